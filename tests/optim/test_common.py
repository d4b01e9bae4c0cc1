"""What every optimizer of the package must hold, one row for each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optim

SHAPES = {"kernel": (8, 16, 24), "bias": (24,)}


def spectra(learning_rate, **options):
    return optim.spectra(learning_rate, rank_ratio=0.2, **options)


def ours(learning_rate, **options):
    extra = dict(rank="auto", nesterov=True, normalization="factored")
    return optim.spectra(learning_rate, rank_ratio=0.25, **extra, **options)


def one_task(learning_rate, **options):
    """AdaTask whose gradients have no task axis: every parameter belongs to the one task."""
    return optim.adatask(learning_rate, 1, shared=lambda path: False, **options)


def modular(learning_rate, **options):
    modules = {"kernel": optim.Modules("layers", ((0, 8),)), "bias": None}
    return optim.mat(optax.adamw(learning_rate, **options), modules)


OPTIMIZERS = {"spectra": spectra, "spectra auto": ours, "adatask": one_task, "mat": modular}
EVERY = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def parameters(rng, dtype=jnp.float32):
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def kinds(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@EVERY
def test_a_quadratic_converges(rng, make):
    target = parameters(rng)
    params = jax.tree.map(jnp.zeros_like, target)
    steps = 300
    tx = make(optax.cosine_decay_schedule(0.1, steps))
    loss = lambda p: sum(jnp.sum((p[n] - target[n]) ** 2) for n in p)  # noqa: E731

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, start = tx.init(params), loss(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert loss(params) < 1e-2 * start
    assert step._cache_size() == 1


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_types_of_the_state_are_stable(rng, make, dtype):
    params = parameters(rng, dtype)
    tx = make(1e-2)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert kinds(after) == kinds(jax.eval_shape(lambda s: s, state))
    moved = optax.apply_updates(params, updates)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, params)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(moved))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(moved))


@EVERY
def test_eager_equals_jit(rng, make):
    params, gradients = parameters(rng), parameters(rng)
    tx = make(1e-2)
    eager, _ = tx.update(gradients, tx.init(params), params)
    jitted, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), jitted, eager)


@EVERY
def test_sharded_state_keeps_its_types_and_layout(rng, make):
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
    params, gradients = parameters(rng), parameters(rng)
    tx = make(1e-2)
    expected, _ = tx.update(gradients, tx.init(params), params)

    def place(leaf):
        stacked = leaf.ndim == 3 and leaf.shape[0] == 8
        spec = PartitionSpec("x") if stacked else PartitionSpec()
        return NamedSharding(mesh, spec)

    layout = jax.tree.map(place, jax.eval_shape(tx.init, params))
    state = jax.jit(tx.init, out_shardings=layout)(params)
    put = lambda tree: jax.tree.map(lambda p: jax.device_put(p, place(p)), tree)  # noqa: E731
    step = jax.jit(tx.update, out_shardings=(jax.tree.map(place, params), layout))
    updates, after = step(put(gradients), state, put(params))
    assert kinds(after) == kinds(state)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), updates, expected
    )
    step(put(gradients), after, put(params))
    assert step._cache_size() == 1


@EVERY
def test_unknown_extra_arguments_are_let_through(rng, make):
    params = parameters(rng)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.with_extra_args_support(make(1e-2)))
    tx.update(params, tx.init(params), params, value=1.0, something_else=2)


@EVERY
def test_learning_rate_is_a_hyperparameter(rng, make):
    params, gradients = parameters(rng), parameters(rng)
    tx = optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate=0.5)
    state = tx.init(params)
    big, _ = tx.update(gradients, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.25)
    small, _ = tx.update(gradients, state, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-5, atol=1e-7), big, small
    )


@EVERY
def test_accumulation_over_equal_parts_is_one_step(rng, make):
    params, gradients = parameters(rng), parameters(rng)
    plain = make(1e-2)
    expected, _ = plain.update(gradients, plain.init(params), params)
    tx = optax.MultiSteps(make(1e-2), every_k_schedule=2)
    state = tx.init(params)
    nothing, state = tx.update(gradients, state, params)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(nothing))
    updates, _ = tx.update(gradients, state, params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), updates, expected
    )


@EVERY
def test_weight_decay_is_decoupled(rng, make):
    params, gradients = parameters(rng), parameters(rng)
    decayed, plain = make(0.1, weight_decay=0.5), make(0.1, weight_decay=0.0)
    with_decay, _ = decayed.update(gradients, decayed.init(params), params)
    without, _ = plain.update(gradients, plain.init(params), params)
    for name in params:
        np.testing.assert_allclose(
            with_decay[name] - without[name], -0.1 * 0.5 * params[name], atol=1e-5
        )
