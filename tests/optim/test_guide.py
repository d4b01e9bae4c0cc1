"""The examples of docs/optimizers.md run as they stand; so do the doctests."""

import doctest
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import optim

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "optimizers.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
MODULES = sorted(
    name for name in sys.modules if name.startswith("optim.") and sys.modules[name] is not None
)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.splitlines()[0][:40])
def test_examples_of_the_guide_run(code):
    for library in re.findall(r"\b(equinox|flax)\b", code):
        if not importlib.util.find_spec(library):
            pytest.skip(f"{library} is not installed")
    exec(compile(code, "docs/optimizers.md", "exec"), {"__name__": "guide"})


def test_the_guide_has_an_example_of_each():
    text = "\n".join(EXAMPLES)
    for name in ("spectra", "adatask", "mat", "spectrum_stats"):
        assert f"optim.{name}(" in text and callable(getattr(optim, name))


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(sys.modules[name])
    assert result.failed == 0


def test_public_functions_have_examples():
    total = sum(doctest.testmod(sys.modules[name]).attempted for name in MODULES)
    assert total >= 15
