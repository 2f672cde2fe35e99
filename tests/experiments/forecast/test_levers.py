"""Memory levers in forecasts: what leaves the device is not in its memory, is in the host's, and takes time."""

from typing import Any

import pytest

from tests.experiments.forecast.test_forecast import GPT2, forecast

pytestmark = pytest.mark.deviceless

RUNG = {**GPT2, "layout": "fsdp=8", "micro_batch_seqs": 4}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return forecast("h100-sxm", 8, **RUNG)


def copied_s(record: dict[str, Any]) -> float:
    return record["breakdown_s"].get("exposed_copy", 0) + record["hidden_s"].get("copy", 0)


def test_an_offloaded_tensor_lies_in_the_host(plain: dict[str, Any]):
    """4 layers of 4 sequences of 512 tokens, 768 wide: brought once and fetched once over a link of 0.82 x 64 GB/s."""
    got = forecast("h100-sxm", 8, **RUNG, remat="dots,ffn_up:offload")
    kept = forecast("h100-sxm", 8, **RUNG, remat="dots")
    n_bytes = 4 * 4 * 512 * 4 * 768 * 2
    assert plain["memory_bytes"]["host"] == 0
    assert got["memory_bytes"]["host"] == n_bytes
    assert kept["memory_bytes"]["temporaries"] - got["memory_bytes"]["temporaries"] > 0.7 * n_bytes
    assert copied_s(got) - copied_s(kept) == pytest.approx(2 * n_bytes / (0.82 * 64e9), rel=0.05)
    assert got["layout"]["remat"] == "dots,ffn_up:offload"


def test_products_in_8_bit_take_less_time():
    """Those of a layer's maps, here large enough to gain; logits stay in 16 bit. The same FLOPs, and the same bytes on
    the wire but for scales. On H100s large bf16 products run at 690 TFLOP/s, those of 8 bit at most twice as fast."""
    large = {
        "preset": "llama3-8b",
        "model": {"n_layers": "1"},
        "seq_len": 2048,
        "layout": "fsdp=8",
        "micro_batch_seqs": 4,
    }
    plain, got = forecast("h100-sxm", 8, **large), forecast("h100-sxm", 8, **large, precision="fp8")
    assert got["hardware_flops_per_token"] == plain["hardware_flops_per_token"]
    down = 4096 * 14_336
    maps = 8 * (4096 * (2 * 4096 + 2 * 1024) + 3 * down) - 2 * down  # full remat, but for the last map
    saved = 4 * 2048 * maps / 2 / 690e12
    assert 0.5 * saved < plain["breakdown_s"]["matmul"] - got["breakdown_s"]["matmul"] < 1.1 * saved
    for kind in ("fsdp all-gather", "fsdp reduce-scatter"):
        assert got["collective_bytes"][kind] == pytest.approx(plain["collective_bytes"][kind], rel=0.01)
    # Of one peak whatever the precision.
    assert got["mfu"]["full"] / plain["mfu"]["full"] == pytest.approx(
        plain["step_s"]["median"] / got["step_s"]["median"]
    )


def test_an_offloaded_optimizer_lies_in_the_host(plain: dict[str, Any]):
    got = forecast("h100-sxm", 8, **RUNG, offload_optimizer=True)
    moments = plain["memory_bytes"]["optimizer"] - 8  # but for two counters
    assert got["memory_bytes"]["host"] == moments
    assert got["memory_bytes"]["optimizer"] == 8
    assert plain["memory_bytes"]["total"] - got["memory_bytes"]["total"] > 0.7 * moments
    assert copied_s(got) == pytest.approx(2 * moments / (0.82 * 64e9), rel=0.1)  # small arrays wait for a launch
