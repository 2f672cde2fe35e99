"""Cross-entropy by chunks against the formula on whole logits, and what it holds; the balance of experts."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer import losses
from transformer.accounting import traced_flops
from transformer.config import ModelConfig
from transformer.experts import Load
from transformer.losses import balance, cross_entropy
from transformer.models import Head
from transformer.placement import UNSHARDED, Unsharded

pytestmark = pytest.mark.usefixtures("strict_dtypes")

B, L, D, V = 2, 11, 5, 13


def model(**changes: Any) -> ModelConfig:
    shape = {"d_model": D, "n_heads": 1, "n_kv_heads": 1, "d_head": 2, "d_ff": 2, "max_len": 8}
    return ModelConfig(n_layers=1, vocab_size=V, **shape | {"vocab_multiple": 1} | changes)


def arrays(config: ModelConfig, *, bias: bool = True) -> tuple[jax.Array, Head, jax.Array, jax.Array]:
    """x, head, targets, weights; what a padding row would say is what would win."""
    rng = np.random.default_rng(0)
    rows = config.vocab_rows
    w, b = rng.normal(size=(D, rows)), rng.normal(size=rows)
    w[:, V:], b[V:] = 50, 50
    head = Head(jnp.asarray(w, jnp.float32), jnp.asarray(b, jnp.float32) if bias else None)
    targets = jnp.asarray(rng.integers(0, V, (B, L)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (B, L)), jnp.float32)
    return jnp.asarray(rng.normal(size=(B, L, D)), jnp.float32), head, targets, weights


def formula(x, head, targets, weights, config: ModelConfig) -> jax.Array:
    """On whole logits of real tokens, with optax's cross-entropy and its smoothed labels."""
    z = jnp.einsum("bld,dv->blv", x, head.w[:, :V])
    z = z if head.bias is None else z + head.bias[None, None, :V]
    z = z * (config.logit_scale or 1)
    z = z if config.logit_cap is None else config.logit_cap * jnp.tanh(z / config.logit_cap)
    labels = optax.smooth_labels(jax.nn.one_hot(targets, V), config.label_smoothing)
    loss = optax.softmax_cross_entropy(z, labels) + config.z_loss * jax.nn.logsumexp(z, axis=-1) ** 2
    return (loss * weights).sum()


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"vocab_multiple": 8},
    "smoothed": {"label_smoothing": 0.3, "vocab_multiple": 8},
    "z-loss": {"z_loss": 0.1, "vocab_multiple": 8},
    "scaled and capped": {"logit_scale": 0.4, "logit_cap": 1.5, "vocab_multiple": 8},
    "all": {"label_smoothing": 0.1, "z_loss": 0.2, "logit_scale": 3.0, "logit_cap": 2.0, "vocab_multiple": 16},
}


@pytest.mark.parametrize(("changes", "chunk"), [*((c, 3) for c in CONFIGS.values()), ({}, 1), ({}, 4096)], ids=str)
def test_chunks_equal_the_whole_in_value_and_every_gradient(changes, chunk, monkeypatch):
    """11 positions by 3, by 1, and at once."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", chunk * B)
    config = model(**changes)
    x, head, targets, weights = arrays(config, bias=chunk > 1)

    def chunked(x, head):
        return cross_entropy(x, head, targets, weights, config=config, shard=UNSHARDED)

    def whole(x, head):
        return formula(x, head, targets, weights, config)

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, head) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    np.testing.assert_allclose(jax.jit(chunked)(x, head), want[0], rtol=1e-5)  # another way than with a gradient


def test_cross_entropy_by_hand():
    """Logits (0, 0) and (ln 3, 0): ln 2 for either token, ln 4 for the second; weights 5 and 7."""
    config = dataclasses.replace(model(), vocab_size=2, d_model=1)
    x, head = jnp.asarray([[[0.0], [math.log(3)]]]), Head(jnp.asarray([[1.0, 0]]), None)
    weights = jnp.asarray([[5.0, 7]])

    def loss(targets: list[int], **changes: Any) -> float:
        changed = dataclasses.replace(config, **changes)
        return float(cross_entropy(x, head, jnp.asarray([targets]), weights, config=changed, shard=UNSHARDED))

    assert loss([0, 1]) == pytest.approx(5 * math.log(2) + 7 * math.log(4))
    smoothed = 5 * math.log(2) + 7 * (0.9 * math.log(4) + 0.1 * math.log(4 / 3))  # 0.2 to both alike
    assert loss([1, 1], label_smoothing=0.2) == pytest.approx(smoothed)
    squares = 5 * math.log(2) ** 2 + 7 * math.log(4) ** 2
    assert loss([0, 1], z_loss=0.5) == pytest.approx(5 * math.log(2) + 7 * math.log(4) + squares / 2)


def test_what_weighs_nothing_changes_nothing():
    config = model()
    x, head, targets, weights = arrays(config)
    gone = np.asarray(weights) == 0
    assert gone.any()
    other = jnp.where(gone, (targets + 1) % V, targets)
    elsewhere = jnp.where(gone[:, :, None], 9.0, x)

    @jax.jit
    def loss(x, targets):
        return jax.value_and_grad(lambda x: cross_entropy(x, head, targets, weights, config=config, shard=UNSHARDED))(x)

    value, grad = loss(x, targets)
    np.testing.assert_allclose(loss(elsewhere, other)[0], value, rtol=1e-6)
    assert not np.asarray(grad)[gone].any()


def test_gradient_follows_what_is_made_of_the_loss():
    config = model()
    x, head, targets, weights = arrays(config)

    def loss(x):
        return cross_entropy(x, head, targets, weights, config=config, shard=UNSHARDED)

    value, grad = jax.jit(jax.value_and_grad(loss))(x)
    squared = jax.jit(jax.grad(lambda x: loss(x) ** 2 / 7))(x)
    np.testing.assert_allclose(squared, 2 * value / 7 * grad, rtol=1e-5, atol=1e-5)


def test_half_precision_sums_in_float32_and_gives_back_half_precision():
    """4,000 equal tokens of ln 13 each: a sum of bfloat16 would stop growing at 512."""
    config = model()
    x, w = jnp.zeros((1, 4000, D), jnp.bfloat16), jnp.ones((D, V), jnp.bfloat16)
    targets, weights = jnp.zeros((1, 4000), jnp.int32), jnp.ones((1, 4000))

    def loss(x, head):
        return cross_entropy(x, head, targets, weights, config=config, shard=UNSHARDED)

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, Head(w, jnp.zeros(V, jnp.bfloat16)))
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}
    assert float(value) == pytest.approx(4000 * math.log(13), rel=1e-5)
    bias = grads[1].bias.astype(jnp.float32)  # 1/13 of 4,000 each, but for the target
    np.testing.assert_allclose(bias, [4000 / 13 - 4000] + [4000 / 13] * 12, rtol=2**-8)


@pytest.mark.parametrize("split", [Unsharded(batch_shards=2), Unsharded(batch_shards=2, context_shards=11)])
def test_groups_of_tokens_change_nothing(monkeypatch, split):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    config = model(**CONFIGS["all"])
    x, head, targets, weights = arrays(config)

    def loss(x, head, shard):
        return cross_entropy(x, head, targets, weights, config=config, shard=shard)

    want, got = (
        jax.jit(jax.value_and_grad(lambda x, head, s=s: loss(x, head, s), argnums=(0, 1)))(x, head)
        for s in (UNSHARDED, split)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def sizes(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all that a traced program makes, inner programs included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")}
        for value in jax.tree.leaves(equation.params, is_leaf=lambda t: hasattr(t, "eqns") or hasattr(t, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            found |= sizes(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.smoke
def test_all_logits_are_never_held_and_made_once(monkeypatch):
    """2 x 512 tokens in chunks of 64: nothing larger than a chunk's logits, and 2 D V of FLOPs a token forward,
    4 D V backward."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 64)
    config = dataclasses.replace(model(), vocab_size=1000)

    def gradient(length: int) -> tuple[Any, list[Any]]:
        head = Head(jax.ShapeDtypeStruct((D, 1000), jnp.float32), None)
        x = jax.ShapeDtypeStruct((2, length, D), jnp.float32)
        targets = jax.ShapeDtypeStruct((2, length), jnp.int32)
        weights = jax.ShapeDtypeStruct((2, length), jnp.float32)

        def loss(x, head, targets, weights):
            return cross_entropy(x, head, targets, weights, config=config, shard=UNSHARDED)

        return jax.value_and_grad(loss, argnums=(0, 1)), [x, head, targets, weights]

    short, long = gradient(64), gradient(512)
    made = sizes(jax.make_jaxpr(long[0])(*long[1]).jaxpr)
    assert max(math.prod(shape) for shape in made) == 64 * 1000
    assert traced_flops(long[0], *long[1]) == 6 * 2 * 512 * D * 1000
    temps = [jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes for f, args in (short, long)]
    assert temps[1] - temps[0] < 2 * (512 - 64) * 1000 * 4 / 20  # of what all logits would take more


def test_balance_is_summed_over_the_layers_of_every_stack():
    def load(*values: float) -> Load:
        return Load(jnp.asarray(values), jnp.ones((len(values), 4)))

    loads = {"encoder": {"block_0": {"layer_0": load(1.0, 2), "layer_1": load(4.0, 8)}}, "decoder": {"block_1": {"layer_0": load(16.0)}}}  # fmt: skip
    assert float(balance(loads)) == 31
    assert float(balance({})) == 0
