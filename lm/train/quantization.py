"""From `QuantConfig` to the plug that chooses each linear layer's product.

A new recipe is one row in `RECIPES`: a function of the configuration that returns a
`lm.layers.linear.Plug`, or None for the plain product in model.dtype.
"""

import difflib
from collections.abc import Callable

from lm.config import ConfigError
from lm.layers.linear import Plug
from lm.train.config import QuantConfig

RECIPES: dict[str, Callable[[QuantConfig], Plug | None]] = {"none": lambda config: None}


def make_plug(config: QuantConfig) -> Plug | None:
    """The plug of a recipe; an unknown name is a ConfigError that lists the known ones."""
    if config.recipe not in RECIPES:
        near = difflib.get_close_matches(config.recipe, RECIPES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"quant.recipe must be one of {', '.join(RECIPES)}, got {config.recipe!r}{hint}"
        )
    return RECIPES[config.recipe](config)
