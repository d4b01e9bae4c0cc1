import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm import generate as module
from lm import model
from lm.config import ConfigError, ModelConfig, RopeScaling
from lm.config_mla import MLAConfig
from lm.config_moe import MoEConfig
from lm.generate import Sampling, continue_text, generate, sample
from lm.layers.stack import unstack

SIZES = dict(vocab_size=48, num_layers=2, d_model=32, num_heads=4, d_ff=48, dtype="float32")
CONFIG = ModelConfig(**SIZES)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def params():
    return sharpened(CONFIG)


def sharpened(config, factor=3):
    """Parameters whose logits are far enough apart that rounding does not decide."""
    params = jax.jit(lm.init, static_argnums=0)(config, jax.random.key(0))
    return jax.tree.map(lambda p: np.asarray(p) * factor, params)


def collect(config, params, prompts, **arguments):
    return np.stack(list(generate(config, params, prompts, **arguments)), axis=1)


FORMS = {
    "plain": dict(),
    "window": dict(sliding_window=5),
    "pattern": dict(num_layers=3, sliding_window=4, attention_pattern=("sliding", "full")),
    "qwen3": dict(num_kv_heads=2, qk_norm=True, tie_embeddings=True, head_dim=16),
    "yarn": dict(
        num_kv_heads=1, qkv_bias=True, logit_soft_cap=5.0, mlp="gelu",
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_cached_logits_equal_uncached_ones_with_chunks_and_padding(rng, name):
    config = ModelConfig(**SIZES | FORMS[name])
    # Times 3 would be too sharp to compare: half a unit in the last place of the weights of "yarn"
    # then moves its logits by up to 6e-4.
    params = sharpened(config, 2)
    lengths, width = [20, 13], 20
    rows = [rng.integers(0, 48, n) for n in lengths]
    tokens = np.zeros((2, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :] = row
    padding = jnp.asarray([width - n for n in lengths])
    cache, pieces = model.init_cache(config, 2, 32), []
    step = jax.jit(
        lambda tokens, cache, index: model.decode(
            config, params, tokens, cache, index, padding=padding
        )
    )
    start = 0
    for chunk in (8, 8, 1, 1, 1, 1):  # the second row begins within the first chunk
        piece = jnp.asarray(tokens[:, start : start + chunk])
        logits, cache = step(piece, cache, jnp.int32(start))
        pieces.append(logits)
        start += chunk
    cached = np.concatenate(pieces, axis=1)
    whole = jax.jit(lambda tokens: lm.apply(config, params, tokens))
    for i, row in enumerate(rows):
        padded = np.pad(row, (0, width - len(row)))[None]  # causal: what follows does not matter
        expected = whole(padded)[0, : len(row)]
        np.testing.assert_allclose(cached[i, width - len(row) :], expected, rtol=1e-4, atol=1e-4)


def test_greedy_is_the_argmax_of_apply_for_prompts_of_many_lengths(rng, params, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_CHUNK", 8)  # the longest prompt takes three pieces
    monkeypatch.setattr(module, "PREFILL_STEP", 8)
    prompts = [rng.integers(0, 48, n).tolist() for n in (19, 1, 7)]
    drawn = collect(CONFIG, params, prompts, max_tokens=6, sampling=GREEDY)
    assert drawn.shape == (3, 6) and drawn.dtype == np.int32
    run = jax.jit(lambda tokens: jnp.argmax(lm.apply(CONFIG, params, tokens), -1))
    for prompt, row in zip(prompts, drawn, strict=True):
        text = [*prompt, *row]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        predicted = run(padded)[0]  # at every position at once: the model is causal
        np.testing.assert_array_equal(row, predicted[len(prompt) - 1 : len(text) - 1])


def test_a_seed_draws_the_same_text_and_another_seed_another(params):
    hot = Sampling(temperature=3.0)
    draw = lambda seed: collect(  # noqa: E731
        CONFIG, params, [[1, 2, 3]] * 2, max_tokens=12, sampling=hot, seed=seed
    )
    first = draw(7)
    np.testing.assert_array_equal(first, draw(7))
    assert (first != draw(8)).any() and (first[0] != first[1]).any()


def test_rows_end_at_the_stop_id(rng, params):
    prompts = [rng.integers(0, 48, 5).tolist() for _ in range(3)]
    free = collect(CONFIG, params, prompts, max_tokens=10, sampling=GREEDY)
    stop = int(free[0, 3])
    stopped = collect(CONFIG, params, prompts, max_tokens=10, sampling=GREEDY, stop_id=stop)
    expected = free.copy()
    for row in expected:
        if stop in row:
            row[row.tolist().index(stop) :] = -1
    alive = (expected >= 0).any(0)
    assert (expected == -1).any()
    np.testing.assert_array_equal(stopped, expected[:, alive])


def test_prompts_of_a_bucket_share_one_program(params):
    arguments = dict(max_tokens=4, sampling=GREEDY)
    collect(CONFIG, params, [[1] * 9], **arguments)
    sizes = module._prefill._cache_size(), module._next._cache_size()
    collect(CONFIG, params, [[2] * 16], **arguments)
    collect(CONFIG, params, [[3]], **arguments, seed=5)
    assert (module._prefill._cache_size(), module._next._cache_size()) == sizes
    collect(CONFIG, params, [[2] * 17], **arguments)
    assert module._prefill._cache_size() == sizes[0] + 1


@pytest.mark.parametrize(
    "prompts,max_tokens,message",
    [
        ([[]], 4, "a prompt needs a token or more"),
        ([], 4, "a prompt needs a token or more"),
        ([[1], []], 4, "a prompt needs a token or more"),
        ([[1, 48]], 4, r"token id 48 is outside of \[0, 48\)"),
        ([[-1]], 4, "token id -1 is outside"),
        ([[1]], 0, "max_tokens must be above 0, got 0"),
        ([[1] * 30], 3, "30 tokens and 3 new ones exceed the model's max_context 32"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_the_call(params, prompts, max_tokens, message):
    config = dataclasses.replace(CONFIG, max_context=32)
    with pytest.raises(ConfigError, match=message):
        generate(config, params, prompts, max_tokens=max_tokens)


@pytest.mark.parametrize(
    "values,message",
    [
        (dict(temperature=-1.0), "temperature must be 0 or more"),
        (dict(top_k=-1), "top_k must be 0 or more"),
        (dict(top_p=0.0), r"top_p must lie in \(0, 1\], got 0.0"),
        (dict(top_p=1.5), "top_p must lie in"),
    ],
)
def test_impossible_sampling_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def reference(logits, sampling):
    """Probabilities after temperature, then top-k, then top-p (arXiv 1904.09751, section 3.1)."""
    order = np.argsort(-logits)
    p = np.exp(logits[order] / sampling.temperature)
    if sampling.top_k:
        p[sampling.top_k :] = 0
    p /= p.sum()
    keep, mass = 0, 0.0
    while keep < len(p) and mass < sampling.top_p:
        mass += p[keep]
        keep += 1
    p[keep:] = 0
    out = np.empty_like(p)
    out[order] = p / p.sum()
    return out


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.0, top_k=3),
        dict(temperature=1.0, top_k=100),
        dict(temperature=2.0, top_p=0.7),
        dict(temperature=1.0, top_p=1e-6),
        dict(temperature=1.5, top_k=5, top_p=0.6),
    ],
)
def test_draws_follow_the_truncated_distribution(rng, values):
    sampling, count = Sampling(**values), 20_000
    logits = 1.5 * rng.normal(size=12)
    tokens = sample(jax.random.key(1), jnp.tile(jnp.float32(logits), (count, 1)), sampling)
    found = np.bincount(tokens, minlength=12) / count
    expected = reference(logits, sampling)
    assert not found[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(found - expected) <= 5 * deviation + 1e-12).all()


def test_temperature_zero_is_the_argmax(rng):
    logits = rng.normal(size=(5, 12))
    tokens = sample(jax.random.key(0), jnp.float32(logits), GREEDY)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


class Letters:
    """Ids 0 .. 39 are the bytes of a text with characters of one to four bytes; 40 separates."""

    text = "añ€🙂b".encode() * 4
    separator_id, end_id, vocab_size = 40, None, 41

    def encode(self, text):
        return np.zeros(len(text), np.int32)

    def decode(self, ids):
        return bytes(self.text[i] for i in ids).decode(errors="replace")


def test_pieces_of_text_are_whole_characters(params, monkeypatch):
    ids = [*range(11), 45, *range(11, 22)]  # id 45 is none of the tokenizer's

    def fake(config, params, prompts, *, stop_id, **_):
        assert prompts == [[40, 0, 0]] and stop_id == 40
        return (np.asarray([i]) for i in ids)

    monkeypatch.setattr(module, "generate", fake)
    pieces = list(continue_text(CONFIG, params, Letters(), "ab", 30, GREEDY, 0))
    assert "".join(pieces) == "añ€🙂b" * 2
    assert all(len(piece) <= 1 for piece in pieces) and "\ufffd" not in "".join(pieces)


def test_text_that_ends_within_a_character_shows_what_there_is(params, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *_, **__: (np.asarray([i]) for i in range(2)))
    assert "".join(continue_text(CONFIG, params, Letters(), "a", 9, GREEDY, 0)) == "a\ufffd"


@pytest.mark.parametrize(
    "changes",
    [
        FORMS["pattern"],
        dict(num_layers=3, mlp="moe", attention_kind="mla")
        | dict(moe=MoEConfig(experts=4, top_k=2, dense_layers=(0,)))
        | dict(
            mla=MLAConfig(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
        ),
    ],
    ids=["pattern", "mixed"],
)
def test_layers_in_arrays_of_their_own_give_the_same(rng, changes):
    """What CPUs decode with against the loop over stacks that other devices run."""
    config = ModelConfig(**SIZES | changes)
    params = sharpened(config)
    tokens = jnp.asarray(rng.integers(0, 48, (2, 9)))
    cache = model.init_cache(config, 2, 12)
    decode = jax.jit(model.decode, static_argnums=0)
    wanted, stacked = decode(config, params, tokens, cache, jnp.int32(0))
    prepared = module.prepare(config, params)
    assert module.prepare(config, prepared) is prepared
    got, loose = decode(config, prepared, tokens, unstack(cache), jnp.int32(0))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    for name, leaves in loose._asdict().items():
        if leaves is not None:
            assert len(leaves) == 3
            np.testing.assert_allclose(np.stack(leaves), getattr(stacked, name), atol=1e-5)


def test_one_row_in_16_bit_gets_company_that_nobody_sees(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    alone = collect(config, params, [[1, 2, 3]], max_tokens=6, sampling=GREEDY)
    assert alone.shape == (1, 6)
    both = collect(config, params, [[1, 2, 3], [1, 2, 3]], max_tokens=6, sampling=GREEDY)
    np.testing.assert_array_equal(both, np.repeat(alone, 2, axis=0))
