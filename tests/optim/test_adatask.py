import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optim
from optim.adatask import BASES

# Three steps of two tasks on three parameters. The expected positions are those of the authors'
# PyTorch class in float64 (adam), and of the same substitution in AdaGrad and RMSProp.
START = [1.0, 2.0, 3.0]
GRADS = np.array(
    [
        [[1.0, 0.1, -2.0], [10.0, -0.1, 0.5]],
        [[0.5, 0.2, -1.0], [-20.0, 0.0, 0.5]],
        [[-1.0, 0.1, 0.0], [5.0, -0.3, 1.0]],
    ]
)
GOLDEN = {
    "adam": [
        [0.98, 2.0, 3.0],
        [0.974339239, 1.997048762, 2.999321797],
        [0.974598315, 1.995326742, 2.996849675],
    ],
    "adagrad": [0.988956624, 1.996460078, 2.989236103],
    "rmsprop": [0.889684645, 1.964400444, 2.892159369],
}
JOINT_ADAM = [0.994495242, 1.993010455, 3.020982892]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def trajectory(tx, start, grads, presents=None, jit=False):
    """Positions after every step, and the last state."""
    update = jax.jit(tx.update) if jit else tx.update
    x, state, positions = start, tx.init(start), []
    for i, g in enumerate(grads):
        extra = {} if presents is None else {"present": jnp.asarray(presents[i])}
        updates, state = update(g, state, x, **extra)
        x = optax.apply_updates(x, updates)
        positions.append(x)
    return positions, state


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_the_authors_numbers(float64, base, jit):
    tx = optim.adatask(0.01, 2, base, decay=0.99)
    positions, _ = trajectory(tx, jnp.array(START), jnp.array(GRADS), jit=jit)
    if base == "adam":
        np.testing.assert_allclose(positions, GOLDEN[base], rtol=0, atol=5e-9)
    # eps moves AdaGrad's and RMSProp's positions by about 1e-9
    np.testing.assert_allclose(positions[-1], np.array(GOLDEN[base]).reshape(-1, 3)[-1], atol=5e-9)


def test_joint_is_the_base_optimizer_on_the_sum(float64):
    tx = optim.adatask(0.01, 2, joint=True)
    positions, _ = trajectory(tx, jnp.array(START), jnp.array(GRADS))
    np.testing.assert_allclose(positions[-1], JOINT_ADAM, rtol=0, atol=5e-9)
    plain, _ = trajectory(optax.adam(0.01), jnp.array(START), jnp.array(GRADS.sum(1)))
    np.testing.assert_allclose(positions, plain, rtol=1e-14)


@pytest.mark.parametrize("owner", [False, 1])
def test_a_head_gets_plain_adam(float64, owner):
    params = {"body": jnp.array(START), "head": {"w": jnp.array(0.5)}}
    # Gradients of 1 and then -3, of the summed losses, always along the same sign of the update:
    # the golden path of a head with a gradient of 1 - 3 = -2 is one learning rate a step.
    grads = [{"body": jnp.array(g), "head": {"w": jnp.array(1.0 - 3.0)}} for g in GRADS]
    shared = lambda path: owner if path == "head/w" else True  # noqa: E731
    for mask in (shared, {"body": True, "head": owner}):
        positions, _ = trajectory(optim.adatask(0.01, 2, shared=mask), params, grads)
        np.testing.assert_allclose([p["head"]["w"] for p in positions], [0.51, 0.52, 0.53])
        np.testing.assert_allclose(positions[-1]["body"], GOLDEN["adam"][-1], atol=5e-9)


@pytest.mark.parametrize("dtype,rounding", [("float32", 3e-7), ("float64", 5e-16)])
def test_one_task_is_adam(float64, rng, dtype, rounding):
    start = {"w": jnp.asarray(rng.normal(size=(5, 3)), dtype), "b": jnp.zeros(3, dtype)}
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(dtype), start) for _ in "12345"]
    ours, theirs = optim.adatask(1e-2, 1, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)
    state, expected_state, x = ours.init(start), theirs.init(start), start
    for g in grads:
        updates, state = ours.update(jax.tree.map(lambda g: g[None], g), state, x)
        expected, expected_state = theirs.update(g, expected_state, x)
        # XLA rounds the powers of decay rates differently in different programs.
        close = functools.partial(np.testing.assert_allclose, rtol=rounding)
        jax.tree.map(close, updates, expected)
        for name in ("mu", "nu"):
            mine = jax.tree.map(lambda m: m[0], getattr(state[0], name))
            jax.tree.map(np.testing.assert_array_equal, mine, getattr(expected_state[0], name))
        x = optax.apply_updates(x, expected)


def reference(grads, presents, base, b1=0.9, b2=0.999, eps=1e-8, decay=0.9):
    """A loop over tasks and steps in NumPy; returns the updates and the parts of each task."""
    steps, num_tasks, size = grads.shape
    m, v, t = np.zeros((num_tasks, size)), np.zeros((num_tasks, size)), np.zeros(num_tasks)
    parts = np.zeros_like(grads)
    for i in range(steps):
        for k in np.flatnonzero(presents[i]):
            g, t[k] = grads[i, k], t[k] + 1
            if base == "adam":
                m[k], v[k] = b1 * m[k] + (1 - b1) * g, b2 * v[k] + (1 - b2) * g * g
                slope = m[k] / (1 - b1 ** t[k])
                parts[i, k] = slope / (np.sqrt(v[k] / (1 - b2 ** t[k])) + eps)
            else:
                v[k] = v[k] + g * g if base == "adagrad" else decay * v[k] + (1 - decay) * g * g
                parts[i, k] = g / (np.sqrt(v[k]) + eps)
    return parts.sum(1), parts


def average(parts, decay):
    """The AU metric from the parts of the updates."""
    au = np.zeros(parts.shape[1:])
    for part in parts:
        au = decay * au + (1 - decay) * part**2
    return au


PRESENTS = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]], bool)


@pytest.mark.parametrize("base", BASES)
def test_absent_tasks_rest(float64, rng, base):
    grads = rng.normal(size=(6, 3, 4)) * np.array([1.0, 30.0, 0.01])[:, None]
    expected, parts = reference(grads, PRESENTS, base)
    grads[~PRESENTS] = np.nan  # whatever an absent task's gradients hold
    tx = optim.scale_by_adatask(3, base, dominance_decay=0.7)
    state = tx.init(jnp.zeros(4))
    for i in range(6):
        before = state
        update, state = jax.jit(tx.update)(grads[i], state, present=jnp.asarray(PRESENTS[i]))
        np.testing.assert_allclose(update, expected[i], rtol=1e-12, atol=1e-14)
        for old, new in ((before.mu, state.mu), (before.nu, state.nu)):
            if old is not None:
                np.testing.assert_array_equal(old[~PRESENTS[i]], new[~PRESENTS[i]])
    np.testing.assert_array_equal(state.count, PRESENTS.sum(0))
    assert state.steps == 6
    np.testing.assert_allclose(state.au, average(parts, 0.7), rtol=1e-12)


def test_the_head_of_an_absent_task_rests_and_a_common_one_does_not():
    params = {"body": jnp.zeros(2), "a": jnp.zeros(2), "common": jnp.zeros(2)}
    grads = {"body": jnp.ones((2, 2)), "a": jnp.ones(2), "common": jnp.ones(2)}
    tx = optim.scale_by_adatask(2, shared={"body": True, "a": 0, "common": False})
    _, state = tx.update(grads, tx.init(params))
    rest, after = tx.update(
        grads | {"a": jnp.full(2, jnp.nan)}, state, present=jnp.array([False, True])
    )
    np.testing.assert_array_equal(rest["a"], 0)
    np.testing.assert_array_equal(after.mu["a"], state.mu["a"])
    assert (
        (rest["common"] > 0.9).all() and (rest["body"] > 0.9).all() and (rest["body"] < 1.1).all()
    )
    again, _ = tx.update(grads, after)
    np.testing.assert_allclose(again["a"], 1.0, rtol=1e-4)  # its own count corrects the bias


def test_in_a_joint_optimizer_an_absent_task_has_a_gradient_of_zero(rng):
    grads = rng.normal(size=(6, 3, 4)).astype("f4")
    tx = optim.adatask(0.1, 3, joint=True)
    silent = np.where(PRESENTS[..., None], grads, np.nan)
    ours, _ = trajectory(tx, jnp.zeros(4), silent, PRESENTS)
    summed = np.where(PRESENTS[..., None], grads, 0).sum(1)
    theirs, _ = trajectory(optax.adam(0.1), jnp.zeros(4), summed)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_weights_decay_once():
    tx = optim.adatask(0.5, 3, weight_decay=0.1, mask={"w": True, "b": False})
    params = {"w": jnp.full(2, 2.0), "b": jnp.full(2, 2.0)}
    zeros = jax.tree.map(lambda p: jnp.zeros((3, *p.shape)), params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("numerator", ["momentum", "gradient"])
def test_dominance_against_numpy(float64, rng, joint, numerator):
    grads = rng.normal(size=(5, 2, 4)) * np.array([1.0, 10.0])[:, None]
    b1, b2, decay = 0.9, 0.999, 0.8
    m, v, parts = np.zeros((2, 4)), np.zeros((2, 4)), []
    for t, g in enumerate(grads, 1):
        pooled = np.tile(g.sum(0), (2, 1)) if joint else g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * pooled**2
        top = m / (1 - b1**t) if numerator == "momentum" else g
        parts.append(top / (np.sqrt(v / (1 - b2**t)) + 1e-8))
    au = average(np.array(parts), decay)
    tx = optim.adatask(0.01, 2, joint=joint, dominance_decay=decay, dominance_numerator=numerator)
    params = {"w": jnp.zeros((2, 2)), "still": jnp.zeros(2)}
    stacked = [{"w": g.reshape(2, 2, 2), "still": jnp.zeros((2, 2))} for g in grads]
    _, state = trajectory(tx, params, stacked)
    relative, mean = optim.task_dominance(state)
    expected = au / au.sum(0)
    np.testing.assert_allclose(relative["w"].reshape(2, 4), expected, rtol=1e-10)
    np.testing.assert_allclose(mean["w"], expected.mean(1), rtol=1e-10)
    np.testing.assert_array_equal(relative["still"], 0)
    np.testing.assert_array_equal(mean["still"], 0)
    if joint:
        assert mean["w"][1] > 0.8, "the steep task moves the parameters"


def test_dominance_of_parameters_that_are_not_shared_is_not_there():
    tx = optim.adatask(0.1, 2, shared={"a": True, "b": False}, dominance_decay=0.9)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    _, state = tx.update({"a": jnp.ones((2, 2)), "b": jnp.ones(3)}, tx.init(params), params)
    relative, mean = optim.task_dominance(state)
    assert isinstance(relative["b"], optax.MaskedNode) and isinstance(mean["b"], optax.MaskedNode)
    np.testing.assert_allclose(relative["a"], 0.5)
    with pytest.raises(ValueError, match="dominance_decay, found 0"):
        optim.task_dominance(optim.adatask(0.1, 2).init(params))


def two_parabolas(x):
    """A steep and a flat one; the flat one's minimum is at 1, both at 2 in the second half."""
    return jnp.stack(
        [1e4 * jnp.sum((x[2:] - 2.0) ** 2), jnp.sum((x - jnp.array([1, 1, 2, 2])) ** 2)]
    )


@pytest.mark.parametrize("base,rate", [("adam", 0.05), ("rmsprop", 0.02), ("adagrad", 0.5)])
def test_converges_without_recompilation_and_keeps_the_types_of_its_state(base, rate):
    tx = optim.adatask(optax.cosine_decay_schedule(rate, 400), 2, base, dominance_decay=0.9)
    value_and_grad = optim.per_task_value_and_grad(two_parabolas)

    @jax.jit
    def step(x, state):
        _, grads = value_and_grad(x)
        # An extra argument for somebody else in the chain does no harm.
        updates, state = tx.update(grads, state, x, value=1.0, present=jnp.ones(2, bool))
        return optax.apply_updates(x, updates), state

    x = jnp.zeros(4)
    state = tx.init(x)
    types = jax.tree.map(jax.typeof, state)
    for _ in range(2):
        x, state = step(x, state)
    assert step._cache_size() == 1 and jax.tree.map(jax.typeof, state) == types
    (x, state), _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (x, state), length=398)
    np.testing.assert_allclose(x, [1, 1, 2, 2], atol=2e-2)


def test_bfloat16_parameters_keep_a_float32_second_moment(rng):
    params = jnp.zeros(64, jnp.bfloat16)
    tx = optim.adatask(1.0, 2, b1=0.0, b2=0.999)
    state = tx.init(params)
    types = jax.tree.map(jax.typeof, state)
    for _ in range(20):
        grads = jnp.asarray(rng.normal(size=(2, 64)), jnp.bfloat16)
        updates, state = tx.update(grads, state, params)
    assert updates.dtype == jnp.bfloat16 and jax.tree.map(jax.typeof, state) == types
    assert state[0].mu.dtype == jnp.bfloat16 and state[0].nu.dtype == jnp.float32
    # A decay of 0.999 is lost in bfloat16, whose spacing is 2^-8: the update would be far off.
    nu = state[0].nu / (1 - 0.999**20)
    expected = -(grads.astype(jnp.float32) / (jnp.sqrt(nu) + 1e-8)).sum(0)
    np.testing.assert_allclose(updates.astype(jnp.float32), expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(nu.mean(), 1.0, atol=0.1)
    assert optim.adatask(1.0, 2, mu_dtype="bfloat16").init(jnp.zeros(3))[0].mu.dtype == jnp.bfloat16


def test_eight_devices_update_like_one_without_collectives(rng):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params = jnp.asarray(rng.normal(size=(16, 4)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(3, 16, 4)), jnp.float32)
    tx = optim.adatask(0.1, 3, weight_decay=0.1, dominance_decay=0.9)
    here, stacked = NamedSharding(mesh, P("x")), NamedSharding(mesh, P(None, "x"))
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    place = lambda leaf: stacked if leaf.ndim == 3 else NamedSharding(mesh, P())  # noqa: E731
    state = tx.init(params)
    layout = jax.tree.map(place, state)
    update = jax.jit(tx.update, out_shardings=(here, layout))
    arguments = (
        jax.device_put(grads, stacked), jax.device_put(state, layout), jax.device_put(params, here)
    )  # fmt: skip
    text = update.lower(*arguments).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "permute"))
    updates, after = update(*arguments)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)
    assert after[0].mu.sharding == stacked


@pytest.mark.parametrize("joint", [False, True])
def test_types_are_stable_in_an_explicit_mesh(joint):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("x")))
        grads = jax.device_put(jnp.ones((3, 16, 4)), NamedSharding(mesh, P(None, "x")))
        tx = optim.adatask(0.1, 3, weight_decay=0.1, dominance_decay=0.9, joint=joint)
        state = tx.init(params)
        assert state[0].mu.sharding.spec == P(None, "x", None)
        for update in (tx.update, jax.jit(tx.update)):
            updates, after = update(grads, state, params, present=jnp.array([True, False, True]))
            assert jax.typeof(updates) == jax.typeof(params)
            assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        np.testing.assert_allclose(optim.task_dominance(after).mean, [0.5, 0.0, 0.5])


def test_wrappers_of_optax(rng):
    grads = jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32)
    start = jnp.ones(3)
    tx = optim.adatask(0.1, 2)
    plain, _ = trajectory(tx, start, grads)
    # hyperparameters in the state
    injected = optax.inject_hyperparams(optim.adatask, static_args=("num_tasks",))(0.1, num_tasks=2)
    ours, state = trajectory(injected, start, grads, jit=True)
    np.testing.assert_allclose(ours, plain, rtol=1e-5)
    np.testing.assert_allclose(state.hyperparams["learning_rate"], 0.1)
    with pytest.raises(ValueError, match="static_args"):
        optax.inject_hyperparams(optim.adatask)(0.1, num_tasks=2).init(start)
    # only some parameters
    masked = optax.masked(tx, {"a": True, "b": False})
    both = {"a": start, "b": start}
    updates, _ = masked.update({"a": grads[0], "b": start}, masked.init(both), both)
    np.testing.assert_allclose(updates["a"], plain[0] - start, rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], start)
    # a no-op that finds everything shaped like parameters
    seen = []
    mapped = optax.tree.map_params(tx, lambda leaf: seen.append(leaf.shape) or leaf, tx.init(both))
    assert seen == [(2, 3)] * 4 and jax.tree.structure(mapped) == jax.tree.structure(tx.init(both))


def test_accumulation_and_skipping_of_what_is_not_finite(rng):
    grads = jnp.asarray(rng.normal(size=(4, 2, 3)), jnp.float32)
    start, tx = jnp.ones(3), optim.adatask(0.1, 2)
    steps = optax.MultiSteps(tx, 2)
    state = steps.init(start)._replace(acc_grads=jnp.zeros((2, 3)))
    x = start
    for g in grads:
        updates, state = jax.jit(steps.update)(g, state, x)
        x = optax.apply_updates(x, updates)
    expected, _ = trajectory(tx, start, grads.reshape(2, 2, 2, 3).mean(1))
    np.testing.assert_allclose(x, expected[-1], rtol=1e-6)
    guarded = optax.MultiSteps(tx, 1, should_skip_update_fn=optax.skip_not_finite)
    state = guarded.init(start)._replace(acc_grads=jnp.zeros((2, 3)))
    x = start
    for g in (grads[0], grads[1].at[1, 2].set(jnp.inf), grads[2].at[0, 0].set(jnp.nan), grads[3]):
        updates, state = jax.jit(guarded.update)(g, state, x)
        x = optax.apply_updates(x, updates)
    expected, _ = trajectory(tx, start, grads[np.array([0, 3])])
    np.testing.assert_allclose(x, expected[-1], rtol=1e-6)


def test_numpy_scalars_are_numbers(rng):
    g, wide = jnp.asarray(rng.normal(size=(2, 3)), jnp.float32), np.float64
    shared = {"a": np.bool_(True), "b": np.int64(1)}
    grads = {"a": g, "b": g[0]}
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    plain = optim.adatask(0.1, 2, shared={"a": True, "b": 1})
    tx = optim.adatask(0.1, np.int64(2), shared=shared)
    updates = [t.update(grads, t.init(params), params)[0] for t in (plain, tx)]
    jax.tree.map(np.testing.assert_array_equal, *updates)
    with jax.enable_x64(True):
        tx = optim.scale_by_adatask(2, b1=wide(0.9), b2=wide(0.99), dominance_decay=wide(0.9))
        state = tx.init(params["a"])
        _, after = tx.update(g, state)
        assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def test_mistakes_are_told(rng):
    for arguments, match in (
        ({"num_tasks": 0}, "above 0, got 0"),
        ({"num_tasks": 2, "base": "sgd"}, "adam, rmsprop, adagrad, got 'sgd'"),
        ({"num_tasks": 2, "dominance_numerator": "mu"}, "momentum, gradient, got 'mu'"),
    ):
        with pytest.raises(ValueError, match=match):
            optim.scale_by_adatask(**arguments)
    tx = optim.scale_by_adatask(2, shared=lambda path: path != "head")
    params = {"body": jnp.zeros((3, 4)), "head": jnp.zeros(5)}
    state = tx.init(params)
    good = {"body": jnp.zeros((2, 3, 4)), "head": jnp.zeros(5)}
    with pytest.raises(ValueError, match=r"'body' must have shape \(2, 3, 4\), with.*\(3, 4\)"):
        tx.update(good | {"body": jnp.zeros((3, 4))}, state)
    with pytest.raises(ValueError, match=r"'head' must have shape \(5,\), without.*\(2, 5\)"):
        tx.update(good | {"head": jnp.zeros((2, 5))}, state)
    with pytest.raises(ValueError, match=r"present must be bool \[2\], got \(3,\)"):
        tx.update(good, state, present=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"task in \[0, 2\).*'head' it is 2"):
        optim.scale_by_adatask(2, shared=lambda path: 2 if path == "head" else True).init(params)


@pytest.mark.parametrize("name", ["adatask", "task_dominance", "task_gradients"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"optim.{name}"))
    assert result.attempted > 0 and result.failed == 0
