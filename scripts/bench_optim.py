"""Time of the optimizer's update alone: AdamW, optax.contrib.muon, Spectra.

    python scripts/bench_optim.py                    # stacked Llama shapes, by device
    python scripts/bench_optim.py --layers 32 --out docs/results/optim.json

Each contender's jitted update (state donated, parameters updated in place) runs on the same
gradients; rounds of all contenders are interleaved and the median is printed with its range. Bytes
are those that the update must touch at least (gradient, parameters and state read; parameters and
state written), so bandwidth says how far it is from the memory's.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

import optim
from lm.files import atomic_write_json

CPU_SHAPES = [(1024, 1024), (1024, 3072), (3072, 1024)]
GPU_SHAPES = [(4096, 4096), (4096, 14336)]
STACKED = MuonDimensionNumbers(1, 2)


def contenders(dtype):
    """Name to transformation, all at one learning rate and without weight decay."""
    rate = 1e-3

    def spectra(**options):
        tx = optim.scale_by_spectra(momentum_dtype=dtype, **options)
        return optax.chain(tx, optax.scale_by_learning_rate(rate))

    def muon():
        return optax.contrib.muon(
            rate,
            mu_dtype=dtype,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: STACKED, params),
        )

    return {
        "optax.adamw": optax.adamw(rate, mu_dtype=dtype),
        "optax.contrib.muon": muon(),
        "spectra (1.5 %)": spectra(),
        "spectra (auto to 25 %, factored, Nesterov)": spectra(
            rank="auto", rank_ratio=0.25, nesterov=True, normalization="factored"
        ),
    }


def tree_bytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class Contender:
    """A compiled update and the arrays it works on."""

    def __init__(self, name, tx, params, gradients):
        self.name, self.gradients = name, gradients

        def step(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.jit(tx.init)(params)
        self.state_bytes = tree_bytes(self.state)
        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.seconds = []
        self.run(3)
        self.seconds.clear()

    def run(self, times):
        for _ in range(times):
            began = time.perf_counter()
            self.params, self.state = self.step(self.params, self.state, self.gradients)
            jax.block_until_ready((self.params, self.state))
            self.seconds.append(time.perf_counter() - began)

    def row(self, reference, adamw_bytes):
        median = statistics.median(self.seconds)
        touched = 2 * (tree_bytes(self.params) + self.state_bytes) + tree_bytes(self.gradients)
        return {
            "name": self.name,
            "ms": round(1e3 * median, 3),
            "ms_min": round(1e3 * min(self.seconds), 3),
            "ms_max": round(1e3 * max(self.seconds), 3),
            "muon_over_this": round(reference / median, 2),
            "state_share_of_adamw": round(self.state_bytes / adamw_bytes, 4),
            "GB_per_s": round(touched / median / 1e9, 2),
        }


def bench(shapes, layers, dtype, rounds, skip):
    key = jax.random.key(0)
    params = {f"{m}x{n}": jnp.zeros((layers, m, n)) for m, n in shapes}
    gradients = {
        name: jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        for i, (name, leaf) in enumerate(params.items())
    }
    found = [
        Contender(name, tx, params, gradients)
        for name, tx in contenders(dtype).items()
        if name not in skip
    ]
    for _ in range(rounds):
        for contender in found:
            contender.run(1)
    by_name = {contender.name: contender for contender in found}
    muon = by_name.get("optax.contrib.muon")
    reference = statistics.median(muon.seconds) if muon else float("nan")
    # AdamW's state in float32, whatever its first moment is kept in here.
    adamw_bytes = 2 * tree_bytes(params)
    return [contender.row(reference, adamw_bytes) for contender in found]


def main(argv=None):
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2 if on_cpu else 32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--out", help="write the rows as JSON here")
    args = parser.parse_args(argv)
    groups = {"llama": CPU_SHAPES} if on_cpu else {"small": CPU_SHAPES, "8b": GPU_SHAPES}
    device = jax.devices()[0].device_kind
    rows = []
    print(f"{device}, jax {jax.__version__}, {args.layers} layers, {args.rounds} rounds")
    for group, shapes in groups.items():
        for dtype in args.dtypes:
            print(f"\n{group}: {', '.join(f'{m}x{n}' for m, n in shapes)}, momentum in {dtype}")
            print(f"{'':36}{'ms':>9}{'range':>19}{'muon/this':>11}{'state':>8}{'GB/s':>8}")
            for row in bench(shapes, args.layers, dtype, args.rounds, args.skip):
                rows.append(row | {"group": group, "momentum": dtype})
                span = f"{row['ms_min']:.2f} - {row['ms_max']:.2f}"
                print(
                    f"{row['name']:36}{row['ms']:9.2f}{span:>19}{row['muon_over_this']:11.2f}"
                    f"{row['state_share_of_adamw']:8.1%}{row['GB_per_s']:8.1f}"
                )
    if args.out:
        versions = {"jax": jax.__version__, "optax": optax.__version__}
        atomic_write_json(
            args.out, {"device": device, "layers": args.layers, **versions} | {"rows": rows}
        )
        print(json.dumps({"written": args.out}))


if __name__ == "__main__":
    main()
