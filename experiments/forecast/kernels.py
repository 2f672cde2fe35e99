"""What kernels multiply: matrix products, and those of experts and attention, which the compiler prints as calls of
which it knows only the shapes.

Of attention two numbers decide: the products of a kernel (one of scores or values with queries, keys or values), and
the pairs of a query and a key that it does not skip. H is the head size of queries and keys, V that of values.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from experiments.forecast.groups import numbers
from experiments.forecast.instructions import BITS, Shape
from transformer.grouped import ROWS


class Product(NamedTuple):
    """`batch` products of [m, k] with [k, n]. `turned`: the left lies by columns and the right too, so that neither
    has the contracted dim where a kernel reads it along; as the gradients of weights have it."""

    m: int
    n: int
    k: int
    batch: int = 1
    dtype: str = "bf16"  # as XLA names element types; of operands of two types the narrower
    turned: bool = False

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.batch


def dot(left: Shape, right: Shape, attributes: str) -> Product:
    """The product of a `dot`: as XLA prints it, and in the configuration of a call to cuBLAS (`gemm_backend_config`).
    One that is ragged multiplies every row once: its groups share the rows of `left`."""

    def dims(which: str) -> tuple[int, ...]:
        found = re.search(rf"""{which}_dim(?:s=\{{|ensions":\s*\[)([\d,"\s]*)""", attributes)
        return numbers(found.group(1).replace('"', "")) if found else ()

    batch, k = (math.prod(left.dims[d] for d in dims(of)) for of in ("lhs_batch", "lhs_contracting"))
    groups = math.prod(right.dims[d] for d in dims("rhs_group"))
    m, n = left.elements // (batch * k or 1), right.elements // (batch * k * groups or 1)
    contracted = dims("lhs_contracting")[-1:], dims("rhs_contracting")[:1]
    turned = batch == 1 and (left.order[-1:], right.order[:1]) == contracted and min(m, n, k) > 1
    return Product(m, n, k, batch, narrower(left, right), turned)


def narrower(*shapes: Shape) -> str:
    """The element type that decides at which rate operands are multiplied."""
    return min((s.dtype for s in shapes), key=BITS.__getitem__)


def called_product(target: str, attributes: str, operands: Sequence[Shape]) -> Product | None:
    """Of a call to cuBLAS, and of cuDNN's product of operands scaled by blocks; None of any other call."""
    if target.startswith("__cublas$"):
        return dot(operands[0], operands[1], attributes)
    if target == "__cudnn$blockScaledDot":  # [batch, m, k] with [batch, n, k]
        left, right = operands[:2]
        *batch, m, k = left.dims
        return Product(m, right.dims[-2], k, math.prod(batch), narrower(left, right))
    return None


class Grouped(NamedTuple):
    """Experts' rows with their matrices, or with each other: one product an expert, of its even share of the rows that
    are likely to be multiplied. `part`: they, of all rows."""

    product: Product
    part: float


def grouped(target: str, attributes: str, operands: Sequence[Shape]) -> Grouped | None:
    """What a custom call multiplies if it is one of `transformer.hopper`, whose caller leaves the number of rows in the
    name of its scope; None of any other. Operands end with rows and matrices, or with two arrays of rows. A dim that is
    mapped over stands before."""
    rows = re.search(ROWS.format(r"(\d+)", r"(\d+)"), attributes)
    if target != "mosaic_gpu_v2" or not rows:
        return None
    expected, given = map(int, rows.groups())
    *_, first, left, right = operands
    mapped, dtype = left.elements // (given * left.dims[-1]), narrower(left, right)
    if len(right.dims) == len(left.dims):
        n_experts = first.dims[-1]
        product = Product(left.dims[-1], right.dims[-1], expected // n_experts, mapped * n_experts, dtype)
    else:
        n_experts, k = right.dims[-3], left.dims[-1]
        n = right.dims[-2] * right.dims[-1] // k
        product = Product(expected // n_experts, n, k, mapped * n_experts, dtype)
    return Grouped(product, expected / given)


def convolution(left: Shape, right: Shape, out: Shape, attributes: str) -> Product:
    """As the TPU compiler writes matrix products: other dims than the two of a matrix are windows.

    Input positions that meet a kernel position each and add up are contracted; those that meet one each to make an
    output each are a batch; where input or kernel has one position, the other's are rows or columns. Positions on
    padding cost nothing and are not counted. A window that is none of these (a true convolution) makes each meeting a
    product of its own.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None, attributes
    of_left, of_right, of_out = labels.groups()
    groups = _count("feature_group_count", attributes) * _count("batch_group_count", attributes)
    m, n, k, batch = (
        out.dims[of_out.index("b")], out.dims[of_out.index("f")] // groups, right.dims[of_right.index("i")], groups,
    )  # fmt: skip
    window = re.search(r"window=\{([^}]*)\}", attributes)
    windows = _windows(window.group(1) if window else "")
    for d in sorted(c for c in of_out if c.isdigit()):
        size, kernel, made = (s.dims[of.index(d)] for s, of in ((left, of_left), (right, of_right), (out, of_out)))
        met = _meetings(size, kernel, made, **windows[int(d)] if int(d) < len(windows) else {})
        if made == 1:
            k *= met
        elif kernel == 1:
            m *= met
        elif size == 1:
            n *= met
        else:
            batch *= met
    return Product(m, n, k, batch, narrower(left, right))


def _count(name: str, attributes: str) -> int:
    found = re.search(rf"{name}=(\d+)", attributes)
    return int(found.group(1)) if found else 1


def _windows(text: str) -> list[dict[str, int]]:
    fields = dict(part.split("=") for part in text.split())
    n = len(fields.get("size", "").split("x")) if fields else 0
    windows: list[dict[str, int]] = [{} for _ in range(n)]
    for key, name in (("stride", "stride"), ("lhs_dilate", "dilate"), ("rhs_dilate", "kernel_dilate"), ("pad", "pad")):
        for window, value in zip(windows, fields.get(key, "").split("x"), strict=False):
            if value:
                window[name] = int(value.split("_")[0])
    return windows


def _meetings(
    size: int, kernel: int, out: int, stride: int = 1, dilate: int = 1, kernel_dilate: int = 1, pad: int = 0
) -> int:
    """Pairs of output and kernel positions that fall on an element rather than on padding or a gap."""
    count = 0
    for k in range(kernel):
        if stride == 1 and dilate == 1:
            low = max(0, pad - k * kernel_dilate)
            count += max(0, min(out, size + pad - k * kernel_dilate) - low)
        else:
            positions = (o * stride + k * kernel_dilate - pad for o in range(out))
            count += sum(0 <= p <= (size - 1) * dilate and p % dilate == 0 for p in positions)
    return count


_SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Products of length H and V: q k, p v; q k, g v, ds k; q k, p g, g v, ds q. Each backward kernel makes the scores
anew, so the two together make 7 products where cuDNN's one makes 5 (`splash_attention_kernel.py`, JAX 0.10 to 0.12)."""


class Attention(NamedTuple):
    """A fused kernel: FLOPs as it runs, size of a head, queries of a sequence, whether it skips what a causal mask
    hides, and whether it is (a part of) the backward pass."""

    flops: float
    head: int
    length: int
    causal: bool
    backward: bool
    dtype: str


def attention(target: str, attributes: str, operands: Sequence[Shape]) -> Attention | None:
    """What a custom call multiplies as attention; None where it is none that is known here.

    `operands`: those that are floats, in order. Forward: two products. Backward: five, for it recomputes the scores
    (Dao et al. 2022).
    """
    if target.startswith("__cudnn$fmha"):
        return _cudnn(target, attributes, operands)
    splash = re.search(r"splash_m[hq]a_(fwd|dq|dkv)_", attributes)
    return _splash(splash.group(1), attributes, operands) if target == "tpu_custom_call" and splash else None


def _cudnn(target: str, attributes: str, operands: Sequence[Shape]) -> Attention:
    """Of its own masks it skips what they hide: causal, and a window under it. A mask or bias that it reads from an
    array hides scores after they are computed; lengths of padding it would skip are not known before they are there."""
    dims = re.search(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]', attributes)
    assert dims is not None, target
    batch, heads, length, keys = (int(d.strip('" ')) for d in dims.group(1).split(","))
    pairs = float(length * keys)
    causal = re.search(r'"mask_type":\s*"(PADDING_)?CAUSAL"', attributes) is not None
    if causal:
        window = re.search(r'"sliding_window_length":\s*"?(\d+)', attributes)
        pairs = seen_pairs(length, min(int(window.group(1)) if window else 0, keys) or keys)
    backward = "Backward" in target
    of_keys, of_values = (3, 2) if backward else (1, 1)
    head, d_value = operands[0].dims[-1], operands[2].dims[-1]
    flops = 2.0 * batch * heads * pairs * (of_keys * head + of_values * d_value)
    return Attention(flops, head, length, causal, backward, operands[0].dtype)


def _splash(kernel: str, attributes: str, operands: Sequence[Shape]) -> Attention:
    """It skips blocks that the mask's pattern empties: `transformer.kernels.splash` leaves their number in the name
    of its scope. Queries, keys and values have batch, heads, length, size; of one sequence no batch."""
    (*several, length, head), (*_, keys, _), (*_, d_value) = (shape.dims for shape in operands[:3])
    blocks = re.search(r"sees_(\d+)_of_(\d+)_blocks", attributes)
    part = int(blocks.group(1)) / int(blocks.group(2)) if blocks else 1.0
    of_keys, of_values = _SPLASH[kernel]
    flops = 2.0 * math.prod(several) * length * keys * part * (of_keys * head + of_values * d_value)
    return Attention(flops, head, length, part < 1, kernel != "fwd", operands[0].dtype)


def seen_pairs(length: int, window: int) -> float:
    """(query, key) pairs under a causal mask where a query sees the last `window` positions.

    >>> seen_pairs(4, 4), seen_pairs(4, 2)
    (10.0, 7.0)
    """
    return window * (window + 1) / 2 + (length - window) * float(window)
