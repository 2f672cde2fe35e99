"""Text -> tokens -> batches: what a language model is trained on.

A dataset is named as on the command line:

    shakespeare, web, en_es   embedded texts (experiments/corpora)
    tfds:NAME                 a tensorflow-datasets dataset that is prepared on this machine
    text:GLOB                 your own text files; the last 5 % of each is held out

Tokens are bytes: 0 is padding, 1 ends a document, 2 begins one, byte b is 3 + b. They are computed
once and kept in the cache, $LADDER_CACHE or ~/.cache/ladder, as one uint16 array a split.
"""

import difflib
import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, UInt16

from transformer.errors import RequestError, nearest

if TYPE_CHECKING:
    import grain  # takes seconds to import, so the functions that need it do

PAD, EOS, BOS = 0, 1, 2
OFFSET = 3
"""The token of byte 0."""
VOCAB_SIZE = OFFSET + 256

Split = Literal["train", "validation"]
EMBEDDED = ("shakespeare", "web", "en_es")

_TOKENIZER = "bytes"
_ENTROPY_CHUNK = 1 << 24  # tokens; bincount makes eight bytes of each


def encode(text: str | bytes) -> UInt16[np.ndarray, " n"]:
    """One token per byte of the text as UTF-8.

    >>> encode("é").tolist()
    [198, 172]
    """
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, np.uint8).astype(np.uint16) + np.uint16(OFFSET)


def decode(ids: Iterable[int] | Int[np.ndarray, " n"]) -> str:
    """The text of tokens. Ids that are no bytes are left out; bytes that are no UTF-8 become U+FFFD.

    >>> decode([2, 198, 172, 1])
    'é'
    """
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64)
    array = array[(array >= OFFSET) & (array < VOCAB_SIZE)] - OFFSET
    return array.astype(np.uint8).tobytes().decode(errors="replace")


def batches(
    dataset: str,
    *,
    split: Split,
    batch_seqs: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    cache: Path | None = None,
    rows: slice | None = None,
) -> "grain.DatasetIterator[dict[str, np.ndarray]]":
    """Batches `{"inputs": int32 [B, L], "targets": int32 [B, L]}`; the targets are the next tokens.

    The corpus is cut into windows of L = `seq_len` tokens. Training sees every window once an epoch,
    each epoch in another order that follows from `seed`, without end. Validation is one epoch in
    order; windows that do not fill a last batch are left out.

    `batch_seqs` counts the sequences of a batch over all processes; `rows` names those that this process
    brings, B of them (default: all), so the batch as a whole does not depend on the number of processes.

    The iterator's `get_state` and `set_state` resume it exactly. Raises RequestError."""
    _check(batch_seqs, seq_len, seed, vocab_size)
    corpus = tokens(dataset, split, cache)
    n_windows = (len(corpus) - 1) // seq_len
    needed = 1 if split == "train" else batch_seqs
    if n_windows < needed:
        raise RequestError(
            f"the {split} split of {dataset!r} has {len(corpus)} tokens: too few for "
            f"{needed} x {seq_len} (batch x seq_len) and a next token"
        )
    import grain

    windows = grain.MapDataset.range(n_windows)
    if split == "train":
        windows = windows.seed(seed).shuffle().repeat()
    mine = slice(batch_seqs) if rows is None else rows
    offsets = np.arange(seq_len + 1)

    # Indices are batched before the corpus is read, so one gather makes a batch.
    def gather(index: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        window = corpus[index[mine, None] * seq_len + offsets[None]].astype(np.int32)
        return {"inputs": window[:, :-1], "targets": window[:, 1:]}

    dataset_of_batches = windows.batch(batch_seqs, drop_remainder=True).map(gather)
    return iter(dataset_of_batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def tokens(dataset: str, split: Split, cache: Path | None = None) -> UInt16[np.ndarray, " n"]:
    """All tokens of a split, memory-mapped, `EOS` after each document; made on first use (seconds).

    The cache is keyed by the text's content. A file there is whole or absent, and two processes may
    make it at once. Raises RequestError for an unknown, absent or damaged dataset."""
    cache = cache or default_cache()
    corpus = _open(dataset, cache)
    path = cache / corpus.key / f"{_TOKENIZER}-{split}.npy"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_tokens(path, corpus.documents(split))
        except OSError as error:
            raise RequestError(f"the cache {cache} cannot be written ({error}): set LADDER_CACHE") from None
    return np.load(path, mmap_mode="r")


def unigram_entropy_nats(dataset: str, split: Split = "train", cache: Path | None = None) -> float:
    """-sum p log p over the frequencies p of single tokens, in nats per token.

    A model that learned nothing but the frequencies has this loss: training must go below it."""
    corpus = tokens(dataset, split, cache)
    chunks = (corpus[start : start + _ENTROPY_CHUNK] for start in range(0, len(corpus), _ENTROPY_CHUNK))
    counts = sum((np.bincount(chunk, minlength=VOCAB_SIZE) for chunk in chunks), np.zeros(VOCAB_SIZE, np.int64))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def default_cache() -> Path:
    """$LADDER_CACHE, else ~/.cache/ladder."""
    return Path(os.environ.get("LADDER_CACHE") or "~/.cache/ladder").expanduser()


class _Text(NamedTuple):
    key: str
    """Names the content: another text has another key."""
    documents: Callable[[Split], Iterable[bytes]]


def _check(batch_seqs: int, seq_len: int, seed: int, vocab_size: int) -> None:
    if vocab_size < VOCAB_SIZE:
        raise RequestError(f"vocab_size={vocab_size} is less than the {VOCAB_SIZE} tokens of the byte tokenizer")
    if batch_seqs < 1 or seq_len < 1:
        raise RequestError(f"a batch of {batch_seqs} sequences of {seq_len} tokens is empty")
    if not 0 <= seed < 2**32:
        raise RequestError(f"seed={seed} is not in 0 ... 2**32 - 1")


def _open(dataset: str, cache: Path) -> _Text:
    kind, _, rest = dataset.partition(":")
    if dataset in EMBEDDED or (kind == "tfds" and rest in EMBEDDED):
        return _open_embedded(rest or dataset, cache)
    if kind == "tfds" and rest:
        return _open_tfds(rest)
    if kind == "text" and rest:
        return _open_files(rest)
    raise RequestError(f"unknown dataset {dataset!r}: {nearest(dataset, [*EMBEDDED, 'tfds:NAME', 'text:GLOB'])}")


def _open_embedded(name: str, cache: Path) -> _Text:
    from experiments import datasets

    key = datasets.key(name)
    return _Text(key, lambda split: datasets.documents(datasets.prepare(name, cache / key), split))


def _open_tfds(name: str) -> _Text:
    from experiments import datasets

    builder = datasets.open_prepared(name)
    content = hashlib.blake2b(builder.info.as_json.encode(), digest_size=8)
    key = f"tfds-{builder.info.full_name.replace('/', '-')}-{content.hexdigest()}"
    return _Text(key, lambda split: datasets.documents(builder, split))


def _open_files(pattern: str) -> _Text:
    from experiments.datasets import hold_out

    pattern = os.path.expanduser(pattern)
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not files:
        raise RequestError(f"text:{pattern} matches no file: {_beside(Path(pattern))}")
    content = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise RequestError(f"text:{pattern}: {file} cannot be read ({error.strerror})") from None
        content.update(f"{len(text)} ".encode() + text)
    return _Text(f"text-{content.hexdigest()}", lambda split: (hold_out(file.read_bytes(), split) for file in files))


def _beside(path: Path) -> str:
    """What there is instead of `path`."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=5, cutoff=0)
    return nearest(path.name, near) if near else f"{path.parent} is empty"


def _write_tokens(path: Path, documents: Iterable[bytes]) -> None:
    """Write a .npy of all documents' tokens, whole or not at all, holding one document at a time."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (0,)}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for document in documents:
                file.write(encode(document).astype("<u2").tobytes())
                file.write(EOS.to_bytes(2, "little"))
            n_tokens = (file.tell() - start) // 2
            file.seek(0)
            # NumPy pads headers so that the first dim may grow in place.
            np.lib.format.write_array_header_1_0(file, header | {"shape": (n_tokens,)})
            assert file.tell() == start
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
