"""The parser on modules small enough to count by hand, and on what a real compiler prints."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from experiments.forecast.groups import replica_group
from experiments.forecast.hlo import Instruction, Module, Shape, parse
from experiments.forecast.instructions import FREE
from experiments.forecast.kernels import Product
from experiments.forecast.topology import devices_of
from experiments.hardware import load


def module(*computations: str) -> Module:
    """A scheduled module. Lines are dedented; each computation's first line is its head."""
    text = "HloModule test, is_scheduled=true, entry_computation_layout={()->()}\n"
    for computation in computations:
        head, *body = [line.strip() for line in computation.strip().splitlines()]
        text += "\n".join(["", head, *(f"  {line}" for line in body), "}", ""])
    return parse(text)


def entry(*lines: str) -> str:
    return "\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *lines])


def only(m: Module, name: str) -> Instruction:
    return m.computations[m.entry].by_name[name]


def flops(m: Module, name: str) -> float:
    return m.flops(m.computations[m.entry], only(m, name))


def traffic(m: Module, name: str) -> float:
    return m.traffic_bytes(m.computations[m.entry], only(m, name))


@pytest.mark.smoke
def test_tuple_shapes_comments_layouts_and_memory_spaces():
    m = module(
        entry(
            "%p = (s32[]{:T(128)}, bf16[5,7]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[2,3,11]{2,1,0}) parameter(0)",
            "%g = bf16[5,7]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1",
            'ROOT %n = bf16[5,7]{1,0:T(8,128)(2,1)} negate(%g), metadata={op_name="jit(f)/neg" stack_frame_id=3}',
        )
    )
    assert only(m, "p").shapes == (Shape("s32", ()), Shape("bf16", (5, 7), 1), Shape("f32", (2, 3, 11)))
    assert [s.n_bytes for s in only(m, "p").shapes] == [4, 70, 264]
    root = m.computations["main"].root
    assert (root.name, root.operands, root.op_name) == ("n", ("g",), "jit(f)/neg")
    assert traffic(m, "n") == 70  # what it reads lies in fast memory


def test_sub_byte_and_8_bit_types():
    assert Shape("s4", (6,)).n_bytes == 3
    assert Shape("f8e4m3fn", (6,)).n_bytes == 6
    assert Shape("pred", ()).n_bytes == 1


def test_text_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match="no schedule"):
        parse("HloModule jit_f, entry_computation_layout={()->()}\n\nENTRY %main () -> f32[] {\n}\n")


def test_dot_flops_and_dtype():
    m = module(
        entry(
            "%a = bf16[3,5,7]{2,1,0} parameter(0)",
            "%b = f32[3,7,11]{2,1,0} parameter(1)",
            "ROOT %d = f32[3,5,11]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
            "rhs_batch_dims={0}, rhs_contracting_dims={1}",
        )
    )
    assert flops(m, "d") == 2 * 3 * 5 * 7 * 11
    assert m.products(m.computations["main"], only(m, "d")) == [Product(5, 11, 7, 3, "bf16")]  # the narrower
    assert traffic(m, "d") == 2 * 105 + 4 * 231 + 4 * 165


def test_fused_dot_is_counted_and_its_dtype_found():
    m = module(
        """%fused (x: f8e4m3fn[3,5], y: bf16[5,7]) -> bf16[3,7] {
        %x = f8e4m3fn[3,5]{1,0} parameter(0)
        %y = bf16[5,7]{1,0} parameter(1)
        ROOT %d = bf16[3,7]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}""",
        entry(
            "%a = f8e4m3fn[3,5]{1,0} parameter(0)",
            "%b = bf16[5,7]{1,0} parameter(1)",
            "ROOT %f = bf16[3,7]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused",
        ),
    )
    assert flops(m, "f") == 2 * 3 * 5 * 7
    assert m.products(m.computations["main"], only(m, "f")) == [Product(3, 7, 5, 1, "f8e4m3fn")]
    assert traffic(m, "f") == 15 + 70 + 42


def test_fusion_that_slices_reads_the_slice():
    m = module(
        """%fused (x: bf16[32,5,7], i: s32[]) -> bf16[5,7] {
        %x = bf16[32,5,7]{2,1,0} parameter(0)
        %i = s32[] parameter(1)
        %zero = s32[] constant(0)
        %s = bf16[1,5,7]{2,1,0} dynamic-slice(%x, %i, %zero, %zero), dynamic_slice_sizes={1,5,7}
        ROOT %r = bf16[5,7]{1,0} bitcast(%s)""",
        entry(
            "%a = bf16[32,5,7]{2,1,0} parameter(0)",
            "%k = s32[] parameter(1)",
            "ROOT %f = bf16[5,7]{1,0} fusion(%a, %k), kind=kLoop, calls=%fused",
        ),
    )
    assert traffic(m, "f") == 70 + 4 + 70


def test_fusion_that_slices_through_a_bitcast_reads_the_slice():
    m = module(
        """%fused (x: bf16[32,35], i: s32[]) -> bf16[1,5,7] {
        %x = bf16[32,35]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %v = bf16[32,5,7]{2,1,0} bitcast(%x)
        ROOT %s = bf16[1,5,7]{2,1,0} dynamic-slice(%v, %i, %i, %i), dynamic_slice_sizes={1,5,7}""",
        entry(
            "%a = bf16[32,35]{1,0} parameter(0)",
            "%k = s32[] parameter(1)",
            "ROOT %f = bf16[1,5,7]{2,1,0} fusion(%a, %k), kind=kLoop, calls=%fused",
        ),
    )
    assert traffic(m, "f") == 70 + 4 + 70


def test_fusion_within_a_fusion_reads_and_writes_its_slice():
    """As the TPU compiler writes a product with the weights of one expert, whose result is one of many."""
    m = module(
        """%picked (x: bf16[32,5,7], i: s32[]) -> bf16[5,7] {
        %x = bf16[32,5,7]{2,1,0} parameter(0)
        %i = s32[] parameter(1)
        %zero = s32[] constant(0)
        %s = bf16[1,5,7]{2,1,0} dynamic-slice(%x, %i, %zero, %zero), dynamic_slice_sizes={1,5,7}
        ROOT %r = bf16[5,7]{1,0} bitcast(%s)""",
        """%put (all: bf16[4,3,7], one: bf16[3,7], j: s32[]) -> bf16[4,3,7] {
        %all = bf16[4,3,7]{2,1,0} parameter(0)
        %one = bf16[3,7]{1,0} parameter(1)
        %j = s32[] parameter(2)
        %row = bf16[1,3,7]{2,1,0} bitcast(%one)
        ROOT %u = bf16[4,3,7]{2,1,0} dynamic-update-slice(%all, %row, %j, %j, %j)""",
        """%fused (w: bf16[32,5,7], e: s32[], y: bf16[3,5], z: bf16[4,3,7]) -> bf16[4,3,7] {
        %w = bf16[32,5,7]{2,1,0} parameter(0)
        %e = s32[] parameter(1)
        %y = bf16[3,5]{1,0} parameter(2)
        %z = bf16[4,3,7]{2,1,0} parameter(3)
        %one = bf16[5,7]{1,0} fusion(%w, %e), kind=kLoop, calls=%picked
        %d = bf16[3,7]{1,0} dot(%y, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        ROOT %r = bf16[4,3,7]{2,1,0} fusion(%z, %d, %e), kind=kLoop, calls=%put""",
        entry(
            "%a = bf16[32,5,7]{2,1,0} parameter(0)",
            "%k = s32[] parameter(1)",
            "%b = bf16[3,5]{1,0} parameter(2)",
            "%c = bf16[4,3,7]{2,1,0} parameter(3)",
            "ROOT %f = bf16[4,3,7]{2,1,0} fusion(%a, %k, %b, %c), kind=kOutput, calls=%fused",
        ),
    )
    read, written = 2 * 5 * 7 + 2 * 3 * 5 + 4, 2 * 3 * 7  # the weights of one, the tokens, the index; one result
    assert traffic(m, "f") == read + written
    assert flops(m, "f") == 2 * 3 * 5 * 7


def test_fusion_that_also_uses_the_whole_operand_reads_it_whole():
    m = module(
        """%fused (x: f32[32,5], i: s32[]) -> (f32[1,5], f32[32,5]) {
        %x = f32[32,5]{1,0} parameter(0)
        %i = s32[] parameter(1)
        %s = f32[1,5]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,5}
        %n = f32[32,5]{1,0} negate(%x)
        ROOT %t = (f32[1,5]{1,0}, f32[32,5]{1,0}) tuple(%s, %n)""",
        entry(
            "%a = f32[32,5]{1,0} parameter(0)",
            "%k = s32[] parameter(1)",
            "ROOT %f = (f32[1,5]{1,0}, f32[32,5]{1,0}) fusion(%a, %k), kind=kLoop, calls=%fused",
        ),
    )
    assert traffic(m, "f") == 640 + 4 + 20 + 640


UPDATE = """%fused (x: f32[32,5], u: f32[1,5], i: s32[]) -> ROOT_SHAPE {
    %x = f32[32,5]{1,0} parameter(0)
    %u = f32[1,5]{1,0} parameter(1)
    %i = s32[] parameter(2)
    MARK%w = f32[32,5]{1,0} dynamic-update-slice(%x, %u, %i, %i)
    REST"""


@pytest.mark.parametrize(
    ("root", "rest", "extra_bytes"),
    [
        pytest.param("f32[32,5]{1,0}", "", 0, id="root"),
        pytest.param("f32[160]{0}", "ROOT %b = f32[160]{0} bitcast(%w)", 0, id="through a bitcast"),
        pytest.param(
            "(f32[32,5]{1,0}, f32[1,5]{1,0})",
            "%n = f32[1,5]{1,0} negate(%u)\nROOT %t = (f32[32,5]{1,0}, f32[1,5]{1,0}) tuple(%w, %n)",
            20,
            id="in a tuple",
        ),
    ],
)
def test_update_in_place_writes_the_slice(root: str, rest: str, extra_bytes: int):
    fused = UPDATE.replace("ROOT_SHAPE", root).replace("MARK", "" if rest else "ROOT ").replace("REST", rest)
    m = module(
        fused,
        entry(
            "%a = f32[32,5]{1,0} parameter(0)",
            "%b = f32[1,5]{1,0} parameter(1)",
            "%k = s32[] parameter(2)",
            f"ROOT %f = {root} fusion(%a, %b, %k), kind=kLoop, calls=%fused",
        ),
    )
    assert traffic(m, "f") == 20 + 4 + 20 + extra_bytes  # the update and its place read, the slice written


def test_unfused_slices_move_the_slice_twice():
    m = module(
        entry(
            "%a = f32[32,5]{1,0} parameter(0)",
            "%u = f32[1,5]{1,0} parameter(1)",
            "%s = f32[1,5]{1,0} slice(%a), slice={[0:1], [0:5]}",
            "ROOT %w = f32[32,5]{1,0} dynamic-update-slice(%a, %u)",
        )
    )
    assert traffic(m, "s") == 40
    assert traffic(m, "w") == 40


def test_trip_count_as_the_gpu_compiler_prints_it():
    m = module(
        entry(
            'ROOT %w = (s32[]) while(%p), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"96"}}',
        )
    )
    assert m.trip_count(only(m, "w")) == 96


@pytest.mark.parametrize(("bound", "gain", "trips"), [(32, 1, 32), (8, 2, 4), (7, 2, 4)])
def test_trip_count_from_the_condition_and_the_gain_of_an_iteration(bound: int, gain: int, trips: int):
    """Windowed products are unrolled by the TPU compiler: their counter gains 2 an iteration."""
    m = module(
        f"""%cond (p: (f32[9], s32[])) -> pred[] {{
        %p = (f32[9]{{0}}, s32[]) parameter(0)
        %n = s32[] constant({bound})
        %i = s32[] get-tuple-element(%p), index=1
        ROOT %lt = pred[] compare(%i, %n), direction=LT""",
        f"""%body (q: (f32[9], s32[])) -> (f32[9], s32[]) {{
        %q = (f32[9]{{0}}, s32[]) parameter(0)
        %x = f32[9]{{0}} get-tuple-element(%q), index=0
        %j = s32[] get-tuple-element(%q), index=1
        %large = s32[] constant(1000)
        %g = s32[] constant({gain})
        %next = s32[] add(%j, %g)
        ROOT %t = (f32[9]{{0}}, s32[]) tuple(%x, %next)""",
        entry("ROOT %w = (f32[9]{0}, s32[]) while(%p), condition=%cond, body=%body"),
    )
    assert m.trip_count(only(m, "w")) == trips


@pytest.mark.parametrize(
    ("start", "step", "bound", "direction", "trips"),
    [
        (0, 1, 12, "LT", 12),
        (2, 1, 12, "LT", 10),
        (2, 3, 12, "LE", 4),  # 2, 5, 8, 11
        (10, -3, 0, "GT", 4),  # 10, 7, 4, 1
        (10, -3, 1, "GE", 4),
        (8, -2, 0, "NE", 4),
        (5, 1, 5, "LT", 0),
        (0, 0, 5, "LT", None),  # for ever
    ],
)
def test_trip_count_of_a_counter_that_starts_strides_and_turns(
    start: int, step: int, bound: int, direction: str, trips: int | None
):
    m = module(
        f"""%cond (p: (s32[], f32[])) -> pred[] {{
        %p = (s32[], f32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] constant({bound})
        ROOT %go = pred[] compare(%i, %n), direction={direction}""",
        f"""%body (q: (s32[], f32[])) -> (s32[], f32[]) {{
        %q = (s32[], f32[]) parameter(0)
        %j = s32[] get-tuple-element(%q), index=0
        %x = f32[] get-tuple-element(%q), index=1
        %step = s32[] constant({step})
        %next = s32[] add(%step, %j)
        %y = f32[] negate(%x)
        ROOT %t = (s32[], f32[]) tuple(%next, %y)""",
        entry(
            f"%from = s32[] constant({start})",
            "%copied = s32[] copy(%from)",
            "%x0 = f32[] constant(1)",
            "%given = (s32[], f32[]) tuple(%copied, %x0)",
            "ROOT %w = (s32[], f32[]) while(%given), condition=%cond, body=%body",
        ),
    )
    assert m.trip_count(only(m, "w")) == trips


def test_trip_count_whose_bound_travels_along_and_whose_gain_is_one_of_a_fusion_s_results():
    m = module(
        """%cond (p: (s32[], s32[])) -> pred[] {
        %p = (s32[], s32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        %n = s32[] get-tuple-element(%p), index=1
        ROOT %go = pred[] compare(%n, %i), direction=GT""",
        """%two (a: s32[]) -> (f32[7], s32[]) {
        %a = s32[] parameter(0)
        %z = f32[7]{0} broadcast(%a), dimensions={}
        %one = s32[] constant(2)
        %b = s32[] add(%a, %one)
        ROOT %r = (f32[7]{0}, s32[]) tuple(%z, %b)""",
        """%body (q: (s32[], s32[])) -> (s32[], s32[]) {
        %q = (s32[], s32[]) parameter(0)
        %j = s32[] get-tuple-element(%q), index=0
        %m = s32[] get-tuple-element(%q), index=1
        %f = (f32[7]{0}, s32[]) fusion(%j), kind=kLoop, calls=%two
        %next = s32[] get-tuple-element(%f), index=1
        ROOT %t = (s32[], s32[]) tuple(%next, %m)""",
        entry(
            "%zero = s32[] constant(0)",
            "%bound = s32[] constant(9)",
            "%given = (s32[], s32[]) tuple(%zero, %bound)",
            "ROOT %w = (s32[], s32[]) while(%given), condition=%cond, body=%body",
        ),
    )
    assert m.trip_count(only(m, "w")) == 5


def test_trip_count_that_data_decides_is_none():
    m = module(
        """%cond (p: (f32[])) -> pred[] {
        %p = (f32[]) parameter(0)
        %x = f32[] get-tuple-element(%p), index=0
        %n = f32[] constant(1e-06)
        ROOT %go = pred[] compare(%x, %n), direction=GT""",
        """%body (q: (f32[])) -> (f32[]) {
        %q = (f32[]) parameter(0)
        %x = f32[] get-tuple-element(%q), index=0
        %y = f32[] sqrt(%x)
        ROOT %t = (f32[]) tuple(%y)""",
        entry("ROOT %w = (f32[]) while(%p), condition=%cond, body=%body"),
    )
    assert m.trip_count(only(m, "w")) is None


def test_trip_count_of_a_fused_condition():
    m = module(
        """%compare (i: s32[]) -> pred[] {
        %i = s32[] parameter(0)
        %n = s32[] constant(12)
        ROOT %lt = pred[] compare(%i, %n), direction=LT""",
        """%cond (p: (s32[])) -> pred[] {
        %p = (s32[]) parameter(0)
        %i = s32[] get-tuple-element(%p), index=0
        ROOT %f = pred[] fusion(%i), kind=kLoop, calls=%compare""",
        """%add (j: s32[]) -> s32[] {
        %j = s32[] parameter(0)
        %one = s32[] constant(1)
        ROOT %a = s32[] add(%j, %one)""",
        """%body (q: (s32[])) -> (s32[]) {
        %q = (s32[]) parameter(0)
        %j = s32[] get-tuple-element(%q), index=0
        %f = s32[] fusion(%j), kind=kLoop, calls=%add
        ROOT %t = (s32[]) tuple(%f)""",
        entry("ROOT %w = (s32[]) while(%p), condition=%cond, body=%body"),
    )
    assert m.trip_count(only(m, "w")) == 12


def test_async_pairs_name_their_collective():
    m = module(
        """%wrapped (x: bf16[8,5]) -> bf16[1,5] {
        %x = bf16[8,5]{1,0} parameter(0)
        ROOT %rs = bf16[1,5]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum""",
        entry(
            "%a = bf16[1,5]{1,0} parameter(0)",
            "%b = bf16[8,5]{1,0} parameter(1)",
            "%c = bf16[16,5]{1,0} parameter(2)",
            "%ag = (bf16[1,5]{1,0}, bf16[8,5]{1,0}) all-gather-start(%a), replica_groups=[1,8]<=[8], dimensions={0}",
            "%agd = bf16[8,5]{1,0} all-gather-done(%ag)",
            "%rs = ((bf16[8,5]{1,0}, bf16[16,5]{1,0}), (bf16[1,5]{1,0}, bf16[2,5]{1,0})) "
            "reduce-scatter-start(%b, /*index=1*/%c), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum",
            "%rsd = (bf16[1,5]{1,0}, bf16[2,5]{1,0}) reduce-scatter-done(%rs)",
            "%as = ((bf16[8,5]{1,0}), bf16[1,5]{1,0}, u32[]) async-start(%b), calls=%wrapped",
            "ROOT %asd = bf16[1,5]{1,0} async-done(%as)",
        ),
    )
    main = m.computations["main"]
    assert [only(m, n).collective for n in ("ag", "agd", "rs", "as")] == ["all-gather", None, "reduce-scatter", None]
    assert [s.n_bytes for s in main.operand_shapes(only(m, "rs"))] == [80, 160]
    assert only(m, "as").called == ("wrapped",)
    assert only(m, "agd").operands == ("ag",)


def test_called_computations_of_a_conditional():
    m = module(entry("ROOT %c = f32[] conditional(%i, %x, %y), branch_computations={%left, %right.1}"))
    assert only(m, "c").called == ("left", "right.1")
    m = module(entry("ROOT %c = f32[] conditional(%i, %x, %y), true_computation=%yes, false_computation=%no"))
    assert only(m, "c").called == ("yes", "no")


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


def test_a_start_of_any_instruction_moves_what_the_instruction_does():
    """What the pair keeps in between (operands, a state) is not moved."""
    m = module(
        entry(
            "%a = bf16[32,5]{1,0} parameter(0)",
            "%k = s32[] parameter(1)",
            "%s = ((bf16[32,5]{1,0}, s32[], s32[]), bf16[1,5]{1,0}, u32[]) dynamic-slice-start(%a, %k, %k), "
            "dynamic_slice_sizes={1,5}",
            "ROOT %d = bf16[1,5]{1,0} dynamic-slice-done(%s)",
        )
    )
    assert traffic(m, "s") == 2 * 10


def test_cycles_of_a_tpu_fusion():
    config = '{"window_config":{"kernel_window_bounds":[],"estimated_cycles":"15377","iteration_bounds":["1"]}}'
    m = module(entry("%a = f32[7]{0} parameter(0)", f"ROOT %n = f32[7]{{0}} negate(%a), backend_config={config}"))
    assert (only(m, "n").cycles, only(m, "a").cycles) == (15377, None)


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [0, 1]),
        ("replica_groups={{3,1,2,0}}", [3, 1, 2, 0]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [0, 1, 2, 3]),
        ("replica_groups=[8,128]<=[128,8]T(1,0), use_global_device_ids=true", list(range(0, 1024, 8))),
        ("replica_groups=[4,4]<=[4,2,2]T(2,1,0)", [0, 4, 8, 12]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=64] {'axis_1'}, dimensions={1}", list(range(64))),
        ("replica_groups=mesh['data'=2,'fsdp'=3,'tensor'=2] {'fsdp'}", [0, 2, 4]),
        ("replica_groups=mesh['data'=2,'fsdp'=3,'tensor'=2] {'data','fsdp'}", [0, 2, 4, 6, 8, 10]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=1,'d'=2], device_ids=([2,2]T(1,0)) {'b'}, dimensions={1}", [0, 1]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=1,'d'=2], device_ids=([2,2]T(1,0)) {'d'}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(1)2}", [0, 4]),  # parts of an axis, from its most significant
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=8] {'a','b':(4)2}", [0, 1, 8, 9]),
        ('frontend_attributes={_xla_send_recv_source_target_pairs="{{0,1},{1,2}}"}', [0, 1]),
        ("replica_groups={}, to_apply=%sum", list(range(16))),
        ("channel_id=1, to_apply=%sum", list(range(16))),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [3, 0]),  # the farthest is the last to end
        ("channel_id=1, source_target_pairs={{4,4},{8,9}}", [8, 9]),
    ],
)
def test_replica_group_in_every_syntax(attributes: str, group: list[int]):
    line = Instruction("c", "all-gather", (), (), ", " + attributes)
    assert replica_group(line.attributes, 16) == group


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


def total_flops(m: Module, name: str) -> float:
    """Loops multiplied out."""
    total = 0.0
    for instruction in m.computations[name].instructions:
        if instruction.opcode == "while":
            body = instruction.attribute(r"body=%?([\w.\-]+)")
            assert body is not None
            total += (m.trip_count(instruction) or 1) * total_flops(m, body)
        else:
            total += m.flops(m.computations[name], instruction)
    return total


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
    place = SingleDeviceSharding(devices_of(load().device("h100-sxm"), 1)[0])

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
