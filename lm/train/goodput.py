"""Where the time of a run went: goodput is the share of it that made lasting progress.

The time from the first start to now is split by cause:

    step        training steps whose result is part of the run
    data_wait   the device stood still because no batch was ready
    compile     until the first step of a start was done
    evaluation, checkpoint   the loop stood still for them (saving in the background is free;
                waiting for storage that fails or is slow counts as checkpoint)
    init        before the first step: imports, data, restoring
    lost        steps after the checkpoint that a restart went back to, done again later
    down        between the end of what one start recorded and the next start
    other       the rest

`goodput = step / total`. Google's "ML Productivity Goodput" (Google Cloud, 2024) multiplies this by
the speed of the program against its peak, which here is a number of its own, the MFU.
"""

import array
from collections.abc import Iterable, Mapping
from typing import Any

CAUSES = (
    "step",
    "data_wait",
    "compile",
    "evaluation",
    "checkpoint",
    "init",
    "lost",
    "down",
    "other",
)


class Account:
    """Adds up the events of a timeline (`lm.train.timeline`), in their order.

    A `start` that goes back to an earlier step turns the steps after it into lost time.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]] = ()):
        self._spans = dict.fromkeys(CAUSES, 0.0)
        self._steps = array.array("d")  # seconds by step; 0 where none was recorded
        self._productive = 0.0
        self._begin: float | None = None
        self._end = 0.0
        for event in events:
            self.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        """Count one event; unknown kinds are ignored."""
        kind, begin = event["kind"], event["time"]
        if kind == "start":
            if self._begin is None:
                self._begin = begin
            else:
                self._spans["down"] += max(0.0, begin - self._end)
            self._lose(event["step"] + 1)
            self._end = max(self._end, begin)
        elif kind == "span":
            self._spans[event["cause"]] += event["seconds"]
            self._end = max(self._end, begin + event["seconds"])
        elif kind == "steps":
            self._lose(event["first"])
            self._steps.extend([0.0] * (event["first"] - len(self._steps)))
            self._steps.extend(event["seconds"])
            self._productive += sum(event["seconds"])
            self._spans["data_wait"] += event["wait"]
            self._end = max(self._end, event["end"])
        elif kind == "end":
            self._end = max(self._end, begin)

    def _lose(self, first: int) -> None:
        """Step `first` and all after it will be done, or have been done, again."""
        lost = sum(self._steps[first:])
        del self._steps[first:]
        self._productive -= lost
        self._spans["lost"] += lost

    def seconds(self, now: float | None = None) -> dict[str, float]:
        """Seconds by cause, in the order of `CAUSES`; they add up to the whole."""
        total = self.total(now)
        found = self._spans | {"step": max(self._productive, 0.0)}
        found["other"] = max(0.0, total - sum(found.values()))
        return found

    def total(self, now: float | None = None) -> float:
        """Seconds from the first start to the last event, or to `now` (seconds since 1970)."""
        if self._begin is None:
            return 0.0
        return max(self._end, now or 0.0) - self._begin

    def goodput(self, now: float | None = None) -> float | None:
        """Share of productive time, in [0, 1]; None before any time has passed."""
        total = self.total(now)
        return min(1.0, max(self._productive, 0.0) / total) if total > 0 else None
