import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe

N, HEADS, E, PART, F = 11, 3, 4, 4, 5
D = HEADS * PART


@pytest.fixture
def params(rng):
    shapes = {
        "head": (D, D),
        "merge": (D, D),
        "head_bias": (D,),
        "merge_bias": (D,),
        "router": (PART, E),
        "gate": (E, PART, F),
        "up": (E, PART, F),
        "down": (E, F, PART),
    }
    return {
        name: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32) for name, shape in shapes.items()
    }


def layer(x, params, k=1, **options):
    """`moe.multi_head_mlp`, compiled, with the slow form of the grouped product."""
    options = dict(heads=HEADS, k=k, implementation="reference") | options
    return jax.jit(lambda x, p: moe.multi_head_mlp(x, p, **options))(x, params)


def loop(x, params, k):
    """The layer of arXiv 2404.15045 token by token, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    rows, routes = [], []
    for token in np.asarray(x, np.float64):
        u = token @ p["head"] + p["head_bias"]
        outputs = []
        for part in u.reshape(HEADS, PART):
            logits = part @ p["router"]
            weights = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-weights)[:k]
            routes.append(chosen)
            y = 0.0
            for e in chosen:
                gate = part @ p["gate"][e]
                y = (
                    y
                    + weights[e]
                    * ((gate / (1 + np.exp(-gate))) * (part @ p["up"][e]))
                    @ (p["down"][e])
                )
            outputs.append(y)
        rows.append(np.concatenate(outputs) @ p["merge"] + p["merge_bias"])
    return np.array(rows), np.array(routes)


@pytest.mark.parametrize("k", [1, 2])
def test_the_layer_equals_a_loop(rng, params, k):
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    y, routing = layer(x, params, k)
    expected, routes = loop(x, params, k)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(routing.indices, routes)
    no_bias = {name: value for name, value in params.items() if not name.endswith("bias")}
    zero = params | {"head_bias": jnp.zeros(D), "merge_bias": jnp.zeros(D)}
    np.testing.assert_allclose(
        layer(x, no_bias, k, implementation="xla")[0], layer(x, zero, k)[0], rtol=1e-4, atol=1e-5
    )


def test_router_and_pool_are_shared_by_the_parts(rng, params):
    """With head and merge layers that pass on, permuting a token's parts permutes its output."""
    plain = params | {"head": jnp.eye(D), "merge": jnp.eye(D)}
    plain = {name: value for name, value in plain.items() if not name.endswith("bias")}
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    order = jnp.array([2, 0, 1])
    turned = x.reshape(N, HEADS, PART)[:, order].reshape(N, D)
    y, _ = layer(x, plain)
    z, _ = layer(turned, plain)
    np.testing.assert_allclose(y.reshape(N, HEADS, PART)[:, order].reshape(N, D), z, atol=1e-5)


def test_capacity_counts_parts_of_tokens(rng, params):
    """One hot expert: with capacity for half of the parts, those of later tokens add nothing."""
    hot = params | {"router": jnp.zeros((PART, E)), "head_bias": jnp.ones(D)}
    x = jnp.asarray(rng.normal(size=(8, D)), jnp.float32)
    full, routing = layer(x, hot)
    assert (routing.indices == 0).all()  # ties go to the first
    # capacity = ceil(2 * 24 / 4) = 12 sub-tokens = the first 4 tokens
    capped, _ = layer(x, hot, capacity_factor=2.0)
    np.testing.assert_allclose(capped[:4], full[:4], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        capped[4:], jnp.broadcast_to(hot["merge_bias"], (4, D)), rtol=1e-5, atol=1e-6
    )


def test_the_adapter_is_the_layer_in_the_low_rank_states(rng):
    rank, out = 6, 9
    shapes = {
        "lora_a": (D, rank),
        "router": (rank // HEADS, E),
        "expert": (E, rank // HEADS, rank // HEADS),
        "lora_b": (rank, out),
    }
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    y, routing = moe.multi_head_lora(x, params, heads=HEADS, k=2, scale=0.25)
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    for n, token in enumerate(np.asarray(x, np.float64)):
        parts = []
        for h, part in enumerate((token @ p["lora_a"]).reshape(HEADS, -1)):
            logits = part @ p["router"]
            weights = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-weights)[:2]
            np.testing.assert_array_equal(routing.indices[n * HEADS + h], chosen)
            parts.append(sum(weights[e] * part @ p["expert"][e] for e in chosen))
        np.testing.assert_allclose(
            y[n], 0.25 * np.concatenate(parts) @ p["lora_b"], rtol=1e-4, atol=1e-4
        )


def test_a_width_that_the_heads_do_not_divide(params):
    with pytest.raises(ValueError, match="width 12 cannot be cut into 5"):
        moe.multi_head_mlp(jnp.zeros((2, D)), params, heads=5)
