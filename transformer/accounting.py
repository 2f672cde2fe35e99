"""Parameters, FLOPs and bytes in closed form, each by the convention that is named where it is used.

FLOPs are multiplications plus additions of matrix products; norms, softmax and other element-wise
work are left out, as everywhere in the field. Utilisation is achieved FLOP/s over the dense peak.

The same FLOPs are counted a second way, from the traced program, by `traced_flops`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax

from transformer.attention import Backend
from transformer.config import ModelConfig, Remat
from transformer.models import decoder_params
from transformer.params import ParamTree, leaves
from transformer.sharding import PARAMETER_RULES, Layout, spec

Attention = Literal["full", "causal", "none"]
"""How attention's products are counted. full: every query with every key, as Megatron-LM since 2022, PaLM and
Llama 3 do; causal: half of that; none: not at all, the field's 6 N."""


def n_params(config: ModelConfig) -> int:
    """All parameters as published: without the embedding's padding rows."""
    padding = (config.vocab_rows - config.vocab_size) * config.d_model * (1 if config.tied else 2)
    return sum(math.prod(p.shape) for _, p in leaves(decoder_params(config))) - padding


def n_embedding_params(config: ModelConfig) -> int:
    """Token and position tables: looked up, not multiplied. (A tied table counts here.)"""
    positions = config.max_len if config.position == "learned" else 0
    return (config.vocab_size + positions) * config.d_model


def n_matmul_params(config: ModelConfig, *, head: bool = True, padded: bool = False) -> int:
    """Parameters that every token is multiplied with: the layers' matrices and, with `head`, the logits'."""
    layers = config.n_layers * _layer_matmul_params(config)
    return layers + head * config.d_model * (config.vocab_rows if padded else config.vocab_size)


def _layer_matmul_params(config: ModelConfig) -> int:
    heads = 2 * config.n_heads + 2 * config.n_kv_heads  # queries and output; keys and values
    ways = 3 if config.ffn == "swiglu" else 2
    return config.d_model * (heads * config.d_head + ways * config.d_ff)


def keys_per_query(length: int, attention: Attention, window: int | None = None) -> float:
    """Keys that a query meets on average, by convention.

    full: min(length, window). causal: length / 2, and with a window w, w (1 - w / 2 length).

    >>> keys_per_query(2048, "full"), keys_per_query(2048, "causal"), keys_per_query(2048, "causal", 512)
    (2048.0, 1024.0, 448.0)
    """
    seen = float(min(length, window or length))
    return {"full": seen, "causal": seen * (1 - seen / (2 * length)), "none": 0.0}[attention]


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
    """Model FLOPs of one trained token: multiplied parameters (head included) and attention by convention."""
    return train_flops_per_token(
        n_params=n_matmul_params(config), n_layers=config.n_layers, n_heads=config.n_heads, d_head=config.d_head,
        length=length, attention=attention, window=config.window,
    )  # fmt: skip


def hardware_flops_per_token(config: ModelConfig, length: int, remat: Remat, backend: Backend) -> float:
    """FLOPs that the machine does for one trained token, recomputation and padding included.

    Linear maps: 2 forward, 4 backward; `full` repeats the layers' forward, but for the last map of the
    feed-forward, whose result no gradient needs. Attention, in products of length x keys x head size:
      xla    multiplies masked scores too; 2 forward, 4 backward; `dots` repeats the scores, `full` both.
      cudnn  skips what the mask empties; 2 forward, 5 backward (the kernel repeats the scores itself);
             `dots` keeps its result, `full` repeats 2.
    """
    layer = _layer_matmul_params(config)
    head = config.d_model * config.vocab_rows
    linear = 6 * (config.n_layers * layer + head)
    if remat == "full":
        linear += 2 * config.n_layers * (layer - config.d_ff * config.d_model)
    if backend == "xla":
        products, keys = {"none": 6, "dots": 7, "full": 8}[remat], float(length)
    else:
        window = min(config.window or length, length)
        products, keys = {"none": 7, "dots": 7, "full": 9}[remat], window - window * (window - 1) / (2 * length)
    return linear + 2 * products * config.n_layers * config.n_heads * config.d_head * keys


def utilization(*, flops_per_token: float, tokens_per_s: float, n_devices: int, peak_flops_per_s: float) -> float:
    """MFU where the FLOPs are the model's, HFU where they are the hardware's: a fraction of the dense peak."""
    return flops_per_token * tokens_per_s / (n_devices * peak_flops_per_s)


def training_days(*, n_params: float, tokens: float, n_devices: int, flops_per_s_per_device: float) -> float:
    """Days to train at a given hardware rate under full recomputation: 8 T P / (n X) (Narayanan et al. 2021, eq. 4)."""
    return 8 * tokens * n_params / (n_devices * flops_per_s_per_device) / 86_400


def state_bytes_per_device(tree: ParamTree, layout: Layout) -> dict[str, int]:
    """Float32 parameters and AdamW's two moments on one device, by the storage rules."""
    sizes = {axis: getattr(layout, axis) for axis in Layout.__dataclass_fields__}
    total = 0
    for _, param in leaves(tree):
        axes = [axis for axis in spec(param.dims, PARAMETER_RULES) if axis]
        total += 4 * math.prod(param.shape) // math.prod(sizes[axis] for axis in axes)
    return {"params": total, "optimizer": 2 * total}


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
        inner = [_jaxpr_flops(sub) for sub in _sub_jaxprs(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        else:
            assert equation.primitive.name != "while" or not sum(inner), "a while loop has no length to count"
            total += sum(inner)
    return total


def _sub_jaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)  # a ClosedJaxpr holds a Jaxpr
            if hasattr(item, "eqns"):
                found.append(item)
    return found
