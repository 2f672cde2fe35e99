"""The fate of single tensors: numbers stay, FLOPs are counted, what is offloaded leaves the device."""

import jax
import pytest

from tests.experiments.test_step import assert_close, gradients, make
from tests.transformer.test_accounting import LENGTH, MODELS, SEQS, abstract_step, inputs
from transformer.accounting import hardware_flops_per_token, traced_flops
from transformer.errors import RequestError
from transformer.remat import TENSORS, fates
from transformer.sharding import Layout

CHOSEN = [f"full,{name}:save" for name in TENSORS]
CHOSEN += [f"dots,{name}:recompute" for name in TENSORS if name != "layer_input"]
OF = {"router": "capacity", "expert_product": "dropless", "latents": "latent"}


@pytest.mark.parametrize("remat", CHOSEN)
def test_flops_of_a_tensor_s_fate_are_those_traced(remat):
    """Every tensor is of one of these models; an encoder-decoder has most of them twice."""
    tensor = remat.partition(",")[2].partition(":")[0]
    for name in {OF.get(tensor, "encoder_decoder"), "sandwich", "dropless"}:
        step = abstract_step(MODELS[name], remat=remat)
        traced = traced_flops(step.gradients, *inputs(step)) / (SEQS * LENGTH)
        assert traced == pytest.approx(hardware_flops_per_token(MODELS[name], LENGTH, remat, "xla", SEQS), rel=1e-12)


OFFLOADED = [
    ("llama", "full,layer_input:offload,attention_output:offload", Layout(fsdp=4)),
    ("dropless", "dots,expert_product:offload", Layout(fsdp=2, expert=2)),
    ("t5", "dots,attention_output:offload,ffn_up:recompute", Layout(fsdp=2, zero=1)),
]


@pytest.mark.parametrize(("name", "remat", "layout"), OFFLOADED, ids=str)
def test_fates_change_no_gradient(name, remat, layout):
    want = gradients(make(name, Layout()))
    loss, grads = gradients(make(name, layout, remat=remat))
    assert loss == pytest.approx(want[0], rel=1e-5)
    assert_close(grads, want[1])


def test_only_offloaded_tensors_go_to_the_host():
    def to_host(remat: str) -> int:
        step = abstract_step(MODELS["tiny"], remat=remat)
        return str(jax.make_jaxpr(step.gradients)(*inputs(step))).count("Space.Host")

    assert to_host("full") == to_host("dots") == 0
    assert to_host("full,ffn_up:offload") > 0


def test_fates_are_those_given():
    assert fates("none") == {}
    assert set(fates("dots").values()) == {"save"}
    full = fates("full,ffn_up:save,router:offload")
    assert {name for name, fate in full.items() if fate == "save"} == {"layer_input", "ffn_up"}
    assert full["router"] == "offload"
    with pytest.raises(RequestError, match="given twice"):
        fates("full,ffn_up:save,ffn_up:offload")
