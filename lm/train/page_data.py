"""The numbers behind a report page: columns of every run, thinned so that no spike is lost."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm.train.history import History

POINTS = 1500
"""Points kept of a series in the main charts; a chart is not wider in pixels."""
REST = 400
"""Points kept of all other series."""

# Figures in their order: title, unit, keys. Several keys are drawn dashed into one figure.
FIGURES = (
    ("Loss", "nats per token", ("loss", "eval_loss")),
    ("Learning rate", "", ("learning_rate",)),
    ("Gradient norm", "", ("grad_norm",)),
    ("Update norm", "", ("update_norm",)),
    ("Parameter norm", "", ("param_norm",)),
    ("Step time", "s, each step", ("step_duration",)),
    ("Throughput", "tokens/s", ("tokens_per_second",)),
    ("MFU", "causal; dashed: full square", ("mfu_causal", "mfu_full")),
    ("Goodput so far", "share of all time", ("goodput",)),
    ("Wait for data", "s since the last row", ("data_wait_seconds",)),
    ("Peak memory", "GiB on the fullest device", ("memory_gib",)),
    ("Memory headroom", "share of the limit", ("memory_headroom",)),
    (
        "Step time over hosts",
        "s, slowest; dashed: median",
        ("hosts/step_seconds_max", "hosts/step_seconds_median"),
    ),
    (
        "Busy time of hosts",
        "s a step, busiest; dashed: median",
        ("hosts/busy_seconds_max", "hosts/busy_seconds_median"),
    ),
    ("Busiest host", "process", ("hosts/slowest",)),
    ("Updates skipped", "so far", ("skipped",)),
)
_HIDDEN = {"step", "tokens", "time", "memory_bytes", "bits_per_byte", "consecutive_skips"}


def tables(run: History) -> list[dict[str, Any]]:
    """The tables of a run for the page: the rows of its log, and the durations of its steps."""
    rows = [
        row | {"memory_gib": row["memory_bytes"] / 2**30} if row.get("memory_bytes") else row
        for row in run.rows
    ]
    steps = _step_rows(run)
    if not steps:  # no timeline: the mean over each interval
        steps = [
            {axis: row[axis] for axis in _AXES if axis in row} | {"step_duration": seconds}
            for row in rows
            if (seconds := row.get("step_seconds"))
        ]
    times = [event["time"] for event in run.events[:1]]
    begin = min([*times, *(row["time"] for row in rows[:1] if "time" in row)], default=0.0)
    return [_table(found, begin) for found in (rows, steps) if found]


def figures(runs: Sequence[History]) -> tuple[list[tuple], dict[str, list[str]]]:
    """The figures that have anything to show, and the remaining keys by group."""
    have = {key for run in runs for table in tables(run) for key in table["series"]}
    shown = [
        (title, unit, [key for key in keys if key in have])
        for title, unit, keys in FIGURES
        if any(key in have for key in keys)
    ]
    used = {key for _, _, keys in shown for key in keys} | _HIDDEN | {"step_seconds"}
    rest: dict[str, list[str]] = {}
    for key in sorted(have - used):
        rest.setdefault(key.partition("/")[0] if "/" in key else "others", []).append(key)
    return shown, rest


_AXES = ("step", "tokens", "time")


def _step_rows(run: History) -> list[dict[str, Any]]:
    """One row for each step that counted, with its duration."""
    last = run.rows[-1] if run.rows else {}
    per_step = last["tokens"] / last["step"] if last.get("step") and "tokens" in last else None
    found: dict[int, dict[str, Any]] = {}
    for event in run.events:
        if event["kind"] == "start":
            found = {step: row for step, row in found.items() if step <= event["step"]}
        if event["kind"] != "steps":
            continue
        at = event["time"]
        for step, seconds in enumerate(event["seconds"], start=event["first"]):
            at += seconds
            row = {"step": step, "step_duration": seconds, "time": at}
            found[step] = row | ({"tokens": step * per_step} if per_step else {})
    return [found[step] for step in sorted(found)]


def _table(rows: Sequence[Mapping[str, Any]], begin: float) -> dict[str, Any]:
    """Columns of the rows that any thinned series needs; hours since `begin` for time."""
    main = {key for _, _, keys in FIGURES for key in keys}
    columns: dict[str, list[tuple[int, Any]]] = {}
    for index, row in enumerate(rows):
        for key, value in row.items():
            if key in _AXES or key.startswith("seconds/") or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                columns.setdefault(key, []).append((index, value))
    kept = {key: thin(points, POINTS if key in main else REST) for key, points in columns.items()}
    needed = sorted({index for points in kept.values() for index, _ in points})
    place = {index: new for new, index in enumerate(needed)}
    axes = {
        "step": [rows[index]["step"] for index in needed],
        "tokens": [rows[index].get("tokens") for index in needed],
        "time": [
            round((rows[index]["time"] - begin) / 3600, 6) if "time" in rows[index] else None
            for index in needed
        ],
    }
    series = {
        key: [[place[index] for index, _ in points], [_short(value) for _, value in points]]
        for key, points in kept.items()
    }
    return {
        "x": {name: axis for name, axis in axes.items() if any(v is not None for v in axis)},
        "series": series,
    }


def thin(points: Sequence[tuple[int, float]], limit: int) -> list[tuple[int, float]]:
    """At most about `limit` points: the least and greatest of every stretch, the ends, and
    everything that is not finite (which stands for an event of its own)."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(len(points) / (limit / 2))
    kept = {points[0], points[-1]}
    for stretch in itertools.batched(points, size):
        finite = [point for point in stretch if math.isfinite(point[1])]
        kept |= set(stretch) - set(finite)
        if finite:
            kept |= {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
    return sorted(kept, key=lambda point: point[0])


def _short(value: float) -> float | str:
    """Six digits; what is not finite as a string, which JSON can hold."""
    if isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else repr(value)
