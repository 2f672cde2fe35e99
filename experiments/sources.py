"""From a dataset's name to its texts: the embedded ones, those of TFDS, and your own files.

It imports TFDS, which costs half a second: import it inside functions.
"""

import codecs
import difflib
import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments import datasets
from experiments.datasets import Split
from transformer.errors import RequestError, nearest

NAMES = (*datasets.EMBEDDED, "tfds:NAME", "text:GLOB", "tsv:FILE")


class Source(NamedTuple):
    """A corpus that was found; its texts are read when asked for."""

    key: str
    """Names the content: another text has another key."""
    documents: Callable[[Split], Iterable[bytes]]
    pairs: Callable[[Split], Iterable[tuple[bytes, bytes]]] | None
    """Texts and their translations, where a record is both."""


def open_source(dataset: str, cache: Path) -> Source:
    """The corpus of that name. RequestError if it is unknown, absent or cannot be read."""
    kind, _, rest = dataset.partition(":")
    if dataset in datasets.EMBEDDED or (kind == "tfds" and rest in datasets.EMBEDDED):
        return _embedded(rest or dataset, cache)
    if kind == "tfds" and rest:
        return _prepared(rest)
    if kind == "text" and rest:
        return _files(rest)
    if kind == "tsv" and rest:
        return _table(rest)
    raise RequestError(f"unknown dataset {dataset!r}: {nearest(dataset, NAMES)}")


def _embedded(name: str, cache: Path) -> Source:
    key = datasets.key(name)

    def documents(split: Split) -> Iterable[bytes]:
        return datasets.documents(datasets.prepare(name, cache / key), split)

    def pairs(split: Split) -> Iterable[tuple[bytes, bytes]]:
        return datasets.pairs(datasets.prepare(name, cache / key), split)

    return Source(key, documents, pairs if datasets.EMBEDDED[name].PAIRS else None)


def _prepared(name: str) -> Source:
    builder = datasets.open_prepared(name)
    content = hashlib.blake2b(builder.info.as_json.encode(), digest_size=8)
    key = f"tfds-{builder.info.full_name.replace('/', '-')}-{content.hexdigest()}"
    pairs = partial(datasets.pairs, builder) if datasets.languages(builder) else None
    return Source(key, partial(datasets.documents, builder), pairs)


def _files(pattern: str) -> Source:
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

    def documents(split: Split) -> Iterable[bytes]:
        return (datasets.hold_out(file.read_bytes(), split) for file in files)

    return Source(f"text-{content.hexdigest()}", documents, None)


def _table(name: str) -> Source:
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=8))
    except FileNotFoundError:
        raise RequestError(f"tsv:{name} is no file: {_beside(path)}") from None
    except OSError as error:
        raise RequestError(f"tsv:{name} cannot be read ({error.strerror})") from None

    def documents(split: Split) -> Iterable[bytes]:
        return map(b"\t".join, _columns(path, split))

    return Source(f"tsv-{content.hexdigest()}", documents, partial(_columns, path))


def _columns(path: Path, split: Split) -> Iterator[tuple[bytes, bytes]]:
    """The two columns of every line of a split; all lines are checked. RequestError names file and line."""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            columns = line.removeprefix(codecs.BOM_UTF8 if index == 0 else b"").rstrip(b"\r\n").split(b"\t")
            place = f"{path}:{index + 1}"
            if len(columns) != 2:
                raise RequestError(f"{place}: expected two columns with a tab between, found {len(columns)}")
            if not all(columns):
                raise RequestError(f"{place}: a column is empty; expected a text on both sides of the tab")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise RequestError(f"{place}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
            if (index % datasets.EVERY_NTH == 0) == (split == "validation"):
                yield columns[0], columns[1]


def _beside(path: Path) -> str:
    """What there is instead of `path`."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=5, cutoff=0)
    return nearest(path.name, near) if near else f"{path.parent} is empty"
