"""Products of sorted rows with one matrix per group, and their weight gradient.

Rows of group e are lhs[sum(sizes[:e]) : sum(sizes[:e + 1])]:

    grouped_matmul:  out[m] = lhs[m] rhs[e]        for every row m of group e
    grouped_outer:   out[e] = lhs_e^T grad_e       over the rows of group e

One has the other in its gradient: dlhs = grouped_matmul(g, rhs^T), drhs = grouped_outer(lhs, g).
Products accumulate in f32; weight gradients leave in the dtype of the weights, so f32 weights never
see a gradient that was rounded to bf16.

"reference"  the definition: every row with every matrix, in f32
"xla"        `jax.lax.ragged_dot`: a kernel on TPUs; on CPUs and GPUs a dense product, E times the
             FLOPs and memory
"tiled"      a loop over tiles (`moe._tiled`): ideal FLOPs, up to padding; for CPUs
"tokamax"    the kernels of the tokamax library, for GPUs (Hopper and later) and TPUs
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe import _tiled

_PLAIN = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [1]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)
_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def grouped_matmul(
    lhs: Float[Array, "M K"],
    rhs: Float[Array, "E K N"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M N"]:
    """lhs rows times their group's matrix, in the dtype of lhs; rows beyond the groups give zeros.

    Args:
      lhs: rows, sorted by group; their dtype is that of the product.
      rhs: a matrix per group, in any floating dtype; cast to that of lhs for the product.
      group_sizes: rows of each group, any of them 0; their sum must not exceed M.
      implementation: name in `IMPLEMENTATIONS`; None picks for the device: "tiled" on CPUs,
        "tokamax" on GPUs if it is installed and the dtype has 16 bits, else "xla".

    Differentiable in lhs and rhs.

    Raises:
      ValueError: shapes that do not fit, or an unknown name.
      NotImplementedError: the named implementation cannot run here. It never hands over.
    """
    if rhs.ndim != 3:
        raise ValueError(f"rhs must be [E, K, N], got shape {rhs.shape}")
    _check(lhs, group_sizes, rhs.shape[1:2], rhs.shape[:1])
    return _grouped(_choose(implementation, lhs.dtype), lhs, rhs, group_sizes)


def grouped_outer(
    lhs: Float[Array, "M K"],
    grad: Float[Array, "M N"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "E K N"]:
    """lhs^T grad over the rows of each group, in f32; empty groups give zeros.

    The weight gradient of `grouped_matmul`, by itself for products that bring their own gradient.
    Arguments and errors are as there.
    """
    _check(lhs, group_sizes, lhs.shape[1:], group_sizes.shape)
    if grad.ndim != 2 or grad.shape[0] != lhs.shape[0]:
        raise ValueError(f"grad must have the {lhs.shape[0]} rows of lhs, got shape {grad.shape}")
    implementation = _choose(implementation, lhs.dtype)
    return IMPLEMENTATIONS[implementation].outer(lhs, grad, group_sizes)


def _check(lhs, group_sizes, width, groups):
    if lhs.ndim != 2 or lhs.shape[1:] != tuple(width):
        raise ValueError(f"lhs must be [rows, {', '.join(map(str, width))}], got {lhs.shape}")
    if group_sizes.shape != tuple(groups) or group_sizes.ndim != 1:
        raise ValueError(f"group_sizes must have shape {tuple(groups)}, got {group_sizes.shape}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be whole numbers, got {group_sizes.dtype}")


def _choose(implementation: str | None, dtype) -> str:
    if implementation is None:
        backend = jax.default_backend()
        if backend == "cpu":
            return "tiled"
        sixteen_bit = dtype in (jnp.bfloat16, jnp.float16)
        if backend == "gpu" and sixteen_bit and importlib.util.find_spec("tokamax"):
            return "tokamax"
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation of grouped_matmul {implementation!r}; "
            f"there are {', '.join(IMPLEMENTATIONS)}"
        )
    return implementation


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(implementation, lhs, rhs, group_sizes):
    return IMPLEMENTATIONS[implementation].matmul(lhs, rhs, group_sizes, False)


def _grouped_fwd(implementation, lhs, rhs, group_sizes):
    return _grouped(implementation, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _grouped_bwd(implementation, residuals, grad):
    lhs, rhs, group_sizes = residuals
    run = IMPLEMENTATIONS[implementation]
    dlhs = run.matmul(grad, rhs, group_sizes, True)
    drhs = run.outer(lhs, grad, group_sizes)
    return dlhs, drhs.astype(rhs.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _membership(rows, group_sizes):
    """bool [M, E]: row m is of group e."""
    ends = jnp.cumsum(group_sizes)[None]
    row = jnp.arange(rows)[:, None]
    return (row >= ends - group_sizes[None]) & (row < ends)


def _reference_matmul(lhs, rhs, group_sizes, transpose):
    member = _membership(lhs.shape[0], group_sizes)
    products = jnp.einsum(
        "mk,enk->emn" if transpose else "mk,ekn->emn",
        lhs.astype(jnp.float32),
        rhs.astype(lhs.dtype).astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.sum(jnp.where(member.T[:, :, None], products, 0), axis=0).astype(lhs.dtype)


def _reference_outer(lhs, grad, group_sizes):
    member = _membership(lhs.shape[0], group_sizes)
    lhs = jnp.where(member.T[:, :, None], lhs.astype(jnp.float32)[None], 0)
    grad = jnp.where(member.T[:, :, None], grad.astype(jnp.float32)[None], 0)
    return jnp.einsum("emk,emn->ekn", lhs, grad, precision=jax.lax.Precision.HIGHEST)


def _xla_matmul(lhs, rhs, group_sizes, transpose):
    dimensions = _TRANSPOSED if transpose else _PLAIN
    return jax.lax.ragged_dot_general(lhs, rhs.astype(lhs.dtype), group_sizes, dimensions)


def _xla_outer(lhs, grad, group_sizes):
    return jax.lax.ragged_dot_general(
        lhs, grad, group_sizes, _OUTER, preferred_element_type=jnp.float32
    )


def _tokamax_matmul(lhs, rhs, group_sizes, transpose):
    dimensions = _TRANSPOSED if transpose else _PLAIN
    out = _tokamax(lhs, rhs.astype(lhs.dtype), group_sizes, dimensions, lhs.dtype)
    # The kernels leave rows beyond the groups as they find them.
    row = jax.lax.broadcasted_iota(jnp.int32, (lhs.shape[0], 1), 0)
    return jnp.where(row < jnp.sum(group_sizes), out, 0)


def _tokamax_outer(lhs, grad, group_sizes):
    out = _tokamax(lhs, grad, group_sizes, _OUTER, jnp.float32)
    return jnp.where((group_sizes > 0)[:, None, None], out, 0)


def _tokamax(lhs, rhs, group_sizes, dimensions, dtype):
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError(
            "implementation 'tokamax' needs the tokamax package: pip install 'aniso[kernels]'"
        )
    backend = jax.default_backend()
    if backend not in ("gpu", "tpu"):
        raise NotImplementedError(
            f"implementation 'tokamax' needs gpu or tpu, this is {backend}: use None or 'tiled'"
        )
    import tokamax  # pyright: ignore[reportMissingImports]

    try:
        return tokamax.ragged_dot_general(
            lhs,
            rhs,
            group_sizes,
            dimensions,
            preferred_element_type=dtype,
            implementation=("mosaic", "triton") if backend == "gpu" else ("mosaic",),
        )
    except ExceptionGroup as group:
        raise NotImplementedError(
            f"no tokamax kernel takes lhs {lhs.shape}, rhs {rhs.shape}, {lhs.dtype} here: "
            f"{'; '.join(str(error) for error in group.exceptions)}"
        ) from group


class Implementation(NamedTuple):
    """How one implementation runs both products."""

    matmul: Callable[..., jax.Array]
    """(lhs, rhs, group_sizes, transpose) -> [M, N]; transpose: rhs is [E, N, K]."""
    outer: Callable[..., jax.Array]
    """(lhs, grad, group_sizes) -> f32 [E, K, N]."""


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(_reference_matmul, _reference_outer),
    "xla": Implementation(_xla_matmul, _xla_outer),
    "tiled": Implementation(_tiled.matmul, _tiled.outer),
    "tokamax": Implementation(_tokamax_matmul, _tokamax_outer),
}
