"""Dense MLPs into experts and experts into SD-MoE: functions kept, statistics, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import moe

D, F, E = 16, 24, 3


@pytest.fixture
def mlp(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)  # noqa: E731
    return {"gate": draw(2, D, F), "up": draw(2, D, F), "down": draw(2, F, D)}


def apply(x, mlp):
    return (jax.nn.silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"]


def test_a_mixture_of_copies_computes_what_the_mlp_does(mlp, rng):
    x = jnp.asarray(rng.normal(size=(2, 5, D)), jnp.float32)
    experts = moe.upcycle_mlp(mlp, E, jax.random.key(0))
    assert {k: v.shape for k, v in experts.items()} == {
        "gate": (2, E, D, F),
        "up": (2, E, D, F),
        "down": (2, E, F, D),
    }
    outputs = apply(x[:, None], experts)
    weights = jnp.asarray([0.2, 0.5, 0.3])[None, :, None, None]
    np.testing.assert_allclose(jnp.sum(weights * outputs, axis=1), apply(x, mlp), atol=1e-5)
    doubled = moe.upcycle_mlp(mlp, E, jax.random.key(0), residual_scale=2.0)
    np.testing.assert_allclose(apply(x[:, None], doubled), 2 * outputs, rtol=1e-5, atol=1e-5)


def test_noise_has_its_scale_and_differs_everywhere(mlp):
    experts = moe.upcycle_mlp(mlp, E, jax.random.key(0), noise_scale=0.01)
    noise = np.stack([np.asarray(experts[name] - mlp[name][:, None]).ravel() for name in mlp])
    assert noise.std() == pytest.approx(0.01, rel=0.05)
    assert abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.1
    each = np.asarray(experts["up"] - mlp["up"][:, None]).transpose(1, 0, 2, 3).reshape(E, -1)
    assert abs(np.corrcoef(each)[np.triu_indices(E, 1)]).max() < 0.1


@pytest.mark.parametrize("gated", [True, False])
def test_drop_upcycling_starts_the_same_units_of_each_matrix_anew(mlp, gated):
    if not gated:
        del mlp["gate"]
    mlp["up"] = mlp["up"] + 0.7  # a mean to be kept
    experts = moe.upcycle_mlp(mlp, E, jax.random.key(1), drop_ratio=0.5)
    chosen = set()
    for layer in range(2):
        for e in range(E):
            new = {}
            for name in mlp:
                changed = np.asarray(experts[name][layer, e] != mlp[name][layer])
                by_unit = changed.T if name != "down" else changed
                assert (by_unit.all(axis=1) == by_unit.any(axis=1)).all()  # whole units
                new[name] = by_unit.all(axis=1)
            assert all((units == new["up"]).all() for units in new.values())
            assert new["up"].sum() == F // 2
            chosen.add(new["up"].tobytes())
            old = np.asarray(mlp["up"][layer])[:, new["up"]]
            drawn = np.asarray(experts["up"][layer, e])[:, new["up"]]
            error = old.std() / old.size**0.5
            assert abs(drawn.mean() - old.mean()) < 5 * error
            assert drawn.std() == pytest.approx(old.std(), rel=0.25)
    assert len(chosen) == 2 * E  # every expert and layer its own


def test_fresh_routers():
    router = moe.upcycle_router(jax.random.key(0), 64, 8, stack=(2,))
    assert router.shape == (2, 64, 8)
    assert 0.115 < float(jnp.max(jnp.abs(router))) <= 1 / 8
    wide = moe.upcycle_router(jax.random.key(0), 64, 8, gate_mode="random", stack=(2,))
    assert float(jnp.std(wide)) == pytest.approx(1, rel=0.1)


def test_split_mean_is_the_best_approximation_of_the_mean(rng):
    w = rng.normal(size=(2, E, D, F)) + 2 * rng.normal(size=(2, 1, D, F))
    found = moe.split_mean(jnp.asarray(w, jnp.float32), 4)
    u, s, vt = np.linalg.svd(w.mean(axis=1), full_matrices=False)
    wanted = (u[..., :4] * s[:, None, :4]) @ vt[:, :4]
    np.testing.assert_allclose(found.common, wanted, atol=1e-4)
    np.testing.assert_allclose(found.common[:, None] + found.unique, w, atol=1e-5)
    np.testing.assert_array_equal(found.change, [0, 0])
    dropped = moe.split_mean(jnp.asarray(w, jnp.float32), 4, displaced="drop")
    inside = u[:, None, :, :4].swapaxes(-1, -2) @ np.float64(dropped.unique)
    assert abs(inside).max() < 1e-4
    lost = np.linalg.norm((w - (dropped.common[:, None] + dropped.unique)).reshape(2, -1), axis=1)
    size = np.linalg.norm(w.reshape(2, -1), axis=1)
    np.testing.assert_allclose(dropped.change, lost / size, rtol=1e-3)
    assert (np.asarray(dropped.change) > 0.05).all()


def test_from_dense_to_sd_moe_to_a_refresh_nothing_is_lost(mlp):
    params = {"layers": {"mlp": {"experts": moe.upcycle_mlp(mlp, E, jax.random.key(0))}}}
    split, changes = moe.to_sd_moe(params, 3, displaced="drop")
    assert set(changes) == {f"layers/mlp/{name}" for name in mlp}
    assert all(float(jnp.max(change)) < 1e-5 for change in changes.values())
    folded = moe.fold_common(split)["layers"]["mlp"]["experts"]
    tx = moe.sd_moe(optax.sgd(0.0), 3, refresh_every=1, refresh_sweeps=8)
    updates, state = tx.update(split, tx.init(split), split)
    refreshed = moe.fold_common(optax.apply_updates(split, updates))["layers"]["mlp"]["experts"]
    for name in mlp:
        np.testing.assert_allclose(folded[name], jnp.stack([mlp[name]] * E, 1), atol=1e-5)
        np.testing.assert_allclose(refreshed[name], folded[name], atol=1e-4)
    assert float(state.refresh_change) < 1e-5


def test_a_mixture_becomes_sd_moe_and_comes_back(rng):
    experts = jnp.asarray(rng.normal(size=(2, E, D, F)), jnp.float32)
    params = {"mlp": {"experts": {"up": experts}, "router": {"kernel": jnp.ones((2, D, E))}}}
    split, _ = moe.to_sd_moe(params, 2)
    assert split["mlp"]["common"]["up"].shape == (2, D, F)
    back = moe.fold_common(split)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    np.testing.assert_allclose(back["mlp"]["experts"]["up"], experts, atol=1e-5)
    with pytest.raises(ValueError, match="mlp is decomposed already"):
        moe.to_sd_moe(split, 2)


def test_refusals(mlp):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="an MLP is gate .*, got up"):
        moe.upcycle_mlp({"up": mlp["up"]}, E, key)
    with pytest.raises(ValueError, match=r"down \[..., F, D\], got"):
        moe.upcycle_mlp(mlp | {"down": mlp["up"]}, E, key)
    with pytest.raises(ValueError, match="num_experts must be 1 or more, got 0"):
        moe.upcycle_mlp(mlp, 0, key)
    with pytest.raises(ValueError, match="drop_ratio must lie in"):
        moe.upcycle_mlp(mlp, E, key, drop_ratio=1.5)
    with pytest.raises(ValueError, match="gate_mode must be .*, got 'hidden'"):
        moe.upcycle_router(key, D, E, gate_mode="hidden")
    with pytest.raises(ValueError, match="displaced must be keep or drop, got 'move'"):
        moe.split_mean(jnp.ones((2, D, F)), 2, displaced="move")
    with pytest.raises(ValueError, match="below both sides of a 16 x 24 expert, got 16"):
        moe.split_mean(jnp.ones((2, D, F)), 16)
