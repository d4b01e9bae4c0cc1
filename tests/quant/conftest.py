"""An independent reference: the printed formulas in NumPy, rounding by ml_dtypes' casts."""

import math

import ml_dtypes
import numpy as np
import pytest

F = np.float32


def block_ids(shape, axis, block, block_2d):
    """For every element the number of its block."""
    axis %= len(shape)
    blocked = (len(shape) - 2, len(shape) - 1) if block_2d else (axis,)
    where = np.indices(shape)
    ids, count = np.zeros(shape, int), 1
    for i, n in enumerate(shape):
        here = where[i] // block if i in blocked else where[i]
        ids = ids * (-(-n // block) if i in blocked else n) + here
        count *= -(-n // block) if i in blocked else n
    return ids, count


def nvfp4(x, axis, block_2d=False):
    """Dequantized values, E2M1 codes of every element, E4M3 bytes of every element's block."""
    x = np.asarray(x).astype(F)
    ids, count = block_ids(x.shape, axis, 16, block_2d)
    amax = np.zeros(count, F)
    np.maximum.at(amax, ids.ravel(), np.abs(x).ravel())
    with np.errstate(all="ignore"):
        s_enc = min(F(2688) / amax.max(), np.finfo(F).max) if amax.max() > 0 else F(1)
        scale = np.minimum(amax * (s_enc * F(1 / 6)), F(448)).astype(ml_dtypes.float8_e4m3fn)
        back = F(1) / s_enc
        enc = np.minimum(F(1) / (scale.astype(F) * back), np.finfo(F).max)
        y = np.clip(x * enc[ids], F(-6), F(6))
    q = y.astype(ml_dtypes.float4_e2m1fn)
    return q.astype(F) * scale.astype(F)[ids] * back, q.view(np.uint8), scale.view(np.uint8)[ids]


def mxfp4(x, axis, rule, block_2d=False):
    """The same for MXFP4, with the exponent of the scale in place of its byte."""
    x = np.asarray(x).astype(F)
    ids, count = block_ids(x.shape, axis, 32, block_2d)
    amax = np.zeros(count)
    np.maximum.at(amax, ids.ravel(), np.abs(x).ravel())
    k = np.zeros(count, int)
    for i, a in enumerate(amax):
        if a == 0:
            k[i] = -127
        elif rule == "floor":
            k[i] = math.frexp(a)[1] - 1 - 2
        elif rule == "ceil":
            k[i] = next(k for k in range(-127, 128) if 6 * 2.0**k >= a)
        else:
            k[i] = next(k for k in range(127, -128, -1) if 2.0**k <= a * 2 / 7)
    scale = 2.0 ** k[ids]
    q = np.clip(x / scale, -6, 6).astype(F).astype(ml_dtypes.float4_e2m1fn)
    return (q.astype(float) * scale).astype(F), q.view(np.uint8), k[ids]


@pytest.fixture(scope="session")
def reference():
    return {"nvfp4": nvfp4, "mxfp4": mxfp4}


@pytest.fixture(scope="session")
def codes_of():
    """Unpack the E2M1 codes of a QArray: low half of a byte first."""

    def unpack(q):
        codes = np.moveaxis(np.asarray(q.codes), q.axis, -1)
        pairs = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
        return np.moveaxis(pairs[..., : q.size], -1, q.axis)

    return unpack
