"""Throughput of an expert layer, forward and backward, against what one would use instead.

    python scripts/bench_moe.py                            # CPU sizes
    python scripts/bench_moe.py --dtypes bfloat16 --width 2048 --hidden 1024 --tokens 16384

Layers of `--experts` x top `--top-k` SwiGLU experts of width `--hidden` on `--tokens` tokens of
width `--width`, f32 parameters, routing included. The layer's rivals, in the same run:

    ragged_dot  the same layer on `jax.lax.ragged_dot`
    einsum      dispatch and combine as dense one-hot products, capacity factor 1.25 (drops tokens)
    dense       one SwiGLU MLP of hidden width top_k x hidden: equal active FLOPs

Contenders take turns; medians. A ratio above 1 says that the layer is faster. One JSON object.
"""

import argparse
import itertools
import json
import statistics
import time

import jax
import jax.numpy as jnp

import moe
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


def measure(arguments, experts, k, dtype):
    """Medians of seconds by contender, and what follows from them."""
    params = make_params(jax.random.key(0), experts, k, arguments.width, arguments.hidden)
    x = jax.random.normal(jax.random.key(1), (arguments.tokens, arguments.width), dtype)
    routed = {name: params[name] for name in ("router", "experts")}
    contenders = {
        "moe": (lambda x, p: expert_layer(x, p, k, arguments.implementation), routed),
        "ragged_dot": (lambda x, p: expert_layer(x, p, k, "xla"), routed),
        "einsum": (lambda x, p: einsum_layer(x, p, k, 1.25), routed),
        "dense": (lambda x, p: dense_layer(x, p, k), {"dense": params["dense"]}),
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
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    flops = 18 * arguments.tokens * k * arguments.width * arguments.hidden
    return {
        "experts": experts,
        "top_k": k,
        "dtype": dtype,
        "milliseconds": {name: round(1e3 * value, 2) for name, value in medians.items()},
        "tokens_per_second": round(arguments.tokens / medians["moe"]),
        "active_tflops_per_second": round(flops / medians["moe"] / 1e12, 3),
        "speed_over": {
            name: round(value / medians["moe"], 3)
            for name, value in medians.items()
            if name != "moe"
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--top-k", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--implementation", help="of the layer's products; default: the device's")
    parser.add_argument("--without", nargs="*", default=[], choices=["ragged_dot", "einsum"])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--slow-repeats", type=int, default=3, help="of ragged_dot and einsum")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    cases = itertools.product(arguments.experts, arguments.top_k, arguments.dtypes)
    results = [measure(arguments, experts, k, dtype) for experts, k, dtype in cases if k <= experts]
    sizes = {name: getattr(arguments, name) for name in ("tokens", "width", "hidden")}
    kind = {"device": device.device_kind, "jax": jax.__version__}
    print(json.dumps({**kind, **sizes, "results": results}, indent=1))


if __name__ == "__main__":
    main()
