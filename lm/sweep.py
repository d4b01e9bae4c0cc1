"""Resumable sweeps: a list of runs, one JSON line for each that is finished, a report of the file.

    sweep = Sweep("docs/results/example.jsonl", runs)
    sweep.main(argv, execute, report)

`--list` shows what is missing, `--limit N` and `--only KEY=VALUE` run a part, `--report` draws the
tables and plots from the file alone, without any argument the missing runs are done in order. A
sweep can be spread over many sittings and machines: a run that is in the file is skipped.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Run = Mapping[str, Any]
"""What tells one run from another: names and plain values, `seed` among them."""


class Sweep:
    """Runs that are to be done and the JSON-lines file of those that are."""

    def __init__(self, path: str | os.PathLike, runs: Iterable[Run]):
        self.path = Path(path)
        self.runs = list(runs)

    def rows(self) -> list[dict[str, Any]]:
        """Finished runs, oldest first. A last line that a kill cut short is passed over."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def missing(self) -> list[Run]:
        """Runs that the file does not hold yet."""
        done = {_key(row["run"]) for row in self.rows()}
        return [run for run in self.runs if _key(run) not in done]

    def append(self, run: Run, result: Mapping[str, Any], seconds: float) -> None:
        """Add a finished run in one write, so that two processes may share the file."""
        row = {
            "run": dict(run),
            "result": dict(result),
            "seconds": round(seconds, 2),
            "device": _device(),
            "versions": _versions(),
            "date": datetime.date.today().isoformat(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_bytes()[-1:] if self.path.exists() else b"\n"
        start = "" if text in (b"\n", b"") else "\n"  # behind a line that a kill cut short
        with open(self.path, "a") as file:
            file.write(start + json.dumps(row, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def main(
        self,
        argv: Sequence[str] | None,
        execute: Callable[[Run], Mapping[str, Any]],
        report: Callable[[list[dict[str, Any]]], None],
    ) -> int:
        """The command line of a sweep; `execute(run)` returns plain values (a curve, say)."""
        args = parser().parse_args(argv)
        todo = [run for run in self.missing() if _matches(run, args.only)]
        if args.report:
            report(self.rows())
            return 0
        if args.list:
            for run in todo:
                print(json.dumps(run))
            print(f"{len(todo)} of {len(self.runs)} runs are missing in {self.path}")
            return 0
        for number, run in enumerate(todo[: args.limit]):
            began = time.monotonic()
            result = execute(run)
            seconds = time.monotonic() - began
            self.append(run, result, seconds)
            short = {k: v for k, v in result.items() if isinstance(v, (int, float, str))}
            print(
                f"[{number + 1}/{len(todo)}] {json.dumps(run)} {json.dumps(short)} {seconds:.0f}s"
            )
        return 0


def parser() -> argparse.ArgumentParser:
    """Flags that every sweep has; a script may add its own and strip them before `main`."""
    result = argparse.ArgumentParser(allow_abbrev=False)
    result.add_argument("--list", action="store_true", help="show the missing runs")
    result.add_argument("--report", action="store_true", help="write tables and plots of the file")
    result.add_argument("--limit", type=int, help="do at most this many runs")
    result.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs with this value; repeat for several keys",
    )
    return result


def best(
    rows: Iterable[Mapping[str, Any]], by: str, value: str, sweep: str = "learning_rate"
) -> dict[str, Any]:
    """For each value of run[by]: the run[sweep] whose mean result[value] over seeds is lowest.

    A value that is not finite (a diverged run) counts as infinite.
    """
    sums: dict[str, dict[Any, list[float]]] = {}
    for row in rows:
        number = row["result"][value]
        number = float("inf") if number is None or number != number else number
        sums.setdefault(row["run"][by], {}).setdefault(row["run"][sweep], []).append(number)
    mean = lambda numbers: sum(numbers) / len(numbers)  # noqa: E731
    return {name: min(found, key=lambda x: mean(found[x])) for name, found in sums.items()}


def _key(run: Run) -> str:
    return json.dumps(run, sort_keys=True)


def _matches(run: Run, only: Sequence[str]) -> bool:
    for item in only:
        key, equals, value = item.partition("=")
        if not equals:
            raise SystemExit(f"--only takes KEY=VALUE, got {item!r}")
        if str(run.get(key)) not in value.split(","):
            return False
    return True


def _device() -> str:
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0))} cores, {platform.machine()}"
    return device.device_kind


def _versions() -> str:
    import flax
    import jax
    import optax

    return f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
