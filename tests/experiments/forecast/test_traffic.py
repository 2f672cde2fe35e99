"""Compiled programs send what the closed form says: by axis and kind, for clusters that are not there."""

from typing import Any

import pytest

from experiments.config import RunConfig
from experiments.forecast import rung
from experiments.forecast.topology import devices_of
from experiments.forecast.traffic import TOLERANCE, compared, off
from experiments.hardware import load
from transformer import sharding
from transformer.communication import Step, by_axis
from transformer.sharding import Layout

DENSE: dict[str, Any] = {"preset": "llama3-8b", "model": {"n_layers": "4", "vocab_size": "32000"}, "seq_len": 2048}
MIXTURE: dict[str, Any] = {"preset": "mixtral-8x7b", "model": {"n_layers": "6"}, "seq_len": 2048}
CAPACITY: dict[str, Any] = MIXTURE | {"model": {"n_layers": "2", "capacity_factor": "1"}}
PAIRS: dict[str, Any] = {"preset": "t5-v1.1-large", "model": {"n_layers": "2", "dropout": "0"}, "seq_len": 512}


def forecast(n_devices: int, **flags: Any) -> dict[str, Any]:
    run = RunConfig(micro_batch_seqs=2, **flags)
    device = load().device("h100-sxm")
    record = rung.forecast(run, run.rung(n_devices), device, devices_of(device, Layout(data=n_devices)), lambda _: None)
    assert not record["failed"], record["failed"]
    return record


@pytest.mark.deviceless
@pytest.mark.parametrize(
    ("n_devices", "flags", "axes"),
    [
        (8, DENSE | {"layout": "fsdp=2,data=2,tensor=2"}, {"data", "fsdp", "tensor"}),
        (8, DENSE | {"layout": "context=2,tensor=2,fsdp=2"}, {"context", "fsdp_context", "tensor"}),
        (8, DENSE | {"layout": "context=4,fsdp=2,ring=1,zero=1", "remat": "none"}, {"context"}),
        (
            8,
            DENSE | {"layout": "pipeline=2,tensor=2,fsdp=2,zero=1", "microbatches": 16},
            {"pipeline", "tensor", "fsdp", "pipeline_tensor"},
        ),
        (8, MIXTURE | {"layout": "expert=4,fsdp=2"}, {"expert", "fsdp_expert"}),
        (8, CAPACITY | {"layout": "expert=4,fsdp=2", "remat": "none"}, {"expert", "fsdp", "fsdp_expert"}),
        (16, MIXTURE | {"layout": "expert=8,tensor=2", "remat": "dots"}, {"expert", "tensor"}),
        (8, PAIRS | {"layout": "data=2,fsdp=2,tensor=2"}, {"data", "fsdp", "tensor"}),
    ],
    ids=lambda given: given.get("layout") if isinstance(given, dict) else "",
)
def test_a_step_sends_what_its_layout_needs(n_devices, flags, axes):
    found = forecast(n_devices, **flags)["collectives"]
    assert off(found) == []
    large = max(c["measured"] for c in found.values())
    sent = {key.split()[0]: c for key, c in found.items() if c["measured"] > large / 50}
    assert axes <= sent.keys()
    for key, c in sent.items():
        assert c["ratio"] == pytest.approx(1, abs=TOLERANCE), key


@pytest.mark.deviceless
def test_a_rule_that_is_gone_is_noticed(monkeypatch):
    """Hidden units that no axis splits any more while they are computed: their weights come together on all."""
    flags = DENSE | {"layout": "fsdp=2,tensor=4"}
    run = RunConfig(micro_batch_seqs=2, **flags)
    asked = run.rung(8)
    closed = by_axis(
        Step(
            config=run.resolved_model, layout=asked.layout, remat=run.remat, precision="bf16", microbatches=1,
            micro_batch_seqs=2, seq_len=run.length,
        ).collectives()
    )  # fmt: skip
    monkeypatch.setitem(sharding.ACTIVATION_RULES, "ffn", None)
    told = off(compared(forecast(8, **flags)["collective_bytes"], closed))
    assert any(line.startswith("tensor all-gather: ") for line in told)


def test_what_is_small_or_moves_nothing_is_not_told():
    measured = {"fsdp all-gather": 100e9, "data all-reduce": 0.5e9, "self collective-permute": 50e9}
    found = compared(measured, {"fsdp all-gather": 97e9})
    assert found["data all-reduce"]["ratio"] is None
    assert "self collective-permute" not in found
    assert off(found) == []
    assert off(compared(measured, {"fsdp all-gather": 94e9})) == [
        "fsdp all-gather: 100.00 GB a step, where the layout needs 94.00"
    ]
