"""Hugging Face checkpoints in and out.

>>> import lm.hf
>>> config, params = lm.hf.load("Qwen3-0.6B")  # doctest: +SKIP
>>> lm.hf.save("out", config, params, tokenizer="Qwen3-0.6B")  # doctest: +SKIP
"""

from lm.hf.families import FAMILIES
from lm.hf.merged import load, load_config, load_params
from lm.hf.peft import adapter_config, adapter_params, load_adapter, save_adapter
from lm.hf.reader import is_hf
from lm.hf.writer import save

__all__ = [
    "FAMILIES",
    "adapter_config",
    "adapter_params",
    "is_hf",
    "load",
    "load_adapter",
    "load_config",
    "load_params",
    "save",
    "save_adapter",
]
