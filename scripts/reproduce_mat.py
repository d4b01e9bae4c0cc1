"""Modular adaptive training against full training: FLOPs and time to equal held-out loss.

    python scripts/reproduce_mat.py            # the missing runs, resumable
    python scripts/reproduce_mat.py --list
    python scripts/reproduce_mat.py --report   # docs/results/mat.md and mat.png from the file alone

First the base optimizer's learning rate is swept; the other runs take the best one. Contenders are
full training (also of fewer steps: the other way to save FLOPs), MAT over layers and over heads,
and a random choice of as many modules. `--limit N` and `--only KEY=VALUE` are those of `lm.sweep`.
Docs: docs/results/mat.md.
"""

import argparse
import functools
import io
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.config import ModelConfig
from lm.experiment import Experiment
from lm.files import atomic_write_bytes, atomic_write_text
from lm.sweep import Sweep, best
from lm.train.config import EvalConfig, GuardConfig, MatConfig, OptimConfig, RunConfig
from lm.train.modular import Refresher, make_run_optimizer
from lm.train.step import make_train_step

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
SEEDS = (0, 1, 2)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
STEPS = 300
SHORTER = (0.5, 0.67, 0.83)
"""Lengths of full training, in shares of STEPS."""
LONGER = (1.0, 1.5)
"""Lengths of the others."""
RULES = {
    # The threshold with the temporal rule, and the share that the paper arrived at. A threshold of
    # 0.1 leaves nearly all modules of so small a model active.
    "alpha": {"alpha": 0.5, "beta": 1e-3},
    "share": {"target_active": 0.34, "beta": 0.0},
}
LABELS = {"full": "full training"} | {
    f"{family}-{rule}-{choice}": f"{family}, {label}, {choice}"
    for family in ("layers", "heads")
    for rule, label in (("alpha", "half of the largest"), ("share", "34 % of the modules"))
    for choice in ("eigenvalue", "random")
}
START, END = "<!-- results -->", "<!-- end of results -->"


def config(contender: str, steps: int, seed: int) -> RunConfig:
    """The run of a contender; all but `optim.name` and `mat` is common."""
    mat = MatConfig()
    if contender != "full":
        family, rule, choice = contender.split("-")
        mat = MatConfig(
            family=family,
            rule=choice,
            start=STEPS // 10,
            every=STEPS // 10,
            probes=8,
            chunk=4,
            **RULES[rule],
        )
    return RunConfig(
        steps=steps,
        seed=seed,
        batch_size=12,
        sequence_length=128,
        model=ModelConfig(
            vocab_size=264, num_layers=4, d_model=128, num_heads=4, d_ff=352, max_context=128,
            dtype="float32",
        ),
        optim=OptimConfig(
            name=mat.base if contender == "full" else "mat", warmup_steps=STEPS // 10
        ),
        mat=mat,
        guard=GuardConfig(spike_sigma=0.0),
        eval=EvalConfig(batches=16),
    )  # fmt: skip


@functools.cache
def experiment(steps: int) -> Experiment:
    """Text, held-out batches and the evaluation's program, common to all runs of a length."""
    return Experiment(config("full", steps, 0))


def execute(run: Mapping[str, Any]) -> dict[str, Any]:
    """Train one contender; FLOPs are counted in full steps (forward and whole backward pass)."""
    setting = config(run["contender"], run["steps"], run["seed"])
    common = experiment(run["steps"])
    peak = jnp.asarray(run["learning_rate"], jnp.float32)
    loader = common.loader(run["seed"])
    refresher = Refresher(setting, loader, sharding.make_mesh({"data": 1}, jax.devices()[:1]))

    def tools(peak):
        unit = common.optimizer(None, 1.0)[1]
        return make_run_optimizer(setting, lambda count: peak * unit(count))

    def one(state, batch, peak):
        return make_train_step(setting, *tools(peak))(state, batch)

    state = jax.jit(lambda: common.init(tools(1.0)[0], run["seed"]))()
    step = jax.jit(one, donate_argnums=0).lower(state, loader.batch(0), peak).compile()
    refresher.prepare(state)
    every = max(STEPS // 20, 1)
    points, spent, seconds, shares = [], [], 0.0, []
    refreshes = 0
    began = time.perf_counter()
    for index in range(run["steps"]):
        if refresher.due(index):
            state, _ = refresher.refresh(state, index)
            refreshes += 1
        state, metrics = step(state, loader.batch(index), peak)
        spent.append(metrics.get("mat/flops", 1.0))
        shares.append(metrics.get("mat/active", 1.0))
        if (index + 1) % every == 0 or index + 1 == run["steps"]:
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            cost = float(sum(map(float, spent)))
            cost += refreshes * setting.mat.probes / setting.batch_size
            loss = common.evaluate(state.params)
            points.append((index + 1, cost, seconds, loss))
            began = time.perf_counter()
    number = lambda x: round(float(x), 4) if math.isfinite(x) else None  # noqa: E731
    return {
        "final": number(points[-1][3]),
        "flops": number(points[-1][1]),
        "train_seconds": number(seconds),
        "active": number(np.mean([float(x) for x in shares])),
        "curve": [[number(x) for x in point] for point in points],
    }


def first_runs() -> list[dict[str, Any]]:
    """The learning-rate sweep of full training."""
    return [
        {"contender": "full", "steps": STEPS, "learning_rate": rate, "seed": seed}
        for seed in SEEDS
        for rate in RATES
    ]


def other_runs(rate: float) -> list[dict[str, Any]]:
    """Everything else, at the best learning rate of full training."""
    lengths = [("full", share) for share in SHORTER]
    lengths += [(name, share) for name in LABELS if name != "full" for share in LONGER]
    return [
        {
            "contender": name,
            "steps": round(share * STEPS),
            "learning_rate": rate,
            "seed": seed,
        }
        for seed in SEEDS
        for name, share in lengths
    ]


def best_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """The learning rate of full training with the lowest mean loss."""
    full = [r for r in rows if r["run"]["contender"] == "full" and r["run"]["steps"] == STEPS]
    return best(full, by="contender", value="final")["full"]


Group = dict[tuple[str, int], dict[int, Mapping[str, Any]]]
"""Results by (contender, steps) and seed."""


def grouped(rows: Sequence[Mapping[str, Any]]) -> Group:
    """Finished runs at the best learning rate."""
    rate, groups = best_rate(rows), {}
    for row in rows:
        run = row["run"]
        if run["learning_rate"] == rate and row["result"]["final"] is not None:
            key = run["contender"], run["steps"]
            groups.setdefault(key, {})[run["seed"]] = row["result"]
    return groups


def full_loss_at(groups: Group, seed: int, flops: float) -> float | None:
    """Final loss of full training of a length that costs `flops`: linear in log FLOPs."""
    points = sorted(
        (found[seed]["flops"], found[seed]["final"])
        for (name, _), found in groups.items()
        if name == "full" and seed in found
    )
    if not points or not points[0][0] <= flops <= points[-1][0]:
        return None
    x, y = zip(*points, strict=True)
    return float(np.interp(math.log(flops), np.log(x), y))


def cost_of_loss(groups: Group, name: str, seed: int, target: float, field: str) -> float | None:
    """`field` (flops, train_seconds) of a run long enough to end at `target`, or None.

    Between two lengths of the contender, linear in the final loss; never beyond them.
    """
    points = sorted(
        (found[seed]["final"], found[seed][field])
        for (contender, _), found in groups.items()
        if contender == name and seed in found
    )
    if len(points) < 2 or not points[0][0] <= target <= points[-1][0]:
        return None
    losses, costs = zip(*points, strict=True)
    return float(np.interp(target, losses, costs))


def spread(values: Sequence[float | None], form: str = "{:.3f}") -> str:
    """Mean and standard error over seeds; "no" if any seed has none."""
    if not values or any(value is None for value in values):
        return "no"
    mean = form.format(statistics.fmean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values) / math.sqrt(len(values)))}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as markdown."""
    groups = grouped(rows)
    whole = groups[("full", STEPS)]
    head = [
        "", "steps", "seeds", "active", "FLOPs", "seconds", "final loss",
        "minus full training of equal FLOPs",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    order = list(LABELS)
    for name, steps in sorted(groups, key=lambda key: (order.index(key[0]), key[1])):
        found = groups[name, steps]
        seeds = sorted(set(found) & set(whole))
        ratio = lambda field: [found[s][field] / whole[s][field] for s in seeds]  # noqa: E731,B023
        gaps = []
        for seed in seeds:
            other = full_loss_at(groups, seed, found[seed]["flops"])
            gaps.append(None if other is None else found[seed]["final"] - other)
        cells = [
            LABELS[name],
            str(steps),
            str(len(seeds)),
            f"{statistics.fmean(found[s]['active'] for s in seeds):.0%}",
            f"{statistics.fmean(ratio('flops')):.3f}",
            f"{statistics.fmean(ratio('train_seconds')):.3f}",
            spread([found[s]["final"] for s in seeds]),
            "" if name == "full" else spread(gaps, "{:+.3f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Cost of the final loss of full training, as a share of its own:", ""]
    lines += ["| | FLOPs | seconds |", "|---|---|---|"]
    for name in LABELS:
        seeds = [s for s in whole if any(s in groups.get((name, n), {}) for _, n in groups)]
        if name == "full" or not seeds:
            continue
        cells = []
        for field in ("flops", "train_seconds"):
            costs = [cost_of_loss(groups, name, s, whole[s]["final"], field) for s in seeds]
            shares = [c and c / whole[s][field] for c, s in zip(costs, seeds, strict=True)]
            cells.append(spread(shares, "{:.2f}"))
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    lines += ["", "Learning rates of full training (final loss):", ""]
    for rate in RATES:
        finals = [
            row["result"]["final"]
            for row in rows
            if row["run"]["contender"] == "full"
            and (row["run"]["learning_rate"], row["run"]["steps"]) == (rate, STEPS)
        ]
        lines.append(f"- {rate:g}: {'diverged' if None in finals else spread(finals)}")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: final loss over counted FLOPs and over wall time, one line for each contender."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = grouped(rows)
    figure = Figure(figsize=(10, 4.2), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    whole = groups[("full", STEPS)]
    for axis, field, label in zip(
        axes, ("flops", "train_seconds"), ("counted FLOPs", "wall time"), strict=True
    ):
        unit = statistics.fmean(result[field] for result in whole.values())
        for number, name in enumerate(LABELS):
            points = sorted(
                tuple(statistics.fmean(r[f] for r in found.values()) for f in (field, "final"))
                for (contender, _), found in groups.items()
                if contender == name
            )
            if points:
                x, y = zip(*points, strict=True)
                style = "k-o" if name == "full" else "--x" if name.endswith("random") else "-o"
                color = {} if name == "full" else {"color": f"C{(number - 1) // 2}"}
                axis.plot(np.array(x) / unit, y, style, label=LABELS[name], markersize=4, **color)
        axis.set_xlabel(f"{label} (full training = 1)")
    axes[0].set_ylabel("final held-out loss (nats per byte)")
    axes[1].legend(frameon=False, fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def report(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """Put the tables into `page`, between its two marks, and the picture beside it."""
    if not any(r["run"]["contender"] == "full" and r["run"]["steps"] == STEPS for r in rows):
        raise SystemExit(f"there is no finished run of full training over {STEPS} steps yet")
    before, _, rest = page.read_text().partition(START)
    after = rest.partition(END)[2]
    devices = "; ".join(sorted({f"{row['device']}, {row['versions']}" for row in rows}))
    image = page.with_suffix(".png")
    body = (
        f"{table(rows)}\n\n![final loss over FLOPs and time]({image.name})\n\n"
        f"{len(rows)} runs on {devices}."
    )
    atomic_write_bytes(image, picture(rows))
    atomic_write_text(page, f"{before}{START}\n{body}\n{END}{after}")
    print(body)


def main(argv: Sequence[str] | None = None) -> int:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--results", type=Path, default=RESULTS / "mat.jsonl")
    own.add_argument("--page", type=Path, default=RESULTS / "mat.md")
    args, rest = own.parse_known_args(argv)
    draw = functools.partial(report, page=args.page)
    sweep = Sweep(args.results, first_runs())
    if sweep.missing() and "--report" not in rest:
        sweep.main(rest, execute, draw)
    if sweep.missing() and "--report" not in rest:
        print("the other runs follow when the learning rates of full training are done")
        return 0
    rate = best_rate(sweep.rows()) if sweep.rows() else RATES[0]
    return Sweep(args.results, first_runs() + other_runs(rate)).main(rest, execute, draw)


if __name__ == "__main__":
    sys.exit(main())
