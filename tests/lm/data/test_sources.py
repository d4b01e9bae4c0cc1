import bz2
import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from lm.data.sources import DataError, open_source, open_valid_source
from lm.train.config import DataConfig


def texts(**options):
    return [document.text for document in open_source(DataConfig(**options)).documents()]


def test_stdlib_is_the_running_pythons_library_without_tests():
    source = open_source(DataConfig())
    documents = list(source.documents())
    names = [document.name for document in documents]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "idlelib", "site-packages", "__pycache__"}
    argparse = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes().decode()
    assert documents[names.index("argparse.py")].text == argparse
    assert sum(len(document.text) for document in documents) > 5e6
    assert open_source(DataConfig()).definition == source.definition


def test_text_file_folder_and_glob(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "one.md").write_text("one")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress("zwölf".encode()))
    (tmp_path / "z.txt.bz2").write_bytes(bz2.compress(b"eleven"))
    (tmp_path / "zz.txt.gz").write_bytes(gzip.compress(b"cut short")[:-9])
    source = open_source(DataConfig(source="text", path=str(tmp_path)))
    found = [(document.name, document.text) for document in source.documents()]
    assert found == [
        ("b/two.txt", "two"),
        ("one.md", "one"),
        ("z.txt.bz2", "eleven"),
        ("z.txt.gz", "zwölf"),
    ]
    assert source.skipped == 3
    assert texts(source="text", path=str(tmp_path / "one.md")) == ["one"]
    assert texts(source="text", path=str(tmp_path / "**" / "*.txt")) == ["two"]
    assert texts(source="text", path=str(tmp_path), max_documents=1) == ["two"]


def test_text_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"packed"))
    assert texts(source="text", path=str(tmp_path)) == ["packed"]


def test_the_definition_follows_the_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    config = DataConfig(source="text", path=str(file))
    before = open_source(config).definition
    assert open_source(config).definition == before
    file.write_text("other")
    assert open_source(config).definition != before


@pytest.mark.parametrize("kind", ["text", "parquet"])
def test_nothing_found_is_an_error_naming_the_path(tmp_path, kind):
    for path in (tmp_path / "missing", tmp_path / "*.none", tmp_path):
        with pytest.raises(DataError, match=f"{path.name}".replace("*", r"\*")):
            open_source(DataConfig(source=kind, path=str(path)))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".json"])
def test_json(tmp_path, cached_datasets, ending):
    rows = [{"body": "one\n", "n": 1}, {"body": None, "n": 2}, {"body": "dréi", "n": 3}]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == ".json":
        content = json.dumps(rows).encode()
    elif ending.endswith(".gz"):
        content = gzip.compress(content)
    elif ending.endswith(".zst"):
        content = pytest.importorskip("zstandard").compress(content)
    (tmp_path / f"a{ending}").write_bytes(content)
    source = open_source(DataConfig(source="json", path=str(tmp_path), text_field="body"))
    assert [document.text for document in source.documents()] == ["one\n", "dréi"]
    assert source.skipped == 1
    with pytest.raises(DataError, match=r"no column 'text'; its columns are body, n: set"):
        texts(source="json", path=str(tmp_path))
    with pytest.raises(DataError, match="column 'n' holds int"):
        texts(source="json", path=str(tmp_path), text_field="n")


def test_broken_json_names_the_file(tmp_path, cached_datasets):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "cut')
    with pytest.raises(DataError, match=r"cannot read .*b\.jsonl"):
        texts(source="json", path=str(tmp_path))


def test_parquet_files_may_differ_in_other_columns(tmp_path, cached_datasets):
    make = cached_datasets.Dataset.from_dict
    make({"text": ["a", "b"], "n": [1, 2]}).to_parquet(tmp_path / "1.parquet")
    make({"text": ["c"], "n": ["three"]}).to_parquet(tmp_path / "2.parquet")
    assert texts(source="parquet", path=str(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize("streaming", [True, False])
def test_hf_dataset_by_name_with_subset_and_split(tmp_path, cached_datasets, streaming):
    make = cached_datasets.Dataset.from_dict
    (tmp_path / "corpus" / "small").mkdir(parents=True)
    for split, words in (("train", ["x", "y"]), ("test", ["z"])):
        make({"text": words}).to_parquet(tmp_path / "corpus" / "small" / f"{split}.parquet")
    card = "---\nconfigs:\n- config_name: small\n  data_dir: small\n---\n"
    (tmp_path / "corpus" / "README.md").write_text(card)
    config = DataConfig(
        source="hf",
        path=f"{tmp_path / 'corpus'}:small",
        streaming=streaming,
        valid_path="test",
    )
    assert [document.text for document in open_source(config).documents()] == ["x", "y"]
    valid = open_valid_source(config)
    assert valid and [document.text for document in valid.documents()] == ["z"]


def test_unknown_dataset_is_named(tmp_path, cached_datasets):
    with pytest.raises(DataError, match="no-such/dataset"):
        texts(source="hf", path=str(tmp_path / "no-such/dataset"))


def test_missing_package_names_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'aniso\[data\]'"):
        open_source(DataConfig(source="parquet", path=str(tmp_path)))


def test_stdlib_passes_over_dangling_links(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "sitecustomize.py").symlink_to(tmp_path / "gone.py")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert texts() == ["a = 1"]


def test_upper_case_compression_endings_are_unpacked(tmp_path):
    (tmp_path / "A.TXT.GZ").write_bytes(gzip.compress(b"upper"))
    assert texts(source="text", path=str(tmp_path)) == ["upper"]


def test_json_names_are_no_patterns_and_empty_files_are_passed_over(tmp_path):
    for name in ("part[1].jsonl", "part1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    (tmp_path / "empty.jsonl").write_text("")
    source = open_source(DataConfig(source="json", path=str(tmp_path)))
    assert sorted(d.text for d in source.documents()) == ["part1.jsonl", "part[1].jsonl"]
    assert source.skipped == 1


def test_a_path_that_cannot_be_looked_at_is_named():
    with pytest.raises(DataError, match="data.path 'xx.*cannot be read: File name too long"):
        open_source(DataConfig(source="text", path="x" * 5000))
