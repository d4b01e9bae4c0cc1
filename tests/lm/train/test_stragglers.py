"""Which process holds the others up, from numbers that nobody waits for."""

import pytest

from lm.train.stragglers import Stragglers


class Store:
    """The key-value store of jax.distributed, without a network."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def test_the_one_that_was_busy_longest_is_named():
    store = Store()
    for process, busy in ((1, 0.02), (2, 0.4), (3, 0.03)):
        assert Stragglers(store, process).report(100, 0.5, busy) == {}
    row = Stragglers(store, 0).report(100, 0.52, 0.01)
    assert row["hosts/slowest"] == 2 and row["hosts/behind"] == 0
    assert row["hosts/busy_seconds_max"] == 0.4
    assert row["hosts/busy_seconds_median"] == pytest.approx(0.025)
    assert row["hosts/step_seconds_max"] == 0.52 and row["hosts/step_seconds_median"] == 0.5


def test_who_has_stopped_reporting_shows():
    store = Store()
    others = Stragglers(store, 1), Stragglers(store, 2)
    for step in (10, 20, 30):
        others[0].report(step, 0.5, 0.1)
        if step == 10:
            others[1].report(step, 0.5, 0.1)
        row = Stragglers(store, 0).report(step, 0.5, 0.1)
    assert row["hosts/behind"] == 20


def test_alone_there_is_nothing_to_tell():
    assert Stragglers().report(1, 0.5, 0.1) == {}
