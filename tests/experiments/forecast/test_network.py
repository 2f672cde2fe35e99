"""Seconds of collectives against the formulas, by hand on round numbers."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.forecast.network import Fabric, fact
from experiments.hardware import Device
from transformer.errors import RequestError

GPU = Device(
    slug="round", name="Round numbers", platform="gpu", compile_target="round",
    devices_per_node=8, scaleup_devices=8, link_bytes_per_s=400.0, nic_bytes_per_s=10.0, link_efficiency=0.5,
)  # fmt: skip
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
    assert Fabric(GPU).collective_s("all-gather", 1000, group) == pytest.approx((g - 1) / g * 1000 / (5 * members))


def test_the_way_out_is_never_wider_than_the_links():
    wide = dataclasses.replace(GPU, nic_bytes_per_s=300.0)
    assert Fabric(wide).collective_s("all-gather", 1000, list(range(16))) == pytest.approx(15 / 16 * 1000 / 200)


def test_oversubscription_divides_what_leaves():
    halved = Fabric(dataclasses.replace(GPU, oversubscription=2.0))
    assert halved.collective_s("all-gather", 1000, [0, 8]) == pytest.approx(0.5 * 1000 / 2.5)
    assert halved.collective_s("all-gather", 1000, [0, 1]) == Fabric(GPU).collective_s("all-gather", 1000, [0, 1])


def test_a_scale_up_domain_may_span_nodes():
    rack = dataclasses.replace(GPU, devices_per_node=4, scaleup_devices=72)
    assert Fabric(rack).collective_s("all-gather", 1000, [0, 71]) == pytest.approx(0.5 * 1000 / 200)
    assert Fabric(rack).collective_s("all-gather", 1000, [0, 72]) == pytest.approx(0.5 * 1000 / 5)


def test_node_is_the_domain_where_nothing_else_is_known():
    plain = dataclasses.replace(GPU, scaleup_devices=None)
    assert Fabric(plain).collective_s("all-gather", 1000, [7, 8]) == pytest.approx(0.5 * 1000 / 5)


@pytest.mark.parametrize(("g", "hops"), [(2, 1), (4, 3), (8, 6)])
def test_latency_is_a_ring_s_in_the_small_and_a_tree_s_in_the_large(g: int, hops: int):
    """min(g - 1, 2 log2 g) hops after the launch."""
    bytes_s = (g - 1) / g * 1000 / 200
    assert Fabric(SLOW_START).collective_s("all-gather", 1000, list(range(g))) == pytest.approx(100 + hops + bytes_s)


def test_latency_across_nodes_is_the_network_s():
    group = list(range(0, 8 * 1024, 8))
    bytes_s = 1023 / 1024 * 1000 / 5
    assert Fabric(SLOW_START).collective_s("all-gather", 1000, group) == pytest.approx(100 + 2 * 10 * 10 + bytes_s)


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
