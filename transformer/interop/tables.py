"""Where every architecture of Hugging Face transformers keeps what: their names on the left, ours on the right.

    Rule("h.{i}.attn.qkv.weight", "(k*h) d", {"decoder/layer/attention/w_q": "g", ".../w_k": "1", ".../w_v": "1"})

    {i} {e}   number of the layer, of the expert
    (k*h) d   two axes; the first runs over kv heads, within each over what stands side by side, then the head's size
    *         where several of ours lie side by side in one of theirs: of queries g, of keys and values one
    H         a capital: neighbouring channels rotate together, where ours are halves apart

The letters are those of `Param.dims`, so a table knows no sizes. What a config has no parameter for is skipped, so one
table serves all variants of an architecture: with biases and without, dense and with experts. Names are those of the
files in the repositories, as written by transformers 4 and 5.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from transformer.config import ModelConfig
from transformer.errors import RequestError, nearest


class Rule(NamedTuple):
    """Where one tensor of theirs, or one for each layer and expert, is in ours."""

    theirs: str
    layout: str
    ours: Mapping[str, str]  # path, "layer" standing for its place among the stacked ones -> letters in place of *
    plus_one: bool = False  # they multiply with 1 + w (Gemma, Nemotron)


class Table(NamedTuple):
    """An architecture."""

    rules: tuple[Rule, ...]
    copies: Mapping[str, str] = {}  # names that may be there too -> whose tensor they then must equal
    ignored: tuple[str, ...] = ()  # patterns of names that carry nothing, {n} being n_layers
    prefix: str = ""  # which files of a model without its head leave out
    sinusoid_halves: bool = False  # their sinusoidal channels: all sines, then all cosines; ours alternate


Rules = tuple[Rule, ...]
SELF, CROSS, FFN, EXPERTS = (f"decoder/layer/{part}" for part in ("attention", "cross", "ffn", "experts"))


def linear(theirs: str, ours: str, out: str, into: str = "d", *, transposed: bool = False) -> Rules:
    """A map and its bias, w and b in place of ?. torch stores W [out, in]; GPT-2's Conv1D is transposed."""
    layout = f"({into}) ({out})" if transposed else f"({out}) ({into})"
    return (
        Rule(f"{theirs}.weight", layout, {ours.replace("?", "w"): ""}),
        Rule(f"{theirs}.bias", "c" if out == "d" else f"({out})", {ours.replace("?", "b"): ""}),
    )


def fused(theirs: str, out: str, stars: str, *, transposed: bool = False) -> Rules:
    """Queries, keys and values of one map; `stars` says for each what stands for * in `out`."""

    def parts(kind: str) -> dict[str, str]:
        return {f"{SELF}/{kind}_{name}": star for name, star in zip("qkv", stars.split(), strict=True)}

    layout = f"d ({out})" if transposed else f"({out}) d"
    return Rule(f"{theirs}.weight", layout, parts("w")), Rule(f"{theirs}.bias", f"({out})", parts("b"))


BY_HEAD = ("k*h", "g 1 1")  # each kv head's queries, its key, its value
ONE_BY_ONE = ("*", "kgh kh kh")  # all queries, all keys, all values


def norm(theirs: str, ours: str, *, plus_one: bool = False) -> Rules:
    """Scale and, of a LayerNorm, bias."""
    return (
        Rule(f"{theirs}.weight", "c", {f"{ours}/scale": ""}, plus_one),
        Rule(f"{theirs}.bias", "c", {f"{ours}/bias": ""}),
    )


def attention(at: str, ours: str, names: str = "q_proj k_proj v_proj o_proj", *, h: str = "h") -> Rules:
    """Four maps; `h` is "H" where neighbouring channels rotate together."""
    q, k, v, o = (f"{at}{name}" for name in names.split())
    return (
        *linear(q, f"{ours}/?_q", f"kg{h}"), *linear(k, f"{ours}/?_k", f"k{h}"),
        *linear(v, f"{ours}/?_v", "kh"), *linear(o, f"{ours}/?_o", "d", "kgh"),
    )  # fmt: skip


def feed_forward(at: str, ours: str, names: str) -> Rules:
    """`names` of the way up, down and, where there is one, the gate."""
    up, down, *gate = (f"{at}{name}" for name in names.split())
    rules = (*linear(up, f"{ours}?_up", "f"), *linear(down, f"{ours}?_down", "d", "f"))
    return (*rules, *linear(gate[0], f"{ours}?_gate", "f")) if gate else rules


def experts(at: str, names: str) -> Rules:
    """Router and experts, each a feed-forward."""
    router = Rule(f"{at}gate.weight", "c d", {f"{EXPERTS}/w_router": ""})
    return (router, *feed_forward(f"{at}experts.{{e}}.", f"{EXPERTS}/", names))


def ends(tokens: str, last_norm: str, head: str = "lm_head", *, plus_one: bool = False) -> Rules:
    """A decoder's embedding, last norm and, where it is not the embedding, head."""
    return (
        Rule(f"{tokens}.weight", "v d", {"embedding/tokens": ""}),
        *norm(last_norm, "decoder/final_norm", plus_one=plus_one),
        Rule(f"{head}.weight", "v d", {"head/w_logits": ""}),
    )


def norms(at: str, names: str = "input_layernorm post_attention_layernorm", *, plus_one: bool = False) -> Rules:
    """Before attention, and before what follows it: feed-forward or experts."""
    first, second = (f"{at}{name}" for name in names.split())
    return (
        *norm(first, f"{SELF}_norm", plus_one=plus_one), *norm(second, f"{FFN}_norm", plus_one=plus_one),
        *norm(second, f"{EXPERTS}_norm", plus_one=plus_one),
    )  # fmt: skip


# Llama and those that name their parts as it does.

LAYER, GATED = "model.layers.{i}.", "up_proj down_proj gate_proj"
ROTARY = r".*rotary_emb\.inv_freq"
ENDS, ENDS_PLUS_ONE = (ends("model.embed_tokens", "model.norm", plus_one=plus_one) for plus_one in (False, True))
ATTENTION, MLP = attention(f"{LAYER}self_attn.", SELF), feed_forward(f"{LAYER}mlp.", f"{FFN}/", GATED)
QK_NORM = tuple(Rule(f"{LAYER}self_attn.{x}_norm.weight", "h", {f"{SELF}/{x}_scale": ""}) for x in "qk")


def like_llama(*rules: Rule, ignored: tuple[str, ...] = ()) -> Table:
    return Table(rules, {"lm_head.weight": "model.embed_tokens.weight"}, (ROTARY, *ignored), "model.")


LLAMA = like_llama(*ENDS, *norms(LAYER), *ATTENTION, *QK_NORM, *MLP, *experts(f"{LAYER}mlp.", GATED))
MIXTRAL = like_llama(*ENDS, *norms(LAYER), *ATTENTION, *experts(f"{LAYER}block_sparse_moe.", "w3 w2 w1"))
COHERE = like_llama(
    *ENDS, *norm(f"{LAYER}input_layernorm", f"{SELF}_norm"), *attention(f"{LAYER}self_attn.", SELF, h="H"), *MLP
)
NEMOTRON = like_llama(*ENDS_PLUS_ONE, *norms(LAYER, plus_one=True), *ATTENTION, *MLP[:4])
GEMMA = like_llama(*ENDS_PLUS_ONE, *norms(LAYER, plus_one=True), *ATTENTION, *MLP)
GEMMA_SANDWICH = like_llama(
    *ENDS_PLUS_ONE, *ATTENTION, *(rule._replace(plus_one=True) for rule in QK_NORM), *MLP,
    *norm(f"{LAYER}input_layernorm", f"{SELF}_norm", plus_one=True),
    *norm(f"{LAYER}post_attention_layernorm", f"{SELF}_after", plus_one=True),
    *norm(f"{LAYER}pre_feedforward_layernorm", f"{FFN}_norm", plus_one=True),
    *norm(f"{LAYER}post_feedforward_layernorm", f"{FFN}_after", plus_one=True),
)  # fmt: skip

LATENT = f"{LAYER}self_attn."
DEEPSEEK = like_llama(
    *ENDS, *norms(LAYER), *MLP, *experts(f"{LAYER}mlp.", GATED),
    Rule(f"{LATENT}q_proj.weight", "(kH) d", {f"{SELF}/w_q": ""}),
    Rule(f"{LATENT}q_a_proj.weight", "c d", {f"{SELF}/w_q_down": ""}),
    Rule(f"{LATENT}q_a_layernorm.weight", "c", {f"{SELF}/latent_q_scale": ""}),
    Rule(f"{LATENT}q_b_proj.weight", "(kH) r", {f"{SELF}/w_q_up": ""}),
    Rule(f"{LATENT}kv_a_proj_with_mqa.weight", "* d", {f"{SELF}/w_kv_down": "c", f"{SELF}/w_k_rope": "C"}),
    Rule(f"{LATENT}kv_a_layernorm.weight", "c", {f"{SELF}/kv_scale": ""}),
    Rule(f"{LATENT}kv_b_proj.weight", "(k*) r", {f"{SELF}/w_k_up": "h", f"{SELF}/w_v_up": "h"}),
    Rule(f"{LATENT}o_proj.weight", "d (kgh)", {f"{SELF}/w_o": ""}),
    *feed_forward(f"{LAYER}mlp.shared_experts.", f"{EXPERTS}/shared_", GATED),
    Rule(f"{LAYER}mlp.gate.e_score_correction_bias", "c", {f"{EXPERTS}/b_router": ""}),
    ignored=(r"model\.layers\.{n}\..*",),  # the layer after the last predicts further tokens
)  # fmt: skip

# GPT-2, and those that name their parts as it or as Megatron-LM does.

GPT2_LAYER, MPT_LAYER = "transformer.h.{i}.", "transformer.blocks.{i}."
CAUSAL_MASKS = r".*\.(attn|attention)\.(masked_)?bias"
GPT2_TIED = {"lm_head.weight": "transformer.wte.weight"}


def gpt2(queries_keys_values: tuple[str, str], *, transposed: bool) -> Table:
    """GPT-2, and StarCoder's variant of it."""
    attn, mlp = f"{GPT2_LAYER}attn.", f"{GPT2_LAYER}mlp."
    rules = (
        *ends("transformer.wte", "transformer.ln_f"), *norms(GPT2_LAYER, "ln_1 ln_2"),
        Rule("transformer.wpe.weight", "p d", {"embedding/positions": ""}),
        *fused(f"{attn}c_attn", *queries_keys_values, transposed=transposed),
        *linear(f"{attn}c_proj", f"{SELF}/?_o", "d", "kgh", transposed=transposed),
        *linear(f"{mlp}c_fc", f"{FFN}/?_up", "f", transposed=transposed),
        *linear(f"{mlp}c_proj", f"{FFN}/?_down", "d", "f", transposed=transposed),
    )  # fmt: skip
    return Table(rules, GPT2_TIED, (CAUSAL_MASKS,), "transformer.")


MPT = Table(
    (
        *ends("transformer.wte", "transformer.norm_f"), *norms(MPT_LAYER, "norm_1 norm_2"),
        *fused(f"{MPT_LAYER}attn.Wqkv", *ONE_BY_ONE), *linear(f"{MPT_LAYER}attn.out_proj", f"{SELF}/?_o", "d", "kgh"),
        *feed_forward(f"{MPT_LAYER}ffn.", f"{FFN}/", "up_proj down_proj"),
    ),
    GPT2_TIED, prefix="transformer.",
)  # fmt: skip


def like_megatron(names: str, layer: str, *rules: Rule) -> Table:
    """`names` of the embedding, the last norm and the head; `layer` as far as the name of attention."""
    tokens, last_norm, head = names.split()
    maps = (
        *fused(f"{layer}.query_key_value", *BY_HEAD), *linear(f"{layer}.dense", f"{SELF}/?_o", "d", "kgh"),
        *feed_forward(f"{layer.rpartition('.')[0]}.mlp.", f"{FFN}/", "dense_h_to_4h dense_4h_to_h"),
    )  # fmt: skip
    copies = {f"{head}.weight": f"{tokens}.weight"}
    prefix = f"{tokens.partition('.')[0]}."
    return Table((*ends(tokens, last_norm, head), *maps, *rules), copies, (ROTARY, CAUSAL_MASKS), prefix)


BLOOM_ENDS = "transformer.word_embeddings transformer.ln_f lm_head"
BLOOM = like_megatron(
    BLOOM_ENDS, f"{GPT2_LAYER}self_attention", *norms(GPT2_LAYER),
    *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
)  # fmt: skip
NEOX = like_megatron(
    "gpt_neox.embed_in gpt_neox.final_layer_norm embed_out", "gpt_neox.layers.{i}.attention",
    *norms("gpt_neox.layers.{i}."),
)  # fmt: skip


def falcon(config: ModelConfig) -> Table:
    """Its two norms have other names where they stand side by side."""
    names = "ln_attn ln_mlp" if config.parallel_norms else "input_layernorm post_attention_layernorm"
    return like_megatron(BLOOM_ENDS, f"{GPT2_LAYER}self_attention", *norms(GPT2_LAYER, names))


# Encoders, and encoders with a decoder.

BERT_LAYER, BERT_HEAD = "bert.encoder.layer.{i}.", "cls.predictions."
BERT = Table(
    (
        Rule("bert.embeddings.word_embeddings.weight", "v d", {"embedding/tokens": ""}),
        Rule("bert.embeddings.position_embeddings.weight", "p d", {"embedding/positions": ""}),
        Rule("bert.embeddings.token_type_embeddings.weight", "p d", {"embedding/types": ""}),
        *norm("bert.embeddings.LayerNorm", "embedding_norm"),
        *attention(
            f"{BERT_LAYER}attention.", "encoder/layer/attention", "self.query self.key self.value output.dense"
        ),
        *norm(f"{BERT_LAYER}attention.output.LayerNorm", "encoder/layer/attention_norm"),
        *feed_forward(BERT_LAYER, "encoder/layer/ffn/", "intermediate.dense output.dense"),
        *norm(f"{BERT_LAYER}output.LayerNorm", "encoder/layer/ffn_norm"),
        *linear(f"{BERT_HEAD}transform.dense", "head/?_transform", "c"),
        Rule(f"{BERT_HEAD}transform.LayerNorm.weight", "c", {"head/norm_scale": ""}),
        Rule(f"{BERT_HEAD}transform.LayerNorm.bias", "c", {"head/norm_bias": ""}),
        Rule(f"{BERT_HEAD}bias", "v", {"head/b_logits": ""}),
    ),
    {
        f"{BERT_HEAD}decoder.weight": "bert.embeddings.word_embeddings.weight",
        f"{BERT_HEAD}decoder.bias": f"{BERT_HEAD}bias",
    },
    (r"bert\.embeddings\.position_ids", r"bert\.pooler\..*", r"cls\.seq_relationship\..*"), "bert.",
)  # fmt: skip


def t5_stack(stack: str, feed: str, names: str) -> Rules:
    """Of an encoder or decoder; `feed` is the feed-forward's number among the parts of a layer."""
    at, ours = f"{stack}.block.{{i}}.layer.", f"{stack}/layer/"
    relative = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *attention(f"{at}0.SelfAttention.", f"{ours}attention", "q k v o"),
        *norm(f"{at}0.layer_norm", f"{ours}attention_norm"),
        Rule(relative, "c (kg)", {f"{stack}/relative/table": ""}),
        *feed_forward(f"{at}{feed}.DenseReluDense.", f"{ours}ffn/", names),
        *norm(f"{at}{feed}.layer_norm", f"{ours}ffn_norm"), *norm(f"{stack}.final_layer_norm", f"{stack}/final_norm"),
    )  # fmt: skip


def t5(config: ModelConfig) -> Table:
    """T5 1.0, or 1.1 whose feed-forward has a gate."""
    names = "wi_1 wo wi_0" if config.gated else "wi wo"
    rules = (
        Rule("shared.weight", "v d", {"embedding/tokens": ""}), Rule("lm_head.weight", "v d", {"head/w_logits": ""}),
        *t5_stack("encoder", "1", names), *t5_stack("decoder", "2", names),
        *attention("decoder.block.{i}.layer.1.EncDecAttention.", CROSS, "q k v o"),
        *norm("decoder.block.{i}.layer.1.layer_norm", f"{CROSS}_norm"),
    )  # fmt: skip
    tables = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    # A remnant of conversion in files of T5 1.0: cross-attention has no relative positions.
    remnant = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    return Table(rules, {f"{name}.weight": "shared.weight" for name in tables}, (remnant,))


def marian_stack(stack: str) -> Rules:
    at, ours = f"model.{stack}.layers.{{i}}.", f"{stack}/layer/"
    return (
        *attention(f"{at}self_attn.", f"{ours}attention", "q_proj k_proj v_proj out_proj"),
        *norm(f"{at}self_attn_layer_norm", f"{ours}attention_norm"),
        *feed_forward(at, f"{ours}ffn/", "fc1 fc2"), *norm(f"{at}final_layer_norm", f"{ours}ffn_norm"),
    )  # fmt: skip


MARIAN = Table(
    (
        Rule("model.shared.weight", "v d", {"embedding/tokens": ""}),
        Rule("final_logits_bias", "1 v", {"head/b_logits": ""}),
        *marian_stack("encoder"), *marian_stack("decoder"),
        *attention("model.decoder.layers.{i}.encoder_attn.", CROSS, "q_proj k_proj v_proj out_proj"),
        *norm("model.decoder.layers.{i}.encoder_attn_layer_norm", f"{CROSS}_norm"),
    ),
    {
        f"{name}.weight": "model.shared.weight"
        for name in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    },
    (r"model\.(en|de)coder\.embed_positions\.weight",),
    sinusoid_halves=True,
)  # fmt: skip

TABLES: Mapping[str, Table | Callable[[ModelConfig], Table]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3"), LLAMA),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), DEEPSEEK),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA_SANDWICH),
    "bert": BERT,
    "bloom": BLOOM,
    "cohere": COHERE,
    "falcon": falcon,
    "gemma": GEMMA,
    "gpt2": gpt2(ONE_BY_ONE, transposed=True),
    "gpt_bigcode": gpt2(BY_HEAD, transposed=False),
    "gpt_neox": NEOX,
    "marian": MARIAN,
    "mixtral": MIXTRAL,
    "mpt": MPT,
    "nemotron": NEMOTRON,
    "t5": t5,
}


def table_of(architecture: str, config: ModelConfig) -> Table:
    """The rules of an architecture, config.json's `model_type`."""
    if architecture not in TABLES:
        raise RequestError(f"unknown architecture {architecture!r}: {nearest(architecture, TABLES)}")
    found = TABLES[architecture]
    return found if isinstance(found, Table) else found(config)
