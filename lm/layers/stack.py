"""The stacked layers of a decoder, run by loops: the program does not grow with depth.

Layers of one kind lie stacked along a leading axis (`ModelConfig.stacks`). They are run in the
order of the model: runs of layers that repeat a period (of attention windows, of dense and expert
layers) are one `jax.lax.scan` each.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.config import ModelConfig

REMAT_POLICIES = {
    "none": None,
    # Keep the products, recompute the cheap rest (norms, activations, softmax).
    "dots": jax.checkpoint_policies.save_only_these_names("linear", "attention", "grouped_matmul"),
    # Keep one activation per layer besides the layer's input.
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    # Keep only the input of each layer (of each period of an attention pattern).
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.tree_util.register_pytree_node_class
class Unstacked(tuple):
    """The members of a stack, each in an array of its own: in place of the stacked leaf.

    For decoding on CPUs, where a loop over stacked layers copies the weights of each (and its part
    of the cache, twice) before it multiplies with them.
    """

    def tree_flatten(self):
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, _, members):
        return cls(members)


def unstack(tree):
    """Every leaf [L, ...] as `Unstacked` leaves of shape [...]."""
    return jax.tree.map(lambda leaf: Unstacked(leaf[i] for i in range(len(leaf))), tree)


def _map(function, *trees):
    """jax.tree.map that takes an `Unstacked` for a leaf."""
    return jax.tree.map(function, *trees, is_leaf=lambda node: isinstance(node, Unstacked))


def _loose(tree) -> bool:
    found = []
    _map(lambda leaf: found.append(isinstance(leaf, Unstacked)), tree)
    return any(found)


class Run(NamedTuple):
    """Layers start .. start + period * repeats - 1, of which every `period` are alike."""

    start: int
    period: int
    repeats: int


def plan(kinds: tuple[Any, ...], looped: bool = True) -> list[Run]:
    """Layers of these kinds as runs: each the longest repetition that begins where it does.

    Not `looped`, every layer is a run of its own.

    >>> plan(("dense", "moe", "moe", "moe"))
    [Run(start=0, period=1, repeats=1), Run(start=1, period=1, repeats=3)]
    """
    runs, start = [], 0
    while start < len(kinds):
        rest, best = kinds[start:], Run(start, 1, 1)
        for period in range(1, len(rest) // 2 + 1 if looped else 1):
            repeats = 1
            while rest[repeats * period :][:period] == rest[:period]:
                repeats += 1
            if repeats > 1 and period * repeats > best.period * best.repeats:
                best = Run(start, period, repeats)
        runs.append(best)
        start += best.period * best.repeats
    return runs


def run_layers(
    blocks: dict[str, nnx.Module],
    x,
    rotation,
    config: ModelConfig,
    plug,
    per_layer,
    routing=None,
):
    """Run all layers on x [B, T, D].

    Without a loop (`config.unroll`) nothing the backward pass needs is copied into and out of
    stacked buffers.

    Args:
      blocks: the stacks, by their names in `config.stacks`; leaves may be `Unstacked`, and those of
        the cache too, if it is given: then there is no loop, and the new cache is `Unstacked`.
      per_layer: what each layer gets of its own besides parameters, stacked over all layers:
        (cache or None, active or None).
      routing: a `lm.layers.merged.Routing`, which all layers get; None where no weights are routed.

    Returns:
      x; the auxiliaries of "layers", stacked; the cache.
    """
    split = {name: nnx.split(block) for name, block in blocks.items()}
    stack_of = {i: name for name, layers in config.stacks.items() for i in layers}
    windows = config.windows
    kinds = tuple((stack_of[i], windows[i % len(windows)]) for i in range(config.num_layers))

    def one(x, state, shared, kind):
        name, window = kind
        layer, (cache, active) = shared
        block = nnx.merge(split[name][0], state)
        return block(x, rotation, window, plug, layer, cache, active, routing)

    def body(x, scanned, kinds, counts):
        states, shared = scanned
        taken = dict.fromkeys(states, 0)
        auxiliaries, caches = [], []
        for i, kind in enumerate(kinds):
            state = _member(states[kind[0]], taken[kind[0]], counts[kind[0]])
            taken[kind[0]] += 1
            x, auxiliary, cache = one(x, state, _member(shared, i, len(kinds)), kind)
            if kind[0] == "layers":
                auxiliaries.append(auxiliary)
            caches.append(cache)
        return x, (_stacked(auxiliaries), _stacked(caches))

    remat = functools.partial(jax.checkpoint, policy=REMAT_POLICIES[config.remat])
    used = dict.fromkeys(blocks, 0)
    auxiliaries, caches = [], []
    loose = _loose((split, per_layer))
    for run in plan(kinds, config.num_layers > config.unroll and not loose):
        period = kinds[run.start : run.start + run.period]
        counts = {name: sum(kind[0] == name for kind in period) for name in blocks}
        states = {}
        for name, count in counts.items():
            if count:
                part = slice(used[name], used[name] + count * run.repeats)
                states[name] = _fold(split[name][1], part, count)
                used[name] = part.stop
        part = slice(run.start, run.start + run.period * run.repeats)
        shared = _fold((jnp.arange(config.num_layers), per_layer), part, run.period)
        step = functools.partial(body, kinds=period, counts=counts)
        if run.repeats == 1:
            step = step if config.remat == "none" else remat(step)
            x, (auxiliary, cache) = step(x, _map(lambda leaf: leaf[0], (states, shared)))
            auxiliary = jax.tree.map(lambda leaf: leaf[None], auxiliary)
            cache = cache if loose else jax.tree.map(lambda leaf: leaf[None], cache)
        else:
            step = step if config.remat == "none" else remat(step, prevent_cse=False)
            x, (auxiliary, cache) = jax.lax.scan(step, x, (states, shared))
            auxiliary = _unfold(auxiliary, counts["layers"])
            cache = _unfold(cache, run.period)
        auxiliaries += [auxiliary] if counts["layers"] else []
        caches.append(cache)
    concatenate = functools.partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))
    if loose:
        caches = [jax.tree.map(lambda *leaves: Unstacked(leaves), *caches)]
    return x, concatenate(*auxiliaries), caches[0] if loose else concatenate(*caches)


def _fold(tree, part: slice, count: int):
    """Members `part` of stacks, by `count` together; a single one gets no axis of its own."""

    def fold(leaf):
        if isinstance(leaf, Unstacked):
            return Unstacked(leaf[part])
        leaf = leaf[part]
        return leaf if count == 1 else leaf.reshape(-1, count, *leaf.shape[1:])

    return _map(fold, tree)


def _member(tree, i: int, count: int):
    return tree if count == 1 else jax.tree.map(lambda leaf: leaf[i], tree)


def _stacked(trees: list):
    if len(trees) < 2:
        return trees[0] if trees else None
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _unfold(tree, count: int):
    if count < 2:
        return tree
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
