"""A small text, a tiny run on it, and how to read back what a run left."""

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.config import ModelConfig
from lm.train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    RunConfig,
)

# Measurements, which differ from run to run; everything else in a row must not.
MEASURED = {"tokens_per_second", "step_seconds", "data_wait_seconds", "memory_bytes"}
MEASURED |= {"time", "goodput", "seconds"}


def pytest_collection_finish():
    """What is imported by now stays; tracing makes garbage faster than it is worth looking for."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 40 text files, 60 kB together."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshr"), rng.integers(1, 8))) for _ in range(200)]
    for i in range(40):
        text = " ".join(words[j] for j in rng.zipf(1.5, 300) % 200)
        (folder / f"{i:02d}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a process that trains: the caches of this test session.

    As many devices as here, for they are part of the name of a compiled program in the cache.
    """
    cache = tmp_path_factory.mktemp("cache")
    return os.environ | {
        "ANISO_CACHE": str(cache),
        "JAX_NUM_CPU_DEVICES": str(jax.config.jax_num_cpu_devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }


@pytest.fixture(scope="session", autouse=True)
def compiled_once(environment):
    """This process shares the compilation cache of its children, and none with earlier sessions."""
    from jax.experimental.compilation_cache import compilation_cache

    before = {
        "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
        "jax_persistent_cache_min_compile_time_secs": (
            jax.config.jax_persistent_cache_min_compile_time_secs
        ),
    }
    jax.config.update("jax_compilation_cache_dir", environment["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def tiny_run(corpus, environment, compiled_once):
    """A function that makes the configuration of 12 steps on one device, in a given folder."""

    def make(out, **changes) -> RunConfig:
        config = RunConfig(
            recipe="tiny",
            out=str(out),
            steps=12,
            batch_size=8,
            sequence_length=32,
            model=ModelConfig(
                vocab_size=264,
                num_layers=2,
                d_model=32,
                num_heads=2,
                d_ff=64,
                max_context=64,
                dtype="float32",
            ),
            data=DataConfig(
                source="text",
                path=str(corpus),
                valid_fraction=0.2,
                cache=environment["ANISO_CACHE"],
                workers=1,
            ),
            optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
            mesh=MeshConfig(data=1),
            checkpoint=CheckpointConfig(every=4, keep=3),
            eval=EvalConfig(every=6, batches=2),
            log=LogConfig(every=1, progress=False),
            sample_prompt="",
        )
        for name, value in changes.items():
            group, dot, field = name.partition("__")
            if dot:
                value = dataclasses.replace(getattr(config, group), **{field: value})
            config = dataclasses.replace(config, **{group: value})
        return config

    return make


@pytest.fixture(scope="session")
def rows_of():
    """A function that reads the rows of a run's metrics.jsonl, without what is measured."""

    def read(out) -> list[dict]:
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        measured = lambda key: key.partition("/")[0] in MEASURED  # noqa: E731
        return [{k: v for k, v in row.items() if not measured(k)} for row in rows]

    return read


@pytest.fixture(scope="session")
def losses_of(rows_of):
    """A function: {step: loss} and {step: eval_loss} of a run."""

    def read(out) -> tuple[dict[int, float], dict[int, float]]:
        rows = rows_of(out)
        return tuple({r["step"]: r[k] for r in rows if k in r} for k in ("loss", "eval_loss"))

    return read


@pytest.fixture(scope="session")
def state_of():
    """A function that reads the bytes of every array in a checkpoint (default: the newest)."""
    from lm.train.checkpoint import Checkpoints

    def read(out, step: int | None = None) -> dict[str, bytes]:
        folder = Path(out) / "checkpoints"
        with Checkpoints(folder, read_only=True) as checkpoints:
            step = checkpoints.latest() if step is None else step
            header = json.loads((folder / f"{step:08d}" / "checkpoint.json").read_bytes())
            abstract = {
                name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
                for name, leaf in header["leaves"].items()
            }
            _, state, _ = checkpoints.restore(abstract, step)
        return {name: np.asarray(leaf).tobytes() for name, leaf in state.items()}

    return read


@pytest.fixture(scope="session")
def finished(tiny_run, tmp_path_factory):
    """A finished run of `tiny_run`'s configuration, to look into and to copy, never to change."""
    from lm.train.loop import train

    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_run(out))
    return out
