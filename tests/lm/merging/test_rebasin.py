"""Weight matching of decoder models."""

import numpy as np
import pytest

from lm.merging.rebasin import align, match
from lm.merging.store import open_store
from lm.merging.types import MergeError

HEADS, GROUPS, SIZE, WIDTH, FF, LAYERS = 6, 3, 8, 24, 40, 2
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
}


def make(rng, norms="head"):
    shapes = {"model.embed_tokens.weight": (30, WIDTH), "model.norm.weight": (WIDTH,)}
    for n in range(LAYERS):
        at, mlp = f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp."
        for name, rows in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)):
            shapes[f"{at}{name}_proj.weight"] = (rows * SIZE, WIDTH)
            shapes[f"{at}{name}_proj.bias"] = (rows * SIZE,)
        for name, rows in (("q", HEADS), ("k", GROUPS)):
            shapes[f"{at}{name}_norm.weight"] = (SIZE if norms == "head" else rows * SIZE,)
        shapes[f"{at}o_proj.weight"] = (WIDTH, HEADS * SIZE)
        shapes |= {f"{mlp}{name}_proj.weight": (FF, WIDTH) for name in ("gate", "up")}
        shapes[f"{mlp}down_proj.weight"] = (WIDTH, FF)
    return {n: (0.3 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def shuffle(rng, tensors):
    """The same function with hidden units in random order, by loops of the test's own."""
    result = {name: value.copy() for name, value in tensors.items()}
    per_group = HEADS // GROUPS
    for n in range(LAYERS):
        at, mlp = f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp."
        units = rng.permutation(FF)
        for name in ("gate", "up"):
            result[f"{mlp}{name}_proj.weight"] = tensors[f"{mlp}{name}_proj.weight"][units]
        result[f"{mlp}down_proj.weight"] = tensors[f"{mlp}down_proj.weight"][:, units]
        for g, old in enumerate(np.roll(np.arange(GROUPS), 1 + n)):
            channels = rng.permutation(SIZE)
            for c in range(SIZE):
                for name in ("k_proj.weight", "k_proj.bias", "k_norm.weight"):
                    if len(tensors[at + name]) > SIZE:
                        row = tensors[at + name][old * SIZE + c]
                        result[at + name][g * SIZE + c] = row
                for name in ("v_proj.weight", "v_proj.bias"):
                    row = tensors[at + name][old * SIZE + channels[c]]
                    result[at + name][g * SIZE + c] = row
            for i, other in enumerate(rng.permutation(per_group)):
                to, source = (g * per_group + i) * SIZE, (old * per_group + other) * SIZE
                for c in range(SIZE):
                    for name in ("q_proj.weight", "q_proj.bias", "q_norm.weight"):
                        if len(tensors[at + name]) > SIZE:
                            result[at + name][to + c] = tensors[at + name][source + c]
                    column = tensors[at + "o_proj.weight"][:, source + channels[c]]
                    result[at + "o_proj.weight"][:, to + c] = column
    return result


def rotated(x):
    """Rotary embedding of [time, heads, size], halves paired."""
    half = SIZE // 2
    angle = np.arange(len(x))[:, None] / 10.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def forward(tensors, x):
    """Layers of grouped attention with rotary embedding and SwiGLU, without other norms, in
    float64."""
    p = {name: value.astype(np.float64) for name, value in tensors.items()}
    time = len(x)
    for n in range(LAYERS):
        at, mlp = f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp."
        parts = {k: x @ p[f"{at}{k}_proj.weight"].T + p[f"{at}{k}_proj.bias"] for k in "qkv"}
        for k in "qk":
            weight = p[f"{at}{k}_norm.weight"]
            value = parts[k].reshape(time, -1, len(weight))
            value = value / np.sqrt((value**2).mean(-1, keepdims=True)) * weight
            parts[k] = rotated(value.reshape(time, -1, SIZE))
        v = parts["v"].reshape(time, GROUPS, SIZE)
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // GROUPS)
            scores = parts["q"][:, h] @ parts["k"][:, g].T / np.sqrt(SIZE)
            scores = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(time)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, g])
        x = x + 0.1 * np.concatenate(heads, -1) @ p[at + "o_proj.weight"].T
        gate = x @ p[mlp + "gate_proj.weight"].T
        hidden = gate * (1 + np.tanh(gate / 2)) / 2 * (x @ p[mlp + "up_proj.weight"].T)
        x = x + 0.1 * hidden @ p[mlp + "down_proj.weight"].T
    return x


@pytest.mark.parametrize("norms", ["head", "full"])
def test_a_random_permutation_is_undone_exactly(tmp_path, tools, rng, norms):
    a = make(rng, norms)
    b = shuffle(rng, a)
    x = rng.standard_normal((7, WIDTH))
    np.testing.assert_allclose(forward(b, x), forward(a, x), rtol=1e-9)  # the shuffle is one
    changed = [name for name in a if (a[name] != b[name]).any()]
    assert len(changed) >= 2 * 10
    paths = [
        str(tools.write_model(tmp_path / name, tensors, config=CONFIG))
        for name, tensors in (("a", a), ("b", b))
    ]
    found = align(*paths, tmp_path / "out", say=lambda _: None)
    result = tools.read_output(tmp_path / "out")
    assert set(result) == set(a)
    for name, value in a.items():
        np.testing.assert_array_equal(result[name], value, err_msg=name)
    assert found.before < 0.9 and found.after == pytest.approx(1) and not found.skipped
    assert (tmp_path / "out" / "config.json").is_file()


def test_other_models_keep_their_function_and_come_closer(memory_store, rng):
    a, b = make(rng), make(rng)
    found = match(memory_store("a", a, CONFIG), memory_store("b", b, CONFIG))
    aligned = {
        name: value.take(found.orders[name][1], found.orders[name][0])
        if name in found.orders
        else value
        for name, value in b.items()
    }
    x = rng.standard_normal((7, WIDTH))
    np.testing.assert_allclose(forward(aligned, x), forward(b, x), rtol=1e-9)
    assert any((aligned[name] != b[name]).any() for name in b)
    names = [name for name in found.orders if b[name].ndim == 2]
    flat = [np.concatenate([t[n].ravel() for n in names]).astype(float) for t in (a, b, aligned)]
    cosines = [flat[0] @ t / np.linalg.norm(flat[0]) / np.linalg.norm(t) for t in flat]
    assert found.before == pytest.approx(cosines[1], abs=1e-6)
    assert found.after == pytest.approx(cosines[2], abs=1e-6)
    assert found.after > found.before + 0.05
    again = match(memory_store("a", a, CONFIG), memory_store("b", aligned, CONFIG))
    assert again.after >= found.after - 1e-9


def test_noise_does_not_hide_the_permutation(memory_store, rng):
    a = make(rng)
    b = shuffle(rng, {n: v + 0.1 * rng.standard_normal(v.shape) for n, v in a.items()})
    found = match(memory_store("a", a, CONFIG), memory_store("b", b, CONFIG))
    errors = [
        np.square(a[n] - b[n].take(order, axis)).mean() for n, (axis, order) in found.orders.items()
    ]
    assert max(errors) < 0.03  # 0.01 from the noise; other units would give 0.18


def test_experts_and_plain_mlps(memory_store, rng):
    shapes = {
        "h.0.block_sparse_moe.gate.weight": (2, 6),
        **{f"h.0.block_sparse_moe.experts.{e}.w{n}.weight": (9, 6) for e in (0, 1) for n in (1, 3)},
        **{f"h.0.block_sparse_moe.experts.{e}.w2.weight": (6, 9) for e in (0, 1)},
        "h.1.mlp.fc1.weight": (9, 6),
        "h.1.mlp.fc1.bias": (9,),
        "h.1.mlp.fc2.weight": (6, 9),
        "h.1.mlp.fc2.bias": (6,),
    }
    a = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    b = dict(a)
    for prefix, ins, out in [
        ("h.0.block_sparse_moe.experts.0.", ["w1.weight", "w3.weight"], "w2.weight"),
        ("h.0.block_sparse_moe.experts.1.", ["w1.weight", "w3.weight"], "w2.weight"),
        ("h.1.mlp.", ["fc1.weight", "fc1.bias"], "fc2.weight"),
    ]:
        order = rng.permutation(9)
        b |= {prefix + name: a[prefix + name][order] for name in ins}
        b[prefix + out] = a[prefix + out][:, order]
    found = match(memory_store("a", a), memory_store("b", b))
    for name, (axis, order) in found.orders.items():
        np.testing.assert_array_equal(b[name].take(order, axis), a[name])
    changed = {name for name in a if (a[name] != b[name]).any()}
    assert changed <= set(found.orders) and len(changed) == 9


def test_what_is_not_known_is_left_alone_and_named(memory_store, tmp_path, tools, rng):
    a = make(rng)
    extra = {"model.layers.1.self_attn.sinks": np.ones(HEADS, np.float32)}
    extra["model.layers.0.mlp.sub_norm.weight"] = np.ones(FF, np.float32)
    found = match(memory_store("a", a | extra, CONFIG), memory_store("b", a | extra, CONFIG))
    assert {text.split(":")[0] for text in found.skipped} == {
        "model.layers.1.self_attn",
        "model.layers.0.mlp",
    }
    assert {name.split(".")[2:4][0] + name.split(".")[3] for name in found.orders} == {
        "0self_attn",
        "1mlp",
    }
    wrong = CONFIG | {"head_dim": 16}
    found = match(memory_store("a", a, wrong), memory_store("b", a, wrong))
    assert not any("self_attn" in name for name in found.orders)
    fused = {"h.0.attn.c_attn.weight": a["model.norm.weight"][None]}
    for first, second, words in [
        (fused, fused, "nothing in a can be permuted"),
        (a, {}, "b lacks model.embed"),
        (a, a | {"model.norm.weight": np.ones(3, np.float32)}, r"is \[24\] and \[3\]"),
    ]:
        with pytest.raises(MergeError, match=words):
            match(memory_store("a", first, CONFIG), memory_store("b", second, CONFIG))
    folder = str(tools.write_model(tmp_path / "a", a, config=CONFIG))
    open_store(folder)
    with pytest.raises(MergeError, match="not empty"):
        align(folder, folder, tmp_path / "a")
