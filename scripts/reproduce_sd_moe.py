"""SD-MoE against plain experts: similarity, steps to the baseline's loss, learning-rate tolerance.

    python scripts/reproduce_sd_moe.py --list
    python scripts/reproduce_sd_moe.py              # about 1 minute a run on one core
    python scripts/reproduce_sd_moe.py --time       # whole training steps, on an idle machine
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
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import moe
from lm import recipes
from lm.config import ModelConfig
from lm.config_moe import MoEConfig
from lm.experiment import Experiment, steps_to
from lm.files import atomic_write_json, atomic_write_text
from lm.sweep import Sweep, best
from lm.train.config import RunConfig
from lm.train.config_sd import SDConfig
from lm.train.modular import make_run_optimizer

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
STEPS, EVAL_EVERY, WARMUP, SEEDS = 300, 20, 30, (0, 1, 2)
LOWEST = 1.5e-3
FACTORS = (1, 2, 4, 8)
ONE_RATE = 4.0  # of the variants
OBSERVED = (1, 20, 50, 100, 200, STEPS)
RANKS = {"1 %": None, "8": 8}
PLAIN, MAIN = "plain experts", "SD-MoE"
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
    for contender in list(CONTENDERS)[2:]:
        found.append(dict(contender=contender, learning_rate=LOWEST * ONE_RATE, seed=0))
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


def report(rows):
    """Tables and curves of everything that is finished."""
    lines = [SUMMARY.strip(), ""]
    swept = [row for row in rows if row["run"]["contender"] in (PLAIN, MAIN)]
    rates = best(swept, "contender", "final")
    chosen = {
        name: {r["run"]["seed"]: r["result"] for r in rows
               if (r["run"]["contender"], r["run"]["learning_rate"]) == (name, rate)}
        for name, rate in rates.items()
    }  # fmt: skip
    lines += main_table(rates, chosen) + rate_table(swept) + similarity_table(rates, chosen)
    lines += variant_table(rows) + time_table()
    atomic_write_text(RESULTS / "sd_moe.md", "\n".join(lines).rstrip() + "\n")
    plot(chosen)
    print(f"wrote {RESULTS / 'sd_moe.md'}")


def main_table(rates, chosen):
    lines = [
        "## Best against best",
        "",
        "| contender | best rate | held-out loss | minus plain (paired) |"
        " steps to the plain experts' final loss | seeds |",
        "|---|---|---|---|---|---|",
    ]
    target = {seed: result["final"] for seed, result in chosen.get(PLAIN, {}).items()}
    for name, found in chosen.items():
        gaps, needed = [], []
        for seed in target.keys() & found.keys():
            gaps.append(found[seed]["final"] - target[seed])
            needed.append(steps_to(found[seed]["steps"], found[seed]["valid"], target[seed]))
        reached = [steps for steps in needed if steps is not None]
        share = "never"
        if reached:
            share = f"{spread(reached, 0)} ({statistics.mean(reached) / STEPS:.0%})"
            share += f", {len(needed) - len(reached)} never" if len(reached) < len(needed) else ""
        finals = [result["final"] for result in found.values()]
        lines.append(
            f"| {name} | {rates[name]:g} | {spread(finals)} | {spread(gaps)} | {share} |"
            f" {len(finals)} |"
        )
    return [*lines, ""]


def rate_table(rows):
    """Losses by rate, and how far each is above the contender's best."""
    lines = [
        "## Learning-rate tolerance",
        "",
        "Held-out loss at multiples of the lowest rate; in brackets above the contender's best.",
        "",
        "| contender | " + " | ".join(f"{factor}x" for factor in FACTORS) + " |",
        "|---" * (len(FACTORS) + 1) + "|",
    ]
    for name in (PLAIN, MAIN):
        finals = {
            factor: [
                row["result"]["final"]
                for row in rows
                if row["run"]["contender"] == name
                and abs(row["run"]["learning_rate"] / LOWEST / factor - 1) < 1e-6
            ]
            for factor in FACTORS
        }
        means = {f: statistics.mean(v) for f, v in finals.items() if v and None not in v}
        cells = [
            f"{spread(values)} (+{means[factor] - min(means.values()):.3f})"
            if factor in means
            else "diverged" if values else "-"
            for factor, values in finals.items()
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def similarity_table(rates, chosen):
    lines = [
        "## Experts' similarity over training",
        "",
        "At each contender's best rate, mean over seeds, layers, pairs, matrices and sides; chance"
        " is rank / 128. For SD-MoE, `similarity` is of whole experts W_c + W_u,i, alike by"
        " construction, `unique_similarity` of the W_u,i.",
        "",
        "| contender | quantity | " + " | ".join(f"step {step}" for step in OBSERVED) + " |",
        "|---" * (len(OBSERVED) + 2) + "|",
    ]
    for name, found in chosen.items():
        observed = [result["observed"] for result in found.values()]
        for quantity in sorted(observed[0]) if observed else ():
            cells = [
                f"{statistics.mean(each[quantity][str(step)] for each in observed):.3f}"
                for step in OBSERVED
            ]
            lines.append(f"| {name} | {quantity} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def variant_table(rows):
    at = {
        row["run"]["contender"]: row["result"]
        for row in rows
        if row["run"]["seed"] == 0
        and abs(row["run"]["learning_rate"] / LOWEST / ONE_RATE - 1) < 1e-6
    }
    lines = [
        f"## Variants (seed 0, rate {LOWEST * ONE_RATE:g})",
        "",
        "| variant | held-out loss | unique similarity (rank 1 %), last | change at the last"
        " refresh |",
        "|---|---|---|---|",
    ]
    for name in (name for name in CONTENDERS if name in at):
        observed = at[name]["observed"]
        last = lambda key, seen=observed: seen.get(key, {}).get(str(STEPS), "-")  # noqa: E731
        lines.append(
            f"| {name} | {spread([at[name]['final']])} | "
            f"{last('unique_similarity, rank 1 %')} | {last('refresh_change')} |"
        )
    return [*lines, ""]


def time_table():
    path = RESULTS / "sd_moe_time.json"
    if not path.exists():
        return []
    lines = ["## Overhead", "", "| step | plain ms | SD-MoE ms | ratio |", "|---|---|---|---|"]
    for name, row in json.loads(path.read_text()).items():
        if isinstance(row, dict):
            lines.append(f"| {name} | {row[PLAIN]} | {row[MAIN]} | {row['ratio']} |")
    return [*lines, ""]


def spread(values, digits=4):
    """Mean and, from two values on, the standard error."""
    if not values or None in values:
        return "diverged" if values else "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def plot(chosen):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, alike) = plt.subplots(1, 2, figsize=(9, 3.4))
    for name, found in chosen.items():
        results = list(found.values())
        steps = results[0]["steps"]
        mean = [statistics.mean(v) for v in zip(*(r["valid"] for r in results), strict=True)]
        losses.plot(steps[2:], mean[2:], label=name)
        for what in ("similarity", "unique_similarity"):
            key = f"{what}, rank 1 %"
            if key in results[0]["observed"]:
                values = [
                    statistics.mean(r["observed"][key][str(step)] for r in results)
                    for step in OBSERVED
                ]
                alike.plot(OBSERVED, values, marker="o", markersize=3, label=f"{name}: {what}")
    losses.set(xlabel="step", ylabel="held-out loss, nats per byte")
    alike.set(xlabel="step", ylabel="expert similarity", ylim=(0, 1))
    losses.legend(fontsize=7)
    alike.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "sd_moe.png", dpi=70)


SUMMARY = """
# SD-MoE against plain experts

`python scripts/reproduce_sd_moe.py`; one line for each run in [sd_moe.jsonl](sd_moe.jsonl).
± is the standard error over seeds; both contenders at their best rate of the same four.

![Held-out loss and expert similarity by step](sd_moe.png)
"""


def main(argv=None):
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    own.add_argument("--time", action="store_true")
    args, rest = own.parse_known_args(argv)
    if args.time:
        time_steps()
        return 0
    return Sweep(RESULTS / "sd_moe.jsonl", runs()).main(rest, execute, report)


if __name__ == "__main__":
    sys.exit(main())
