"""Sizes at which layers of different kinds have equally many parameters, or equal work.

A token multiplies each active parameter once, so for these layers equal active parameters are
equal FLOPs (2 per parameter and token). Plain integers and fractions; nothing here touches JAX.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Size(NamedTuple):
    """Parameters of a layer."""

    total: int
    active: int
    """Those that one token is multiplied by, its routers included."""

    def __add__(self, other):
        return Size(self.total + other.total, self.active + other.active)


def lora_size(
    d_in: int, d_out: int, rank: int, *, heads: int = 1, experts: int = 1, k: int = 1
) -> Size:
    """A LoRA pair (one expert), LoRAMoE (one head) or head-wise LoRA experts on d_in -> d_out."""
    router = d_in * experts if experts > 1 else 0  # H routers of d_in / H rows
    pair = rank * (d_in // heads + d_out)
    return Size(router + heads * experts * pair, router + heads * k * pair)


def multi_head_lora_size(
    d_in: int, d_out: int, rank: int, *, heads: int, experts: int, k: int = 1
) -> Size:
    """Microsoft's layer with linear experts inside of a LoRA pair (`moe.multi_head_lora`)."""
    width = rank // heads
    pair, router, expert = rank * (d_in + d_out), width * experts, width * width
    # The shared router and an expert work once for each of the `heads` parts of a token.
    return Size(pair + router + experts * expert, pair + heads * (router + k * expert))


def matched_rank(d_in: int, d_out: int, rank: int, *, heads: int = 1, k: int = 1) -> float:
    """Rank of head-wise experts with the active parameters of one LoRA pair of rank `rank`.

        r_h = rank (d_in + d_out) / (k (d_in + H d_out))

    Routers are left out of it: with equally many experts per bank both have d_in * E. H = 1 is
    LoRAMoE with k experts per token. Not rounded: see `matched_ranks`.
    """
    return rank * (d_in + d_out) / (k * (d_in + heads * d_out))


def matched_ranks(
    shapes: Sequence[tuple[int, int]], rank: int, *, heads: int = 1, k: int = 1
) -> list[int]:
    """Whole ranks for several projections that together come closest to LoRA of rank `rank`.

    Each projection (d_in, d_out) gets the rank that brings the sum so far nearest to that of LoRA;
    what rounding added or left out is made up for by those that follow. At least 1 everywhere, so
    many heads on few ranks may exceed the sum.
    """
    ranks, wanted, spent = [], 0, 0
    for d_in, d_out in shapes:
        if d_in % heads:
            raise ValueError(f"an input of width {d_in} cannot be cut into {heads} equal slices")
        wanted += rank * (d_in + d_out)
        unit = k * (d_in + heads * d_out)
        ranks.append(max(1, round((wanted - spent) / unit)))
        spent += ranks[-1] * unit
    return ranks


def mlp_experts_size(d_model: int, d_ff: int, *, experts: int, k: int, matrices: int = 3) -> Size:
    """A plain mixture: a router and `experts` feed-forward networks of hidden width d_ff."""
    expert, router = matrices * d_model * d_ff, d_model * experts
    return Size(router + experts * expert, router + k * expert)


def head_wise_mlp_size(
    d_model: int, d_ff: int, *, heads: int, experts: int, k: int = 1, matrices: int = 3
) -> Size:
    """`moe.head_wise_mlp`: H banks; an expert reads d_model / H and writes d_model."""
    expert = d_ff * ((matrices - 1) * d_model // heads + d_model)
    router = d_model * experts
    return Size(router + heads * experts * expert, router + heads * k * expert)


def matched_head_wise_width(
    d_model: int, d_ff: int, *, k_plain: int, heads: int, k: int = 1, matrices: int = 3
) -> float:
    """Hidden width of head-wise experts with the active parameters of a plain mixture.

        H k f_h ((m - 1) D / H + D) = k_plain m D d_ff

    for m matrices (3: swiglu, 2: gelu). With m = 3, k = k_plain: f_h = 3 d_ff / (2 + H).
    """
    return k_plain * matrices * d_ff / (k * (matrices - 1 + heads))


def multi_head_mlp_size(
    d_model: int, d_ff: int, *, heads: int, experts: int, k: int, matrices: int = 3
) -> Size:
    """Microsoft's layer: dense head and merge layers (without biases), experts on d_model / h."""
    expert, router = matrices * (d_model // heads) * d_ff, d_model // heads * experts
    dense = 2 * d_model * d_model
    return Size(dense + router + experts * expert, dense + heads * (router + k * expert))


def matched_multi_head(
    d_model: int, d_ff: int, experts: int, *, heads: int, k: int, matrices: int = 3
) -> tuple[float, float]:
    """(hidden width, number of experts) at which Microsoft's layer is as large as a plain mixture.

    FLOPs and total parameters both equal those of `experts` experts of width d_ff, top-k (arXiv
    2411.16205, section 3, solved for m matrices):

        h k m (D / h) f + 2 D^2 = k m D d_ff        =>  f = d_ff - 2 D / (m k)
        E m (D / h) f + 2 D^2 = experts m D d_ff    =>  E = h (experts d_ff - 2 D / m) / f

    Routers are left out. Not rounded.

    Raises:
      ValueError: the head and merge layers alone cost more than the plain mixture.
    """
    width = d_ff - 2 * d_model / (matrices * k)
    if width <= 0:
        raise ValueError(
            f"the head and merge layers of width {d_model} cost more than {k} experts of width "
            f"{d_ff}: raise d_ff above {2 * d_model / (matrices * k):g}"
        )
    return width, heads * (experts * d_ff - 2 * d_model / matrices) / width
