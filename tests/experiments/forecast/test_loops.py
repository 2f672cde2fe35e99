"""How often a loop turns."""

import pytest

from tests.experiments.forecast.texts import entry, module, only


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
