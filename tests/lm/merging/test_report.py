"""The report against NumPy in float64, and the page as a browser would read it."""

import html.parser
import json
import re
import tracemalloc
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from lm.merging.report import describe, layer_of, write_report
from lm.merging.row_map import RowMap
from lm.merging.session import Session
from lm.merging.store import open_store
from lm.merging.types import Job, MergeError, Plan, Source


def merged(folder, tools, method="ties", **changes):
    """A finished merge: session, the report, names of the models."""
    config = tools.write_config(folder, method, **changes)
    session = Session(config, folder / "out", jobs=2, say=lambda _: None)
    session.run()
    result = open_store(str(folder / "out"))
    return SimpleNamespace(
        session=session, result=result, report=describe(session.plan, session.stores, result)
    )


def named(entries):
    return {entry["name"]: entry for entry in entries}


def norm(values):
    return float(np.sqrt(np.square(values).sum()))


def expected(base, models, result):
    """The numbers of a report from float64 arrays of any shape; result in its own type."""
    deltas = {name: value - base for name, value in models.items()}
    first, second = deltas.values()
    changed = (first != 0) | (second != 0)
    rounded = base.astype(result.dtype)
    out = result.astype(np.float64)
    inputs = {**models, "base": base}
    return {
        "relative_delta": {name: norm(delta) / norm(base) for name, delta in deltas.items()},
        "cosine": float((first * second).sum()) / norm(first) / norm(second),
        "sign_conflict": np.sum(first * second < 0) / np.sum(changed),
        "kept": np.sum((rounded != result) & changed) / np.sum(changed),
        "drift": {name: norm(out - value) / norm(value) for name, value in inputs.items()},
    }


def compare(entry, wanted, folder):
    for key in ("relative_delta", "drift"):
        got = {name.removeprefix(f"{folder}/"): value for name, value in entry[key].items()}
        assert got == pytest.approx(wanted[key], rel=2e-6), key
    (pair,) = entry["cosines"]
    assert pair["of"] == "task vectors"
    assert pair["cosine"] == pytest.approx(wanted["cosine"], abs=1e-6)
    for key in ("sign_conflict", "kept"):
        assert entry[key] == pytest.approx(wanted[key], rel=1e-12), key


@pytest.fixture
def wide(tmp_path, tools, rng):
    """A family with a tensor of several blocks, float32 and bfloat16 files, sparse changes."""
    base = tools.llama_tensors(rng, np.float32, layers=2)
    base["model.embed_tokens.weight"] = rng.standard_normal((400, 500), np.float32)
    tensors = {"base": base}
    for name, dtype in (("a", np.float32), ("b", ml_dtypes.bfloat16)):
        tensors[name] = {
            key: (
                value + 0.1 * rng.standard_normal(value.shape) * (rng.random(value.shape) < 0.6)
            ).astype(dtype)
            for key, value in base.items()
        }
    for name, values in tensors.items():
        tools.write_model(tmp_path / name, values)
    return SimpleNamespace(folder=tmp_path, tensors=tensors)


def test_every_number_against_numpy(wide, tools):
    made = merged(wide.folder, tools, "ties", dtype="bfloat16")
    output = tools.read_output(wide.folder / "out")
    doubles = {
        name: {key: value.astype(np.float64) for key, value in tensors.items()}
        for name, tensors in wide.tensors.items()
    }

    def check(entry, names):
        def joined(tensors):
            return np.concatenate([tensors[name].reshape(-1) for name in names])

        base = joined(doubles["base"])
        assert entry["elements"] == base.size
        models = {name: joined(doubles[name]) for name in ("a", "b")}
        compare(entry, expected(base, models, joined(output)), wide.folder)

    for name, entry in named(made.report["tensors"]).items():
        check(entry, [name])
        assert entry["shape"] == list(output[name].shape) and entry["method"] == "ties"
    layers = named(made.report["layers"])
    inside = [name for name in output if name.startswith("model.layers.1.")]
    check(layers["model.layers.1"], inside)
    check(made.report["model"], list(output))
    assert list(layers) == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    # Trimming to half of what differs (nine tenths and more) must show.
    assert 0.3 < made.report["model"]["kept"] < 0.95


def test_the_same_to_the_last_bit_for_any_number_of_threads(wide, tools):
    made = merged(wide.folder, tools)
    plan, stores = made.session.plan, made.session.stores
    for jobs in (1, 5):
        assert describe(plan, stores, made.result, jobs) == made.report


def test_without_a_base_only_models_and_drift(family, tools):
    made = merged(family.folder, tools, "linear")
    whole = made.report["model"]
    assert set(whole) == {"elements", "cosines", "drift"}
    a, b = (
        np.concatenate([v.astype(np.float64).reshape(-1) for v in family.tensors[name].values()])
        for name in ("a", "b")
    )
    (pair,) = whole["cosines"]
    assert pair["of"] == "models"
    assert pair["cosine"] == pytest.approx((a * b).sum() / norm(a) / norm(b), abs=1e-6)
    assert set(whole["drift"]) == {str(family.folder / name) for name in ("a", "b")}


def test_signs_and_kept_of_a_case_done_by_hand(tmp_path, tools):
    base = np.array([1, 1, 1, 1, 1, 1, 1, 1], np.float32)
    steps = {"a": [0.5, 0.5, -0.5, 0, 0, 0.5, 0, 0], "b": [0.5, -0.5, 0.5, 0, 0.5, 0, 0, 0]}
    for name, step in {"base": 0 * base, **steps}.items():
        tools.write_model(tmp_path / name, {"w": base + np.array(step, np.float32)})
    made = merged(tmp_path, tools, "task_arithmetic", dtype="float32")
    whole = made.report["model"]
    assert whole["sign_conflict"] == 2 / 5  # elements 1 and 2 of 0, 1, 2, 4, 5
    assert whole["kept"] == 3 / 5  # 1 and 2 cancel
    (pair,) = whole["cosines"]
    assert pair["cosine"] == pytest.approx(-1 / 4, abs=1e-7)
    assert whole["relative_delta"][str(tmp_path / "a")] == pytest.approx((1 / 8) ** 0.5)


def test_a_model_that_comes_twice_and_what_has_no_number(family, tools):
    a = str(family.folder / "a")
    source = {"parameters": {"weight": 0.5}}
    sources = [source | {"model": a, "layer_range": [n, n + 1]} for n in (0, 1)]
    made = merged(family.folder, tools, "linear", models=[], slices=[{"sources": sources}])
    layer = named(made.report["layers"])["model.layers.0"]
    assert list(layer["drift"]) == [a, f"{a} (2)"]
    same = merged_same(family, tools)
    (pair,) = same["cosines"]
    assert pair["cosine"] is None and same["sign_conflict"] is None and same["kept"] is None
    assert set(same["relative_delta"].values()) == {0.0}


def merged_same(family, tools):
    """Report of the base merged with two copies of itself: nothing differs."""
    for name in ("copy", "other"):
        tools.write_model(family.folder / name, family.tensors["base"])
    config = tools.write_config(family.folder, "ties", names=("copy", "other"))
    session = Session(config, family.folder / "same", say=lambda _: None)
    session.run()
    result = open_store(str(family.folder / "same"))
    return describe(session.plan, session.stores, result)["model"]


def test_damaged_numbers_are_null_and_the_json_is_strict(family, tools):
    sick = dict(family.tensors["a"])
    sick["model.norm.weight"] = np.full_like(sick["model.norm.weight"], np.nan)
    tools.write_model(family.folder / "sick", sick)
    config = tools.write_config(family.folder, "ties", names=("sick", "b"))
    session = Session(config, family.folder / "out", say=lambda _: None)
    report = describe(session.plan, session.stores)
    write_report(report, family.folder / "report")
    text = (family.folder / "report" / "report.json").read_text()

    def refuse(name):
        raise AssertionError(name)

    tensor = named(json.loads(text, parse_constant=refuse)["tensors"])["model.norm.weight"]
    assert tensor["relative_delta"][str(family.folder / "sick")] is None
    assert tensor["relative_delta"][str(family.folder / "b")] > 0
    assert "drift" not in tensor


def test_rearranged_vocabularies_and_compressed_results(memory_store, rng):
    arrays = [rng.standard_normal((n, 4)).astype(np.float32) for n in (5, 3, 5)]
    stores = [memory_store(str(k), {"e": value}) for k, value in enumerate(arrays)]
    rows = [np.array(r, np.int32) for r in ([0, 1, 4], [2, 0, 1], [0, 1, 4])]
    transform = RowMap(tuple(rows))
    sources = (Source(0, "e"), Source(1, "e"))
    job = Job("e", (3, 4), "float32", "linear", sources, Source(2, "e"), {}, transform=transform)
    ids = Job("ids", (2,), "int32", "passthrough", (Source(0, "ids"),), None, {})
    plan = Plan(("0", "1", "2"), (job, ids), {}, {}, 0, "paper", "x")
    a, b, base = (value[r].astype(np.float64) for value, r in zip(arrays, rows, strict=True))
    merged_values = ((a + b) / 2).astype(np.float32)
    report = describe(plan, stores, memory_store("out", {"e": merged_values}))
    whole = report["model"]
    assert whole["relative_delta"]["0"] == pytest.approx(norm(a - base) / norm(base))
    assert whole["drift"]["1"] == pytest.approx(norm(merged_values - b) / norm(b))
    assert report["copied"] == ["ids"]
    # A compressed output has no tensor of that name: what is known of the inputs is told.
    compressed = describe(plan, stores, memory_store("out", {"e.sign.0": merged_values}))
    assert "drift" not in compressed["model"] and compressed["model"]["relative_delta"]


def test_memory_does_not_grow_with_the_tensor(memory_store):
    def peak(elements):
        values = np.ones(elements, np.float32)
        stores = [memory_store(str(k), {"w": values}) for k in range(3)]
        for store in stores:
            store.will_need = lambda *_: None
        job = Job("w", (elements,), "float32", "linear", (Source(0, "w"), Source(1, "w")), None, {})
        plan = Plan(("0", "1"), (job,), {}, {}, 0, "paper", "x")
        tracemalloc.start()
        report = describe(plan, stores[:2], stores[2])
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report["model"]["elements"] == elements
        return used

    peak(1 << 20)
    small, large = peak(1 << 21), peak(1 << 24)
    assert large < 1.5 * small and large < 4 << 24  # less than one of the three tensors


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.3.mlp.experts.7.w1.weight", "model.layers.3"),
        ("transformer.h.11.ln_1.bias", "transformer.h.11"),
        ("lm_head.weight", "lm_head"),
        ("scale", "scale"),
    ],
)
def test_layers_of_names(tensor, layer):
    assert layer_of(tensor) == layer


class Page(html.parser.HTMLParser):
    """Elements with attributes, checked to be closed in order."""

    VOID = ("meta", "circle", "line", "polyline")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append((self.open[-1] if self.open else "", data))


def test_the_page_stands_alone_and_shows_the_numbers(family, tools):
    odd = family.folder / "<i>&a"
    (family.folder / "a").rename(odd)
    made = merged(family.folder, tools, "ties", names=("<i>&a", "b"))
    write_report(made.report, family.folder / "page")
    text = (family.folder / "page" / "report.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.found]
    assert not {"script", "link", "img", "iframe", "i>"} & set(tags) and "url(" not in text
    assert not re.search(r"https?://", text)
    assert "prefers-color-scheme:dark" in text and tags.count("svg") == 5
    shown = [words for tag, words in page.words if tag == "title" and ": " in words]
    for entry in made.report["layers"]:
        for ref, value in entry["drift"].items():
            name = ref.rpartition("/")[2]
            assert f"{entry['name']}, {name}: {value:.4g}" in shown
        assert f"{entry['name']}, sign conflict: {entry['sign_conflict']:.4g}" in shown
    # Higher values are drawn higher, inside the picture.
    circles = [attrs for tag, attrs in page.found if tag == "circle"]
    assert len(circles) == len(shown)
    assert all(0 < float(circle["cy"]) < 270 for circle in circles)
    points = [
        (float(words.rpartition(": ")[2]), float(circle["cy"]))
        for words, circle in zip(shown, circles, strict=True)
        if ", b: " in words
    ][: len(made.report["layers"])]
    assert [y for _, y in sorted(points)] == sorted((y for _, y in points), reverse=True)


def test_from_the_command_line(family, tools):
    config = tools.write_config(family.folder, "ties")
    out = family.folder / "out"
    before = tools.digest(family.folder)
    dry = tools.run(config, out, "--report", "--dry-run")
    assert dry.code == 0, dry.err
    assert re.search(
        r"^all tensors: .*delta a 0\.\d+ .*cosine a b .*sign conflict 0\.", dry.out, re.M
    )
    assert tools.digest(family.folder) == before
    done = tools.run(config, out, "--report", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    report = json.loads((out / "report.json").read_text())
    assert report["model"]["drift"] and (out / "report.html").is_file()
    # The merged folder can still be read as a model, and made a report of again.
    other = family.folder / "elsewhere"
    again = tools.run(config, out, "--resume", "--report-dir", other)
    assert again.code == 0, again.err
    assert (other / "report.json").read_bytes() == (out / "report.json").read_bytes()
    taken = tools.run(config, family.folder / "new", "--report-dir", other)
    assert taken.code == 2 and "holds a report" in taken.err and taken.err.count("\n") == 1
    assert not (family.folder / "new").exists()


def test_a_report_folder_that_is_a_file(tmp_path):
    from lm.merging.report import check_report

    (tmp_path / "file").write_text("x")
    with pytest.raises(MergeError, match="not a folder"):
        check_report(tmp_path / "file", True)
