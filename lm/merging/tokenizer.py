"""Vocabularies of several models brought to one, from their tokenizer.json files alone.

The rules are mergekit's (0.1.5). The output tokenizer is the base's, a named model's, or the
union: the base's tokenizer with all other tokens appended, in the order of the models and of their
ids (mergekit appends in an order that changes from run to run). For a token that a model lacks,
its embedding is: what `tokens:` says; else the only model's that has it; else the base's; else
the mean of the models that have it; zero if none has it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.merging.config import MergeConfig, TokenSource
from lm.merging.row_map import RowMap
from lm.merging.types import MergeError, Store

__all__ = [
    "Vocabulary",
    "folder_of",
    "make_vocabulary",
    "read_tokenizer",
    "tokens_of",
    "vocabulary_warnings",
]

Tokenizer = dict[str, Any]
"""The content of a tokenizer.json."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the output, and where each model has its tokens."""

    tokens: Mapping[str, int]
    """Of the output: token -> row."""
    own: Mapping[str, Mapping[str, int]]
    """For each model: token -> row of its embedding."""
    configured: Mapping[str, TokenSource]
    multiple: int
    """The number of rows is padded to a multiple of this."""
    tokenizer: Tokenizer
    folder: Path
    """Whose other tokenizer files go with it."""
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rows for tokens: the largest id + 1."""
        return max(self.tokens.values()) + 1

    @property
    def height(self) -> int:
        """Rows of the output's embedding, padding included."""
        return -(-self.size // self.multiple) * self.multiple

    def row_map(self, refs: Sequence[str], base: str | None, heights: Sequence[int]) -> RowMap:
        """The row map of an embedding of models `refs` whose tensors have `heights` rows.

        Raises:
            MergeError: `tokens:` asks for a token or a model that is not there.
        """
        own = [
            {token: row for token, row in self.own[ref].items() if row < height}
            for ref, height in zip(refs, heights, strict=True)
        ]
        rows = [np.full(self.size, -1, np.int32) for _ in refs]
        made: list[tuple[tuple[int, int], ...]] = [()]  # row -1: zeros, also for unused ids
        index: dict[tuple[tuple[int, int], ...], int] = {(): 0}
        first = refs.index(base) if base in refs else None
        for token, row in self.tokens.items():
            have = [k for k in range(len(refs)) if token in own[k]]
            source = self.configured.get(token)
            force = source is not None and source.force
            for k in have:
                rows[k][row] = own[k][token]
            if len(have) == len(refs) and not force:
                continue
            pairs = self._pairs(token, source, refs, own, have, first, heights)
            number = index.setdefault(pairs, len(made))
            if number == len(made):
                made.append(pairs)
            for k in range(len(refs)):
                if force or k not in have:
                    rows[k][row] = -1 - number
        return RowMap(tuple(rows), tuple(made), self.height - self.size)

    def _pairs(
        self,
        token: str,
        source: TokenSource | None,
        refs: Sequence[str],
        own: Sequence[Mapping[str, int]],
        have: Sequence[int],
        base: int | None,
        heights: Sequence[int],
    ) -> tuple[tuple[int, int], ...]:
        """(participant, row) pairs whose mean is the token's embedding where it is lacking."""
        place = f"tokenizer.tokens[{token!r}].source"
        kind = source.kind if source else "auto"
        if kind == "auto":
            givers = [base] if base in have else have
            return tuple((k, own[k][token]) for k in givers)
        if kind == "zero" or source is None:
            return ()
        if source.model not in refs:
            raise MergeError(
                f"{place}: the model {source.model} takes no part in the embedding; name one of "
                f"{', '.join(refs)}"
            )
        giver = refs.index(source.model)
        if source.token_id is not None:
            if not 0 <= source.token_id < heights[giver]:
                raise MergeError(
                    f"{place}: token_id {source.token_id} is outside the {heights[giver]} rows of "
                    f"{source.model}"
                )
            return ((giver, source.token_id),)
        wanted = token if source.token is None else source.token
        if wanted not in own[giver]:
            raise MergeError(f"{place}: {source.model} has no token {wanted!r}")
        return ((giver, own[giver][wanted]),)


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer.json of a model folder; None without one.

    Raises:
        MergeError: it is no JSON or has another form.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise MergeError(f"{path} is no tokenizer: it has no model")
    return value


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    """All tokens of a tokenizer and their ids, added tokens included, by id."""
    vocab = tokenizer["model"].get("vocab", {})
    if isinstance(vocab, list):  # Unigram: [piece, score] in the order of ids
        vocab = {piece: index for index, (piece, _) in enumerate(vocab)}
    every = dict(vocab)
    every |= {item["content"]: item["id"] for item in tokenizer.get("added_tokens") or ()}
    return dict(sorted(every.items(), key=lambda item: item[1]))


def make_vocabulary(
    config: MergeConfig, stores: Mapping[str, Store], rows: Mapping[str, int], donor: str
) -> Vocabulary | None:
    """The output's vocabulary, or None where the configuration does not ask for one.

    Args:
        config: with `tokenizer` (or `tokenizer_source`, which is read into it).
        stores: all models.
        rows: rows of each model's embedding; tokens beyond have none.
        donor: the base, or the first model without a base.
    """
    wanted = config.tokenizer
    if wanted is None:
        return None
    loaded, warnings = {}, []
    for ref, store in stores.items():
        loaded[ref] = read_tokenizer(folder_of(store))
    if loaded[donor] is None:
        raise MergeError(
            f"{donor} has no tokenizer.json, which tokenizer settings need: convert its tokenizer "
            "to that form, or leave tokenizer and tokenizer_source out"
        )
    own = {}
    for ref, tokenizer in loaded.items():
        if tokenizer is None:
            warnings.append(f"{ref} has no tokenizer.json: taken to have the tokens of {donor}")
        every = tokens_of(tokenizer if tokenizer is not None else loaded[donor])
        own[ref] = {token: row for token, row in every.items() if row < rows[ref]}
    folder = folder_of(stores[donor])
    if wanted.source in ("base", "union"):
        result = _without(loaded[donor], rows[donor], donor)
    elif wanted.source in stores:
        folder, result = folder_of(stores[wanted.source]), loaded[wanted.source]
    else:
        folder = Path(wanted.source).expanduser()
        result = read_tokenizer(folder)
    if result is None:
        raise MergeError(f"tokenizer source {wanted.source!r} has no tokenizer.json")
    result = dict(result)
    if wanted.source == "union":
        plain = [token for ref in (donor, *stores) for token in own[ref]]
        added = [
            item
            for ref in (donor, *stores)
            for item in (loaded[ref] or {}).get("added_tokens") or ()
            if item["id"] < rows[ref]
        ]
        special = {item["content"] for item in added}
        _append(result, [{"content": token} for token in plain if token not in special] + added)
    _append(result, [{"content": token} for token in wanted.tokens])
    tokens = tokens_of(result)
    nowhere = [token for token in tokens if not any(token in each for each in own.values())]
    nowhere = [token for token in nowhere if token not in wanted.tokens]
    if nowhere:
        warnings.append(f"no model has an embedding for {len(nowhere)} tokens: {nowhere[:5]}; zero")
    multiple = wanted.pad_to_multiple_of or 1
    return Vocabulary(tokens, own, wanted.tokens, multiple, result, folder, tuple(warnings))


def vocabulary_warnings(stores: Mapping[str, Store], donor: str) -> list[str]:
    """Lines for models whose tokenizer differs from the donor's, for merges that ignore it."""
    lines, base = [], None
    for ref, store in stores.items():
        paths = [folder_of(each) / "tokenizer.json" for each in (stores[donor], store)]
        if ref == donor or not all(path.is_file() for path in paths):
            continue
        if paths[0].read_bytes() == paths[1].read_bytes():
            continue
        base = tokens_of(read_tokenizer(paths[0].parent) or {}) if base is None else base
        other = tokens_of(read_tokenizer(paths[1].parent) or {})
        moved = [token for token in base if token in other and base[token] != other[token]]
        extra, lacking = len(other.keys() - base.keys()), len(base.keys() - other.keys())
        if moved or extra or lacking:
            lines.append(
                f"the tokenizers of {donor} and {ref} differ ({extra} tokens more, {lacking} "
                f"fewer, {len(moved)} with other ids): set `tokenizer: {{source: base}}` or union "
                "to align the embeddings"
            )
    return lines


def folder_of(store: Store) -> Path:
    """Where a store's small files are; of `base+adapter` the base's."""
    path = Path(store.path).expanduser()
    return path if path.exists() else Path(store.path.rpartition("+")[0] or path).expanduser()


def _without(tokenizer: Tokenizer, rows: int, ref: str) -> Tokenizer:
    """A tokenizer without the tokens that the embedding has no row for."""
    gone = {token for token, row in tokens_of(tokenizer).items() if row >= rows}
    if not gone:
        return tokenizer
    model = tokenizer["model"]
    if model.get("type") != "BPE" and gone & set(model.get("vocab", ())):
        raise MergeError(
            f"the tokenizer of {ref} has {len(gone)} tokens beyond the {rows} rows of the "
            f"embedding, and a {model.get('type')} tokenizer cannot be cut: fix its tokenizer.json"
        )
    if gone & set(model.get("vocab", ())):
        model = dict(model)
        model["vocab"] = {token: row for token, row in model["vocab"].items() if token not in gone}
        model["merges"] = [
            merge
            for merge in model.get("merges", ())
            if not gone & {*(parts := _parts(merge)), "".join(parts)}
        ]
    added = [item for item in tokenizer.get("added_tokens") or () if item["content"] not in gone]
    return tokenizer | {"model": model, "added_tokens": added}


def _parts(merge: str | list[str]) -> list[str]:
    """The two tokens of a BPE merge, which has been written in two ways."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _append(tokenizer: Tokenizer, items: Sequence[Mapping[str, Any]]) -> None:
    """Replace `added_tokens` by a longer list: known tokens keep their id."""
    known = tokens_of(tokenizer)
    added = tokenizer["added_tokens"] = list(tokenizer.get("added_tokens") or ())
    listed = {item["content"] for item in added}
    following = max(known.values(), default=-1) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    for item in items:
        token = item["content"]
        if token in listed or ("id" not in item and token in known):
            continue
        row = known.setdefault(token, following)
        following = max(following, row + 1)
        added.append(plain | {"special": False} | dict(item) | {"id": row})
        listed.add(token)
    added.sort(key=lambda item: item["id"])
