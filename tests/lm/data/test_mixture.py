import dataclasses
import json

import pytest

from lm.data.mixture import held_out, members, split_documents
from lm.data.sources import DataError, Document
from lm.train.config import DataConfig


def write(tmp_path, rows):
    file = tmp_path / "mixture.json"
    file.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return DataConfig(source="mixture", path=str(file), max_documents=7)


def test_members_take_what_they_leave_out_from_the_run(tmp_path):
    config = write(
        tmp_path,
        [
            {"source": "text", "path": "books", "weight": 3, "valid_path": "held"},
            {"source": "json", "path": "/logs", "weight": 1, "text_field": "body"},
            {"source": "stdlib", "weight": 4, "name": "python", "max_documents": 2},
        ],
    )
    books, logs, python = members(config)
    assert [m.weight for m in (books, logs, python)] == [0.375, 0.125, 0.5]
    assert [m.name for m in (books, logs, python)] == ["books", "logs", "python"]
    assert books.config.path == str(tmp_path / "books")
    assert books.config.valid_path == str(tmp_path / "held")
    assert (logs.config.path, logs.config.text_field) == ("/logs", "body")
    assert (books.config.max_documents, python.config.max_documents) == (7, 2)


def test_members_of_the_same_name_are_told_apart(tmp_path):
    rows = [{"source": "text", "path": f"{folder}/data"} for folder in "ab"]
    names = [member.name for member in members(write(tmp_path, rows))]
    assert len(set(names)) == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[", "not JSON"),
        ({}, "must hold a list"),
        ([], "must hold a list"),
        ([{"source": "text", "path": "x", "wieght": 1}], "'wieght'; did you mean weight"),
        ([{"source": "mixture", "path": "x"}], "source must be one of"),
        ([{"source": "text", "path": "x", "weight": 0}], "weight must be above 0 .*got 0"),
        ([{"source": "text", "path": "x", "weight": -1.0}], "weight must be above 0"),
        ([{"source": "text", "path": "x", "weight": True}], "weight must be above 0"),
        ([{"source": "stdlib"}, {"source": "text"}], r"source 1: .*needs data\.path"),
        ([{"source": []}], r"source must be a string, got \[\]"),
        ([{"source": "text", "path": 5}], "path must be a string, got 5"),
        ([{"source": "stdlib", "name": 7}], "name must be a string, got 7"),
        ([{"source": "json", "path": "x", "text_field": None}], "text_field must be a string"),
        ([{"source": "stdlib", "weight": "1"}], "weight must be above 0 .*got '1'"),
        ([{"source": "stdlib", "weight": 10**400}], "weight must be above 0"),
        ([{"source": "stdlib", "weight": float("nan")}], "weight must be above 0 .*got nan"),
        ([{"source": "stdlib", "max_documents": "9"}], "max_documents must be a whole number"),
        ([{"source": "stdlib", "max_documents": 2.5}], "max_documents must be a whole number"),
    ],
)
def test_bad_mixtures_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        members(write(tmp_path, rows))


def documents(count):
    return [Document(f"file{i}", f"text {i}") for i in range(count)]


def test_many_documents_are_split_by_the_hash_of_their_names():
    labelled = list(split_documents(documents(4000), 0.1))
    valid = {document.name for split, document in labelled if split == "valid"}
    # binomial: 400 +- 5 standard deviations
    assert 305 < len(valid) < 495
    assert valid == {document.name for document in documents(4000) if held_out(document, 0.1)}
    # where a document lands depends on nothing else: not on order, not on the others
    again = split_documents(documents(4000)[:1:-1], 0.1)
    for split, document in again:
        assert (split == "valid") == (document.name in valid)
    # a larger share holds out the same ones and more
    assert valid < {d.name for s, d in split_documents(documents(4000), 0.2) if s == "valid"}


def test_unnamed_documents_are_split_by_their_text():
    labelled = split_documents([Document("", f"{i % 500}") for i in range(2000)], 0.2)
    sides: dict[str, set] = {"train": set(), "valid": set()}
    for split, document in labelled:
        sides[split].add(document.text)
    assert sides["valid"] and not sides["train"] & sides["valid"]


@pytest.mark.parametrize("count", [2, 3, 30, 99])
def test_few_documents_always_hold_out_some(count):
    labelled = list(split_documents(documents(count), 0.05))
    assert [document for _, document in labelled] == documents(count)
    assert sum(split == "valid" for split, _ in labelled) == max(1, round(0.05 * count))


def test_a_single_document_loses_its_end():
    text = "".join(f"line {i}\n" for i in range(1000))
    (first, front), (second, back) = split_documents([Document("a", text)], 0.1)
    assert (first, second) == ("train", "valid")
    assert front.text + back.text == text
    assert back.text.startswith("line 9") and len(back.text) == pytest.approx(len(text) / 10, 0.1)


def test_the_runs_valid_path_is_not_dropped_silently(tmp_path):
    config = dataclasses.replace(write(tmp_path, [{"source": "stdlib"}]), valid_path="held")
    with pytest.raises(DataError, match="does not apply to a mixture"):
        members(config)


def test_a_text_without_lines_but_a_title_is_cut_near_the_fraction():
    (_, train), (_, valid) = split_documents([Document("a", "Title\n" + "x" * 9994)], 0.05)
    assert train.text + valid.text == "Title\n" + "x" * 9994
    assert 400 < len(valid.text) <= 1000


def test_many_documents_whose_hashes_hold_out_none_still_hold_out_one():
    many = [d for d in documents(150) if not held_out(d, 0.05)]
    assert len(many) > 100
    splits = [split for split, _ in split_documents(many, 0.05)]
    assert splits.count("valid") == 1
