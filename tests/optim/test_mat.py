import doctest
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim import Modules, label_modules, mat, mat_refresh, modular_rule, random_rule, temporal_rule

LAYERS, D, HEADS, WIDTH = 3, 4, 2, 3


def make_params(rng):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {
        "in": draw(LAYERS, D, HEADS * WIDTH),
        "out": draw(LAYERS, HEADS * WIDTH, D),
        "mlp": draw(LAYERS, D, D),
        "free": draw(D, D),
    }


def label(path, leaf):
    name = path[0].key
    if name == "free":
        return None
    if name == "mlp":
        return Modules("mlp", ((0, LAYERS),))
    return Modules("heads", ((0, LAYERS), (2 if name == "in" else 1, HEADS)))


ACTIVE = {
    "heads": np.array([[True, False], [False, False], [True, True]]),
    "mlp": np.array([False, True, True]),
}


def still(name, leaf):
    """Where a leaf of this name must not change, by NumPy alone."""
    where = np.zeros(leaf.shape, bool)
    for layer in range(LAYERS):
        if name == "mlp":
            where[layer] = not ACTIVE["mlp"][layer]
        for head in range(HEADS):
            span = slice(head * WIDTH, (head + 1) * WIDTH)
            if name == "in":
                where[layer, :, span] = not ACTIVE["heads"][layer, head]
            if name == "out":
                where[layer, span] = not ACTIVE["heads"][layer, head]
    return where


def muon_dimensions(params):
    axes = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda leaf: axes(leaf.ndim - 2, leaf.ndim - 1), params)


INNER = {
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-0.1)
    ),
    "muon": lambda: optax.contrib.muon(1e-2, muon_weight_dimension_numbers=muon_dimensions),
    "partition": lambda: optax.partition(
        {"a": optax.adamw(1e-2), "b": optax.sgd(0.1, momentum=0.9)},
        lambda params: {"in": "a", "out": "b", "mlp": "b", "free": "a"},
    ),
}


@pytest.mark.parametrize("name", INNER)
def test_inactive_modules_and_their_moments_stand_still_bit_for_bit(name, rng):
    params = make_params(rng)
    inner = INNER[name]()
    tx = mat(inner, label_modules(label, params))
    step = jax.jit(lambda g, s, p, active: tx.update(g, s, p, active=active))
    everything = jax.tree.map(jnp.ones_like, ACTIVE)
    grads = make_params(rng)
    state = tx.init(params)
    plain_updates, plain_state = jax.jit(inner.update)(grads, inner.init(params), params)
    updates, state = step(grads, state, params, everything)
    # All active: the optimizer's own update, up to how XLA orders its sums.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # noqa: E731
    jax.tree.map(close, updates, plain_updates)
    jax.tree.map(close, state.inner_state, plain_state)

    grads = make_params(rng)
    frozen, after = step(grads, state, params, jax.tree.map(jnp.asarray, ACTIVE))
    for leaf in params:
        where = still(leaf, params[leaf])
        assert not np.any(np.asarray(frozen[leaf])[where]), leaf
        assert np.all(np.asarray(frozen[leaf])[~where]), leaf
    mirrored = 0
    before = jax.tree_util.tree_leaves_with_path(state.inner_state)
    for (path, old), new in zip(before, jax.tree.leaves(after.inner_state), strict=True):
        leaf = next((e.key for e in reversed(path) if getattr(e, "key", None) in params), None)
        if leaf is not None and old.shape == params[leaf].shape:
            mirrored += 1
            where = still(leaf, old)
            np.testing.assert_array_equal(np.asarray(new)[where], np.asarray(old)[where])
            assert np.any(np.asarray(new)[~where] != np.asarray(old)[~where])
    assert mirrored >= len(params)
    assert step._cache_size() == 1


def test_state_of_another_shape_is_frozen_by_whole_layers_only(rng):
    """Like a cached basis: one column for each matrix of a stack."""

    def init(params):
        return jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], 1)), params)

    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda s: s + 1, state)

    params = make_params(rng)
    tx = mat(optax.GradientTransformation(init, update), label_modules(label, params))
    state = tx.init(params)
    _, state = tx.update(params, state, params, active=jax.tree.map(jnp.asarray, ACTIVE))
    np.testing.assert_array_equal(state.inner_state["mlp"][:, 0, 0], ACTIVE["mlp"])
    assert np.all(state.inner_state["in"] == 1) and np.all(state.inner_state["free"] == 1)


def test_the_state_chooses_unless_told_and_types_are_stable(rng):
    params = make_params(rng)
    tx = mat(optax.adam(1e-2), label_modules(label, params))
    state = tx.init(params)
    assert all(bool(flags.all()) for flags in state.active.values())
    state = state._replace(active=jax.tree.map(jnp.asarray, ACTIVE))
    by_state, after = tx.update(params, state, params)
    by_argument, _ = tx.update(params, tx.init(params), params, active=ACTIVE)
    jax.tree.map(np.testing.assert_array_equal, by_state, by_argument)
    kind = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)  # noqa: E731
    assert kind(after) == kind(state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    mirrors = optax.tree.map_params(tx, lambda leaf: leaf.shape, state)
    assert mirrors.inner_state[0].mu == jax.tree.map(jnp.shape, params)


def test_modular_rule():
    values = {"a": np.array([1.0, 0.05, 0.2, 0.1]), "b": np.array([[3.0, 100.0], [9.0, 11.0]])}
    for alpha in (0.0, 0.1, 1.0):
        got = modular_rule(values, alpha=alpha)
        for kind, v in values.items():
            np.testing.assert_array_equal(got[kind], v >= alpha * v.max())
    for target in (0.0, 0.25, 0.34, 0.5, 1.0):
        got = modular_rule(values, target_active=target)
        for kind, v in values.items():
            count = math.ceil(target * v.size)
            chosen = np.isin(v, np.sort(v.reshape(-1))[::-1][:count])
            np.testing.assert_array_equal(got[kind], chosen)
    # Of equals the first; 0.1 of 30 is 3 and not, by rounding, 4.
    ties = modular_rule({"a": np.ones(30)}, target_active=0.1)["a"]
    np.testing.assert_array_equal(ties, np.arange(30) < 3)


def test_temporal_rule():
    change, last = {"a": np.array([1.0, 1.0, 3.0])}, {"a": np.array([1.05, 1.2, 3.0])}
    first = {"a": np.array([1.0, 1.0, 0.0])}
    got = temporal_rule(change, last, first, beta=0.1)["a"]
    np.testing.assert_array_equal(got, [True, False, False])


def test_random_rule_keeps_the_counts_and_forgets_the_choice():
    active = {"a": jnp.arange(40) < 7, "b": jnp.arange(12).reshape(3, 4) < 6}
    draws = [random_rule(jax.random.key(i), active) for i in range(200)]
    assert all(int(d["a"].sum()) == 7 and int(d["b"].sum()) == 6 for d in draws)
    frequency = np.mean([d["a"] for d in draws], axis=0)
    np.testing.assert_allclose(frequency, 7 / 40, atol=0.11)


def simulate(values, alpha, beta):
    """The policy over refreshes, module by module, in NumPy."""
    first, changes, stopped, actives = values[0], [], np.zeros(values[0].shape, bool), []
    for t, value in enumerate(values):
        changes.append(np.abs(value - first))
        if t >= 2:
            stopped |= np.abs(changes[t] - changes[t - 1]) < beta * changes[1]
        actives.append((value >= alpha * value.max()) & ~stopped)
    return actives


def test_refresh_follows_the_rules_over_time(rng):
    # f32 numbers, so that both sides compare the same values.
    values = np.cumsum(rng.exponential(1.0, (8, 5)), axis=0) * rng.exponential(1.0, (8, 5))
    values[3:, 0] = values[2, 0]  # comes to rest: stopped at the refresh after
    values[:, 1] = [9, 0, 9, 0, 9, 0, 9, 0]  # fails the modular rule now and then, comes back
    values = values.astype(np.float32)
    tx = mat(optax.sgd(0.1), {"w": Modules("m", ((0, 5),))})
    state = tx.init({"w": jnp.zeros((5, 2))})
    refresh = jax.jit(lambda s, v: mat_refresh(s, {"m": v}, alpha=0.1, beta=0.05))
    actives = []
    for value in values:
        state = refresh(state, value)
        actives.append(np.asarray(state.active["m"]))
    np.testing.assert_array_equal(actives, simulate(values, 0.1, 0.05))
    assert not any(a[0] for a in actives[3:])
    assert [a[1] for a in actives[:5]] == [True, False, True, False, True]
    assert state.refreshes == 8 and refresh._cache_size() == 1


def test_refresh_ignores_a_round_that_is_not_finite():
    tx = mat(optax.sgd(0.1), {"w": Modules("m", ((0, 3),))})
    state = mat_refresh(tx.init({"w": jnp.zeros((3, 2))}), {"m": jnp.array([1.0, 0.0, 2.0])})
    again = mat_refresh(state, {"m": jnp.array([1.0, jnp.nan, 2.0])})
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_random_refresh_has_equal_activity():
    tx = mat(optax.sgd(0.1), {"w": Modules("m", ((0, 20),))})
    state = tx.init({"w": jnp.zeros((20, 2))})
    values = {"m": jnp.arange(20.0)}
    ours = mat_refresh(state, values, target_active=0.34).active["m"]
    control = mat_refresh(state, values, target_active=0.34, random_key=jax.random.key(0))
    assert int(ours.sum()) == int(control.active["m"].sum()) == 7
    assert np.any(ours != control.active["m"])


def test_trains_what_is_active():
    """A quadratic: active modules converge, inactive ones stay where they started."""
    target = jnp.array([[1.0, -2.0], [3.0, 4.0]])
    tx = mat(optax.adam(0.1), Modules("m", ((0, 2),)))
    params, state = jnp.zeros((2, 2)), tx.init(jnp.zeros((2, 2)))
    state = state._replace(active={"m": jnp.array([True, False])})

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum((p - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(300):
        params, state = step(params, state)
    np.testing.assert_allclose(params[0], target[0], atol=1e-2)
    np.testing.assert_array_equal(params[1], 0)


def test_bad_input_is_named():
    tx = mat(optax.sgd(0.1), {"w": Modules("m", ((0, 3),))})
    params = {"w": jnp.zeros((3, 2))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"active must hold bools of shapes .*got {'m': \(2,\)}"):
        tx.update(params, state, params, active={"m": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match="eigenvalues must have shapes"):
        mat_refresh(state, {"n": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"target_active must lie in \[0, 1\], got 1.5"):
        mat_refresh(state, {"m": jnp.ones(3)}, target_active=1.5)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got -1"):
        modular_rule({"m": jnp.ones(3)}, alpha=-1)
    with pytest.raises(TypeError, match="optim.Modules and None, got 'm'"):
        mat(optax.sgd(0.1), {"w": "m"})
    for axes in (((0, 2),), ((-1, 2),), ((2, 1),)):
        with pytest.raises(ValueError, match=r"does not fit a leaf of shape \(3, 2\)"):
            mat(optax.sgd(0.1), {"w": Modules("m", axes)}).init(params)


def test_example():
    assert doctest.testmod(sys.modules["optim.mat"]).failed == 0
