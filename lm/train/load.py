"""A trained model from a run folder or one of its checkpoints, without the optimizer."""

from pathlib import Path
from typing import NamedTuple

import jax

from lm import model
from lm.config import ConfigError
from lm.data import load_tokenizer
from lm.data.tokenizer import Tokenizer
from lm.train.checkpoint import Checkpoints
from lm.train.config import RunConfig
from lm.train.folder import load_run_config


class LoadedRun(NamedTuple):
    """What `load_run` found."""

    config: RunConfig
    params: model.Params
    step: int
    tokenizer: Tokenizer


def locate(path: str | Path) -> tuple[Path, int | None]:
    """(run folder, step) of RUN, RUN/checkpoints or RUN/checkpoints/STEP; step None: the newest."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path} does not exist: give a run folder or one of its checkpoints")
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None


def load_run(path: str | Path, step: int | None = None) -> LoadedRun:
    """Configuration and parameters, on the first device.

    Args:
      path: run folder, its `checkpoints` folder, or one checkpoint in it.
      step: checkpoint to take; None is the one that `path` names, or the newest good one.

    Raises:
      ConfigError: no run there, or its tokenizer is not the one that it was trained with.
      CheckpointError: no good checkpoint.
    """
    folder, named = locate(path)
    config = load_run_config(folder)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {"params": model.abstract_params(config.model)},
    )
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        wanted = step if step is not None else named
        found, state, meta = checkpoints.restore(abstract, wanted, subset=True)
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise ConfigError(
            f"{config.data.tokenizer} is not the tokenizer that {folder} was trained with (it has "
            "changed since): bring the old file back"
        )
    return LoadedRun(config, state["params"], found, tokenizer)
