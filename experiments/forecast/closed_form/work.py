"""What one device multiplies and moves for one microbatch of one layer, forward and backward.

Letters: T tokens of a microbatch on this device (its part of the sequence under context parallelism); t the tensor
axis. A width that tensor splits is divided by t; passes over the residual stream are too under sequence parallelism.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.kernels import Product
from transformer.config import LayerKind, ModelConfig


class Loop(NamedTuple):
    """`times` one after another: products, and element-wise kernels that move so many bytes each."""

    times: int
    products: tuple[Product, ...]
    passes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """Kernels of one pass. `attention_flops`: of fused kernels, as they run. `bytes`: of element-wise passes outside of
    loops."""

    products: tuple[Product, ...]
    attention_flops: float
    bytes: float
    kernels: int
    loops: tuple[Loop, ...] = ()

    def plus(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products, self.attention_flops + other.attention_flops, self.bytes + other.bytes,
            self.kernels + other.kernels, self.loops + other.loops,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """Both passes of a layer, the parts that remat repeats, and what crosses the axes. Of our own program without the
    routed experts (`mixture`)."""

    forward: Work
    again: Work  # as full remat repeats it: without the products whose results no gradient needs
    backward: Work
    scores: Work  # of attention, which selective recomputation makes again
    shared: tuple[Product, ...]  # forward, of experts that every token passes
    stream_bytes: float  # of the residual stream of a microbatch, whole over tensor
    expert_bytes: float  # that one device sends to other experts' devices, one way
    kv_bytes: float  # keys and values of this device's part of the sequence


class Passes(NamedTuple):
    """Bytes per element of two bytes, forward and backward."""

    norm: tuple[int, int]
    residual: tuple[int, int]
    rope: tuple[int, int]
    one_way: tuple[int, int]
    two_ways: tuple[int, int]
    join: int
    logit: int


PASSES = {
    "eager": Passes((4, 10), (6, 6), (24, 24), (4, 6), (10, 16), join=4, logit=42),
    "fused": Passes((4, 8), (6, 6), (4, 4), (4, 6), (6, 10), join=4, logit=26),
    "compiled": Passes((3, 6), (5, 4), (4, 4), (4, 6), (6, 10), join=0, logit=14),
    "scanned": Passes((4, 12), (5, 5), (4, 4), (4, 14), (6, 14), join=0, logit=18),
}
"""Bytes that are read and written per element of two bytes, forward and backward, counted operator by operator.

A norm reads and writes (4), its gradient reads the input and the output's gradient and writes (6), and reads both once
more for the scale's (4); a residual sum reads two and writes one (6), and so does the sum of two gradients. XLA and
torch.compile make the norm in the pass that adds. scanned: counted in compiled schedules of llama3-8b and gpt3-1.3b,
where XLA reads a norm's input once more for each of its sums, and a gate's parts for each gradient. rope: of queries
and keys; eager rotates in float32, an operator at a time. one_way, two_ways: the activation per hidden unit of a plain
or gated feed-forward. join: gradients of queries, keys and values put beside each other for one product. logit: the
loss, both directions."""

CASTS = {"fused": (1, 3), "compiled": (6, 8), "scanned": (6, 8), "eager": (8, 10), "rows": (24, 32)}
"""Bytes per element of a product's input that casts to eight bits move, forward and backward. A cast reads (2) and
writes the number and its transpose (1 + 1). Transformer Engine (fused) does so inside norms and activations, and only
attention's result and gradients take a pass of their own; elsewhere the largest value is found in a pass before (2);
with a scale per row, each side of each product has both passes of its own, and the one across rows reads at a third of
the bandwidth."""

KERNELS = {"eager": (17, 34), "fused": (12, 24), "compiled": (6, 12), "scanned": (6, 12)}
"""Element-wise kernels of a layer, forward and backward, beside products and attention."""

ROUTER_BYTES = (32, 52)
"""Of a score of the router, forward and backward: in float32, written once and read or written in 8 and 13 passes as
it is normed, ranked, chosen from and counted; of compiled schedules of qwen3-30b-a3b and deepseek-v3."""

DROPOUT_BYTES = 1  # of a mask per element, written and read
SCORE_BYTES = (9, 9)
"""Of an attention score, beside the two products that write and read it (4, and 8 backward): scale, mask and softmax
in one pass (4), dropout (5); backward the same."""


CHUNK_BYTES = ((14, 8), (22, 28))
"""Of two chunks that meet, forward and backward, per element of one such tensor of queries and of keys. Queries (their
results and gradients too, backward), keys and values are cut out (2 + 2 each), and what a kernel makes is added to the
float32 sum of calls before (2 + 4 + 4)."""

SUM_BYTES = 10
"""Per element of such a sum: zeros at first (4), rounded at last (4 + 2)."""

CHUNK_KERNELS = 3
"""Short ones of two chunks, beside those that move chunks: two of normalizers, and the loop's counter."""


def layer(setup: Setup, kind: LayerKind, *, causal: bool = True, cross: bool = False) -> Layer:
    """One layer's work. `cross`: it also reads a memory as long as its own sequence."""
    config, layout, practice = setup.model, setup.layout, setup.practice
    size, t = setup.element_bytes, layout.tensor
    tokens = max(setup.micro_batch_seqs * setup.seq_len // layout.context, 1)
    passes = PASSES[practice.fusion]
    stream = tokens * config.d_model / (t if setup.sequence_parallel else 1) * size / 2

    maps = _attention_maps(setup, tokens) * (2 if cross else 1)
    experts, ffn_width = _feed_forward(setup, kind, tokens)
    keys = _keys(setup, kind, causal=causal)
    heads = max(config.n_heads // t, 1)
    attend = Work((), 0, 0, 0)
    attend_back = attend
    for n_keys, is_causal in ((keys, causal), *([(float(setup.seq_len), False)] if cross else [])):
        there = _attention(setup, tokens, heads, n_keys)
        back = _attention_backward(setup, there)
        if practice.attention_in_chunks:
            there, back = (
                _in_chunks(setup, tokens, heads, whole, causal=is_causal, way=way)
                for way, whole in enumerate((there, back))
            )
        attend, attend_back = attend.plus(there), attend_back.plus(back)
    narrow = tokens * (config.n_heads / t + 2 * setup.kv_heads) * config.d_head * size / 2
    norms = 4 if config.norm_placement == "sandwich" else 1 if config.parallel else 2
    norms += cross
    sums = 1 + (not config.parallel) + cross
    moved = [0.0, 0.0]
    for way in (0, 1):
        moved[way] += stream * (norms * passes.norm[way] + sums * passes.residual[way])
        moved[way] += stream * sums * practice.dropout * 2 * DROPOUT_BYTES
        moved[way] += narrow * practice.copies * 4
        if practice.separate_maps and way == 0 and (config.bias or config.qkv_bias):
            moved[way] += narrow * 4
        if config.position == "rotary":
            moved[way] += narrow * passes.rope[way]
        moved[way] += ffn_width * size / 2 * (passes.two_ways if config.gated else passes.one_way)[way]
    routed = tokens * config.experts_per_token * config.d_model * size if kind.experts else 0.0
    if kind.experts and practice.fusion == "scanned":  # scores of the router, in float32: softmax, ranks, their sums
        moved = [moved[way] + ROUTER_BYTES[way] * tokens * (config.n_experts or 0) for way in (0, 1)]
    elif kind.experts:  # sorted for the devices, sorted for the experts, and both undone: read and written
        moved = [moved[0] + 8 * routed, moved[1] + 9 * routed]
    moved[1] += narrow * passes.join
    products = maps + experts
    if config.bias:  # a bias' gradient is a sum over tokens
        moved[1] += sum(p.m * p.n * p.batch for p in products) * size
    moved = [bytes_ + cast for bytes_, cast in zip(moved, cast_bytes(setup, products), strict=True)]
    n = KERNELS[practice.fusion]
    forward = Work(products, 0, moved[0], len(products) + n[0]).plus(attend)
    backward = Work(backward_products(products, frozen=setup.adapters_only), 0, moved[1], 2 * len(products) + n[1])
    again = forward
    if not practice.repeats_last:
        ends = _ends(config, kind, maps, experts)
        again = dataclasses.replace(forward, products=tuple(p for i, p in enumerate(forward.products) if i not in ends))
    return Layer(
        forward=forward,
        again=again,
        backward=backward.plus(attend_back),
        scores=attend,
        shared=experts[-(3 if config.gated else 2) :] if kind.experts and config.n_shared_experts else (),
        stream_bytes=float(tokens * config.d_model * size),
        expert_bytes=routed / (t if setup.sequence_parallel else 1) if layout.expert > 1 else 0.0,
        kv_bytes=tokens * setup.kv_heads * (config.d_head + config.value_size) * size,
    )


def cast_bytes(setup: Setup, products: tuple[Product, ...]) -> tuple[float, float]:
    """Moved to bring the inputs of products to eight bits, forward and backward."""
    if setup.precision not in ("fp8", "int8"):
        return 0.0, 0.0
    there, back = CASTS["rows" if setup.slow_scaling else setup.practice.fusion]
    cast = sum(p.m * p.k * p.batch for p in products if p.dtype == setup.linear_dtype)
    return there * cast, back * cast


def _ends(
    config: ModelConfig, kind: LayerKind, maps: tuple[Product, ...], feed_forward: tuple[Product, ...]
) -> tuple[int, ...]:
    """Which products only the residual sum reads: a norm's gradient reads its input."""
    if config.norm_placement != "pre" or (kind.experts and not config.n_shared_experts):
        return ()
    out, down = len(maps) - 1, len(maps) + len(feed_forward) - 1
    return (out, down) if config.parallel else (down,)


def head(setup: Setup) -> tuple[Work, Work]:
    """The logits and their loss, forward and backward, of one microbatch on a device of the last stage."""
    config, t = setup.model, setup.layout.tensor
    tokens = max(setup.micro_batch_seqs * setup.seq_len // setup.layout.context, 1)
    product = Product(tokens, _part(config.vocab_rows, t), config.d_model, 1, setup.wide_dtype)
    moved = tokens * config.vocab_rows / t * PASSES[setup.practice.fusion].logit / 2
    return Work((product,), 0, moved, 8), Work(backward_products((product,), frozen=setup.adapters_only), 0, moved, 6)


def backward_products(products: tuple[Product, ...], *, frozen: bool = False) -> tuple[Product, ...]:
    """The input's gradient [m, n] x [n, k] and, unless weights are frozen, the weight's [k, m] x [m, n] of each."""
    inputs = [Product(m, k, n, batch, dtype) for m, n, k, batch, dtype, _ in products]
    weights = [] if frozen else [Product(k, n, m, batch, dtype) for m, n, k, batch, dtype, _ in products]
    return (*inputs, *weights)


def _part(width: int, t: int) -> int:
    return max(-(-width // t), 1)


def _attention_maps(setup: Setup, tokens: int) -> tuple[Product, ...]:
    config, t, dtype = setup.model, setup.layout.tensor, setup.linear_dtype
    D, N, K, H, V = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.value_size
    out = Product(tokens, D, _part(N * V, t), 1, dtype)
    if config.kv_rank and config.d_rope:
        R, Q, rope = config.kv_rank, config.q_rank, config.d_rope
        down = Product(tokens, (Q or 0) + R + rope, D, 1, dtype)
        queries = Product(tokens, _part(N * H, t), Q or D, 1, dtype)
        return down, queries, Product(tokens, _part(N * (H - rope + V), t), R, 1, dtype), out
    q, k, v = _part(N * H, t), _part(K * H, min(t, K)), _part(K * V, min(t, K))
    widths = (q, k, v) if setup.practice.separate_maps else (q + k + v,)
    return (*(Product(tokens, width, D, 1, dtype) for width in widths), out)


def _feed_forward(setup: Setup, kind: LayerKind, tokens: int) -> tuple[tuple[Product, ...], float]:
    """Products of the feed-forward, and how many hidden units this device makes."""
    config, layout, dtype = setup.model, setup.layout, setup.linear_dtype
    t, ways, D = layout.tensor, 2 if config.gated else 1, config.d_model
    if not kind.experts:
        width = _part(config.d_ff, t)
        apart = ways if setup.practice.separate_maps else 1
        up, down = Product(tokens, ways // apart * width, D, 1, dtype), Product(tokens, D, width, 1, dtype)
        return (*[up] * apart, down), float(tokens * width)
    assert config.n_experts
    found, units = [Product(tokens, config.n_experts, D, 1, "f32")], 0.0
    if setup.practice.fusion != "scanned":
        width, local = _part(config.expert_size, t), max(config.n_experts // layout.expert, 1)
        rows = max(tokens * config.experts_per_token // local, 1)  # those of all who share the experts, evenly
        found += [Product(rows, ways * width, D, local, dtype), Product(rows, D, width, local, dtype)]
        units = float(rows * local * width)
    if config.n_shared_experts:
        shared = _part(config.n_shared_experts * config.expert_size, t)
        apart = ways if setup.practice.fusion == "scanned" else 1
        found += [Product(tokens, ways // apart * shared, D, 1, dtype)] * apart
        found += [Product(tokens, D, shared, 1, dtype)]
        units += tokens * shared
    return tuple(found), units


def _keys(setup: Setup, kind: LayerKind, *, causal: bool) -> float:
    """Keys that a query is multiplied with on average: fused kernels skip what a causal mask or a window hides."""
    config, length = setup.model, setup.seq_len
    seen = float(length)
    if kind.local:
        seen = float(min(length, config.window or config.chunk or length))
    return seen * (1 - seen / (2 * length)) if causal and setup.practice.flash else seen


def _attention(setup: Setup, tokens: int, heads: int, keys: float) -> Work:
    config = setup.model
    of_value = config.d_head if setup.practice.padded_values else config.value_size
    flops = 2.0 * tokens * heads * keys * (config.d_head + of_value)
    if setup.practice.flash:
        return Work((), flops, 0, 1)
    length = max(int(keys), 1)
    batch = max(tokens // setup.seq_len, 1) * heads
    rows = tokens // max(tokens // setup.seq_len, 1)
    products = (
        Product(rows, length, config.d_head, batch, setup.wide_dtype),
        Product(rows, config.value_size, length, batch, setup.wide_dtype),
    )
    per_score = SCORE_BYTES[0] - (0 if setup.practice.dropout else 5)
    return Work(products, 0, batch * rows * length * per_score * setup.element_bytes / 2, 4)


def _in_chunks(setup: Setup, tokens: int, heads: int, whole: Work, *, causal: bool, way: int) -> Work:
    """A fused kernel's work over a split sequence, where it is called for two chunks at a time: under a causal mask
    2 C + 1 times on each of C devices, for half of its queries and as many keys; without one for all there are."""
    config, C = setup.model, setup.layout.context
    of_queries, of_keys = CHUNK_BYTES[way]
    size = max(config.d_head, config.value_size)
    queries, keys = tokens * heads * size, tokens * setup.kv_heads * size
    sums = SUM_BYTES * (queries + way * 2 * C * keys)
    n, met = (2 * C + 1, 0.5 * (of_queries * queries + of_keys * keys))
    if not causal:
        n, met = 1, of_queries * queries + of_keys * C * keys
    return dataclasses.replace(whole, bytes=whole.bytes + n * met + sums, kernels=whole.kernels + n * CHUNK_KERNELS)


def _attention_backward(setup: Setup, forward: Work) -> Work:
    """Five products for two where scores are made again (Dao et al. 2022), else four."""
    if setup.practice.flash:
        return Work((), 2.5 * forward.attention_flops, 0, 2)
    return Work(backward_products(forward.products), 0, forward.bytes * 1.25, 8)
