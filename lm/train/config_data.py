"""Where text comes from and how it becomes tokens: `--data.*`, read by `lm.data`."""

import dataclasses
from typing import Literal

from lm.config import check

SOURCES = ("stdlib", "text", "json", "parquet", "hf", "mixture")
TABLES = ("json", "parquet", "hf", "mixture")
"""Sources whose documents are rows, which can be conversations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: Literal["stdlib", "text", "json", "parquet", "hf", "mixture"] = "stdlib"
    """stdlib: the running Python's own standard library. text, json (lines), parquet: local files.
    hf: a dataset of the Hugging Face Hub. mixture: a weighted mixture of the others."""
    path: str = ""
    """File, folder or glob (text, json, parquet); dataset name or name:subset (hf); a JSON file
    that lists sources with weights (mixture)."""
    text_field: str = "text"
    """Column or key that holds the document."""
    format: Literal["text", "chat"] = "text"
    """chat: rows are conversations, {"messages": [...]} or {"prompt": ..., "completion": ...};
    they are rendered with the chat template, only assistant turns are learnt, none is cut."""
    chat_template: str = ""
    """chat: file of a Jinja template, or chatml, llama3, mistral, alpaca, exaone; empty is the
    tokenizer's own."""
    skip_long: bool = False
    """chat: leave out conversations that are longer than a sequence instead of refusing them."""
    split: str = "train"
    """Split of a Hub dataset."""
    valid_path: str = ""
    """Held-out files or split; empty holds out documents of the source by hash."""
    valid_fraction: float = 0.05
    """Share of documents held out by hash of their name (or text) when valid_path is empty."""
    streaming: bool = True
    """hf: stream while tokenizing instead of downloading the whole dataset first."""
    max_documents: int | None = None
    """Read at most this many documents of each source."""
    tokenizer: str = "byte"
    """"byte", or the path of a tokenizer.json or of a folder that holds one."""
    cache: str = ""
    """Folder of the token stores; empty is $ANISO_CACHE or ~/.cache/aniso."""
    workers: int = 0
    """Processes that tokenize; 0 is one per core."""
    prefetch: int = 2
    """Batches made ahead of the device."""

    def __post_init__(self):
        check(
            self.source in SOURCES,
            f"data.source must be one of {', '.join(SOURCES)}, got {self.source!r}",
        )
        check(
            self.source == "stdlib" or bool(self.path),
            f"data.source {self.source} needs data.path",
        )
        check(
            self.source != "stdlib" or not self.path,
            f"data.path {self.path} is given but data.source is stdlib, which has none: name the "
            f"kind of source with --data.source ({', '.join(SOURCES[1:])})",
        )
        check(
            0 < self.valid_fraction < 1 or bool(self.valid_path),
            f"data.valid_fraction must lie between 0 and 1, got {self.valid_fraction}",
        )
        chat = self.format == "chat"
        check(self.format in ("text", "chat"), f"data.format is text or chat, not {self.format!r}")
        check(
            not chat or self.source in TABLES,
            f"data.format chat is for conversations in rows, data.source {self.source} has none: "
            f"choose one of {', '.join(TABLES)}",
        )
        for name in ("chat_template", "skip_long"):
            check(
                chat or not getattr(self, name) or self.source == "mixture",
                f"data.{name} is given but data.format is {self.format}: add --data.format chat",
            )
        check(self.workers >= 0, f"data.workers must be 0 or more, got {self.workers}")
        check(self.prefetch >= 1, f"data.prefetch must be 1 or more, got {self.prefetch}")
        check(
            self.max_documents is None or self.max_documents > 0,
            f"data.max_documents must be above 0, got {self.max_documents}",
        )
