"""Mixtures of experts out of dense models."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.merging.router import normal
from lm.merging.types import MergeError
from lm.merging.upcycle import upcycle
from lm.merging.upcycle_config import load_moe_config, parse_moe_config

WORDS = ["<unk>", "code", "math", "write", "prove", "story"]
WIDTH, FF, LAYERS = 32, 48, 2


@pytest.fixture
def models(tmp_path, tools, rng):
    """Three small models with a word tokenizer: their folder, tensors, and a way to make more."""

    def make(name, tensors=None, model_type="llama", change=None):
        if tensors is None:
            tensors = tools.llama_tensors(rng, np.float32, LAYERS, WIDTH, ff=FF)
        folder = tools.write_model(tmp_path / name, change(tensors) if change else tensors)
        config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))
        vocab = {word: index for index, word in enumerate(WORDS)}
        content = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return tensors

    make.tensors = {name: make(name) for name in ("base", "coder", "prover")}
    make.folder = tmp_path
    return make


def config_of(models, **changes):
    value = {
        "base_model": str(models.folder / "base"),
        "gate_mode": "cheap_embed",
        "experts": [
            {
                "source_model": str(models.folder / "coder"),
                "positive_prompts": ["write code", "code"],
                "negative_prompts": ["story"],
            },
            {"source_model": str(models.folder / "prover"), "positive_prompts": ["prove math"]},
        ],
    }
    return parse_moe_config(value | changes)


def made(models, tools, said=None, **changes):
    out = models.folder / f"moe{len(list(models.folder.iterdir()))}"
    upcycle(config_of(models, **changes), out, say=[].append if said is None else said.append)
    return tools.read_output(out), json.loads((out / "config.json").read_text()), out


def test_mixtral_tensors_and_config(models, tools):
    tensors, config, out = made(models, tools)
    base, coder, prover = (models.tensors[name] for name in ("base", "coder", "prover"))
    expected = {name: value for name, value in base.items() if ".mlp." not in name}
    embedding = base["model.embed_tokens.weight"].astype(np.float64)
    word = dict(zip(WORDS, embedding, strict=False))
    gates = [
        (word["write"] + word["code"] + word["code"]) / 2 - word["story"],
        word["prove"] + word["math"],
    ]
    for layer in range(LAYERS):
        before, after = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        for number, expert in enumerate((coder, prover)):
            for name, other in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                source = expert[f"{before}{name}.weight"]
                expected[f"{after}experts.{number}.{other}.weight"] = source
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors.pop(name), value, err_msg=name)
    for layer in range(LAYERS):
        rows = tensors.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
        for row, gate in zip(rows, gates, strict=True):
            np.testing.assert_allclose(row, gate / np.linalg.norm(gate), rtol=1e-5, atol=1e-6)
    assert not tensors
    assert config["architectures"] == ["MixtralForCausalLM"] and config["model_type"] == "mixtral"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert config["intermediate_size"] == FF and config["num_hidden_layers"] == LAYERS
    assert (out / "tokenizer.json").is_file()


def swiglu(x, gate, up, down):
    h = x @ gate.T
    return (h / (1 + np.exp(-h)) * (x @ up.T)) @ down.T


def test_equal_experts_compute_what_the_dense_model_does(models, tools, rng):
    """A NumPy mixture with the weights of the chosen experts normalized, as all layouts have it."""
    expert = {"source_model": str(models.folder / "base"), "positive_prompts": ["code"]}
    experts = [expert, expert | {"positive_prompts": ["math"]}, expert]
    tensors, config, _ = made(models, tools, experts=experts)
    x = rng.standard_normal((5, WIDTH))
    prefix = "model.layers.1.block_sparse_moe."
    scores = np.exp(x @ tensors[prefix + "gate.weight"].T.astype(float))
    result = np.zeros_like(x)
    for row, score in enumerate(scores):
        chosen = np.argsort(-score)[: config["num_experts_per_tok"]]
        for k in chosen:
            parts = [tensors[f"{prefix}experts.{k}.w{n}.weight"] for n in (1, 3, 2)]
            result[row] += score[k] / score[chosen].sum() * swiglu(x[row], *parts)
    names = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    dense = swiglu(x, *(models.tensors["base"][name] for name in names))
    np.testing.assert_allclose(result, dense, rtol=1e-9)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "deepseek"])
def test_other_layouts(models, tools, rng, kind):
    def change(tensors):
        extra = {}
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}.self_attn."
            if kind == "qwen2":
                for name in "qkv":
                    extra[f"{prefix}{name}_proj.bias"] = rng.standard_normal(WIDTH, np.float32)
            if kind == "qwen3":
                for name in "qk":
                    extra[f"{prefix}{name}_norm.weight"] = np.ones(8, np.float32)
        models.tensors["based"] = tensors | extra
        return tensors | extra

    models("based", model_type="llama" if kind == "deepseek" else kind, change=change)
    shared = {
        "source_model": str(models.folder / "coder"),
        "positive_prompts": ["write"],
        "residual_scale": 0.5,
    }
    changes = {"base_model": str(models.folder / "based")}
    changes |= {} if kind == "qwen3" else {"shared_experts": [shared]}
    tensors, config, _ = made(models, tools, experts_per_token=1, **changes)
    for name, value in models.tensors["based"].items():
        if ".mlp." not in name:
            np.testing.assert_array_equal(tensors[name], value)
    prefix = "model.layers.1.mlp."
    for name in ("gate_proj", "up_proj", "down_proj"):
        source = models.tensors["prover"][f"{prefix}{name}.weight"]
        np.testing.assert_array_equal(tensors[f"{prefix}experts.1.{name}.weight"], source)
    assert tensors[prefix + "gate.weight"].shape == (2, WIDTH)
    assert config["norm_topk_prob"] is True and config["num_experts_per_tok"] == 1
    down = 0.5 * models.tensors["coder"][prefix + "down_proj.weight"]
    if kind == "qwen2":
        np.testing.assert_array_equal(tensors[prefix + "shared_expert.down_proj.weight"], down)
        word = models.tensors["based"]["model.embed_tokens.weight"][WORDS.index("write")]
        gate = tensors[prefix + "shared_expert_gate.weight"]
        np.testing.assert_allclose(gate, word[None] / np.linalg.norm(word), rtol=1e-5)
        assert config["architectures"] == ["Qwen2MoeForCausalLM"]
        assert config["shared_expert_intermediate_size"] == FF and config["num_experts"] == 2
    elif kind == "qwen3":
        assert config["architectures"] == ["Qwen3MoeForCausalLM"]
        assert config["moe_intermediate_size"] == FF and config["decoder_sparse_step"] == 1
    else:
        np.testing.assert_array_equal(tensors[prefix + "shared_experts.down_proj.weight"], down)
        assert not any("shared_expert_gate" in name for name in tensors)
        assert (config["n_routed_experts"], config["n_shared_experts"]) == (2, 1)
        assert config["model_type"] == "deepseek" and config["first_k_dense_replace"] == 0


def test_scales_noise_and_dtype(models, tools):
    coder = {"source_model": str(models.folder / "coder")}
    experts = [coder | {"residual_scale": 0.25}, coder | {"noise_scale": 0.1}]
    tensors, config, _ = made(models, tools, experts=experts, gate_mode="random", dtype="bfloat16")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert config["torch_dtype"] == "bfloat16"
    source, prefix = models.tensors["coder"], "model.layers.0."
    for name, other, scale in (("gate", "w1", 1), ("up", "w3", 1), ("down", "w2", 0.25)):
        value = source[f"{prefix}mlp.{name}_proj.weight"]
        got = tensors[f"{prefix}block_sparse_moe.experts.0.{other}.weight"]
        np.testing.assert_array_equal(got, (value * np.float32(scale)).astype(got.dtype))
        noisy = tensors[f"{prefix}block_sparse_moe.experts.1.{other}.weight"]
        noise = noisy.astype(np.float64) - value
        assert noise.std() == pytest.approx(0.1, rel=0.1) and abs(noise.mean()) < 0.02
    noises = [
        tensors[f"model.layers.{n}.block_sparse_moe.experts.1.w1.weight"].astype(float)
        - source[f"model.layers.{n}.mlp.gate_proj.weight"]
        for n in (0, 1)
    ]
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.1


def test_random_routers(models, tools):
    tensors, _, _ = made(models, tools, gate_mode="random")
    again, _, _ = made(models, tools, gate_mode="random")
    uniforms, _, _ = made(models, tools, gate_mode="uniform_random")
    names = [f"model.layers.{n}.block_sparse_moe.gate.weight" for n in range(LAYERS)]
    assert (tensors[names[0]] != tensors[names[1]]).all()
    np.testing.assert_array_equal(tensors[names[0]], again[names[0]])
    values = np.stack([tensors[name] for name in names])
    assert 0.8 < values.std() < 1.2
    values = np.abs([uniforms[name] for name in names])
    assert 0.8 < values.max() * np.sqrt(WIDTH) <= 1
    numbers = normal(0, "x", 0, 200_000)
    assert abs(numbers.mean()) < 0.01 and abs(numbers.std() - 1) < 0.01
    assert abs((numbers**4).mean() - 3) < 0.1
    np.testing.assert_array_equal(normal(0, "x", 1000, 50), numbers[1000:1050])


def test_prompts_that_are_alike_are_warned_of(models, tools):
    said = []
    made(models, tools, said)
    assert not any("condition number" in line for line in said)
    expert = {"source_model": str(models.folder / "coder"), "positive_prompts": ["code"]}
    made(models, tools, said, experts=[expert, expert])
    assert sum("condition number" in line for line in said) == 1


def test_what_cannot_work(models, tools, rng):
    coder = {"source_model": str(models.folder / "coder")}
    prompted = coder | {"positive_prompts": ["code"]}
    for changes, words in [
        ({"gate_mode": "hidden"}, "cheap_embed.*random"),
        ({"gate_mode": None}, "the default.*cheap_embed"),
        ({"gate_mode": "hidden_avg"}, "hidden states"),
        ({"gate_mode": "cheap"}, "did you mean 'cheap_embed'"),
        ({"experts": [coder, coder]}, r"experts\[0\]: positive_prompts is missing"),
        ({"experts": [prompted]}, "at least 2"),
        ({"experts": [prompted, prompted | {"nois_scale": 1}]}, "did you mean 'noise_scale'"),
        ({"experts": [prompted, prompted | {"noise_scale": -1}]}, "negative"),
        ({"experts_per_token": 3}, "from 1 to 2"),
        ({"dtype": "int4"}, "unknown type"),
        ({"architecture": "mixtrel"}, "did you mean 'mixtral'"),
        ({"archtecture": "mixtral"}, "did you mean 'architecture'"),
    ]:
        with pytest.raises(MergeError, match=words):
            config_of(models, **changes)
    wide = tools.llama_tensors(rng, np.float32, LAYERS, WIDTH, ff=FF + 2)
    models("wide", wide)
    models("gemma", model_type="gemma2")
    other = {"source_model": str(models.folder / "wide"), "positive_prompts": ["math"]}
    empty = prompted | {"negative_prompts": ["code"]}
    for changes, words in [
        ({"experts": [prompted, other]}, r"\[50, 32\], not \[48, 32\]"),
        ({"experts": [prompted, empty]}, "row of zeros"),
        ({"architecture": "qwen3_moe"}, "qwen3_moe takes base models of type qwen3, not llama"),
        ({"base_model": str(models.folder / "gemma")}, "is of type gemma2"),
        ({"shared_experts": [coder, coder]}, "one shared expert, got 2"),
        ({"shared_experts": [coder], "architecture": "mixtral"}, "no shared experts"),
        ({"base_model": str(models.folder / "nowhere")}, "no model at"),
    ]:
        with pytest.raises(MergeError, match=words):
            upcycle(config_of(models, **changes), models.folder / "out")
    assert not (models.folder / "out").exists()
    (models.folder / "base" / "tokenizer.json").unlink()
    with pytest.raises(MergeError, match=r"cheap_embed needs .*tokenizer.json"):
        upcycle(config_of(models), models.folder / "out")
    path = models.folder / "x.yml"
    path.write_text("base_model: [")
    with pytest.raises(MergeError, match="is not YAML"):
        load_moe_config(path)


LEAVES = st.none() | st.booleans() | st.integers(-3, 5) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["source_model", "positive_prompts", "search"]), inner)
    ),
    max_leaves=6,
)
KEYS = ["base_model", "experts", "gate_mode", "experts_per_token", "shared_experts", "dtype"]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from([*KEYS, "architecture", "other"]), VALUES) | VALUES)
def test_any_content_is_a_config_or_one_line(value):
    good = {"base_model": "x", "experts": [{"source_model": "x"}] * 2, "gate_mode": "random"}
    for data in (value, good | value if isinstance(value, dict) else value):
        try:
            parse_moe_config(data)
        except MergeError as error:
            assert "\n" not in str(error)
