"""Tensors of all models, cut into blocks and brought to float32: what methods get to see."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.merging.numbers import all_finite, is_float, to_float32
from lm.merging.random import stream_key, uniform
from lm.merging.types import Block, Job, MergeError, Method, Plan, Source, Store, TensorInfo

__all__ = ["BLOCK", "Reader", "Span", "TensorBlocks", "Workspace", "copies", "spans_of", "unit_of"]

BLOCK = 1 << 17
"""Elements of a block: small enough for the caches, large enough that Python's share is small."""
_GROUP = 8  # blocks per task of `map`: tasks cost some 50 microseconds each
_AHEAD = 2  # blocks per task of an iteration, which holds them all in memory

Span = tuple[int, int]


def spans_of(size: int, length: int, unit: int = 1) -> list[Span]:
    """[0, size) cut into pieces of about `length` elements, multiples of `unit`; never empty."""
    length = max(unit, length // unit * unit)
    return [(start, min(start + length, size)) for start in range(0, size, length)] or [(0, 0)]


def unit_of(job: Job, method: Method) -> int:
    """Blocks of this job are multiples of so many elements: 1, a row, or the whole tensor.

    Packed bits (`many`) fill whole bytes.
    """
    if method.scope == "tensor":
        return max(1, math.prod(job.shape))
    row = job.shape[-1] if method.scope == "row" and job.shape else 1
    token = _columns(job) if job.transform is not None else 1
    return math.lcm(max(1, row), max(1, token), 8 if method.many else 1)


class Workspace:
    """Buffers for one block: float32 for every participant, the files' bytes, the result."""

    def __init__(self, participants: int, length: int):
        self.length = length
        self.values = [np.empty(length, np.float32) for _ in range(participants)]
        # A whole tensor (scope "tensor") passes through these in pieces.
        self.raw = np.empty(8 * min(length, BLOCK), np.uint8)
        self.result = np.empty(8 * min(length, BLOCK), np.uint8)


class Reader:
    """Reads blocks of jobs; one for a whole merge, used by all its threads.

    Args:
      plan: what is merged.
      stores: the models by their place in `plan.models`.
      block: elements of a block.
      allow_nonfinite: let NaN and infinity pass instead of raising `MergeError`.
      to_device: puts a float32 array where `xp` computes; None leaves it to NumPy.
      xp: the array namespace.
      count: called with the number of bytes read.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Store],
        *,
        block: int = BLOCK,
        allow_nonfinite: bool = False,
        to_device: Callable[[np.ndarray], Any] | None = None,
        xp: Any = np,
        count: Callable[[int], None] = lambda _: None,
    ):
        self.plan, self.stores, self.block, self.xp = plan, stores, block, xp
        self._allow_nonfinite, self._to_device, self._count = allow_nonfinite, to_device, count
        self._spare: collections.deque[Workspace] = collections.deque()
        self._means: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def workspace(self, job: Job, length: int) -> Iterator[Workspace]:
        """Buffers for a block of `length` elements; those of the usual size are kept for reuse."""
        participants = len(job.sources) + (job.base is not None)
        space = None
        with self._lock:
            for index, spare in enumerate(self._spare):
                if spare.length >= length and len(spare.values) >= participants:
                    space = spare
                    del self._spare[index]
                    break
        space = space or Workspace(participants, max(length, min(self.block, _size(job))))
        try:
            yield space
        finally:
            if space.length <= 2 * self.block:
                with self._lock:
                    self._spare.append(space)

    def load(
        self,
        job: Job,
        method: Method,
        span: Span,
        space: Workspace,
        statistics: Any = None,
        whole: Any = None,
        check: bool = True,
    ) -> Block:
        """The block at `span`; its arrays lie in `space`."""
        order = [*job.sources, *([job.base] if job.base else [])]
        arrays: list[Any] = []
        known: dict[tuple[int, str], Any] = {}
        for participant, source in enumerate(order):
            key = (source.model, source.name)
            if key not in known or job.transform is not None:
                values = self._values(job, participant, order, span, space, check)
                known[key] = self._shaped(job, method, span, values)
            arrays.append(known[key])
        base = arrays.pop() if job.base else None
        return Block(
            base=base,
            models=tuple(arrays),
            per_model=tuple(source.params for source in job.sources),
            params=job.params,
            start=span[0],
            random=self._random(job, span, arrays),
            xp=self.xp,
            statistics=statistics,
            whole=whole,
            info=TensorInfo(job.output, job.shape, job.dtype),
        )

    def will_need(self, job: Job, span: Span) -> None:
        """This part of a tensor comes soon: let the disk work meanwhile."""
        if job.transform is None:
            for source in (*job.sources, *([job.base] if job.base else [])):
                self.stores[source.model].will_need(source.name, *span)

    def raw(
        self, source: Source, span: Span, buffer: np.ndarray | None = None, check: bool = True
    ) -> np.ndarray:
        """Elements as they are in the file, searched for NaN and infinity if `check`."""
        store = self.stores[source.model]
        values = store.read(source.name, *span, buffer)
        self._count(values.nbytes)
        if check and not self._allow_nonfinite and not all_finite(values):
            raise MergeError(
                f"{source.name} of {self.plan.models[source.model]} holds NaN or infinity: the "
                "model is damaged (--allow-nonfinite merges it nevertheless)"
            )
        return values

    def _values(
        self,
        job: Job,
        participant: int,
        order: Sequence[Source],
        span: Span,
        space: Workspace,
        check: bool,
    ) -> np.ndarray:
        """Flat float32 values of one participant."""
        if job.transform is not None:
            columns = _columns(job)
            first, last = span[0] // columns, -(-span[1] // columns)
            fetch = self._fetcher(order, columns)
            mean = None
            if last > job.transform.vocabulary:
                mean = self._mean(job, participant, fetch)
            rows = job.transform.read(participant, first, last, fetch, mean)
            return np.ascontiguousarray(rows, np.float32).reshape(-1)
        buffer = space.values[participant]
        source = order[participant]
        store = self.stores[source.model]
        name = store.aliases.get(source.name, source.name)
        single = store.tensors[name].dtype == "float32"
        step = max(1, len(space.raw) // 8)
        for start in range(*span, step):
            stop = min(start + step, span[1])
            target = buffer[start - span[0] : stop - span[0]]
            given = target.view(np.uint8) if single else space.raw
            values = self.raw(source, (start, stop), given, check)
            if not single or not np.may_share_memory(values, target):
                to_float32(values, target)
        return buffer[: span[1] - span[0]]

    def _fetcher(self, order: Sequence[Source], columns: int) -> Callable[..., np.ndarray]:
        def fetch(participant: int, rows: np.ndarray) -> np.ndarray:
            out = np.empty((len(rows), columns), np.float32)
            cuts = np.flatnonzero(np.diff(rows) != 1) + 1
            for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
                if last > first:
                    start = int(rows[first]) * columns
                    span = (start, start + (last - first) * columns)
                    to_float32(self.raw(order[participant], span), out[first:last].reshape(-1))
            return out

        return fetch

    def _mean(self, job: Job, participant: int, fetch: Callable[..., np.ndarray]) -> np.ndarray:
        key = (id(job), participant)
        with self._lock:
            found = self._means.get(key)
        if found is None:
            found = job.transform.mean(participant, fetch)
            with self._lock:
                self._means[key] = found
        return found

    def _shaped(self, job: Job, method: Method, span: Span, values: np.ndarray) -> Any:
        if method.scope == "tensor":
            values = values.reshape(job.shape)
        elif method.scope == "row":
            values = values.reshape(-1, job.shape[-1] if job.shape else 1)
        return values if self._to_device is None else self._to_device(values)

    def _random(self, job: Job, span: Span, arrays: Sequence[Any]) -> Callable[[int], Any]:
        def random(k: int) -> Any:
            model = job.sources[k].model
            before = sum(source.model == model for source in job.sources[:k])
            key = stream_key(self.plan.seed, job.method, model, before, job.output)
            numbers = uniform(key, span[0], span[1] - span[0]).reshape(arrays[k].shape)
            return numbers if self._to_device is None else self._to_device(numbers)

        return random


@dataclasses.dataclass(frozen=True)
class TensorBlocks:
    """`lm.merging.types.Blocks` of one job, read and converted by the threads of `pool`."""

    reader: Reader
    job: Job
    method: Method
    pool: concurrent.futures.Executor
    window: int
    """Tasks under way at once."""
    block: int = BLOCK
    """The same whatever blocks are used elsewhere, so that sums over blocks are the same."""

    def spans(self) -> list[Span]:
        """Where the tensor is cut."""
        return spans_of(_size(self.job), self.block, unit_of(self.job, self.method))

    def __call__(self) -> Iterator[Block]:
        """The blocks one after the other, read ahead."""

        def task(spans: list[Span]) -> list[tuple[contextlib.ExitStack, Block]]:
            loaded = []
            try:
                for span in spans:
                    stack = contextlib.ExitStack()
                    loaded.append((stack, None))
                    length = span[1] - span[0]
                    space = stack.enter_context(self.reader.workspace(self.job, length))
                    block = self.reader.load(self.job, self.method, span, space, check=False)
                    loaded[-1] = (stack, block)
            except BaseException:
                for stack, _ in loaded:
                    stack.close()
                raise
            return loaded

        for group in self._ordered(task, _AHEAD, 2):
            for stack, block in group:
                with stack:
                    yield block

    def map(self, function: Callable[[Block], Any]) -> Iterator[Any]:
        """`function(block)` of every block, in order."""

        def task(spans: list[Span]) -> list[Any]:
            results = []
            for span in spans:
                with (
                    self.reader.workspace(self.job, span[1] - span[0]) as space,
                    np.errstate(all="ignore"),
                ):
                    block = self.reader.load(self.job, self.method, span, space, check=False)
                    results.append(function(block))
            return results

        for group in self._ordered(task, _GROUP, self.window):
            yield from group

    def _ordered(self, task: Callable[[list[Span]], Any], size: int, window: int) -> Iterator[Any]:
        """Results of `task` for groups of spans, at most `window` of them ahead of the reader."""
        spans = self.spans()
        groups = iter([spans[i : i + size] for i in range(0, len(spans), size)])
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for group in groups:
                self.reader.will_need(self.job, (group[0][0], group[-1][1]))
                waiting.append(self.pool.submit(task, group))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _size(job: Job) -> int:
    return math.prod(job.shape)


def _columns(job: Job) -> int:
    """Elements of one token: 1 in the bias of a head, which has no other axis."""
    return math.prod(job.shape[1:])


def copies(job: Job, method: Method, stores: Sequence[Store]) -> bool:
    """Whether the output has the very bytes of its only source (integers are always copied)."""
    if not is_float(job.dtype):
        return True
    source = job.sources[0] if job.sources else job.base
    store = stores[source.model]
    info = store.tensors[store.aliases.get(source.name, source.name)]
    return (
        method.name == "passthrough"
        and job.transform is None
        and info.dtype == job.dtype
        and source.params.get("scale") in (None, 1, 1.0)
        and "+" not in store.path
    )
