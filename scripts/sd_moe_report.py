"""Tables and curves of reproduce_sd_moe.py."""

import json
import statistics
from pathlib import Path

from lm.experiment import steps_to
from lm.files import atomic_write_text
from lm.sweep import best

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PLAIN, MAIN = "plain experts", "SD-MoE"
FACTORS = (1, 2, 4, 8)
ONE_RATE = 4.0  # of the variants


def write(rows, lowest: float, names, steps: int, observed) -> None:
    """docs/results/sd_moe.md and .png of everything that is finished."""
    lines = [SUMMARY.strip(), ""]
    swept = [row for row in rows if row["run"]["contender"] in (PLAIN, MAIN)]
    rates = best(swept, "contender", "final")
    chosen = {
        name: {r["run"]["seed"]: r["result"] for r in rows
               if (r["run"]["contender"], r["run"]["learning_rate"]) == (name, rate)}
        for name, rate in rates.items()
    }  # fmt: skip
    lines += main_table(rates, chosen, steps) + rate_table(swept, lowest)
    lines += similarity_table(rates, chosen, observed) + sides_table()
    lines += variant_table(rows, lowest, names, steps) + time_table()
    atomic_write_text(RESULTS / "sd_moe.md", "\n".join(lines).rstrip() + "\n")
    plot(chosen, observed)
    print(f"wrote {RESULTS / 'sd_moe.md'}")


def main_table(rates, chosen, total):
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
            share = f"{spread(reached, 0)} ({statistics.mean(reached) / total:.0%})"
            share += f", {len(needed) - len(reached)} never" if len(reached) < len(needed) else ""
        finals = [result["final"] for result in found.values()]
        lines.append(
            f"| {name} | {rates[name]:g} | {spread(finals)} | {spread(gaps)} | {share} |"
            f" {len(finals)} |"
        )
    return [*lines, ""]


def rate_table(rows, lowest):
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
                and abs(row["run"]["learning_rate"] / lowest / factor - 1) < 1e-6
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


def similarity_table(rates, chosen, steps):
    lines = [
        "## Experts' similarity over training",
        "",
        "At each contender's best rate, mean over seeds, layers, pairs, matrices and sides; chance"
        " is rank / 128. For SD-MoE, `similarity` is of whole experts W_c + W_u,i, alike by"
        " construction, `unique_similarity` of the W_u,i.",
        "",
        "| contender | quantity | " + " | ".join(f"step {step}" for step in steps) + " |",
        "|---" * (len(steps) + 2) + "|",
    ]
    for name, found in chosen.items():
        observed = [result["observed"] for result in found.values()]
        for quantity in sorted(observed[0]) if observed else ():
            cells = [
                f"{statistics.mean(each[quantity][str(step)] for each in observed):.3f}"
                for step in steps
            ]
            lines.append(f"| {name} | {quantity} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def variant_table(rows, lowest, names, steps):
    at = {}
    for row in rows:
        if abs(row["run"]["learning_rate"] / lowest / ONE_RATE - 1) < 1e-6:
            at.setdefault(row["run"]["contender"], {})[row["run"]["seed"]] = row["result"]
    lines = [
        f"## Variants (rate {lowest * ONE_RATE:g})",
        "",
        "| variant | held-out loss | minus plain (paired) | unique similarity (rank 1 %), last |"
        " change at the last refresh | seeds |",
        "|---|---|---|---|---|---|",
    ]
    plain = at.get(PLAIN, {})
    for name in (name for name in names if name in at):
        found = at[name]
        gaps = [found[seed]["final"] - plain[seed]["final"] for seed in found.keys() & plain.keys()]
        last = {}
        for key in ("unique_similarity, rank 1 %", "refresh_change"):
            seen = [each["observed"][key] for each in found.values() if key in each["observed"]]
            last[key] = f"{statistics.mean(s[str(steps)] for s in seen):.3f}" if seen else "-"
        finals = [result["final"] for result in found.values()]
        lines.append(
            f"| {name} | {spread(finals)} | {spread(gaps)} | {' | '.join(last.values())} |"
            f" {len(finals)} |"
        )
    return [*lines, ""]


def sides_table():
    path = RESULTS / "sd_moe_sides.json"
    if not path.exists():
        return []
    lines = [
        "## Where plain experts are alike",
        "",
        "Leading direction (rank 1 %) after the last step, seed 0; left is the side of the inputs."
        " Chance is 0.008.",
        "",
        "| matrix/side | of the weights | of their change since initialization |",
        "|---|---|---|",
    ]
    for name, row in json.loads(path.read_text()).items():
        lines.append(f"| {name} | {row['weights']} | {row['change']} |")
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


def plot(chosen, observed):
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
                    for step in observed
                ]
                alike.plot(observed, values, marker="o", markersize=3, label=f"{name}: {what}")
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

The paper (arXiv 2602.12556) trained 0.8 and 1.5 billion active parameters on 100 billion tokens.
Here are 0.5 million active parameters, 8 routed experts and a shared one, and 0.6 million tokens.
What this size shows:

- **SD-MoE is behind**: 0.016 nats at either's best rate, and it never reaches the plain experts'
  final loss, of which the paper says that it takes about 30 % fewer steps.
- **No wider range of rates**: twice and four times the best rate cost both about the same.
- **What it is meant to cure is not there**: plain experts are alike in 6 % of their leading
  direction and 10 % of the leading eight (chance: 1 and 6 %), also after 1000 steps (8 and 14 %),
  where the paper starts from more than 90 %. So that SD-MoE's own parts are below 0.1 proves
  nothing.
- **What overlap there is has one side**: what training adds to experts is alike where they meet the
  residual stream (inputs of gate and up, outputs of down), and at chance level on the side of the
  hidden units, which have no order in common. The double complement removes common directions on
  both sides; on the second there is nothing to remove, and what it takes away is just capacity.
- **The variants agree**: with 2 directions taken away it ties with plain experts, with 8 it is
  behind. Projecting the update alone costs half of projecting gradient and update, and keeping what
  a refresh displaces costs most; the rest is within errors.

![Held-out loss and expert similarity by step](sd_moe.png)
"""
