"""Tiny checkpoints that transformers wrote, with what it computes from them (make_fixtures.py)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = sorted(folder.name for folder in FIXTURES.iterdir() if folder.is_dir())


def pytest_generate_tests(metafunc):
    if "checkpoint" in metafunc.fixturenames:
        folders = [FIXTURES / name for name in FAMILIES]
        metafunc.parametrize("checkpoint", folders, ids=FAMILIES)


@pytest.fixture
def fixtures() -> Path:
    """The folder of all fixtures."""
    return FIXTURES


@pytest.fixture
def expected(checkpoint) -> dict[str, np.ndarray]:
    """What transformers computes from `checkpoint`."""
    with np.load(checkpoint / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def altered(tmp_path):
    """A copy of a fixture with keys of its config.json changed (None removes one)."""

    def alter(name: str, **keys) -> Path:
        folder = tmp_path / name
        shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
        file = folder / "config.json"
        content = json.loads(file.read_text()) | keys
        file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
        return folder

    return alter
