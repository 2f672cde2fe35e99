"""Experts that drop no token: tokens sorted by expert, and multiplied block after block.

Every expert's run of tokens is filled up to whole blocks, and each block is multiplied with its expert's weights (Gale
et al. 2022, MegaBlocks): FLOPs are those of the chosen experts and of the blocks' ends, whatever the router says, and
shapes are known before it has spoken.

    loop      block after block, on any device and at any precision; of every expert one block may be empty
    grouped   all blocks in one kernel, which leaves out the empty ones (`grouped.py`); on Hopper GPUs

Everything here is what one device does with the tokens and the weights that it has.

Letters: T tokens of a device, k experts of each, D model, E experts, F hidden width, n blocks of b tokens.
"""

import math
from collections.abc import Mapping
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from transformer.config import ExpertProducts, Precision
from transformer.feed_forward import activate
from transformer.grouped import Tiles, grouped_dot
from transformer.products import gradients, product
from transformer.remat import EXPERT_PRODUCT

BLOCKS: Mapping[ExpertProducts, tuple[int, int]] = {"loop": (1, 1024), "grouped": (64, 128)}
"""Tokens that an expert multiplies at once, at least and at most: of the loop enough to use a matrix unit fully, of the
kernels the rows of a tile."""

Weights = Mapping[str, Float[Array, "E i o"]]
"""w_up and, of gated ones, w_gate [E D F]; w_down [E F D]."""


def block_size(n_slots: int, n_experts: int, experts: ExpertProducts = "loop") -> int:
    """Tokens of a block: about half of an expert's even share, so that padding stays small, in powers of two.

    >>> block_size(4096 * 2, 8), block_size(4096 * 8, 256), block_size(4, 8), block_size(4, 8, "grouped")
    (512, 64, 1, 64)
    """
    least, most = BLOCKS[experts]
    return min(most, max(least, 2 ** max(0, math.floor(math.log2(max(1, n_slots / n_experts / 2))))))


def n_blocks_of(n_slots: int, n_experts: int, n_expected: int | None = None, experts: ExpertProducts = "loop") -> int:
    """Blocks that suffice however the tokens fall: every expert's run may end within one.

    >>> n_blocks_of(4096 * 2, 8)
    24
    """
    return n_slots // block_size(n_expected or n_slots, n_experts, experts) + n_experts


def n_rows_of(n_slots: int, n_experts: int, n_expected: int | None = None, experts: ExpertProducts = "loop") -> int:
    """Rows that are multiplied: of all blocks, or of those that are likely to have any, each expert's last half full.

    >>> n_rows_of(4096 * 2, 8), n_rows_of(4096 * 2, 8, experts="grouped")
    (12288, 8704)
    """
    block = block_size(n_expected or n_slots, n_experts, experts)
    rows = block * n_blocks_of(n_slots, n_experts, n_expected, experts)
    return rows if experts == "loop" else min(rows, (n_expected or n_slots) + n_experts * block // 2)


class Runs(NamedTuple):
    """A device's choices in the order of their experts. A slot is a token's i-th choice."""

    order: Int[Array, " Tk"]  # slots, by expert; empty ones last
    place: Int[Array, " Tk"]  # of each slot within its expert's run
    counts: Int[Array, " E"]
    start: Int[Array, " E"]  # of each run in `order`


def runs_of(slots: Int[Array, " Tk"], n_experts: int) -> Runs:
    """Sort the slots by the expert that each chose; those of one expert stay in order. n_experts: by none."""
    order = jnp.argsort(slots, stable=True)
    counts = jax.nn.one_hot(slots, n_experts + 1, dtype=jnp.int32).sum(0)
    start = jnp.cumsum(counts) - counts
    rank = jnp.argsort(order)  # where each slot went
    return Runs(order, rank - start[slots], counts[:-1], start[:-1])


def dropless(
    x: Float[Array, "T D"],
    slots: Int[Array, " Tk"],
    w: Weights,
    *,
    ffn: str,
    precision: Precision = "bf16",
    experts: ExpertProducts = "loop",
    n_expected: int | None = None,
) -> Float[Array, "Tk D"]:
    """Every slot's result: its expert's feed-forward of its token. `slots` are the chosen experts, token by token;
    how many of them are likely not to be empty decides the size of blocks."""
    n_slots, k, n_experts = len(slots), len(slots) // len(x), len(w["w_up"])
    block = block_size(n_expected or n_slots, n_experts, experts)
    n_blocks = n_blocks_of(n_slots, n_experts, n_expected, experts)
    runs = runs_of(slots, n_experts)
    blocks_of = -(-runs.counts // block)
    first_block = jnp.cumsum(blocks_of) - blocks_of
    j = jnp.arange(n_blocks)
    ends = first_block + blocks_of
    whose = (ends[None] <= j[:, None]).sum(-1)  # n_experts: blocks after the last are empty
    expert_of = jnp.minimum(whose, n_experts - 1)
    place = ((j - first_block[expert_of]) * block)[:, None] + jnp.arange(block)[None]  # n b
    filled = place < runs.counts[expert_of][:, None]
    source = jnp.clip(runs.start[expert_of][:, None] + place, 0, n_slots - 1)
    inputs = jnp.where(filled[..., None], x[runs.order[source] // k], 0)
    if experts == "grouped":
        n_rows = n_rows_of(n_slots, n_experts, n_expected, experts)
        outputs: Any = _at_once(
            ffn, inputs.reshape(n_blocks * block, -1), Tiles(whose, first_block, blocks_of), w, n_rows
        )
    else:
        outputs = _blocks(ffn, precision, inputs, expert_of, dict(w))
    full = slots < n_experts
    at = jnp.where(full, first_block[jnp.where(full, slots, 0)] * block + runs.place, 0)
    return jnp.where(full[:, None], outputs.reshape(n_blocks * block, -1)[at], 0)


def exchanged(
    x: Float[Array, "T D"],
    slots: Int[Array, " Tk"],
    w: Weights,
    *,
    ffn: str,
    precision: Precision = "bf16",
    experts: ExpertProducts = "loop",
    n_shards: int,
    axis: str,
) -> Float[Array, "Tk D"]:
    """`dropless` where each of the `n_shards` devices of a mesh axis has some of the experts: every slot travels to
    the device of its expert, and its result back (Lepikhin et al. 2020, sec. 3.3).

    Devices send each other as many rows as there might be, for shapes are known before the router has spoken.
    """
    k, n_experts = len(slots) // len(x), len(w["w_up"])
    runs = runs_of(slots // n_experts, n_shards)
    rows = len(x) * min(k, n_experts)
    i = jnp.arange(rows)
    source = jnp.minimum(runs.start[:, None] + i[None], len(slots) - 1)  # n_shards rows
    slot = runs.order[source]
    filled = i[None] < runs.counts[:, None]
    sent = jnp.where(filled[..., None], x[slot // k], 0), jnp.where(filled, slots[slot] % n_experts, n_experts)
    got, expert = (jax.lax.all_to_all(t, axis, 0, 0, tiled=True) for t in sent)
    y = dropless(
        got.reshape(-1, x.shape[-1]), expert.reshape(-1), w, ffn=ffn, precision=precision, experts=experts,
        n_expected=len(slots),
    )  # fmt: skip
    back = jax.lax.all_to_all(y.reshape(got.shape), axis, 0, 0, tiled=True)
    return back[slots // n_experts, runs.place]


def _at_once(ffn: str, x: Float[Array, "M D"], tiles: Tiles, w: Weights, n_rows: int) -> Float[Array, "M D"]:
    """Every tile through its expert. Rows of tiles that are none's are garbage, and so is their gradient: what has a
    token's place is picked by who asks, and `x` has put zeros, whose gradient is 0, in all other rows."""

    def multiply(x: Array, name: str) -> Array:
        return checkpoint_name(grouped_dot(n_rows, x, w[name], tiles), EXPERT_PRODUCT)

    made = {name: multiply(x, name) for name in ("w_up", "w_gate") if name in w}
    return multiply(activate(made["w_up"], made.get("w_gate"), ffn), "w_down")


_MAP = "bi,io->bo"


def _products(ffn: str, precision: Precision, x: Float[Array, "b D"], w: Mapping[str, Array]) -> dict[str, Array]:
    """A block's products with its expert's matrices."""
    made = {name: product(_MAP, x, w[name], precision) for name in ("w_up", "w_gate") if name in w}
    hidden = activate(made["w_up"], made.get("w_gate"), ffn)
    return made | {"w_down": product(_MAP, hidden, w["w_down"], precision)}


def _of(w: Weights, expert: Int[Array, ""]) -> dict[str, Array]:
    return {name: jax.lax.dynamic_index_in_dim(t, expert, keepdims=False) for name, t in w.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(
    ffn: str, precision: Precision, x: Float[Array, "n b D"], expert_of: Int[Array, " n"], w: Weights
) -> Float[Array, "n b D"]:
    """Each block through its expert. `expert_of` never falls."""
    return _blocks_forward(ffn, precision, x, expert_of, w)[0]


def _blocks_forward(ffn: str, precision: Precision, x: Array, expert_of: Array, w: Weights) -> tuple[Array, Any]:
    """Of a block its products are kept, never the weights that it picked: that were a copy of an expert a block."""

    def multiply(_: None, part: tuple[Array, Array]) -> tuple[None, dict[str, Array]]:
        block, expert = part
        return None, _products(ffn, precision, block, _of(w, expert))

    _, made = jax.lax.scan(multiply, None, (x, expert_of))
    made = {name: checkpoint_name(t, EXPERT_PRODUCT) for name, t in made.items()}
    hidden = {name: t for name, t in made.items() if name != "w_down"}
    return made["w_down"], (x, expert_of, w, hidden)


def _blocks_backward(
    ffn: str, precision: Precision, kept: Any, dy: Float[Array, "n b D"]
) -> tuple[Array, None, dict[str, Array]]:
    """A loop's own gradient would add a whole array of all experts for every block. Blocks of one expert follow each
    other: their gradients add up in float32 in an array of one expert, which is written where it belongs."""
    x, expert_of, w, hidden = kept
    is_first = jnp.concatenate([jnp.ones(1, bool), expert_of[1:] != expert_of[:-1]])

    def multiply(carry: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], Array]:
        grads, sums = carry
        block, expert, first, dy, made = part
        mine = _of(w, expert)
        h, back = jax.vjp(lambda made: activate(made["w_up"], made.get("w_gate"), ffn), made)
        dh, added = gradients(_MAP, h, mine["w_down"], dy, precision)
        (d_made,) = back(dh)
        found = {name: gradients(_MAP, block, mine[name], d_made[name], precision) for name in d_made}
        dx = reduce(jnp.add, [of_x for of_x, _ in found.values()])
        added = {name: of_w for name, (_, of_w) in found.items()} | {"w_down": added}
        sums = jax.tree.map(lambda total, new: jnp.where(first, 0, total) + new, sums, added)
        grads = jax.tree.map(
            lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one.astype(all_.dtype), expert, 0), grads, sums
        )
        return (grads, sums), dx

    zero = {name: jnp.zeros_like(t) for name, t in w.items()}
    one = {name: jnp.zeros(t.shape[1:], jnp.float32) for name, t in w.items()}
    ((dw, _), dx) = jax.lax.scan(multiply, (zero, one), (x, expert_of, is_first, dy, hidden))
    return dx, None, dw


_blocks.defvjp(_blocks_forward, _blocks_backward)
