"""Free text of published tables, read: sharding, recomputation, precision, links. What cannot be read is None."""

import re
from typing import NamedTuple


class Sharding(NamedTuple):
    """ZeRO stage, and over how many devices if the text says (fsdp inside a slice, HSDP inside a node)."""

    zero: int
    size: int | None = None
    tensor: int | None = None  # of a mesh that the text spells out
    data: int | None = None
    keeps: bool = False  # weights fetched for the forward pass stay until the backward pass
    hybrid: bool = False


class Recompute(NamedTuple):
    """none, selective or full, and the share of layers that it is for."""

    kind: str
    share: float = 1.0


class Number(NamedTuple):
    """A precision: of linear maps, and how fp8 is scaled."""

    precision: str
    row_scaled: bool = False
    engine: bool = False  # Transformer Engine's kernels
    pure: bool = False  # gradients travel, and perhaps weights rest, in 16 bits


def first_number(text: str) -> float | None:
    """The first number of a text.

    >>> first_number("2 pods"), first_number("FSDP-64"), first_number("none")
    (2.0, 64.0, None)
    """
    found = re.search(r"(?<![A-Za-z0-9.])\d+(?:\.\d+)?(?![A-Za-z0-9])|(?<=-)\d+", text)
    return float(found.group()) if found else None


def sharding(text: str) -> Sharding | None:
    """What `fsdp_zero_stage` says; None where it is blank or says nothing known.

    >>> sharding("distributed optimizer (ZeRO-1)"), sharding("FSDP-64 in slice").size, sharding("FSDP2-8").size
    (Sharding(zero=1, size=None, tensor=None, data=None, keeps=False, hybrid=False), 64, 8)
    """
    said = text.strip().lower()
    if mesh := re.search(r"mesh\s*\[(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\]", said):
        data, size, tensor = (int(n) for n in mesh.groups())
        return Sharding(3, size=size, tensor=tensor, data=data)
    if re.fullmatch(r"[0-3](\.0)?", said):
        return Sharding(int(float(said)))
    if stage := re.search(r"(?:zero|stage)[\s\-_]*(?:stage)?[\s\-_]*([0-3])\b", said):
        return Sharding(int(stage.group(1)))
    if stage := re.match(r"([0-3])\s*\(", said):
        return Sharding(int(stage.group(1)))
    if re.search(r"no_shard|\bddp\b|^none$|^no$|replicat", said):
        return Sharding(0)
    if re.search(r"shard_grad_op|optimizer\s*\+\s*grad", said):
        return Sharding(2, keeps="resharded" in said)
    if re.search(r"hsdp|hybrid", said):
        return Sharding(3, size=_size(said), hybrid=True)
    if "fsdp" in said or "full_shard" in said or "fully" in said:
        return Sharding(3, size=_size(said), keeps=bool(re.search(r"not reshard|no reshard", said)))
    if re.search(r"distributed\s*(fused\s*)?(optimizer|adam)|dist[-_ ]?opt", said):
        return Sharding(1)
    return None


def _size(said: str) -> int | None:
    found = re.search(r"(?:fsdp2?|hsdp)\s*[-=_x( ]\s*(\d+)", said)
    return int(found.group(1)) if found else None


def recompute(text: str) -> Recompute | None:
    """What `remat` says; None where it is blank or says nothing known.

    >>> recompute("selective(per-op)"), recompute("full-ish (rematerialisation)").kind, recompute("minimal_flash").kind
    (Recompute(kind='selective', share=1.0), 'full', 'none')
    """
    said = text.strip().lower()
    if not said:
        return None
    if re.search(r"^(none|no|off|disabled|false|0|no recompute|save_all)\b", said) or "minimal" in said:
        return Recompute("none")
    share = 1.0
    if every := re.search(r"every\s+(\d+)(?:nd|rd|th)?\b|1\s*/\s*(\d+)|1 (?:of|in) (\d+)", said):
        share = 1 / int(next(n for n in every.groups() if n))
    elif part := re.search(r"(\d+(?:\.\d+)?)\s*%", said):
        share = float(part.group(1)) / 100
    if re.search(r"selective|attention|attn|core_attn|dots|custom|save_\w+|mlp|norm", said) and "full" not in said:
        if re.search(r"selective\s*[-(]?\s*(?:every|\d)", said) or "1/" in said:  # whole layers, some of them
            return Recompute("full", share if share < 1 else 0.5)
        return Recompute("selective")
    if re.search(r"full|yes|true|all|block|uniform|layer|remat|checkpoint|recomput|^1$", said):
        return Recompute("full", share)
    return None


def precision(text: str) -> Number | None:
    """What `precision` says; None where it is blank or says nothing known.

    >>> precision("fp8 rowwise").row_scaled, precision("amp_bf16 DEFAULT").precision
    (True, 'bf16')
    """
    said = text.strip().lower()
    if not said:
        return None
    engine = bool(re.search(r"transformer engine|\bte\b", said))
    pure = "pure" in said
    if re.search(r"fp8|float8|f8|e4m3|fp4", said):
        return Number("fp8", bool(re.search(r"row|block", said)), engine)
    if re.search(r"int8|aqt", said):
        return Number("int8", engine=engine)
    if re.search(r"bf16|bfloat16|16-mixed", said):
        return Number("bf16", engine=engine, pure=pure)
    if re.search(r"fp16|float16|half|\bamp\b|mixed", said):
        return Number("fp16", engine=engine, pure=pure)
    if re.search(r"fp32|float32|\bf32|tf32|single", said):
        return Number("f32")
    return None


def nic_bytes_per_s(text: str, devices_per_node: int) -> float | None:
    """One direction, per device, of an interconnect's description; None where it names no rate out of the node.

    >>> nic_bytes_per_s("NVLink3 + 8x200Gb HDR IB per node", 8), nic_bytes_per_s("1600 Gb/s per node RoCE", 8)
    (25000000000.0, 25000000000.0)
    """
    said = text.lower().replace(",", " ")
    gbit = r"(\d+(?:\.\d+)?)\s*g(?:b(?:it|ps)?)?(?:/s|ps)?"
    if many := re.search(rf"(\d+)\s*x\s*{gbit}\b", said):
        return int(many.group(1)) * float(many.group(2)) / 8e-9 / devices_per_node
    if found := re.search(rf"{gbit}\s+(?:\w+\s+){{0,2}}per (?:node|host|server|vm)", said):
        return float(found.group(1)) / 8e-9 / devices_per_node
    if found := re.search(rf"{gbit}\s+(?:\w+\s+){{0,2}}per (?:gpu|device|chip|accelerator)", said):
        return float(found.group(1)) / 8e-9
    return None
