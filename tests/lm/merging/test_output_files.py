"""What lies beside the weights: config.json, tokenizer files, chat template, card, provenance."""

import json

import pytest
import yaml

from lm.merging.chat_templates import TEMPLATES
from lm.merging.config import parse_yaml
from lm.merging.output_config import output_config
from lm.merging.plan import make_plan
from lm.merging.types import MergeError

TEXT = """\
merge_method: linear
base_model: {0}
models: [{{model: {0}}}, {{model: {1}}}]
parameters: {{weight: 1}}
"""


@pytest.fixture
def pair(decoder, tokenizer_folder):
    """Two model folders with tokenizers of the same tokens, and their stores."""
    tokens = ["<unk>", "<s>", "</s>", "x"]
    folders = [tokenizer_folder(name, tokens, chat_template=f"{{{{ {name} }}}}") for name in "ab"]
    stores = {
        str(folder): decoder(str(folder), layers=2, rows=4, eos_token_id=2) for folder in folders
    }
    return folders, stores


def files_of(folders, stores, extra="", text=TEXT):
    plan = make_plan(parse_yaml(text.format(*folders) + extra), stores)
    return plan, dict(plan.files)


def test_files_of_the_base_are_taken(pair):
    folders, stores = pair
    (folders[0] / "generation_config.json").write_text('{"temperature": 0.5}')
    (folders[0] / "merges.txt").write_text("a b")
    (folders[0] / "model.safetensors").write_text("weights")
    (folders[1] / "special_tokens_map.json").write_text("{}")
    _, files = files_of(folders, stores)
    own = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt"}
    assert set(files) == own | {"config.json", "README.md", "merge_config.yml"}
    for name in own:
        assert files[name] == (folders[0] / name).read_bytes()


def test_card_and_provenance_keep_the_configuration_and_no_paths_above(pair):
    folders, stores = pair
    plan, files = files_of(folders, stores)
    text = TEXT.format(*folders)
    assert files["merge_config.yml"].decode() == text
    card = files["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == ["a", "b"]
    assert "`linear`" in body and f"```yaml\n{text}```" in body
    record = json.loads(plan.metadata["merge"])
    assert (record["merge_method"], record["models"]) == ("linear", ["a", "b"])
    assert (record["config"], record["fingerprint"]) == (text, plan.fingerprint)
    assert plan.metadata["format"] == "pt"
    assert all(isinstance(value, str) for value in plan.metadata.values())


def test_a_configuration_with_a_fence_stays_inside_its_block(pair):
    folders, stores = pair
    _, files = files_of(folders, stores, "# ``` a comment\n")
    assert "\n``````yaml\n" in files["README.md"].decode()


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("auto", "{{ a }}"),
        ("chatml", TEMPLATES["chatml"]),
        ('"{{ messages }}"', "{{ messages }}"),
    ],
)
def test_chat_templates(setting, wanted, pair):
    folders, stores = pair
    (folders[0] / "chat_template.jinja").write_text("{{ a }}\n")
    _, files = files_of(folders, stores, f"chat_template: {setting}\n")
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == wanted
    assert files["chat_template.jinja"].decode() == wanted


def test_auto_takes_the_commonest_template(pair, decoder, tokenizer_folder):
    folders, stores = pair
    third = tokenizer_folder("c", ["<unk>", "<s>", "</s>", "x"], chat_template="{{ b }}")
    stores[str(third)] = decoder(str(third), layers=2, rows=4)
    text = TEXT.replace("}}]", f"}}}}, {{{{model: {third}}}}}]")
    _, files = files_of(folders, stores, "chat_template: auto\n", text)
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "{{ b }}"


def test_unknown_chat_templates_are_refused(pair):
    with pytest.raises(MergeError, match="chat_template.*'chatlm'.*did you mean 'chatml'"):
        files_of(*pair, "chat_template: chatlm\n")


def test_a_changed_vocabulary_drops_files_that_repeat_the_old_one(pair, tokenizer_folder, decoder):
    folders, stores = pair
    (folders[0] / "vocab.json").write_text("{}")
    settings = {"added_tokens_decoder": {"1": {"content": "<s>"}}, "eos_token": "</s>"}
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(settings))
    other = tokenizer_folder("c", ["x", "</s>", "<s>"], ["<new>"])
    stores[str(other)] = decoder(str(other), layers=2, rows=4)
    _, files = files_of((folders[0], other), stores, "tokenizer_source: union\n")
    assert "vocab.json" not in files
    found = json.loads(files["tokenizer_config.json"])
    assert found["eos_token"] == "</s>"
    assert found["added_tokens_decoder"]["4"]["content"] == "<new>"
    same = json.loads(files_of(folders, stores)[1]["tokenizer_config.json"])
    assert same == settings


def test_special_ids_follow_their_tokens(pair, tokenizer_folder, decoder):
    folders, stores = pair
    (folders[0] / "generation_config.json").write_text('{"eos_token_id": [2, 0], "top_k": 2}')
    other = tokenizer_folder("c", ["x", "</s>", "<s>", "<unk>", "y"])
    stores[str(other)] = decoder(str(other), layers=2, rows=5)
    _, files = files_of((folders[0], other), stores, f"tokenizer_source: {other}\n")
    assert json.loads(files["config.json"])["eos_token_id"] == 1
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": [1, 3], "top_k": 2}


def configured(decoder, origins, **config):
    from lm.merging.architecture import describe

    store = decoder("a", layers=4, **config)
    options = {"dtype": None, "tied": None, "vocabulary": None}
    layers = {"default": [("a", layer) for layer in origins]}
    return output_config({"a": store.config}, "a", describe(store), layers, **options)


def test_unchanged_layers_leave_the_config_alone(decoder):
    kinds = ["x", "y", "z", "w"]
    result, warnings = configured(decoder, range(4), layer_types=kinds)
    assert result == decoder("a", layers=4, layer_types=kinds).config and not warnings


def test_kinds_that_follow_from_the_number_are_warned_about(decoder):
    result, (line,) = configured(decoder, [0, 1, 1, 2], sliding_window_pattern=2)
    assert "sliding_window_pattern" in line and result["num_hidden_layers"] == 4
    _, warnings = configured(decoder, [0, 1], sliding_window_pattern=2)
    assert not warnings


def test_an_unknown_layer_count_is_told(decoder):
    _, (line,) = configured(decoder, [0, 1], num_hidden_layers=7)
    assert "holds no number of layers equal to 4" in line
