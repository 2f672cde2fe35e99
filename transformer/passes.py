"""A layer's forward and backward pass, apart in time: what lies between them is kept.

Letters: B sequences of a microbatch, L length, D model; S stages.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

Tree = Any


class Passes(NamedTuple):
    """A layer's two passes, traced once."""

    forward: Callable[[Tree, Tree, Array, Tree], tuple[Array, list[Array], Tree]]  # -> stream, kept, left behind
    backward: Callable[[list[Array], Tree, Tree, Tree, Array, Array], tuple[Tree, Tree, Array]]
    """Of what was kept; of the layer's parameters, what is shared and the rows, had again; of the gradients of the
    stream and of what is added: those of parameters, of what is shared and of the stream before."""
    kept: Tree  # shapes
    seen: Tree


def passes_of(layer: Callable[..., Any], p: Tree, shared: Tree, x: Any, row: Tree) -> Passes:
    """Kept is what JAX keeps for the backward pass, but for what is there again when it runs, or every microbatch on
    its way would hold a copy: parameters are had again, and what depends neither on them nor on the stream, such as
    masks and biases of places, is made again."""
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (p, shared, x, row))
    pullback: Any = ...
    again: list[int | None] = []  # for everything that JAX keeps: which input it is

    def forward(p: Tree, shared: Tree, x: Array, row: Tree) -> tuple[Array, list[Array], Tree]:
        nonlocal pullback
        (y, _), back, seen = jax.vjp(lambda p, shared, x: layer(p, shared, x, row), p, shared, x, has_aux=True)
        residuals, pullback = jax.tree.flatten(back)
        inputs = jax.tree.leaves((p, shared, row))
        again[:] = [next((i for i, a in enumerate(inputs) if a is leaf), None) for leaf in residuals]
        return y, [leaf for leaf, i in zip(residuals, again, strict=True) if i is None], seen

    traced, (y, needed, seen) = jax.make_jaxpr(forward, return_shape=True)(*abstract)
    run, out = jaxpr_as_fun(traced), jax.tree.structure((y, needed, seen))
    n_p, n_shared = len(jax.tree.leaves(p)), len(jax.tree.leaves(shared))

    def alone(wanted: Sequence[bool]) -> tuple[Any, list[bool]]:
        """The part of the forward pass that makes some of what is needed, and the inputs that it takes."""
        rest = [False] * len(jax.tree.leaves(seen))
        return partial_eval.dce_jaxpr(traced.jaxpr, [False, *wanted, *rest])

    def of_places(n: int) -> bool:
        taken = alone([i == n for i in range(len(needed))])[1]
        return not (any(taken[:n_p]) or taken[n_p + n_shared])

    made_again = [of_places(n) for n in range(len(needed))]
    part, taken = alone(made_again)
    make_again = jaxpr_as_fun(ClosedJaxpr(part, traced.consts))
    keep = [not is_again for is_again in made_again]

    def forward_and_kept(*given: Any) -> tuple[Array, list[Array], Tree]:
        y, needed, seen = jax.tree.unflatten(out, run(*jax.tree.leaves(given)))
        return y, list(compress(needed, keep)), seen

    def backward(
        kept: list[Array], p: Tree, shared: Tree, row: Tree, dy: Array, added: Array
    ) -> tuple[Tree, Tree, Array]:
        given = jax.tree.leaves((p, shared, dy, row))  # dy stands for the stream, which is not taken
        remade, stored = iter(make_again(*compress(given, taken))), iter(kept)
        sources = iter([next(stored if is_kept else remade) for is_kept in keep])
        inputs = jax.tree.leaves((p, shared, row))
        return jax.tree.unflatten(pullback, [next(sources) if i is None else inputs[i] for i in again])((dy, added))

    return Passes(forward_and_kept, backward, list(compress(needed, keep)), seen)


def traced(over_stages: Callable[..., Any], make: Callable[[], Passes], stages: int) -> Passes:
    """`make` under the map over stages: what it traces must know that the axis of the mesh is taken."""
    made: list[Passes] = []
    jax.eval_shape(over_stages(lambda stage: (made.append(make()), stage)[1]), jnp.arange(stages))
    return made[0]
