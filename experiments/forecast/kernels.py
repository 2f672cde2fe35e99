"""What kernels multiply: matrix products, and attention, which the compiler prints as calls of which it knows only
the shapes.

Of attention two numbers decide: the products of a kernel (one of scores or values with queries, keys or values), and
the pairs of a query and a key that it does not skip. H is the head size of queries and keys, V that of values.
"""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Product(NamedTuple):
    """`batch` products of [m, k] with [k, n]."""

    m: int
    n: int
    k: int
    batch: int = 1
    dtype: str = "bf16"  # as XLA names element types; of operands of two types the narrower

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.batch


_SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}
"""Products of length H and V: q k, p v; q k, g v, ds k; q k, p g, g v, ds q. Each backward kernel makes the scores
anew, so the two together make 7 products where cuDNN's one makes 5 (`splash_attention_kernel.py`, JAX 0.10 to 0.12)."""


def attention_flops(target: str, attributes: str, operands: Sequence[tuple[int, ...]]) -> float:
    """FLOPs of a custom call as it runs, 0 where it is no attention that is known here.

    `operands`: dims of those that are floats, in order. Forward: two products. Backward: five, for it recomputes
    the scores (Dao et al. 2022).
    """
    if target.startswith("__cudnn$fmha"):
        return _cudnn(target, attributes, operands)
    splash = re.search(r"splash_m[hq]a_(fwd|dq|dkv)_", attributes)
    return _splash(splash.group(1), attributes, operands) if target == "tpu_custom_call" and splash else 0.0


def _cudnn(target: str, attributes: str, operands: Sequence[tuple[int, ...]]) -> float:
    """Of its own masks it skips what they hide: causal, and a window under it. A mask or bias that it reads from an
    array hides scores after they are computed; lengths of padding it would skip are not known before they are there."""
    dims = re.search(r'"intermediate_tensor_shape":\s*\{[^}]*?"dimensions":\s*\[([^\]]*)\]', attributes)
    assert dims is not None, target
    batch, heads, length, keys = (int(d.strip('" ')) for d in dims.group(1).split(","))
    pairs = float(length * keys)
    if re.search(r'"mask_type":\s*"(PADDING_)?CAUSAL"', attributes):
        window = re.search(r'"sliding_window_length":\s*"?(\d+)', attributes)
        pairs = seen_pairs(length, min(int(window.group(1)) if window else 0, keys) or keys)
    of_keys, of_values = (3, 2) if "Backward" in target else (1, 1)
    return 2.0 * batch * heads * pairs * (of_keys * operands[0][-1] + of_values * operands[2][-1])


def _splash(kernel: str, attributes: str, operands: Sequence[tuple[int, ...]]) -> float:
    """It skips blocks that the mask's pattern empties: `transformer.backends.splash` leaves their number in the name
    of its scope. Queries, keys and values have batch, heads, length, size; of one sequence no batch."""
    (*several, length, d_key), (*_, keys, _), (*_, d_value) = operands[:3]
    blocks = re.search(r"sees_(\d+)_of_(\d+)_blocks", attributes)
    part = int(blocks.group(1)) / int(blocks.group(2)) if blocks else 1.0
    of_keys, of_values = _SPLASH[kernel]
    return 2.0 * math.prod(several) * length * keys * part * (of_keys * d_key + of_values * d_value)


def seen_pairs(length: int, window: int) -> float:
    """(query, key) pairs under a causal mask where a query sees the last `window` positions.

    >>> seen_pairs(4, 4), seen_pairs(4, 2)
    (10.0, 7.0)
    """
    return window * (window + 1) / 2 + (length - window) * float(window)
