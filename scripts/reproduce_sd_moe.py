"""SD-MoE against plain experts: similarity, steps to the baseline's loss, learning-rate tolerance.

    python scripts/reproduce_sd_moe.py --list
    python scripts/reproduce_sd_moe.py              # about 1 minute a run on one core
    python scripts/reproduce_sd_moe.py --time       # whole training steps, on an idle machine
    python scripts/reproduce_sd_moe.py --sides      # where plain experts are alike
    python scripts/reproduce_sd_moe.py --report

Decoders of 2 layers and width 128 with 8 routed experts (top-2) and 1 shared one of width 128,
byte tokens of Python's standard library, 300 steps of 16 x 128 tokens (512 for each expert if they
are balanced), AdamW, warm-up 30 and cosine to 10 %, weight decay 0.1, clip 1; equal data order for
each seed. The rates are 1, 2, 4 and 8 times the lowest. Every finished run is one line of
docs/results/sd_moe.jsonl; the report is docs/results/sd_moe.md and sd_moe.png.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import sd_moe_report
from sd_moe_report import FACTORS, MAIN, ONE_RATE, PLAIN

import moe
from lm import recipes
from lm.config import ModelConfig
from lm.config_moe import MoEConfig
from lm.experiment import Experiment
from lm.files import atomic_write_json
from lm.sweep import Sweep
from lm.train.config import RunConfig
from lm.train.config_sd import SDConfig
from lm.train.modular import make_run_optimizer

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
STEPS, EVAL_EVERY, WARMUP, SEEDS = 300, 20, 30, (0, 1, 2)
LOWEST = 1.5e-3
OBSERVED = (1, 20, 50, 100, 200, STEPS)
RANKS = {"1 %": None, "8": 8}
# Rank of the common part, what differs in `--sd.*`.
CONTENDERS: dict[str, tuple[int, dict]] = {
    PLAIN: (0, {}),
    MAIN: (8, {}),
    "rank 2": (2, {}),
    "rank 16": (16, {}),
    "refresh: drop": (8, {"on_refresh": "drop"}),
    "refresh: keep": (8, {"on_refresh": "keep"}),
    "no refresh": (8, {"refresh_every": 0}),
    "gradient projected only (literal)": (8, {"project_update": False}),
    "update projected only": (8, {"project_gradient": False}),
    "mean for the common gradient": (8, {"common_gradient": "mean"}),
}


def runs():
    """Seed by seed, so that an unfinished sweep is complete for its first seeds."""
    found = []
    for seed in SEEDS:
        for contender in (PLAIN, MAIN):
            for factor in FACTORS:
                rate = LOWEST * factor
                found.append(dict(contender=contender, learning_rate=rate, seed=seed))
    for seed in SEEDS:
        for contender in list(CONTENDERS)[2:]:
            found.append(dict(contender=contender, learning_rate=LOWEST * ONE_RATE, seed=seed))
    return found


def configuration(contender: str, width: int = 128, batch: int = 16, length: int = 128):
    """The run of a contender, clipping included."""
    rank, options = CONTENDERS[contender]
    base = recipes.get("tiny")
    model = ModelConfig(
        vocab_size=base.model.vocab_size,
        num_layers=2,
        d_model=width,
        num_heads=width // 32,
        d_ff=width,
        mlp="moe",
        max_context=length,
        unroll=2,
        dtype="float32",
        moe=MoEConfig(experts=8, top_k=2, shared=1, sd_rank=rank),
    )
    return dataclasses.replace(
        base,
        model=model,
        steps=STEPS,
        batch_size=batch,
        sequence_length=length,
        optim=dataclasses.replace(base.optim, warmup_steps=WARMUP),
        sd=SDConfig(**options),
    )


@functools.cache
def experiment(contender: str, **size) -> tuple[RunConfig, Experiment]:
    config = configuration(contender, **size)
    # Clipped inside of the optimizer, where gradients are decomposed already.
    outside = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip=0.0))
    return config, Experiment(outside, 8)


def optimizer(config: RunConfig):
    return lambda schedule: make_run_optimizer(config, schedule)[0]


@jax.jit
def measure(params):
    """Means over layers, pairs, matrices and sides."""
    found = {}
    for label, rank in RANKS.items():
        metrics = moe.expert_metrics(params, rank)
        for what in ("similarity", "unique_similarity"):
            values = [v for name, v in metrics.items() if name.startswith(f"{what}/")]
            if values:
                found[f"{what}, rank {label}"] = jnp.mean(jnp.stack(values))
        for what in ("matched", "specificity"):
            values = [v for name, v in metrics.items() if name.endswith(f"/{what}")]
            found[f"router {what}, rank {label}"] = jnp.mean(jnp.stack(values))
    return found


def execute(run):
    config, found = experiment(run["contender"])
    seen = {}

    def observe(step, state, metrics):
        if step in OBSERVED:
            values = dict(measure(state.params))
            if isinstance(state.opt_state, moe.SDMoEState):
                values["refresh_change"] = state.opt_state.refresh_change
            values["max_violation"] = metrics["experts/max_violation"]
            for name, value in values.items():
                seen.setdefault(name, {})[step] = round(float(value), 4)

    curve = found.run(
        run["contender"],
        optimizer(config),
        learning_rate=run["learning_rate"],
        seed=run["seed"],
        eval_every=EVAL_EVERY,
        observe=observe,
    )
    return curve.as_row() | {"observed": seen}


def time_steps(rounds: int = 12) -> None:
    """Milliseconds of a whole training step at 512 and more tokens an expert, in turn."""
    rows = {}
    for width, batch in ((128, 16), (256, 16), (256, 64)):
        steps, states, spent = {}, {}, {}
        size = dict(width=width, batch=batch)
        for name in (PLAIN, MAIN):
            config, found = experiment(name, **size)
            data = found.loader(0).batch(0)
            init, steps[name] = found.compile(optimizer(config), data)
            states[name], spent[name] = init(0), []
        rate = jnp.asarray(1e-3, jnp.float32)
        for _ in range(rounds):
            for name, step in steps.items():
                began = time.perf_counter()
                for _ in range(16):  # one of them refreshes the bases
                    states[name], _ = step(states[name], data, rate)
                jax.block_until_ready(states[name])
                spent[name].append((time.perf_counter() - began) / 16 * 1e3)
        row = {name: round(statistics.median(times), 2) for name, times in spent.items()}
        ratios = [b / a for a, b in zip(spent[PLAIN], spent[MAIN], strict=True)]
        row |= {"ratio": round(statistics.median(ratios), 4)}
        rows[f"width {width}, {batch * 128 * 2 // 8} tokens an expert"] = row
        print(rows)
    atomic_write_json(RESULTS / "sd_moe_time.json", rows | {"jax": jax.__version__})


def show_sides() -> None:
    """Similarity of plain experts, and of what training has added to them, by matrix and side."""
    config, found = experiment(PLAIN)
    kept = {}

    def observe(step, state, metrics):
        if step in (1, STEPS):
            kept[step] = jax.tree.map(jnp.copy, state.params)

    found.run(
        PLAIN,
        optimizer(config),
        learning_rate=2 * LOWEST,
        seed=0,
        eval_every=STEPS,
        observe=observe,
    )
    change = jax.tree.map(jnp.subtract, kept[STEPS], kept[1])
    table = {}
    for what, params in (("weights", kept[STEPS]), ("change", change)):
        for name, value in moe.expert_metrics(params, None).items():
            if name.startswith("similarity/"):
                table.setdefault(name.removeprefix("similarity/"), {})[what] = round(
                    float(value), 3
                )
    atomic_write_json(RESULTS / "sd_moe_sides.json", table)
    print(table)


def report(rows):
    sd_moe_report.write(rows, LOWEST, list(CONTENDERS), STEPS, OBSERVED)


def main(argv=None):
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    own.add_argument("--time", action="store_true")
    own.add_argument("--sides", action="store_true")
    args, rest = own.parse_known_args(argv)
    if args.time or args.sides:
        (time_steps if args.time else show_sides)()
        return 0
    return Sweep(RESULTS / "sd_moe.jsonl", runs()).main(rest, execute, report)


if __name__ == "__main__":
    sys.exit(main())
