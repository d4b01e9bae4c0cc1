"""Throughput of an expert layer, forward and backward, against what one would use instead.

    python scripts/bench_moe.py [--out FILE.md]            # CPU sizes
    python scripts/bench_moe.py --dtypes bfloat16 --width 2048 --hidden 1024 --tokens 16384

Layers of `--experts` x top `--top-k` SwiGLU experts of width `--hidden` on `--tokens` tokens of
width `--width`, f32 parameters, routing included. The layer's rivals, in the same run:

    ragged_dot  the same layer on `jax.lax.ragged_dot`
    einsum      dispatch and combine as dense one-hot products, capacity factor 1.25 (drops tokens)
    dense       one SwiGLU MLP of hidden width top_k x hidden: equal active FLOPs

Contenders take turns; medians. A ratio above 1 says that the layer is faster; in brackets its
quartiles over the rounds.
"""

import argparse
import datetime
import itertools
import statistics
import time

import jax
import jax.numpy as jnp

import moe
from lm.files import atomic_write_text
from lm.layers.linear import linear
from lm.layers.mlp import silu_product


def expert_layer(x, params, k, implementation):
    """The layer as `lm.layers.moe` runs it, without losses."""
    routing = moe.route(linear(x.astype(jnp.float32), params["router"]), k, normalize=True)
    return moe.expert_mlp(x, routing, params["experts"], implementation=implementation)


def einsum_layer(x, params, k, factor):
    """Mesh-TensorFlow's dispatch (arXiv 2006.16668, algorithm 2): every expert gets `capacity`
    places, filled by a product with a [tokens, experts, capacity] mask."""
    experts = params["router"].shape[1]
    routing = moe.route(linear(x.astype(jnp.float32), params["router"]), k, normalize=True)
    capacity = max(int(factor * x.shape[0] * k / experts), 1)
    chosen = jax.nn.one_hot(routing.indices, experts, dtype=jnp.int32)
    order = chosen.swapaxes(0, 1).reshape(-1, experts)  # first choices first
    place = (jnp.cumsum(order, axis=0) - 1).reshape(k, -1, experts).swapaxes(0, 1)
    place = jnp.where(chosen > 0, place, capacity)
    mask = jax.nn.one_hot(place, capacity, dtype=x.dtype)  # beyond the capacity: zero
    combine = jnp.einsum("nk,nkec->nec", routing.weights.astype(x.dtype), mask)
    rows = jnp.einsum("nec,nd->ecd", jnp.sum(mask, axis=1), x)
    bank = {name: w.astype(x.dtype) for name, w in params["experts"].items()}
    gate = jnp.einsum("ecd,edf->ecf", rows, bank["gate"])
    hidden = silu_product(gate, jnp.einsum("ecd,edf->ecf", rows, bank["up"]))
    return jnp.einsum("nec,ecd->nd", combine, jnp.einsum("ecf,efd->ecd", hidden, bank["down"]))


def dense_layer(x, params, k):
    dense = params["dense"]
    hidden = silu_product(linear(x, dense["gate"]), linear(x, dense["up"]))
    return linear(hidden, dense["down"])


def make_params(key, experts, k, width, hidden):
    def bank(key, leading, hidden):
        shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        return {
            name: jax.random.normal(each, (*leading, *shape)) * shape[0] ** -0.5
            for (name, shape), each in zip(shapes.items(), jax.random.split(key, 3), strict=True)
        }

    keys = jax.random.split(key, 3)
    return {
        "router": jax.random.normal(keys[0], (width, experts)) * width**-0.5,
        "experts": bank(keys[1], (experts,), hidden),
        "dense": bank(keys[2], (), k * hidden),
    }


def measure(arguments, tokens, experts, k, dtype) -> dict[str, list[float]]:
    """Seconds of each round, by contender."""
    params = make_params(jax.random.key(0), experts, k, arguments.width, arguments.hidden)
    x = jax.random.normal(jax.random.key(1), (tokens, arguments.width), dtype)
    routed = {name: params[name] for name in ("router", "experts")}
    contenders = {
        "moe": (lambda x, p: expert_layer(x, p, k, arguments.implementation), routed),
        "dense": (lambda x, p: dense_layer(x, p, k), {"dense": params["dense"]}),
        "einsum": (lambda x, p: einsum_layer(x, p, k, 1.25), routed),
        "ragged_dot": (lambda x, p: expert_layer(x, p, k, "xla"), routed),
    }
    for name in arguments.without:
        contenders.pop(name)
    programs, seconds = {}, {name: [] for name in contenders}
    for name, (layer, p) in contenders.items():
        loss = lambda x, p, layer=layer: jnp.sum(jnp.square(layer(x, p).astype(jnp.float32)))  # noqa: E731
        run = jax.jit(jax.grad(loss, (0, 1))).lower(x, p).compile()
        jax.block_until_ready(run(x, p))
        programs[name] = run, p
    for repeat in range(arguments.repeats):
        for name, (run, p) in programs.items():
            if repeat >= arguments.slow_repeats and name in ("ragged_dot", "einsum"):
                continue
            begin = time.perf_counter()
            jax.block_until_ready(run(x, p))
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def speed(seconds: dict[str, list[float]], rival: str) -> str:
    """How many times as fast as the rival, from rounds in which both ran."""
    if rival not in seconds:
        return "-"
    both = zip(seconds["moe"], seconds[rival], strict=False)
    ratios = sorted(theirs / ours for ours, theirs in both)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    return f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--implementation", help="of the layer's products; default: the device's")
    parser.add_argument("--without", nargs="*", default=[], choices=["ragged_dot", "einsum"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--slow-repeats", type=int, default=3, help="of ragged_dot and einsum")
    parser.add_argument("--out", help="also write the table to this file")
    arguments = parser.parse_args()
    lines = [
        f"JAX {jax.__version__}, {jax.default_backend()} ({jax.devices()[0].device_kind}), "
        f"{datetime.date.today()}; width {arguments.width}, experts of {arguments.hidden}.",
        "",
        "| tokens | experts | top | dtype | ms | active TFLOP/s | speed over dense | over einsum |"
        " over ragged_dot |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    cases = (arguments.tokens, arguments.experts, arguments.top_k, arguments.dtypes)
    for tokens, experts, k, dtype in itertools.product(*cases):
        if k >= experts:
            continue
        seconds = measure(arguments, tokens, experts, k, dtype)
        ours = statistics.median(seconds["moe"])
        flops = 18 * tokens * k * arguments.width * arguments.hidden
        rivals = " | ".join(speed(seconds, name) for name in ("dense", "einsum", "ragged_dot"))
        lines.append(
            f"| {tokens} | {experts} | {k} | {dtype} | {1e3 * ours:.1f} | {flops / ours / 1e12:.3f}"
            f" | {rivals} |"
        )
        print(lines[-1], flush=True)
    if arguments.out:
        head = __doc__.splitlines()[0].rstrip(".")
        command = "    python scripts/bench_moe.py --tokens " + " ".join(map(str, arguments.tokens))
        atomic_write_text(arguments.out, "\n".join([f"# {head}", "", command, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
