"""The parser on modules small enough to count by hand: lines, fusions, traffic, groups."""

import pytest

from experiments.forecast.groups import replica_group
from experiments.forecast.hlo import Instruction, Shape, parse
from experiments.forecast.kernels import Product
from tests.experiments.forecast.texts import entry, flops, module, only, traffic


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


@pytest.mark.parametrize(
    ("left", "right", "contracted", "turned"),
    [
        ("3,5]{1,0}", "5,7]{1,0}", (1, 0), False), ("5,3]{1,0}", "7,5]{1,0}", (0, 1), True),
        ("5,3]{1,0}", "5,7]{1,0}", (0, 0), False), ("3,5]{1,0}", "7,5]{1,0}", (1, 1), False),
        ("3,5]{0,1}", "5,7]{0,1}", (1, 0), True), ("5,3]{0,1}", "7,5]{0,1}", (0, 1), False),
    ],
)  # fmt: skip
def test_a_product_is_turned_as_its_operands_lie(left: str, right: str, contracted: tuple[int, int], turned: bool):
    """Whatever dims are called, what counts is which is the fastest."""
    m = module(
        entry(
            f"%a = f32[{left} parameter(0)",
            f"%b = f32[{right} parameter(1)",
            f"ROOT %d = f32[3,7]{{1,0}} dot(%a, %b), lhs_contracting_dims={{{contracted[0]}}}, "
            f"rhs_contracting_dims={{{contracted[1]}}}",
        )
    )
    assert m.products(m.computations["main"], only(m, "d")) == [Product(3, 7, 5, 1, "f32", turned)]


def test_dims_of_size_one_lie_nowhere():
    assert Shape("f32", (3, 1, 5)).order == (2, 0)
    assert Shape("f32", (3, 1, 5), layout="1,0,2").order == (0, 2)


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
