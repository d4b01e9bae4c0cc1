"""Time to load a Hugging Face checkpoint against that of reading its bytes.

    python scripts/bench_load.py [--out FILE.md]

A Llama of about `--gigabytes` of random weights is written once. A process of its own then takes
turns, with the files in the page cache: all bytes are read into fresh memory (`readinto`, one file
after the other, by as many threads as loading uses), and `lm.hf.load` makes parameters of them.
The memory of each is given back before the next begins, so that all of them start with pages that
the system has to clear. The first turn is not counted: a virtual machine gets memory that it has
not used for seconds from its host, at a tenth of the usual speed, and a first load traces the model
(0.04 s). With `--cold` the files are dropped from the page cache before each measurement, so both
read them from the disk, as the first load does. Medians, quartiles in brackets, and the peak of
memory of a process that only loads, above what it was before.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lm.files import atomic_write_text

CHILD = """
import concurrent.futures, json, os, re, sys, time
from pathlib import Path
what, folder, cold, rounds = *sys.argv[1:4], int(sys.argv[4])
files = sorted(Path(folder).glob("*.safetensors"))
import jax, numpy as np
from lm import hf
jax.block_until_ready(jax.numpy.zeros(1))
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def read():
    def some(job):
        path, start, view = job
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while len(view):
                view = view[file.readinto(view[:1 << 20]):]
    jobs = []
    for path in files:
        view, size = memoryview(np.empty(path.stat().st_size, np.uint8)), path.stat().st_size
        cuts = [size * i // 8 for i in range(9)]
        jobs += [(path, a, view[a:b]) for a, b in zip(cuts, cuts[1:])]
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        list(pool.map(some, jobs))
    return jobs
def load():
    return jax.block_until_ready(hf.load(folder)[1])
def drop():
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before, seconds = peak(), []
for _ in range(rounds):
    for work in (load,) if what == "peak" else (read, load):
        if cold == "cold":
            drop()
        began = time.perf_counter()
        kept = work()
        seconds.append(time.perf_counter() - began)
        del kept
print(json.dumps({"seconds": seconds, "peak": peak() - before}))
"""


def write(folder: str, dtype: str, gigabytes: float) -> int:
    """The checkpoint; returns its bytes."""
    import dataclasses

    import jax

    import lm
    from lm import hf

    size = 2 if dtype == "bfloat16" else 4
    width, vocabulary = 1024, 32_000
    layer = 4 * width**2 + 3 * width * 2752
    count = max(1, round((gigabytes * 1e9 / size - vocabulary * width) / layer))
    config = lm.ModelConfig(
        vocab_size=vocabulary,
        num_layers=count,
        d_model=width,
        num_heads=16,
        d_ff=2752,
        tie_embeddings=True,
    )
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    hf.save(folder, config, lm.init(config, jax.random.key(0)))
    os.sync()  # or the disk is still at it when the first measurements begin
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def measure(what: str, folder: str, cold: bool, rounds: int) -> dict:
    words = [what, folder, "cold" if cold else "cached", str(rounds)]
    command = [sys.executable, "-c", CHILD, *words]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="read from the disk each time")
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    lines = [
        "| stored as | GB | read s | load s | load over read | peak of load, bytes over file |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for dtype in arguments.dtypes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(Path(scratch) / "model")
            size = write(folder, dtype, arguments.gigabytes)
            share = measure("peak", folder, arguments.cold, 1)["peak"] / size
            both = measure("both", folder, arguments.cold, arguments.rounds + 1)["seconds"][2:]
        read, load = both[::2], both[1::2]
        ratios = sorted(b / a for a, b in zip(read, load, strict=True))
        quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        lines.append(
            f"| {dtype} | {size / 1e9:.2f} | {statistics.median(read):.2f} |"
            f" {statistics.median(load):.2f} | {statistics.median(ratios):.2f}"
            f" ({quartiles[0]:.2f} to {quartiles[1]:.2f}) | {share:.2f} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        head = [
            "# Speed of loading",
            "",
            f"    python scripts/bench_load.py --rounds {arguments.rounds}"
            + " --cold" * arguments.cold,
            "",
            f"{os.cpu_count()} cores, files "
            + ("on the disk" if arguments.cold else "in the page cache")
            + f", {datetime.date.today()}; medians of"
            f" {arguments.rounds} (quartiles).",
            "",
        ]
        atomic_write_text(arguments.out, "\n".join(head + lines) + "\n")


if __name__ == "__main__":
    main()
