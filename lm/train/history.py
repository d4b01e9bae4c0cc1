"""A run as its folder tells it, for reports: forgiving where a run was killed or is still going on.

Only metrics.jsonl is needed. timeline.jsonl, config.json, summary.json and environment.json are
used where they are there.
"""

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from lm.config import ConfigError
from lm.train.goodput import CAUSES, Account
from lm.train.timeline import NAME as TIMELINE
from lm.train.timeline import read_timeline

SILENT_SECONDS = 600
"""A run that has not ended and has written nothing for so long is taken for dead."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclasses.dataclass
class History:
    """What is known of one run.

    Attributes:
      name: the folder's name, made unique among several.
      rows: of metrics.jsonl in the order of steps, each step once (the last time it was logged).
      events: of timeline.jsonl.
      config, summary, environment: the JSON files; {} where there is none.
      starts: how often the run was started, as far as it can be told.
      unreadable: lines of metrics.jsonl that were no rows, a torn last one not counted.
      written: when something was last written, seconds since 1970.
    """

    name: str
    path: Path
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: dict[str, Any]
    summary: dict[str, Any]
    environment: dict[str, Any]
    starts: int
    unreadable: int
    written: float

    @property
    def training(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval_loss" in row]

    def last(self, key: str) -> Any:
        """The newest value of a metric; None without one."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def spent(self) -> dict[str, float]:
        """Seconds by cause (`lm.train.goodput`); {} for runs that did not record them."""
        if self.events:
            return Account(self.events).seconds()
        row = next((row for row in reversed(self.rows) if "seconds/step" in row), {})
        return {cause: row[f"seconds/{cause}"] for cause in CAUSES if f"seconds/{cause}" in row}

    def status(self, now: float | None = None) -> str:
        """ "finished", "running", or what else became of it."""
        ended = self.events[-1] if self.events and self.events[-1]["kind"] == "end" else None
        if (ended and ended.get("reason") == "finished") or (self.summary and not self.events):
            return "finished"
        if ended:
            return str(ended.get("reason", "ended"))
        silent = (time.time() if now is None else now) - self.written
        if silent < SILENT_SECONDS:
            return "running"
        return f"not ended, silent since {time.strftime('%F %R', time.localtime(self.written))}"


def read_history(path: str | os.PathLike) -> History:
    """Read a run folder, or a metrics.jsonl alone; ConfigError for what is neither."""
    path = Path(path)
    file = path if path.is_file() else path / "metrics.jsonl"
    folder = file.parent
    if not path.exists():
        raise ConfigError(f"{path}: no such folder")
    if not file.exists() and not (folder / "config.json").exists():
        raise ConfigError(f"{path} holds no run (neither metrics.jsonl nor config.json)")
    rows, restarts, unreadable = _rows(file)
    whole = path.is_dir()
    events = read_timeline(folder / TIMELINE) if whole else []
    starts = sum(event["kind"] == "start" for event in events) or restarts + bool(rows)
    times = [file.stat().st_mtime] if file.exists() else [folder.stat().st_mtime]
    if whole and (folder / TIMELINE).exists():
        times.append((folder / TIMELINE).stat().st_mtime)
    return History(
        name=path.resolve().name if whole else file.stem,
        path=path,
        rows=rows,
        events=events,
        config=_object(folder / "config.json") if whole else {},
        summary=_object(folder / "summary.json") if whole else {},
        environment=_newest_environment(folder) if whole else {},
        starts=starts,
        unreadable=unreadable,
        written=max(times),
    )


def read_histories(paths: list[str | os.PathLike]) -> list[History]:
    """Several runs; where names are equal, as much of the paths as tells them apart is added."""
    runs = [read_history(path) for path in paths]
    names = [run.name for run in runs]
    for run, name in zip(runs, names, strict=True):
        if names.count(name) > 1:
            run.name = str(run.path)
    for index, run in enumerate(runs):
        if any(run.name == other.name for other in runs[:index]):
            raise ConfigError(f"{run.path} is given twice")
    return runs


def _rows(file: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Rows, how often the steps went back, and how many lines were no rows."""
    if not file.exists():
        return [], 0, 0
    lines = file.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    restarts = unreadable = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
            if not isinstance(step, int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            unreadable += number < len(lines)
            continue
        row = {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
        kind = "eval_loss" in row
        back = False
        while rows and (
            rows[-1]["step"] > step
            or (rows[-1]["step"] == step and any(_same(r, step, kind) for r in rows[-2:]))
        ):
            rows.pop()
            back = True
        restarts += back
        rows.append(row)
    return rows, restarts, unreadable


def _same(row: dict[str, Any], step: int, kind: bool) -> bool:
    return row["step"] == step and ("eval_loss" in row) == kind


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _newest_environment(folder: Path) -> dict[str, Any]:
    files = sorted(
        folder.glob("environment*.json"),
        key=lambda file: int(file.stem.partition("-")[2] or 1) if file.stem[12:].isdigit() else 1,
    )
    return _object(files[-1]) if files else {}
