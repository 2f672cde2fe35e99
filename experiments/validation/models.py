"""The model of a row: its printed dims, and for what no column prints, the published model of that name and size."""

import dataclasses
import re
from functools import cache

from experiments.validation.tables import Row
from transformer.config import ModelConfig
from transformer.errors import RequestError
from transformer.presets import PRESETS

DIMS = ("layers", "d_model", "n_heads", "seq_len", "n_devices")
FFN = {
    "swiglu": "swiglu", "geglu": "geglu", "sqrelu": "relu2", "relu2": "relu2", "relu": "relu", "gelu": "gelu",
    "silu": "swiglu", "gated": "swiglu", "mlp": "gelu",
}  # fmt: skip
_LIKE_OURS = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "max_len", "d_head")
_OUTSIDE = re.compile(r"mamba|\bssm\b|hyena|rwkv|conv|diffusion|vision|clip|\bvit\b", re.IGNORECASE)


class Excused(Exception):
    """A row that cannot be forecast, and why: a layer that we do not build, no facts, or no dims."""


def model_of(row: Row) -> tuple[ModelConfig, list[str]]:
    """The row's model and what of it was assumed. Excused where it cannot be built."""
    for column in DIMS:
        if not row.count(column):
            raise Excused(f"no {column}")
    for column in ("model_name", "ffn_type"):
        if found := _OUTSIDE.search(row.text(column)):
            raise Excused(f"{found.group()!r} is a layer that is not built here")
    assumed: list[str] = []
    layers, d_model, heads = (row.count(column) or 0 for column in ("layers", "d_model", "n_heads"))
    is_pair = "encoder-decoder" in row.text("notes").lower() or bool(
        re.match(r"(m?t5|ul2|bart)\b", row.text("model_name").lower())
    )
    like = _namesake(row.text("model_name"), d_model, heads)
    base = dataclasses.asdict(like) if like else {}
    kind = row.text("ffn_type").lower()
    ffn = next((ours for theirs, ours in FFN.items() if theirs in kind), base.get("ffn", "gelu"))
    experts = row.count("moe_experts")
    if d_model % heads and not base:
        raise Excused(f"d_model={d_model} is not a multiple of n_heads={heads}, and no head size is printed")
    d_head = base.get("d_head") or d_model // heads
    if found := re.search(r"head_?(?:dim|size)\s*=\s*(\d+)", row.text("notes")):
        d_head = int(found.group(1))
    gated = ffn in ("swiglu", "geglu")
    d_ff = row.count("d_ff")
    if d_ff is None:
        d_ff = base.get("d_ff") or (8 * d_model // 3 if gated else 4 * d_model)
        assumed.append(f"d_ff={d_ff}")
    vocab = row.count("vocab")
    if vocab is None:
        vocab = base.get("vocab_size") or 50_257
        assumed.append(f"vocab={vocab}")
    kv = row.count("n_kv_heads")
    if kv is None:
        kv = base.get("n_kv_heads") or heads
        assumed.append(f"n_kv_heads={kv}")
    elif base.get("kv_rank"):  # latent attention, where sources print anything
        kv = heads
    given = {
        "n_layers": layers // 2 if is_pair else layers, "d_model": d_model, "n_heads": heads, "n_kv_heads": kv,
        "d_head": d_head, "d_ff": d_ff, "vocab_size": vocab, "max_len": row.count("seq_len"), "ffn": ffn,
        "family": "encoder_decoder" if is_pair else base.get("family", "decoder"),
        "parallel": "parallel" in kind or base.get("parallel", False),
    }  # fmt: skip
    plain_gpt = {"position": "learned", "norm": "layer", "bias": experts is None} if not gated and not base else {}
    if experts:
        given |= {"n_experts": experts, "experts_per_token": row.count("moe_topk") or base.get("experts_per_token", 2)}
        given |= {"d_expert": base.get("d_expert") or d_ff, "bias": False}
        if given["experts_per_token"] == 1:
            given["router_normalize"] = False
        if experts != base.get("n_experts"):
            base |= dict.fromkeys(("router_groups", "router_top_groups"))
        if base.get("d_expert"):  # the column prints an expert's width; of dense layers the published one
            given |= {"d_expert": d_ff, "d_ff": base["d_ff"]}
        if base.get("n_dense_layers") and layers < base["n_layers"]:  # cut down in proportion
            given["n_dense_layers"] = max(round(layers * base["n_dense_layers"] / base["n_layers"]), 1)
            assumed.append(f"dense layers={given['n_dense_layers']}")
    elif base.get("n_experts"):
        base = {}
    try:
        return ModelConfig(**{**base, **plain_gpt, **given}), assumed
    except RequestError as error:
        raise Excused(f"a layer that is not built here: {error}") from None


@cache
def _shapes() -> dict[tuple[int, int], list[tuple[str, ModelConfig]]]:
    found: dict[tuple[int, int], list[tuple[str, ModelConfig]]] = {}
    for slug, config in PRESETS.items():
        found.setdefault((config.d_model, config.n_heads), []).append((slug, config))
    return found


def _namesake(name: str, d_model: int, heads: int) -> ModelConfig | None:
    """The published model of that width whose slug is nearest to the name: its family must be the same."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    best, most = None, 0
    for slug, config in _shapes().get((d_model, heads), []):
        family = re.sub(r"[^a-z0-9.]", "", slug.split("-")[0].lower())
        shared = len(_common(plain, re.sub(r"[^a-z0-9]", "", slug.lower())))
        if plain.startswith(re.sub(r"[^a-z]", "", family)) and shared > most:
            best, most = config, shared
    return best


def _common(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]
