"""Batched, bucketed, sharded likelihoods against the model applied to one sequence at a time."""

import functools

import jax
import numpy as np
import pytest

import lm
from lm import sharding
from lm.config import ConfigError, ModelConfig
from lm.generate import Sampling
from lm.scoring import Scorer, rolling_windows


def make_config(**changes):
    sizes = dict(vocab_size=264, num_layers=2, d_model=32, num_heads=4, d_ff=48, max_context=96)
    return ModelConfig(dtype="float32", **sizes | changes)


CONFIG = make_config()


@pytest.fixture(scope="module")
def tiny():
    return CONFIG, jax.jit(lm.init, static_argnums=0)(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def scorer(tiny):
    """Compiles each of its programs once."""
    return Scorer(*tiny, batch_size=4)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, tokens):
    return lm.apply(config, params, tokens)


def logits_of(config, params, ids, padded=True):
    """Logits behind every token of one sequence; padding behind it changes none of them."""
    row = np.zeros((1, 96 if padded else len(ids)), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(apply(config, params, row))[0, : len(ids)].astype(np.float64)


def alone(config, params, context, continuation, padded=True):
    """Log-likelihood and greediness of one continuation, by `lm.apply` on it alone."""
    logits = logits_of(config, params, [*context, *continuation][:-1], padded)
    logits = logits[len(context) - 1 :]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    score = logp[np.arange(len(continuation)), list(continuation)].sum()
    return score, bool((logits.argmax(-1) == list(continuation)).all())


def greedy_alone(config, params, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(config, params, ids)[-1].argmax()))
    return ids[len(prompt) :]


def make_pairs(rng, count, longest):
    lengths = rng.integers(2, longest, count)
    cuts = [int(rng.integers(1, length)) for length in lengths]
    ids = [rng.integers(0, 264, length).tolist() for length in lengths]
    return [(each[:cut], each[cut:]) for each, cut in zip(ids, cuts, strict=True)]


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_likelihoods_are_those_of_each_sequence_alone(tiny, scorer, rng, mesh):
    config, params = tiny
    if mesh:
        scorer = Scorer(config, params, batch_size=4, mesh=sharding.make_mesh(mesh))
    pairs = make_pairs(rng, 11, 16 if mesh else 90)
    # Continuations that greedy decoding gives: the second value is not always False.
    for index in (2, 5):
        context = pairs[index][0][:12]
        pairs[index] = context, greedy_alone(config, params, context, 4)
    ready = []
    found = scorer.loglikelihoods(pairs, ready.append)
    assert sum(ready) == len(pairs)
    for (score, greedy), pair in zip(found, pairs, strict=True):
        expected = alone(config, params, *pair)
        assert score == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    assert [greedy for _, greedy in found].count(True) >= 2
    expected = alone(config, params, *pairs[0], padded=False)[0]
    assert found[0][0] == pytest.approx(expected, abs=1e-4)


def test_no_program_for_every_length(scorer, rng):
    scorer.loglikelihoods([([1] * length, [2]) for length in range(1, 96)])
    assert scorer.programs == 4  # 16, 32, 64, 96
    scorer.loglikelihoods(make_pairs(rng, 30, 96))
    assert scorer.programs == 4


def test_what_is_too_long_loses_its_front(tiny, rng):
    scorer = Scorer(*tiny, batch_size=2, max_length=20)
    ids = rng.integers(0, 264, 40).tolist()
    (score, _), (all_of_it, _) = scorer.loglikelihoods([(ids[:35], ids[35:]), (ids[:2], ids[2:])])
    assert score == pytest.approx(alone(*tiny, ids[19:35], ids[35:])[0], abs=1e-4)
    assert all_of_it == pytest.approx(alone(*tiny, ids[19:20], ids[20:])[0], abs=1e-4)


def test_logits_of_some_positions_at_a_time(tiny, scorer, rng, monkeypatch):
    pairs = make_pairs(rng, 4, 16)
    whole = scorer.loglikelihoods(pairs)
    monkeypatch.setattr("lm.scoring._LOGITS", 4 * 264 * 2)  # two positions
    parts = Scorer(*tiny, batch_size=4).loglikelihoods(pairs)
    np.testing.assert_allclose([s for s, _ in parts], [s for s, _ in whole], atol=1e-5)


@pytest.mark.parametrize("count,length", [(0, 4), (3, 4), (4, 4), (10, 4), (12, 4), (9, 1)])
def test_windows_predict_every_token_once(count, length):
    ids = list(range(1, count + 1))
    windows = list(rolling_windows(ids, 0, length))
    assert [token for _, continuation in windows for token in continuation] == ids
    whole, at = [0, *ids], 0
    for number, (context, continuation) in enumerate(windows):
        at += len(continuation)
        inputs = len(context) + len(continuation) - 1
        assert [*context, *continuation] == whole[at - inputs : at + 1]
        assert inputs == length or (number == 0 and inputs == count)


def test_rolling_sums_the_windows(tiny, rng):
    ids = rng.integers(0, 264, 30).tolist()
    scorer = Scorer(*tiny, batch_size=4, max_length=16)
    found = scorer.rolling([ids, ids[:5], []], 256)
    first = alone(*tiny, [256], ids[:16])[0]
    rest = alone(*tiny, ids[13:16], ids[16:])[0]
    assert found[0] == pytest.approx(first + rest, abs=1e-4)
    assert found[1] == pytest.approx(alone(*tiny, [256], ids[:5])[0], abs=1e-4)
    assert found[2] == 0


def test_continuations_are_those_of_each_prompt_alone(tiny, rng):
    scorer = Scorer(*tiny, batch_size=3)
    prompts = [rng.integers(0, 264, length).tolist() for length in (3, 20, 7, 5)]
    greedy = Sampling(temperature=0.0)

    def one(prompt):
        return greedy_alone(*tiny, prompt, 6)

    expected = [one(prompt) for prompt in prompts]
    found = scorer.continuations(prompts, max_tokens=6, sampling=greedy, finished=lambda ids: False)
    assert found == expected
    stop = expected[1][2]
    found = scorer.continuations(
        prompts, max_tokens=6, sampling=greedy, finished=lambda ids: ids[-1] == stop
    )
    for ids, whole in zip(found, expected, strict=True):
        assert ids == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    # The front of a prompt makes room.
    long = rng.integers(0, 264, 120).tolist()
    cut = scorer.continuations([long], max_tokens=6, sampling=greedy, finished=lambda ids: False)
    assert cut == [one(long[-90:])]


def test_what_cannot_work_is_told(tiny):
    config, params = tiny
    with pytest.raises(ConfigError, match="max_length 97 must lie between 1 and .* 96"):
        Scorer(config, params, max_length=97)
    with pytest.raises(ConfigError, match="8 devices do not divide"):
        Scorer(config, params, batch_size=4, mesh=sharding.make_mesh({"data": 8}))
    scorer = Scorer(config, params, batch_size=2)
    with pytest.raises(ConfigError, match="a context needs a token"):
        scorer.loglikelihoods([([], [1])])
    with pytest.raises(ConfigError, match="token id 264 is outside"):
        scorer.loglikelihoods([([1], [264])])
    with pytest.raises(ConfigError, match="96 new tokens leave no room"):
        scorer.continuations([[1]], max_tokens=96, sampling=Sampling(), finished=lambda ids: True)
