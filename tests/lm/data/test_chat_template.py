"""Jinja templates: their marks, what they are given, and where they are found."""

import json

import pytest

from lm.data.chat_template import ChatTemplate, load_template
from lm.data.sources import DataError
from lm.merging.chat_templates import CHATML

pytest.importorskip("jinja2")


def test_marks_move_with_what_a_macro_or_a_filter_makes_of_them():
    source = (
        "{% set said %}  {% generation %}yes{% endgeneration %}  {% endset %}"
        "before {{ said | trim }} after {{ said }}"
    )
    template = ChatTemplate(source, {}, "it")
    text, spans = template.render([])
    assert text == "before yes after   yes  "
    assert [text[a:b] for a, b in spans] == ["yes", "yes"] and spans[0][0] == 7


def test_templates_get_tools_arguments_and_one_date():
    source = "{{ strftime_now('%d %b %Y') }}|{{ tools | tojson }}|{{ style }}|{{ eos_token }}"
    template = ChatTemplate(source, {"eos_token": "<e>"}, "it")
    text, _ = template.render([], tools=[{"name": "<f>"}], style="short")
    assert text == '26 Jul 2024|[{"name": "<f>"}]|short|<e>'
    escaping = ChatTemplate("{{ messages.__class__.__mro__ }}", {}, "it")
    with pytest.raises(DataError, match="it refuses it: access to attribute"):
        escaping.render([])


def test_where_a_template_is_found(tmp_path, bpe_file):
    folder = tmp_path
    (folder / "tokenizer.json").write_bytes(bpe_file.read_bytes())
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "im_start" in load_template(str(folder)).source
    assert load_template(str(folder)).tokens == {"eos_token": "<|im_end|>"}
    (folder / "chat_template.jinja").write_text("newer")
    assert load_template(str(folder / "tokenizer.json")).source == "newer"
    (folder / "chat_template.jinja").unlink()
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert load_template(str(folder)).source == "d"
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match="no chat template: choose one with data.chat_template"):
        load_template(str(folder))
    with pytest.raises(DataError, match="'chatlm' is neither a file nor one of alpaca, chatml"):
        load_template(str(folder), "chatlm")
