"""How settings become the parameters of a tensor."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.merging.config import parse_config
from lm.merging.parameters import Scope, evaluate, find_method, resolve, unused_parameters
from lm.merging.types import MergeError, Parameter
from lm.merging.yaml_text import Condition, settings_of

NUMBER = Parameter("t")
NAME = "model.layers.3.mlp.up_proj.weight"


def value(setting, t=0.0, name=NAME, parameter=NUMBER):
    return evaluate(settings_of({"t": setting}, "p")["t"], parameter, name, t, "p.t")


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=7), st.floats(0, 1), st.integers(2, 40))
def test_gradients_interpolate_linearly(anchors, t, layers):
    grid = np.linspace(0, 1, len(anchors))
    np.testing.assert_allclose(value(anchors, t), np.interp(t, grid, anchors), atol=1e-12)
    ends = [value(anchors, index / (layers - 1)) for index in (0, layers - 1)]
    assert ends == [anchors[0], anchors[-1]]


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.floats(0, 1))
def test_gradients_of_flags_pick_the_entry_below(flags, t):
    found = value(flags, t, parameter=Parameter("t", kind="bool"))
    assert found is flags[int(t * (len(flags) - 1))]


def test_the_first_filter_that_fits_wins():
    mlp, any_ = {"filter": "mlp", "value": 1}, {"filter": "*", "value": 2}
    assert value([mlp, any_]) == 1 and value([any_, mlp]) == 2
    assert value([{"filter": "self_attn", "value": 3}, {"value": 4}]) == 4
    assert value([{"filter": "layers.3.", "value": [0, 10]}], 0.25) == 2.5
    assert value([{"filter": "self_attn", "value": 3}]) is None


def test_narrow_scopes_come_first_and_filters_fall_through():
    condition = (Condition(5, "self_attn"),)
    scopes = [
        Scope("a", {"t": condition}),
        Scope("b", {}),
        Scope("c", {"t": 2}),
        Scope("d", {"t": 3}),
    ]
    assert resolve([NUMBER], scopes, "x.self_attn.y", 0, "") == {"t": 5.0}
    assert resolve([NUMBER], scopes, NAME, 0, "") == {"t": 2.0}
    assert resolve([Parameter("u", default=7)], scopes, NAME, 0, "") == {"u": 7}


def test_missing_required_parameters_name_model_and_tensor():
    with pytest.raises(MergeError, match="weight is missing for the model m .*embed.*parameters"):
        resolve([Parameter("weight", required=True)], [], "embed", 0, "the model m")


@pytest.mark.parametrize(
    ("kind", "setting", "text"),
    [
        ("number", "many", "a number"),
        ("number", "inf", "finite"),
        ("integer", 1.5, "a whole number"),
        ("integer", [1, 2], "a whole number"),
        ("bool", "perhaps", "true or false"),
        ("bool", 2, "true or false"),
        ("bool", 0.5, "true or false"),
    ],
)
def test_values_of_the_wrong_kind(kind, setting, text):
    with pytest.raises(MergeError, match=f"p.t must be {text}"):
        value(setting, 0.5, parameter=Parameter("t", kind=kind))


def test_ranges():
    limited = Parameter("t", low=0, high=1)
    assert value(1, parameter=limited) == 1
    with pytest.raises(MergeError, match="p.t must be between 0 and 1, got 1.5"):
        value(1.5, parameter=limited)
    with pytest.raises(MergeError, match="p.t must be at least 0, got -1"):
        value(-1, parameter=Parameter("t", low=0))


def test_methods_by_name():
    assert find_method("slerp").name == "slerp"
    with pytest.raises(MergeError, match="unknown merge_method 'slrep' .did you mean 'slerp'"):
        find_method("slrep")


def test_parameters_without_effect_are_told():
    config = parse_config(
        {
            "merge_method": "slerp",
            "base_model": "a",
            "models": [{"model": "a", "parameters": {"t": 0.5}}, {"model": "b"}],
            "parameters": {"t": 1, "int8_mask": True},
        }
    )
    lines = unused_parameters(config)
    assert len(lines) == 2
    assert lines[0] == "parameters.int8_mask has no effect: slerp has no such parameter"
    assert lines[1].startswith("models[0].parameters.t has no effect: it belongs to the whole")


@pytest.mark.parametrize("place", ["whole", "module", "slice", "source"])
def test_unknown_names_are_found_in_every_scope(place):
    wrong = {"wheight": 1}
    source = {"model": "a", "layer_range": [0, 1], "parameters": wrong if place == "source" else {}}
    piece = {"sources": [source], "parameters": wrong if place == "slice" else {}}
    module = {"slices": [piece], "parameters": wrong if place == "module" else {}}
    config = {"merge_method": "linear", "modules": {"default": module}}
    config["parameters"] = wrong if place == "whole" else {}
    with pytest.raises(MergeError, match="parameters: unknown parameter 'wheight'.*'weight'"):
        parse_config(config)
