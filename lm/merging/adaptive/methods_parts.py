"""Surgery and weight ensembles: from the session's inputs to their results."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.hf.merged import part_arrays
from lm.hf.tensors import by_path
from lm.merging.adaptive import surgery, wemoe
from lm.merging.adaptive.adamerging import apply_coefficients
from lm.merging.adaptive.data import Batch, Rows, batch_of, stacked
from lm.merging.adaptive.models import Models, Piece
from lm.merging.adaptive.objective import Monitor, task_entropies
from lm.merging.adaptive.output import Result
from lm.merging.adaptive.parts import Training, flatten, make_step, train
from lm.merging.adaptive.vectors import Vectors
from lm.merging.adaptive.work import Work

__all__ = ["make_surgery", "make_wemoe"]


def make_surgery(session: Any, models: Models, tasks: Sequence[Rows], work: Work) -> Result:
    """Corrections of every task, each trained by itself against its individual model."""
    config, options = session.config, session.config.parameters
    layers = config.merge_method == "surgery_v2"
    if layers:
        surgery.check_layers(models.config)
    first = 0 if config.base_model is None else 1
    if config.merged is not None:
        given = len(models.stores) - 1

        def piece(piece: Piece) -> np.ndarray:
            return models.read(given, piece)
    else:
        weights = np.asarray([task.parameters["weight"] for task in config.models])
        vectors = Vectors(models)

        def piece(piece: Piece) -> np.ndarray:
            return apply_coefficients(*vectors(piece), weights)

    merged = models.place(models.build(piece))
    corrections = {}

    def loss(correction, inputs):
        batch, merged, individual = inputs
        return surgery.surgery_loss(models.config, merged, individual, correction, batch)

    step = make_step(loss)
    how = Training(options["steps"], lambda _: options["learning_rate"])
    for number, rows in enumerate(tasks):
        # The models are arguments of the program, not constants in it.
        frozen = (merged, models.params(first + number))

        def batch(step: int, number=number, rows=rows, frozen=frozen) -> Any:
            return _batch(options, rows, step, session.seed, number), *frozen

        start = surgery.init_surgery(models.config, options["rank"], layers, session.seed + number)
        name = f"surgery-{number}"
        found = train(name, how, start, step, batch, work, session.say)
        corrections |= {f"{rows.name}/{key}": value for key, value in flatten(found).items()}
        del frozen, batch
    settings = {"kind": "surgery", "tasks": [rows.name for rows in tasks]}
    return Result(piece, parts={"surgery": corrections}, settings=settings)


def make_wemoe(session: Any, models: Models, tasks: Sequence[Rows], work: Work) -> Result:
    """Dense parameters, task vectors of the MLPs, and a router trained by entropy."""
    config, options = session.config, session.config.parameters
    wemoe.check_mlp(models.config)
    weights = [task.parameters["weight"] for task in config.models]
    pruned = config.merge_method == "e_wemoe"
    deltas_of = Vectors(models)
    cuts = _cuts(models, deltas_of, options["density"]) if pruned else {}

    def piece(piece: Piece) -> np.ndarray:
        base, deltas = deltas_of(piece)
        if piece.name in cuts:
            deltas = [_prune(d, cut) for d, cut in zip(deltas, cuts[piece.name], strict=True)]
        return apply_coefficients(base, deltas, np.asarray(weights))

    names = [rows.name for rows in tasks]
    depth = options["router_depth"]
    ensemble = wemoe.routed(models.config, names, weights, depth=depth, shared=pruned)
    params, vectors = models.place(models.build(piece)), _mlp_vectors(models, cuts)
    answers = [rows.answers for rows in tasks]

    def batch(step: int) -> Any:
        batches = [_batch(options, rows, step, session.seed, k) for k, rows in enumerate(tasks)]
        return stacked(batches, options["positions"]), params, vectors

    def loss(router, inputs):
        batch, params, vectors = inputs
        now = wemoe.attach(ensemble, params, router, vectors)
        sums = task_entropies(ensemble, now, batch, answers, options["average_logits"])
        return sum(each.loss(options["diversity"]) for each in sums), sums

    steps = options["steps"]
    how = Training(
        steps,
        lambda step: options["learning_rate"] * (1 + math.cos(math.pi * step / steps)) / 2,
        monitor=Monitor(options["collapse"], names),
        stop=options["stop_on_collapse"],
    )
    start = wemoe.init_router(ensemble, session.seed)
    router = train("router", how, start, make_step(loss), batch, work, session.say)
    arrays = part_arrays(ensemble, by_path(wemoe.attach(ensemble, params, router, vectors)))
    settings = {"kind": "wemoe", "tasks": names}
    return Result(piece, parts={"wemoe": arrays}, settings=settings)


def _batch(options: dict[str, Any], rows: Rows, step: int, seed: int, number: int) -> Batch:
    positions = options.get("positions", 1)
    size = options["batch_size"]
    return batch_of(rows, step, size=size, positions=positions, seed=seed, stream=number)


def _mlp_names(models: Models) -> list[str]:
    return [name for name, at in models.places.items() if at[0].leaf.path[:2] == ("layers", "mlp")]


def _cuts(models: Models, vectors: Vectors, density: float) -> dict[str, list[float]]:
    """For every tensor of the MLPs and every model the magnitude that stays are above."""
    found = {}
    for name in _mlp_names(models):
        pieces = [vectors(piece)[1] for piece in models.cuts[name]]
        whole = [np.abs(np.concatenate([part[k] for part in pieces])) for k in range(vectors.count)]
        found[name] = [float(np.quantile(each, 1 - density)) for each in whole]
    return found


def _prune(delta: np.ndarray, cut: float) -> np.ndarray:
    return delta * (np.abs(delta) > np.float32(cut))


def _mlp_vectors(models: Models, cuts: dict[str, list[float]]) -> dict[str, Any]:
    """tau [L, K, ...] of the MLPs' parameters, in the models' dtype."""
    vectors = Vectors(models)
    config, count = models.config, vectors.count
    leaves = [leaf for leaf in models.leaves if leaf.path[:2] == ("layers", "mlp")]
    tree = {
        leaf.path: np.empty((leaf.shape[0], count, *leaf.shape[1:]), config.dtype)
        for leaf in leaves
    }
    for name in _mlp_names(models):
        for piece in models.cuts[name]:
            deltas = vectors(piece)[1]
            for k, delta in enumerate(deltas):
                if name in cuts:
                    delta = _prune(delta, cuts[name][k])
                view = {path: array[:, k] for path, array in tree.items()}
                models.put(view, piece, delta)
    found: dict[str, Any] = {}
    for path, array in tree.items():
        where = models.sharding and models.sharding[path]
        if where:  # as the dense parameter, with the axis of the tasks behind that of the layers
            spec = where.spec
            where = NamedSharding(where.mesh, PartitionSpec(*spec[:1], None, *spec[1:]))
        found.setdefault(path[2], {})[path[3]] = jax.device_put(array, where)
    return found
