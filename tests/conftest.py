"""Strictness for every test: 8 simulated CPU devices, no silent promotion of ranks or dtypes."""

import contextlib
import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what the suite does and LLVM's optimization a third of that; no test times
# anything. ANISO_TEST_OPTIMIZED=1 compiles as users do.
if not os.environ.get("ANISO_TEST_OPTIMIZED"):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


MOST_MAPS = 40_000
"""Memory maps of this process from which on compiled programs are let go."""


@pytest.fixture(scope="module", autouse=True)
def programs_let_go():
    """XLA's CPU client maps each compiled program into memory several times, and Linux gives a
    process 65,530 maps (vm.max_map_count): the one after them is a segmentation fault."""
    yield
    with contextlib.suppress(OSError):  # where there is no /proc there is no such limit
        if Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPS:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def getkey():
    """A function that gives a fresh key at every call."""
    count = iter(range(1_000_000))
    return lambda: jax.random.key(next(count))
