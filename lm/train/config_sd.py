"""How decomposed experts are trained: `--sd.*`, read by `lm.train.optimizer`."""

import dataclasses
from typing import Any, Literal

from lm.config import check, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDConfig:
    """SD-MoE's side of the optimizer (`moe.sd_moe`)."""

    refresh_every: int = 16
    """Steps between refreshes of the bases (the paper's 16); 0 keeps the first ones."""
    refresh_sweeps: int = 2
    """Sweeps of subspace iteration at a refresh."""
    on_refresh: Literal["drop", "move_mean", "keep"] = "move_mean"
    """What becomes of the part of an expert's own matrix that a refresh finds in the common
    directions: lost, its mean moved to the common matrix, or kept."""
    project_gradient: bool = True
    """Decompose gradients before the optimizer sees them."""
    project_update: bool = True
    """Project the updates of the experts' own matrices behind it."""
    common_gradient: Literal["sum", "mean"] = "sum"
    """Gradient of the common matrix: sum or mean over the experts."""

    def __post_init__(self):
        every = self.refresh_every
        check(every >= 0, f"sd.refresh_every must be 0 or more, got {every}")
        check_positive(self, "refresh_sweeps")
        for name, known in (
            ("on_refresh", ("drop", "move_mean", "keep")),
            ("common_gradient", ("sum", "mean")),
        ):
            value = getattr(self, name)
            check(value in known, f"sd.{name} must be one of {', '.join(known)}, got {value!r}")


def check_sd(config: Any) -> None:
    """Raise `ConfigError` where a `RunConfig` asks for decomposed experts that it cannot have."""
    experts, name = config.model.mlp == "moe", config.optim.name
    rank = config.model.moe.sd_rank if experts else 0
    for field in dataclasses.fields(SDConfig) if not rank else ():
        check(
            getattr(config.sd, field.name) == field.default,
            f"sd.{field.name} is given but experts have no common directions: set model.mlp to moe "
            "and model.moe.sd_rank to their number",
        )
    side = min(config.model.d_model, config.model.d_expert)
    check(
        rank < side,
        f"model.moe.sd_rank {rank} must be below both sides of an expert, of which the smaller has "
        f"{side}",
    )
    check(
        not rank or name not in ("mat", "adatask"),
        f"model.moe.sd_rank does not go with optim.name {name}: take another optimizer",
    )
    check(
        not config.log.experts or experts,
        f"log.experts needs model.mlp moe, and it is {config.model.mlp!r}",
    )
