"""The decoder against a naive float64 one, and what must hold whatever its numbers are."""

import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm import model
from lm.config import ConfigError, ModelConfig, RopeScaling
from lm.layers.linear import by_name
from lm.layers.self_attention import Cache

SIZES = dict(vocab_size=48, num_layers=2, d_model=32, num_heads=4, d_ff=48, dtype="float32")


def make(**changes):
    """A configuration and parameters with no zero bias and no norm of 1."""
    config = ModelConfig(**SIZES | changes)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            return np.float32(noise / math.sqrt(leaf.shape[-2]))
        return np.float32(0.1 * noise + (path[-1].key == "scale"))

    return config, jax.tree_util.tree_map_with_path(draw, model.abstract_params(config))


apply = jax.jit(lm.apply, static_argnums=0, static_argnames="plug")


# --- the naive model: loops, float64, one token at a time where that is clearer ------------------


def frequencies(config):
    """arXiv 2104.09864 section 3.2.2; arXiv 2306.15595; Llama 3.1 model code; arXiv 2309.00071."""
    h, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    plain = [theta ** (-2 * i / h) for i in range(h // 2)]
    if scaling is None:
        return plain, 1.0
    s, context = scaling.factor, scaling.original_context
    if scaling.kind == "linear":
        return [f / s for f in plain], 1.0
    if scaling.kind == "llama3":
        out = []
        for f in plain:
            wave = 2 * math.pi / f
            if wave < context / scaling.high_freq_factor:
                out.append(f)
            elif wave > context / scaling.low_freq_factor:
                out.append(f / s)
            else:
                spread = scaling.high_freq_factor - scaling.low_freq_factor
                smooth = (context / wave - scaling.low_freq_factor) / spread
                out.append((1 - smooth) * f / s + smooth * f)
        return out, 1.0

    def dimension(rotations):
        return h * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(dimension(scaling.beta_fast)), 0)
    last = min(math.ceil(dimension(scaling.beta_slow)), h - 1)
    out = []
    for i, f in enumerate(plain):
        share = min(max((i - first) / (last - first), 0), 1)
        out.append(f * (1 - share) + f / s * share)
    return out, 0.1 * math.log(s) + 1


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def turn(x, position, config):
    inv_freq, factor = frequencies(config)
    half = config.head_dim // 2
    pairs = (x[..., :half] + 1j * x[..., half:]) * factor
    pairs = pairs * np.exp(1j * position * np.asarray(inv_freq))
    return np.concatenate([pairs.real, pairs.imag], -1)


def attend(q, k, v, window, segments):
    """q [T, N, H], k and v [T, K, H] of one row -> [T, N * H]."""
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for t in range(len(q)):
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if segments[s] == segments[t]]
        for n in range(q.shape[1]):
            scores = k[seen, n // group] @ q[t, n] / math.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v[seen, n // group]
    return out.reshape(len(q), -1)


def naive_row(config, params, tokens, segments):
    positions = []
    for t in range(len(tokens)):
        same = t > 0 and segments[t] == segments[t - 1]
        positions.append(positions[-1] + 1 if same else 0)

    def project(p, x):
        return x @ p["kernel"] + p.get("bias", 0.0)

    x = params["embedding"][tokens]
    pattern = config.attention_pattern or ("sliding" if config.sliding_window else "full",)
    for layer in range(config.num_layers):
        p = jax.tree.map(operator.itemgetter(layer), params["layers"])
        h = norm(x, p["attention_norm"]["scale"], config.norm_eps)
        a = p["attention"]
        q, k, v = (
            project(a[name], h).reshape(len(x), -1, config.head_dim)
            for name in ("query", "key", "value")
        )
        if config.qk_norm:
            q = norm(q, a["query_norm"]["scale"], config.norm_eps)
            k = norm(k, a["key_norm"]["scale"], config.norm_eps)
        q, k = (np.stack([turn(y[t], positions[t], config) for t in range(len(x))]) for y in (q, k))
        sliding = pattern[layer % len(pattern)] == "sliding"
        out = attend(q, k, v, config.sliding_window if sliding else None, segments)
        x = x + project(a["out"], out)
        h = norm(x, p["mlp_norm"]["scale"], config.norm_eps)
        m = p["mlp"]
        if config.mlp == "swiglu":
            gate = project(m["gate"], h)
            h = gate / (1 + np.exp(-gate)) * project(m["up"], h)
        else:
            h = project(m["up"], h)
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + project(m["down"], h)
    x = norm(x, params["final_norm"]["scale"], config.norm_eps)
    head = params["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    logits, cap = x @ head, config.logit_soft_cap
    return logits if cap is None else cap * np.tanh(logits / cap)


def naive(config, params, tokens, segments=None):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    segments = np.ones_like(tokens) if segments is None else segments
    rows = zip(tokens, segments, strict=True)
    return np.stack([naive_row(config, params, row, ids) for row, ids in rows])


def scaled(kind):
    return RopeScaling(kind=kind, factor=4.0, original_context=64, beta_fast=8.0)


FORMS = {
    "llama": dict(),
    "llama3_gqa_tied": dict(num_kv_heads=2, tie_embeddings=True, rope_scaling=scaled("llama3")),
    "qwen2": dict(num_kv_heads=1, qkv_bias=True, rope_theta=1e6),
    "qwen3": dict(num_kv_heads=2, qk_norm=True, head_dim=16, norm_eps=1e-6),
    "gpt": dict(mlp="gelu", mlp_bias=True, qkv_bias=True, attention_out_bias=True),
    "mistral": dict(sliding_window=4),
    "soft_cap": dict(logit_soft_cap=2.0, tie_embeddings=True),
    "pattern": dict(num_layers=4, sliding_window=3, attention_pattern=("sliding", "full")),
    "pattern_with_rest": dict(
        num_layers=5, sliding_window=3, attention_pattern=("sliding", "sliding", "full")
    ),
    "pattern_longer_than_the_model": dict(
        sliding_window=3, attention_pattern=("sliding", "full", "full")
    ),
    "linear": dict(rope_scaling=scaled("linear")),
    "yarn": dict(rope_scaling=scaled("yarn"), head_dim=16),
}
PACKED = np.asarray([[1] * 5 + [2] * 9 + [3] * 3, [7] * 16 + [0]])


@pytest.mark.parametrize("name", FORMS)
def test_logits_equal_a_naive_float64_decoder(rng, name):
    config, params = make(**FORMS[name])
    tokens = rng.integers(0, 48, (2, 17))
    segments = PACKED if name in ("llama", "qwen2", "mistral", "pattern_with_rest") else None
    ids = None if segments is None else jnp.asarray(segments)
    got = apply(config, params, jnp.asarray(tokens), segment_ids=ids)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, naive(config, params, tokens, segments), rtol=2e-4, atol=2e-4)


# --- invariants ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_gradients_reach_exactly_the_past_that_is_visible(window):
    length, layers = 12, 2
    config, params = make(sliding_window=window, num_layers=layers)
    tokens = jnp.arange(length)[None]  # token s is row s of the embedding

    def outputs(embedding):
        logits = apply(config, params | {"embedding": embedding}, tokens)
        return jnp.sin(logits[0]).sum(-1)

    jacobian = jax.jit(jax.jacrev(outputs))(params["embedding"])[:, :length]
    reached = np.asarray(jnp.abs(jacobian).max(-1)) > 0  # exact zeros
    t, s = np.mgrid[:length, :length]
    reach = length if window is None else layers * (window - 1)
    np.testing.assert_array_equal(reached, (s <= t) & (s >= t - reach))


@pytest.mark.parametrize("implementation", ["reference", "dense", "blocked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_of_a_row_do_not_touch(rng, implementation, dtype):
    config, params = make(attention=implementation, dtype=dtype, num_kv_heads=2)
    segments = jnp.asarray([[1] * 6 + [2] * 8 + [3] * 4])
    first = rng.integers(0, 48, (1, 18))
    second = first.copy()
    second[0, :6] = (first[0, :6] + 1 + rng.integers(0, 46, 6)) % 48
    second[0, 14:] = (first[0, 14:] + 1) % 48
    a = apply(config, params, jnp.asarray(first), segment_ids=segments)
    b = apply(config, params, jnp.asarray(second), segment_ids=segments)
    np.testing.assert_array_equal(a[:, 6:14], b[:, 6:14])
    assert (a[:, :6] != b[:, :6]).any() and (a[:, 14:] != b[:, 14:]).any()


def test_positions_restart_and_may_be_given(rng):
    config, params = make()
    tokens = jnp.asarray(rng.integers(0, 48, (1, 12)))
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    packed = apply(config, params, tokens, segment_ids=segments)
    alone = apply(config, params, tokens[:, 5:])
    np.testing.assert_allclose(packed[:, 5:], alone, rtol=1e-4, atol=1e-5)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    given = apply(config, params, tokens, segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(given, packed)
    stretched = apply(config, params, tokens, segment_ids=segments, positions=3 * positions)
    assert np.abs(stretched - packed).max() > 1e-3


@pytest.mark.parametrize("bad", [-1, 48])
def test_an_id_outside_of_the_vocabulary_gives_nan(bad):
    config, params = make()
    tokens = jnp.zeros((2, 6), int).at[1, 3].set(bad)
    broken = np.isnan(apply(config, params, tokens))
    assert not broken[0].any() and broken[1, 3:].all()


def test_bf16_compute_stays_near_f32(rng):
    _, params = make()
    tokens = jnp.asarray(rng.integers(0, 48, (2, 9)))
    f32 = apply(ModelConfig(**SIZES), params, tokens)
    bf16 = apply(ModelConfig(**SIZES | dict(dtype="bfloat16")), params, tokens)
    assert bf16.dtype == jnp.float32
    assert 0 < np.abs(bf16 - f32).max() < 0.05 * np.abs(f32).max()


def test_init_has_the_documented_scales():
    config = ModelConfig(
        vocab_size=512, num_layers=8, d_model=64, num_heads=2, d_ff=256, qkv_bias=True,
        qk_norm=True, init_std=0.03,
    )  # fmt: skip
    init = jax.jit(lm.init, static_argnums=0)
    params = init(config, jax.random.key(3))
    block = params["layers"]
    residual = math.sqrt(2 * 8)
    expected = {
        "embedding": (params["embedding"], 0.03),
        "head": (params["head"]["kernel"], 1 / 8),
        "query": (block["attention"]["query"]["kernel"], 1 / 8),
        "out": (block["attention"]["out"]["kernel"], 1 / 8 / residual),
        "up": (block["mlp"]["up"]["kernel"], 1 / 8),
        "down": (block["mlp"]["down"]["kernel"], 1 / 16 / residual),
    }
    for name, (leaf, std) in expected.items():
        assert np.std(leaf) == pytest.approx(std, rel=0.03), name
        assert abs(np.mean(leaf)) < 0.05 * std, name
    assert (block["attention"]["query"]["bias"] == 0).all()
    for scale in (block["mlp_norm"], block["attention"]["key_norm"], params["final_norm"]):
        assert (scale["scale"] == 1).all()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    again, other = init(config, jax.random.key(3)), init(config, jax.random.key(4))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert (other["embedding"] != params["embedding"]).any()


def test_abstract_parameters_and_axes_describe_the_real_ones():
    config = ModelConfig(**SIZES | dict(qkv_bias=True, qk_norm=True, param_dtype="bfloat16"))
    params, abstract = lm.init(config, jax.random.key(0)), model.abstract_params(config)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    kind = lambda leaf: (leaf.shape, leaf.dtype)  # noqa: E731
    assert jax.tree.map(kind, params) == jax.tree.map(kind, abstract)
    axes = model.logical_axes(config)
    is_axes = lambda node: isinstance(node, tuple)  # noqa: E731
    ranks = jax.tree.map(len, axes, is_leaf=is_axes)
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)
    stacked = jax.tree.leaves(axes["layers"], is_leaf=is_axes)
    assert stacked and all(a[0] == "layers" for a in stacked)


def test_wrong_inputs_are_refused():
    config, params = make()
    with pytest.raises(ValueError, match=r"\[batch, time\], got shape \(3,\)"):
        apply(config, params, jnp.zeros(3, int))
    with pytest.raises(ConfigError, match="not of this model configuration"):
        apply(config, make(qk_norm=True)[1], jnp.zeros((1, 3), int))


# --- plugged products ----------------------------------------------------------------------------


def times(factor):
    return lambda a, b, dims: factor * jax.lax.dot_general(a, b, dims)


SITES = {
    "layers.attention.query": ("layers", "attention", "query", "kernel"),
    "layers.attention.key": ("layers", "attention", "key", "kernel"),
    "layers.attention.value": ("layers", "attention", "value", "kernel"),
    "layers.attention.out": ("layers", "attention", "out", "kernel"),
    "layers.mlp.gate": ("layers", "mlp", "gate", "kernel"),
    "layers.mlp.up": ("layers", "mlp", "up", "kernel"),
    "layers.mlp.down": ("layers", "mlp", "down", "kernel"),
    "head": ("head", "kernel"),
}


def with_kernel(params, path, factor):
    if not path:
        return params * factor
    return params | {path[0]: with_kernel(params[path[0]], path[1:], factor)}


def test_plugs_are_asked_at_every_site_and_nowhere_else():
    config, params = make(num_layers=3)
    asked = []
    jax.eval_shape(lambda p: apply(config, p, jnp.zeros((1, 4), int), plug=asked.append), params)
    assert {site.name for site in asked} == set(SITES)
    for site in asked:
        traced = isinstance(site.layer, jax.core.Tracer)
        assert traced if site.name.startswith("layers.") else site.layer is None


@pytest.mark.parametrize("name", ["layers.attention.key", "layers.attention.out", "head"])
def test_a_rule_by_name_reaches_its_site_alone(name):
    config, params = make()
    tokens = jnp.arange(6)[None]
    got = apply(config, params, tokens, plug=by_name([(name, times(3.0))]))
    expected = apply(config, with_kernel(params, SITES[name], 3.0), tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(got - apply(config, params, tokens)).max() > 1e-2


@pytest.mark.parametrize(
    "changes",
    [dict(num_layers=3), dict(num_layers=5, attention_pattern=("full", "full"))],
)
def test_plugs_know_their_layer(changes):
    config, params = make(**changes)
    tokens = jnp.arange(6)[None]

    def plug(site):
        return times(1.0 + site.layer) if site.name == "layers.mlp.down" else None

    got = apply(config, params, tokens, plug=plug)
    factor = 1.0 + jnp.arange(config.num_layers)[:, None, None]
    expected = apply(config, with_kernel(params, SITES["layers.mlp.down"], factor), tokens)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_cache_has_room_for_every_layer():
    config = ModelConfig(**SIZES | dict(num_kv_heads=2, dtype="bfloat16"))
    cache = model.init_cache(config, 3, 10)
    assert isinstance(cache, Cache) and cache.keys.dtype == jnp.bfloat16
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 10, 8)


@pytest.mark.parametrize("pattern", [(), ("sliding", "sliding", "full")])
def test_layers_without_a_loop_compute_the_same(pattern, rng):
    form = dict(vocab_size=64, num_layers=4, d_model=32, num_heads=2, d_ff=48, dtype="float32")
    window = dict(sliding_window=3, attention_pattern=pattern) if pattern else {}
    looped, unrolled = (lm.ModelConfig(**form, **window, unroll=n) for n in (1, 4))
    params = lm.init(looped, jax.random.key(0))
    tokens = jnp.asarray(rng.integers(0, 64, (2, 9)))
    programs = [
        jax.jit(lambda p, c=config: lm.apply(c, p, tokens)).lower(params).as_text()
        for config in (looped, unrolled)
    ]
    assert "stablehlo.while" in programs[0] and "stablehlo.while" not in programs[1]
    np.testing.assert_allclose(
        lm.apply(looped, params, tokens), lm.apply(unrolled, params, tokens), atol=1e-5
    )
