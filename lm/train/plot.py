"""The loss curve of a run as a picture."""

import io
import math
import os
from typing import Any

from lm.files import atomic_write_bytes
from lm.train.metrics import read_metrics


def loss_curve(metrics_path: str | os.PathLike, out_png: str | os.PathLike) -> None:
    """Draw training and evaluation loss (nats per token) of a metrics.jsonl over tokens seen.

    The raw training loss is light, its moving average dark; steps whose update was
    skipped are marked at the bottom; the upper axis counts steps. Losses that are not finite are
    left out. The picture replaces `out_png` atomically. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read_metrics(metrics_path)
    train = _series(rows, "loss")
    evaluation = _series(rows, "eval_loss")
    # No pyplot: nothing global, no window, safe beside a caller's own figures.
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    one = {"marker": "o", "markersize": 4} if len(train) == 1 else {}
    if train:
        tokens, losses = zip(*train, strict=True)
        axes.plot(tokens, losses, color="#9ecae1", linewidth=1, label="training", **one)
        smooth = smoothed(losses)
        label = f"training, smoothed ({smooth[-1]:.3f})"
        axes.plot(tokens, smooth, color="#08519c", linewidth=1.8, label=label)
    if evaluation:
        tokens, losses = zip(*evaluation, strict=True)
        label = f"held out ({losses[-1]:.3f})"
        axes.plot(tokens, losses, "o-", color="#d94801", linewidth=1, markersize=4, label=label)
    if skips := _skips(rows):
        axes.plot(
            skips,
            [0.02] * len(skips),
            linestyle="none",
            marker="x",
            color="#a50f15",
            transform=axes.get_xaxis_transform(),
            label="update skipped",
        )
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["right", "top"]].set_visible(False)
    if train or evaluation or skips:
        axes.legend(frameon=False)
    if per_step := _tokens_per_step(rows):
        upper = axes.secondary_xaxis("top", (lambda x: x / per_step, lambda x: x * per_step))
        upper.set_xlabel("step")
        upper.spines["top"].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    atomic_write_bytes(out_png, picture.getvalue())


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Moving average over about a twentieth of the values, centred so that it does not lag.

    Windows shrink evenly towards the first value (the curve is steep there) and are cut at the
    last.
    """
    half, out = len(values) // 40, []
    for i in range(len(values)):
        reach = min(half, i)
        window = values[i - reach : i + reach + 1]
        out.append(sum(window) / len(window))
    return out


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(tokens, value) of the rows that hold a finite number under `key`."""
    return [
        (row["tokens"], row[key])
        for row in rows
        if isinstance(row.get(key), int | float) and math.isfinite(row[key]) and "tokens" in row
    ]


def _skips(rows: list[dict[str, Any]]) -> list[float]:
    """Tokens at the rows where the count of skipped updates rises."""
    counted, marks = 0, []
    for row in rows:
        count = row.get("skipped") or 0
        if count > counted:
            marks.append(row["tokens"])
        counted = max(counted, count)
    return marks


def _tokens_per_step(rows: list[dict[str, Any]]) -> float | None:
    last = next((row for row in reversed(rows) if row.get("tokens") and row["step"]), None)
    return last["tokens"] / last["step"] if last else None
