"""The tokenizer that goes along with a checkpoint."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lm.config import ConfigError
from lm.files import atomic_write_json
from lm.merging.store.files import read_json

__all__ = ["FILES", "check_vocabulary", "copy_tokenizer", "end_ids", "prompt_ids", "token_ids"]

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
"""What is copied beside the weights."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_vocabulary(tokenizer: Any, where: str, vocab_size: int) -> None:
    """ConfigError if the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer {where} has {tokenizer.vocab_size} ids, the model {vocab_size} "
            "embeddings: it is not the tokenizer of this model"
        )


def prompt_ids(path: str | os.PathLike) -> list[int]:
    """The tokens that a folder's tokenizer puts in front of a text.

    Llama's and Gemma's begin every text with a token of their own, Qwen's and GPT-2's do not.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a", add_special_tokens=True).ids
    starts = range(len(framed) - len(bare) + 1)
    start = next((i for i in starts if framed[i : i + len(bare)] == bare), 0)
    return framed[:start]


def end_ids(path: str | os.PathLike) -> list[int]:
    """The tokens that end a text by a folder's generation_config.json (chat models have several).

    Empty without that file, or for what is no folder of Hugging Face's.
    """
    file = Path(path) / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def token_ids(tokenizer: str | os.PathLike | None, vocab_size: int) -> dict[str, Any]:
    """bos_token_id, eos_token_id and pad_token_id for config.json.

    They are those of the config.json beside the tokenizer, where there is one (it may list several
    ends), else what the tokenizer calls them. None is written too: a file that leaves them out gets
    the ids of its family's first model in transformers.

    Raises:
      ConfigError: no tokenizer there, or one with ids beyond `vocab_size`.
    """
    unknown = dict.fromkeys(_IDS)
    if tokenizer is None:
        return unknown
    from lm.data import load_tokenizer

    folder, known = _folder(tokenizer), {}
    if str(tokenizer) != "byte" and (folder / "config.json").is_file():
        content = read_json(folder / "config.json")
        known = {key: content[key] for key in _IDS if content.get(key) is not None}
        if not (folder / "tokenizer.json").is_file() and Path(tokenizer).expanduser().is_dir():
            return unknown | known  # its tokenizer, of another format, goes along unread
    loaded = load_tokenizer(str(tokenizer))
    check_vocabulary(loaded, str(tokenizer), vocab_size)
    if known:
        return unknown | known
    return unknown | {"bos_token_id": loaded.bos_id, "eos_token_id": loaded.eos_id}


def copy_tokenizer(tokenizer: str | os.PathLike | None, folder: Path) -> None:
    """Put the files of `tokenizer` (see `lm.hf.save`) into `folder`."""
    if tokenizer is None:
        return
    if str(tokenizer) == "byte":
        write_byte_tokenizer(folder)
        return
    source = _folder(tokenizer)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _folder(tokenizer: str | os.PathLike) -> Path:
    path = Path(tokenizer).expanduser()
    return path if path.is_dir() else path.parent


def write_byte_tokenizer(folder: Path) -> None:
    """The tokenizer of bytes (`lm.data.tokenizer.ByteTokenizer`) as tokenizer.json: same ids."""
    from lm.data.tokenizer import END_OF_TEXT, ByteTokenizer

    library = ByteTokenizer().library()
    atomic_write_json(folder / "tokenizer.json", json.loads(library.to_str()))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write_json(folder / "tokenizer_config.json", settings)
