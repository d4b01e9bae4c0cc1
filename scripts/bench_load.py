"""Time to load a Hugging Face checkpoint against that of reading its bytes.

    python scripts/bench_load.py [--out FILE.md]

A Llama of about `--gigabytes` of random weights is written once. Then, in turn and with the files
in the page cache: all bytes are read into fresh memory (`readinto`, one file after the other, by
as many threads as loading uses), and `lm.hf.load` makes parameters of them. Each measurement is a
process of its own, because memory that it used before is cheaper than fresh one. A loader's time
does not count imports. With `--cold` the files are dropped from the page cache before each
measurement, so both read them from the disk, as the first load does. Medians, quartiles in
brackets, and the peak of the process's memory above what it was before.
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
import concurrent.futures, json, mmap, os, re, sys, time
from pathlib import Path
what, folder, first = sys.argv[1:]
files = sorted(Path(folder).glob("*.safetensors"))
import jax, numpy as np
from lm import hf
jax.block_until_ready(jax.numpy.zeros(1))
# A virtual machine gets memory that it has not used for seconds from its host, at a tenth of the
# usual speed: use as much as will be needed, and give it back to this machine's kernel.
size = sum(path.stat().st_size for path in files) * 3 // 2
if first != "first":
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:
        room.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(room, np.uint8)[::4096] = 1
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before, began = peak(), time.perf_counter()
if what == "read":
    def read(job):
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
        list(pool.map(read, jobs))
else:
    jax.block_until_ready(hf.load(folder)[1])
print(json.dumps([time.perf_counter() - began, peak() - before]))
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


def drop(folder: str) -> None:
    """Let the kernel forget the files' contents."""
    for path in Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


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
            seconds, share = {"read": [], "load": []}, 0.0
            for turn in range(arguments.rounds + 1):
                for what, found in seconds.items():
                    if arguments.cold:
                        drop(folder)
                    which = "later" if turn else "first"
                    command = [sys.executable, "-c", CHILD, what, folder, which]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    value, peak = json.loads(out.splitlines()[-1])
                    if turn:
                        found.append(value)
                    elif what == "load":  # the first fills the page cache, and tells the peak
                        share = peak / size
        ratios = sorted(b / a for a, b in zip(seconds["read"], seconds["load"], strict=True))
        quartiles = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        lines.append(
            f"| {dtype} | {size / 1e9:.2f} | {statistics.median(seconds['read']):.2f} |"
            f" {statistics.median(seconds['load']):.2f} | {statistics.median(ratios):.2f}"
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
