"""The arrows of the house: scripts, tpu -> lm -> moe, quant, optim; checked from the source."""

import ast
import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import lm
import lm.layers.linear

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("scripts", "tpu", "lm", "moe", "quant", "optim")
BELOW = {
    "scripts": {"scripts", "tpu", "lm", "moe", "quant", "optim"},
    "tpu": {"tpu", "lm", "moe", "quant", "optim"},
    "lm": {"lm", "moe", "quant", "optim"},
    "moe": {"moe"},
    "quant": {"quant"},
    "optim": {"optim"},
}
HEAVY = ("datasets", "grain", "tokamax", "transformers", "matplotlib", "tokenizers")
MAX_LINES = 400


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(text: str) -> set[str]:
    """Top-level names of all absolute imports, those inside of functions included."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def upward(package: str, text: str) -> set[str]:
    return imported(text) & set(PACKAGES) - BELOW[package]


def test_every_package_is_seen():
    found = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert found >= {"scripts", "lm", "moe", "quant", "optim"}


@pytest.mark.parametrize(
    "package,text,bad",
    [
        ("lm", "import scripts.train", {"scripts"}),
        ("lm", "def f():\n    from tpu.plan import fit", {"tpu"}),
        ("moe", "import jax, lm.config", {"lm"}),
        ("quant", "from optim import spectra", {"optim"}),
        ("scripts", "import lm, optim\nfrom moe import route", set()),
        ("optim", "from . import muon\nimport optax", set()),
    ],
)
def test_the_check_finds_an_arrow_that_points_up(package, text, bad):
    assert upward(package, text) == bad


def test_arrows_point_down():
    bad = {}
    for path in sources():
        package = path.relative_to(ROOT).parts[0]
        if names := upward(package, path.read_text()):
            bad[str(path.relative_to(ROOT))] = sorted(names)
    assert not bad, f"these files import from above or beside them: {bad}"


def test_no_file_grows_beyond_its_one_thing():
    files = sources() + sorted((ROOT / "tests").rglob("*.py"))
    long = {}
    for path in files:
        if (lines := len(path.read_text().splitlines())) > MAX_LINES:
            long[str(path.relative_to(ROOT))] = lines
    assert not long, f"above {MAX_LINES} lines, what second thing does the file do? {long}"


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_imports_without_the_heavy_libraries():
    out = run_python(
        "import sys\n"
        "import lm, lm.model, lm.train.step, lm.train.optimizer, lm.generate\n"
        "import optim, quant, moe\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert out.strip() == "[]"


def test_reading_a_configuration_does_not_load_jax():
    code = "import sys, lm, lm.recipes\nlm.recipes.get('tiny')\nprint('jax' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        lm.aply  # noqa: B018


@pytest.mark.parametrize("module", [lm, lm.layers.linear])
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
