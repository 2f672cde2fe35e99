"""Logits and gradients of every architecture are those of Hugging Face transformers, on small random models.

The reference is torch on the CPU in float32. What it said is kept in `fixtures/`, so that the comparison runs where
there is no torch; where there is, the reference is asked again. `UPDATE_FIXTURES=1 pytest
tests/transformer/test_parity.py` writes them anew (without -n: the reference comes first in this file).

Weights are multiples of 1/64 within +-2, so a byte keeps one exactly. Of every gradient a fixture keeps its norm and
two projections, onto cos(0), cos(1) ... and the sines: any other order of the same numbers has others.
"""

import contextlib
import functools
import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.interop import config_from, from_hf, to_hf
from transformer.interop.configs import READERS
from transformer.losses import cross_entropy
from transformer.models import Transformer, apply, logits_of
from transformer.placement import UNSHARDED

FIXTURES = Path(__file__).parent / "fixtures"
UPDATE = os.environ.get("UPDATE_FIXTURES") == "1"
STEP = 64  # of the weights

# As fractions of the largest logit, and of a gradient's largest entry (norm, for its projections).
LOGITS_WITHIN, GRADIENTS_WITHIN = 1e-5, 1e-4


class Case(NamedTuple):
    """A model of transformers, by the names of its classes, small and with every dim a number of its own."""

    model: str
    config: dict[str, Any]
    padded: bool = False
    untied: bool = False  # the head is torn from the embedding, which transformers 5 no longer does by itself


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {
    "vocab_size": 37, "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 34, "max_position_embeddings": 32, "rms_norm_eps": 1e-3, **NO_TOKENS,
}  # fmt: skip
NEMOTRON = LLAMA | {
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
NO_HEAD_DIM = {k: v for k, v in LLAMA.items() if k != "head_dim"} | {"hidden_size": 24}
GPT = {"vocab_size": 37, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 18, "n_inner": 34, **NO_TOKENS}
DEEPSEEK = {
    **{k: v for k, v in LLAMA.items() if k != "head_dim"},
    "num_key_value_heads": 4, "q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "moe_intermediate_size": 9, "first_k_dense_replace": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip
T5 = {
    "vocab_size": 37, "d_model": 22, "d_kv": 6, "num_heads": 4, "d_ff": 34, "num_layers": 2,
    "relative_attention_num_buckets": 10, "relative_attention_max_distance": 9, "decoder_start_token_id": 0,
    "pad_token_id": 36, "eos_token_id": None,
}  # fmt: skip


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}

CASES = {
    "bert": Case(
        "BertForMaskedLM", {
            "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 34, "max_position_embeddings": 18, "type_vocab_size": 3, "pad_token_id": 36,
        }, padded=True,
    ),
    "bloom": Case("BloomForCausalLM", {"vocab_size": 37, "hidden_size": 24, "n_layer": 2, "n_head": 6, **NO_TOKENS}),
    "cohere": Case("CohereForCausalLM", LLAMA | {"logit_scale": 0.3}),
    "deepseek_v2": Case(
        "DeepseekV2ForCausalLM",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "n_shared_experts": 2, "routed_scaling_factor": 3.0}
        | rope("yarn", **YARN, mscale=0.707, mscale_all_dim=0.707),
    ),
    "deepseek_v2_lite": Case("DeepseekV2ForCausalLM", DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": Case("DeepseekV3ForCausalLM", DEEPSEEK | rope("yarn", **YARN, mscale=1.0, mscale_all_dim=1.0)),
    "falcon_7b": Case(
        "FalconForCausalLM",
        {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 34,
         **NO_TOKENS},
    ),
    "falcon_180b": Case(
        "FalconForCausalLM",
        {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 34,
         "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "tie_word_embeddings": False, **NO_TOKENS},
    ),
    "gemma": Case("GemmaForCausalLM", LLAMA),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        LLAMA | {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
                 "sliding_window": 4},
    ),
    "gemma3_text": Case(
        "Gemma3ForCausalLM",
        LLAMA | {
            "num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": 3, "query_pre_attn_scalar": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
        },
    ),
    "gpt2": Case("GPT2LMHeadModel", GPT),
    "gpt_bigcode": Case("GPTBigCodeForCausalLM", GPT),
    "gpt_neox": Case(
        "GPTNeoXForCausalLM",
        {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 34,
         **NO_TOKENS},
    ),
    "llama": Case("LlamaForCausalLM", LLAMA),
    "llama3.1": Case("LlamaForCausalLM", LLAMA | rope("llama3", **LLAMA3) | {"tie_word_embeddings": True}),
    "marian": Case(
        "MarianMTModel",
        {"vocab_size": 37, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 34, "decoder_ffn_dim": 34, "max_position_embeddings": 32,
         "activation_function": "relu", "scale_embedding": True, "pad_token_id": 36, "decoder_start_token_id": 36,
         "eos_token_id": 0, "forced_eos_token_id": None},
        padded=True,
    ),
    "mistral": Case("MistralForCausalLM", LLAMA | {"sliding_window": 4}),
    "mixtral": Case("MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "intermediate_size": 10}),
    "mpt": Case("MptForCausalLM", {"vocab_size": 37, "d_model": 24, "n_heads": 6, "n_layers": 2, "max_seq_len": 32}),
    "nemotron": Case("NemotronForCausalLM", NEMOTRON),
    "qwen2": Case("Qwen2ForCausalLM", NO_HEAD_DIM | rope("yarn", **YARN)),
    "qwen3": Case("Qwen3ForCausalLM", LLAMA),
    "qwen3_moe": Case(
        "Qwen3MoeForCausalLM",
        LLAMA | {"num_experts": 5, "moe_intermediate_size": 9, "num_experts_per_tok": 2, "norm_topk_prob": True,
                 "mlp_only_layers": [0]},
    ),
    "smollm3": Case("SmolLM3ForCausalLM", LLAMA | {"no_rope_layer_interval": 2}),
    "t5": Case("T5ForConditionalGeneration", T5, padded=True),
    "t5_v1.1": Case(
        "T5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        padded=True, untied=True,
    ),
}  # fmt: skip


class Reference(NamedTuple):
    """What transformers says, or a fixture of it. Names are those of the files in a repository."""

    config: dict[str, Any]  # config.json
    state: dict[str, np.ndarray]
    batch: dict[str, np.ndarray]
    logits: np.ndarray
    gradients: dict[str, np.ndarray]  # whole, or as `projected`


class Difference(NamedTuple):
    logits: float
    gradients: dict[str, float]


def projected(gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each its norm, its projections onto cos n and sin n."""

    def three(g: np.ndarray) -> np.ndarray:
        flat, n = g.astype(np.float64).ravel(), np.arange(g.size)
        return np.array([np.linalg.norm(flat), flat @ np.cos(n), flat @ np.sin(n)], np.float32)

    return {name: three(g) for name, g in gradients.items()}


def ours(reference: Reference) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Our logits and gradients for its weights and batch, gradients under their names."""
    architecture, config = reference.config["model_type"], config_from(reference.config)
    model, batch = Transformer(config), {k: jnp.asarray(v) for k, v in reference.batch.items()}

    @jax.jit
    def run(params):
        def loss(params):
            out = apply(model, params, batch)
            weights = batch["weights"].astype(jnp.float32)
            total = cross_entropy(out.x, out.head, batch["targets"], weights, config=config, shard=UNSHARDED)
            return total / weights.sum(), logits_of(out.x, out.head, config)

        return jax.grad(loss, has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        gradients, logits = run(jax.tree.map(jnp.asarray, from_hf(reference.state, config, architecture)))
    # to_hf subtracts 1 from some: the difference to zeros does not.
    wide = jax.tree.map(lambda g: np.asarray(g, np.float64), gradients)
    theirs, zeros = (to_hf(tree, config, architecture) for tree in (wide, jax.tree.map(np.zeros_like, wide)))
    return np.asarray(logits)[..., : config.vocab_size], {name: g - zeros[name] for name, g in theirs.items()}


def difference(reference: Reference, logits: np.ndarray, gradients: dict[str, np.ndarray]) -> Difference:
    """Largest deviation as a fraction of the largest value: of logits, and of each gradient.

    A gradient that is zero but for rounding (a key's bias shifts all scores alike) counts on the scale of the others.
    """
    counts = reference.batch["weights"] > 0
    off = np.abs(logits - reference.logits)[counts].max() / np.abs(reference.logits[counts]).max()
    if next(iter(reference.gradients.values())).shape == (3,):
        gradients = projected(gradients)
    floor = 1e-2 * max(np.abs(g).max() for g in reference.gradients.values())
    return Difference(
        float(off),
        {
            name: float(np.abs(gradients[name] - g).max() / max(np.abs(g).max(), floor))
            for name, g in reference.gradients.items()
        },
    )


def load(name: str) -> Reference:
    with np.load(FIXTURES / f"{name}.npz") as stored:
        parts: dict[str, dict[str, np.ndarray]] = {"state": {}, "batch": {}, "gradients": {}}
        names = json.loads(str(stored["names"]))
        for part, arrays in names.items():
            flat, at = stored[part], 0
            for key, shape in arrays.items():
                n = int(np.prod(shape))
                parts[part][key], at = flat[at : at + n].reshape(shape), at + n
        state = {key: array.astype(np.float32) / STEP for key, array in parts["state"].items()}
        return Reference(
            json.loads(str(stored["config"])), state, parts["batch"], stored["logits"], parts["gradients"]
        )  # fmt: skip


def save(name: str, reference: Reference) -> None:
    parts = {
        "state": {key: (array * STEP).astype(np.int8) for key, array in reference.state.items()},
        "batch": reference.batch,
        "gradients": projected(reference.gradients),
    }
    names = {part: {key: array.shape for key, array in arrays.items()} for part, arrays in parts.items()}
    flat = {part: np.concatenate([array.ravel() for array in arrays.values()]) for part, arrays in parts.items()}
    np.savez_compressed(
        FIXTURES / f"{name}.npz", config=json.dumps(reference.config), names=json.dumps(names),
        logits=reference.logits, **flat,
    )  # fmt: skip


def batch_of(name: str, config: Any, *, padded: bool) -> dict[str, np.ndarray]:
    """Tokens of two sequences; padded, the last few of the second are none. Reals are below the padding's id, 36."""
    rng, B, L, S = np.random.default_rng(zlib.crc32(name.encode())), 2, 11, 9

    def tokens(n: int) -> np.ndarray:
        return rng.integers(0, 36, (B, n), dtype=np.int32)

    def valid(n: int) -> np.ndarray:
        return (np.arange(n) < np.array([[n], [n - 4]])).astype(np.int32)

    batch = {"inputs": tokens(L), "targets": tokens(L), "weights": np.ones((B, L), np.int32)}
    if config.is_encoder_decoder:
        segments = {"source_segments": valid(S), "segments": batch["weights"]} if padded else {}
        return batch | {"source": tokens(S)} | segments
    if hasattr(config, "type_vocab_size"):
        batch["types"] = rng.integers(0, config.type_vocab_size, (B, L), dtype=np.int32)
    return batch | {"segments": valid(L), "weights": valid(L)} if padded else batch


@contextlib.contextmanager
def quiet(transformers: Any):
    """Without its remarks on small models: that 36 is no usual padding, that tokens of the default are none."""
    transformers.logging.disable_progress_bar()
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def random_model(name: str, torch: Any, transformers: Any) -> tuple[Any, set[str]]:
    """A model with weights that all matter, and the names of those that are no parameters and get no gradient."""
    case, rng = CASES[name], np.random.default_rng(zlib.crc32(name.encode()))
    kind = getattr(transformers, case.model)
    config = kind.config_class(**case.config, attn_implementation="eager", experts_implementation="eager")
    model = kind(config).eval()
    if case.untied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    buffers = {k: b for k, b in model.named_buffers() if k.endswith(("correction_bias", "logits_bias"))}
    with torch.no_grad():
        for key, tensor in {**dict(model.named_parameters()), **buffers}.items():
            if "embed_positions" not in key:  # Marian's sinusoids
                center = float(tensor.ndim == 1 and tensor.min() == 1)  # a norm's scale
                values = np.round((center + 0.3 * rng.standard_normal(tuple(tensor.shape))) * STEP)
                tensor.copy_(torch.tensor(np.clip(values, -127, 127) / STEP))
    return model, set(buffers)


@functools.cache
def asked(name: str) -> Reference:
    """The reference's own answer. Its files are what `save_pretrained` writes: of the weights, then of the gradients."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    safetensors = pytest.importorskip("safetensors.numpy")
    with quiet(transformers), tempfile.TemporaryDirectory() as folder:
        model, buffers = random_model(name, torch, transformers)

        def stored() -> dict[str, np.ndarray]:
            model.save_pretrained(folder)
            return safetensors.load_file(Path(folder) / "model.safetensors")

        state, config = stored(), json.loads((Path(folder) / "config.json").read_text())
        batch = batch_of(name, model.config, padded=CASES[name].padded)
        theirs = {"inputs": "input_ids", "segments": "attention_mask", "types": "token_type_ids"}
        if model.config.is_encoder_decoder:
            theirs = {"inputs": "decoder_input_ids", "source": "input_ids", "source_segments": "attention_mask"}
        tensors = {key: torch.tensor(array, dtype=torch.long) for key, array in batch.items()}
        logits = model(**{theirs[key]: tensor for key, tensor in tensors.items() if key in theirs}).logits
        losses = torch.nn.functional.cross_entropy(logits.mT, tensors["targets"], reduction="none")
        ((losses * tensors["weights"]).sum() / tensors["weights"].sum()).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        gradients = {key: array for key, array in stored().items() if key not in buffers}
    return Reference(config, state, batch, logits.detach().numpy(), gradients)


@functools.cache
def answered(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Our answer to a fixture."""
    return ours(load(name))


def check(name: str, reference: Reference) -> None:
    found = difference(reference, *answered(name))
    print(f"{name}: logits {found.logits:.1e}, gradients {max(found.gradients.values()):.1e}")
    assert found.logits < LOGITS_WITHIN
    assert {k: off for k, off in found.gradients.items() if not off < GRADIENTS_WITHIN} == {}


SMOKE = ("gpt2", "mixtral", "t5")


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.smoke] if name in SMOKE else []) for name in CASES], scope="module"
)
def name(request: pytest.FixtureRequest) -> str:
    """Of a module's scope, so that both tests of a case are neighbours and compile our side once."""
    return request.param


def test_reference_asked_now_gives_our_logits_and_gradients(name):
    reference = asked(name)
    if UPDATE:
        save(name, reference)
    fixture = load(name)
    assert reference.state.keys() == fixture.state.keys()
    for key, array in reference.state.items():
        np.testing.assert_array_equal(array, fixture.state[key], err_msg=key)
    check(name, reference)


def test_reference_as_recorded_gave_our_logits_and_gradients(name):
    check(name, load(name))


def test_every_architecture_is_compared():
    assert {load(name).config["model_type"] for name in CASES} == set(READERS)
    assert {path.stem for path in FIXTURES.glob("*.npz")} == set(CASES)
