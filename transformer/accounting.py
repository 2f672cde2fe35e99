"""Parameters, FLOPs and bytes in closed form, each by the convention that is named where it is used.

FLOPs are multiplications plus additions of matrix products; norms, softmax and other element-wise
work are left out, as everywhere in the field. Utilisation is achieved FLOP/s over the dense peak.

The same FLOPs are counted a second way, from the traced program, by `traced_flops`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from transformer.attention import Context
from transformer.blockwise import BLOCK, visible_blocks
from transformer.config import Backend, ExpertProducts, LayerKind, ModelConfig, Precision, Remat, Weights
from transformer.dropless import n_rows_of
from transformer.experts import capacity_of
from transformer.grouped import kernel_flops
from transformer.kernels import LANES, SPLASH_SIZES
from transformer.layers import self_mask
from transformer.masks import Causal, Everything, Mask, Window, parts
from transformer.models import model_params
from transformer.params import ParamTree, dtype_of, leaves
from transformer.remat import ATTENTION_OUTPUT, EXPERT_PRODUCT, base_of, fates
from transformer.sharding import Layout, param_spec

Attention = Literal["full", "causal", "none"]
"""How attention's products are counted. full: every query with every key, as Megatron-LM since 2022, PaLM and
Llama 3 do; causal: half of that where a mask hides the future; none: not at all, the field's 6 N."""


def n_params(config: ModelConfig) -> int:
    """All parameters as published: without the embedding's padding rows."""
    padding = config.vocab_rows - config.vocab_size
    rows = config.d_model * (1 if config.tied else 2) + config.head_bias
    return sum(math.prod(p.shape) for _, p in leaves(model_params(config))) - padding * rows


def n_active_params(config: ModelConfig) -> int:
    """Parameters that one token meets: of the experts, those that are chosen."""
    if config.n_experts is None:
        return n_params(config)
    ways = 3 if config.gated else 2
    idle = (config.n_experts - config.experts_per_token) * ways * config.d_model * config.expert_size
    return n_params(config) - idle * sum(kind.experts for _, kind, _ in _layers(config))


def n_embedding_params(config: ModelConfig) -> int:
    """Token, position and type tables: looked up, not multiplied. (A tied table counts here.)"""
    positions = config.max_len if config.position == "learned" else 0
    return (config.vocab_size + positions + (config.token_types or 0)) * config.d_model


def _layers(config: ModelConfig) -> list[tuple[bool, LayerKind, bool]]:
    """Every layer of every stack: whether it hides the future, its kind, whether it reads a memory."""
    kinds = [config.kind(i) for i in range(config.n_layers)]
    found = []
    if config.family != "decoder":
        found += [(False, kind, False) for kind in kinds]
    if config.family != "encoder":
        found += [(True, kind, config.family == "encoder_decoder") for kind in kinds]
    return found


def layer_maps(config: ModelConfig, kind: LayerKind, *, cross: bool) -> dict[str, float]:
    """Numbers that a token is multiplied with in a layer, by the tensor that they make (`remat.TENSORS`)."""
    D, N, K, H, V = config.d_model, config.n_heads, config.n_kv_heads, config.d_head, config.value_size
    maps: dict[str, float] = {
        "queries": D * N * H, "keys": (config.share == "none") * D * K * H, "values": D * K * V,
        "attention_projection": N * V * D,
    }  # fmt: skip
    again = dict(maps)  # for the memory
    if config.share == "query_key":
        again["keys"] = D * N * H  # those of itself are its queries
    if config.kv_rank and config.d_rope:
        R, Q, rope = config.kv_rank, config.q_rank, config.d_rope
        maps |= {"keys": R * N * (H - rope), "values": R * N * V, "latents": D * (R + rope + (Q or 0))}
        maps["queries"] = (Q or D) * N * H
    if cross:
        maps |= {name: maps[name] + n for name, n in again.items()}
    width = config.d_ff
    if kind.experts:
        assert config.n_experts
        ways, chosen = 3 if config.gated else 2, config.experts_per_token * config.expert_size
        maps |= {"router": D * config.n_experts, EXPERT_PRODUCT: ways * D * chosen}
        width = (config.n_shared_experts or 0) * config.expert_size
    return maps | {"ffn_up": D * width, "ffn_gate": config.gated * D * width, "ffn_down": D * width}


def n_matmul_params(config: ModelConfig, *, head: bool = True, padded: bool = False) -> int:
    """Parameters that every token is multiplied with: the layers' matrices, of experts the chosen ones, and with
    `head` the logits'. An encoder-decoder's token is one of the target and one of the source."""
    layers = sum(sum(layer_maps(config, kind, cross=cross).values()) for _, kind, cross in _layers(config))
    return int(layers) + head * _head_map(config, config.vocab_rows if padded else config.vocab_size)


def _head_map(config: ModelConfig, rows: int) -> int:
    return config.d_model * (rows + config.head_transform * config.d_model)


def keys_per_query(length: int, attention: Attention, window: int | None = None) -> float:
    """Keys that a query meets on average, by convention.

    full: min(length, window). causal: length / 2, and with a window w, w (1 - w / 2 length).

    >>> keys_per_query(2048, "full"), keys_per_query(2048, "causal"), keys_per_query(2048, "causal", 512)
    (2048.0, 1024.0, 448.0)
    """
    seen = float(min(length, window or length))
    return {"full": seen, "causal": seen * (1 - seen / (2 * length)), "none": 0.0}[attention]


def _keys(config: ModelConfig, kind: LayerKind, length: int, attention: Attention, *, causal: bool) -> float:
    """Keys that a query of such a layer meets in self-attention, by convention."""
    if attention == "causal" and not causal:
        attention = "full"
    if kind.local and config.chunk:  # a sequence of its own, but for the last that is cut short
        whole, rest = divmod(length, config.chunk)
        chunks = [config.chunk] * whole + [rest]
        return sum(n * keys_per_query(n, attention) for n in chunks if n) / length
    if kind.local and config.window and not causal:
        return keys_per_query(length, attention, 2 * config.window - 1)  # to both sides
    return keys_per_query(length, attention, config.window if kind.local else None)


def train_flops_per_token(
    *, n_params: float, n_layers: int, n_heads: int, d_head: int, length: int,
    attention: Attention = "full", window: int | None = None,
) -> float:  # fmt: skip
    """6 N + 12 n_layers n_heads d_head keys: forward and backward of one token, nothing recomputed.

    Every parameter costs a multiplication and an addition forward and twice that backward; every key
    costs as much in scores and values. (PaLM, arXiv:2204.02311, app. B.) N is the caller's choice:
    all parameters, or without embeddings, or those multiplied (`n_matmul_params`).
    """
    return 6 * n_params + 12 * n_layers * n_heads * d_head * keys_per_query(length, attention, window)


def model_flops_per_token(config: ModelConfig, length: int, attention: Attention = "full") -> float:
    """Model FLOPs of one trained token: multiplied parameters (head included) and attention by convention.

    An encoder-decoder's tokens are those of the target; each stands for one of the source too, which is as long.
    """
    total = 6.0 * n_matmul_params(config)
    for causal, kind, cross in _layers(config):
        keys = _keys(config, kind, length, attention, causal=causal)
        keys += cross * keys_per_query(length, "none" if attention == "none" else "full")
        total += 6 * config.n_heads * (config.d_head + config.value_size) * keys
    return total


def hardware_flops_per_token(
    config: ModelConfig,
    length: int,
    remat: Remat,
    backend: Backend,
    micro_batch_seqs: int = 1,
    experts: ExpertProducts = "loop",
) -> float:
    """FLOPs that the machine does for one trained token, recomputation and padding included.

    Linear maps: 2 forward, 4 backward; those that `remat` recomputes 2 again, but for maps whose result no gradient
    needs: the last before the residual stream, where neither norm nor a router's weight follows.
    Experts: padded blocks or capacities; `micro_batch_seqs` sequences of a data shard are sorted together.
    Attention, in products of length x keys x head size:
      xla        multiplies masked scores too; 2 forward, 4 backward; but for "none" the scores again, and the
                 values where its output is recomputed.
      others     skip what the mask empties, whole blocks of it; 2 forward, 5 backward (splash 7), for they repeat
                 the scores themselves; where their output is recomputed, 2 again.
    """
    total = 6.0 * _head_map(config, config.vocab_rows)
    for causal, kind, cross in _layers(config):
        maps = layer_maps(config, kind, cross=cross)
        if kind.experts:
            ratio = _expert_rows(config, length, micro_batch_seqs, experts) / config.experts_per_token
            maps[EXPERT_PRODUCT] *= ratio
        again = [name for name, fate in fates(remat).items() if fate == "recompute"]
        total += 6 * sum(maps.values())
        total += 2 * sum(maps.get(name, 0) for name in again if name not in _unneeded(config))
        masks = [self_mask(config, kind, Context(jnp.zeros((1, 1), jnp.int32)), causal=causal)]
        masks += [Everything()] if cross else []
        keys = sum(_computed_keys(mask, length, backend) for mask in masks)
        scores, values = _products(remat, backend)
        total += 2 * config.n_heads * (scores * config.d_head + values * config.value_size) * keys
    return total


def _unneeded(config: ModelConfig) -> tuple[str, ...]:
    """Maps whose result is only added to the stream: they are never repeated."""
    if config.norm_placement != "pre":
        return ()
    return ("attention_projection", "ffn_down") if config.parallel else ("ffn_down",)


def _products(remat: Remat, backend: Backend) -> tuple[int, int]:
    """How often scores (d_head long) and values (d_value long) are multiplied, forward, backward and again."""
    again = fates(remat).get(ATTENTION_OUTPUT) == "recompute"
    if backend == "xla":
        return (3 if base_of(remat) == "none" else 4, 3 + again)
    scores, values = (5, 4) if backend == "splash" else (4, 3)  # splash's two backward kernels each make the scores
    return scores + again, values + again


def _computed_keys(mask: Mask, length: int, backend: Backend) -> float:
    """Keys that a query is multiplied with, masked ones included where the backend does so."""
    if backend == "xla":
        return float(length)
    if backend == "cudnn":  # it skips what the future and a window behind it hide, and knows no other pattern
        match parts(mask):
            case [Causal()]:
                return (length + 1) / 2
            case [Causal(), Window(size)]:
                size = min(size, length)
                return size - size * (size - 1) / (2 * length)
        return float(length)
    rows, size = length, min(BLOCK, length)
    if backend == "splash":
        rows = -(-length // LANES) * LANES
        size = max(n for n in SPLASH_SIZES if rows % n == 0)
    n = -(-rows // size)
    return len(visible_blocks(mask, n, size, n, size)) * size * size / length


def _expert_rows(config: ModelConfig, length: int, micro_batch_seqs: int, experts: ExpertProducts) -> float:
    """Rows that experts multiply for one token: its choices, and what blocks or capacities are filled up with."""
    assert config.n_experts
    if config.capacity_factor:
        return config.n_experts * capacity_of(length, config) / length
    n_tokens = micro_batch_seqs * length
    return n_rows_of(n_tokens * config.experts_per_token, config.n_experts, experts=experts) / n_tokens


def utilization(*, flops_per_token: float, tokens_per_s: float, n_devices: int, peak_flops_per_s: float) -> float:
    """MFU where the FLOPs are the model's, HFU where they are the hardware's: a fraction of the dense peak."""
    return flops_per_token * tokens_per_s / (n_devices * peak_flops_per_s)


def mfu_peak(precision: Precision) -> Literal["bf16", "f32"]:
    """The peak that utilisation is of: with linear maps in 8 bit that of bf16, as the field's tables have it, so that
    what they save shows, and all of it could pass 1."""
    return "f32" if precision == "f32" else "bf16"


def training_days(*, n_params: float, tokens: float, n_devices: int, flops_per_s_per_device: float) -> float:
    """Days to train at a given hardware rate under full recomputation: 8 T P / (n X) (Narayanan et al. 2021, eq. 4)."""
    return 8 * tokens * n_params / (n_devices * flops_per_s_per_device) / 86_400


def state_bytes_per_device(
    tree: ParamTree, layout: Layout, weights: Weights = "f32", *, offload_optimizer: bool = False
) -> dict[str, int]:
    """Parameters and AdamW's two float32 moments on one device, or in its host's memory, by the storage rules."""
    params, moments = 0, 0
    for name, param in leaves(tree):
        parts = math.prod(layout.split(e) for e in param_spec(param, layout.shape))
        params += dtype_of(name, weights).itemsize * math.prod(param.shape) // parts
        moments += 2 * 4 * math.prod(param.shape) // parts
    if offload_optimizer:
        return {"params": params, "optimizer": 0, "host": moments}
    return {"params": params, "optimizer": moments}


def traced_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matrix products in a function's traced program, loops multiplied out.

    Knows no architecture, so a new one needs no new formula. `args` may be ShapeDtypeStructs.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_flops(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2.0 * math.prod(out.shape) * math.prod(left.shape[d] for d in contracted)
            continue
        if of_kernel := kernel_flops(str(equation.source_info.name_stack), [v.aval for v in equation.invars]):
            total += of_kernel
            continue
        inner = [_jaxpr_flops(sub) for sub in jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            assert equation.primitive.name != "while" or not sum(inner), "a while loop has no length to count"
            total += sum(inner)
    return total
