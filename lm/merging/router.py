"""Rows of a mixture's routers, from prompts or at random; see `lm.merging.upcycle`."""

import math

import numpy as np

from lm.merging.numbers import to_float32
from lm.merging.random import stream_key, uniform
from lm.merging.tokenizer import folder_of
from lm.merging.types import MergeError, Store
from lm.merging.upcycle_config import Expert, MoeConfig

__all__ = ["condition_warning", "normal", "router_rows"]

CONDITION = 5.0


def router_rows(
    config: MoeConfig, base: Store, embedding: str | None, layers: int, seed: int
) -> np.ndarray:
    """float32 [layers, experts + shared experts, d].

    A shared expert without prompts has zeros: its gate is then sigmoid(0) = 1/2 everywhere.

    Raises:
        MergeError: prompts need a tokenizer.json or an embedding that the base lacks.
    """
    if embedding is None:
        raise MergeError(f"{config.base_model} has no embedding that could be recognized")
    width = base.tensors[embedding].shape[1]
    every = (*config.experts, *config.shared_experts)
    rows = np.zeros((layers, len(every), width), np.float32)
    if config.gate_mode == "cheap_embed":
        encode = _tokenizer(base)
        for number, expert in enumerate(every):
            if expert.positive_prompts:
                rows[:, number] = _cheap(expert, base, embedding, encode, number)
        return rows
    count = len(config.experts)  # a shared expert's gate has no prompts to follow: zeros
    for layer in range(layers):
        name = f"router of layer {layer}"
        if config.gate_mode == "random":
            drawn = normal(seed, name, 0, count * width)
        else:
            drawn = uniform(stream_key(seed, "upcycle", 0, 0, name), 0, count * width)
            drawn = (2 * drawn - 1) / np.float32(math.sqrt(width))
        rows[layer, :count] = drawn.reshape(count, width)
    return rows


def condition_warning(rows: np.ndarray) -> list[str]:
    """A line when the experts' rows are nearly dependent in some layer: the ratio of the largest
    to the smallest singular value of [experts, d] exceeds 5 (mergekit's limit)."""
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    with np.errstate(divide="ignore", invalid="ignore"):
        conditions = np.nan_to_num(values[:, 0] / values[:, -1], nan=np.inf, posinf=np.inf)
    layer = int(conditions.argmax())
    if conditions[layer] <= CONDITION:
        return []
    return [
        f"the router of layer {layer} has condition number {conditions[layer]:.3g} (above "
        f"{CONDITION:g}): its experts are hardly told apart; use prompts that differ more, or "
        "negative_prompts"
    ]


def normal(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """Numbers [start, start + count) of a stream of N(0, 1), float32 [count].

    Box and Muller (1958): sqrt(-2 ln u) cos(2 pi v), with u in (0, 1] so that the logarithm is
    finite; 24 bits of u bound the numbers by 5.8.
    """
    u, v = (uniform(stream_key(seed, "upcycle", k, 0, name), start, count) for k in (0, 1))
    u = np.float32(1) - u
    return np.sqrt(-2 * np.log(u)) * np.cos(np.float32(2 * math.pi) * v)


def _tokenizer(base: Store):
    path = folder_of(base) / "tokenizer.json"
    if not path.is_file():
        raise MergeError(f"gate_mode: cheap_embed needs {path}: copy it there, or write random")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise MergeError(f"{path} is no tokenizer that can be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda prompt: tokenizer.encode(prompt).ids


def _cheap(expert: Expert, base: Store, embedding: str, encode, number: int) -> np.ndarray:
    def mean(prompts: tuple[str, ...]) -> np.ndarray:
        return sum(_summed(base, embedding, encode(prompt)) for prompt in prompts) / len(prompts)

    row = mean(expert.positive_prompts)
    if expert.negative_prompts:
        row = row - mean(expert.negative_prompts)
    norm = float(np.linalg.norm(row))
    if not norm > 0:
        raise MergeError(
            f"experts[{number}]: its prompts give a router row of zeros (no tokens, or positive "
            "and negative prompts cancel): change them"
        )
    return (row / norm).astype(np.float32)


def _summed(base: Store, embedding: str, ids: list[int]) -> np.ndarray:
    """Sum of the embedding rows of `ids`, float64 [d]; reads these rows only."""
    rows, width = base.tensors[embedding].shape
    total = np.zeros(width)
    for token in ids:
        if token >= rows:
            raise MergeError(f"{embedding} has {rows} rows, the tokenizer gives token {token}")
        values = base.read(embedding, token * width, (token + 1) * width)
        total += to_float32(values, np.empty(width, np.float32))
    return total
