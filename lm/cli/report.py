"""`report.py RUN... [--output FILE]`: one HTML page on a run, or on several together."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lm import exit_codes
from lm.config import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page and print where it is; exits with one of `lm.exit_codes`."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name or "report.py",
        description="One self-contained HTML page on a run: where its time went, its curves, its "
        "settings. Several runs are laid over each other. Runs that are still going on, were "
        "resumed or killed are fine.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a metrics.jsonl")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="the page; default RUN/report.html, and report.html here for several runs",
    )
    options = parser.parse_args(argv)
    from lm.files import explain_os_error
    from lm.train.page import write_page

    first = Path(options.runs[0])
    folder = first if len(options.runs) == 1 and first.is_dir() else Path()
    output = Path(options.output) if options.output else folder / "report.html"
    try:
        write_page(options.runs, output)
    except ConfigError as error:
        refuse(parser.prog, exit_codes.USAGE, str(error))
    except OSError as error:
        refuse(parser.prog, exit_codes.STORAGE, f"{output}: {explain_os_error(error)}")
    print(output)


def refuse(program: str, code: int, message: str) -> None:
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(code)
