"""Elements by class, counted by hand in fusions as XLA's CPU compiler writes them."""

import pytest

from experiments.forecast.operations import elements
from experiments.hardware import OPERATION_CLASSES
from tests.experiments.forecast.texts import entry, module

SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
    %a = f32[] parameter(0)
    %b = f32[] parameter(1)
    ROOT %s = f32[] add(%a, %b)"""


def counted(*lines: str, also: tuple[str, ...] = ()) -> dict[str, int]:
    """Of one fusion with these lines in it."""
    fused = "\n".join(["%fused (x: f32[]) -> f32[] {", *lines])
    m = module(*also, fused, entry("ROOT %f = f32[5,7] fusion(), kind=kLoop, calls=%fused"))
    main = m.computations[m.entry]
    return dict(elements(m.computations, main, main.root))


X = "%x = f32[5,7]{1,0} parameter(0)"
Y = "%y = f32[5,7]{1,0} parameter(1)"
TURN = ("%t = f32[7,5]{0,1} transpose(%m), dimensions={1,0}", "ROOT %c = f32[7,5]{1,0} copy(%t)")


def test_a_function_is_no_sum():
    got = counted(X, Y, "%e = f32[5,7]{1,0} exponential(%x)", "ROOT %s = f32[5,7]{1,0} add(%e, %y)")
    assert got == {"function": 35, "arithmetic": 35}


def test_a_line_that_is_not_fused_counts_alike():
    m = module(entry("%x = f32[5,7]{1,0} parameter(0)", "ROOT %e = f32[5,7]{1,0} tanh(%x)"))
    main = m.computations["main"]
    assert elements(m.computations, main, main.root) == {"function": 35}
    assert elements(m.computations, main, main.by_name["x"]) == {}


def test_what_a_reduction_is_given_counts_and_not_what_it_makes():
    line = "ROOT %r = f32[5]{0} reduce(%x, %z), dimensions={1}, to_apply=%sum"
    assert counted(X, "%z = f32[] parameter(1)", line, also=(SUM,)) == {"reduction": 35}


@pytest.mark.parametrize(
    ("dims", "other", "of"), [("3,1,5,7", "y", "dotted"), ("3,5,7", "y", "reduction"), ("3,1,5,7", "x", "reduction")]
)
def test_a_sum_of_products_beside_a_dim_of_one(dims: str, other: str, of: str):
    """Squares are no products of two arrays, and without the dim of size 1 there is no such kernel."""
    got = counted(
        f"%x = f32[{dims}] parameter(0)",
        f"%y = f32[{dims}] parameter(1)",
        "%z = f32[] parameter(2)",
        f"%m = f32[{dims}] multiply(%x, %{other})",
        f"ROOT %r = f32[{dims[:-2]}] reduce(%m, %z), dimensions={{{dims.count(',')}}}, to_apply=%sum",
        also=(SUM,),
    )
    assert got == {"arithmetic": 105, of: 105}


def test_two_arrays_are_turned_in_tiles():
    assert counted(X, Y, "%m = f32[5,7]{1,0} multiply(%x, %y)", *TURN) == {"arithmetic": 35, "crossing": 70}


def test_a_constant_keeps_them_from_it():
    one = ("%one = f32[] constant(1)", "%b = f32[5,7]{1,0} broadcast(%one), dimensions={}")
    assert counted(X, *one, "%m = f32[5,7]{1,0} subtract(%b, %x)", *TURN) == {"arithmetic": 35, "scattered": 35}


@pytest.mark.parametrize(
    ("small", "dimensions", "arrays"),
    [("f32[5]{0}", "0", 1), ("f32[7]{0}", "1", 1), ("f32[5,7]{1,0}", "0,1", 2), ("f32[7,5]{1,0}", "1,0", 1)],
)
def test_what_is_repeated_or_lies_along_is_not_read_across(small: str, dimensions: str, arrays: int):
    """A number a row, one a column; a matrix that lies as the first, which is read across too; one that lies as the
    result."""
    repeat = (
        f"%v = {small} parameter(1)",
        f"%b = f32[5,7]{{1,0}} broadcast(%v), dimensions={{{dimensions}}}",
        "%m = f32[5,7]{1,0} multiply(%x, %b)",
    )
    assert counted(X, *repeat, *TURN)["scattered"] == 35 * arrays


def test_a_mask_is_found_behind_the_turn():
    """As attention has it: scores of [heads, queries, keys] turned to [heads, keys, queries]."""
    got = counted(
        "%mask = pred[5,7]{1,0} parameter(1)",
        "%p = f32[3,5,7]{2,1,0} parameter(0)",
        "%b = pred[3,5,7]{2,1,0} broadcast(%mask), dimensions={1,2}",
        "%m = f32[3,5,7]{2,1,0} select(%b, %p, %p)",
        "%t = f32[3,7,5]{1,2,0} transpose(%m), dimensions={0,2,1}",
        "ROOT %c = f32[3,7,5]{2,1,0} copy(%t)",
    )
    assert got == {"arithmetic": 105, "scattered": 2 * 105}


@pytest.mark.parametrize(("rows", "of"), [(512, "scattered"), (513, "scattered_far")])
def test_what_is_read_far_across_leaves_the_first_cache(rows: int, of: str):
    """A line of 64 bytes of each row: 512 are 32 KiB. It is the rows that are gone through, not the columns."""
    one = ("%one = f32[] constant(1)", f"%b = f32[{rows},999]{{1,0}} broadcast(%one), dimensions={{}}")
    got = counted(
        f"%x = f32[{rows},999]{{1,0}} parameter(0)", *one, f"%m = f32[{rows},999]{{1,0}} subtract(%b, %x)",
        f"%t = f32[999,{rows}]{{0,1}} transpose(%m), dimensions={{1,0}}", f"ROOT %c = f32[999,{rows}]{{1,0}} copy(%t)",
    )  # fmt: skip
    assert got == {"arithmetic": rows * 999, of: rows * 999}


def test_rows_of_several_sequences_are_gone_through_one_after_another():
    """4 sequences of 256 rows, turned to columns of 1,024."""
    one = ("%one = f32[] constant(1)", "%b = f32[4,256,9]{2,1,0} broadcast(%one), dimensions={}")
    got = counted(
        "%x = f32[4,256,9]{2,1,0} parameter(0)", *one, "%m = f32[4,256,9]{2,1,0} subtract(%b, %x)",
        "%t = f32[9,4,256]{0,2,1} transpose(%m), dimensions={2,0,1}", "ROOT %c = f32[9,4,256]{2,1,0} copy(%t)",
    )  # fmt: skip
    assert got == {"arithmetic": 9216, "scattered_far": 9216}


def test_rows_that_move_whole_cost_their_bytes_alone():
    x = "%m = f32[3,5,7]{2,1,0} parameter(0)"
    moved = "%t = f32[5,3,7]{2,0,1} transpose(%m), dimensions={1,0,2}"
    assert counted(x, moved, "ROOT %c = f32[5,3,7]{2,1,0} copy(%t)") == {}
    ones = "%m = f32[3,7,1]{2,1,0} parameter(0)"
    turned = "%t = f32[3,1,7]{1,2,0} transpose(%m), dimensions={0,2,1}"
    assert counted(ones, turned, "ROOT %c = f32[3,1,7] copy(%t)") == {}


def test_a_schedule_turns_in_tiles_whatever_else_is_in_it():
    m = module(entry("%x = f32[5,7]{1,0} parameter(0)", "%z = f32[] constant(0)", "ROOT %c = f32[5,7]{0,1} copy(%x)"))
    main = m.computations["main"]
    assert elements(m.computations, main, main.root) == {"crossing": 35}


def test_joined_arrays_are_gone_through_one_by_one():
    assert counted(X, Y, "ROOT %j = f32[10,7]{1,0} concatenate(%x, %y), dimensions={0}") == {"scattered": 70}


def test_fusions_within_fusions_are_counted():
    inner = """%inner (a: f32[5,7]) -> f32[5,7] {
        %a = f32[5,7]{1,0} parameter(0)
        ROOT %e = f32[5,7]{1,0} rsqrt(%a)"""
    outer = "ROOT %g = f32[5,7]{1,0} fusion(%x), kind=kLoop, calls=%inner"
    assert counted(X, outer, also=(inner,)) == {"function": 35}


def test_every_class_can_be_measured():
    from experiments.primitives import OPERATIONS

    assert set(OPERATIONS) == set(OPERATION_CLASSES)
