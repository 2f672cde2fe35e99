"""Keys of a config.json: what must be there, what may, what we can compute.

What a config.json leaves out has the default of its class in transformers 5. A value that we cannot compute is an
error, never a silent difference.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from transformer.errors import RequestError, nearest

Json = Mapping[str, Any]
Keys = dict[str, Any]

PLAIN = {
    "gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
    "relu": "relu", "relu2": "relu2",
}  # fmt: skip
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ROPE_SCALING = ("default", "linear", "llama3", "yarn")


def need(c: Json, name: str) -> Any:
    """A key's value. RequestError where there is none."""
    if c.get(name) is None:
        raise RequestError(f"config.json of {c['model_type']} has no {name}")
    return c[name]


def get(c: Json, name: str, default: Any) -> Any:
    """A key's value; the default where it is null or not there."""
    value = c.get(name)
    return default if value is None else value


def defaults(c: Json, **values: Any) -> Json:
    """With values for keys that are null or not there."""
    return {**c, **{name: value for name, value in values.items() if c.get(name) is None}}


def expect(c: Json, **expected: Any) -> None:
    """RequestError if a key has another value; the first of a tuple is the default."""
    for name, values in expected.items():
        values = values if isinstance(values, tuple) else (values,)
        if (value := get(c, name, values[0])) not in values:
            known = " or ".join(repr(v) for v in values)
            raise RequestError(f"{c['model_type']} with {name}={value!r} cannot be computed; expected {known}")


def activation(c: Json, name: str, default: str, known: Mapping[str, str]) -> str:
    """What we call the non-linearity under a key."""
    if (value := get(c, name, default)) not in known:
        raise RequestError(f"{c['model_type']} with {name}={value!r} cannot be computed; {nearest(value, known)}")
    return known[value]


def rope(c: Json, d_head: int, layers: str = "full_attention") -> Keys:
    """Rotary positions.

    transformers 5 has `rope_parameters`, maybe for each kind of layer, 4 had `rope_theta` and `rope_scaling`.
    """
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}
    given = given.get(layers) or given
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_SCALING:
        raise RequestError(f"rope type {kind!r} cannot be computed; {nearest(kind, ROPE_SCALING)}")
    found: Keys = {"rope_theta": float(given.get("rope_theta", get(c, "rope_theta", 10_000)))}
    found["rope_fraction"] = given.get("partial_rotary_factor", get(c, "partial_rotary_factor", 1.0))
    if kind == "default":
        return found
    inner = {"model_type": f"{c['model_type']}'s {kind} rope", **given}
    found |= {"rope_scaling": kind, "rope_factor": float(need(inner, "factor"))}
    if kind != "linear":
        trained = given.get("original_max_position_embeddings", c.get("original_max_position_embeddings"))
        found["rope_trained_len"] = trained or need(c, "max_position_embeddings")
    if kind == "llama3":
        expect(inner, low_freq_factor=1, high_freq_factor=4)
    if kind == "yarn":
        expect(inner, beta_fast=32, beta_slow=1, truncate=True)
        found |= _yarn_scale(c, given, d_head, whole=found["rope_fraction"] == 1 and "kv_lora_rank" not in c)
    return found


def _yarn_scale(c: Json, given: Json, d_head: int, *, whole: bool) -> Keys:
    """The scores' scale where it is not d_head^-1/2 (0.1 ln s + 1)^2, which we give YaRN ourselves.

    They multiply what turns of queries and keys by `attention_factor` or by the ratio of two m(mscale) = 0.1 mscale
    ln s + 1 (modeling_rope_utils.py); DeepSeek's scores besides by the second's square (yarn_apply_mscale).
    """

    def m(mscale: float) -> float:
        return 0.1 * mscale * math.log(given["factor"]) + 1

    one, other = given.get("mscale"), given.get("mscale_all_dim")
    turned = given.get("attention_factor")
    if turned is None:
        turned = m(one) / m(other) if one and other else m(1)
    if turned != 1 and not whole:
        raise RequestError(
            f"{c['model_type']}: its yarn rope multiplies by {turned:.4g} what turns of a head, and not all of it "
            "turns; expected 1, as where mscale is mscale_all_dim"
        )
    of_all = m(other) if other and "kv_lora_rank" in c else 1.0
    ratio = (turned * of_all / m(1)) ** 2
    return {} if math.isclose(ratio, 1) else {"score_scale": d_head**-0.5 * ratio}


def window(c: Json, local_layers: list[bool], size: int | None) -> Keys:
    """The pattern of layers that see a window only."""
    if size is None or not any(local_layers):
        return {}
    for every in (None, *range(2, len(local_layers) + 1)):
        if local_layers == [every is None or (i + 1) % every != 0 for i in range(len(local_layers))]:
            return {"window": size, "global_every": every} if every else {"window": size}
    layers = [i for i, there in enumerate(local_layers) if there]
    raise RequestError(
        f"{c['model_type']} with a window in layers {layers} cannot be computed; expected all, or all but every n-th"
    )


def local(c: Json, default: Callable[[int], bool]) -> list[bool]:
    """Of every layer whether it sees a window only."""
    kinds = c.get("layer_types")
    if kinds is None:
        return [default(i) for i in range(need(c, "num_hidden_layers"))]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise RequestError(f"{c['model_type']} with layer_types {unknown[0]!r} cannot be computed")
    return [kind == "sliding_attention" for kind in kinds]
