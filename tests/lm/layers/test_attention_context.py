"""Attention of rows that are cut over devices, against the definition on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm
from lm import sharding
from lm.config import MLAConfig, ModelConfig
from lm.layers import attention_blocked
from lm.layers.attention import attention
from lm.layers.attention_blocked import block_pairs, device_pairs
from lm.layers.attention_common import Spec, zigzag
from lm.layers.attention_context import cut, join, mesh_attention, pieces_of, row_segments

LENGTH = 128


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 1, "fsdp": 2, "context": 2, "tensor": 2})


def packed(rng, rows, length=LENGTH):
    """Documents of 1 to 50 tokens, padding behind them in every other row."""
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        ends = np.cumsum(rng.integers(1, 50, length))
        row[:] = 1 + np.searchsorted(ends, np.arange(length), "right")
    ids[::2, -9:] = 0
    return ids


@pytest.mark.parametrize("ways", [2, 4])
def test_zigzag_gives_each_device_an_early_and_a_late_chunk(ways):
    table = zigzag(ways, 48)
    assert sorted(table.reshape(-1)) == list(range(48))
    size = 48 // (2 * ways)
    for device, tokens in enumerate(table):
        late = 2 * ways - 1 - device
        expected = [*range(device * size, (device + 1) * size)]
        expected += range(late * size, (late + 1) * size)
        assert tokens.tolist() == expected


@pytest.mark.parametrize("window", [None, 64, 200])
def test_every_device_visits_as_many_blocks_and_together_those_of_one(window):
    ways, size, length = 4, 16, 512
    spec = Spec(1.0, True, window, None, ways)
    lists = device_pairs(spec, size, length // ways, length)
    counts = [len(pairs) for pairs in lists]
    if window is None:
        assert len(set(counts)) == 1
    (alone,) = device_pairs(Spec(1.0, True, window), size, length, length)
    assert sum(counts) == len(alone)
    # In the order of the row the last device would visit nearly twice as many as the mean.
    places = np.arange(length)
    slowest = max(
        len(block_pairs(spec, size, places[i : i + length // ways], places))
        for i in range(0, length, length // ways)
    )
    if window is None:
        assert slowest > 1.6 * max(counts)


def test_pieces_travel_to_their_devices_and_back(mesh, rng):
    x = jnp.asarray(rng.normal(size=(4, 16, 3)), jnp.float32)
    ids = jnp.asarray(np.tile(np.arange(16), (4, 1)), jnp.int32)

    @jax.jit
    def there_and_back(x, ids):
        pieces = pieces_of(x.shape)
        parts, places = cut(pieces, x, ids)
        grad = jax.grad(lambda parts: jnp.sum(join(pieces, parts) ** 2))(parts)
        return parts, places, join(pieces, parts), grad, row_segments(pieces, places)

    with jax.set_mesh(mesh):
        parts, places, again, grad, rows = there_and_back(x, ids)
        assert pieces_of((4, 18)) is None and pieces_of((3, 16)) is None
    assert pieces_of((4, 16)) is None  # no mesh
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(grad, 2 * parts)
    table = zigzag(2, 16)
    # Each device has its rows; of every row one piece.
    for shard in places.addressable_shards:
        context = dict(zip(mesh.axis_names, np.argwhere(mesh.device_ids == shard.device.id)[0]))  # noqa: B905
        np.testing.assert_array_equal(shard.data, np.tile(table[context["context"]], (2, 1)))
    np.testing.assert_array_equal(rows, np.tile(table.reshape(-1), (4, 1)))


CASES = {
    "packed": (True, {}),
    "sliding": (True, {"window": 37}),
    "soft cap": (False, {"soft_cap": 2.0}),
}


@pytest.mark.parametrize("name", ["dense", "blocked", "reference"])
def test_equals_one_device(mesh, rng, monkeypatch, name):
    """Grouped heads, values and gradients, all options in one program."""
    monkeypatch.setattr(attention_blocked, "CPU_BLOCK", 16)
    shapes = [(2, LENGTH, heads, 8) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    ids = jnp.asarray(packed(rng, 2))

    def over_mesh(q, k, v, grad, ids):
        pieces = pieces_of(q.shape)
        q, k, v, grad, ids = cut(pieces, q, k, v, grad, ids)
        rows = row_segments(pieces, ids)
        found = {}
        for case, (segments, options) in CASES.items():
            given = dict(segment_ids=ids, row_segment_ids=rows) if segments else {}
            defaults = dict(segment_ids=None, window=None, soft_cap=None, scale=0.3)

            def run(q, k, v, options=defaults | options | given):
                return mesh_attention(q, k, v, implementation=name, pieces=pieces, **options)

            out, pull = jax.vjp(run, q, k, v)
            found[case] = [join(pieces, x) for x in (out, *pull(grad))]
        return found

    with jax.set_mesh(mesh):
        found = jax.jit(over_mesh)(q, k, v, grad, ids)
    for case, (segments, options) in CASES.items():
        given = options | {"scale": 0.3} | ({"segment_ids": ids} if segments else {})

        def run(q, k, v, options=given):
            return attention(q, k, v, implementation="reference", **options)

        out, pull = jax.vjp(run, q, k, v)
        for x, y in zip(found[case], (out, *pull(grad)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5, err_msg=case)


def test_kernels_that_cannot_see_other_devices_are_refused(mesh):
    x = jnp.ones((4, 16, 2, 64), jnp.bfloat16)

    def run(x):
        pieces = pieces_of(x.shape)
        (x,) = cut(pieces, x)
        options = dict(segment_ids=None, window=None, soft_cap=None, scale=1.0)
        return mesh_attention(x, x, x, pieces=pieces, implementation="cudnn", **options)

    with jax.set_mesh(mesh), pytest.raises(NotImplementedError, match="mesh.context = 2 use None"):
        jax.eval_shape(run, x)


MODEL = dict(vocab_size=48, num_layers=1, d_model=32, num_heads=4, d_ff=48, dtype="float32")
KINDS = {
    "sliding": dict(num_kv_heads=2, sliding_window=21, positions="learned", max_context=LENGTH),
    "latents": dict(
        attention_kind="mla",
        mla=MLAConfig(
            q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_take_rows_in_order_and_give_them_back_so(mesh, rng, kind):
    config = ModelConfig(**MODEL | KINDS[kind])
    params = lm.init(config, jax.random.key(0))
    tokens = jnp.asarray(rng.integers(0, 48, (2, LENGTH)), jnp.int32)
    ids = jnp.asarray(packed(rng, 2))

    def run(params, tokens, ids):
        return lm.apply(config, params, tokens, segment_ids=ids)

    with jax.set_mesh(mesh):
        placed = jax.device_put(params, lm.model.shardings(config, mesh))
        program = jax.jit(run).lower(placed, tokens, ids).compile()
        got = program(placed, tokens, ids)
    np.testing.assert_allclose(got, jax.jit(run)(params, tokens, ids), rtol=1e-4, atol=1e-5)
    assert "collective-permute" in program.as_text()  # the rows were cut
