"""Small stores and tokenizers for the tests of lm.data."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from lm.cli.tokenizer import train_tokenizer
from lm.data.builder import build_store
from lm.data.sources import Document, Source
from lm.data.store import Store
from lm.data.tokenizer import ByteTokenizer


class PairTokenizer(ByteTokenizer):
    """Bytes framed by two different tokens: [256] document [257]."""

    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = "pair"


@pytest.fixture(scope="session")
def pair_tokenizer():
    return PairTokenizer()


@pytest.fixture(scope="session")
def make_store():
    """Build a store of `texts` in `folder` and open it."""

    def make(folder, texts, tokenizer=None, **options) -> Store:
        source = Source(["test"], lambda skip: (Document("", text) for text in texts))
        build_store(
            folder,
            source,
            lambda documents: (("train", document) for document in documents),
            tokenizer or ByteTokenizer(),
            head={},
            **options,
        )
        return Store(folder, "train")

    return make


@pytest.fixture
def cached_datasets(tmp_path, monkeypatch):
    """The datasets library, with its cache in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return datasets


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory):
    """A byte-level BPE of 400 tokens."""
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    words = "the cat sat on a mat and then, naïvely, it thought: über café \U0001f600 def f(x):\n"
    file.write_text(train_tokenizer(iter([words * 30, "return x + 1\n" * 30]), 400))
    return file
