"""Running a command in this process."""

import pytest


@pytest.fixture
def run_command(capsys):
    """run_command(main, *words) -> (exit code, stdout, stderr)."""

    def call(main, *words):
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
