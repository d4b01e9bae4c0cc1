"""What quantization does to a tensor, and what made it hard: numbers for one linear layer.

`mean_share`   l |mu|^2 / |x|^2: energy of the mean over tokens (x and d)
`spike_share`  energy of the leading 1.5 % of directions, of what is left without the mean
`snr`          signal to noise of an operand as the product sees it, 10 log10(|a|^2 / |a^ - a|^2) dB
`underflow`    share of its values, not zero before, that round to zero
`saturated`    share of its values that are cut to the largest number of the grid
"""

import jax
import jax.numpy as jnp

from quant.operands import basis_of, dense, prepare, role_key, take_out, transform
from quant.qarray import load_elements
from quant.quantize import dequantize, quantize
from quant.recipe import ROLES, LowRank, Recipe
from quant.rounding import Key

TENSORS = ("x", "w", "d")
NAMES: tuple[str, ...] = (
    "mean_share/x",
    "mean_share/d",
    *(f"spike_share/{tensor}" for tensor in TENSORS),
    *(f"{what}/{role}" for what in ("snr", "underflow", "saturated") for role in ROLES),
)
"""Names of the numbers that `measure` returns; those of an operand that is not quantized are 0."""

_AXES = {"fprop_x": 1, "fprop_w": 0, "dgrad_d": 1, "dgrad_w": 1, "wgrad_x": 0, "wgrad_d": 0}
_PLAIN = Recipe("plain", low_rank=LowRank(oversample=0, iterations=4))


def measure(recipe: Recipe, x, w, d, key: Key | None, bases=None) -> jax.Array:
    """All of `NAMES` for one layer, float32.

    Args:
      recipe: its quantization is what is measured.
      x, w, d: inputs [l, m], weights [m, n], gradient of the outputs [l, n].
      key: of the layer; needed if the recipe needs one.
      bases: those in use, by tensor; None finds new ones.
    """
    tensors = {"x": x, "w": w, "d": d}
    numbers = {f"mean_share/{name}": _mean_share(tensors[name]) for name in ("x", "d")}
    for name, tensor in tensors.items():
        numbers[f"spike_share/{name}"] = spike_share(tensor, center=name != "w")
    for role in ROLES:
        measured = _operand(recipe, role, tensors[role[-1]], key, bases)
        for what, value in zip(("snr", "underflow", "saturated"), measured, strict=True):
            numbers[f"{what}/{role}"] = value
    return jnp.stack([jnp.asarray(numbers[name], jnp.float32) for name in NAMES])


def _energy(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    return part / jnp.where(whole > 0, whole, 1)


def _mean_share(x: jax.Array) -> jax.Array:
    return _share(len(x) * _energy(jnp.mean(x, 0, dtype=jnp.float32)), _energy(x))


def spike_share(x: jax.Array, *, center: bool, rank: float = 0.015) -> jax.Array:
    """Energy of the leading `rank` of directions over that of all, by a randomized SVD."""
    x = x.astype(jnp.float32)
    if center:
        x = x - jnp.mean(x, 0, keepdims=True)
    columns = max(1, round(rank * min(x.shape)))
    # Weights are the tensor whose every row is used.
    basis = basis_of(_PLAIN, "w", x, jax.random.key(0), columns)
    assert basis is not None
    return _share(_energy(x @ basis), _energy(x))


def _operand(recipe: Recipe, role: str, x: jax.Array, key, bases) -> tuple:
    operand = getattr(recipe, role)
    if operand is None:
        return 0.0, 0.0, 0.0
    tensor, axis = role[-1], _AXES[role]
    basis = None if bases is None else bases.get(tensor)
    if basis is None and recipe.low_rank is not None:
        basis = basis_of(recipe, tensor, x, key, recipe.low_rank.columns(*x.shape))
    parts = take_out(recipe, tensor, x, operand, key, basis)
    signs = role_key(key, f"{role[:5]}.signs")
    given = dense(prepare(recipe, role, parts, axis, key, signs))
    exact, residual = x.astype(jnp.float32), parts.residual
    if operand.hadamard:  # compared where the operand lives
        exact = transform(x, axis, operand.hadamard, recipe, signs)
        residual = transform(residual, axis, operand.hadamard, recipe, signs)
    noise = _energy(given - exact)
    q = quantize(
        residual,
        operand.fmt,
        axis=axis,
        rounding=operand.rounding,
        key=role_key(key, role) if operand.rounding == "stochastic" else None,
        block_2d=operand.block_2d,
        sr_headroom=operand.sr_headroom,
    )
    back = jnp.abs(dequantize(q, jnp.float32))
    size = jnp.abs(residual.astype(jnp.float32))
    top = jnp.abs(load_elements(q)) == operand.fmt.element.max
    return (
        10 * jnp.log10(_share(_energy(exact), noise)),
        jnp.mean((back == 0) & (size > 0)),
        # A value rounded up to the largest number is not cut; allow for the rounding of products.
        jnp.mean(top & (size > back * (1 + 2**-20))),
    )
