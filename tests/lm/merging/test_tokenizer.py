"""Vocabularies of several models in one: tokens, ids, and where each row comes from."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.merging.config import parse_yaml
from lm.merging.plan import make_plan
from lm.merging.row_map import RowMap
from lm.merging.tokenizer import read_tokenizer, tokens_of, vocabulary_warnings
from lm.merging.types import MergeError

CONFIG = """\
merge_method: linear
base_model: {base}
models: [{models}]
parameters: {{weight: 1}}
tokenizer: {tokenizer}
"""
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def merge(decoder, tokenizer_folder):
    """`merge(vocabularies, tokenizer)`: the plan, and each model's rows of the embedding by token.

    Row r of the k-th model is filled with 1000 (k + 1) + r, so values tell where they come from.
    """

    def run(vocabularies, tokenizer, rows=None, base=0, kind="WordLevel"):
        stores, names = {}, []
        for index, (name, (tokens, added)) in enumerate(vocabularies.items()):
            folder = str(tokenizer_folder(name, tokens, added, kind))
            count = (rows or {}).get(name, len(tokens) + len(added))
            stores[folder] = decoder(folder, layers=1, rows=count, width=2)
            values = 1000 * (index + 1) + np.arange(count, dtype=np.float32)
            stores[folder].arrays[EMBEDDING] = np.repeat(values[:, None], 2, 1)
            names.append(folder)
            tokenizer = tokenizer.replace(f"@{name}", folder)
        text = CONFIG.format(
            base=names[base],
            models=", ".join(f"{{model: {name}}}" for name in names),
            tokenizer=tokenizer,
        )
        plan = make_plan(parse_yaml(text), stores)
        job = next(job for job in plan.jobs if job.output == EMBEDDING)
        content = json.loads(plan.files["tokenizer.json"])
        tokens = tokens_of(content)
        by_model = {}
        arrays = [stores[plan.models[source.model]].arrays[EMBEDDING] for source in job.sources]
        for k, source in enumerate(job.sources):
            if job.transform is None:
                values = arrays[k]
            else:
                values = job.transform.read(k, 0, job.shape[0], lambda p, r: arrays[p][r])
            name = plan.models[source.model].rsplit("/", 1)[-1]
            by_model[name] = {token: float(values[row, 0]) for token, row in tokens.items()}
            by_model[name]["rows"] = values
        return plan, tokens, by_model

    return run


TWO = {"a": (["x", "y", "z"], []), "b": (["z", "w", "x"], ["<s>"])}


def test_union_keeps_the_base_and_appends(merge):
    plan, tokens, rows = merge(TWO, "{source: union}")
    assert tokens == {"x": 0, "y": 1, "z": 2, "w": 3, "<s>": 4}
    assert json.loads(plan.files["config.json"])["vocab_size"] == 5
    del rows["a"]["rows"], rows["b"]["rows"]
    # of tokens in one model only, both take that model's row
    assert rows["a"] == {"x": 1000, "y": 1001, "z": 1002, "w": 2001, "<s>": 2003}
    assert rows["b"] == {"x": 2002, "y": 1001, "z": 2000, "w": 2001, "<s>": 2003}
    added = json.loads(plan.files["tokenizer.json"])["added_tokens"]
    assert [(item["id"], item["content"], item["special"]) for item in added] == [
        (3, "w", False),
        (4, "<s>", True),
    ]


def test_base_drops_what_only_others_have(merge):
    plan, tokens, rows = merge(TWO, "{source: base}")
    assert tokens == {"x": 0, "y": 1, "z": 2}
    assert plan.jobs[0].shape == (3, 2)
    assert [rows["b"][token] for token in "xyz"] == [2002, 1001, 2000]


def test_a_named_model_gives_the_vocabulary(merge):
    _, tokens, rows = merge(TWO, "{source: @b}")
    assert tokens == {"z": 0, "w": 1, "x": 2, "<s>": 3}
    assert [rows["a"][token] for token in tokens] == [1002, 2001, 1000, 2003]


def test_lacking_rows_are_the_bases_else_the_mean_of_those_that_have_it(merge):
    three = {"a": (["x"], []), "b": (["x", "m", "k"], []), "c": (["m", "x"], []), "d": (["x"], [])}
    _, _, rows = merge(three, "{source: union}")
    assert rows["a"]["m"] == rows["d"]["m"] == (2001 + 3000) / 2
    assert rows["b"]["m"] == 2001 and rows["c"]["m"] == 3000
    _, _, rows = merge({f"{k}2": v for k, v in three.items()}, "{source: union}", base=2)
    assert rows["a2"]["m"] == rows["d2"]["m"] == 3000, "the base's own row comes before the mean"


def test_configured_tokens(merge):
    text = """{source: base, tokens: {
        w: {source: @b}, y: {source: @a, force: true},
        x: {source: {kind: model_token, model: @b, token: w}, force: true},
        n: {source: {kind: zero}}, q: {source: {kind: model_token, model: @b, token_id: 2}}}}"""
    _, tokens, rows = merge(TWO, text)
    assert list(tokens) == ["x", "y", "z", "w", "n", "q"]
    for name in "ab":
        values = rows[name]
        assert [values[token] for token in "xywnq"] == [2001, 1001, 2001, 0, 2002]
    assert (rows["a"]["z"], rows["b"]["z"]) == (1002, 2000)


def test_padding_rows_are_the_mean(merge):
    plan, tokens, rows = merge(TWO, "{source: union, pad_to_multiple_of: 4}")
    assert plan.jobs[0].shape == (8, 2)
    values = rows["b"]["rows"]
    np.testing.assert_allclose(values[5:], np.broadcast_to(values[:5].mean(0), (3, 2)))
    assert json.loads(plan.files["config.json"])["vocab_size"] == 8


def test_tokens_without_a_row_are_left_out(merge):
    two = {"a": (["x", "y", "xy", "yx"], ["<s>"]), "b": (["x", "y"], [])}
    _, tokens, _ = merge(two, "{source: base}", rows={"a": 3}, kind="BPE")
    assert tokens == {"x": 0, "y": 1, "xy": 2}
    plan, _, _ = merge({"c": two["a"], "d": two["b"]}, "{source: base}", rows={"c": 3}, kind="BPE")
    content = json.loads(plan.files["tokenizer.json"])
    assert content["model"]["merges"] == ["x y"] and content["added_tokens"] == []
    plan, tokens, _ = merge({"g": two["a"], "h": two["b"]}, "{source: base}", rows={"g": 4})
    assert list(tokens) == two["a"][0], "added tokens can be cut from any tokenizer"
    with pytest.raises(MergeError, match="2 tokens beyond the 3 rows.*WordLevel"):
        merge({"e": two["a"], "f": two["b"]}, "{source: base}", rows={"e": 3})


def test_equal_vocabularies_need_no_row_map(merge):
    same = {"a": (["x", "y"], []), "b": (["x", "y"], [])}
    plan, _, _ = merge(same, "{source: union}")
    assert all(job.transform is None for job in plan.jobs)


ERRORS = [
    ("{tokens: {x: {source: nowhere, force: true}}}", "nowhere takes no part"),
    ("{tokens: {n: {source: @a}}}", "has no token 'n'"),
    (
        "{tokens: {n: {source: {kind: model_token, model: @a, token_id: 3}}}}",
        "token_id 3 is outside the 3 rows",
    ),
    ("{source: /nowhere/at/all}", "'/nowhere/at/all' has no tokenizer.json"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_errors(text, message, merge):
    with pytest.raises(MergeError, match=message):
        merge(TWO, text)


def test_a_model_without_tokenizer_has_the_bases(decoder, tokenizer_folder, tmp_path):
    base = str(tokenizer_folder("a", ["x", "y"]))
    other = str(tmp_path / "none")
    stores = {ref: decoder(ref, layers=1, rows=2) for ref in (base, other)}
    models = f"{{model: {base}}}, {{model: {other}}}"
    text = CONFIG.format(base=base, models=models, tokenizer="{source: union}")
    plan = make_plan(parse_yaml(text), stores)
    assert f"{other} has no tokenizer.json: taken to have the tokens of {base}" in plan.warnings
    with pytest.raises(MergeError, match="none has no tokenizer.json, which tokenizer settings"):
        make_plan(parse_yaml(text.replace(f"base_model: {base}", f"base_model: {other}")), stores)


def test_damaged_tokenizers_are_named(tmp_path):
    assert read_tokenizer(tmp_path) is None
    for text in ("{", "[]", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(MergeError, match="tokenizer.json"):
            read_tokenizer(tmp_path)


def test_ignored_differences_are_told(decoder, tokenizer_folder):
    a = str(tokenizer_folder("a", ["x", "y", "z"]))
    b = str(tokenizer_folder("b", ["y", "x", "w"]))
    c = str(tokenizer_folder("c", ["x", "y", "z"]))
    stores = {ref: decoder(ref, layers=1, rows=3) for ref in (a, b, c)}
    (line,) = vocabulary_warnings(stores, a)
    assert f"{a} and {b} differ (1 tokens more, 1 fewer, 2 with other ids)" in line
    assert "tokenizer: {source: base}" in line


def test_unigram_and_added_tokens():
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}
    added = [{"id": 2, "content": "<s>"}]
    assert tokens_of({"model": model, "added_tokens": added}) == {"<unk>": 0, "a": 1, "<s>": 2}


def test_the_union_is_a_working_tokenizer(merge):
    tokenizers = pytest.importorskip("tokenizers")
    plan, tokens, _ = merge(
        {"a": (["a", "b", "ab"], ["<s>"]), "b": (["b", "c", "bc"], ["<t>"])},
        "{source: union}",
        kind="BPE",
    )
    loaded = tokenizers.Tokenizer.from_str(plan.files["tokenizer.json"].decode())
    assert loaded.get_vocab() == tokens
    assert loaded.encode("ab<t>bc<s>").tokens == ["ab", "<t>", "bc", "<s>"]


@given(st.data())
def test_row_maps_read_any_piece(data):
    """Pieces of a map equal the map applied at once, by a plain loop in float64."""
    heights = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    size, padding = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3))
    arrays = [
        np.arange(2.0 * h, dtype=np.float32).reshape(h, 2) + 100 * k for k, h in enumerate(heights)
    ]
    pair = st.integers(0, len(heights) - 1).flatmap(
        lambda k: st.tuples(st.just(k), st.integers(0, heights[k] - 1))
    )
    made = data.draw(st.lists(st.lists(pair, max_size=3).map(tuple), min_size=1, max_size=3))
    rows = tuple(
        np.array(data.draw(st.lists(st.integers(-len(made), h - 1), min_size=size, max_size=size)))
        for h in heights
    )
    row_map = RowMap(rows, tuple(made), padding)
    for k in range(len(arrays)):
        whole = np.zeros((size + padding, 2))
        for index, row in enumerate(rows[k]):
            pairs = [(k, row)] if row >= 0 else made[-1 - row]
            if pairs:
                whole[index] = np.mean([arrays[p][r].astype(np.float64) for p, r in pairs], axis=0)
        whole[size:] = whole[:size].mean(0)
        start = data.draw(st.integers(0, size + padding - 1))
        stop = data.draw(st.integers(start + 1, size + padding))
        found = row_map.read(k, start, stop, lambda p, r: arrays[p][r])
        np.testing.assert_allclose(found, whole[start:stop], rtol=1e-5)
        assert found.dtype == np.float32
