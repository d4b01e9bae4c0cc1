"""Expert layers in the decoder: parameters, losses, training, layouts, checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moe
from lm import model, recipes
from lm.config import ConfigError, ModelConfig, MoEConfig
from lm.layers.moe import MoE
from lm.layers.parameters import SINGLE
from lm.sharding import check_mesh, make_mesh
from lm.train.checkpoint import Checkpoints
from lm.train.config import GuardConfig, MeshConfig, OptimConfig, RunConfig
from lm.train.flops import model_flops_per_token, parameter_count
from lm.train.optimizer import make_optimizer, parameter_labels
from lm.train.state import abstract_state, init_state
from lm.train.step import loss_sum, make_train_step

DEEPSEEK = dict(scoring="sigmoid", shared=1, groups=2, bias_rate=0.01, balance_per_sequence=True)


def make_config(**changes) -> ModelConfig:
    options = dict(experts=4, top_k=2, d_expert=12, implementation="xla") | changes.pop("moe", {})
    sizes = dict(vocab_size=48, num_layers=2, d_model=16, num_heads=2, d_ff=24, max_context=64)
    return ModelConfig(
        **sizes | dict(mlp="moe", dtype="float32", moe=MoEConfig(**options)) | changes
    )


def make_run(**changes) -> RunConfig:
    run = dict(optim=OptimConfig(learning_rate=1e-2, warmup_steps=0), guard=GuardConfig(window=8))
    run |= {key: changes.pop(key) for key in ("optim", "micro_batches") if key in changes}
    return RunConfig(model=make_config(**changes), sequence_length=16, batch_size=8, **run)


@pytest.fixture(scope="module")
def batch():
    ids = np.random.default_rng(0).integers(0, 48, (8, 17))
    return {
        "tokens": jnp.asarray(ids[:, :-1], jnp.int32),
        "targets": jnp.asarray(ids[:, 1:], jnp.int32),
        "segment_ids": jnp.ones((8, 16), jnp.int32),
        "positions": jnp.tile(jnp.arange(16, dtype=jnp.int32), (8, 1)),
        "weights": jnp.ones((8, 16), jnp.float32),
    }


compile_fast = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def start():
    """The state before the first step, on the host."""
    config = make_run(moe=DEEPSEEK)
    tx, _ = make_optimizer(config.optim, config.steps)
    return jax.device_get(compile_fast(lambda: init_state(config, tx))())


def trained(config, start, batch, steps, sizes):
    """States and metrics after each step on one batch."""
    mesh = make_mesh(sizes)
    tx, schedule = make_optimizer(config.optim, config.steps)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, tx, mesh))
    states, history = [], []
    with jax.set_mesh(mesh):
        state = jax.device_put(start, shardings)
        step = make_train_step(config, tx, schedule)
        step = compile_fast(step, out_shardings=(shardings, None))
        for _ in range(steps):
            state, metrics = step(state, batch)
            states.append(state)
            history.append(jax.device_get(metrics))
    return states, history


@pytest.fixture(scope="module")
def on_one_device(start, batch):
    """In micro-batches, so that what is compared with it holds for these too."""
    return trained(make_run(moe=DEEPSEEK, micro_batches=2), start, batch, 12, {"data": 1})


@pytest.fixture(scope="module")
def on_mesh(start, batch):
    config = make_run(moe=DEEPSEEK)
    return trained(config, start, batch, 2, {"expert": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize("options", [{}, DEEPSEEK, {"sd_rank": 2, "activation": "gelu"}])
def test_parameters_have_their_names_and_are_counted(options):
    config = make_config(moe=options)
    params = model.abstract_params(config)
    mlp = params["layers"]["mlp"]
    assert mlp["router"]["kernel"].shape == (2, 16, 4)
    assert mlp["experts"]["up"].shape == (2, 4, 16, 12)
    assert mlp["experts"]["down"].shape == (2, 4, 12, 16)
    assert ("gate" in mlp["experts"]) == (options.get("activation") != "gelu")
    assert ("bias" in mlp["router"]) == ("bias_rate" in options)
    assert ("shared" in mlp) == ("shared" in options) and ("common" in mlp) == (
        "sd_rank" in options
    )
    assert parameter_count(config) == sum(np.prod(p.shape) for p in jax.tree.leaves(params))


def test_active_parameters_and_flops_are_those_of_an_equal_dense_model():
    experts = make_config(moe=dict(experts=8, top_k=2, shared=1))
    dense = dataclasses.replace(experts, mlp="swiglu", d_ff=3 * 12, moe=MoEConfig())
    router = 2 * 16 * 8
    assert parameter_count(experts, active=True) == parameter_count(dense) + router
    got, want = (model_flops_per_token(c, 16, causal=True) for c in (experts, dense))
    assert got == want + 6 * router


def layer_of(config, seed=0):
    return MoE(jax.random.key(seed), config, SINGLE)


def test_layer_is_its_parts(rng):
    config = make_config(moe=DEEPSEEK | {"scale": 2.5})
    layer, x = layer_of(config), jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    layer.router.bias.set_value(jnp.array([0.0, 0.3, -0.2, 0.1]))
    y, auxiliary = layer(x)
    flat = x.reshape(-1, 16)
    logits = flat @ layer.router.kernel[...]
    routing = moe.route(
        logits,
        2,
        scoring="sigmoid",
        normalize=True,
        bias=layer.router.bias[...],
        groups=2,
        scale=2.5,
    )
    expected = moe.expert_mlp(flat, routing, layer.experts.arrays(), implementation="xla")
    shared = {name: getattr(layer.shared, name).kernel[...] for name in ("gate", "up", "down")}
    expected += moe.shared_mlp(flat, shared)
    np.testing.assert_allclose(y.reshape(-1, 16), expected, rtol=1e-5, atol=1e-5)
    nested = moe.Routing(*(a.reshape(2, 5, -1) for a in routing))
    balance = 0.01 * moe.load_balance_loss(nested, per_sequence=True)
    np.testing.assert_allclose(auxiliary["loss/load_balance"], balance, rtol=1e-5)
    z_loss = 0.001 * moe.router_z_loss(logits)
    np.testing.assert_allclose(auxiliary["loss/router_z"], z_loss, rtol=1e-5)
    load = np.bincount(np.asarray(routing.indices).reshape(-1), minlength=4) / 20
    np.testing.assert_allclose(auxiliary["experts/load"], load)


def test_common_part_is_added_to_every_expert(rng):
    config = make_config(moe={"sd_rank": 2})
    layer, x = layer_of(config), jnp.asarray(rng.normal(size=(1, 6, 16)), jnp.float32)
    folded = layer_of(make_config())
    folded.router.kernel.set_value(layer.router.kernel[...])
    for name, common in layer.common.arrays().items():
        whole = getattr(layer.experts, name)[...] + common[None]
        getattr(folded.experts, name).set_value(whole)
    np.testing.assert_allclose(layer(x)[0], folded(x)[0], rtol=1e-5, atol=1e-6)


def test_router_is_f32_in_a_bf16_model(rng):
    config = make_config(dtype="bfloat16", param_dtype="bfloat16", moe=DEEPSEEK)
    layer = layer_of(config)
    x = jnp.asarray(rng.normal(size=(1, 64, 16)), jnp.bfloat16)
    logits = layer.router(x)
    exact = np.asarray(x[0], float) @ np.asarray(layer.router.kernel[...], float)
    assert logits.dtype == jnp.float32 and layer.router.bias[...].dtype == jnp.float32
    np.testing.assert_allclose(logits[0], exact, rtol=1e-5, atol=1e-6)
    y, auxiliary = layer(x)
    assert y.dtype == jnp.bfloat16
    assert all(value.dtype == jnp.float32 for value in auxiliary.values())


def test_labels_keep_routers_and_biases_from_matrix_optimizers():
    labels = parameter_labels(model.abstract_params(make_config(moe=DEEPSEEK)))["layers"]["mlp"]
    assert labels["router"] == {"kernel": "router", "bias": "bias"}
    assert set(labels["experts"].values()) == {"matrix"}


@pytest.mark.parametrize("name", ["muon", "spectra"])
def test_matrix_optimizers_take_every_expert_by_itself(name, rng):
    """Against five Newton-Schulz steps in float64, and Spectra's root mean square of 0.2."""
    shapes = {"up": (2, 3, 16, 12), "down": (2, 3, 12, 16)}
    grads = {
        "experts": {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    }
    options = dict(warmup_steps=0, weight_decay=0.0, clip=0.0, schedule="constant")
    tx, _ = make_optimizer(OptimConfig(name=name, learning_rate=0.01, **options), 10)
    updates, _ = compile_fast(lambda g: tx.update(g, tx.init(g), g))(grads)
    for matrix in shapes:
        for at in np.ndindex(2, 3):
            found = np.float64(updates["experts"][matrix][at])
            if name == "spectra":
                assert np.sqrt(np.mean(found**2)) == pytest.approx(0.002, rel=1e-4)
                continue
            x = np.float64(grads["experts"][matrix][at])
            x = x / np.linalg.norm(x)
            for _ in range(5):  # its fixed points are not 1: singular values end in 0.68 .. 1.13
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            np.testing.assert_allclose(found, -0.01 * 0.2 * 4 * x, atol=1e-6)


def test_training_learns_and_reports(on_one_device):
    _, history = on_one_device
    first, last = history[0], history[-1]
    assert last["loss"] < first["loss"] - 0.3
    assert {"loss/load_balance", "loss/router_z", "experts/max_violation"} <= set(last)
    assert 0 < last["experts/entropy"] <= np.log(4) and last["experts/drop_share"] == 0
    assert "experts/load" not in last  # a vector


def router_bias(state):
    return np.asarray(state.params["layers"]["mlp"]["router"]["bias"])


def test_bias_follows_the_load_of_the_whole_batch_and_has_no_gradient(start, batch, on_one_device):
    config, (states, _) = make_config(moe=DEEPSEEK), on_one_device
    hidden = compile_fast(lambda p: model.hidden(config, p, batch["tokens"]))
    _, auxiliary = hidden(start.params)
    load = np.asarray(auxiliary["experts/load"])
    expected = 0.01 * np.sign(load.mean(1, keepdims=True) - load)
    np.testing.assert_allclose(router_bias(states[0]), expected, atol=1e-7)
    assert expected.any()
    leaves = jax.tree_util.tree_leaves_with_path(states[0].opt_state)
    moments = [leaf for path, leaf in leaves if "bias" in jax.tree_util.keystr(path)]
    assert moments and not any(leaf.any() for leaf in moments)


def test_mesh_trains_as_one_device(on_one_device, on_mesh):
    (one, rows), (many, same) = on_one_device, on_mesh
    up = many[1].params["layers"]["mlp"]["experts"]["up"]
    assert up.shape == (2, 4, 16, 12) and up.addressable_shards[0].data.shape == (2, 2, 8, 6)
    for a, b in zip(rows[:2], same, strict=True):
        for name in ("loss", "grad_norm", "experts/entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)  # noqa: E731
    jax.tree.map(close, *jax.device_get((one[1].params, many[1].params)))


def test_checkpoint_continues_on_another_degree_of_expert_parallelism(
    batch, on_one_device, on_mesh, tmp_path
):
    config = make_run(moe=DEEPSEEK)
    tx, _ = make_optimizer(config.optim, config.steps)
    wide = make_mesh({"expert": 4})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, on_mesh[0][1], {})
        checkpoints.wait()
        _, restored, _ = checkpoints.restore(abstract_state(config, tx, wide))
    up = restored.params["layers"]["mlp"]["experts"]["up"]
    assert up.addressable_shards[0].data.shape == (2, 1, 16, 12)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((restored, on_mesh[0][1])))
    with jax.set_mesh(wide):
        total, _ = compile_fast(functools.partial(loss_sum, config))(restored.params, batch)
    found = float(total) / batch["targets"].size
    assert found == pytest.approx(float(on_one_device[1][2]["loss"]), rel=1e-5)


def test_generation_decodes_what_a_whole_pass_gives(rng):
    config = make_config(moe=DEEPSEEK)
    params = compile_fast(lambda: model.init(config, jax.random.key(1)))()
    tokens = jnp.asarray(rng.integers(0, 48, (2, 6)), jnp.int32)
    whole = compile_fast(functools.partial(model.apply, config))(params, tokens)
    cache, decode = model.init_cache(config, 2, 6), compile_fast(model.decode, static_argnums=0)
    for t in range(6):
        step, cache = decode(config, params, tokens[:, t : t + 1], cache, jnp.int32(t))
        np.testing.assert_allclose(step[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)


def test_products_without_a_grouped_form_are_refused(rng):
    layer = layer_of(make_config())
    x = jnp.zeros((1, 4, 16))
    with pytest.raises(NotImplementedError, match="no form for experts.*quant.high"):
        layer(x, lambda site: jax.lax.dot_general)

    class Product:
        align = 8
        calls = []

        def grouped(self, lhs, rhs, sizes):
            self.calls.append(lhs.shape)
            return moe.grouped_matmul(lhs, rhs, sizes, implementation="xla")

    y, _ = layer(x + 1, lambda site: Product() if "experts" in site.name else None, 0)
    np.testing.assert_allclose(y, layer(x + 1)[0], rtol=1e-5)
    assert len(Product.calls) == 3 and all(rows % 8 == 0 for rows, _ in Product.calls)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(moe=dict(top_k=5)), "top_k .5. exceeds the 4 experts"),
        (dict(moe=dict(experts=4, groups=3)), "groups must divide experts"),
        (dict(moe=dict(scoring="sigmoid", order="topk_softmax")), "is a softmax"),
        (dict(moe=dict(capacity_factor=0.0)), "capacity_factor must be above 0"),
        (dict(moe=dict(implementation="cuda")), "implementation must be one of"),
        (dict(mlp="swiglu"), "model.moe.experts is given but model.mlp is swiglu"),
        (dict(mlp_bias=True), "experts have none"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(**changes)


def test_mesh_must_divide_the_experts():
    mesh = make_mesh({"expert": 8})
    with pytest.raises(ConfigError, match="mesh.expert = 8 does not divide model.moe.experts = 4"):
        check_mesh(make_config(), 8, 1, mesh)
    assert MeshConfig(expert=4).expert == 4


@pytest.mark.parametrize("name,total,active", [("qwen3_moe_small", 2.0, 0.8), ("deepseek_moe_small", 2.2, 0.6)])  # fmt: skip  # noqa: E501
def test_recipes_have_their_sizes(name, total, active):
    config = recipes.get(name).model
    assert parameter_count(config) / 1e9 == pytest.approx(total, rel=0.05)
    assert parameter_count(config, active=True) / 1e9 == pytest.approx(active, rel=0.05)


def test_tiny_recipe_has_the_active_size_of_the_dense_one():
    dense, experts = (recipes.get(name).model for name in ("tiny", "moe_tiny"))
    assert parameter_count(experts, active=True) == parameter_count(dense) + 4 * 192 * 8


def test_layer_is_a_module_of_the_tree():
    layer = layer_of(make_config(moe=DEEPSEEK))
    assert set(nnx.to_pure_dict(nnx.state(layer))) == {"router", "experts", "shared"}
