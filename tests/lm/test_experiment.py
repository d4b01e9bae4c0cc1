import math

import jax
import numpy as np
import optax
import pytest

from lm.experiment import Curve, Experiment, steps_to
from lm.train.optimizer import OPTIMIZERS


@pytest.fixture(scope="module")
def experiment(tiny_run):
    return Experiment(tiny_run("", steps=6), eval_batch_count=2)


def test_steps_to_a_loss_are_interpolated():
    steps, valid = [10, 20, 30], [3.0, 2.0, 2.5]
    assert steps_to(steps, valid, 2.5) == 15
    assert steps_to(steps, valid, 3.5) == 10
    assert steps_to(steps, valid, 1.9) is None
    assert steps_to(steps, [None, 2.0, 1.0], 2.0) == 20


def test_a_row_holds_plain_values_and_none_for_what_is_not_finite():
    row = Curve([1, 2], [2.0, math.nan], 1.23456, 0.5).as_row()
    assert row["final"] is None and row["valid"] == [2.0, None] and row["train"] == 1.2346


def test_runs_of_one_seed_are_paired_and_share_a_program(experiment):
    adamw = lambda schedule: optax.adamw(schedule)  # noqa: E731
    first = experiment.run("a", adamw, learning_rate=1e-2, seed=1, eval_every=2)
    compiled = experiment._compiled["a"]
    again = experiment.run("a", adamw, learning_rate=1e-2, seed=1, eval_every=2)
    assert again.valid == first.valid and first.steps == [2, 4, 6]
    other = experiment.run("a", adamw, learning_rate=1e-1, seed=1, eval_every=2)
    assert experiment._compiled["a"] is compiled and other.valid != first.valid
    still = experiment.run("still", adamw, learning_rate=0.0, seed=1, eval_every=6)
    assert still.final == pytest.approx(experiment.evaluate(still.state.params))
    assert first.final < still.final


def test_the_configured_optimizer_is_the_default_and_the_peak_is_the_argument(experiment):
    config = experiment.config.optim
    rate = config.learning_rate
    default = experiment.run("default", learning_rate=rate, seed=0, eval_every=6)
    same = experiment.run(
        "same",
        lambda schedule: OPTIMIZERS[config.name](config, schedule),
        learning_rate=rate,
        seed=0,
        eval_every=6,
    )
    np.testing.assert_allclose(same.valid, default.valid, rtol=1e-6)
    _, schedule = experiment.optimizer(None, 0.5)
    assert max(float(schedule(step)) for step in range(6)) == pytest.approx(0.5)


def test_every_step_can_be_observed(experiment):
    seen = []
    experiment.run(
        "default",
        learning_rate=1e-3,
        seed=0,
        eval_every=6,
        observe=lambda step, state, metrics: seen.append((step, int(jax.device_get(state.step)))),
    )
    assert seen == [(step, step) for step in range(1, 7)]
