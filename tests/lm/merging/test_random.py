"""Random numbers as a function of position."""

import numpy as np

from lm.merging.random import stream_key, uniform

KEY = stream_key(3, "dare_ties", 1, 0, "model.norm.weight")


def test_pieces_make_the_whole():
    whole = uniform(KEY, 0, 200_000)
    cuts = [0, 1, 7, 65_535, 65_536, 131_073, 200_000]
    parts = [uniform(KEY, a, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_positions_beyond_32_bits_are_other_numbers():
    start = (1 << 32) - 5
    across = uniform(KEY, start, 10)
    np.testing.assert_array_equal(across[5:], uniform(KEY, 1 << 32, 5))
    assert not np.isin(across[5:], uniform(KEY, 0, 5)).any()


def test_every_part_of_the_key_matters():
    keys = [
        stream_key(4, "dare_ties", 1, 0, "model.norm.weight"),
        stream_key(3, "dare_linear", 1, 0, "model.norm.weight"),
        stream_key(3, "dare_ties", 2, 0, "model.norm.weight"),
        stream_key(3, "dare_ties", 1, 1, "model.norm.weight"),
        stream_key(3, "dare_ties", 1, 0, "model.norm.bias"),
    ]
    n = 100_000
    mine = uniform(KEY, 0, n) - 0.5
    for key in keys:
        other = uniform(key, 0, n) - 0.5
        assert abs(np.corrcoef(mine, other)[0, 1]) < 4 / np.sqrt(n)


def test_uniform_and_independent():
    n = 1 << 20
    values = uniform(KEY, 0, n)
    assert 0 <= values.min() and values.max() < 1
    counts = np.histogram(values, 256, (0, 1))[0]
    chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert 160 < chi < 360  # 255 degrees of freedom: mean 255, standard deviation 22.6
    for lag in (1, 2, 32, 1024):
        assert abs(np.corrcoef(values[lag:], values[:-lag])[0, 1]) < 5 / np.sqrt(n)
    bits = (values * 2**24).astype(np.uint32)
    for bit in range(24):
        assert abs((bits >> bit & 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)
