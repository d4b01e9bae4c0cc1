"""What can be known to go wrong before any work is done."""

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lm.merging.blocks import BLOCK, Reader, TensorBlocks
from lm.merging.manifest import PARTIAL
from lm.merging.numbers import is_float, resolution, to_float32
from lm.merging.pieces import tensor_memory
from lm.merging.progress import size
from lm.merging.store.writer import Layout
from lm.merging.types import Job, MergeError, Method, Plan, StorageError, Store

__all__ = [
    "check_disk",
    "check_jobs",
    "check_memory",
    "estimate_fixed",
    "estimate_memory",
    "estimate_seconds",
    "lost_deltas",
]

_PROCESS = 90_000_000  # Python, NumPy and the code itself
_SAMPLE = 1 << 16
_SAMPLED_TENSORS = 8
_TIMED = 1 << 20


def check_jobs(plan: Plan, stores: Sequence[Store], methods: Sequence[Method]) -> None:
    """Every source exists, has the output's shape, and can be merged or copied.

    Raises:
      MergeError: the first few of the tensors that do not fit, in one line.
    """
    problems = []
    for job, method in zip(plan.jobs, methods, strict=True):
        sources = [*job.sources, *([job.base] if job.base else [])]
        for source in sources:
            store, model = stores[source.model], plan.models[source.model]
            info = store.tensors.get(store.aliases.get(source.name, source.name))
            if info is None:
                problems.append(f"{model} lacks {source.name}")
            elif job.transform is None and math.prod(info.shape) != math.prod(job.shape):
                problems.append(
                    f"{source.name} of {model} is {list(info.shape)}, not {list(job.shape)}"
                )
            elif is_float(info.dtype) != is_float(job.dtype):
                problems.append(f"{source.name} of {model} is {info.dtype}, not {job.dtype}")
        if method.check is not None:
            method.check(job)
        if job.base is None and method.base == "required":
            problems.append(f"{job.output}: {method.name} needs a base_model")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise MergeError("; ".join(problems[:5]) + more)


def check_disk(out: Path, layout: Layout) -> None:
    """There is room for the output, and its folder can be written.

    Raises:
      StorageError: there is not.
    """
    parent = out.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise MergeError(f"cannot make {out}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write to {out}: {parent} is read-only for this user")
    # A merge that was interrupted at its very end has moved some of its files to their places.
    files = [folder / shard.name for folder in (out / PARTIAL, out) for shard in layout.shards]
    there = sum(512 * path.stat().st_blocks for path in files if path.is_file())
    free = shutil.disk_usage(parent).free + there
    if free < layout.nbytes:
        raise StorageError(
            f"{parent} has {size(free)} free, the output needs {size(layout.nbytes)}: free some "
            "space or choose another disk"
        )


def estimate_memory(plan: Plan, methods: Sequence[Method], jobs: int) -> int:
    """Peak bytes of the process, with the largest of the tensors that are needed as a whole."""
    return estimate_fixed(plan, methods, jobs) + _largest(plan, methods)[0]


def estimate_fixed(plan: Plan, methods: Sequence[Method], jobs: int) -> int:
    """Bytes of the process itself and of the threads' blocks."""
    participants = max((len(job.sources) + 1 for job in plan.jobs), default=1)
    # Each worker has a block of every model and about as much again for the method's own arrays;
    # blocks that a sequential measurement reads ahead come on top.
    block = 4 * BLOCK * (2 * participants + 6)
    blocks = (3 * jobs + 2) * block
    rows = [
        4 * job.shape[-1] * (2 * len(job.sources) + 4) * jobs
        for job, method in zip(plan.jobs, methods, strict=True)
        if method.scope == "row" and job.shape and job.shape[-1] > BLOCK
    ]
    # Thresholds keep a few per cent of a tensor as candidates.
    kept = [
        4 * math.prod(job.shape) * len(job.sources) // 25
        for job, method in zip(plan.jobs, methods, strict=True)
        if method.measure is not None or method.survey is not None
    ]
    return _PROCESS + blocks + max(rows, default=0) + max(kept, default=0)


def check_memory(plan: Plan, methods: Sequence[Method], limit: int, jobs: int) -> int:
    """Number of threads (at most `jobs`) with which the merge stays within `limit` bytes.

    Raises:
      MergeError: even one thread needs more; names the tensor or what else takes it.
    """
    for count in range(jobs, 0, -1):
        if estimate_memory(plan, methods, count) <= limit:
            return count
    need, name = _largest(plan, methods)
    least = estimate_memory(plan, methods, 1)
    cause = f": {name} is needed as a whole ({size(need)})" if need else ""
    raise MergeError(
        f"the merge needs {size(least)}, more than --max-memory {size(limit)}{cause}; allow at "
        f"least {math.ceil(least / 1e6)}MB"
    )


def _largest(plan: Plan, methods: Sequence[Method]) -> tuple[int, str]:
    pairs = zip(plan.jobs, methods, strict=True)
    needs = [(tensor_memory(job, m), job.output) for job, m in pairs if m.scope == "tensor"]
    return max(needs, default=(0, ""))


def lost_deltas(plan: Plan, stores: Sequence[Store]) -> list[str]:
    """Warnings about models whose difference from the base is below the resolution of the files.

    Looked at are the beginnings of a few of the largest tensors. Where the typical difference is
    smaller than the spacing of the numbers around the base's, what the files hold of it is mostly
    rounding: a delta of 1e-5 on weights of 0.02 is lost in bfloat16.
    """
    jobs = [job for job in plan.jobs if job.base and job.transform is None and is_float(job.dtype)]
    jobs = sorted(jobs, key=lambda job: -math.prod(job.shape))[:_SAMPLED_TENSORS]
    sums: dict[int, list[float]] = {}
    dtypes: dict[int, str] = {}
    for job in jobs:
        count = min(_SAMPLE, math.prod(job.shape))
        base, _ = _beginning(stores, job.base, count)
        for source in job.sources:
            if (source.model, source.name) == (job.base.model, job.base.name):
                continue
            values, dtype = _beginning(stores, source, count)
            step = resolution(dtype) * 2.0 ** np.floor(np.log2(np.maximum(np.abs(base), 1e-30)))
            total = sums.setdefault(source.model, [0.0, 0.0])
            total[0] += float(np.square(values - base, dtype=np.float64).sum())
            total[1] += float(np.square(step, dtype=np.float64).sum())
            dtypes[source.model] = dtype
    warnings = []
    for model, (delta, step) in sums.items():
        name = plan.models[model]
        if delta == 0:
            warnings.append(f"{name} does not differ from the base in the tensors looked at")
        elif delta < step:
            warnings.append(
                f"{name} differs from the base by {math.sqrt(delta / step):.2g} of the resolution "
                f"of {dtypes[model]}: most of it is lost in rounding, merge from float32 files"
            )
    return warnings


def _beginning(stores: Sequence[Store], source, count: int) -> tuple[np.ndarray, str]:
    values = stores[source.model].read(source.name, 0, count)
    with np.errstate(all="ignore"):  # the type is that of the values: adapters give float32
        return to_float32(values, np.empty(values.size, np.float32)), values.dtype.name


def estimate_seconds(
    plan: Plan, stores: Sequence[Store], methods: Sequence[Method], jobs: int
) -> float:
    """Seconds that the merge will take about, from timing the beginning of its largest tensor."""
    import concurrent.futures

    order = sorted(range(len(plan.jobs)), key=lambda n: -math.prod(plan.jobs[n].shape))
    picked = next((n for n in order if plan.jobs[n].transform is None), None)
    if picked is None or not math.prod(plan.jobs[picked].shape) or methods[picked].survey:
        return math.nan
    job, method = _shortened(plan.jobs[picked]), methods[picked]
    reader = Reader(plan, stores)
    elements = math.prod(job.shape)
    seconds = math.inf
    for _ in range(2):  # the first trial also fetches code and data
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(1) as pool, np.errstate(all="ignore"):
            blocks = TensorBlocks(reader, job, method, pool, 2)
            measured = method.measure(blocks) if method.measure else None
            for span in blocks.spans():
                with reader.workspace(job, span[1] - span[0]) as space:
                    method.apply(reader.load(job, method, span, space, measured, None))
        seconds = min(seconds, time.perf_counter() - start)
    return seconds / elements * sum(math.prod(job.shape) for job in plan.jobs) / jobs


def _shortened(job: Job) -> Job:
    """The same with the first rows only."""
    if math.prod(job.shape) <= _TIMED or not job.shape:
        return job
    row = math.prod(job.shape[1:])
    return dataclasses.replace(job, shape=(max(1, _TIMED // max(1, row)), *job.shape[1:]))
