"""Merging that learns from unlabelled text: closed forms, coefficients, corrections, routers.

The configurations are those of the static methods with `data:` beside every model; `options` lists
the methods, docs/adaptive_merging.md is the guide. JAX is imported by the parts that run models,
not here: `scripts/merge.py` asks this package whether a configuration is for it.
"""

from lm.merging.adaptive.config import AdaptiveConfig, adaptive_method, load_adaptive
from lm.merging.adaptive.options import METHODS

__all__ = ["METHODS", "AdaptiveConfig", "adaptive_method", "load_adaptive"]
