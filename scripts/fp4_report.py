"""The report of scripts/reproduce_fp4.py: tables and a plot, from its result files alone."""

import json
import statistics
from pathlib import Path

from lm.files import atomic_write_text

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
PUBLISHED = """
| 30M parameters, tokens a parameter | 25 | 98 |
|---|---|---|
| NVIDIA's recipe, 17/16, no BF16 layers | 1.60 % | 2.45 % |
| TetraJet-v2 | 1.58 % | 2.23 % |
| Quartet II | 1.26 % | 1.84 % |
""".strip()


def gaps(rows, size: str, rate: float) -> dict[str, list[float | None]]:
    """Relative gap of the held-out loss to bf16 of the same seed, in percent, by recipe."""
    final = {
        (row["run"]["recipe"], row["run"]["seed"]): row["result"]["final"]
        for row in rows
        if row["run"]["size"] == size and row["run"]["learning_rate"] == rate
    }
    found: dict[str, list[float | None]] = {}
    for (recipe, seed), loss in sorted(final.items(), key=lambda item: item[0][1]):
        base = final.get(("bf16", seed))
        if base is not None and recipe != "bf16":
            gap = None if loss is None else 100 * (loss - base) / base
            found.setdefault(recipe, []).append(gap)
    return found


def spread(values, digits=2) -> str:
    """Mean and, from two values on, the standard error."""
    good = [value for value in values if value is not None]
    if len(good) < len(values):
        return f"{len(values) - len(good)} of {len(values)} diverged"
    mean = f"{statistics.mean(good):+.{digits}f}"
    if len(good) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(good) / len(good) ** 0.5:.{digits}f}"


def losses(rows, size: str, recipe: str):
    """Held-out losses by learning rate."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["run"]["size"], row["run"]["recipe"]) == (size, recipe):
            found.setdefault(row["run"]["learning_rate"], []).append(row["result"]["final"])
    return found


def training(rows, size: str, rate: float, order) -> list[str]:
    """The section of one size."""
    found = gaps(rows, size, rate)
    swept = losses(rows, size, "bf16")
    text = "; ".join(f"{r:g}: {statistics.mean(v):.4f}" for r, v in sorted(swept.items()))
    base = swept.get(rate, [])
    lines = [
        f"## {size}",
        "",
        f"bf16 at the swept rates: {text}; used: {rate:g} ({len(base)} seeds, nats per byte).",
        "",
        "| recipe | loss gap to bf16, % (paired) | seeds | minus plain nvfp4, points (paired) |",
        "|---|---|---|---|",
    ]
    plain = found.get("nvfp4", [])
    for name in (name for name in order if name in found):
        values = found[name]
        both = [
            a - b for a, b in zip(values, plain, strict=False) if a is not None and b is not None
        ]
        against = spread(both) if both and name != "nvfp4" else "-"
        lines.append(f"| {name} | {spread(values)} | {len(values)} | {against} |")
    return [*lines, ""]


def diagnostics(path: Path) -> list[str]:
    """The section of what happens at fixed weights."""
    table = json.loads(path.read_text())
    steps = [str(step) for step in table["steps"]]
    lines = [
        f"## At fixed weights of a bf16 run ({table['size']})",
        "",
        "Same weights, same batch, no training noise: gap of the loss; error of the gradient of "
        "all block weights, and the part that does not average out over roundings (8 draws; an "
        "unbiased gradient would show error / sqrt(8)).",
        "",
        "| recipe | " + " | ".join(f"step {step}: loss %, error, bias" for step in steps) + " |",
        "|---|" + "---|" * len(steps),
    ]
    for name, found in table["recipes"].items():
        cells = (
            f"{100 * found[s]['loss_gap']:+.2f}, {found[s]['gradient_error']:.3f}, "
            f"{found[s]['gradient_bias']:.3f}"
            for s in steps
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    names = table["names"]
    lines += [
        "",
        "Where the energy is, mean over layers, at those steps:",
        "",
        "| product | mean share of x | mean share of d | leading 1.5 % of x | of w | of d |",
        "|---|---|---|---|---|---|",
    ]
    shares = [names.index(name) for name in names if "_share" in name]
    for site in table["layers"][steps[0]]:
        cells = []
        for index in shares:
            over = [
                statistics.mean(row[index] for row in table["layers"][step][site]) for step in steps
            ]
            cells.append(" / ".join(f"{value:.0%}" for value in over))
        lines.append(f"| {site.removeprefix('layers.')} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def plot(rows, sizes: dict[str, float], order) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    present = [size for size in sizes if gaps(rows, size, sizes[size])]
    figure, axes = plt.subplots(1, len(present), figsize=(5 * len(present), 3.6), squeeze=False)
    for axis, size in zip(axes[0], present, strict=True):
        found = gaps(rows, size, sizes[size])
        names = [name for name in order if name in found][::-1]
        for at, name in enumerate(names):
            values = [value for value in found[name] if value is not None]
            axis.plot(values, [at] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
            if values:
                axis.plot(statistics.mean(values), at, "|", color="black", markersize=12)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_xlabel("loss gap to bf16, %")
        axis.set_title(size, fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS / "fp4.png", dpi=70)


def write(rows, sizes: dict[str, float], order, summary: str) -> None:
    """docs/results/fp4.md and fp4.png."""
    lines = [summary.strip(), ""]
    for size, rate in sizes.items():
        if gaps(rows, size, rate):
            lines += training(rows, size, rate, order)
    for size in sizes:
        path = RESULTS / f"fp4_diagnostics_{size}.json"
        if path.exists():
            lines += diagnostics(path)
    lines += ["## Published, for comparison", "", PUBLISHED, "", "(arXiv 2601.22813, run files.)"]
    atomic_write_text(RESULTS / "fp4.md", "\n".join(lines) + "\n")
    plot(rows, sizes, order)
    print(f"wrote {RESULTS / 'fp4.md'}")
