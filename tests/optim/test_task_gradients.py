import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import optim


def network(params, x):
    """Two tasks on one trunk of three layers, with a head each."""
    for w in params["trunk"]:
        x = jnp.tanh(x @ w)
    y = [jnp.mean((x @ head) ** 2) for head in params["heads"]]
    return jnp.stack([*y, jnp.mean(x)]), x.shape


def make_network(rng, width=32):
    w = lambda *shape: jnp.asarray(rng.normal(size=shape) / width**0.5, jnp.float32)  # noqa: E731
    return {"trunk": [w(width, width) for _ in range(3)], "heads": [w(width, 2), w(width, 2)]}


def count(jaxpr, name):
    values = (v for eqn in jaxpr.eqns for v in eqn.params.values())
    inner = [v.jaxpr for v in values if isinstance(v, jax.extend.core.ClosedJaxpr)]
    return sum(e.primitive.name == name for e in jaxpr.eqns) + sum(count(j, name) for j in inner)


@pytest.mark.parametrize("sequential", [False, True])
def test_all_gradients_come_from_one_forward_pass(rng, sequential):
    params, x = make_network(rng), jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    shared = lambda path: int(path[-1]) if path.startswith("heads") else True  # noqa: E731
    fn = optim.per_task_value_and_grad(network, has_aux=True, shared=shared, sequential=sequential)
    (losses, shape), grads = fn(params, x)
    assert shape == (64, 32) and losses.shape == (3,)
    expected = jax.jacrev(lambda p: network(p, x)[0])(params)
    for ours, theirs in zip(grads["trunk"], expected["trunk"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    for k in range(2):
        np.testing.assert_allclose(grads["heads"][k], expected["heads"][k][k], rtol=1e-5)
        assert np.abs(expected["heads"][k][1 - k]).max() == 0
    only = lambda p: network(p, x)[0]  # noqa: E731
    jaxpr = jax.make_jaxpr(optim.per_task_value_and_grad(only, sequential=sequential))(params)
    assert count(jaxpr.jaxpr, "tanh") == 3, "one for each layer of one forward pass"


def test_the_flops_are_those_of_one_forward_and_k_backward_passes(rng):
    params, x = make_network(rng, 64), jnp.asarray(rng.normal(size=(128, 64)), jnp.float32)
    losses = lambda p: network(p, x)[0]  # noqa: E731

    def flops(f):
        return jax.jit(f).lower(params).compile().cost_analysis()["flops"]

    apart = [flops(jax.value_and_grad(lambda p, k=k: losses(p)[k])) for k in range(3)]
    forward, ours = flops(losses), flops(optim.per_task_value_and_grad(losses))
    assert ours < sum(apart) - 1.5 * forward


def test_a_common_head_gets_the_gradient_of_the_summed_losses(rng):
    params, x = make_network(rng), jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)
    losses = lambda p: network(p, x)[0]  # noqa: E731
    mask = {"trunk": True, "heads": False}
    _, grads = jax.jit(optim.per_task_value_and_grad(losses, shared=mask))(params)
    expected = jax.grad(lambda p: losses(p).sum())(params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), grads["heads"], expected["heads"]
    )
    with pytest.raises(ValueError, match="vector with one loss per task, got"):
        optim.per_task_value_and_grad(lambda p: losses(p).sum())(params)
