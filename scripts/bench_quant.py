"""Time of quantized linear layers and of the quantizers alone, on this machine.

    python scripts/bench_quant.py [--shape 4096,1024,4096] [--rounds 9] [--out FILE.md]

First table: forward and backward (y, dx, dw in bfloat16) of one linear layer of x [l, m] and
w [m, n], per recipe, over the same with recipe bf16. Recipes that keep bases are timed at a step
that keeps and at one that renews them, and the two weighted as in training. Second table: the
quantizers alone, bytes of input a second over those of an elementwise pass that reads and writes
bfloat16 (a copy). Where qwix is installed its nearest equivalents run in the same rounds: NVFP4
there has no tensor scale, and no row there rounds stochastically.

Rounds are interleaved in a new order each, so that drifts hit all alike; each timed call follows
an untimed one. The median is given, and in brackets the quartiles.
"""

import argparse
import datetime
import importlib.util
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

import quant
from lm.files import atomic_write_text

DIMS = (((1,), (0,)), ((), ()))
KEEP, RENEW = " keep", " renew"
Function = Callable[..., object]
Times = dict[str, list[float]]


def linear(product: Function) -> Function:
    """(x, w, d) -> y, dx, dw."""

    def run(x, w, d):
        y, pull = jax.vjp(lambda x, w: product(x, w, DIMS), x, w)
        return y, *pull(d)

    return run


def ours(name: str, shape: tuple[int, int, int]) -> dict[str, Function]:
    """The layer by a recipe; two of it where bases are kept."""
    recipe, key = quant.get_recipe(name), jax.random.key(0)
    if not recipe.needs_state:
        return {name: linear(quant.dot_general(recipe, key=key))}

    def at(step):
        def run(x, w, d):
            def product(state, x, w):
                f = quant.dot_general(recipe, key=key, state=state, step=step)
                return f(x, w, DIMS)

            # Not zero, or bases would be renewed; orthonormal or not makes no difference in time.
            state = jax.tree.map(lambda b: b + 1e-3, quant.init_state(recipe, *shape))
            y, pull = jax.vjp(product, state, x, w)
            return y, pull(d)

        return run

    assert recipe.low_rank is not None
    return {name + KEEP: at(1), name + RENEW: at(recipe.low_rank.refresh)}


def qwix_layers() -> dict[str, Function]:
    """qwix's quantized products for training, all three GEMMs."""
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig, dot_general_qt

    def layer(qtype, tile):
        config = DotGeneralQtConfig(
            lhs_qtype=qtype,
            rhs_qtype=qtype,
            tile_size=tile,
            dlhs_grad_qtype=qtype,
            drhs_grad_qtype=qtype,
            dlhs_tile_size=tile,
            drhs_tile_size=tile,
            dlhs_residual_qtype=qtype,
            drhs_residual_qtype=qtype,
        )
        return linear(lambda x, w, dims: dot_general_qt(x, w, dims, config))

    return {
        "qwix nvfp4": layer("nvfp4", 16),
        "qwix mxfp4": layer("mxfp4", 32),
        "qwix fp8": layer(jnp.float8_e4m3fn, None),
    }


def quantizers(with_qwix: bool) -> dict[str, Function]:
    """Functions of x [l, m]: quantize and dequantize, blocks along the last axis."""

    def fake(fmt, **how):
        return lambda x: quant.fake_quant(x, fmt, axis=-1, **how)

    random_ = {"rounding": "stochastic", "key": jax.random.key(0)}
    rows = {
        "copy": lambda x: -x,
        "nvfp4": fake(quant.NVFP4),
        "nvfp4 square": fake(quant.NVFP4, block_2d=True),
        "nvfp4 stochastic": fake(quant.NVFP4, **random_),
        "nvfp4 stored": lambda x: quant.dequantize(quant.quantize(x, quant.NVFP4, axis=-1)),
        "mxfp4": fake(quant.MXFP4),
        "mxfp8": fake(quant.MXFP8),
        "fp8": fake(quant.FP8),
    }
    if with_qwix:
        import qwix

        def qwix_row(qtype, tile):
            def run(x):
                how = {"tiled_axes": {1: tile}} if tile else {}
                return qwix.dequantize(qwix.quantize(x, qtype, **how))

            return run

        rows["qwix nvfp4"] = qwix_row("nvfp4", 16)
        rows["qwix mxfp4"] = qwix_row("mxfp4", 32)
        rows["qwix mxfp8"] = qwix_row("mxfp8", 32)
        rows["qwix fp8"] = qwix_row(jnp.float8_e4m3fn, None)
    return rows


def measure(functions: dict[str, Function], args: tuple, rounds: int) -> Times:
    """Seconds of every round of each compiled function."""
    programs = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    times: Times = {name: [] for name in programs}
    order = list(programs)
    for round_ in range(rounds):
        random.Random(round_).shuffle(order)
        for name in order:
            jax.block_until_ready(programs[name](*args))
            start = time.perf_counter()
            jax.block_until_ready(programs[name](*args))
            times[name].append(time.perf_counter() - start)
    return times


def merge_kept(times: Times) -> Times:
    """Steps that keep bases and the one that renews them, weighted as in training."""
    merged: Times = {}
    for name, values in times.items():
        if name.endswith(KEEP):
            name = name.removesuffix(KEEP)
            low_rank = quant.get_recipe(name).low_rank
            assert low_rank is not None
            share = 1 / low_rank.refresh
            pairs = zip(values, times[name + RENEW], strict=True)
            values = [(1 - share) * keep + share * renew for keep, renew in pairs]
        elif name.endswith(RENEW):
            continue
        merged[name] = values
    return merged


def spread(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def layer_rows(times: Times) -> list[str]:
    """Time, and the ratio to bf16 of the same round."""
    rows = ["| layer | ms | over bf16 |", "|---|---|---|"]
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times["bf16"], strict=True)]
        rows.append(f"| {name} | {spread([1e3 * v for v in values], 1)} | {spread(ratios, 2)} |")
    return rows


def quantizer_rows(times: Times, num_bytes: int) -> list[str]:
    """Bytes of input a second, and the share of a copy's in the same round."""
    rows = ["| quantize and dequantize | GB/s | of a copy |", "|---|---|---|"]
    for name, values in times.items():
        rates = [num_bytes / v / 1e9 for v in values]
        shares = [b / a for a, b in zip(values, times["copy"], strict=True)]
        rows.append(f"| {name} | {spread(rates, 2)} | {spread(shares, 2)} |")
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", help="tokens,in,out; 4096,1024,4096, on a GPU 16384,4096,14336")
    parser.add_argument("--recipes", nargs="+", default=list(quant.RECIPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-qwix", action="store_true")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown too")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds must be 2 or more, got {args.rounds}")
    return args


def main() -> None:
    args = parse()
    cpu = jax.default_backend() == "cpu"
    text = args.shape or ("4096,1024,4096" if cpu else "16384,4096,14336")
    l, m, n = (int(size) for size in text.split(","))  # noqa: E741
    with_qwix = not args.without_qwix and importlib.util.find_spec("qwix") is not None
    keys = jax.random.split(jax.random.key(1), 3)
    x, w, d = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, ((l, m), (m, n), (l, n)), strict=True)
    )
    layers: dict[str, Function] = {}
    for name in dict.fromkeys(["bf16", *args.recipes]):
        layers |= ours(name, (l, m, n))
    if with_qwix:
        layers |= qwix_layers()
    device = jax.devices()[0].device_kind
    path = {name: quant.dot_general(name, key=jax.random.key(0)).paths for name in args.recipes}
    native = [name for name, paths in path.items() if "native" in paths.values()]
    qwix = f", qwix {importlib.import_module('qwix').__version__}" if with_qwix else ""
    lines = [
        f"JAX {jax.__version__}{qwix}, {jax.default_backend()} ({device}), "
        f"{datetime.date.today()}; [l, m, n] = {[l, m, n]}, medians of {args.rounds} rounds "
        f"(quartiles). On the hardware's own FP4 or FP8 units: {', '.join(native) or 'none'}.",
        "",
        *layer_rows(merge_kept(measure(layers, (x, w, d), args.rounds))),
        "",
        *quantizer_rows(measure(quantizers(with_qwix), (x,), args.rounds), x.nbytes),
    ]
    print("\n".join(lines))
    if args.out:
        command = f"python scripts/bench_quant.py --shape {text} --rounds {args.rounds}"
        head = f"# Speed of quantized layers\n\n    {command}\n\n"
        atomic_write_text(args.out, head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
