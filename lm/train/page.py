"""One self-contained HTML page on one run or on several laid over each other.

Everything is in the file: no request leaves the browser. Bars and tables are plain HTML; the charts
are drawn by page.js from the numbers in the page.
"""

import html
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.config import ConfigError
from lm.files import atomic_write_text
from lm.train.goodput import CAUSES
from lm.train.history import History, read_histories
from lm.train.metrics import format_seconds
from lm.train.page_data import figures, tables

MARK = '<meta name="generator" content="aniso report">'
COLORS = ("#3b7dd8", "#e0762b", "#2f9e66", "#b94fa0", "#8a7a16", "#7a5fd0", "#d14646", "#2a97a5")
CAUSE_COLORS = dict(
    zip(
        CAUSES,
        "#2f9e66 #e3a008 #7a5fd0 #3b7dd8 #2a97a5 #8d99a6 #d14646 #58616b #c3cad2".split(),
        strict=True,
    )
)
STYLES = {
    "hosts/slowest": "dots",
    **dict.fromkeys(("learning_rate", "goodput", "skipped", "memory_headroom"), "exact"),
}
"""Of figures that smoothing would falsify."""
CAUSE_NAMES = {"step": "training", "data_wait": "wait for data", "lost": "lost work"}


def write_page(paths: Sequence[str | os.PathLike], output: str | os.PathLike) -> None:
    """Write the page on the runs in `paths` to `output`.

    Raises:
      ConfigError: a path holds no run, or `output` exists and is no report.
      OSError: `output` cannot be written.
    """
    output = Path(output)
    if output.exists() and (
        output.is_dir() or MARK not in output.read_text(errors="replace")[:400]
    ):
        raise ConfigError(f"{output} exists and is not a report: choose another --output")
    atomic_write_text(output, page(read_histories(list(paths))))


def page(runs: Sequence[History]) -> str:
    """The whole document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    shown, rest = figures(runs)
    colors = {run.name: COLORS[i % len(COLORS)] for i, run in enumerate(runs)}
    data = {
        "runs": [
            {"name": run.name, "color": colors[run.name], "tables": tables(run)} for run in runs
        ]
    }
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=soft>{_text(_headline(runs))}</p>",
        _overview(runs, colors),
        "<h2>Where the time went</h2>",
        *(_time_spent(run, colors) for run in runs),
        _cause_legend(),
        "<h2>Curves</h2>",
        _controls(runs, colors),
        '<div class="charts">',
        *(_figure(*figure, lead=index == 0) for index, figure in enumerate(shown)),
        "</div>",
        *(_group(name, keys) for name, keys in rest.items()),
        *_settings(runs),
    ]
    if not any(run.rows for run in runs):
        parts.insert(2, "<p>Nothing has been logged yet.</p>")
    here = Path(__file__).parent
    # "</" would end the script element; "<!--" would change how it is read.
    numbers = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title>\n<style>{(here / 'page.css').read_text()}</style></head>\n"
        f'<body>\n{body}\n<div id="tip"></div>\n'
        "<noscript><p>The curves need JavaScript.</p></noscript>\n"
        f'<script id="data" type="application/json">{numbers}</script>\n'
        f"<script>{(here / 'page.js').read_text()}</script>\n</body></html>\n"
    )


def _headline(runs: Sequence[History]) -> str:
    made = time.strftime("%F %R")
    if len(runs) > 1:
        return f"as of {made}"
    run = runs[0]
    devices = run.environment.get("devices", {})
    where = f"{devices['count']} x {devices['kind']}" if devices else ""
    git = run.environment.get("git", {})
    code = (
        f"commit {git['commit'][:10]}{' with changes' if git.get('dirty') else ''}"
        if (git.get("commit"))
        else ""
    )
    recipe = run.config.get("recipe", "")
    return ", ".join(part for part in (recipe, where, code, f"as of {made}") if part)


def _overview(runs: Sequence[History], colors: Mapping[str, str]) -> str:
    head = ["", "state", "step", "loss", "held out", "bits per byte", "tokens/s", "MFU", "goodput"]
    head += ["memory free", "starts", "time"]
    rows = []
    for run in runs:
        spent = run.spent()
        total = sum(spent.values())
        steps = run.config.get("steps")
        step = run.rows[-1]["step"] if run.rows else 0
        rates = [r["tokens_per_second"] for r in run.training if r.get("tokens_per_second")]
        headroom = run.last("memory_headroom")
        evaluations = run.evaluations[-1] if run.evaluations else {}
        mfu = run.last("mfu_causal")
        rows.append(
            [
                _swatch(colors[run.name]) + _text(run.name),
                _text(run.status()),
                f"{step:,}" + (f" of {steps:,}" if steps else ""),
                _number(run.training[-1]["loss"] if run.training else None, ".4f"),
                _number(evaluations.get("eval_loss"), ".4f"),
                _number(evaluations.get("eval_bits_per_byte"), ".4f"),
                _number(sorted(rates)[len(rates) // 2] if rates else None, ",.0f"),
                _number(mfu, ".1%"),
                _number(spent["step"] / total if total else None, ".1%"),
                _number(headroom, ".0%"),
                str(run.starts),
                format_seconds(total) if total else "",
            ]
        )
    return _table(head, rows, escape=False)


def _time_spent(run: History, colors: Mapping[str, str]) -> str:
    spent = run.spent()
    total = sum(spent.values())
    title = f"<p class=small>{_swatch(colors[run.name])}{_text(run.name)}: "
    if not total:
        return f"{title}<span class=soft>not recorded</span></p>"
    parts = [
        f"{CAUSE_NAMES.get(cause, cause)} {seconds / total:.1%} ({format_seconds(seconds)})"
        for cause, seconds in spent.items()
        if seconds / total >= 0.0005
    ]
    bar = "".join(
        f'<i style="width:{100 * seconds / total:.3f}%;background:{CAUSE_COLORS[cause]}" '
        f'title="{CAUSE_NAMES.get(cause, cause)}: {format_seconds(seconds)}"></i>'
        for cause, seconds in spent.items()
        if seconds > 0
    )
    return f'{title}{", ".join(parts)}</p><div class="bar">{bar}</div>{_strip(run)}'


def _strip(run: History) -> str:
    """What the run did when, from its first start to its last event."""
    spans = _spans(run.events)
    if not spans:
        return ""
    begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
    width = max(end - begin, 1e-9)
    merged: list[list[Any]] = []
    for first, last, cause in sorted(spans):
        if merged and merged[-1][2] == cause and first - merged[-1][1] < width / 1000:
            merged[-1][1] = max(last, merged[-1][1])
        else:
            merged.append([first, last, cause])
    pieces = "".join(
        f'<i style="left:{100 * (a - begin) / width:.3f}%;width:{100 * (b - a) / width:.3f}%;'
        f'background:{CAUSE_COLORS[cause]}" title="{CAUSE_NAMES.get(cause, cause)}, '
        f'{format_seconds(b - a)} from {format_seconds(a - begin)}"></i>'
        for a, b, cause in merged
        if b - a >= width / 2000
    )
    return f'<div class="strip" title="over time">{pieces}</div>'


def _spans(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, str]]:
    """Beginning, end and cause of all that happened; steps that were lost are told apart."""
    spans: list[tuple[float, float, str]] = []
    steps: list[tuple[int, float, list[float]]] = []  # first step, its beginning, seconds
    end = events[0]["time"] if events else 0.0
    for event in events:
        begin = event["time"]
        if event["kind"] == "start":
            if begin > end:
                spans.append((end, begin, "down"))
            kept = []
            for first, start, seconds in steps:
                good = seconds[: max(0, event["step"] - first + 1)]
                lost = seconds[len(good) :]
                start_lost = start + sum(good)
                spans += [(start_lost, start_lost + sum(lost), "lost")] if lost else []
                kept += [(first, start, good)] if good else []
            steps = kept
            end = max(end, begin)
        elif event["kind"] == "span":
            spans.append((begin, begin + event["seconds"], event["cause"]))
            end = max(end, begin + event["seconds"])
        elif event["kind"] == "steps":
            steps.append((event["first"], begin, event["seconds"]))
            done = begin + sum(event["seconds"])
            if event["wait"] > 0:  # which of the steps waited is not recorded
                spans.append((done, done + event["wait"], "data_wait"))
            end = max(end, event["end"])
        elif event["kind"] == "end":
            end = max(end, begin)
    return spans + [(start, start + sum(seconds), "step") for _, start, seconds in steps]


def _cause_legend() -> str:
    keys = "".join(
        f"<span>{_swatch(color)}{CAUSE_NAMES.get(cause, cause)}</span>"
        for cause, color in CAUSE_COLORS.items()
    )
    return (
        f'<p class="legend">{keys}</p><p class="soft small">Upper bar: shares of all time since '
        "the first start; goodput is the share of training that was not lost again. Lower bar: "
        "what was done when.</p>"
    )


def _controls(runs: Sequence[History], colors: Mapping[str, str]) -> str:
    buttons = "".join(
        f'<button data-run="{_text(name)}">{_swatch(color)}{_text(name)}</button>'
        for name, color in colors.items()
        if len(runs) > 1
    )
    return (
        '<div class="controls"><label>over <select id="x"><option value="step">steps</option>'
        '<option value="tokens">tokens</option><option value="time">hours</option></select></label>'
        '<label>smoothing <input id="smooth" type="range" min="0" max="99" value="0"></label>'
        '<label><input id="log" type="checkbox"> logarithmic</label>'
        '<label><input id="clip" type="checkbox" checked> ignore outliers</label>'
        f'{buttons}<span class="soft">drag to zoom, double-click to go back</span></div>'
    )


def _figure(title: str, unit: str, keys: Sequence[str], lead: bool = False) -> str:
    style = f' data-style="{STYLES[keys[0]]}"' if keys[0] in STYLES else ""
    return (
        f'<figure data-key="{_text(" ".join(keys))}"{style}{" class=lead" if lead else ""}>'
        "<figcaption>"
        f"{_text(title)}<small>{_text(unit)}</small></figcaption></figure>"
    )


def _group(name: str, keys: Sequence[str]) -> str:
    inner = "".join(_figure(key, "", [key]) for key in keys)
    return (
        f"<details><summary>{_text(name.replace('_', ' '))} ({len(keys)})</summary>"
        f'<div class="charts">{inner}</div></details>'
    )


def _settings(runs: Sequence[History]) -> list[str]:
    """How the runs differ, and what each was."""
    parts = []
    flat = [_flatten(run.config) for run in runs]
    names = dict.fromkeys(name for values in flat for name in values)
    differing = [n for n in names if n != "out" and len({json.dumps(v.get(n)) for v in flat}) > 1]
    if len(runs) > 1 and differing:
        rows = [[name, *(_plain(values.get(name)) for values in flat)] for name in differing]
        parts += ["<h2>Settings that differ</h2>", _table(["", *(r.name for r in runs)], rows)]
    parts.append("<h2>Settings and machine</h2>")
    for run in runs:
        found = {"configuration": run.config, "environment": run.environment}
        for what, value in found.items():
            if value:
                text = _text(json.dumps(value, indent=1))
                label = f"{run.name}: {what}" if len(runs) > 1 else what
                parts.append(
                    f"<details><summary>{_text(label)}</summary><pre>{text}</pre></details>"
                )
        if run.unreadable:
            parts.append(
                f"<p class=soft>{run.unreadable} lines of {_text(run.name)}'s metrics.jsonl "
                "cannot be read and are left out.</p>"
            )
    return parts


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            leaves |= _flatten(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    def cell(value: str) -> str:
        return _text(value) if escape else value

    top = "".join(f"<th>{_text(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"


def _swatch(color: str) -> str:
    return f'<i class="swatch" style="background:{color}"></i>'


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: Any, spec: str) -> str:
    return format(value, spec) if isinstance(value, int | float) else ""


def _text(value: Any) -> str:
    return html.escape(str(value))
