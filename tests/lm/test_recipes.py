import shlex

import jax
import numpy as np
import pytest

import lm.recipes as recipes
from lm.cli.args import parse_run
from lm.config import ConfigError, ModelConfig
from lm.train.flops import model_flops_per_token, parameter_count, utilization


@pytest.mark.parametrize(
    "name,published",
    [
        # Sums of the safetensors shapes on the model pages of the Hugging Face Hub.
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("qwen3_0_6b", 596_049_920),
    ],
)
def test_recipes_have_the_published_parameter_counts(name, published):
    assert parameter_count(recipes.get(name).model) == published


def test_gpt2_recipe_is_gpt2_small_without_positions_and_biases():
    gpt2 = 124_439_808  # GPT-2 small; 50,257 tokens, learned positions, biases, LayerNorm
    positions, biases = 1024 * 768, 12 * (3 * 768 + 768 + 3072 + 768)
    layer_norm_shifts = 25 * 768
    padding = (50_304 - 50_257) * 768
    expected = gpt2 - positions - biases - layer_norm_shifts + padding
    assert parameter_count(recipes.get("gpt2_124m").model) == expected


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_consistent(name):
    config = recipes.get(name)
    assert config.recipe == name
    assert config.sequence_length <= config.model.max_context
    rows = config.batch_size // config.micro_batches
    assert rows % (config.mesh.fsdp * config.mesh.tensor) == 0


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_first_docstring_line_is_the_command(name):
    doc = recipes.RECIPES[name].__doc__.splitlines()
    python, script, *words = shlex.split(doc[0])
    assert (python, script) == ("python", "scripts/train.py")
    assert parse_run(words) == recipes.get(name)
    assert "Hardware:" in "".join(doc) and "Result:" in "".join(doc)
    assert doc[0] in recipes.listing()


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean llama3_8b.*tiny"):
        recipes.get("llama3-8b")


SHAPES = [
    dict(),
    dict(tie_embeddings=True, num_kv_heads=2),
    dict(mlp="gelu", mlp_bias=True, attention_out_bias=True),
    dict(qkv_bias=True, qk_norm=True, head_dim=16, num_kv_heads=1, mlp_bias=True),
]


@pytest.mark.parametrize("changes", SHAPES)
def test_parameter_count_is_that_of_the_model(changes):
    lm = pytest.importorskip("lm.model")
    config = ModelConfig(
        **dict(vocab_size=96, num_layers=2, d_model=32, num_heads=4, d_ff=48) | changes
    )
    shapes = jax.eval_shape(lambda: lm.init(config, jax.random.key(0)))
    assert parameter_count(config) == sum(np.prod(s.shape) for s in jax.tree.leaves(shapes))


def counted_flops(config, length, causal):
    """Multiply-adds times 2, one query and one matrix at a time, forward times 3."""
    d, h, kv, dh = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
    matrices = [(d, h * dh), (d, kv * dh), (d, kv * dh), (h * dh, d)]
    matrices += [(d, config.d_ff)] * (3 if config.mlp == "swiglu" else 2)
    total = 0
    for t in range(length):
        total += 2 * d * config.vocab_size
        for layer in range(config.num_layers):
            total += sum(2 * a * b for a, b in matrices)
            window = config.windows[layer % len(config.windows)]
            keys = [s for s in range(length) if not causal or (s <= t)]
            if causal and window is not None:
                keys = [s for s in keys if s > t - window]
            total += len(keys) * h * (2 * dh + 2 * dh)  # scores, then weighted values
    return 3 * total / length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(mlp="gelu", tie_embeddings=True, num_kv_heads=1),
        dict(sliding_window=5),
        dict(sliding_window=5, attention_pattern=("sliding", "sliding", "full"), num_layers=7),
        dict(sliding_window=500),
    ],
)
def test_flops_equal_a_count_by_hand(changes, causal):
    config = ModelConfig(
        **dict(vocab_size=96, num_layers=2, d_model=32, num_heads=4, d_ff=48) | changes
    )
    got = model_flops_per_token(config, 17, causal)
    assert got == pytest.approx(counted_flops(config, 17, causal), rel=1e-12)


def test_utilization_reproduces_a_published_figure():
    """modded-nanogpt track 3: 489.7k tokens/s on one H200 is 42 % with the full square counted."""
    flops = model_flops_per_token(recipes.get("gpt2_124m").model, 1024, causal=False)
    assert utilization(flops, 489_700, 1, 989.4e12) == pytest.approx(0.42, abs=0.005)
    assert utilization(flops, 2 * 489_700, 2, 989.4e12) == utilization(flops, 489_700, 1, 989.4e12)


def test_unknown_peak_or_layer_gives_no_utilization():
    experts = ModelConfig(mlp="experts")
    assert model_flops_per_token(experts, 16, causal=True) is None
    assert utilization(None, 1.0, 1, 1e12) is None and utilization(1.0, 1.0, 1, None) is None
    with pytest.raises(ConfigError, match="experts"):
        parameter_count(experts)
