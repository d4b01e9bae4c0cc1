"""Tokenize a source once, in parallel, into the files of a token store.

Documents are cut into shards in the order they are read, by their size alone, so the files do not
depend on the number of workers. A shard counts as done when its entry in the journal exists; an
interrupted build reads the source again, finds the entries and tokenizes only what is missing.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from lm.data.chat import ChatEncoder
from lm.data.files import unwritable, write_file
from lm.data.sources import DataError, Document, Source
from lm.data.tokenizer import ByteTokenizer, Tokenizer

VERSION = 1
SHARD_BYTES = 4 << 20  # text in each of the first shards; doubles every 8 shards, at most 64-fold
ENCODE_BYTES = 1 << 20  # text handed to a tokenizer at once; bounds its memory


@dataclasses.dataclass
class Shard:
    """Documents that become one token file."""

    split: str
    number: int
    texts: list[bytes]
    size: int = 0
    crc: int = 0
    origins: list[str] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"

    def add(self, text: bytes, origin: str = ""):
        self.texts.append(text)
        self.origins.append(origin)
        self.size += len(text)
        self.crc = zlib.crc32(text, zlib.crc32(len(text).to_bytes(8, "little"), self.crc))


def cut_shards(labelled: Iterable[tuple[str, Document]], shard_bytes: int) -> Iterator[Shard]:
    """Group documents by split into shards, in reading order."""
    open_shards: dict[str, Shard] = {}
    for split, document in labelled:
        shard = open_shards.setdefault(split, Shard(split, 0, []))
        shard.add(document.text.encode("utf-8", errors="replace"), document.origin)
        if shard.size >= shard_bytes << min(shard.number // 8, 6):
            yield shard
            open_shards[split] = Shard(split, shard.number + 1, [])
    yield from (shard for shard in open_shards.values() if shard.texts)


def _json(value) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def encode_shard(tokenizer: Tokenizer, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Framed tokens of all `texts` one behind the other, and the number of each."""
    pieces, lengths = [], []
    dtype = store_dtype(tokenizer)
    front = np.array([tokenizer.separator_id], dtype)
    back = np.array([] if tokenizer.end_id is None else [tokenizer.end_id], dtype)
    for group in _groups(texts):
        for ids in tokenizer.encode_batch([text.decode("utf-8") for text in group]):
            pieces += (front, ids.astype(dtype), back)
            lengths.append(len(front) + len(ids) + len(back))
    return np.concatenate(pieces), np.array(lengths, np.int64)


def encode_conversations(
    encoder: ChatEncoder, texts: list[bytes], origins: list[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of all conversations, not framed, the number of each, and uint8: which are learnt."""
    pieces, masks = [], []
    for text, origin in zip(texts, origins, strict=True):
        ids, mask = encoder.encode(text.decode("utf-8"), origin)
        pieces.append(ids)
        masks.append(mask)
    lengths = np.array([len(ids) for ids in pieces], np.int64)
    tokens = np.concatenate(pieces).astype(store_dtype(encoder.tokenizer))
    return tokens, lengths, np.concatenate(masks).astype(np.uint8)


def _groups(texts: list[bytes]) -> Iterator[list[bytes]]:
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= ENCODE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def store_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def _finish_shard(folder: str, tokenizer: Tokenizer | ChatEncoder, shard: Shard) -> int:
    """Write one shard's files, its journal entry last; returns the bytes of text in it."""
    journal, masked = Path(folder, "journal"), {}
    if isinstance(tokenizer, ChatEncoder):
        tokens, lengths, mask = encode_conversations(tokenizer, shard.texts, shard.origins)
        data = memoryview(mask).cast("B")
        write_file(Path(folder, f"{shard.name}.mask"), data)
        write_file(journal / f"{shard.name}.origins", "\n".join(shard.origins).encode())
        masked = {
            "mask_sha256": hashlib.sha256(data).hexdigest(),
            "targets": int(mask.sum()),
            "learnt_bytes": int(tokenizer.token_bytes[tokens[mask > 0]].sum()),
        }
    else:
        tokens, lengths = encode_shard(tokenizer, shard.texts)
    data = memoryview(tokens).cast("B")
    write_file(Path(folder, f"{shard.name}.tokens"), data)
    write_file(journal / f"{shard.name}.lengths", memoryview(lengths).cast("B"))
    entry = {
        "file": f"{shard.name}.tokens",
        "size": len(data),
        "tokens": len(tokens),
        "documents": len(lengths),
        "bytes": shard.size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "source_crc": shard.crc,
        **masked,
    }
    write_file(journal / f"{shard.name}.json", _json(entry))
    return shard.size


def _is_finished(folder: Path, shard: Shard) -> bool:
    try:
        entry = json.loads((folder / "journal" / f"{shard.name}.json").read_bytes())
    except (OSError, ValueError):
        return False
    same = (entry["source_crc"], entry["bytes"], entry["documents"]) == (
        shard.crc,
        shard.size,
        len(shard.texts),
    )
    file = folder / entry["file"]
    return same and file.is_file() and file.stat().st_size == entry["size"]


_worker: tuple[str, Tokenizer | ChatEncoder] | None = None


def _start_worker(folder: str, tokenizer: Tokenizer | ChatEncoder) -> None:
    import multiprocessing

    global _worker
    _worker = folder, tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()

    def follow_parent():  # a killed parent would leave its workers waiting forever
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _work(shard: Shard) -> int:
    assert _worker is not None
    return _finish_shard(*_worker, shard)


def _tokenize(
    folder: Path,
    tokenizer: Tokenizer | ChatEncoder,
    shards: Iterable[Shard],
    workers: int,
    report: Callable[[int], object],
) -> None:
    """Finish every shard; in this process if there is one worker or one shard."""
    import concurrent.futures
    import multiprocessing
    from concurrent.futures.process import BrokenProcessPool

    waiting: Shard | None = None  # the first one: a second must come before a pool pays off
    pool, running = None, set()

    def drain(limit: int):
        nonlocal running
        while len(running) > limit:
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                report(future.result())

    try:
        for shard in shards:
            if workers == 1:
                report(_finish_shard(str(folder), tokenizer, shard))
            elif pool is None and waiting is None:
                waiting = shard
            else:
                if pool is None:
                    # spawn: forking a process that runs JAX's threads can deadlock
                    pool = concurrent.futures.ProcessPoolExecutor(
                        workers,
                        multiprocessing.get_context("spawn"),
                        _start_worker,
                        (str(folder), tokenizer),
                    )
                    running.add(pool.submit(_work, waiting))
                running.add(pool.submit(_work, shard))
                drain(workers)
        drain(0)
        if pool is None and waiting is not None:
            report(_finish_shard(str(folder), tokenizer, waiting))
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process died (out of memory, or a script that starts training without "
            '`if __name__ == "__main__"`); lower data.workers and run again: finished shards '
            "are kept"
        ) from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _finish_store(
    folder: Path, tokenizer: Tokenizer, head: dict, shards: dict[str, int], masked: bool
) -> None:
    """Join the journal into one offsets file per split and meta.json."""
    splits = {}
    for split, count in shards.items():
        names = [f"{split}-{number:05d}" for number in range(count)]
        entries = [json.loads((folder / "journal" / f"{name}.json").read_bytes()) for name in names]
        lengths = [np.fromfile(folder / "journal" / f"{name}.lengths", "<i8") for name in names]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
        data = memoryview(offsets).cast("B")
        write_file(folder / f"{split}.offsets", data)
        splits[split] = {
            "documents": len(offsets) - 1,
            "tokens": int(offsets[-1]),
            "bytes": sum(entry.get("learnt_bytes", entry["bytes"]) for entry in entries),
            "offsets_sha256": hashlib.sha256(data).hexdigest(),
            "shards": entries,
        }
        if masked:
            splits[split]["targets"] = sum(entry["targets"] for entry in entries)
            origins = [(folder / "journal" / f"{name}.origins").read_bytes() for name in names]
            write_file(folder / f"{split}.origins", b"\n".join(origins))
    sizes = tokenizer.token_bytes()
    write_file(folder / "token_bytes", memoryview(sizes.astype("<i4")).cast("B"))
    meta = {
        **head,
        "version": VERSION,
        "dtype": store_dtype(tokenizer).str,
        "vocab_size": tokenizer.vocab_size,
        "separator_id": tokenizer.separator_id,
        "end_id": tokenizer.end_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "masked": masked,
        "splits": splits,
    }
    write_file(folder / "meta.json", _json(meta))


def build_store(
    folder: Path,
    source: Source,
    label: Callable[[Iterable[Document]], Iterable[tuple[str, Document]]],
    tokenizer: Tokenizer | ChatEncoder,
    *,
    head: dict,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Make `folder`, or continue where a killed build stopped; the result is the same bytes.

    Args:
      folder: the store; `folder`.partial is where it grows. The caller holds its lock.
      source: the documents.
      label: documents to (split, document).
      tokenizer: made once here and sent to the workers; one of conversations makes a store that
        says which tokens are learnt.
      head: JSON-able entries for meta.json.
      workers: processes that tokenize; bytes are always cut in this process, which is faster.
      shard_bytes: text in the first shards.
      progress: show a bar on stderr.

    Raises:
      DataError: no text, or the folder cannot be written.
    """
    from tqdm import tqdm

    partial = folder.with_name(folder.name + ".partial")
    try:
        (partial / "journal").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(partial, error) from error
    if isinstance(tokenizer, ByteTokenizer):
        workers = 1
    counts: dict[str, int] = {}
    bar = tqdm(
        total=source.size,
        desc=f"tokenizing {folder.name}",
        unit="B",
        unit_scale=True,
        disable=not progress,
        file=sys.stderr,
        leave=False,
    )

    def missing():
        for shard in cut_shards(label(source.documents()), shard_bytes):
            counts[shard.split] = shard.number + 1
            if _is_finished(partial, shard):
                bar.update(shard.size)
            else:
                yield shard

    with bar:
        _tokenize(partial, tokenizer, missing(), workers, bar.update)
    if not counts:
        raise DataError(
            f"{folder.name}: the source holds no text ({source.skipped} files or rows were "
            "passed over as unreadable, not UTF-8 or empty)"
        )
    masked = isinstance(tokenizer, ChatEncoder)
    plain = tokenizer.tokenizer if isinstance(tokenizer, ChatEncoder) else tokenizer
    _finish_store(partial, plain, {**head, "skipped": source.skipped}, counts, masked)
    try:
        kept = {"meta.json", "token_bytes", *(f"{split}.offsets" for split in counts)}
        names = [f"{split}-{n:05d}" for split, count in counts.items() for n in range(count)]
        kept |= {f"{name}.tokens" for name in names}
        if masked:
            kept |= {f"{name}.mask" for name in names} | {f"{split}.origins" for split in counts}
        for file in partial.iterdir():  # the journal, and what a killed writer left
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in kept:
                file.unlink(missing_ok=True)
        os.replace(partial, folder)
    except OSError as error:
        raise unwritable(folder, error) from error
