"""A recipe as a drop-in for `jax.lax.dot_general`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.linear import Bases, Extras, Options, quantized_matmul
from quant.native import Implementation, Path, paths
from quant.recipe import Recipe
from quant.recipes import get_recipe
from quant.rounding import Key, fold_seed, seed_of

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def dot_general(
    recipe: str | Recipe,
    *,
    key: Key | None = None,
    state: Bases | None = None,
    step: jax.Array | int | None = None,
    enabled: jax.Array | bool | None = None,
    probe: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> "DotGeneral":
    """A function with the signature of `jax.lax.dot_general` that multiplies by a recipe.

    For the `dot_general=` argument of Flax Linen's and NNX's layers, or wherever a product of
    activations (left) with weights (right) is written. Its gradient is the recipe's: straight
    through the rounding, with dgrad and wgrad quantized in their own right, from the unquantized
    arrays.

    Args:
      recipe: a `quant.Recipe`, or the name of one in `quant.RECIPES`.
      key: random key of this layer at this step (`quant.fold_key`, or the cheaper
        `quant.fold_seed`); needed if `recipe.needs_key`. Each rounding folds in its own role.
      state: bases kept between steps, from `quant.init_state`; only for recipes with
        `recipe.needs_state`. Differentiate with respect to it as well: its gradient is the new
        state, to be used instead of the old one in the next step. None: new bases at every use.
      step: number of the step; with `state`, bases are renewed where it is a multiple of the
        recipe's `refresh`.
      enabled: a bool, possibly traced: False leaves this product in high precision. For layers
        that are scanned and of which some are not to be quantized.
      probe: float32 zeros [len(quant.diagnostics.NAMES)]: its gradient is what
        `quant.diagnostics.measure` says about this layer.
      implementation: "native" on the hardware's FP4 and FP8 units where formats allow, "emulated"
        nowhere; None chooses by the device, see `quant.native.paths`. `.paths` of the result says
        what was chosen.

    Returns:
      The function. It raises TypeError for arrays that are not float32, bfloat16 or float16, and
      ValueError for a missing key.

    Examples:
      >>> x = jax.random.normal(jax.random.key(0), (64, 32))
      >>> w = jax.random.normal(jax.random.key(1), (32, 16))
      >>> product = dot_general("nvidia", key=jax.random.key(2))
      >>> error = product(x, w, (((1,), (0,)), ((), ()))) - x @ w
      >>> bool(0.05 < jnp.linalg.norm(error) / jnp.linalg.norm(x @ w) < 0.2)
      True
    """
    recipe = get_recipe(recipe)
    if recipe.needs_key and key is None:
        raise ValueError(
            f"recipe {recipe.name!r} draws random numbers: give it the key of this layer and step, "
            "quant.fold_key(key, layer=..., role='linear', step=...)"
        )
    if state is not None and not recipe.needs_state:
        raise ValueError(f"recipe {recipe.name!r} keeps nothing between steps; drop `state`")
    if state is not None and step is None:
        raise ValueError(f"recipe {recipe.name!r}: with a state, give the step too")
    refresh = None
    if state is not None:
        assert recipe.low_rank is not None
        refresh = jnp.asarray(step) % recipe.low_rank.refresh == 0
    on = None if enabled is None or enabled is True else jnp.asarray(enabled)
    if enabled is False:
        recipe, on = get_recipe("bf16"), None
    seed = None if key is None else seed_of(key)
    paths(recipe, implementation)  # raises for an unknown one
    return DotGeneral(recipe, Extras(seed, state, refresh, on, probe), implementation)


@dataclasses.dataclass(frozen=True, eq=False)
class DotGeneral:
    """See `quant.dot_general`."""

    recipe: Recipe
    extras: Extras = Extras()
    implementation: Implementation | None = None

    @property
    def paths(self) -> dict[str, Path]:
        """How "fprop", "dgrad" and "wgrad" are computed: "native", "emulated" or "high"."""
        return paths(self.recipe, self.implementation)

    def __call__(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """lhs are activations, rhs weights. The result has lhs's dtype, or the preferred one."""
        del precision  # operands are exact and the sum is in float32, whatever is asked
        lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)
        for name, array in (("lhs", lhs), ("rhs", rhs)):
            if array.dtype not in _DTYPES:
                raise TypeError(
                    f"quant.dot_general: {name} must be float32, bfloat16 or float16, "
                    f"not {array.dtype}"
                )
        if out_sharding is not None:
            raise ValueError(
                "quant.dot_general takes no out_sharding: constrain the result, or use Auto axes"
            )
        dtype = None if preferred_element_type is None else np.dtype(preferred_element_type)
        options = Options(dtype, self.implementation)
        return _general(self.recipe, self.extras, options, lhs, rhs, dimension_numbers)


def _general(recipe: Recipe, extras: Extras, options, lhs, rhs, dimension_numbers) -> jax.Array:
    (contract_l, contract_r), (batch_l, batch_r) = (
        tuple(tuple(int(i) for i in axes) for axes in pair) for pair in dimension_numbers
    )
    contract_l, batch_l = (_positive(axes, lhs.ndim) for axes in (contract_l, batch_l))
    contract_r, batch_r = (_positive(axes, rhs.ndim) for axes in (contract_r, batch_r))
    x, free_l = _flatten(lhs, batch_l, contract_l, contract_last=True)
    w, free_r = _flatten(rhs, batch_r, contract_r, contract_last=False)
    if x.shape[-1] != w.shape[-2]:
        raise ValueError(
            f"quant.dot_general: contracted sizes differ: lhs {lhs.shape} over {contract_l}, "
            f"rhs {rhs.shape} over {contract_r}"
        )
    batch = tuple(lhs.shape[i] for i in batch_l)
    if not batch:
        y = quantized_matmul(recipe, x, w, extras, options)
        return y.reshape(free_l + free_r)
    if extras.bases is not None or extras.probe is not None:
        raise ValueError("quant.dot_general: state and probe are for products without batch axes")
    count = math.prod(batch)
    x, w = (a.reshape(count, *a.shape[len(batch) :]) for a in (x, w))

    def one(x, w, index):
        key = None if extras.key is None else fold_seed(extras.key, index)
        return quantized_matmul(recipe, x, w, extras._replace(key=key), options)

    y = jax.vmap(one)(x, w, jnp.arange(count))
    return y.reshape(batch + free_l + free_r)


def _positive(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return tuple(axis % ndim for axis in axes)


def _flatten(x: jax.Array, batch, contract, *, contract_last: bool):
    """[*batch, free, contracted] (or the last two exchanged), and the sizes of the free axes."""
    free = tuple(i for i in range(x.ndim) if i not in batch + contract)
    order = batch + (free + contract if contract_last else contract + free)
    if order != tuple(range(x.ndim)):
        x = x.transpose(order)
    sizes = [x.shape[: len(batch)]]
    f, c = (
        int(np.prod([1, *(x.shape[order.index(i)] for i in axes)])) for axes in (free, contract)
    )
    shape = (f, c) if contract_last else (c, f)
    free_sizes = tuple(x.shape[order.index(i)] for i in free)
    return x.reshape(*sizes[0], *shape), free_sizes


def init_state(recipe: str | Recipe, tokens: int, m: int, n: int) -> Bases | None:
    """Empty bases for one linear layer, or None if the recipe keeps none.

    Args:
      recipe: the recipe, or its name.
      tokens: rows of the inputs in one call.
      m, n: shape of the weights.

    Examples:
      >>> {name: basis.shape for name, basis in init_state("metis_paper", 4096, 256, 1024).items()}
      {'x': (256, 4), 'w': (1024, 4), 'd': (1024, 15)}
    """
    recipe = get_recipe(recipe)
    if not recipe.needs_state:
        return None
    low_rank = recipe.low_rank
    assert low_rank is not None
    shapes = {"x": (tokens, m), "w": (m, n), "d": (tokens, n)}
    return {
        name: jnp.zeros((shape[1], low_rank.columns(*shape)), jnp.float32)
        for name, shape in shapes.items()
        if getattr(low_rank, name) and low_rank.columns(*shape)
    }
