"""Orbax folders in several layouts."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lm.merging.store import open_store
from lm.merging.types import StorageError


@pytest.fixture
def tree(rng):
    w = jnp.asarray(rng.standard_normal((7, 5)), jnp.bfloat16)
    return {
        "params": {"layers": [{"w": w}, {"w": w + 1}], "n": jnp.arange(3.0)},
        "state": {"mu": jnp.ones(2)},
    }


def save(folder, tree, **options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
def test_trees_by_dotted_names(tmp_path, tree, ocdbt, zarr3):
    save(tmp_path / "c", tree, use_ocdbt=ocdbt, use_zarr3=zarr3)
    store = open_store(str(tmp_path / "c"))
    assert set(store.tensors) == {"layers.0.w", "layers.1.w", "n"}  # no optimizer state
    w = np.asarray(tree["params"]["layers"][1]["w"])
    assert store.tensors["layers.1.w"].shape == (7, 5)
    assert store.tensors["layers.1.w"].dtype == "bfloat16"
    np.testing.assert_array_equal(store.read("layers.1.w"), w.reshape(-1))
    np.testing.assert_array_equal(store.read("layers.1.w", 4, 13), w.reshape(-1)[4:13])
    assert store.identity() == open_store(str(tmp_path / "c")).identity()


def test_the_newest_step_of_a_run(tmp_path, tree):
    for step, add in ((90, 0), (100, 1)):
        arrays = {"params.n": tree["params"]["n"] + add, "opt.mu": jnp.ones(3)}
        save(tmp_path / "run" / "checkpoints" / f"{step:08d}" / "arrays", arrays, use_zarr3=True)
    store = open_store(str(tmp_path / "run"))
    assert store.read("n").tolist() == [1, 2, 3] and list(store.tensors) == ["n"]
    assert open_store(str(tmp_path / "run/checkpoints/00000090")).read("n").tolist() == [0, 1, 2]


def test_a_damaged_folder_is_named(tmp_path, tree):
    save(tmp_path / "c", tree)
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file() and path.name != "_METADATA":
            path.write_bytes(b"")
    with pytest.raises(StorageError, match="/c: "):
        open_store(str(tmp_path / "c"))
    (tmp_path / "c" / "_METADATA").write_text("{}")
    with pytest.raises(StorageError, match="_METADATA"):
        open_store(str(tmp_path / "c"))
