"""What our own program moves and waits for because its layers are in a loop: counted in its compiled schedules."""

import math
from typing import NamedTuple

from experiments.forecast.closed_form import memory
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.rates import Rates

FLOAT32_SUM_BYTES = 10
"""Of a weight of the head: its float32 gradient is made ready (4) and cast (6)."""

SLICED_BYTES = 12
"""Of a weight of layers in a loop: cut out of their stack forward and backward, its gradient put into one."""
TURNED_BYTES = 3
"""The same where fsdp gathers it: of most matrices the gathered whole is put in order once, backward."""
ENDS_BYTES = 12 + FLOAT32_SUM_BYTES
"""Of a weight of embedding and head together: the embedding's gradient is set to zero (4) and scattered into (8), the
head's made ready and cast (10)."""
ENDS_CAST_BYTES = 6
"""The same where fsdp scatters it: the embedding's gradient is cast before."""
BRANCH_BYTES = 12
"""Of a weight of either in a pipeline: its float32 sum is copied around the branches in which ends are worked on."""


class Beside(NamedTuple):
    """Seconds of one microbatch through the layers of a stage, beside which weights and gradients travel."""

    matmul: float  # forward
    attention: float  # forward
    attention_back: float
    back: float  # the whole backward pass


class Sent(NamedTuple):
    """Seconds in which the weights of a stage, or their gradients, travel, were each kind sent as one."""

    dense: float
    experts: float
    start: float  # of every collective, whatever it carries

    @property
    def all(self) -> float:
        return self.dense + self.experts


def in_layer(
    setup: Setup, rates: Rates, beside: Beside, gather: Sent, scatter: Sent, n_dense: float
) -> tuple[float, float, float]:
    """Seconds in which weights and gradients travel in all, and what of it is exposed forward and backward, where all
    weights take `gather` to come, twice, and `scatter` to leave. `n_dense`: dense weights of the stage, embedding and
    head with them.

    Each matrix comes beside the product with the one before, the first of a layer beside nothing; backward two products
    hide it, unless the layer is made again first. XLA sends the gradients of a layer as one and waits for them after
    two products of the next, those of the last layer beside nothing. Where experts exchange rows these wait, on the one
    stream of collectives, for the gradients before them, so that both hide beside the same products. Embedding and head
    come and leave once: the embedding beside nothing, the head beside the passes that make its sum ready and cast it.
    """
    n = math.ceil(memory.stacks(setup.model) / setup.layout.pipeline)
    tables = memory.tables(setup) / n_dense
    of = memory.matrices(setup.model)
    come, leave = (
        [
            (sent.dense * (1 - tables) * dense + sent.experts * experts) / n + sent.start / together
            for dense, experts in zip(of.dense, of.experts, strict=True)
        ]
        for sent, together in ((gather, 1), (scatter, len(of.dense)))
    )
    one_gather, one_scatter = sum(come), sum(leave)
    there = [share * beside.matmul / n for share in of.products]
    there[of.last] += beside.attention / n
    back_come, back = come, there
    if queued := setup.layout.expert > 1 and setup.model.n_experts is not None:
        back_come = [sum(both) for both in zip(come, leave, strict=True)]
    if setup.remat != "full":
        back_come, back = back_come[::-1], [2 * share * beside.matmul / n for share in reversed(of.products)]
        back[-1 - of.last - 1] += beside.attention_back / n
    first_there, first_back = (
        sent[0] + sum(max(sent[i] - c[i - 1], 0.0) for i in range(1, len(sent)))
        for sent, c in ((come, there), (back_come, back))
    )
    busy = 0.0 if queued else one_gather + one_scatter - beside.back / n
    head = 0.0 if setup.model.tied else tables / 2
    passes = rates.memory_s(FLOAT32_SUM_BYTES * memory.tables(setup) / 2)
    ends = [max(sent.dense * head - passes, 0.0) + sent.dense * (tables - head) for sent in (gather, scatter)]
    two = [of.products[-1], of.products[-2 if setup.remat == "full" else of.last]]
    late = 0.0 if queued else max(one_scatter - sum(two) * beside.matmul / n, 0.0)
    exposed_back = n * max(first_back + late, busy) + one_scatter + ends[1]
    there_s, back_s = n * one_gather + gather.dense * tables, n * (one_gather + one_scatter) + scatter.dense * tables
    return there_s + back_s, n * first_there + ends[0], min(exposed_back, back_s)


def looped_bytes(setup: Setup, dense: float, experts: float) -> float:
    """Moved for layers' weights, gradients and what is kept, a microbatch; what fsdp splits is a shard's. `dense`,
    `experts`: weights of the device's stage, before fsdp splits them."""
    practice, layout = setup.practice, setup.layout
    adds = practice.sum_bytes if setup.microbatches > 1 else 0
    moved = 0.0
    for n, shards in (
        (dense - memory.tables(setup), memory.shards_of(layout)),
        (experts, layout.fsdp * layout.context),
    ):
        split = shards if layout.zero == 3 else 1
        moved += n * ((SLICED_BYTES + adds) / split + (TURNED_BYTES if split > 1 else 0))
    passes = practice.kept_passes[layout.pipeline > 1]
    kept = memory.activation_bytes(setup)[0] / memory.in_flight(setup)
    return moved + passes * kept


def ends_bytes(setup: Setup) -> float:
    """Moved for embedding and head, a microbatch. Each chunk of tokens but the first adds its part of the head's
    gradient."""
    practice = setup.practice
    shards = memory.shards_of(setup.layout) if setup.layout.zero == 3 else 1
    adds = practice.sum_bytes / shards if setup.microbatches > 1 else 0.0
    tokens = setup.micro_batch_seqs * setup.seq_len / setup.layout.context
    chunks = math.ceil(tokens / (practice.chunk_tokens or tokens))
    of_both = ENDS_BYTES + (ENDS_CAST_BYTES if shards > 1 else 0) + (chunks - 1) * practice.sum_bytes
    branched = BRANCH_BYTES if setup.layout.pipeline > 1 else 0
    return memory.tables(setup) * (of_both / (1 if setup.model.tied else 2) + adds + branched)
