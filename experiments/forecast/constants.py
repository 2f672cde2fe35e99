"""Every constant of the model that is no fact of a device, in one place: its value, unit, meaning and evidence.

None belongs to a source, a model or a row of a table. Facts of devices, with the fractions of published
rates that they reach (`[efficiency]`), are in hardware.toml.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Constant(NamedTuple):
    """`value` in `unit`; what it means in hardware, and what it was fitted on or where it was read."""

    value: float
    unit: str
    meaning: str
    evidence: str
    is_fitted: bool = True  # to measurements; otherwise read in a source, or chosen


PRODUCT_START_S = Constant(
    2e-6, "s", "from a product's launch until its first tile multiplies, and from the last tile until it ends",
    "aiconfigurator 95f58a51, gemm: smallest products of six devices leave 1 to 4 us beside their tiles",
)  # fmt: skip
TILE_FILL_K = Constant(
    64, "elements of k", "depth by which a tile's loop is longer than k: its pipeline fills, its results are written",
    "aiconfigurator 95f58a51, gemm: 0 (A100) to 100 (H100) fit best; 64 is one stage of shared memory in bf16",
)  # fmt: skip
IN_STEP = Constant(
    1.08, "1", "time of a matrix product in a step over its time alone, in a loop that repeats it: its operands are "
    "not in cache, its board is warm from the kernels before, and two of three have an operand transposed. Of GPUs; a "
    "TPU's rates are of programs as they are",
    "published runs in closed form (docs/validation.md): 1.08 or 1.10 for every source that is left out",
)  # fmt: skip
POWER_EXPONENT = Constant(
    0.5, "1", "rate of a board at its power limit, over the limit; 1 with a fixed voltage, 1/3 where it follows clocks",
    "own choice; rests on the physics of CMOS alone, for no source measures one part at two limits", is_fitted=False,
)  # fmt: skip
STEADY_FLOPS = Constant(
    1e13, "FLOP", "a product this large lasts longer than the power governor waits, so its rate is a sustained one",
    "aiconfigurator 95f58a51, gemm: on H100, H200 and B200 rates fall from 1e11 to 1e13 FLOP and then no more",
)  # fmt: skip
MXU_LANES = Constant(
    128, "elements", "TPUs pad the last dims of a product's operands to so many lanes, rows to 8",
    "jax-ml/scaling-book 0819a7d, tpus.md", is_fitted=False,
)  # fmt: skip
TPU_CYCLES = Constant(
    0.85, "1", "time of a TPU's fusion over the compiler's estimated_cycles at the highest clock",
    "MaxText's 32B on 256 v5e chips: 14.7 s by cycles where 12.5 s is published", is_fitted=True,
)  # fmt: skip

ATTENTION_GRADIENT = Constant(
    0.75, "1", "efficiency of attention's gradient kernel, five products, over the forward one's, two",
    "FlashAttention-2 (arXiv:2307.08691) on A100: 63 % of peak where the forward has 73; FlashAttention-3 "
    "(arXiv:2407.08608) on H100: 561 TFLOP/s where it has 648; exponentials counted apart",
)  # fmt: skip
EXP_PER_CYCLE = Constant(
    16, "exponentials per cycle and processor", "throughput of the special function units",
    "CUDA C++ programming guide, arithmetic instructions: 16 results a cycle, capability 7.0 to 10.0", is_fitted=False,
)  # fmt: skip
ATTENTION_BLOCK = Constant(
    128, "tokens", "side of the blocks of scores; a causal mask leaves one block on the diagonal of each row half used",
    "FlashAttention-2 and -3 work in blocks of 64 to 128 queries by 64 to 176 keys", is_fitted=False,
)  # fmt: skip

L2_BYTES_PER_CYCLE = Constant(
    24, "bytes per cycle and processor", "what a kernel achieves from L2, read and written",
    "about half of the 5,120 bytes a cycle of NVIDIA's A100 whitepaper (47 a processor)", is_fitted=False,
)  # fmt: skip
GPU_LAUNCH_S = Constant(
    3e-6, "s", "least time from one kernel to the next, queued or in a CUDA graph: a short kernel and its gap",
    "NVIDIA, Getting started with CUDA graphs (2019): 3.8 us a kernel queued, 3.4 us in a graph, of 2.9 us alone",
    is_fitted=False,
)  # fmt: skip
EAGER_LAUNCH_S = Constant(
    9.6e-6, "s", "time a kernel costs a host that launches each from Python and does not run ahead",
    "the same: 9.6 us a kernel where the host waits for each", is_fitted=False,
)  # fmt: skip
TPU_LAUNCH_S = Constant(0.5e-6, "s", "a TPU's sequencer between fusions", "own estimate", is_fitted=False)
CPU_LAUNCH_S = Constant(1e-6, "s", "XLA's thunk on a CPU, where none is measured", "own estimate", is_fitted=False)

CACHE_LINE_BYTES = Constant(64, "bytes", "that a core fetches at once, however few it reads", "x86-64", is_fitted=False)
FIRST_CACHE_BYTES = Constant(
    2**15, "bytes", "of a core's own cache for data, from which it reads without waiting",
    "32 to 48 KiB on x86 cores from Zen and Skylake on; 1 array of 256 and of 1,024 rows, read across here: 0.9 and "
    "2.0 to 3.8 ns an element", is_fitted=False,
)  # fmt: skip
KEPT_BYTES = Constant(
    2**25, "bytes", "a process keeps freed memory up to this size for its next use; larger is asked for and given anew",
    "mallopt(3), M_MMAP_THRESHOLD: dynamic, at most 4 MiB x sizeof(long); checked: page faults of a step are its "
    "temporaries to the page", is_fitted=False,
)  # fmt: skip

LOCAL_COPY = Constant(
    0.5, "1", "time of a byte that a gather or scatter copies from a device to itself, over one on the link",
    "aiconfigurator 95f58a51, nccl: bandwidth of 2, 4 and 8 devices on seven parts",
)  # fmt: skip
SWITCH_REDUCTION = Constant(
    0.74, "1", "fraction of the link's rate at which an NVSwitch adds up and multicasts (NVLS)",
    "aiconfigurator 95f58a51, nccl: all-reduce of 4 and 8 devices on H100 to GB300",
)  # fmt: skip
RING_FILLING_HOPS = Constant(
    7, "hops", "hops that a part of a message passes before all links of a ring work, at the most",
    "aiconfigurator 95f58a51, nccl: all of a ring's up to 8 devices, the most that were measured", is_fitted=False,
)  # fmt: skip
NETWORK_EFFICIENCY = Constant(
    0.92, "1", "fraction of an adapter's rate that NCCL's largest messages reach",
    "stas00/ml-engineering 744d01e: 382 of 400 GB/s on 4 nodes of B200; awsome-distributed-training 7217859f: 42 of 50 "
    "on 2 of A100",
)  # fmt: skip
DCN_EFFICIENCY = Constant(
    0.45, "1", "fraction of a host's adapter that a sum over TPU slices reaches: many small streams of TCP",
    "MaxText on v5e, 256 to 512 chips: 16B loses 0.31 s, 32B 0.40 s, 64B 0.80 s, as if float32 gradients crossed at "
    "0.3 to 0.45 of it in the open",
)  # fmt: skip
NETWORK_FILLING_HOPS = Constant(
    2, "hops", "the same between nodes",
    "the same tables: what remains at 16 to 256 MiB is that of 60 us on H100 and 50 us on B200, about 2 hops of theirs",
)  # fmt: skip
NCCL_CHANNELS = Constant(
    16, "multiprocessors", "that a collective holds while it runs: a channel is a thread block that has one for itself",
    "NVIDIA/nccl issues 689 and 1656; so many are what NCCL logs between Hoppers, issues 892 and 1041", is_fitted=False,
)  # fmt: skip
STEP_VARIATION = Constant(
    0.008, "1", "standard deviation of the time that one node takes for the same work, over its mean",
    "NVIDIA DGX Cloud benchmarks on H100, weak scaling: Llama 8B +1.5 % from 1 node to 16, 70B +1.8 % from 8 to 256, "
    "GPT-3 +1.2 % from 16 to 256, where next to nothing is communicated more",
)  # fmt: skip


def all_of_them() -> Mapping[str, Constant]:
    """By name, in the order of the file."""
    return {name: value for name, value in globals().items() if isinstance(value, Constant)}
