"""Pairs in rows: each that fits exactly once an epoch, whole, its sides side by side; and your own pairs as a table."""

import math
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data, packing
from experiments.tokenizer import BOS, EOS
from transformer.errors import RequestError

L = 24


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def made_up(n=300, longest=40):
    rng = np.random.default_rng(0)
    words = ["uno", "dos", "漢字", "é", "x"]

    def text():
        return " ".join(rng.choice(words, rng.integers(1, 7)))[: rng.integers(1, longest)] or "x"

    return [(f"{i}{text()}", f"{text()}{i}") for i in range(n)]


def table(folder, pairs):
    (folder / "pairs.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in pairs), encoding="utf-8")
    return f"tsv:{folder}/pairs.tsv"


def stream(dataset, **changes):
    request = {"split": "train", "batch_seqs": 4, "seq_len": L, "seed": 0, "vocab_size": 259}
    return data.batches(dataset, objective="pairs", **(request | changes))


def refusal(dataset, **changes):
    with pytest.raises(RequestError) as error:
        stream(dataset, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


def unpacked(batch):
    """Every pair of a batch as two texts, by the segments and positions that a model would read."""
    for row in range(len(batch["source"])):
        both = batch["source_segments"][row], batch["segments"][row]
        numbers = [np.unique(side[side > 0]).tolist() for side in both]
        assert numbers[0] == numbers[1] == list(range(1, len(numbers[0]) + 1))
        for number in numbers[0]:
            source, target = (np.flatnonzero(side == number) for side in both)
            for places, positions in ((source, batch["source_positions"]), (target, batch["positions"])):
                assert np.diff(places).tolist() == [1] * (len(places) - 1)
                assert positions[row, places].tolist() == list(range(len(places)))
            assert batch["source"][row, source[-1]] == batch["targets"][row, target[-1]] == EOS
            assert batch["inputs"][row, target[0]] == BOS
            np.testing.assert_array_equal(batch["inputs"][row, target[1:]], batch["targets"][row, target[:-1]])
            yield data.decode(batch["source"][row, source]), data.decode(batch["targets"][row, target])
    for side, tokens in (("source_segments", "source"), ("segments", "inputs"), ("segments", "targets")):
        np.testing.assert_array_equal(batch[side] == 0, batch[tokens] == 0)
    np.testing.assert_array_equal(batch["weights"], batch["segments"] > 0)


def fits(pair, seq_len=L):
    return max(len(text.encode()) for text in pair) + 1 <= seq_len


# How rows are filled


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=60)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 14), st.integers(1, 5))
def test_no_row_overflows_and_every_pair_that_fits_has_one(lengths, seq_len, open_rows):
    array = np.array(lengths, np.int64).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        row_of = packing.pack(array, seq_len)
    np.testing.assert_array_equal(row_of < 0, array.max(axis=1, initial=0) > seq_len)
    used = np.unique(row_of[row_of >= 0])
    assert used.tolist() == list(range(len(used)))
    for row in used:
        assert array[row_of == row].sum(axis=0).max() <= seq_len


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 14))
def test_rows_hold_the_pairs_that_were_packed_in_order(lengths, seq_len):
    array = np.array(lengths, np.int64).reshape(-1, 2)
    texts = [
        [[10 * pair + side + 3] * (n - 1) + [EOS] for side, n in enumerate(both)] for pair, both in enumerate(lengths)
    ]
    tokens = np.array([token for both in texts for text in both for token in text], np.uint16)
    row_of = packing.pack(array, seq_len)
    rows = list(packing.rows(tokens, array, row_of, seq_len))
    assert len(rows) == row_of.max(initial=-1) + 1
    for number, row in enumerate(rows):
        for side in (0, 1):
            expected = [token for pair in np.flatnonzero(row_of == number) for token in texts[pair][side]]
            assert row[side].tolist() == expected + [0] * (seq_len - len(expected))


def test_a_pair_goes_where_it_leaves_least_room():
    assert packing.pack(np.array([[5, 5], [8, 8], [2, 2], [3, 3], [9, 9]]), 10).tolist() == [0, 1, 1, 0, 2]


def test_the_fullest_row_closes(monkeypatch):
    monkeypatch.setattr(packing, "OPEN_ROWS", 2)
    # 8 and 3 are open when 9 comes: the row of 8 closes, so 2 goes to that of 3 although 8 + 2 would be full.
    assert packing.pack(np.array([[8, 1], [3, 1], [9, 1], [2, 1]]), 10).tolist() == [0, 1, 2, 1]


# What is read


def test_an_epoch_has_every_pair_that_fits_once_and_whole(tmp_path):
    pairs = made_up()
    dataset = table(tmp_path, pairs)
    rows, n_left_out, n_pairs = data.packed(dataset, "train", L)
    train = [pair for i, pair in enumerate(pairs) if i % 50]
    assert (n_left_out, n_pairs) == (sum(not fits(pair) for pair in train), len(train))
    assert n_left_out > 0
    read = stream(dataset, batch_seqs=1)
    epochs = [[next(read) for _ in range(len(rows))] for _ in range(2)]
    found = [Counter(pair for batch in epoch for pair in unpacked(batch)) for epoch in epochs]
    assert found[0] == found[1] == Counter(filter(fits, train))
    first, second = (np.concatenate([batch["source"] for batch in epoch]) for epoch in epochs)
    assert not np.array_equal(first, second)


def test_every_50th_line_is_held_out_and_in_order(tmp_path):
    pairs = made_up(900)
    batches = list(stream(table(tmp_path, pairs), split="validation", batch_seqs=1, seq_len=60))
    found = [pair for batch in batches for pair in unpacked(batch)]
    assert Counter(found) == Counter(pairs[::50])
    rows, *_ = data.packed(table(tmp_path, pairs), "validation", 60)
    np.testing.assert_array_equal(np.concatenate([batch["source"] for batch in batches]), rows[:, 0])


def test_pairs_that_are_too_long_are_counted_on_stderr_once_and_by_the_first_process(tmp_path, capsys):
    dataset = table(tmp_path, [("a", "b")] * 50 + [("a" * L, "b"), ("a", "b" * L), ("a" * (L - 1), "b")])
    stream(dataset, rows=slice(2, 4))
    assert capsys.readouterr().err == ""  # another process says it
    for rows in (slice(0, 2), slice(0, 4), None):
        stream(dataset, rows=rows)
    said = capsys.readouterr()
    assert said.err == f"{dataset}: 1 of 51 train pairs are longer than seq_len={L} on one side and left out\n"
    assert said.out == ""


def test_rows_are_packed_once_and_appear_whole_or_not_at_all(tmp_path, cache, monkeypatch):
    dataset = table(tmp_path, made_up())
    monkeypatch.setattr(packing, "pack", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream(dataset)
    (folder,) = cache.iterdir()
    assert [path.name for path in folder.iterdir()] == ["bytes-pairs-train.npy"]
    monkeypatch.undo()
    monkeypatch.setenv("LADDER_CACHE", str(cache))
    before = next(stream(dataset))
    assert sorted(path.name for path in folder.iterdir()) == [
        f"bytes-pairs-train-{packing.METHOD}-{L}.npy",
        "bytes-pairs-train.npy",
    ]
    monkeypatch.setattr(packing, "pack", lambda *_: 1 / 0)
    np.testing.assert_array_equal(next(stream(dataset))["source"], before["source"])
    with pytest.raises(ZeroDivisionError):
        stream(dataset, seq_len=L + 1)


def test_two_may_pack_at_once(tmp_path):
    dataset = table(tmp_path, made_up())
    found = []
    threads = [threading.Thread(target=lambda: found.append(data.packed(dataset, "train", L)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert all(np.array_equal(rows, found[0]) for rows in found)


@pytest.mark.parametrize(("seq_len", "fill", "left_out"), [(256, (0.93, 0.91), 933), (512, (0.96, 0.94), 3)])
def test_rows_of_verses_are_more_than_nine_tenths_full(seq_len, fill, left_out, shared_cache):
    rows, n_left_out, n_pairs = data.packed("en_es", "train", seq_len, shared_cache)
    assert (n_left_out, n_pairs) == (left_out, 30_455)
    assert tuple(np.asarray(rows != 0).mean(axis=(0, 2)).round(2)) == fill


def test_verses_are_english_to_spanish(shared_cache):
    batch = next(stream("en_es", split="validation", seq_len=256, cache=shared_cache))
    assert next(unpacked(batch)) == (
        "In the beginning, God created the heavens and the earth.",
        "EN el principio crió Dios los cielos y la tierra.",
    )


def test_entropy_of_pairs_is_that_of_targets_by_hand(tmp_path, monkeypatch):
    dataset = table(tmp_path, [("held", "out"), ("xxxx", "ab"), ("y", "aa")])  # a a a b and two ends
    expected = -sum(n / 6 * math.log(n / 6) for n in (3, 1, 2))
    assert data.unigram_entropy_nats(dataset, objective="pairs") == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(data, "_ENTROPY_CHUNK", 3)
    assert data.unigram_entropy_nats(dataset, objective="pairs") == pytest.approx(expected, rel=1e-12)
    assert data._pair_lengths(data.pair_tokens(dataset, "train")).tolist() == [[5, 3], [2, 3]]


def test_no_pair_that_fits_is_refused_with_the_length_that_would_hold_most(tmp_path):
    dataset = table(tmp_path, [("x" * (10 + i), "y") for i in range(102)])  # train: 100 of 12 ... 112 tokens
    message = refusal(dataset, seq_len=11)
    assert f"seq_len=11 holds no train pair of {dataset!r}" in message
    assert "the shortest has 12 tokens" in message
    nearest = int(message.rsplit(" ", 1)[1])
    held = [10 + i + 1 <= nearest for i in range(102) if i % 50]
    assert sum(held) >= 0.99 * len(held) > sum(held) - 1
    assert not list((tmp_path / "cache").rglob("*-11.npy"))


def test_too_few_pairs_are_refused(tmp_path):
    dataset = table(tmp_path, [("a", "b")])
    assert refusal(dataset) == f"the train split of {dataset!r} has no pairs"
    assert "fills 1 rows of 24 tokens: too few for a batch of 4" in refusal(dataset, split="validation")


# Tables


def test_a_table_is_also_a_text(tmp_path):
    dataset = table(tmp_path, [("held", "out"), ("uno", "one"), ("dos", "two")])
    assert data.decode(data.tokens(dataset, "train")) == "uno\tonedos\ttwo"
    assert data.decode(data.tokens(dataset, "validation")) == "held\tout"
    batch = next(
        data.batches(dataset, objective="causal", split="train", batch_seqs=1, seq_len=8, seed=0, vocab_size=259)
    )
    assert data.decode(batch["inputs"][0]) == "uno\tone"


def test_lines_of_windows_and_a_byte_order_mark_are_read(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfa\tb\r\nc\td")
    assert data.tokens(f"tsv:{tmp_path}/a.tsv", "validation").tolist() == [*data.encode("a\tb"), EOS]
    assert data.decode(data.pair_tokens(f"tsv:{tmp_path}/a.tsv", "train")) == "cd"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"no tab", "expected two columns with a tab between, found 1"),
        (b"", "expected two columns with a tab between, found 1"),
        (b"a\tb\tc", "expected two columns with a tab between, found 3"),
        (b"a\t", "a column is empty; expected a text on both sides of the tab"),
        (b"\tb", "a column is empty; expected a text on both sides of the tab"),
        (b"a\tb\xff", "not UTF-8 (invalid start byte at byte 4)"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, line, says, number):
    lines = [b"a\tb"] * 4
    lines[number - 1] = line
    (tmp_path / "a.tsv").write_bytes(b"\n".join(lines) + b"\n")
    assert refusal(f"tsv:{tmp_path}/a.tsv") == f"{tmp_path}/a.tsv:{number}: {says}"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_table_that_is_not_there_names_the_nearest(tmp_path):
    table(tmp_path, [])
    assert refusal(f"tsv:{tmp_path}/pair.tsv") == f"tsv:{tmp_path}/pair.tsv is no file: did you mean 'pairs.tsv'?"
    assert refusal(f"tsv:{tmp_path}/no/pairs.tsv").endswith(f"there is no folder {tmp_path}/no")
    assert refusal(f"tsv:{tmp_path}") == f"tsv:{tmp_path} cannot be read (Is a directory)"
    assert "has no pairs" in refusal(f"tsv:{tmp_path}/pairs.tsv")
    assert refusal("tsv:") == "unknown dataset 'tsv:': did you mean 'tsv:FILE'?"


def test_changed_pairs_are_not_taken_from_the_cache(tmp_path):
    before, *_ = data.packed(table(tmp_path, made_up(100)), "train", L)
    after, *_ = data.packed(table(tmp_path, made_up(200)), "train", L)
    assert len(before) < len(after)
