"""One merge that learns, from the configuration to the finished folder."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.merging.adaptive.config import AdaptiveConfig, load_adaptive
from lm.merging.adaptive.output import write_result
from lm.merging.adaptive.work import Work, check_free, folder_of
from lm.merging.manifest import MANIFEST
from lm.merging.progress import size
from lm.merging.store.files import read_json
from lm.merging.types import MergeError

__all__ = ["AdaptiveSession"]


class AdaptiveSession:
    """As `lm.merging.session.Session`, for methods that learn from text.

    Args:
      config: the YAML file, or what was read from one.
      out: the folder to be made.
      seed: of the order of text, of drawn labels and of fresh routers and corrections.
      shard_size: largest data of an output file, in bytes.
      jobs: threads that read and combine tensors.
      device: kind of devices that run the model; None: the first kind that JAX finds.
      say: takes the lines meant for the user.

    Raises:
      MergeError: the configuration or a model cannot work; nothing has been written.
    """

    def __init__(
        self,
        config: Path | AdaptiveConfig,
        out: Path,
        *,
        seed: int = 0,
        shard_size: int = 5 * 10**9,
        jobs: int = 2,
        device: str | None = None,
        say: Callable[[str], None] = print,
    ):
        self.config = config if isinstance(config, AdaptiveConfig) else load_adaptive(config)
        self.out, self.seed, self.jobs, self.say = out, seed, jobs, say
        self._shard_size = shard_size
        self._mesh = _mesh(device)

    def describe(self, resume: bool = False) -> str:
        """What would be done."""
        check_free(self.out, resume)
        config = self.config
        with tempfile.TemporaryDirectory() as folder:
            made = lambda name, make: _filled(Path(folder) / name, make)  # noqa: E731
            models, tasks = self._inputs(self._folders(made))
            lines = [f"method      {config.merge_method} {json.dumps(config.parameters)}"]
            for task, rows in zip(config.models, tasks, strict=True):
                answers = f", answers {', '.join(task.data.answers)}" if task.data.answers else ""
                lines.append(
                    f"task        {task.name}: {task.model}; {len(rows.tokens)} rows, "
                    f"{rows.lengths.sum()} tokens of {task.data.path}{answers}"
                    + (f" {json.dumps(task.parameters)}" if task.parameters else "")
                )
            count = sum(info.size for info in models.infos.values())
            lines += [
                f"output      {len(models.infos)} tensors, {count:,} parameters, "
                f"{config.dtype or models.dtype}",
                f"memory      {size(models.nbytes)} for a model, as much for a gradient",
            ]
        return "\n".join(lines)

    def run(self, resume: bool = False) -> None:
        """Learn and merge; OUT is complete afterwards.

        Raises:
          MergeError, OSError: one clear line; finished work stays for `resume`.
        """
        import jax

        from lm.merging.adaptive.methods import make_result
        from lm.train.loop import enable_compilation_cache

        if check_free(self.out, resume) == "complete":
            self._check_finished()
            return
        enable_compilation_cache()
        identity = self._identity()
        work = Work(self.out, identity, resume)
        try:
            folders = self._folders(work.made)
            with jax.set_mesh(self._mesh):
                models, tasks = self._inputs(folders)
                if work.continues:
                    self.say(f"continuing in {work.folder}")
                result = make_result(self, models, tasks, work)
                record = {"models": list(self.config.references()), **identity}
                work.publish(
                    lambda folder: write_result(
                        folder,
                        self.config,
                        models,
                        result,
                        record=record,
                        shard_size=self._shard_size,
                    )
                )
        finally:
            work.close()
        self.say(f"{self.config.merge_method}: {self.out} is complete")

    def _folders(self, made: Callable[[str, Callable[[Path], None]], Path]) -> list[str]:
        """The references, with runs of ours as folders that `made` keeps."""
        return [
            _as_folder(reference, f"run-{number}", made)
            for number, reference in enumerate(self.config.references())
        ]

    def _inputs(self, references: list[str]):
        """The models, and the tasks' text."""
        from lm.merging.adaptive.data import read_rows
        from lm.merging.adaptive.models import Models

        mesh = self._mesh if self._mesh.size > 1 else None
        models = Models(references, mesh)
        tokenizer, prefix = models.tokenizer()
        options = self.config.parameters
        length = options["sequence_length"]
        if length > models.config.max_context:
            raise MergeError(
                f"parameters.sequence_length is {length}, the models' context "
                f"{models.config.max_context}: give no more than that"
            )
        tasks = [
            read_rows(
                task,
                tokenizer,
                prefix,
                length=length,
                examples=options["examples"],
                vocab=models.config.vocab_size,
            )
            for task in self.config.models
        ]
        return models, tasks

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for task in self.config.models:
            digest.update(Path(task.data.path).expanduser().read_bytes())
        from lm.merging.store import open_store

        inputs = [open_store(reference).identity() for reference in self.config.references()]
        if self.config.coefficients:
            digest.update(Path(self.config.coefficients).expanduser().read_bytes())
        return {
            "configuration": hashlib.blake2b(
                repr(self.config).encode(), digest_size=16
            ).hexdigest(),
            "inputs": hashlib.blake2b("".join(inputs).encode(), digest_size=16).hexdigest(),
            "data": digest.hexdigest(),
            "seed": self.seed,
        }

    def _check_finished(self) -> None:
        before = read_json(self.out / MANIFEST)
        if any(before.get(name) != value for name, value in self._identity().items()):
            raise MergeError(
                f"{self.out} holds a finished merge of another configuration or other inputs: "
                "give another output folder"
            )
        shutil.rmtree(folder_of(self.out), ignore_errors=True)  # killed while clearing up
        self.say(f"{self.out} is already complete: nothing to do")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _mesh(device: str | None):
    import jax

    from lm.sharding import make_mesh

    try:
        devices = jax.devices("gpu" if device == "cuda" else device) if device else jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise MergeError(f"--device {device}: JAX finds none here ({reason})") from error
    return make_mesh({"fsdp": len(devices)}, devices)


def _filled(folder: Path, make: Callable[[Path], None]) -> Path:
    if not folder.exists():
        folder.mkdir()
        make(folder)
    return folder


def _as_folder(reference: str, name: str, made) -> str:
    """A run of ours as a Hugging Face folder; other references as they are."""
    path = Path(reference).expanduser()
    if not (path.is_dir() and _is_run(path)):
        return reference
    from lm import hf
    from lm.train.load import load_run

    def write(folder: Path) -> None:
        run = load_run(path)
        if run.config.model.adapter.kind != "none":
            raise MergeError(
                f"{reference} is a run with adapters: write it as a dense model first (convert.py)"
            )
        hf.save(folder, run.config.model, run.params, run.config.data.tokenizer)

    return str(made(name, write))


def _is_run(path: Path) -> bool:
    from lm import hf

    at = path.parent.parent if path.parent.name == "checkpoints" else path
    return not hf.is_hf(path) and (at / "config.json").is_file() and (at / "checkpoints").is_dir()
