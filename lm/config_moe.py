"""What an expert layer is: `--model.moe.*`, read where `model.mlp` is "moe" (`lm.layers.moe`)."""

import dataclasses
import math
from typing import Literal

from lm.checks import check, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts of a layer and how tokens are routed to them (`moe.route`)."""

    kind: Literal["token", "head_wise", "multi_head"] = "token"
    """What is routed. token: whole tokens. head_wise: slices of a token, each among `experts` of
    its own (arXiv 2602.12587). multi_head: parts of a projected token, among experts that they
    share (arXiv 2404.15045). The last two take softmax scores as they are, and one device."""
    heads: int = 4
    """Slices or parts of a token, with head_wise and multi_head."""
    experts: int = 8
    """Routed experts of a layer."""
    top_k: int = 2
    """Routed experts that a token visits."""
    d_expert: int | None = None
    """Hidden width of one expert; None is model.d_ff."""
    shared: int = 0
    """Experts that every token visits besides."""
    d_shared: int | None = None
    """Hidden width of one shared expert; None is that of the others."""
    shared_gate: bool = False
    """What the shared experts add is multiplied by sigmoid(x w), w being learned (Qwen2-MoE)."""
    dense_layers: tuple[int, ...] = ()
    """Layers, from 0, that have an ordinary MLP of width model.d_ff instead of experts (DeepSeek:
    the first ones)."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """MLP that an expert is."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How router outputs become scores; sigmoid is DeepSeek-V3's."""
    order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    """topk_softmax: softmax over the chosen experts alone (Mixtral)."""
    normalize: bool = True
    """Divide a token's weights by their sum."""
    groups: int = 1
    """Experts in so many groups, of which a token may use groups_kept (DeepSeek-V3)."""
    groups_kept: int = 1
    scale: float = 1.0
    """Factor of all weights (DeepSeek-V3: 2.5)."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss (Switch: 0.01; DeepSeek-V3: 1e-4)."""
    balance_per_sequence: bool = False
    """Balance each sequence by itself instead of the batch."""
    z_weight: float = 0.001
    """Weight of the router z-loss."""
    bias_rate: float = 0.0
    """Step of the selection bias that balances without a loss (DeepSeek-V3: 0.001); 0 has none."""
    capacity_factor: float | None = None
    """An expert takes this times its fair share of tokens and drops the rest; None drops nothing.
    With several devices each counts over its own tokens."""
    sd_rank: int = 0
    """Common directions of the experts (SD-MoE, `moe.sd_moe`); 0: they have no common part."""
    implementation: str | None = None
    """Grouped products by name (`moe.grouped_matmul`); None picks for the device."""
    exchange: str | None = None
    """Exchange between devices by name (`moe.parallel`); None picks for the device."""

    def __post_init__(self):
        check_positive(self, "experts", "top_k", "groups", "groups_kept", "scale")
        for name in ("d_expert", "d_shared", "capacity_factor"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        for name in ("shared", "sd_rank", "balance_weight", "z_weight", "bias_rate"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"model.moe.{name} must be 0 or more, got {value}")
        for name, known in (
            ("activation", ("swiglu", "gelu")),
            ("scoring", ("softmax", "sigmoid")),
            ("order", ("softmax_topk", "topk_softmax")),
            ("implementation", (None, "reference", "xla", "tiled", "tokamax")),
            ("exchange", (None, "all_to_all", "ragged_all_to_all")),
        ):
            value = getattr(self, name)
            names = ", ".join(n for n in known if n)
            check(value in known, f"model.moe.{name} must be one of {names}, got {value!r}")
        self._check_kind()
        for name in ("d_shared", "shared_gate"):
            check(
                self.shared > 0 or not getattr(self, name),
                f"model.moe.{name} is given but there are no shared experts: set model.moe.shared",
            )
        object.__setattr__(self, "dense_layers", tuple(sorted(self.dense_layers)))
        check(
            len(set(self.dense_layers)) == len(self.dense_layers)
            and all(type(layer) is int and layer >= 0 for layer in self.dense_layers),
            f"model.moe.dense_layers must name layers, from 0, once each, got {self.dense_layers}",
        )
        check(
            self.order == "softmax_topk" or self.scoring == "softmax",
            "model.moe.order topk_softmax is a softmax: set model.moe.scoring to softmax",
        )
        check(
            self.experts % self.groups == 0 and self.groups_kept <= self.groups,
            f"model.moe: {self.experts} experts in {self.groups} groups of which "
            f"{self.groups_kept} are kept: groups must divide experts and groups_kept not exceed "
            "groups",
        )
        most = self.experts // self.groups * self.groups_kept
        check(
            self.top_k <= most,
            f"model.moe.top_k ({self.top_k}) exceeds the {most} experts to choose from",
        )

    def _check_kind(self):
        kinds = ("token", "head_wise", "multi_head")
        check(self.kind in kinds, f"model.moe.kind must be one of {kinds}, got {self.kind!r}")
        check_positive(self, "heads")
        unread = ("heads",) if self.kind == "token" else ()
        unread += ("capacity_factor",) if self.kind == "head_wise" else ()
        if self.kind != "token":
            unread += ("shared", "scoring", "order", "normalize", "groups", "groups_kept", "scale")
            unread += ("d_shared", "shared_gate")
            unread += ("bias_rate", "sd_rank", "exchange", "balance_per_sequence", "z_weight")
        for field in dataclasses.fields(self):
            check(
                field.name not in unread or getattr(self, field.name) == field.default,
                f"model.moe.{field.name} is not read with model.moe.kind {self.kind}: leave it out",
            )
