"""Seconds of collectives against the formulas, by hand on round numbers, and against published measurements."""

import csv
import dataclasses
import itertools
import math
from importlib import resources

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.forecast.constants import DCN_EFFICIENCY, NETWORK_EFFICIENCY
from experiments.forecast.network import Fabric, expected_largest, fact
from experiments.hardware import Device, load
from transformer.errors import RequestError

GPU = Device(
    slug="round", name="Round numbers", platform="gpu", compile_target="round",
    devices_per_node=8, scaleup_devices=8, link_bytes_per_s=400.0, nic_bytes_per_s=10.0, link_efficiency=0.5,
)  # fmt: skip
OUT = 10 * NETWORK_EFFICIENCY.value
SLOW_START = dataclasses.replace(GPU, link_latency_s=1.0, nic_latency_s=10.0, collective_launch_s=100.0)
TPU = Device(
    slug="torus", name="Round torus", platform="tpu", compile_target="torus",
    ici_bytes_per_s=100.0, torus_dims=2, link_efficiency=1.0,
)  # fmt: skip


def torus(*sizes: int, dims: int) -> Fabric:
    coords = tuple(itertools.product(*(range(size) for size in sizes)))
    return Fabric(dataclasses.replace(TPU, torus_dims=dims), coords)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("all-gather", 3 / 4), ("reduce-scatter", 3 / 4), ("all-to-all", 3 / 4), ("all-reduce", 6 / 4),
        ("collective-permute", 1.0),
    ],
)  # fmt: skip
def test_ring_within_a_node(kind: str, share: float):
    group = [0, 1] if kind == "collective-permute" else [0, 2, 4, 6]
    assert Fabric(GPU).collective_s(kind, 1000, group) == pytest.approx(share * 1000 / 200)


@pytest.mark.parametrize("members", [1, 2, 8])
def test_members_of_a_node_share_its_way_out(members: int):
    """Four nodes; each member's ring leaves by its own NIC, never faster than the links inside."""
    group = [8 * node + i for node in range(4) for i in range(members)]
    g = 4 * members
    assert Fabric(GPU).collective_s("all-gather", 1000, group) == pytest.approx((g - 1) / g * 1000 / (OUT * members))
    assert Fabric(GPU).collective_s("all-reduce", 1000, group) == pytest.approx(
        2 * (g - 1) / g * 1000 / (OUT * members)
    )


def test_two_nodes_swap_their_sums():
    """Eight devices reduce their parts within a node; then each sends its eighth of the sum across, once."""
    assert Fabric(GPU).collective_s("all-reduce", 1000, range(16)) == pytest.approx(1000 / (8 * OUT))


def test_in_an_all_to_all_each_device_leaves_by_its_own_adapter():
    """12 of the 16 parts that a device sends go to the three other nodes."""
    group = [8 * node + i for node in range(4) for i in range(4)]
    assert Fabric(GPU).collective_s("all-to-all", 1000, group) == pytest.approx(12 / 16 * 1000 / OUT)


def test_the_way_out_is_never_wider_than_the_links():
    wide = dataclasses.replace(GPU, nic_bytes_per_s=300.0)
    assert Fabric(wide).collective_s("all-gather", 1000, list(range(16))) == pytest.approx(15 / 16 * 1000 / 200)


def test_oversubscription_divides_what_leaves():
    halved = Fabric(dataclasses.replace(GPU, oversubscription=2.0))
    assert halved.collective_s("all-gather", 1000, [0, 8]) == pytest.approx(0.5 * 1000 / (OUT / 2))
    assert halved.collective_s("all-gather", 1000, [0, 1]) == Fabric(GPU).collective_s("all-gather", 1000, [0, 1])


def test_a_scale_up_domain_may_span_nodes():
    rack = dataclasses.replace(GPU, devices_per_node=4, scaleup_devices=72)
    assert Fabric(rack).collective_s("all-gather", 1000, [0, 71]) == pytest.approx(0.5 * 1000 / 200)
    assert Fabric(rack).collective_s("all-gather", 1000, [0, 72]) == pytest.approx(0.5 * 1000 / OUT)


def test_node_is_the_domain_where_nothing_else_is_known():
    plain = dataclasses.replace(GPU, scaleup_devices=None)
    assert Fabric(plain).collective_s("all-gather", 1000, [7, 8]) == pytest.approx(0.5 * 1000 / OUT)


def test_a_switch_that_adds_up_moves_the_sum_once():
    """1 + 1/8 instead of 2 x 7/8, at 0.74 of the link's rate; two devices gain nothing."""
    nvls = Fabric(dataclasses.replace(GPU, switch_reduces=True))
    assert nvls.collective_s("all-reduce", 1000, range(8)) == pytest.approx(1.125 * 1000 / (400 * 0.74))
    assert nvls.collective_s("all-reduce", 1000, [0, 1]) == Fabric(GPU).collective_s("all-reduce", 1000, [0, 1])


@pytest.mark.parametrize(("g", "hops"), [(2, 1), (4, 3), (8, 7)])
def test_a_ring_fills_before_it_flows(g: int, hops: int):
    """Launch, and the latency of the hops beside the time of the bytes under the root of a pipeline's best cut."""
    bytes_s = (g - 1) / g * 1000 / 200
    expected = 100 + (math.sqrt(hops) + math.sqrt(bytes_s)) ** 2
    assert Fabric(SLOW_START).collective_s("all-gather", 1000, range(g)) == pytest.approx(expected)


def test_latency_across_nodes_is_the_network_s():
    """1,024 nodes: up and down a tree of ten levels and its root, 21 hops of 10 s, of which two fill."""
    bytes_s = 1023 / 1024 * 1000 / OUT
    expected = 100 + 19 * 10 + (math.sqrt(2 * 10) + math.sqrt(bytes_s)) ** 2
    assert Fabric(SLOW_START).collective_s("all-gather", 1000, range(0, 8192, 8)) == pytest.approx(expected)


def test_nothing_to_send_costs_nothing():
    assert Fabric(SLOW_START).collective_s("all-reduce", 1000, [3]) == 0
    assert Fabric(SLOW_START).collective_s("all-reduce", 0, [0, 1]) == 0


@pytest.mark.parametrize(
    ("fabric", "group", "links"),
    [
        pytest.param(torus(4, 8, dims=2), [0, 1, 2, 3], 1, id="2D, a line"),
        pytest.param(torus(4, 8, dims=2), list(range(8)), 1, id="2D, a whole side of 8 is no ring"),
        pytest.param(torus(16, 16, dims=2), list(range(16)), 2, id="2D, a side of 16 is a ring"),
        pytest.param(torus(16, 16, dims=2), list(range(256)), 4, id="2D, both sides are rings"),
        pytest.param(torus(4, 8, dims=2), list(range(32)), 2, id="2D, two lines"),
        pytest.param(torus(4, 4, 8, dims=3), list(range(8)), 2, id="3D, 8 closes"),
        pytest.param(torus(4, 4, 8, dims=3), list(range(4)), 1, id="3D, half a ring is a line"),
        pytest.param(torus(4, 4, 8, dims=3), list(range(128)), 6, id="3D, three rings"),
        pytest.param(torus(2, 2, 1, dims=3), list(range(4)), 2, id="3D, below a cube nothing closes"),
        pytest.param(torus(16, 16, dims=2), [0, 17], 1, id="two chips have one path"),
    ],
)
def test_torus_bandwidth_is_that_of_the_group_s_dims(fabric: Fabric, group: list[int], links: int):
    g = len(group)
    assert fabric.collective_s("all-gather", 1000, group) == pytest.approx((g - 1) / g * 1000 / (100 * links))


def test_virtual_cpu_devices_meet_in_memory():
    cpu = Device(slug="c", name="C", platform="cpu", compile_target="cpu", hbm_bytes_per_s=50.0, memory_efficiency=0.8)
    assert Fabric(cpu).collective_s("all-gather", 1000, [0, 1]) == pytest.approx(0.5 * 1000 / 40)


def test_a_missing_fact_is_named():
    with pytest.raises(RequestError, match="no nic_bytes_per_s is known for 'round'"):
        Fabric(dataclasses.replace(GPU, nic_bytes_per_s=None)).collective_s("all-gather", 1000, [0, 8])
    assert fact(GPU, "link_bytes_per_s") == 400


def test_an_all_to_all_crosses_the_middle_of_the_torus():
    """A ring of 16: 8 devices send half of their bytes to the other half over two links, so 2 x 100 in all."""
    assert torus(16, 16, dims=2).collective_s("all-to-all", 1000, range(16)) == pytest.approx(8 * 500 / (2 * 100))
    assert torus(4, 8, dims=2).collective_s("all-to-all", 1000, range(8)) == pytest.approx(4 * 500 / 100)


def test_slices_are_joined_by_the_slow_network():
    """Two slices of 4 chips: within, a gather of the half that is there; between them each chip brings 1/8."""
    device = dataclasses.replace(TPU, nic_bytes_per_s=5.0)
    coords = tuple(itertools.product(range(2), range(2)))
    fabric = Fabric(device, coords * 2, slices=(0,) * 4 + (1,) * 4)
    between_s = 0.5 * 1000 / (4 * 5 * DCN_EFFICIENCY.value)
    assert fabric.collective_s("all-gather", 1000, range(8)) == pytest.approx(between_s)
    assert fabric.collective_s("all-gather", 1000, range(4)) == pytest.approx(0.75 * 1000 / 200)
    assert fabric.collective_s("all-reduce", 1000, [0, 4]) == pytest.approx(1000 / (5 * DCN_EFFICIENCY.value))


def test_hops_go_the_short_way_round():
    ring = Fabric(dataclasses.replace(TPU, link_latency_s=1.0), tuple((i, j) for i in range(16) for j in range(16)))
    assert ring.collective_s("collective-permute", 100, [0, 15 * 16]) == pytest.approx(1 + 8)  # 15 apart, 8 at most
    assert ring.collective_s("all-gather", 1600, range(16)) == pytest.approx(15 / 16 * 1600 / 200 + 8)


@pytest.mark.parametrize("axes", [((8, 1),), ((128, 8),), ((64, 1), (4, 512)), ((5, 7),)])
def test_axes_and_lists_of_devices_are_the_same_group(axes):
    group = sorted(
        sum(i * stride for i, (_, stride) in zip(at, axes, strict=True))
        for at in itertools.product(*(range(n) for n, _ in axes))
    )
    fabric = Fabric(SLOW_START)
    for kind in ("all-gather", "all-reduce", "all-to-all"):
        assert fabric.along_s(kind, 1000, *axes) == fabric.collective_s(kind, 1000, group)


def test_expected_largest_is_that_of_drawn_numbers():
    drawn = np.random.default_rng(0).standard_normal((4000, 64)).max(axis=1).mean()
    assert expected_largest(64) == pytest.approx(drawn, rel=0.02)
    assert Fabric(GPU).slowest(8) == 1.0  # one node waits for nobody
    assert Fabric(GPU).slowest(4096) == pytest.approx(1 + 0.008 * expected_largest(512))


def published(name: str) -> list[dict[str, str]]:
    text = resources.files("experiments").joinpath(f"published/{name}.csv").read_text()
    return list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))


def errors(row: dict[str, str], fabric: Fabric, least_bytes: float) -> list[float]:
    sizes = {float(size): float(us) for size, us in row.items() if size.isdigit() and us}
    return [
        fabric.along_s(row.get("op", "all-reduce"), size, (int(row["n_devices"]), 1)) / (us * 1e-6) - 1
        for size, us in sizes.items()
        if size >= least_bytes
    ]


SEEN_IN_THE_FIT = ("a100-80g-sxm", "h200-sxm", "b200-sxm", "gb200-nvl72")


@pytest.mark.parametrize("seen", [True, False])
def test_collectives_within_a_node_as_published(seen: bool):
    """Fitted on four parts; the three others are as near. Sizes from 512 B to 512 MiB, 2 to 8 devices."""
    found = {}
    for row in published("collectives"):
        if row["source"] == "aiconfigurator" and (row["device"] in SEEN_IN_THE_FIT) == seen:
            found.setdefault(row["op"], []).extend(errors(row, Fabric(load().device(row["device"])), 0))
    for op, error in found.items():
        assert np.median(np.abs(error)) < 0.11, op
        assert abs(np.median(error)) < 0.05, op
    assert np.median(np.abs(np.concatenate(list(found.values())))) < 0.07


def test_all_reduce_across_nodes_as_published():
    """AWS clusters of 2 and 4 nodes, 1 GiB and more. Their adapters' latency is read off the smallest message."""
    rates = {"a100-80g-sxm": 50e9 / 8, "h100-sxm": 50e9, "b200-sxm": 50e9}  # 4 x 100, 32 x 100, 8 x 400 Gb/s a node
    for row in published("collectives_across_nodes"):
        least_s = min(float(us) for size, us in row.items() if size.isdigit() and us) * 1e-6
        steps = {16: 2, 32: 5}[int(row["n_devices"])]
        device = dataclasses.replace(
            load().device(row["device"]), nic_bytes_per_s=rates[row["device"]], nic_latency_s=least_s / steps
        )
        assert np.abs(errors(row, Fabric(device), 2**30)).max() < 0.35, row["device"]
        assert np.abs(errors(row, Fabric(device), 2**33)).max(initial=0) < 0.16, row["device"]


KINDS = st.sampled_from(["all-gather", "reduce-scatter", "all-reduce", "all-to-all"])
GROUPS = st.sets(st.integers(0, 63), min_size=2, max_size=20).map(sorted)
BYTES = st.integers(1, 10**9)


@given(KINDS, GROUPS, BYTES, BYTES)
def test_more_bytes_never_take_less(kind: str, group: list[int], one: int, other: int):
    fabric = Fabric(SLOW_START)
    low, high = sorted((one, other))
    assert fabric.collective_s(kind, low, group) <= fabric.collective_s(kind, high, group)


@given(KINDS, GROUPS, BYTES, st.floats(1, 100), st.sampled_from(["link_bytes_per_s", "nic_bytes_per_s"]))
def test_a_slower_link_is_never_faster(kind: str, group: list[int], n_bytes: int, factor: float, name: str):
    slower = Fabric(dataclasses.replace(GPU, **{name: getattr(GPU, name) / factor}))
    assert slower.collective_s(kind, n_bytes, group) >= Fabric(GPU).collective_s(kind, n_bytes, group)


@given(KINDS, BYTES)
def test_leaving_the_node_is_never_faster(kind: str, n_bytes: int):
    inside, across = ([0, 1, 2, 3], [0, 1, 8, 9])
    assert Fabric(GPU).collective_s(kind, n_bytes, across) >= Fabric(GPU).collective_s(kind, n_bytes, inside)
