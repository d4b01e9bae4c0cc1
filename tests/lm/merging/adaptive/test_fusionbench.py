"""Against FusionBench 0.2.33: its own outputs on small random tensors (fixtures/).

fixtures/make_fusionbench.py made them; docs/results/fusionbench.md says what agrees and what not.
"""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lm
from lm import model
from lm.hf.merged import plain
from lm.layers.merged import Routing, corrected
from lm.merging.adaptive import wemoe
from lm.merging.adaptive.adamerging import Coefficients, apply_coefficients
from lm.merging.adaptive.fisher import fisher_mean
from lm.merging.adaptive.methods_parts import _prune
from lm.merging.adaptive.models import Piece
from lm.merging.adaptive.objective import entropy
from lm.merging.adaptive.regmean import Solver
from lm.merging.adaptive.vectors import Vectors

HERE = Path(__file__).parent
ENDS = ("weight", "bias")
KEYS = ("up.weight", "up.bias", "down.weight", "down.bias")


@pytest.fixture(scope="module")
def golden():
    with np.load(HERE / "fixtures" / "fusionbench.npz") as file:
        return {key: file[key] for key in file.files}


def test_the_fixture_is_small():
    assert (HERE / "fixtures" / "fusionbench.npz").stat().st_size < 50_000


def test_entropies_and_their_gradient(golden):
    logits = jnp.asarray(golden["entropy/logits"], jnp.float32)[None]
    counts = jnp.ones(logits.shape[:2])
    value, gradient = jax.value_and_grad(lambda z: entropy(z, counts).entropy)(logits)
    np.testing.assert_allclose(value, golden["entropy/value"], rtol=1e-5)
    np.testing.assert_allclose(gradient[0], golden["entropy/gradient"], atol=1e-6)
    mean = entropy(logits, counts, average_logits=True).entropy
    np.testing.assert_allclose(mean, golden["entropy/of_mean"], rtol=1e-5)
    assert abs(float(mean) - float(value)) > 0.1  # the text variants' objective is another one


def deltas_of(golden, key):
    base = golden[f"mlp/base/{key}"].astype("f4")
    return base, [golden[f"mlp/expert{k}/{key}"].astype("f4") - base for k in range(3)]


@pytest.mark.parametrize("clip", [True, False])
def test_layer_wise_merges(golden, clip):
    for row, key in enumerate(KEYS):
        coefficients = Coefficients.start([key], golden["merge/weights"][:, row])
        base, deltas = deltas_of(golden, key)
        got = apply_coefficients(base, deltas, coefficients.of(key, clip))
        np.testing.assert_allclose(got, golden[f"merge/layer_wise{clip:d}/{key}"], atol=1e-6)


def test_task_wise_merges(golden):
    coefficients = Coefficients.start([""], golden["merge/weights"][:, 0])
    for key in KEYS:
        base, deltas = deltas_of(golden, key)
        got = apply_coefficients(base, deltas, coefficients.of(key, True))
        np.testing.assert_allclose(got, golden[f"merge/task_wise/{key}"], atol=1e-6)


def test_trimmed_vectors_and_elected_signs(golden):
    flat = golden["ties/flat"].astype("f4")
    whole = Piece("x", 0, flat.shape[1], 1)
    models = SimpleNamespace(
        stores=[None] * 4,
        pieces=[whole],
        infos={"x": SimpleNamespace(size=flat.shape[1])},
        read=lambda k, piece: flat[k - 1].copy() if k else np.zeros(flat.shape[1], "f4"),
    )
    kept, sign = golden["ties/kept"], golden["ties/sign"]
    for k, delta in enumerate(Vectors(models, 0.2)(whole)[1]):
        np.testing.assert_allclose(delta, kept[k] * (np.sign(kept[k]) == sign), atol=1e-7)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_regmean(golden, alpha):
    solver = Solver(alpha, 1e-12)
    for k, gram in enumerate(golden["regmean/grams"]):
        solver.add(gram, golden[f"mlp/expert{k}/up.weight"].T)
    np.testing.assert_allclose(solver.solve().T, golden[f"regmean/{alpha}/up.weight"], rtol=1e-5)
    bias = np.mean([golden[f"mlp/expert{k}/up.bias"] for k in range(3)], 0)
    np.testing.assert_allclose(bias, golden[f"regmean/{alpha}/up.bias"], rtol=1e-6)


def test_fisher_means_but_for_the_floor(golden):
    values = [golden[f"mlp/expert{k}/up.weight"] for k in range(3)]
    fishers, share = golden["fisher/diagonals"], [0.5, 0.2, 0.3]
    np.testing.assert_allclose(
        fisher_mean(values, list(fishers), share, 0.0), golden["fisher/plain"], rtol=1e-5
    )
    scaled = [f / np.sqrt(np.square(f).sum()) for f in fishers]
    np.testing.assert_allclose(
        fisher_mean(values, scaled, share, 0.0), golden["fisher/norm"], rtol=1e-5
    )
    # Its floor is added to every element; ours is the least value.
    added = fisher_mean(values, [f + 0.1 for f in fishers], share, 0.0)
    np.testing.assert_allclose(added, golden["fisher/floor"], rtol=1e-5)
    assert np.abs(fisher_mean(values, list(fishers), share, 0.1) - added).max() > 1e-3


def test_squared_gradients_hold_cross_terms(golden):
    """sum_y sqrt(p_y) grad log p_y, squared as a sum: not the Fisher diagonal of even one row."""
    w, x = golden["fisher/classifier"], golden["fisher/inputs"]

    def parts(row):
        p = np.exp(w @ row) / np.exp(w @ row).sum()
        return p, (np.eye(4) - p)[:, :, None] * row  # grad log p_y, [y, 4, D]

    def summed(rows):
        found = [(np.sqrt(p)[:, None, None] * g).sum(0) for p, g in map(parts, rows)]
        return np.square(np.sum(found, 0)) / len(rows)

    np.testing.assert_allclose(summed(x[:1]), golden["fisher/squares_one"], rtol=1e-9)
    np.testing.assert_allclose(summed(x), golden["fisher/squares_batch"], rtol=1e-9)
    p, g = parts(x[0])
    fisher = (p[:, None, None] * np.square(g)).sum(0)
    assert np.abs(golden["fisher/squares_one"] / fisher - 1).max() > 0.1


def test_surgery(golden):
    z = golden["surgery/z"].astype("f4")
    np.testing.assert_array_equal(golden["surgery/fresh"], golden["surgery/z"])
    pair = {name: jnp.asarray(golden[f"surgery/{name}"].T, jnp.float32) for name in ("down", "up")}
    np.testing.assert_allclose(corrected(z, pair), golden["surgery/corrected"], atol=1e-5)


def test_pruning_for_e_wemoe(golden):
    tau = golden["prune/tau"].astype("f4")
    cut = float(np.quantile(np.abs(tau), 0.9))
    np.testing.assert_allclose(_prune(tau, cut), golden["prune/kept"], atol=1e-7)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_weight_ensembles_of_single_samples(golden, depth):
    """A layer of ours at the last token is one of FusionBench's without its batch average."""
    config = lm.ModelConfig(
        vocab_size=8,
        num_layers=1,
        d_model=6,
        num_heads=1,
        d_ff=10,
        mlp="gelu",
        mlp_bias=True,
        dtype="float32",
    )
    config = wemoe.routed(config, list("abc"), [0.3] * 3, depth=depth, shared=False)
    f4 = lambda key: jnp.asarray(golden[key].astype("f4"))  # noqa: E731
    if depth == 0:
        router = {"out": {"bias": f4("wemoe/0/weight")}}
    else:
        names = {1: {"out": "fc"}, 2: {"hidden": "fc1", "out": "fc2"}}[depth]
        router = {
            part: {
                "kernel": f4(f"wemoe/{depth}/{n}.weight").T,
                "bias": f4(f"wemoe/{depth}/{n}.bias"),
            }
            for part, n in names.items()
        }
    h, vectors, dense = f4("wemoe/h"), {}, {}
    for name in ("up", "down"):
        for kind, key in (("weight", "kernel"), ("bias", "bias")):
            base, deltas = (np.asarray(v) for v in deltas_of(golden, f"{name}.{kind}"))
            tau = jnp.asarray(deltas.swapaxes(-1, -2) if key == "kernel" else deltas)
            start = jnp.asarray(base.T if key == "kernel" else base)
            dense.setdefault(name, {})[key] = (start + 0.3 * tau.sum(0))[None]
            vectors.setdefault(name, {})[key] = tau[None]
    params = model.init(plain(config), jax.random.key(0))
    layers = params["layers"] | {"mlp": dense}
    stacked = jax.tree.map(lambda leaf: leaf[None], router)
    params = wemoe.attach(config, params | {"layers": layers}, stacked, vectors)
    # The layer alone: in the model its input is a norm's output.
    block = model._model(config, params).layers
    state = jax.tree.map(lambda leaf: leaf[0], nnx.state(block))
    block = nnx.merge(nnx.graphdef(block), state)
    routing = Routing(None, None, None)
    got, _ = block.ensemble.around(block.mlp, routing, None)(h, None, 0)
    expected = golden[f"wemoe/{depth}/out0"]
    np.testing.assert_allclose(got[:, -1], expected[:, -1], atol=1e-5)
    # Averaged over the batch, both samples get other weights, unless these are constant.
    gap = np.abs(golden[f"wemoe/{depth}/out1"] - expected).max()
    assert gap < 1e-12 if depth == 0 else gap > 1e-3
