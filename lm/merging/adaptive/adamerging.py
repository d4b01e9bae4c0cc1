"""AdaMerging (Yang et al., arXiv 2310.02575): coefficients by entropy minimization, streamed.

    theta^l = theta_0^l + sum_k lambda_k^l tau_k^l,      0 <= lambda <= 1 if `clip`
    min over lambda of sum_k mean_x H(p(. | x; theta)),  x: unlabelled text of task k

task-wise (one lambda_k) or layer-wise (one for every tensor of the checkpoint). With the gradient
G^l of the loss in the merged weights,

    d loss / d lambda_k^l = <G^l, tau_k^l>

so that the device holds one model and one gradient, and the task vectors pass by from the disk: a
tensor's inner products are formed, its coefficients take their Adam step, and its merged values are
made anew, in one go. (Task-wise steps need all inner products first, and two passes.)
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lm import model
from lm.host import release_memory
from lm.merging.adaptive.data import Rows, batch_of, stacked
from lm.merging.adaptive.gradient import Gradient, entropy_gradient
from lm.merging.adaptive.models import Models, Piece, Tree
from lm.merging.adaptive.objective import Monitor
from lm.merging.adaptive.vectors import Vectors

__all__ = ["Coefficients", "Learner", "apply_coefficients"]

_KEPT = 1 << 24
"""Elements of a tensor of all models that are kept between its inner products and its merge."""
_LARGE = 1 << 28
"""Bytes of a model from which on activations are computed again for the gradient."""
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


class Coefficients(NamedTuple):
    """lambda, with the state of Adam."""

    names: list[str]
    """Tensors; [""] where all share one."""
    values: np.ndarray
    """float64 [tensors, K], before clipping."""
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def start(names: Sequence[str], weights: Sequence[float]) -> "Coefficients":
        """All tensors with the same weights."""
        values = np.tile(np.asarray(weights, np.float64), (len(names), 1))
        return Coefficients(list(names), values, np.zeros_like(values), np.zeros_like(values))

    def row(self, name: str) -> int:
        """Where a tensor's are."""
        return 0 if self.names == [""] else self.names.index(name)

    def of(self, name: str, clip: bool) -> np.ndarray:
        """A tensor's, as they are used."""
        values = self.values[self.row(name)]
        return np.clip(values, 0, 1) if clip else values

    def update(self, row: int, gradient: np.ndarray, step: int, rate: float, clip: bool) -> None:
        """Adam on one row, in place; a coefficient outside of the clip has no gradient."""
        values = self.values[row]
        if clip:
            gradient = np.where((values >= 0) & (values <= 1), gradient, 0.0)
        self.first[row] = BETA1 * self.first[row] + (1 - BETA1) * gradient
        self.second[row] = BETA2 * self.second[row] + (1 - BETA2) * gradient**2
        first = self.first[row] / (1 - BETA1 ** (step + 1))
        second = self.second[row] / (1 - BETA2 ** (step + 1))
        self.values[row] = values - rate * first / (np.sqrt(second) + EPS)


def apply_coefficients(base: np.ndarray, deltas: list[np.ndarray], share: np.ndarray) -> np.ndarray:
    """theta_0 + sum_k lambda_k tau_k, with the sums in the order of task_arithmetic."""
    total = deltas[0] * np.float32(share[0])
    for delta, weight in zip(deltas[1:], share[1:], strict=True):
        total += delta * np.float32(weight)
    return total + base


class Learner:
    """The steps of AdaMerging.

    Args:
      models: base first.
      vectors: its task vectors.
      tasks: text of each task, in the order of the models.
      options: the method's parameters (`lm.merging.adaptive.options`).
      coefficients: where to begin; changed in place.
      seed: of the order of rows.
      jobs: threads that work on tensors.
    """

    def __init__(
        self,
        models: Models,
        vectors: Vectors,
        tasks: Sequence[Rows],
        options: dict[str, Any],
        coefficients: Coefficients,
        *,
        seed: int = 0,
        jobs: int = 2,
    ):
        self.models, self.vectors, self.tasks, self.options = models, vectors, tasks, options
        self.coefficients, self.seed, self.jobs = coefficients, seed, jobs
        self.monitor = Monitor(options["collapse"], [rows.name for rows in tasks])
        self._params: model.Params | None = None
        # Activations of all layers at once only where they are small beside the model.
        remat = "full" if models.nbytes > _LARGE else "none"
        self._config = dataclasses.replace(models.config, remat=remat)

    def step(self, step: int) -> tuple[list[float], list[str]]:
        """One step of all tasks; gives their entropies and warnings of the monitor."""
        if self._params is None:
            self._params = self.models.place(self._over_tensors(self._rebuild))
        release_memory()  # of the models that went by
        found, grads = self._gradient(step)
        self._params = None  # before the next model is built
        release_memory()  # of compiling
        new = self._stepped(grads, step)
        del grads
        self._params = self.models.place(new)
        return [e for e, _ in found], self.monitor.see([m for _, m in found])

    def _gradient(self, step: int) -> tuple[list[tuple[float, float]], Gradient]:
        """(entropy, marginal entropy) of every task, and the gradient of the sum of entropies."""
        size, positions = self.options["batch_size"], self.options["positions"]
        batches = [
            batch_of(rows, step, size=size, positions=positions, seed=self.seed, stream=number)
            for number, rows in enumerate(self.tasks)
        ]
        sums, grads = entropy_gradient(
            self._config,
            self._params,
            stacked(batches, positions),
            [rows.answers for rows in self.tasks],
            average_logits=self.options["average_logits"],
            diversity=self.options["diversity"],
        )
        found = [(float(each.entropy), float(each.marginal)) for each in sums]
        if not np.isfinite(found).all():
            raise FloatingPointError(f"the entropies of step {step} are not finite: {found}")
        return found, grads

    def _stepped(self, grads: Gradient, step: int) -> Tree:
        """The parameters after the coefficients' step."""
        rate, clip = self.options["learning_rate"], self.options["clip"]
        if self.options["layer_wise"]:
            return self._over_tensors(partial(self._layer_step, grads, step, rate, clip))
        parts = self._map(lambda name: self._inner(grads, self._pieces(name)))
        self.coefficients.update(0, np.sum(parts, axis=0), step, rate, clip)
        return self._over_tensors(self._rebuild)

    def _layer_step(self, grads, step, rate, clip, tree: Tree, name: str) -> None:
        pieces = list(self._pieces(name)) if self._small(name) else None
        gradient = self._inner(grads, pieces or self._pieces(name))
        self.coefficients.update(self.coefficients.row(name), gradient, step, rate, clip)
        self._rebuild(tree, name, pieces)

    def _small(self, name: str) -> bool:
        return self.models.infos[name].size * (self.vectors.count + 1) <= _KEPT

    def _pieces(self, name: str):
        for piece in self.models.cuts[name]:
            yield piece, self.vectors(piece)

    def _inner(self, grads: Gradient, pieces) -> np.ndarray:
        """<G, tau_k> of a tensor: float32 products, sums of pieces in float64."""
        total = np.zeros(self.vectors.count)
        for piece, (_, deltas) in pieces:
            flat = grads.flat(self.models, piece)
            total += [float(np.dot(flat, delta)) for delta in deltas]
        return total

    def _rebuild(self, tree: Tree, name: str, pieces=None) -> None:
        share = self.coefficients.of(name, self.options["clip"])
        for piece, (base, deltas) in pieces or self._pieces(name):
            self.models.put(tree, piece, apply_coefficients(base, deltas, share))

    def _over_tensors(self, work) -> Tree:
        tree = self.models.empty()
        self._map(partial(work, tree))
        return tree

    def _map(self, work) -> list[Any]:
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            return list(pool.map(work, self.models.infos))


def merged_piece(
    vectors: Vectors, coefficients: Coefficients, clip: bool, piece: Piece
) -> np.ndarray:
    """The merged values of a piece."""
    base, deltas = vectors(piece)
    return apply_coefficients(base, deltas, coefficients.of(piece.name, clip))
