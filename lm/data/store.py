"""Memory-mapped token stores: every token of a source, on disk once, addressed by position."""

import bisect
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from lm.data import builder
from lm.data.chat import ChatEncoder, load_encoder
from lm.data.files import locked
from lm.data.mixture import members, split_documents
from lm.data.packing import PackedRows
from lm.data.sources import DataError, Source, open_source, open_valid_source
from lm.data.tokenizer import Tokenizer, load_tokenizer
from lm.train.config import DataConfig

Stores = dict[str, list[tuple["Store", float]]]


class Store:
    """One split of a token store: a stream of framed documents.

    Attributes:
      name: of the source, unique in a mixture.
      tokens, documents, bytes: how many; `bytes` are those of the text in UTF-8.
      vocab_size: ids are below this.
      separator_id: token in front of every document.
      end_id: token behind every document, or None.
      fingerprint: hash of every token and document boundary of the split.
      masked: whether documents are conversations, of which only some tokens are learnt.
      targets: tokens that are learnt; all, unless `masked`. `bytes` are then of theirs alone.
      skip_long: whether conversations that are longer than a row are left out.
      offsets: int64 [documents + 1], where each document starts, then `tokens`.
      token_bytes: int32 [vocab_size], UTF-8 bytes that each token stands for.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        name: str = "",
        verify: bool = False,
        skip_long: bool = False,
    ):
        """Open `split` of the store in `folder`.

        Sizes of all files are always checked; `verify` reads them and checks their SHA-256 too.

        Raises:
          DataError: a file is missing, truncated or altered, or the split is empty.
        """
        self.folder = Path(folder)
        self.name, self._split = name or self.folder.name, split
        meta = self._meta()
        if split not in meta["splits"]:
            raise DataError(
                f"no document of {self.name} fell into the {split} split: give data.valid_path, "
                "or change data.valid_fraction"
            )
        part = meta["splits"][split]
        self.tokens: int = part["tokens"]
        self.documents: int = part["documents"]
        self.bytes: int = part["bytes"]
        self.skipped: int = meta["skipped"]
        self.vocab_size: int = meta["vocab_size"]
        self.separator_id: int = meta["separator_id"]
        self.end_id: int | None = meta["end_id"]
        self.tokenizer_fingerprint: str = meta["tokenizer_fingerprint"]
        self.masked: bool = meta.get("masked", False)
        self.targets: int = part.get("targets", self.tokens)
        self.skip_long = skip_long
        content = [part["offsets_sha256"], [shard["sha256"] for shard in part["shards"]]]
        if self.masked:
            content.append([shard["mask_sha256"] for shard in part["shards"]])
        self.fingerprint: str = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        self._dtype = np.dtype(meta["dtype"])
        self._files = [self.folder / shard["file"] for shard in part["shards"]]
        counts = [shard["tokens"] for shard in part["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._mapped: dict[Path, np.ndarray] = {}
        self._rows: dict[int, PackedRows] = {}
        offsets = self.folder / f"{split}.offsets"
        self._check(offsets, 8 * (self.documents + 1), verify and part["offsets_sha256"])
        for file, shard in zip(self._files, part["shards"], strict=True):
            self._check(file, shard["size"], verify and shard["sha256"])
            if self.masked:
                self._check(_mask(file), shard["tokens"], verify and shard["mask_sha256"])
        self._check(self.folder / "token_bytes", 4 * self.vocab_size, None)
        self.offsets = np.asarray(np.memmap(offsets, "<i8", "r"))
        self.token_bytes = np.fromfile(self.folder / "token_bytes", "<i4")

    def _meta(self) -> dict:
        file = self.folder / "meta.json"
        try:
            meta = json.loads(file.read_bytes())
            version = meta["version"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._broken(file, f"cannot be read ({error})") from error
        if version != builder.VERSION:
            raise self._broken(file, f"is of format {version}, not {builder.VERSION}")
        return meta

    def _broken(self, file: Path, what: str) -> DataError:
        return DataError(
            f"token store file {file} {what}: delete the folder {self.folder} and run again to "
            "rebuild it"
        )

    def _check(self, file: Path, size: int, sha256: str | None | bool) -> None:
        try:
            actual = file.stat().st_size
        except OSError as error:
            raise self._broken(file, f"is missing ({error.strerror})") from error
        if actual != size:
            raise self._broken(file, f"has {actual} bytes instead of {size} (truncated?)")
        if sha256:
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                    raise self._broken(file, "was altered (its SHA-256 differs)")

    def _map(self, file: Path, dtype: np.dtype) -> np.ndarray:
        mapped = self._mapped.get(file)
        if mapped is None:
            # a plain view: slicing np.memmap itself is several times slower
            mapped = self._mapped[file] = np.asarray(np.memmap(file, dtype, "r"))
        return mapped

    def packed(self, length: int) -> PackedRows:
        """The rows of `length` positions that hold the conversations of a `masked` store."""
        if length not in self._rows:
            self._rows[length] = PackedRows(self, length)
        return self._rows[length]

    def origin(self, document: int) -> str:
        """File and line of a conversation; reads them all, for messages."""
        file = self.folder / f"{self._split}.origins"
        return file.read_text(encoding="utf-8").split("\n")[document]

    def mask(self, start: int, length: int) -> np.ndarray:
        """uint8, 1 where the tokens of `window` are learnt; for a `masked` store."""
        return self._slice(start, length, True)

    def window(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of the stream, in the store's own dtype."""
        return self._slice(start, length, False)

    def _slice(self, start: int, length: int, masks: bool) -> np.ndarray:
        if not 0 <= start <= start + length <= self.tokens:
            raise IndexError(
                f"tokens {start} to {start + length} are outside of {self.name}, which has "
                f"{self.tokens}"
            )
        number = bisect.bisect_right(self._starts, start, hi=len(self._files)) - 1
        begin = start - self._starts[number]
        file = self._files[number]
        mapped = self._map(_mask(file), np.dtype("u1")) if masks else self._map(file, self._dtype)
        piece = mapped[begin : begin + length]
        if len(piece) == length:
            return piece
        rest = self._slice(start + len(piece), length - len(piece), masks)
        return np.concatenate([piece, rest])


def _mask(file: Path) -> Path:
    return file.with_suffix(".mask")


def cache_folder(config: DataConfig) -> Path:
    """Folder of the token stores: data.cache, $ANISO_CACHE or ~/.cache/aniso."""
    return Path(config.cache or os.environ.get("ANISO_CACHE") or "~/.cache/aniso").expanduser()


def _ready(
    config: DataConfig,
    name: str,
    source: Source,
    split: float | str,
    tokenizer: Tokenizer,
    progress: bool,
) -> Path:
    """Folder of the finished store of `source`, built if it is not there."""
    head = {
        "source": source.definition,
        "split": split,
        "framing": [tokenizer.separator_id, tokenizer.end_id],
    }
    encoder: Tokenizer | ChatEncoder = tokenizer
    if config.format == "chat":
        encoder = load_encoder(tokenizer, config.tokenizer, config.chat_template)
        head["chat"] = encoder.template.fingerprint
    content = {**head, "tokenizer": tokenizer.fingerprint, "version": builder.VERSION}
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    label = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:40]
    folder = cache_folder(config) / f"{label}-{key[:16]}"
    if folder.exists():
        return folder

    def split_by(documents):
        if isinstance(split, str):
            return ((split, document) for document in documents)
        return split_documents(documents, split, whole=config.format == "chat")

    with locked(folder):
        if not folder.exists():  # another process may have built it while this one waited
            builder.build_store(
                folder,
                source,
                split_by,
                encoder,
                head={"key": key, **head},
                workers=config.workers or os.cpu_count() or 1,
                progress=progress,
            )
    return folder


def open_stores(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    progress: bool = True,
    verify: bool = False,
) -> Stores:
    """The token stores of `config`, built first where they are not in the cache.

    Args:
      config: sources, tokenizer, cache.
      tokenizer: the tokenizer of `config` if it is at hand.
      progress: show a bar on stderr while building.
      verify: check every file's SHA-256, not only its size.

    Returns:
      {"train": [(store, weight), ...], "valid": [...]}, one pair per source; weights add up to 1.

    Raises:
      DataError: text cannot be found, read or stored, or a store is damaged.
    """
    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    stores: Stores = {"train": [], "valid": []}
    for name, weight, member in members(config):
        source, valid = open_source(member), open_valid_source(member)
        rule = "train" if valid else member.valid_fraction
        train_folder = _ready(member, name, source, rule, tokenizer, progress)
        valid_folder = train_folder
        if valid:
            valid_folder = _ready(member, f"{name}-valid", valid, "valid", tokenizer, progress)
        for split, folder in (("train", train_folder), ("valid", valid_folder)):
            store = Store(folder, split, name=name, verify=verify, skip_long=member.skip_long)
            stores[split].append((store, weight))
    return stores
