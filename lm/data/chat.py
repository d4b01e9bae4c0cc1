"""Conversations as training data: rows read and checked, rendered, tokenized, and masked.

A row is {"messages": [{"role": ..., "content": ...}, ...]}, optionally with "tools" and
"chat_template_kwargs", or {"prompt": ..., "completion": ...}, each a text or a list of messages.
What the assistant says is learnt, the token that ends its turn included; all else is context.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.chat_template import ChatTemplate, load_template
from lm.data.sources import DataError, Document, open_binary
from lm.data.tokenizer import Tokenizer

__all__ = ["ChatEncoder", "conversations", "load_encoder", "read_json_lines", "text_encoder"]

_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
_NONCHARACTERS = ("\ufdd0", "\ufdd1")


def read_json_lines(file: Path, skip: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    """(where, value) of every line of a file, compressed or not; or of a JSON array's elements.

    Raises:
      DataError: a line that is not JSON, or a file that cannot be read.
    """
    number, empty = 0, True
    try:
        with open_binary(file) as raw, io.BufferedReader(raw) as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                if empty and line.lstrip()[:1] == b"[":  # everything is one array
                    array = (line + stream.read()).decode("utf-8")
                    for element, value in enumerate(_parse(array, str(file)), 1):
                        yield f"{file}, element {element}", value
                    return
                empty = False
                where = f"{file}, line {number}"
                yield where, _parse(line.decode("utf-8-sig" if number == 1 else "utf-8"), where)
    except DataError:
        raise
    except Exception as error:  # each compression has its own errors; not UTF-8
        raise DataError(
            f"cannot read {file} behind line {max(number - 1, 0)}: {type(error).__name__}: {error}"
        ) from error
    if empty:
        skip(str(file))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{where}: not JSON ({error}): every line must be one object, {_EXAMPLE}"
        ) from error


def conversations(rows: Iterable[tuple[str, Any]]) -> Iterator[Document]:
    """Rows as documents, checked: `text` is the conversation in JSON, `origin` where it stands.

    Raises:
      DataError: no conversation, naming its file and line and what to change.
    """
    for where, row in rows:
        yield Document("", json.dumps(_conversation(row, where), ensure_ascii=False), where)


def _conversation(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} is no object: it must be like {_EXAMPLE}")
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        front = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        back = completion
        if isinstance(completion, str):
            back = [{"role": "assistant", "content": completion}]
        if not isinstance(front, list) or not isinstance(back, list):
            raise DataError(f"{where}: prompt and completion must be texts or lists of messages")
        messages = [*front, *back]
    else:
        raise DataError(
            f"{where}: the keys are {', '.join(row) or 'none'}, needed are messages, or prompt and "
            "completion"
        )
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list like that of {_EXAMPLE}")
    clean = [_message(message, f"{where}, message {i}") for i, message in enumerate(messages, 1)]
    if not any(message["role"] == "assistant" for message in clean):
        raise DataError(
            f"{where}: there is nothing to learn from, no message has the role assistant: remove "
            "the conversation, or give it an answer"
        )
    found: dict[str, Any] = {"messages": clean}
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(key)
        if value is not None:
            if not isinstance(value, kind):
                raise DataError(f"{where}: {key} must be a {kind.__name__}, got {value!r:.60}")
            found[key] = value
    return found


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where}: {message!r:.60} is no object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        other = " (from and value are to be called role and content)" if "from" in message else ""
        raise DataError(f"{where} has no role: add system, user, assistant or tool{other}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str | list):
        raise DataError(f"{where} ({role}) has no content: it must be a text, got {content!r:.60}")
    if any(mark in json.dumps(message, ensure_ascii=False) for mark in _NONCHARACTERS):
        raise DataError(f"{where} ({role}) holds U+FDD0 or U+FDD1, which no text may: remove them")
    # Tables fill up with None what only other rows have.
    rest = {key: value for key, value in message.items() if value is not None}
    return {**rest, "role": role, "content": content}


class ChatEncoder:
    """Conversations (JSON, as `conversations` makes them) to tokens, and which of them are learnt.

    Attributes:
      tokenizer: whose ids they are.
      template: how they are rendered.
      token_bytes: as `Tokenizer.token_bytes` gives them.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        self._open()

    def __getstate__(self) -> dict:
        return {"tokenizer": self.tokenizer, "template": self.template}

    def __setstate__(self, state: dict):
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._library = _library(self.tokenizer)
        self.token_bytes = self.tokenizer.token_bytes()
        added = self._library.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}

    def ids(self, text: str) -> np.ndarray:
        """int32 [tokens] of a rendered text, special tokens in it included."""
        return np.array(self._encode(text).ids, np.int32)

    def _encode(self, text: str):
        return self._library.encode(_clean(text), add_special_tokens=False)

    def encode(self, text: str, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [n] of one conversation, and bool [n]: which are learnt.

        With a template that marks them, a token is learnt if it holds a character of what is
        marked. Otherwise the conversation is rendered up to each assistant turn and up to its end,
        and both must be the beginning of the whole, text and tokens; what lies between them is
        learnt, but for blanks behind the token that ends the turn.

        Raises:
          DataError: the template fails, renders turns differently in the middle of a conversation
            than at its end, or marks nothing; named with `where`.
        """
        row = json.loads(text)
        messages = row["messages"]
        options = row.get("chat_template_kwargs", {})
        options = {**options, "tools": row["tools"]} if "tools" in row else options
        try:
            whole, spans = self.template.render(messages, **options)
            encoded = self._encode(whole)
            ids = np.array(encoded.ids, np.int32)
            mask = np.zeros(len(ids), bool)
            if self.template.marked:
                offsets = np.array(encoded.offsets, np.int64).reshape(-1, 2)
                for start, stop in spans:
                    mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
            else:
                for index, message in enumerate(messages):
                    if message["role"] == "assistant":
                        start = self._prefix(whole, ids, messages, index, True, options)
                        stop = self._prefix(whole, ids, messages, index + 1, False, options)
                        mask[start : self._end(ids, start, stop)] = True
            mask[:1] = False  # nothing stands before the first token, so nothing predicts it
            if not mask.any():
                raise DataError(
                    f"there is nothing to learn from: {self.template.where} leaves nothing of what "
                    "the assistant says"
                )
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return ids, mask

    def _prefix(self, whole: str, ids, messages, count: int, prompt: bool, options) -> int:
        """Tokens of the first `count` messages, which must be the beginning of `ids`."""
        text, _ = self.template.render(messages[:count], prompt=prompt, **options)
        begin = self.ids(text)
        if not whole.startswith(text):
            how = "another text"
        elif not np.array_equal(ids[: len(begin)], begin):
            how = "other tokens"
        else:
            return len(begin)
        turns = f"messages 1 to {count}" + (" and the prompt for an answer" if prompt else "")
        raise DataError(
            f"{self.template.where} gives {turns} {how} when more follows, so that it cannot be "
            "told what is learnt: give data.chat_template one that marks what the assistant says "
            "by {% generation %} and {% endgeneration %}, or one like chatml"
        )

    def _end(self, ids: np.ndarray, start: int, stop: int) -> int:
        """Where a turn ends: blanks behind its last special token are the template's."""
        end = stop
        while end > start and int(ids[end - 1]) not in self._special:
            if self._library.decode([int(ids[end - 1])], skip_special_tokens=False).strip():
                return stop
            end -= 1
        return end if end > start else stop


def _library(tokenizer: Tokenizer):
    """The tokenizer's library, with names of special tokens in texts read as these tokens."""
    library = tokenizer.library()
    library.encode_special_tokens = False
    library.no_truncation()
    library.no_padding()
    return library


def _clean(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode("utf-8")  # no lone surrogates


def text_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """A function from rendered text to ids: names of special tokens are read as these tokens."""
    library = _library(tokenizer)
    return lambda text: library.encode(_clean(text), add_special_tokens=False).ids


def load_encoder(tokenizer: Tokenizer, spec: str, chosen: str = "") -> ChatEncoder:
    """The encoder of conversations for `DataConfig.tokenizer` and `DataConfig.chat_template`.

    Args:
      tokenizer: as `load_tokenizer(spec)` gives it.
      spec: where it came from; beside it lies its chat template.
      chosen: another template: a file, or a name.

    Raises:
      DataError: no template, or one that cannot be used.
    """
    library = tokenizer.library()
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    known = {name: library.id_to_token(i) for name, i in ids.items() if i is not None}
    return ChatEncoder(tokenizer, load_template(spec, chosen, known))
