"""The practice of a framework, told from what a row says of its software, its year and its numbers.

Families and what their sources do at that time; nothing here knows a table, and nothing is fitted.
"""

import re
from dataclasses import replace

from experiments.forecast.closed_form.practice import Practice
from experiments.forecast.constants import EAGER_LAUNCH_S
from experiments.validation.words import Number

EAGER_HOST_S = 4 * EAGER_LAUNCH_S.value
"""Seconds of PyTorch's host for a kernel that is counted here: it comes with about four operators (views, allocations,
autograd's record). It makes a millisecond for a layer forward, which is what small models take (vTrain)."""

COLLECTIVE_MATMUL = 0.8
"""The same of XLA on TPUs, whose links have engines of their own: all but the first of about five pieces."""

ASYNC_TENSOR = 0.5
"""Part of tensor parallelism's communication that hides in products cut into pieces (user buffers of Transformer
Engine, async TP of PyTorch, XLA's collective matmul): what torchtitan gains by it, 9 to 14 % of a step of which the
communication is a quarter. The rest is the first piece's, and what smaller products lose."""

XLA = Practice(
    name="xla", fusion="compiled", resident_weight_bytes=4, layers_in_loop=True,
    tensor_backward_overlap=False,
)  # fmt: skip
MEGATRON_2020 = Practice(
    name="megatron-2020", attention="unfused", dropout=True, copies=3, host_s_per_kernel=EAGER_HOST_S,
    data_overlap=False, tensor_backward_overlap=False, pipeline_overlap=False, scatter_gather=False,
    fused_accumulation=False,
)  # fmt: skip
MEGATRON_2021 = replace(MEGATRON_2020, name="megatron-2021", scatter_gather=True)
MEGATRON_2022 = replace(MEGATRON_2021, name="megatron-2022", tensor_backward_overlap=True)
MEGATRON_CORE = Practice(name="megatron-core", host_s_per_kernel=EAGER_HOST_S)
NEMO = replace(MEGATRON_CORE, name="nemo", tensor_overlap=ASYNC_TENSOR, reduce_bytes=2, gradient_bytes=2)
MEGATRON_DEEPSPEED = replace(MEGATRON_2020, name="megatron-deepspeed")
DEEPSPEED = Practice(
    name="deepspeed", attention="unfused", dropout=True, copies=3, host_s_per_kernel=EAGER_HOST_S, reduce_bytes=2
)
FSDP = Practice(
    name="fsdp", fusion="eager", host_s_per_kernel=EAGER_HOST_S, resident_weight_bytes=4, tensor_backward_overlap=False,
    fused_accumulation=False,
)  # fmt: skip
NANOTRON = Practice(
    name="nanotron", fusion="eager", host_s_per_kernel=EAGER_HOST_S, pipeline_overlap=False, data_overlap=False
)

FAMILIES: tuple[tuple[str, Practice], ...] = (
    (r"maxtext|\bjax\b|\bpax|paxml|praxis|t5x|levanter|seqax|haiku|flax|easylm|gspmd|spmd|pathways|axlearn|alpa", XLA),
    (r"megatron-?\s?deepspeed|gpt-?neox", MEGATRON_DEEPSPEED),
    (r"nemo|megatron-?\s?bridge", NEMO),
    (r"megatron", MEGATRON_CORE),
    (r"nanotron|picotron", NANOTRON),
    (r"deepspeed|zero-?3|sagemaker|mics", DEEPSPEED),
    (r"torchtitan|fsdp|composer|llm-?foundry|torchtune|lightning|litgpt|axolotl|hugging|transformers|olmo|torch", FSDP),
)  # fmt: skip


def practice_of(
    software: str, notes: str, year: int | None, platform: str, number: Number
) -> tuple[Practice, list[str]]:
    """How such software runs, and what of it is assumed."""
    said = f"{software} {notes}".lower()
    assumed = []
    practice = next((found for pattern, found in FAMILIES if re.search(pattern, software.lower())), None)
    dated = _date(software) or (float(year) if year else None)
    if dated is None:
        dated = 2024.0
        assumed.append("year=2024")
    if practice is None:
        practice = XLA if platform == "tpu" else MEGATRON_CORE
        assumed.append(f"practice={practice.name}")
    if practice is MEGATRON_CORE and dated < 2023:
        practice = next(p for before, p in _MEGATRONS if dated < before)
    if ("flash" in software.lower() and not practice.flash) or (practice.name == "deepspeed" and dated >= 2023.5):
        practice = replace(practice, dropout=False, copies=0, attention="flash2")
    if practice.name == "xla":
        fused = number.engine or "flash" in said or dated >= (2024 if platform == "tpu" else 2025)
        overlap = COLLECTIVE_MATMUL if platform == "tpu" else 0.0
        practice = replace(practice, attention="best" if fused else "unfused", tensor_overlap=overlap)
    if (
        practice.name in ("megatron-core", "nemo") and dated < 2024.4
    ):  # before cuDNN's kernels were Transformer Engine's
        practice = replace(practice, attention="flash2")
    if practice.name in ("fsdp", "nanotron"):  # PyTorch's own attention is FlashAttention's, a version behind
        practice = replace(practice, attention="flash1" if dated < 2024.25 else "flash2")
    return _adjusted(practice, software.lower(), number), assumed


_MEGATRONS = ((2021.2, MEGATRON_2020), (2022.0, MEGATRON_2021), (2023.0, MEGATRON_2022))


def _adjusted(practice: Practice, software: str, number: Number) -> Practice:
    """What the text says beside the family."""
    changes: dict[str, object] = {}
    if re.search(r"compile", software) and practice.fusion != "compiled":
        changes |= {"fusion": "compiled", "host_s_per_kernel": EAGER_HOST_S / 2}
    if re.search(r"async\s?tp", software) and "vanilla" not in software:
        changes["tensor_overlap"] = ASYNC_TENSOR
    if re.search(r"no (comm\w* )?overlap|overlap off|no dp overlap|no gradient bucketing", software):
        changes["data_overlap"] = False
    if re.search(r"no comm\w* overlap|overlap off", software):
        off = ("gather_overlap", "pipeline_overlap", "tensor_backward_overlap")
        changes |= {"tensor_overlap": 0.0} | dict.fromkeys(off, False)
    if re.search(r"composer|llm-?foundry|fused (cross|ce)", software):  # a fused loss, in place
        changes["float32_logits"] = False
    if re.search(r"cuda ?graph", software):
        changes["host_s_per_kernel"] = 0.0
    if re.search(r"gpipe|afab(?! or)", software) and "1f1b" not in software:
        changes["schedule"] = "gpipe"
    if re.search(r"dualpipe|deepep|hai-llm", software):
        changes["expert_overlap"] = True
    if number.pure:
        changes |= {"reduce_bytes": 2, "gradient_bytes": 2}
    if number.precision == "fp16" and practice.name.startswith("megatron-20"):
        changes |= {"reduce_bytes": 2, "gradient_bytes": 2}  # gradients have the weights' type
    return replace(practice, **changes)  # pyright: ignore[reportArgumentType]


def _date(software: str) -> float | None:
    """The date that a software's text names: 2021-04, 24.07, 2022.

    >>> _date("Megatron-LM 2021-04"), _date("NeMo 24.07"), _date("torch 2.8")
    (2021.25, 2024.5, None)
    """
    if found := re.search(r"\b(20[12]\d)(?:[-.](\d\d))?\b", software):
        return int(found.group(1)) + (int(found.group(2) or 1) - 1) / 12
    if found := re.search(r"\b(2[2-9])\.(0[1-9]|1[0-2])\b", software):
        return 2000 + int(found.group(1)) + (int(found.group(2)) - 1) / 12
    return None
