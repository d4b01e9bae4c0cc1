"""Joining the processes of a multi-host run before the first device is touched."""

import os

from lm.config import ConfigError


def initialize() -> bool:
    """Join a multi-process run if the environment describes one; returns whether it does.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID describe it anywhere.

    Raises:
      ConfigError: only some of the variables are set, or one is not a number.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    values = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not values:
        return False
    missing = [name for name in names if name not in values]
    if missing:
        raise ConfigError(
            f"{', '.join(values)} set but not {', '.join(missing)}: set all three or none"
        )
    try:
        count, index = int(values[names[1]]), int(values[names[2]])
    except ValueError:
        raise ConfigError(
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers, got {values[names[1]]!r} and "
            f"{values[names[2]]!r}"
        ) from None
    if not 0 <= index < count:
        raise ConfigError(f"JAX_PROCESS_ID {index} is not in [0, JAX_NUM_PROCESSES = {count})")
    import jax

    jax.distributed.initialize(values[names[0]], count, index)
    return True


def several() -> bool:
    """Whether this process has joined others."""
    import jax

    return jax.distributed.is_initialized()
