"""cuDNN's attention kernel, forward with the log of every query's normalizer, backward from a given one.

JAX's public function does neither: it rounds the normalizer to the results' 16 bit, and its gradient is that of the
keys it was given alone. Who sums over keys in several calls needs both (`chunkwise.py`), so what lies below it is
called here, and nowhere else; of JAX 0.10 to 0.12 only the argument `score_mod` is newer.

Letters: B batch, L query length, S key length, N query heads, K kv heads, H head size of all three.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as below
from jaxtyping import Array, Float

from transformer.errors import RequestError


@contextmanager
def refusals() -> Iterator[None]:
    """What the installed cuDNN, or an older GPU, cannot is a RequestError."""
    try:
        yield
    except NotImplementedError as error:
        raise RequestError(f"--attention=cudnn: {str(error).rstrip('.')}; nearest: --attention=blockwise") from error


def forward(
    q: Float[Array, "B L N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *, scale: float, causal: bool
) -> tuple[Float[Array, "B L N H"], Float[Array, "B N L"]]:
    """The result in q's dtype, and log sum exp of every query's scores in float32. RequestError as of `refusals`."""
    with refusals():
        found: Any = below.dot_product_attention(
            q, k, v, scale=scale, mask_type=_mask_type(causal), return_residual=True
        )
    return tuple(found)


def backward(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B L N H"],
    normalizer: Float[Array, "B N L"],
    d_out: Float[Array, "B L N H"],
    *,
    scale: float,
    causal: bool,
) -> tuple[Float[Array, "B L N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Gradients of q, k and v, in their dtypes, as far as these keys have a part in them: with `out` and `normalizer`
    of all keys, weights are exp(scores - normalizer)."""
    absent = jnp.zeros(0, q.dtype)  # bias, lengths, offsets, pages
    newer = "score_mod" in inspect.signature(below._dot_product_attention_bwd_rule).parameters
    return tuple(
        below._dot_product_attention_bwd_p_wrapper.bind(
            q, k, v, *[absent] * 7, normalizer, out, d_out, scale=scale, seed=0, dropout_rate=0.0,
            variadic_args=(False, False), mask_type=_mask_type(causal), layout=below.AttentionLayout.BTNH.value,
            sliding_window_length=None, **({"score_mod": None} if newer else {}),
        )
    )  # fmt: skip


def _mask_type(causal: bool) -> below.MaskType:
    return below.MaskType.CAUSAL if causal else below.MaskType.NO_MASK
