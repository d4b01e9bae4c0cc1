"""Quantized products in training: exact resumption, micro-batches, kept layers, measurements."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from lm.config import ConfigError, ModelConfig
from lm.layers.linear import Site
from lm.train.config import LogConfig, OptimConfig, QuantConfig, RunConfig
from lm.train.loop import train
from lm.train.optimizer import make_optimizer
from lm.train.quant_log import QuantLog
from lm.train.quantization import Quantization, make_quantization
from lm.train.state import init_state
from lm.train.step import loss_sum, make_train_step

MODEL = ModelConfig(
    vocab_size=48,
    num_layers=3,
    d_model=32,
    num_heads=2,
    d_ff=48,
    max_context=64,
    dtype="float32",
)
ROWS, LENGTH = 4, 16
BUT_ONE = ("*attention*", "*gate", "*down", "head")
"""Leaves one product to be quantized, `layers.mlp.up`: each takes seconds to compile."""


def make_config(recipe="nvfp4", *, model=MODEL, log=None, **changes):
    fields = {f.name for f in dataclasses.fields(QuantConfig)}
    quantization = QuantConfig(recipe=recipe, **{k: v for k, v in changes.items() if k in fields})
    return RunConfig(
        model=model,
        quant=quantization,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        batch_size=ROWS,
        sequence_length=LENGTH,
        steps=20,
        log=log or LogConfig(),
        **{k: v for k, v in changes.items() if k not in fields},
    )


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 48, (ROWS, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": np.ones((ROWS, LENGTH), np.float32),
    }


def params_of(config):
    tx, _ = make_optimizer(config.optim, config.steps)
    return init_state(dataclasses.replace(config, quant=QuantConfig()), tx).params


def gradients(config, params):
    """A jitted function of the step: the gradient of the loss."""
    quantization = make_quantization(config)

    @jax.jit
    def run(step):
        plug = quantization.at(step) if quantization else None
        return jax.grad(lambda p: loss_sum(config, p, make_batch(), plug)[0])(params)

    return run


def distance(a, b):
    square = lambda t: sum(np.sum(np.square(x)) for x in jax.tree.leaves(t))  # noqa: E731
    return float(np.sqrt(square(jax.tree.map(np.subtract, a, b)) / square(b)))


@pytest.mark.parametrize(
    "recipe,changes",
    [
        ("nvidia", {"micro_batches": 2}),
        pytest.param(
            *("metis_paper", {"quant__refresh": 3, "model__d_model": 64}), marks=pytest.mark.slow
        ),
    ],
)
def test_resumption_is_exact(recipe, changes, tiny_run, tmp_path, rows_of, state_of):
    changes |= {"quant__recipe": recipe, "log__quant": 3, "eval__every": 4, "steps": 8}
    changes |= {"model__num_layers": 1, "quant__high": BUT_ONE}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny_run(whole, **changes))
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "00000008")
    train(tiny_run(resumed, resume=True, **changes))
    state = state_of(whole)
    assert state_of(resumed) == state
    assert rows_of(resumed) == rows_of(whole)
    kept = [np.frombuffer(leaf, np.float32) for name, leaf in state.items() if "quant" in name]
    assert bool(kept) == (recipe == "metis_paper")
    assert all(leaf.any() and np.isfinite(leaf).all() for leaf in kept)
    measured = {row["step"] for row in rows_of(whole) if "quant/mlp.up.0/snr/fprop_x" in row}
    assert measured == {3, 6}
    # Q(x) of NVFP4 has some 20 dB; a wrong operand would have far less.
    row = next(row for row in rows_of(whole) if row["step"] == 3)
    assert 15 < row["quant/mlp.up.0/snr/fprop_x"] < 40
    assert 0 <= row["quant/mlp.up.0/mean_share/x"] <= 1


def test_steps_layers_and_sites_have_their_own_numbers():
    quantization = Quantization(make_config("nvfp4"))
    x = jax.random.normal(jax.random.key(0), (32, 32))
    dims = (((1,), (0,)), ((), ()))

    @functools.partial(jax.jit, static_argnums=3)
    def dw(step, micro, layer, name=0):
        site = Site(("layers.mlp.up", "layers.mlp.gate")[name], layer)
        f = quantization.at(step, micro)(site)
        return jax.grad(lambda w: (f(x, w, dims) * x).sum())(x)

    base = dw(1, 2, 0)
    np.testing.assert_array_equal(base, dw(1, 2, 0))
    for changed in (dw(2, 2, 0), dw(1, 3, 0), dw(2, 1, 0), dw(1, 2, 1), dw(1, 2, 0, 1)):
        assert (np.asarray(changed) != base).mean() > 0.5


@pytest.mark.slow
def test_kept_layers():
    """First and last stay in high precision; the middle one alone is quantized."""
    params = params_of(make_config())
    numbers = lambda **c: gradients(make_config("nvfp4", high=BUT_ONE, **c), params)(0)  # noqa: E731

    kept_all, plain = numbers(keep_first=3), gradients(make_config("none"), params)(0)
    assert distance(kept_all, plain) < 1e-5
    middle, whole = numbers(keep_first=1, keep_last=1.0), numbers()
    assert 1e-3 < distance(middle, plain) < distance(whole, plain)
    # Scanned, the index of a block is only known at run time; unrolled, and recomputed, it is not.
    model = dataclasses.replace(MODEL, unroll=4, remat="full")
    assert distance(numbers(keep_first=1, keep_last=1.0, model=model), middle) < 1e-4


def test_layers_that_stay_by_name():
    config = make_config("nvfp4", high=("*",))
    params = params_of(config)
    assert Quantization(config).sites() == {}
    plain = gradients(make_config("none"), params)(0)
    for a, b in zip(
        jax.tree.leaves(gradients(config, params)(0)), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    sites = Quantization(make_config("nvfp4")).sites()
    assert set(sites) == {
        *(f"layers.attention.{n}" for n in ("query", "key", "value", "out")),
        *(f"layers.mlp.{n}" for n in ("gate", "up", "down")),
    }
    assert sites["layers.mlp.down"] == (48, 32)


@pytest.mark.slow
def test_bases_move_through_micro_batches():
    model = dataclasses.replace(MODEL, d_model=64, d_ff=64, num_layers=2)
    config = make_config("metis_paper", model=model, refresh=2, micro_batches=2, high=BUT_ONE)
    config = dataclasses.replace(config, batch_size=8)
    tx, schedule = make_optimizer(config.optim, config.steps)
    state = init_state(config, tx)
    assert state.quant and not any(leaf.any() for leaf in jax.tree.leaves(state.quant))
    step = jax.jit(make_train_step(config, tx, schedule, make_quantization(config)))
    batch = jax.tree.map(lambda a, b: np.concatenate([a, b]), make_batch(0), make_batch(1))
    kept = []
    for _ in range(4):
        state, _ = step(state, batch)
        kept.append(jax.tree.map(np.asarray, state.quant))
    assert step._cache_size() == 1
    for at in jax.tree.leaves(jax.tree.map(lambda *t: np.stack(t), *kept)):
        assert np.isfinite(at).all()
        for basis in at.reshape(-1, *at.shape[-2:]):
            np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-4)
        np.testing.assert_array_equal(at[0], at[1])
        np.testing.assert_array_equal(at[2], at[3])
        assert (at[1] != at[2]).any()


def test_evaluation_is_quantized_unless_told_otherwise():
    assert Quantization(make_config(evaluate="high")).for_evaluation() is None
    params = params_of(make_config())
    loss = lambda plug: float(loss_sum(make_config(), params, make_batch(), plug)[0])  # noqa: E731
    plug = Quantization(make_config(high=BUT_ONE)).for_evaluation()
    assert loss(plug) == loss(plug) != loss(None)


def test_measurements_are_taken_when_due():
    config = make_config("mean", log=LogConfig(quant=5))
    log = QuantLog(config, Quantization(config))
    assert [step for step in range(11) if log.due(step)] == [4, 9]
    assert not QuantLog(make_config("none", log=LogConfig(quant=5)), None).due(4)


def test_refusals():
    with pytest.raises(
        ConfigError, match="quant.recipe must be one of none, .*did you mean 'nvidia'"
    ):
        make_quantization(make_config("nvida"))
    with pytest.raises(ConfigError, match="recipe nvidia has no bases to renew"):
        make_quantization(make_config("nvidia", refresh=4))
    with pytest.raises(ConfigError, match="numbers of blocks"):
        make_quantization(make_config("nvidia", keep_last=1.5))
    config = make_config("metis_paper")
    adatask = dataclasses.replace(
        config, optim=OptimConfig(name="adatask", tasks=2, warmup_steps=2)
    )
    with pytest.raises(ConfigError, match="set --quant.refresh 1"):
        Quantization(adatask)
    assert make_quantization(make_config("none")) is None
