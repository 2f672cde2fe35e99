"""Streams against each other, worked by hand on the device of round numbers that test_simulate.py describes.

A dot takes 2 ms of arithmetic (and, where memory counts, 6 ms of memory), a negation 8 ms of memory, a gather 6 ms of the
wire and a fifth of the memory's bandwidth, a permutation of 4e5 bytes 4 ms.
"""

import dataclasses
import runpy
from pathlib import Path

import pytest

from experiments.forecast.timeline import max_min
from transformer.sharding import Layout

neighbour = runpy.run_path(str(Path(__file__).with_name("test_simulate.py")))
play, part, parts, body, LOOP, DEVICE, FAST = (
    neighbour[name] for name in ("play", "part", "parts", "body", "LOOP", "DEVICE", "FAST")
)

PERMUTE = """
  %ps = (bf16[200000]{0}, bf16[200000]{0}) collective-permute-start(%v), source_target_pairs={{0,1},{1,0}}
"""
PERMUTE_DONE = "  %pd = bf16[200000]{0} collective-permute-done(%ps)\n"
VECTOR = "  %v = bf16[200000]{0} parameter(3)\n"


def dots(n: int, name: str = "d") -> str:
    return "".join(part("dot", f"{name}{i}") for i in range(n))


def test_a_memory_bound_kernel_is_slowed_by_what_a_gather_reads_and_writes():
    """6 ms at 4/5 of the bandwidth, then 3.2 ms at all of it."""
    got = play(part("start", "g") + part("negate", "n") + part("done", "e", "g"), device=DEVICE)
    assert parts(got) == pytest.approx({"memory": 8e-3, "contention": 1.2e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 6e-3})


def test_a_product_is_slowed_by_the_multiprocessors_that_a_gather_holds():
    """16 of 64: 2 ms become 8/3 ms, and the wait for the gather so much shorter."""
    got = play(part("start", "g") + part("dot", "d") + part("done", "e", "g"), held=0.25)
    assert parts(got) == pytest.approx({"matmul": 2e-3, "contention": 2e-3 / 3, "exposed_fsdp": 10e-3 / 3})


def test_slowness_ends_with_the_gather():
    """Of 10 ms of products 4.5 are done in the gather's 6, the others take 5.5."""
    got = play(part("start", "g") + dots(5) + part("done", "e", "g"), held=0.25)
    assert parts(got) == pytest.approx({"matmul": 10e-3, "contention": 1.5e-3})


def test_tpu_links_hold_no_multiprocessors():
    device = dataclasses.replace(FAST, platform="tpu", matmul_efficiency=1.0)
    got = play(part("start", "g") + dots(5) + part("done", "e", "g"), device=device, held=0.25)
    assert parts(got) == pytest.approx({"matmul": 10e-3 * 1.024**2})  # columns and depth of 1,000 fill lanes of 1,024


COPY = "  %c = (f32[250000]{0}, f32[250000]{0}, u32[]) copy-start(%m)\n"
COPIED = "  %cd = f32[250000]{0} copy-done(%c)\n"


def test_a_copy_and_a_memory_bound_kernel_share_bandwidth_and_lose_none():
    """Each half of it until the copy's 2 ms of traffic are through after 4; both together take what they take alone."""
    got = play(COPY + part("dot", "d") + COPIED, device=DEVICE)
    assert got.compute_s == pytest.approx(2e-3 + 6e-3)
    assert parts(got) == pytest.approx({"matmul": 6e-3, "contention": 2e-3})


def test_a_copy_holds_no_multiprocessors():
    assert parts(play(COPY + part("dot", "d") + COPIED, held=0.25)) == pytest.approx({"matmul": 2e-3})


def test_copies_queue_for_the_memory():
    second = COPY.replace("%c ", "%c2 "), COPIED.replace("%cd", "%cd2").replace("(%c)", "(%c2)")
    got = play(COPY + second[0] + COPIED + second[1], device=DEVICE)
    assert parts(got) == pytest.approx({"exposed_copy": 4e-3})


def test_what_goes_from_device_to_device_does_not_queue_behind_collectives():
    """The permutation is awaited for its 4 ms, the gather beside it for the 2 ms that are left of its 6."""
    got = play(VECTOR + part("start", "g") + PERMUTE + PERMUTE_DONE + part("done", "e", "g"))
    assert parts(got) == pytest.approx({"exposed_fsdp": 6e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 4e-3})


def test_a_permutation_queues_behind_a_permutation():
    again = PERMUTE.replace("%ps", "%qs"), PERMUTE_DONE.replace("%pd", "%qd").replace("%ps", "%qs")
    got = play(VECTOR + PERMUTE + again[0] + PERMUTE_DONE + again[1])
    assert got.compute_s == pytest.approx(8e-3)


RECEIVE = (
    "  %r = (bf16[200000]{{0}}, u32[], token[]) recv(%t), channel_id=7, "
    'frontend_attributes={{_xla_send_recv_source_target_pairs="{{{{0,1}}}}"}}\n'
).format()
RECEIVED = "  %rd = (bf16[200000]{0}, token[]) recv-done(%given), channel_id=7\n"


def test_a_loop_whose_receive_is_awaited_in_its_next_iteration():
    """Only the first is waited for: each of the others has 4 ms of products to hide behind."""
    inside = RECEIVED + RECEIVE + dots(2)
    got = play(RECEIVE + LOOP.format(name="w", body="b", n=10) + RECEIVED, body("b", inside))
    assert parts(got) == pytest.approx({"exposed_fsdp": 4e-3, "matmul": 40e-3})
    assert got.hidden_s == pytest.approx({"fsdp": 40e-3})


def test_a_loop_bound_by_communication():
    inside = part("start", "g") + part("dot", "d") + part("done", "e", "g")
    got = play(LOOP.format(name="w", body="b", n=50), body("b", inside))
    assert parts(got) == pytest.approx({"matmul": 50 * 2e-3, "exposed_fsdp": 50 * 4e-3})


def test_nested_loops_with_a_gather_for_each():
    """The outer gather hides behind the inner loop's 3 products, the inner one only behind one of them."""
    inner = body("inner", part("start", "h") + part("dot", "d") + part("done", "f", "h"))
    outer = body("outer", part("start", "g") + LOOP.format(name="v", body="inner", n=3) + part("done", "e", "g"))
    got = play(LOOP.format(name="w", body="outer", n=4), inner, outer)
    # 4 gathers of 6 ms queue in an outer iteration, and 3 products of 2 ms are the only work beside them.
    assert got.compute_s == pytest.approx(4 * 4 * 6e-3)
    assert parts(got) == pytest.approx({"matmul": 12 * 2e-3, "exposed_fsdp": 96e-3 - 24e-3})


def test_an_asynchronous_call_is_worked_off_by_a_second_stream():
    """A product that takes 20 ms and 3/10 of the bandwidth leaves 7/10 to a negation of 8 ms beside it."""
    slow = dataclasses.replace(DEVICE, peak_flops_per_s={"bf16": 1e11})
    wrapped = "%wrapped (x: f32[1000000]) -> f32[1000000] {\n  %x = f32[1000000]{0} parameter(0)\n"
    wrapped += "  ROOT %n = f32[1000000]{0} negate(%x)\n"
    lines = (
        "  %s1 = ((f32[1000000]{0}), f32[1000000]{0}, u32[]) async-start(%m), calls=%wrapped\n"
        "  %s2 = ((f32[1000000]{0}), f32[1000000]{0}, u32[]) async-update(%s1)\n"
    )
    done = "  %s3 = f32[1000000]{0} async-done(%s2)\n"
    got = play(lines + part("dot", "d") + done, wrapped, device=slow)
    assert parts(got) == pytest.approx({"matmul": 20e-3})
    assert got.hidden_s == pytest.approx({"copy": 8e-3 / 0.7})
    assert parts(play(lines + done, wrapped, device=slow)) == pytest.approx({"exposed_copy": 8e-3})


def test_true_and_false_computations_are_branches():
    got = play(
        "  %c = f32[] conditional(%i, %x, %y), true_computation=%left, false_computation=%right\n",
        body("left", part("dot", "d")), body("right", part("gather", "g")),
    )  # fmt: skip
    assert parts(got) == pytest.approx({"exposed_fsdp": 6e-3})


def test_what_travels_through_a_conditional_is_awaited_after_it():
    got = play(
        part("start", "g")
        + "  %c = f32[] conditional(%i, %x, %y), branch_computations={%left, %right}\n"
        + part("done", "e", "g"),
        body("left", part("dot", "d")), body("right", ""),
    )  # fmt: skip
    assert parts(got) == pytest.approx({"matmul": 2e-3, "exposed_fsdp": 4e-3})


def test_the_bubble_of_a_pipeline_in_lock_step():
    """2 stages, 4 microbatches; forward 2 ms, backward 4 ms, and in the steady phase 2 ms for the ends of the model.
    5 ticks each way, of which one is idle: (S - 1) / M = 1/4 of the 24 ms of work of a stage (Narayanan et al. 2021)."""
    ends = "  %c = f32[] conditional(%i, %x, %y), branch_computations={%head, %nothing}\n"
    got = play(
        dots(1, "fill") + LOOP.format(name="w", body="steady", n=4) + dots(2, "drain"),
        body("head", part("dot", "h")), body("nothing", ""), body("steady", dots(3) + ends),
        layout=Layout(pipeline=2, fsdp=4), microbatches=4,
    )  # fmt: skip
    assert got.compute_s == pytest.approx(5 * 6e-3 + 4 * 2e-3)
    assert parts(got) == pytest.approx({"bubble": 6e-3, "matmul": 24e-3 + 8e-3})
    assert got.flops["matmul"] == pytest.approx((4 * 3 + 4) * 2e9)  # what idle ticks compute is none


def test_the_ends_of_an_interleaved_pipeline_work_once_a_microbatch():
    """2 stages of 2 parts, 4 microbatches: 6 steady ticks, in 4 of which a microbatch leaves; 9 ticks each way of which
    one is idle."""
    ends = "  %c = f32[] conditional(%i, %x, %y), branch_computations={%head, %nothing}\n"
    fill, drain = LOOP.format(name="f", body="fill", n=3), LOOP.format(name="z", body="drain", n=3)
    got = play(
        fill + LOOP.format(name="w", body="steady", n=6) + drain,
        body("head", part("dot", "h")), body("nothing", ""), body("steady", dots(3) + ends),
        body("fill", dots(1)), body("drain", dots(2)),
        layout=Layout(pipeline=2, fsdp=4, repeats=2), microbatches=4,
    )  # fmt: skip
    assert got.compute_s == pytest.approx(9 * 6e-3 + 4 * 2e-3)
    assert parts(got) == pytest.approx({"bubble": 6e-3, "matmul": 8 * 6e-3 + 8e-3})


def test_a_loop_that_data_decides_is_counted_once_and_listed():
    condition = "%c (p: (pred[])) -> pred[] {\n  %p = (pred[]) parameter(0)\n"
    condition += "  ROOT %go = pred[] get-tuple-element(%p), index=0\n"
    inside = "%b (p: (pred[])) -> (pred[]) {" + neighbour["PARAMETERS"] + part("dot", "d")
    inside += "  %any = pred[] custom-call(%a)\n  ROOT %t = (pred[]) tuple(%any)\n"
    got = play("  %w = (pred[]) while(%t), condition=%c, body=%b\n", condition, inside)
    assert got.breakdown_s["matmul"] == pytest.approx(2e-3)
    assert "w: iterations, counted as one" in got.unknown


def test_the_optimizer_is_told_by_its_scope():
    line = part("negate", "n").rstrip() + ', metadata={op_name="jit(_step)/optimizer/add"}\n'
    assert parts(play(line, device=DEVICE)) == pytest.approx({"optimizer": 8e-3})


@pytest.mark.parametrize(
    ("asked", "had"),
    [
        ([], []),
        ([0.2, 0.3], [0.2, 0.3]),
        ([1.0, 1.0], [0.5, 0.5]),
        ([1.0, 0.2], [0.8, 0.2]),
        ([0.5, 1.0, 0.1], [0.45, 0.45, 0.1]),
    ],
)
def test_bandwidth_is_shared_max_min(asked: list[float], had: list[float]):
    assert max_min(asked) == pytest.approx(had)
