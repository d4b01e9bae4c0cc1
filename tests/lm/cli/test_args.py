import dataclasses
import functools
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lm.recipes as recipes
from lm.cli.args import parse_run, run_flags
from lm.config import ConfigError, ModelConfig, RopeScaling
from lm.train.config import DataConfig, EvalConfig, LogConfig, MeshConfig, OptimConfig, RunConfig
from lm.train.config_io import ADDED, config_from_dict, config_to_dict, flatten


def refusal(capsys, *words):
    """What is printed for words that must be refused: one line, exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        parse_run(words)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert err.count("\n") == 1 and ": error: " in err
    return err


def test_no_words_are_the_tiny_recipe():
    assert parse_run([]) == recipes.get("tiny")


def test_recipe_and_nested_flags():
    config = parse_run(
        ["qwen3_0_6b", "--steps", "7", "--optim.learning-rate=1e-3", "--mesh.fsdp", "4", "--resume"]
    )
    expected = recipes.get("qwen3_0_6b")
    assert config == dataclasses.replace(
        expected,
        steps=7,
        resume=True,
        mesh=MeshConfig(fsdp=4),
        optim=dataclasses.replace(expected.optim, learning_rate=1e-3, warmup_steps=1),
    )


def test_contract_flags():
    words = "--out o --steps 60 --seed 3 --no-resume --batch-size 4 --sequence-length 32 "
    words += "--data.source text --data.path p --optim.name muon --optim.learning-rate 0.1 "
    words += "--quant.recipe none --mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2"
    config = parse_run(words.split())
    assert (config.out, config.steps, config.seed, config.resume) == ("o", 60, 3, False)
    assert (config.batch_size, config.sequence_length) == (4, 32)
    assert (config.data.source, config.data.path, config.optim.name) == ("text", "p", "muon")
    assert config.optim.learning_rate == 0.1 and config.quant.recipe == "none"
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (2, 2, 2)


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_dashes_and_underscores(flag):
    assert parse_run([flag, "8"]).batch_size == 8


def test_none_and_tuples():
    words = ["--data.max-documents", "None", "--model.sliding-window", "8"]
    words += ["--model.attention-pattern", "sliding", "full"]
    config = parse_run(words)
    assert config.data.max_documents is None
    assert config.model.attention_pattern == ("sliding", "full")


def test_switches():
    assert parse_run(["--log.no-progress"]).log.progress is False
    assert parse_run(["--model.qk-norm"]).model.qk_norm is True
    assert parse_run(["--resume", "--no-resume"]).resume is False


def test_derived_widths_follow_the_heads():
    wide = ["tiny", "--model.d-model", "256", "--model.num-heads", "8"]
    model = parse_run(wide).model
    assert (model.head_dim, model.num_kv_heads) == (32, 8)
    model = parse_run([*wide, "--model.head-dim", "64"]).model
    assert (model.head_dim, model.num_kv_heads) == (64, 8)
    model = parse_run(["qwen3_0_6b", "--model.num-heads", "8"]).model  # the recipe chose these
    assert (model.head_dim, model.num_kv_heads) == (128, 8)


def test_warmup_shrinks_with_steps_unless_given():
    tiny = recipes.get("tiny")
    share = tiny.optim.warmup_steps / tiny.steps
    assert parse_run(["--steps", "60"]).optim.warmup_steps == round(share * 60)
    assert parse_run(["--steps", "1"]).optim.warmup_steps == 1
    assert parse_run(["--steps", "60000"]).optim.warmup_steps == tiny.optim.warmup_steps
    kept = parse_run(["--steps", "60", "--optim.warmup_steps", "44"])
    assert kept.optim.warmup_steps == 44


def test_rope_scaling_can_be_added_and_removed():
    model = parse_run(["tiny", "--model.rope-scaling.kind", "yarn"]).model
    assert model.rope_scaling == RopeScaling(kind="yarn")
    assert parse_run(["llama3_1b", "--model.rope-scaling", "None"]).model.rope_scaling is None
    model = parse_run(["llama3_1b", "--model.rope-scaling.factor", "4"]).model
    assert model.rope_scaling.factor == 4 and model.rope_scaling.original_context == 8192


@pytest.mark.parametrize(
    "words,parts",
    [
        ("tinny", ["'tinny'", "did you mean tiny", "llama3_8b"]),
        ("--stepz 5", ["--stepz", "did you mean --steps?"]),
        ("--dmodel 5", ["did you mean --model.d-model?"]),
        ("--learning-rate 1", ["did you mean --optim.learning-rate?"]),
        ("--every 1", ["--log.every", "--eval.every", "--checkpoint.every"]),
        ("--log.no-progres", ["did you mean --log.no-progress?"]),
        ("--xyzzyx 1", ["--xyzzyx", "--help"]),
        ("--batch-size -3", ["--batch-size must be above 0", "-3"]),
        ("--batch-size abc", ["--batch-size", "INT", "'abc'"]),
        ("--steps 1e3", ["--steps", "'1e3'"]),
        ("--steps", ["--steps needs a value"]),
        ("--model.d-model 250 --model.num-heads 4", ["250", "num_heads (4)"]),
        ("--optim.learning-rate nan", ["--optim.learning-rate", "nan"]),
        ("--optim.schedule cosin", ["wsd", "'cosin'", "did you mean cosine?"]),
        ("--data.source text", ["data.path"]),
        ("--batch-size 3 --micro-batches 2", ["multiple of micro_batches"]),
        ("--resume True", ["'True'", "without a value"]),
        ("--steps 5 tiny", ["'tiny'", "first word"]),
        ("tiny --recipe gpt2_124m", ["two recipes"]),
        ("--recipe", ["unknown recipe ''"]),
        ("--model.rope-scaling 4", ["only None"]),
        ("-x", ["'-x'"]),
    ],
)
def test_hostile_words_are_refused_in_one_line(capsys, words, parts):
    err = refusal(capsys, *words.split())
    for part in parts:
        assert part in err


def test_recipe_flag_is_the_first_word_by_another_name():
    assert parse_run(["--recipe", "gpt2_124m", "--seed", "1"]).model.num_layers == 12
    assert parse_run(["--seed=1", "--recipe=gpt2_124m"]).seed == 1


def test_help_is_grouped_documented_and_quick():
    """In a fresh process: it must not pay for JAX."""
    code = (
        "import sys; sys.argv[0] = 'train.py'\n"
        "from lm.cli.args import parse_run\n"
        "try: parse_run(['gpt2_124m', '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'jax', 'flax', 'optax', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("train.py gpt2_124m", "model options", "--optim.learning-rate FLOAT", "50304"):
        assert part in done.stdout
    assert "Sequences per step over all devices." in done.stdout and "--list-recipes" in done.stdout


def test_list_recipes(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_run(["--list-recipes"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in recipes.RECIPES) and "python scripts/train.py tiny" in out


names = st.text("abc /=-'\"é", min_size=0, max_size=8).filter(lambda s: s != "None")
positive = st.floats(1e-6, 1e6)
scalings = st.none() | st.builds(
    RopeScaling,
    kind=st.sampled_from(["linear", "llama3", "yarn"]),
    factor=positive,
    attention_factor=st.none() | positive,
)


@st.composite
def configs(draw):
    base = recipes.get(draw(st.sampled_from(list(recipes.RECIPES))))
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    window = draw(st.none() | st.integers(1, 99))
    pattern = st.lists(st.sampled_from(["full", "sliding"] if window else ["full"]), max_size=3)
    steps = draw(st.sampled_from([base.steps, 1, 1000]))
    micro = draw(st.integers(1, 3))
    return dataclasses.replace(
        base,
        steps=steps,
        out=draw(names),
        resume=draw(st.booleans()),
        batch_size=micro * draw(st.integers(1, 9)),
        micro_batches=micro,
        sample_prompt=draw(names),
        model=dataclasses.replace(
            base.model,
            num_heads=heads,
            num_kv_heads=draw(st.sampled_from([1, heads])),
            head_dim=draw(st.sampled_from([2, 64, base.model.head_dim])),
            qk_norm=draw(st.booleans()),
            rope_scaling=draw(scalings),
            sliding_window=window,
            attention_pattern=tuple(draw(pattern)),
            logit_soft_cap=draw(st.none() | positive),
            norm_eps=draw(positive),
        ),
        data=DataConfig(source="text", path="x" + draw(names), streaming=draw(st.booleans())),
        optim=OptimConfig(
            learning_rate=draw(positive),
            warmup_steps=draw(st.sampled_from([0, 1, min(steps, base.optim.warmup_steps)])),
            clip=draw(st.sampled_from([0.0, 1.0])),
        ),
        mesh=MeshConfig(data=draw(st.sampled_from([-1, 1, 3]))),
        eval=EvalConfig(every=draw(st.integers(1, 9))),
        log=LogConfig(progress=draw(st.booleans())),
    )


@settings(max_examples=100, deadline=None)
@given(configs())
def test_config_json_round_trip(config):
    text = json.dumps(config_to_dict(config), allow_nan=False)
    back = config_from_dict(json.loads(text))
    assert back == config and hash(back) == hash(config)


@settings(max_examples=20, deadline=None)
@given(configs())
def test_flags_round_trip(config):
    assert parse_run(run_flags(config)) == config


def test_flags_hold_only_differences():
    assert run_flags(recipes.get("tiny")) == ["tiny"]
    config = parse_run(["llama3_1b", "--steps", "10", "--model.num-heads", "64"])
    assert run_flags(config) == ["llama3_1b", "--steps=10", "--model.num-heads=64"]


def test_every_field_is_written():
    written = config_to_dict(RunConfig())
    assert set(written) == {f.name for f in dataclasses.fields(RunConfig)}
    assert set(written["model"]) == {f.name for f in dataclasses.fields(ModelConfig)}
    assert flatten(RunConfig())["optim.beta1"] == RunConfig().optim.beta1


def test_folders_of_earlier_versions_are_read_with_what_they_did():
    config = recipes.get("tiny")
    scaled = dataclasses.replace(config.model, rope_scaling=RopeScaling(kind="linear", factor=2.0))
    config = dataclasses.replace(config, model=scaled)
    values = config_to_dict(config)
    for path, names in sorted(ADDED.items(), key=lambda item: -len(item[0])):  # inner ones first
        group = functools.reduce(dict.__getitem__, path.split("."), values) if path else values
        for name in names:
            del group[name]
    assert config_from_dict(values) == config


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda d: d.pop("seed"), "missing key seed"),
        (lambda d: d["optim"].pop("eps"), r"missing key optim\.eps"),
        (lambda d: d.update(sed=1), r"unknown key sed \(did you mean seed\?\)"),
        (lambda d: d["model"].update(d_modle=1), r"unknown key model\.d_modle.*model\.d_model"),
        (lambda d: d.update(steps="5"), "steps must be int, got '5'"),
        (lambda d: d.update(steps=True), "steps must be int, got True"),
        (lambda d: d.update(resume=1), "resume must be bool"),
        (lambda d: d["optim"].update(clip=True), r"optim\.clip must be float, got True"),
        (lambda d: d["optim"].update(schedule="sine"), r"optim\.schedule must be"),
        (lambda d: d["model"].update(attention_pattern="full"), r"model\.attention_pattern"),
        (lambda d: d.update(model=3), "model must be an object"),
        (lambda d: d.update(batch_size=-1), "batch_size must be above 0"),
    ],
)
def test_config_json_is_read_strictly(change, message):
    values = config_to_dict(RunConfig())
    change(values)
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_all_problems_of_a_config_json_are_named():
    values = config_to_dict(RunConfig())
    del values["seed"]
    values["extra"] = 1
    with pytest.raises(ConfigError, match="extra.*seed"):
        config_from_dict(values)
