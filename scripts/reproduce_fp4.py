"""FP4 training recipes against bfloat16: relative loss gap, gradient error, what causes them.

    python scripts/reproduce_fp4.py --list
    python scripts/reproduce_fp4.py --only size=d64        # about 1.5 minutes a run on one core
    python scripts/reproduce_fp4.py --diagnose             # along one bfloat16 run, 20 minutes
    python scripts/reproduce_fp4.py --report

Byte-level decoders of 0.3 and 0.9 million parameters on Python's own standard library, AdamW,
warm-up and cosine to 10 %, weight decay 0.1, clip 1, model.dtype bfloat16, 1024 tokens a step;
equal initialization and data order for each seed. All linear layers of the blocks are quantized,
in training and in evaluation; embedding, head and norms are not. The learning rate is bfloat16's
best of a sweep. On a GPU `--only size=30m_25` and `30m_98` train the 30M-parameter model of the
published comparison (6 layers, width 640) for 25 and 98 tokens a parameter, here with byte tokens
in rows of 128, so that only gaps could be compared.

Every finished run is one line of docs/results/fp4.jsonl; report: docs/results/fp4.md, fp4.png.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from pathlib import Path

import fp4_report
import jax
import jax.numpy as jnp
import numpy as np
import optax

import quant
from lm import model, recipes
from lm.config import ModelConfig
from lm.experiment import Experiment
from lm.files import atomic_write_json
from lm.sweep import Sweep
from lm.train.config import QuantConfig
from lm.train.guard import init_guard
from lm.train.state import TrainState
from lm.train.step import loss_sum, make_eval_step

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
# width, layers, sequences of 128 a step, steps
SIZES = {
    "d64": (64, 4, 8, 2000),
    "d128": (128, 4, 8, 1500),
    "30m_25": (640, 6, 2048, 2900),
    "30m_98": (640, 6, 2048, 11200),
}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
RATE = {"d64": 4e-3, "d128": 2e-3, "30m_25": 1.2e-3, "30m_98": 1.2e-3}
"""bfloat16's best; at 30M that of the published comparison."""


def _but(name: str, base: str, part: str, **changes) -> quant.Recipe:
    """A named recipe with other values in its `mean` or `low_rank`."""
    recipe = quant.get_recipe(base)
    changed = dataclasses.replace(getattr(recipe, part), **changes)
    return dataclasses.replace(recipe, name=name, **{part: changed})


def _adaptive(name: str, base: str) -> quant.Recipe:
    """A named recipe with adaptive blocks wherever it rounds to nearest."""
    recipe = quant.get_recipe(base)
    nearest = {
        role: dataclasses.replace(operand, fmt=quant.NVFP4_ADAPTIVE)
        for role, operand in recipe.operands.items()
        if operand.rounding == "nearest"
    }
    return dataclasses.replace(recipe, name=name, **nearest)


_PLAIN = quant.get_recipe("nvfp4")
VARIANTS = (
    dataclasses.replace(
        _PLAIN, name="nvfp4 forward", dgrad_d=None, dgrad_w=None, wgrad_x=None, wgrad_d=None
    ),
    dataclasses.replace(_PLAIN, name="nvfp4 backward", fprop_x=None, fprop_w=None),
    _but("metis without x", "metis", "low_rank", x=False),
    _but("metis without w", "metis", "low_rank", w=False),
    _but("metis without d", "metis", "low_rank", d=False),
    _but("metis fp4 factors", "metis", "low_rank", factors="fp4"),
    _but("metis fp4_feedback", "metis", "low_rank", factors="fp4_feedback"),
    _but("metis 6 %", "metis", "low_rank", rank=0.06),
    _adaptive("nvfp4 adaptive", "nvfp4"),
    _adaptive("mean adaptive", "mean"),
    _adaptive("metis_mean adaptive", "metis_mean"),
    _but("mean x only", "mean", "mean", d=False),
    _but("mean in fp4", "mean", "mean", precision="fp4"),
    _but("mean quantized w", "mean", "mean", weight="quantized"),
    _but("mean cross terms", "mean", "mean", cross_terms=True),
)
quant.RECIPES.update({recipe.name: recipe for recipe in VARIANTS})
SPLIT = ("bf16 split", "metis_paper split")
"""Trained on the factors of the weights (`quant.split_weights`)."""
NAMED = tuple(name for name in quant.RECIPES if name not in [v.name for v in VARIANTS])
MAIN = ("bf16", "nvfp4", "nvidia", "mean", "metis", "metis_mean")


def runs():
    """Seed by seed, so that an unfinished sweep is complete for its first seeds."""
    found = []

    def add(size, names, seeds, rates=None):
        for seed in seeds:
            for name in names:
                for rate in rates or (RATE[size],):
                    found.append(dict(size=size, recipe=name, learning_rate=rate, seed=seed))

    add("d64", ("bf16",), (0,), RATES)
    add("d64", NAMED, (0, 1, 2))
    add("d128", ("bf16",), (0,), (1e-3, *RATES[:3]))
    add("d128", MAIN, (0,))
    add("d64", (*SPLIT, *(v.name for v in VARIANTS)), (0, 1, 2))
    add("d128", MAIN, (1, 2))
    add("30m_25", NAMED, (0, 1, 2))
    add("30m_98", NAMED, (0,))
    unique = {json.dumps(run): run for run in found}
    return list(unique.values())


def run_config(size: str, recipe: str):
    width, layers, batch, steps = SIZES[size]
    base = recipes.get("tiny")
    big = size.startswith("30m")
    return dataclasses.replace(
        base,
        model=ModelConfig(
            vocab_size=base.model.vocab_size,
            num_layers=layers,
            d_model=width,
            num_heads=5 if big else width // 32,
            d_ff=4 * width,
            max_context=128,
            unroll=1,
            dtype="bfloat16",
        ),
        steps=steps,
        batch_size=batch,
        sequence_length=128,
        optim=dataclasses.replace(base.optim, warmup_steps=steps // 10),
        quant=QuantConfig(recipe=recipe.removesuffix(" split")),
    )


@functools.cache
def experiment(size: str, recipe: str) -> Experiment:
    kind = SplitExperiment if recipe.endswith(" split") else Experiment
    return kind(run_config(size, recipe), 32)


class SplitExperiment(Experiment):
    """Trains u, s, v and the residual of every matrix of the blocks."""

    def __init__(self, config, eval_batch_count=None):
        super().__init__(config, eval_batch_count)
        assert self.quantization is not None
        plug = self.quantization.for_evaluation()
        evaluate = make_eval_step(config, plug)
        self._evaluate = jax.jit(lambda params, batch: evaluate(merged(params), batch))

    def init(self, tx, seed):
        low_rank = quant.LowRank()
        params = model.init(self.config.model, jax.random.key(seed))

        def split(path, leaf):
            if leaf.ndim != 3:
                return leaf
            key = quant.fold_seed(jax.random.key(0), jax.tree_util.keystr(path))
            return quant.split_weights(leaf, low_rank, key)

        params = jax.tree_util.tree_map_with_path(split, params)
        guard = init_guard(self.config.guard)
        bases = self.quantization.init() if self.quantization else {}
        return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), guard, bases)

    def compile(self, make_tx, batch, make_step=None):
        config, quantization = self.config, self.quantization
        assert quantization is not None

        def tools(peak):
            def make(schedule):
                optim = config.optim
                decayed = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)  # noqa: E731
                return optax.adamw(
                    schedule,
                    optim.beta1,
                    optim.beta2,
                    optim.eps,
                    weight_decay=optim.weight_decay,
                    mask=decayed,
                )

            return self.optimizer(make, peak)

        def step(state, batch, peak):
            tx, _ = tools(peak)

            def loss(differentiated):
                params, bases = differentiated
                plug = quantization.at(state.step, bases=bases)
                return loss_sum(config, merged(params), batch, plug)[0] / batch["weights"].sum()

            value, (grads, bases) = jax.value_and_grad(loss)((state.params, state.quant))
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            new = TrainState(state.step + 1, params, opt_state, state.guard, bases)
            return new, {"loss": value}

        init = jax.jit(lambda seed: self.init(tools(1.0)[0], seed))
        abstract, peak = jax.eval_shape(init, 0), jax.ShapeDtypeStruct((), jnp.float32)
        return init, jax.jit(step, donate_argnums=0).lower(abstract, batch, peak).compile()


def merged(params):
    is_split = lambda node: isinstance(node, quant.SplitWeight)  # noqa: E731
    return jax.tree.map(
        lambda node: quant.merge_weights(node) if is_split(node) else node,
        params,
        is_leaf=is_split,
    )


def execute(run):
    found = experiment(run["size"], run["recipe"])
    curve = found.run(
        run["recipe"],
        learning_rate=run["learning_rate"],
        seed=run["seed"],
        eval_every=found.config.steps // 10,
    )
    return curve.as_row()


DIAGNOSED = (*NAMED, *(variant.name for variant in VARIANTS))


def diagnose(size: str = "d64", draws: int = 8) -> None:
    """Along one bfloat16 run: what every recipe does to the loss and the gradient of its weights.

    Noise-free where a training run is not: same weights, same batch. The error of the mean
    gradient over `draws` roundings is the bias, the rest is noise that averages out over steps.
    """
    base = experiment(size, "bf16")
    at = [base.config.steps // 20, base.config.steps // 4, base.config.steps]
    states = {}

    def observe(step, state, metrics):
        if step in at:
            states[step] = jax.tree.map(jnp.copy, state)

    base.run("bf16", learning_rate=RATE[size], seed=0, eval_every=10**9, observe=observe)
    batch = base.loader(0).batch(base.config.steps)
    table = {"size": size, "steps": at, "names": quant.NAMES, "recipes": {}, "layers": {}}
    exact = None
    for name in DIAGNOSED:
        found = experiment(size, name)
        config, quantization = found.config, found.quantization
        assert quantization is not None

        @jax.jit
        def gradient(params, draw, config=config, quantization=quantization):
            plug = quantization.at(draw)
            total = lambda p: loss_sum(config, p, batch, plug)[0] / batch["weights"].sum()  # noqa: E731
            loss, grads = jax.value_and_grad(total)(params)
            return loss, jax.tree.leaves(grads["layers"])

        rows = {}
        for step, state in states.items():
            found_at = [gradient(state.params, draw) for draw in range(draws)]
            losses = [float(loss) for loss, _ in found_at]
            grads = [np.concatenate([np.ravel(g) for g in leaves]) for _, leaves in found_at]
            if name == "bf16":
                exact = (exact or {}) | {step: (losses[0], grads[0])}
            loss, true = exact[step]
            size_of = np.linalg.norm(true)
            bias = np.linalg.norm(np.mean(grads, 0) - true)
            error = np.sqrt(np.mean([np.sum((g - true) ** 2) for g in grads]))
            rows[step] = {
                "loss_gap": (statistics.mean(losses) - loss) / loss,
                "gradient_error": float(error / size_of),
                "gradient_bias": float(bias / size_of),
            }
        table["recipes"][name] = rows
        print(name, rows, flush=True)
    table["layers"] = layers_of(experiment(size, "nvfp4"), states, batch)
    atomic_write_json(RESULTS / f"fp4_diagnostics_{size}.json", table)


def layers_of(found: Experiment, states, batch):
    """{step: {site: [layers, numbers]}} of `quant.NAMES`, under plain NVFP4."""
    quantization = found.quantization
    assert quantization is not None

    @jax.jit
    def measure(state):
        def loss(probes):
            plug = quantization.at(state.step, probes=probes)
            return loss_sum(found.config, state.params, batch, plug)[0] / batch["weights"].sum()

        return jax.grad(loss)(quantization.probes())

    measured = {step: jax.device_get(measure(state)) for step, state in states.items()}
    return {
        step: {site: np.round(rows, 4).tolist() for site, rows in sites.items()}
        for step, sites in measured.items()
    }


SUMMARY = """
# FP4 recipes against bfloat16

`python scripts/reproduce_fp4.py`; one line for each run in [fp4.jsonl](fp4.jsonl). ± is the
standard error over seeds; gaps are paired by seed.

![Loss gaps](fp4.png)

Everything here is a decoder of 0.3 million parameters, 64 wide, trained on 2 million tokens: far
too small for the published gaps of one to three per cent, and no run of the 30M-parameter
comparison was possible without a GPU. What this size does show:

- **The forward pass is the gap**: of plain NVFP4's 4.0 % (earlier code, one seed) quantizing it
  alone made 4.0 and quantizing the backward pass alone 0.5 (Quartet II's run files: 1.43 of 1.60
  and 0.44).
- **Training runs do not separate the recipes**: nvfp4, nvidia, mean, metis and their combinations
  are ties within about half a point, the noise of three seeds. Apart from them stand fp8 (a fifth
  of the gap), mxfp4 and metis_paper (2.6 and 3.1 points worse than nvfp4), and mean_paper (0.9
  worse).
- **At fixed weights, without that noise, they do**: plain 3.9 %, mean 3.0 %, metis 2.8 %,
  metis_mean 2.2 % and metis with 6 % of the directions 1.9 % at the end of the run, and a
  gradient whose error averages out far better (bias 0.27 against 0.68). One model and one
  batch: no error bars. nvidia, whose square blocks round weights more coarsely, is behind plain.
- **The published forms are worse than plain NVFP4 here**: singular vectors in FP4 with a residual
  that does not know of it (metis_paper), and a mean in FP4 times quantized weights (mean_paper).
  In high precision, at one or two vectors of cost, both help. That is what our defaults do.
- **Where a mean is**: 6 to 54 % of the energy of inputs, most at the start, and none in the
  gradients of outputs, at any step. So there is nothing to centre in gradients, of which the
  second version of Averis says that it is less pronounced. Hadamard in wgrad changes nothing
  either, as NVIDIA reports below about a billion parameters.
- **Which split Metis needs**: at fixed weights without that of the weights the bias of the gradient
  goes from 0.30 to 0.52, without that of the inputs to 0.36, without that of the gradients it stays
  at 0.30. In training runs the differences are within errors. Factors in FP4 cost nothing once the
  residual knows of them (2.7 %, against 5.1 % as published).
- **Where the mean goes**: in FP4 it costs more than centring gains; quantized weights under it cost
  0.4 % at fixed weights; cross terms and the centring of gradients do nothing.
- **Trained factors** (bf16 split) end 0.9 % above bfloat16 at this size: Metis's losses below
  bfloat16 are not explained by them here. FP4 as published gains 0.8 points by them.
- **Adaptive blocks** (6 or 4 as the largest) take a third off plain NVFP4's gap at fixed weights.

Not every run is of the last code: nvfp4, metis, mean and what has three seeds below them are; the
other named recipes and what has one seed rounded weights from bfloat16 (they are rounded from
float32 now). Rerun, nvfp4, metis and mean moved by 0.0 to 0.3 points, single seeds by up to 1.3.
The table at fixed weights is of the last code.

Not reached: 0.4 % from bfloat16, which would need a larger model to be measured on. Width 128 has
only the bfloat16 sweep so far (`--list` shows what is missing).
"""


def main(argv=None):
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    own.add_argument("--diagnose", nargs="?", const="d64", choices=tuple(SIZES))
    args, rest = own.parse_known_args(argv)
    if args.diagnose:
        diagnose(args.diagnose)
        return 0
    sweep = Sweep(RESULTS / "fp4.jsonl", runs())
    return sweep.main(rest, execute, report)


def report(rows):
    order = [*NAMED, *SPLIT, *(v.name for v in VARIANTS)]
    fp4_report.write(rows, RATE, order, SUMMARY)


if __name__ == "__main__":
    sys.exit(main())
