"""What a plan writes: its output tensors, and the pieces that the work is cut into."""

import math
from collections.abc import Sequence

from lm.merging.blocks import Span, spans_of, unit_of
from lm.merging.numbers import is_float
from lm.merging.types import Job, Method, Plan, TensorInfo

__all__ = ["PIECE", "job_pieces", "outputs_of", "part_of", "pieces_of", "tensor_memory"]

PIECE = 1 << 22
"""Elements of a piece, the unit of the journal: 8 MiB of bfloat16."""


def outputs_of(plan: Plan, methods: Sequence[Method]) -> tuple[list[TensorInfo], list[list[int]]]:
    """All tensors to be written, and for each job the numbers of its own."""
    outputs: list[TensorInfo] = []
    owned: list[list[int]] = []
    for job, method in zip(plan.jobs, methods, strict=True):
        info = TensorInfo(job.output, tuple(job.shape), job.dtype)
        mine: Sequence[TensorInfo] = (info,)
        if method.many and is_float(job.dtype):
            mine = method.outputs(info, len(job.sources))
        owned.append(list(range(len(outputs), len(outputs) + len(mine))))
        outputs += mine
    return outputs, owned


def pieces_of(plan: Plan, methods: Sequence[Method]) -> list[list[Span]]:
    """For every output its pieces: what is finished and checked as a whole when resuming."""
    outputs, owned = outputs_of(plan, methods)
    pieces: list[list[Span]] = []
    for job, method, numbers in zip(plan.jobs, methods, owned, strict=True):
        spans = job_pieces(job, method)
        pieces += [[part_of(outputs[n], job, span) for span in spans] for n in numbers]
    return pieces


def job_pieces(job: Job, method: Method) -> list[Span]:
    """Pieces in elements of the job's own tensor; they depend on nothing but the plan."""
    unit = 1 if method.scope == "tensor" else unit_of(job, method)
    return spans_of(math.prod(job.shape), PIECE, unit)


def part_of(output: TensorInfo, job: Job, span: Span) -> Span:
    """The elements of an output that belong to elements `span` of its job's tensor.

    An output of the tensor's size goes along with it, one of an eighth of that holds bits, and
    anything else (a few numbers) comes with the first element.
    """
    size = math.prod(job.shape)
    if output.size == size:
        return span
    if output.size == -(-size // 8):
        return span[0] // 8, -(-span[1] // 8)
    return (0, output.size) if span[0] == 0 else (output.size, output.size)


def tensor_memory(job: Job, method: Method) -> int:
    """Bytes that a method of scope "tensor" takes for this tensor."""
    if method.memory is not None:
        return method.memory(tuple(job.shape), len(job.sources))
    participants = len(job.sources) + (job.base is not None)
    return 4 * math.prod(job.shape) * (2 * participants + 2)
