"""Latent attention against a naive float64 one; its cache, layouts, sizes and refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm import model
from lm.cli.args import parse_run, run_flags
from lm.config import AdapterConfig, ConfigError, MLAConfig, ModelConfig, RopeScaling
from lm.layers.mla import MLA, make_attention
from lm.layers.parameters import SINGLE
from lm.layers.self_attention import SelfAttention
from lm.sharding import check_mesh, make_mesh
from lm.train.config import MatConfig, OptimConfig, RunConfig
from lm.train.flops import model_flops_per_token, parameter_count
from lm.train.modular import modules

T, D, N, RANK, NOPE, ROPE, V = 11, 24, 3, 10, 6, 4, 5
WIDTHS = MLAConfig(kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=V)
QUERIES = dataclasses.replace(WIDTHS, q_lora_rank=8)
YARN = RopeScaling(
    kind="yarn", factor=4.0, original_context=4, mscale=0.7, mscale_all_dim=1.2, beta_fast=4.0
)
compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(**changes) -> ModelConfig:
    sizes = dict(vocab_size=40, num_layers=2, d_model=D, num_heads=N, d_ff=16, max_context=64)
    kind = dict(attention_kind="mla", mla=WIDTHS, rope_interleave=True, dtype="float32")
    return ModelConfig(**sizes | kind | changes)


def random_params(config, rng):
    """No norm of 1, and matrices that give scores of some size."""

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "scale":
            return np.float32(1 + 0.2 * noise)
        return np.float32(noise / math.sqrt(leaf.shape[-2]))

    return jax.tree_util.tree_map_with_path(draw, model.abstract_params(config))


def naive(config, p, x, positions):
    """arXiv 2405.04434, equations 9 to 19 (37 to 47 of its appendix), one query at a time."""
    p = jax.tree.map(np.float64, p)
    mla = config.mla

    def norm(x, scale):
        return x / math.sqrt(np.mean(x * x) + 1e-6) * scale

    def m(scale, factor):
        return 0.1 * scale * math.log(factor) + 1

    frequencies = [config.rope_theta ** (-2 * i / ROPE) for i in range(ROPE // 2)]
    factor, scale = 1.0, 1 / math.sqrt(NOPE + ROPE)
    if s := config.rope_scaling:

        def dimension(turns):
            turned = math.log(s.original_context / (turns * 2 * math.pi))
            return ROPE * turned / (2 * math.log(config.rope_theta))

        first = max(math.floor(dimension(s.beta_fast)), 0)
        last = min(math.ceil(dimension(s.beta_slow)), ROPE - 1)
        for i, f in enumerate(frequencies):
            share = min(max((i - first) / max(last - first, 1e-3), 0), 1)
            frequencies[i] = f * (1 - share) + f / s.factor * share
        factor = m(s.mscale, s.factor) / m(s.mscale_all_dim, s.factor)
        scale *= m(s.mscale_all_dim, s.factor) ** 2

    def rope(x, position):
        out = np.zeros_like(x)
        for i, f in enumerate(frequencies):
            a, b = (2 * i, 2 * i + 1) if config.rope_interleave else (i, i + ROPE // 2)
            c, s = math.cos(f * position) * factor, math.sin(f * position) * factor
            out[a], out[b] = x[a] * c - x[b] * s, x[b] * c + x[a] * s
        return out

    queries, keys, values = [], [], []
    for row, position in zip(np.float64(x), positions, strict=True):
        if mla.q_lora_rank:
            latent = norm(row @ p["query_down"]["kernel"], p["query_norm"]["scale"])
            q = (latent @ p["query_up"]["kernel"]).reshape(N, NOPE + ROPE)
        else:
            q = (row @ p["query"]["kernel"]).reshape(N, NOPE + ROPE)
        down = row @ p["kv_down"]["kernel"]
        up = (norm(down[:RANK], p["kv_norm"]["scale"]) @ p["kv_up"]["kernel"]).reshape(N, NOPE + V)
        key = rope(down[RANK:], position)
        queries.append([np.concatenate([h[:NOPE], rope(h[NOPE:], position)]) for h in q])
        keys.append([np.concatenate([h[:NOPE], key]) for h in up])
        values.append(up[:, NOPE:])
    out = []
    for t in range(len(x)):
        heads = []
        for n in range(N):
            scores = np.array([queries[t][n] @ keys[s][n] * scale for s in range(t + 1)])
            weights = np.exp(scores - scores.max())
            heads.append(weights / weights.sum() @ np.array([values[s][n] for s in range(t + 1)]))
        out.append(np.concatenate(heads) @ p["out"]["kernel"])
    return np.array(out)


CASES = {
    "plain": dict(),
    "query latent": dict(mla=QUERIES),
    "yarn": dict(rope_scaling=YARN, rope_theta=100.0),
    "halves": dict(rope_interleave=False, mla=QUERIES),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_layer_is_the_naive_one_at_once_and_from_the_cache(changes, rng):
    config = make(**changes)
    layer = make_attention(jax.random.key(0), config, SINGLE)
    assert isinstance(layer, MLA)
    every = random_params(config, rng)["layers"]["attention"]
    params = jax.tree.map(lambda leaf: leaf[0], every)
    for name, leaves in params.items():
        for leaf, value in leaves.items():
            getattr(getattr(layer, name), leaf).set_value(jnp.asarray(value))
    x = rng.normal(size=(T, D)).astype(np.float32)
    positions = np.arange(T) + 7
    expected = naive(config, params, x, positions)
    run = jax.jit(lambda x, rotation, cache=None: layer(x, rotation, None, cache=cache))
    whole, none = run(x[None], model.make_rotation(config, jnp.asarray(positions)[None]))
    assert none is None
    np.testing.assert_allclose(whole[0], expected, rtol=2e-4, atol=2e-5)
    cache = jax.tree.map(lambda leaf: leaf[0] + 1e3, model.init_cache(config, 1, T + 3))
    for start, stop in ((0, 5), (5, 10), (10, T)):  # several tokens at a time, and one
        rotation = model.make_rotation(
            config, jnp.asarray(positions[start:stop])[None], cache_index=jnp.int32(start)
        )
        y, cache = run(x[None, start:stop], rotation, cache)
        np.testing.assert_allclose(y[0], expected[start:stop], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(cache.keys[:, :, T:], 1e3)


def test_cache_holds_one_latent_and_one_rotary_key_for_all_heads():
    config = make(dtype="bfloat16")
    cache = model.init_cache(config, 3, 16)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(2, 3, 1, 16, RANK + ROPE)]
    assert cache.keys.dtype == jnp.bfloat16 and cache.values is None


def test_model_decodes_padded_rows_and_keeps_packed_documents_apart(rng):
    config = make(mla=QUERIES, num_layers=1)
    params = random_params(config, rng)
    apply = compile_fast(lm.apply, static_argnums=0)
    decode = compile_fast(model.decode, static_argnums=0)
    tokens = jnp.asarray(rng.integers(0, 40, (1, T)), jnp.int32)
    alone = apply(config, params, tokens)
    packed = jnp.concatenate([tokens[:, ::-1], tokens], axis=1)
    segments = jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), T, axis=1)
    together = apply(config, params, packed, segment_ids=segments)
    np.testing.assert_allclose(together[:, T:], alone, rtol=1e-4, atol=1e-4)
    padded = jnp.pad(tokens, ((0, 0), (5, 0)))
    got, _ = decode(
        config,
        params,
        padded,
        model.init_cache(config, 1, T + 5),
        jnp.int32(0),
        padding=jnp.asarray([5]),
    )
    np.testing.assert_allclose(got[:, 5:], alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter_alike_on_a_mesh(rng):
    config = make(mla=dataclasses.replace(QUERIES, v_head_dim=6), num_heads=4, num_layers=1)
    params = random_params(config, rng)
    tokens = jnp.asarray(rng.integers(0, 40, (4, 8)), jnp.int32)

    def loss(params, tokens):
        return jnp.mean(jax.nn.logsumexp(lm.apply(config, params, tokens), axis=-1) ** 2)

    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    check_mesh(config, 4, 1, mesh)
    one = compile_fast(jax.grad(loss))(params, tokens)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one))
    layout = model.shardings(config, mesh)
    up = layout["layers"]["attention"]["kv_up"]["kernel"].spec
    assert up == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    with jax.set_mesh(mesh):
        many = compile_fast(jax.grad(loss))(jax.device_put(params, layout), tokens)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, one, jax.device_get(many))


@pytest.mark.parametrize("mla", [WIDTHS, QUERIES], ids=["direct", "latent"])
def test_parameters_and_flops_equal_a_count_by_hand(mla):
    config = make(mla=mla, attention_out_bias=True)
    shapes = jax.tree.leaves(model.abstract_params(config))
    assert parameter_count(config) == sum(math.prod(leaf.shape) for leaf in shapes)
    matrices = [(D, RANK + ROPE), (RANK, N * (NOPE + V)), (N * V, D), *[(D, 16)] * 3]
    matrices += [(D, 8), (8, N * (NOPE + ROPE))] if mla.q_lora_rank else [(D, N * (NOPE + ROPE))]
    products = sum(2 * a * b for a, b in matrices)
    scores = sum(2 * N * (NOPE + ROPE + V) * (t + 1) for t in range(T)) / T
    expected = 3 * (2 * (products + scores) + 2 * D * 40)
    assert model_flops_per_token(config, T, causal=True) == pytest.approx(expected, rel=1e-12)


def test_cache_is_as_small_as_published():
    """arXiv 2405.04434, table 1: 9/2 d_h a layer, with d_c = 4 d_h and d_h^R = d_h / 2."""
    published = make(mla=MLAConfig(), num_heads=128, d_model=128)
    cache = jax.eval_shape(lambda: model.init_cache(published, 1, 1))
    assert cache.keys.size / published.num_layers == 4.5 * 128


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(attention_kind="grouped"), "model.mla.kv_lora_rank is given.*--model.attention-kind"),
        (dict(attention_kind="latent"), "attention_kind must be grouped or mla, got 'latent'"),
        (dict(num_kv_heads=1), "model.num_kv_heads is 1.*it must be 3"),
        (dict(head_dim=8), "model.head_dim is 8.*it must be 10"),
        (dict(qk_norm=True), "model.qk_norm is True"),
        (dict(qkv_bias=True), "model.qkv_bias is True"),
        (dict(positions="learned"), "model.positions is 'learned'"),
        (dict(attention_kind="grouped", mla=MLAConfig(), rope_scaling=YARN), "attention_factor"),
    ],
    ids=str,
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(kv_lora_rank=0), "kv_lora_rank must be above 0"),
        (dict(q_lora_rank=1.5), "q_lora_rank must be a whole number"),
        (dict(qk_rope_head_dim=5), "qk_rope_head_dim must be even"),
    ],
)
def test_bad_widths_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MLAConfig(**fields)


def test_what_latent_attention_lacks_is_refused_where_it_is_asked_for(rng):
    with pytest.raises(ConfigError, match="mesh.fsdp = 4 does not divide model.mla.kv_lora_rank"):
        check_mesh(make(), 8, 1, make_mesh({"fsdp": 4}))
    with pytest.raises(ConfigError, match="'key'.*no projection.*attention_kind 'mla'"):
        model.abstract_params(make(adapter=AdapterConfig(kind="lora", targets=("key",))))
    run = RunConfig(
        model=make(max_context=256),
        optim=OptimConfig(name="mat"),
        mat=MatConfig(family="heads"),
    )
    with pytest.raises(ConfigError, match="mat.family to layers"):
        modules(run)
    layer = make_attention(jax.random.key(0), make(), SINGLE)
    rotation = model.make_rotation(make(), jnp.arange(4)[None])
    with pytest.raises(ConfigError, match="mat.family layers"):
        layer(jnp.zeros((1, 4, D)), rotation, None, active=jnp.ones(N, bool))


def test_adapters_beside_the_projections_that_there_are():
    config = make(adapter=AdapterConfig(kind="lora", rank=2, targets=("query", "out")))
    params = model.abstract_params(config)
    attention = params["layers"]["attention"]
    assert attention["out"]["adapter"]["lora_a"].shape == (2, N * V, 2)
    assert parameter_count(config) == sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_the_command_line_makes_it_and_repeats_it():
    words = ["tiny", "--model.attention-kind", "mla", "--model.mla.kv-lora-rank", "32"]
    words += ["--model.mla.qk-nope-head-dim", "16", "--model.mla.qk-rope-head-dim", "8"]
    config = parse_run(words)
    assert (config.model.head_dim, config.model.mla.kv_lora_rank) == (24, 32)
    assert parse_run(run_flags(config)) == config


def test_ordinary_attention_can_rotate_neighbours(rng):
    """Pairs (2 i, 2 i + 1) with the columns of query and key reordered are pairs (i, i + H/2)."""
    plain = ModelConfig(
        vocab_size=40, num_layers=1, d_model=D, num_heads=N, d_ff=16, dtype="float32"
    )
    other = dataclasses.replace(plain, rope_interleave=True)
    make_layer = functools.partial(SelfAttention, jax.random.key(0), stack=SINGLE)
    one, two, untouched = make_layer(plain), make_layer(other), make_layer(other)
    order = np.arange(D).reshape(N, 2, -1).swapaxes(1, 2).reshape(-1)
    for name in ("query", "key"):
        kernel = getattr(one, name).kernel[...]
        getattr(two, name).kernel.set_value(kernel[:, order])
    x = jnp.asarray(rng.normal(size=(1, T, D)), jnp.float32)
    rotation = model.make_rotation(plain, jnp.arange(T)[None])
    a, b, c = (jax.jit(lambda x, m=m: m(x, rotation, None)[0])(x) for m in (one, two, untouched))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert np.abs(c - a).max() > 1e-3
