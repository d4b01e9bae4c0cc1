"""Train a byte-level BPE tokenizer on any data source.

Example: aniso-tokenizer --vocab-size 8192 --out bpe.json --data.source text --data.path books/
then:    train.py tiny --data.tokenizer bpe.json ...
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lm.cli.args import one_line_errors, refuse
from lm.config import ConfigError, check
from lm.data.mixture import members, split_documents
from lm.data.sources import DataError, open_source
from lm.data.tokenizer import END_OF_TEXT
from lm.files import atomic_write_text, explain_os_error
from lm.train.config import DataConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A byte-level BPE tokenizer and the text it is trained on."""

    out: str
    """The tokenizer.json to write."""
    vocab_size: int = 8192
    """Tokens: the 256 bytes, <|endoftext|>, and merges."""
    force: bool = False
    """Overwrite OUT."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """Only documents that training would see are read, the held-out ones are not."""

    def __post_init__(self):
        check(
            self.vocab_size >= 257,
            f"vocab_size must be 257 or more (256 bytes and {END_OF_TEXT}), got {self.vocab_size}",
        )


def training_texts(config: DataConfig) -> Iterator[str]:
    """The text of every document that is not held out, source by source; of conversations what is
    said."""
    for _, _, member in members(config):
        documents, chat = open_source(member).documents(), member.format == "chat"
        if not member.valid_path:
            labelled = split_documents(documents, member.valid_fraction, whole=chat)
            documents = (document for split, document in labelled if split == "train")
        for document in documents:
            yield from _said(document.text) if chat else [document.text]


def _said(conversation: str) -> Iterator[str]:
    for message in json.loads(conversation)["messages"]:
        if isinstance(message["content"], str):
            yield message["content"]


def train_tokenizer(texts: Iterator[str], vocab_size: int, progress: bool = False) -> str:
    """A tokenizer.json of `vocab_size` tokens or, of little text, fewer; the same every time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True)


def run(config: TokenizerConfig) -> Path:
    """Train the tokenizer that `config` describes and write it.

    Raises:
      DataError: the file is there already, or the source holds no text.
    """
    out = Path(config.out).expanduser()
    if out.exists() and not config.force:
        raise DataError(f"{out} is there already: choose another --out, or --force to replace it")
    if not out.parent.is_dir():
        raise DataError(f"the folder {out.parent} of --out does not exist: make it first")
    seen = 0

    def counted():
        nonlocal seen
        for text in training_texts(config.data):
            seen += len(text)
            yield text

    content = train_tokenizer(counted(), config.vocab_size, progress=sys.stderr.isatty())
    if not seen:
        raise DataError("the source holds no text to train a tokenizer on")
    try:
        atomic_write_text(out, content)
    except OSError as error:
        raise DataError(f"cannot write {out}: {explain_os_error(error)}") from error
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The command `aniso-tokenizer` (default: the program's own arguments)."""
    import tyro

    program = "aniso-tokenizer"
    try:
        with one_line_errors(TokenizerConfig):
            config = tyro.cli(TokenizerConfig, prog=program, description=__doc__, args=argv)
        out = run(config)
    except ConfigError as error:
        refuse(program, str(error))
    from lm.data.tokenizer import load_tokenizer

    print(f"{out}: {load_tokenizer(str(out)).vocab_size} tokens")
    return 0
