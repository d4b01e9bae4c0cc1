"""Batches made ahead of the device, and global arrays of which each process makes its rows."""

import atexit
import collections
import threading
import time
import weakref
from collections.abc import Callable, Mapping

import numpy as np


class _Shared:
    """What the thread and the Prefetcher both hold; guarded by `change`."""

    def __init__(self):
        self.change = threading.Condition()
        self.ready = collections.deque()
        self.error: BaseException | None = None
        self.stop = False


def _produce(shared: _Shared, make_batch: Callable, step: int, depth: int) -> None:
    while True:
        with shared.change:
            shared.change.wait_for(lambda: shared.stop or len(shared.ready) < depth)
            if shared.stop:
                return
        try:
            batch = make_batch(step)
        except BaseException as error:
            with shared.change:
                shared.error = error
                shared.change.notify_all()
            return
        with shared.change:
            shared.ready.append((step, batch))
            shared.change.notify_all()
        step += 1
        del batch  # the consumer decides how long it lives


def _stop(shared: _Shared, thread: threading.Thread) -> None:
    with shared.change:
        shared.stop = True
        shared.change.notify_all()
    if thread is not threading.current_thread():
        thread.join()
    shared.ready.clear()


class Prefetcher[T]:
    """Makes batches of coming steps in a background thread, in order.

    Close it, or use it as a context manager; a forgotten one stops when it is garbage collected
    and when the interpreter exits.
    """

    wait_seconds: float = 0.0
    """How long the last `get` waited."""

    def __init__(self, make_batch: Callable[[int], T], start_step: int = 0, depth: int = 2):
        """Args:
        make_batch: step to batch; runs in the thread and must not refer to this object.
        start_step: the first step that will be asked for.
        depth: batches held ready.
        """
        if depth < 1:
            raise ValueError(f"depth must be 1 or more, got {depth}")
        self._shared, self._next = _Shared(), start_step
        arguments = (self._shared, make_batch, start_step, depth)
        thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        self._close = weakref.finalize(self, _stop, self._shared, thread)
        # finalize's own exit hook may run after JAX has shut down; this one runs before
        atexit.register(self._close)
        thread.start()

    def get(self, step: int) -> T:
        """The batch of `step`; steps must be asked for in order.

        Raises:
          ValueError: another step is next.
          Exception: whatever make_batch raised, with its traceback, after the batches before it.
        """
        if step != self._next:
            raise ValueError(f"step {step} was asked for, but {self._next} is next")
        shared, begin = self._shared, time.perf_counter()
        with shared.change:
            shared.change.wait_for(lambda: shared.ready or shared.error or shared.stop)
            self.wait_seconds = time.perf_counter() - begin
            if not shared.ready:
                raise shared.error or ValueError("this Prefetcher is closed")
            _, batch = shared.ready.popleft()
            shared.change.notify_all()
        self._next += 1
        return batch

    def close(self) -> None:
        """Stop the thread and wait for it; batches not asked for are dropped."""
        self._close()
        atexit.unregister(self._close)

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_):
        self.close()


def to_global(
    make_rows: Callable[[slice], Mapping[str, np.ndarray]], sharding, batch_size: int
) -> dict:
    """Global `jax.Array`s of a batch of which this process makes only the rows it holds.

    Args:
      make_rows: rows [a, b) of the global batch as arrays [b - a, ...], equal in every process
        that asks for them; called once per contiguous run of rows that this process needs.
      sharding: `jax.sharding.NamedSharding` of every array; the first axis may be sharded over any
        mesh axes, and rows may be replicated. Arrays with fewer axes take the front of its spec.
      batch_size: B, rows of the global batch.

    Returns:
      name to `jax.Array` [B, ...].
    """
    import jax

    def span(index) -> tuple[int, int]:
        return index[0].indices(batch_size)[:2] if index else (0, batch_size)

    rank = max(1, len(sharding.spec))
    probe = (batch_size,) + tuple(sharding.mesh.size for _ in range(rank - 1))
    needed = sharding.addressable_devices_indices_map(probe).values()
    runs: list[list[int]] = []
    for begin, end in sorted({span(index) for index in needed}):
        if runs and begin <= runs[-1][1]:
            runs[-1][1] = max(end, runs[-1][1])
        else:
            runs.append([begin, end])
    made = [(begin, make_rows(slice(begin, end))) for begin, end in runs]

    def array(name: str) -> "jax.Array":
        def shard(index):
            begin, end = span(index)
            at = next(i for i, (first, _) in reversed(list(enumerate(runs))) if first <= begin)
            first, arrays = made[at]
            return arrays[name][(slice(begin - first, end - first), *index[1:])]

        shape = (batch_size, *made[0][1][name].shape[1:])
        spec = jax.sharding.PartitionSpec(*sharding.spec[: len(shape)])
        return jax.make_array_from_callback(
            shape, jax.sharding.NamedSharding(sharding.mesh, spec), shard
        )

    return {name: array(name) for name in made[0][1]}
