"""`train.py RECIPE --dotted.field value ...`: parse, train, print."""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm import exit_codes
from lm.cli.args import parse_run
from lm.config import ConfigError
from lm.host import use_huge_pages

_STOPPED = (exit_codes.PREEMPTED, exit_codes.INTERRUPTED)
_ADVICE = "once the cause is removed, the same command with --resume continues from there"


def entry() -> None:
    """The command: `main` in a process whose malloc uses huge pages (`lm.host`)."""
    use_huge_pages()
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; exits with one of `lm.exit_codes`."""
    config = parse_run(argv)
    from lm import distributed, xla_flags
    from lm.train.checkpoint import CheckpointError
    from lm.train.loop import Diverged, Stopped, train

    code, alone = exit_codes.OK, False
    try:
        # While no part of JAX has read its environment.
        for name, words in xla_flags.apply(config.flags)["added"].items():
            added = f"{name} += {' '.join(words)} (--flags off adds none)"
            print(f"{os.path.basename(sys.argv[0])}: {added}", file=sys.stderr)
        distributed.initialize()
        summary = train(config)
        if summary:
            show(summary)
    except ConfigError as error:
        code = fail(exit_codes.USAGE, error)
    except distributed.ClusterError as error:
        code = fail(exit_codes.CLUSTER, error)
    except Diverged as error:
        code = fail(exit_codes.DIVERGED, error)
    except Stopped as error:
        interrupted = error.signal is signal.SIGINT
        code = exit_codes.INTERRUPTED if interrupted else exit_codes.PREEMPTED
        fail(code, error)
    except KeyboardInterrupt:
        alone = True
        code = fail(exit_codes.INTERRUPTED, "interrupted; the last checkpoint holds what was saved")
    except CheckpointError as error:
        code = fail(exit_codes.STORAGE, f"{error}; {_ADVICE}")
    except OSError as error:
        from lm.files import explain_os_error

        alone = True
        where = f"{error.filename}: " if error.filename else ""
        code = fail(exit_codes.STORAGE, f"{where}{explain_os_error(error)}; {_ADVICE}")
    except Exception:
        import traceback

        alone = True
        traceback.print_exc()
        code = exit_codes.FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    if alone and distributed.several():
        # The other processes know nothing of it: they stop when this one is gone, for which JAX
        # would wait minutes at its exit.
        os._exit(code)
    raise SystemExit(code)


def show(summary: dict[str, Any]) -> None:
    """Print a sample of generated text, then the summary."""
    from lm.train.summary import render_summary

    sample = summary["paths"].get("sample")
    if sample:
        print(f"{Path(sample).read_text().rstrip()}\n{'-' * 72}")
    print(render_summary(summary), end="")


def fail(code: int, message: object) -> int:
    """Print one line on stderr and return `code`."""
    program = os.path.basename(sys.argv[0])
    print(f"{program}: {'' if code in _STOPPED else 'error: '}{message}", file=sys.stderr)
    return code
