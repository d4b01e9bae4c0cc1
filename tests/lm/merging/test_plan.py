"""Configurations and stores become jobs; what does not fit is told before any work."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.merging.config import parse_config, parse_yaml
from lm.merging.parameters import find_method
from lm.merging.plan import make_plan
from lm.merging.types import MergeError

Q = "model.layers.{}.self_attn.q_proj.weight"


def plan_of(text, stores, **options):
    return make_plan(parse_yaml(text), stores, **options)


def jobs_of(plan):
    return {job.output: job for job in plan.jobs}


def origin(plan, job):
    """(model, tensor) of a job's first source."""
    return plan.models[job.sources[0].model], job.sources[0].name


LINEAR = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}"


def test_models_give_one_job_per_tensor(decoder):
    stores = {name: decoder(name) for name in "abc"}
    plan = plan_of(
        """\
merge_method: ties
base_model: c
models:
- {model: a, parameters: {weight: 0.5, density: [1, 0.4]}}
- {model: b, parameters: {weight: 2}}
parameters: {lambda: 3}
""",
        stores,
        seed=5,
        flavor="mergekit",
    )
    assert plan.models == ("c", "a", "b") and (plan.seed, plan.flavor) == (5, "mergekit")
    assert [job.output for job in plan.jobs] == list(stores["a"].tensors)
    job = jobs_of(plan)[Q.format(1)]
    assert [plan.models[source.model] for source in job.sources] == ["a", "b"]
    assert plan.models[job.base.model] == "c" and not job.base.params
    first, second = (source.params for source in job.sources)
    assert first["weight"] == 0.5 and first["density"] == pytest.approx(1 - 0.6 / 3)
    assert second == {"weight": 2.0, "density": 1.0}
    assert job.params["lambda"] == 3 and job.params["normalize"] is True
    assert (job.kind, job.shape, job.dtype, job.transform) == ("matrix", (4, 4), "float32", None)
    kinds = {job.output: job.kind for job in plan.jobs}
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == "embedding"
    assert kinds["model.norm.weight"] == "vector"


def test_a_listed_base_is_not_a_source(decoder):
    stores = {name: decoder(name) for name in "ab"}
    text = "{merge_method: task_arithmetic, base_model: a, models: [{model: a}, {model: b}], "
    plan = plan_of(text + "parameters: {weight: 1}}", stores)
    assert all(len(job.sources) == 1 and job.base.model == 0 for job in plan.jobs)
    assert {plan.models[job.sources[0].model] for job in plan.jobs} == {"b"}


def test_the_default_reading_is_the_methods_own(decoder):
    stores = {name: decoder(name) for name in "ab"}
    text = "{merge_method: ties, base_model: a, models: [{model: b, parameters: {weight: 1}}]}"
    assert plan_of(text, stores).flavor == (find_method("ties").flavor or "mergekit")
    for flavor in ("paper", "mergekit"):
        assert plan_of(text, stores, flavor=flavor).flavor == flavor


def test_slices_renumber_layers(decoder):
    stores = {"a": decoder("a"), "b": decoder("b", layers=6)}
    plan = plan_of(
        """\
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 2], parameters: {scale: 0.5}}]
- sources: [{model: a, layer_range: [1, 4]}]
- sources: [{model: b, layer_range: [4, 6]}]
""",
        stores,
    )
    jobs = jobs_of(plan)
    expected = [("a", 0), ("a", 1), ("a", 2), ("b", 1), ("a", 1), ("a", 2), ("a", 3), ("b", 4)]
    expected += [("b", 5)]
    for number, (model, layer) in enumerate(expected):
        assert origin(plan, jobs[Q.format(number)]) == (model, Q.format(layer))
    assert Q.format(9) not in jobs
    assert origin(plan, jobs["model.embed_tokens.weight"])[0] == "a"
    assert origin(plan, jobs["model.norm.weight"])[0] == "b"
    assert origin(plan, jobs["lm_head.weight"])[0] == "b"
    assert jobs[Q.format(3)].sources[0].params["scale"] == 0.5
    assert json.loads(plan.files["config.json"])["num_hidden_layers"] == 9


def test_one_model_may_be_merged_with_itself(decoder):
    plan = plan_of(
        """\
merge_method: linear
slices: [{sources: [
  {model: a, layer_range: [0, 2], parameters: {weight: 0.25}},
  {model: a, layer_range: [2, 4], parameters: {weight: 0.75}}]}]
""",
        {"a": decoder("a")},
    )
    job = jobs_of(plan)[Q.format(1)]
    assert [source.name for source in job.sources] == [Q.format(1), Q.format(3)]
    assert [source.params["weight"] for source in job.sources] == [0.25, 0.75]


def test_qwen3_frankenmerge_keeps_layer_lists_right(decoder):
    """mergekit 0.1.5 stops here: layer_types keeps its old length."""
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    config = {"layer_types": kinds, "max_window_layers": 4, "mlp_only_layers": [3]}
    config |= {"no_rope_layers": [1, 1, 1, 0], "rope_ratios": [1, 2, 3, 4]}
    config |= {"eos_token_id": [1, 2, 3, 4], "architectures": ["Qwen3ForCausalLM"]}
    stores = {"a": decoder("a", head=False, **config), "b": decoder("b", head=False, **config)}
    plan = plan_of(
        """\
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
""",
        stores,
    )
    found = json.loads(plan.files["config.json"])
    assert found["layer_types"] == kinds[:3] + kinds[1:]
    assert found["num_hidden_layers"] == found["max_window_layers"] == 6
    assert found["mlp_only_layers"] == [5]
    assert found["no_rope_layers"] == [1, 1, 1, 1, 1, 0] and found["rope_ratios"] == [1, 2, 3, 4]
    assert found["eos_token_id"] == [1, 2, 3, 4] and found["tie_word_embeddings"] is True
    assert "lm_head.weight" not in jobs_of(plan)


def test_tied_and_untied_models_together(decoder):
    stores = {"a": decoder("a", head=False), "b": decoder("b")}
    plan = plan_of(LINEAR, stores)
    job = jobs_of(plan)["lm_head.weight"]
    assert [source.name for source in job.sources] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert json.loads(plan.files["config.json"])["tie_word_embeddings"] is False
    assert not plan.aliases


def test_a_stored_but_tied_head_is_written_once(decoder):
    stores = {name: decoder(name, tie_word_embeddings=True) for name in "ab"}
    plan = plan_of(LINEAR, stores)
    assert "lm_head.weight" not in jobs_of(plan)
    assert plan.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_shared_tensors_are_written_once(memory_store):
    arrays = {"shared.weight": np.zeros((9, 4), "f4")}
    arrays |= {
        f"{part}.block.0.layer.0.q.weight": np.zeros((4, 4), "f4")
        for part in ("encoder", "decoder")
    }
    alias = {"encoder.embed_tokens.weight": "shared.weight"}
    stores = {name: memory_store(name, arrays, {}, alias) for name in "ab"}
    plan = plan_of(LINEAR, stores)
    assert set(jobs_of(plan)) == set(arrays) and plan.aliases == alias


def test_a_bias_of_the_head_is_no_matrix_but_has_a_row_per_token(decoder, memory_store):
    stores = {"a": decoder("a"), "b": decoder("b", rows=23)}
    for store in stores.values():
        rows = store.tensors["lm_head.weight"].shape[0]
        info = type(store.tensors["lm_head.weight"])("lm_head.bias", (rows,), "float32")
        store.tensors["lm_head.bias"] = info
    with pytest.raises(MergeError, match=r"lm_head.bias: a has \[20\], b has \[23\]; the vocab"):
        plan_of(LINEAR, stores)
    del stores["b"]
    plan = plan_of("{merge_method: linear, models: [{model: a, parameters: {weight: 1}}]}", stores)
    assert jobs_of(plan)["lm_head.bias"].kind == "vector"


def test_layer_settings_come_from_the_base_also_without_differences(decoder):
    stores = {
        "a": decoder("a", layer_types=list("xxyy")),
        "b": decoder("b", layer_types=list("yyxx")),
    }
    plan = plan_of(LINEAR[:-1] + ", base_model: b}", stores)
    assert json.loads(plan.files["config.json"])["layer_types"] == list("yyxx")


def test_configs_that_read_the_weights_differently_are_told(decoder):
    stores = {"a": decoder("a", rope_theta=1e4), "b": decoder("b", rope_theta=1e6)}
    expected = "the configs of a and b differ in rope_theta 10000.0 and 1000000.0: the output has"
    assert [line for line in plan_of(LINEAR, stores).warnings if expected in line]
    stores["b"] = decoder("b", rope_theta=1e4)
    assert not plan_of(LINEAR, stores).warnings


def test_types(decoder, memory_store):
    stores = {"a": decoder("a", dtype="bfloat16"), "b": decoder("b", dtype="float16")}
    assert {job.dtype for job in plan_of(LINEAR, stores).jobs} == {"float32"}
    stores["b"] = decoder("b", dtype="bfloat16")
    plan = plan_of(LINEAR, stores)
    assert {job.dtype for job in plan.jobs} == {"bfloat16"}
    assert json.loads(plan.files["config.json"])["torch_dtype"] == "bfloat16"
    for key, wanted in (("dtype", "float16"), ("out_dtype", "float32")):
        config = parse_yaml(LINEAR[:-1] + f", {key}: {wanted}}}")
        assert {job.dtype for job in make_plan(config, stores).jobs} == {wanted}
    config = parse_yaml(LINEAR[:-1] + ", dtype: float32, out_dtype: bfloat16}")
    assert {job.dtype for job in make_plan(config, stores).jobs} == {"bfloat16"}


def test_integers_are_copied_and_buffers_may_be_missing(decoder):
    stores = {"a": decoder("a"), "b": decoder("b")}
    for store in stores.values():
        info = store.tensors["model.norm.weight"]
        store.tensors["steps"] = type(info)("steps", (1,), "int64")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    stores["a"].tensors[name] = type(info)(name, (2,), "float32")
    jobs = jobs_of(plan_of(LINEAR, stores))
    assert (jobs["steps"].method, jobs["steps"].dtype) == ("passthrough", "int64")
    assert name not in jobs


def test_all_misfits_are_told_at_once(decoder, memory_store):
    stores = {"a": decoder("a"), "b": decoder("b"), "c": decoder("c")}
    del stores["b"].tensors["model.norm.weight"]
    for name, shape in (("model.extra.weight", (3,)), (Q.format(2), (4, 8))):
        info = stores["c"].tensors[Q.format(0)]
        stores["c"].tensors[name] = type(info)(name, shape, "float32")
    text = LINEAR.replace("{model: b}", "{model: b}, {model: c}")
    with pytest.raises(MergeError) as caught:
        plan_of(text, stores)
    message = str(caught.value)
    assert "model.norm.weight: missing in b but in a, c" in message
    assert "model.extra.weight: missing in a, b but in c" in message
    assert f"{Q.format(2)}: a has [4, 4], b has [4, 4], c has [4, 8]" in message
    assert "architecture" in message and "one size" in message and "\n" not in message


def test_vocabularies_of_other_sizes_name_the_remedy(decoder):
    stores = {"a": decoder("a"), "b": decoder("b", rows=23)}
    with pytest.raises(MergeError) as caught:
        plan_of(LINEAR, stores)
    expected = "model.embed_tokens.weight: a has [20, 4], b has [23, 4]; the vocabularies differ: "
    assert expected + "align them with `tokenizer: {source: base}` or union" in str(caught.value)


SLERP = "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n"
ERRORS = [
    (SLERP.replace("base_model: a\n", "") + "models: [{model: a}]", "slerp needs base_model"),
    (SLERP + "models: [{model: a}]", "models: slerp needs 1 models besides the base, got 0"),
    (SLERP + "models: [{model: b}, {model: c}]", "slerp needs 1 models besides the base, got 2"),
    (SLERP + "models: [{model: b}, {model: d}]", "a has 4, b has 4|numbers of layers differ"),
    (
        SLERP + "slices: [{sources: [{model: b, layer_range: [0, 1]}]}]",
        "slices[0]: the base_model a is not among the sources",
    ),
    (
        SLERP + "slices: [{sources: [{model: a, layer_range: [0, 5]},"
        " {model: b, layer_range: [0, 5]}]}]",
        "slices[0].sources[0].layer_range [0, 5] goes beyond the 4 layers of a",
    ),
    (SLERP + "modules: {vision: {models: [{model: b}]}}", "no module 'vision' in a"),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]",
        "weight is missing for the model a",
    ),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors(text, message, decoder):
    stores = {name: decoder(name) for name in "abc"} | {"d": decoder("d", layers=2)}
    with pytest.raises(MergeError) as caught:
        plan_of(text, stores)
    assert any(part in str(caught.value) for part in message.split("|")), caught.value


def vision_model(memory_store, name):
    arrays = {"model.language_model.embed_tokens.weight": np.zeros((9, 4), "f4")}
    for i in range(3):
        arrays[f"model.language_model.layers.{i}.mlp.up_proj.weight"] = np.zeros((4, 4), "f4")
    for i in range(2):
        arrays[f"model.visual.blocks.{i}.attn.proj.weight"] = np.zeros((4, 4), "f4")
    arrays["model.visual.merger.norm.weight"] = np.zeros(4, "f4")
    arrays["lm_head.weight"] = np.zeros((9, 4), "f4")
    config = {"text_config": {"num_hidden_layers": 3, "vocab_size": 9}}
    return memory_store(name, arrays, config | {"vision_config": {"depth": 2}})


def test_modules(memory_store):
    stores = {name: vision_model(memory_store, name) for name in "ab"}
    text = """\
merge_method: passthrough
base_model: b
modules:
  text_decoder:
    slices:
    - sources: [{model: a, layer_range: [0, 2]}]
    - sources: [{model: a, layer_range: [1, 3]}]
"""
    plan = plan_of(text, stores)
    jobs = jobs_of(plan)
    assert origin(plan, jobs["model.language_model.layers.3.mlp.up_proj.weight"]) == (
        "a",
        "model.language_model.layers.2.mlp.up_proj.weight",
    )
    assert origin(plan, jobs["model.visual.blocks.1.attn.proj.weight"])[0] == "b"
    assert origin(plan, jobs["model.visual.merger.norm.weight"])[0] == "b"
    assert any("copied from b" in line for line in plan.warnings)
    config = json.loads(plan.files["config.json"])
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"] == {"depth": 2}
    with pytest.raises(MergeError, match="use modules with"):
        plan_of(text.replace("modules:\n  text_decoder:\n    slices", "slices"), stores)
    both = plan_of(LINEAR, stores)
    assert set(jobs_of(both)) == set(stores["a"].tensors)


def test_plain_named_tensors_work(memory_store):
    stores = {name: memory_store(name, {"x": np.zeros((3, 2), "f4")}) for name in "ab"}
    plan = plan_of(LINEAR, stores)
    assert [job.output for job in plan.jobs] == ["x"]
    assert "config.json" not in plan.files


def test_the_fingerprint_is_of_configuration_and_inputs(decoder):
    stores = {name: decoder(name) for name in "ab"}
    first = plan_of(LINEAR, stores).fingerprint
    assert plan_of(LINEAR, lambda ref: stores[ref]).fingerprint == first
    assert plan_of(LINEAR.replace("weight: 1", "weight: 2"), stores).fingerprint != first
    assert plan_of(LINEAR, stores, seed=1).fingerprint != first
    stores["b"].path = "changed"
    assert plan_of(LINEAR, stores).fingerprint != first


NUMBERS = st.floats(-1, 2) | st.booleans() | st.lists(st.floats(0, 1), min_size=1, max_size=3)
VALUES = NUMBERS | st.lists(
    st.fixed_dictionaries({"value": NUMBERS}, optional={"filter": st.sampled_from(["mlp", "*"])}),
    min_size=1,
    max_size=2,
)
KEYS = st.sampled_from(["weight", "density", "t", "lambda", "normalize", "scale", "epsilon"])
PARAMETERS = st.dictionaries(KEYS, VALUES, max_size=3)
MODELS = st.sampled_from("abcd")
RANGES = st.lists(st.integers(0, 5), min_size=2, max_size=2).map(sorted)
ENTRY = st.fixed_dictionaries({"model": MODELS, "parameters": PARAMETERS})
SOURCE = st.fixed_dictionaries(
    {"model": MODELS, "layer_range": RANGES}, optional={"parameters": PARAMETERS}
)
PIECE = st.fixed_dictionaries(
    {"sources": st.lists(SOURCE, min_size=1, max_size=2)}, optional={"parameters": PARAMETERS}
)
CONFIGS = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["linear", "ties", "slerp", "passthrough", "karcher"]),
        "parameters": PARAMETERS,
    },
    optional={"base_model": MODELS, "dtype": st.sampled_from(["float16", "float32"])},
)
PARTS = st.fixed_dictionaries({"models": st.lists(ENTRY, min_size=1, max_size=3)}) | (
    st.fixed_dictionaries({"slices": st.lists(PIECE, min_size=1, max_size=3)})
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(CONFIGS, PARTS)
def test_any_configuration_is_planned_or_one_error(decoder, config, parts):
    stores = {"a": decoder("a"), "b": decoder("b"), "c": decoder("c", head=False)}
    stores["d"] = decoder("d", layers=2, rows=21)
    with contextlib.suppress(MergeError):
        plan = make_plan(parse_config(config | parts), stores)
        outputs = [job.output for job in plan.jobs]
        assert len(outputs) == len(set(outputs)) and "config.json" in plan.files
        layers = json.loads(plan.files["config.json"])["num_hidden_layers"]
        assert Q.format(layers - 1) in outputs and Q.format(layers) not in outputs
