"""One decision for all processes of a run: who does it, and how the others learn of it.

With one process each function is a plain call. With several, all must call it in the same order.
"""

import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the key-value store of jax.distributed has no public name
from jax.experimental import multihost_utils

from lm.files import explain_os_error
from lm.train.checkpoint_checks import CheckpointError

__all__ = ["MeetingPoints", "agree", "from_primary", "gather", "on_primary"]


@functools.cache
def _several() -> bool:
    """Whether there are other processes; the first time these have come to ask as well.

    The first collective on CPU (Gloo) fails after 30 seconds without the others, some of which may
    still be importing or compiling.
    """
    if jax.process_count() == 1:
        return False
    client = distributed.global_state.client
    client.wait_at_barrier("aniso/first", MeetingPoints.TIMEOUT * 1000)
    return True


def from_primary(function: Callable[[], Any]) -> Any:
    """The JSON value that `function` has on process 0, on all processes."""
    if not _several():
        return function()
    data = json.dumps(function() if jax.process_index() == 0 else None).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros((size,), np.uint8)
    if jax.process_index() == 0:
        buffer[:] = np.frombuffer(data, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer).tobytes())


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, by their index, on all of them."""
    data = json.dumps(value).encode()
    if not _several():
        return [json.loads(data)]
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    buffer = np.zeros((int(sizes.max()),), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def on_primary(action: Callable[[], None]) -> None:
    """Run `action` on process 0 alone; its CheckpointError or OSError is raised on all."""

    def run() -> str | None:
        try:
            action()
        except CheckpointError as error:
            return str(error)
        except OSError as error:
            return explain_os_error(error)
        return None

    if problem := from_primary(run):
        raise CheckpointError(problem)


def agree(problem: str | None) -> str | None:
    """This process's problem, or else the number of a process that has one, or else None."""
    if _several():
        failed = multihost_utils.process_allgather(np.int32(problem is not None))
        if failed.any() and problem is None:
            return f"process {int(failed.argmax())} failed"
    return problem


class MeetingPoints:
    """Where the processes meet during a save in the background, those that failed as well.

    Orbax meets twice: when all have written, and when process 0 has put the parts together. A
    process that fails never comes there, and the others would wait for it for 20 minutes. With this
    as Orbax's barrier it says why and comes all the same, so that all learn of it at once. Device
    collectives cannot be used for this, as the main thread is training meanwhile.
    """

    TIMEOUT = 1200  # seconds
    _instances = itertools.count()

    def __init__(self):
        self._name = f"checkpoints/{next(self._instances)}"  # the same on all processes
        self._save = 0
        self._met = 2

    def begin(self) -> None:
        """A save starts."""
        self._save, self._met = self._save + 1, 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier; `key` is not used, as a process that failed may not know it."""
        self._met += 1
        client = distributed.global_state.client
        client.wait_at_barrier(f"{self._name}/{self._save}/{self._met}", timeout_ms)

    def finish(self, problem: str | None) -> str | None:
        """Come to the points that are left; the problems of all processes, None without any."""
        if jax.process_count() == 1:
            return problem
        client, failed = distributed.global_state.client, f"{self._name}/{self._save}/failed/"
        if problem is not None:
            client.key_value_set(f"{failed}{jax.process_index()}", problem)
        while self._met < 2:
            self(key="", timeout_ms=self.TIMEOUT * 1000)
        # One lost part makes process 0 fail as well, so its own problem is rarely the cause.
        reasons = [
            f"process {key.rsplit('/', 1)[1]}: {reason}"
            for key, reason in sorted(client.key_value_dir_get(failed), reverse=True)
        ]
        return "; ".join(reasons[:3]) or None
