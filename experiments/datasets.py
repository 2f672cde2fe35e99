"""Text as tensorflow-datasets (TFDS) keeps it: the embedded corpora as registered builders, and any
dataset that is prepared on this machine. No TensorFlow: records are array_record files.

Importing this module registers the builders, so `tfds.builder("shakespeare", file_format="array_record")`
works. It costs half a second: import it inside functions.
"""

import contextlib
import difflib
import hashlib
import io
import lzma
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

from transformer.errors import RequestError, nearest

Split = Literal["train", "validation"]

CORPORA = Path(__file__).parent / "corpora"
HELD_OUT = 0.05
"""Fraction of a text that is held out by position."""
EVERY_NTH = 50
"""One verse in so many is held out."""

_FILE_FORMAT = "array_record"  # the default, tfrecord, is written and read by TensorFlow
_READ_AT_ONCE = 1000


def hold_out(text: bytes, split: Split) -> bytes:
    """The first 95 % of a text, or the rest of it; the cut is moved back to the start of a line if one is near."""
    cut = int(len(text) * (1 - HELD_OUT))
    cut = text.rfind(b"\n", int(len(text) * (1 - 2 * HELD_OUT)), cut) + 1 or cut
    return text[:cut] if split == "train" else text[cut:]


class _Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """An embedded corpus: `records` says what the records of a split are."""

    VERSION = tfds.core.Version("1.0.0")  # raise it when `records` changes: the cache goes by it
    FILE: str
    FEATURES: tfds.features.FeaturesDict
    PAIRS = False  # whether a record is a text and its translation

    def records(self, text: bytes, split: Split) -> Iterable[dict[str, bytes]]:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        # Not shuffled: what follows in the text follows in the records.
        return tfds.core.DatasetInfo(builder=self, features=self.FEATURES, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        text = _decompress(CORPORA / self.FILE)
        return {split: self._generate_examples(text, split) for split in ("train", "validation")}

    def _generate_examples(self, text: bytes, split: Split) -> Iterator[tuple[int, dict[str, bytes]]]:
        yield from enumerate(self.records(text, split))


class Shakespeare(_Corpus):
    """38 plays, a record each; the last 5 % of every play is held out."""

    FILE = "shakespeare.txt.xz"
    FEATURES = tfds.features.FeaturesDict({"text": tfds.features.Text()})

    def records(self, text: bytes, split: Split) -> Iterable[dict[str, bytes]]:
        # Titles are top headings, as are three epilogues and an intermission. Measure for Measure came
        # without its title: its first act follows the play before, and no other does, without a blank line.
        plays = re.split(rb"(?m)^(?=# (?!EPILOGUE|INTERMISSION))|(?<=[^\n]\n)(?=## ACT I$)", text)
        return ({"text": hold_out(play, split)} for play in plays if play)


class Web(_Corpus):
    """The World English Bible; every 50th verse is held out, a record is the verses in between."""

    FILE = "web.txt.xz"
    FEATURES = tfds.features.FeaturesDict({"text": tfds.features.Text()})

    def records(self, text: bytes, split: Split) -> Iterable[dict[str, bytes]]:
        verses = text.splitlines()
        for start in range(0, len(verses), EVERY_NTH):
            held_out, *rest = verses[start : start + EVERY_NTH]
            if lines := rest if split == "train" else [held_out]:
                yield {"text": b"\n".join(lines)}


class EnEs(_Corpus):
    """31,077 verses in English and Spanish, a record each; every 50th is held out."""

    FILE = "en_es.tsv.xz"
    FEATURES = tfds.features.Translation(languages=("en", "es"))
    PAIRS = True

    def records(self, text: bytes, split: Split) -> Iterable[dict[str, bytes]]:
        for index, line in enumerate(text.splitlines()):
            if (index % EVERY_NTH == 0) == (split == "validation"):
                _, english, spanish = line.split(b"\t")
                yield {"en": english, "es": spanish}


EMBEDDED: dict[str, type[_Corpus]] = {corpus.name: corpus for corpus in (Shakespeare, Web, EnEs)}


def key(name: str) -> str:
    """A name for the content of an embedded corpus: another text or another cut of it has another.

    Raises RequestError if the corpus file is missing."""
    corpus = EMBEDDED[name]
    path = CORPORA / corpus.FILE
    try:
        content = hashlib.blake2b(path.read_bytes(), digest_size=8)
    except OSError as error:
        raise RequestError(f"the corpus {path} cannot be read ({error.strerror}): reinstall the package") from None
    return f"{name}-{corpus.VERSION}-{content.hexdigest()}"


def prepare(name: str, folder: Path) -> tfds.core.DatasetBuilder:
    """The builder of an embedded corpus, its records built in `folder` unless they are there.

    They appear whole or not at all, and two processes may build them at once.
    Raises RequestError if the corpus file is damaged."""
    records = folder / "tfds"
    if not records.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tfds.") as temporary:
            tfds.disable_progress_bar()
            unfinished = Path(temporary) / "tfds"
            with contextlib.redirect_stdout(io.StringIO()):  # standard output belongs to --json
                EMBEDDED[name](data_dir=unfinished, file_format=_FILE_FORMAT).download_and_prepare()
            try:
                unfinished.rename(records)
            except OSError:  # another process was first; its records are the same
                if not records.is_dir():
                    raise
    return EMBEDDED[name](data_dir=records, file_format=_FILE_FORMAT)


def open_prepared(name: str) -> tfds.core.DatasetBuilder:
    """The builder of a TFDS dataset that is prepared in TFDS_DATA_DIR, or else in ~/tensorflow_datasets.

    Raises RequestError, at once and without asking the network, if TFDS does not know the name or
    the dataset is not prepared: TFDS itself would try to download it for minutes."""
    import tensorflow_datasets.text
    import tensorflow_datasets.translate  # noqa: F401  # registers datasets of the older kind

    data_dir = os.environ.get("TFDS_DATA_DIR")
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format=_FILE_FORMAT)
    except registered.DatasetNotFoundError:
        known = difflib.get_close_matches(name, registered.list_imported_builders(), n=5, cutoff=0)
        raise RequestError(f"TFDS has no dataset {name!r}: {nearest(name, known)}") from None
    except (ValueError, AssertionError, ImportError) as error:
        raise RequestError(f"tfds:{name} cannot be opened: {_first_line(error)}") from None
    if not builder.is_prepared():
        raise RequestError(
            f"tfds:{name} is not prepared in {builder.data_path}: point TFDS_DATA_DIR at a folder that has it, "
            f"or with a network run tfds.builder({name!r}, file_format={_FILE_FORMAT!r}).download_and_prepare()"
        )
    return builder


def documents(builder: tfds.core.DatasetBuilder, split: Split) -> Iterator[bytes]:
    """The texts of a prepared dataset, a record each, in order; a translation's languages are joined by tabs.

    Held out is the split `validation`, else `test`, else the last 5 % of `train`.
    Raises RequestError if the records have no one text or cannot be read."""
    return map(b"\t".join, _records(builder, split, _text_features(builder)))


def pairs(builder: tfds.core.DatasetBuilder, split: Split) -> Iterator[tuple[bytes, bytes]]:
    """Source and target of every record of a dataset that has `languages`; the splits are those of `documents`."""
    both = languages(builder)
    assert both is not None
    return ((source, target) for source, target in _records(builder, split, both))


def languages(builder: tfds.core.DatasetBuilder) -> tuple[str, str] | None:
    """The features that are source and target: as the dataset says, else in its order. None if it has no such two."""
    features: Any = builder.info.features
    if not isinstance(features, tfds.features.Translation):
        return None
    known = tuple(features.keys())
    said: Any = builder.info.supervised_keys or known
    return said if len(said) == 2 and set(said) == set(known) else None


def _records(builder: tfds.core.DatasetBuilder, split: Split, features: tuple[str, ...]) -> Iterator[tuple[bytes, ...]]:
    """Those features of every record of a split."""
    slices = {"train": "train[:95%]", "validation": "train[95%:]"}
    if held_out := next((s for s in ("validation", "test") if s in builder.info.splits), None):
        slices = {"train": "train", "validation": held_out}
    try:
        source = builder.as_data_source(slices[split])  # pyright: ignore[reportCallIssue]  # a decorator hides it
        for start in range(0, len(source), _READ_AT_ONCE):
            for record in source.__getitems__(range(start, min(start + _READ_AT_ONCE, len(source)))):
                texts = (record[feature] for feature in features)
                yield tuple(text.encode() if isinstance(text, str) else text for text in texts)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        raise RequestError(f"the {split} records of tfds:{builder.name} cannot be read: {_first_line(error)}") from None


def _text_features(builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    features: Any = builder.info.features
    texts = tuple(key for key, feature in features.items() if isinstance(feature, tfds.features.Text))
    if "text" in texts:
        return ("text",)
    if len(texts) == 1 or isinstance(features, tfds.features.Translation):
        return texts
    raise RequestError(f"tfds:{builder.name} is not one text a record: its features are {', '.join(features)}")


def _first_line(error: Exception) -> str:
    """TFDS explains at length."""
    return str(error).strip().partition("\n")[0].rstrip(" :")


def _decompress(path: Path) -> bytes:
    try:
        return lzma.decompress(path.read_bytes())
    except lzma.LZMAError as error:
        raise RequestError(f"the corpus {path} is damaged ({error}): reinstall the package") from None
