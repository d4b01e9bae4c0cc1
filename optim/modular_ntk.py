"""Neural tangent kernels of the modules of a model, and their principal eigenvalues."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Modules:
    """Which modules one parameter leaf belongs to.

    A module may be a whole leaf or a slice of one: layer l of a stacked leaf, head h of a
    projection. Nothing is cut out; the leaf is reshaped where it is used.

    Attributes:
      kind: the family of like modules that compete with each other, such as "mlp".
      axes: (axis, blocks) pairs in the order of the module's index. The axis is cut into that many
        equal blocks, one for each value of the index; () is a single module. Every leaf of a kind
        has the same blocks, so a kind's modules form an array of shape `(blocks, ...)`.

    Examples:
      A stack of L layers whose query projections [L, D, H * K] hold H heads each:

      >>> Modules("heads", ((0, 12), (2, 8))).shape
      (12, 8)
    """

    kind: str
    axes: tuple[tuple[int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(blocks for _, blocks in self.axes)


def label_modules(label: Callable[[tuple, Any], Modules | None], params: Any) -> Any:
    """The tree of `Modules` (None: in no module) that `label(path, leaf)` gives for a tree.

    Args:
      label: function of the key path (as in `jax.tree_util.tree_map_with_path`) and the leaf.
      params: parameters, or their shapes.

    Raises:
      ValueError: an axis that a leaf lacks or blocks that do not divide it, or two leaves of one
        kind whose blocks differ.
    """
    modules = jax.tree_util.tree_map_with_path(label, params)
    kind_shapes(modules)
    check_fit(modules, params)
    return modules


def check_fit(modules: Any, params: Any) -> None:
    """Raises `ValueError` for an axis that a leaf lacks, or blocks that do not divide it."""
    leaves, treedef = jax.tree.flatten(params)
    if not leaves:  # also the placeholder with which optax.tree.map_params calls init
        return
    for leaf, module in zip(leaves, treedef.flatten_up_to(modules), strict=True):
        for axis, blocks in module.axes if module else ():
            if not 0 <= axis < leaf.ndim or blocks < 1 or leaf.shape[axis] % blocks:
                raise ValueError(
                    f"{module} does not fit a leaf of shape {leaf.shape}: axis {axis} must exist "
                    f"and be a multiple of {blocks}"
                )


def kind_shapes(modules: Any) -> dict[str, tuple[int, ...]]:
    """Shape of the module index of each kind in a tree of `Modules`.

    Raises `ValueError` for two leaves of one kind with different blocks, or a tree of none, and
    `TypeError` for a leaf that is no `Modules`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for module in jax.tree.leaves(modules):
        if not isinstance(module, Modules):
            raise TypeError(f"modules must hold optim.Modules and None, got {module!r}")
        if shapes.setdefault(module.kind, module.shape) != module.shape:
            raise ValueError(
                f"leaves of kind {module.kind!r} have blocks {shapes[module.kind]} and "
                f"{module.shape}: give them different kinds"
            )
    if not shapes:
        raise ValueError("no leaf belongs to a module: the label function gave None everywhere")
    return shapes


def modular_ntk(
    output: Callable[[Any, Any], jax.Array],
    params: Any,
    probes: Any,
    modules: Any,
    *,
    chunk: int | None = None,
) -> dict[str, jax.Array]:
    r"""Gram matrices of the gradients of each module over a set of probes.

    .. math::
      K^l_{ij} = \frac{1}{S} \langle \nabla_{\theta^l} s_i, \nabla_{\theta^l} s_j \rangle

    is the tangent kernel :math:`\Theta^l = J_l J_l^T` of module :math:`l` over :math:`S` probes
    :math:`x_i` with the scalar outputs :math:`s_i` = ``output(params, x_i)``, divided by S. The
    kernels of disjoint modules that cover the parameters add up to the whole model's.

    Cost: S backward passes of one probe each, `chunk` at a time; then, for every leaf, one product
    of 2 S^2 x its size FLOPs. Memory: the gradients of S probes for the leaves that belong to a
    module (other leaves are not differentiated), and the activations of `chunk` probes.

    Args:
      output: scalar output of one probe; `logit_sum` and `logit_projection` make one of logits.
      params: the parameters.
      probes: pytree of arrays with a leading axis of S probes.
      modules: tree of `Modules` and None in the structure of `params` (`label_modules`).
      chunk: probes differentiated at a time, a divisor of S; None takes all at once.

    Returns:
      f32 (f64 for f64 parameters) [*blocks, S, S] by kind.

    References:
      Shi et al., `Train Faster, Perform Better: Modular Adaptive Training in Over-Parameterized
      Models <https://arxiv.org/abs/2405.07527>`_, 2023. The paper's own estimator is not public;
      this one follows the definition.

    Raises:
      ValueError: a chunk that does not divide S, or modules that do not fit.
    """
    shapes = kind_shapes(modules)
    count = jax.tree.leaves(probes)[0].shape[0]
    size = count if chunk is None else chunk
    if size < 1 or count % size:
        raise ValueError(f"chunk must divide the number of probes {count}, got {chunk}")
    leaves, treedef = jax.tree.flatten(params)
    labels = treedef.flatten_up_to(modules)
    used = [i for i, module in enumerate(labels) if module is not None]

    def scalar(chosen, probe):
        merged = list(leaves)
        for i, leaf in zip(used, chosen, strict=True):
            merged[i] = leaf
        return output(treedef.unflatten(merged), probe)

    chosen = [leaves[i] for i in used]
    grads = jax.vmap(jax.grad(scalar), in_axes=(None, 0))
    if size == count:
        rows = grads(chosen, probes)
    else:
        split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), probes)
        rows = jax.lax.map(lambda part: grads(chosen, part), split)
        rows = [row.reshape(count, *row.shape[2:]) for row in rows]
    grams: dict[str, jax.Array] = {}
    for i, row in zip(used, rows, strict=True):
        gram = _gram(row, labels[i]) / count
        kind = labels[i].kind
        grams[kind] = grams[kind] + gram if kind in grams else gram
    return {kind: grams[kind] for kind in sorted(shapes)}


def _gram(row: jax.Array, module: Modules) -> jax.Array:
    """[S, *leaf] -> [*blocks, S, S], by one product over the axes that are no module index."""
    # Axis a of the leaf becomes (blocks, rest). Letters: b and c are the probes.
    shape, names = [row.shape[0]], ["b"]
    free = iter("defghijklmnopqrstuvwxyz")
    index = {}
    blocks_of = dict(module.axes)
    for axis, size in enumerate(row.shape[1:]):
        blocks = blocks_of.get(axis)
        if blocks is not None:
            index[axis] = next(free)
            shape.append(blocks)
            names.append(index[axis])
            size //= blocks
        shape.append(size)
        names.append(next(free))
    left = "".join(names)
    out = "".join(index[axis] for axis, _ in module.axes) + "bc"
    x = row.reshape(shape)
    dtype = jnp.promote_types(row.dtype, jnp.float32)
    return jnp.einsum(
        f"{left},c{left[1:]}->{out}",
        x,
        x,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )


def principal_eigenvalues(grams: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Largest eigenvalue of each module's kernel: [*blocks, S, S] -> [*blocks], by kind.

    NaN for kernels that are not finite.
    """

    def largest(gram):
        finite = jnp.all(jnp.isfinite(gram), axis=(-2, -1))
        clean = jnp.where(finite[..., None, None], gram, 0.0)
        return jnp.where(finite, jnp.linalg.eigvalsh(clean)[..., -1], jnp.nan)

    return {kind: largest(gram) for kind, gram in grams.items()}


def logit_sum(logits: jax.Array) -> jax.Array:
    """Sum of all logits [T, V] of a sequence, divided by sqrt(T V): a scalar output.

    Softmax ignores a shift of all logits, so this sees a direction that the loss does not;
    `logit_projection` has no such preference.
    """
    return jnp.sum(logits) / math.sqrt(logits.size)


def logit_projection(logits: jax.Array, key: jax.Array) -> jax.Array:
    """Logits [T, V] times random signs, summed and divided by sqrt(T V): a scalar output.

    Over the signs, the expected product of two probes' gradients with the same key is the mean
    over outputs (t, v) of the products of their gradients: the kernel traced over outputs.
    """
    signs = jax.random.rademacher(key, logits.shape, logits.dtype)
    return jnp.sum(logits * signs) / math.sqrt(logits.size)
