"""`merge.py CONFIG.yml OUT`: merge checkpoints by a configuration in mergekit's format.

JAX is not imported here, nor anything that imports it, unless --device or an Orbax checkpoint asks
for it: the command answers in a fraction of a second.
"""

import argparse
import ctypes
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lm import exit_codes
from lm.config import ConfigError

__all__ = ["main", "run"]

NOTES = """\
CONFIG.yml is a configuration of mergekit; models are paths of local folders, path+adapter merges a
LoRA adapter in. Several documents in the file, with names, are stages as for mergekit-multi. OUT
must not exist, or be empty. After an interruption the same command with --resume continues, with
the same result to the last bit. Exit codes: 0 done, 2 something given cannot work, 4 a file cannot
be read or written, 130 interrupted."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(match[1].split("=")[0], flags, 1)
            message = f"unknown flag {match[1]}" + (f": did you mean {near[0]}?" if near else "")
        self.exit(exit_codes.USAGE, f"{self.prog}: error: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave the process with one of `lm.exit_codes`."""
    program = Path(sys.argv[0]).name or "merge.py"
    arguments = _parser(program).parse_args(argv)
    try:
        code = run(arguments)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted; --resume continues", file=sys.stderr)
        code = exit_codes.INTERRUPTED
    except Exception as error:
        if os.environ.get("ANISO_TRACEBACK"):
            raise
        code, message = explained(error)
        print(f"{program}: error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code)


def explained(error: Exception) -> tuple[int, str]:
    from lm.files import explain_os_error
    from lm.merging.types import StorageError

    text = str(error).strip()
    if isinstance(error, StorageError):
        return exit_codes.STORAGE, text
    if isinstance(error, ConfigError):
        return exit_codes.USAGE, text
    if isinstance(error, OSError):
        return exit_codes.STORAGE, explain_os_error(error)
    kind = type(error).__name__
    first = text.splitlines()[0] if text else ""
    return exit_codes.FAILED, f"{kind}: {first} (set ANISO_TRACEBACK=1 to see where)"


def _parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        description="Merge checkpoints by a configuration in mergekit's format.",
        epilog=NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("config", metavar="CONFIG.yml", type=Path, help="what to merge, and how")
    add("out", metavar="OUT", type=Path, help="folder of the merged model")
    add("--dry-run", action="store_true", help="show what would be done; write nothing")
    add("--resume", action="store_true", help="continue an interrupted merge in OUT")
    add("--report", action="store_true", help="write report.json and report.html to OUT")
    add("--report-dir", metavar="FOLDER", type=Path, help="the same to another folder")
    add("--intermediate-dir", metavar="FOLDER", type=Path, help="keep the stages' results there")
    add("--max-memory", metavar="SIZE", type=byte_size, help="such as 600MB (default: half of RAM)")
    add("--out-shard-size", metavar="SIZE", type=byte_size, default=5 * 10**9, help="default 5GB")
    add("--seed", type=int, default=0, help="of the methods that draw random numbers (default 0)")
    add("--flavor", choices=("paper", "mergekit"), help="reading of methods that have two")
    add("--device", metavar="KIND", choices=("cpu", "gpu", "cuda", "tpu"), help="compute by JAX")
    add("--jobs", type=whole_number, help="threads (default: the number of cores)")
    add("--out-format", choices=("safetensors", "orbax"), default="safetensors")
    add("--allow-nonfinite", action="store_true", help="merge NaN and infinity, do not stop")
    add("--quiet", action="store_true", help="no progress, no summary")
    return parser


def byte_size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    number = 0.0
    if match:
        base = 1024 if match[3] else 1000
        number = float(match[1]) * base ** " KMGT".index(match[2].upper() or " ")
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 600MB or 5GB")
    return int(number)


def whole_number(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of threads")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; gives the exit code.

    Raises:
      ConfigError, OSError: one clear line.
    """
    prepare_process()
    # Imported after the process is prepared: NumPy reads the environment when it is loaded.
    from lm.merging.adaptive.config import adaptive_method
    from lm.merging.session import Session
    from lm.merging.stages import read_stages

    say = _silent if arguments.quiet else _say
    progress = None if arguments.quiet else sys.stderr
    resume, intermediate = arguments.resume, arguments.intermediate_dir

    def make(config: Any, out: Path, final: bool = True, open_stores: Any = None) -> Session:
        return Session(
            config,
            out,
            seed=arguments.seed,
            flavor=arguments.flavor,
            shard_size=arguments.out_shard_size,
            jobs=arguments.jobs or _cores(),
            max_memory=arguments.max_memory,
            device=arguments.device,
            out_format=arguments.out_format if final else "safetensors",
            allow_nonfinite=arguments.allow_nonfinite,
            stores=open_stores,
            say=say,
        )

    if adaptive_method(arguments.config) is not None:
        return _run_adaptive(arguments, say)
    report = _reporter(arguments, say)
    stages = read_stages(arguments.config)
    if stages is None:
        if intermediate is not None:
            raise ConfigError(f"--intermediate-dir: {arguments.config} holds a single merge")
        session = make(arguments.config, arguments.out)
        if arguments.dry_run:
            print(session.describe(resume))
        else:
            session.run(resume, progress)
        report(session)
        return exit_codes.OK
    from lm.merging.multi import describe_stages, finished, run_stages

    options = f"{arguments.seed} {arguments.flavor} {arguments.device}"
    if arguments.dry_run:
        text, session = describe_stages(
            stages, arguments.out, make, intermediate=intermediate, resume=resume
        )
        print(text)
        if session is not None:
            report(session)
    elif resume and finished(stages, arguments.out, intermediate, options):
        say(f"{arguments.out} is already complete: nothing to do")
    else:
        run_stages(
            stages,
            arguments.out,
            make,
            options=options,
            intermediate=intermediate,
            resume=resume,
            progress=progress,
            say=say,
            after=report,
        )
    return exit_codes.OK


def _run_adaptive(arguments: argparse.Namespace, say: Callable[[str], None]) -> int:
    """A method that learns from text (docs/adaptive_merging.md)."""
    from lm.merging.adaptive.session import AdaptiveSession

    unfit = {
        "--report": arguments.report,
        "--report-dir": arguments.report_dir,
        "--intermediate-dir": arguments.intermediate_dir,
        "--flavor": arguments.flavor,
        "--max-memory": arguments.max_memory,
        "--out-format": arguments.out_format != "safetensors",
        "--allow-nonfinite": arguments.allow_nonfinite,
    }
    for flag, value in unfit.items():
        if value:
            raise ConfigError(f"{flag} is for static methods: this one learns from text")
    session = AdaptiveSession(
        arguments.config,
        arguments.out,
        seed=arguments.seed,
        shard_size=arguments.out_shard_size,
        jobs=arguments.jobs or _cores(),
        device=arguments.device,
        say=say,
    )
    if arguments.dry_run:
        print(session.describe(arguments.resume))
    else:
        session.run(arguments.resume)
    return exit_codes.OK


def _reporter(arguments: argparse.Namespace, say: Callable[[str], None]) -> Callable[[Any], None]:
    """What makes the report of a session that was described or run; does nothing unless asked."""
    if not arguments.report and arguments.report_dir is None:
        return lambda _: None
    from lm.merging import report
    from lm.merging.store import open_store

    if arguments.report_dir is not None:
        report.check_report(arguments.report_dir, arguments.resume)
    folder = arguments.report_dir or (None if arguments.dry_run else arguments.out)

    def make(session: Any) -> None:
        result = None if arguments.dry_run else open_store(str(arguments.out))
        found = report.describe(session.plan, session.stores, result, session.jobs)
        if arguments.dry_run:
            print(report.summary(found))
        if folder is not None:
            report.write_report(found, folder)
            say(f"report: {folder / 'report.html'}")

    return make


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _silent(_: str) -> None:
    pass


def prepare_process() -> None:
    """Let threads multiply matrices one each, and let freed memory stay with the process."""
    # Several threads within one product would share its sums out differently: other last bits.
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    try:
        import resource  # not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (ImportError, OSError, ValueError):
        pass  # all shards of all models are open at once: many of them may then be too many
    if sys.platform.startswith("linux"):
        try:
            library: Any = ctypes.CDLL(None)
            # Arrays of a block are made and freed thousands of times: without this the C library
            # gives their pages back each time, and the system clears them again.
            library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
            library.mallopt(-1, 1 << 26)  # M_TRIM_THRESHOLD
        except (OSError, AttributeError):
            pass  # another C library; only slower
