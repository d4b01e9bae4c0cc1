import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.loader import Loader, eval_batches
from lm.data.sources import DataError
from lm.data.tokenizer import load_tokenizer

NAMES = ["tokens", "targets", "segment_ids", "positions", "weights"]


def naive_rows(texts, tokenizer, length):
    """Every window of the framed stream, token by token."""
    stream, segments, positions = [], [], []
    for number, text in enumerate(texts):
        ids = [tokenizer.separator_id, *text.encode()]
        ids += [] if tokenizer.end_id is None else [tokenizer.end_id]
        stream += ids
        segments += [number] * len(ids)
        positions += range(len(ids))
    rows = []
    for start in range(0, len(stream) - length, length):
        row = {name: [] for name in NAMES}
        for i in range(start, start + length):
            row["tokens"].append(stream[i])
            row["targets"].append(stream[i + 1])
            row["segment_ids"].append(segments[i] - segments[start] + 1)
            same = segments[i] == segments[start]
            row["positions"].append(i - start if same else positions[i])
            ends = tokenizer.end_id is not None and segments[i] != segments[i + 1]
            row["weights"].append(0.0 if ends else 1.0)
        rows.append(row)
    return rows


@pytest.fixture
def store(tmp_path, make_store, rng):
    sizes = rng.integers(5, 100, 60)
    texts = ["".join(map(chr, rng.integers(97, 123, size))) for size in sizes]
    return make_store(tmp_path / "s", texts, shard_bytes=300)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    length=st.integers(1, 12),
    pair=st.booleans(),
)
def test_rows_equal_a_walk_over_the_stream(make_store, pair_tokenizer, lengths, length, pair):
    tokenizer = pair_tokenizer if pair else load_tokenizer("byte")
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [letters[i % 26] * size for i, size in enumerate(lengths)]
    expected = naive_rows(texts, tokenizer, length)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "s"), texts, tokenizer, shard_bytes=60)
        if not expected:
            with pytest.raises(DataError, match="too few"):
                Loader([(store, 1)], batch_size=1, sequence_length=length, seed=0)
            return
        loader = Loader(
            [(store, 1)], batch_size=len(expected), sequence_length=length, seed=0, shuffle=False
        )
        batch = loader.batch(0)
    for name in NAMES:
        assert batch[name].dtype == (np.float32 if name == "weights" else np.int32)
        np.testing.assert_array_equal(batch[name], [row[name] for row in expected], name)


def row_keys(store, batch):
    """Position of each row's window in the store, found by its content."""
    length = batch["tokens"].shape[1]
    stream = store.window(0, store.tokens)
    starts = range(0, store.tokens - length, length)
    table = {stream[start : start + length + 1].tobytes(): start for start in starts}
    assert len(table) == len(starts), "windows must differ for this test"
    whole = np.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1).astype(stream.dtype)
    return [table[row.tobytes()] for row in whole]


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_every_window_once_an_epoch_in_a_new_order(store, batch_size):
    loader = Loader([(store, 1)], batch_size=batch_size, sequence_length=24, seed=3)
    rows = (store.tokens - 1) // 24
    steps = -(-3 * rows // batch_size)
    seen = [key for step in range(steps) for key in row_keys(store, loader.batch(step))]
    epochs = [seen[i * rows : (i + 1) * rows] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, rows * 24, 24))
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_batch_is_a_pure_function_of_seed_step_and_row(store, tmp_path, make_store):
    other = make_store(tmp_path / "o", [f"other {i}" * 7 for i in range(90)])

    def make(seed=5):
        pairs = [(store, 0.3), (other, 0.7)]
        return Loader(pairs, batch_size=12, sequence_length=16, seed=seed)

    straight = [make().batch(step) for step in range(20)]
    resumed = make()
    for step in (19, 0, 7, 7, 18):
        whole = resumed.batch(step)
        for name in NAMES:
            np.testing.assert_array_equal(whole[name], straight[step][name])
    for rows in (slice(0, 5), slice(5, 12), range(3, 9, 2), slice(0, 0)):
        part = make().batch(11, rows)
        every = rows if isinstance(rows, slice) else list(rows)
        for name in NAMES:
            np.testing.assert_array_equal(part[name], straight[11][name][every])
    assert not np.array_equal(make(6).batch(0)["tokens"], straight[0]["tokens"])
    for step, rows in ((-1, None), (0, range(0, 13)), (0, range(-1, 3))):
        with pytest.raises(IndexError):
            make().batch(step, rows)


def test_a_late_step_costs_no_more_than_the_first(store, monkeypatch):
    read, window = [], type(store).window

    def counted(self, start, length):
        read.append(length)
        return window(self, start, length)

    monkeypatch.setattr(type(store), "window", counted)
    loader = Loader([(store, 1)], batch_size=4, sequence_length=8, seed=0)
    loader.batch(10**9)
    assert read.count(9) == 4 and len(read) <= 8  # own rows only (twice, across a shard's end)


def test_mixture_proportions(tmp_path, make_store):
    weights = [0.6, 0.3, 0.1]
    texts = [[letter * 50] * 40 for letter in "abc"]
    stores = [make_store(tmp_path / str(i), text) for i, text in enumerate(texts)]
    loader = Loader(
        list(zip(stores, weights, strict=True)), batch_size=50, sequence_length=10, seed=0
    )
    tokens = np.concatenate([loader.batch(step)["tokens"] for step in range(40)])
    owner = np.sort(tokens, axis=1)[:, 0] - ord("a")  # separators are larger than letters
    shares = np.bincount(owner, minlength=3) / len(owner)
    np.testing.assert_allclose(shares, weights, atol=0.002)
    # no long stretch of one source: any 100 rows hold all in proportion
    for start in range(0, 2000, 100):
        counts = np.bincount(owner[start : start + 100], minlength=3)
        np.testing.assert_allclose(counts, [60, 30, 10], atol=2)
    statistics = loader.statistics()
    assert [s["weight"] for s in statistics.values()] == pytest.approx(weights, abs=1e-3)
    for store, weight, one in zip(stores, weights, statistics.values(), strict=True):
        assert (one["documents"], one["tokens"], one["bytes"]) == (40, 40 * 51, 2000)
        assert one["share"] == pytest.approx(1 / 3)
        rows = (store.tokens - 1) // 10
        assert one["epochs_per_step"] == pytest.approx(50 * weight / rows, rel=0.01)
    assert loader.tokens_per_byte == pytest.approx(51 / 50)


def test_loaders_that_cannot_work_are_refused(tmp_path, make_store, store, pair_tokenizer):
    other = make_store(tmp_path / "p", ["text" * 30], pair_tokenizer)
    cases = [
        ([], 8, "at least one store"),
        ([(store, 0.0)], 8, "weight of s must be above 0"),
        ([(store, 1), (other, 1)], 8, "same tokenizer"),
        ([(other, 1)], 122, "p holds 122 tokens, too few for one row of sequence_length 122"),
    ]
    for stores, length, message in cases:
        with pytest.raises(DataError, match=message):
            Loader(stores, batch_size=2, sequence_length=length, seed=0)
    Loader([(other, 1)], batch_size=2, sequence_length=121, seed=0)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("batch_size", "length"), [(1, 7), (8, 16), (5, 1000), (3, 5000)])
def test_evaluation_counts_every_target_and_byte_once(
    tmp_path, make_store, pair_tokenizer, pair, batch_size, length
):
    texts = [f"Straße {i} " * (i % 9 + 1) for i in range(40)]
    store = make_store(tmp_path / "s", texts, pair_tokenizer if pair else None)
    stream = store.window(0, store.tokens).astype(np.int32)
    targets, n_bytes, weight = [], 0, 0
    for batch, count in eval_batches(store, batch_size, length):
        assert all(batch[name].shape == (batch_size, length) for name in NAMES)
        real = batch["segment_ids"] > 0
        assert not batch["weights"][~real].any()
        targets += batch["targets"][real].tolist()
        weight += batch["weights"].sum()
        n_bytes += count
        counted = batch["targets"][batch["weights"] > 0]
        assert count == store.token_bytes[counted].sum()
    assert targets == stream[1:].tolist()
    assert n_bytes == store.bytes == sum(len(text.encode()) for text in texts)
    assert weight == store.tokens - 1 - (len(texts) - 1) * pair


def test_limited_evaluation_reaches_every_store(tmp_path, make_store):
    stores = [(make_store(tmp_path / letter, [letter * 400]), 0.5) for letter in "abc"]
    batches = [batch for batch, _ in eval_batches(stores, 3, 10, limit=2)]
    assert len(batches) == 2
    seen = {chr(token) for batch in batches for token in batch["tokens"].ravel() if token < 256}
    assert seen == set("abc")
    again = [batch for batch, _ in eval_batches(stores, 3, 10, limit=2)]
    for one, two in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one["tokens"], two["tokens"])
    assert sum(1 for _ in eval_batches(stores, 3, 10, limit=1000)) == 40


def test_importing_the_package_is_cheap():
    import subprocess
    import sys

    code = (
        "import sys, lm.data, lm.data.store, lm.data.loader, lm.data.prefetch, lm.data.tokenizer\n"
        "heavy = {'jax', 'grain', 'datasets', 'tokenizers', 'transformers', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from lm.data import *\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
