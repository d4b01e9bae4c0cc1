import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm import model
from lm.config import ConfigError, ModelConfig
from lm.train.config import MatConfig, OptimConfig, RunConfig
from lm.train.optimizer import decay_mask, make_optimizer, make_schedule, parameter_labels

CONFIG = ModelConfig(
    vocab_size=48, num_layers=3, d_model=16, num_heads=2, d_ff=24, qkv_bias=True, qk_norm=True,
    dtype="float32",
)  # fmt: skip


def fresh():
    return jax.jit(lm.init, static_argnums=0)(CONFIG, jax.random.key(0))


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf for path, leaf in leaves}


def test_every_leaf_has_a_label():
    labels = flat(parameter_labels(model.abstract_params(CONFIG)))
    attention, mlp = "layers/attention/", "layers/mlp/"
    assert labels == {
        "embedding": "embedding",
        "head/kernel": "head",
        "final_norm/scale": "norm",
        "layers/attention_norm/scale": "norm",
        "layers/mlp_norm/scale": "norm",
        f"{attention}query_norm/scale": "norm",
        f"{attention}key_norm/scale": "norm",
        **{f"{attention}{name}/bias": "bias" for name in ("query", "key", "value")},
        **{f"{attention}{name}/kernel": "matrix" for name in ("query", "key", "value", "out")},
        **{f"{mlp}{name}/kernel": "matrix" for name in ("gate", "up", "down")},
    }


def test_routers_have_their_own_label():
    tree = {"layers": {"mlp": {"router": {"kernel": 0}, "up": {"kernel": 0}}}}
    assert flat(parameter_labels(tree)) == {
        "layers/mlp/router/kernel": "router",
        "layers/mlp/up/kernel": "matrix",
    }


def test_weight_decay_spares_norms_biases_and_embeddings():
    mask = flat(decay_mask(model.abstract_params(CONFIG)))
    for name, decays in mask.items():
        assert decays == name.endswith("kernel"), name


def schedule(steps, **values):
    return make_schedule(OptimConfig(learning_rate=0.8, **values), steps)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "constant"])
def test_warm_up_moves_from_the_first_step_and_ends_at_the_peak(kind):
    rate = schedule(1000, schedule=kind, warmup_steps=4)
    np.testing.assert_allclose([rate(s) for s in range(5)], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)
    assert float(schedule(1000, schedule=kind, warmup_steps=0)(0)) == pytest.approx(0.8)
    assert float(schedule(1000, schedule=kind, warmup_steps=1)(0)) == pytest.approx(0.8)


def test_cosine_is_half_a_wave_down_to_the_final_fraction():
    rate = schedule(1000, schedule="cosine", warmup_steps=100, final_fraction=0.25)
    for step in (100, 325, 550, 999, 1000):
        share = (step - 100) / 900
        expected = 0.8 * (0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * share)))
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5)
    assert float(rate(1000)) == pytest.approx(0.2, rel=1e-6)


def test_linear_is_a_line():
    rate = schedule(1000, schedule="linear", warmup_steps=200, final_fraction=0.5)
    np.testing.assert_allclose([rate(s) for s in (200, 600, 1000)], [0.8, 0.6, 0.4], rtol=1e-6)


def test_wsd_has_a_plateau_and_decays_at_the_end():
    rate = schedule(1000, schedule="wsd", warmup_steps=100, decay_fraction=0.2, final_fraction=0.0)
    np.testing.assert_allclose([rate(s) for s in (100, 500, 800)], 0.8, rtol=1e-6)
    np.testing.assert_allclose([rate(s) for s in (900, 1000)], [0.4, 0.0], atol=1e-6)
    # A warm-up that leaves less than the decay shortens the decay.
    short = schedule(10, schedule="wsd", warmup_steps=8, decay_fraction=0.5, final_fraction=0.0)
    np.testing.assert_allclose([short(s) for s in (7, 8, 9, 10)], [0.8, 0.8, 0.4, 0], atol=1e-6)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="adamw, muon, .*got 'adamv'; did you mean 'adamw'"):
        make_optimizer(OptimConfig(name="adamv"), 10)
    config = dataclasses.replace(OptimConfig(), schedule="cosin")
    with pytest.raises(ConfigError, match="optim.schedule must be.*'cosin'"):
        make_schedule(config, 10)


def numpy_adamw(params, grads, config, rates, decays):
    """arXiv 1711.05101, algorithm 2, with global-norm clipping before it, in float64."""
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t, (gradient, rate) in enumerate(zip(grads, rates, strict=True), 1):
        gradient = {name: np.asarray(g, np.float64) for name, g in gradient.items()}
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g * min(1, config.clip / norm) if config.clip else g
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g**2
            first, second = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
            decay = config.weight_decay * params[name] if decays[name] else 0
            update = first / (np.sqrt(second) + config.eps) + decay
            params[name] = params[name] - rate * update
    return params


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_equals_numpy(rng, clip):
    config = OptimConfig(
        learning_rate=0.02, clip=clip, weight_decay=0.3, warmup_steps=2, beta1=0.8, beta2=0.9,
        eps=1e-3, schedule="linear",
    )  # fmt: skip
    params = fresh()
    tx, _ = make_optimizer(config, 4)
    state = tx.init(params)
    update = jax.jit(tx.update)
    grads, current = [], params
    for _ in range(4):
        grad = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
        grads.append(flat(grad))
        updates, state = update(grad, state, current)
        current = jax.tree.map(np.add, current, updates)
    rates = [0.01, 0.02, 0.02, 0.02 * 0.55]  # warm-up 2, then a line to 0.002 over 2
    expected = numpy_adamw(flat(params), grads, config, rates, flat(decay_mask(params)))
    for name, leaf in flat(current).items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=2e-6, err_msg=name)


def muon_update(params, grads, **values):
    config = OptimConfig(
        name="muon", learning_rate=0.1, warmup_steps=0, schedule="constant", clip=0.0,
        **dict(weight_decay=0.0) | values,
    )  # fmt: skip
    tx, _ = make_optimizer(config, 10)
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def with_spectrum(x, low, high):
    """The matrices x with singular values from low to high."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    return (u * np.linspace(high, low, s.shape[-1])) @ v


def test_muon_orthogonalizes_every_layer_of_a_stack(rng):
    params = fresh()
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    grads = jax.tree.map(
        lambda label, g: np.float32(with_spectrum(g, 0.1, 1.0) if label == "matrix" else g),
        parameter_labels(params),
        grads,
    )
    updates = muon_update(params, grads)
    for name, label in flat(parameter_labels(params)).items():
        if label != "matrix":
            continue
        for update in np.asarray(flat(updates)[name], np.float64):
            singular = np.linalg.svd(update, compute_uv=False)
            # Five steps of Jordan's quintic bring singular values into about [0.7, 1.2]; those
            # of the gradient are spread over a factor of 10.
            assert singular.max() / singular.min() < 2, name
            assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2 * 0.1, rel=0.2), name
    # A layer of the stack is treated as that matrix would be by itself.
    single = {"layers": {"up": {"kernel": params["layers"]["mlp"]["up"]["kernel"][1]}}}
    gradient = {"layers": {"up": {"kernel": grads["layers"]["mlp"]["up"]["kernel"][1]}}}
    np.testing.assert_allclose(
        updates["layers"]["mlp"]["up"]["kernel"][1],
        muon_update(single, gradient)["layers"]["up"]["kernel"],
        rtol=1e-3,
        atol=1e-5,
    )


def test_muon_gives_everything_else_to_adamw(rng):
    params = fresh()
    grads = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
    updates = flat(muon_update(params, grads, weight_decay=0.5))
    for name, label in flat(parameter_labels(params)).items():
        if label != "matrix":
            # The first step of Adam is the sign of the gradient; of these only the head decays.
            expected = -0.1 * np.sign(flat(grads)[name])
            if label == "head":
                expected = expected - 0.1 * 0.5 * flat(params)[name]
            np.testing.assert_allclose(updates[name], expected, rtol=1e-3, err_msg=name)


def test_muon_decays_its_matrices(rng):
    params = fresh()
    grads = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), params)
    with_decay, without = (flat(muon_update(params, grads, weight_decay=w)) for w in (0.5, 0.0))
    name = "layers/mlp/up/kernel"
    np.testing.assert_allclose(
        with_decay[name] - without[name], -0.1 * 0.5 * flat(params)[name], rtol=1e-3, atol=1e-6
    )
    np.testing.assert_array_equal(with_decay["embedding"], without["embedding"])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_first_moment_has_the_dtype_asked_for(name):
    tx, _ = make_optimizer(OptimConfig(name=name, state_dtype="bfloat16"), 10)
    state = jax.eval_shape(tx.init, model.abstract_params(CONFIG))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert dtypes.count(jnp.bfloat16) == 7  # one for each stacked matrix


@pytest.mark.parametrize(
    "optim,mat,message",
    [
        ({"nesterov": True}, {}, "optim.nesterov is only for optim.name spectra, and it is adamw"),
        ({"name": "mat", "rank": "auto"}, {}, "optim.rank .* it is mat over adamw"),
        ({}, {"base": "muon"}, "mat.base is given but optim.name is adamw: add --optim.name mat"),
    ],
)
def test_flags_of_an_optimizer_that_is_not_chosen_are_refused(optim, mat, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig(optim=OptimConfig(**optim), mat=MatConfig(**mat))
    RunConfig(optim=OptimConfig(name="mat", nesterov=True), mat=MatConfig(base="spectra"))
