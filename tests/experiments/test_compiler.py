"""Where XLA cannot tile a product for Triton, the step is compiled without Triton's, and what was taken is told. The
refusal is played here: the program that provokes it (megatron-22b on 8 A100s) takes half a minute."""

import jax
import pytest

from experiments.compiler import compile_step


class Lowered:
    def __init__(self, says: str | None):
        self.says, self.asked = says, []

    def compile(self, compiler_options):
        self.asked.append(dict(compiler_options))
        if self.says and compiler_options.get("xla_gpu_enable_triton_gemm") is not False:
            raise jax.errors.JaxRuntimeError(self.says)
        return "compiled"


def test_what_compiles_is_compiled_once_with_the_options_given():
    lowered = Lowered(None)
    assert compile_step(lowered, {"a": 1}) == ("compiled", {"a": 1})
    assert lowered.asked == [{"a": 1}]


def test_a_product_that_cannot_be_tiled_goes_to_cublas():
    lowered = Lowered("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.156 = bf16[6144,8192]{0,1}")
    wanted = {"a": 1, "xla_gpu_enable_triton_gemm": False}
    assert compile_step(lowered, {"a": 1}) == ("compiled", wanted)
    assert lowered.asked == [{"a": 1}, wanted]


def test_any_other_refusal_is_raised():
    lowered = Lowered("RESOURCE_EXHAUSTED: out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        compile_step(lowered, {})
    assert lowered.asked == [{}]
