"""mergekit's YAML: what is accepted, and that everything else is one clear error."""

import contextlib

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lm.merging.config import (
    ModelEntry,
    Slice,
    SliceSource,
    TokenSource,
    load_config,
    parse_config,
    parse_yaml,
)
from lm.merging.types import MergeError
from lm.merging.yaml_text import Condition

LINEAR = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
SLICED = {
    "merge_method": "slerp",
    "base_model": "a",
    "slices": [
        {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [1, 3]}]}
    ],
    "parameters": {"t": [0, 1]},
}


def test_reads_all_keys():
    config = parse_yaml("""\
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.5, density: [1, 0.5]}}
- model: {model: {path: b}, lora: {path: c}}
  parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.25}]}
parameters: {lambda: 1e-1, normalize: true, int8_mask: null}
dtype: float32
out_dtype: torch.bfloat16
tokenizer:
  source: base
  tokens:
    x: {source: a}
    y: {source: {kind: zero}, force: true}
    z: {source: {kind: model_token, model: b, token: q}}
    w:
  pad_to_multiple_of: 8
chat_template: auto
""")
    first, second = config.models
    assert first == ModelEntry("a", {"weight": 0.5, "density": (1, 0.5)})
    assert second.model == "b+c"
    assert second.parameters["weight"] == (Condition((0, 1), "mlp"), Condition(0.25, None))
    assert config.parameters == {"lambda": "1e-1", "normalize": True}
    assert (config.dtype, config.out_dtype) == ("float32", "bfloat16")
    assert config.tokenizer.source == "base" and config.tokenizer.pad_to_multiple_of == 8
    assert config.tokenizer.tokens == {
        "x": TokenSource("model", "a"),
        "y": TokenSource("zero", force=True),
        "z": TokenSource("model_token", "b", "q"),
        "w": TokenSource("auto"),
    }
    assert config.references() == ("base", "a", "b+c")
    assert config.text.startswith("merge_method: ties\n")


def test_reads_slices_and_modules():
    config = parse_config(SLICED)
    sources = (SliceSource("a", (0, 2)), SliceSource("b", (1, 3)))
    assert config.slices == (Slice(sources),)
    inner = {key: value for key, value in SLICED.items() if key != "slices"}
    config = parse_config(inner | {"modules": {"text_decoder": {"slices": SLICED["slices"]}}})
    assert config.modules["text_decoder"].slices == (Slice(sources),)
    assert config.references() == ("a", "b")


def test_tokenizer_source_is_the_short_form():
    config = parse_config(LINEAR | {"tokenizer_source": "union"})
    assert config.tokenizer.source == "union" and not config.tokenizer.tokens


def test_no_base_is_a_reference_of_its_own():
    assert parse_config(LINEAR | {"base_model": "b"}).references() == ("b", "a")


def test_programs_may_give_mappings():
    """The record is then written anew, and reads as the same configuration."""
    data = LINEAR | {"parameters": {"normalize": True, "weight": np.float64(0.25)}}
    config = parse_config(data)
    assert parse_yaml(config.text) == config
    assert yaml.safe_load(config.text)["parameters"] == {"normalize": True, "weight": 0.25}


WRONG = [
    ("[1, 2]", "must be a mapping", "[1, 2]"),
    ("", "holds 0 documents", ""),
    ("a: 1\n---\nb: 2", "holds 2 documents", ""),
    ("merge_method: linear\nmodels: []", "give one of models, slices or modules", "none of them"),
    ("merge_method: lienar\nmodels: [{model: a}]", "'lienar'", "did you mean 'linear'"),
    ("merge_method: linear\nmodel: [{model: a}]", "unknown key 'model'", "'models'"),
    ("merge_method: 3\nmodels: [{model: a}]", "merge_method must be text", "3"),
    ("models: [{model: a}]", "merge_method is missing", ""),
    ("merge_method: linear\nmodels: {model: a}", "models must be a list", "{'model': 'a'}"),
    ("merge_method: linear\nmodels: [a]", "models[0] must be a mapping", "'a'"),
    ("merge_method: linear\nmodels: [{modle: a}]", "models[0]: unknown key", "'model'"),
    ("merge_method: linear\nmodels: [{model: a}, {model: a}]", "models[1]", "listed twice"),
    ("merge_method: linear\nmodels: [{model: a+}]", "models[0].model", "path+lora"),
    ("merge_method: linear\nmerge_method: ties\nmodels: [{model: a}]", "line 2", "appears twice"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]", "wieght", "'weight'"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: x}}]", "a number", "'x'"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "finite", "nan"),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: []}}]", "empty list", ""),
    ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [[1]]}}]", "weight", "[1]"),
    (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]",
        "models[0].parameters.weight[0]",
        "value is missing",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {normalize: maybe}",
        "parameters.normalize must be true or false",
        "'maybe'",
    ),
    ("merge_method: linear\nmodels: [{model: a}]\ndtype: float33", "dtype", "'float32'"),
    (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer_source: base\ntokenizer: {}",
        "not both",
        "",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}",
        "pad_to_multiple_of",
        "0",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {source: "
        "{kind: model_token, model: a}}}}",
        "tokens['x'].source",
        "token or token_id",
    ),
    ("merge_method: linear\nmodels: [{model: a}", "line 2", "not YAML"),
    ("merge_method: linear\nmodels: &a [*a]", "not YAML", "recursive"),
    ("merge_method: linear\nmodules: {x: {models: [], slices: []}}", "modules.x", "either models"),
    ("merge_method: linear\nmodules: [x]", "modules must be a mapping", "['x']"),
    (
        "merge_method: linear\nmodels: [{model: {model: {path: a, revision: v2}}}]",
        "models[0].model.model.revision",
        "local folders",
    ),
    (
        "merge_method: linear\nmodels: [{model: {model: a, override_architecture: B}}]",
        "override_architecture",
        "remove it",
    ),
    (
        "merge_method: linear\nslices: [{residual_weight: 1, sources: [{model: a, layer_range: "
        "[0, 1]}]}]",
        "slices[0].residual_weight",
        "remove it",
    ),
    ("merge_method: linear\nslices: [{sources: []}]", "slices[0].sources is empty", "layer_range"),
    (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {force: 1}}}",
        "tokenizer.tokens['x'].force",
        "true or false",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {source: "
        "{kind: copy}}}}",
        "tokenizer.tokens['x'].source.kind",
        "'copy'",
    ),
    ("x: !!timestamp nonsense", "not YAML", ""),
    ("x: !!python/object/apply:os.system [true]", "not YAML", "python/object"),
    ("[" * 700, "not YAML", "nested too deeply"),
    (
        "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 0x" + "f" * 6000 + "}",
        "",
        "",
    ),
]


@pytest.mark.parametrize(("text", "first", "second"), WRONG, ids=range(len(WRONG)))
def test_errors_name_place_value_and_remedy(text, first, second):
    with pytest.raises(MergeError) as caught:
        parse_yaml(text, "merge.yml")
    message = str(caught.value)
    assert first in message and second in message
    assert "\n" not in message and len(message) < 700


SLICE_ERRORS = [
    ([0, 2], [0, 3], "equally many layers"),
    ([2, 2], [0, 2], "first < behind the last"),
    ([-1, 1], [0, 2], "first < behind the last"),
    ([0, 1, 2], [0, 2], "[first, behind the last]"),
    ("0-2", [0, 2], "[first, behind the last]"),
    ([False, True], [0, 1], "[first, behind the last]"),
]


@pytest.mark.parametrize(("one", "other", "text"), SLICE_ERRORS)
def test_layer_ranges_are_checked(one, other, text):
    sources = [{"model": "a", "layer_range": one}, {"model": "b", "layer_range": other}]
    with pytest.raises(MergeError, match="slices") as caught:
        parse_config(SLICED | {"slices": [{"sources": sources}]})
    assert text in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MergeError, match="cannot be read"):
        load_config(tmp_path / "missing.yml")
    (tmp_path / "bytes.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MergeError, match="not UTF-8"):
        load_config(tmp_path / "bytes.yml")


def test_shared_anchors_do_not_explode():
    """A "billion laughs" file: refused at once, with a short message."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    with pytest.raises(MergeError, match="unknown key"):
        parse_yaml("\n".join(lines))
    text = "merge_method: linear\nmodels: [{model: a}]\nx: &x [1]\nparameters: {weight: *x}"
    with pytest.raises(MergeError, match="unknown key 'x'"):
        parse_yaml(text)


WORDS = st.sampled_from(
    ["merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "model"]
    + ["out_dtype", "tokenizer_source", "tokenizer", "tokens", "source", "sources", "layer_range"]
    + ["weight", "t", "filter", "value", "linear", "slerp", "ties", "a", "b", "union", "kind"]
    + ["chat_template", "force", "density", "*", "path", "pad_to_multiple_of", "normalize"]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | WORDS
    | st.text(max_size=5)
    | st.dates()
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | LEAVES, inner, max_size=4),
    max_leaves=12,
)


@given(TREES)
def test_any_tree_is_accepted_or_one_error(tree):
    with contextlib.suppress(MergeError):
        parse_config(tree)


@given(TREES, st.sampled_from(["models", "slices", "modules", "parameters", "tokenizer", "dtype"]))
def test_any_value_of_a_key_is_accepted_or_one_error(tree, key):
    for config in (LINEAR, SLICED):
        with contextlib.suppress(MergeError):
            parse_config(config | {key: tree})
        with contextlib.suppress(MergeError):
            parse_config({**config, "models": [{"model": "a", key: tree}], "slices": None})


@given(st.text(max_size=60) | st.text(st.sampled_from("&*!{}[]:,-|>'\"#%@ \n\ta1.~<"), max_size=40))
def test_any_text_is_accepted_or_one_error(text):
    with contextlib.suppress(MergeError):
        parse_yaml(text)


@given(st.data())
def test_damaged_files_are_one_error(data):
    text = yaml.safe_dump(data.draw(st.sampled_from([LINEAR, SLICED])))
    at = data.draw(st.integers(0, len(text)))
    junk = data.draw(st.text(st.sampled_from("&*!{}[]:,-|>'\"#%@ \n\tax1~"), max_size=4))
    cut = data.draw(st.integers(0, 6))
    with contextlib.suppress(MergeError):
        parse_yaml(text[:at] + junk + text[at + cut :])
