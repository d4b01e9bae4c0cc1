"""SD-MoE: identities of the decomposition, invariants, refresh, sharding, checkpoints."""

import doctest
import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import moe
import optim
from moe._subspace import common_part, random_basis, sweep, unique_part

compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
L, E, M, N, K = 2, 4, 24, 32, 4
BOTH = ("up", "down")


def make_params(dtype=jnp.float32, names=("up",)):
    shapes = {"up": (M, N), "down": (N, M)}
    params = {"common": {}, "experts": {}, "router": {"kernel": jnp.ones((L, M, E), dtype)}}
    for number, name in enumerate(names):
        common, unique = moe.init_sd_moe(
            jax.random.key(number), E, shapes[name], K, std=0.2, stack=(L,), dtype=dtype
        )
        params["common"][name], params["experts"][name] = common, unique
    return params


def gradients(params, seed):
    """Of W_i = W_c + W_u,i, as automatic differentiation gives them, with a strong common part."""
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
    for name, common in params["common"].items():
        shared = rng.normal(size=(L, common.shape[-2], 1)) * rng.normal(size=(1, common.shape[-1]))
        g = grads["experts"][name] + 3 * shared[:, None].astype(common.dtype)
        grads["experts"][name], grads["common"][name] = g, g.sum(axis=1)
    return jax.tree.map(jnp.asarray, grads)


def leak(state, params):
    """Largest entry of P_U W_u and W_u P_V over the largest of W_u."""
    worst = 0.0
    for name, w in params["experts"].items():
        w = np.asarray(w, np.float64)
        u = np.asarray(state.left["common"][name], np.float64)[:, None]
        v = np.asarray(state.right["common"][name], np.float64)[:, None]
        inside = max(abs(u.swapaxes(-1, -2) @ w).max(), abs(w @ v).max())
        worst = max(worst, inside / abs(w).max())
    return worst


@functools.cache
def jitted(tx):
    return compile_fast(tx.init), compile_fast(tx.update)


def train(tx, params, steps, start=0, state=None):
    init, step = jitted(tx)
    state = init(params) if state is None else state
    for seed in range(start, start + steps):
        updates, state = step(gradients(params, seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("m,n,k", [(64, 48, 8), (16, 40, 3), (5, 5, 1)])
def test_parts_are_the_projections_of_the_paper(rng, m, n, k):
    g = rng.normal(size=(3, m, n))
    u, v = (np.linalg.qr(rng.normal(size=(3, size, k)))[0] for size in (m, n))
    p_u, p_v = u @ u.swapaxes(-1, -2), v @ v.swapaxes(-1, -2)
    wanted = p_u @ g + (np.eye(m) - p_u) @ g @ p_v
    arrays = [jnp.asarray(x, jnp.float32) for x in (g, u, v)]
    common, unique = np.float64(common_part(*arrays)), np.float64(unique_part(*arrays))
    np.testing.assert_allclose(common, wanted, atol=1e-5)
    np.testing.assert_allclose(common + unique, g, atol=1e-6)
    assert abs(np.sum(common * unique)) < 1e-5 * np.sum(g * g)
    for one in range(3):
        s = np.linalg.svd(common[one], compute_uv=False)
        assert np.sum(s > 1e-4 * s[0]) == min(2 * k, m, n)
        s = np.linalg.svd(unique[one], compute_uv=False)
        assert np.sum(s > 1e-4 * s[0]) == min(m, n) - k


def test_sweeps_find_the_leading_subspaces(rng):
    u0, v0 = (np.linalg.qr(rng.normal(size=(size, 20)))[0] for size in (40, 30))
    spectrum = np.r_[10.0, 9, 8, 7, np.linspace(2, 1, 16)]
    w = jnp.asarray((u0 * spectrum) @ v0.T, jnp.float32)
    u, v = sweep(w, random_basis(jax.random.key(0), (30, 4)), 12)
    for found, wanted in ((u, u0[:, :4]), (v, v0[:, :4])):
        np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-5)
        overlap = np.linalg.svd(np.asarray(found).T @ wanted, compute_uv=False)
        np.testing.assert_allclose(overlap, 1, atol=1e-4)


def test_initialization_is_a_double_complement_with_the_usual_spectrum():
    m, n, k, std = 96, 160, 8, 0.3
    common, unique = moe.init_sd_moe(jax.random.key(3), 6, (m, n), k, std=std, stack=(2,))
    assert common.shape == (2, m, n) and unique.shape == (2, 6, m, n)
    u, s, vt = np.linalg.svd(np.float64(common))
    assert (s[:, k] < 1e-5).all()
    inside_left = np.einsum("lmk,lemn->lekn", u[..., :k], np.float64(unique))
    inside_right = np.einsum("lkn,lemn->lemk", vt[:, :k], np.float64(unique))
    assert max(abs(inside_left).max(), abs(inside_right).max()) < 1e-5
    drawn = np.random.default_rng(0).normal(size=(40, m, n)) * std
    usual = np.linalg.svd(drawn, compute_uv=False).mean(axis=0)
    np.testing.assert_allclose(s[0, :k], usual[:k], rtol=0.02)
    whole = np.linalg.svd(np.float64(common[:, None] + unique), compute_uv=False)
    np.testing.assert_allclose(whole.mean(axis=(0, 1)), usual, rtol=0.12)
    assert not np.allclose(unique[0, 0], unique[0, 1])


def test_gradients_of_the_decomposition_are_those_of_the_experts(rng):
    x = jnp.asarray(rng.normal(size=(E, 7, M)), jnp.float32)
    common, unique = moe.init_sd_moe(jax.random.key(0), E, (M, N), K, std=0.2)
    loss = lambda w: jnp.sum(jnp.tanh(jnp.einsum("etm,emn->etn", x, w)) ** 2)  # noqa: E731
    g = jax.grad(loss)(common[None] + unique)
    dc, du = jax.grad(lambda c, u: loss(c[None] + u), argnums=(0, 1))(common, unique)
    np.testing.assert_allclose(du, g, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dc, g.sum(axis=0), rtol=1e-4, atol=1e-5)


def test_sgd_gets_the_parts_of_the_sum():
    params = make_params(names=BOTH)
    tx = moe.sd_moe(optax.sgd(1.0), K, refresh_every=0)
    state = tx.init(params)
    grads = gradients(params, 0)
    updates, _ = tx.update(grads, state, params)
    for name, common in params["common"].items():
        u, _, vt = (np.float64(x) for x in np.linalg.svd(np.float64(common)))
        p_u = u[..., :K] @ u[..., :K].swapaxes(-1, -2)
        p_v = vt[:, :K].swapaxes(-1, -2) @ vt[:, :K]
        g = np.float64(grads["experts"][name])
        c = sum(p_u @ g[:, e] + (g[:, e] - p_u @ g[:, e]) @ p_v for e in range(E))
        np.testing.assert_allclose(updates["common"][name], -c, atol=1e-4)
        q_u, q_v = np.eye(p_u.shape[-1]) - p_u, np.eye(p_v.shape[-1]) - p_v
        wanted = -(q_u[:, None] @ g @ q_v[:, None])
        np.testing.assert_allclose(updates["experts"][name], wanted, atol=1e-4)
    np.testing.assert_array_equal(updates["router"]["kernel"], -grads["router"]["kernel"])


def test_mean_of_the_common_gradient():
    params = make_params()
    grads, found = gradients(params, 0), {}
    for how in ("sum", "mean"):
        tx = moe.sd_moe(optax.sgd(1.0), K, refresh_every=0, common_gradient=how)
        found[how], _ = tx.update(grads, tx.init(params), params)
    wide, narrow = found["sum"]["common"]["up"], found["mean"]["common"]["up"]
    np.testing.assert_allclose(wide, E * narrow, rtol=1e-5)
    np.testing.assert_array_equal(*(found[how]["experts"]["up"] for how in found))


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(0.02, weight_decay=0.1),
    "spectra": lambda: optim.spectra(0.02, min_rank=2, weight_decay=0.1),
    "clipped sgd": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)),
}


@pytest.mark.parametrize(
    "inner,on_refresh",
    [("adamw", "move_mean"), ("spectra", "move_mean"), ("clipped sgd", "drop")],
)
def test_unique_parts_stay_in_the_complement(inner, on_refresh):
    tx = moe.sd_moe(OPTIMIZERS[inner](), K, refresh_every=4, on_refresh=on_refresh)
    params, state = train(tx, make_params(), 7)  # one refresh, three steps beyond it
    assert leak(state, params) < 1e-5
    before = make_params()["common"]["up"]
    assert float(jnp.linalg.norm(params["common"]["up"] - before)) > 0.1  # it did learn


def test_elementwise_optimizers_leak_without_the_projected_update():
    inner = optax.adamw(0.02)
    params, state = train(moe.sd_moe(inner, K, project_update=False), make_params(), 3)
    assert leak(state, params) > 0.01
    params, state = train(moe.sd_moe(optax.sgd(0.02), K, project_update=False), make_params(), 3)
    assert leak(state, params) < 1e-5
    params, state = train(moe.sd_moe(inner, K, project_gradient=False), make_params(), 3)
    assert leak(state, params) < 1e-5


@pytest.fixture(scope="module")
def without_refresh():
    return train(moe.sd_moe(optax.adamw(0.05), K, refresh_every=0), make_params(), 3)


@pytest.mark.parametrize("on_refresh", ["move_mean", "drop", "keep"])
def test_a_refresh_moves_what_it_says(on_refresh, without_refresh):
    plain, old = without_refresh
    options = dict(refresh_every=3, refresh_sweeps=20, on_refresh=on_refresh)
    found, state = train(moe.sd_moe(optax.adamw(0.05), K, **options), make_params(), 3)
    changed = total = 0.0
    for name in plain["common"]:
        w_c, w_u = (np.float64(plain[node][name]) for node in ("common", "experts"))
        u, s, vt = np.linalg.svd(w_c)
        u, v = u[..., :K], vt[:, :K].swapaxes(-1, -2)
        overlap = np.linalg.svd(
            np.float64(state.left["common"][name]).swapaxes(-1, -2) @ u, compute_uv=False
        )
        np.testing.assert_allclose(overlap, 1, atol=1e-3)  # the bases are those of the new W_c
        p_u, p_v = (u @ u.swapaxes(-1, -2))[:, None], (v @ v.swapaxes(-1, -2))[:, None]
        r = p_u @ w_u + (w_u - p_u @ w_u) @ p_v
        if on_refresh == "keep":
            r = 0 * r
        mean = r.mean(axis=1) * (on_refresh == "move_mean")
        np.testing.assert_allclose(found["common"][name], w_c + mean, atol=2e-3)
        np.testing.assert_allclose(found["experts"][name], w_u - r, atol=2e-3)
        changed += np.sum((mean[:, None] - r) ** 2)
        total += np.sum((w_c[:, None] + w_u) ** 2)
    assert float(state.refresh_change) == pytest.approx((changed / total) ** 0.5, rel=0.02)
    assert (float(state.refresh_change) == 0) == (on_refresh == "keep")
    moved = float(jnp.max(jnp.abs(state.left["common"]["up"] - old.left["common"]["up"])))
    assert moved > 1e-3


def test_equal_displacements_move_without_changing_a_single_expert():
    params = make_params(names=BOTH)
    one = jnp.asarray(np.random.default_rng(1).normal(size=(L, 1, M, N)), jnp.float32)
    params["experts"]["up"] = jnp.broadcast_to(one, (L, E, M, N))
    params["experts"]["down"] = jnp.zeros((L, E, N, M))
    tx = moe.sd_moe(optax.sgd(0.0), K, refresh_every=1)
    updates, state = tx.update(gradients(params, 0), tx.init(params), params)
    after = optax.apply_updates(params, updates)
    assert float(state.refresh_change) < 1e-6
    whole, before = (moe.fold_common(tree)["experts"]["up"] for tree in (after, params))
    np.testing.assert_allclose(whole, before, atol=1e-5)
    assert float(jnp.max(jnp.abs(updates["common"]["up"]))) > 0.1


def test_refreshes_come_at_their_step_and_only_there():
    tx = moe.sd_moe(optax.adamw(0.05), K, refresh_every=3)
    params, moved = make_params(), []
    state = tx.init(params)
    for seed in range(7):
        before = state.left["common"]["up"]
        params, state = train(tx, params, 1, seed, state)
        moved.append(bool(jnp.any(state.left["common"]["up"] != before)))
    assert moved == [False, False, True] * 2 + [False]


def test_no_square_matrix_and_the_flops_of_thin_factors():
    # Sides that nothing else has, so that an m x m or n x n value shows in the program's shapes.
    m, n, experts, k = 176, 208, 3, 8
    common, unique = moe.init_sd_moe(jax.random.key(0), experts, (m, n), k, std=0.1)
    params = {"common": {"up": common}, "experts": {"up": unique}}
    tx = moe.sd_moe(optax.sgd(0.1), k, refresh_every=16)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    text = compiled.as_text()
    assert f"[{experts},{m},{n}]" in text  # the shapes are written as this test looks for them
    assert not re.search(rf"\[(\d+,)*({m},{m}|{n},{n})\]", text)
    tx = moe.sd_moe(optax.sgd(0.1), k, refresh_every=0)
    flops = jax.jit(tx.update).lower(params, state, params).compile().cost_analysis()["flops"]
    # Gradients and updates of the experts and the common gradient, 8 m n k each.
    ideal = 8 * m * n * k * (2 * experts + 1)
    assert ideal < flops < 1.3 * ideal


def test_sharded_over_experts_equals_one_device():
    params = make_params(names=BOTH)
    tx = moe.sd_moe(optax.adamw(0.02), K, refresh_every=2)
    grads = [gradients(params, seed) for seed in range(3)]

    def run(params, grads):
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    alone, _ = compile_fast(run)(params, grads)
    mesh = jax.make_mesh((4, 2), ("expert", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "common": {"up": P(None, "fsdp"), "down": P(None, None, "fsdp")},
        "experts": {"up": P(None, "expert", "fsdp"), "down": P(None, "expert", None, "fsdp")},
        "router": {"kernel": P()},
    }
    layout = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    place = lambda tree: jax.tree.map(jax.device_put, tree, layout)  # noqa: E731
    run = compile_fast(run, out_shardings=(layout, None))
    spread, state = run(place(params), [*map(place, grads)])
    assert spread["experts"]["up"].sharding.spec == P(None, "expert", "fsdp")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone, spread)
    assert leak(jax.device_get(state), jax.device_get(spread)) < 1e-5


def test_a_restored_state_goes_on_bit_for_bit(tmp_path):
    import orbax.checkpoint as ocp

    tx = moe.sd_moe(optax.adamw(0.02), K, refresh_every=4)
    params, state = train(tx, make_params(), 6)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"params": params, "state": state})
        restored = checkpointer.restore(tmp_path / "state", abstract)
    onward = train(tx, params, 3, start=6, state=state)
    again = train(tx, restored["params"], 3, start=6, state=restored["state"])
    jax.tree.map(np.testing.assert_array_equal, onward, again)


def test_bfloat16_parameters_keep_their_dtype_and_stable_state_types():
    params = make_params(jnp.bfloat16)
    tx = moe.sd_moe(optax.adamw(0.02), K, refresh_every=2)
    after, state = train(tx, params, 3)
    assert after["experts"]["up"].dtype == after["common"]["up"].dtype == jnp.bfloat16
    assert state.left["common"]["up"].dtype == jnp.float32
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert kinds(tx.init(params)) == kinds(state)
    assert leak(state, after) < 0.02  # rounding of the parameters


def test_a_single_layer_and_no_stack():
    common, unique = moe.init_sd_moe(jax.random.key(0), E, (M, N), K, std=0.2)
    params = {"common": common, "experts": unique}
    tx = moe.sd_moe(optax.sgd(0.1), K, refresh_every=2)
    updates, state = tx.update(params, tx.init(params), params)
    assert updates["experts"].shape == (E, M, N) and state.left["common"].shape == (M, K)


def test_folding_keeps_every_expert_and_leaves_the_rest():
    params = {"layers": {"mlp": make_params(names=BOTH)}, "head": jnp.ones(3)}
    folded = moe.fold_common(params)
    mlp = params["layers"]["mlp"]
    assert set(folded["layers"]["mlp"]) == {"experts", "router"}
    assert "common" in mlp  # the given tree is not changed
    wanted = mlp["common"]["down"][:, None] + mlp["experts"]["down"]
    np.testing.assert_array_equal(folded["layers"]["mlp"]["experts"]["down"], wanted)
    np.testing.assert_array_equal(folded["head"], params["head"])


def test_works_as_a_part_of_a_partition_and_under_map_params():
    params = make_params()
    labels = {"common": "sd", "experts": "sd", "router": "sgd"}
    tx = optax.partition({"sd": moe.sd_moe(optax.adamw(0.1), K), "sgd": optax.sgd(0.1)}, labels)
    after, _ = train(tx, params, 2)
    assert float(jnp.max(jnp.abs(after["experts"]["up"] - params["experts"]["up"]))) > 0.01
    tx = moe.sd_moe(optax.adamw(0.1), K)
    masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    seen = []
    optax.tree.map_params(
        tx, lambda leaf: seen.append(getattr(leaf, "shape", None)), tx.init(params), is_leaf=masked
    )
    assert (L, M, K) in seen and (L, E, M, N) in seen


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(rank=0), "rank must be a whole number, 1 or more, got 0"),
        (dict(refresh_every=-1), "refresh_every must be a whole number, 0 or more"),
        (dict(on_refresh="mean"), "on_refresh must be drop, move_mean or keep, got 'mean'"),
        (dict(common_gradient="max"), "common_gradient must be sum or mean"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        moe.sd_moe(optax.sgd(0.1), **change)


def test_bad_parameters():
    tx = moe.sd_moe(optax.sgd(0.1), K)
    params = make_params(names=BOTH)
    with pytest.raises(ValueError, match="hold no 'common' beside 'experts'"):
        tx.init({"experts": params["experts"]})
    with pytest.raises(ValueError, match="common/up has no partner"):
        tx.init(params | {"experts": {"down": params["experts"]["down"]}})
    with pytest.raises(ValueError, match=r"must be \[..., m, n\] and its experts"):
        tx.init(params | {"experts": jax.tree.map(lambda x: x[..., 1:], params["experts"])})
    with pytest.raises(ValueError, match="below both sides of a 32 x 24 expert, got 24"):
        moe.sd_moe(optax.sgd(0.1), 24).init({k: params[k] for k in ("common", "experts")})
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_the_example_of_the_docstring():
    result = doctest.testmod(sys.modules["moe.sd_moe"])
    assert result.attempted > 0 and result.failed == 0
