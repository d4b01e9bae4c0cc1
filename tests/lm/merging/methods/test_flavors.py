"""Where the paper's and mergekit's readings differ, and the quirks of each method."""

import numpy as np
import pytest

from lm.merging.types import MergeError


def weighted(count, **more):
    return [{"weight": 1.0, **more}] * count


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(21)
    base = rng.normal(size=(40, 50)).astype(np.float32)
    return base, (base + 0.1 * rng.normal(size=(3, 40, 50))).astype(np.float32)


def changed(result, base):
    return int(np.count_nonzero(result - base))


def test_ties_keeps_exactly_so_many_even_of_equal_entries(run):
    base = np.zeros(1000, np.float32)
    models = np.where(np.arange(1000) % 3 == 0, 1.0, -1.0)[None].astype(np.float32)
    got = run("ties", base, models, each=weighted(1, density=0.25), block=64)
    np.testing.assert_array_equal(got, np.where(np.arange(1000) < 250, models[0], 0))
    paper = run("ties", base, models, flavor="paper", each=weighted(1, density=0.25))
    np.testing.assert_array_equal(paper, models[0])  # >= the threshold: all equal entries


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 0.9, 1.0])
def test_ties_counts(run, inputs, density):
    base, models = inputs
    got = run("ties", base, models[:1], each=weighted(1, density=density))
    assert changed(got, base) == int(density * 2000)
    one = run("ties", [1.0], [[2.0]], each=weighted(1, density=density))
    assert one == (1.0 if density == 0 else 2.0)  # what is not empty keeps one entry


def test_paper_ties_has_one_threshold_for_the_whole_model(run, inputs):
    base, models = inputs
    small = base + 0.01 * (models - base)
    # The second tensor's changes are a hundred times smaller: only the first keeps any.
    each = weighted(3, density=0.3)
    arguments = {"flavor": "paper", "each": each, "details": True}
    got, seen = run("ties", base, models, more=[("v", base, small)], **arguments)
    assert seen.passes >= 6  # two tensors, three passes
    magnitudes = np.abs(np.stack([models - base, small - base]))
    for k in range(3):
        bound = np.sort(magnitudes[:, k], axis=None)[-(int(0.3 * 4000) + 1)]
        kept = np.abs(models[k] - base) >= bound
        assert kept.sum() > 1100
        alone = run(
            "ties",
            base,
            models[k : k + 1],
            more=[("v", base, small[k : k + 1])],
            flavor="paper",
            each=each[:1],
        )
        np.testing.assert_array_equal(alone != base, kept)
    other = run("ties", base, small, more=[("v", base, models)], flavor="paper", each=each)
    assert changed(other, base) < 100
    local = run("ties", base, small, each=each)
    assert changed(local, base) > 600


def test_the_sign_of_sums_that_cancel(run):
    base = np.zeros(5, np.float32)
    models = np.array([[1, -1, -1, -1, 2], [-1, -2, -1, -1, -2]], np.float32)
    kept = run("ties", base, models, each=weighted(2))
    np.testing.assert_array_equal(kept, [1, -1.5, -1, -1, 2])  # mergekit: 0 elects +
    paper = run("ties", base, models, flavor="paper", each=weighted(2))
    np.testing.assert_array_equal(paper, [-1, -1.5, -1, -1, -2])  # most positions elect -
    paper = run("ties", base, -models, flavor="paper", each=weighted(2))
    np.testing.assert_array_equal(paper, [1, 1.5, 1, 1, 2])


def test_dare_of_the_paper_is_unbiased_and_of_mergekit_keeps_the_norm(run, inputs):
    base, models = inputs
    each = weighted(1, density=0.3)
    draws = {
        flavor: np.array(
            [
                run("dare_linear", base, models[:1], flavor=flavor, each=each, seed=s)
                for s in range(400)
            ]
        )
        - base
        for flavor in ("paper", "mergekit")
    }
    delta = models[0] - base
    error = np.sqrt(np.mean((draws["paper"].mean(0) - delta) ** 2) / np.mean(delta**2))
    assert error < 1.3 * np.sqrt(0.7 / 0.3 / 400)
    norms = np.abs(draws["mergekit"]).sum((1, 2), dtype=np.float64)
    np.testing.assert_allclose(norms, np.abs(delta).sum(dtype=np.float64), rtol=1e-5)
    spread = np.abs(draws["paper"]).sum((1, 2)).std() / np.abs(delta).sum()
    assert spread > 0.01
    for draw in draws["paper"]:
        assert abs(np.count_nonzero(draw) / 2000 - 0.3) < 0.06


@pytest.mark.parametrize("flavor", ["paper", "mergekit"])
@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_rescale_can_be_switched_off(run, inputs, name, flavor):
    base, models = inputs
    each = weighted(1, density=0.5)
    got = run(name, base, models[:1], flavor=flavor, each=each, rescale=False) - base
    kept = got != 0
    np.testing.assert_allclose(got[kept], (models[0] - base)[kept], rtol=2e-4, atol=1e-6)
    assert 0.4 < kept.mean() < 0.6
    scaled = run(name, base, models[:1], flavor=flavor, each=each) - base
    assert np.abs(scaled[kept]).sum() > 1.5 * np.abs(got[kept]).sum()


def test_random_methods_depend_on_the_seed_alone(run, inputs):
    base, models = inputs
    for name in "dare_ties", "della":
        for flavor in "paper", "mergekit":
            arguments = {"flavor": flavor, "each": weighted(3, density=0.5)}
            first = run(name, base, models, seed=1, block=500, **arguments)
            np.testing.assert_allclose(
                first, run(name, base, models, seed=1, **arguments), rtol=1e-6, atol=1e-6
            )
            assert changed(first, run(name, base, models, seed=2, **arguments)) > 500


def test_della_of_the_paper_divides_by_the_probability(run, toy):
    each = weighted(1, density=0.5, epsilon=0.15)
    random = [np.zeros((3, 4))]  # everything is kept
    got = run("della_linear", toy.B, toy.M[:1], flavor="paper", each=each, random=random) - toy.B
    np.testing.assert_allclose(got[0], toy.T[0, 0] / [0.65, 0.45, 0.35, 0.55], rtol=1e-5)


def test_della_of_single_columns_and_bad_epsilon(run):
    base, models = np.zeros((4, 1)), np.ones((1, 4, 1))
    each = weighted(1, density=0.5, epsilon=0.15)
    random = [np.array([[0.49], [0.51], [0.49], [0.51]])]
    got = run("della", base, models, each=each, random=random, rescale=False)
    np.testing.assert_array_equal(got, [[1], [0], [1], [0]])
    with pytest.raises(MergeError, match="lower epsilon"):
        run("della", base, models, each=weighted(1, density=0.1, epsilon=0.15))


def test_breadcrumbs_without_outliers_and_with_too_many(run, inputs):
    base, models = inputs
    delta = np.abs(models[0] - base)
    order = np.argsort(-delta, axis=None)

    def kept(density, gamma):
        each = weighted(1, density=density, gamma=gamma)
        got = run("breadcrumbs", base, models[:1], each=each, block=100)
        return set(np.flatnonzero(got != base).tolist())

    assert kept(0.5, 0.0001) == set(order[:1000].tolist())  # int(gamma n) = 0: not all zero
    assert kept(0.5, 0.1) == set(order[200:1200].tolist())
    assert kept(0.8, 0.4) == set(order[400:].tolist())  # fewer outliers, density stays
    assert kept(1.0, 0.4) == set(order.tolist())
    assert kept(0.0, 0.4) == set()


def test_breadcrumbs_rescaled(run, inputs):
    base, models = inputs
    each = weighted(1, density=0.5, gamma=0.01)
    got = run("breadcrumbs", base, models[:1], each=each, rescale=True, block=300) - base
    total = np.abs(models[0] - base).sum(dtype=np.float64)
    np.testing.assert_allclose(np.abs(got).sum(dtype=np.float64), total, rtol=1e-5)


def test_sce_weights_of_small_changes(run, inputs):
    base, models = inputs
    deltas = (models - base) * np.array([1, 2, 3], np.float32)[:, None, None] * 1e-3
    models = deltas.astype(np.float32)  # mean squares of 1e-8, and no rounding against a base
    zero = np.zeros_like(base)
    deltas = models.astype(np.float64)
    agree = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    for flavor, share in (("paper", (deltas**2).mean((1, 2))), ("mergekit", np.ones(3))):
        w = (share / share.sum())[:, None, None] * agree
        got = run("sce", zero, models, flavor=flavor)
        np.testing.assert_allclose(got, (w * deltas).sum(0) / w.sum(0), rtol=1e-5, atol=1e-9)


def test_sce_of_nothing_selected_is_the_base(run, inputs):
    base, models = inputs
    np.testing.assert_array_equal(run("sce", base, models, select_topk=0.0), base)
    same = np.stack([models[0]] * 3)  # no variance anywhere
    np.testing.assert_array_equal(run("sce", base, same, select_topk=0.5), base)


def test_consensus_keeps_what_enough_tasks_use(run, toy):
    counts = np.array([2, 2, 2, 2, 2, 3, 1, 1, 3, 3, 2, 1]).reshape(3, 4)
    for least in 1, 2, 3, 4:
        got = run("consensus", toy.B, toy.M, k_min=least, **{"lambda": 1.0}) - toy.B
        np.testing.assert_allclose(got, np.where(counts >= least, toy.T.sum(0), 0), atol=1e-6)


def test_a_tall_threshold_of_nothing_keeps_every_change(run, inputs):
    base, models = inputs
    each = [{"tall_threshold": 0.0}] * 3
    got = run("consensus", base, models, each=each, k_min=3, **{"lambda": 1.0})
    np.testing.assert_allclose(got, base + (models - base).sum(0), rtol=1e-5, atol=1e-6)


def test_pcb_over_two_tensors_is_that_over_their_union(run, inputs):
    base, models = inputs
    whole = run("pcb", base, models)
    halves = [(base[:15], models[:, :15]), (base[15:], models[:, 15:])]
    first = run("pcb", *halves[0], more=[("v", *halves[1])], block=64)
    second = run("pcb", *halves[1], more=[("v", *halves[0])])
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
