"""What a merged model has besides weights: `--model.merged.*` (`lm.layers.merged`).

Such models come from `lm.merging.adaptive` and are loaded from their folders (`lm.hf.load`).
"""

import dataclasses
import math
from typing import Literal

from lm.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergedConfig:
    """Routed task vectors, or low-rank corrections of features."""

    kind: Literal["none", "wemoe", "surgery"] = "none"
    """wemoe: every MLP is W + sum_k (r_k - w_k) tau_k, with routers r (arXiv 2402.00433).
    surgery: x - relu(x D) U on final features (arXiv 2402.02705)."""
    tasks: tuple[str, ...] = ()
    """wemoe: the tasks of the vectors tau_k; surgery: the one whose correction it is."""
    weights: tuple[float, ...] = ()
    """wemoe: w, of which the dense weights hold sum_k w_k tau_k already."""
    depth: int = 2
    """wemoe: linear layers of a router; with 0 r is constant."""
    shared: bool = False
    """wemoe: one router for all layers (arXiv 2410.21804)."""
    rank: int = 16
    """surgery: columns of D."""
    layers: bool = False
    """surgery: every layer's output is corrected too (arXiv 2410.14389)."""

    def __post_init__(self):
        for name in ("tasks", "weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check(
            self.kind in ("none", "wemoe", "surgery"),
            f"model.merged.kind must be none, wemoe or surgery, got {self.kind!r}",
        )
        read = {"none": {"kind"}, "surgery": {"kind", "tasks", "rank", "layers"}}
        known = read.get(self.kind, {"kind", "tasks", "weights", "depth", "shared"})
        for field in dataclasses.fields(self):
            check(
                field.name in known or getattr(self, field.name) == field.default,
                f"model.merged.{field.name} is given, which kind {self.kind!r} does not have",
            )
        if self.kind == "wemoe":
            check(
                len(self.weights) > 0 and all(map(math.isfinite, self.weights)),
                f"model.merged.weights must be a number for each vector, got {self.weights}",
            )
            check(
                len(self.tasks) == len(self.weights),
                f"model.merged: {len(self.tasks)} tasks and {len(self.weights)} weights",
            )
            check(
                self.depth in (0, 1, 2), f"model.merged.depth must be 0, 1 or 2, got {self.depth}"
            )
        if self.kind == "surgery":
            check(self.rank > 0, f"model.merged.rank must be above 0, got {self.rank}")
            check(
                len(self.tasks) == 1,
                f"model.merged.tasks must name the one task of surgery, got {self.tasks}",
            )
