"""The run folder: who may write into it, and whether it can be continued."""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
import uuid
from pathlib import Path

from lm.config import ConfigError
from lm.files import atomic_write_json, atomic_write_text
from lm.train.checkpoint import differing_fields
from lm.train.checkpoint_processes import from_primary, on_primary
from lm.train.config import RunConfig
from lm.train.config_io import config_from_dict, config_to_dict

# Fields that change neither the maths nor the data order: a resumed run may set them anew.
FREE = (
    "recipe",
    "out",
    "resume",
    "steps",
    "micro_batches",
    "sample_prompt",
    "mesh",
    "log",
    "checkpoint",
    "eval",
    "profile",
    "flags",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "model.remat",
    "model.unroll",
    "model.attention",
    "model.loss",
)


class RunFolder:
    """One run's folder, locked against a second writer until `close` or `abandon`.

    Attributes:
      path: the folder.
      config: the configuration, with `out` filled in.
      resuming: whether the folder held this run already.
    """

    def __init__(self, config: RunConfig):
        """Claim the folder; nothing in it is changed before `write_config`.

        Raises:
          ConfigError: it holds a run and `config.resume` is off; it holds other things; it holds
            a run of another configuration (the differing fields are listed); another process is
            writing to it. A folder that was made for this run is gone again.
        """
        name = f"runs/{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        out = config.out or from_primary(lambda: name)
        self.config = dataclasses.replace(config, out=out)
        self.path = Path(out)
        self._lock = None
        self._made = False
        problem = from_primary(self._claim)
        self.resuming = from_primary(lambda: (self.path / "config.json").exists())
        problem = problem or from_primary(self._compare)
        if problem:
            self.abandon()
            raise ConfigError(problem)

    def _claim(self) -> str | None:
        lock = self.path / ".lock"
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            others = self._contents()
            if others and "config.json" not in others:
                return (
                    f"{self.path} is not empty and holds no run (it has {', '.join(others[:4])}): "
                    "choose another --out"
                )
            self._lock = open(lock, "w")  # noqa: SIM115
        except OSError as error:
            return f"cannot write to --out {self.path}: {error.strerror}; choose another folder"
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The file may have gone with an abandoned run, and a third process have a new one.
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(lock)):
                raise BlockingIOError
        except OSError:
            self._made = False
            return (
                f"another process is training in {self.path}; wait for it or choose another --out"
            )
        if not self.config.resume and "config.json" in self._contents():
            return (
                f"{self.path} already holds a run: add --resume to continue it, or choose "
                "another --out"
            )
        return None

    def _contents(self) -> list[str]:
        """What lies in the folder, without what a killed claim may have left."""
        names = (path.name for path in self.path.iterdir())
        return sorted(name for name in names if name != ".lock" and not name.endswith(".tmp"))

    def _compare(self) -> str | None:
        if not self.resuming:
            return None
        file = self.path / "config.json"
        try:
            saved = config_from_dict(json.loads(file.read_text()))
        except (ValueError, OSError) as error:
            return f"{file} cannot be read: {error}"
        differing = differing_fields(strict_fields(saved), strict_fields(self.config))
        if differing:
            return (
                f"{self.path} holds a run of another configuration; saved against asked for: "
                + "; ".join(differing)
                + ". Use the saved values or another --out"
            )
        return None

    def write_config(self) -> None:
        """Write config.json, which makes the folder a run's; CheckpointError if that fails."""
        file = self.path / "config.json"
        on_primary(lambda: atomic_write_json(file, config_to_dict(self.config)))

    def identity(self) -> str:
        """What tells this run from any other, also from an earlier one in the same folder."""
        file = self.path / "identity"

        def read() -> str:
            with contextlib.suppress(FileNotFoundError):
                return file.read_text().strip()
            name = uuid.uuid4().hex[:12]
            atomic_write_text(file, name + "\n")
            return name

        found = ""

        def remember() -> None:
            nonlocal found
            found = read()

        on_primary(remember)
        return from_primary(lambda: found)

    def abandon(self) -> None:
        """`close`, and remove a folder that was made for this run and holds nothing yet."""
        if self._made and self._lock is not None and not self._contents():
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink()
                self.path.rmdir()
        self.close()

    def close(self) -> None:
        """Let another process write to the folder."""
        if self._lock is not None:
            self._lock.close()


def strict_fields(config: RunConfig) -> dict:
    """The configuration without the fields that a resumed run may change."""
    values = config_to_dict(config)
    for name in FREE:
        *parents, last = name.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node.pop(last)
    return values


def load_run_config(path: Path) -> RunConfig:
    """The configuration of the run in `path`; ConfigError if there is none that can be read."""
    file = path / "config.json"
    try:
        return config_from_dict(json.loads(file.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"{path} holds no run (there is no {file})") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
