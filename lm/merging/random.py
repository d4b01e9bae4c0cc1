"""Random numbers that are a function of what they are for, not of when they are drawn.

Number i of a stream is a hash of (key, i), and the key a hash of (seed, method, model, tensor), so
the numbers do not depend on block sizes, threads, shards or devices. The hash is made of 32-bit
integer operations alone, three rounds of multiply and xor-shift with the key entering in each; its
multipliers are those of "triple32" (Chris Wellons, hash-prospector: bias 0.02 of the ideal limit).
NumPy's Philox takes nearly twice as long.
"""

import hashlib

import numpy as np

__all__ = ["stream_key", "uniform"]

Key = tuple[int, int, int]
_CHUNK = 1 << 16
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))


def stream_key(seed: int, method: str, model: int, occurrence: int, tensor: str) -> Key:
    """Key of the stream for one model in one tensor.

    Args:
      seed: of the whole merge.
      method: name of the merge method.
      model: the model's index in `Plan.models`.
      occurrence: how often that model came before among the sources of this tensor.
      tensor: name of the output tensor.
    """
    text = "\0".join((str(seed), method, str(model), str(occurrence), tensor))
    digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
    a, b, c = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8))
    return a, b, c


def uniform(key: Key, start: int, count: int) -> np.ndarray:
    """Numbers [start, start + count) of a stream: float32 [count], multiples of 2^-24 in [0, 1)."""
    out = np.empty(count, np.float32)
    bits = out.view(np.uint32)
    scratch = np.empty(min(count, _CHUNK), np.uint32)
    for first in range(0, count, _CHUNK):
        piece = bits[first : first + _CHUNK]
        _hash(key, start + first, piece, scratch[: piece.size])
        whole = scratch[: piece.size]
        np.right_shift(piece, 8, out=whole)
        numbers = out[first : first + _CHUNK]
        np.copyto(
            numbers, whole.view(np.int32), casting="unsafe"
        )  # signed: that conversion is vectorized
        np.multiply(numbers, np.float32(2.0**-24), out=numbers)
    return out


def _hash(key: Key, start: int, out: np.ndarray, scratch: np.ndarray) -> None:
    """Hashes of positions start, start + 1, ...; pieces that cross 2^32 are cut there."""
    low = start & 0xFFFFFFFF
    room = (1 << 32) - low
    if out.size > room:
        _hash(key, start + room, out[room:], scratch[room:])
        out, scratch = out[:room], scratch[:room]
    # The upper half of a position goes into the keys: a tensor may have more than 2^32 elements.
    high = (start >> 32) * 0x9E3779B9
    np.add(_steps()[: out.size], np.uint32(low), out=out)
    for number, ((shift, factor), word) in enumerate(zip(_ROUNDS, key, strict=True)):
        np.bitwise_xor(out, np.uint32((word + high * (number + 1)) & 0xFFFFFFFF), out=out)
        np.right_shift(out, shift, out=scratch)
        np.bitwise_xor(out, scratch, out=out)
        np.multiply(out, np.uint32(factor), out=out)
    np.right_shift(out, 14, out=scratch)
    np.bitwise_xor(out, scratch, out=out)


_STEPS: list[np.ndarray] = []


def _steps() -> np.ndarray:
    if not _STEPS:
        _STEPS.append(np.arange(_CHUNK, dtype=np.uint32))
    return _STEPS[0]
