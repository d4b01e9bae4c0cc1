"""Golden vectors: mergekit 0.1.4 and the authors' code on the 3x4 example (specification, 5).

Numbers have the digits that were printed: agreement to half a unit of the last, in float32.
"""

import jax.numpy as jnp
import numpy as np
import pytest

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
SPACES = pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])


def weighted(*weights, **more):
    return [{"weight": w, **more} for w in weights]


@SPACES
def test_ties_mergekit(run, toy, xp):
    each = weighted(1, 0.5, 1, density=0.5)
    got = run("ties", toy.B, toy.M, each=each, xp=xp) - toy.B
    want = [[0.766667, 0.75, -0.45, 0.625], [-0.7, 0.375, -0.55, 0.55], [0.6, -0.95, -0.65, 0.65]]
    np.testing.assert_allclose(got, want, **CLOSE)


@SPACES
def test_ties_of_the_authors(run, toy, xp):
    each = weighted(1, 1, 1, density=0.5)
    mean = run("ties", toy.B, toy.M, flavor="paper", each=each, xp=xp) - toy.B
    want = [[0.7, 0.75, -0.45, 0.625], [-0.5, 0.375, -0.55, 0.55], [0.6, -0.95, -0.65, 0.45]]
    np.testing.assert_allclose(mean, want, **CLOSE)
    total = run("ties", toy.B, toy.M, flavor="paper", each=each, normalize=False, xp=xp) - toy.B
    want = [[1.4, 0.75, -0.45, 1.25], [-1, 0.75, -0.55, 0.55], [0.6, -0.95, -1.3, 0.9]]
    np.testing.assert_allclose(total, want, **CLOSE)


@SPACES
def test_dare(run, toy, xp):
    mask = np.array([[1, 0, 1, 1], [0, 1, 1, 0], [1, 0, 1, 0]])
    arguments = {
        "each": weighted(1, density=0.5),
        "random": [np.where(mask == 1, 0.25, 0.75)],
        "xp": xp,
    }
    for name in "dare_linear", "dare_ties":
        paper = run(name, toy.B, toy.M[:1], flavor="paper", **arguments) - toy.B
        np.testing.assert_allclose(paper[0], [1.8, 0, 0.1, 0.8], **CLOSE)
        np.testing.assert_allclose(paper, 2 * mask * toy.T[0], **CLOSE)
        kept = run(name, toy.B, toy.M[:1], flavor="mergekit", **arguments) - toy.B
        np.testing.assert_allclose(kept[0], [1.313115, 0, 0.072951, 0.583607], **CLOSE)


@SPACES
def test_slerp(run, toy, xp):
    got = run("slerp", toy.M[0], toy.M[1:2], t=0.3, xp=xp)
    np.testing.assert_allclose(got[0], [1.838858, -1.067763, 0.41134, 2.261459], **CLOSE)


@SPACES
def test_nuslerp(run, toy, xp):
    got = run("nuslerp", toy.B, toy.M[:2], each=weighted(1, 3), xp=xp)
    np.testing.assert_allclose(got[0], [1.804996, -0.753389, 0.103843, 1.875885], **CLOSE)


@SPACES
def test_multislerp(run, toy, xp):
    got = run("multislerp", None, toy.M, each=weighted(1, 2, 1), xp=xp)
    np.testing.assert_allclose(got[0], [1.542254, -0.734128, 0.351824, 2.277408], **CLOSE)


@SPACES
def test_karcher(run, toy, xp):
    got = run("karcher", None, toy.M, xp=xp)
    np.testing.assert_allclose(got[0], [1.527647, -0.749385, 0.452781, 2.441106], **CLOSE)


@SPACES
def test_model_stock(run, toy, xp):
    t1, t2, t3 = toy.T
    models = toy.B + np.array([t1, 0.6 * t1 + 0.4 * t2, 0.5 * t1 + 0.3 * t3])
    got, seen = run("model_stock", toy.B, models, xp=xp, details=True)
    np.testing.assert_allclose(seen.statistics, 0.920755, atol=1e-6)
    np.testing.assert_allclose(got[0], [1.632252, -1.016881, 0.495396, 2.299245], **CLOSE)
    _, seen = run("model_stock", toy.B, models, flavor="paper", xp=xp, details=True)
    np.testing.assert_allclose(seen.statistics, 0.925054, atol=1e-6)


@SPACES
def test_della(run, toy, xp):
    chances = []

    def kept(threshold):
        random = [np.full((3, 4), threshold)]
        each = weighted(1, density=0.5, epsilon=0.15)
        got = run("della_linear", toy.B, toy.M[:1], each=each, random=random, rescale=False, xp=xp)
        return np.abs(got - toy.B)[0] > 1e-6

    # The probabilities of row 1 are .65 .45 .35 .55: drawing just below keeps, just above drops.
    for column, chance in enumerate([0.65, 0.45, 0.35, 0.55]):
        chances.append(kept(chance - 1e-4)[column] and not kept(chance + 1e-4)[column])
    assert all(chances)


@SPACES
def test_breadcrumbs(run, toy, xp):
    for name in "breadcrumbs", "breadcrumbs_ties":
        each = weighted(1, density=0.5, gamma=0.1)
        got = run(name, toy.B, toy.M[:1], each=each, xp=xp) - toy.B
        want = [[0, 0, 0, 0.4], [-0.7, 0.3, 0, 0], [0.6, 0, -0.8, 0.25]]
        np.testing.assert_allclose(got, want, **CLOSE)


@SPACES
@pytest.mark.parametrize("flavor", ["paper", "mergekit"])
def test_sce(run, toy, xp, flavor):
    got = run("sce", toy.B, toy.M, flavor=flavor, select_topk=0.5, xp=xp)
    want = [
        [1.700677, -0.401847, 0.5, 2.678454],
        [0, 0.642818, -0.75, 1.5],
        [-1.721769, -0.85, 0.3, -0.4],
    ]
    np.testing.assert_allclose(got, want, **CLOSE)


@SPACES
def test_ram(run, xp):
    models = np.array([[0.4, 0], [0.2, 0.3]])
    got = run("ram", np.zeros(2), models, xp=xp)
    np.testing.assert_allclose(got, [0.3, 0.3], **CLOSE)
    got = run("ramplus_tl", np.zeros(2), models, xp=xp)
    np.testing.assert_allclose(got, [0.3, 0.306], **CLOSE)


@SPACES
def test_pcb(run, toy, xp):
    got = run("pcb", toy.B, toy.M, ratio=0.5, xp=xp) - toy.B
    want = [
        [0.747967, 0.724264, -0.45, 0.839096],
        [-0.7, 0, -0.55, 0.55],
        [0.6, -0.85, -0.774522, 0.65],
    ]
    np.testing.assert_allclose(got, want, **CLOSE)


@SPACES
def test_consensus(run, toy, xp):
    got = run("consensus", toy.B, toy.M, xp=xp, **{"lambda": 0.3, "k_min": 2}) - toy.B
    want = [[0.39, 0.27, -0.06, 0.285], [-0.24, 0.045, 0, 0], [0.084, -0.03, -0.435, 0]]
    np.testing.assert_allclose(got, want, **CLOSE)


@SPACES
def test_tall_masks(run, toy, xp):
    got = run("tall", toy.B, toy.M, xp=xp)
    masks = [np.unpackbits(np.asarray(got[f".mask.{k}"]), count=12) for k in range(3)]
    np.testing.assert_array_equal(np.sum(masks, 0), [2, 2, 2, 2, 2, 3, 1, 1, 3, 3, 2, 1])


@SPACES
def test_emr(run, toy, xp):
    got = run("emr", toy.B, toy.M, xp=xp)
    want = [[0.9, 0.75, -0.45, 0.85], [-0.7, 0.45, -0.55, 0.55], [0.6, -0.95, -0.8, 0.65]]
    np.testing.assert_allclose(got[".unified"].reshape(3, 4), want, **CLOSE)
    np.testing.assert_allclose(got[".scale"], [0.89899, 1.207317, 0.740146], **CLOSE)


@SPACES
def test_tsv(run, toy, xp):
    got = run("tsv", toy.B, toy.M, xp=xp) - toy.B
    want = [
        [0.765174, 0.897376, 0.323904, 0.707182],
        [-1.032439, 0.6817, 0.647874, -0.140229],
        [-0.2497, 0.294479, -1.035609, 0.177851],
    ]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@SPACES
def test_iso(run, toy, xp):
    got = run("iso_c", toy.B, toy.M, xp=xp) - toy.B
    np.testing.assert_allclose(got[0], [0.915606, 0.949301, 0.160976, 0.712285], **CLOSE)
    got = run("iso_cts", toy.B, toy.M[:2], common_fraction=0.34, xp=xp) - toy.B
    np.testing.assert_allclose(got[0], [0.979836, 0.242535, -0.526204, -0.422887], **CLOSE)


@SPACES
def test_wudi(run, toy, xp):
    got = run("wudi", toy.B, toy.M, xp=xp) - toy.B
    want = [
        [1.180789, 0.923579, 0.244357, 0.297241],
        [-0.741342, -0.20334, -0.000607, 0.256682],
        [0.063432, -0.355774, -1.085613, 0.572475],
    ]
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


def test_wudi_steps_move_an_entry_by_at_most_three_thousandths(run, toy):
    # Printed: .0029968. Float32 sums of 300 steps of 1e-5 drift by up to 300 ulp of 1.
    got = run("wudi_steps", toy.B, toy.M) - toy.B - toy.T.sum(0)
    assert 0.00298 < np.abs(got).max() < 0.003 + 300 * 6e-8
