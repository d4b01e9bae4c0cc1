"""Experts: a bank of MLPs of which each token visits k, and shared ones that it always visits.

    y_n = sum_j weights[n, j] down_e(act(gate_e x_n) * up_e x_n),  e = indices[n, j]

The routing weight is applied to the hidden vector, before the last product: the same by linearity,
at the width of an expert instead of the model's, and nothing of the outputs need be kept for the
weights' gradient.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from moe import dispatch
from moe.grouped_matmul import grouped_matmul
from moe.routing import ExpertChoice, Routing

Activation = Literal["swiglu", "gelu"]
Params = dict[str, jax.Array]
"""Of a bank: {"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}, without "gate" for GELU."""
GroupedProduct = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(lhs [R, K], rhs [E, K, N], group_sizes [E]) -> [R, N], with its own gradient."""
Product = GroupedProduct | Mapping[str, GroupedProduct]
"""One for all matrices of an expert, or one for each of "gate", "up", "down" (random numbers in
quantized products must not be shared)."""

CHECKPOINT_NAME = "grouped_matmul"
"""Name of the grouped products' results, for rematerialization policies."""


@jax.custom_vjp
def gated(gate, up, scale):
    """silu(gate) * up * scale[:, None] in f32, in the dtype of gate; gate, up [R, F], scale [R].

    Its own gradient keeps only the inputs.
    """
    gate32, up32, scale = gate.astype(jnp.float32), up.astype(jnp.float32), scale[:, None]
    return (gate32 * jax.nn.sigmoid(gate32) * up32 * scale).astype(gate.dtype)


def _gated_fwd(gate, up, scale):
    return gated(gate, up, scale), (gate, up, scale)


def _gated_bwd(residuals, g):
    gate, up, scale = residuals
    gate32, up32, g32 = (a.astype(jnp.float32) for a in (gate, up, g))
    sigmoid = jax.nn.sigmoid(gate32)
    silu = gate32 * sigmoid
    scaled = g32 * scale[:, None]
    dgate = scaled * up32 * (sigmoid + silu * (1 - sigmoid))
    dscale = jnp.sum(g32 * silu * up32, axis=1).astype(scale.dtype)
    return dgate.astype(gate.dtype), (scaled * silu).astype(up.dtype), dscale


gated.defvjp(_gated_fwd, _gated_bwd)


def expert_mlp(
    x: Float[Array, "N D"],
    routing: Routing | ExpertChoice,
    params: Params,
    *,
    activation: Activation = "swiglu",
    capacity_factor: float | None = None,
    implementation: str | None = None,
    product: Product | None = None,
    align: int = 1,
) -> Float[Array, "N D"]:
    """What the chosen experts make of each token, weighted and summed, in the dtype of x.

    Args:
      x: tokens; their dtype is that of the products.
      routing: as from `route` or `expert_choice`.
      params: the bank, in any floating dtype; `shared_mlp` runs shared experts.
      activation: "swiglu", or "gelu" (tanh approximation, no "gate").
      capacity_factor: an expert takes ceil(factor * N k / E) tokens at most, the rest of its
        assignments add nothing (`capacity_drops` says how many); None: dropless.
      implementation: of the grouped products (`moe.grouped_matmul`).
      product: another grouped product, such as a quantized one.
      align: every expert's rows start at a multiple of this, filled up with zeros; for products
        whose blocks of rows must not straddle two experts.

    Raises:
      ValueError: shapes that do not fit, or an unknown name.
    """
    experts = check_bank(x.shape[-1], params, activation)
    if routing.probabilities.shape[-1] != experts:
        raise ValueError(
            f"the routing is over {routing.probabilities.shape[-1]} experts, the bank has {experts}"
        )
    run = bind_product(product, implementation)
    if isinstance(routing, ExpertChoice):
        if capacity_factor is not None or align != 1:
            raise ValueError("expert choice has its own capacity and takes no align")
        return _expert_choice(x, routing, params, activation, run)
    capacity = None
    if capacity_factor is not None:
        capacity = dispatch.capacity_rows(routing.indices.size, experts, capacity_factor)
    plan = dispatch.plan(routing.indices, experts, align=align, capacity=capacity)
    rows = dispatch.spread(x, plan.token, plan.row)
    scale = dispatch.row_weights(routing.weights, plan)
    y = bank_mlp(rows, scale, plan.group_sizes, params, activation, run)
    return dispatch.collect(y, plan.token, plan.row)


def capacity_drops(
    indices: Int[Array, "*N k"], experts: int, capacity_factor: float | None
) -> Float[Array, ""]:
    """Share of the assignments that `expert_mlp` drops at this capacity factor, f32."""
    if capacity_factor is None:
        return jnp.zeros((), jnp.float32)
    capacity = dispatch.capacity_rows(indices.size, experts, capacity_factor)
    wanted = jnp.sum(jax.nn.one_hot(indices.reshape(-1), experts, dtype=jnp.float32), axis=0)
    return jnp.sum(jnp.maximum(wanted - capacity, 0.0)) / max(indices.size, 1)


def shared_mlp(
    x: Float[Array, "*batch D"], params: Params, *, activation: Activation = "swiglu"
) -> Float[Array, "*batch D"]:
    """The experts that every token visits, as one MLP: {"gate": [D, S], "up", "down": [S, D]}.

    m shared experts of width F are one of width S = m F (arXiv 2401.06066, equation 9).
    """
    up = x @ params["up"].astype(x.dtype)
    if activation == "gelu":
        hidden = jax.nn.gelu(up, approximate=True)
    else:
        hidden = jax.nn.silu(x @ params["gate"].astype(x.dtype)) * up
    return hidden @ params["down"].astype(x.dtype)


def bank_mlp(
    rows: Float[Array, "R D"],
    scale: Float[Array, " R"],
    group_sizes: Int[Array, " E"],
    params: Params,
    activation: Activation,
    product: Product,
) -> Float[Array, "R D"]:
    """The bank on rows that are sorted by expert already, each row times its `scale`."""

    def named(lhs, name):
        run = product[name] if isinstance(product, Mapping) else product
        return checkpoint_name(run(lhs, params[name], group_sizes), CHECKPOINT_NAME)

    up = named(rows, "up")
    if activation == "gelu":
        hidden = jax.nn.gelu(up.astype(jnp.float32), approximate=True) * scale[:, None]
        hidden = hidden.astype(up.dtype)
    else:
        hidden = gated(named(rows, "gate"), up, scale)
    return named(hidden, "down")


def check_bank(width: int, params: Params, activation: Activation) -> int:
    """The number of experts of a bank, whose names and shapes are checked."""
    if activation not in ("swiglu", "gelu"):
        raise ValueError(f"activation must be swiglu or gelu, got {activation!r}")
    names = {"gate", "up", "down"} if activation == "swiglu" else {"up", "down"}
    if set(params) != names:
        raise ValueError(f"a {activation} bank has {sorted(names)}, got {sorted(params)}")
    experts, _, hidden = params["up"].shape
    for name in names:
        shape = (experts, hidden, width) if name == "down" else (experts, width, hidden)
        if params[name].shape != shape:
            raise ValueError(f"{name} must be {shape}, got {params[name].shape}")
    return experts


def bind_product(product: Product | None, implementation: str | None) -> Product:
    """`product` itself, or `grouped_matmul` with the named implementation; not both."""
    if product is not None:
        if implementation is not None:
            raise ValueError("give either a product or the name of an implementation")
        return product
    return lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes, implementation=implementation)


def _expert_choice(x, routing, params, activation, product):
    experts, capacity = routing.indices.shape
    sizes = jnp.full((experts,), capacity, jnp.int32)
    token = routing.indices.reshape(-1)
    y = bank_mlp(x[token], routing.weights.reshape(-1), sizes, params, activation, product)
    total = jnp.zeros(x.shape, jnp.float32).at[token].add(y.astype(jnp.float32))
    return total.astype(x.dtype)
