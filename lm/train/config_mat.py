"""What modular adaptive training is told: `--mat.*`, read by `lm.train.modular`."""

import dataclasses
from typing import Literal

from lm.config import check, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatConfig:
    """Modular adaptive training (optim.name mat): which modules are trained, and when."""

    base: str = "adamw"
    """Optimizer of the active modules: any other name that optim.name takes."""
    family: Literal["layers", "heads"] = "layers"
    """Modules. layers: each layer's attention and MLP branch (norm included). heads: each layer's
    key/value heads with their queries and rows of the output projection."""
    rule: Literal["eigenvalue", "random"] = "eigenvalue"
    """How modules are chosen. random: as many as the eigenvalues would choose, at random (the
    control experiment)."""
    alpha: float = 0.1
    """Active: principal eigenvalue at least alpha times the largest of the module's kind."""
    target_active: float | None = None
    """Instead of alpha: this share of each kind's modules, largest eigenvalues first."""
    beta: float = 1e-3
    """Frozen for good: the eigenvalue's distance from its first value changes by less than beta
    times its first change from one refresh to the next; 0 freezes none."""
    skip: Literal["weights", "branch"] = "branch"
    """What inactive modules do without. weights: their update. branch: their whole
    back-propagation, which saves its FLOPs; the residual path carries the signal."""
    start: int = 100
    """Step of the first refresh; all modules are active before it."""
    every: int = 100
    """Steps between refreshes."""
    probes: int = 16
    """Sequences whose gradients give the eigenvalues: this many backward passes a refresh."""
    chunk: int = 4
    """Probes worked on at a time, a divisor of probes."""
    output: Literal["sum", "signs"] = "sum"
    """Scalar output that is differentiated: the sum of a sequence's logits, or their sum with
    random signs."""

    def __post_init__(self):
        for name in ("alpha", "target_active"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"mat.{name} must lie in [0, 1], got {value}")
        check(self.beta >= 0, f"mat.beta must be 0 or more, got {self.beta}")
        check(self.start >= 0, f"mat.start must be 0 or more, got {self.start}")
        check_positive(self, "every", "probes", "chunk")
        check(
            self.probes % self.chunk == 0,
            f"mat.chunk must divide mat.probes ({self.probes}), got {self.chunk}",
        )
