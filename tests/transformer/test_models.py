"""The decoder against its table, against a loop over its layers, and against formulas in numpy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.step import cross_entropy
from transformer.config import ModelConfig, preset
from transformer.decoding import sample
from transformer.layers import DecoderLayer, feed_forward, feed_forward_params, norm, norm_params
from transformer.models import Decoder, apply, decoder_params, init
from transformer.params import leaves
from transformer.sharding import DIMS, UNSHARDED

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Small, every dim a number of its own, and initial values large enough that every part is seen in the logits.
LLAMA = ModelConfig(
    n_layers=3, d_model=14, n_heads=6, n_kv_heads=3, d_head=4, d_ff=22, vocab_size=13, max_len=9,
    vocab_multiple=8, init_std=0.4,
)  # fmt: skip
GPT = dataclasses.replace(
    LLAMA, n_kv_heads=6, position="learned", norm="layer", ffn="gelu", bias=True, tied=True, window=4
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "gpt": GPT,
    "tied": dataclasses.replace(LLAMA, tied=True),
    "multi-query": dataclasses.replace(LLAMA, n_kv_heads=1, window=2),
    "biased-swiglu": dataclasses.replace(LLAMA, bias=True, norm="layer"),
    "untied-gpt": dataclasses.replace(GPT, tied=False, ffn="gelu"),
}
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 7)), jnp.int32)


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Unlike fresh ones, with biases and scales that matter. Made in numpy: nothing to compile."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init(Decoder(config), jax.random.key(0)))
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape) * 0.4, p.dtype), shapes)


def slashed(tree) -> dict[str, tuple[int, ...]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in paths}


@pytest.mark.smoke
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_is_what_init_returns(config):
    fresh = jax.eval_shape(lambda key: init(Decoder(config), key), jax.random.key(0))
    table = dict(leaves(decoder_params(config)))
    assert slashed(fresh) == {path: param.shape for path, param in table.items()}
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    for path, param in table.items():
        assert len(param.dims) == len(param.shape), path
        assert set(param.dims) <= set(DIMS), path


def test_optional_parameters_are_there_only_when_asked_for():
    paths = {name: set(dict(leaves(decoder_params(config)))) for name, config in CONFIGS.items()}
    assert paths["llama"] - paths["tied"] == {"head/w_logits"}
    assert paths["gpt"] - paths["llama"] == {
        "embedding/positions", "final_norm/bias", "layers/attention_norm/bias", "layers/ffn_norm/bias",
        "layers/ffn/b_up", "layers/ffn/b_down", *(f"layers/attention/b_{name}" for name in "qkvo"),
    }  # fmt: skip
    assert paths["llama"] - paths["gpt"] == {"head/w_logits", "layers/ffn/w_gate"}


def test_initial_values_have_the_spread_of_the_table():
    """0.02, over sqrt(2 x 8 layers) = 4 where a layer writes to the residual stream; no two layers alike."""
    params = jax.jit(lambda key: init(Decoder(preset("tiny")), key))(jax.random.key(0))
    attention, ffn = params["layers"]["attention"], params["layers"]["ffn"]
    for wide in (params["embedding"]["tokens"], attention["w_q"], attention["w_v"], ffn["w_up"], ffn["w_gate"]):
        np.testing.assert_allclose(np.std(wide), 0.02, rtol=0.02)
    for narrow in (attention["w_o"], ffn["w_down"]):
        np.testing.assert_allclose(np.std(narrow), 0.005, rtol=0.02)
    assert bool((params["final_norm"]["scale"] == 1).all())
    assert abs(np.corrcoef(np.ravel(ffn["w_up"][0]), np.ravel(ffn["w_up"][1]))[0, 1]) < 0.05


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_is_its_formula(kind):
    config = dataclasses.replace(LLAMA, norm=kind)
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (2, 5, 14))
    params = {name: rng.normal(size=p.shape) for name, p in norm_params(config).items()}
    if kind == "rms":
        want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * params["scale"]
    else:
        centred = x - x.mean(-1, keepdims=True)
        want = centred / np.sqrt(x.var(-1, keepdims=True) + 0.1) * params["scale"] + params["bias"]
    as32 = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    np.testing.assert_allclose(norm(as32, jnp.asarray(x, jnp.float32), eps=0.1), want, rtol=1e-4, atol=1e-5)
    half = norm(as32, jnp.asarray(x, jnp.bfloat16), eps=0.1)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_feed_forward_is_its_formula(ffn, bias):
    config = dataclasses.replace(LLAMA, ffn=ffn, bias=bias)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 14))
    p = {name: rng.normal(size=param.shape) for name, param in feed_forward_params(config).items()}
    up = x @ p["w_up"] + p.get("b_up", 0)
    if ffn == "swiglu":
        gate = x @ p["w_gate"] + p.get("b_gate", 0)
        hidden = gate / (1 + np.exp(-gate)) * up
    else:  # Hendrycks & Gimpel 2016, the tanh form
        hidden = up / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    want = hidden @ p["w_down"] + p.get("b_down", 0)
    as32 = jax.tree.map(lambda t: jnp.asarray(t, jnp.float32), p)
    got = feed_forward(as32, jnp.asarray(x, jnp.float32), config=config, shard=UNSHARDED)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@BOTH
def test_scan_equals_a_loop_over_the_layers(config):
    params = random_params(config)
    x = params["embedding"]["tokens"][TOKENS]
    if config.position == "learned":
        x = x + params["embedding"]["positions"][None, :7]
    layer = jax.jit(DecoderLayer(config, "xla", UNSHARDED).apply)
    for i in range(config.n_layers):
        x, _ = layer({"params": jax.tree.map(lambda p, i=i: p[i], params["layers"])}, x)
    x = norm(params["final_norm"], x, eps=config.norm_eps)
    head = params["embedding"]["tokens"].T if config.tied else params["head"]["w_logits"]
    got = jax.jit(lambda p: apply(Decoder(config), p, TOKENS))(params)
    np.testing.assert_allclose(got[..., :13], (x @ head)[..., :13], rtol=1e-4, atol=1e-4)


@BOTH
def test_layer_is_two_residual_steps(config):
    """Maps back to the stream set to zero, a layer is the identity; one set to zero leaves the other."""
    params = jax.tree.map(lambda p: p[0], random_params(config)["layers"])
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 14)), jnp.float32)
    layer = jax.jit(DecoderLayer(config, "xla", UNSHARDED).apply)
    closed = {name: jnp.zeros_like(params["attention"][name]) for name in ("w_o", "b_o") if name in params["attention"]}
    alone = params | {"attention": params["attention"] | closed}
    h = norm(params["ffn_norm"], x, eps=config.norm_eps)
    want = x + feed_forward(params["ffn"], h, config=config, shard=UNSHARDED)
    np.testing.assert_allclose(layer({"params": alone}, x)[0], want, rtol=1e-5, atol=1e-5)
    closed = {name: jnp.zeros_like(params["ffn"][name]) for name in ("w_down", "b_down") if name in params["ffn"]}
    still = layer({"params": alone | {"ffn": params["ffn"] | closed}}, x)[0]
    np.testing.assert_array_equal(still, x)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_never_wins_and_changes_no_loss(tied):
    """13 tokens in 16 rows, the rows beyond filled with what would win, against 13 rows."""
    padded = dataclasses.replace(LLAMA, tied=tied)
    exact = dataclasses.replace(padded, vocab_multiple=1)
    params = random_params(padded)
    params["embedding"]["tokens"] = params["embedding"]["tokens"].at[13:].set(50.0)
    cut = params | {"embedding": {"tokens": params["embedding"]["tokens"][:13]}}
    if not tied:
        params["head"] = {"w_logits": params["head"]["w_logits"].at[:, 13:].set(50.0)}
        cut["head"] = {"w_logits": params["head"]["w_logits"][:, :13]}
    logits, want = (
        jax.jit(lambda p, c=c: apply(Decoder(c), p, TOKENS))(p) for c, p in ((padded, params), (exact, cut))
    )
    assert (logits.shape[-1], want.shape[-1]) == (16, 13)
    np.testing.assert_allclose(logits[..., :13], want, rtol=1e-5, atol=1e-5)
    assert int(logits.argmax(-1).max()) < 13
    assert float(jax.nn.softmax(logits)[..., 13:].max()) == 0
    np.testing.assert_allclose(cross_entropy(logits, TOKENS), cross_entropy(want, TOKENS), rtol=1e-6)


@pytest.mark.parametrize(("config", "remats"), [(LLAMA, ("dots", "full")), (GPT, ("full",))], ids=["llama", "gpt"])
def test_rematerialisation_changes_neither_loss_nor_gradient(config, remats):
    params = random_params(config)

    def loss(remat):
        return jax.value_and_grad(lambda p: cross_entropy(apply(Decoder(config, remat=remat), p, TOKENS), TOKENS))

    kept, want = jax.jit(loss("none"))(params)
    assert "remat" not in str(jax.make_jaxpr(loss("none"))(params))
    for remat in remats:
        assert "remat" in str(jax.make_jaxpr(loss(remat))(params))  # it was turned on
        value, grads = jax.jit(loss(remat))(params)
        np.testing.assert_allclose(value, kept, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, want)


@BOTH
def test_bf16_parameters_compute_in_bf16_and_give_float32_logits(config):
    params = random_params(config)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    got = jax.eval_shape(lambda p: apply(Decoder(config), p, TOKENS), half)
    assert got.dtype == jnp.float32
    inner = str(jax.make_jaxpr(lambda p: apply(Decoder(config), p, TOKENS))(half))
    products = [line for line in inner.splitlines() if "dot_general" in line]
    # all but the scores and the logits, which accumulate and stay in float32
    assert sum(":bf16" in line.split("=")[0] for line in products) == len(products) - 2 > 0


@BOTH
def test_later_token_changes_no_earlier_logit(config):
    params = random_params(config)
    read = jax.jit(lambda tokens: apply(Decoder(config), params, tokens))
    before = read(TOKENS)
    for at in range(1, 7):
        after = read(TOKENS.at[:, at].set((TOKENS[:, at] + 1) % 13))
        np.testing.assert_array_equal(before[:, :at], after[:, :at])
        assert not np.allclose(before[:, at], after[:, at])


@BOTH
def test_temperature_0_takes_the_likeliest(config):
    params, model = random_params(config), Decoder(config)
    got = sample(model, params, TOKENS[:, :3], jax.random.key(0), n_tokens=4, temperature=0)
    read = jax.jit(lambda tokens: apply(model, params, tokens))
    want = np.array(TOKENS)  # what stands behind the end does not matter: the model sees no future
    for end in range(3, 7):
        want[:, end] = read(jnp.asarray(want))[:, end - 1].argmax(-1)
    np.testing.assert_array_equal(got, want)


def test_samples_follow_the_distribution():
    """One layer of zeros leaves the embedding: logits that are known, drawn 4,000 times."""
    config = ModelConfig(
        n_layers=1, d_model=2, n_heads=1, n_kv_heads=1, d_head=2, d_ff=2, vocab_size=3, max_len=2, vocab_multiple=4
    )
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["embedding"]["tokens"] = jnp.ones((4, 2))
    params["final_norm"]["scale"] = jnp.ones(2)
    params["head"]["w_logits"] = jnp.asarray([[0.0, 1, 2, 9], [0, 0, 0, 0]])
    prompt = jnp.zeros((4000, 1), jnp.int32)
    for temperature in (1.0, 2.0):
        drawn = sample(Decoder(config), params, prompt, jax.random.key(0), n_tokens=1, temperature=temperature)[:, 1]
        share = np.bincount(drawn, minlength=3) / 4000
        want = np.exp(np.arange(3) / temperature) / np.exp(np.arange(3) / temperature).sum()
        np.testing.assert_allclose(share, want, atol=0.03)


def test_sample_needs_room():
    with pytest.raises(AssertionError, match=r"\(3, 7, 9\)"):
        sample(Decoder(LLAMA), {}, TOKENS[:, :3], jax.random.key(0), n_tokens=7)
