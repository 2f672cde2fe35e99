"""The closed form of our own step against its compiled and simulated schedule: real widths, few layers, few devices."""

import statistics

import pytest

from experiments.forecast.closed_form.practice import ours
from experiments.forecast.closed_form.setup import Setup
from experiments.forecast.closed_form.step import ClosedForm
from experiments.hardware import load
from experiments.validation.simulated import simulated, task_of
from transformer.presets import preset
from transformer.sharding import Layout

FACTS = load()
GRID = [
    ("h100-sxm", "llama3-8b", Layout(), 4, 1, "none"),
    ("h100-sxm", "llama3-8b", Layout(fsdp=8), 4, 1, "dots"),
    ("a100-80g-sxm", "llama3-8b", Layout(fsdp=4, tensor=2), 4, 1, "full"),
    ("h100-sxm", "llama3-8b", Layout(pipeline=2), 1, 8, "full"),
    ("a100-80g-sxm", "llama3-8b", Layout(data=8), 4, 1, "full"),
    ("h100-sxm", "gpt3-1.3b", Layout(fsdp=8), 4, 1, "full"),
    ("h100-sxm", "llama3-8b", Layout(fsdp=8, zero=1), 1, 4, "dots"),
    ("h100-sxm", "llama3-8b", Layout(fsdp=2, context=4), 4, 1, "full"),
]
"""Device, model, layout, sequences of a microbatch, microbatches, remat. Layers are in a loop, so that few of them
compile as fast as many and take as long each."""


@pytest.mark.deviceless
def test_closed_form_is_within_5_percent_of_the_simulated_schedule():
    """In the median; and each within 8 %."""
    found = {}
    for slug, name, layout, micro, m, remat in GRID:
        device = FACTS.device(slug)
        setup = Setup(
            model=preset(name, {"n_layers": "4"}), layout=layout, seq_len=2048, micro_batch_seqs=micro, microbatches=m,
            remat=remat, practice=ours("cudnn", layout),
        )  # fmt: skip
        task = task_of(setup, device)
        assert task.setup == setup  # which asks for what our program does, in every respect
        record = simulated(task)
        assert record["failed"] is None
        found[slug, name, str(layout), remat] = ClosedForm(device).forecast(setup).step_s / record["step_s"]["median"]
    off = [abs(ratio - 1) for ratio in found.values()]
    assert statistics.median(off) <= 0.05, found
    assert max(off) <= 0.08, found
