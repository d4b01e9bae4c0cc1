"""Multi-head latent attention: `--model.mla.*`, read where `model.attention_kind` is "mla"."""

import dataclasses

from lm.checks import check, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Widths of multi-head latent attention (`lm.layers.mla`; arXiv 2405.04434, section 2.1).

    The defaults are those of DeepSeek-V2 and V3; V2-Lite has no q_lora_rank.
    """

    q_lora_rank: int | None = None
    """Width of the latent that all queries are made of; None makes them of the input."""
    kv_lora_rank: int = 512
    """Width of the latent that all keys and values are made of, and that is cached."""
    qk_nope_head_dim: int = 128
    """Part of a query and key head that has no rotary embedding."""
    qk_rope_head_dim: int = 64
    """Part that has one; the key's is shared by all heads."""
    v_head_dim: int = 128
    """Width of a value head."""

    def __post_init__(self):
        check_positive(self, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.q_lora_rank is not None:
            check_positive(self, "q_lora_rank")
        check(
            self.qk_rope_head_dim % 2 == 0,
            "model.mla.qk_rope_head_dim must be even for the rotary embedding, got "
            f"{self.qk_rope_head_dim}",
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim
