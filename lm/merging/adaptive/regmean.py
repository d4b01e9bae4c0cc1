"""RegMean (Jin et al., arXiv 2212.09849) and RegMean++: linear layers by least squares.

For every matrix W [in, out] with inputs X_k [N, in] of task k

    G_k = X_k^T X_k / N,      G^_k = alpha G_k outside of the diagonal, G_k on it
    W = (sum_k G^_k + rho)^-1 (sum_k G^_k W_k + rho mean_k W_k),   rho = ridge * mean diagonal

by Cholesky factors in float64; all other parameters are averaged. (The ridge draws to the mean,
not to 0, so that equal Gram matrices give the mean exactly.) RegMean sees the inputs of each model
in its own layers. RegMean++ takes those behind the merged layers: layer by layer, the inputs of
layer l come from the merged layers before it.

The Gram matrices are taken where the model multiplies: a plug (`lm.layers.linear.Plug`) sees the
inputs of every product.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import model
from lm.config import ModelConfig
from lm.hf.tensors import by_path
from lm.layers.linear import Site
from lm.merging.adaptive.data import Batch, Rows, take
from lm.merging.adaptive.models import Models, Tree, host, nested
from lm.merging.adaptive.objective import unrolled
from lm.merging.adaptive.work import Work

__all__ = ["Solver", "grams", "regmean", "regmean_plus"]

SITES = {
    "layers.attention.query": ("query", "key", "value"),
    "layers.attention.out": ("out",),
    "layers.mlp.gate": ("gate", "up"),
    "layers.mlp.up": ("up",),
    "layers.mlp.down": ("down",),
}
"""Products whose inputs are taken, and the projections that share them."""
HEAD = "head"
Grams = dict[tuple[str, int], np.ndarray]
"""Gram matrices [in, in] by (site, layer)."""
Key = tuple[tuple[str, ...], int]
"""Path of a kernel, and its layer (-1: outside of layers)."""
Solved = dict[Key, np.ndarray]
_Say = Callable[[str], None]


def grams(
    config: ModelConfig, params: model.Params, rows: Rows, layers: Sequence[int], batch_size: int
) -> Grams:
    """G of the sites of some layers (and of the head as layer `num_layers`), summed in float32."""
    total: dict[tuple[str, int], Any] = {}
    for start in range(0, len(rows.tokens), batch_size):
        chosen = np.arange(start, min(len(rows.tokens), start + batch_size))
        # The last batch repeats rows that do not count: one compiled program.
        batch = take(rows, np.resize(chosen, batch_size), 1)
        batch.real[len(chosen) :] = 0
        found = _gram_sums(config, tuple(layers), params, batch)
        total = {key: total.get(key, 0) + np.asarray(value) for key, value in found.items()}
    count = float(rows.lengths.sum())
    return {key: value / count for key, value in total.items()}


@partial(jax.jit, static_argnames=("config", "layers"))
def _gram_sums(config: ModelConfig, layers, params, batch: Batch):
    calls: dict[str, int] = {}
    found: dict[tuple[str, int], jax.Array] = {}
    real = jnp.asarray(batch.real).reshape(-1, 1)

    def plug(site: Site):
        # Layers are not looped over, so the calls come in their order.
        layer = calls[site.name] = calls.get(site.name, -1) + 1
        shared = site.name == "layers.mlp.up" and "layers.mlp.gate" in calls
        if layer not in layers or shared or site.name not in SITES:
            return None

        def product(x, w, dims):
            masked = x.astype(jnp.float32) * real
            found[site.name, layer] = jnp.matmul(masked.T, masked, precision="highest")
            return jax.lax.dot_general(x, w, dims)

        return product

    flat = model.hidden(unrolled(config), params, jnp.asarray(batch.tokens), plug=plug)[0]
    if config.num_layers in layers and not config.tie_embeddings:
        flat = flat.reshape(-1, flat.shape[-1]).astype(jnp.float32) * real
        found[HEAD, config.num_layers] = jnp.matmul(flat.T, flat, precision="highest")
    return found


class Solver:
    """Collects what one matrix's merge needs, and solves it.

    Args:
      alpha: factor of the Gram matrices outside of the diagonal.
      ridge: relative to the mean of the sum's diagonal.
    """

    def __init__(self, alpha: float, ridge: float):
        self.alpha, self.ridge = alpha, ridge
        self.left: Any = 0.0
        self.right: Any = 0.0
        self.mean: Any = 0.0
        self.count = 0

    def add(self, gram: np.ndarray, weight: np.ndarray) -> None:
        """One model: its G [in, in] and W [in, out]."""
        scaled = self.alpha * np.asarray(gram, np.float64)
        np.fill_diagonal(scaled, np.diag(gram))
        weight = np.asarray(weight, np.float64)
        self.left, self.right = self.left + scaled, self.right + scaled @ weight
        self.mean, self.count = self.mean + weight, self.count + 1

    def solve(self) -> np.ndarray:
        """W, float32; the mean where no input was ever other than 0."""
        from scipy.linalg import cho_factor, cho_solve

        mean = self.mean / self.count
        size = float(np.mean(np.diag(self.left)))
        if size == 0:
            return mean.astype(np.float32)
        # Inputs that are nearly dependent: more ridge until the factor exists.
        for rho in self.ridge * size * 10.0 ** np.arange(7):
            left = self.left + rho * np.eye(len(self.left))
            try:
                factor = cho_factor(left, lower=True)
            except np.linalg.LinAlgError:
                continue
            return cho_solve(factor, self.right + rho * mean).astype(np.float32)
        raise ValueError("no ridge makes the Gram matrices positive: inputs hold NaN or infinity")


def regmean(
    models: Models, tasks: Sequence[Rows], options: dict[str, Any], work: Work, say: _Say
) -> Iterator[Solved]:
    """Merged matrices, some layers at a time.

    Every model is brought to the device once for each group of layers; a group's Gram matrices are
    about as large as a model.
    """
    layers = list(range(models.config.num_layers)) + _head(models)
    for number, group in enumerate(_groups(models, layers)):

        def make(group: list[int] = group) -> dict[str, np.ndarray]:
            solvers: dict[Key, Solver] = {}
            for number, rows in enumerate(tasks):
                whole = models.params(number)
                found = grams(models.config, whole, rows, group, options["batch_size"])
                tree = host(whole)
                _collect(solvers, found, lambda path, at, t=tree: t[path][at], options)
                say(f"{rows.name}: inputs of layers {group[0]} to {group[-1]}")
            return {_text(key): solver.solve() for key, solver in solvers.items()}

        yield _solved(work.arrays(f"layers-{number}", make))


def regmean_plus(
    models: Models,
    tasks: Sequence[Rows],
    options: dict[str, Any],
    merged: Tree,
    work: Work,
    say: _Say,
) -> Iterator[Solved]:
    """The same with the inputs of the merged layers before; `merged` starts as the average of all
    models and gets every layer as it is made."""
    for layer in list(range(models.config.num_layers)) + _head(models):

        def make(layer: int = layer) -> dict[str, np.ndarray]:
            solvers: dict[Key, Solver] = {}
            prefix = models.place({path: array.copy() for path, array in merged.items()})
            for number, rows in enumerate(tasks):
                own = models.layer(number, layer)
                trial = _replaced(prefix, own, layer)
                found = grams(models.config, trial, rows, [layer], options["batch_size"])
                _collect(solvers, found, lambda path, at, t=own: t[path], options)
            say(f"layer {layer} merged")
            return {_text(key): solver.solve() for key, solver in solvers.items()}

        result = _solved(work.arrays(f"layer-{layer}", make))
        for (path, index), value in result.items():
            merged[path][index if index >= 0 else ...] = value
        yield result


def _head(models: Models) -> list[int]:
    return [] if models.config.tie_embeddings else [models.config.num_layers]


def _groups(models: Models, layers: list[int]) -> list[list[int]]:
    c = models.config
    widths = [c.d_model, c.num_heads * c.head_dim, c.d_model, c.d_ff]
    each = 4 * sum(width * width for width in widths)
    step = max(1, models.nbytes // each)
    return [layers[start : start + step] for start in range(0, len(layers), step)]


def _paths(site: str) -> list[tuple[str, ...]]:
    if site == HEAD:
        return [("head", "kernel")]
    part = site.split(".")[1]
    return [("layers", part, name, "kernel") for name in SITES[site]]


def _collect(solvers: dict[Key, Solver], found: Grams, kernel_of, options: dict[str, Any]):
    """Add one model's Gram matrices, with `kernel_of(path, layer or ...)`."""
    for (site, layer), gram in found.items():
        for path in _paths(site):
            index = -1 if site == HEAD else layer
            try:
                kernel = kernel_of(path, ... if site == HEAD else layer)
            except KeyError:
                continue  # an MLP without a gate
            solver = solvers.setdefault((path, index), Solver(options["alpha"], options["ridge"]))
            solver.add(gram, kernel)


def _text(key: Key) -> str:
    return "/".join((*key[0], str(key[1])))


def _solved(arrays: dict[str, np.ndarray]) -> Solved:
    parts = {name: name.split("/") for name in arrays}
    return {(tuple(parts[n][:-1]), int(parts[n][-1])): array for n, array in arrays.items()}


def _replaced(prefix: model.Params, own: Tree, layer: int) -> model.Params:
    """The merged model with one layer of another."""
    tree = by_path(prefix)
    for path, value in own.items():
        if path[0] == "layers":
            tree[path] = tree[path].at[layer].set(jnp.asarray(value, tree[path].dtype))
    return nested(tree)
