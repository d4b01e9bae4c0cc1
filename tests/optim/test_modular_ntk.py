import doctest
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim import (
    Modules,
    label_modules,
    logit_projection,
    logit_sum,
    modular_ntk,
    principal_eigenvalues,
)

LAYERS, D, HEADS, WIDTH, VOCAB, T = 2, 6, 3, 2, 5, 4


def make_params(rng, dtype):
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    return {
        "embedding": draw(VOCAB, D),
        "in": draw(LAYERS, D, HEADS * WIDTH),
        "out": draw(LAYERS, HEADS * WIDTH, D),
        "mlp": draw(LAYERS, D, D),
        "scale": draw(D),
    }


def logits(params, tokens):
    x = params["embedding"][tokens]
    for layer in range(LAYERS):
        h = jnp.tanh(x @ params["in"][layer])
        x = x + h @ params["out"][layer] + jnp.tanh(x @ params["mlp"][layer])
    return (x * params["scale"][None]) @ params["embedding"].T


def label(path, leaf):
    name = path[0].key
    if name in ("in", "out"):
        return Modules("heads", ((0, LAYERS), (2 if name == "in" else 1, HEADS)))
    return Modules("mlp", ((0, LAYERS),)) if name == "mlp" else Modules(f"rest_{name}")


def jacobian(output, params, probes):
    """Rows of gradients [S, *leaf] per leaf, each from reverse mode over the vector of outputs."""
    return jax.jacrev(lambda p: jnp.stack([output(p, probe) for probe in probes]))(params)


OUTPUTS = {
    "sum": lambda p, tokens: logit_sum(logits(p, tokens)),
    "signs": lambda p, tokens: logit_projection(logits(p, tokens), jax.random.key(3)),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_kernels_equal_explicit_jacobians_in_float64(rng, name, chunk):
    with jax.enable_x64(True):
        params, probes = make_params(rng, jnp.float64), rng.integers(0, VOCAB, (6, T))
        modules = label_modules(label, params)
        output = OUTPUTS[name]
        grams = modular_ntk(output, params, probes, modules, chunk=chunk)
        rows = jax.tree.map(np.asarray, jacobian(output, params, probes))
        got = principal_eigenvalues(grams)
        assert grams["heads"].shape == (LAYERS, HEADS, 6, 6)
        assert got["heads"].dtype == jnp.float64

        def top(*parts):
            j = np.concatenate([part.reshape(6, -1) for part in parts], axis=1)
            return np.linalg.svd(j, compute_uv=False)[0] ** 2 / 6

        for layer in range(LAYERS):
            np.testing.assert_allclose(got["mlp"][layer], top(rows["mlp"][:, layer]), rtol=1e-10)
            for head in range(HEADS):
                span = slice(head * WIDTH, (head + 1) * WIDTH)
                want = top(rows["in"][:, layer, :, span], rows["out"][:, layer, span])
                np.testing.assert_allclose(got["heads"][layer, head], want, rtol=1e-10)
        # Modules that cover all parameters: their kernels add up to the model's.
        whole = sum(np.asarray(g).reshape(-1, 6, 6).sum(0) for g in grams.values())
        j = np.concatenate([row.reshape(6, -1) for row in rows.values()], axis=1)
        np.testing.assert_allclose(whole, j @ j.T / 6, rtol=1e-9)


def test_f32_is_close_and_leaves_outside_are_not_differentiated(rng):
    params, probes = make_params(rng, jnp.float32), rng.integers(0, VOCAB, (4, T))
    modules = label_modules(
        lambda path, leaf: label(path, leaf) if path[0].key == "mlp" else None, params
    )
    grams = jax.jit(lambda p: modular_ntk(OUTPUTS["sum"], p, probes, modules))(params)
    rows = np.asarray(jacobian(OUTPUTS["sum"], params, probes)["mlp"]).reshape(4, LAYERS, -1)
    assert list(grams) == ["mlp"]
    np.testing.assert_allclose(
        grams["mlp"], np.einsum("slp,tlp->lst", rows, rows) / 4, rtol=1e-4, atol=1e-5
    )
    # The embedding is used twice in the model; were it differentiated, its integer stand-in
    # would be refused.
    whole = params | {"embedding": (params["embedding"] * 8).astype(jnp.int32)}
    modular_ntk(OUTPUTS["sum"], whole, probes, modules)


def test_random_signs_estimate_the_kernel_traced_over_outputs(rng):
    """The mean over many sign draws approaches sum_tv <df_tv, df_tv'> / (T V)."""
    params, probes = make_params(rng, jnp.float32), rng.integers(0, VOCAB, (3, T))
    modules = label_modules(lambda path, leaf: Modules("all"), params)

    def gram(seed):
        output = lambda p, x: logit_projection(logits(p, x), jax.random.key(seed))  # noqa: E731
        return modular_ntk(output, params, probes, modules)["all"]

    mean = jnp.mean(jax.lax.map(gram, jnp.arange(3000), batch_size=500), axis=0)
    full = [jax.jacrev(lambda p, x=x: logits(p, x).reshape(-1))(params) for x in probes]
    flat = [np.concatenate([v.reshape(T * VOCAB, -1) for v in f.values()], axis=1) for f in full]
    want = np.array([[np.sum(a * b) for b in flat] for a in flat]) / (T * VOCAB) / 3
    np.testing.assert_allclose(mean, want, atol=0.05 * np.max(np.diag(want)))


def test_no_module_is_copied(rng):
    """One product a leaf: the number of products does not grow with the number of modules."""
    params, probes = make_params(rng, jnp.float32), rng.integers(0, VOCAB, (4, T))

    def products(blocks):
        modules = label_modules(
            lambda path, leaf: Modules("m", ((1, blocks),)) if path[0].key == "out" else None,
            params,
        )
        text = jax.jit(lambda p: modular_ntk(OUTPUTS["sum"], p, probes, modules)).lower(params)
        return text.as_text().count("dot_general")

    assert products(1) == products(6)


def test_non_finite_kernels_give_nan():
    grams = {"a": jnp.stack([jnp.eye(3), jnp.full((3, 3), jnp.nan)])}
    got = principal_eigenvalues(grams)["a"]
    assert got[0] == 1 and np.isnan(got[1])


def test_bad_input_is_named(rng):
    params = make_params(rng, jnp.float32)
    probes = rng.integers(0, VOCAB, (4, T))
    modules = label_modules(label, params)
    with pytest.raises(ValueError, match="chunk must divide the number of probes 4, got 3"):
        modular_ntk(OUTPUTS["sum"], params, probes, modules, chunk=3)
    with pytest.raises(ValueError, match=r"does not fit a leaf of shape .* multiple of 4"):
        label_modules(lambda path, leaf: Modules("m", ((0, 4),)), params)
    with pytest.raises(ValueError, match="give them different kinds"):
        label_modules(lambda path, leaf: Modules("m", ((0, leaf.shape[0]),)), params)
    with pytest.raises(ValueError, match="None everywhere"):
        label_modules(lambda path, leaf: None, params)


def test_example():
    assert doctest.testmod(sys.modules["optim.modular_ntk"]).failed == 0
