"""Schedules worked by hand: a device of round numbers, every time known exactly.

Device: 1e12 bf16 FLOP/s, 1e9 bytes/s of memory, 1e8 bytes/s of links, nothing lost, no latency. So
bf16[1000,1000] x bf16[1000,1000] takes 2 ms of arithmetic and 6 ms of memory, and n bytes of a gather
over 4 devices take 0.75 n / 1e8 s.
"""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.forecast.constants import IN_STEP
from experiments.forecast.groups import axis_of
from experiments.forecast.hlo import parse
from experiments.forecast.network import Fabric
from experiments.forecast.rates import LAUNCH_S, Rates
from experiments.forecast.simulate import Simulator
from experiments.forecast.timeline import Timeline, Transfer, Work
from experiments.hardware import Device
from transformer.errors import RequestError
from transformer.sharding import Layout

DEVICE = Device(
    slug="round", name="Round numbers", platform="gpu", compile_target="round",
    peak_flops_per_s={"bf16": 1e12, "tf32": 5e11, "fp8": 2e12}, hbm_bytes=1e12, hbm_bytes_per_s=1e9,
    host_bytes_per_s=1e8,
    devices_per_node=64, scaleup_devices=64, link_bytes_per_s=1e8, nic_bytes_per_s=1e7,
    matmul_efficiency=IN_STEP.value,  # a product alone is faster than in a step, which takes the round number
    memory_efficiency=1.0, link_efficiency=1.0, attention_efficiency=1.0,
)  # fmt: skip
FAST = dataclasses.replace(DEVICE, hbm_bytes_per_s=1e18)  # memory never counts
GATHER_S = 0.75 * 4 * 2e5 / 1e8  # of `gather`, below: 6 ms

PARTS = {
    "dot": "%{n} = bf16[1000,1000]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}",
    "start": "%{n} = (bf16[100000]{{0}}, bf16[400000]{{0}}) all-gather-start(%s), replica_groups=[2,4]<=[8]",
    "done": "%{n} = bf16[400000]{{0}} all-gather-done(%{of})",
    "gather": "%{n} = bf16[400000]{{0}} all-gather(%s), replica_groups=[2,4]<=[8]",
    "negate": "%{n} = f32[1000000]{{0}} negate(%m)",
    "opaque": '%{n} = f32[1000000]{{0}} custom-call(%m), custom_call_target="mystery"',
}
PARAMETERS = """
  %a = bf16[1000,1000]{1,0} parameter(0)
  %s = bf16[100000]{0} parameter(1)
  %m = f32[1000000]{0} parameter(2)
"""


def part(kind: str, name: str, of: str = "") -> str:
    return "  " + PARTS[kind].format(n=name, of=of) + "\n"


LAYOUT = Layout(data=2, fsdp=4)


def play(
    lines: str, *computations: str, device: Device = FAST, layout: Layout = LAYOUT, trace: bool = False, **of: float
) -> Timeline:
    inner = "".join(f"{c}}}\n" for c in computations)
    text = f"HloModule t, is_scheduled=true\n{inner}ENTRY %main (p: f32[]) -> f32[] {{{PARAMETERS}{lines}}}\n"
    timeline = Simulator(parse(text), Rates(device), Fabric(device), layout, **of).run(trace=trace)
    assert sum(timeline.breakdown_s.values()) == pytest.approx(timeline.compute_s, rel=1e-9)
    return timeline


def parts(timeline: Timeline) -> dict[str, float]:
    return {k: v for k, v in timeline.breakdown_s.items() if v}


@pytest.mark.smoke
def test_one_matrix_product():
    got = play(part("dot", "d"))
    assert parts(got) == pytest.approx({"matmul": 2e-3})
    assert got.flops == {"matmul": 2e9}


def test_matrix_product_bound_by_memory():
    assert play(part("dot", "d"), device=DEVICE).compute_s == pytest.approx(6e-3)


def test_efficiencies_stretch_what_they_are_of():
    half = dataclasses.replace(FAST, matmul_efficiency=0.5 * IN_STEP.value)
    assert play(part("dot", "d"), device=half).compute_s == pytest.approx(4e-3)
    half = dataclasses.replace(DEVICE, memory_efficiency=0.5)
    assert play(part("negate", "n"), device=half).compute_s == pytest.approx(16e-3)


def test_elementwise_fusion_is_bound_by_memory():
    fused = "%fused (x: f32[1000000]) -> f32[1000000] {\n  %x = f32[1000000]{0} parameter(0)\n"
    fused += "  ROOT %e = f32[1000000]{0} exponential(%x)\n"
    got = play("  %f = f32[1000000]{0} fusion(%m), kind=kLoop, calls=%fused\n", fused, device=DEVICE)
    assert parts(got) == pytest.approx({"memory": 8e-3})


def test_a_core_takes_the_longer_of_bytes_and_operations():
    """negate: 1e6 elements, 8 MB read and written at 1e9 bytes/s."""
    slow, quick = (dataclasses.replace(DEVICE, operation_s={"arithmetic": s}) for s in (2e-8, 2e-9))
    assert play(part("negate", "n"), device=slow).breakdown_s["memory"] == pytest.approx(20e-3)
    assert play(part("negate", "n"), device=quick).breakdown_s["memory"] == pytest.approx(8e-3)


def test_what_is_fused_to_a_product_takes_its_own_time():
    fused = """%f (p: bf16[1000,1000]) -> bf16[1000,1000] {
      %p = bf16[1000,1000]{1,0} parameter(0)
      %d = bf16[1000,1000]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      ROOT %e = bf16[1000,1000]{1,0} exponential(%d)\n"""
    core = dataclasses.replace(FAST, operation_s={"function": 3e-9})
    line = "  %x = bf16[1000,1000]{1,0} fusion(%a), kind=kCustom, calls=%f\n"
    assert play(line, fused, device=core).breakdown_s["matmul"] == pytest.approx(2e-3 + 3e-3)


def test_temporaries_are_given_anew_in_every_step():
    core = dataclasses.replace(DEVICE, fresh_bytes_per_s=1e10)
    text = f"HloModule t, is_scheduled=true\nENTRY %main (p: f32[]) -> f32[] {{{PARAMETERS}{part('negate', 'n')}}}\n"
    step = Simulator(parse(text), Rates(core), Fabric(core), LAYOUT, fresh_bytes=1e8).run(trace=True)
    assert step.breakdown_s["memory"] == pytest.approx(8e-3 + 10e-3)
    assert step.spans[0].name == "temporaries, given anew"


def test_nothing_is_faster_than_a_launch():
    got = play("  %z = f32[] negate(%m0)\n  %y = f32[] negate(%z)\n")
    assert sum(parts(got).values()) == pytest.approx(2 * LAUNCH_S["gpu"])
    assert parts(got)["host"] == pytest.approx(2 * (LAUNCH_S["gpu"] - got.breakdown_s["memory"] / 2))


def test_gather_fully_hidden():
    dots = "".join(part("dot", f"d{i}") for i in range(4))
    got = play(part("start", "g") + dots + part("done", "e", "g"))
    assert parts(got) == pytest.approx({"matmul": 8e-3})
    assert got.hidden_s == pytest.approx({"fsdp": GATHER_S})


def test_gather_partly_exposed():
    got = play(part("start", "g") + part("dot", "d") + part("done", "e", "g"))
    assert parts(got) == pytest.approx({"matmul": 2e-3, "exposed_fsdp": 4e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 2e-3})
    assert got.compute_s == pytest.approx(6e-3)


def test_two_gathers_queue():
    """0 to 6 ms and 6 to 12 ms on the wire; 2 ms of arithmetic."""
    got = play(
        part("start", "g") + part("start", "h") + part("dot", "d") + part("done", "e", "g") + part("done", "f", "h")
    )
    assert parts(got) == pytest.approx({"matmul": 2e-3, "exposed_fsdp": 10e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 2e-3})


def test_a_gather_starts_no_earlier_than_its_place():
    got = play(part("dot", "d") + part("start", "g") + part("done", "e", "g"))
    assert got.compute_s == pytest.approx(8e-3)


def test_synchronous_collective_is_exposed():
    got = play(part("dot", "d") + part("gather", "g") + part("dot", "e"))
    assert parts(got) == pytest.approx({"matmul": 4e-3, "exposed_fsdp": 6e-3})
    assert got.hidden_s["fsdp"] == pytest.approx(0)


def test_synchronous_collective_behind_an_asynchronous_one_is_counted_once():
    """12 ms on the wire, all of it waited for at the second: nothing is left to wait for, or to hide, at the first."""
    got = play(part("start", "g") + part("gather", "h") + part("done", "e", "g"))
    assert parts(got) == pytest.approx({"exposed_fsdp": 12e-3})
    assert got.hidden_s["fsdp"] == pytest.approx(0)


def test_a_wait_is_charged_to_what_the_wire_carries():
    """The tensor gather waits 6 ms for the fsdp gather before it, then 10 ms x 1/2 of its own."""
    tensor = "  %t = bf16[500000]{0} all-gather(%u), replica_groups=[4,2]<=[8]\n"
    got = play("  %u = bf16[250000]{0} parameter(3)\n" + part("start", "g") + tensor + part("done", "e", "g"),
               layout=Layout(fsdp=4, tensor=2))  # fmt: skip
    assert parts(got) == pytest.approx({"exposed_fsdp_tensor": 6e-3, "exposed_tensor": 5e-3})


def test_all_reduce_costs_a_scatter_and_a_gather():
    got = play("  %r = bf16[100000]{0} all-reduce(%s), replica_groups=[2,4]<=[8], to_apply=%sum\n")
    assert got.compute_s == pytest.approx(2 * 0.75 * 2e5 / 1e8)


LOOP = (
    '  %{name} = (s32[]) while(%t), condition=%c, body=%{body}, backend_config={{"known_trip_count":{{"n":"{n}"}}}}\n'
)


def body(name: str, lines: str) -> str:
    return f"%{name} (t: (s32[])) -> (s32[]) {{{PARAMETERS}{lines}"


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 100])
def test_a_loop_repeats_its_body(n: int):
    got = play(LOOP.format(name="w", body="b", n=n), body("b", part("dot", "d") + part("gather", "g")))
    expected = {"matmul": n * 2e-3, "exposed_fsdp": n * 6e-3}
    assert parts(got) == pytest.approx({k: v for k, v in expected.items() if v})


def test_nested_loops_multiply():
    inner = body("inner", part("dot", "d"))
    outer = body("outer", LOOP.format(name="v", body="inner", n=7) + part("dot", "e"))
    got = play(LOOP.format(name="w", body="outer", n=5), inner, outer)
    assert got.compute_s == pytest.approx(5 * (7 + 1) * 2e-3)
    assert got.flops["matmul"] == 5 * 8 * 2e9


def test_a_loop_reaches_its_steady_state():
    """A gather from before the loop holds the wire for 6 ms: only the first body's own gather waits for it."""
    overlapped = part("start", "g") + "".join(part("dot", f"d{i}") for i in range(4)) + part("done", "e", "g")
    got = play(
        part("start", "early") + LOOP.format(name="w", body="b", n=10) + part("done", "late", "early"),
        body("b", overlapped),
    )
    assert parts(got) == pytest.approx({"matmul": 80e-3, "exposed_fsdp": 4e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 11 * 6e-3 - 4e-3})


def test_repeating_moves_what_travels_along():
    timeline = Timeline()
    before = timeline.copy()
    timeline.run(Work("matmul", 1.0))
    sent = timeline.send("collective", Transfer("collective", "fsdp", 5.0))
    timeline.repeat(3, before)
    assert timeline.compute_s == 4.0
    timeline.wait(sent)
    assert parts(timeline) == {"matmul": 4.0, "exposed_fsdp": 5.0}
    assert timeline.hidden_s["fsdp"] == 0
    assert before.breakdown_s == {}  # a copy is a copy


def test_conditional_takes_the_longer_branch():
    got = play(
        "  %c = f32[] conditional(%i, %x, %y), branch_computations={%left, %right}\n",
        body("left", part("dot", "d")), body("right", part("dot", "d") + part("dot", "e")),
    )  # fmt: skip
    assert got.compute_s == pytest.approx(4e-3)


def test_unknown_custom_call_is_listed_with_its_bytes():
    got = play(part("opaque", "o") + part("dot", "d"), device=DEVICE)
    assert got.unknown == pytest.approx({"mystery": 8e6})
    assert parts(got) == pytest.approx({"memory": 8e-3, "matmul": 6e-3})


def test_copy_and_slice_in_the_background_move_what_they_make():
    """1e6 bytes each, though the slice's source is 32 times that."""
    copy = (
        "  %c = (f32[250000]{0:S(1)}, f32[250000]{0}, u32[]) copy-start(%m)\n  %d = f32[250000]{0:S(1)} copy-done(%c)\n"
    )
    cut = (
        "  %s1 = ((f32[32,250000]{1,0}), f32[1,250000]{1,0:S(1)}, s32[]) slice-start(%m), slice={[0:1], [0:250000]}\n"
        "  %s2 = f32[1,250000]{1,0:S(1)} slice-done(%s1)\n"
    )
    for text in (copy, cut):
        assert parts(play(text, device=DEVICE)) == pytest.approx({"exposed_copy": 1e-3})


def test_copies_to_the_host_share_its_link():
    """Two of 1e6 bytes at 1e8 a second, one behind the other. They take a tenth of the memory's bandwidth, of which a
    product would have all for 6 ms: it has nine tenths, and hides as much of them as it then takes."""
    copies = "".join(f"  %c{i} = (f32[250000]{{0:S(5)}}, f32[250000]{{0}}, u32[]) copy-start(%m)\n" for i in range(2))
    waits = "".join(f"  %d{i} = f32[250000]{{0:S(5)}} copy-done(%c{i})\n" for i in range(2))
    got = play(copies + part("dot", "d") + waits, device=DEVICE)
    assert parts(got) == pytest.approx({"matmul": 6e-3, "contention": 6e-3 / 9, "exposed_copy": 20e-3 - 6e-3 / 0.9})
    assert got.hidden_s["copy"] == pytest.approx(6e-3 / 0.9)  # the second is waited for while it waits for the first


ASYNC_FUSION = """%{name} (x: bf16[100000]) -> bf16[400000] {{
  %x = bf16[100000]{{0}} parameter(0)
  %ag = bf16[400000]{{0}} all-gather(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={{0}}
  ROOT %r = bf16[400000]{{0}} {root}
"""


def test_tpu_gather_spread_over_fusions_is_one_gather():
    """Started by one fusion, carried by a second that computes, awaited by a third: 6 ms on the wire, 2 ms of it hidden."""
    carrier = """%carry (x: bf16[100000], y: bf16[1000,1000]) -> (bf16[400000], bf16[1000,1000]) {
  %x = bf16[100000]{0} parameter(0)
  %y = bf16[1000,1000]{1,0} parameter(1)
  %ag = bf16[400000]{0} all-gather(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  %d = bf16[1000,1000]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (bf16[400000]{0}, bf16[1000,1000]{1,0}) tuple(%ag, %d)
"""
    got = play(
        "  %f = bf16[400000]{0} fusion(%s), kind=kCustom, calls=%begin\n"
        "  %g = (bf16[400000]{0}, bf16[1000,1000]{1,0}) fusion(%s, %a), kind=kOutput, calls=%carry\n"
        "  %h = bf16[400000]{0} fusion(%s), kind=kCustom, calls=%end\n",
        ASYNC_FUSION.format(name="begin", root='custom-call(%ag), custom_call_target="AsyncCollectiveStart"'),
        carrier,
        ASYNC_FUSION.format(name="end", root='custom-call(%ag), custom_call_target="AsyncCollectiveDone"'),
    )
    assert parts(got) == pytest.approx({"matmul": 2e-3, "exposed_fsdp": 4e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 2e-3})


def test_tpu_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
    fused = """%scatter (x: bf16[100000]) -> bf16[25000] {
  %x = bf16[100000]{0} parameter(0)
  %ar = bf16[100000]{0} all-reduce(%x), channel_id=6, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %r = bf16[25000]{0} dynamic-slice(%ar, %x), dynamic_slice_sizes={25000}
"""
    got = play("  %f = bf16[25000]{0} fusion(%s), kind=kCustom, calls=%scatter\n", fused)
    assert parts(got) == pytest.approx({"exposed_fsdp": 0.75 * 2e5 / 1e8})


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ([0, 1], "tensor"), ([4, 5], "tensor"), ([0, 2, 4], "fsdp"), ([1, 3, 5], "fsdp"), ([0, 6], "data"),
        ([0, 2, 4, 6, 8, 10], "data_fsdp"), ([0, 1, 6, 7], "data_tensor"), (list(range(12)), "data_fsdp_tensor"),
        ([3], "self"),
    ],
)  # fmt: skip
def test_axis_of_a_group(group: list[int], name: str):
    assert axis_of(group, Layout(data=2, fsdp=3, tensor=2)) == name


def test_peaks_by_dtype():
    assert [Rates(DEVICE).peak(d) for d in ("bf16", "f16", "f32", "f8e4m3fn")] == [1e12, 1e12, 5e11, 2e12]
    volta = dataclasses.replace(DEVICE, peak_flops_per_s={"fp16": 3e12})
    assert Rates(volta).peak("bf16") == 3e12
    assert Rates(dataclasses.replace(DEVICE, peak_flops_per_s={"bf16": 8e12})).peak("f32") == 4e12
    assert Rates(dataclasses.replace(DEVICE, platform="tpu", peak_flops_per_s={"bf16": 8e12})).peak("f32") == 8e12
    with pytest.raises(RequestError, match="no peak rate for s8"):
        Rates(DEVICE).peak("s8")


def test_a_missing_fact_is_named():
    with pytest.raises(RequestError, match="no link_bytes_per_s is known for 'round'"):
        play(part("gather", "g"), device=dataclasses.replace(FAST, link_bytes_per_s=None))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["dot", "start", "done", "gather", "negate", "opaque"]), max_size=12), st.integers(0, 9)
)
def test_parts_add_up_whatever_the_schedule(kinds: list[str], trips: int):
    lines, open_, n_gathers = "", [], 0
    for i, kind in enumerate(kinds):
        if kind == "done" and not open_:
            continue
        lines += part(kind, f"i{i}", open_.pop(0) if kind == "done" else "")
        n_gathers += kind in ("start", "gather")
        open_ += [f"i{i}"] if kind == "start" else []
    for name in open_:
        lines += part("done", f"end_{name}", name)
    got = play(lines + LOOP.format(name="w", body="b", n=trips), body("b", lines), device=DEVICE)
    alone_s = sum({"dot": 6e-3, "negate": 8e-3, "opaque": 8e-3}.get(kind, 0) for kind in kinds)
    communication_s = (1 + trips) * n_gathers * GATHER_S
    exposed_s, slowed_s = got.breakdown_s["exposed_fsdp"], got.breakdown_s["contention"]
    assert exposed_s + got.hidden_s["fsdp"] == pytest.approx(communication_s)
    assert got.compute_s - exposed_s - slowed_s == pytest.approx((1 + trips) * alone_s)
    assert 0 <= slowed_s <= 0.2 * communication_s + 1e-12  # a gather takes a fifth of the memory's bandwidth
