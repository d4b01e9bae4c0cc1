import jax
import pytest

from lm import distributed
from lm.config import ConfigError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture
def cluster(monkeypatch):
    """Describes a cluster in the environment; returns what JAX is asked to join."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: joined.append(args))

    def describe(*values):
        for name, value in zip(NAMES, values, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        return joined

    return describe


def test_alone_by_default(cluster):
    joined = cluster(None, None, None)
    assert not distributed.initialize() and joined == []


def test_joins_what_the_environment_describes(cluster):
    joined = cluster("localhost:1234", "4", "3")
    assert distributed.initialize() and joined == [("localhost:1234", 4, 3)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("localhost:1", None, "0"), "set but not JAX_NUM_PROCESSES"),
        ((None, "2", None), "not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (("localhost:1", "two", "0"), "must be numbers, got 'two'"),
        (("localhost:1", "2", "2"), "JAX_PROCESS_ID 2 is not in"),
        (("localhost:1", "2", "-1"), "JAX_PROCESS_ID -1 is not in"),
    ],
)
def test_bad_description(cluster, values, message):
    joined = cluster(*values)
    with pytest.raises(ConfigError, match=message):
        distributed.initialize()
    assert joined == []
