"""Speed of a full training step: ours, a bare hand-written JAX loop, transformers on PyTorch.

    python scripts/bench_train.py [--torch-python PYTHON] [--rounds 3] [--json FILE]

All contenders train the same shapes with AdamW and clipping, in turns; medians over the rounds.
--torch-python names an interpreter that has torch and transformers; without it that row is left
out. Rows marked "huge pages" run under GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which train.py sets
for itself (lm/host.py); every contender is measured with it and without.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SHAPE = dict(layers=6, width=256, heads=4, hidden=1024, vocab=4096, length=256, batch=16)


def our_step(shape, dtype, unroll=1):
    """(state, compiled step, batch, seconds of compilation) of the framework's own step."""
    import jax
    import jax.numpy as jnp

    from lm.config import ModelConfig
    from lm.train.config import OptimConfig, RunConfig
    from lm.train.optimizer import make_optimizer
    from lm.train.state import init_state
    from lm.train.step import make_train_step

    model = ModelConfig(
        vocab_size=shape["vocab"],
        num_layers=shape["layers"],
        d_model=shape["width"],
        num_heads=shape["heads"],
        d_ff=shape["hidden"],
        dtype=dtype,
        unroll=unroll,
    )
    config = RunConfig(
        model=model,
        batch_size=shape["batch"],
        sequence_length=shape["length"],
        optim=OptimConfig(learning_rate=1e-3),
    )
    tx, schedule = make_optimizer(config.optim, config.steps)
    state = jax.jit(lambda: init_state(config, tx))()
    batch = random_batch(shape)
    batch |= {
        "segment_ids": jnp.ones_like(batch["tokens"]),
        "positions": jnp.broadcast_to(
            jnp.arange(shape["length"], dtype=jnp.int32)[None], batch["tokens"].shape
        ),
        "weights": jnp.ones(batch["tokens"].shape, jnp.float32),
    }
    return state, *compiled(make_train_step(config, tx, schedule), state, batch), batch


def bare_step(shape, dtype, **variant):
    """The same for scripts/bench_bare.py."""
    import bench_bare
    import jax

    init_state, step = bench_bare.make_step(shape, dtype, **variant)
    state = jax.jit(init_state)(jax.random.key(0))
    batch = random_batch(shape)
    return state, *compiled(step, state, batch), batch


def random_batch(shape):
    import jax
    import jax.numpy as jnp

    size = (shape["batch"], shape["length"] + 1)
    tokens = jax.random.randint(jax.random.key(1), size, 0, shape["vocab"], jnp.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def compiled(step, state, batch):
    import jax

    lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
    began = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - began


def worker(args):
    """One process, one round: every JAX contender in turns; one JSON line each."""
    import jax

    sys.path.insert(0, str(HERE))
    makers = {
        "ours scanned": lambda: our_step(SHAPE, args.dtype),
        "ours unrolled": lambda: our_step(SHAPE, args.dtype, unroll=SHAPE["layers"]),
    }
    variants = [(False, False), (False, True), (True, True)] if args.bare else []
    for scan, custom in variants:
        name = f"bare {'scanned' if scan else 'unrolled'}{', own gradient' if custom else ''}"
        makers[name] = lambda scan=scan, custom=custom: bare_step(
            SHAPE, args.dtype, scan=scan, custom_gradient=custom
        )
    for name, make in makers.items():
        state, program, seconds_compiling, batch = make()
        seconds = []
        for _ in range(args.steps + 2):
            began = time.perf_counter()
            state, metrics = program(state, batch)
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
        memory = program.memory_analysis()
        row = {
            "name": name,
            "dtype": args.dtype,
            "tokens_per_second": tokens(SHAPE) / statistics.median(seconds[2:]),
            "compile_seconds": seconds_compiling,
            "bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
            "loss": float(metrics["loss"]),
            "versions": {"jax": jax.__version__},
        }
        print(json.dumps(row), flush=True)
        del state, program


def depth(args):
    """Compile time at 6 and 48 layers, without the compilation cache."""
    times = {}
    for layers in (6, 48):
        times[layers] = our_step({**SHAPE, "layers": layers, "batch": 2}, args.dtype)[2]
    print(json.dumps({"name": "depth", **{str(k): v for k, v in times.items()}}))


def overhead(args):
    """Milliseconds that dispatching one step keeps the host busy, on a step that takes no time."""
    import dataclasses
    import tempfile

    import jax

    from lm.recipes import get
    from lm.train.loop import Trainer

    with tempfile.TemporaryDirectory() as folder:
        config = get("tiny")
        model = dataclasses.replace(
            config.model, d_model=16, num_layers=2, num_heads=2, d_ff=16, head_dim=8, num_kv_heads=2
        )
        config = dataclasses.replace(
            config, model=model, batch_size=1, sequence_length=8, out=f"{folder}/run"
        )
        trainer = Trainer(config)
        with jax.set_mesh(trainer.mesh):
            batch, state = trainer.batch(0), trainer.state
            for _ in range(5):
                state, metrics = trainer.train_step(state, batch)
            jax.block_until_ready(metrics)
            dispatch, whole = [], []
            for _ in range(300):
                began = time.perf_counter()
                state, metrics = trainer.train_step(state, batch)
                dispatch.append(time.perf_counter() - began)
                jax.block_until_ready((state, metrics))
                whole.append(time.perf_counter() - began)
        trainer.checkpoints.close()
        trainer.folder.close()
    median = {"dispatch_ms": dispatch, "whole_step_ms": whole}
    print(
        json.dumps(
            {"name": "overhead"} | {k: 1e3 * statistics.median(v) for k, v in median.items()}
        )
    )


def tokens(shape):
    return shape["batch"] * shape["length"]


def child(words, huge_pages):
    tunable = "glibc.malloc.hugetlb=1" if huge_pages else "glibc.malloc.hugetlb=0"
    env = os.environ | {"GLIBC_TUNABLES": tunable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table(rows, torch_best):
    print(
        f"{'contender':34} {'dtype':9} {'pages':6} {'tokens/s':>9} {'min':>7} {'max':>7} vs torch"
    )
    for (name, dtype, huge), values in sorted(rows.items(), key=lambda item: item[0][1:]):
        median = statistics.median(values)
        ratio = f"{median / torch_best[dtype]:8.3f}" if dtype in torch_best else ""
        pages = "huge" if huge else "4 KiB"
        spread = f"{min(values):7.0f} {max(values):7.0f}"
        print(f"{name:34} {dtype:9} {pages:6} {median:9.0f} {spread} {ratio}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=os.environ.get("TORCH_PYTHON"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("worker", "depth", "overhead"), help=argparse.SUPPRESS)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return {"worker": worker, "depth": depth, "overhead": overhead}[args.part](args)
    rows, facts = {}, {}
    for round_number in range(args.rounds):
        for dtype in ("float32", "bfloat16"):
            for huge in (True, False):
                me = [sys.executable, __file__, "--steps", str(args.steps), "--dtype", dtype]
                found = child([*me, "--part", "worker", *(["--bare"] if huge else [])], huge)
                if args.torch_python:
                    shape = [w for k, v in SHAPE.items() for w in (f"--{k}", str(v))]
                    words = [*shape, "--steps", str(args.steps), "--dtype", dtype, "--threads"]
                    script = str(HERE / "bench_train_torch.py")
                    found += child([args.torch_python, script, *words, str(os.cpu_count())], huge)
                for row in found:
                    key = (row["name"], row["dtype"], huge)
                    rows.setdefault(key, []).append(row["tokens_per_second"])
                    facts[key] = row
            print(f"round {round_number + 1} {dtype} done", file=sys.stderr)
    medians = {key: statistics.median(values) for key, values in rows.items()}
    best = {}
    for (name, dtype, _), value in medians.items():
        kind = name.split()[0]
        best[kind, dtype] = max(best.get((kind, dtype), 0.0), value)
    torch_best = {dtype: value for (kind, dtype), value in best.items() if kind == "transformers"}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, shape {SHAPE}")
    table(rows, torch_best)
    for dtype in ("float32", "bfloat16"):
        ours, bare = best["ours", dtype], best["bare", dtype]
        fact = facts["ours unrolled", dtype, True]
        print(
            f"{dtype}: ours / best bare = {ours / bare:.3f}"
            + (f", ours / best torch = {ours / torch_best[dtype]:.3f}" if torch_best else "")
            + f", compile {fact['compile_seconds']:.1f} s, {fact['bytes'] / 2**20:.0f} MiB"
        )
    extra = [
        child([sys.executable, __file__, "--part", part], True)[0] for part in ("depth", "overhead")
    ]
    print(f"compile at 48 layers / at 6 layers = {extra[0]['48'] / extra[0]['6']:.2f}")
    print(f"dispatch {extra[1]['dispatch_ms']:.2f} ms of a {extra[1]['whole_step_ms']:.2f} ms step")
    if args.json:
        values = [
            {"name": name, "dtype": dtype, "huge_pages": huge, "rounds": rows[name, dtype, huge]}
            | {k: v for k, v in facts[name, dtype, huge].items() if k not in ("name", "dtype")}
            for name, dtype, huge in rows
        ]
        args.json.write_text(json.dumps({"shape": SHAPE, "rows": values, "extra": extra}, indent=1))


if __name__ == "__main__":
    main()
