"""What is multiplied: dots, calls to cuBLAS, and convolutions, as which the TPU compiler writes products."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.forecast.hlo import Instruction, Module, parse
from experiments.forecast.instructions import FREE
from experiments.forecast.kernels import Product
from experiments.forecast.topology import devices_of
from experiments.hardware import load
from tests.experiments.forecast.texts import entry, flops, module, only, total_flops, traffic
from transformer.sharding import Layout


def call(target: str, operands: str, made: str, config: str) -> tuple[Module, Instruction]:
    lines = [f"%p{i} = {shape} parameter({i})" for i, shape in enumerate(operands.split())]
    names = ", ".join(f"%p{i}" for i in range(len(lines)))
    line = f'ROOT %c = {made} custom-call({names}), custom_call_target="{target}", backend_config={config}'
    m = module(entry(*lines, line))
    return m, only(m, "c")


def gemm(contracting: tuple[int, int], batch: str = "") -> str:
    left, right = contracting
    return (
        '{"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":'
        f'{{"lhs_contracting_dimensions":["{left}"],"rhs_contracting_dimensions":["{right}"],'
        f'"lhs_batch_dimensions":[{batch}],"rhs_batch_dimensions":[{batch}]}},"precision_config":{{}}}}}}'
    )


def test_cublas_calls_say_what_they_multiply():
    m, c = call("__cublas$gemm", "bf16[5,3]{1,0} bf16[5,7]{1,0}", "(bf16[3,7]{1,0}, s8[4194304]{0})", gemm((0, 0)))
    assert m.products(m.computations["main"], c) == [Product(3, 7, 5, 1, "bf16")]
    assert traffic(m, "c") == 2 * (15 + 35 + 21)  # the workspace is not read
    m, c = call("__cublas$lt$matmul", "f32[2,3,5]{2,1,0} f32[2,5,7]{2,1,0}", "f32[2,3,7]{2,1,0}", gemm((2, 1), '"0"'))
    assert m.products(m.computations["main"], c) == [Product(3, 7, 5, 2, "f32")]
    assert flops(m, "c") == 2 * 2 * 3 * 5 * 7


def test_float8_products_have_scales_behind_their_operands():
    m, c = call(
        "__cublas$lt$matmul$f8", "f8e4m3fn[3,5]{1,0} f8e5m2[7,5]{1,0} f32[] f32[]", "bf16[3,7]{1,0}", gemm((1, 1))
    )
    assert m.products(m.computations["main"], c) == [Product(3, 7, 5, 1, "f8e4m3fn")]
    m, c = call(
        "__cudnn$blockScaledDot",
        "f8e4m3fn[2,3,32]{2,1,0} f8e4m3fn[2,7,32]{2,1,0} f8e8m0fnu[2,3,1]{2,1,0} f8e8m0fnu[2,7,1]{2,1,0}",
        "(bf16[2,3,7]{2,1,0}, u8[128]{0})", "{}",
    )  # fmt: skip
    assert m.products(m.computations["main"], c) == [Product(3, 7, 32, 2, "f8e4m3fn")]


def test_ragged_product_multiplies_every_row_once():
    m = module(
        entry(
            "%a = bf16[12,5]{1,0} parameter(0)",
            "%b = bf16[4,5,7]{2,1,0} parameter(1)",
            "%g = s32[4]{0} parameter(2)",
            "ROOT %d = bf16[12,7]{1,0} ragged-dot(%a, %b, %g), lhs_contracting_dims={1}, rhs_contracting_dims={1}, "
            "lhs_ragged_dims={0}, rhs_group_dims={0}",
        )
    )
    assert m.products(m.computations["main"], only(m, "d")) == [Product(12, 7, 5, 1, "bf16")]


def convolution(left: str, right: str, out: str, attributes: str) -> Product:
    m = module(
        entry(
            f"%a = {left} parameter(0)",
            f"%b = {right} parameter(1)",
            f"ROOT %c = {out} convolution(%a, %b), {attributes}",
        )
    )
    (product,) = m.products(m.computations["main"], only(m, "c"))
    return product


def test_matrix_product_as_a_convolution():
    got = convolution("bf16[3,5]{1,0}", "bf16[5,7]{1,0}", "bf16[3,7]{1,0}", "dim_labels=bf_io->bf")
    assert got == Product(3, 7, 5, 1, "bf16")


def test_second_contracted_dim_as_a_window():
    """One output position that meets all 5 of the kernel's."""
    got = convolution(
        "bf16[3,5,7]{2,1,0}", "bf16[5,7,11]{2,1,0}", "bf16[3,1,11]{2,1,0}",
        "window={size=5}, dim_labels=b0f_0io->b0f",
    )  # fmt: skip
    assert got == Product(3, 11, 5 * 7, 1, "bf16")


def test_second_free_dim_as_a_window():
    """A kernel of one meets each of 5 positions once."""
    got = convolution(
        "bf16[3,5,7]{2,1,0}", "bf16[1,7,11]{2,1,0}", "bf16[3,5,11]{2,1,0}",
        "window={size=1}, dim_labels=b0f_0io->b0f",
    )  # fmt: skip
    assert got == Product(3 * 5, 11, 7, 1, "bf16")


def test_free_kernel_dim_as_a_padded_reversed_window():
    """One input position meets each of the kernel's 5, at 5 outputs; the other 20 pairs fall on padding."""
    got = convolution(
        "bf16[3,1,7]{2,1,0}", "bf16[5,7,11]{2,1,0}", "bf16[3,5,11]{2,1,0}",
        "window={size=5 pad=4_4 rhs_reversal=1}, dim_labels=b0f_0io->b0f",
    )  # fmt: skip
    assert got == Product(3, 5 * 11, 7, 1, "bf16")


def test_batch_dim_as_a_dilated_window_counts_only_its_diagonal():
    """XLA writes batch B as a window of size B, stride B - 1, input dilated by B: one meeting a batch element."""
    got = convolution(
        "bf16[8,5,7]{2,1,0}", "bf16[8,7,11]{2,1,0}", "bf16[8,5,11]{2,1,0}",
        "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
    )  # fmt: skip
    assert got == Product(5, 11, 7, 8, "bf16")


def test_two_windows_multiply():
    got = convolution(
        "bf16[3,5,2,7]{3,2,1,0}", "bf16[5,2,7,11]{3,2,1,0}", "bf16[3,1,1,11]{3,2,1,0}",
        "window={size=5x2}, dim_labels=b01f_01io->b01f",
    )  # fmt: skip
    assert got == Product(3, 11, 5 * 2 * 7, 1, "bf16")


def test_groups_of_a_convolution():
    """Features in 3 groups: each output is made of a third of the inputs."""
    got = convolution(
        "bf16[4,6]{1,0}", "bf16[2,9]{1,0}", "bf16[4,9]{1,0}", "dim_labels=bf_io->bf, feature_group_count=3"
    )
    assert got == Product(4, 3, 2, 3, "bf16")


def test_real_text_of_the_cpu_compiler_has_the_hand_counted_flops():
    """Five layers of [8, 48] x [48, 48], then [8, 48] x [48, 31]."""

    def f(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
        return x @ v

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 48), (5, 48, 48), (48, 31))]
    m = parse(jax.jit(f).lower(*shapes).compile().as_text())
    assert total_flops(m, m.entry) == 5 * 2 * 8 * 48 * 48 + 2 * 8 * 48 * 31
    assert all(i.opcode in FREE or m.traffic_bytes(c, i) >= 0 for c in m.computations.values() for i in c.instructions)


@pytest.mark.deviceless
def test_calls_to_cublas_as_the_gpu_compiler_prints_them():
    """Without its own products XLA calls cuBLAS, and for float8 operands with scales its float8 product."""
    place = SingleDeviceSharding(devices_of(load().device("h100-sxm"), Layout(data=1))[0])

    def f(x: jax.Array, w: jax.Array, q: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = q.astype(jnp.bfloat16) * s
        return x @ w, jax.lax.dot_general(wide, wide, (((1,), (1,)), ((), ())))

    types = (jnp.bfloat16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.bfloat16)
    shapes = ((4, 256, 128), (4, 128, 512), (1024, 512), ())
    given = [jax.ShapeDtypeStruct(s, t, sharding=place) for s, t in zip(shapes, types, strict=True)]
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    m = parse(jax.jit(f).lower(*given).compile(compiler_options=options).as_text())
    found = [p for c in m.computations.values() for i in c.instructions if i.target for p in m.products(c, i)]
    assert sorted(found) == [Product(256, 512, 128, 4, "bf16"), Product(1024, 1024, 512, 1, "f8e4m3fn")]
