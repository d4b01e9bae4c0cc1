"""What every configuration class checks its values with."""

import math
from typing import Any


class ConfigError(ValueError):
    """A configuration value that cannot work; the message names the value and the remedy."""


def check(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def check_positive(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless each named field of `config` is a number above zero."""
    for name in names:
        value = getattr(config, name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        check(
            good and math.isfinite(value) and value > 0,
            f"{type(config).__name__}.{name} must be above 0, got {value!r}",
        )
        whole = type(config).__dataclass_fields__[name].type in (int, int | None)
        check(
            isinstance(value, int) or not whole,
            f"{type(config).__name__}.{name} must be a whole number, got {value!r}",
        )
