"""What the routed experts of a layer cost in our own program (`transformer.experts`, `transformer.dropless`), counted
in its compiled schedules.

With a capacity every expert multiplies as many rows of each sequence as it has room for, all experts in one batched
product. Without, a loop multiplies block after block, each a handful of kernels of its own; where devices exchange
tokens there are as many blocks as might come.

Letters, bytes of one device and microbatch: rows, those that experts take, empty ones too; chosen, those of k experts
a token; stream, the tokens themselves.
"""

from typing import NamedTuple

from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.work import PASSES, Loop, Work, backward_products, cast_bytes
from experiments.forecast.kernels import Product
from transformer.dropless import block_size, n_blocks_of
from transformer.experts import capacity_of

FLOAT32_BYTES = 4
SORTING_KERNELS = 30
"""Of a pass: choices ranked, sorted and counted, each a kernel too small to be seen."""


class Mixture(NamedTuple):
    """The routed experts of one layer, one microbatch."""

    forward: Work
    again: Work  # under full remat
    backward: Work
    rows_bytes: float  # sent to other experts' devices, one way; as many come back
    summed_bytes: float  # added up over tensor: of what the experts make, and of each gradient of what they are given
    up: tuple[Product, ...]  # forward, beside which rows' gradients may come; in a loop nothing travels
    of_weights: tuple[Product, ...]  # their gradients, beside which those of rows may leave


def rows_of(setup: Setup) -> tuple[int, int]:
    """Rows that a device's experts multiply for one microbatch, and those that it sends, empty ones among both."""
    config, layout = setup.model, setup.layout
    assert config.n_experts
    local = max(config.n_experts // layout.expert, 1)
    if config.capacity_factor:
        n = setup.micro_batch_seqs * config.n_experts * capacity_of(setup.seq_len, config)
        return n, n
    tokens = max(setup.micro_batch_seqs * setup.seq_len // layout.context, 1)
    slots = tokens * config.experts_per_token
    sent = slots if layout.expert == 1 else tokens * min(config.experts_per_token, local) * layout.expert
    return n_blocks_of(sent, local, slots) * block_size(slots, local), sent


def mixture(setup: Setup) -> Mixture:
    """As our program runs it under the setup's layout."""
    return _by_capacity(setup) if setup.model.capacity_factor else _dropless(setup)


def _by_capacity(setup: Setup) -> Mixture:
    """Rows are put in the experts' order before a product that is batched over several experts and has rows of several
    sequences, and back behind it; what is exchanged is in the devices' order first."""
    config, layout = setup.model, setup.layout
    assert config.n_experts
    D, ways = config.d_model, 2 if config.gated else 1
    width, local = max(config.expert_size // layout.tensor, 1), max(config.n_experts // layout.expert, 1)
    n, _ = rows_of(setup)
    up = Product(n // local, width, D, local, setup.linear_dtype)
    down = Product(n // local, D, width, local, setup.linear_dtype)
    forward = (*[up] * ways, down)
    rows, chosen, stream = _bytes(setup, n)
    exchanged, several = layout.expert > 1, setup.micro_batch_seqs > 1
    turned = 2 * rows * (local > 1 and (exchanged or several))
    arrived = 2 * rows * (local > 1 and exchanged)
    act, act_back = (a + b for a, b in zip(_activation(setup, n * width), cast_bytes(setup, forward), strict=True))
    # Gathered from the stream and written, empty places cleared; what comes back is read where it is added up.
    there = 2 * rows + stream + turned + arrived + chosen
    again = rows + stream + turned + 2 * arrived
    # Both gathers' gradients scatter into zeros; those of gate and up are added, by themselves where they travel.
    added = 3 if exchanged or several else 1
    back = (4 + added) * rows + chosen + 4 * stream + turned + arrived + 2 * rows * several
    back += 2 * rows * (layout.tensor > 1 and local > 1)
    backward = backward_products(forward, frozen=setup.adapters_only)
    return Mixture(
        Work(forward, 0, there + act, SORTING_KERNELS), Work(forward, 0, again + act, SORTING_KERNELS),
        Work(backward, 0, back + act_back, SORTING_KERNELS),
        rows_bytes=rows if exchanged else 0.0, summed_bytes=rows if layout.tensor > 1 else 0.0,
        up=forward[:-1], of_weights=backward[len(forward) :],
    )  # fmt: skip


def _dropless(setup: Setup) -> Mixture:
    """Every block copies its expert's matrices out of their stack; backward the sums of an expert's gradients are read
    and written in float32 and put into their stack once a block."""
    config, layout = setup.model, setup.layout
    assert config.n_experts
    D, ways, size = config.d_model, 2 if config.gated else 1, setup.element_bytes
    width, local = max(config.expert_size // layout.tensor, 1), max(config.n_experts // layout.expert, 1)
    multiplied, sent = rows_of(setup)
    tokens = max(setup.micro_batch_seqs * setup.seq_len // layout.context, 1)
    block = block_size(tokens * config.experts_per_token, local)
    n, dtype = multiplied // block, setup.linear_dtype
    weights, row, hidden = (ways + 1) * D * width, block * D * size, block * width * size
    forward = (*[Product(block, width, D, 1, dtype)] * ways, Product(block, D, width, 1, dtype))
    backward = backward_products(forward, frozen=setup.adapters_only)
    act = (ways + 1) * hidden
    # A block of rows, and its expert's matrices, are copied.
    picked = (2 * row, 2 * weights * size) if local > 1 else (2 * row,)
    counted = 0.0
    there = Loop(n, forward, (*picked, act, 2 * row, counted))
    again = Loop(n, forward, (*picked, act, 2 * row, *[2 * hidden] * ways, counted))
    # A new gradient is float32 too; one expert's is cast as it is added, for there is no stack.
    sums = [weights / (ways + 1) * (3 * FLOAT32_BYTES + size * (local == 1))] * (ways + 1)
    put = [weights / (ways + 1) * (FLOAT32_BYTES + size)] * (ways + 1) if local > 1 else []
    back = Loop(n, backward, (*picked, 2 * row, 3 * act, (ways + 1) * row, *sums, *put, counted))

    blocks, chosen, stream = _bytes(setup, multiplied)
    travelling = float(sent * D * size) if layout.expert > 1 else 0.0
    # Rows are sorted for the devices, then into blocks, and out of both, each read and written, empty ones cleared.
    around = 3 * blocks + stream + chosen + 6 * travelling
    around_back = 6 * blocks + 3 * act * n + 4 * stream + chosen + 12 * travelling
    stack = 4 * weights * size * local if layout.expert == 1 else 0.0  # of gathered matrices, turned each time
    return Mixture(
        Work((), 0, around + stack, SORTING_KERNELS, (there,)), Work((), 0, around + stack, SORTING_KERNELS, (again,)),
        Work((), 0, around_back + stack, SORTING_KERNELS, (back,)),
        rows_bytes=travelling, summed_bytes=0.0, up=(), of_weights=(),
    )  # fmt: skip


def _bytes(setup: Setup, n_rows: int) -> tuple[float, float, float]:
    """Of rows, of chosen ones, and of the stream, whole over tensor."""
    config = setup.model
    tokens = max(setup.micro_batch_seqs * setup.seq_len // setup.layout.context, 1)
    row = config.d_model * setup.element_bytes
    return float(n_rows * row), float(tokens * config.experts_per_token * row), float(tokens * row)


def _activation(setup: Setup, units: float) -> tuple[float, float]:
    """Bytes that so many hidden units move, forward and backward."""
    passes = PASSES["scanned"]
    there, back = passes.two_ways if setup.model.gated else passes.one_way
    return there * units * setup.element_bytes / 2, back * units * setup.element_bytes / 2
