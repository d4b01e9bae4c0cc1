"""The commands beside merge.py: extract_lora.py, upcycle.py, evolve_merge.py and align.py."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lm import exit_codes
from lm.cli.merge import Parser, byte_size, explained, prepare_process, whole_number

__all__ = ["align", "evolve", "extract_lora", "upcycle"]

CODES = """\
OUT must not exist, or be empty. Exit codes: 0 done, 2 something given cannot work, 4 a file cannot
be read or written, 130 interrupted."""


def extract_lora(argv: Sequence[str] | None = None) -> NoReturn:
    """`extract_lora.py BASE TUNED OUT`: a LoRA adapter out of a fine-tuned model."""
    parser = _new("extract_lora.py", "Extract a LoRA adapter from a fine-tuned model.", CODES)
    add = parser.add_argument
    add("base", metavar="BASE", help="the model that was fine-tuned")
    add("tuned", metavar="TUNED", help="the fine-tuned model")
    add("out", metavar="OUT", type=Path, help="folder of the adapter")
    add("--max-rank", type=int, help="largest rank (default 128; no limit with --energy alone)")
    add("--energy", type=float, help="share of each squared difference to keep, such as 0.95")
    add("--embeddings", choices=("whole", "lora", "skip"), default="whole")
    add("--include", metavar="REGEX", default="", help="only modules with such a name")
    add("--exclude", metavar="REGEX", help="no modules with such a name")
    add("--save-whole", metavar="MODULE", nargs="+", default=(), help="not as factors")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--seed", type=int, default=0, help="of the randomized decompositions (default 0)")
    arguments = parser.parse_args(argv)

    def run(say: Callable[[str], None]) -> None:
        from lm.merging import extract_lora as tool

        max_rank = arguments.max_rank
        if max_rank is None and arguments.energy is None:
            max_rank = 128
        settings = tool.Extraction(
            max_rank=max_rank,
            energy=arguments.energy,
            embeddings=arguments.embeddings,
            include=arguments.include,
            exclude=arguments.exclude,
            save_whole=tuple(arguments.save_whole),
            dtype=arguments.dtype,
            seed=arguments.seed,
        )
        tool.extract_lora(arguments.base, arguments.tuned, arguments.out, settings, say)

    _leave(parser.prog, arguments, run)


def upcycle(argv: Sequence[str] | None = None) -> NoReturn:
    """`upcycle.py CONFIG.yml OUT`: a mixture of experts out of dense models."""
    notes = "CONFIG.yml is a configuration of mergekit-moe. " + CODES
    parser = _new("upcycle.py", "Make a mixture of experts out of dense models.", notes)
    add = parser.add_argument
    add("config", metavar="CONFIG.yml", type=Path, help="the experts, and what routes to them")
    add("out", metavar="OUT", type=Path, help="folder of the mixture")
    add("--seed", type=int, default=0, help="of random routers and noise (default 0)")
    add("--out-shard-size", metavar="SIZE", type=byte_size, default=5 * 10**9, help="default 5GB")
    arguments = parser.parse_args(argv)

    def run(say: Callable[[str], None]) -> None:
        from lm.merging.upcycle import upcycle as make
        from lm.merging.upcycle_config import load_moe_config

        config = load_moe_config(arguments.config)
        size = arguments.out_shard_size
        make(config, arguments.out, seed=arguments.seed, shard_size=size, say=say)

    _leave(parser.prog, arguments, run)


def evolve(argv: Sequence[str] | None = None) -> NoReturn:
    """`evolve_merge.py TEMPLATE.yml OUT --command '...'`: search a merge's coefficients."""
    notes = (
        "TEMPLATE.yml is a merge configuration with {search: [low, high]} in place of numbers. "
        'The last line of the command\'s output is the score: a number or {"score": number}. '
        "After an interruption the same command continues. " + CODES
    )
    parser = _new("evolve_merge.py", "Search a merge's coefficients by CMA-ES.", notes)
    add = parser.add_argument
    add("template", metavar="TEMPLATE.yml", type=Path)
    add("out", metavar="OUT", type=Path, help="folder of the log and of best.yml")
    add("--command", required=True, help="evaluates the model in {model}; no shell runs it")
    add("--budget", type=int, default=100, help="merges to be evaluated in all (default 100)")
    add("--population", type=int, help="per generation (default 4 + 3 ln(number of values))")
    add("--minimize", action="store_true", help="the score is a loss")
    add("--timeout", metavar="SECONDS", type=float, help="of one evaluation")
    add("--seed", type=int, default=0, help="of search and merges (default 0)")
    add("--flavor", choices=("paper", "mergekit"), help="reading of methods that have two")
    add("--jobs", type=whole_number, help="threads of a merge (default: the number of cores)")
    add("--quiet", action="store_true", help="no line per candidate")
    arguments = parser.parse_args(argv)

    def run(say: Callable[[str], None]) -> None:
        prepare_process()
        from lm.merging.evolve import Search
        from lm.merging.evolve import evolve as search

        names = ("command", "budget", "seed", "population", "minimize", "timeout", "flavor")
        settings = {name: getattr(arguments, name) for name in names}
        jobs = arguments.jobs or len(os.sched_getaffinity(0))
        best = search(arguments.template, arguments.out, Search(**settings, jobs=jobs), say)
        print(f"best score {best['score']:.8g}: {arguments.out / 'best.yml'}")

    _leave(parser.prog, arguments, run)


def align(argv: Sequence[str] | None = None) -> NoReturn:
    """`align.py REFERENCE MODEL OUT`: git re-basin by weight matching."""
    text = (
        "Permute the hidden units, heads and value channels of MODEL to match REFERENCE (git "
        "re-basin by weight matching). The output computes what MODEL computes; merge it with "
        "REFERENCE in place of MODEL."
    )
    parser = _new("align.py", text, CODES)
    add = parser.add_argument
    add("reference", metavar="REFERENCE", help="stays as it is")
    add("model", metavar="MODEL", help="is permuted")
    add("out", metavar="OUT", type=Path, help="folder of the permuted model")
    add("--out-shard-size", metavar="SIZE", type=byte_size, default=5 * 10**9, help="default 5GB")
    arguments = parser.parse_args(argv)

    def run(say: Callable[[str], None]) -> None:
        from lm.merging.rebasin import align as permute

        size = arguments.out_shard_size
        permute(arguments.reference, arguments.model, arguments.out, shard_size=size, say=say)

    _leave(parser.prog, arguments, run)


def _new(name: str, description: str, notes: str) -> Parser:
    program = Path(sys.argv[0]).name or name
    return Parser(prog=program, description=description, epilog=notes, allow_abbrev=False)


def _leave(
    program: str, arguments: argparse.Namespace, run: Callable[[Callable[[str], None]], None]
) -> NoReturn:
    """Run, and leave the process with one of `lm.exit_codes`."""
    quiet = getattr(arguments, "quiet", False)
    code = exit_codes.OK
    try:
        run(lambda line: None if quiet else print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        code = exit_codes.INTERRUPTED
    except Exception as error:
        if os.environ.get("ANISO_TRACEBACK"):
            raise
        code, message = explained(error)
        print(f"{program}: error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code)
