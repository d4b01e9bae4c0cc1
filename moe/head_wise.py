"""Head-wise MH-MoE (arXiv 2602.12587): every slice of a token has a router and experts of its own.

The input x of D numbers is cut into H contiguous slices x_1 .. x_H. Slice h is routed among the E
experts of bank h, an expert maps the slice to the full output width, and the H results are summed:

    p_h = softmax(x_h R_h),   S_h = top-k of p_h,   y = sum_h sum_{e in S_h} p_he expert_he(x_h)

There is no projection before the cut and none after the sum (Microsoft's layer of a similar name
has both, and one router for all slices: `moe.multi_head`). A route is the tuple of the experts
chosen in all banks, so there are C(E, k)^H of them. With H = 1 and LoRA experts this is LoRAMoE
(arXiv 2312.09979) with top-k routing.

Not published, and chosen here: weights are the full softmax's, not normalized over the chosen.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe import dispatch
from moe.experts import Activation, Product, bank_mlp, bind_product
from moe.routing import Routing, route


def head_wise_route(x: Float[Array, "N D"], router: Float[Array, "H S E"], k: int = 1) -> Routing:
    """Each slice's experts, by the router of its bank.

    Args:
      x: tokens; D = H * S.
      router: one matrix per slice.
      k: experts per slice.

    Returns:
      weights f32 and indices int32 [N, H, k], probabilities f32 [N, H, E]. The indices count within
      a bank. `load_balance_loss` takes one bank at a time: `bank(routing, h)`.

    Raises:
      ValueError: the slices of x are not those of the router.
    """
    slices = _slices(x, router)
    logits = jnp.einsum("nhs,hse->nhe", slices.astype(jnp.float32), router.astype(jnp.float32))
    tokens, heads, experts = logits.shape
    routing = route(logits.reshape(-1, experts), k)
    return Routing(*(value.reshape(tokens, heads, value.shape[-1]) for value in routing))


def bank(routing: Routing, head: int) -> Routing:
    """The routing [N, ...] of one slice out of `head_wise_route`'s [N, H, ...]."""
    return Routing(*(value[:, head] for value in routing))


def routes(routing: Routing) -> Int[Array, "N Hk"]:
    """Each token's route: the experts of all banks, those of one bank in ascending order.

    Equal rows are equal routes, whatever the order of preference within a bank.
    """
    ordered = jnp.sort(routing.indices, axis=-1)
    return ordered.reshape(ordered.shape[0], ordered.shape[1] * ordered.shape[2])


def head_wise_lora(
    x: Float[Array, "N D"], params: dict[str, jax.Array], *, k: int = 1, scale: float = 1.0
) -> tuple[Float[Array, "N F"], Routing]:
    """The sum over slices of scale * p_he x_h A_he B_he: what is added to a frozen projection.

    All experts' A are multiplied at once and what was not chosen is masked before B: at the ranks
    that adapters have, this is a few per cent of the frozen product, and 10 to 20 times faster on a
    CPU than gathering the chosen experts' factors for each token.

    Args:
      x: inputs of the projection; the products are in their dtype, the routing in f32.
      params: "router" [H, S, E], "lora_a" [H, E, S, r], "lora_b" [H, E, r, F]; S = D / H.
      k: experts per slice.
      scale: alpha / r of LoRA (arXiv 2106.09685, section 4.1).

    Raises:
      ValueError: shapes that do not fit together.
    """
    a, b = params["lora_a"], params["lora_b"]
    routing = head_wise_route(x, params["router"], k)
    heads, experts, _, rank = a.shape
    if params["router"].shape[::2] != (heads, experts) or b.shape[:3] != (heads, experts, rank):
        raise ValueError(
            f"router {params['router'].shape}, lora_a {a.shape} and lora_b {b.shape} are not of "
            "one layer: [H, S, E], [H, E, S, r] and [H, E, r, F] are needed"
        )
    gates = scale * gate_matrix(routing)
    hidden = jnp.einsum("nhs,hesr->nher", _slices(x, params["router"]), a.astype(x.dtype))
    hidden = hidden * gates.astype(x.dtype)[..., None]
    # One product sums over heads, experts and ranks.
    b = b.astype(x.dtype).reshape(-1, b.shape[-1])
    y = hidden.reshape(x.shape[0], b.shape[0]) @ b
    return y, routing


def gate_matrix(routing: Routing) -> Float[Array, "*tokens E"]:
    """The weight of every expert, 0 for those that were not chosen, f32."""
    chosen = jax.nn.one_hot(routing.indices, routing.probabilities.shape[-1], dtype=jnp.float32)
    return jnp.sum(chosen * routing.weights[..., None], axis=-2)


def head_wise_mlp(
    x: Float[Array, "N D"],
    params: dict[str, jax.Array],
    *,
    k: int = 1,
    activation: Activation = "swiglu",
    implementation: str | None = None,
    product: Product | None = None,
    align: int = 1,
) -> tuple[Float[Array, "N D"], Routing]:
    """Whole feed-forward experts of each slice, for training from scratch; dropless.

    Args:
      x: tokens.
      params: "router" [H, S, E]; "gate" (swiglu only) and "up" [H, E, S, F], "down" [H, E, F, D].
      k: experts per slice.
      activation: "swiglu" or "gelu".
      implementation: of the grouped products (`moe.grouped_matmul`).
      product: another grouped product (`moe.expert_mlp`).
      align: every expert's rows start at a multiple of this.
    """
    routing = head_wise_route(x, params["router"], k)
    heads, _, experts = params["router"].shape
    tokens = x.shape[0]
    # All banks are one of H * E experts: slice h has those from h * E on.
    first = jnp.arange(heads, dtype=jnp.int32) * experts
    indices = (routing.indices + first[None, :, None]).reshape(tokens, heads * k)
    plan = dispatch.plan(indices, heads * experts, align=align)
    slices = _slices(x, params["router"]).reshape(tokens * heads, x.shape[1] // heads)
    slice_of = jnp.minimum(plan.token * heads + plan.choice // k, tokens * heads)
    rows = dispatch.spread(slices, slice_of, plan.row.reshape(tokens * heads, k))
    bank = {
        name: value.reshape(-1, *value.shape[2:])
        for name, value in params.items()
        if name != "router"
    }
    scale = dispatch.row_weights(routing.weights.reshape(tokens, heads * k), plan)
    run = bind_product(product, implementation)
    y = bank_mlp(rows, scale, plan.group_sizes, bank, activation, run)
    return dispatch.collect(y, plan.token, plan.row), routing


def _slices(x, router):
    heads, width, _ = router.shape
    if x.ndim != 2 or x.shape[1] != heads * width:
        raise ValueError(
            f"x must be [tokens, {heads} slices x {width}] for a router of shape {router.shape}, "
            f"got {x.shape}"
        )
    return x.reshape(x.shape[0], heads, width)
