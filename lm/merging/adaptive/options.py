"""The methods that learn, with the parameters of each, declared as those of the static methods."""

import dataclasses

from lm.merging.types import Parameter

__all__ = ["METHODS", "AdaptiveMethod"]


@dataclasses.dataclass(frozen=True)
class AdaptiveMethod:
    """What a method is called, what it asks for, and what to take where there is no text."""

    name: str
    per_model: tuple[Parameter, ...]
    params: tuple[Parameter, ...]
    base: bool
    """Whether it works on task vectors and needs a base_model."""
    fallback: str
    """Static methods to suggest where a model has no data."""
    models: int = 2
    """Fewest models."""


def _count(name: str, default: int, low: int = 1) -> Parameter:
    return Parameter(name, default, kind="integer", low=low)


def _switch(name: str, default: bool) -> Parameter:
    return Parameter(name, default, kind="bool")


WEIGHT = Parameter("weight", 0.3)
TEXT = (_count("examples", 256), _count("sequence_length", 128, 2))
"""Rows of text per task, and tokens of a row."""
RIDGE = Parameter("ridge", 1e-6, low=0.0)
CLOSED = (*TEXT, _count("batch_size", 8))
LEARNED = (
    _count("steps", 500, 0),
    *TEXT,
    _count("batch_size", 16),
    Parameter("learning_rate", 1e-3, low=0.0),
)
ENTROPY = (
    _count("positions", 8),
    _switch("average_logits", False),
    Parameter("diversity", 0.0, low=0.0),
    Parameter("collapse", 0.5, low=0.0, high=1.0),
    _switch("stop_on_collapse", False),
)
"""Predictions of a row that count, spread evenly to the last; `average_logits` takes the entropy of
the batch's mean logits; `diversity` times the entropy of a task's mean prediction is subtracted
from what is minimized (information maximization, as in SHOT, arXiv 2002.08546, equation 4, with
1); collapse is suspected below this share of the first marginal entropy."""
COEFFICIENTS = (_switch("layer_wise", True), _switch("clip", True), *LEARNED, *ENTROPY)
ROUTER = (Parameter("router_depth", 2, kind="integer", low=0, high=2),)
WEMOE = (*ROUTER, *LEARNED[:-1], Parameter("learning_rate", 1e-4, low=0.0), *ENTROPY)
DENSITY = Parameter("density", 0.2, low=0.0, high=1.0)
SURGERY = (_count("rank", 16), *LEARNED)

_VECTORS = "task_arithmetic or ties"
_ALL = (
    AdaptiveMethod(
        "fisher",
        (Parameter("weight", 1.0, low=0.0),),
        (
            *TEXT,
            _count("draws", 1),
            _switch("normalize", True),
            Parameter("floor", 1e-6, low=0.0),
        ),
        base=False,
        fallback="linear",
    ),
    AdaptiveMethod(
        "regmean",
        (),
        (*CLOSED, Parameter("alpha", 0.9, low=0.0, high=1.0), RIDGE),
        base=False,
        fallback="linear, or wudi, which needs no text",
    ),
    AdaptiveMethod(
        "regmean++",
        (),
        (*CLOSED, Parameter("alpha", 0.9, low=0.0, high=1.0), RIDGE),
        base=False,
        fallback="linear, or wudi, which needs no text",
    ),
    AdaptiveMethod("adamerging", (WEIGHT,), COEFFICIENTS, True, _VECTORS, 1),
    AdaptiveMethod("adamerging++", (WEIGHT,), (*COEFFICIENTS, DENSITY), True, "ties", 1),
    AdaptiveMethod("surgery", (WEIGHT,), SURGERY, True, _VECTORS, 1),
    AdaptiveMethod("surgery_v2", (WEIGHT,), SURGERY, True, _VECTORS, 1),
    AdaptiveMethod("wemoe", (WEIGHT,), WEMOE, True, _VECTORS),
    AdaptiveMethod(
        "e_wemoe",
        (WEIGHT,),
        (*WEMOE, dataclasses.replace(DENSITY, default=0.1)),
        True,
        _VECTORS,
    ),
)
METHODS: dict[str, AdaptiveMethod] = {method.name: method for method in _ALL}
