"""The report as one HTML page: plots are inline SVG, nothing is loaded, no scripts."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["page"]

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 920, 270, 62, 14, 46
COLORS = ("#3b82d0", "#d9772b", "#2f9e66", "#b94fa0", "#a1851c", "#7a6bd8", "#cf4a4a", "#3a9fa8")
MAX_PAIRS = 10
STYLE = """
:root{color-scheme:light dark;--ink:#1d2126;--soft:#68707a;--line:#d9dde2;--page:#fff;--box:#f6f7f9}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e9ec;--soft:#9aa3ad;--line:#383f47;--page:#15181b;--box:#1e2226}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);
max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .2rem}p{margin:.2rem 0 .6rem}
.soft{color:var(--soft)}.wide{overflow-x:auto}
svg{width:100%;height:auto;background:var(--box);border-radius:6px}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .grid{stroke:var(--line)}
.key{display:inline-block;margin-right:1.1rem;white-space:nowrap}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.4rem}
table{border-collapse:collapse;font-size:.83rem;font-variant-numeric:tabular-nums}
th,td{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600}
"""
Entry = Mapping[str, Any]
Series = list[tuple[str, list[float | None]]]


def page(report: Mapping[str, Any]) -> str:
    """A whole HTML document from what `lm.merging.report.describe` gave."""
    layers, tensors = report["layers"], report["tensors"]
    names = _short_names([ref for entry in (*layers, report["model"]) for ref in _refs(entry)])
    about = f"{', '.join(report['methods'])} of {len(report['models'])} models"
    parts = [
        f"<h1>Merge report: {_text(about)}</h1>",
        f"<p class=soft>{_text(report['about'])}; {len(tensors)} tensors, seed {report['seed']}, "
        f"flavor {_text(report['flavor'])}, fingerprint {_text(report['fingerprint'])}</p>",
        "<h2>Models</h2>",
        _table(["model", "path"], [[Path(ref).name, ref] for ref in report["models"]]),
        "<h2>The whole model</h2>",
        _numbers_table([{"name": "all tensors"} | report["model"]], names),
    ]
    notes = report["definitions"]
    plots = (
        ("Size of the task vectors", "relative_delta", _by_model(layers, "relative_delta", names)),
        ("Cosines", "cosines", _by_pair(layers, names)),
        ("Sign conflict", "sign_conflict", _single(layers, "sign_conflict")),
        ("Kept", "kept", _single(layers, "kept")),
        ("Drift of the result", "drift", _by_model(layers, "drift", names)),
    )
    for title, key, series in plots:
        if series:
            parts += [f"<h2>{title}</h2>", f"<p class=soft>{_text(notes[key])}</p>"]
            parts.append(_plot([entry["name"] for entry in layers], series))
    hidden = len(report["model"].get("cosines", ())) - MAX_PAIRS
    if hidden > 0:
        parts.append(f"<p class=soft>{hidden} more pairs are in report.json.</p>")
    for title, entries in (("Layers", layers), ("Tensors", tensors)):
        table = _numbers_table(entries, names)
        parts.append(f"<h2>{title}</h2><details><summary>All numbers</summary>{table}</details>")
    if report["copied"]:
        parts.append(f"<p class=soft>Copied unread: {_text(', '.join(report['copied']))}</p>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Merge report</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _refs(entry: Entry) -> list[str]:
    pairs = [ref for pair in entry.get("cosines", ()) for ref in pair["models"]]
    return [*entry.get("relative_delta", {}), *entry.get("drift", {}), *pairs]


def _short_names(refs: Sequence[str]) -> dict[str, str]:
    """Last part of each path, or the whole path where that would not tell two models apart."""
    short = {ref: Path(ref).name for ref in refs}
    found = list(short.values())
    return {ref: name if found.count(name) == 1 else ref for ref, name in short.items()}


def _by_model(layers: Sequence[Entry], key: str, names: Mapping[str, str]) -> Series:
    refs = dict.fromkeys(ref for entry in layers for ref in entry.get(key, {}))
    return [(names[ref], [entry.get(key, {}).get(ref) for entry in layers]) for ref in refs]


def _by_pair(layers: Sequence[Entry], names: Mapping[str, str]) -> Series:
    values = [
        {(*pair["models"], pair["of"]): pair["cosine"] for pair in entry.get("cosines", ())}
        for entry in layers
    ]
    pairs = list(dict.fromkeys(key for found in values for key in found))[:MAX_PAIRS]
    return [
        (f"{names[a]}, {names[b]} ({of})", [found.get((a, b, of)) for found in values])
        for a, b, of in pairs
    ]


def _single(layers: Sequence[Entry], key: str) -> Series:
    values = [entry.get(key) for entry in layers]
    return [(key.replace("_", " "), values)] if any(v is not None for v in values) else []


def _plot(groups: Sequence[str], series: Series) -> str:
    """Lines with a point for every layer, in the order of the output."""
    values = [v for _, line in series for v in line if v is not None]
    low, high, step = _scale(min(0.0, *values, 0.0), max(values, default=0.0))
    plot_width, plot_height = WIDTH - LEFT - 16, HEIGHT - TOP - BOTTOM

    def x(index: int) -> float:
        return LEFT + plot_width * (index + 0.5) / len(groups)

    def y(value: float) -> float:
        return TOP + plot_height * (high - value) / (high - low)

    svg = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        svg.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 16}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{LEFT - 6}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.4g}</text>'
        )
    every = math.ceil(len(groups) / 16)
    for index, name in enumerate(groups):
        if index % every == 0:
            place = f"{x(index):.1f},{TOP + plot_height + 14}"
            svg.append(
                f'<text transform="translate({place}) rotate(18)">{_text(_tick(name))}</text>'
            )
    for number, (label, line) in enumerate(series):
        svg += _line(number, label, line, groups, x, y)
    keys = "".join(
        f'<span class=key><i style="background:{COLORS[n % len(COLORS)]}"></i>{_text(label)}</span>'
        for n, (label, _) in enumerate(series)
    )
    return "".join(svg) + f"</svg><p>{keys}</p>"


def _line(number: int, label: str, line: Sequence, groups: Sequence[str], x: Any, y: Any) -> list:
    color = COLORS[number % len(COLORS)]
    dash = ' stroke-dasharray="5 3"' if number >= len(COLORS) else ""
    svg, run = [], []
    for index, value in enumerate([*line, None]):
        if value is not None:
            run.append(f"{x(index):.1f},{y(value):.1f}")
            svg.append(
                f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="3" fill="{color}"><title>'
                f"{_text(groups[index])}, {_text(label)}: {value:.4g}</title></circle>"
            )
        elif run:
            points = " ".join(run)
            svg.insert(0, f'<polyline points="{points}" fill="none" stroke="{color}"{dash}/>')
            run = []
    return svg


def _scale(low: float, high: float) -> tuple[float, float, float]:
    """Limits and step of an axis at round numbers: 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    size = 10.0 ** math.floor(math.log10(span / 4))
    step = next(size * f for f in (1, 2, 5, 10) if size * f >= span / 5)
    top = math.ceil(high / step - 1e-9) if high > low else math.ceil((low + span) / step)
    return math.floor(low / step + 1e-9) * step, top * step, step


def _tick(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last.isdigit() or len(last) < 14 else last[:12] + "…"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{top}</tr>{body}</table></div>"


def _numbers_table(entries: Sequence[Entry], names: Mapping[str, str]) -> str:
    columns: dict[str, dict[int, Any]] = {}
    for row, entry in enumerate(entries):
        cells = {f"delta {names[r]}": v for r, v in entry.get("relative_delta", {}).items()}
        for pair in entry.get("cosines", ()):
            a, b = (names[ref] for ref in pair["models"])
            cells[f"cosine of {pair['of']} {a}, {b}"] = pair["cosine"]
        cells |= {key.replace("_", " "): entry.get(key) for key in ("sign_conflict", "kept")}
        cells |= {f"drift {names[r]}": v for r, v in entry.get("drift", {}).items()}
        for title, value in cells.items():
            columns.setdefault(title, {})[row] = value
    shown = [title for title, cells in columns.items() if set(cells.values()) != {None}]
    rows = [
        [entry["name"], f"{entry['elements']:,}", *(_cell(columns[t].get(n)) for t in shown)]
        for n, entry in enumerate(entries)
    ]
    return _table(["", "elements", *shown], rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
