"""Text -> tokens -> batches: what a model of each family is trained on.

A dataset is named as on the command line:

    shakespeare, web, en_es   embedded texts (experiments/corpora); en_es has pairs
    tfds:NAME                 a tensorflow-datasets dataset that is prepared on this machine; translations have pairs
    text:GLOB                 your own text files; the last 5 % of each is held out
    tsv:FILE                  your own pairs, a tab between source and target; every 50th line is held out

Tokens (`tokenizer.py`) are computed once and kept in the cache, $LADDER_CACHE or ~/.cache/ladder, as one uint16 array
a split; so are packed pairs (`packing.py`). What becomes of them is the objective's (`objectives.py`).
"""

import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import Int, UInt16

from experiments import objectives, packing
from experiments.objectives import Batch, Objective
from experiments.tokenizer import BOS as BOS
from experiments.tokenizer import EOS, MASK, VOCAB_SIZE, encode
from experiments.tokenizer import PAD as PAD
from experiments.tokenizer import decode as decode
from transformer.errors import RequestError

if TYPE_CHECKING:
    import grain  # takes seconds to import, so the functions that need it do

    from experiments.sources import Source

Split = Literal["train", "validation"]

_TOKENIZER = "bytes"
_ENTROPY_CHUNK = 1 << 24  # tokens; bincount makes eight bytes of each
_HELD_OUT_KEY = 1 << 32  # of random numbers; seeds are less


def default_dataset(objective: Objective) -> str:
    """The embedded corpus that an objective is tried on."""
    return "en_es" if objective == "pairs" else "shakespeare"


def batches(
    dataset: str,
    *,
    objective: Objective,
    split: Split,
    batch_seqs: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    cache: Path | None = None,
    rows: slice | None = None,
) -> "grain.DatasetIterator[Batch]":
    """Batches as `transformer.models` reads them, with "targets" int32 [B, L] and "weights" float32 [B, L].

    The corpus is cut into windows of L = `seq_len` tokens, or for pairs packed into rows of L on either side.
    Training sees every window once an epoch, each epoch in another order that follows from `seed`, without end.
    Validation is one epoch in order, the same for every seed; windows that do not fill a last batch are left out.

    `batch_seqs` counts the sequences of a batch over all processes; `rows` names those that this process
    brings, B of them (default: all), so the batch as a whole does not depend on the number of processes.

    The iterator's `get_state` and `set_state` resume it exactly. Raises RequestError."""
    _check(objective, batch_seqs, seq_len, seed, vocab_size)
    first, stop, step = (rows or slice(None)).indices(batch_seqs)
    assert step == 1  # random numbers are drawn for neighbours
    if objective == "pairs":
        n_windows, make = _pair_rows(dataset, split, batch_seqs, seq_len, cache, say=first == 0)
    else:
        key = seed if split == "train" else _HELD_OUT_KEY
        n_windows, make = _windows(dataset, objective, split, batch_seqs, seq_len, cache, key)
    import grain

    windows = grain.MapDataset.range(n_windows)
    if split == "train":
        windows = windows.seed(seed).shuffle().repeat()

    # Indices are batched before the corpus is read, so one gather makes a batch.
    def gather(batch: int, index: Int[np.ndarray, " all"]) -> Batch:
        return make(index[first:stop], batch * batch_seqs + first)

    dataset_of_batches = windows.batch(batch_seqs, drop_remainder=True).map_with_index(gather)
    return iter(dataset_of_batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


Make = Callable[[Int[np.ndarray, " B"], int], Batch]
"""Which windows, and how many sequences the stream had before them -> their batch."""


def _windows(
    dataset: str, objective: Objective, split: Split, batch_seqs: int, seq_len: int, cache: Path | None, key: int
) -> tuple[int, Make]:
    """How many windows a split has, and what makes a batch of some."""
    corpus = tokens(dataset, split, cache)
    beyond = 0 if objective == "masked" else 1  # the last token's target
    n_windows = (len(corpus) - beyond) // seq_len
    needed = 1 if split == "train" else batch_seqs
    if n_windows < needed:
        raise RequestError(
            f"the {split} split of {dataset!r} has {len(corpus)} tokens: too few for "
            f"{needed} x {seq_len} (batch x seq_len){' and a next token' * beyond}"
        )
    offsets = np.arange(seq_len + beyond)

    def make(index: Int[np.ndarray, " B"], n_before: int) -> Batch:
        window = corpus[index[:, None] * seq_len + offsets[None]].astype(np.int32)
        if objective == "causal":
            return objectives.next_tokens(window)
        if objective == "prefix":
            return objectives.after_prefix(window, objectives.draws(key, n_before, len(index), 1)[:, 0])
        return objectives.masked(window, objectives.draws(key, n_before, len(index), seq_len))

    return n_windows, make


def _pair_rows(
    dataset: str, split: Split, batch_seqs: int, seq_len: int, cache: Path | None, *, say: bool
) -> tuple[int, Make]:
    """How many packed rows a split has, and what makes a batch of some."""
    corpus, n_left_out, n_pairs = packed(dataset, split, seq_len, cache)
    if split == "validation" and len(corpus) < batch_seqs:
        raise RequestError(
            f"the {split} split of {dataset!r} fills {len(corpus)} rows of {seq_len} tokens: "
            f"too few for a batch of {batch_seqs}"
        )
    if n_left_out and say:
        _say_once(
            f"{dataset}: {n_left_out:,} of {n_pairs:,} {split} pairs are longer than seq_len={seq_len} "
            "on one side and left out"
        )
    return len(corpus), lambda index, _: objectives.side_by_side(corpus[index].astype(np.int32))


def tokens(dataset: str, split: Split, cache: Path | None = None) -> UInt16[np.ndarray, " n"]:
    """All tokens of a split, memory-mapped, `EOS` after each document; made on first use (seconds).

    The cache is keyed by the text's content. A file there is whole or absent, and two processes may
    make it at once. Raises RequestError for an unknown, absent or damaged dataset."""
    cache = cache or default_cache()
    source = _open(dataset, cache)
    return _cached(cache, source.key, f"{_TOKENIZER}-{split}", lambda: _encoded(source.documents(split)))


def pair_tokens(dataset: str, split: Split, cache: Path | None = None) -> UInt16[np.ndarray, " n"]:
    """The same of a split's pairs: source, `EOS`, target, `EOS`, and so on. RequestError if there are none."""
    cache = cache or default_cache()
    return _pair_tokens(dataset, _open(dataset, cache), split, cache)


def packed(
    dataset: str, split: Split, seq_len: int, cache: Path | None = None
) -> tuple[UInt16[np.ndarray, "R 2 L"], int, int]:
    """Rows of source and target, several pairs in each; how many pairs are too long for it; and of how many.

    Memory-mapped, made on first use (seconds). RequestError if all are too long."""
    cache = cache or default_cache()
    source = _open(dataset, cache)
    corpus = _pair_tokens(dataset, source, split, cache)
    lengths = _pair_lengths(corpus)
    longest = lengths.max(axis=1)
    if longest.min() > seq_len:
        holds_99 = np.sort(longest)[math.ceil(0.99 * len(longest)) - 1]
        raise RequestError(
            f"seq_len={seq_len} holds no {split} pair of {dataset!r}: the shortest has {longest.min()} tokens on "
            f"its longer side; nearest that holds 99 % of pairs: {holds_99}"
        )

    def chunks() -> Iterator[UInt16[np.ndarray, "2 L"]]:
        return packing.rows(corpus, lengths, packing.pack(lengths, seq_len), seq_len)

    name = f"{_TOKENIZER}-pairs-{split}-{packing.METHOD}-{seq_len}"
    rows = _cached(cache, source.key, name, chunks, (2, seq_len))
    return rows, int((longest > seq_len).sum()), len(lengths)


def unigram_entropy_nats(
    dataset: str, split: Split = "train", cache: Path | None = None, *, objective: Objective = "causal"
) -> float:
    """-sum p log p over the frequencies p of single tokens, in nats per token; of pairs, over the targets.

    A model that learned nothing but the frequencies has this loss: training must go below it."""
    corpus = pair_tokens(dataset, split, cache) if objective == "pairs" else tokens(dataset, split, cache)
    counts, n_texts = np.zeros(VOCAB_SIZE, np.int64), 0
    for start in range(0, len(corpus), _ENTROPY_CHUNK):
        chunk = corpus[start : start + _ENTROPY_CHUNK]
        if objective == "pairs":
            ends = chunk == EOS
            text = n_texts + ends.cumsum() - ends  # which one a token is of; the odd ones are targets
            n_texts += int(ends.sum())
            chunk = chunk[text % 2 == 1]
        counts += np.bincount(chunk, minlength=VOCAB_SIZE)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def default_cache() -> Path:
    """$LADDER_CACHE, else ~/.cache/ladder."""
    return Path(os.environ.get("LADDER_CACHE") or "~/.cache/ladder").expanduser()


def _check(objective: Objective, batch_seqs: int, seq_len: int, seed: int, vocab_size: int) -> None:
    assert objective in get_args(Objective)
    needed = VOCAB_SIZE if objective == "masked" else MASK  # others have no use for the last token
    if vocab_size < needed:
        also = " with MASK" if objective == "masked" else ""
        raise RequestError(f"vocab_size={vocab_size} is less than the {needed} tokens of the byte tokenizer{also}")
    if batch_seqs < 1 or seq_len < 1:
        raise RequestError(f"a batch of {batch_seqs} sequences of {seq_len} tokens is empty")
    if objective == "prefix" and seq_len < 2:
        raise RequestError(f"seq_len={seq_len} cannot be split into a prefix and what follows; nearest: 2")
    if not 0 <= seed < 2**32:
        raise RequestError(f"seed={seed} is not in 0 ... 2**32 - 1")


def _open(dataset: str, cache: Path) -> "Source":
    from experiments import sources

    return sources.open_source(dataset, cache)


@functools.cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr)


def _pair_tokens(dataset: str, source: "Source", split: Split, cache: Path) -> UInt16[np.ndarray, " n"]:
    pairs = source.pairs
    if pairs is None:
        raise RequestError(f"{dataset!r} has no pairs: en_es, tsv:FILE and translations as tfds:NAME have")

    def chunks() -> Iterator[UInt16[np.ndarray, " n"]]:
        return _encoded(text for pair in pairs(split) for text in pair)

    corpus = _cached(cache, source.key, f"{_TOKENIZER}-pairs-{split}", chunks)
    if not len(corpus):
        raise RequestError(f"the {split} split of {dataset!r} has no pairs")
    return corpus


def _pair_lengths(corpus: UInt16[np.ndarray, " n"]) -> Int[np.ndarray, "N 2"]:
    """Tokens of every source and target, their ends included."""
    starts = range(0, len(corpus), _ENTROPY_CHUNK)
    ends = [np.flatnonzero(corpus[start : start + _ENTROPY_CHUNK] == EOS) + start for start in starts]
    return np.diff(np.concatenate(ends), prepend=-1).reshape(-1, 2)


def _encoded(documents: Iterable[bytes]) -> Iterator[UInt16[np.ndarray, " n"]]:
    end = np.array([EOS], np.uint16)
    return (np.concatenate([encode(document), end]) for document in documents)


def _cached(
    cache: Path, key: str, name: str, chunks: Callable[[], Iterable[np.ndarray]], row: tuple[int, ...] = ()
) -> np.ndarray:
    """The uint16 array [n, *row] of that name, memory-mapped; made of chunks [*row], or of [m] where rows are numbers,
    unless it is there."""
    path = cache / key / f"{name}.npy"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, chunks(), row)
        except OSError as error:
            raise RequestError(f"the cache {cache} cannot be written ({error}): set LADDER_CACHE") from None
    return np.load(path, mmap_mode="r")


def _write(path: Path, chunks: Iterable[np.ndarray], row: tuple[int, ...]) -> None:
    """Write chunks as one .npy, whole or not at all, holding one at a time."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (0, *row)}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for chunk in chunks:
                file.write(chunk.astype("<u2").tobytes())
            n = (file.tell() - start) // (2 * math.prod(row))
            file.seek(0)
            # NumPy pads headers so that the first dim may grow in place.
            np.lib.format.write_array_header_1_0(file, header | {"shape": (n, *row)})
            assert file.tell() == start
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
