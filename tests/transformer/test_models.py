"""Models against their table, against a loop over their layers, and against formulas in numpy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention import Context, attend
from transformer.config import ModelConfig
from transformer.experts import rebalanced
from transformer.layers import Layer, norm
from transformer.losses import cross_entropy
from transformer.models import (
    Transformer,
    apply,
    init,
    logits,
    logits_of,
    model_params,
)
from transformer.params import embedding, leaves, map_params, weight
from transformer.placement import UNSHARDED
from transformer.presets import preset
from transformer.sharding import DIMS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Small, every dim a number of its own, and initial values large enough that every part is seen in the logits.
LLAMA = ModelConfig(
    n_layers=3, d_model=14, n_heads=6, n_kv_heads=3, d_head=4, d_ff=22, vocab_size=13, max_len=9,
    vocab_multiple=8, init_std=0.4,
)  # fmt: skip
GPT = dataclasses.replace(
    LLAMA, n_kv_heads=6, position="learned", norm="layer", ffn="gelu", bias=True, tied=True, window=4
)  # fmt: skip
BERT = dataclasses.replace(
    GPT, family="encoder", norm_placement="post", token_types=2, head_bias=True, head_transform=True, embed_norm=True,
    ffn="gelu_exact", window=None,
)  # fmt: skip
T5 = dataclasses.replace(LLAMA, family="encoder_decoder", position="relative", score="dot", ffn="relu")
DEEPSEEK = dataclasses.replace(
    LLAMA, n_kv_heads=6, kv_rank=5, q_rank=7, d_rope=2, d_value=3, n_experts=5, experts_per_token=2,
    n_shared_experts=2, n_dense_layers=1, d_expert=3, router="sigmoid", balance_rate=0.1,
)  # fmt: skip
MIXED = dataclasses.replace(
    LLAMA, n_layers=5, window=3, global_every=2, no_rope_every=2, n_experts=3, moe_every=2, norm_placement="sandwich",
    qk_norm=True, sinks=True, rope_theta_local=100.0, qkv_bias=True,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "gpt": GPT,
    "bert": BERT,
    "t5": T5,
    "deepseek": DEEPSEEK,
    "mixed": MIXED,
    "palm": dataclasses.replace(LLAMA, n_kv_heads=1, parallel=True, tied=True, embed_scale=True),
    "reformer": dataclasses.replace(LLAMA, n_kv_heads=6, share="query_key"),
    "bahdanau": dataclasses.replace(LLAMA, score="additive", share="key_value", position="sinusoidal"),
    "swin": dataclasses.replace(LLAMA, score="cosine", position="alibi", prefix=True),
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 7)), jnp.int32)
BATCH = {"inputs": TOKENS, "source": TOKENS[:, :5]}


def leaves_of(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_table_is_what_init_returns(config):
    fresh = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    table = dict(leaves(model_params(config)))
    assert {path: leaf.shape for path, leaf in leaves_of(fresh).items()} == {
        path: param.shape for path, param in table.items()
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    for path, param in table.items():
        assert len(param.dims) == len(param.shape), path
        assert set(param.dims) <= set(DIMS), path


LAYER = "decoder/block_0/layer_0"
ATTENTION = f"{LAYER}/attention"


@pytest.mark.parametrize(
    ("changes", "more", "less"),
    [
        ({"tied": True}, set(), {"head/w_logits"}),
        ({"position": "learned"}, {"embedding/positions"}, set()),
        ({"position": "relative"}, {"decoder/relative/table"}, set()),
        ({"token_types": 2, "head_bias": True}, {"embedding/types", "head/b_logits"}, set()),
        ({"embed_norm": True}, {"embedding_norm/scale"}, set()),
        ({"head_transform": True}, {f"head/{name}" for name in ("w_transform", "b_transform", "norm_scale")}, set()),
        ({"norm": "layer"}, {f"{norm}/bias" for norm in ("decoder/final_norm", f"{LAYER}/attention_norm", f"{LAYER}/ffn_norm")}, set()),
        ({"norm": "layer", "norm_bias": False}, set(), set()),
        ({"norm_placement": "post"}, set(), {"decoder/final_norm/scale"}),
        ({"norm_placement": "sandwich"}, {f"{LAYER}/attention_after/scale", f"{LAYER}/ffn_after/scale"}, set()),
        ({"parallel": True}, set(), {f"{LAYER}/ffn_norm/scale"}),
        ({"parallel": True, "parallel_norms": True}, set(), set()),
        ({"ffn": "relu"}, set(), {f"{LAYER}/ffn/w_gate"}),
        ({"qkv_bias": True}, {f"{ATTENTION}/b_{name}" for name in "qkv"}, set()),
        ({"bias": True}, {f"{ATTENTION}/b_{name}" for name in "qkvo"} | {f"{LAYER}/ffn/b_{name}" for name in ("up", "gate", "down")}, set()),
        ({"qk_norm": True}, {f"{ATTENTION}/q_scale", f"{ATTENTION}/k_scale"}, set()),
        ({"sinks": True}, {f"{ATTENTION}/sinks"}, set()),
        ({"score": "additive"}, {f"{ATTENTION}/w_score"}, set()),
        ({"score": "cosine"}, {f"{ATTENTION}/log_temperature"}, set()),
        ({"share": "key_value"}, set(), {f"{ATTENTION}/w_k"}),
        ({"share": "query_key", "n_kv_heads": 6}, set(), {f"{ATTENTION}/w_k"}),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)  # fmt: skip
def test_optional_parameters_are_there_only_when_asked_for(changes, more, less):
    plain = set(dict(leaves(model_params(LLAMA))))
    paths = set(dict(leaves(model_params(dataclasses.replace(LLAMA, **changes)))))
    assert (paths - plain, plain - paths) == (more, less)


@pytest.mark.smoke
def test_initial_values_have_the_spread_of_the_table():
    """0.02, over sqrt(2 x 8 layers) = 4 where a layer writes to the residual stream; no two layers alike."""
    params = jax.jit(lambda key: init(preset("tiny"), key))(jax.random.key(0))
    layer = params["decoder"]["block_0"]["layer_0"]
    attention, ffn = layer["attention"], layer["ffn"]
    for wide in (params["embedding"]["tokens"], attention["w_q"], attention["w_v"], ffn["w_up"], ffn["w_gate"]):
        np.testing.assert_allclose(np.std(wide), 0.02, rtol=0.02)
    for narrow in (attention["w_o"], ffn["w_down"]):
        np.testing.assert_allclose(np.std(narrow), 0.005, rtol=0.02)
    assert bool((params["decoder"]["final_norm"]["scale"] == 1).all())
    assert abs(np.corrcoef(np.ravel(ffn["w_up"][0]), np.ravel(ffn["w_up"][1]))[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("kind", "std", "residual", "queries", "rows", "furthest"),
    [
        ("normal", 0.4, 0.4, 0.4, 0.4, 4.5),
        ("residual", 0.4, 0.4 / 6**0.5, 0.4, 0.4, 4.5),  # 2 x 3 layers
        ("truncated", 0.352, 0.352, 0.352, 0.352, 2 / 0.8796),  # what is left of a std of 0.4 when cut at 2 of them
        ("xavier", (2 / (100 + 50)) ** 0.5, (2 / 150) ** 0.5, (2 / 150) ** 0.5, 14**-0.5, 3**0.5),
        ("fan_in", 0.1, 0.1, 0.1, 1.0, 4.5),
        ("t5", 0.1, 0.1, 0.05, 1.0, 4.5),  # over sqrt(d_head) = 2
    ],
)
def test_initial_values_are_those_that_their_model_was_published_with(kind, std, residual, queries, rows, furthest):
    config, key = dataclasses.replace(LLAMA, init=kind), jax.random.key(0)
    for role, want in (({}, std), ({"residual": True}, residual), ({"queries": True}, queries)):
        drawn = np.asarray(
            weight(config, (100, 50), ("embed", "ffn"), fan_in=100, fan_out=50, **role).init(
                key, (100, 50), jnp.float32
            )
        )
        np.testing.assert_allclose(drawn.std(), want, rtol=0.03)
        assert (
            furthest * 0.75 < np.abs(drawn).max() / want < furthest * (1.01 if kind in ("xavier", "truncated") else 1.2)
        )
    table = embedding(config, 1000, "vocab")
    np.testing.assert_allclose(table.init(key, table.shape, jnp.float32).std(), rows, rtol=0.03)


@pytest.mark.parametrize("name", ["llama", "gpt", "mixed"])
def test_scan_equals_a_loop_over_the_layers(name, random_params):
    config, n = CONFIGS[name], {"llama": (3,), "gpt": (3,), "mixed": (2, 2)}[name]
    params = random_params(config)
    blocks = config.blocks()
    assert tuple(b.repeats for b in blocks)[: len(n)] == (n if name != "mixed" else (2, 1))
    context = Context(jnp.arange(7)[None])
    x = params["embedding"]["tokens"][TOKENS]
    if config.position == "learned":
        x = x + params["embedding"]["positions"][None, :7]
    apply_layer = {
        kind: jax.jit(Layer(config, kind, attend, UNSHARDED, causal=True, cross=False, train=False).apply)
        for kind in {config.kind(i) for i in range(config.n_layers)}
    }
    for block in blocks:
        stored = params["decoder"][f"block_{block.first}"]
        for repeat in range(block.repeats):
            for i, kind in enumerate(block.kinds):
                one = jax.tree.map(lambda p, at=repeat: p[at], stored[f"layer_{i}"])
                x, _ = apply_layer[kind]({"params": one}, x, context)
    x = norm(params["decoder"]["final_norm"], x, config=config)
    head = params["embedding"]["tokens"].T if config.tied else params["head"]["w_logits"]
    got = jax.jit(lambda p: logits(Transformer(config), p, BATCH))(params)
    np.testing.assert_allclose(got[..., :13], (x @ head)[..., :13], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_never_wins_and_changes_no_loss(tied, random_params):
    """13 tokens in 16 rows, the rows beyond filled with what would win, against 13 rows."""
    wide = dataclasses.replace(LLAMA, tied=tied)
    exact = dataclasses.replace(wide, vocab_multiple=1)
    params = random_params(wide)
    params["embedding"]["tokens"] = params["embedding"]["tokens"].at[13:].set(50.0)
    cut = params | {"embedding": {"tokens": params["embedding"]["tokens"][:13]}}
    if not tied:
        params["head"] = {"w_logits": params["head"]["w_logits"].at[:, 13:].set(50.0)}
        cut["head"] = {"w_logits": params["head"]["w_logits"][:, :13]}

    def read(config, p):
        out = apply(Transformer(config), p, BATCH)
        loss = cross_entropy(out.x, out.head, TOKENS, jnp.ones(TOKENS.shape), config=config, shard=UNSHARDED)
        return logits_of(out.x, out.head, config), loss

    (got, loss), (want, want_loss) = (jax.jit(read, static_argnums=0)(c, p) for c, p in ((wide, params), (exact, cut)))
    assert (got.shape[-1], want.shape[-1]) == (16, 13)
    np.testing.assert_allclose(got[..., :13], want, rtol=1e-5, atol=1e-5)
    assert int(got.argmax(-1).max()) < 13
    assert float(jax.nn.softmax(got)[..., 13:].max()) == 0
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_parameters_compute_in_bf16_and_give_float32_logits(name):
    config = CONFIGS[name]
    half = map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), model_params(config))

    def stream(params):
        return apply(Transformer(config), params, BATCH)

    def read(params):
        out = stream(params)
        return logits_of(out.x, out.head, config)

    assert jax.eval_shape(lambda p: stream(p).x, half).dtype == jnp.bfloat16
    assert jax.eval_shape(read, half).dtype == jnp.float32
    if name in ("llama", "gpt"):
        products = [line for line in str(jax.make_jaxpr(read)(half)).splitlines() if "dot_general" in line]
        # all but the scores and the logits, which accumulate and stay in float32
        assert sum(":bf16" in line.split("=")[0] for line in products) == len(products) - 2 > 0


@pytest.mark.parametrize("name", ["deepseek", "translator"])
def test_loads_are_of_every_layer_with_experts_as_its_parameters_are_stored(name, random_params):
    """So that the biases of a whole model can follow them."""
    translator = dataclasses.replace(T5, n_experts=3, experts_per_token=2, moe_every=3)
    config = dataclasses.replace(CONFIGS.get(name, translator), balance_rate=0.1)
    params = random_params(config)
    loads = jax.jit(lambda p: apply(Transformer(config), p, BATCH).loads)(params)
    found = {path: leaf.shape for path, leaf in leaves_of(loads).items() if path.endswith("counts")}
    routers = {path: p.shape for path, p in leaves(model_params(config)) if path.endswith("b_router")}
    assert found == {path.replace("experts/b_router", "counts"): shape for path, shape in routers.items()}
    for path, counts in leaves_of(loads).items():
        if path.endswith("counts"):
            length = 5 if path.startswith("encoder") else 7
            np.testing.assert_allclose(counts.sum(-1), 2 * length * config.experts_per_token)
    moved = rebalanced(params, loads, 0.1)
    changed = {path for path, p in leaves_of(moved).items() if not np.array_equal(p, leaves_of(params)[path])}
    assert changed == set(routers)
