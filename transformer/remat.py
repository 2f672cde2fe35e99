"""What the forward pass keeps for the backward one, tensor by tensor.

    none    everything, as differentiation asks for it
    dots    outputs of the weights' matrix products and of attention, with what its kernel's backward pass needs: only
            element-wise work, and for plain attention its scores, are redone
    full    each layer's input alone (Chen et al. 2016)

Behind `dots` and `full` the fate of single tensors of a layer may be given: `full,ffn_up:save,layer_input:offload`.

    save       kept on the device
    recompute  made again when the backward pass asks for it
    offload    kept in the host's memory, and fetched when the backward pass asks for it

A tensor has the name under which `products.linear` and others mark it (`jax.ad_checkpoint.checkpoint_name`).
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, cast, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

from transformer.errors import RequestError, nearest

Base = Literal["none", "dots", "full"]
Fate = Literal["save", "recompute", "offload"]

LAYER_INPUT = "layer_input"
ATTENTION_OUTPUT = "attention_output"
EXPERT_PRODUCT = "expert_product"

TENSORS: Mapping[str, str] = {
    LAYER_INPUT: "the stream as the layer takes it; kept in any case",
    "queries": "of attention", "keys": "of attention", "values": "of attention",
    "latents": "of latent attention, before they are queries, keys and values",
    ATTENTION_OUTPUT: "the heads' outputs, with what the kernel's backward pass needs",
    "attention_projection": "those mapped back to the stream",
    "ffn_up": "of the feed-forward, before the non-linearity; of shared experts too",
    "ffn_gate": "of gated ones, before the non-linearity",
    "ffn_down": "mapped back to the stream",
    "router": "scores of experts",
    EXPERT_PRODUCT: "of experts, the products with all of their matrices",
}  # fmt: skip
"""Tensors of a layer whose fate can be chosen."""


@cache
def fates(remat: str) -> Mapping[str, Fate]:
    """Of every tensor; of "none" nothing, for it keeps what has no name too. RequestError for what cannot be."""
    base, *given = remat.split(",")
    if base not in get_args(Base):
        raise RequestError(f"--remat={remat}: {base!r} is not none|dots|full; {nearest(base, get_args(Base))}")
    if base == "none":
        if given:
            raise RequestError(f"--remat={remat}: none keeps everything and chooses nothing; nearest: dots,{given[0]}")
        return {}
    chosen: dict[str, Fate] = dict.fromkeys(TENSORS, "save" if base == "dots" else "recompute")
    chosen[LAYER_INPUT] = "save"
    seen = set()
    for part in given:
        tensor, _, fate = part.partition(":")
        if tensor not in TENSORS:
            raise RequestError(f"--remat={remat}: a layer has no tensor {tensor!r}; {nearest(tensor, TENSORS)}")
        if fate not in get_args(Fate):
            raise RequestError(f"--remat={remat}: {part!r} says no fate; expected {tensor}: save, recompute or offload")
        if tensor in seen:
            raise RequestError(f"--remat={remat}: the fate of {tensor!r} is given twice")
        if (tensor, fate) == (LAYER_INPUT, "recompute"):
            raise RequestError(f"--remat={remat}: a layer starts from its input; nearest: {tensor}:offload")
        seen.add(tensor)
        chosen[tensor] = cast(Fate, fate)
    return chosen


def base_of(remat: str) -> str:
    """none, dots or full."""
    return remat.partition(",")[0]


def offloaded(remat: str) -> list[str]:
    """Tensors that go to the host's memory."""
    return [name for name, fate in fates(remat).items() if fate == "offload"]


def policy(remat: str) -> Callable[..., Any]:
    """The policy of `jax.checkpoint` that gives every tensor its fate. ("none" has no policy.)"""
    chosen = fates(remat)
    by_name = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name, fate in chosen.items() if fate == "save"],
        names_which_can_be_offloaded=offloaded(remat), offload_src="device", offload_dst="pinned_host",
    )  # fmt: skip
    naming = jax.make_jaxpr(lambda x: checkpoint_name(x, LAYER_INPUT))(0.0).eqns[0].primitive

    def fate_of(primitive: Any, *args: Any, **params: Any) -> Any:
        if "dot_product_attention_fwd" in primitive.name:  # cuDNN's kernel has no name for what it keeps
            return by_name(naming, name=ATTENTION_OUTPUT)
        return by_name(primitive, *args, **params)

    return fate_of
