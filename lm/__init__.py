"""Language models: configuration, model, data, training, checkpoints, generation.

>>> import jax, lm
>>> config = lm.ModelConfig(vocab_size=320, num_layers=2, d_model=64, num_heads=4, d_ff=128)
>>> params = lm.init(config, jax.random.key(0))
>>> lm.apply(config, params, jax.numpy.zeros((1, 8), int)).shape
(1, 8, 320)
"""

import importlib

from lm.config import ConfigError, ModelConfig, RopeScaling

__all__ = ["ConfigError", "ModelConfig", "RopeScaling", "apply", "hidden", "init", "shardings"]

_MODEL = ("apply", "hidden", "init", "shardings")


def __getattr__(name: str):
    # JAX is loaded when a function of the model is first used: reading a configuration is instant.
    if name in _MODEL:
        return getattr(importlib.import_module("lm.model"), name)
    raise AttributeError(f"module 'lm' has no attribute {name!r}")
