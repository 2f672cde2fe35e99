"""Weights of Hugging Face transformers in and out, by the rules of `tables.py`, read in both directions.

Their tensors are a flat mapping of names, one for every layer and expert; ours a nested dict with layers and experts
stacked. Vocabularies are padded with zeros on the way in and cut on the way out.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Shaped

from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.interop.tables import Rule, Table, table_of
from transformer.models import model_params
from transformer.params import Param, leaves

LETTERS: Mapping[str, str] = {
    "embed": "d", "expert_embed": "d", "channel": "c", "kv_heads": "k", "kv_head": "k", "group": "g", "heads": "g",
    "head": "h", "ffn": "f", "vocab": "v", "position": "p", "latent": "r",
}  # fmt: skip

OLDER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in files converted from TensorFlow, such as BERT's."""

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]


class _Part(NamedTuple):
    """A parameter of ours, or a layer's and expert's part of it, as a rule sees it."""

    path: str
    at: tuple[int, ...]  # where in the stacked array
    letters: str  # of its axes
    shape: tuple[int, ...]  # with the vocabulary as long as theirs
    star: str

    def size(self, letters: str) -> int:
        return math.prod(1 if c == "1" else self.shape[self.letters.index(c.lower())] for c in letters)

    def axes(self, layout: str) -> str:
        """The letters of theirs that are axes of ours, in their order."""
        return layout.replace("*", self.star).replace("1", "").lower()

    @property
    def window(self) -> tuple[int | slice, ...]:
        """The part of the stored array, without the padding of the vocabulary."""
        return (*self.at, *(slice(n) for n in self.shape))


class _Entry(NamedTuple):
    """One tensor of theirs and all parts of ours that it holds."""

    name: str
    rule: Rule
    parts: tuple[_Part, ...]

    @property
    def groups(self) -> list[str]:
        """Letters of each of its axes.

        >>> _Entry("x", Rule("x", "(k*h) d", {}), ()).groups
        ['k*h', 'd']
        """
        return [group.strip("()") for group in self.rule.layout.split()]

    def shape(self, groups: Iterable[str]) -> tuple[int, ...]:
        """Sizes of axes or letters; `*` is all parts together."""
        first = self.parts[0]
        stars = sum(part.size(part.star) for part in self.parts)
        return tuple(math.prod(stars if c == "*" else first.size(c) for c in group) for group in groups)


def from_hf(state: Tensors, config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Our parameters, a nested dict of arrays in the dtype given, from weights as they lie in a repository's files.

    `architecture` is config.json's `model_type`. RequestError for a tensor that is missing, of another shape, not of
    this model, or that contradicts the one it should repeat.

    >>> config = ModelConfig(n_layers=1, d_model=4, n_heads=2, n_kv_heads=2, d_head=2, d_ff=8, vocab_size=3, max_len=8)
    >>> from_hf({}, config, "lama")
    Traceback (most recent call last):
    transformer.errors.RequestError: unknown architecture 'lama': did you mean 'llama'?
    """
    table = table_of(architecture, config)
    state = {_newer(name): array for name, array in state.items()}
    if table.prefix and not any(name.startswith(table.prefix) for name in state):
        state = {table.prefix + name: array for name, array in state.items()}
    params = dict(leaves(model_params(config)))
    arrays: dict[str, np.ndarray] = {}
    read: set[str] = set()
    for entry in _entries(table, config, architecture):
        tensor, expected = state.get(entry.name), entry.shape(entry.groups)
        if tensor is None:
            close = difflib.get_close_matches(entry.name, state, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(f"the weights have no {entry.name!r}, expected with shape {expected}{hint}")
        if tensor.shape != expected:
            raise RequestError(f"{entry.name!r} has shape {tensor.shape}, expected {expected}")
        read.add(entry.name)
        for part, array in zip(entry.parts, _split(entry, np.asarray(tensor)), strict=True):
            whole = arrays.setdefault(part.path, np.zeros(params[part.path].shape, tensor.dtype))
            whole[part.window] = _changed(entry.rule, part, array, config, table, inwards=True)
    _check_rest(state, read, table, config, architecture)
    return _nested(arrays)


def to_hf(params: Mapping[str, Any], config: ModelConfig, architecture: str) -> dict[str, np.ndarray]:
    """The same weights under their names: what `from_hf` reads, exactly.

    Where they store w for our 1 + w (Gemma, Nemotron) the way there and back is exact from ours, and from theirs
    within the rounding of 1 + w.
    """
    table = table_of(architecture, config)
    paths = jax.tree_util.tree_leaves_with_path(params)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}
    state = {}
    for entry in _entries(table, config, architecture):
        parts = [
            _changed(entry.rule, part, arrays[part.path][part.window], config, table, inwards=False)
            for part in entry.parts
        ]
        state[entry.name] = _join(entry, parts)
    return state


def _entries(table: Table, config: ModelConfig, architecture: str) -> list[_Entry]:
    """Every tensor that the table has for a config. RequestError if a parameter of ours is in none."""
    params = dict(leaves(model_params(config)))
    entries: list[_Entry] = []
    layers = [
        (f"/block_{block.first}/layer_{place}/", repeat)
        for block in config.blocks() for repeat in range(block.repeats) for place in range(len(block.kinds))
    ]  # fmt: skip
    for rule in table.rules:
        for i, layer in enumerate(layers if "{i}" in rule.theirs else [None]):
            for e in range(config.n_experts or 0) if "{e}" in rule.theirs else [None]:
                parts = (_part(params, path, star, layer, e, config) for path, star in rule.ours.items())
                present = tuple(part for part in parts if part is not None)
                if present:
                    entries.append(_Entry(rule.theirs.format(i=i, e=e), rule, present))
    if missing := sorted(params.keys() - {part.path for entry in entries for part in entry.parts}):
        raise RequestError(f"{architecture} has nothing for {missing[0]} of shape {params[missing[0]].shape}")
    return entries


def _part(
    params: Mapping[str, Param], path: str, star: str, layer: tuple[str, int] | None, expert: int | None,
    config: ModelConfig,
) -> _Part | None:  # fmt: skip
    """The parameter of that path in a layer and expert; None if the config has none."""
    at: tuple[int, ...] = ()
    if layer is not None:
        path, at = path.replace("/layer/", layer[0]), (layer[1],)
    if path not in params:
        return None
    if expert is not None:
        at = (*at, expert)
    param = params[path]
    dims, shape = param.dims[len(at) :], param.shape[len(at) :]
    shape = tuple(config.vocab_size if dim == "vocab" else n for dim, n in zip(dims, shape, strict=True))
    return _Part(path, at, "".join(LETTERS[dim] for dim in dims), shape, star)


def _split(entry: _Entry, tensor: np.ndarray) -> list[np.ndarray]:
    """Each part of ours out of a tensor of theirs."""
    letters = "".join(entry.groups)
    tensor = tensor.reshape(entry.shape(letters))
    pieces = [tensor]
    if "*" in letters:
        ends = np.cumsum([part.size(part.star) for part in entry.parts])
        pieces = np.split(tensor, ends[:-1], axis=letters.index("*"))
    arrays = []
    for part, piece in zip(entry.parts, pieces, strict=True):
        axes = part.axes(letters)
        array = piece.reshape([part.size(c) for c in axes])
        arrays.append(array.transpose([axes.index(c) for c in part.letters]))
    return arrays


def _join(entry: _Entry, arrays: list[np.ndarray]) -> np.ndarray:
    """`_split` backwards."""
    letters = "".join(entry.groups)
    pieces = []
    for part, array in zip(entry.parts, arrays, strict=True):
        axes = part.axes(letters)
        array = array.transpose([part.letters.index(c) for c in axes])
        pieces.append(array.reshape([part.size(part.star if c == "*" else c) for c in letters]))
    tensor = np.concatenate(pieces, axis=letters.index("*")) if "*" in letters else pieces[0]
    return np.ascontiguousarray(tensor.reshape(entry.shape(entry.groups)))


def _changed(
    rule: Rule, part: _Part, array: np.ndarray, config: ModelConfig, table: Table, *, inwards: bool
) -> np.ndarray:
    """Values as we have them (`inwards`) or as they do: an offset, channels in another order."""
    if rule.plus_one:
        one = np.ones((), array.dtype)
        array = array + one if inwards else array - one
    for axis, letter in enumerate(part.letters):
        order = None
        if letter.upper() in rule.layout.replace("*", part.star):
            order = _halves(part.shape[axis], config.rotating, last=config.kv_rank is not None)
        if table.sinusoid_halves and letter in "cd" and part.shape[axis] == config.d_model:
            order = np.argsort(_halves(config.d_model, config.d_model, last=False))
        if order is not None:
            array = np.take(array, order if inwards else np.argsort(order), axis=axis)
    return array


def _halves(n: int, rotating: int, *, last: bool) -> np.ndarray:
    """Which of n neighbouring channels go where when the first or last `rotating` become two halves.

    >>> _halves(6, 4, last=True).tolist()
    [0, 1, 2, 4, 3, 5]
    """
    order = np.arange(n)
    at = slice(n - rotating, n) if last else slice(rotating)
    order[at] = order[at].reshape(-1, 2).T.ravel()
    return order


def _newer(name: str) -> str:
    old = next((old for old in OLDER if name.endswith(old)), None)
    return name if old is None else name.removesuffix(old) + OLDER[old]


def _check_rest(state: Tensors, read: set[str], table: Table, config: ModelConfig, architecture: str) -> None:
    for name in state.keys() - read:
        source = table.copies.get(name)
        if source in read:
            if not np.array_equal(state[name], state[source]):
                raise RequestError(f"{name!r} differs from {source!r}, which it repeats in this {architecture}")
        elif not any(re.fullmatch(pattern.replace("{n}", str(config.n_layers)), name) for pattern in table.ignored):
            raise RequestError(f"{name!r} of shape {state[name].shape} has no place in this {architecture}")


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = array
    return tree
