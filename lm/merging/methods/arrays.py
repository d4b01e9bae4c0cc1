"""Arithmetic that overwrites its first argument in NumPy and makes a new array elsewhere.

Methods are bound by memory traffic: writing into arrays that are already in the cache halves the
time of a merge. `a = multiply(xp, a, b)` reads the same for NumPy and for jax.numpy. The first
argument must be an array of the method's own (a delta, an intermediate), never a block's input.
"""

from typing import Any

import numpy as np

__all__ = ["add", "divide", "flat", "multiply"]


def add(xp: Any, a: Any, b: Any) -> Any:
    """a + b."""
    return np.add(a, b, out=_own(a)) if xp is np else xp.add(a, b)


def multiply(xp: Any, a: Any, b: Any) -> Any:
    """a * b; `b` may be a mask."""
    return np.multiply(a, b, out=_own(a)) if xp is np else xp.multiply(a, b)


def divide(xp: Any, a: Any, b: Any) -> Any:
    """a / b."""
    return np.divide(a, b, out=_own(a)) if xp is np else xp.divide(a, b)


def _own(a: Any) -> Any:
    """`a` to write into; NumPy gives scalars, which cannot be written, for tensors of no axes."""
    return a if isinstance(a, np.ndarray) else None


def flat(xp: Any, values: Any) -> Any:
    """The values as a contiguous vector."""
    return xp.reshape(np.ascontiguousarray(values) if xp is np else values, (-1,))


# Memory that is given back to the system after every block costs more page faults than the merge
# itself takes (4.2 instead of 1.1 ns per element of `linear`). glibc keeps freed blocks up to twice
# the size of the largest one that it ever saw freed, 32 MiB at most; elsewhere this does nothing.
del_large = np.empty(31 << 20, np.uint8)
del del_large
