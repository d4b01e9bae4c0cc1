"""Inner products of streamed tensors, and sums weighted by what they tell.

Spherical methods see their vectors only through norms and angles. One pass measures all inner
products; iterations then run on a few coefficients, and a last pass forms the weighted sum.

Accuracy: products of small blocks are exact (float64); those of large ones are rounded to float32
each and summed in float32 over 1024 elements, in float64 beyond: relative to the product of the
norms the error is about 1e-7 / sqrt(n / 1024), some times that in the order in which XLA sums.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from lm.merging.methods.arrays import add
from lm.merging.types import Block, Blocks

__all__ = ["Along", "coefficients", "gram", "inner", "mix"]

EXACT = 1 << 13
RUN = 1024

Along = Literal["all", "rows", "columns"]
"""What the vectors are: the whole tensor, each row (last axis), or each column (first axis)."""


def inner(xp: Any, a: Any, b: Any) -> float:
    """Inner product of all elements."""
    if xp is np:
        a, b = a.reshape(-1), b.reshape(-1)
        if a.size <= EXACT:
            return float(np.einsum("n,n->", a, b, dtype=np.float64, casting="safe"))
        product, whole = a * b, a.size - a.size % RUN
        runs = product[:whole].reshape(-1, RUN).sum(1)
        return float(runs.sum(dtype=np.float64) + product[whole:].sum(dtype=np.float64))
    product = (a * b).reshape(-1)
    product = xp.pad(product, (0, -product.size % RUN)).reshape(-1, RUN)
    return float(np.asarray(product.sum(1)).sum(dtype=np.float64))


def _rows(xp: Any, a: Any, b: Any) -> np.ndarray:
    if xp is np:
        return np.einsum("ij,ij->i", a, b, dtype=np.float64, casting="safe")
    return np.asarray((a * b).sum(1), np.float64)


def _columns(a: Any, b: Any) -> np.ndarray:
    return np.einsum("ij,ij->ij", a, b, dtype=np.float64, casting="safe")


def gram(
    blocks: Blocks, vectors: Callable[[Block], Sequence[Any]], along: Along = "all"
) -> np.ndarray:
    """Inner products of the given vectors, float64.

    Args:
      blocks: of scope "row" unless `along` is "all".
      vectors: K arrays of a block.
      along: which elements make up a vector.

    Returns:
      [K, K] for "all", [K, K, rows] for "rows". For "columns" [K, K, p, columns]: the elements of
      an [m, ..., columns] tensor with the same places in all axes but the first, p the product of
      the axes between.
    """

    def products(block: Block) -> np.ndarray:
        values = vectors(block)
        count = len(values)
        out: Any = [[None] * count for _ in range(count)]
        for i, a in enumerate(values):
            for j in range(i, count):
                b = values[j]
                if along == "all":
                    entry = inner(block.xp, a, b)
                elif along == "rows":
                    entry = _rows(block.xp, a, b)
                else:
                    entry = _folded(block, _columns(np.asarray(a), np.asarray(b)))
                out[i][j] = out[j][i] = entry
        return np.array(out)

    parts = blocks.map(products)
    return np.concatenate(list(parts), axis=2) if along == "rows" else sum(parts)


def _folded(block: Block, products: np.ndarray) -> np.ndarray:
    """Products [rows, columns] summed over the tensor's first axis."""
    middle = int(np.prod(block.info.shape[1:-1], dtype=np.int64))
    columns = products.shape[1]
    out = np.zeros((middle, columns))
    rows = block.start // columns + np.arange(products.shape[0])
    np.add.at(out, rows % middle, products)
    return out


def coefficients(block: Block, values: np.ndarray, along: Along) -> Any:
    """Measured numbers of vectors, as float32 that multiplies the block: [], [rows, 1], [rows, c].

    Args:
      block: of scope "row" unless `along` is "all".
      values: [], [rows of the tensor] or [p, columns], in the order that `gram` gives.
      along: as given to `gram`.
    """
    if along == "all":
        return float(values)
    rows, columns = block.models[0].shape
    first = block.start // columns
    if along == "rows":
        values = values[first : first + rows, None]
    else:
        values = values[(first + np.arange(rows)) % values.shape[0]]
    return block.xp.asarray(values, block.xp.float32)


def mix(xp: Any, factors: Sequence[Any], vectors: Sequence[Any]) -> Any:
    """Sum of factors times vectors."""
    total = xp.multiply(vectors[0], factors[0])
    for factor, vector in zip(factors[1:], vectors[1:], strict=True):
        total = add(xp, total, xp.multiply(vector, factor))
    return total
