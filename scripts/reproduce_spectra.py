"""Spectra against AdamW and Muon: steps to AdamW's final loss, learning rate swept for each.

    python scripts/reproduce_spectra.py --list
    python scripts/reproduce_spectra.py --only corpus=stdlib        # about 1 to 4 minutes a run
    python scripts/reproduce_spectra.py --data-dir DIR --only corpus=technical
    python scripts/reproduce_spectra.py --time          # a whole step of each, for the report
    python scripts/reproduce_spectra.py --report

Decoders of about 0.2, 0.9 and 2 million parameters, byte tokens, 300 steps of 16 x 128 tokens,
warm-up 30 and cosine to 10 %, weight decay 0.1, clip 1; equal initialization and data order for
each seed. `stdlib` is Python's own standard library; `technical` a mixture of three domains
(DIR/{english_tech,python_code,c_code}.{train,valid}.parquet). Every finished run is one line of
docs/results/spectra.jsonl; the report is docs/results/spectra.md and spectra.png.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

import optim
from lm import recipes
from lm.config import ModelConfig
from lm.experiment import Experiment, steps_to
from lm.files import atomic_write_json, atomic_write_text
from lm.sweep import Sweep, best
from lm.train.optimizer import OPTIMIZERS
from lm.train.spectrum_log import momentum

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
STEPS, EVAL_EVERY, WARMUP = 300, 20, 30
SIZES = {"d64": (64, 3), "d128": (128, 3), "d256": (256, 2)}
PAPER = {"name": "spectra"}
OURS = PAPER | {"nesterov": True, "normalization": "factored", "rank_ratio": 0.25}
CONTENDERS = {
    "AdamW": {"name": "adamw"},
    "Muon": {"name": "muon"},
    "Spectra 1.5 % (paper)": PAPER,
    "Spectra ours: auto up to 25 %, Nesterov, factored": OURS | {"rank": "auto"},
    "25 %, Nesterov, factored": OURS,
    "12.5 %, Nesterov, factored": OURS | {"rank_ratio": 0.125},
    "25 %, Nesterov": PAPER | {"nesterov": True, "rank_ratio": 0.25},
    "25 %, factored": OURS | {"nesterov": False},
    "1.5 %, Nesterov": PAPER | {"nesterov": True},
    "1.5 %, Nesterov, factored": OURS | {"rank_ratio": 0.015},
}
MAIN = tuple(CONTENDERS)[:4]
LOW, HIGH = (1.5e-3, 3e-3, 6e-3), (5e-3, 1e-2, 2e-2)
RATES = {"AdamW": LOW, "Spectra 1.5 % (paper)": LOW, "Muon": HIGH, MAIN[3]: HIGH}
# What the variants were tried at: the best of their relatives among the main contenders.
ONE_RATE = {name: (3e-3,) if "1.5 %" in name else (1e-2,) for name in CONTENDERS}
DOMAINS = ("english_tech", "python_code", "c_code")


# Seeds after the first run at the best rates of the first; width 256 at those of width 128.
BEST = {
    ("stdlib", "d128"): dict(zip(MAIN, (3e-3, 1e-2, 3e-3, 1e-2), strict=True)),
    ("stdlib", "d64"): dict(zip(MAIN, (6e-3, 1e-2, 6e-3, 2e-2), strict=True)),
    ("stdlib", "d256"): dict(zip(MAIN, (3e-3, 1e-2, 3e-3, 1e-2), strict=True)),
}


def runs():
    """Seed by seed, so that an unfinished sweep is complete for its first seeds."""
    found = []

    def add(corpus, size, contender, rates, seed):
        run = dict(corpus=corpus, size=size, contender=contender)
        found.extend(run | {"learning_rate": rate, "seed": seed} for rate in rates)

    for corpus, size in (("stdlib", "d128"), ("stdlib", "d64"), ("technical", "d128")):
        for contender in CONTENDERS if (corpus, size) == ("stdlib", "d128") else MAIN:
            add(corpus, size, contender, RATES.get(contender, ONE_RATE[contender]), 0)
    # The best of the first sweep lay at the edge of its grid.
    for contender, rate in ((MAIN[0], 1.2e-2), (MAIN[2], 1.2e-2), (MAIN[3], 4e-2)):
        add("stdlib", "d64", contender, (rate,), 0)
    for (corpus, size), rates in BEST.items():
        for seed in (0,) if size == "d256" else (1, 2):
            for contender, rate in rates.items():
                add(corpus, size, contender, (rate,), seed)
    return found


@functools.cache
def experiment(corpus: str, size: str, data_dir: str) -> Experiment:
    width, layers = SIZES[size]
    base = recipes.get("tiny")
    model = ModelConfig(
        vocab_size=base.model.vocab_size,
        num_layers=layers,
        d_model=width,
        num_heads=width // 32,
        d_ff=4 * width,
        max_context=128,
        unroll=layers,
    )
    data = base.data
    if corpus != "stdlib":
        sources = [
            {
                "name": name,
                "source": "parquet",
                "weight": 1,
                "path": str(Path(data_dir, f"{name}.train.parquet").resolve()),
                "valid_path": str(Path(data_dir, f"{name}.valid.parquet").resolve()),
            }
            for name in DOMAINS
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(sources, file)
        data = dataclasses.replace(data, source="mixture", path=file.name)
    config = dataclasses.replace(
        base,
        model=model,
        data=data,
        steps=STEPS,
        batch_size=16,
        sequence_length=128,
        optim=dataclasses.replace(base.optim, warmup_steps=WARMUP),
    )
    return Experiment(config, 16)


def execute(run, data_dir: str):
    found = experiment(run["corpus"], run["size"], data_dir)
    config = dataclasses.replace(found.config.optim, **CONTENDERS[run["contender"]])
    spikes = {}

    def observe(step, state, metrics):
        if run["seed"] == 0 and step in (1, 30, 100, 200, STEPS):
            spikes[step] = round(float(spike(state)), 4)

    curve = found.run(
        run["contender"],
        lambda schedule: OPTIMIZERS[config.name](config, schedule),
        learning_rate=run["learning_rate"],
        seed=run["seed"],
        eval_every=EVAL_EVERY,
        observe=observe,
    )
    return curve.as_row() | ({"spike_50": spikes} if spikes else {})


def time_steps(rounds: int = 12) -> None:
    """Milliseconds of a whole training step, contenders in turn; on an idle machine."""
    rows = {}
    for size in SIZES:
        found = experiment("stdlib", size, "")
        batch = found.loader(0).batch(0)
        steps, states, spent = {}, {}, {}
        for name in MAIN:
            config = dataclasses.replace(found.config.optim, **CONTENDERS[name])
            make = lambda schedule, c=config: OPTIMIZERS[c.name](c, schedule)  # noqa: E731
            init, steps[name] = found.compile(make, batch)
            states[name], spent[name] = init(0), []
        rate = jnp.asarray(1e-3, jnp.float32)
        for _ in range(rounds):
            for name, step in steps.items():
                began = time.perf_counter()
                for _ in range(5):
                    states[name], _ = step(states[name], batch, rate)
                jax.block_until_ready(states[name])
                spent[name].append((time.perf_counter() - began) / 5 * 1e3)
        rows[size] = {name: round(statistics.median(times), 2) for name, times in spent.items()}
        print(size, rows[size])
    atomic_write_json(RESULTS / "spectra_time.json", rows | {"jax": jax.__version__})


@jax.jit
def spike(state):
    """Mean over matrices of the share of directions that hold half of the momentum's energy."""
    tree = momentum(state.params, state.opt_state)["layers"]
    matrices = jax.tree.map(lambda m: m if m.ndim == 3 else None, tree)
    stats = optim.spectrum_stats(matrices)
    leaves = jax.tree.leaves(stats, is_leaf=lambda s: isinstance(s, optim.SpectrumStats))
    return jnp.mean(jnp.stack([jnp.mean(s.spike_50) for s in leaves]))


def report(rows):
    """Tables and curves of everything that is finished."""
    lines = [SUMMARY.strip(), ""]
    groups = {(row["run"]["corpus"], row["run"]["size"]): [] for row in rows}
    for row in rows:
        groups[row["run"]["corpus"], row["run"]["size"]].append(row)
    for (corpus, size), group in groups.items():
        lines += table(corpus, size, group)
    atomic_write_text(RESULTS / "spectra.md", "\n".join(lines).rstrip() + "\n")
    plot(groups)
    print(f"wrote {RESULTS / 'spectra.md'}")


def best_rates(rows):
    """By the first seed, which has every rate; a mean over other seeds would not compare."""
    return best([row for row in rows if row["run"]["seed"] == 0], "contender", "final")


def table(corpus, size, rows):
    rates = best_rates(rows)
    at_best = {
        name: [row for row in rows if (row["run"]["contender"], row["run"]["learning_rate"])
               == (name, rates[name])]
        for name in CONTENDERS if name in rates
    }  # fmt: skip
    target = {row["run"]["seed"]: row["result"]["final"] for row in at_best.get("AdamW", ())}
    muon = {row["run"]["seed"]: row["result"]["final"] for row in at_best.get("Muon", ())}
    width, layers = SIZES[size]
    timed = RESULTS / "spectra_time.json"
    milliseconds = json.loads(timed.read_text())[size] if timed.exists() else {}
    lines = [
        f"## {corpus}, width {width}, {layers} layers",
        "",
        "| contender | best rate | held-out loss | minus Muon (paired) | steps to AdamW's loss |"
        " ms a step | seeds | losses at the swept rates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in at_best.items():
        swept = {}
        for row in rows:
            if row["run"]["contender"] == name:
                swept.setdefault(row["run"]["learning_rate"], []).append(row["result"]["final"])
        finals = [row["result"]["final"] for row in found]
        gaps = [
            row["result"]["final"] - muon[row["run"]["seed"]]
            for row in found
            if row["run"]["seed"] in muon
        ]
        needed = [
            steps_to(row["result"]["steps"], row["result"]["valid"], target[row["run"]["seed"]])
            for row in found
            if row["run"]["seed"] in target
        ]
        reached = [steps for steps in needed if steps is not None]
        share = f"{spread(reached, 0)} ({statistics.mean(reached) / STEPS:.0%})" if reached else "-"
        if len(reached) < len(needed):
            share += f", {len(needed) - len(reached)} never"
        cells = "; ".join(f"{rate:g}: {spread(values)}" for rate, values in sorted(swept.items()))
        lines.append(
            f"| {name} | {rates[name]:g} | {spread(finals)} | {spread(gaps, 4) if gaps else '-'} |"
            f" {share} | {milliseconds.get(name, '-')} | {len(found)} | {cells} |"
        )
    spikes = [row for row in rows if "spike_50" in row["result"]]
    if spikes:
        lines += ["", "Share of directions holding half of the momentum's energy, by step:", ""]
        for row in spikes:
            name, rate = row["run"]["contender"], row["run"]["learning_rate"]
            if rate == rates[name] and name in MAIN:
                values = row["result"]["spike_50"].items()
                lines.append(f"- {name}: " + ", ".join(f"{s}: {v:.1%}" for s, v in values))
    return [*lines, ""]


def spread(values, digits=4):
    """Mean and, from two values on, the standard error."""
    values = [value for value in values if value is not None]
    if not values:
        return "diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def plot(groups):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.4), squeeze=False)
    for axis, ((corpus, size), rows) in zip(axes[0], groups.items(), strict=True):
        rates = best_rates(rows)
        for name in (name for name in CONTENDERS if name in rates):
            curves = [
                row["result"]["valid"]
                for row in rows
                if (row["run"]["contender"], row["run"]["learning_rate"]) == (name, rates[name])
            ]
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            steps = rows[0]["result"]["steps"]
            axis.plot(steps[2:], mean[2:], label=name, linewidth=1.2)
        axis.set_title(f"{corpus}, {size}", fontsize=9)
        axis.set_xlabel("step")
    axes[0][0].set_ylabel("held-out loss, nats per byte")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(RESULTS / "spectra.png", dpi=70)


SUMMARY = """
# Spectra against AdamW and Muon

`python scripts/reproduce_spectra.py`; one line for each run in [spectra.jsonl](spectra.jsonl).
Learning rate swept for every contender, best against best; ± is the standard error over seeds.

![Held-out loss by step](spectra.png)

"Spectra ours" is `rank="auto"` of at most 25 % of the directions, Nesterov momentum and factored
normalization. It was picked among the variants on the first seed of `stdlib`, width 128; the other
seeds, widths and corpus played no part in that.

- **The paper's setting** (1.5 %) does not reach AdamW's loss at widths 64 and 128 and just reaches
  it at 256 (one seed, 98 % of the steps): the 30 % fewer steps do not appear below some larger
  width, but the gap closes with width. Half of the momentum's energy lies in 1 to 6 % of the
  directions while training, the less the wider the matrices: the paper's 1.5 % is the right order.
- **Ours** needs about 40 % fewer steps than AdamW at every size and corpus tried, and ends below
  Muon at widths 64 and 128 (three seeds on `stdlib`, one on `technical`); at width 256 (one seed,
  one rate) the two are equal.
- **What does it**: the number of directions first, then Nesterov momentum and normalization, each
  worth 0.04 to 0.05 at 25 %; `auto`, which leaves directions inside of the noise alone, gives
  another 0.012 (one seed).
"""


def main(argv=None):
    own = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    own.add_argument("--data-dir", default="")
    own.add_argument("--time", action="store_true")
    args, rest = own.parse_known_args(argv)
    if args.time:
        time_steps()
        return 0
    sweep = Sweep(RESULTS / "spectra.jsonl", runs())
    if not args.data_dir and not {"--list", "--report"} & set(rest):
        sweep.runs = [run for run in sweep.runs if run["corpus"] == "stdlib"]
        print("without --data-dir only the runs on stdlib are done", file=sys.stderr)
    return sweep.main(rest, lambda run: execute(run, args.data_dir), report)


if __name__ == "__main__":
    sys.exit(main())
