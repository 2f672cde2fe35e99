"""Batches: every token once an epoch, the same on any number of processes, resumable; and every wrong request."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from experiments import data, datasets
from transformer.errors import RequestError

B, L = 6, 7
TEXT = "".join(f"line {i}: naïve café, 漢字, 🎭\n" for i in range(40))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LADDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """The embedded corpora are prepared once for all tests that only read them."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    return f"text:{tmp_path}/*.txt"


def some(corpus, n=20, **changes):
    """The first n batches."""
    return [batch for batch, _ in zip(stream(corpus, **changes), range(n), strict=False)]


def stream(corpus, **changes):
    request = {"objective": "causal", "split": "train", "batch_seqs": B, "seq_len": L, "seed": 0, "vocab_size": 259}
    return data.batches(corpus, **(request | changes))


def rows(batches):
    return Counter(row.tobytes() for batch in batches for row in batch["inputs"])


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("text", ["", "plain", "naïve café", "漢字 🎭", "\0\r\n\x7f"])
def test_any_text_survives_encoding(text):
    ids = data.encode(text)
    assert ids.dtype == np.uint16
    assert len(ids) == len(text.encode())
    assert not len(ids) or 3 <= ids.min() <= ids.max() < data.MASK == 259
    assert data.decode([data.BOS, *ids.tolist(), data.MASK, data.EOS, data.PAD]) == text


def test_every_byte_has_its_own_token():
    assert data.encode(bytes(range(256))).tolist() == list(range(3, 259))


def test_half_a_character_and_ids_that_are_no_bytes_do_not_stop_decoding():
    assert data.decode([ord("a") + 3, 0xE6 + 3, 300]) == "a�"


def test_a_document_is_its_text_and_an_end(corpus):
    train, held_out = data.tokens(corpus, "train"), data.tokens(corpus, "validation")
    assert train.dtype == np.uint16
    assert (train[-1], held_out[-1]) == (data.EOS, data.EOS)
    assert data.decode(train) + data.decode(held_out) == TEXT


def test_five_percent_is_held_out_from_the_start_of_a_line(corpus):
    held_out = data.decode(data.tokens(corpus, "validation"))
    assert held_out.startswith("line ")
    assert 0.05 <= len(held_out) / len(TEXT) <= 0.1


def test_targets_are_the_next_tokens_and_validation_is_in_order(corpus):
    tokens = data.tokens(corpus, "validation")
    batches = list(stream(corpus, split="validation", batch_seqs=2))
    assert len(batches) == (len(tokens) - 1) // L // 2
    for key, shift in (("inputs", 0), ("targets", 1)):
        got = np.concatenate([batch[key] for batch in batches])
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got.ravel(), tokens[shift : shift + got.size])


def test_an_epoch_sees_every_window_once_in_another_order_each_time(corpus):
    tokens = data.tokens(corpus, "train")
    n_windows = (len(tokens) - 1) // L
    windows = Counter(tokens[i * L : (i + 1) * L].astype(np.int32).tobytes() for i in range(n_windows))
    first, second = np.split(np.concatenate([b["inputs"] for b in some(corpus, 2 * n_windows, batch_seqs=1)]), 2)
    assert rows([{"inputs": first}]) == rows([{"inputs": second}]) == windows
    assert not np.array_equal(first, second)


def test_the_seed_decides_the_order(corpus):
    assert same(some(corpus, seed=3), some(corpus, seed=3))
    assert not same(some(corpus, seed=3), some(corpus, seed=4))


OBJECTIVES = ["causal", "masked", "prefix", "pairs"]
WIDTHS = {"causal": 3, "masked": 3, "prefix": 4, "pairs": 8}  # arrays of a batch


def corpus_for(objective, folder):
    """A text of few windows, or pairs of few rows: parts of its lines."""
    (folder / "a.txt").write_text(TEXT, encoding="utf-8")
    pairs = [f"{line[: i % 9 + 1]}\t{line[-(i % 7) - 8 : -4]}\n" for i, line in enumerate(TEXT.splitlines() * 12)]
    (folder / "a.tsv").write_text("".join(pairs), encoding="utf-8")
    return f"tsv:{folder}/a.tsv" if objective == "pairs" else f"text:{folder}/a.txt"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_batch_has_targets_and_weights_of_one_shape(objective, tmp_path):
    (batch,) = some(corpus_for(objective, tmp_path), 1, objective=objective, seq_len=20, vocab_size=260)
    assert len(batch) == WIDTHS[objective]
    for name, array in batch.items():
        assert array.shape == ((B,) if name == "prefix" else (B, 20))
        assert array.dtype == (np.float32 if name == "weights" else np.int32)
    assert set(np.unique(batch["weights"])) <= {0, 1}
    assert (batch["weights"].sum(axis=1) >= 1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_restored_state_continues_with_the_same_batches(tmp_path, split, objective):
    corpus = corpus_for(objective, tmp_path)
    changes = {"split": split, "batch_seqs": 1, "objective": objective, "seq_len": 20, "vocab_size": 260}
    whole = some(corpus, 6 if split == "train" else 3, **changes)
    iterator = stream(corpus, **changes)
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = stream(corpus, **changes)
    resumed.set_state(state)
    assert same([next(resumed) for _ in range(len(whole) - 2)], whole[2:])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_processes_share_one_batch_between_them(tmp_path, objective):
    changes = {"objective": objective, "vocab_size": 260, "seq_len": 20}
    corpus = corpus_for(objective, tmp_path)
    whole = some(corpus, 30, **changes)
    shares = [some(corpus, 30, rows=slice(*bounds), **changes) for bounds in ((0, 1), (1, 4), (4, 6))]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part["inputs"]) for part in parts] == [1, 3, 2]
        assert same([batch], [{key: np.concatenate([part[key] for part in parts]) for key in batch}])


def test_the_state_is_the_same_on_every_process(corpus):
    one, other = stream(corpus, rows=slice(0, 2)), stream(corpus, rows=slice(2, 6))
    next(one), next(other)
    assert one.get_state() == other.get_state()


def test_two_processes_may_build_the_cache_at_once(cache):
    program = "from experiments import data; print(len(data.tokens('shakespeare', 'train')))"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lengths = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert lengths == [f"{len(data.tokens('shakespeare', 'train'))}\n"] * 2
    (folder,) = cache.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["bytes-train.npy", "tfds"]


def test_a_failed_build_leaves_no_file(cache, corpus, monkeypatch):
    monkeypatch.setattr(data, "encode", lambda text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.tokens(corpus, "train")
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_changed_text_is_not_taken_from_the_cache(corpus, tmp_path):
    before = len(data.tokens(corpus, "train"))
    (tmp_path / "b.txt").write_text(TEXT)
    assert len(data.tokens(corpus, "train")) == 2 * before


@pytest.mark.parametrize(
    ("name", "bits"), [("shakespeare", 4.77), ("web", 4.46), ("en_es", 4.60)]
)  # the first two as published for these files; en_es is without its column of references
def test_unigram_entropy_of_the_embedded_texts(name, bits, shared_cache):
    assert round(data.unigram_entropy_nats(name, "train", shared_cache) / math.log(2), 2) == bits


def test_unigram_entropy_by_hand(tmp_path):
    (tmp_path / "ab.txt").write_bytes(b"ab" * 19 + b"aa")  # train is 19 a, 19 b and an end
    expected = -(2 * 19 / 39 * math.log(19 / 39) + 1 / 39 * math.log(1 / 39))
    assert data.unigram_entropy_nats(f"text:{tmp_path}/ab.txt") == pytest.approx(expected, rel=1e-12)


def test_the_embedded_corpora_are_registered_builders():
    import tensorflow_datasets as tfds

    assert set(datasets.EMBEDDED) == {"shakespeare", "web", "en_es"}
    for name, corpus in datasets.EMBEDDED.items():
        assert type(tfds.builder(name, file_format="array_record")) is corpus


def test_embedded_splits_are_disjoint_and_together_the_text(shared_cache):
    read = {name: _documents(name, shared_cache) for name in datasets.EMBEDDED}
    text = {name: datasets._decompress(datasets.CORPORA / datasets.EMBEDDED[name].FILE) for name in datasets.EMBEDDED}
    train, held_out = read["shakespeare"]
    assert len(train) == len(held_out) == 38
    assert b"".join(play + rest for play, rest in zip(train, held_out, strict=True)) == text["shakespeare"]
    assert sum(map(len, held_out)) / len(text["shakespeare"]) == pytest.approx(0.05, abs=0.001)
    train, held_out = read["web"]
    verses = b"\n".join(b"\n".join(pair) for pair in zip(held_out, train, strict=True))
    assert verses.split(b"\n") == text["web"].splitlines()
    train, held_out = read["en_es"]
    assert (len(train), len(held_out)) == (30_455, 622)
    assert Counter(train + held_out) == Counter(line.split(b"\t", 1)[1] for line in text["en_es"].splitlines())


def _documents(name, cache):
    builder = datasets.prepare(name, cache / datasets.key(name))
    return [list(datasets.documents(builder, split)) for split in ("train", "validation")]


def test_tfds_and_the_plain_name_are_one_corpus(shared_cache):
    assert data.tokens("tfds:web", "validation", shared_cache).filename == data.tokens(
        "web", "validation", shared_cache
    ).filename  # fmt: skip


def _prepared_lm1b(folder: Path, **changes):
    """What TFDS leaves beside the records of lm1b, which has no split called validation."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    _prepared(folder / "lm1b" / "1.1.0", features, {"name": "lm1b", "version": "1.1.0"} | changes)


def _prepared(folder: Path, features, changes):
    folder.mkdir(parents=True)
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    splits = [
        {"name": n, "filepathTemplate": template, "numBytes": "9", "shardLengths": ["5"]} for n in ("train", "test")
    ]
    info = {"fileFormat": "array_record", "splits": splits} | changes
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features.to_json()))


@pytest.fixture
def mocked(tmp_path, monkeypatch):
    """Five made-up records in every split of what is prepared."""
    import tensorflow_datasets as tfds

    # The mock does not bind `self` here as it does in its sibling for single records.
    fixed = lambda record_keys, *, generator: [generator[key] for key in record_keys]  # noqa: E731
    monkeypatch.setattr("tensorflow_datasets.testing.mocking._getitems", fixed)
    return tfds.testing.mock_data(num_examples=5, data_dir=tmp_path / "tfds")


def test_a_prepared_tfds_dataset_is_read(tmp_path, mocked):
    _prepared_lm1b(tmp_path / "tfds")
    with mocked:
        for split in ("train", "validation"):
            tokens = data.tokens("tfds:lm1b", split)
            assert np.count_nonzero(tokens == data.EOS) == 5
            assert data.decode(tokens).isprintable()
        assert refusal("tfds:lm1b", objective="pairs").startswith("'tfds:lm1b' has no pairs: en_es, ")


@pytest.mark.parametrize(("said", "order"), [(["pt", "es"], 1), (None, 0)])
def test_a_prepared_translation_has_pairs_in_the_direction_that_it_says(tmp_path, mocked, said, order):
    import tensorflow_datasets as tfds

    features = tfds.features.Translation(languages=("es", "pt"))
    info = {"name": "ted_hrlr_translate", "version": "1.0.0", "configName": "es_to_pt"}
    folder = tmp_path / "tfds" / "ted_hrlr_translate" / "es_to_pt" / "1.0.0"
    _prepared(folder, features, info)
    with mocked, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds.core.DatasetInfo, "supervised_keys", said)
        name = "tfds:ted_hrlr_translate/es_to_pt"
        lines = [text.split("\t") for text in _texts(data.tokens(name, "train"))]
        pairs = _texts(data.pair_tokens(name, "train"))
        assert list(zip(pairs[::2], pairs[1::2], strict=True)) == [(line[order], line[1 - order]) for line in lines]
        assert len(lines) == 5


def _texts(tokens):
    return [data.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == data.EOS) + 1)][:-1]


def refusal(dataset, split="train", **changes):
    with pytest.raises(RequestError) as error:
        stream(dataset, split=split, **changes)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("shakespear", "unknown dataset 'shakespear': did you mean 'shakespeare'?"),
        ("tfds:", "did you mean 'tfds:NAME'?"),
        ("tfds:lm1c", "TFDS has no dataset 'lm1c': did you mean 'lm1b'?"),
        ("tfds:shakespeer", "did you mean 'shakespeare'?"),
        ("tfds:lm1b:9.9.9", "cannot be loaded at version 9.9.9, only: 1.1.0"),
        ("tfds:not a name", "Parsing builder name string not a name failed"),
        ("text:/no/such/folder/*.txt", "matches no file: there is no folder /no/such/folder"),
    ],
)
def test_wrong_name_is_refused_in_one_line(dataset, says):
    assert says in refusal(dataset)


def test_a_dataset_that_is_not_prepared_is_refused_at_once(tmp_path):
    message = refusal("tfds:wmt14_translate/de-en")
    assert f"not prepared in {tmp_path}/tfds/wmt14_translate/de-en" in message
    assert "TFDS_DATA_DIR" in message
    assert "download_and_prepare()" in message


def test_records_that_need_tensorflow_are_refused(tmp_path):
    _prepared_lm1b(tmp_path / "tfds", fileFormat="tfrecord")
    assert "FileFormat.TFRECORD" in refusal("tfds:lm1b")


def test_records_that_are_missing_are_refused(tmp_path):
    _prepared_lm1b(tmp_path / "tfds")
    assert "lm1b-train.array_record-00000-of-00001" in refusal("tfds:lm1b")


@pytest.mark.parametrize("name", ["shakespeare", "tfds:web", "text:FOLDER/a.txt"])
def test_pairs_of_a_corpus_without_any_are_refused_before_any_work(name, corpus, tmp_path, cache):
    name = name.replace("FOLDER", str(tmp_path))
    assert (
        refusal(name, objective="pairs") == f"{name!r} has no pairs: en_es, tsv:FILE and translations as tfds:NAME have"
    )
    assert not cache.exists()


def test_a_glob_that_matches_nothing_names_the_nearest_file(corpus, tmp_path):
    assert refusal(f"text:{tmp_path}/a.tx").endswith("matches no file: did you mean 'a.txt'?")
    (tmp_path / "empty").mkdir()
    assert refusal(f"text:{tmp_path}/empty/*").endswith("empty is empty")


def test_too_little_text_is_refused_with_its_length(corpus, tmp_path):
    n_train, n_held_out = (len(data.tokens(corpus, split)) for split in ("train", "validation"))
    some(corpus, 1, seq_len=n_train - 1)
    assert f"{n_train} tokens: too few for 1 x {n_train}" in refusal(corpus, seq_len=n_train)
    assert f"{n_held_out} tokens: too few for 6 x 100" in refusal(corpus, split="validation", seq_len=100)
    (tmp_path / "empty").touch()
    assert "has 1 tokens" in refusal(f"text:{tmp_path}/empty")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 258}, "vocab_size=258 is less than the 259 tokens of the byte tokenizer"),
        (
            {"vocab_size": 259, "objective": "masked"},
            "vocab_size=259 is less than the 260 tokens of the byte tokenizer with MASK",
        ),
        ({"seq_len": 1, "objective": "prefix"}, "seq_len=1 cannot be split into a prefix and what follows; nearest: 2"),
        ({"seq_len": 0}, "a batch of 6 sequences of 0 tokens is empty"),
        ({"batch_seqs": 0}, "a batch of 0 sequences of 7 tokens is empty"),
        ({"seed": -1}, "seed=-1 is not in 0 ... 2**32 - 1"),
    ],
)
def test_wrong_number_is_refused(corpus, changes, says):
    assert says in refusal(corpus, **changes)


def test_a_damaged_or_missing_corpus_is_refused_by_name(tmp_path, monkeypatch):
    whole = (datasets.CORPORA / "web.txt.xz").read_bytes()
    monkeypatch.setattr(datasets, "CORPORA", tmp_path)
    assert f"{tmp_path}/web.txt.xz cannot be read (No such file or directory)" in refusal("web")
    for damaged in (whole[:1000], whole[:500_000] + b"!" + whole[500_001:], b"no xz"):
        (tmp_path / "web.txt.xz").write_bytes(damaged)
        assert f"{tmp_path}/web.txt.xz is damaged" in refusal("web")


def test_a_cache_that_cannot_be_made_is_refused(corpus, tmp_path):
    (tmp_path / "file").touch()
    assert "set LADDER_CACHE" in refusal(corpus, cache=tmp_path / "file" / "cache")
