import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model, sharding
from lm.config import ConfigError, ModelConfig
from lm.train import modular
from lm.train.config import GuardConfig, MatConfig, OptimConfig, RunConfig
from lm.train.guard import init_guard
from lm.train.loop import Trainer, train
from lm.train.optimizer import make_optimizer
from lm.train.state import init_state, state_shardings
from lm.train.step import loss_sum, make_train_step

MODEL = ModelConfig(
    vocab_size=48,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=48,
    max_context=64,
    qkv_bias=True,
    attention_out_bias=True,
    qk_norm=True,
    dtype="float32",
)
ROWS, LENGTH = 8, 16
CHOICES = {
    "layers": {"attention": np.array([True, False]), "mlp": np.array([False, True])},
    "heads": {"heads": np.array([[True, False], [False, False]])},
}


def make_config(mat=None, **changes):
    values = dict(
        model=MODEL,
        optim=OptimConfig(name="mat", learning_rate=1e-2, warmup_steps=2),
        mat=mat or MatConfig(),
        guard=GuardConfig(window=8),
        batch_size=ROWS,
        sequence_length=LENGTH,
        steps=20,
    )
    return RunConfig(**values | changes)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "tokens": rng.integers(0, 48, (ROWS, LENGTH)).astype(np.int32),
        "targets": rng.integers(0, 48, (ROWS, LENGTH)).astype(np.int32),
        "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        "weights": np.ones((ROWS, LENGTH), np.float32),
    }


def stands_still(names, leaf, family):
    """Where a parameter belongs to an inactive module of `CHOICES`, by NumPy alone."""
    where = np.zeros(leaf.shape, bool)
    if names[0] != "layers":
        return where
    for layer in range(2):
        if family == "layers":
            kind = names[1].split("_")[0]
            where[layer] = not CHOICES["layers"][kind][layer]
        elif names[1] == "attention" and "norm" not in names[2] and names != OUT_BIAS:
            for group in range(2):
                span = slice(group * leaf_width(names), (group + 1) * leaf_width(names))
                index = (layer, span) if names[2] == "out" else (layer, ..., span)
                where[index] = not CHOICES["heads"]["heads"][layer, group]
    return where


OUT_BIAS = ["layers", "attention", "out", "bias"]


def leaf_width(names):
    """Columns (of out: rows) of one key/value head, or of its two queries."""
    return 8 if names[2] in ("key", "value") else 16


@pytest.mark.parametrize(("family", "skip"), [("layers", "branch"), ("heads", "weights")])
def test_a_step_leaves_inactive_modules_bit_for_bit(family, skip):
    config = make_config(MatConfig(family=family, skip=skip))
    tx, schedule = modular.make_run_optimizer(config)
    state = init_state(config, tx)
    step = jax.jit(make_train_step(config, tx, schedule))
    state, metrics = step(state, make_batch(0))
    assert metrics["mat/active"] == 1
    chosen = jax.tree.map(jnp.asarray, CHOICES[family])
    state = dataclasses.replace(state, opt_state=state.opt_state._replace(active=chosen))
    new, metrics = step(state, make_batch(1))
    moments = lambda state: optim_moments(state.opt_state)  # noqa: E731
    trees = [(state.params, new.params)] + list(zip(moments(state), moments(new), strict=True))
    for old_tree, new_tree in trees:
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(old_tree), jax.tree.leaves(new_tree), strict=True
        )
        for (path, old), after in pairs:
            names = [entry.key for entry in path]
            still = stands_still(names, old, family)
            np.testing.assert_array_equal(np.asarray(after)[still], np.asarray(old)[still])
            assert np.mean(np.asarray(after)[~still] != np.asarray(old)[~still]) > 0.4, names
    flags = np.concatenate([flag.reshape(-1) for flag in CHOICES[family].values()])
    np.testing.assert_allclose(metrics["mat/active"], flags.mean())
    assert (metrics["mat/flops"] == 1) == (skip == "weights")
    assert step._cache_size() == 1


def optim_moments(opt_state):
    adam = [
        s
        for s in jax.tree.leaves(opt_state, is_leaf=lambda n: hasattr(n, "nu"))
        if hasattr(s, "nu")
    ]
    return [adam[0].mu, adam[0].nu]


def test_eigenvalues_are_those_of_explicit_gradients():
    """One probe at a time, one module at a time, by slicing the gradients."""
    config = make_config(MatConfig(family="heads", probes=4, chunk=2, target_active=0.5))
    tx, _ = modular.make_run_optimizer(config)
    state = init_state(config, tx)
    probes = {name: x[:4] for name, x in make_batch().items() if name not in ("targets", "weights")}
    refresh = jax.jit(modular.make_refresh(config))
    chosen, metrics = refresh(state.params, state.opt_state, probes, jnp.int32(0))

    @jax.jit
    def gradient(params, row):
        def output(params):
            logits = model.apply(
                config.model,
                params,
                row["tokens"][None],
                segment_ids=row["segment_ids"][None],
            )
            return jnp.sum(logits) / np.sqrt(logits.size)

        return jax.grad(output)(params)["layers"]["attention"]

    rows = [gradient(state.params, {k: v[i] for k, v in probes.items()}) for i in range(4)]
    want = np.zeros((2, 2))
    for layer, group in np.ndindex(2, 2):
        wide, narrow = (slice(group * w, (group + 1) * w) for w in (16, 8))
        j = [
            np.concatenate(
                [np.ravel(row["out"]["kernel"][layer, wide])]
                + [np.ravel(row["query"][name][layer][..., wide]) for name in ("kernel", "bias")]
                + [
                    np.ravel(row[part][name][layer][..., narrow])
                    for part in ("key", "value")
                    for name in ("kernel", "bias")
                ]
            )
            for row in rows
        ]
        want[layer, group] = np.linalg.svd(np.array(j, np.float64), compute_uv=False)[0] ** 2 / 4
    np.testing.assert_allclose(metrics["mat/eigenvalue/heads"], want, rtol=1e-3)
    np.testing.assert_array_equal(chosen.active["heads"], want >= np.sort(want.reshape(-1))[2])
    np.testing.assert_allclose(metrics["mat/active/heads"], 0.5)
    np.testing.assert_allclose(metrics["mat/refresh_steps"], 4 / ROWS)


WIDE = ModelConfig(
    vocab_size=64,
    num_layers=1,
    d_model=128,
    num_heads=4,
    d_ff=256,
    max_context=64,
    dtype="float32",
    loss="dense",
)
"""One layer, so that it is not looped over and flags that NumPy holds choose while tracing."""


def count_flops(config, active):
    """As XLA counts them, of loss and gradient, before it optimizes."""
    params, batch = model.abstract_params(config.model), make_batch()
    grad = jax.grad(lambda p: loss_sum(config, p, batch, active=active)[0])
    return jax.jit(grad).lower(params).cost_analysis()["flops"]


def test_flops_of_skipped_branches_are_really_saved():
    """Forward 1, input gradient 1, weight gradient 1: an inactive branch saves two thirds."""
    config = make_config(model=WIDE)
    full, tokens = count_flops(config, None), ROWS * LENGTH
    branch = {
        "attention": 2 * tokens * 4 * 128 * 128 + 4 * tokens * LENGTH * 128,
        "mlp": 2 * tokens * 3 * 128 * 256,
    }
    for chosen in ("attention", "mlp"):
        active = {kind: np.array([kind == chosen]) for kind in branch}
        counted = count_flops(config, active)
        (other,) = set(branch) - {chosen}
        np.testing.assert_allclose(full - counted, 2 * branch[other], rtol=0.06)
        share = modular.flops_share(config, jax.tree.map(jnp.asarray, active))
        np.testing.assert_allclose(share, counted / full, rtol=0.03)


def test_flops_of_skipped_heads_are_really_saved_in_every_bucket():
    config = make_config(MatConfig(family="heads"), model=WIDE)
    full, tokens = count_flops(config, None), ROWS * LENGTH
    attention = 2 * tokens * 4 * 128 * 128 + 4 * tokens * LENGTH * 128
    for heads in (0, 1, 3):
        active = {"heads": np.arange(4)[None] < heads}
        counted = count_flops(config, active)
        again = 4 * tokens * LENGTH * 128 * heads / 4  # the scores, once more
        saved = 2 * attention * (1 - heads / 4) - again
        np.testing.assert_allclose(full - counted, saved, rtol=0.06)
        share = modular.flops_share(config, jax.tree.map(jnp.asarray, active))
        np.testing.assert_allclose(share, counted / full, rtol=0.03)


@pytest.mark.slow
def test_sharded_refresh_and_gradients_equal_one_device():
    config = make_config(MatConfig(family="heads", probes=4, target_active=0.5))
    tx, _ = modular.make_run_optimizer(config)
    state, batch = init_state(config, tx), make_batch()
    probes = {name: x[:4] for name, x in batch.items() if name not in ("targets", "weights")}
    refresh = modular.make_refresh(config)

    def run(state, batch):
        opt_state, metrics = refresh(state.params, state.opt_state, probes, jnp.int32(0))
        active = modular.branch_flags(config, opt_state)
        grads = jax.grad(lambda p: loss_sum(config, p, batch, active=active)[0])(state.params)
        return metrics["mat/eigenvalue/heads"], grads

    alone, grads = jax.jit(run)(state, batch)
    mesh = sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, state_shardings(config, tx, mesh))
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        sharded, sharded_grads = jax.jit(run)(placed, rows)
    np.testing.assert_allclose(sharded, alone, rtol=1e-3)
    assert not np.all(grads["layers"]["attention"]["query"]["kernel"])
    for a, b in zip(jax.tree.leaves(sharded_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(np.abs(b).max()))


@pytest.mark.parametrize(
    ("base", "family", "changes"),
    [
        pytest.param(
            *("adamw", "layers", {"alpha": 0.9, "beta": 0.05, "rule": "random"}),
            marks=pytest.mark.slow,
        ),
        ("muon", "heads", {"target_active": 0.5}),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_the_same(
    base, family, changes, tiny_run, tmp_path, rows_of, state_of
):
    """Checkpoints after 4, 8 and 12 steps; refreshes before the steps 2, 5, 8 and 11."""
    mat = MatConfig(base=base, family=family, start=2, every=3, probes=4, **changes)
    changes = {"optim__name": "mat", "mat": mat, "log__spectra": 5 if base == "adamw" else 0}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny_run(whole, **changes))
    rows = {row["step"]: row for row in rows_of(whole) if "loss" in row}
    names = [name for name in rows[3] if name.startswith("mat/")]
    kind = "heads.0.1" if family == "heads" else "attention.1"
    assert f"mat/eigenvalue/{kind}" in names and "mat/refresh_steps" in names
    refreshed = [step for step, row in rows.items() if "mat/refresh_steps" in row]
    assert refreshed == [3, 6, 9, 12]
    assert all(rows[step]["mat/active"] == 1 for step in (1, 2))
    assert min(row["mat/flops"] for row in rows.values()) < 0.95
    measured = [step for step, row in rows.items() if "spectrum/weights/head/spike_50" in row]
    assert measured == ([5, 10] if base == "adamw" else [])
    if measured:
        row = rows[10]
        assert 0 < row["spectrum/momentum/mlp.down/alignment"] <= 1 + 1e-5
        assert row["spectrum/weights/attention.query/alignment"] > 0.99
        assert 0 < row["spectrum/momentum/attention.out/spike_90"] < 1
    shutil.copytree(whole, cut)
    for step in (8, 12) if base == "muon" else (12,):
        shutil.rmtree(cut / "checkpoints" / f"{step:08d}")
    train(tiny_run(cut, resume=True, **changes))
    assert state_of(cut) == state_of(whole)
    assert rows_of(cut) == rows_of(whole)


def test_probes_are_the_rows_of_the_step_and_go_on_in_the_next(tiny_run, tmp_path):
    mat = MatConfig(probes=12)
    trainer = Trainer(tiny_run(tmp_path / "run", optim__name="mat", mat=mat))
    with trainer.checkpoints:
        got = trainer.refresher.probes(3)
        want = [trainer.loader.batch(3, slice(0, 8)), trainer.loader.batch(4, slice(0, 4))]
        for name, x in got.items():
            np.testing.assert_array_equal(x, np.concatenate([part[name] for part in want]))
        due = [step for step in range(500) if trainer.refresher.due(step)]
        assert due == [100, 200, 300, 400]
    trainer.folder.close()


@pytest.mark.parametrize("skip", ["weights", "branch"])
def test_a_module_that_comes_back_is_no_spike(skip):
    """The guard forgets norms only where more gradients than before are computed."""
    config = make_config(MatConfig(skip=skip))
    guard = init_guard(config.guard)._replace(accepted=jnp.int32(9))
    before = {"mlp": jnp.array([True, False])}
    for after, forgets in (([True, False], False), ([False, False], False), ([False, True], True)):
        new = modular.forget_norms(config, guard, before, {"mlp": jnp.array(after)})
        assert int(new.accepted) == (0 if forgets and skip == "branch" else 9)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="mat.base cannot be mat"):
        modular.make_run_optimizer(make_config(MatConfig(base="mat")))
    with pytest.raises(ConfigError, match="optim.name must be one of .*got 'adam'"):
        modular.make_run_optimizer(make_config(MatConfig(base="adam")))
    with pytest.raises(ConfigError, match="make_run_optimizer"):
        make_optimizer(OptimConfig(name="mat"), 10)
    with pytest.raises(ConfigError, match=r"mat.chunk must divide mat.probes \(16\), got 5"):
        MatConfig(chunk=5)
    with pytest.raises(ConfigError, match=r"mat.alpha must lie in \[0, 1\], got 2"):
        MatConfig(alpha=2)
    with pytest.raises(ConfigError, match="mat.beta must be 0 or more"):
        MatConfig(beta=-1e-3)
