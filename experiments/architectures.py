"""Every architecture through every verb: does it train, is it measured, is it forecast on GPUs and TPUs.

    python -m experiments.architectures --out=runs/architectures --readme=README.md

For each the commands that a user would type are run: a shrunk one is trained for a few steps and measured on
two virtual devices; the published one is compiled for absent H100s and TPUs. One to three minutes each on two
cores; the same command goes on where it was stopped. `--readme` replaces the table in that file.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import entry, records
from experiments.entry import flag
from experiments.records import Record, check_out, write_whole
from transformer.accounting import n_active_params, n_params
from transformer.config import ModelConfig
from transformer.errors import RequestError, nearest
from transformer.presets import preset

ARCHITECTURES = {
    "gpt2-1.5b": "decoder: LayerNorm, GELU, learned positions",
    "llama3-8b": "decoder: RMSNorm, SwiGLU, rotary, grouped-query",
    "mistral-7b": "decoder: sliding window",
    "qwen3-8b": "decoder: normed queries and keys",
    "gemma2-9b": "decoder: local and global layers, soft caps, sandwich norm",
    "gemma3-12b": "decoder: five local layers to a global one, two rotary bases",
    "bloom-176b": "decoder: ALiBi, normed embedding",
    "pythia-6.9b": "decoder: parallel layers, partly rotary",
    "palm-540b": "decoder: parallel layers, multi-query",
    "nemotron4-340b": "decoder: squared ReLU",
    "mixtral-8x7b": "decoder: mixture of experts",
    "qwen3-30b-a3b": "decoder: 128 small experts",
    "grok1-314b": "decoder: experts, soft cap, sandwich norm",
    "deepseek-v3": "decoder: latent attention, 256 experts, sigmoid router",
    "bert-large": "encoder: masked language model, post-norm",
    "transformer-big": "encoder-decoder: the original, sinusoidal, post-norm",
    "t5-11b": "encoder-decoder: relative positions",
    "t5-v1.1-xxl": "encoder-decoder: GEGLU, a head of its own",
}
"""One preset for each architecture, and what it has that others have not."""

BEGIN, END = "<!-- architectures: made by experiments.architectures -->", "<!-- end of architectures -->"
STEPS, LENGTH, N_DEVICES = 20, 64, 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """`python -m experiments.architectures`"""

    presets: tuple[str, ...] = flag(tuple(ARCHITECTURES), "which, with commas between; default: all")
    out: str = flag("runs/architectures", "the folder for records")
    readme: str | None = flag(None, "a file whose table between two marks is replaced")

    def __post_init__(self) -> None:
        for name in self.presets:
            if name not in ARCHITECTURES:
                raise RequestError(f"--presets: {name!r} stands for no architecture: {nearest(name, ARCHITECTURES)}")
        if not self.presets:
            raise RequestError(f"--presets is empty: expected some of {', '.join(ARCHITECTURES)}")
        if self.readme:
            _split(Path(self.readme))


def main(request: Request) -> int:
    out = Path(request.out)
    check_out(out)
    rows = [_row(name, out / name) for name in request.presets]
    table = "\n".join([_line(HEAD), _line(["---"] * len(HEAD)), *map(_line, rows)])
    print(table)
    if request.readme:
        before, after = _split(Path(request.readme))
        write_whole(Path(request.readme), f"{before}{BEGIN}\n{table}\n{END}{after}")
    return 1 if any(cell.startswith("failed") for row in rows for cell in row) else 0


HEAD = ["architecture", "preset", "parameters", "trains", "ladder", f"{N_DEVICES} H100", f"{N_DEVICES} TPU v5p"]


def shrunk(config: ModelConfig) -> dict[str, str]:
    """Overrides that keep the design of a model and make it small enough for a core: every kind of layer once."""
    kv = {config.n_heads: 4, 1: 1}.get(config.n_kv_heads, 2)
    small: dict[str, Any] = {
        "d_model": 64, "n_heads": 4, "n_kv_heads": kv, "d_head": 16, "d_ff": 128, "vocab_size": 264,
        "vocab_multiple": 8, "max_len": LENGTH, "n_layers": 2, "n_dense_layers": 1, "global_every": 2, "moe_every": 1,
        "window": 16, "chunk": 16, "q_rank": 32, "kv_rank": 16, "d_rope": 8, "d_value": 16, "n_experts": 8,
        "experts_per_token": min(2, config.experts_per_token), "d_expert": 32, "router_groups": 4,
        "router_top_groups": 2,
    }  # fmt: skip
    return {key: str(value) for key, value in small.items() if getattr(config, key) is not None}


def _row(name: str, folder: Path) -> list[str]:
    config = preset(name)
    overrides = [f"--model.{key}={value}" for key, value in shrunk(config).items()]
    small = [f"--preset={name}", *overrides, f"--seq_len={LENGTH}"]
    train = [
        "experiments.train", *small, "--devices=1", "--micro_batch_seqs=8", f"--steps={STEPS}", "--warmup_steps=5",
        f"--validate_every={STEPS}", f"--checkpoint_every={STEPS}", "--sample_tokens=0", f"--out={folder}/train",
    ]  # fmt: skip
    ladder = ["experiments.ladder", *small, "--micro_batch_seqs=2", "--devices=1,2", "--steps=3", f"--out={folder}"]
    length = min(config.max_len, 2048)
    whole = [
        "experiments.forecast", f"--preset={name}", f"--devices={N_DEVICES}", f"--layout=fsdp={N_DEVICES}",
        f"--seq_len={length}", f"--micro_batch_seqs={8192 // length}", f"--out={folder}",
    ]  # fmt: skip
    return [
        ARCHITECTURES[name], f"`{name}`", _size(config),
        _trained(folder, train), _measured(folder, ladder),
        _forecast(folder, "h100-sxm", whole), _forecast(folder, "tpu-v5p", whole),
    ]  # fmt: skip


def _size(config: ModelConfig) -> str:
    def short(count: int) -> str:
        return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"

    active = f", {short(n_active_params(config))} active" if config.n_experts else ""
    return short(n_params(config)) + active


def _run(command: list[str]) -> str | None:
    """Run a verb on two virtual devices; the last line of what it complained of, if it failed."""
    print("$ python -m", *command, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *command], env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, text=True, capture_output=True
    )
    if done.returncode == 0:
        return None
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return f"failed: {said[-1][:160] if said else done.returncode}".replace("|", "/")


def _trained(folder: Path, command: list[str]) -> str:
    path = folder / "train" / "metrics.jsonl"

    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []

    whole = (folder / "train" / "checkpoints" / str(STEPS)).is_dir()
    failed = None if whole and len(losses()) == STEPS else _run(command)
    found = losses()
    return failed or f"{found[0]:.2f} → {found[-1]:.2f}"


def _measured(folder: Path, command: list[str]) -> str:
    def measured() -> list[Record]:
        return [r for r in _records(folder, "cpu") if not r["failed"]]

    failed = None if len(measured()) == 2 else _run(command)
    return failed or "yes, " + ", ".join(f"{r['n_devices']}" for r in measured()) + " devices"


def _forecast(folder: Path, device: str, command: list[str]) -> str:
    failed = None if _records(folder, device) else _run([*command, f"--device={device}"])
    if failed:
        return failed
    record = _records(folder, device)[-1]
    if record["failed"]:  # the TPU compiler itself says what does not fit
        return "does not fit" if record.get("fits") is False else f"failed: {record['failed'][:70]}"
    fits = "" if record["fits"] else ", does not fit"
    step_s, mfu, backend = record["step_s"]["median"], record["mfu"]["full"], record["layout"]["attention"]
    return f"{step_s:.3g} s, MFU {100 * mfu:.0f} %, {backend}{fits}"


def _records(folder: Path, device: str) -> list[Record]:
    found = records.read(folder) if (folder / records.FILE).exists() else []
    return [r for r in found if r["device"] == device or (device == "cpu" and r["kind"] == "measured")]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _split(readme: Path) -> tuple[str, str]:
    """What stands before and after the table. RequestError if the marks are not there."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--readme={readme}: cannot be read as text ({error})") from None
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RequestError(f"--readme={readme}: expected the lines {BEGIN} and {END}")
    return before, after


if __name__ == "__main__":
    entry.start(main, Request)
