"""Decomposed experts in a training run: options, metrics, resuming, several devices."""

import dataclasses
import shutil

import numpy as np
import pytest

import moe
from lm import model
from lm.config import ConfigError, ModelConfig
from lm.config_moe import MoEConfig
from lm.train.config import LogConfig, OptimConfig, RunConfig, SDConfig
from lm.train.load import load_run
from lm.train.loop import train

RANK = 3
# "xla" compiles fastest.
EXPERTS = dict(experts=4, d_expert=24, shared=1, sd_rank=RANK, implementation="xla")
DECOMPOSED = {"mlp": "moe", "moe": MoEConfig(**EXPERTS)}


@pytest.fixture(scope="module")
def make(tiny_run):
    """A function that makes a run with a refresh every 3 steps, in a given folder."""

    def make(out, **changes):
        config = tiny_run(out)
        experts = dataclasses.replace(config.model, **DECOMPOSED)
        return tiny_run(out, model=experts, sd=SDConfig(refresh_every=3), **changes)

    return make


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """A finished run that logs what experts have in common, never to be changed."""
    out = tmp_path_factory.mktemp("sd") / "run"
    train(make(out, log__experts=6))
    return out


def test_metrics_and_parameters_of_a_run(whole, rows_of):
    rows = {row["step"]: row for row in rows_of(whole) if "loss" in row}
    assert rows[12]["loss"] < rows[1]["loss"]
    for step, row in rows.items():
        logged = "experts/unique_similarity/up/left" in row
        assert logged == (step in (6, 12))
    last = rows[12]
    assert 0 < last["experts/refresh_change"] < 0.5
    assert last["experts/similarity/up/left"] > last["experts/unique_similarity/up/left"]
    loaded = load_run(whole)
    config, params = loaded.config, loaded.params
    mlp = params["layers"]["mlp"]
    assert mlp["common"]["up"].shape == (2, 32, 24)
    # The decomposition holds: 12 is a step of a refresh, whose bases are those of `common` there.
    u, _, _ = np.linalg.svd(np.float64(mlp["common"]["up"]))
    inside = np.einsum("ldk,ledf->lekf", u[..., :RANK], np.float64(mlp["experts"]["up"]))
    assert abs(inside).max() < 0.05 * abs(np.asarray(mlp["experts"]["up"])).max()
    # Folded, it is a model of ordinary experts that computes the same.
    plain = dataclasses.replace(config.model, moe=dataclasses.replace(config.model.moe, sd_rank=0))
    tokens = np.arange(16, dtype=np.int32)[None]
    found = model.apply(plain, moe.fold_common(params), tokens)
    np.testing.assert_allclose(found, model.apply(config.model, params, tokens), atol=1e-4)


def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    whole, make, tmp_path, rows_of, state_of
):
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    for step in (8, 12):  # between two refreshes
        shutil.rmtree(resumed / "checkpoints" / f"{step:08d}")
    train(make(resumed, log__experts=6, resume=True))
    assert rows_of(resumed) == rows_of(whole)
    found, wanted = state_of(resumed), state_of(whole)
    assert any("left" in name for name in wanted)  # the bases are part of what is compared
    assert found == wanted


def test_options_that_nothing_would_read():
    experts = ModelConfig(**DECOMPOSED)
    with pytest.raises(ConfigError, match="sd.on_refresh is given but experts have no common"):
        RunConfig(sd=SDConfig(on_refresh="keep"))
    with pytest.raises(ConfigError, match="log.experts needs model.mlp moe, and it is 'swiglu'"):
        RunConfig(log=LogConfig(experts=10))
    wide = dataclasses.replace(experts, moe=MoEConfig(d_expert=24, sd_rank=24))
    with pytest.raises(ConfigError, match="sd_rank 24 must be below both sides .* smaller has 24"):
        RunConfig(model=wide)
    with pytest.raises(ConfigError, match="model.moe.sd_rank does not go with optim.name adatask"):
        RunConfig(model=experts, optim=OptimConfig(name="adatask"))
    assert RunConfig(model=experts, sd=SDConfig(on_refresh="keep")).sd.on_refresh == "keep"


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(refresh_every=-1), "sd.refresh_every must be 0 or more, got -1"),
        (dict(refresh_sweeps=0), "SDConfig.refresh_sweeps must be above 0"),
        (dict(on_refresh="mean"), "sd.on_refresh must be one of drop, move_mean, keep, got 'mean'"),
        (dict(common_gradient="max"), "sd.common_gradient must be one of sum, mean"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SDConfig(), **change)
