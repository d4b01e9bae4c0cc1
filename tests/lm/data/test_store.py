import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from lm.data.builder import build_store, cut_shards
from lm.data.sources import DataError, Document, Source
from lm.data.store import Store, open_stores
from lm.data.tokenizer import load_tokenizer
from lm.train.config import DataConfig

ROOT = Path(__file__).parents[3]

# Builds argv[1] with tokenizer argv[2] and argv[3] workers from 300 documents that come slowly.
BUILD = """
import sys, time
from pathlib import Path
from lm.data.builder import build_store
from lm.data.sources import Document, Source
from lm.data.mixture import split_documents
from lm.data.tokenizer import load_tokenizer

def read(skip):
    for i in range(300):
        time.sleep(float(sys.argv[4]))
        yield Document(str(i), f"document {i} with some words\\n" * (1 + i % 37))

if __name__ == "__main__":
    build_store(
        Path(sys.argv[1]), Source(["slow"], read), lambda d: split_documents(d, 0.25),
        load_tokenizer(sys.argv[2]), head={}, workers=int(sys.argv[3]), shard_bytes=4000,
    )
"""


@pytest.fixture
def build(tmp_path):
    script = tmp_path / "build.py"
    script.write_text(BUILD)

    def start(folder, tokenizer, workers, pause=0.0):
        command = [sys.executable, str(script), str(folder), tokenizer, str(workers), str(pause)]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})

    return start


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def read_back(store):
    """The documents of a store, without framing."""
    stream = store.window(0, store.tokens)
    pairs = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    back = None if store.end_id is None else -1
    return [stream[start + 1 : end][:back] for start, end in pairs]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_builds_continue_to_the_same_bytes(tmp_path, build, bpe_file, workers):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert build(whole, str(bpe_file), 1).wait() == 0
    partial = tmp_path / "killed.partial"
    finished: dict[str, int] = {}
    for goal in (2, 7, 15):
        process = build(killed, str(bpe_file), workers, 0.005)
        while process.poll() is None and len(list(partial.glob("journal/*.json"))) < goal:
            time.sleep(0.005)
        assert process.poll() is None, "the build was over before it could be killed"
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive, "workers outlived the killed build"
        assert not killed.exists()
        for name, when in finished.items():  # what was finished is not made again
            assert (partial / name).stat().st_mtime_ns == when
        names = [f"{file.stem}.tokens" for file in partial.glob("journal/*.json")]
        finished = {name: (partial / name).stat().st_mtime_ns for name in names}
    assert build(killed, str(bpe_file), workers).wait() == 0
    for name, when in finished.items():
        assert (killed / name).stat().st_mtime_ns == when
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) > 20 and not partial.exists()


def test_a_changed_document_is_not_taken_from_the_journal(tmp_path, make_store):
    texts = [f"text {i} " * 30 for i in range(50)]

    def cut_off():
        yield from (Document("", text) for text in texts[:40])
        raise KeyboardInterrupt

    label = lambda documents: (("train", document) for document in documents)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        source = Source(["a"], lambda skip: cut_off())
        tokenizer = load_tokenizer("byte")
        build_store(tmp_path / "s", source, label, tokenizer, head={}, shard_bytes=1000)
    assert len(list(tmp_path.glob("s.partial/journal/*.json"))) > 5
    texts[3] = texts[3].upper()
    make_store(tmp_path / "s", texts, shard_bytes=1000)
    make_store(tmp_path / "t", texts, shard_bytes=1000)
    assert contents(tmp_path / "s") == contents(tmp_path / "t")


@pytest.mark.parametrize("kind", ["byte", "bpe", "pair"])
def test_a_store_holds_what_was_read(tmp_path, make_store, bpe_file, pair_tokenizer, kind):
    tokenizer = {
        "byte": load_tokenizer("byte"),
        "bpe": load_tokenizer(str(bpe_file)),
        "pair": pair_tokenizer,
    }[kind]
    texts = [f"Dokument {i}: über\n" * (i % 13 + 1) for i in range(80)] + ["x"]
    store = make_store(tmp_path / "s", texts, tokenizer, shard_bytes=500)
    assert [tokenizer.decode(ids) for ids in read_back(store)] == texts
    assert store.documents == len(texts)
    assert store.bytes == sum(len(text.encode()) for text in texts)
    stream = store.window(0, store.tokens)
    assert store.token_bytes[stream].sum() == store.bytes
    assert (stream[store.offsets[:-1]] == tokenizer.separator_id).all()
    if tokenizer.end_id is not None:
        assert (stream[store.offsets[1:] - 1] == tokenizer.end_id).all()
    for start in range(0, store.tokens - 700, 31):  # windows of more than one shard
        np.testing.assert_array_equal(store.window(start, 700), stream[start : start + 700])
    for start, length in ((-1, 2), (0, store.tokens + 1), (store.tokens, 1)):
        with pytest.raises(IndexError, match="outside"):
            store.window(start, length)


def test_large_vocabularies_are_stored_in_32_bits(tmp_path, make_store):
    class Large(type(load_tokenizer("byte"))):
        vocab_size = 70_000
        bos_id = eos_id = 69_999

    store = make_store(tmp_path / "s", ["ab", "c"], Large())
    assert store.window(0, 5).tolist() == [69_999, 97, 98, 69_999, 99]


def test_shards_are_cut_by_size_and_grow():
    documents = [("train", Document("", "x" * 100)) for _ in range(400)]
    shards = list(cut_shards(documents, 1000))
    assert [len(shard.texts) for shard in shards] == [10] * 8 + [20] * 8 + [40] * 4
    assert [shard.number for shard in shards] == list(range(20))


@pytest.mark.parametrize(
    "file", ["train-00001.tokens", "train.offsets", "token_bytes", "meta.json"]
)
def test_truncated_and_missing_files_are_named(tmp_path, make_store, file):
    make_store(tmp_path / "s", ["some text"] * 100, shard_bytes=200)
    damaged = tmp_path / "s" / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{file} .*delete the folder {tmp_path}/s and run again"):
        Store(tmp_path / "s", "train")
    damaged.unlink()
    with pytest.raises(DataError, match=rf"{file} .*delete"):
        Store(tmp_path / "s", "train")


@pytest.mark.parametrize("file", ["train-00001.tokens", "train.offsets"])
def test_altered_files_are_found_by_verifying(tmp_path, make_store, file):
    make_store(tmp_path / "s", ["some text"] * 100, shard_bytes=200)
    Store(tmp_path / "s", "train", verify=True)
    data = bytearray((tmp_path / "s" / file).read_bytes())
    data[100] ^= 1
    (tmp_path / "s" / file).write_bytes(data)
    with pytest.raises(DataError, match=rf"{file} was altered .*delete the folder"):
        Store(tmp_path / "s", "train", verify=True)


def text_config(tmp_path, **options):
    folder = tmp_path / "texts"
    if not folder.exists():
        folder.mkdir()
        for i in range(40):
            (folder / f"{i}.txt").write_text(f"text {i}")
    options = {"source": "text", "path": str(folder), "cache": str(tmp_path / "cache")} | options
    return DataConfig(**options)


def test_open_stores_splits_and_builds_once(tmp_path, monkeypatch):
    config = text_config(tmp_path, valid_fraction=0.1)
    stores = open_stores(config, progress=False)
    (train, weight), (valid, _) = stores["train"][0], stores["valid"][0]
    assert weight == 1 and train.name == "texts"
    texts = [
        {bytes(ids.astype(np.uint8)).decode() for ids in read_back(store)}
        for store in (train, valid)
    ]
    assert texts[0] | texts[1] == {f"text {i}" for i in range(40)}
    assert not texts[0] & texts[1] and len(texts[1]) == 4
    monkeypatch.setattr("lm.data.builder.build_store", None)  # now everything must be there
    open_stores(config, progress=False, verify=True)


def test_whatever_changes_the_tokens_changes_the_store(tmp_path, bpe_file):
    def folder(**options):
        return open_stores(text_config(tmp_path, **options), progress=False)["train"][0][0].folder

    plain = folder()
    others = [
        folder(tokenizer=str(bpe_file)),
        folder(valid_fraction=0.5),
        folder(max_documents=20),
        folder(valid_path=str(tmp_path / "texts" / "3.txt")),
    ]
    (tmp_path / "texts" / "7.txt").write_text("changed")
    others.append(folder())
    assert len({plain, *others}) == 6
    assert folder() == others[-1] and folder(workers=1) == others[-1]


def test_valid_path_is_held_out_and_nothing_else(tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    config = text_config(tmp_path, valid_path=str(tmp_path / "held.txt"))
    stores = open_stores(config, progress=False)
    assert stores["train"][0][0].documents == 40
    assert bytes(read_back(stores["valid"][0][0])[0].astype(np.uint8)) == b"held out"


def test_two_builders_at_once_share_one_build(tmp_path):
    config = text_config(tmp_path)
    code = (
        "import sys; from lm.data import open_stores; from lm.train.config import DataConfig;"
        f"s = open_stores({config!r}, verify=True); print(s['train'][0][0].tokens)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", f"from lm.train.config import DataConfig; {code}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    results = [(run.communicate()[0], run.returncode) for run in runs]
    assert len(set(results)) == 1 and results[0][1] == 0
    folders = [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]
    assert len(folders) == 1 and not folders[0].name.endswith(".partial")


def test_a_waiting_builder_takes_what_the_other_built(tmp_path):
    """The lock is held by a build that finishes while open_stores waits for it."""
    import threading

    from lm.data.files import locked

    config = text_config(tmp_path)
    folder = open_stores(config, progress=False)["train"][0][0].folder
    shutil.move(folder, tmp_path / "built")
    opened = []
    with locked(folder):
        thread = threading.Thread(
            target=lambda: opened.append(open_stores(config, progress=False)["train"][0][0])
        )
        thread.start()
        time.sleep(0.3)
        assert not opened and not folder.exists()
        shutil.move(tmp_path / "built", folder)
        marker = folder.stat().st_ino
    thread.join(10)
    assert opened and folder.stat().st_ino == marker


def test_sources_without_text_and_empty_splits_are_refused(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\xff\xfe")
    config = text_config(tmp_path, path=str(tmp_path / "image.png"))
    with pytest.raises(DataError, match=r"holds no text \(1 files or rows were passed over"):
        open_stores(config, progress=False)


def test_an_unwritable_cache_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"cannot write the token store .*cache.*data\.cache"):
        open_stores(text_config(tmp_path), progress=False)


def test_a_full_disk_is_named_and_the_build_continues_later(tmp_path, monkeypatch):
    write, count = os.fsync, iter(range(100))

    def full(handle):
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        write(handle)

    config = text_config(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="disk is full.*data.cache"):
        open_stores(config, progress=False)
    monkeypatch.undo()
    stores = open_stores(config, progress=False, verify=True)
    assert stores["train"][0][0].documents == 38
