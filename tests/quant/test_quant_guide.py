"""The examples of docs/quantization.md run as they stand; so do the doctests."""

import doctest
import re
import sys
from pathlib import Path

import pytest

import quant

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "quantization.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
MODULES = sorted(name for name in sys.modules if name.split(".")[0] == "quant")


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_examples_of_the_guide_run(code, monkeypatch):
    monkeypatch.setattr(quant.recipes, "RECIPES", dict(quant.RECIPES))
    monkeypatch.setattr(quant, "RECIPES", quant.recipes.RECIPES)
    with_promotion = {"__name__": "guide"}
    exec(compile(code, "docs/quantization.md", "exec"), with_promotion)


def test_the_guide_names_every_recipe():
    named = set(re.findall(r"^\| (`[^|]*) \|", GUIDE, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", " ".join(named))) == set(quant.RECIPES)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    assert doctest.testmod(sys.modules[name]).failed == 0


def test_public_functions_have_examples():
    assert sum(doctest.testmod(sys.modules[name]).attempted for name in MODULES) >= 15
