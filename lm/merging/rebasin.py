"""Git re-basin by weight matching for decoder models: bring one model's hidden units into the order
of another's, without changing what it computes.

Networks trained apart order their hidden units at random; averaging them mixes unrelated units.
Weight matching (Ainsworth, Hayase and Srinivasa 2022, arXiv 2209.04836, section 3.2) permutes the
units of model B so that the inner product of its weights with A's is largest. Permuted here, in
every layer by itself:

MLP         hidden units, in every plain, gated or expert MLP: rows of the input projections (with
            biases), columns of the output projection. One linear assignment of
            sum_in W_a W_b^T + V_a^T V_b, which is the exact optimum.
attention   (1) key-value heads with all that belongs to them; (2) query heads within the group
            that shares a key-value head; (3) the channels of values within a head, which rotary
            embeddings do not touch: rows of v_proj, columns of o_proj. Whole heads only for queries
            and keys: inside a head, rotary pairs have frequencies of their own. (2) and (3) depend
            on each other through o_proj and are improved in turns until nothing gains, from two
            starts, the better of which counts; (1) is one assignment over the results.

Not permuted: the residual stream (embeddings, norms, and the outer sides of all projections: one
permutation of it would have to fit all layers at once), experts and their routers, fused
projections (qkv_proj, gate_up_proj, c_attn); layers with tensors that are not known here are left
as they are and named. Where the residual streams of two models differ by more than fine-tuning
does, aligning the layers inside it cannot bring the models together.

Cost: products of O(f^2 d) per MLP and O((H h)^2 d) per attention, assignments of O(f^3) in the
worst case (scipy.optimize.linear_sum_assignment); memory for one layer: four float32 matrices
[f, d] or [d, f] and the float64 score matrix [f, f] twice (f = 11008: 2 GB).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lm.merging import architecture as arch
from lm.merging.folder import check_folder, copied, write_folder
from lm.merging.numbers import to_float32
from lm.merging.output_files import tokenizer_files
from lm.merging.store import open_store
from lm.merging.types import MergeError, Store

__all__ = ["Alignment", "align", "match"]

INPUTS = ("gate_proj", "up_proj", "w1", "w3", "fc1", "dense_h_to_4h")
OUTPUTS = ("down_proj", "w2", "fc2", "dense_4h_to_h")
_MLP = re.compile(rf"(.+\.)({'|'.join(INPUTS + OUTPUTS)})\.(weight|bias)")
_ATTENTION = re.compile(r"(.+\.(?:self_attn|attention|attn)\.)([^.]+)\.(weight|bias)")
OUT = ("o_proj", "out_proj", "dense")
_ROUNDS = 50
_GAIN = 1e-9  # of the norms involved; smaller gains are rounding

Units = dict[str, tuple[int, np.ndarray]]
"""Tensor name -> (axis, order): the aligned tensor is `tensor.take(order, axis)`."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How a model is to be permuted."""

    orders: Units
    skipped: tuple[str, ...]
    """Parts that were left as they are, each with the reason."""
    before: float
    """Cosine between the two models over the permuted matrices as they were."""
    after: float
    """The same after the permutation."""


class _Pair:
    """Tensors of the reference (a) and of the model (b) to be aligned."""

    def __init__(self, a: Store, b: Store):
        self.a, self.b = a, b
        self.orders: Units = {}
        self.skipped: list[str] = []
        self.dots = np.zeros(4)  # <a, b>, <a, aligned b>, |a|^2, |b|^2

    def read(self, name: str, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Both tensors in float32 [units, the rest], the units along `axis`."""
        values = []
        for store in (self.a, self.b):
            info = arch.info(store, name)
            flat = to_float32(store.read(name), np.empty(info.size, np.float32))
            value = flat.reshape(info.shape)
            values.append(value.reshape(len(value), -1) if axis == 0 else value.T)
        return values[0], values[1]

    def has(self, name: str) -> bool:
        """Whether both models have it."""
        return all(store.aliases.get(name, name) in store.tensors for store in (self.a, self.b))

    def settle(self, name: str, axis: int, order: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """Record how a tensor is permuted; a, b as from `read`."""
        self.orders[name] = (axis, order)
        if a.shape[1] > 1:
            self.dots += [_dot(a, b), _dot(a, b[order]), _dot(a, a), _dot(b, b)]


def match(reference: Store, model: Store) -> Alignment:
    """Permutations that bring `model` closest to `reference`; both in the same layout.

    Raises:
        MergeError: the models have other tensors or shapes, or nothing in them can be permuted.
    """
    names = [name for name, info in reference.tensors.items() if arch.is_float(info.dtype)]
    vocabulary = arch.describe(reference).vocabulary
    pair = _Pair(reference, model)
    for name in names:
        if not pair.has(name):
            raise MergeError(f"{model.path} lacks {name}: only models of one layout can be aligned")
        shapes = [arch.info(store, name).shape for store in (reference, model)]
        if shapes[0] != shapes[1] and name not in vocabulary:
            raise MergeError(f"{name} is {list(shapes[0])} and {list(shapes[1])}")
    for prefix, leaves in _groups(_MLP, names).items():
        _match_mlp(pair, prefix, leaves)
    for prefix, leaves in _groups(_ATTENTION, names).items():
        _match_attention(pair, prefix, leaves)
    if not pair.orders:
        reasons = "; ".join(pair.skipped[:3]) or "no MLP and no attention was recognized"
        raise MergeError(f"nothing in {reference.path} can be permuted: {reasons}")
    norm = float(np.sqrt(pair.dots[2] * pair.dots[3])) or 1.0
    before, after = float(pair.dots[0] / norm), float(pair.dots[1] / norm)
    return Alignment(pair.orders, tuple(pair.skipped), before, after)


def align(
    reference: str,
    model: str,
    out: Path,
    *,
    shard_size: int = 5 * 10**9,
    say: Callable[[str], None] = print,
) -> Alignment:
    """Write `model`, permuted to match `reference`, into the folder `out`.

    It computes what `model` computes, up to the order of floating-point sums; merge it with
    `reference` in place of `model`.

    Raises:
        MergeError: see `match`; or `out` is not empty.
        StorageError: a file cannot be read or written.
    """
    check_folder(out)
    a, b = open_store(reference), open_store(model)
    found = match(a, b)
    for text in found.skipped:
        say(f"warning: {text}")
    tensors = [
        (info, lambda name=name: _permuted(b, name, found.orders))
        for name, info in b.tensors.items()
    ]
    files = tokenizer_files(b, None)
    if b.config:
        files["config.json"] = (json.dumps(b.config, indent=2, ensure_ascii=False) + "\n").encode()
    record = {"models": [reference, model], "cosine": [found.before, found.after]}
    write_folder(out, tensors, files, record, metadata={}, shard_size=shard_size)
    moved = sum(bool((order != np.arange(len(order))).any()) for _, order in found.orders.values())
    say(
        f"{moved} tensors permuted; cosine with {reference} over them {found.before:.4f} before, "
        f"{found.after:.4f} after"
    )
    return found


def _groups(pattern: re.Pattern, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Prefix of a module -> {leaf ("up_proj.weight"): full name} of all that it holds."""
    prefixes = dict.fromkeys(found[1] for name in names if (found := pattern.fullmatch(name)))
    return {
        prefix: {name[len(prefix) :]: name for name in names if name.startswith(prefix)}
        for prefix in prefixes
    }


def _match_mlp(pair: _Pair, prefix: str, leaves: Mapping[str, str]) -> None:
    inner = {leaf: name for leaf, name in leaves.items() if leaf.split(".")[0] in INPUTS}
    outer = [leaf for leaf in leaves if leaf.split(".")[0] in OUTPUTS]
    weights = [leaf for leaf in outer if leaf.endswith(".weight")]
    if len(weights) != 1 or not inner:
        pair.skipped.append(f"{prefix[:-1]}: no complete MLP, left as it is")
        return
    units = arch.info(pair.a, leaves[weights[0]]).shape[-1]
    # Children of their own (experts, a shared expert) are groups of their own.
    own = {leaf for leaf in leaves if leaf.count(".") == 1 and leaf != "gate.weight"}
    odd = [leaf for leaf in own if leaf not in inner and leaf not in outer]
    rows = {arch.info(pair.a, name).shape[0] for name in inner.values()}
    if odd or rows != {units} or len(arch.info(pair.a, leaves[weights[0]]).shape) != 2:
        what = f"{odd[0]} is not known" if odd else "its shapes do not fit together"
        pair.skipped.append(f"{prefix[:-1]}: {what}, left as it is")
        return
    scores = np.zeros((units, units), np.float64)
    for name, axis in [*((name, 0) for name in inner.values()), (leaves[weights[0]], 1)]:
        a, b = pair.read(name, axis)
        scores += a @ b.T
    order = _assign(scores)[0]
    del scores
    for name, axis in [*((name, 0) for name in inner.values()), (leaves[weights[0]], 1)]:
        pair.settle(name, axis, order, *pair.read(name, axis))


def _match_attention(pair: _Pair, prefix: str, leaves: Mapping[str, str]) -> None:
    try:
        heads, groups, size, members = _attention(pair, leaves)
    except _Unfit as reason:
        pair.skipped.append(f"{prefix[:-1]}: {reason}, left as it is")
        return
    read = {name: pair.read(name, axis) for name, (_, axis) in members.items()}
    sides = {
        side: [read[name] for name, (own, _) in members.items() if own == side] for side in "qkvo"
    }
    group_order, head_order, channels = _best_heads(sides, heads, groups, size)
    orders = {
        "q": _rows(head_order, size, np.arange(size)),
        "k": _rows(group_order, size, np.arange(size)),
        "v": _rows(group_order, size, channels),
        "o": _rows(head_order, size, np.repeat(channels, heads // groups, 0)),
    }
    for name, (side, axis) in members.items():
        pair.settle(name, axis, orders[side], *read[name])


class _Unfit(Exception):
    """Why an attention layer cannot be permuted."""


def _attention(
    pair: _Pair, leaves: Mapping[str, str]
) -> tuple[int, int, int, dict[str, tuple[str, int]]]:
    """(query heads, key-value heads, head size, {tensor: (side, axis)}) of a layer."""
    config = pair.a.config
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    shapes = {leaf: arch.info(pair.a, name).shape for leaf, name in leaves.items()}
    outs = [leaf for leaf in OUT if f"{leaf}.weight" in leaves]
    lacking = [leaf for leaf in ("q_proj", "k_proj", "v_proj") if f"{leaf}.weight" not in leaves]
    if lacking or len(outs) != 1:
        raise _Unfit(f"it has no {lacking[0] if lacking else 'output projection'}")
    rows = {leaf: shapes[f"{leaf}.weight"][0] for leaf in ("q_proj", "k_proj", "v_proj")}
    if not isinstance(heads, int) or heads < 1 or rows["q_proj"] % heads:
        raise _Unfit(f"config.json says num_attention_heads {heads!r}")
    size = rows["q_proj"] // heads
    groups = rows["k_proj"] // size
    said = config.get("head_dim") or size, config.get("num_key_value_heads") or groups
    fits = rows["k_proj"] == rows["v_proj"] == groups * size and groups and not heads % groups
    if not fits or said != (size, groups) or shapes[f"{outs[0]}.weight"][1] != heads * size:
        raise _Unfit("its shapes are not those of heads as config.json gives them")
    sides = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "q_norm": "q", "k_norm": "k"}
    full = {"q": heads * size, "k": groups * size, "v": groups * size}
    members = {leaves[f"{outs[0]}.weight"]: ("o", 1)}
    for leaf, name in leaves.items():
        module = leaf.split(".")[0]
        if module == outs[0] or arch.is_buffer(name):
            continue
        side = sides.get(module)
        if side and shapes[leaf][0] == full[side]:
            members[name] = (side, 0)
        elif not (module in ("q_norm", "k_norm") and shapes[leaf] == (size,)):
            raise _Unfit(f"{leaf} is not known")  # a norm within each head stays
    return heads, groups, size, members


def _rows(order: np.ndarray, size: int, inner: np.ndarray) -> np.ndarray:
    """Order of single rows, from that of heads of `size` rows and that inside each head."""
    return (order[:, None] * size + inner).reshape(-1)


def _best_heads(
    sides: Mapping[str, list[tuple[np.ndarray, np.ndarray]]], heads: int, groups: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orders of groups [K] and query heads [H], and of the channels in each group [K, size].

    Entry i is the unit of b that goes to place i; heads are numbered through all groups, channels
    within theirs.
    """
    per_group = heads // groups
    queries = sum(a.reshape(heads, -1) @ b.reshape(heads, -1).T for a, b in sides["q"])
    keys = sum(a.reshape(groups, -1) @ b.reshape(groups, -1).T for a, b in sides["k"])
    values = sum(a @ b.T for a, b in sides["v"]).reshape(groups, size, groups, size)
    outputs = sum(a @ b.T for a, b in sides["o"]).reshape(
        groups, per_group, size, groups, per_group, size
    )
    queries = queries.reshape(groups, per_group, groups, per_group)
    scores = np.zeros((groups, groups))
    inner = {}
    for i in range(groups):
        for j in range(groups):
            parts = queries[i, :, j], values[i, :, j], outputs[i, :, :, j]
            gain, *inner[i, j] = _best_group(*(part.astype(np.float64) for part in parts))
            scores[i, j] = gain + keys[i, j]
    order, _ = _assign(scores)
    found = [inner[i, j] for i, j in enumerate(order)]
    head_order = np.concatenate(
        [j * per_group + own[0] for j, own in zip(order, found, strict=True)]
    )
    return order, head_order, np.stack([own[1] for own in found])


def _best_group(
    queries: np.ndarray, values: np.ndarray, outputs: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Best (score, order of heads, order of channels) for one pair of groups.

    Args:
        queries: scores of pairs of heads [g, g].
        values: scores of pairs of channels [s, s].
        outputs: scores of (head, channel) pairs [g, s, g, s].
    """
    size = len(values)
    best = None
    for start in (_assign(values)[0], np.arange(size)):
        channels, score = start, -np.inf
        for _ in range(_ROUNDS):
            heads, _ = _assign(queries + outputs[:, np.arange(size), :, channels].sum(0))
            both = values + outputs[np.arange(len(heads)), :, heads].sum(0)
            channels, total = _assign(both)
            total += queries[np.arange(len(heads)), heads].sum()
            gained = total - score
            score = total
            if gained <= _GAIN * abs(total):
                break
        if best is None or score > best[0]:
            best = (score, heads, channels)
    return best


def _assign(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """Order of the columns that makes the trace largest, and that trace."""
    from scipy.optimize import linear_sum_assignment

    rows, order = linear_sum_assignment(scores, maximize=True)
    return order, float(scores[rows, order].sum())


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))


def _permuted(store: Store, name: str, orders: Units) -> Iterator[np.ndarray]:
    """A tensor of the aligned model, in its own type."""
    if name not in orders:
        yield from copied(store, name)
        return
    axis, order = orders[name]
    yield np.take(store.read(name).reshape(store.tensors[name].shape), order, axis).reshape(-1)
