"""Forward and backward time of attention and of the vocabulary loss, on this machine.

    python scripts/bench_attention.py [--torch PYTHON] [--shapes 16,256,4,64 ...] [--repeats 7]

Each row is one shape [B, T, N, H] and dtype, causal; each column one implementation, the median
over `--repeats` of output and all gradients, in milliseconds. "jax.nn" is
`jax.nn.dot_product_attention` (XLA). With `--torch` (or $ANISO_TORCH_PYTHON), a Python that has
PyTorch, its scaled_dot_product_attention and its linear + cross_entropy are timed in between, each
in its own process, so that both libraries see the same machine.
"""

import argparse
import functools
import os
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from lm.layers.attention import IMPLEMENTATIONS, attention
from lm.loss import cross_entropy

ATTENTION_SHAPES = ("16,256,4,64", "4,1024,8,64", "1,4096,8,64")
LOSS_SHAPES = ("16,256,256,4096",)
REFERENCE_LIMIT = 2**26
"""Scores (B N T T) beyond which forms that hold them all are not run."""

TORCH = """
import sys, time, statistics, torch, torch.nn.functional as F
kind, dtype, repeats = sys.argv[1], getattr(torch, sys.argv[3]), int(sys.argv[4])
a, b, c, d = map(int, sys.argv[2].split(","))
torch.manual_seed(0)
if kind == "attention":
    q, k, v, g = (torch.randn(a, b, c, d, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    def step():
        heads = [x.transpose(1, 2) for x in leaves]
        out = F.scaled_dot_product_attention(*heads, is_causal=True)
        out.transpose(1, 2).backward(g)
else:
    x = torch.randn(a * b, c, dtype=dtype).requires_grad_()
    w = (torch.randn(d, c) * 0.05).requires_grad_()
    y = torch.randint(d, (a * b,))
    leaves = [x, w]
    def step():
        F.cross_entropy(F.linear(x, w.to(dtype)).float(), y, reduction="sum").backward()
times = []
for i in range(repeats + 2):
    start = time.perf_counter()
    step()
    times.append(time.perf_counter() - start)
    for leaf in leaves:
        leaf.grad = None
print(1e3 * statistics.median(times[2:]))
"""


def medians(functions: dict, args: tuple, repeats: int) -> dict[str, float]:
    """Milliseconds of each compiled function, interleaved so that drifts hit all alike.

    Each timed call follows an untimed one of the same function, which refills caches and heap.
    """
    programs = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    times = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            jax.block_until_ready(program(*args))
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def bench_attention(shape: tuple[int, ...], dtype: str, repeats: int) -> dict[str, float]:
    """Medians of every implementation that runs here."""
    rng = np.random.default_rng(0)
    args = tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    candidates = {
        name: functools.partial(attention, implementation=name) for name in IMPLEMENTATIONS
    }
    candidates["jax.nn"] = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    functions = {}
    for name, f in candidates.items():
        holds_scores = name in ("reference", "dense", "jax.nn")
        if holds_scores and shape[0] * shape[2] * shape[1] ** 2 > REFERENCE_LIMIT:
            continue

        def both(q, k, v, grad, f=f):
            out, pull = jax.vjp(f, q, k, v)
            return out, *pull(grad)

        try:
            jax.eval_shape(both, *args)
        except NotImplementedError:
            continue
        functions[name] = both
    return medians(functions, args, repeats)


def bench_loss(shape: tuple[int, ...], dtype: str, repeats: int) -> dict[str, float]:
    """Medians of the loss and its gradients with respect to x [B, T, D] and head [D, V]."""
    batch, length, width, vocab = shape
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, length, width)), dtype)
    head = jnp.asarray(rng.normal(size=(width, vocab)) * 0.05, jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)

    def naive(x, head):
        logits = (x @ head.astype(x.dtype)).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).sum()

    candidates = {"naive": naive}
    for name in ("dense", "chunked"):
        candidates[name] = lambda x, head, name=name: (
            cross_entropy(x, head, targets, implementation=name).total
        )
    functions = {name: jax.value_and_grad(f, (0, 1)) for name, f in candidates.items()}
    return medians(functions, (x, head), repeats)


def bench_torch(python: str, kind: str, shape, dtype: str, repeats: int) -> float:
    """The same in PyTorch, in a process of its own."""
    command = [python, "-c", TORCH, kind, ",".join(map(str, shape)), dtype, str(repeats)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"PyTorch run failed: {result.stderr.strip().splitlines()[-1]}")
    return float(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", default=os.environ.get("ANISO_TORCH_PYTHON", ""))
    parser.add_argument("--shapes", nargs="*", default=ATTENTION_SHAPES, help="B,T,N,H")
    parser.add_argument("--loss-shapes", nargs="*", default=LOSS_SHAPES, help="B,T,D,V")
    parser.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.platform} {device.device_kind}, {os.cpu_count()} cores")
    runs = [("attention", s, bench_attention) for s in args.shapes]
    runs += [("loss", s, bench_loss) for s in args.loss_shapes]
    for kind, text, bench in runs:
        shape = tuple(map(int, text.split(",")))
        for dtype in args.dtypes:
            row = bench(shape, dtype, args.repeats)
            if args.torch:
                row["torch"] = bench_torch(args.torch, kind, shape, dtype, args.repeats)
            cells = "  ".join(f"{name} {value:.1f}" for name, value in row.items())
            print(f"{kind} {list(shape)} {dtype}: {cells}  ms", flush=True)


if __name__ == "__main__":
    main()
