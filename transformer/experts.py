"""Mixture of experts: many feed-forwards, of which a router picks a few for every token.

    y = sum over the chosen e of weight_e(x) feed_forward_e(x)   (+ shared experts that every token passes)

Shazeer et al. 2017; Fedus et al. 2021 (Switch); Mixtral (Jiang et al. 2024); DeepSeek-V2 and V3 (2024).

Tokens are sorted by expert, so that each expert multiplies a contiguous run of them:
  dropless   nothing is dropped, FLOPs are those of the chosen experts (`dropless.py`).
  capacity   every expert takes the first `capacity_factor` times its even share of each sequence; the rest is
             dropped, and such a token keeps what the residual stream has of it (Lepikhin et al. 2020, GShard).
The same tokens are dropped whatever the layout: capacity is of a sequence, never of a device.

Letters: B batch, L length, D model, E experts, k experts of a token, F hidden width, C capacity; P devices that hold
different sequences.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from transformer.config import ExpertProducts, ModelConfig, Precision
from transformer.dropless import dropless, exchanged, runs_of
from transformer.feed_forward import activate, feed_forward, feed_forward_params
from transformer.params import Param, Params, declare, weight, zeros
from transformer.placement import UNSHARDED, Shard
from transformer.products import linear, product
from transformer.remat import EXPERT_PRODUCT

WAYS = ("w_gate", "w_up", "w_down")  # the matrices of an expert


class Choice(NamedTuple):
    """What the router says: for every token its k experts, and their weights."""

    experts: Int[Array, "B L k"]
    weights: Float[Array, "B L k"]
    probs: Float[Array, "B L E"]  # of all experts, before the choice


class Load(NamedTuple):
    """What a layer's router leaves behind for the loss and for its balance."""

    balance: Float[Array, ""]  # mean over sequences of E sum_e f_e P_e: 1 when even
    counts: Float[Array, " E"]  # tokens that chose each expert


def expert_params(config: ModelConfig) -> Mapping[str, Param]:
    """A router, and the weights of all experts stacked; shared experts are one wider feed-forward beside."""
    D, E, F = config.d_model, config.n_experts, config.expert_size
    assert E is not None
    table = {
        "w_router": weight(config, (D, E), ("embed", "channel"), fan_in=D, fan_out=E),
        "w_up": weight(config, (E, D, F), ("experts", "expert_embed", "ffn"), fan_in=D, fan_out=F),
        "w_down": weight(config, (E, F, D), ("experts", "ffn", "expert_embed"), fan_in=F, fan_out=D, residual=True),
    }
    if config.gated:
        table["w_gate"] = weight(config, (E, D, F), ("experts", "expert_embed", "ffn"), fan_in=D, fan_out=F)
    if config.balance_rate:
        table["b_router"] = Param((E,), ("channel",), zeros)
    if config.n_shared_experts:
        shared = feed_forward_params(config, config.n_shared_experts * F)
        table |= {f"shared_{name}": param for name, param in shared.items()}
    return table


def route(params: Params, x: Float[Array, "B L D"], config: ModelConfig, shard: Shard = UNSHARDED) -> Choice:
    """The k experts with the highest scores, softmax or sigmoid of x W_router, in float32.

    A bias that only the choice sees evens out the loads (Wang et al. 2024; DeepSeek-V3, eq. 16). With groups, the
    choice is among the experts of the best ones: those whose best score (DeepSeek-V2, sec. 2.2.2), or with
    sigmoid scores whose best two, are highest (DeepSeek-V3's code).
    """
    logits = linear("bld,de->ble", x.astype(jnp.float32), params["w_router"].astype(jnp.float32), "router")
    probs = jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    rank = jax.lax.stop_gradient(probs)
    if "b_router" in params:
        rank = rank + jax.lax.stop_gradient(params["b_router"].astype(jnp.float32))[None, None]
    dims = ("batch", "length", "channel")  # by itself the compiler would gather all tokens' scores to rank them
    experts = shard.local(partial(_best, config=config), [dims], dims)(rank)
    weights = jnp.take_along_axis(probs, experts, axis=-1)
    if config.router_normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return Choice(experts, weights * config.router_scale, probs)


def _best(rank: Float[Array, "B L E"], config: ModelConfig) -> Int[Array, "B L k"]:
    if config.router_groups and config.router_top_groups:
        grouped = rank.reshape(*rank.shape[:2], config.router_groups, -1)
        several = min(2 if config.router == "sigmoid" else 1, grouped.shape[-1])
        best = jax.lax.top_k(grouped, several)[0].sum(-1)
        least = jax.lax.top_k(best, config.router_top_groups)[0][..., -1:]
        rank = jnp.where((best >= least)[..., None], grouped, -jnp.inf).reshape(rank.shape)
    return jax.lax.top_k(rank, config.experts_per_token)[1]


def load_of(choice: Choice, n_experts: int, valid: Float[Array, "B L"]) -> Load:
    """How evenly the tokens spread, each sequence by itself (DeepSeek-V3, eqs. 17-20; Fedus et al. 2021, eq. 4).

    f_e is the share of a sequence's choices that fell on e, P_e its mean probability; both of valid tokens alone.
    By sequence, and not by batch, so that neither layout nor microbatches change it.
    """
    k = choice.experts.shape[-1]
    chosen_BLE = jax.nn.one_hot(choice.experts, n_experts, dtype=jnp.float32).sum(2) * valid[:, :, None]
    n_tokens = jnp.maximum(valid.sum(1), 1)[:, None]
    f_BE = chosen_BLE.sum(1) / (k * n_tokens)
    probs = choice.probs / (choice.probs.sum(-1, keepdims=True) + 1e-20)
    p_BE = (probs * valid[:, :, None]).sum(1) / n_tokens
    return Load(n_experts * (f_BE * p_BE).sum(-1).mean(), chosen_BLE.sum((0, 1)))


def _rows(x: Float[Array, "B L D"], index: Int[Array, "B n"]) -> Float[Array, "B n D"]:
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


def _by_capacity(
    x: Float[Array, "B L D"], experts: Int[Array, "B L k"], run: Callable[..., Array], n_experts: int, capacity: int
) -> tuple[Float[Array, "B Lk D"], Float[Array, "B Lk"]]:
    """Every slot's result, and whether it was kept."""
    B, L, k = experts.shape
    slots = experts.reshape(B, -1)
    runs = jax.vmap(partial(runs_of, n_experts=n_experts))(slots)
    c = jnp.arange(capacity)
    source = jnp.minimum(runs.start[:, :, None] + c[None, None], L * k - 1)  # B E C
    filled = c[None, None] < runs.counts[:, :, None]
    tokens = jnp.take_along_axis(runs.order, source.reshape(B, -1), axis=1) // k
    inputs = _rows(x, tokens).reshape(B, n_experts, capacity, -1)
    inputs = jnp.where(filled[..., None], inputs, 0)
    outputs = run(inputs).reshape(B, n_experts * capacity, -1)
    kept = runs.place < capacity
    return _rows(outputs, slots * capacity + jnp.minimum(runs.place, capacity - 1)), kept.astype(jnp.float32)


def capacity_of(length: int, config: ModelConfig) -> int:
    """Tokens of one sequence that an expert takes: ceil(factor * length * k / E)."""
    assert config.capacity_factor
    assert config.n_experts
    even = length * config.experts_per_token / config.n_experts
    return min(length, math.ceil(config.capacity_factor * even))


def mixture(
    params: Params, x: Float[Array, "B L D"], valid: Float[Array, "B L"], *, config: ModelConfig,
    shard: Shard, precision: Precision = "bf16", experts: ExpertProducts = "loop",
) -> tuple[Float[Array, "B L D"], Load]:  # fmt: skip
    """The chosen experts' weighted sum, and how the choices fell. `experts`: how dropless ones are multiplied."""
    B, L, D = x.shape
    E, k = config.n_experts, config.experts_per_token
    assert E is not None
    choice, narrow = route(params, x, config, shard), partial(linear, precision=precision)
    if config.capacity_factor:
        rest = "channel", "channel"

        def run(inputs: Array) -> Array:
            up = narrow("becd,edf->becf", inputs, params["w_up"], EXPERT_PRODUCT)
            gate = narrow("becd,edf->becf", inputs, params["w_gate"], EXPERT_PRODUCT) if config.gated else None
            hidden = shard.activation(activate(up, gate, config.ffn), "expert_batch", "experts", "channel", "ffn")
            return product("becf,efd->becd", hidden, params["w_down"], precision)

        def there(inputs: Array) -> Array:
            """Where the experts are, and back: both places named each time, or weights might travel instead. Results
            are kept at home, where they are read: of those away the compiler would bring back all layers' each time."""
            at_home, away = ("batch", "channel"), ("expert_batch", "experts")
            inputs = shard.activation(shard.activation(inputs, *at_home, *rest), *away, *rest)
            results = shard.activation(shard.activation(run(inputs), *away, *rest), *at_home, *rest)
            return checkpoint_name(results, EXPERT_PRODUCT)

        y, kept = _by_capacity(x, choice.experts, there, E, capacity_of(L, config))
        weights = choice.weights.reshape(B, L * k) * kept
        out = (y * weights[:, :, None].astype(y.dtype)).reshape(B, L, k, D).sum(2)
    else:
        out = _dropless(params, x, choice, config, precision, experts, shard)
    if config.n_shared_experts:
        shared = {name.removeprefix("shared_"): p for name, p in params.items() if name.startswith("shared_")}
        out = out + feed_forward(shared, x, config=config, linear=narrow, shard=shard)
    return out, load_of(choice, E, valid)


def _dropless(
    params: Params, x: Float[Array, "B L D"], choice: Choice, config: ModelConfig, precision: Precision,
    experts: ExpertProducts, shard: Shard,
) -> Float[Array, "B L D"]:  # fmt: skip
    """Every device sorts its own tokens, and multiplies them with its part of the hidden units."""
    n_shards = shard.expert_shards
    P, C = shard.batch_shards // n_shards, shard.context_shards
    tokens = ("batch", "length", "channel")
    dims = {name: ("experts", "ffn", "channel") if name == "w_down" else ("experts", "channel", "ffn") for name in WAYS}
    names = [name for name in WAYS if name in params]
    # Each group has the weights to itself, so that no gradient travels before all blocks have added to it.
    mine = [jnp.broadcast_to(params[name][None, None], (P, C, *params[name].shape)) for name in names]

    def here(x: Array, chosen: Array, weights: Array, *mine: Array) -> Array:
        run = dropless if n_shards == 1 else partial(exchanged, n_shards=n_shards, axis="expert")
        w = {name: w[0, 0] for name, w in zip(names, mine, strict=True)}
        flat = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
        y = run(*flat, w, ffn=config.ffn, precision=precision, experts=experts).reshape(*chosen.shape, -1)
        return (y * weights[..., None].astype(y.dtype)).sum(-2)[None]

    run = shard.local(
        here, [tokens, tokens, tokens, *(("expert_batch", "length", *dims[name]) for name in names)], ("ffn", *tokens)
    )
    return run(x, choice.experts, choice.weights, *mine).sum(0)


def rebalanced(params: Mapping[str, Any], loads: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Parameters whose router biases moved by `rate` towards an even load (Wang et al. 2024; DeepSeek-V3, sec. 2.1.2):
    up for experts that fewer tokens than the mean chose, down for those of more. `loads` is of a whole batch."""
    moved = dict(params)
    for name, load in loads.items():
        if isinstance(load, Load):
            experts = dict(params[name]["experts"])
            behind = load.counts.mean(-1, keepdims=True) - load.counts
            experts["b_router"] = experts["b_router"] + rate * jnp.sign(behind)
            moved[name] = {**params[name], "experts": experts}
        else:
            moved[name] = rebalanced(params[name], load, rate)
    return moved


class Experts(nn.Module):
    """Names and initialises the parameters of `mixture`."""

    config: ModelConfig
    shard: Shard
    precision: Precision = "bf16"
    experts: ExpertProducts = "loop"

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], valid: Float[Array, "B L"]) -> tuple[Float[Array, "B L D"], Load]:
        table = expert_params(self.config)
        params = self.shard.weights(declare(self, table), table)
        return mixture(
            params, x, valid, config=self.config, precision=self.precision, experts=self.experts, shard=self.shard
        )
