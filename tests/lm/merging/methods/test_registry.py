"""Names, parameters and flavours."""

import subprocess
import sys

import pytest

from lm.merging.methods import METHODS, get
from lm.merging.types import MergeError

MERGEKIT = {
    "linear": {"weight*", "normalize=True"},
    "task_arithmetic": {"weight*", "density", "normalize=False", "lambda=1.0", "rescale=False"},
    "ties": {"weight*", "density=1.0", "normalize=True", "lambda=1.0"},
    "dare_linear": {"weight*", "density=1.0", "normalize=False", "rescale=True", "lambda=1.0"},
    "dare_ties": {"weight*", "density=1.0", "normalize=False", "rescale=True", "lambda=1.0"},
    "della": {"weight*", "density=1.0", "epsilon=0.15", "normalize=True", "rescale=True"},
    "della_linear": {"weight*", "density=1.0", "epsilon=0.15", "normalize=False", "rescale=True"},
    "breadcrumbs": {"weight*", "density=1.0", "gamma=0.01", "normalize=False", "rescale=False"},
    "breadcrumbs_ties": {"weight*", "density=1.0", "gamma=0.01", "normalize=False"},
    "sce": {"select_topk=1.0", "int8_mask=False"},
    "ram": {"epsilon=1e-05"},
    "ramplus_tl": {"epsilon=1e-05", "r=0.1", "alpha=0.2"},
    "slerp": {"t*"},
    "nuslerp": {"weight*", "nuslerp_row_wise=False", "nuslerp_flatten=True"},
    "multislerp": {"weight*", "normalize_weights=True", "eps=1e-08"},
    "karcher": {"max_iter=10", "tol=1e-05"},
    "model_stock": {"filter_wise=False"},
    "nearswap": {"t*"},
    "arcee_fusion": set(),
    "passthrough": {"scale"},
}
OWN = {
    "pcb", "consensus", "tall", "emr", "bitdelta", "magmax", "expo", "tsv", "iso_c", "iso_cts",
    "knots", "wudi", "wudi_steps",
}  # fmt: skip


def text(parameter):
    if parameter.required:
        return parameter.name + "*"
    return parameter.name if parameter.default is None else f"{parameter.name}={parameter.default}"


@pytest.mark.parametrize("name", MERGEKIT)
def test_parameters_and_defaults_are_those_of_mergekit(name):
    for method in METHODS[name]:
        assert {text(p) for p in (*method.per_model, *method.params)} >= MERGEKIT[name]


def test_all_methods_are_there():
    assert set(METHODS) == set(MERGEKIT) | OWN


def test_flavours():
    two = {name for name, readings in METHODS.items() if len(readings) == 2}
    assert two == {
        "ties", "dare_linear", "dare_ties", "della", "della_linear", "sce", "model_stock",
    }  # fmt: skip
    for name in two:
        assert {m.flavor for m in METHODS[name]} == {"paper", "mergekit"}
        assert get(name).flavor == "mergekit"
        for flavor in "paper", "mergekit":
            assert get(name, flavor).flavor == flavor
    for name in set(METHODS) - two:
        assert get(name, "paper") is get(name, "mergekit") is METHODS[name][0]


def test_companions_for_other_tensors():
    assert get("tsv", None, "matrix").scope == "tensor"
    for name in "tsv", "iso_c", "iso_cts", "knots", "wudi", "wudi_steps":
        for kind in "embedding", "vector", "other":
            other = get(name, None, kind)
            assert other.scope == "block"
            theirs, ours = ({p.name for p in m.params} for m in (other, get(name)))
            assert theirs == ours
    assert get("ties", None, "vector") is get("ties")


def test_unknown_names():
    with pytest.raises(MergeError, match="unknown merge_method 'tie'; did you mean 'ties'"):
        get("tie")
    with pytest.raises(
        MergeError, match="unknown merge_method 'zzzzzz'; known: .*arcee_fusion.*wudi"
    ):
        get("zzzzzz")
    with pytest.raises(MergeError, match="flavor must be 'paper' or 'mergekit', got 'salty'"):
        get("ties", "salty")


def test_no_jax_on_the_way_in():
    code = "import sys, lm.merging.methods; print('jax' in sys.modules)"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.strip() == "False"
