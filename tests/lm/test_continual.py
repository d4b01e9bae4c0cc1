import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import model
from lm.config import AdapterConfig
from lm.continual import Domain, Method, Stream, penalty
from lm.continual_routes import compositions, route_report, spearman, token_losses, token_routes
from lm.data import open_stores
from lm.layers import adapters

LORA = AdapterConfig(kind="lora", rank=2, targets=("up",))


@pytest.fixture(scope="module")
def stream(tiny_run, tmp_path_factory):
    """Two domains with an alphabet each, on an untrained model."""
    domains, base = [], tiny_run("")
    for name, letters in (("one", "abcdef"), ("two", "uvwxyz")):
        folder, rng = tmp_path_factory.mktemp(name), np.random.default_rng(0)
        for number in range(8):
            words = ["".join(rng.choice(list(letters), 4)) for _ in range(40)] * 5
            (folder / f"{number}.txt").write_text(" ".join(words))
        data = dataclasses.replace(base.data, path=str(folder), valid_fraction=0.3)
        stores = open_stores(data)
        domains.append(Domain(name, stores["train"], stores["valid"]))
    config = dataclasses.replace(
        base, steps=10, model=dataclasses.replace(base.model, unroll=2), data=base.data
    )
    params = model.init(config.model, jax.random.key(0))
    return Stream(config, params, domains, 2)


def test_a_stream_is_learned_forgotten_and_measured(stream):
    learned = stream.learn(Method(LORA), [0, 1], rate=3e-2, seed=0)
    losses = learned.losses
    assert losses.shape == (3, 2)
    assert losses[1, 0] < losses[0, 0] - 0.3 and losses[2, 1] < losses[1, 1] - 0.3
    assert learned.op == pytest.approx((losses[2, 0] + losses[2, 1]) / 2)
    assert learned.forgetting == pytest.approx(losses[2, 0] - losses[1, 0])
    assert learned.forgetting > 0
    frozen, trained = adapters.divide(learned.params)
    jax.tree.map(np.testing.assert_array_equal, frozen, stream.base)
    # Training on did not take the halfway model away.
    _, before = adapters.divide(learned.halfway)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, trained)
    assert not any(jax.tree.leaves(same))
    again = stream.learn(Method(LORA), [0, 1], rate=3e-2, seed=0)
    np.testing.assert_array_equal(again.losses, losses)


def test_strong_ewc_keeps_everything_and_none_is_plain_lora(stream):
    plain = stream.learn(Method(LORA), [0, 1], rate=3e-2, seed=0)
    none = stream.learn(Method(LORA, "ewc", 0.0), [0, 1], rate=3e-2, seed=0)
    np.testing.assert_allclose(none.losses, plain.losses, rtol=1e-5)
    strong = stream.learn(Method(LORA, "ewc", 1e9), [0, 1], rate=3e-2, seed=0)
    assert strong.losses[1, 0] == pytest.approx(plain.losses[1, 0], rel=1e-5)
    assert abs(strong.forgetting) < 0.5 * plain.forgetting


def test_olora_learns_new_pairs_on_merged_old_ones(stream):
    learned = stream.learn(Method(LORA, "olora", 0.5), [0, 1], rate=3e-2, seed=0)
    frozen, trained = adapters.divide(learned.params)
    up = frozen["layers"]["mlp"]["up"]["kernel"]
    assert np.abs(up - stream.base["layers"]["mlp"]["up"]["kernel"]).max() > 1e-3
    assert not np.any(trained["layers"]["mlp"]["up"]["adapter"]["lora_b"])
    assert learned.losses[2, 1] < learned.losses[1, 1] - 0.3
    with pytest.raises(ValueError, match="ewc is for adapters of kind lora"):
        Method(AdapterConfig(kind="loramoe"), "ewc", 1.0)


def test_penalties_are_their_formulas(rng):
    new = jnp.asarray(rng.normal(size=(2, 5, 3)), jnp.float32)
    old = jnp.asarray(rng.normal(size=(4, 2, 5, 3)), jnp.float32).at[2:].set(0)
    tree = {"up": {"adapter": {"lora_a": new}}}
    expected = sum(np.abs(old[t, layer].T @ new[layer]).sum() for t in (0, 1) for layer in (0, 1))
    found = penalty(Method(LORA, "olora", 0.5), [old], tree)
    assert float(found) == pytest.approx(0.5 * float(expected), rel=1e-5)
    memory = {"fisher": {"a": jnp.array([1.0, 2.0])}, "anchor": {"a": jnp.array([0.0, 1.0])}}
    found = penalty(Method(LORA, "ewc", 4.0), memory, {"a": jnp.array([3.0, 2.0])})
    assert float(found) == pytest.approx(0.5 * 4 * (9 + 2))


def test_routes_are_those_that_the_model_takes(stream):
    """Experts that no token's route names are not used: filling them with NaN changes nothing."""
    adapter = AdapterConfig(kind="head_wise", rank=4, heads=2, experts=4, targets=("down",))
    config = dataclasses.replace(stream.config.model, adapter=adapter)
    params = model.init(config, jax.random.key(1))
    batch, _ = stream.held_out[0][0]
    down = params["layers"]["mlp"]["down"]["adapter"]
    down["lora_b"] = jax.random.normal(jax.random.key(2), down["lora_b"].shape)
    routes = jax.jit(lambda p: token_routes(config, p, batch))(params)
    assert list(routes) == ["layers.mlp.down"]
    rows = np.asarray(routes["layers.mlp.down"])
    assert rows.shape == (2, batch["tokens"].size, 2)
    losses = jax.jit(lambda p: token_losses(config, p, batch))
    before, b = losses(params), np.asarray(down["lora_b"])
    frozen, _ = adapters.divide(params)
    unused = 0
    for layer in range(2):
        for head in range(2):
            used = set(rows[layer, :, head].tolist())
            for expert in range(4):
                moved = params["layers"]["mlp"]["down"]["adapter"] | {
                    "lora_b": jnp.asarray(b).at[layer, head, expert].add(10.0)
                }
                tree = adapters.join(frozen, {"layers": {"mlp": {"down": {"adapter": moved}}}})
                same = np.array_equal(losses(tree), before)
                assert same == (expert not in used), (layer, head, expert)
                unused += same
    report = route_report(config, params, params, stream.held_out)
    assert 1 <= report["n_eff"] and report["routes"] <= 16 and report["correlation"] is None


def test_spearman_and_compositions():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 15.0])) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 9.0])) == pytest.approx(1)
    assert spearman(np.array([1.0, 1.0]), np.array([3.0, 4.0])) is None
    domain = np.repeat([0, 1], 32)
    token = np.tile(np.repeat([0, 1, 2, 3], [2, 4, 8, 18]), 2)
    position = np.tile(np.arange(32), 2)
    labels = compositions(domain, token, position)
    assert labels.min() >= 0 and labels.max() < 32
    assert set(labels[:32]).isdisjoint(labels[32:])
