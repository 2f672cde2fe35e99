"""What kernels of attention and of experts multiply: calls small enough to count by hand, and what real compilers print."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from experiments.forecast.hlo import parse
from experiments.forecast.kernels import seen_pairs
from experiments.forecast.topology import devices_of
from experiments.hardware import load
from tests.experiments.forecast.texts import entry, flops, module, total_flops
from transformer.backends import attend_by
from transformer.config import Backend
from transformer.masks import Causal, Window
from transformer.placement import OnMesh
from transformer.sharding import Layout, make_mesh


def attention_call(target: str, mask: str, window: int | None = None, d_value: int = 16) -> float:
    """Batch 2, 3 heads, 8 queries and keys of size 16."""
    sliding = "" if window is None else f', "sliding_window_length": {window}'
    config = (
        f'{{"cudnn_fmha_backend_config": {{"mask_type": "{mask}"{sliding}, "intermediate_tensor_shape": '
        '{"element_type": "BF16", "dimensions": ["2", "3", "8", "8"]}}}'
    )
    m = module(
        entry(
            "%q = bf16[2,8,3,16]{3,2,1,0} parameter(0)",
            f"%v = bf16[2,8,3,{d_value}]{{3,2,1,0}} parameter(1)",
            f"ROOT %c = (bf16[2,3,8,{d_value}]{{3,1,2,0}}, f32[2,3,8]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %q, %v), "
            f'custom_call_target="{target}", backend_config={config}',
        )
    )
    return flops(m, "c")


@pytest.mark.parametrize(
    ("mask", "window", "pairs"),
    [("NO_MASK", None, 64), ("CAUSAL", None, 36), ("CAUSAL", 0, 36), ("CAUSAL", 3, 1 + 2 + 3 * 6), ("CAUSAL", 9, 36)],
)
def test_attention_kernel_flops(mask: str, window: int | None, pairs: int):
    assert attention_call("__cudnn$fmhaSoftmax", mask, window) == 2 * 2 * (2 * 3) * pairs * 16
    assert attention_call("__cudnn$fmhaSoftmaxBackward", mask, window) == 2 * 5 * (2 * 3) * pairs * 16


def test_a_bias_or_dense_mask_skips_nothing_of_its_own():
    """What an array hides is computed; a causal mask beside it is still skipped."""
    for suffix, products in (("", 2), ("Backward", 5)):
        target = f"__cudnn$fmhaScaleBiasSoftmax{suffix}"
        assert attention_call(target, "NO_MASK") == 2 * products * (2 * 3) * 64 * 16
        assert attention_call(target, "CAUSAL", 0) == 2 * products * (2 * 3) * 36 * 16
        assert attention_call(target, "PADDING") == 2 * products * (2 * 3) * 64 * 16
        assert attention_call(target, "PADDING_CAUSAL") == 2 * products * (2 * 3) * 36 * 16


def test_values_of_another_size_than_keys():
    assert attention_call("__cudnn$fmhaSoftmax", "NO_MASK", d_value=5) == 2 * (2 * 3) * 64 * (16 + 5)
    backward = attention_call("__cudnn$fmhaSoftmaxBackward", "NO_MASK", d_value=5)
    assert backward == 2 * (2 * 3) * 64 * (3 * 16 + 2 * 5)


def test_other_custom_calls_have_no_known_flops():
    assert attention_call("Sharding", "CAUSAL") == 0
    assert attention_call("tpu_custom_call", "CAUSAL") == 0  # another Pallas kernel


@pytest.mark.parametrize(
    ("kernel", "scope", "expected"),
    [
        ("fwd", "sees_3_of_4_blocks/", 0.75 * (16 + 5)),
        ("dq", "sees_3_of_4_blocks/", 0.75 * (2 * 16 + 5)),
        ("dkv", "sees_3_of_4_blocks/", 0.75 * (2 * 16 + 2 * 5)),
        ("fwd", "", 16 + 5),
    ],
)
@pytest.mark.parametrize("batch", [2, 1])
def test_splash_kernel_flops(kernel: str, scope: str, expected: float, batch: int):
    """6 query heads of 3, 8 queries, 12 keys. Scalars come first, ids and gradients after the values. Of one
    sequence there is no dim of the batch."""

    def shape(*dims: int) -> str:
        dims = (batch, *dims) if batch > 1 else dims
        return f"{list(dims)}{{{','.join(str(d) for d in reversed(range(len(dims))))}}}".replace(" ", "")

    m = module(
        entry(
            "%m = s8[1,2,2]{2,1,0} parameter(0)",
            f"%q = bf16{shape(6, 8, 16)} parameter(1)",
            f"%k = bf16{shape(3, 12, 16)} parameter(2)",
            f"%v = bf16{shape(3, 12, 5)} parameter(3)",
            f"%i = s32{shape(8, 128)} parameter(4)",
            f"%g = bf16{shape(6, 8, 5)} parameter(5)",
            f"%c = bf16{shape(6, 8, 5)} custom-call(%m, %q, %k, %v, /*index=4*/%i, %g), "
            'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
            '"xprof_metadata":"{\\"block_q\\": 4}"\n'
            f'}}}}, metadata={{op_name="jit(f)/{scope}vmap(x)/splash_mha_{kernel}_no_residuals/pallas_call"}}',
            f"ROOT %n = bf16{shape(6, 8, 5)} negate(%c)",
        )
    )
    assert flops(m, "c") == 2 * (batch * 6) * (8 * 12) * expected
    assert m.computations["main"].root.operands == ("c",)  # what follows the three lines is read too


@pytest.mark.parametrize("mapped", ["", "2,"])
@pytest.mark.parametrize("turned", [False, True])
def test_experts_kernel_moves_and_multiplies_the_rows_that_are_likely(turned: bool, mapped: str):
    """3 experts of 24 x 40, 12 rows of 16. A dim that is mapped over stands before all others."""
    n, d, f = 2 if mapped else 1, *((40, 24) if turned else (24, 40))
    call = 'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/multiplies_12_of_16_rows/mpmd_map"}'
    m = module(
        entry(
            f"%e = s32[{mapped}2] parameter(0)",
            f"%s = s32[{mapped}3] parameter(1)",
            f"%x = bf16[{mapped}16,{d}] parameter(2)",
            f"%w = bf16[{mapped}3,24,40] parameter(3)",
            f"%g = bf16[{mapped}16,{f}] parameter(4)",
            f"%y = bf16[{mapped}16,{f}] custom-call(%e, %x, %w), {call}",
            f"%dw = bf16[{mapped}3,{d},{f}] custom-call(%s, %s, %x, %g), {call}",
            f"ROOT %other = bf16[{mapped}16,{f}] custom-call(%e, %x, %w), {call.replace('multiplies', 'adds')}",
        )
    )
    assert flops(m, "y") == flops(m, "dw") == n * 2 * 12 * 24 * 40
    main = m.computations["main"]
    of_rows, of_weights = (m.products(main, main.by_name[name])[0] for name in ("y", "dw"))
    assert of_rows[:4] == (4, f, d, 3 * n)  # m, n, k, batch
    assert of_weights[:4] == (d, f, 4, 3 * n)
    moved, whole = (m.traffic_bytes(main, main.by_name[name]) for name in ("y", "other"))
    assert whole - moved == n * 2 * 4 * (24 + 40) + 0.25 * n * 4 * 2
    assert flops(m, "other") == 0


@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 7), (7, 3), (7, 1)])
def test_seen_pairs_counts_the_mask(length: int, window: int):
    assert seen_pairs(length, window) == sum(0 <= i - j < window for i in range(length) for j in range(length))


@pytest.mark.deviceless
@pytest.mark.parametrize(
    ("device", "backend", "products"),
    [
        ("h100-sxm", "blockwise", 7),
        ("tpu-v5p", "blockwise", 7),
        ("h100-sxm", "cudnn", 7),
        ("tpu-v5p", "splash", 9),  # two backward kernels, each of which makes the scores anew
    ],
)
def test_attention_of_real_compilers_has_the_hand_counted_flops(device: str, backend: Backend, products: int):
    """2 sequences of 2,048, 4 heads of 64. Causal and a window of 600: of 4 x 4 blocks of 512, 9 have a pair that
    sees; cuDNN is counted by pairs."""
    place = SingleDeviceSharding(devices_of(load().device(device), Layout(data=4))[0])
    shapes = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in ((2, 2048, 2, 2, 64), *[(2, 2048, 2, 64)] * 2)
    ]

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_by(backend, q, k, v, Causal() & Window(600), scale=0.125).astype(jnp.float32).sum()

    m = parse(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text())
    pairs = seen_pairs(2048, 600) if backend == "cudnn" else 9 * 512**2
    assert total_flops(m, m.entry) == 2 * products * (2 * 4) * pairs * 64


@pytest.mark.deviceless
@pytest.mark.parametrize(
    ("device", "backend", "products", "pairs"),
    [
        ("h100-sxm", "cudnn", 7, 4096 * 4097 / 2 / 4),
        ("tpu-v5p", "splash", 9, (7 + 2) * 512**2),  # of 8 chunks of a block each
    ],
)
def test_attention_over_a_split_sequence_has_the_flops_of_its_part(device, backend, products, pairs):
    """A causal mask over 4,096 positions on 4 devices, 2 sequences, 4 heads of 64: every device has a quarter."""
    mesh = make_mesh(Layout(context=4), devices_of(load().device(device), Layout(data=4)))

    def place(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "context")))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_by(backend, q, k, v, Causal(), scale=0.125, shard=OnMesh(mesh)).astype(jnp.float32).sum()

    shapes = place(2, 4096, 2, 2, 64), *[place(2, 4096, 2, 64)] * 2
    m = parse(jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text())
    assert total_flops(m, m.entry) == 2 * products * (2 * 4) * pairs * 64
