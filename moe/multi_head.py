"""Microsoft's MH-MoE (arXiv 2404.15045, 2411.16205): experts see parts of a token, not tokens.

    u = x W_head + b_head                       [N, D], the head layer
    sub-tokens: u cut into h parts of D / h     [N h, D / h]
    z = mixture(sub-tokens)                     one router and one pool of experts for all of them
    y = concatenated z W_merge + b_merge        the merge layer

The head-wise layer of arXiv 2602.12587 (`moe.head_wise`) shares the name and little else: it has no
dense layers around the experts, private routers and banks, and sums full-width outputs.

Initial scales of the published code: Xavier uniform for both dense layers, the head layer's with
gain 1 / sqrt(2); biases 0. It balances with the Switch loss, weight 0.01 (`moe.load_balance_loss`
of the routing that is returned).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe.experts import Activation, Product, expert_mlp
from moe.head_wise import gate_matrix
from moe.routing import Routing, route


def multi_head_mlp(
    x: Float[Array, "N D"],
    params: dict[str, jax.Array],
    *,
    heads: int,
    k: int = 1,
    activation: Activation = "swiglu",
    capacity_factor: float | None = None,
    implementation: str | None = None,
    product: Product | None = None,
) -> tuple[Float[Array, "N D"], Routing]:
    """The layer with feed-forward experts, for training from scratch.

    Args:
      x: tokens; D must be a multiple of `heads`.
      params: "head" and "merge" [D, D], optionally "head_bias" and "merge_bias" [D]; "router"
        [D / h, E]; "gate" (swiglu only) and "up" [E, D / h, F], "down" [E, F, D / h].
      heads: parts h of a token.
      k: experts per part.
      activation: "swiglu" or "gelu".
      capacity_factor: None is dropless. Otherwise an expert takes at most that share of the mean
        number of assignments, as in `moe.expert_mlp`.
      implementation: of the grouped products.
      product: another grouped product.

    Returns:
      y [N, D], and the routing of the N h sub-tokens, those of a token next to each other.
    """
    z, routing = multi_head_experts(
        _dense(x, params, "head"),
        params,
        heads=heads,
        k=k,
        activation=activation,
        capacity_factor=capacity_factor,
        implementation=implementation,
        product=product,
    )
    return _dense(z, params, "merge"), routing


def multi_head_experts(
    u: Float[Array, "N D"],
    params: dict[str, jax.Array],
    *,
    heads: int,
    k: int = 1,
    activation: Activation = "swiglu",
    capacity_factor: float | None = None,
    implementation: str | None = None,
    product: Product | None = None,
) -> tuple[Float[Array, "N D"], Routing]:
    """What stands between the head and the merge layer; arguments of `multi_head_mlp`."""
    parts = _parts(u, heads)
    routing = _route(parts, params["router"], k)
    names = ("gate", "up", "down")
    z = expert_mlp(
        parts,
        routing,
        {name: params[name] for name in names if name in params},
        activation=activation,
        capacity_factor=capacity_factor,
        implementation=implementation,
        product=product,
    )
    return z.reshape(u.shape), routing


def multi_head_lora(
    x: Float[Array, "N D"],
    params: dict[str, jax.Array],
    *,
    heads: int,
    k: int = 1,
    scale: float = 1.0,
) -> tuple[Float[Array, "N F"], Routing]:
    """The layer as an adapter: low-rank head and merge layers around linear experts.

    u = x A [N, r] is cut into h parts, an expert is a matrix on a part, and z B is added to a
    frozen projection. An adaptation of ours, for comparisons at equal active parameters: dense head
    and merge layers would cost more than all of the adapters together.

    Args:
      x: inputs of the projection.
      params: "lora_a" [D, r], "router" [r / h, E], "expert" [E, r / h, r / h], "lora_b" [r, F].
      heads: parts h; must divide r.
      k: experts per part.
      scale: alpha / r.
    """
    parts = _parts(x @ params["lora_a"].astype(x.dtype), heads)
    routing = _route(parts, params["router"], k)
    gates = gate_matrix(routing).astype(x.dtype)
    z = jnp.einsum("ns,est,ne->nt", parts, params["expert"].astype(x.dtype), gates)
    return scale * (
        z.reshape(x.shape[0], params["lora_b"].shape[0]) @ params["lora_b"].astype(x.dtype)
    ), routing


def _dense(x, params, name):
    y = x @ params[name].astype(x.dtype)
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(x.dtype)[None]


def _parts(x, heads: int):
    if x.shape[-1] % heads:
        raise ValueError(f"width {x.shape[-1]} cannot be cut into {heads} equal parts")
    return x.reshape(x.shape[0] * heads, x.shape[-1] // heads)


def _route(parts, router, k: int) -> Routing:
    return route(parts.astype(jnp.float32) @ router.astype(jnp.float32), k)
