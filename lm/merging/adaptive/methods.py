"""From a method's name to what it makes: the steps of each, with their checkpoints."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.hf.tensors import by_path
from lm.merging.adaptive import adamerging, fisher, regmean
from lm.merging.adaptive.config import AdaptiveConfig
from lm.merging.adaptive.data import Rows
from lm.merging.adaptive.methods_parts import make_surgery, make_wemoe
from lm.merging.adaptive.models import Models, Piece, joined
from lm.merging.adaptive.output import Result, replay
from lm.merging.adaptive.vectors import Vectors
from lm.merging.adaptive.work import Work
from lm.merging.store.files import read_json
from lm.merging.types import MergeError

__all__ = ["make_result"]


def make_result(session: Any, models: Models, tasks: Sequence[Rows], work: Work) -> Result:
    """Run the session's method.

    Args:
      session: an `AdaptiveSession`: its config, seed, jobs and `say`.
      models, tasks: its inputs.
      work: where progress is kept.
    """
    makers: dict[str, Callable[..., Result]] = {
        "fisher": _fisher,
        "regmean": _regmean,
        "regmean++": _regmean,
        "adamerging": _adamerging,
        "adamerging++": _adamerging,
        "surgery": make_surgery,
        "surgery_v2": make_surgery,
        "wemoe": make_wemoe,
        "e_wemoe": make_wemoe,
    }
    return makers[session.config.merge_method](session, models, tasks, work)


def _fisher(session: Any, models: Models, tasks: Sequence[Rows], work: Work) -> Result:
    config: AdaptiveConfig = session.config
    options, weights = config.parameters, [task.parameters["weight"] for task in config.models]
    found, scales = [], []
    for number, rows in enumerate(tasks):

        def make(number: int = number, rows: Rows = rows) -> dict[str, np.ndarray]:
            diagonal = fisher.fisher_diagonal(
                models.config,
                models.params(number),
                rows,
                draws=options["draws"],
                seed=session.seed,
            )
            return {"/".join(path): np.asarray(leaf) for path, leaf in by_path(diagonal).items()}

        stored = work.arrays(f"fisher-{number}", make)
        session.say(f"{rows.name}: Fisher diagonal from {len(rows.tokens)} rows")
        tree = {tuple(key.split("/")): value for key, value in stored.items()}
        norm = sum(float(np.sum(np.square(v, dtype=np.float64))) for v in tree.values()) ** 0.5
        scales.append(1 / norm if options["normalize"] and norm > 0 else 1.0)
        found.append(tree)

    def piece(piece: Piece) -> np.ndarray:
        values = [models.read(number, piece) for number in range(len(tasks))]
        shares = [
            models.flat(tree, piece) * np.float32(scale)
            for tree, scale in zip(found, scales, strict=True)
        ]
        return fisher.fisher_mean(values, shares, weights, options["floor"])

    return Result(piece)


def _regmean(session: Any, models: Models, tasks: Sequence[Rows], work: Work) -> Result:
    options = session.config.parameters
    solved: dict[tuple[Any, int], np.ndarray] = {}

    def average(piece: Piece) -> np.ndarray:
        total = models.read(0, piece)
        for number in range(1, len(tasks)):
            total += models.read(number, piece)
        return total / np.float32(len(tasks))

    if session.config.merge_method == "regmean":
        steps = regmean.regmean(models, tasks, options, work, session.say)
    else:
        steps = regmean.regmean_plus(
            models, tasks, options, models.build(average), work, session.say
        )
    for found in steps:
        solved |= found

    def piece(piece: Piece) -> np.ndarray:
        at = models.places[piece.name]
        keys = [(place.leaf.path, place.index[0] if place.index else -1) for place in at]
        if not all(key in solved for key in keys):
            return average(piece)
        kernels = dict(zip(map(id, at), (solved[key] for key in keys), strict=True))
        return joined(models.parts(piece, lambda place: kernels[id(place)]))

    return Result(piece)


def _adamerging(session: Any, models: Models, tasks: Sequence[Rows], work: Work) -> Result:
    config: AdaptiveConfig = session.config
    options = config.parameters
    vectors = Vectors(models, options.get("density"))
    names = list(models.infos) if options["layer_wise"] else [""]
    coefficients = _first_coefficients(config, names)
    learner = adamerging.Learner(
        models, vectors, tasks, options, coefficients, seed=session.seed, jobs=session.jobs
    )
    history = _learn(session, learner, work)
    clip = options["clip"]
    weights = {name: coefficients.of(name, clip) for name in models.infos}
    content = {
        "models": [task.model for task in config.models],
        "tasks": [task.name for task in config.models],
        "method": config.merge_method,
        "weights": {name: value.tolist() for name, value in weights.items()},
        "history": history,
    }
    files = {"coefficients.json": (json.dumps(content, indent=1) + "\n").encode()}
    if config.merge_method == "adamerging":
        files["task_arithmetic.yml"] = replay(config, models.infos, weights).encode()
    return Result(lambda piece: adamerging.merged_piece(vectors, coefficients, clip, piece), files)


def _first_coefficients(config: AdaptiveConfig, names: list[str]) -> adamerging.Coefficients:
    weights = [task.parameters["weight"] for task in config.models]
    start = adamerging.Coefficients.start(names, weights)
    if config.coefficients is None:
        return start
    content = read_json(Path(config.coefficients).expanduser())
    known = content.get("weights", {})
    want = [task.name for task in config.models]
    if content.get("tasks") != want or (names != [""] and set(known) != set(names)):
        raise MergeError(
            f"{config.coefficients} holds coefficients of the tasks {content.get('tasks')} for "
            f"{len(known)} tensors; this merge has {want} and {len(names)} tensors"
        )
    rows = list(known.values())
    if names == [""] and any(row != rows[0] for row in rows):
        raise MergeError(f"{config.coefficients} differs by tensor: set layer_wise: true")
    for number, name in enumerate(names):
        start.values[number] = rows[0] if name == "" else known[name]
    return start


def _learn(session: Any, learner: adamerging.Learner, work: Work) -> list[dict[str, Any]]:
    """All steps of AdaMerging; gives the entropies along the way."""
    options, coefficients, say = learner.options, learner.coefficients, session.say
    history: list[dict[str, Any]] = []
    start, steps = 0, options["steps"]
    if before := work.load("coefficients"):
        arrays, meta = before
        for name in ("values", "first", "second"):
            getattr(coefficients, name)[...] = arrays[name]
        learner.monitor.restore(meta["monitor"])
        start, history = meta["step"], meta["history"]
        say(f"continuing at step {start}")
    every = max(1, steps // 20)
    for step in range(start, steps):
        entropies, warnings = learner.step(step)
        for text in warnings:
            say(f"warning: {text}")
        if (step + 1) % every == 0 or step == 0:
            history.append({"step": step + 1, "entropy": entropies})
            mean = sum(entropies) / len(entropies)
            say(f"step {step + 1} of {steps}: mean entropy {mean:.4f} nats")
        stop = bool(warnings) and options["stop_on_collapse"]
        if stop:
            say(f"stopped at step {step + 1}: stop_on_collapse")
        if work.due() or stop:
            end = steps if stop else step + 1
            work.save(
                "coefficients",
                {name: getattr(coefficients, name) for name in ("values", "first", "second")},
                {"step": end, "history": history, "monitor": learner.monitor.state()},
            )
        if stop:
            break
    return history
