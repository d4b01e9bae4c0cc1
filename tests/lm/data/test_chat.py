"""Conversations: rendered, masked, packed, and every way in which a file of them can be wrong."""

import gzip
import json
import pickle

import numpy as np
import pytest

from lm.cli.tokenizer import training_texts
from lm.data.chat import ChatEncoder, load_encoder
from lm.data.chat_template import ChatTemplate
from lm.data.loader import Loader, eval_batches
from lm.data.sources import DataError
from lm.data.store import open_stores
from lm.data.tokenizer import ByteTokenizer, load_tokenizer
from lm.train.config import ConfigError, DataConfig

pytest.importorskip("jinja2")

MARKED = """\
{%- for message in messages -%}
<{{ message['role'] }}>
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] | trim }}</s>{% endgeneration %}
{%- else -%}
{{ message['content'] }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}"""


def turns(*contents, roles=("user", "assistant")):
    return [
        {"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)
    ]


def row(*contents):
    return {"messages": turns(*contents)}


@pytest.fixture
def folder(tmp_path, bpe_file):
    """A byte-level BPE with the tokens of ChatML, and a template without marks."""
    import tokenizers

    from lm.merging.chat_templates import CHATML

    path = tmp_path / "tokenizer"
    path.mkdir()
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_file))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="chat.jsonl"):
        file = tmp_path / name
        file.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        return file

    return write


def learnt(encoder, conversation) -> list[str]:
    """The learnt stretches of a conversation as text."""
    text = json.dumps(conversation)
    ids, mask = encoder.encode(text, "here")
    stretches, last = [], False
    for token, learns in zip(ids.tolist(), mask.tolist(), strict=True):
        if learns:
            stretches = stretches if last else [*stretches, []]
            stretches[-1].append(token)
        last = learns
    return [encoder._library.decode(each, skip_special_tokens=False) for each in stretches]


def test_only_assistant_turns_and_what_ends_them_are_learnt(folder):
    encoder = load_encoder(load_tokenizer(str(folder)), str(folder))
    conversation = row("the cat?", "a mat.\n\n", "and then?", "it sat")
    assert learnt(encoder, conversation) == ["a mat.\n\n<|im_end|>", "it sat<|im_end|>"]
    ids, _ = encoder.encode(json.dumps(conversation), "here")
    specials = {encoder._library.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    assert sum(int(i) in specials for i in ids) == 8  # read as tokens, not as letters
    system = turns("be kind", "hi", "hello", roles=("system", "user", "assistant"))
    assert learnt(encoder, {"messages": system}) == ["hello<|im_end|>"]


def test_marks_of_the_template_decide(folder, tmp_path):
    (tmp_path / "marked.jinja").write_text(MARKED)
    spec = load_tokenizer(str(folder))
    encoder = load_encoder(spec, str(folder), str(tmp_path / "marked.jinja"))
    assert encoder.template.marked
    # The blanks that the template trims are not there; text outside of the marks is not learnt.
    assert learnt(encoder, row("on", " a mat ", "on", "then")) == ["a mat</s>", "then</s>"]
    text, spans = encoder.template.render(turns("on", " a mat "))
    assert text == "<user>on<assistant>a mat</s>"
    assert [text[start:stop] for start, stop in spans] == ["a mat</s>"]


def test_the_bytes_tokenizer_and_named_templates(tmp_path):
    tokenizer = ByteTokenizer()
    library = tokenizer.library()
    text = "über \U0001f600\n\x00"
    assert library.encode(text).ids == tokenizer.encode(text).tolist()
    encoder = load_encoder(tokenizer, "byte", "chatml")
    assert learnt(encoder, row("a", "b")) == ["b<|im_end|>\n"]  # letters here: nothing is a token
    encoder = load_encoder(tokenizer, "byte", "alpaca")
    assert learnt(encoder, row("a", "b")) == ["b<|endoftext|>"]
    copy = pickle.loads(pickle.dumps(encoder))
    assert learnt(copy, row("a", "b")) == ["b<|endoftext|>"]


@pytest.mark.parametrize(
    "source,message",
    [
        # the end of a conversation looks unlike its middle (Qwen3 drops older thoughts)
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
            "{% if loop.last and m.role == 'assistant' %}!{% endif %}{% endfor %}",
            "messages 1 to 2 another text when more follows",
        ),
        ("{% for m in messages %}{{ m.nothing.there }}{% endfor %}", "refuses it"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{% if %}", "is no chat template"),
        ("{% generation %}{% endgeneration %}hello", "nothing to learn from"),
    ],
)
def test_templates_that_cannot_be_masked_are_told(source, message):
    with pytest.raises(DataError, match=message):
        encoder = ChatEncoder(ByteTokenizer(), ChatTemplate(source, {}, "template x"))
        encoder.encode(json.dumps(row("a", "b", "c", "d")), "f.jsonl, line 3")


def test_a_prompt_whose_last_token_grows_with_the_answer_is_told(folder):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    encoder = ChatEncoder(load_tokenizer(str(folder)), ChatTemplate(source, {}, "template x"))
    whole = encoder.ids("the cat")
    assert len(encoder.ids("the c")) + len(encoder.ids("at")) > len(whole)  # "cat" is a token
    with pytest.raises(DataError, match="f, line 1: template x gives .* other tokens when more"):
        encoder.encode(json.dumps(row("the c", "at")), "f, line 1")


def data(file, folder, **options) -> DataConfig:
    options = {"source": "json", "valid_fraction": 0.2, "workers": 1} | options
    return DataConfig(
        path=str(file),
        format="chat",
        tokenizer=str(folder),
        cache=str(folder.parent / "cache"),
        **options,
    )


ROWS = [row(f"what is {i}?", "number " * (i % 7 + 1), "sure?", f"yes {i}") for i in range(40)]


def test_batches_hold_whole_conversations_apart(folder, write):
    config = data(write(*ROWS), folder)
    stores = open_stores(config, progress=False)
    encoder = load_encoder(load_tokenizer(str(folder)), str(folder))
    (store, weight), length = stores["train"][0], 768
    count = store.documents
    assert store.masked and weight == 1 and count + stores["valid"][0][0].documents == len(ROWS)
    encoded = {}
    for each in ROWS:
        ids, mask = encoder.encode(json.dumps(each), "")
        encoded[tuple(ids[:-1])] = ids[1:], mask[1:]
    loader = Loader(stores["train"], batch_size=1, sequence_length=length, seed=3)
    rows = store.packed(length).rows
    assert rows < count / 2  # packed: several in a row
    seen = []
    for step in range(rows):
        batch = {name: values[0] for name, values in loader.batch(step).items()}
        segments = batch["segment_ids"]
        used = int((segments > 0).sum())
        assert (segments[:used] > 0).all() and not segments[used:].any()
        assert not batch["weights"][used:].any() and not batch["tokens"][used:].any()
        for segment in range(1, segments.max() + 1):
            place = segments == segment
            tokens = tuple(batch["tokens"][place])
            targets, mask = encoded[tokens]
            np.testing.assert_array_equal(batch["targets"][place], targets)
            np.testing.assert_array_equal(batch["weights"][place], mask)
            np.testing.assert_array_equal(batch["positions"][place], np.arange(len(tokens)))
            seen.append(tokens)
    assert len(seen) == len(set(seen)) == count  # an epoch, every conversation once
    assert store.targets == sum(int(encoded[tokens][1].sum()) for tokens in seen)
    again = Loader(stores["train"], batch_size=4, sequence_length=length, seed=3)
    for name, values in again.batch(5, slice(1, 3)).items():
        np.testing.assert_array_equal(values, again.batch(5)[name][1:3])


def test_held_out_conversations_are_counted_by_what_is_learnt(folder, write):
    stores = open_stores(data(write(*ROWS), folder), progress=False)
    encoder = load_encoder(load_tokenizer(str(folder)), str(folder))
    store = stores["valid"][0][0]
    total, weights = 0, 0.0
    for batch, n_bytes in eval_batches(store, 3, 320):
        assert batch["tokens"].shape == (3, 320)
        total, weights = total + n_bytes, weights + batch["weights"].sum()
    assert weights == store.targets and total == store.bytes
    everything = sum(p[0].bytes for p in stores.values() for p in p)
    said = sum(len(m["content"]) for each in ROWS for m in each["messages"][1::2])
    assert everything == said  # ends of turns are no text
    tokens = sum(int(encoder.encode(json.dumps(each), "")[1].sum()) for each in ROWS)
    assert sum(p[0].targets for p in stores.values() for p in p) == tokens
    loader = Loader([(store, 1.0)], batch_size=2, sequence_length=320, seed=0)
    assert loader.tokens_per_byte == pytest.approx(store.targets / store.bytes)


def test_stores_do_not_depend_on_the_workers_and_follow_the_template(folder, write, tmp_path):
    file = write(*ROWS)
    first = open_stores(data(file, folder), progress=False)["train"][0][0]
    other = data(file, folder, chat_template="llama3")
    second = open_stores(other, progress=False)["train"][0][0]
    assert first.folder != second.folder and first.fingerprint != second.fingerprint
    for part in first.folder.iterdir():
        part.unlink()
    first.folder.rmdir()
    assert open_stores(data(file, folder), progress=False)["train"][0][0].fingerprint == (
        first.fingerprint
    )


def test_a_mixture_of_conversations_and_text(folder, write, tmp_path):
    write(*ROWS)
    (tmp_path / "text.txt").write_text("the cat sat on a mat and then " * 60)
    mixture = [
        {"source": "json", "path": "chat.jsonl", "weight": 1},
        {"source": "text", "path": "text.txt", "weight": 1},
    ]
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    config = data(tmp_path / "mixture.json", folder, source="mixture", chat_template="llama3")
    stores = open_stores(config, progress=False)["train"]
    assert [store.masked for store, _ in stores] == [True, False]
    loader = Loader(stores, batch_size=8, sequence_length=320, seed=0, sources=True)
    batch = loader.batch(0)
    for source, weights in zip(batch["sources"], batch["weights"], strict=True):
        assert (weights.min() == 0) if source == 0 else (weights == 1).all()


@pytest.mark.parametrize("form", ["prompt", "messages", "array", "gzip", "zstd"])
def test_forms_of_the_same_conversations(folder, write, tmp_path, form):
    rows = [row(f"q {i}", f"a {i}") for i in range(10)]
    expected = open_stores(data(write(*rows), folder), progress=False)["train"][0][0]
    if form == "prompt":
        pairs = [[m["content"] for m in each["messages"]] for each in rows]
        file = write(*({"prompt": p, "completion": c} for p, c in pairs), name="b.jsonl")
    elif form == "messages":
        halves = [each["messages"] for each in rows]
        file = write(*({"prompt": m[:1], "completion": m[1:]} for m in halves), name="b.jsonl")
    elif form == "array":
        file = tmp_path / "b.json"
        file.write_text(json.dumps(rows, indent=1))
    else:
        pack = gzip if form == "gzip" else pytest.importorskip("zstandard")
        file = tmp_path / f"b.jsonl.{'gz' if form == 'gzip' else 'zst'}"
        file.write_bytes(pack.compress((tmp_path / "chat.jsonl").read_bytes()))
    found = open_stores(data(file, folder), progress=False)["train"][0][0]
    assert found.fingerprint == expected.fingerprint


def test_parquet(folder, write, tmp_path, cached_datasets):
    rows = [row(f"q {i}", f"a {i}") for i in range(10)]
    expected = open_stores(data(write(*rows), folder), progress=False)["train"][0][0]
    cached_datasets.Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    config = data(tmp_path / "b.parquet", folder, source="parquet")
    assert open_stores(config, progress=False)["train"][0][0].fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"messages": [', r"bad.jsonl, line 2: not JSON .*every line must be one object"),
        ("[1]", r"line 2: list is no object"),
        ('{"text": "a"}', "line 2: the keys are text, needed are messages, or prompt and"),
        ('{"messages": []}', "line 2: messages must be a list like"),
        ('{"messages": ["hi"]}', "line 2, message 1: 'hi' is no object"),
        ('{"messages": [{"content": "hi"}]}', "line 2, message 1 has no role: add system"),
        ('{"messages": [{"from": "human", "value": "hi"}]}', "from and value are to be called"),
        ('{"messages": [{"role": "user"}]}', r"message 1 \(user\) has no content: .* got None"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: there is nothing to learn"),
        ('{"prompt": "a", "completion": 3}', "line 2: prompt and completion must be texts"),
        (
            '{"messages": [{"role": "assistant", "content": "\ufdd0"}]}',
            r"message 1 \(assistant\) holds U\+FDD0",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}], "tools": "x"}',
            "line 2: tools must be a list, got 'x'",
        ),
    ],
)
def test_wrong_lines_are_named(folder, tmp_path, line, message):
    good = json.dumps(row("a", "b"))
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(DataError, match=message):
        open_stores(data(tmp_path / "bad.jsonl", folder), progress=False)


def test_bytes_that_are_no_text_are_named(folder, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(json.dumps(row("a", "b")).encode() + b"\n\xff\n")
    with pytest.raises(DataError, match="cannot read .*bad.jsonl behind line 1: UnicodeDecode"):
        open_stores(data(file, folder), progress=False)


def test_conversations_that_are_too_long_are_refused_or_left_out(folder, write):
    rows = [*ROWS[:10], row("long", "the cat sat on a mat " * 50), *ROWS[10:20]]
    valid = write(*ROWS[20:25], name="valid.jsonl")
    config = data(write(*rows), folder, valid_path=str(valid))
    stores = open_stores(config, progress=False)
    with pytest.raises(
        DataError,
        match=r"chat.jsonl, line 11: the conversation has \d+ tokens, and a sequence_length of 200 "
        r"holds 201; so it is with 1 of 21 .*--data.skip-long",
    ):
        Loader(stores["train"], batch_size=1, sequence_length=200, seed=0)
    config = data(write(*rows), folder, valid_path=str(valid), skip_long=True)
    store = open_stores(config, progress=False)["train"][0][0]
    loader = Loader([(store, 1.0)], batch_size=1, sequence_length=200, seed=0)
    counted = loader.statistics()["chat.jsonl"]
    assert counted["left_out"] == 1 and counted["targets"] == store.targets
    with pytest.raises(DataError, match="all 21 conversations .* are longer"):
        store.packed(4)


def test_one_conversation_is_not_cut_for_the_held_out(folder, write):
    with pytest.raises(DataError, match="fell into the valid split: give data.valid_path"):
        open_stores(data(write(ROWS[0]), folder), progress=False)


def test_a_damaged_mask_is_found(folder, write):
    store = open_stores(data(write(*ROWS), folder), progress=False)["train"][0][0]
    mask = next(store.folder.glob("train-*.mask"))
    content = bytearray(mask.read_bytes())
    content[-1] ^= 1
    mask.write_bytes(content)
    with pytest.raises(DataError, match="mask was altered"):
        type(store)(store.folder, "train", verify=True)
    mask.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"mask has \d+ bytes instead of"):
        type(store)(store.folder, "train")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"source": "text", "format": "chat"}, "data.source text has none: choose one of json"),
        ({"source": "json", "chat_template": "chatml"}, "add --data.format chat"),
        ({"source": "json", "format": "chatt"}, "data.format is text or chat, not 'chatt'"),
    ],
)
def test_flags_that_do_not_go_together(options, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(path="x", **options)


def test_tokenizers_are_trained_on_what_is_said(write, tmp_path):
    config = DataConfig(
        source="json", format="chat", path=str(write(*ROWS[:2])), valid_path=str(tmp_path)
    )
    assert list(training_texts(config)) == [
        message["content"] for each in ROWS[:2] for message in each["messages"]
    ]
