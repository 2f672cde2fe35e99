"""Which clusters can be compiled for, and what is said of those that cannot. Nothing is compiled here."""

import dataclasses
import math
import tomllib
from importlib import resources

import numpy as np
import pytest

from experiments import hardware
from experiments.forecast import topology
from experiments.forecast.topology import devices_of, torus_shape
from transformer.errors import RequestError
from transformer.sharding import AXES, Layout, make_mesh

DEVICES = hardware.load().devices
TARGETS = tomllib.loads(resources.files("experiments.forecast").joinpath("targets.toml").read_text(encoding="utf-8"))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("chips", "dims", "shape"),
    [
        (1, 2, (1, 1)), (4, 2, (2, 2)), (8, 2, (2, 4)), (16, 2, (4, 4)), (32, 2, (4, 8)), (64, 2, (8, 8)),
        (128, 2, (8, 16)), (256, 2, (16, 16)), (512, 2, None), (3, 2, None), (12, 2, None),
        (1, 3, (1, 1, 1)), (4, 3, (2, 2, 1)), (8, 3, (2, 2, 2)), (16, 3, (2, 2, 4)), (32, 3, (2, 4, 4)),
        (64, 3, (4, 4, 4)), (128, 3, (4, 4, 8)), (512, 3, (8, 8, 8)), (1024, 3, (8, 8, 16)),
        (4096, 3, (16, 16, 16)), (6144, 3, (16, 16, 24)), (8960, 3, (16, 20, 28)), (65, 3, None), (96, 3, None),
    ],
)  # fmt: skip
def test_torus_shape(chips: int, dims: int, shape: tuple[int, ...] | None):
    assert torus_shape(chips, dims=dims) == shape
    assert shape is None or math.prod(shape) == chips


@pytest.mark.parametrize(
    ("slug", "n", "near"),
    [
        ("tpu-v5e", 100, 128), ("tpu-v5e", 5, 4), ("tpu-v5e", 1000, 256), ("tpu-v5p", 100, 128),
        ("tpu-v5p", 6000, 6144), ("tpu-v7", 7, 8), ("tpu-v7", 131, 128),
    ],
)  # fmt: skip
def test_a_slice_that_is_not_sold_names_the_nearest(slug: str, n: int, near: int):
    with pytest.raises(RequestError, match=f"no {slug} slice has {n} devices; nearest: {near}$"):
        devices_of(DEVICES[slug], Layout(data=n))


@pytest.mark.parametrize(("slug", "n", "near"), [("h100-sxm", 12, "8 or 16"), ("h100-sxm", 1023, "1016 or 1024")])
def test_gpus_that_do_not_fill_nodes_name_the_nearest(slug: str, n: int, near: str):
    with pytest.raises(RequestError, match=f"{n} devices do not fill nodes of 8; nearest that do: {near}$"):
        devices_of(DEVICES[slug], Layout(data=n))


def test_every_gpu_that_is_its_own_target_is_described():
    own = {slug for slug, device in DEVICES.items() if device.platform == "gpu" and device.compile_target == slug}
    assert own == set(TARGETS)


def test_every_other_accelerator_compiles_for_one_that_is_known():
    known = {*TARGETS, *topology._TPU_NAMES}
    assert {d.compile_target for d in DEVICES.values() if d.platform != "cpu"} <= known


def test_targets_have_their_device_s_memory():
    """What the compiler is told is within 5 % of the facts, so that it plans for the memory that is there."""
    for slug, target in TARGETS.items():
        assert target["device_memory_size"] == pytest.approx(DEVICES[slug].hbm_bytes, rel=0.05), slug


def test_this_machine_s_cpu_wants_a_calibration_and_enough_virtual_devices():
    with pytest.raises(RequestError, match="nothing is known of 'cpu' here: run experiments.calibrate"):
        devices_of(DEVICES["cpu"], Layout(data=1))
    known = dataclasses.replace(DEVICES["cpu"], hbm_bytes_per_s=1e10, peak_flops_per_s={"f32": 1e11})
    assert len(devices_of(known, Layout(data=8))) == 8
    with pytest.raises(RequestError, match="9 virtual devices: 8 are there; set JAX_NUM_CPU_DEVICES=9"):
        devices_of(known, Layout(data=9))


@pytest.mark.parametrize("slug", [slug for slug in DEVICES if slug.startswith("cpu-")])
def test_cpus_cannot_be_absent(slug: str):
    with pytest.raises(RequestError, match=f"{slug} cannot be compiled for when absent: measure it"):
        devices_of(DEVICES[slug], Layout(data=8))


def test_an_undescribed_target_names_the_nearest():
    with pytest.raises(RequestError, match="no compiler target for 'h100-sxn'.*h100-sxm"):
        devices_of(dataclasses.replace(DEVICES["h100-sxm"], compile_target="h100-sxn"), Layout(data=8))


def test_a_device_of_unknown_node_size_is_refused():
    with pytest.raises(RequestError, match="no devices_per_node is known for 'h100-sxm'"):
        devices_of(dataclasses.replace(DEVICES["h100-sxm"], devices_per_node=None), Layout(data=8))


@pytest.mark.deviceless
def test_slices_of_a_layout_are_pods_of_their_own():
    found = devices_of(DEVICES["tpu-v5e"], Layout(slice=2, data=16))
    assert [d.slice_index for d in found] == [0] * 16 + [1] * 16
    with pytest.raises(RequestError, match="layout data=32: the devices are of 2 slices; nearest: slice=2"):
        make_mesh(Layout(data=32), found)


@pytest.mark.deviceless
def test_a_mesh_over_slices_has_them_outermost():
    """Within each the axes lie along the torus: a tensor group of four is a square or a line of neighbours."""
    layout = Layout(slice=4, fsdp=4, tensor=4)
    mesh = make_mesh(layout, list(devices_of(DEVICES["tpu-v5e"], layout)))
    assert mesh.axis_names == AXES
    at = np.vectorize(lambda d: d.slice_index)(mesh.devices).reshape(4, -1)
    assert (at == np.arange(4)[:, None]).all()
    for group in mesh.devices.reshape(-1, 4):
        x, y, _ = zip(*(d.coords for d in group), strict=True)
        assert (np.ptp(x) + 1) * (np.ptp(y) + 1) == 4
