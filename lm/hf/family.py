"""What a family of models is: a table of config keys and a table of tensors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.hf.keys import Rule

__all__ = ["UNIMPORTANT", "Family", "Tensor"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter of ours and the checkpoint's tensor (or tensors) that hold it.

    Parameters under "layers" are stacked; "{layer}" in the name counts them, and "{expert}" what
    lies along a second leading axis. The same goes for those of "dense_layers"
    (`ModelConfig.stacks`), whose tensors have the same names.
    """

    param: str
    """Path in our parameters, such as "layers/attention/query/kernel"."""
    name: str
    """Name in the checkpoint."""
    transpose: bool = False
    """Whether the checkpoint holds the matrix as [out, in]; ours are [in, out]."""
    part: tuple[int, int] | None = None
    """(i, n): the tensor's last dimension holds n parameters side by side and this is the i-th."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers, described in both directions."""

    model_type: str
    architecture: str
    """The class with a language-model head."""
    rules: tuple[Rule, ...]
    tensors: tuple[Tensor, ...]
    """All parameters that models of this family may have."""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `ModelConfig` that all models of the family share."""
    prefix: str = "model."
    """Front of the names of all but the head; some checkpoints of the bare model lack it."""
    buffers: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Regular expressions of tensors that checkpoints may hold and that are no parameters."""
    code: tuple[str, ...] = ()
    """Classes that `auto_map` may name: code that came with the first checkpoints, and is a part of
    transformers now."""
    more_layers: bool = False
    """Checkpoints may hold layers beyond the last (heads that predict further tokens), which
    transformers leaves out too."""


UNIMPORTANT = frozenset(
    {
        # what the file is about
        *("n_ctx", "reorder_and_upcast_attn"),  # GPT-2: the first repeats n_positions
        *("_name_or_path", "architectures", "model_type", "transformers_version", "auto_class"),
        *("dtype", "torch_dtype", "task_specific_params", "license", "finetuning_task"),
        *("is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
        # ids, which the tokenizer and the caller decide about
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        # initialization and dropout: training from scratch only
        *("initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout"),
        *("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "residual_dropout"),
        *("router_jitter_noise", "output_router_logits"),
        # how transformers runs the model
        *("use_cache", "cache_implementation", "pretraining_tp", "return_dict", "torchscript"),
        *("output_attentions", "output_hidden_states", "use_bfloat16", "use_flash_attn"),
        *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
        *("chunk_size_feed_forward", "gradient_checkpointing", "tie_last_hidden_states"),
        # other heads
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type"),
        "classifier_dropout",
        *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        *("summary_first_dropout",),
        # defaults of generate() that older files hold
        *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams"),
        *("repetition_penalty", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    }
)
"""Keys that do not change what the model computes from tokens."""
