"""What a merge did, in numbers: for every tensor, every layer and the whole model.

The numbers come from one extra streamed pass over the inputs and, where it is there, the result:
the same blocks in the same bounded memory as the merge, so the report can also be made of the
inputs alone before anything is merged, or of a merge that was resumed. Nothing in it depends on
the number of threads. `DEFINITIONS` says what each number is.
"""

import concurrent.futures
import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import atomic_write_text
from lm.merging.blocks import Reader, TensorBlocks
from lm.merging.methods import get
from lm.merging.methods.gram import inner
from lm.merging.numbers import dtype_of, from_float32, is_float, to_float32
from lm.merging.types import Block, Job, MergeError, Plan, Store

__all__ = ["DEFINITIONS", "check_report", "describe", "summary", "write_report"]

JSON, HTML = "report.json", "report.html"
DEFINITIONS = {
    "relative_delta": "norm of a model's task vector (its difference from the base) divided by the "
    "norm of the base",
    "cosines": "between task vectors where there is a base, else between the models themselves",
    "sign_conflict": "of the elements that any model changes, the share that some models increase "
    "and others decrease",
    "kept": "of the elements that any model changes, the share in which the result differs from "
    "the base rounded to the result's type",
    "drift": "norm of the difference between the result and a model, divided by the model's norm",
}
Sums = Mapping[tuple, float]


def check_report(folder: Path, replace: bool) -> None:
    """That a report can be written to `folder` later.

    Raises:
      MergeError: there is one already, or `folder` is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise MergeError(f"{folder} is not a folder: give another --report-dir")
    if not replace and (folder / JSON).exists():
        raise MergeError(f"{folder} holds a report already: give another --report-dir")


def describe(
    plan: Plan, stores: Sequence[Store], result: Store | None = None, jobs: int = 2
) -> dict[str, Any]:
    """The report, as it is written to report.json.

    Args:
      plan: the merge.
      stores: its models, in the order of `plan.models`.
      result: the merged model; without it, the report is of the inputs only.
      jobs: threads.

    Returns:
      `model` (numbers of the whole), `layers` and `tensors` (lists of the same with names), and
      what was merged. A number that is not defined (a division by zero, NaN in the inputs) is
      None; keys that do not apply are left out.

    Raises:
      StorageError: a file cannot be read.
    """
    reader, method = Reader(plan, stores), get("linear")
    tensors, layers, whole = [], {}, {}
    copied = []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for job in plan.jobs:
            if not is_float(job.dtype):
                copied.append(job.output)
                continue
            labels = _labels(plan, job)
            blocks = TensorBlocks(reader, job, method, pool, 2 * jobs)
            sums = _measure(job, blocks, labels, result)
            head = {"name": job.output, "shape": list(job.shape), "dtype": job.dtype}
            tensors.append(head | {"method": job.method} | _numbers(sums))
            for total in (whole, layers.setdefault(layer_of(job.output), {})):
                for key, value in sums.items():
                    total[key] = total.get(key, 0.0) + value
    kind = "the inputs" if result is None else "the inputs and the result"
    return {
        "about": f"computed in one extra pass over {kind}",
        "definitions": DEFINITIONS,
        "models": list(plan.models),
        "methods": sorted({job.method for job in plan.jobs}),
        "seed": plan.seed,
        "flavor": plan.flavor,
        "fingerprint": plan.fingerprint,
        "copied": copied,
        "model": _numbers(whole),
        "layers": [{"name": name} | _numbers(sums) for name, sums in layers.items()],
        "tensors": tensors,
    }


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json and report.html, one self-contained page, to `folder` (made if missing)."""
    from lm.merging.report_html import page

    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / HTML, page(report))
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write_text(folder / JSON, text + "\n")


def summary(report: Mapping[str, Any]) -> str:
    """The numbers of the layers and of the whole model as lines of text."""
    lines = []
    for entry in (*report["layers"], {"name": "all tensors"} | report["model"]):
        parts = [f"{entry['name']}:"]
        for key, word in (("relative_delta", "delta"), ("drift", "drift")):
            parts += [
                f"{word} {Path(ref).name} {_show(value)}"
                for ref, value in entry.get(key, {}).items()
            ]
        for pair in entry.get("cosines", ()):
            names = " ".join(Path(ref).name for ref in pair["models"])
            parts.append(f"cosine {names} {_show(pair['cosine'])}")
        parts += [
            f"{word} {_show(entry[key])}"
            for key, word in (("sign_conflict", "sign conflict"), ("kept", "kept"))
            if key in entry
        ]
        lines.append("  ".join(parts))
    return "\n".join(lines)


def layer_of(tensor: str) -> str:
    """The group of a tensor: its layer ("model.layers.3"), or what stands outside the layers."""
    match = re.match(r"(.*?\.\d+)\.", tensor)
    return match[1] if match else tensor.rpartition(".")[0] or tensor


def _labels(plan: Plan, job: Job) -> list[str]:
    """Names of the sources and, last, of the base; a model that comes twice is numbered."""
    labels: list[str] = []
    for source in (*job.sources, *([job.base] if job.base else [])):
        name, count = plan.models[source.model], 1
        while (label := name if count == 1 else f"{name} ({count})") in labels:
            count += 1
        labels.append(label)
    return labels


def _measure(job: Job, blocks: TensorBlocks, labels: Sequence[str], result: Store | None) -> Sums:
    """Sums over the elements of a tensor, by what they are of."""
    info = result.tensors.get(job.output) if result else None
    dtype = dtype_of(info.dtype) if info else None
    models = labels[: len(job.sources)]
    kind = "models" if job.base is None else "task vectors"

    def sums(block: Block) -> dict[tuple, float]:
        vectors = block.models if block.base is None else block.deltas
        everyone = (*block.models, *(() if block.base is None else (block.base,)))
        size = everyone[0].size
        found: dict[tuple, float] = {("elements",): size}
        for (a, one), (b, two) in itertools.combinations_with_replacement(
            zip(models, vectors, strict=True), 2
        ):
            found["product", kind, a, b] = inner(np, one, two)
        for label, values in zip(labels, everyone, strict=True):
            found["square", label] = inner(np, values, values)
        changed = None
        if block.base is not None and models:
            up, down = (_any(vectors, compare) for compare in (np.greater, np.less))
            changed = up | down
            found |= {("base", label): found["square", labels[-1]] for label in models}
            found["changed",] = float(np.count_nonzero(changed))
            found["conflict",] = float(np.count_nonzero(up & down))
        if result is not None and dtype is not None:
            raw = result.read(job.output, block.start, block.start + size)
            values = to_float32(raw, np.empty(raw.size, np.float32))
            for label, model in zip(labels, everyone, strict=True):
                found["drift", label] = _square(values - model)
                found["drifted from", label] = found["square", label]
            if changed is not None:
                rounded = from_float32(everyone[-1], np.empty(raw.size, dtype))
                found["kept",] = float(np.count_nonzero((rounded != raw) & changed))
                found["dense",] = found["changed",]
        return found

    total: dict[tuple, float] = {}
    for found in blocks.map(sums):
        for key, value in found.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _any(vectors: Iterable[np.ndarray], compare: np.ufunc) -> np.ndarray:
    """Where any of them compares with 0."""
    return functools.reduce(np.logical_or, (compare(vector, 0) for vector in vectors))


def _square(values: np.ndarray) -> float:
    return inner(np, values, values)


def _numbers(sums: Sums) -> dict[str, Any]:
    """The report's numbers from sums over any set of tensors."""
    numbers: dict[str, Any] = {"elements": int(sums.get(("elements",), 0))}
    products = {key[1:]: value for key, value in sums.items() if key[0] == "product"}
    deltas = {a: v for (kind, a, b), v in products.items() if kind == "task vectors" and a == b}
    if deltas:
        numbers["relative_delta"] = {
            label: _root(value, sums["base", label]) for label, value in deltas.items()
        }
    cosines = list(_cosines(products))
    if cosines:
        numbers["cosines"] = cosines
    if ("changed",) in sums:
        numbers["sign_conflict"] = _share(sums["conflict",], sums["changed",])
    if ("kept",) in sums:
        numbers["kept"] = _share(sums["kept",], sums["dense",])
    drift = {key[1]: value for key, value in sums.items() if key[0] == "drift"}
    if drift:
        numbers["drift"] = {
            label: _root(value, sums["drifted from", label]) for label, value in drift.items()
        }
    return numbers


def _cosines(products: Mapping[tuple, float]) -> Iterator[dict[str, Any]]:
    for (kind, a, b), value in products.items():
        if a != b:
            norms = products[kind, a, a] * products[kind, b, b]
            cosine = _share(value, math.sqrt(norms) if norms >= 0 else math.nan)
            if cosine is not None:
                cosine = min(1.0, max(-1.0, cosine))
            yield {"models": [a, b], "of": kind, "cosine": cosine}


def _share(part: float, of: float) -> float | None:
    """A ratio; None where it is not defined."""
    ratio = part / of if of else math.nan
    return ratio if math.isfinite(ratio) else None


def _root(part: float, of: float) -> float | None:
    """Ratio of two norms from their squares."""
    ratio = _share(part, of)
    return None if ratio is None or ratio < 0 else math.sqrt(ratio)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
