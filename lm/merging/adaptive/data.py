"""Unlabelled text of a task as rows of tokens, and batches of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.data.tokenizer import Tokenizer
from lm.merging.adaptive.config import Task
from lm.merging.types import MergeError

__all__ = ["Batch", "Rows", "batch_of", "read_rows", "stacked", "take"]

_BYTES_PER_TOKEN = 16
"""Most bytes of a text that are read for each token that is wanted."""


class Rows(NamedTuple):
    """The text of a task. Rows are padded on the right with token 0."""

    name: str
    tokens: np.ndarray
    """int32 [N, T]."""
    lengths: np.ndarray
    """int32 [N]: tokens of each row that are text."""
    answers: np.ndarray | None
    """int32 [A]: the tokens compared behind each row; None is the whole vocabulary."""
    last_only: bool
    """Whether only the prediction behind the last token counts."""


class Batch(NamedTuple):
    """Rows of one task, with the predictions that count."""

    tokens: np.ndarray
    """int32 [B, T]."""
    real: np.ndarray
    """float32 [B, T]: 1 for text, 0 for padding."""
    index: np.ndarray
    """int32 [B, P]: positions whose prediction counts."""
    counts: np.ndarray
    """float32 [B, P]: 1, or 0 where a short row has fewer."""


def read_rows(
    task: Task, tokenizer: Tokenizer, prefix: list[int], *, length: int, examples: int, vocab: int
) -> Rows:
    """The text of a task.

    Args:
      task: whose `data` is read.
      tokenizer: of the models.
      prefix: tokens in front of every document.
      length: tokens of a row; of longer prompts the end is taken.
      examples: most rows; taken evenly from those that there are.
      vocab: ids must be below.

    Raises:
      MergeError: the file holds no text, a line is no JSON object, or an answer is not one token.
    """
    data, rows = task.data, []
    keep = max(1, length - len(prefix))
    for text in _documents(task, examples * length * _BYTES_PER_TOKEN):
        ids = tokenizer.encode(text)
        if data.prompts:
            rows.append([*prefix, *ids[-keep:]])
            continue
        ids = [*prefix, *ids]
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        if len(pieces) > 1 and len(pieces[-1]) < length // 4:
            pieces.pop()  # predictions from almost no context say little of the task
        rows += pieces
    rows = [row for row in rows if len(row) > len(prefix)]
    if not rows:
        raise MergeError(f"{data.path} holds no text for {task.name}")
    rows = [rows[i] for i in np.linspace(0, len(rows) - 1, min(len(rows), examples)).astype(int)]
    tokens = np.zeros((len(rows), length), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    if tokens.max() >= vocab:
        raise MergeError(
            f"{data.path}: the tokenizer gives the id {tokens.max()}, the models have {vocab} "
            "embeddings: it is not theirs"
        )
    lengths = np.asarray([len(row) for row in rows], np.int32)
    return Rows(task.name, tokens, lengths, _answers(task, tokenizer), data.prompts)


def _documents(task: Task, limit: int):
    data, path = task.data, Path(task.data.path).expanduser()
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            if data.kind == "text":
                yield file.read(limit)
                return
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if not line.strip():
                    continue
                yield line if data.kind == "prompts" else _field(line, f"{path}:{number}", data)
                limit -= len(line)
                if limit < 0:
                    return
    except OSError as error:
        raise MergeError(f"{path} cannot be read: {error.strerror}") from None


def _field(line: str, where: str, data) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise MergeError(f"{where} is no JSON: kind jsonl is one object a line") from None
    text = value.get(data.field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise MergeError(f"{where} has no text in the field {data.field!r}: name it by data.field")
    return text


def _answers(task: Task, tokenizer: Tokenizer) -> np.ndarray | None:
    ids = []
    for answer in task.data.answers:
        found = tokenizer.encode(answer)
        if len(found) != 1:
            raise MergeError(
                f"{task.name}: the answer {answer!r} is {len(found)} tokens, and must be one: "
                "answer by letters or digits, perhaps with a space in front"
            )
        ids.append(int(found[0]))
    if len(set(ids)) < len(ids):
        raise MergeError(f"{task.name}: two of the answers {task.data.answers} are the same token")
    return np.asarray(ids, np.int32) if ids else None


def batch_of(rows: Rows, step: int, *, size: int, positions: int, seed: int, stream: int) -> Batch:
    """Batch `step` of a task: a function of its arguments alone, so that work can be resumed.

    Rows are taken without repetition until all were, in an order drawn from (seed, stream, pass).

    Args:
      rows: the task's text.
      step: counts from 0.
      size: rows of a batch.
      positions: predictions of a row, spread evenly up to the last.
      seed: of the order.
      stream: the number of the task.
    """
    count = len(rows.tokens)
    places = np.arange(step * size, (step + 1) * size)
    orders = {
        each: np.random.default_rng([seed, stream, each]).permutation(count)
        for each in dict.fromkeys((places // count).tolist())
    }
    chosen = np.asarray([orders[place // count][place % count] for place in places.tolist()])
    return take(rows, chosen, positions)


def take(rows: Rows, chosen: np.ndarray, positions: int) -> Batch:
    """The rows of these numbers as a batch."""
    lengths = rows.lengths[chosen]
    real = np.arange(rows.tokens.shape[1])[None] < lengths[:, None]
    wanted = 1 if rows.last_only else positions
    back = np.arange(wanted)[::-1]
    # From the last token backwards in equal steps; what falls before the row does not count.
    step = np.maximum(lengths, wanted)[:, None]
    index = lengths[:, None] - 1 - (back[None] * step) // wanted
    counts = index >= 0
    index = np.maximum(index, 0).astype(np.int32)
    return Batch(rows.tokens[chosen], real.astype(np.float32), index, counts.astype(np.float32))


def stacked(batches: Sequence[Batch], positions: int) -> Batch:
    """Batches of several tasks as one, task by task; rows with one prediction are filled up with
    some that do not count."""
    wide = []
    for batch in batches:
        missing = ((0, 0), (positions - batch.index.shape[1], 0))
        index, counts = np.pad(batch.index, missing), np.pad(batch.counts, missing)
        wide.append(batch._replace(index=index, counts=counts))
    return Batch(*(np.concatenate(parts) for parts in zip(*wide, strict=True)))
