"""Memory of a merge that learns: eight experts of a Llama of 331 M parameters, in bfloat16.

    python scripts/bench_merging_memory.py [--folder DIR] [--method adamerging] [--experts 8]
        [--steps 2] [--batch-size 1] [--sequence-length 32] [--untied] [--tiny] [--out FILE]

Writes a base and experts with random weights (tied embedding of 128,256 words, or two matrices of
32,000 with --untied), merges them in a process of its own, and follows that process through
/proc: its greatest resident memory above that of a process that has imported JAX and compiled
something. One expert's file is the unit. --folder keeps the models for another run (6 GB).
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
IDLE = """
import jax, jax.numpy as jnp, lm.hf, time
jax.jit(lambda x: x @ x)(jnp.ones((64, 64))).block_until_ready()
print("ready", flush=True)
time.sleep(60)
"""


def config_of(untied: bool, tiny: bool):
    import lm

    shape = {"d_model": 1024, "num_heads": 16, "num_kv_heads": 8, "max_context": 1024}
    shape |= {"num_layers": 24, "d_ff": 2576, "vocab_size": 32_000, "tie_embeddings": False}
    if not untied:
        shape |= {"num_layers": 16, "d_ff": 3040, "vocab_size": 128_256, "tie_embeddings": True}
    if tiny:
        shape |= {"d_model": 64, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "d_ff": 96}
    return lm.ModelConfig(**shape, dtype="bfloat16", param_dtype="bfloat16")


def make_models(folder: Path, config, experts: int) -> None:
    """Random weights, the experts a tenth away from the base; kept if they are already there."""
    import jax

    import lm.hf
    from lm import model

    shapes = model.abstract_params(config)
    for number, name in enumerate(["base", *(f"expert-{n}" for n in range(experts))]):
        if (folder / name / "config.json").is_file():
            continue
        base, own = np.random.default_rng(0), np.random.default_rng([1, number])

        def values(leaf, base=base, own=own, number=number):
            size = int(np.prod(leaf.shape))
            found = np.empty(size, ml_dtypes.bfloat16)
            for start in range(0, size, 1 << 22):
                count = min(size - start, 1 << 22)
                part = 0.02 * base.standard_normal(count, np.float32)
                if number:
                    part += 0.002 * own.standard_normal(count, np.float32)
                found[start : start + count] = part
            return found.reshape(leaf.shape)

        lm.hf.save(folder / name, config, jax.tree.map(values, shapes), "byte")
        text = np.random.default_rng([2, number]).integers(32, 127, 20_000, np.uint8)
        (folder / f"{name}.txt").write_bytes(text.tobytes())


def write_config(folder: Path, args: argparse.Namespace) -> Path:
    parameters = {"examples": 16, "sequence_length": args.sequence_length}
    parameters["batch_size"] = args.batch_size
    if args.method not in ("regmean", "regmean++", "fisher"):
        parameters["steps"] = args.steps
    if args.method == "fisher":
        parameters.pop("batch_size")
    value = {
        "merge_method": args.method,
        "models": [
            {"model": str(folder / f"expert-{n}"), "data": str(folder / f"expert-{n}.txt")}
            for n in range(args.experts)
        ],
        "parameters": parameters,
    }
    if args.method not in ("regmean", "regmean++", "fisher"):
        value["base_model"] = str(folder / "base")
    path = folder / f"{args.method}.yml"
    path.write_text(json.dumps(value))
    return path


def memory(pid: int) -> dict[str, int]:
    """Bytes of VmHWM, VmRSS, RssAnon and RssFile; empty when the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = re.findall(r"^(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB", text, re.M)
    return {name: 1024 * int(value) for name, value in found}


def idle() -> int:
    """Peak bytes of a process that does nothing with what it imported."""
    process = subprocess.Popen([sys.executable, "-c", IDLE], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    found = memory(process.pid)
    process.kill()
    process.wait()
    return found["VmHWM"]


def follow(command: list[str]) -> tuple[float, int, list[dict]]:
    """(seconds, peak bytes, points of time with the bytes then) of a command that must succeed."""
    began, points, peak = time.monotonic(), [], 0
    process = subprocess.Popen(command, cwd=ROOT)
    while process.poll() is None:
        if now := memory(process.pid):
            peak = max(peak, now.get("VmHWM", 0))
            points.append({"seconds": round(time.monotonic() - began, 2)} | now)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - began, peak, points


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder")
    parser.add_argument("--method", default="adamerging")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--untied", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--timeline", help="file for the bytes at every twentieth of a second")
    parser.add_argument("--out", help="file that gets the result as a line of JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(args.untied, args.tiny)
        make_models(folder, config, args.experts)
        unit = (folder / "base" / "model.safetensors").stat().st_size
        quiet = idle()
        out = Path(scratch) / "out"
        script = str(ROOT / "scripts" / "merge.py")
        command = [sys.executable, script, str(write_config(folder, args)), str(out)]
        seconds, peak, points = follow([*command, "--device", "cpu"])
    result = {
        "method": args.method,
        "experts": args.experts,
        "tied": not args.untied,
        "rows_per_task": args.batch_size,
        "sequence_length": args.sequence_length,
        "model_bytes": unit,
        "idle_bytes": quiet,
        "peak_bytes": peak,
        "above_idle_in_models": round((peak - quiet) / unit, 3),
        "seconds": round(seconds, 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    text = json.dumps(result)
    print(text)
    if args.timeline:
        Path(args.timeline).write_text("\n".join(map(json.dumps, points)) + "\n")
    if args.out:
        with open(args.out, "a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
