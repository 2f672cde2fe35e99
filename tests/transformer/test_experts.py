"""The router by hand, experts against loops over tokens, loads, and biases that follow them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transformer.config import ModelConfig
from transformer.dropless import BLOCKS, block_size, n_blocks_of
from transformer.experts import (
    Choice,
    Load,
    capacity_of,
    expert_params,
    load_of,
    mixture,
    rebalanced,
    route,
)
from transformer.feed_forward import activate
from transformer.placement import UNSHARDED

pytestmark = pytest.mark.usefixtures("strict_dtypes")

few = settings(max_examples=200, deadline=None, derandomize=True)


def model(**changes: Any) -> ModelConfig:
    shape = {"d_model": 7, "n_heads": 1, "n_kv_heads": 1, "d_head": 2, "d_ff": 3, "vocab_size": 16, "max_len": 8}
    return ModelConfig(n_layers=2, **shape | {"n_experts": 5, "experts_per_token": 2} | changes)


def weights(config: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for name, p in expert_params(config).items()}


def tokens(batch: int = 2, length: int = 11, d_model: int = 7, seed: int = 1) -> jax.Array:
    """Unlike in their mean, so that experts are chosen unevenly and some hardly at all."""
    return jnp.asarray(np.random.default_rng(seed).normal(0.7, 1, (batch, length, d_model)), jnp.float32)


def routed(odds: list[float], bias: list[float] | None = None, **changes: Any) -> tuple[list[int], np.ndarray]:
    """What the router makes of one token: with a router of ones x is the logits, and e^x are the odds."""
    E = len(odds)
    params = {"w_router": jnp.eye(E)} | ({"b_router": jnp.asarray(bias)} if bias else {})
    x = jnp.log(jnp.asarray(odds))[None, None]
    config = model(d_model=E, n_experts=E, **changes)
    choice = jax.jit(lambda params, x: route(params, x, config))(params, x)
    return choice.experts[0, 0].tolist(), np.asarray(choice.weights[0, 0])


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [4 / 7, 3 / 7]),
        ({"router_normalize": False}, [0.4, 0.3]),
        ({"router_scale": 2.5}, [10 / 7, 7.5 / 7]),
        ({"router_normalize": False, "router_scale": 2.5}, [1.0, 0.75]),
    ],
)
def test_softmax_router_by_hand(changes, want):
    """Odds 1 : 3 : 2 : 4 are shares of tenths."""
    experts, got = routed([1, 3, 2, 4], **changes)
    assert experts == [3, 1]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_sigmoid_router_by_hand():
    """Odds 1, 3, 1/3, 9 are 0.5, 0.75, 0.25, 0.9, each by itself."""
    experts, got = routed([1, 3, 1 / 3, 9], router="sigmoid", router_normalize=False)
    assert experts == [3, 1]
    np.testing.assert_allclose(got, [0.9, 0.75], rtol=1e-6)
    np.testing.assert_allclose(routed([1, 3, 1 / 3, 9], router="sigmoid")[1], [0.9 / 1.65, 0.75 / 1.65], rtol=1e-6)


def test_a_bias_moves_the_choice_and_no_weight():
    """0.25 + 0.6 and 0.75 + 0.1 are now next to 0.9; what they weigh stays."""
    experts, got = routed([1, 3, 1 / 3, 9], [0, 0, 0.6, 0], router="sigmoid", router_normalize=False)
    assert experts == [3, 2]
    np.testing.assert_allclose(got, [0.9, 0.25], rtol=1e-6)
    params = {"w_router": jnp.eye(4), "b_router": jnp.asarray([0.1, 0.0, 0.6, 0.0])}

    def weight(params):
        return route(params, jnp.zeros((1, 1, 4)), model(d_model=4, n_experts=4, router="sigmoid")).weights[0, 0, 0]

    assert not jax.jit(jax.grad(weight))(params)["b_router"].any()


def test_groups_by_hand():
    """Two groups of three. Softmax takes the one with the best expert, sigmoid the one with the best two."""
    odds = [40, 1, 4, 30, 20, 5]
    assert routed(odds)[0] == [0, 3]
    assert routed(odds, router_groups=2, router_top_groups=2)[0] == [0, 3]
    assert routed(odds, router_groups=2, router_top_groups=1)[0] == [0, 2]
    assert routed(odds, router_groups=3, router_top_groups=1)[0] == [0, 1]
    assert routed([1, 3, 1 / 3, 9], router="sigmoid", router_groups=4, router_top_groups=2)[0] == [3, 1]  # each alone
    # 0.9, 0.1, 0.05 against 0.5, 0.45, 0.4: 1.0 is more than 0.95, though 1.05 in all is less than 1.35
    odds = [p / (1 - p) for p in (0.9, 0.1, 0.05, 0.5, 0.45, 0.4)]
    sigmoid = {"router": "sigmoid", "router_groups": 2, "router_top_groups": 1}
    assert routed(odds, **sigmoid)[0] == [0, 1]
    assert routed(odds, [0, 0, 0, 0.06, 0, 0], **sigmoid)[0] == [3, 4]  # the bias chooses groups too


def one_expert(params: Any, e: int, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    up = x @ params["w_up"][e]
    if config.gated:
        gate = x @ params["w_gate"][e]
        return (gate / (1 + np.exp(-gate)) * up) @ params["w_down"][e]
    return np.maximum(up, 0) ** 2 @ params["w_down"][e]


def by_loops(params: Any, x: Any, config: ModelConfig) -> tuple[np.ndarray, int]:
    """One token after another: its best experts' results by their shares, if they still take one. And the drops."""
    params, x = jax.tree.map(np.asarray, params), np.asarray(x)
    out, dropped = np.zeros_like(x), 0
    for b in range(len(x)):
        room = dict.fromkeys(range(config.n_experts), math.inf)
        if config.capacity_factor:
            even = x.shape[1] * config.experts_per_token / config.n_experts
            room = dict.fromkeys(room, min(x.shape[1], math.ceil(config.capacity_factor * even)))
        for i in range(x.shape[1]):
            odds = np.exp(x[b, i] @ params["w_router"])
            best = sorted(range(config.n_experts), key=lambda e, odds=odds: -odds[e])[: config.experts_per_token]
            for e in best:
                if room[e] > 0:
                    out[b, i] += (
                        odds[e]
                        / (odds[best] if config.router_normalize else odds).sum()
                        * one_expert(params, e, x[b, i], config)
                    )
                else:
                    dropped += 1
                room[e] -= 1
            if config.n_shared_experts:
                shared = {name.removeprefix("shared_"): p[None] for name, p in params.items() if "shared" in name}
                out[b, i] += one_expert(shared, 0, x[b, i], config)
    return out, dropped


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ffn": "relu2", "experts_per_token": 1, "n_experts": 3, "router_normalize": False},
        {"experts_per_token": 5, "d_expert": 4},
        {"n_experts": 23, "n_shared_experts": 2},  # more experts than a sequence fills
    ],
    ids=str,
)
def test_dropless_equals_a_loop_over_the_tokens(changes):
    config = model(**changes)
    params, x = weights(config), tokens()
    got, _ = jax.jit(lambda p, x: mixture(p, x, jnp.ones(x.shape[:2]), config=config, shard=UNSHARDED))(params, x)
    want, dropped = by_loops(params, x, config)
    assert dropped == 0
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("factor", [0.4, 1.0, 1.3, 9.0])
def test_capacity_drops_exactly_the_tokens_that_a_loop_says(factor):
    """Each sequence by itself: the first so many that chose an expert."""
    config = model(capacity_factor=factor, n_shared_experts=1)
    params, x = weights(config), tokens()
    got, load = jax.jit(lambda p, x: mixture(p, x, jnp.ones(x.shape[:2]), config=config, shard=UNSHARDED))(params, x)
    want, dropped = by_loops(params, x, config)
    assert (dropped == 0) == (factor == 9)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert float(load.counts.sum()) == x.shape[0] * x.shape[1] * 2  # what was dropped was chosen all the same


def test_capacity_is_rounded_up_and_never_more_than_the_sequence():
    assert [capacity_of(11, model(capacity_factor=factor)) for factor in (0.2, 1.0, 1.25, 9.0)] == [1, 5, 6, 11]


@pytest.mark.parametrize("changes", [{"router": "sigmoid", "ffn": "geglu"}, {"capacity_factor": 1.0}], ids=str)
def test_gradient_equals_that_of_every_expert_run_on_every_token(changes):
    """y = sum over all e of share_e(x) f_e(x), where the share of those that were not chosen, or full, is 0."""
    config = model(n_shared_experts=None, **changes)
    params, x, direction = weights(config), tokens(), tokens(seed=3)
    E, k = 5, 2

    def loss(params, x):
        return (mixture(params, x, jnp.ones(x.shape[:2]), config=config, shard=UNSHARDED)[0] * direction).sum()

    def plain(params, x):
        choice = route(params, x, config)
        chosen = jax.nn.one_hot(choice.experts, E)  # B L k E
        if config.capacity_factor:
            place = jnp.cumsum(chosen.reshape(2, -1, E), axis=1).reshape(chosen.shape)
            chosen = jnp.where(place <= math.ceil(config.capacity_factor * 11 * k / E), chosen, 0)
        share = (chosen * choice.weights[..., None]).sum(2)
        up, gate = (jnp.einsum("bld,edf->blef", x, params[name]) for name in ("w_up", "w_gate"))
        results = jnp.einsum("blef,efd->bled", activate(up, gate, config.ffn), params["w_down"])
        return ((share[..., None] * results).sum(2) * direction).sum()

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, x) for f in (loss, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, want)
    assert all(np.abs(g).max() > 0.01 for g in jax.tree.leaves(want[1]))


def test_dropless_keeps_products_and_no_copies_of_weights_for_the_backward_pass():
    """Blocks pick their expert's matrices: kept, they would be a copy of an expert for every block."""
    config = model(d_model=24, d_ff=40, n_experts=2)
    params, x = weights(config), tokens(length=64, d_model=24)

    def loss(params, x):
        return mixture(params, x, jnp.ones(x.shape[:2]), config=config, shard=UNSHARDED)[0].sum()

    n_blocks = n_blocks_of(2 * 64 * 2, 2)
    kept = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda *at: jax.vjp(loss, *at)[1], params, x))]
    assert [shape for shape in kept if shape[:1] == (n_blocks,)]  # the products of every block
    assert not [shape for shape in kept if shape[:1] == (n_blocks,) and shape[-2:] in ((24, 40), (40, 24))]


def choice_of(experts: list[list[list[int]]], probs: Any) -> Choice:
    chosen = jnp.asarray(experts)
    return Choice(chosen, jnp.ones(chosen.shape), jnp.asarray(probs, jnp.float32))


def test_balance_is_1_when_even_and_the_number_of_experts_when_all_go_to_one():
    valid = jnp.ones((2, 4))
    even = choice_of([[[e] for e in range(4)]] * 2, np.full((2, 4, 4), 0.25))
    assert load_of(even, 4, valid).balance == pytest.approx(1)
    one = choice_of([[[2]] * 4, [[1]] * 4], np.eye(4)[[[2] * 4, [1] * 4]])  # each sequence has its own
    load = load_of(one, 4, valid)
    assert load.balance == pytest.approx(4)
    assert load.counts.tolist() == [0, 4, 4, 0]
    two = choice_of([[[0, 3]] * 4] * 2, np.tile([0.5, 0, 0, 0.5], (2, 4, 1)))  # k = 2: all to the same two
    assert load_of(two, 4, valid).balance == pytest.approx(2)


def test_balance_by_hand():
    """Choices 0, 0, 1 of 2 experts, mean probabilities 0.6 and 0.4: 2 (2/3 0.6 + 1/3 0.4); sigmoids as shares."""
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]]])
    for scale in (1.0, 0.5):
        load = load_of(choice_of([[[0], [0], [1]]], scale * probs), 2, jnp.ones((1, 3)))
        assert load.balance == pytest.approx(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_padding_counts_for_nothing():
    probs = np.array([[[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.0, 1.0], [0.5, 0.5]]])
    padded = load_of(choice_of([[[0], [0], [1], [1], [1]]], probs), 2, jnp.asarray([[1.0, 1, 1, 0, 0]]))
    alone = load_of(choice_of([[[0], [0], [1]]], probs[:, :3]), 2, jnp.ones((1, 3)))
    np.testing.assert_allclose(padded.balance, alone.balance, rtol=1e-6)
    assert padded.counts.tolist() == alone.counts.tolist() == [2, 1]
    empty = load_of(choice_of([[[0]]], [[[1.0, 0.0]]]), 2, jnp.zeros((1, 1)))
    assert float(empty.balance) == 0


def test_biases_move_by_the_sign_of_what_an_expert_lacks():
    """Two layers, as a stack stores them: means of 4 and 2 tokens."""
    counts = jnp.asarray([[7.0, 4, 1], [0, 3, 3]])
    loads = {"decoder": {"block_0": {"layer_1": Load(jnp.zeros(2), counts)}}}
    experts = {"b_router": jnp.asarray([[0.0, 1, 2], [0, 0, 0]]), "w_up": jnp.ones(1)}
    other = {"layer_0": {"ffn": jnp.ones(2)}, "layer_1": {"experts": experts, "norm": jnp.ones(3)}}
    params = {"decoder": {"block_0": other, "final_norm": jnp.ones(5)}, "embedding": jnp.ones(7)}
    got = rebalanced(params, loads, 0.25)
    moved = got["decoder"]["block_0"]["layer_1"]["experts"]
    assert moved["b_router"].tolist() == [[-0.25, 1, 2.25], [0.25, -0.25, -0.25]]
    moved["b_router"] = experts["b_router"]
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True))


@few
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.sampled_from(["loop", "grouped"]))
def test_blocks_suffice_however_the_tokens_fall(counts, experts):
    n_slots, n_experts = sum(counts), len(counts)
    block, (least, most) = block_size(n_slots, n_experts, experts), BLOCKS[experts]
    n_blocks = n_blocks_of(n_slots, n_experts, experts=experts)
    assert least <= block <= most
    assert sum(math.ceil(count / block) for count in counts) <= n_blocks
    assert block * n_blocks <= n_slots + n_experts * min(most, max(least, n_slots / n_experts))


def test_the_table_has_what_is_asked_for():
    plain = set(expert_params(model()))
    assert plain == {"w_router", "w_up", "w_down", "w_gate"}
    assert plain - set(expert_params(model(ffn="relu"))) == {"w_gate"}
    assert set(expert_params(model(balance_rate=0.1))) - plain == {"b_router"}
    shared = expert_params(model(n_shared_experts=2, d_expert=5))
    assert set(shared) - plain == {"shared_w_up", "shared_w_down", "shared_w_gate"}
    assert (shared["w_up"].shape, shared["shared_w_up"].shape) == ((5, 7, 5), (7, 10))
