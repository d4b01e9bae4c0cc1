"""The merge itself: reads, computes and writes the blocks of all tensors on several threads.

Two pools of threads. Workers do everything that costs time: they read a block of all models,
apply the method and write the result; NumPy and the system release the GIL meanwhile, so one
worker computes while another waits for the disk. Drivers take one tensor after the other, have it
measured, hand its pieces to the workers and wait. Nothing depends on who does what when: every
piece has its place in the output and its random numbers from its position.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.merging.blocks import (
    BLOCK,
    Reader,
    Span,
    TensorBlocks,
    Workspace,
    copies,
    spans_of,
    unit_of,
)
from lm.merging.devices import DEVICE_BLOCK, placement
from lm.merging.manifest import Workplace
from lm.merging.numbers import all_finite, dtype_of, from_float32
from lm.merging.pieces import job_pieces, outputs_of, part_of, pieces_of, tensor_memory
from lm.merging.progress import Progress
from lm.merging.types import Job, MergeError, Method, Plan, Store

__all__ = ["Options", "merge"]


@dataclasses.dataclass(frozen=True)
class Options:
    """How a merge is done; none of it changes the result."""

    jobs: int = 2
    """Threads that compute."""
    memory: int = 600_000_000
    """Bytes that methods working on whole tensors may take together."""
    block: int = BLOCK
    """Elements of a block."""
    device: str | None = None
    """None computes with NumPy; else "cpu", "gpu" or "tpu" by way of JAX."""
    allow_nonfinite: bool = False
    """Merge NaN and infinity instead of stopping."""


def merge(
    plan: Plan,
    stores: Sequence[Store],
    methods: Sequence[Method],
    place: Workplace,
    options: Options,
    progress: Progress,
) -> None:
    """Make every piece of the plan's outputs that `place` does not have yet.

    Args:
      plan: what is merged.
      stores: the models, in the order of `plan.models`.
      methods: the method of each job.
      place: where the results go.
      options: threads and memory.
      progress: told of every step.

    Raises:
      MergeError: NaN or infinity in an input or a result.
      StorageError: an input cannot be read or the output cannot be written.
    """
    _Merge(plan, stores, methods, place, options, progress).run()


class _Merge:
    def __init__(
        self,
        plan: Plan,
        stores: Sequence[Store],
        methods: Sequence[Method],
        place: Workplace,
        options: Options,
        progress: Progress,
    ):
        self.plan, self.methods, self.place, self.options = plan, methods, place, options
        self.stores, self.progress = stores, progress
        xp, to_device, block = np, None, options.block
        if options.device is not None:
            xp, to_device, _ = placement(options.device)
            block = DEVICE_BLOCK
        self.reader = Reader(
            plan,
            stores,
            block=block,
            allow_nonfinite=options.allow_nonfinite,
            to_device=to_device,
            xp=xp,
            count=self._count,
        )
        self.measured_block = BLOCK if to_device is None else DEVICE_BLOCK
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.outputs, self.owned = outputs_of(plan, methods)
        self.pieces = pieces_of(plan, methods)
        self.memory = _Budget(options.memory)
        self.workers = concurrent.futures.ThreadPoolExecutor(options.jobs, "worker")
        self.drivers = concurrent.futures.ThreadPoolExecutor(options.jobs + 1, "driver")

    def run(self) -> None:
        """Everything; on an error or Ctrl-C the threads are stopped before it is raised."""
        waiting: set[concurrent.futures.Future] = set()
        try:
            whole = self._survey()
            for number in self._order():
                waiting.add(self.drivers.submit(self._job, number, whole))
            while waiting:
                # With a time limit: an interrupt is only seen between two waits.
                done, waiting = concurrent.futures.wait(
                    waiting, 0.5, concurrent.futures.FIRST_EXCEPTION
                )
                if self.error is not None:
                    raise self.error
                for future in done:
                    future.result()
                self.progress.show()
        except _Stopped:
            raise self.error or MergeError("stopped") from None
        finally:
            self.stop.set()
            self.drivers.shutdown(cancel_futures=True)
            self.workers.shutdown(cancel_futures=True)

    def _order(self) -> list[int]:
        """Jobs in order, but huge tensors first: the last one must not run alone."""
        sizes = [math.prod(job.shape) for job in self.plan.jobs]
        limit = max(1, sum(sizes) // 20)
        return sorted(range(len(sizes)), key=lambda n: (-(sizes[n] // limit), n))

    def _blocks(self, number: int) -> TensorBlocks:
        return TensorBlocks(
            self.reader,
            self.plan.jobs[number],
            self.methods[number],
            self.workers,
            2 * self.options.jobs,
            self.measured_block,
        )

    def _survey(self) -> dict[Method, Any]:
        """What methods want to know of the whole model."""
        found: dict[Method, Any] = {}
        for method in dict.fromkeys(m for m in self.methods if m.survey is not None):
            numbers = [n for n, m in enumerate(self.methods) if m is method]

            def job_blocks(numbers: list[int] = numbers) -> Iterator[tuple[str, TensorBlocks]]:
                for number in numbers:
                    self.progress.show(f"survey: {self.plan.jobs[number].output}")
                    yield self.plan.jobs[number].output, self._blocks(number)

            found[method] = self._careful(numbers, lambda m=method, b=job_blocks: m.survey(b))
        return found

    def _careful(self, numbers: Sequence[int], measure: Callable[[], Any]) -> Any:
        """Run a measurement; where it fails, NaN or infinity in its inputs are told instead.

        Inputs are searched when they are merged: a measurement sees them before.
        """
        try:
            with np.errstate(all="ignore"):
                return measure()
        except _Stopped:
            raise
        except Exception:
            for job in (self.plan.jobs[number] for number in numbers):
                for source in (*job.sources, *([job.base] if job.base else [])):
                    store = self.stores[source.model]
                    size = store.tensors[store.aliases.get(source.name, source.name)].size
                    for span in spans_of(size, self.options.block):
                        self.reader.raw(source, span)
            raise

    def _count(self, count: int) -> None:
        """Called for every read: the place where a thread learns that it should end."""
        if self.stop.is_set():
            raise _Stopped
        self.progress.add_bytes(count)

    def _job(self, number: int, whole: dict[Method, Any]) -> None:
        """All missing pieces of one tensor; the first error of all threads is kept."""
        try:
            self._finish_job(number, whole)
        except BaseException as error:
            if not isinstance(error, _Stopped):
                self.error = self.error or error
            self.stop.set()
            raise

    def _finish_job(self, number: int, whole: dict[Method, Any]) -> None:
        job, method = self.plan.jobs[number], self.methods[number]
        outputs = self.owned[number]
        spans = job_pieces(job, method)
        missing = [
            piece
            for piece in range(len(spans))
            if any((output, piece) not in self.place.done for output in outputs)
        ]
        for piece in set(range(len(spans))) - set(missing):
            self.progress.finish(spans[piece][1] - spans[piece][0])
        if not missing or self.stop.is_set():
            return
        if not math.prod(job.shape) and not method.many:
            for piece in missing:  # nothing to compute: no method need know of empty tensors
                self.place.finish_piece(outputs[0], piece, 0)
        elif copies(job, method, self.stores):
            self._all([self.workers.submit(self._copy, number, piece) for piece in missing])
        elif method.scope == "tensor":
            need = tensor_memory(job, method)
            with self.memory.taken(need):
                if not self.stop.is_set():
                    self._whole(number, whole.get(method))
        else:
            measured = None
            if method.measure is not None:
                measured = self._careful([number], lambda: method.measure(self._blocks(number)))
            self._all(
                [
                    self.workers.submit(self._piece, number, piece, measured, whole)
                    for piece in missing
                ]
            )

    def _all(self, futures: list[concurrent.futures.Future]) -> None:
        for future in futures:
            future.result()

    def _piece(self, number: int, piece: int, measured: Any, whole: dict[Method, Any]) -> None:
        """Compute and write one piece of a tensor, a block at a time."""
        job, method, outputs = self.plan.jobs[number], self.methods[number], self.owned[number]
        start, stop = job_pieces(job, method)[piece]
        sums = dict.fromkeys(outputs, 0)
        ahead = job_pieces(job, method)[piece + 1 :][: self.options.jobs]
        self.reader.will_need(job, (start, ahead[-1][1] if ahead else stop))
        for first, last in spans_of(stop - start, self.reader.block, unit_of(job, method)):
            if self.stop.is_set():
                return
            span = (start + first, start + last)
            with (
                self.reader.workspace(job, last - first) as space,
                np.errstate(all="ignore"),
            ):
                block = self.reader.load(job, method, span, space, measured, whole.get(method))
                for output, values in self._results(number, method.apply(block)).items():
                    place = part_of(self.outputs[output], job, span)
                    sums[output] = self._store(job, output, place, values, space, sums[output])
        for output, crc in sums.items():
            self.place.finish_piece(output, piece, crc)
        self.progress.finish(stop - start)

    def _whole(self, number: int, whole: Any) -> None:
        """A method that needs the whole tensor at once, in the driver's own thread."""
        job, method, (output,) = self.plan.jobs[number], self.methods[number], self.owned[number]
        span = (0, math.prod(job.shape))
        measured = None
        if method.measure is not None:
            measured = self._careful([number], lambda: method.measure(self._blocks(number)))
        with self.reader.workspace(job, span[1]) as space, np.errstate(all="ignore"):
            block = self.reader.load(job, method, span, space, measured, whole)
            values = np.asarray(method.apply(block), np.float32).reshape(-1)
            for piece, (start, stop) in enumerate(self.pieces[output]):
                part = values[start:stop]
                crc = self._store(job, output, (start, stop), part, space, 0)
                self.place.finish_piece(output, piece, crc)
        self.progress.finish(span[1])

    def _results(self, number: int, results: Any) -> dict[int, Any]:
        """What a method gave, by the numbers of the outputs."""
        outputs = self.owned[number]
        if not self.methods[number].many:
            return {outputs[0]: results}
        name = self.plan.jobs[number].output
        by_name = {self.outputs[n].name: n for n in outputs}
        return {by_name[name + suffix]: values for suffix, values in results.items()}

    def _store(
        self, job: Job, output: int, span: Span, result: Any, space: Workspace, crc: int
    ) -> int:
        """Round, check and write a result; gives the CRC of all bytes so far."""
        values = np.asarray(result).reshape(-1)
        if values.size != span[1] - span[0]:
            raise MergeError(
                f"{job.output}: the method {job.method} gave {values.size} elements for "
                f"{span[1] - span[0]}: it is wrong"
            )
        dtype = dtype_of(self.outputs[output].dtype)
        exact = values.dtype == dtype
        values = np.ascontiguousarray(values, None if exact else np.float32)
        buffer = space.result.view(dtype)
        step = max(1, len(space.result) // 8)
        for first in range(0, values.size, step):
            rounded = values[first : first + step]
            if not exact:
                rounded = from_float32(rounded, buffer)
            if not self.options.allow_nonfinite and not all_finite(rounded):
                self._explain(job, values[first : first + step])
            data = rounded.view(np.uint8)
            crc = zlib.crc32(data, crc)
            self.place.write(output, span[0] + first, rounded)
            self.progress.add_bytes(data.nbytes)
        return crc

    def _explain(self, job: Job, values: np.ndarray) -> None:
        if np.isfinite(values).all():
            raise MergeError(
                f"{job.output}: results up to {np.abs(values).max():.3g} do not fit into "
                f"{job.dtype}: choose another out_dtype (--allow-nonfinite writes infinity)"
            )
        names = ", ".join(self.plan.models[source.model] for source in job.sources)
        raise MergeError(
            f"{job.output}: the method {job.method} gave NaN or infinity for {names} (with "
            "--allow-nonfinite it is written nevertheless)"
        )

    def _copy(self, number: int, piece: int) -> None:
        """A piece of a tensor that is taken over as it is."""
        job, method, (output,) = self.plan.jobs[number], self.methods[number], self.owned[number]
        start, stop = job_pieces(job, method)[piece]
        source = job.sources[0] if job.sources else job.base
        crc = 0
        for first, last in spans_of(stop - start, self.options.block):
            values = self.reader.raw(source, (start + first, start + last))
            values = values.astype(dtype_of(job.dtype), copy=False)
            crc = zlib.crc32(values.view(np.uint8), crc)
            self.place.write(output, start + first, values)
            self.progress.add_bytes(values.nbytes)
        self.place.finish_piece(output, piece, crc)
        self.progress.finish(stop - start)


class _Stopped(Exception):
    """Another thread failed."""


class _Budget:
    """Lets threads take bytes of a common amount; whoever asks for more than that waits for all."""

    def __init__(self, amount: int):
        self._amount = self._free = amount
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        count = min(count, self._amount)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            self.release(count)

    def release(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()
