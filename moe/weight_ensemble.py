"""Weight ensembles (WEMoE, arXiv 2402.00433): one layer whose weights are mixed for each input.

    y_t = x_t (W + sum_k s_tk tau_k) + ...,      s = r - w

    r_t = mean over the tokens 1 .. t of t's document of router(h),     h: the input of the MLP

The paper routes a whole input at once, by the mean over all of its tokens; a language model must
not look ahead, so every prediction is routed by what stands before it, and at the end of a prompt
that is the mean over the prompt. Unlike in expert layers (`moe.route`) nothing is chosen and there
is no softmax: outputs of experts are not mixed, weights before the nonlinearity are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Router = dict[str, dict[str, Array]]
"""{"out": {"kernel" [D, K], "bias" [K]}, "hidden": {"kernel" [D, D], "bias" [D]}}: depth 2; without
"hidden" depth 1; "out" with a bias alone depth 0."""


def ensemble_router(router: Router, h: Float[Array, "B T D"]) -> Float[Array, "B T K"]:
    """The router's output for each token by itself, in f32."""
    h = h.astype(jnp.float32)
    if "hidden" in router:
        hidden = router["hidden"]
        h = jax.nn.relu(h @ hidden["kernel"] + hidden["bias"][None, None])
    bias = jnp.broadcast_to(router["out"]["bias"], (*h.shape[:2], router["out"]["bias"].size))
    return h @ router["out"]["kernel"] + bias if "kernel" in router["out"] else bias


def running_mean(
    found: Float[Array, "B T K"],
    *,
    start: Int[Array, "B T"] | None = None,
    before: tuple[Float[Array, "B K"], Int[Array, "B T"], Int[Array, "B T"]] | None = None,
) -> tuple[Float[Array, "B T K"], Float[Array, "B K"]]:
    """Means of what a document has given so far, and the sum at the end of the row.

    Args:
      found: of every token.
      start: index in the row of the first token of each token's document; None: 0.
      before: behind a cache: (the sum of earlier tokens, 1 for tokens that count and 0 for padding,
        the number of tokens up to each, itself included).
    """
    if before is not None:
        total, real, count = before
        sums = total[:, None] + jnp.cumsum(found * real[..., None], 1)
        return sums / jnp.maximum(count, 1)[..., None], sums[:, -1]
    sums = jnp.cumsum(found, 1)
    index = jnp.arange(found.shape[1])[None]
    if start is None:
        return sums / (index + 1)[..., None].astype(jnp.float32), sums[:, -1]
    # Sums of a row's earlier documents are taken off again.
    earlier = jnp.take_along_axis(sums - found, start[..., None], 1)
    return (sums - earlier) / (index - start + 1)[..., None].astype(jnp.float32), sums[:, -1]


def document_starts(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Where in the row each token's document begins; documents are contiguous.

    >>> document_starts(jnp.asarray([[3, 3, 4, 4, 4]])).tolist()
    [[0, 0, 2, 2, 2]]
    """
    index = jnp.arange(segment_ids.shape[1])[None]
    new = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.where(jnp.pad(new, ((0, 0), (1, 0)), constant_values=True), index, 0)
    return jax.lax.cummax(begins, axis=1)


def ensemble_product(
    x: Float[Array, "N D"],
    share: Float[Array, "N K"],
    vectors: dict[str, Array],
    matmul: Callable[[Array, Array], Array],
) -> Float[Array, "N F"]:
    """sum_k s_k (x tau_k + b_k), added up in f32.

    Args:
      x: inputs of a projection.
      share: s of every token.
      vectors: tau: "kernel" [K, D, F] and perhaps "bias" [K, F].
      matmul: of x and one kernel.
    """

    def add(total, each):
        weight, vector = each
        y = matmul(x, vector["kernel"]).astype(jnp.float32)
        y = y + vector["bias"].astype(jnp.float32)[None] if "bias" in vector else y
        return total + weight[:, None] * y, None

    zero = jnp.zeros((x.shape[0], vectors["kernel"].shape[-1]), jnp.float32)
    return jax.lax.scan(add, zero, (share.T, vectors))[0]
