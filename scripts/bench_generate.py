"""Tokens per second of generation, greedy, against transformers on PyTorch: same weights, same run.

    python scripts/bench_generate.py --peer PYTHON [--out FILE.md]

PYTHON is an interpreter that has torch and transformers. A Llama of `--layers` x `--width` with
random weights is written once by transformers and read by both. Each case is one call with a batch
of prompts of one length and `--new` tokens for each row, prefill included; the prompt lengths
differ, and the programs compiled for the first of a bucket serve the others. Contenders take turns,
after one untimed call of every case; medians, and in brackets the quartiles of the ratio.
"""

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import lm.hf
from lm import generate as g
from lm.files import atomic_write_text

CASES = ((1, 20), (1, 200), (1, 700), (8, 60), (8, 250))
"""(batch, prompt length)"""
PEER = Path(__file__).with_name("bench_generate_torch.py")


@contextlib.contextmanager
def peer(arguments, folder: str, dtype: str):
    """A function case -> answer of the other process, and its versions."""
    command = [arguments.peer, str(PEER), folder, "--dtype", dtype]
    with subprocess.Popen(
        [*command, "--threads", str(os.cpu_count())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def read():
            line = process.stdout.readline()
            if not line:
                raise SystemExit("the peer ended; its message is above")
            return json.loads(line)

        def ask(case):
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            return read()

        yield ask, read()["versions"]
        process.stdin.close()


def ours(config, params, case) -> tuple[float, list]:
    began = time.perf_counter()
    rows = g.generate(
        config,
        params,
        case["prompts"],
        max_tokens=case["new"],
        sampling=g.Sampling(temperature=0),
    )
    tokens = np.stack(list(rows), axis=1)
    return time.perf_counter() - began, tokens.tolist()


def compare(arguments, folder: str, dtype: str) -> tuple[list[str], dict]:
    """Rows of the table for one dtype, and the peer's versions."""
    config, params = lm.hf.load(folder, dtype=dtype)
    params = g.prepare(config, params)
    rng = np.random.default_rng(0)
    cases = [
        dict(prompts=rng.integers(1, config.vocab_size, (b, t)).tolist(), new=arguments.new)
        for b, t in CASES
    ]
    rows = []
    with peer(arguments, folder, dtype) as (ask, versions):
        for case in cases:  # compiles here, warms up there
            mine, theirs = ours(config, params, case)[1], ask(case)["tokens"]
            case["agree"] = np.mean(np.asarray(mine) == np.asarray(theirs))
        programs = g._prefill._cache_size() + g._next._cache_size()
        for (batch, length), case in zip(CASES, cases, strict=True):
            sent = {name: case[name] for name in ("prompts", "new")}
            times = [(ours(config, params, sent)[0], ask(sent)["seconds"])
                     for _ in range(arguments.rounds)]  # fmt: skip
            a, b = (statistics.median(t) for t in zip(*times, strict=True))
            ratios = sorted(theirs / mine for mine, theirs in times)
            low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            count, ratio = batch * arguments.new, statistics.median(ratios)
            rows.append(
                f"| {dtype} | {batch} | {length} | {count / a:.1f} | {count / b:.1f} |"
                f" {ratio:.2f} ({low:.2f} to {high:.2f}) | {case['agree']:.0%} |"
            )
            print(rows[-1], flush=True)
    assert programs == g._prefill._cache_size() + g._next._cache_size(), "recompiled"
    return rows, versions


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, help="a Python with torch and transformers")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    lines = [
        "| dtype | batch | prompt | tokens/s | transformers | ratio | equal tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        size = ["--layers", str(arguments.layers), "--width", str(arguments.width)]
        subprocess.run([arguments.peer, str(PEER), folder, "--make", *size], check=True)
        versions = {}
        for dtype in arguments.dtypes:
            rows, versions = compare(arguments, folder, dtype)
            lines += rows
    head = [
        "# Speed of generation",
        "",
        "    python scripts/bench_generate.py --peer PYTHON"
        f" --new {arguments.new} --rounds {arguments.rounds}",
        "",
        f"JAX {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores; torch"
        f" {versions['torch']}, transformers {versions['transformers']}; {datetime.date.today()}."
        f" Llama, {arguments.layers} x {arguments.width}, vocabulary 32000, tied; {arguments.new}"
        " new tokens a row, greedy, prefill included; medians (quartiles of the ratio).",
        "",
    ]
    if arguments.out:
        atomic_write_text(arguments.out, "\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
