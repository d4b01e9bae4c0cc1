"""Peak memory, as the system counts it, does not grow with the models."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

SCRIPT = """
import resource
from lm.cli.merge import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
# The counter of a child begins with the peak of its parent (Linux keeps it across exec), and pytest
# may have had much: a small shell in between is the parent.
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tools):
    """The same model in two sizes: 9 and 90 MB, the larger with one tensor of 60 MB."""
    folder = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)
    for size, rows in (("small", 3_000), ("large", 30_000)):
        shapes = {"embed.weight": (rows, 1000)}
        shapes |= {f"layers.{n}.weight": (rows // 20, 1000) for n in range(10)}
        for name in ("base", "a", "b"):
            tensors = {
                key: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
                for key, shape in shapes.items()
            }
            tools.write_model(folder / size / name, tensors, shards=3, config=None)
    return folder


def peak(tools, folder, method, *words):
    config = tools.write_config(folder, method)
    words = (config, folder / f"out-{method}", "--quiet", "--jobs", "2", *words)
    done = subprocess.run(
        [*SHELL, sys.executable, "-c", SCRIPT, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tools.root)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss in KiB")
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_ten_times_the_model_takes_the_same_memory(models, tools, method):
    small = peak(tools, models / "small", method)
    large = peak(tools, models / "large", method)
    assert large < 200e6
    # Thresholds keep samples and candidates of a tensor, which grow a little with it.
    assert large - small < 30e6


def test_one_huge_shard_needs_no_buffer(models, tools):
    assert peak(tools, models / "large", "task_arithmetic", "--out-shard-size", "1GB") < 200e6
