"""What is refused, or warned about, before any work."""

import dataclasses
import itertools
import shutil

import ml_dtypes
import numpy as np
import pytest

from lm.merging import preflight
from lm.merging.store import open_store
from lm.merging.store.writer import make_layout
from lm.merging.types import Job, MergeError, Method, Plan, Source, StorageError, TensorInfo

PLAIN = Method("plain", lambda block: block.models[0])
WHOLE = Method("whole", lambda block: block.models[0], scope="tensor")


@pytest.fixture
def plan(tmp_path, tools, rng):
    """A base in bfloat16 with models that differ by 0, 1e-5 and .01, and one of other shapes."""
    base = (0.02 * rng.standard_normal((64, 100))).astype(np.float32)
    for name, step in (("base", 0), ("same", 0), ("near", 1e-5), ("far", 0.01)):
        value = base + step * rng.standard_normal(base.shape)
        tools.write_model(tmp_path / name, {"w": value.astype(ml_dtypes.bfloat16)})
    tools.write_model(tmp_path / "other", {"w": np.ones((3, 4), np.float32), "n": np.arange(3)})
    names = ("base", "same", "near", "far", "other")
    sources = tuple(Source(k, "w") for k in (1, 2, 3))
    job = Job("w", (64, 100), "bfloat16", "plain", sources, Source(0, "w"), {})
    models = tuple(str(tmp_path / name) for name in names)
    return Plan(models, (job,), {}, {}, 0, "mergekit", "x")


def stores(plan):
    return [open_store(model) for model in plan.models]


def test_differences_below_the_resolution_are_warned_of(plan):
    lines = preflight.lost_deltas(plan, stores(plan))
    assert len(lines) == 2
    assert "same does not differ" in lines[0]
    assert "near differs from the base by" in lines[1] and "bfloat16" in lines[1]


def with_source(plan, source, **changes):
    job = dataclasses.replace(plan.jobs[0], sources=(source,), **changes)
    return dataclasses.replace(plan, jobs=(job,))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source(4, "w"), r"w of .*other is \[3, 4\], not \[64, 100\]"),
        (Source(1, "v"), "same lacks v"),
    ],
)
def test_tensors_that_do_not_fit(plan, source, words):
    with pytest.raises(MergeError, match=words):
        preflight.check_jobs(with_source(plan, source), stores(plan), [PLAIN])
    preflight.check_jobs(plan, stores(plan), [PLAIN])


def test_integers_are_no_floats(plan):
    job = Job("n", (3,), "float32", "plain", (Source(4, "n"),), None, {})
    with pytest.raises(MergeError, match="n of .*other is int64, not float32"):
        preflight.check_jobs(
            dataclasses.replace(plan, jobs=(job,)),
            stores(plan),
            [dataclasses.replace(PLAIN, base="none")],
        )


def test_a_method_without_its_base(plan):
    bare = with_source(plan, Source(1, "w"), base=None)
    with pytest.raises(MergeError, match="needs a base_model"):
        preflight.check_jobs(bare, stores(plan), [PLAIN])


def test_a_disk_that_is_too_small(plan, tmp_path):
    huge = TensorInfo("w", (1 << 40, 1 << 10), "float32")
    with pytest.raises(StorageError, match="TB"):
        preflight.check_disk(tmp_path / "a" / "b", make_layout([huge], 1 << 62, {}))
    small = TensorInfo("w", (1,), "float32")
    preflight.check_disk(tmp_path / "a" / "b", make_layout([small], 1 << 62, {}))


def test_files_that_are_there_already_need_no_room(tmp_path, monkeypatch):
    """On a disk that the interrupted merge has filled, wherever its files are by now."""
    infos = [TensorInfo(name, (5000,), "float32") for name in "ab"]
    layout = make_layout(infos, 1, {})
    folders = tmp_path / "out" / preflight.PARTIAL, tmp_path / "out"
    folders[0].mkdir(parents=True)
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match="10 kB free"):
        preflight.check_disk(tmp_path / "out", layout)
    for folder, shard in zip(folders, layout.shards, strict=True):
        (folder / shard.name).write_bytes(bytes(shard.size))
    preflight.check_disk(tmp_path / "out", layout)


def test_memory_grows_with_threads_and_whole_tensors(plan):
    few = preflight.estimate_memory(plan, [PLAIN], 1)
    many = preflight.estimate_memory(plan, [PLAIN], 8)
    assert few < many < 300e6
    assert preflight.check_memory(plan, [PLAIN], many, 8) == 8
    assert 1 <= preflight.check_memory(plan, [PLAIN], (few + many) // 2, 8) < 8
    big = with_source(plan, Source(1, "w"), shape=(100_000, 10_000))
    with pytest.raises(MergeError, match=r"w is needed as a whole \(24 GB\); allow at least"):
        preflight.check_memory(big, [WHOLE], 10**9, 2)
    assert preflight.check_memory(big, [PLAIN], 10**9, 2) == 2


def test_the_time_is_estimated_by_the_faster_of_two_trials(plan, monkeypatch):
    ticks = itertools.cycle([0.0, 9.0, 20.0, 21.0])
    monkeypatch.setattr(preflight.time, "perf_counter", lambda: next(ticks))
    seconds = preflight.estimate_seconds(plan, stores(plan), [PLAIN], 2)
    larger = with_source(plan, Source(1, "w"))
    larger = dataclasses.replace(larger, jobs=larger.jobs * 1000)
    assert seconds == 1 / 2
    assert preflight.estimate_seconds(larger, stores(plan), [PLAIN] * 1000, 2) == 1000 / 2
