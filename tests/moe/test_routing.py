"""Routing against definitions written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.routing import (
    Routing,
    expert_choice,
    expert_load,
    load_balance_loss,
    route,
    router_z_loss,
    routing_statistics,
    update_bias,
)

N, E, K = 37, 12, 3


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.fixture
def logits(rng):
    return rng.normal(size=(N, E))


def best(scores, k):
    """Indices of the k largest, ties to the lower index."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def close(a, b, tolerance=1e-6):
    np.testing.assert_allclose(np.asarray(a), b, rtol=tolerance, atol=tolerance)


def test_softmax_then_top_k(logits):
    routing = route(jnp.asarray(logits, jnp.float32), K)
    scores = softmax(logits)
    chosen = best(scores, K)
    assert np.array_equal(routing.indices, chosen) and routing.indices.dtype == jnp.int32
    close(routing.weights, np.take_along_axis(scores, chosen, 1))
    close(routing.probabilities, scores)


def test_mixtral_takes_the_softmax_over_the_chosen(logits):
    x = jnp.asarray(logits, jnp.float32)
    routing = route(x, K, order="topk_softmax")
    chosen = best(logits, K)
    close(routing.weights, softmax(np.take_along_axis(logits, chosen, 1)))
    normalized = route(x, K, normalize=True)  # the same by another way
    close(routing.weights, normalized.weights)
    assert np.array_equal(routing.indices, normalized.indices)


def test_deepseek_v3_selects_by_bias_and_groups_but_weighs_without(logits, rng):
    bias = rng.normal(size=E)
    groups, kept = 4, 2
    routing = route(
        jnp.asarray(logits, jnp.float32),
        K,
        scoring="sigmoid",
        normalize=True,
        bias=jnp.asarray(bias, jnp.float32),
        groups=groups,
        groups_kept=kept,
        scale=2.5,
    )
    scores = 1 / (1 + np.exp(-logits))
    for n in range(N):
        biased = (scores[n] + bias).reshape(groups, -1)
        group_scores = np.sort(biased, axis=1)[:, -2:].sum(1)
        allowed = np.sort(np.argsort(-group_scores, kind="stable")[:kept])
        masked = np.full_like(biased, -np.inf)
        masked[allowed] = biased[allowed]
        chosen = np.argsort(-masked.reshape(-1), kind="stable")[:K]
        assert np.array_equal(routing.indices[n], chosen)
        close(routing.weights[n], 2.5 * scores[n, chosen] / scores[n, chosen].sum(), 1e-5)


def test_softmax_groups_go_by_their_best_score():
    # Group 0 has the best single expert, group 1 the better pair.
    logits = jnp.log(jnp.array([[0.5, 0.01, 0.25, 0.24]]))
    assert route(logits, 2, groups=2).indices[0].tolist() == [0, 1]
    assert route(logits, 2, scoring="sigmoid", groups=2).indices[0].tolist() == [2, 3]


def test_ties_go_to_the_lower_index():
    logits = jnp.zeros((5, 8)).at[:, 6].set(1.0)
    for scoring in ("softmax", "sigmoid"):
        indices = route(logits, 3, scoring=scoring, groups=2, groups_kept=2).indices
        assert (indices == jnp.array([[6, 0, 1]])).all()


def test_bf16_logits_are_scored_in_f32(logits):
    rounded = jnp.asarray(logits, jnp.bfloat16)
    routing = route(rounded, K)
    assert routing.weights.dtype == routing.probabilities.dtype == jnp.float32
    close(routing.probabilities, softmax(np.asarray(rounded, np.float64)))


def test_leading_axes_are_tokens(logits):
    x = jnp.asarray(logits[:36], jnp.float32)
    flat, nested = route(x, K), route(x.reshape(4, 9, E), K)
    assert np.array_equal(flat.indices, nested.indices.reshape(-1, K))
    close(load_balance_loss(flat), load_balance_loss(nested))


def test_gradient_reaches_weights_and_not_the_bias(logits):
    x, bias = jnp.asarray(logits, jnp.float32), jnp.zeros(E)
    total = lambda x, b: jnp.sum(jnp.cos(route(x, K, scoring="sigmoid", bias=b).weights))  # noqa: E731
    dx, dbias = jax.grad(total, (0, 1))(x, bias)
    scores = 1 / (1 + np.exp(-logits))
    expected = np.zeros_like(scores)
    np.put_along_axis(expected, best(scores, K), 1, 1)
    close(dx, -np.sin(scores) * scores * (1 - scores) * expected, 1e-5)
    assert not dbias.any()


def test_scores_that_vanish_in_f32_keep_weights_and_gradients_finite():
    steps = np.arange(4) / 8
    x = jnp.asarray(np.array([[-40.0], [-60.0], [-200.0]]) + steps, jnp.float32)
    bias = jnp.array([0.0, 0.0, 1.0, 2.0])

    @jax.jit
    def run(x):
        routing = route(x, 2, scoring="sigmoid", normalize=True, bias=bias)
        values = (routing, load_balance_loss(routing), routing_statistics(routing))
        return jnp.sum(jnp.sin(routing.weights)) + values[1], values

    gradient, values = jax.grad(run, has_aux=True)(x)
    # So far below 0 the sigmoid is exp.
    close(values[0].weights, np.tile(softmax(steps[[3, 2]]), (3, 1)), 1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, values)))


def test_a_bias_may_choose_experts_of_probability_zero():
    x, bias = jnp.array([[200.0, 0, 0, 0]]), jnp.array([-5.0, 0, 0, 0])
    close(route(x, 2, normalize=True, bias=bias).weights, [[0.5, 0.5]])


def test_load_balance_loss_by_definition(logits):
    routing = route(jnp.asarray(logits[:36], jnp.float32).reshape(4, 9, E), K, scoring="sigmoid")
    scores = 1 / (1 + np.exp(-logits[:36]))
    shares = scores / scores.sum(1, keepdims=True)
    chosen = best(scores, K)

    def loss(rows):
        f = np.bincount(chosen[rows].reshape(-1), minlength=E) / chosen[rows].size
        return E * (f * shares[rows].mean(0)).sum()

    close(load_balance_loss(routing), loss(slice(36)))
    each = [loss(slice(i, i + 9)) for i in range(0, 36, 9)]
    close(load_balance_loss(routing, per_sequence=True), np.mean(each))


def test_load_balance_loss_is_one_when_even_and_e_over_k_when_collapsed():
    even = jnp.tile(jnp.eye(E), (2, 1)) * 30
    close(load_balance_loss(route(even, 1)), 1.0)
    collapsed = jnp.full((8, E), -30.0).at[:, :2].set(0.0)
    close(load_balance_loss(route(collapsed, 2)), E / 2)


def test_z_loss(logits):
    expected = np.mean(np.log(np.exp(logits).sum(-1)) ** 2)
    close(router_z_loss(jnp.asarray(logits, jnp.float32)), expected, 1e-5)


def test_bias_rises_where_load_is_low():
    load = jnp.array([[0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    new = update_bias(jnp.ones((2, 4)), load, 0.01)
    close(new, [[0.99, 1.01, 1.01, 1.01], [1, 1, 1, 1]])


def test_bias_updates_balance_a_skewed_router(rng):
    logits = jnp.asarray(rng.normal(size=(512, 8)) + np.linspace(0, 2, 8), jnp.float32)
    bias = jnp.zeros(8)

    @jax.jit
    def choose(bias):
        return expert_load(route(logits, 2, scoring="sigmoid", bias=bias).indices, 8)

    before = choose(bias).max() * 8
    for _ in range(200):
        bias = update_bias(bias, choose(bias), 5e-3)
    assert before > 2.2 and choose(bias).max() * 8 < 1.2


def test_statistics():
    probabilities = jnp.array([[0.25] * 4, [1.0, 0.0, 0.0, 0.0]])
    indices = jnp.array([[0, 1], [0, 2]], jnp.int32)
    values = routing_statistics(Routing(jnp.ones((2, 2)), indices, probabilities), 0.125)
    close(values["load"], [0.5, 0.25, 0.25, 0])
    close(values["max_violation"], 1.0)  # 2 assignments where 1 is the mean
    close(values["entropy"], np.log(4) / 2)
    close(values["drop_share"], 0.125)
    assert all(value.dtype == jnp.float32 for value in values.values())


def test_expert_choice_is_balanced(logits):
    routing = expert_choice(jnp.asarray(logits, jnp.float32), 5)
    scores = softmax(logits).T
    assert np.array_equal(routing.indices, best(scores, 5))
    close(routing.weights, np.take_along_axis(scores, best(scores, 5), 1))


def test_no_tokens():
    routing = route(jnp.zeros((0, E)), 2)
    assert routing.weights.shape == (0, 2)
    values = [load_balance_loss(routing), router_z_loss(jnp.zeros((0, E)))]
    values += jax.tree.leaves(routing_statistics(routing))
    assert all(jnp.isfinite(value).all() for value in values)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"k": 13}, "k must be from 1 to the 12"),
        ({"k": 5, "groups": 3}, "k must be from 1 to the 4"),
        ({"groups": 5}, "not 5 groups"),
        ({"groups": 2, "groups_kept": 3}, "groups_kept"),
        ({"scoring": "tanh"}, "softmax or sigmoid"),
        ({"order": "first"}, "softmax_topk or topk_softmax"),
        ({"scoring": "sigmoid", "order": "topk_softmax"}, "use scoring softmax"),
        ({"bias": jnp.zeros(3)}, r"shape \(12,\)"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((4, E)), **({"k": 2} | changes))


def test_expert_choice_refuses_more_tokens_than_there_are():
    with pytest.raises(ValueError, match="1 to the 4 tokens"):
        expert_choice(jnp.zeros((4, 2)), 5)
