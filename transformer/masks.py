"""Which query may see which key: five small masks and two ways to join them.

A mask is asked about places, not built: `mask(queries, keys)` says for the queries and keys at those places
who sees whom. So a backend may ask for all places at once or for one block of them, and one that knows a
pattern by itself (`Causal`, `Window`) need not ask at all. `&` is both, `|` is either:

    Causal() & Window(4096)          a decoder that sees the last 4,096 positions
    Causal() | Prefix(lengths)       a prefix that sees all of itself, and after it a decoder
    Causal() & Segments(ids, ids)    several texts packed into one sequence, none of which sees another

Letters: B batch, L query length, S key length.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from transformer.errors import RequestError

_STATIC = {"static": True}


class Mask:
    """Base of all masks. Every one is a JAX tree, so that it may be passed into jitted functions and loops."""

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "#B L S"]:
        """True where the query at a place may see the key at a place."""
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return other if isinstance(self, Everything) else self if isinstance(other, Everything) else Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Everything(Mask):
    """Every query sees every key: an encoder without padding."""

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "1 L S"]:
        return jnp.ones((1, len(queries), len(keys)), bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal(Mask):
    """No query sees the future: s <= l (Vaswani et al. 2017, sec. 3.2.3)."""

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "1 L S"]:
        return keys[None, None] <= queries[None, :, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window(Mask):
    """A query sees keys less than `size` positions away, on both sides: |l - s| < size (Beltagy et al. 2020).

    With `Causal` those are the last `size` positions, the query's own included, as in Mistral and Gemma."""

    size: int = field(metadata=_STATIC)

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "1 L S"]:
        return jnp.abs(queries[None, :, None] - keys[None, None]) < self.size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunked(Mask):
    """A query sees the chunk of `size` positions that it stands in: l // size = s // size (Llama 4, 2025)."""

    size: int = field(metadata=_STATIC)

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "1 L S"]:
        return (queries // self.size)[None, :, None] == (keys // self.size)[None, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prefix(Mask):
    """Every query sees the first `lengths` keys of its sequence: s < length (prefix LM; Raffel et al. 2020, fig. 4)."""

    lengths: Int[Array, " B"]

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "B L S"]:
        seen = keys[None, None] < self.lengths[:, None, None]
        return jnp.broadcast_to(seen, (len(self.lengths), len(queries), len(keys)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Segments(Mask):
    """Query and key belong to the same segment, and not to padding: id_l = id_s > 0.

    Packing gives several texts of one sequence the ids 1, 2 ...; padding has 0, so a padded batch has ids of 1
    and 0 (`padding`)."""

    queries: Int[Array, "B L"]
    keys: Int[Array, "B S"]

    def __call__(self, queries: Int[Array, " l"], keys: Int[Array, " s"]) -> Bool[Array, "B l s"]:
        of_query = jnp.take(self.queries, queries, axis=1)[:, :, None]
        of_key = jnp.take(self.keys, keys, axis=1)[:, None, :]
        return (of_query == of_key) & (of_key > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both(Mask):
    """What the two allow both."""

    first: Mask
    second: Mask

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "#B L S"]:
        return self.first(queries, keys) & self.second(queries, keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Either(Mask):
    """What at least one of the two allows."""

    first: Mask
    second: Mask

    def __call__(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "#B L S"]:
        return self.first(queries, keys) | self.second(queries, keys)


def padding(valid: Bool[Array, "B S"], n_queries: int) -> Segments:
    """Keys that are padding are seen by nobody; what padded queries see does not matter, so they see as the others."""
    return Segments(jnp.ones((valid.shape[0], n_queries), jnp.int32), valid.astype(jnp.int32))


def parts(mask: Mask) -> tuple[Mask, ...]:
    """The masks that `&` joined, in order: what a backend looks through for patterns that it knows.

    >>> parts(Causal() & Window(4))
    (Causal(), Window(size=4))
    """
    return (*parts(mask.first), *parts(mask.second)) if isinstance(mask, Both) else (mask,)


def check(mask: Mask, *, batch: int, n_queries: int, n_keys: int) -> None:
    """RequestError for a mask whose arrays are not of the attention's shape: the mask, its shape, the one expected."""
    for part in parts(mask):
        if isinstance(part, Either):
            check(part.first, batch=batch, n_queries=n_queries, n_keys=n_keys)
            check(part.second, batch=batch, n_queries=n_queries, n_keys=n_keys)
        for name, expected in {
            "lengths": (batch,),
            "queries": (batch, n_queries),
            "keys": (batch, n_keys),
        }.items():
            array = getattr(part, name, None)
            if array is not None and array.shape != expected:
                raise RequestError(
                    f"mask {type(part).__name__}: {name} has shape {tuple(array.shape)}, expected {expected}"
                )
