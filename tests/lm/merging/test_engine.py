"""The engine with small methods of the test's own, against plain NumPy."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from lm.merging import blocks as blocks_module
from lm.merging import pieces
from lm.merging.engine import Options, merge
from lm.merging.manifest import Workplace
from lm.merging.pieces import outputs_of, pieces_of
from lm.merging.progress import Progress
from lm.merging.row_map import RowMap
from lm.merging.store import open_store
from lm.merging.store.writer import make_layout
from lm.merging.types import Job, MergeError, Method, Plan, Source, TensorInfo

SHAPES = {
    "big": (37, 53),
    "wide": (2, 301),
    "vector": (53,),
    "scalar": (),
    "cube": (3, 4, 5),
    "empty": (0, 4),
    "even": (16, 6),  # eight devices can share it
}


def add_deltas(block):
    total = block.base
    for delta, params in zip(block.deltas, block.per_model, strict=True):
        total = total + delta * np.float32(params["weight"])
    return total


def norms(blocks):
    """Uses both ways through the blocks."""
    first = [np.zeros(2)]
    for block in blocks():
        first.append(np.array([float((m.astype(np.float64) ** 2).sum()) for m in block.models]))
    again = list(blocks.map(lambda b: [float((m.astype(np.float64) ** 2).sum()) for m in b.models]))
    assert np.array_equal(np.sum(first[1:], 0), np.sum(again, 0))
    return np.sqrt(np.sum(first, 0))


def normalized(block):
    one, two = (m / np.float32(n) for m, n in zip(block.models, block.statistics, strict=True))
    return one + two


def dropped(block):
    return sum(m * (block.random(k) < 0.5) for k, m in enumerate(block.models))


def row_scaled(block):
    assert block.models[0].ndim == 2
    return block.models[0] - block.models[0].mean(1, keepdims=True)


def turned(block):
    assert block.models[0].shape == block.info.shape
    return np.flip(block.models[0], 0) if block.models[0].ndim else block.models[0]


def count_all(job_blocks):
    return sum(
        float(sum(b.map(lambda x: x.models[0].sum(dtype=np.float64)))) for _, b in job_blocks()
    )


def minus_total(block):
    return block.models[0] - np.float32(block.whole)


def several(block):
    found = {".sum": sum(block.models), ".sign": np.packbits(block.models[0] > 0)}
    return found | ({".count": np.array([2, 5], np.float32)} if block.start == 0 else {})


def several_outputs(info, count):
    return (
        TensorInfo(info.name + ".sum", info.shape, info.dtype),
        TensorInfo(info.name + ".sign", ((info.size + 7) // 8,), "uint8"),
        TensorInfo(info.name + ".count", (count,), "float32"),
    )


METHODS = {
    "add": Method("add", add_deltas),
    "norm": Method("norm", normalized, measure=norms),
    "drop": Method("drop", dropped),
    "row": Method("row", row_scaled, scope="row"),
    "turn": Method("turn", turned, scope="tensor"),
    "survey": Method("survey", minus_total, survey=count_all),
    "many": Method("many", several, many=True, outputs=several_outputs),
    "passthrough": Method("passthrough", lambda block: block.models[0]),
}


@pytest.fixture
def inputs(tmp_path, tools, rng):
    tensors = []
    for name in ("base", "a", "b"):
        values = {n: rng.standard_normal(s, np.float32) for n, s in SHAPES.items()}
        values = {
            n: np.asarray(v, np.float32).astype(ml_dtypes.bfloat16) for n, v in values.items()
        }
        values["steps"] = np.arange(5)
        tools.write_model(tmp_path / name, values, shards=2 if name == "a" else 1)
        tensors.append(values)
    return tmp_path, tensors


def make_plan(folder, method, dtype="float32", names=SHAPES, **changes):
    base = Source(0, "", {}) if method == "add" else None
    jobs = tuple(
        Job(
            output=name,
            shape=SHAPES.get(name, (5,)),
            dtype=dtype if name in SHAPES else "int64",
            method=method if name in SHAPES else "passthrough",
            sources=(Source(1, name, {"weight": 0.5}), Source(2, name, {"weight": -0.25})),
            base=dataclasses.replace(base, name=name) if base else None,
            params={},
        )
        for name in names
    )
    models = tuple(str(folder / name) for name in ("base", "a", "b"))
    return Plan(models, jobs, {}, {}, 7, "mergekit", "f" + method, **changes)


def run(plan, out, shard_size=10**9, **options):
    methods = [METHODS[job.method] for job in plan.jobs]
    stores = [open_store(model) for model in plan.models]
    outputs, _ = outputs_of(plan, methods)
    layout = make_layout(outputs, shard_size, {})
    place = Workplace(out, layout, outputs, pieces_of(plan, methods), {"plan": plan.fingerprint})
    try:
        merge(plan, stores, methods, place, Options(**options), Progress(0))
        place.complete(plan.files, {})
    finally:
        place.close()
    return out


def as_float(values):
    return [{n: v.astype(np.float32) for n, v in each.items()} for each in values]


def test_each_kind_of_method(inputs, tools, tmp_path):
    folder, tensors = inputs
    base, a, b = as_float(tensors)
    total = sum(float(a[n].astype(np.float64).sum()) for n in SHAPES)
    expected = {
        "add": lambda n: base[n] + 0.5 * (a[n] - base[n]) - 0.25 * (b[n] - base[n]),
        "norm": lambda n: (
            a[n] / max(np.linalg.norm(a[n].astype(float)), 1e-30)
            + b[n] / max(np.linalg.norm(b[n].astype(float)), 1e-30)
        ),
        "row": lambda n: a[n] - (a[n].mean(-1, keepdims=True) if a[n].ndim else a[n]),
        "turn": lambda n: a[n][::-1] if a[n].ndim else a[n],
        "survey": lambda n: a[n] - np.float32(total),
    }
    for method, reference in expected.items():
        got = tools.read_output(run(make_plan(folder, method), tmp_path / f"out-{method}"))
        assert set(got) == set(SHAPES)
        for name in SHAPES:
            np.testing.assert_allclose(
                got[name], reference(name), rtol=1e-5, atol=1e-5, err_msg=f"{method} {name}"
            )


@pytest.mark.parametrize("method", ["add", "norm", "drop", "row", "turn", "survey", "many"])
def test_bytes_do_not_depend_on_threads_pieces_or_blocks(
    inputs, tools, tmp_path, monkeypatch, method
):
    folder, _ = inputs
    names = [*SHAPES, "steps"] if method != "many" else ["big", "wide", "cube", "steps"]
    plan = make_plan(folder, method, "bfloat16", names)
    reference = tools.digest(run(plan, tmp_path / "reference", jobs=1))
    reference.pop("merge_manifest.json")
    for jobs, block, piece, whole in [(1, 64, 128, 1), (4, 1000, 1 << 22, 10**9), (3, 7, 21, 1)]:
        monkeypatch.setattr(pieces, "PIECE", piece)
        out = tmp_path / f"{jobs}-{block}"
        got = tools.digest(run(plan, out, jobs=jobs, block=block, memory=whole))
        got.pop("merge_manifest.json")
        assert got == reference


def test_shards_change_the_files_but_no_tensor(inputs, tools, tmp_path):
    folder, _ = inputs
    plan = make_plan(folder, "drop", "bfloat16")
    one = tools.read_output(run(plan, tmp_path / "one"))
    many = run(plan, tmp_path / "many", shard_size=1000)
    assert len(list(many.glob("*.safetensors"))) >= 3
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    for name, value in tools.read_output(many).items():
        np.testing.assert_array_equal(value.view(np.uint16), one[name].view(np.uint16))


def test_several_results_of_a_method_are_tensors_of_their_own(inputs, tools, tmp_path):
    folder, (_, a, b) = inputs
    plan = make_plan(folder, "many", "bfloat16", ["big", "steps"])
    got = tools.read_output(run(plan, tmp_path / "out"))
    assert set(got) == {"big.sum", "big.sign", "big.count", "steps"}
    one, two = a["big"].astype(np.float32), b["big"].astype(np.float32)
    np.testing.assert_array_equal(got["big.sum"], (one + two).astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(got["big.sign"], np.packbits(one.reshape(-1) > 0))
    np.testing.assert_array_equal(got["big.count"], [2, 5])
    np.testing.assert_array_equal(got["steps"], np.arange(5))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_in_an_input_is_named_and_may_be_allowed(tools, tmp_path, rng, bad):
    for name in ("base", "a", "b"):
        values = {n: np.asarray(rng.standard_normal(s), np.float32) for n, s in SHAPES.items()}
        if name == "b":
            values["big"][30, 11] = bad
        tools.write_model(tmp_path / name, values)
    plan = make_plan(tmp_path, "add")
    with pytest.raises(MergeError, match=r"big of .*/b holds NaN or infinity"):
        run(plan, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    out = run(plan, tmp_path / "allowed", allow_nonfinite=True)
    got = tools.read_output(out)["big"]
    assert not np.isfinite(got[30, 11]) and np.isfinite(got).sum() == got.size - 1


def test_a_result_that_overflows_or_breaks_is_named(inputs, tmp_path, monkeypatch):
    folder, _ = inputs
    plan = make_plan(folder, "huge", "float16")
    monkeypatch.setitem(METHODS, "huge", Method("huge", lambda b: b.models[0] * 1e5))
    with pytest.raises(MergeError, match="do not fit into float16"):
        run(plan, tmp_path / "one")
    monkeypatch.setitem(METHODS, "huge", Method("huge", lambda b: b.models[0] / 0))
    with pytest.raises(MergeError, match="the method huge gave NaN or infinity"):
        run(plan, tmp_path / "two")
    monkeypatch.setitem(METHODS, "huge", Method("huge", lambda b: b.models[0][1:]))
    with pytest.raises(MergeError, match="the method huge gave"):
        run(plan, tmp_path / "three")


def test_an_error_of_a_method_stops_everything(inputs, tmp_path, monkeypatch):
    folder, _ = inputs

    def fail(block):
        if block.info.name == "wide":
            raise RuntimeError("broken on purpose")
        return block.models[0]

    monkeypatch.setitem(METHODS, "fail", Method("fail", fail))
    with pytest.raises(RuntimeError, match="broken on purpose"):
        run(make_plan(folder, "fail"), tmp_path / "out", jobs=3)


def test_a_rearranged_vocabulary(inputs, tools, tmp_path):
    folder, tensors = inputs
    base, a, b = as_float(tensors)
    rows = np.array([3, 4, 5, -1, 0, -2], np.int32)
    made = (((2, 7), (2, 8)), ())  # the mean of two rows of the base, and zeros
    transform = RowMap((rows, rows, rows), made, padding=2)
    job = make_plan(folder, "add", names=["big"]).jobs[0]
    plan = dataclasses.replace(
        make_plan(folder, "add"),
        jobs=(dataclasses.replace(job, shape=(8, 53), transform=transform),),
    )
    got = tools.read_output(run(plan, tmp_path / "out", block=60))["big"]

    def arranged(own):
        first = np.stack(
            [own[3], own[4], own[5], (base["big"][7] + base["big"][8]) / 2, own[0], 0 * own[0]]
        )
        return np.concatenate([first, np.tile(first.mean(0), (2, 1))])

    x, y, z = (arranged(t["big"]) for t in (base, a, b))
    np.testing.assert_allclose(got, x + 0.5 * (y - x) - 0.25 * (z - x), rtol=1e-5, atol=1e-6)


def test_on_eight_devices(inputs, tools, tmp_path, monkeypatch):
    folder, _ = inputs
    assert len(jax.devices("cpu")) == 8
    seen = set()

    def spread(block):
        seen.add((block.xp.__name__, len(block.models[0].sharding.device_set)))
        split = block.models[0].sharding.is_fully_replicated
        seen.add(("replicated", split))
        return add_deltas(block)

    plan = make_plan(folder, "add", "bfloat16")
    expected = tools.read_output(run(plan, tmp_path / "numpy"))
    monkeypatch.setitem(METHODS, "add", Method("add", spread))
    got = tools.read_output(run(plan, tmp_path / "jax", device="cpu"))
    assert ("jax.numpy", 8) in seen and ("replicated", False) in seen
    for name in SHAPES:
        np.testing.assert_array_equal(got[name].view(np.uint16), expected[name].view(np.uint16))
    drop = make_plan(folder, "drop")
    one, two = (
        tools.read_output(run(drop, tmp_path / f"drop{device}", device=device))
        for device in (None, "cpu")
    )
    for name in SHAPES:
        np.testing.assert_array_equal(one[name], two[name])


def test_unknown_devices_are_told(inputs, tmp_path):
    with pytest.raises(MergeError, match="--device tpu"):
        run(make_plan(inputs[0], "add"), tmp_path / "out", device="tpu")


def test_spans_cover_everything_in_whole_units():
    spans = blocks_module.spans_of(1000, 64, 30)
    assert spans[0] == (0, 60) and spans[-1] == (960, 1000)
    assert [a for a, _ in spans[1:]] == [b for _, b in spans[:-1]]
    assert blocks_module.spans_of(90, 7, 30) == [(0, 30), (30, 60), (60, 90)]
    assert blocks_module.spans_of(0, 7) == [(0, 0)]
