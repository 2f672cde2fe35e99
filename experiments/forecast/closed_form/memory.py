"""Bytes that one device holds at the worst moment of a step, by class: activations after Korthikanti et al. 2022."""

import math
from functools import lru_cache
from typing import NamedTuple

from experiments.forecast.closed_form.mixture import rows_of
from experiments.forecast.closed_form.setup import Setup
from transformer.accounting import layer_maps
from transformer.config import LayerKind, ModelConfig
from transformer.remat import EXPERT_PRODUCT
from transformer.sharding import Layout

MASK = 1  # bytes of an element that dropout keeps


@lru_cache(maxsize=4096)
def parameters(config: ModelConfig) -> tuple[int, int, int, int]:
    """Numbers in a dense layer, in a layer of experts without them, in its routed experts, in one embedding table."""
    found = []
    for kind in {config.kind(i) for i in range(config.n_layers)}:
        maps = layer_maps(config, kind, cross=config.family == "encoder_decoder")
        found.append((kind.experts, sum(v for k, v in maps.items() if k != EXPERT_PRODUCT)))
    ways = 3 if config.gated else 2
    norms = 4 * config.d_model * (1 + (config.norm == "layer"))
    dense = int(next((n for experts, n in found if not experts), 0)) + norms
    moe = int(next((n for experts, n in found if experts), 0)) + norms
    routed = ways * config.d_model * config.expert_size * (config.n_experts or 0)
    return dense, moe, routed, config.vocab_rows * config.d_model


class Matrices(NamedTuple):
    """Of a layer what is fetched and multiplied with one after another: shares of the dense weights, of the routed
    experts' and of the products, and which is the last before attention."""

    dense: tuple[float, ...]
    experts: tuple[float, ...]
    products: tuple[float, ...]
    last: int


@lru_cache(maxsize=4096)
def matrices(config: ModelConfig) -> Matrices:
    """Keys and values, queries, out of attention, the feed-forward's each. Of experts attention's together, those into
    the hidden units, those out of them; without a capacity one loop needs all of them, of latent attention two too."""
    kinds_ = [config.kind(i) for i in range(config.n_layers)]
    maps = [layer_maps(config, kind, cross=config.family == "encoder_decoder") for kind in kinds_]
    if not (config.kv_rank or config.n_experts or config.family == "encoder_decoder"):
        D, N, K, H, V, F = (
            config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.value_size, config.d_ff,
        )  # fmt: skip
        sizes = D * K * (H + V), D * N * H, D * N * V, *(D * F for _ in range(3 if config.gated else 2))
        shares = tuple(size / sum(sizes) for size in sizes)
        return Matrices(shares, (0.0,) * len(shares), shares, 1)
    ways = 3 if config.gated else 2
    into = (ways - 1) / ways

    def sums(routed: float) -> tuple[float, ...]:
        found = [0.0, 0.0, 0.0]
        for name, n in (item for one in maps for item in one.items()):
            if name == EXPERT_PRODUCT:
                found[1], found[2] = found[1] + routed * n * into, found[2] + routed * n * (1 - into)
            else:
                found[2 if name == "ffn_down" else 1 if name.startswith("ffn") else 0] += n
        return tuple(n / sum(found) for n in found)

    dense, products, routed = sums(0.0), sums(1.0), (0.0, into, 1 - into)
    if not config.capacity_factor:
        dense, routed, products = ((one[0], one[1] + one[2]) for one in (dense, routed, products))
    return Matrices(dense, routed, products, 0)


@lru_cache(maxsize=4096)
def experts_layers(config: ModelConfig) -> int:
    """Layers that have experts."""
    return sum(config.kind(i).experts for i in range(config.n_layers))


@lru_cache(maxsize=4096)
def kinds(config: ModelConfig) -> dict[tuple[LayerKind, bool, bool], int]:
    """How many layers there are of each kind: what the layer is, whether it hides the future, whether it reads a
    memory."""
    counts: dict[tuple[LayerKind, bool, bool], int] = {}
    for i in range(config.n_layers):
        sides = [(False, False)] if config.family != "decoder" else []
        sides += [(True, config.family == "encoder_decoder")] if config.family != "encoder" else []
        for causal, cross in sides:
            key = (config.kind(i), causal, cross)
            counts[key] = counts.get(key, 0) + 1
    return counts


def stacks(config: ModelConfig) -> int:
    """Layers over all stacks."""
    return config.n_layers * (2 if config.family == "encoder_decoder" else 1)


def layers_of_stage(setup: Setup) -> dict[tuple[LayerKind, bool, bool], float]:
    """Layers of each kind (`kinds`) that the fullest stage works through for each microbatch. Stages that keep step
    share out the last block, each with room for as many of its layers, and take turns with those before it."""
    config, layout = setup.model, setup.layout
    p, v = layout.pipeline, layout.repeats
    if p == 1 or setup.practice.schedule != "lockstep":
        share = math.ceil(stacks(config) / p) / stacks(config)
        return {kind: n * share for kind, n in kinds(config).items()}
    found = dict.fromkeys(kinds(config), 0.0)
    *before, last = config.blocks()
    for block in (*before, last):
        times = math.ceil(block.repeats / (p * v)) * v if block is last else block.repeats / p
        for kind in found:
            found[kind] += times * block.kinds.count(kind[0])
    return found


def held(setup: Setup, *, last: bool = False) -> tuple[float, float]:
    """Dense parameters, and experts' parameters, of the device of the first or last stage before fsdp splits them."""
    config, layout = setup.model, setup.layout
    dense, moe, routed, _ = parameters(config)
    share = math.ceil(stacks(config) / layout.pipeline) / stacks(config)
    n_moe = experts_layers(config)
    layers = share * ((stacks(config) - n_moe) * dense + n_moe * moe)
    if config.position == "learned" and not last:
        layers += config.max_len * config.d_model
    return layers / layout.tensor + tables(setup), share * n_moe * routed / layout.tensor / layout.expert


def tables(setup: Setup) -> float:
    """Of the same, numbers in embedding and head."""
    config, layout = setup.model, setup.layout
    n = 1 if layout.pipeline > 1 or config.tied else 2
    if setup.practice.schedule == "lockstep":  # every stage has its part of both
        n = (1 if config.tied else 2) / layout.pipeline
    return n * parameters(config)[3] / layout.tensor


def activations_of_layer(setup: Setup, *, experts: bool = False) -> dict[str, float]:
    """Bytes that the forward pass of one layer leaves for its backward pass, by what remat would do about them.

    kept: under no remat, but for the scores; scores: those of attention without a fused kernel; dots: products' results
    and the input; checkpoint: its input.
    Of GPT that is s b h (10 + 24 / t + 5 a s / h t), and with sequence parallelism s b h / t (34 + 5 a s / h)
    (Korthikanti et al. 2022, eq. 2 and 4).
    """
    config, layout, practice = setup.model, setup.layout, setup.practice
    size, t = setup.element_bytes, layout.tensor
    split = t if setup.sequence_parallel else 1
    tokens = setup.micro_batch_seqs * setup.seq_len / layout.context
    stream = tokens * config.d_model
    norms = 1 if config.parallel else 2
    kept = stream * size * norms / split  # norms' inputs
    kept += stream * size * norms / split  # inputs of the maps to queries and up
    if practice.dropout:
        kept += 2 * MASK * stream / split
    heads = tokens * (config.n_heads / t * config.d_head + setup.kv_heads * (config.d_head + config.value_size))
    kept += heads * size + tokens * config.n_heads * config.value_size / t * size  # q, k, v; the context
    if config.kv_rank:
        kept += tokens * (config.kv_rank + (config.q_rank or 0)) * size * 2
    units, moved = tokens * config.d_ff / t, 0.0  # hidden units, and bytes that bring rows to experts
    if experts:
        units = tokens * (config.n_shared_experts or 0) * config.expert_size / t
        if practice.fusion == "scanned":  # empty rows too, whole over tensor
            rows, _ = rows_of(setup)
            units, moved = units + rows * config.expert_size / t, float(rows * config.d_model * size)
            kept += 2 * moved
        else:
            units += tokens * config.experts_per_token * config.expert_size / t
            kept += tokens * config.experts_per_token * config.d_model * size * 2 / split  # permuted in and out
    hidden = (3 if config.gated else 2) + (config.gated and practice.fusion == "eager")
    kept += units * size * hidden
    made = units * size + moved + norms * stream * size / split  # from products' results, without a product
    scores = 0.0
    if not practice.flash:
        per = (2 * size + MASK) if practice.dropout else size
        scores = per * tokens * config.n_heads * setup.seq_len / t
    return {"kept": kept, "scores": scores, "dots": kept - made, "checkpoint": stream * size / split}


def activation_bytes(setup: Setup) -> tuple[float, float]:
    """Of the first stage, whose microbatches in flight are the most; and of the layer that is made again."""
    config, layout = setup.model, setup.layout
    n_moe = experts_layers(config)
    of_dense = activations_of_layer(setup)
    of = of_dense
    if n_moe:
        share, of_moe = n_moe / stacks(config), activations_of_layer(setup, experts=True)
        of = {key: (1 - share) * of_dense[key] + share * of_moe[key] for key in of_dense}
    whole = setup.practice.kept_share * of["kept"] + of["scores"]
    ops = of["checkpoint"] + 0.4 * of["kept"]  # every other product's result, attention's and its inputs
    stays = {"none": whole, "selective": of["kept"], "ops": ops, "dots": of["dots"], "full": of["checkpoint"]}[
        setup.remat
    ]
    per_layer = setup.remat_share * stays + (1 - setup.remat_share) * whole
    layers = math.ceil(stacks(config) / layout.pipeline)
    again = 0.0 if setup.remat == "none" else whole - stays
    return per_layer * layers * in_flight(setup), again


def shards_of(layout: Layout) -> int:
    """Devices that share the optimizer of a dense weight: fsdp's, and those that hold other tokens beside it."""
    return layout.fsdp * layout.expert * layout.context


def in_flight(setup: Setup) -> float:
    """Microbatches whose activations the first stage holds, in forward passes of the whole stage."""
    p, v, m = setup.layout.pipeline, setup.layout.repeats, setup.microbatches
    if p == 1:
        return 1.0
    if setup.practice.schedule == "lockstep":
        return (min(2 * p * v - 1, v * m) + 1) / v  # and the part that is being worked on
    if setup.practice.schedule != "1f1b":
        return float(m)
    if v > 1:
        return min(p * (1 + (p - 1) / (p * v)), float(m))
    return float(min(p, m))


def memory_bytes(setup: Setup, of_stage: tuple[float, float]) -> dict[str, float]:
    """By class, of the worst device, whose stage has so many parameters (`held`). Their sum is what the framework has
    allocated; the runtime's reserve is apart."""
    config, layout, practice = setup.model, setup.layout, setup.practice
    dense, experts = of_stage
    shards = shards_of(layout)

    def split(n_bytes: float, from_stage: int) -> float:
        if layout.zero < from_stage:
            return n_bytes * (dense + experts)
        return n_bytes * (dense / shards + experts / (shards / layout.expert))

    trained = not setup.adapters_only
    tokens = setup.micro_batch_seqs * setup.seq_len / layout.context
    logits = min(tokens, practice.chunk_tokens or tokens) * config.vocab_rows / layout.tensor
    if practice.schedule == "lockstep":
        logits /= layout.pipeline
    elif layout.pipeline > 1:  # the last stage, where one microbatch is in flight
        logits = 0.0
    compute_copy = 0.0
    if layout.zero == 3 and shards > 1:
        per_layer = (dense + experts) / max(math.ceil(stacks(config) / layout.pipeline), 1)
        gathered = 2 * per_layer * 2
        if not practice.reshard_after_forward:
            gathered = 2 * (dense + experts)
        compute_copy = gathered + per_layer * setup.element_bytes  # and the gradient of the layer, not yet split
    fresh = practice.fresh_gradient_bytes * (setup.microbatches > 1)
    activations, again = activation_bytes(setup)
    logits *= setup.element_bytes + (8 if practice.float32_logits else 2)
    return {
        "weights": split(practice.resident_weight_bytes, 3),
        "gradients": trained * split(practice.gradient_bytes + fresh, 2 if practice.gather_every_microbatch else 4),
        "optimizer": trained * split(practice.optimizer_bytes - (4 if practice.resident_weight_bytes == 4 else 0), 1),
        "activations": activations + again,
        "logits": max(logits - again, 0.0),  # gone before the first layer is made again
        "buffers": compute_copy,
    }
