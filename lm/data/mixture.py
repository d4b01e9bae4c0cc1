"""Weighted mixtures of sources, and which documents are held out."""

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lm.config import ConfigError
from lm.data.sources import SOURCES, DataError, Document
from lm.train.config import DataConfig
from lm.train.config_data import TABLES

KEYS = (
    *("name", "source", "path", "weight", "text_field", "format", "valid_path", "split"),
    "max_documents",
)
LOCAL = ("text", "json", "parquet")
MAX_WEIGHT = 1e12


class Member(NamedTuple):
    """One source of a mixture; `weight` is its share of the rows, all shares add up to 1."""

    name: str
    weight: float
    config: DataConfig


def members(config: DataConfig) -> list[Member]:
    """The sources of `config`: itself, or those that its mixture file lists.

    The file is a JSON list of objects with `source`, `path`, `weight` and, where they differ from
    `config`, `name`, `text_field`, `valid_path`, `split`, `max_documents`. Relative paths start at
    the file's folder.

    Raises:
      DataError: the file is missing or malformed, a key is unknown, a weight is not above 0.
    """
    if config.source != "mixture":
        return [Member(_name(config), 1.0, config)]
    file = Path(config.path).expanduser()
    if config.valid_path:
        raise DataError(
            f"data.valid_path does not apply to a mixture: give valid_path to the sources in {file}"
        )
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the mixture file {file}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"the mixture file {file} is not JSON: {error}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f'{file} must hold a list like [{{"source": "text", "path": "...", "weight": 1}}]'
        )
    found = [_member(config, row, file, number) for number, row in enumerate(rows)]
    total = sum(member.weight for member in found)
    names = [member.name for member in found]
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names)]
    return [
        Member(name, member.weight / total, member.config)
        for name, member in zip(names, found, strict=True)
    ]


def _member(config: DataConfig, row: dict, file: Path, number: int) -> Member:
    where = f"{file}, source {number}"
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1) or [", ".join(KEYS)]
            raise DataError(f"{where}: unknown key {key!r}; did you mean {near[0]}?")
    for key in set(KEYS) & set(row) - {"weight", "max_documents"}:
        if not isinstance(row[key], str):
            raise DataError(f"{where}: {key} must be a string, got {row[key]!r}")
    kind = row.get("source")
    if kind not in SOURCES:
        raise DataError(f"{where}: source must be one of {', '.join(SOURCES)}, got {kind!r}")
    weight = row.get("weight", 1.0)
    number_like = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number_like or not 0 < weight < MAX_WEIGHT:
        raise DataError(
            f"{where}: weight must be above 0 and below {MAX_WEIGHT:g}, got {weight!r:.40}"
        )
    limit = row.get("max_documents")
    if limit is not None and type(limit) is not int:
        raise DataError(f"{where}: max_documents must be a whole number or null, got {limit!r}")
    fields = {key: value for key, value in row.items() if key not in ("name", "weight")}
    # The mixture file's own path belongs to no member.
    fields = {"path": "", "valid_path": "", **fields}
    if kind not in TABLES:
        fields = {"format": "text", **fields}  # a text among conversations
    if fields.get("format", config.format) != "chat":
        fields |= {"chat_template": "", "skip_long": False}
    for key in ("path", "valid_path"):
        if fields[key] and kind in LOCAL:
            fields[key] = str(file.parent / Path(fields[key]).expanduser())
    try:
        member = dataclasses.replace(config, **fields)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from error
    return Member(row.get("name") or _name(member), float(weight), member)


def _name(config: DataConfig) -> str:
    if config.source == "stdlib":
        return "stdlib"
    if config.source == "hf":
        return config.path.replace("/", "--").replace(":", "--")
    return Path(config.path).name.replace("*", "_") or config.source


def held_out(document: Document, fraction: float) -> bool:
    """Whether the hash of the document's name (text, if it has none) falls into `fraction`."""
    return _hash(document) < fraction * 2.0**64


def _hash(document: Document) -> int:
    key = (document.name or document.text).encode("utf-8", errors="replace")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def split_documents(
    documents: Iterable[Document], fraction: float, whole: bool = False
) -> Iterator[tuple[str, Document]]:
    """Label every document "train" or "valid", in order, by the hash of its name.

    With fewer than 5 / fraction documents hashes would often hold out none, so those with the
    smallest hashes are held out, at least one; of a single document about its last `fraction`,
    or nothing, if documents are to stay `whole`.
    """
    few = min(math.ceil(5 / fraction), 4096)
    documents = iter(documents)
    first = list(itertools.islice(documents, few))
    if len(first) == 1 and whole:
        yield "train", first[0]
    elif len(first) == 1:
        yield from _cut(first[0], fraction)
    elif len(first) < few:
        ranks = sorted(range(len(first)), key=lambda i: _hash(first[i]))
        valid = set(ranks[: max(1, round(fraction * len(first)))])
        for i, document in enumerate(first):
            yield ("valid" if i in valid else "train"), document
    else:
        # Always held out, as in 1 of 150 cases the hashes of 5 / fraction documents hold out none.
        lowest = min(first, key=_hash)
        for document in itertools.chain(first, documents):
            valid = document is lowest or held_out(document, fraction)
            yield ("valid" if valid else "train"), document


def _cut(document: Document, fraction: float) -> Iterator[tuple[str, Document]]:
    """The front and about the last `fraction` of a document, cut behind a line where one ends near.

    A cut at a line may at most double what is held out: a text without lines but for a title would
    otherwise leave nothing but the title to train on.
    """
    middle = round(len(document.text) * (1 - fraction))
    earliest = max(0, 2 * middle - len(document.text))
    middle = document.text.rfind("\n", earliest, middle) + 1 or middle
    yield "train", Document(document.name, document.text[:middle])
    yield "valid", Document(document.name, document.text[middle:])
