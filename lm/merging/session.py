"""One merge from the configuration to the finished folder: what the command line runs."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from lm.merging import methods as registry
from lm.merging import preflight
from lm.merging.config import MergeConfig, load_config
from lm.merging.engine import Options, merge
from lm.merging.manifest import MANIFEST, PARTIAL, Workplace, check_output
from lm.merging.numbers import dtype_of
from lm.merging.pieces import outputs_of, pieces_of
from lm.merging.plan import make_plan
from lm.merging.progress import Progress, duration, size
from lm.merging.store import open_store
from lm.merging.store.files import read_json
from lm.merging.store.writer import make_layout
from lm.merging.types import Job, MergeError, Plan, Source, Store

__all__ = ["Session"]


class Session:
    """A merge that is planned and checked; `describe` or `run` it.

    Args:
      config: the YAML file, or what was read from one.
      out: the folder to be made.
      seed, flavor: of the plan.
      shard_size: largest data of an output file, in bytes.
      jobs: threads.
      max_memory: bytes that the process may take; None: half of the machine's.
      device: None for NumPy, else the kind of JAX devices.
      out_format: what OUT holds in the end.
      allow_nonfinite: merge NaN and infinity.
      stores: models that are open already, by their references.
      say: takes the lines meant for the user.

    Raises:
      MergeError: the configuration or a model cannot work; nothing has been written.
    """

    def __init__(
        self,
        config: Path | MergeConfig,
        out: Path,
        *,
        seed: int = 0,
        flavor: Literal["paper", "mergekit"] | None = None,
        shard_size: int = 5 * 10**9,
        jobs: int = 2,
        max_memory: int | None = None,
        device: str | None = None,
        out_format: Literal["safetensors", "orbax"] = "safetensors",
        allow_nonfinite: bool = False,
        stores: Mapping[str, Store] | None = None,
        say: Callable[[str], None] = print,
    ):
        self.out, self._say, self._device, self._format = out, say, device, out_format
        self._allow_nonfinite = allow_nonfinite
        self._stores: dict[str, Store] = dict(stores or {})
        config = config if isinstance(config, MergeConfig) else load_config(config)
        self.plan: Plan = make_plan(config, self._open, seed=seed, flavor=flavor)
        self.stores = [self._open(reference) for reference in self.plan.models]
        self.methods = [
            registry.get(job.method, self.plan.flavor, job.kind) for job in self.plan.jobs
        ]
        preflight.check_jobs(self.plan, self.stores, self.methods)
        self.outputs, _ = outputs_of(self.plan, self.methods)
        metadata = {"format": "pt", **self.plan.metadata}
        self.layout = make_layout(self.outputs, shard_size, metadata)
        limit = max_memory or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        self.jobs = jobs
        if device is None:
            self.jobs = preflight.check_memory(self.plan, self.methods, limit, jobs)
        self._limit = limit

    def _open(self, reference: str) -> Store:
        if reference not in self._stores:
            self._stores[reference] = open_store(reference)
        return self._stores[reference]

    def describe(self, resume: bool = False) -> str:
        """The resolved parameters of every tensor, and what the merge will take."""
        check_output(self.out, resume)
        preflight.check_disk(self.out, self.layout)
        lines = [self._line(job) for job in self.plan.jobs]
        lines += [f"{name} is {stored}" for name, stored in self.plan.aliases.items()]
        lines += [f"warning: {text}" for text in self._warnings()]
        memory = preflight.estimate_memory(self.plan, self.methods, self.jobs)
        seconds = preflight.estimate_seconds(self.plan, self.stores, self.methods, self.jobs)
        reads = sum(
            math.prod(job.shape)
            * dtype_of(job.dtype).itemsize
            * (len(job.sources) + bool(job.base))
            for job in self.plan.jobs
        )
        lines += [
            f"models      {len(self.plan.models)}: {', '.join(self.plan.models)}",
            f"output      {len(self.outputs)} tensors in {len(self.layout.shards)} files",
            f"disk        {size(self.layout.nbytes)} to write, about {size(reads)} to read",
            f"memory      about {size(memory)} with {self.jobs} threads",
            f"time        {'unknown' if seconds != seconds else 'about ' + duration(seconds)}",
        ]
        return "\n".join(lines)

    def run(self, resume: bool = False, progress: TextIO | None = None) -> None:
        """Merge; OUT is complete afterwards.

        Raises:
          MergeError, OSError: one clear line; finished work stays for `resume`.
        """
        state = check_output(self.out, resume)
        if state == "complete":
            self._check_finished()
            self._convert()
            return
        preflight.check_disk(self.out, self.layout)
        for text in self._warnings():
            self._say(f"warning: {text}")
        pieces = pieces_of(self.plan, self.methods)
        place = Workplace(self.out, self.layout, self.outputs, pieces, self._identity())
        shown = Progress(sum(math.prod(job.shape) for job in self.plan.jobs), progress)
        if place.done:
            self._say(f"continuing: {len(place.done)} finished pieces verified")
        options = Options(
            jobs=self.jobs,
            memory=max(
                1, self._limit - preflight.estimate_fixed(self.plan, self.methods, self.jobs)
            ),
            device=self._device,
            allow_nonfinite=self._allow_nonfinite,
        )
        try:
            merge(self.plan, self.stores, self.methods, place, options, shown)
            place.complete(self.plan.files, {"models": list(self.plan.models)})
        finally:
            place.close()
        shown.show(last=True)
        self._convert()

    def _convert(self) -> None:
        if self._format == "orbax":
            from lm.merging.store.orbax import convert

            convert(self.out, self.layout)

    def _warnings(self) -> list[str]:
        return [*self.plan.warnings, *preflight.lost_deltas(self.plan, self.stores)]

    def _identity(self) -> dict[str, Any]:
        """What must be the same when work is continued, by names for the message."""
        return {
            "fingerprint": self.plan.fingerprint,
            "seed": self.plan.seed,
            "flavor": self.plan.flavor,
            "device": self._device or "numpy",
        }

    def _check_finished(self) -> None:
        before = read_json(self.out / MANIFEST)
        if before.get("fingerprint") != self.plan.fingerprint:
            raise MergeError(
                f"{self.out} holds a finished merge of another configuration or other inputs: "
                "give another output folder"
            )
        shutil.rmtree(self.out / PARTIAL, ignore_errors=True)  # killed while clearing up
        self._say(f"{self.out} is already complete: nothing to do")

    def _line(self, job: Job) -> str:
        sources = [self._source(source, job) for source in job.sources]
        base = f" base {self._source(job.base, job)}" if job.base else ""
        return (
            f"{job.output} {list(job.shape)} {job.dtype} {job.method}{_values(job.params)}"
            f"{base}; {'; '.join(sources)}"
        )

    def _source(self, source: Source, job: Job) -> str:
        name = "" if source.name == job.output else f":{source.name}"
        return f"{self.plan.models[source.model]}{name}{_values(source.params)}"


def _values(params: Mapping[str, Any]) -> str:
    if not params:
        return ""
    return " {" + ", ".join(f"{k}: {json.dumps(v, default=str)}" for k, v in params.items()) + "}"
