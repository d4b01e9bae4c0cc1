"""Where documents come from: one function and one row of `SOURCES` per kind of source.

Every source yields its documents in the same order every time it is read, and says by its
`definition` what it read, so that a token store can tell whether it is still valid.
"""

import contextlib
import dataclasses
import errno
import glob
import importlib
import itertools
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from lm.config import ConfigError
from lm.train.config import DataConfig

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


class DataError(ConfigError):
    """Data that cannot be read, stored or used; the message names it and the remedy."""


@dataclasses.dataclass
class Document:
    """One text; `name` is where it came from, "" for a row of a table."""

    name: str
    text: str
    origin: str = ""
    """For messages: file and line of a conversation."""


@dataclasses.dataclass
class Source:
    """Documents that can be read again and again in the same order."""

    definition: list
    """JSON-able, changes when the documents do: names, sizes, times of files; name of a dataset."""
    read: Callable[[Callable[[str], None]], Iterator[Document]]
    """Yields the documents; calls its argument with the name of everything it passes over."""
    size: int | None = None
    """Bytes of text, where known beforehand."""
    max_documents: int | None = None
    skipped: int = 0
    """Files and rows passed over in the last read: unreadable, not UTF-8 or empty."""

    def documents(self) -> Iterator[Document]:
        """The documents that hold text."""
        self.skipped = 0

        def skip(_name: str):
            self.skipped += 1

        def nonempty():
            for document in self.read(skip):
                if document.text:
                    yield document
                else:
                    skip(document.name)

        return itertools.islice(nonempty(), self.max_documents)


def require(package: str):
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"this data source needs the package {package}: pip install 'aniso[data]'"
        ) from error


def find_files(path: str, endings: tuple[str, ...] = ()) -> dict[str, Path]:
    """Files of a file, folder or glob by their name below it, sorted; at least one.

    In a folder only files with one of `endings` count (none given: all), compressed or not,
    hidden ones never.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return {place.name: place}
    if place.is_dir():
        root, found = place, [file for file in place.rglob("*") if file.is_file()]
        found = [f for f in found if not any(p.startswith(".") for p in f.relative_to(root).parts)]
        if endings:
            found = [f for f in found if _plain_ending(f) in endings]
    else:
        found = [Path(f) for f in glob.glob(str(place), recursive=True) if os.path.isfile(f)]
        root = Path(os.path.commonpath([f.parent for f in found])) if found else place
    if not found:
        what = f" ending in {', '.join(endings)}" if endings and place.is_dir() else ""
        raise DataError(f"data.path {path!r}: no such file, folder or glob match{what}")
    files = {file.relative_to(root).as_posix(): file for file in found}
    return dict(sorted(files.items()))


def _plain_ending(file: Path) -> str:
    endings = [e.lower() for e in file.suffixes]
    if endings and endings[-1] in COMPRESSIONS:
        endings.pop()
    return endings[-1] if endings else ""


def _stamp(files: dict[str, Path]) -> list:
    stats = [(name, file.stat()) for name, file in files.items()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


@contextlib.contextmanager
def open_binary(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if its name ends like a compressed one's."""
    ending = file.suffix.lower()
    if ending == ".zst":
        with file.open("rb") as raw, require("zstandard").open(raw, "rb") as stream:
            yield stream
        return
    opener = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2"}.get(ending, "builtins")
    with importlib.import_module(opener).open(file, "rb") as stream:
        yield stream


def _read_text(file: Path) -> str:
    with open_binary(file) as stream:
        return stream.read().decode("utf-8")


def _text_files(files: dict[str, Path], definition: list) -> Source:
    def read(skip):
        for name, file in files.items():
            try:
                text = _read_text(file)
            except (DataError, MemoryError):
                raise
            except Exception as error:  # each compression has its own errors; not UTF-8
                # A disk that fails for a moment must not leave the file out of the store for good.
                if isinstance(error, OSError) and error.errno not in (None, errno.EACCES):
                    raise DataError(f"cannot read {file}: {error.strerror}; try again") from error
                skip(name)
                continue
            yield Document(name, text)

    packed = any(file.suffix.lower() in COMPRESSIONS for file in files.values())
    size = None if packed else sum(file.stat().st_size for file in files.values())
    return Source(definition, read, size)


def stdlib_source(config: DataConfig) -> Source:
    """Sources and docstrings of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    leave = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    files = {}
    for folder, subfolders, names in root.walk():
        subfolders[:] = [name for name in subfolders if name not in leave]
        for file in (folder / name for name in names if name.endswith(".py")):
            if file.is_file():  # distributions leave links to settings that may not be there
                files[file.relative_to(root).as_posix()] = file
    files = dict(sorted(files.items()))
    if not files:
        raise DataError(
            f"data.source stdlib: {root} holds no *.py files (a stripped Python); use "
            "data.source text with data.path"
        )
    return _text_files(files, ["stdlib", sys.version, _stamp(files)])


def text_source(config: DataConfig) -> Source:
    """One document per file; files that are not UTF-8 are passed over."""
    files = find_files(config.path)
    return _text_files(files, ["text", _stamp(files)])


def _rows(config: DataConfig, load: Callable, where: str, skip) -> Iterator[Document]:
    """One document per row of a dataset that `load(**options)` gives."""
    field = config.text_field
    try:
        rows = load()
        if chat := _chat(config):
            places = ((f"{where}, row {i}", row) for i, row in enumerate(rows, 1))
            yield from chat.conversations(places)
            return
        columns = rows.column_names
        if columns is not None and field in columns:
            rows = rows.select_columns([field])
        for number, row in enumerate(rows):
            if field not in row:
                raise DataError(
                    f"{where} has no column {field!r}; its columns are "
                    f"{', '.join(columns or row)}: set data.text_field"
                )
            text = row[field]
            if text is None:
                skip(f"{where}:{number}")
            elif isinstance(text, str):
                yield Document("", text)
            else:
                raise DataError(
                    f"{where}: column {field!r} holds {type(text).__name__}, not text: set "
                    "data.text_field"
                )
    except DataError:
        raise
    except Exception as error:  # readers of many formats and of the network: no common base
        cause = error.__cause__ or error
        raise DataError(
            f"cannot read {where}: {type(error).__name__}: {error}"
            + (f" ({cause})" if cause is not error else "")
        ) from error


def _table_source(config: DataConfig, kind: str, endings: tuple[str, ...]) -> Source:
    chat = _chat(config)
    datasets = None if chat and kind == "json" else require("datasets")
    files = find_files(config.path, endings)

    def read(skip):
        # One file at a time: an error names its file, and files may differ in other columns.
        for name, file in files.items():
            if chat and kind == "json":  # read here: the library's errors name no line
                yield from chat.conversations(chat.read_json_lines(file, skip))
                continue
            if kind == "json" and file.stat().st_size == 0:  # the reader fails on no rows at all
                skip(name)
                continue

            def load(file=file):
                # The library takes names for patterns, which may match nothing or other files.
                pattern = glob.escape(str(file))
                return datasets.load_dataset(
                    kind, data_files=[pattern], split="train", streaming=True
                )

            yield from _rows(config, load, str(file), skip)

    return Source([kind, _what(config), _stamp(files)], read)


def json_source(config: DataConfig) -> Source:
    """One document per line of JSON (or per element of a JSON array)."""
    return _table_source(config, "json", (".jsonl", ".json", ".ndjson"))


def parquet_source(config: DataConfig) -> Source:
    """One document per row of parquet files."""
    return _table_source(config, "parquet", (".parquet",))


def hf_source(config: DataConfig) -> Source:
    """One document per row of a dataset of the Hugging Face Hub (name or name:subset)."""
    datasets = require("datasets")
    name, _, subset = config.path.partition(":")

    def load():
        return datasets.load_dataset(
            name, subset or None, split=config.split, streaming=config.streaming
        )

    def read(skip):
        yield from _rows(config, load, f"dataset {config.path} ({config.split})", skip)

    return Source(["hf", name, subset, config.split, _what(config)], read)


def _chat(config: DataConfig):
    """`lm.data.chat` if rows are conversations, which needs more than this module; else None."""
    return importlib.import_module("lm.data.chat") if config.format == "chat" else None


def _what(config: DataConfig) -> str | list[str]:
    """What of a row is read, for a source's definition."""
    return config.text_field if config.format == "text" else [config.format]


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "stdlib": stdlib_source,
    "text": text_source,
    "json": json_source,
    "parquet": parquet_source,
    "hf": hf_source,
}


def open_source(config: DataConfig) -> Source:
    """The documents that `config` names; mixtures are taken apart by `lm.data.mixture` first.

    Raises:
      DataError: nothing at data.path, or a package is missing.
    """
    try:
        source = SOURCES[config.source](config)
    except OSError as error:  # no right to look, a name too long, a file that has just gone
        raise DataError(
            f"data.path {config.path[:200]!r} cannot be read: {error.strerror}"
        ) from error
    source.max_documents = config.max_documents
    source.definition = [*source.definition, config.max_documents]
    return source


def open_valid_source(config: DataConfig) -> Source | None:
    """The separate held-out documents of `config.valid_path`; None when it is empty."""
    if not config.valid_path:
        return None
    if config.source == "hf":
        return open_source(dataclasses.replace(config, split=config.valid_path))
    kind = "text" if config.source == "stdlib" else config.source
    return open_source(dataclasses.replace(config, source=kind, path=config.valid_path))
