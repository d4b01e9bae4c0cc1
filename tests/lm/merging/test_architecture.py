"""Layers, embeddings, heads and ties read off names and shapes."""

import numpy as np
import pytest

from lm.merging.architecture import describe, info, is_buffer, kind_of, layer_count_path, names
from lm.merging.types import MergeError

FAMILIES = {
    "llama": ("model.embed_tokens.weight", "model.layers.{}.mlp.up_proj.weight",
              "model.norm.weight", "lm_head.weight", "num_hidden_layers"),
    "gpt2": ("transformer.wte.weight", "transformer.h.{}.mlp.c_fc.weight",
             "transformer.ln_f.weight", "lm_head.weight", "n_layer"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight",
                 "gpt_neox.final_layer_norm.weight", "embed_out.weight", "num_hidden_layers"),
    "internlm2": ("model.tok_embeddings.weight", "model.layers.{}.feed_forward.w1.weight",
                  "model.norm.weight", "output.weight", "num_hidden_layers"),
    "mamba": ("backbone.embeddings.weight", "backbone.layers.{}.mixer.A_log",
              "backbone.norm_f.weight", "lm_head.weight", "num_hidden_layers"),
    "bloom": ("transformer.word_embeddings.weight", "transformer.h.{}.mlp.dense.weight",
              "transformer.ln_f.weight", "lm_head.weight", "n_layer"),
}  # fmt: skip


def zeros(**shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_families(family, memory_store):
    embedding, layer, norm, head, key = FAMILIES[family]
    shapes = {embedding: (9, 4), **{layer.format(i): (8, 4) for i in range(12)}}
    store = memory_store("m", zeros(**shapes, **{norm: (4,), head: (9, 4)}), {key: 12})
    found = describe(store)
    stack = found.stacks["default"]
    assert (stack.count, len(found.stacks)) == (12, 1)
    assert f"{stack.prefix}.11.{stack.tensors[11][0]}" == layer.format(11)
    assert (found.embedding, found.head, found.tied) == (embedding, head, False)
    assert found.vocabulary == {embedding, head}
    assert [name for name in found.loose if found.first(name)] == [embedding]
    assert kind_of(found, embedding, (9, 4)) == "embedding"
    assert kind_of(found, layer.format(0), (8, 4)) == "matrix"
    assert kind_of(found, norm, (4,)) == "vector"
    assert layer_count_path(store.config, "default", 12) == (key,)


def test_positions_are_no_vocabulary(memory_store):
    shapes = {"transformer.wte.weight": (9, 4), "transformer.wpe.weight": (9, 4)}
    shapes["transformer.h.0.ln_1.weight"] = (4,)
    found = describe(memory_store("m", zeros(**shapes), {"vocab_size": 9}))
    assert found.vocabulary == {"transformer.wte.weight"}
    assert found.first("transformer.wpe.weight")


def test_unusual_embeddings_are_told_by_their_rows(memory_store):
    shapes = {"input_table": (9, 4), "weird.layers.0.a": (4, 4), "gate": (5, 4)}
    found = describe(memory_store("m", zeros(**shapes), {"vocab_size": 9}))
    assert found.vocabulary == {"input_table"}


@pytest.mark.parametrize("case", ["absent", "flag", "shared", "untied"])
def test_ties(case, memory_store):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    shapes = {embedding: (9, 4), "model.layers.0.a.weight": (4, 4)}
    shapes |= {head: (9, 4)} if case in ("flag", "untied") else {}
    config = {"tie_word_embeddings": True} if case == "flag" else {}
    aliases = {head: embedding} if case == "shared" else {}
    store = memory_store("m", zeros(**shapes), config, aliases)
    found = describe(store)
    assert found.tied == (case != "untied")
    assert found.head == (None if case == "absent" else head)
    if case == "shared":
        assert head in names(store) and info(store, head).shape == (9, 4)


def test_several_stacks_are_modules(memory_store):
    shapes = {"language_model.model.embed_tokens.weight": (9, 4)}
    shapes |= {f"language_model.model.layers.{i}.mlp.up_proj.weight": (8, 4) for i in range(3)}
    shapes |= {f"vision_tower.vision_model.encoder.layers.{i}.fc.weight": (4, 4) for i in range(2)}
    shapes |= {"vision_tower.vision_model.embeddings.patch_embedding.weight": (4, 4)}
    shapes |= {
        "multi_modal_projector.linear.weight": (4, 4),
        "language_model.lm_head.weight": (9, 4),
    }
    config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2}}
    found = describe(memory_store("m", zeros(**shapes), config))
    counts = {name: stack.count for name, stack in found.stacks.items()}
    assert counts == {"text_decoder": 3, "vision_tower": 2}
    owners = set(found.loose.values())
    assert owners == {"text_decoder", "vision_tower", "multi_modal_projector"}
    text = layer_count_path(config, "text_decoder", 3)
    assert text == ("text_config", "num_hidden_layers")
    assert layer_count_path(config, "vision_tower", 2) == ("vision_config", "num_hidden_layers")
    assert layer_count_path(config, "text_decoder", 7) is None


def test_experts_stay_inside_their_layer(memory_store):
    shapes = {f"model.layers.{i}.mlp.experts.{e}.up.weight": (4, 4) for i in (0, 1) for e in (0, 1)}
    stack = describe(memory_store("m", zeros(**shapes))).stacks["default"]
    assert stack.tensors[1] == ("mlp.experts.0.up.weight", "mlp.experts.1.up.weight")


def test_small_module_lists_are_no_layers(memory_store):
    shapes = {"visual.merger.mlp.0.weight": (4, 4), "visual.merger.mlp.2.weight": (4, 4)}
    shapes |= {"model.layers.0.a.weight": (4, 4), "model.layers.1.a.weight": (4, 4)}
    found = describe(memory_store("m", zeros(**shapes)))
    assert list(found.stacks) == ["default"]
    assert set(found.loose) == {"visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"}


def test_plain_tensors(memory_store):
    found = describe(memory_store("m", zeros(a=(3,), b=(2, 2))))
    assert not found.stacks and set(found.loose) == {"a", "b"} and not found.tied


def test_a_missing_layer_is_named(memory_store):
    shapes = {f"model.layers.{i}.a.weight": (4,) for i in (0, 1, 3)}
    with pytest.raises(MergeError, match=r"m: layers \[2\] of model.layers are missing"):
        describe(memory_store("m", zeros(**shapes)))


def test_buffers():
    assert is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_buffer("model.layers.0.self_attn.q_proj.weight")
