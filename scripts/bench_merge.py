"""Time and memory of merging, against a plain copy of the same bytes and against mergekit.

    python scripts/bench_merge.py [--folder DIR] [--mergekit PATH/TO/mergekit-yaml] [--out FILE]

Makes a base and three fine-tuned models in the shapes of Qwen3 (vocabulary 151936, width 1024, 14
layers, tied embedding: 332 M parameters, 633 MiB in bfloat16), merges them by each method in a
process of its own, and prints wall time, CPU time and peak memory (`ru_maxrss`). `--scale 10`
makes the models about ten times larger by repeating layers, to see that memory stays.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, WIDTH, HEADS, KV_HEADS, HEAD_DIM, D_FF, LAYERS = 151936, 1024, 16, 8, 128, 2048, 14
NAMES = ("base", "math", "code", "chat")
METHODS = {
    "linear": ("base math code chat", {"weight": 0.25}, {}),
    "task_arithmetic": ("math code chat", {"weight": 0.4}, {}),
    "ties": ("math code chat", {"weight": 0.5, "density": 0.5}, {}),
    "dare_ties": ("math code chat", {"weight": 0.5, "density": 0.5}, {}),
    "slerp": ("base math", {}, {"t": 0.4}),
    "karcher": ("base math code chat", {}, {}),
}
"""Models that take part, parameters of each, parameters of the whole."""
COPY = """
import os, sys
import numpy as np
buffer = np.empty(1 << 20, np.uint8)
sink = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for number, path in enumerate(sys.argv[2:]):
    source = os.open(path, os.O_RDONLY)
    while count := os.readv(source, [buffer]):
        if not number:
            os.write(sink, buffer[:count])
os.fsync(sink)
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen3 with a tied embedding."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for n in range(layers):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "mlp.down_proj": (WIDTH, D_FF),
            "mlp.gate_proj": (D_FF, WIDTH),
            "mlp.up_proj": (D_FF, WIDTH),
            "post_attention_layernorm": (WIDTH,),
            "self_attn.k_norm": (HEAD_DIM,),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
            "self_attn.q_norm": (HEAD_DIM,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
        }.items():
            found[f"model.layers.{n}.{name}.weight"] = shape
    return found | {"model.norm.weight": (WIDTH,)}


def make_models(folder: Path, layers: int) -> None:
    """Random weights, the tuned models a tenth away from the base; kept if already there."""
    wanted = shapes(layers)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": D_FF,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "layer_types": ["full_attention"] * layers,
    }
    for seed, name in enumerate(NAMES):
        path = folder / name
        if (path / "config.json").is_file():
            continue
        path.mkdir(parents=True, exist_ok=True)
        print(f"making {path}", file=sys.stderr)
        header, place = {"__metadata__": {"format": "pt"}}, 0
        for tensor, shape in wanted.items():
            end = place + 2 * int(np.prod(shape))
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
            place = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path / "model.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            base, tuned = np.random.default_rng(0), np.random.default_rng(seed)
            for shape in wanted.values():
                left = int(np.prod(shape))
                while left:
                    count = min(left, 1 << 20)
                    values = 0.02 * base.standard_normal(count, np.float32)
                    if seed:
                        values += 0.002 * tuned.standard_normal(count, np.float32)
                    file.write(values.astype(ml_dtypes.bfloat16).tobytes())
                    left -= count
        (path / "config.json").write_text(json.dumps(config))


def write_config(folder: Path, method: str) -> Path:
    """The mergekit configuration of one method."""
    models, each, whole = METHODS[method]
    value: dict = {"merge_method": method, "dtype": "bfloat16"}
    value["models"] = [
        {"model": str(folder / name)} | ({"parameters": each} if each else {})
        for name in models.split()
    ]
    if method not in ("linear", "karcher"):
        value["base_model"] = str(folder / "base")
    if whole:
        value["parameters"] = whole
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(value, indent=1))  # JSON is YAML
    return path


def measure(command: list[str]) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak bytes of a process, or an error with its last words."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            words = output.read().decode(errors="replace").strip().splitlines()
            raise SystemExit(f"{' '.join(command)} failed: {words[-1] if words else ''}")
    # ru_maxrss of a child that Popen made by vfork starts from its own pages, in KiB on Linux.
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median of each measure over the runs, but the largest peak."""
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return found | {"peak": max(run["peak"] for run in runs)}


def main() -> None:
    """Make the models, run everything, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the models are, or are made and kept")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=3, help="runs of each; medians are printed")
    parser.add_argument("--scale", type=int, default=1, help="size of the models, times 332 M")
    parser.add_argument("--jobs", help="threads, for merge.py")
    parser.add_argument("--mergekit", help="path of mergekit-yaml, run side by side")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="bench-merge-"))
    # The embedding stays the largest tensor; layers of 12.6 M parameters make up the rest.
    layers = LAYERS + round((arguments.scale - 1) * 331.8 / 12.6)
    results = {}
    try:
        make_models(folder, layers)
        inputs = {name: str(folder / name / "model.safetensors") for name in NAMES}
        for method in arguments.methods:
            models = dict.fromkeys(METHODS[method][0].split())
            if method not in ("linear", "karcher"):
                models = dict.fromkeys(["base", *models])
            config, out = write_config(folder, method), folder / "merged"
            copied = [str(folder / "copied"), *(inputs[name] for name in models)]
            ours = [sys.executable, str(ROOT / "scripts/merge.py"), str(config), str(out)]
            commands = {
                "copy": [sys.executable, "-c", COPY, *copied],
                "ours": [*ours, "--quiet", *(["--jobs", arguments.jobs] if arguments.jobs else [])],
            }
            if arguments.mergekit:
                commands["mergekit"] = [arguments.mergekit, str(config), str(out)]
                commands["mergekit"] += ["--no-write-model-card", "--no-copy-tokenizer"]
            runs: dict[str, list] = {name: [] for name in commands}
            for _ in range(arguments.repeat):  # interleaved: disturbances meet all of them
                for name, command in commands.items():
                    shutil.rmtree(out, ignore_errors=True)
                    runs[name].append(measure(command))
            (folder / "copied").unlink()
            results[method] = {name: median(each) for name, each in runs.items()}
            for name, each in results[method].items():
                print(
                    f"{method:16s} {name:9s} {each['wall']:7.2f} s wall {each['cpu']:7.2f} s CPU "
                    f"{each['peak'] / 1e6:6.0f} MB peak "
                    f"{each['wall'] / results[method]['copy']['wall']:6.2f} x copy",
                    flush=True,
                )
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            shutil.rmtree(folder / "merged", ignore_errors=True)
    if arguments.out:
        machine = {"cores": os.cpu_count(), "platform": platform.platform()}
        record = {"machine": machine, "repeat": arguments.repeat, "layers": layers}
        arguments.out.write_text(json.dumps(record | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
