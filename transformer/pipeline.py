"""The pipeline axis: stages of layers on different devices, through which microbatches pass.

Stage s of S has the layers of parts s, s + S, ... of v S parts (v `repeats`), so a microbatch passes all stages v times
(Narayanan et al. 2021, sec. 2.2.2: interleaved). In one tick every stage works on one part of one microbatch forward
and on one backward, then hands both on, to the next stage and to the last:

    fill    v S - 1 ticks       forward only
    steady  v M + S - v S       one microbatch forward, another backward (one forward, one backward: 1F1B)
    drain   v S - 1 ticks       backward only

v M + S - 1 ticks each way, of which v M have work for a stage: the bubble is (S - 1) / (v M) of the step, as published.
A stage keeps what the backward pass needs of at most 2 v S - 1 parts, however many microbatches there are; GPipe keeps
v M (Huang et al. 2019). (Megatron-LM's first stage keeps S + (v - 1) S + ...: it may let stages wait for each other,
where here all keep step.)

The stages are a dim of every array, which a map runs over and the mesh splits. What comes before the layers and after
them, embedding and head, is split over the stages by the rules of the vocabulary, so no stage has more of it. Layers
that do not repeat and go before the others (DeepSeek V3's first three) are worked off beforehand, every stage with its
share of the microbatches (`stages.leading`).

Letters: S stages, v repeats, M microbatches, G groups of S of them, r layers of a part, K parts kept, B sequences of a
microbatch, L length, D model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.passes import Passes, passes_of, traced
from transformer.placement import Shard

Tree = Any


class Pipeline(NamedTuple):
    """Stages, parts of the model that each has, microbatches that pass, and layers that do something."""

    stages: int
    repeats: int
    microbatches: int
    layers: int

    @property
    def parts(self) -> int:
        """Of the model."""
        return self.stages * self.repeats

    @property
    def of_part(self) -> int:
        """Layers of a part; the last parts are filled up to as many (Llama 3's 126 over 16 stages: 8)."""
        return -(-self.layers // self.parts)

    @property
    def room(self) -> int:
        """Layers that all parts have room for."""
        return self.parts * self.of_part

    @property
    def ticks(self) -> int:
        """Of one direction."""
        return self.repeats * self.microbatches + self.stages - 1

    @property
    def kept(self) -> int:
        """Parts whose activations a stage keeps at most."""
        return min(2 * self.parts - 1, self.repeats * self.microbatches)

    @property
    def bubble(self) -> float:
        """Idle ticks over those with work: (S - 1) / (v M) (Narayanan et al. 2021, sec. 2.2.2)."""
        return (self.stages - 1) / (self.repeats * self.microbatches)

    def at(self, n: Array, *, backward: bool = False) -> tuple[Array, Array]:
        """The microbatch and the part that are a stage's n-th work: S microbatches pass all parts, then the next S."""
        group, within = jnp.divmod(n, self.parts)
        part, microbatch = jnp.divmod(within, self.stages)
        return group * self.stages + microbatch, self.repeats - 1 - part if backward else part

    def number(self, microbatch: Array, part: Array) -> Array:
        """Which work of its stage it is, forward."""
        group, within = jnp.divmod(microbatch, self.stages)
        return group * self.parts + part * self.stages + within


def by_stage(layers: Float[Array, " *layers"], pipe: Pipeline) -> Float[Array, " *room"]:
    """Layers so that those of a stage follow each other; others that do nothing fill up the last parts."""
    layers = jnp.pad(layers, ((0, pipe.room - pipe.layers), *((0, 0),) * (layers.ndim - 1)))
    parts = layers.reshape(pipe.repeats, pipe.stages, pipe.of_part, *layers.shape[1:])
    return parts.swapaxes(0, 1).reshape(layers.shape)


def in_order(layers: Float[Array, " *room"], pipe: Pipeline) -> Float[Array, " *layers"]:
    """What `by_stage` moved, back again."""
    parts = layers.reshape(pipe.stages, pipe.repeats, pipe.of_part, *layers.shape[1:])
    return parts.swapaxes(0, 1).reshape(layers.shape)[: pipe.layers]


class Model(NamedTuple):
    """What passes through a pipeline: pure functions of the parameters `outer`, that all stages share, and of those of
    one layer. A layer also gives what it adds to the loss, and what it leaves behind to look at."""

    first: Callable[[Tree, Tree], Float[Array, "B L D"]]  # outer, rows
    layer: Callable[[Tree, Tree, Array, Tree], tuple[tuple[Float[Array, "B L D"], Float[Array, ""]], Tree]]
    """Of a layer's parameters, of what `shared` gives, of the stream, and of its rows."""
    last: Callable[[Tree, Float[Array, "B L D"], Tree], Float[Array, ""]]  # outer, stream, rows -> loss
    shared: Callable[[Tree], Tree]  # of outer, what every layer reads
    place: Callable[[Tree], Tree] = lambda d_outer: d_outer  # gradients of outer, where they add up


class _Carry(NamedTuple):
    """What a tick leaves to the next."""

    x: Float[Array, "S B L D"]  # what every stage takes next, forward
    dx: Float[Array, "S B L D"]  # and backward
    kept: Tree  # S K r ...: what the backward pass needs
    loss: Float[Array, ""]
    seen: Tree  # S v r ...: what layers left behind
    d_layers: Tree  # S v r ..., float32
    d_outer: Tree  # float32
    d_shared: Tree  # S ..., float32
    d_stream: Float[Array, "G S B L D"] | None


class Gradients(NamedTuple):
    """Of a whole batch; float32."""

    loss: Float[Array, ""]
    outer: Tree
    layers: Tree  # S v r ..., stage by stage
    stream: Float[Array, "G S B L D"] | None  # in the stream's own type
    seen: Tree  # S v r ...: what the layers left behind, added up over microbatches


def gradients(
    model: Model, outer: Tree, layers: Tree, rows: Tree, pipe: Pipeline, shard: Shard,
    stream: Float[Array, "G S B L D"] | None = None,
) -> Gradients:  # fmt: skip
    """Loss and gradients of microbatches that pass through the stages.

    layers: every leaf [S v r, ...], stage by stage (`by_stage`); those from `pipe.layers` on are there to fill the last
    parts, and what they make is dropped. rows: every leaf [M, ...]. stream: what enters the first stage, microbatch m
    at [m // S, m % S], where layers go before those of the stages (`stages.leading`); else it is `model.first`.
    """
    S, v, M, _ = pipe
    staged = jax.tree.map(lambda p: p.reshape(S, v, pipe.of_part, *p.shape[1:]), layers)
    shared, of_shared = jax.vjp(model.shared, outer)
    over_stages = partial(jax.vmap, spmd_axis_name="pipeline")

    def of_one_layer(staged: Tree) -> Tree:
        return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[3:], p.dtype), staged)

    row0 = jax.tree.map(lambda a: a[0], rows)
    x = jax.eval_shape(model.first, outer, row0)
    passes = traced(over_stages, lambda: passes_of(model.layer, of_one_layer(staged), shared, x, row0), S)
    work = _Work(passes, shared, rows, pipe)
    stages = jnp.arange(S)

    def row(m: Array) -> Tree:
        return jax.tree.map(lambda a: a[m], rows)

    def placed(x: Float[Array, "S B L D"]) -> Float[Array, "S B L D"]:
        return shard.activation(x, "layers", "batch", "sequence", "embed")

    def of_stage(x: Float[Array, "S B L D"], stage: Any) -> Float[Array, "B L D"]:
        """Known to all stages afterwards. A sum, for an index into a split dim would gather all of it."""
        return jnp.where(_is(stages, stage, x), x, 0).sum(0).astype(x.dtype)

    def forward(c: _Carry, t: Array) -> tuple[_Carry, Float[Array, "S B L D"]]:
        m, part = pipe.at(t)
        m = jnp.clip(m, 0, M - 1)
        fresh = model.first(outer, row(m)) if stream is None else of_stage(stream[m // S], m % S)
        x = jnp.where(_is(stages, 0, c.x) & (part == 0), fresh[None], c.x)
        x, kept, seen = over_stages(work.forward)(staged, placed(x), c.kept, c.seen, t - stages, stages)
        return c._replace(x=placed(jnp.roll(x, 1, axis=0)), kept=kept, seen=seen), placed(x)

    def ends(c: _Carry, x: Float[Array, "S B L D"], t: Array) -> tuple[_Carry, Float[Array, "B L D"]]:
        """The loss of the microbatch that leaves the last stage, and its gradient."""
        n = t - (S - 1)
        m, part = pipe.at(n)

        def leave(loss: Array, d_outer: Tree) -> tuple[Array, Tree, Array]:
            value, (new, dx) = jax.value_and_grad(model.last, argnums=(0, 1))(outer, of_stage(x, S - 1), row(m))
            return loss + value, model.place(_plus(d_outer, new)), dx

        def stay(loss: Array, d_outer: Tree) -> tuple[Array, Tree, Array]:
            return loss, d_outer, jnp.zeros_like(x[0])

        leaves = (n >= 0) & (n < v * M) & (part == v - 1)
        loss, d_outer, dx = jax.lax.cond(leaves, leave, stay, c.loss, c.d_outer)
        return c._replace(loss=loss, d_outer=d_outer), dx

    def backward(c: _Carry, t: Array, dx_last: Float[Array, "B L D"] | None) -> _Carry:
        n = t - (pipe.parts - 1)
        dx = c.dx
        if dx_last is not None:
            _, part = pipe.at(n, backward=True)
            dx = jnp.where(_is(stages, S - 1, dx) & (part == v - 1), dx_last[None], dx)
        of_stages = n - (S - 1 - stages)
        dx, d_layers, d_shared = over_stages(work.backward)(
            staged, placed(dx), c.kept, c.d_layers, c.d_shared, of_stages, stages
        )
        n = n - (S - 1)  # of the first stage
        m, part = pipe.at(n, backward=True)

        def read(d_outer: Tree) -> Tree:
            pull: Any = jax.vjp(lambda outer: model.first(outer, row(m)), outer)[1]
            return model.place(_plus(d_outer, pull(of_stage(dx, 0))[0]))

        enters = (n >= 0) & (n < v * M) & (part == 0)
        c = c._replace(dx=placed(jnp.roll(dx, -1, axis=0)), d_layers=d_layers, d_shared=d_shared)
        if c.d_stream is None:
            return c._replace(d_outer=jax.lax.cond(enters, read, lambda d_outer: d_outer, c.d_outer))
        group, place = jnp.divmod(jnp.clip(m, 0, M - 1), S)
        old = c.d_stream[group]
        new = jnp.where(_is(stages, place, dx) & enters, of_stage(dx, 0)[None], old)
        return c._replace(d_stream=_put(c.d_stream, placed(new), group))

    def fill(c: _Carry, t: Array) -> tuple[_Carry, None]:
        return forward(c, t)[0], None

    def steady(c: _Carry, t: Array) -> tuple[_Carry, None]:
        c, x = forward(c, t)
        c, dx = ends(c, x, t)
        return backward(c, t, dx), None

    def drain(c: _Carry, t: Array) -> tuple[_Carry, None]:
        return backward(c, t, None), None

    def zeros(a: Any, *front: int) -> Array:
        return jnp.zeros((S, *front, *a.shape), a.dtype)

    def float32(a: Any, *front: int) -> Array:
        return jnp.zeros((*front, *a.shape), jnp.float32)

    r = pipe.of_part
    carry = _Carry(
        placed(zeros(x)), placed(zeros(x)),
        jax.tree.map(lambda a: zeros(a, pipe.kept, r), passes.kept),
        jnp.zeros(()),
        jax.tree.map(lambda a: zeros(a, v, r), passes.seen),
        jax.tree.map(float32, staged), model.place(jax.tree.map(float32, outer)),
        jax.tree.map(lambda a: float32(a, S), shared),
        None if stream is None else jnp.zeros_like(stream),
    )  # fmt: skip
    ends_at = 0
    for phase, n_ticks in ((fill, pipe.parts - 1), (steady, pipe.ticks - pipe.parts + 1), (drain, pipe.parts - 1)):
        starts_at, ends_at = ends_at, ends_at + n_ticks
        carry, _ = jax.lax.scan(phase, carry, jnp.arange(starts_at, ends_at))
    d_outer = _plus(carry.d_outer, of_shared(_as(jax.tree.map(lambda g: g.sum(0), carry.d_shared), shared))[0])
    d_layers, seen = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), (carry.d_layers, carry.seen))
    return Gradients(carry.loss, d_outer, d_layers, carry.d_stream, seen)


class _Work(NamedTuple):
    """What one stage does in one tick: functions that are mapped over the stages."""

    passes: Passes
    shared: Tree
    rows: Tree
    pipe: Pipeline

    def _row(self, m: Any) -> Tree:
        return jax.tree.map(lambda a: a[m], self.rows)

    def _alive(self, part: Array, stage: Array) -> Array:
        """Which layers of a part do something: all that the model has."""
        first = (part * self.pipe.stages + stage) * self.pipe.of_part
        return first + jnp.arange(self.pipe.of_part) < self.pipe.layers

    def forward(
        self, layers: Tree, x: Array, buffer: Tree, seen: Tree, n: Array, stage: Array
    ) -> tuple[Array, Tree, Tree]:
        """A part of one microbatch: the stream after it, and what is kept, in its place."""
        valid = (n >= 0) & (n < self.pipe.repeats * self.pipe.microbatches)
        n = jnp.where(valid, n, 0)
        m, part = self.pipe.at(n)
        row = self._row(m)

        def one(x: Array, of_layer: tuple[Tree, Array]) -> tuple[Array, tuple[list[Array], Tree]]:
            p, alive = of_layer
            y, kept, left = self.passes.forward(p, self.shared, x, row)
            return jnp.where(alive, y, x), (kept, left)

        alive = self._alive(part, stage)
        x, (kept, left) = jax.lax.scan(one, x, (_pick(layers, part, self.pipe.repeats), alive))
        slot = n % self.pipe.kept
        buffer = jax.tree.map(lambda b, new: _put(b, jnp.where(valid, new, b[slot]), slot), buffer, kept)
        left = jax.tree.map(lambda a: jnp.where(valid, a, 0), left)
        return x, buffer, _add(seen, left, part, self.pipe.repeats)

    def backward(
        self, layers: Tree, dx: Array, buffer: Tree, d_layers: Tree, d_shared: Tree, n: Array, stage: Array
    ) -> tuple[Array, Tree, Tree]:
        """The gradient of a part of one microbatch's stream before it; those of parameters are added up."""
        valid = (n >= 0) & (n < self.pipe.repeats * self.pipe.microbatches)
        n = jnp.where(valid, n, 0)
        m, part = self.pipe.at(n, backward=True)
        row, slot = self._row(m), self.pipe.number(m, part) % self.pipe.kept
        kept = jax.tree.map(lambda b: b[slot], buffer)

        def one(
            carry: tuple[Array, Tree], of_layer: tuple[Tree, list[Array], Array]
        ) -> tuple[tuple[Array, Tree], Tree]:
            dx, d_shared = carry
            p, kept, alive = of_layer
            dy = jnp.where(alive, dx, 0)
            dp, ds, new = self.passes.backward(kept, p, self.shared, row, dy, (valid & alive).astype(jnp.float32))
            return (jnp.where(alive, new, dx), _plus(d_shared, ds)), dp

        dx = jnp.where(valid, dx, 0)
        of_layers = _pick(layers, part, self.pipe.repeats), kept, self._alive(part, stage)
        (dx, d_shared), dp = jax.lax.scan(one, (dx, d_shared), of_layers, reverse=True)
        return dx, _add(d_layers, dp, part, self.pipe.repeats), d_shared


def _pick(tree: Tree, part: Array, repeats: int) -> Tree:
    return jax.tree.map(lambda a: a[0] if repeats == 1 else a[part], tree)


def _put(all_: Array, one: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(all_, one.astype(all_.dtype), at, 0)


def _add(all_: Tree, new: Tree, part: Array, repeats: int) -> Tree:
    if repeats == 1:
        return jax.tree.map(lambda a, b: a + b[None].astype(a.dtype), all_, new)
    return jax.tree.map(lambda a, b: _put(a, a[part] + b.astype(a.dtype), part), all_, new)


def _is(stages: Int[Array, " S"], stage: Any, like: Array) -> Array:
    return (stages == stage).reshape(-1, *(1,) * (like.ndim - 1))


def _plus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), a, b)


def _as(a: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), a, like)
