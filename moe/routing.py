"""Routing: which experts a token goes to, with which weight, and what that costs in balance.

Pure functions on f32 logits; nothing is kept and nothing is hidden. N tokens (any number of leading
axes, such as [B, T]), E experts, k chosen.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scoring = Literal["softmax", "sigmoid"]
Order = Literal["softmax_topk", "topk_softmax"]

_LEAST = 1e-18
"""Least sum of sigmoids that is divided by: the square of a smaller one is 0 in f32, and the
gradient of the quotient would not be finite."""


class Routing(NamedTuple):
    """Each token's choice of experts."""

    weights: Float[Array, "*N k"]
    """Factor of each chosen expert's output, float32."""
    indices: Int[Array, "*N k"]
    """The chosen experts, int32, best first; distinct within a row."""
    probabilities: Float[Array, "*N E"]
    """Scores of all experts, float32: softmax or sigmoid of the logits, without any bias."""


class ExpertChoice(NamedTuple):
    """Each expert's choice of tokens (arXiv 2202.09368)."""

    weights: Float[Array, "E C"]
    """Factor of the expert's output for each chosen token, float32."""
    indices: Int[Array, "E C"]
    """The chosen tokens, int32, best first; distinct within a row."""
    probabilities: Float[Array, "N E"]
    """softmax of the logits, float32."""


def route(
    logits: Float[Array, "*N E"],
    k: int,
    *,
    scoring: Scoring = "softmax",
    order: Order = "softmax_topk",
    normalize: bool = False,
    bias: Float[Array, " E"] | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    scale: float = 1.0,
) -> Routing:
    """The k best experts of each token, and their weights.

        scores = softmax(logits) or sigmoid(logits)
        indices = top-k of scores + bias;  weights = scale * scores[indices]

    All in float32. Of equal scores the expert with the lower index is chosen. Gradients flow
    through the weights only, never through `bias`.

    The families: Switch and Qwen-MoE softmax_topk; Mixtral topk_softmax; Qwen3-MoE softmax_topk
    with normalize; DeepSeek-V3 sigmoid with normalize, bias, groups and scale 2.5 (arXiv
    2412.19437, equations 12 to 16).

    Args:
      logits: router outputs, any floating dtype.
      k: experts per token.
      scoring: how logits become scores.
      order: "topk_softmax" takes the softmax over the k chosen logits alone (Mixtral, arXiv
        2401.04088, section 2.1), so the weights sum to `scale`; softmax scoring only.
      normalize: divide the weights by their sum over the chosen experts.
      bias: added to the scores for the selection alone (arXiv 2408.15664).
      groups: experts are `groups` equal runs; only those of each token's `groups_kept` best groups
        can be chosen. A group's score is its best score (softmax, DeepSeek-V2, arXiv 2405.04434,
        section 2.2.2) or the sum of its two best (sigmoid, DeepSeek-V3).
      groups_kept: groups that each token may use.
      scale: factor of all weights.

    Raises:
      ValueError: numbers that do not fit together, or an unknown name.
    """
    experts = logits.shape[-1]
    _check(experts, k, scoring, order, groups, groups_kept)
    logits = logits.astype(jnp.float32)
    softmax = scoring == "softmax"
    probabilities = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
    ranked = jax.lax.stop_gradient(probabilities)
    if bias is not None:
        if bias.shape != (experts,):
            raise ValueError(f"bias must have shape ({experts},), got {bias.shape}")
        bias = jax.lax.stop_gradient(bias.astype(jnp.float32))
        ranked = ranked + jnp.broadcast_to(bias, ranked.shape)
    if groups_kept < groups:
        ranked = _within_groups(ranked, groups, groups_kept, best=1 if softmax else 2)
    indices = jax.lax.top_k(ranked, k)[1].astype(jnp.int32)
    chosen = _pick(logits, indices)
    if softmax and (normalize or order == "topk_softmax"):
        weights = jax.nn.softmax(chosen, axis=-1)  # exp(logits) over their sum, in either case
    elif normalize:
        # Sigmoids over their sum, by their logarithms: those that are 0 in f32 have them too.
        weights = jax.nn.softmax(jax.nn.log_sigmoid(chosen), axis=-1)
    else:
        weights = _pick(probabilities, indices)
    return Routing(weights * scale, indices, probabilities)


def expert_choice(logits: Float[Array, "N E"], capacity: int) -> ExpertChoice:
    """Each expert takes the `capacity` tokens with the largest softmax(logits) over experts.

    Perfectly balanced by construction, but a token's experts depend on the other tokens, later ones
    included: not for causal models at inference (arXiv 2202.09368, sections 3.2 and 5). Of equal
    scores the earlier token is taken.
    """
    tokens = logits.shape[0]
    if not 1 <= capacity <= tokens:
        raise ValueError(f"capacity must be from 1 to the {tokens} tokens, got {capacity}")
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, indices = jax.lax.top_k(probabilities.T, capacity)
    return ExpertChoice(weights, indices.astype(jnp.int32), probabilities)


def load_balance_loss(routing: Routing, *, per_sequence: bool = False) -> Float[Array, ""]:
    """E sum_i f_i P_i, 1 when tokens and probability are spread evenly; f32.

    f_i is the share of assignments that went to expert i (sum 1) and P_i the mean of its normalized
    score (arXiv 2101.03961, equations 4 to 6, with k assignments a token). Only P has a gradient.

    Args:
      routing: as from `route`.
      per_sequence: balance each run of tokens along the last token axis (of logits [B, T, E]: each
        sequence) by itself and take the mean (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20);
        else all tokens together.
    """
    shares, indices = _shares(routing.probabilities), routing.indices
    experts = shares.shape[-1]
    if shares.size == 0:
        return jnp.zeros((), jnp.float32)
    if not per_sequence:
        shares, indices = shares.reshape(-1, experts), indices.reshape(-1, indices.shape[-1])
    load = jax.vmap(lambda chosen: expert_load(chosen, experts))(
        indices.reshape(-1, *indices.shape[-2:])
    )
    mean_share = jnp.mean(shares, axis=-2).reshape(-1, experts)
    return experts * jnp.mean(jnp.sum(load * mean_share, axis=-1))


def router_z_loss(logits: Float[Array, "*N E"]) -> Float[Array, ""]:
    """Mean over tokens of logsumexp(logits)^2: keeps them small (arXiv 2202.08906, equation 5)."""
    if logits.size == 0:
        return jnp.zeros((), jnp.float32)
    return jnp.mean(jnp.square(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)))


def expert_load(indices: Int[Array, "*N k"], experts: int) -> Float[Array, " E"]:
    """Share of all assignments that each expert got, f32, sum 1 (all 0 without tokens)."""
    chosen = jax.nn.one_hot(indices.reshape(-1), experts, dtype=jnp.float32)
    return jnp.sum(chosen, axis=0) / max(indices.size, 1)


def update_bias(
    bias: Float[Array, "*layers E"], load: Float[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """The selection bias after one step: b_i + rate * sign(mean load - load_i).

    Balances without a gradient (arXiv 2408.15664, algorithm 1). DeepSeek-V3 used rate 1e-3, then 0
    (arXiv 2412.19437, section 4.2). `load` may be counts or shares, over the whole global batch.
    """
    error = jnp.mean(load, axis=-1, keepdims=True) - load
    return bias + (rate * jnp.sign(error)).astype(bias.dtype)


def routing_statistics(
    routing: Routing, drop_share: Float[Array, ""] | float = 0.0
) -> dict[str, jax.Array]:
    """What to watch while training; all f32.

    load: [E], share of assignments of each expert. max_violation: largest load over mean load,
    minus 1 (arXiv 2408.15664, equation 4); 0 is balance. entropy: mean over tokens of that of the
    normalized scores, in nats (log E: undecided). drop_share: as given, the share of assignments
    that the capacity limit refused.
    """
    experts = routing.probabilities.shape[-1]
    load = expert_load(routing.indices, experts)
    shares = _shares(routing.probabilities)
    entropy = -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)
    return {
        "load": load,
        "max_violation": jnp.max(load) * experts - 1.0,
        "entropy": jnp.sum(entropy) / max(entropy.size, 1),
        "drop_share": jnp.asarray(drop_share, jnp.float32),
    }


def _pick(scores, indices):
    return jnp.take_along_axis(scores, indices, axis=-1)


def _shares(probabilities):
    return probabilities / jnp.maximum(jnp.sum(probabilities, axis=-1, keepdims=True), _LEAST)


def _within_groups(ranked, groups, groups_kept, best):
    """Scores with -inf outside of each token's best groups."""
    members = ranked.shape[-1] // groups
    grouped = ranked.reshape(*ranked.shape[:-1], groups, members)
    score = jnp.sum(jax.lax.top_k(grouped, min(best, members))[0], axis=-1)
    chosen = jax.lax.top_k(score, groups_kept)[1]
    kept = jnp.any(jax.nn.one_hot(chosen, groups, dtype=bool), axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(ranked.shape)


def _check(experts, k, scoring, order, groups, groups_kept):
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be softmax or sigmoid, got {scoring!r}")
    if order not in ("softmax_topk", "topk_softmax"):
        raise ValueError(f"order must be softmax_topk or topk_softmax, got {order!r}")
    if order == "topk_softmax" and scoring != "softmax":
        raise ValueError("order topk_softmax is a softmax over logits: use scoring softmax")
    if groups < 1 or experts % groups:
        raise ValueError(f"{experts} experts are not {groups} groups of equal size")
    if not 1 <= groups_kept <= groups:
        raise ValueError(f"groups_kept must be from 1 to groups = {groups}, got {groups_kept}")
    most = experts // groups * groups_kept
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to the {most} experts to choose from, got {k}")
