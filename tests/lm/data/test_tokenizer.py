import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.cli.tokenizer import main, train_tokenizer
from lm.data.sources import DataError
from lm.data.tokenizer import load_tokenizer


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_byte_tokenizer_frames_with_one_token_and_decodes_anything():
    tokenizer = load_tokenizer("byte")
    assert tokenizer.vocab_size == 257
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.separator_id) == (256, 256, 256)
    assert tokenizer.end_id is None and tokenizer.token_bytes()[256] == 0
    assert tokenizer.decode([104, 256, 105, 300]) == "hi"
    assert tokenizer.decode([0xFF, 65]) == "\ufffdA"
    assert tokenizer.encode("\ud800").tolist() == [ord("?")]


def test_bpe_round_trip_and_exact_bytes(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))

    @settings(deadline=None, max_examples=100)
    @given(text=st.text(st.characters(exclude_categories=["Cs"])))
    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert len(ids) == 0 or ids.max() < tokenizer.vocab_size
        np.testing.assert_array_equal(tokenizer.encode_batch(["x", text])[1], ids)

    check()
    assert len(tokenizer.encode("the cat sat")) < 8  # merges happened


def test_special_names_in_text_stay_text(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    for one in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = one.encode("a<|endoftext|>b")
        assert one.eos_id not in ids.tolist()
        assert one.decode(ids) == "a<|endoftext|>b"
        assert one.token_bytes()[one.eos_id] == 0
        assert one.decode([*ids, one.eos_id]) == "a<|endoftext|>b"


def word_tokenizer(folder, specials, config=None):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate(["unk", "hello", "world", *specials])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(specials)
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{specials[0]} $A", special_tokens=[(specials[0], vocab[specials[0]])]
        )
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("specials", "config", "expected"),
    [
        (["<s>", "</s>"], None, ("<s>", "</s>", "<s>", "</s>")),
        (["<|endoftext|>"], None, (None, "<|endoftext|>", "<|endoftext|>", None)),
        (["<s>"], None, ("<s>", None, "<s>", None)),
        (["<|im_start|>", "<|im_end|>"], None, (None, "<|im_end|>", "<|im_end|>", None)),
        (
            ["<s>", "</s>", "<x>"],
            {"bos_token": None, "eos_token": {"content": "<x>"}},
            (None, "<x>", "<x>", None),
        ),
        (["<x>"], {"bos_token": "<x>", "eos_token": "<x>"}, ("<x>", "<x>", "<x>", None)),
    ],
)
def test_special_tokens_are_found(tmp_path, specials, config, expected):
    tokenizer = load_tokenizer(word_tokenizer(tmp_path, specials, config))
    ids = {None: None} | {name: 3 + i for i, name in enumerate(specials)}
    found = tokenizer.bos_id, tokenizer.eos_id, tokenizer.separator_id, tokenizer.end_id
    assert found == tuple(ids[name] for name in expected)
    # neither the file's template, nor its truncation, nor its padding touches the ids
    assert tokenizer.encode("hello world hello").tolist() == [1, 2, 1]


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(DataError, match="no token that can separate documents"):
        load_tokenizer(word_tokenizer(tmp_path, []))
    with pytest.raises(DataError, match="no file .*missing"):
        load_tokenizer(str(tmp_path / "missing"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json is no tokenizer"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_fingerprint_follows_the_content(tmp_path, bpe_file):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe_file.read_bytes())
    first = load_tokenizer(str(bpe_file)).fingerprint
    assert load_tokenizer(str(copy)).fingerprint == first
    copy.write_text(train_tokenizer(iter(["other words"]), 260))
    assert load_tokenizer(str(copy)).fingerprint != first != load_tokenizer("byte").fingerprint


def test_sentencepiece_style_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "\u2581the", "\u2581c", "at", "é"]
    pieces = words + [f"<0x{i:02X}>" for i in range(256)] + ["</s>"]
    model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    text = " the caté\u4e2d"
    ids = ours.encode(text)
    assert ours.token_bytes()[ids].sum() == len(text.encode())
    assert ours.decode(ids) == text


def test_command_trains_round_trips_and_overwrites_only_by_force(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for i in range(20):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"gray zebra naïve {i} \U0001f993\n" * 50)
    out = tmp_path / "bpe.json"
    words = ["--vocab-size", "280", "--out", str(out), "--data.source", "text"]
    words += ["--data.path", str(tmp_path / "corpus")]
    assert main(words) == 0
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.vocab_size == 280 and str(out) in capsys.readouterr().out
    text = "gray zebra naïve\t\U0001f993 \x00 новое <|endoftext|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(" zebra")) < 3

    before = out.read_bytes()
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2 and out.read_bytes() == before
    assert "--force" in capsys.readouterr().err
    out.write_text("old")
    assert main([*words, "--force"]) == 0
    assert out.read_bytes() == before  # deterministic, too


def test_command_does_not_read_held_out_documents(tmp_path):
    from lm.cli.tokenizer import training_texts
    from lm.data.store import open_stores
    from lm.train.config import DataConfig

    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    config = DataConfig(
        source="text", path=str(tmp_path), valid_fraction=0.2, cache=str(tmp_path / ".cache")
    )
    stores = open_stores(config, progress=False)
    (train, _), (valid, _) = stores["train"][0], stores["valid"][0]
    assert len(list(training_texts(config))) == train.documents == 30 - valid.documents == 24


@pytest.mark.parametrize("content", ["{", "[1]", b"\xff"])
def test_damaged_settings_beside_a_tokenizer_are_named(tmp_path, bpe_file, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(bpe_file.read_bytes())
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer_config.json is no JSON object"):
        load_tokenizer(str(file))


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    file = tmp_path / "tokenizer.json"
    file.write_text(Tokenizer(models.BPE()).to_str())
    with pytest.raises(DataError, match="no token that can separate documents"):
        load_tokenizer(str(file))


def test_lone_surrogates_are_replaced_as_by_the_byte_tokenizer(bpe_file):
    tokenizer = load_tokenizer(str(bpe_file))
    assert tokenizer.encode("\ud800").tolist() == tokenizer.encode("?").tolist()
