"""Between the files' number formats and float32, and the search for NaN and infinity.

These passes over memory take most of the tool's time, so each writes into a given buffer and works
on pieces that stay in the processor's cache. bfloat16 and float8 go through ml_dtypes, whose loops
are vectorized, round to nearest even, keep NaN and release the GIL. NumPy's float16 -> float32 is
a table of branches, about four times slower than the arithmetic on bits below.
"""

from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 and float8 with NumPy
import numpy as np

__all__ = ["all_finite", "dtype_of", "from_float32", "is_float", "resolution", "to_float32"]

_FLOATS = {
    "bfloat16": 8,
    "float16": 11,
    "float32": 24,
    "float64": 53,
    "float8_e4m3fn": 4,
    "float8_e5m2": 3,
    "float8_e4m3fnuz": 4,
    "float8_e5m2fnuz": 3,
}
"""Formats that can be merged, with the bits of their significands (the implicit one counted)."""
_EXPONENTS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_SCALE = np.float32(2.0**112)


def dtype_of(name: str) -> np.dtype:
    """NumPy's dtype of a name of `TensorInfo`."""
    return np.dtype(name)


def is_float(dtype: Any) -> bool:
    """Whether tensors of this dtype are merged; others (integers, flags) are only copied."""
    return np.dtype(dtype).name in _FLOATS


def resolution(dtype: Any) -> float:
    """Spacing of the numbers of this dtype between 1 and 2: 2^-7 for bfloat16."""
    return 2.0 ** (1 - _FLOATS[np.dtype(dtype).name])


def to_float32(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Flat `values` of any number format as float32 in the buffer `out`; exact up to 24 bits."""
    out = out[: values.size]
    if values.dtype != np.float16:
        np.copyto(out, values, casting="unsafe")
        return out
    # Exponent and fraction of a half, moved to their places in a float32, read 2^112 too small;
    # the product puts that right, subnormal halves included. The sign arrives by sign extension.
    bits = out.view(np.int32)
    np.copyto(bits, values.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)
    np.multiply(out, _SCALE, out=out)
    if not all_finite(values):  # exponent 31 means infinity or NaN there, but 65536 here
        np.copyto(out, values)
    return out


def from_float32(values: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Flat float32 `values` in the format of the buffer `out`, rounded to nearest even."""
    out = out[: values.size]
    with np.errstate(over="ignore", invalid="ignore"):  # `all_finite` of the result tells
        np.copyto(out, values, casting="unsafe")
    return out


def all_finite(values: np.ndarray) -> bool:
    """Whether no element is NaN or infinite. Reads bits only: nothing is written or allocated.

    Among bit patterns, positive infinities and NaNs are the largest signed integers and negative
    ones the largest unsigned integers.
    """
    if not values.size:
        return True
    name = values.dtype.name
    if name in _EXPONENTS:
        bits, width = _EXPONENTS[name], 8 * values.itemsize
        if values.view(f"i{values.itemsize}").max() >= bits:
            return False
        return bool(values.view(f"u{values.itemsize}").max() < bits + (1 << (width - 1)))
    if name not in _FLOATS:
        return True
    if values.itemsize == 1:
        values = values.astype(np.float32)
    return bool(np.isfinite(values).all())
