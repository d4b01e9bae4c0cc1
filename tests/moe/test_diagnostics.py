"""Diagnostics of experts, routers and routes against direct float64 computations and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe


def test_effective_compositions_of_the_worked_example():
    # p = (0.9, 0.1): 1 / (0.81 + 0.01); a pure route; an even one; an empty one.
    counts = jnp.asarray([[90, 10, 0, 0], [7, 0, 0, 0], [5, 5, 5, 5], [0, 0, 0, 0]])
    found = moe.effective_compositions(counts)
    np.testing.assert_allclose(found.per_route, [1 / 0.82, 1, 4, 0], rtol=1e-6)
    np.testing.assert_allclose(found.share, np.array([100, 7, 20, 0]) / 127, rtol=1e-6)
    wanted = (100 / 0.82 + 7 + 20 * 4) / 127
    assert float(found.mean) == pytest.approx(wanted, rel=1e-6)
    both = moe.effective_compositions(jnp.stack([counts, counts[::-1]]))
    np.testing.assert_allclose(both.mean, [wanted] * 2, rtol=1e-6)


def test_counts_of_compositions_by_route(rng):
    indices = rng.integers(0, 4, size=(300, 2))
    labels = rng.integers(0, 3, size=300)
    for ordered in (False, True):
        ids, routes = moe.route_ids(indices, ordered=ordered)
        key = lambda row, ordered=ordered: tuple(row if ordered else sorted(row))  # noqa: E731
        assert routes == len({key(row) for row in indices})
        counts = np.asarray(moe.composition_counts(ids, labels, routes, 3))
        for one in range(0, 300, 37):
            same = [key(row) == key(indices[one]) for row in indices]
            wanted = np.bincount(labels[np.array(same)], minlength=3)
            np.testing.assert_array_equal(counts[ids[one]], wanted)
    assert moe.route_ids(np.zeros((0, 2), int))[1] == 0


def subspaces(w, k):
    u, _, vt = np.linalg.svd(w)
    return u[:, :k], vt[:k].T


@pytest.mark.parametrize("sweeps", [None, 60])
def test_similarity_against_singular_vectors(rng, sweeps):
    layers, experts, m, n, k = 2, 3, 20, 28, 2
    w = rng.normal(size=(layers, experts, m, n))
    for layer in range(layers):  # a gap behind the k leading ones, and a partly shared direction
        shared = rng.normal(size=(m, 1)) * rng.normal(size=(1, n))
        w[layer] += shared * np.array([3, 2, 0.2])[:, None, None]
    found = moe.expert_similarity(jnp.asarray(w, jnp.float32), k, sweeps)
    for layer in range(layers):
        for i in range(experts):
            for j in range(experts):
                (ui, vi), (uj, vj) = subspaces(w[layer, i], k), subspaces(w[layer, j], k)
                left = np.sum((ui.T @ uj) ** 2) / k
                right = np.sum((vi.T @ vj) ** 2) / k
                tolerance = dict(atol=1e-4 if sweeps is None else 2e-2)
                np.testing.assert_allclose(found.left[layer, i, j], left, **tolerance)
                np.testing.assert_allclose(found.right[layer, i, j], right, **tolerance)


def test_similarity_of_equal_and_of_unrelated_experts(rng):
    w = jnp.asarray(rng.normal(size=(1, 40, 60)), jnp.float32)
    same = moe.expert_similarity(jnp.broadcast_to(w, (3, 40, 60)))
    np.testing.assert_allclose(same.left, np.ones((3, 3)), atol=1e-4)
    others = jnp.asarray(rng.normal(size=(30, 40, 60)), jnp.float32)
    found = moe.expert_similarity(others, 4)
    # By chance two subspaces of dimension k share k / m.
    assert float(moe.off_diagonal_mean(found.left)) == pytest.approx(4 / 40, rel=0.1)
    assert float(moe.off_diagonal_mean(found.right)) == pytest.approx(4 / 60, rel=0.1)


def test_off_diagonal_mean(rng):
    x = rng.normal(size=(2, 4, 4))
    wanted = [x[i][~np.eye(4, dtype=bool)].mean() for i in range(2)]
    np.testing.assert_allclose(moe.off_diagonal_mean(jnp.asarray(x, jnp.float32)), wanted, 1e-5)
    assert float(moe.off_diagonal_mean(jnp.ones((1, 1)))) == 0


def test_router_alignment_against_squared_cosines(rng):
    d, f, experts, k = 16, 24, 4, 3
    router, w = rng.normal(size=(d, experts)), rng.normal(size=(experts, d, f))
    arrays = jnp.asarray(router, jnp.float32), jnp.asarray(w, jnp.float32)
    found = moe.router_alignment(*arrays, k)
    wanted = np.zeros((experts, experts))
    for i in range(experts):
        for j in range(experts):
            u, _ = subspaces(w[j], k)
            r = router[:, i]
            wanted[i, j] = sum((r @ u[:, c]) ** 2 / (r @ r) for c in range(k))
    np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
    matched = np.diag(wanted).mean()
    mismatched = wanted[~np.eye(experts, dtype=bool)].mean()
    assert float(found.matched) == pytest.approx(matched, rel=1e-4)
    assert float(found.mismatched) == pytest.approx(mismatched, rel=1e-4)
    assert float(found.specificity) == pytest.approx(matched / mismatched, rel=1e-4)
    assert found.baseline == k / d


def test_a_router_that_points_at_its_experts(rng):
    q = np.linalg.qr(rng.normal(size=(32, 4)))[0]
    experts = np.stack([5 * np.outer(q[:, e], rng.normal(size=40)) for e in range(4)])
    found = moe.router_alignment(jnp.asarray(q * 7, jnp.float32), jnp.asarray(experts, jnp.float32))
    assert float(found.matched) == pytest.approx(1, abs=1e-4)
    assert float(found.mismatched) < 1e-4 and float(found.specificity) > 1e3
    # Scale and sign of a router's column play no part.
    flipped = moe.router_alignment(-jnp.asarray(q, jnp.float32), jnp.asarray(experts, jnp.float32))
    np.testing.assert_allclose(found.scores, flipped.scores, atol=1e-5)


def test_utilization_by_group():
    indices = jnp.asarray([[0, 1], [0, 2], [3, 0], [3, -1]])
    np.testing.assert_allclose(moe.utilization(indices, 4), [[3 / 7, 1 / 7, 1 / 7, 2 / 7]])
    grouped = moe.utilization(indices, 4, jnp.asarray([0, 0, 2, 2]), 3)
    wanted = [[0.5, 0.25, 0.25, 0], [0, 0, 0, 0], [1 / 3, 0, 0, 2 / 3]]
    np.testing.assert_allclose(grouped, wanted, atol=1e-6)


def test_metrics_of_a_tree(rng):
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    mlp = {
        "router": {"kernel": draw(2, 12, 3)},
        "experts": {"up": draw(2, 3, 12, 20), "down": draw(2, 3, 20, 12)},
    }
    plain = moe.expert_metrics({"layers": {"mlp": mlp}, "head": draw(4, 4)}, rank=2)
    wanted = moe.off_diagonal_mean(moe.expert_similarity(mlp["experts"]["up"], 2).right).mean()
    assert float(plain["similarity/up/right"]) == pytest.approx(float(wanted), rel=1e-5)
    wanted = moe.router_alignment(mlp["router"]["kernel"], mlp["experts"]["up"], 2)
    found = float(plain["alignment/up/specificity"])
    assert found == pytest.approx(float(wanted.specificity.mean()), rel=1e-5)
    assert not any("down" in name for name in plain if "alignment" in name)
    assert not any("unique" in name for name in plain)
    # A strong common matrix makes whole experts alike and says nothing of the unique ones.
    common = {"up": 50 * draw(2, 12, 20), "down": 50 * draw(2, 20, 12)}
    metrics = jax.jit(lambda tree: moe.expert_metrics(tree, rank=2))
    split = metrics({"layers": {"mlp": mlp | {"common": common}}})
    assert float(split["similarity/up/left"]) > 0.9
    name = "similarity/up/left"
    assert float(split[f"unique_{name}"]) == pytest.approx(float(plain[name]), rel=1e-4)
    assert set(moe.expert_metrics({"block": mlp}, rank=2)) == {f"block/{name}" for name in plain}


def test_pictures(rng, tmp_path):
    maps = {"similarity": rng.random((4, 4)), "utilization": jnp.ones((2, 4)) / 4}
    figure = moe.plot_maps(maps, vmax=1)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:2] == list(maps)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), maps["similarity"])
    figure.savefig(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 1000


def test_a_rank_that_is_none():
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 8\], got 9"):
        moe.expert_similarity(jnp.ones((2, 8, 8)), 9)
