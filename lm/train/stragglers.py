"""Which process of a run holds the others up, without making any of them wait.

In a synchronous step all processes end together, so their step times are equal; what tells them
apart is how long each was busy itself (making batches, dispatching, logging) instead of waiting for
its devices: the one that holds the others up waits least. Each process leaves its numbers in the
key-value store of `jax.distributed` when it logs, and process 0 reads what lies there: a message to
the coordinator every `log.every` steps, no collective, no barrier. Numbers of others may be one
interval old; a process that has stopped reporting shows by the step of its last report.
"""

import json
import statistics
from typing import Any

import jax
from jax._src import distributed  # the key-value store of jax.distributed has no public name

_FOLDER = "aniso/stragglers/"


class Stragglers:
    """Exchange of step times; does nothing in a run of one process."""

    def __init__(self, client: Any = None, process: int | None = None):
        self._client = client
        if client is None and jax.process_count() > 1:
            self._client = distributed.global_state.client
        self._process = jax.process_index() if process is None else process

    def report(self, step: int, step_seconds: float, busy_seconds: float) -> dict[str, Any]:
        """Leave this process's numbers (means over the steps since its last report).

        Returns the row entries that process 0 logs: median and maximum over the processes that have
        reported, `hosts/slowest` (the process that was busy longest) and `hosts/behind` (how many
        steps ago the report came that is oldest); {} on others.
        """
        if self._client is None:
            return {}
        mine = json.dumps([step, step_seconds, busy_seconds])
        self._client.key_value_set(f"{_FOLDER}{self._process}", mine, allow_overwrite=True)
        if self._process:
            return {}
        found = {
            int(key.rpartition("/")[2]): json.loads(value)
            for key, value in self._client.key_value_dir_get(_FOLDER)
        }
        return summarize(step, found)


def summarize(step: int, reports: dict[int, list[float]]) -> dict[str, Any]:
    """Row entries from `{process: [step, step seconds, busy seconds]}`."""
    steps, times, busy = zip(*reports.values(), strict=True)
    return {
        "hosts/step_seconds_median": statistics.median(times),
        "hosts/step_seconds_max": max(times),
        "hosts/busy_seconds_median": statistics.median(busy),
        "hosts/busy_seconds_max": max(busy),
        "hosts/slowest": max(reports, key=lambda process: (reports[process][2], -process)),
        "hosts/behind": step - min(steps),
    }
