"""Expert layers against a loop over tokens in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import dispatch
from moe.experts import capacity_drops, expert_mlp, shared_mlp
from moe.grouped_matmul import grouped_matmul
from moe.routing import Routing, expert_choice, route

D, F, E, K = 8, 5, 6, 2
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_bank(rng, activation="swiglu"):
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    if activation == "gelu":
        del shapes["gate"]
    return {name: rng.normal(size=shape) / 2 for name, shape in shapes.items()}


def one_expert(x, bank, e, activation="swiglu"):
    up = x @ bank["up"][e]
    if activation == "gelu":
        hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    else:
        gate = x @ bank["gate"][e]
        hidden = gate / (1 + np.exp(-gate)) * up
    return hidden @ bank["down"][e]


def by_token(x, weights, indices, bank, activation="swiglu", kept=None):
    out = np.zeros_like(x)
    for n in range(len(x)):
        for j, e in enumerate(indices[n]):
            if kept is None or kept[n, j]:
                out[n] += weights[n, j] * one_expert(x[n], bank, e, activation)
    return out


def kept_under(indices, capacity):
    """First choices of all tokens before second choices; earlier tokens before later ones."""
    kept, used = np.zeros(indices.shape, bool), np.zeros(E, int)
    for j in range(indices.shape[1]):
        for n in range(len(indices)):
            if used[indices[n, j]] < capacity:
                used[indices[n, j]] += 1
                kept[n, j] = True
    return kept


def f32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def setting(rng, tokens=33, skew=0.0):
    x = rng.normal(size=(tokens, D))
    logits = rng.normal(size=(tokens, E)) + skew * np.arange(E)
    return x, jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize(
    "activation,capacity_factor,implementation",
    [("swiglu", None, "tiled"), ("gelu", 0.5, "xla"), ("swiglu", 1.25, "xla")],
)
def test_layer_equals_a_loop_over_tokens(activation, capacity_factor, implementation, rng):
    x, logits = setting(rng, skew=0.6)
    bank, routing = make_bank(rng, activation), route(logits, K)
    indices, kept = np.asarray(routing.indices), None
    if capacity_factor is not None:
        kept = kept_under(indices, int(np.ceil(capacity_factor * indices.size / E)))
        assert not kept.all()
    options = dict(activation=activation, capacity_factor=capacity_factor)
    options["implementation"] = implementation
    run = compile_fast(lambda x, r, bank: expert_mlp(x, r, bank, **options))
    weights = np.asarray(routing.weights, float)
    expected = by_token(x, weights, indices, bank, activation, kept)
    np.testing.assert_allclose(run(f32(x), routing, f32(bank)), expected, rtol=1e-4, atol=1e-5)
    dropped = capacity_drops(routing.indices, E, capacity_factor)
    assert dropped == pytest.approx(0.0 if kept is None else 1 - kept.mean(), abs=1e-6)


def dense(x, logits, bank):
    """All experts on all tokens, weighted by the routing: differentiated by JAX."""
    routing = route(logits, K, normalize=True)
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, bank["gate"]))
    hidden = hidden * jnp.einsum("nd,edf->nef", x, bank["up"])
    outputs = jnp.einsum("nef,efd->ned", hidden, bank["down"])
    chosen = jax.nn.one_hot(routing.indices, E)
    return jnp.einsum("nk,nke,ned->nd", routing.weights, chosen, outputs)


@pytest.mark.parametrize(
    "tokens,align,implementation", [(50, 1, "tiled"), (1, 16, "xla"), (50, 16, "xla")]
)
def test_gradients_of_inputs_router_and_bank(tokens, align, implementation, rng):
    x, logits = setting(rng, tokens, skew=0.3)
    args = f32((x, np.asarray(logits), make_bank(rng)))

    def sparse(x, logits, bank):
        routing = route(logits, K, normalize=True)
        return expert_mlp(x, routing, bank, align=align, implementation=implementation)

    def gradients(layer):
        loss = jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(layer(*a))), (0, 1, 2))
        return compile_fast(loss)(*args)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradients(sparse),
        gradients(dense),
    )


def test_no_tokens(rng):
    x, logits = setting(rng, 0)
    y = expert_mlp(f32(x), route(logits, K), f32(make_bank(rng)), capacity_factor=1.0)
    assert y.shape == (0, D)


def test_all_tokens_on_one_expert(rng):
    x, _ = setting(rng, 70)
    bank = make_bank(rng)
    logits = jnp.zeros((70, E)).at[:, 4].set(50.0)
    y = expert_mlp(f32(x), route(logits, 1), f32(bank))
    np.testing.assert_allclose(y, one_expert(x, bank, 4), rtol=1e-4, atol=1e-5)


def test_expert_choice(rng):
    x, logits = setting(rng, 20)
    bank, routing = make_bank(rng), expert_choice(logits, 7)
    expected = np.zeros_like(x)
    for e in range(E):
        for weight, n in zip(routing.weights[e], routing.indices[e], strict=True):
            expected[n] += float(weight) * one_expert(x[n], bank, e)
    np.testing.assert_allclose(
        expert_mlp(f32(x), routing, f32(bank), implementation="xla"),
        expected,
        rtol=1e-4,
        atol=1e-5,
    )


def test_product_is_plugged_in_on_aligned_rows(rng):
    x, logits = setting(rng, 41)
    routing, bank = route(logits, K), f32(make_bank(rng))
    calls = []

    def product(lhs, rhs, sizes):
        calls.append((lhs, np.asarray(sizes)))
        return grouped_matmul(lhs, rhs, sizes, implementation="reference")

    y = expert_mlp(f32(x), routing, bank, product=product, align=16)
    plain = expert_mlp(f32(x), routing, bank, implementation="xla")
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3
    wanted = np.bincount(np.asarray(routing.indices).reshape(-1), minlength=E)
    for lhs, sizes in calls:
        assert lhs.shape[0] % 16 == 0
        np.testing.assert_array_equal(sizes, -(-wanted // 16) * 16)
    rows = np.asarray(calls[0][0])
    starts = np.cumsum(calls[0][1]) - calls[0][1]
    for e in range(E):
        used = rows[starts[e] : starts[e] + wanted[e]]
        assert used.any(axis=1).all()
        assert not rows[starts[e] + wanted[e] : starts[e] + calls[0][1][e]].any()


def test_plan_is_a_bijection_between_assignments_and_rows(rng):
    indices = route(setting(rng, 29)[1], K).indices
    for align, capacity in ((1, None), (8, None), (1, 7), (8, 7)):
        plan = jax.jit(lambda i, a=align, c=capacity: dispatch.plan(i, E, align=a, capacity=c))(
            indices
        )
        rows = plan.token.shape[0]
        for n in range(29):
            for j in range(K):
                if (row := int(plan.row[n, j])) < rows:
                    assert (int(plan.token[row]), int(plan.choice[row])) == (n, j)
                    ends = np.cumsum(plan.group_sizes)
                    assert np.searchsorted(ends, row, side="right") == indices[n, j]
        assert int((plan.token < 29).sum()) == int((plan.row < rows).sum())
        assert float(plan.drop_share) == pytest.approx(float((plan.row == rows).mean()), abs=1e-6)
        assert float(plan.drop_share) > 0 or capacity is None


def test_bf16_tokens_with_f32_bank(rng):
    x, logits = setting(rng, 64)
    bank, routing = make_bank(rng), route(logits, K)
    y = expert_mlp(jnp.asarray(x, jnp.bfloat16), routing, f32(bank), implementation="xla")
    assert y.dtype == jnp.bfloat16
    expected = by_token(x, np.asarray(routing.weights, float), np.asarray(routing.indices), bank)
    assert np.abs(np.asarray(y, float) - expected).max() < 0.03 * np.abs(expected).max()


def test_shared_experts_are_one_wide_mlp(rng):
    x = rng.normal(size=(3, 4, D))
    bank = {n: rng.normal(size=s) for n, s in dict(gate=(D, 9), up=(D, 9), down=(9, D)).items()}
    expected = one_expert(x, {name: w[None] for name, w in bank.items()}, 0)
    np.testing.assert_allclose(shared_mlp(f32(x), f32(bank)), expected, rtol=1e-3, atol=1e-4)


def test_bad_input(rng):
    x, logits = setting(rng, 4)
    bank, routing = f32(make_bank(rng)), route(logits, K)
    with pytest.raises(ValueError, match="down must be"):
        expert_mlp(f32(x), routing, bank | {"down": bank["up"]})
    with pytest.raises(ValueError, match=r"swiglu bank has \['down', 'gate', 'up'\]"):
        expert_mlp(f32(x), routing, {n: w for n, w in bank.items() if n != "gate"})
    with pytest.raises(ValueError, match="swiglu or gelu"):
        expert_mlp(f32(x), routing, bank, activation="relu")
    with pytest.raises(ValueError, match="over 6 experts, the bank has 5"):
        expert_mlp(f32(x), routing, {n: w[:5] for n, w in bank.items()})
    with pytest.raises(ValueError, match="capacity_factor must be above 0"):
        expert_mlp(f32(x), routing, bank, capacity_factor=0.0)
    with pytest.raises(ValueError, match="either a product or"):
        expert_mlp(f32(x), routing, bank, product=grouped_matmul, implementation="xla")
    with pytest.raises(ValueError, match="its own capacity"):
        expert_mlp(f32(x), expert_choice(logits, 2), bank, align=4)
    wrong = Routing(routing.weights, routing.indices, routing.probabilities)
    with pytest.raises(ValueError, match="align and capacity"):
        expert_mlp(f32(x), wrong, bank, align=0)
