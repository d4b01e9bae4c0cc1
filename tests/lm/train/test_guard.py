import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.train.config import GuardConfig
from lm.train.guard import init_guard, judge

CONFIG = GuardConfig(spike_sigma=6.0, window=16)


@pytest.fixture(scope="module")
def run():
    step = jax.jit(judge, static_argnums=0)

    def run(values, config=CONFIG, state=None):
        """Verdict of each (loss, gradient norm), and the state at the end."""
        state = init_guard(config) if state is None else state
        verdicts = []
        for loss, norm in values:
            ok, state = step(config, state, jnp.float32(loss), jnp.float32(norm))
            verdicts.append(bool(ok))
        return verdicts, state

    return run


def calm(rng, steps):
    return [(2 + 0.01 * rng.normal(), 1 + 0.02 * rng.normal()) for _ in range(steps)]


@pytest.mark.parametrize("loss,norm", [(np.nan, 1), (2, np.nan), (np.inf, 1), (2, np.inf)])
@pytest.mark.parametrize("sigma", [0.0, 6.0])
def test_what_is_not_finite_is_refused_from_the_first_step(run, loss, norm, sigma):
    config = GuardConfig(spike_sigma=sigma, window=16)
    verdicts, state = run([(loss, norm), (2, 1)], config)
    assert verdicts == [False, True]
    assert (state.accepted, state.skipped, state.consecutive) == (1, 1, 0)
    assert np.isfinite(state.losses).all() and np.isfinite(state.grad_norms).all()


def test_consecutive_counts_and_starts_again(run):
    bad = (np.nan, 1.0)
    _, state = run([(2, 1), bad, bad])
    assert (state.skipped, state.consecutive) == (2, 2)
    _, state = run([(2, 1), bad], state=state)
    assert (state.skipped, state.consecutive, state.accepted) == (3, 1, 2)


@pytest.mark.parametrize("spike", [(3.0, 1.0), (2.0, 5.0)], ids=["loss", "gradient"])
def test_spikes_are_refused_once_a_quarter_of_the_window_is_filled(run, rng, spike):
    assert run([*calm(rng, 3), spike])[0] == [True] * 4
    verdicts, state = run([*calm(rng, 4), spike])
    assert verdicts == [True] * 4 + [False]
    assert 3.0 not in state.losses and 5.0 not in state.grad_norms
    # Far into the run the window has turned over; the next calm step passes again.
    verdicts, state = run([*calm(rng, 40), spike, *calm(rng, 1)])
    assert verdicts == [True] * 40 + [False, True]
    assert (state.accepted, state.skipped, state.consecutive) == (41, 1, 0)


def test_sigma_zero_lets_spikes_pass(run, rng):
    config = GuardConfig(spike_sigma=0.0, window=16)
    assert all(run([*calm(rng, 20), (50.0, 1e6)], config)[0])


def test_the_threshold_is_sigma_deviations_of_the_logarithm(run, rng):
    history = calm(rng, 16)
    logs = np.log([loss for loss, _ in history])
    limit = np.exp(logs.mean() + 6 * logs.std() + 0.01)  # 1 % of slack for converged runs
    assert run([*history, (0.999 * limit, 1.0)])[0][-1]
    assert not run([*history, (1.001 * limit, 1.0)])[0][-1]


def test_only_the_window_counts(run, rng):
    high = [(10 * loss, norm) for loss, norm in calm(rng, 16)]
    low = calm(rng, 16)
    assert run([*high, (20.0, 1.0)])[0][-1]
    assert not run([*high, *low, (20.0, 1.0)])[0][-1]


def test_a_falling_loss_and_a_constant_one_pass(run):
    falling = [(10 * 0.9**i, 5 * 0.95**i) for i in range(40)]
    assert all(run(falling)[0])
    assert all(run([(2.0, 1.0)] * 40 + [(2.01, 1.005)])[0])
