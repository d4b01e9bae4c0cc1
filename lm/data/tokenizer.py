"""Tokenizers behind one small interface: raw bytes, or any `tokenizer.json`.

A document enters the token stream framed (`separator_id`, `end_id`): with one special token the
stream is [sep] doc [sep] doc ..., with two different ones it is [bos] doc [eos] [bos] doc [eos].
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lm.data.sources import DataError

END_OF_TEXT = "<|endoftext|>"
# Looked up in this order when no tokenizer_config.json names them.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|im_start|>", "[BOS]")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", END_OF_TEXT, "<|im_end|>", "[EOS]")


class Tokenizer(Protocol):
    """Text to ids and back. Encoding never adds special tokens itself."""

    vocab_size: int
    """Ids are below this."""
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    """SHA-256 (hex) of everything that decides the ids."""

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]. Names of special tokens inside `text` are text like any other."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of every text, faster."""
        ...

    def decode(self, ids) -> str:
        """Text of `ids`, without special tokens; invalid UTF-8 becomes U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each token stands for; 0 for special tokens."""
        ...

    def library(self) -> Any:
        """A `tokenizers.Tokenizer` of the same ids, to be set up and used by the caller."""
        ...

    @property
    def separator_id(self) -> int:
        """The token in front of every document."""
        ...

    @property
    def end_id(self) -> int | None:
        """The token behind every document; None when the separator alone marks the border."""
        ...


class _Framing:
    """`separator_id` and `end_id` from `bos_id` and `eos_id`, of which at least one is there."""

    bos_id: int | None
    eos_id: int | None

    @property
    def separator_id(self) -> int:
        separator = self.eos_id if self.bos_id is None else self.bos_id
        assert separator is not None
        return separator

    @property
    def end_id(self) -> int | None:
        return self.eos_id if self.bos_id is not None and self.eos_id != self.bos_id else None


class ByteTokenizer(_Framing):
    """Ids 0 to 255 are the bytes of UTF-8; 256 is `<|endoftext|>`."""

    vocab_size = 257
    bos_id = eos_id = 256
    fingerprint = hashlib.sha256(b"bytes 0..255, 256 = <|endoftext|>").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        raw = text.encode("utf-8", errors="replace")
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (np.arange(self.vocab_size) < 256).astype(np.int32)

    def library(self):
        """The same ids as a `tokenizers.Tokenizer`: byte-level BPE without merges."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        # The letters that byte-level BPE writes bytes as: printable Latin-1 stands for itself, the
        # other bytes for the letters from 256 on (the encoder of GPT-2).
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letters = {byte: chr(byte) for byte in printable}
        letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        tokenizer = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        return tokenizer


class FileTokenizer(_Framing):
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, file: Path):
        import tokenizers

        try:
            content = file.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"data.tokenizer {file} is no tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        self.bos_id, self.eos_id = self._special_ids(file)
        self.fingerprint = hashlib.sha256(
            content + f"|{self.bos_id}|{self.eos_id}".encode()
        ).hexdigest()

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # lost in pickling

    def _special_ids(self, file: Path) -> tuple[int | None, int | None]:
        settings = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            beside = file.parent / name
            if beside.is_file():
                try:
                    settings |= json.loads(beside.read_text(encoding="utf-8"))
                except (OSError, ValueError, TypeError) as error:
                    raise DataError(
                        f"{beside} is no JSON object that can be read: {error}"
                    ) from error

        def named(key: str) -> int | None:
            value = settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            return self._tokenizer.token_to_id(value) if isinstance(value, str) else None

        def known(names: tuple[str, ...]) -> int | None:
            ids = (self._tokenizer.token_to_id(name) for name in names)
            return next((i for i in ids if i is not None), None)

        ids = named("bos_token"), named("eos_token")
        if ids == (None, None):
            eos = known(EOS_NAMES)
            # <|im_start|> opens a chat turn; it begins documents only if nothing ends them.
            ids = known(BOS_NAMES[:-2] if eos is not None else BOS_NAMES), eos
        if ids == (None, None):
            raise DataError(
                f"data.tokenizer {file} has no token that can separate documents: put a "
                "tokenizer_config.json with bos_token or eos_token beside it, or add one of "
                f"{', '.join(EOS_NAMES)}"
            )
        return ids

    def encode(self, text: str) -> np.ndarray:
        text = text.encode("utf-8", errors="replace").decode("utf-8")  # no lone surrogates
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    def library(self):
        """A copy of the `tokenizers.Tokenizer`."""
        return type(self._tokenizer).from_str(self._tokenizer.to_str())

    def token_bytes(self) -> np.ndarray:
        """Exact for byte-level BPE and byte fallback.

        Elsewhere a token counts as its own text, with the marker of a space as one byte, which
        leaves out what a normalizer changed.
        """
        from tokenizers import pre_tokenizers

        decoder = json.loads(self._tokenizer.to_str())["decoder"] or {}
        kinds = {part["type"] for part in [decoder, *decoder.get("decoders", [])] if part}
        # In a byte-level vocabulary each letter of this alphabet stands for one byte.
        letters = set(pre_tokenizers.ByteLevel.alphabet()) if "ByteLevel" in kinds else set()
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if i in added:
                sizes[i] = 0 if added[i].special else len(added[i].content.encode("utf-8"))
            elif letters:
                sizes[i] = sum(1 if c in letters else len(c.encode("utf-8")) for c in token)
            elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
                sizes[i] = 1
            elif "WordPiece" in kinds:
                plain = token.removeprefix("##")
                sizes[i] = len(plain.encode("utf-8")) + (plain == token)
            else:
                sizes[i] = len(token.replace("\u2581", " ").encode("utf-8"))
        for i in (self.bos_id, self.eos_id):
            if i is not None:
                sizes[i] = 0
        return sizes


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `DataConfig.tokenizer` names.

    Args:
      spec: "byte", or the path of a tokenizer.json or of a folder that holds one.

    Raises:
      DataError: nothing there, not a tokenizer, or no token that can separate documents.
    """
    if spec == "byte":
        return ByteTokenizer()
    file = Path(spec).expanduser()
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise DataError(
            f'data.tokenizer {spec!r}: no file {file}; give "byte", the path of a '
            "tokenizer.json or of a folder that holds one"
        )
    return FileTokenizer(file)
