"""The whole tool against what mergekit 0.1.5 made of the same checkpoints and configurations.

The results of mergekit are in `fixtures/`, beside the script that made them.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from lm.merging.parameters import evaluate
from lm.merging.session import Session
from lm.merging.store import open_store
from lm.merging.tokenizer import read_tokenizer, tokens_of
from lm.merging.types import Parameter
from lm.merging.yaml_text import settings_of

FIXTURES = Path(__file__).parent / "fixtures"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, FIXTURES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _load("make_fixtures")
CASES = _load("cases").CASES
STORED = np.load(FIXTURES / "mergekit.npz")
INDEX = json.loads(STORED["index"].tobytes())
ABOUT = json.loads((FIXTURES / "mergekit.json").read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mergekit") / "inputs"
    digest = MAKER.make_inputs(folder)
    assert digest == ABOUT["inputs_sha256"], "the checkpoints are not those that mergekit merged"
    return folder


def run(text, inputs, out, monkeypatch):
    monkeypatch.chdir(inputs)
    config = out.with_suffix(".yml")
    config.write_text(text)
    Session(config, out, flavor="mergekit", say=lambda line: None).run()
    store = open_store(str(out))
    tensors = {
        name: store.read(name).astype(np.float32).reshape(info.shape)
        for name, info in store.tensors.items()
    }
    return store, tensors


# What must be equal to the last bit: copies, and sums of products in mergekit's own order.
EXACT = {
    "task_arithmetic",
    "task_arithmetic_normalize",
    "ties",
    "ties_sum",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "ram",
    "ramplus_tl",
    "passthrough",
    "precedence",
    "slices",
    "bool_gradient",
    "out_dtype",
    "tied_ties",
}
# The others differ in the last bits, on values of about 1 (float32 has steps of 1.2e-7 there):
# linear multiplies by w / sum(w) and mergekit divides at the end; spherical methods take inner
# products in float64 and mergekit in float32; SCE's weights are such sums; NearSwap divides once.
FLOAT32 = 3e-7
# mergekit rounds its inputs to `dtype` first and here only the result is rounded: one step of
# bfloat16 (2**-7 at 1). Of two bfloat16 models the mean often lies just between two such numbers,
# where the last bit of float32 decides. Task arithmetic rounds its differences to bfloat16 there.
TOLERANCE = {"dtype": 2.0**-7, "bf16": 2.0**-7, "bf16_task": 2.0**-10, "float16": 2.0**-10}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_mergekit(case, inputs, tmp_path, monkeypatch):
    store, tensors = run(CASES[case], inputs, tmp_path / "out", monkeypatch)
    expected = INDEX[case]
    if "tokens" in expected:
        vocabulary = tokens_of(read_tokenizer(tmp_path / "out"))
        assert sorted(vocabulary) == expected["tokens"]
        tensors = MAKER.by_token(tensors, vocabulary)
    rows, values = MAKER.record(tensors)
    assert [row[:2] for row in rows] == [row[:2] for row in expected["tensors"]]
    assert sorted({info.dtype for info in store.tensors.values()}) == expected["dtypes"]
    assert {key: store.config[key] for key in expected["config"]} == expected["config"]
    if case in EXACT:
        assert rows == expected["tensors"]
    else:
        tolerance = TOLERANCE.get(case, FLOAT32)
        np.testing.assert_allclose(values, STORED[case], rtol=0, atol=tolerance)


def test_bfloat16_differences_are_nearer_to_the_truth(inputs, tmp_path, monkeypatch):
    """Where results differ from mergekit's, ours have the smaller error against float64."""
    _, tensors = run(CASES["bf16_task"], inputs, tmp_path / "out", monkeypatch)
    base, a = (open_store(str(inputs / name)) for name in ("base16", "a16"))
    truth = {}
    for name, info in base.tensors.items():
        start, end = (store.read(name).astype(np.float64) for store in (base, a))
        truth[name] = (start + 0.7 * (end - start)).reshape(info.shape)
    exact = MAKER.record(truth)[1]
    ours = np.abs(MAKER.record(tensors)[1] - exact)
    theirs = np.abs(STORED["bf16_task"] - exact)
    assert np.all(ours <= np.abs(exact) * 2.0**-8)
    assert np.all(ours <= theirs) and ours.sum() < theirs.sum()


CHANGES = [
    ("gradient", "0.7", "0.701"),
    ("gradients", "0.2", "0.201"),
    ("filters", "0.25", "0.251"),
    ("precedence", "2e-1", "2.01e-1"),
    ("slices_slerp", "[1, 4]", "[0, 3]"),
    ("tokens_set", "w3", "w4"),
]


@pytest.mark.parametrize(("case", "old", "new"), CHANGES)
def test_the_comparison_sees_small_changes(case, old, new, inputs, tmp_path, monkeypatch):
    """A parameter off by 0.001, or another layer or token, is far outside the tolerance."""
    text = CASES[case]
    assert old in text
    _, tensors = run(text.replace(old, new), inputs, tmp_path / "out", monkeypatch)
    if "tokens" in INDEX[case]:
        tensors = MAKER.by_token(tensors, tokens_of(read_tokenizer(tmp_path / "out")))
    difference = np.abs(MAKER.record(tensors)[1] - STORED[case]).max()
    assert difference > 20 * FLOAT32


def test_settings_resolve_as_in_mergekit():
    for kind, setting, name, t, value in ABOUT["resolved"]:
        read = settings_of({"p": setting}, "parameters")["p"]
        found = evaluate(read, Parameter("p", kind=kind), name, t, "parameters.p")
        assert (found, type(found)) == (value, type(value)), (setting, name, t)


def test_fixtures_tell_their_versions():
    assert ABOUT["made_with"]["mergekit"] == "0.1.5"
    assert ABOUT["cases"] == len(CASES) == len(INDEX)
    assert sum(path.stat().st_size for path in FIXTURES.iterdir() if path.is_file()) < 10**6
