"""Wrong requests: each one line that names the value, what was expected, and the nearest right one; exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import architectures, cost, data, datasets, entry, ladder, retrieve, train
from experiments.forecast import __main__ as forecast
from experiments.report import __main__ as report
from launch import submit
from transformer.errors import RequestError

VERBS = {
    "train": (train.TrainRequest, train.main),
    "ladder": (ladder.LadderRequest, ladder.main),
    "forecast": (forecast.ForecastRequest, forecast.main),
    "cost": (cost.Request, cost.main),
    "report": (report.Request, report.main),
    "submit": (submit.Submit, submit.main),
    "retrieve": (retrieve.Request, retrieve.main),
    "architectures": (architectures.Request, architectures.main),
}
RECORD = {
    "schema": 1, "kind": "measured", "preset": "tiny", "model": {}, "device": "h100-sxm", "n_devices": 8,
    "layout": {"data": 8}, "scaling": "weak", "seq_len": 256, "step_s": {"median": 1, "low": 1, "high": 1}, "failed": None,
}  # fmt: skip
LADDER = 'name = "t"\nout = "out"\ndevices = [2, 4]\n'
FILES = {
    "a.txt": "green bottles, standing on the wall\n" * 100,
    "typo.toml": "[devices.h100-sxm]\nhbm_byte_per_s = 3e12\n",
    "broken.toml": "[devices.h100-sxm\n",
    "corrupt/records.jsonl": json.dumps(RECORD) + '\n{"schema": 1, "ki\n',
    "other/records.jsonl": json.dumps(RECORD | {"schema": 7}) + "\n",
    "unknown/records.jsonl": json.dumps(RECORD | {"device": "h100-sxn"}) + "\n",
    "fine/records.jsonl": json.dumps(RECORD) + "\n",
    "empty/records.jsonl": "",
    "file": "mine",
    "verb.toml": LADDER + 'verb = "laddr"\n',
    "key.toml": LADDER + "device_per_process = 2\n",
    "count.toml": LADDER + "devices_per_process = 3\n",
    "flag.toml": LADDER + '[flags]\n"micro-batch" = 2\n',
}

WRONG = [
    # model
    ("train --preset=gpt2-124", "unknown preset 'gpt2-124'", "did you mean 'gpt2-124m'"),
    ("forecast --preset=lama3-8b", "unknown preset 'lama3-8b'", "did you mean 'llama3-8b'"),
    ("ladder --model.n_layer=2", "unknown key --model.n_layer", "did you mean 'n_layers'"),
    ("train --model.n_layers=two", "--model.n_layers=two", "expected a whole number"),
    ("train --model.n_layers=2.5", "--model.n_layers=2.5", "expected a whole number"),
    ("train --model.n_layers=0", "n_layers=0", "expected a positive number"),
    ("train --model.d_ff=-8", "d_ff=-8", "expected a positive number"),
    ("train --model.rope_theta=big", "--model.rope_theta=big", "expected a number"),
    ("train --model.bias=1", "--model.bias=1", "expected true or false"),
    ("train --model.ffn=swigul", "ffn='swigul'", "did you mean 'swiglu'"),
    ("train --model.n_kv_heads=3", "n_heads=8 is not a multiple of n_kv_heads=3", "nearest that is: "),
    ("train --model.d_head=15", "d_head=15", "must be even"),
    ("train --model.n_experts=2 --model.experts_per_token=3", "n_experts=2 is fewer than experts_per_token=3", "=2"),
    ("train --model.n_shared_experts=1", "n_shared_experts=1", "expected n_experts too"),
    ("forecast --preset=deepseek-v3 --model.router_groups=7", "n_experts=256 is not a multiple of router_groups=7", ""),
    ("forecast --preset=deepseek-v3 --model.n_dense_layers=61", "n_dense_layers=61 of n_layers=61", "nearest: 60"),
    ("train --model.window=8 --model.chunk=8", "window=8 and chunk=8", "one of the two"),
    ("train --model.kv_rank=8", "kv_rank=8 makes attention latent", "nearest: 8"),
    ("train --model.score=cosin", "score='cosin'", "did you mean 'cosine'"),
    ("train --model.share=query_key --model.n_kv_heads=4", "n_kv_heads=4 must be n_heads", "nearest: 8"),
    ("train --preset=bert-base --model.prefix=true", "prefix is of decoders", "encoder"),
    ("train --model.dropout=1.5", "dropout=1.5", "expected below 1"),
    ("train --model.z_loss=-1", "z_loss=-1.0", "expected 0 or more"),
    ("train --preset=t5-small --dataset=shakespeare", "shakespeare", "en_es"),
    ("train --preset=bert-base --seq_len=513", "--seq_len=513 is beyond the 512 learned positions", "nearest"),
    ("ladder --attention=splash", "--attention=splash needs a TPU", "nearest: --attention=xla"),
    ("retrieve nowhere --query=light", "no run in 'nowhere'", "--out of experiments.train"),
    ("retrieve nowhere", "--query is empty", "expected a text"),
    ("architectures --presets=gpt2", "'gpt2' stands for no architecture", "did you mean"),
    ("architectures --readme=DIR/a.txt", "a.txt: expected the lines", "<!--"),
    ("train --model.n_layers", "'--model.n_layers' needs a value", "--model.n_layers=12"),
    ("train --modle.n_layers=2", "unknown flag '--modle.n_layers=2'", "did you mean 'model'"),
    ("ladder --preset=gpt2-124m --seq_len=1025", "--seq_len=1025", "1024 learned positions", "nearest: --seq_len=1024"),
    ("train --model.vocab_size=100", "vocab_size=100", "259 tokens of the byte tokenizer"),
    # layout and batch
    ("ladder --devices=8 --layout=fsdb=2", "unknown mesh axis 'fsdb'", "did you mean 'fsdp'"),
    ("ladder --devices=8 --layout=fsdp=2,fsdp=4", "'fsdp' is given twice, as 2 and 4"),
    ("ladder --devices=8 --layout=fsdp=0", "'fsdp=0' is not an axis and its size", "as in fsdp=8"),
    ("ladder --devices=8 --layout=fsdp", "'fsdp' is not an axis and its size", "as in fsdp=8"),
    ("ladder --devices=8 --layout=fsdp=3", "8 devices do not divide by 3", "nearest count: 9"),
    ("ladder --devices=8 --layout=data=2,fsdp=2", "is of 4 devices, not 8", "without data="),
    ("ladder --devices=2 --layout=4:fsdp=2", "no entry at or below 2 devices", "the lowest is 4"),
    ("forecast --preset=gpt2-1.5b --devices=8 --layout=tensor=2", "is 25, which tensor=2 does not divide", "nearest: tensor="),
    ("train --devices=8 --global_batch_seqs=12", "--global_batch_seqs=12", "8 data shards", "nearest: 16"),
    ("train --devices=8 --global_batch_seqs=4", "8 data shards for 4 sequences", "the largest count that works is 4"),
    ("train --devices=1 --global_batch_seqs=8 --micro_batch_seqs=3", "--micro_batch_seqs=3", "nearest: 2"),
    ("train --micro_batch_seqs=0", "--micro_batch_seqs=0", "expected at least 1"),
    ("train --seq_len=-1", "--seq_len=-1", "expected at least 1"),
    # devices
    ("ladder --devices=", "--devices is empty", "expected counts such as 1,2,4,8"),
    ("ladder --devices=0", "--devices=0", "expected at least 1"),
    ("train --devices=0", "--devices=0", "expected at least 1"),
    ("ladder --devices=1,x", "--devices=1,x", "with commas between, such as 1,2,4,8"),
    ("ladder --devices=1,16", "--devices=16", "8 devices are attached", "JAX_NUM_CPU_DEVICES=16"),
    ("train --devices=16", "--devices=16", "8 devices are attached"),
    ("forecast --device=h100-sxn", "'h100-sxn'", "did you mean 'h100-sxm'"),
    ("forecast --device=cpu", "nothing is known of 'cpu'", "experiments.calibrate", "--facts"),
    ("forecast --device=a100-80g-sxm --precision=fp8", "--precision=fp8", "a100-80g-sxm has rates of", "bf16"),
    ("forecast --device=tpu-v7 --precision=int8", "--precision=int8", "tpu-v7 has rates of bf16", "bf16"),
    # flags
    ("train --steps=-1", "--steps=-1", "expected a positive number"),
    ("ladder --steps=0", "--steps=0", "expected at least 1"),
    ("ladder --warmup_steps=-1", "--warmup_steps=-1", "expected at least 0"),
    ("train --steps=many", "--steps=many", "expected a whole number"),
    ("train --learning_rate=0", "--learning_rate=0", "expected a positive number"),
    ("train --learning_rate=nan", "--learning_rate=nan", "expected a finite number"),
    ("train --stpes=3", "unknown flag --stpes", "did you mean 'steps'"),
    ("train --steps", "Missing value for flag --steps"),
    ("train 3", "unexpected argument '3'", "--name=value"),
    ("train --seed=-1", "seed=-1", "0 ... 2**32 - 1"),
    ("train --remat=ful", "--remat=ful", "none|dots|full"),
    ("train --remat=full,ffn_upp:save", "'ffn_upp'", "ffn_up"),
    ("train --remat=full,ffn_up:keep", "'ffn_up:keep'", "save, recompute or offload"),
    ("train --remat=none,ffn_up:save", "none keeps everything", "dots,ffn_up:save"),
    ("train --remat=full,layer_input:recompute", "starts from its input", "layer_input:offload"),
    ("ladder --precision=fp16", "--precision=fp16", "auto|bf16|f32"),
    ("ladder --json=maybe", "--json=maybe", "expected true or false"),
    ("ladder --attention=cudnn", "--attention=cudnn needs an NVIDIA GPU", "nearest: --attention=xla"),
    ("ladder --preset=mixtral-8x7b --experts=grouped", "--experts=grouped needs a Hopper GPU", "nearest: --experts=loop"),
    ("forecast --preset=mixtral-8x7b --experts=block", "--experts=block", "loop|grouped"),
    ("ladder --attention=flash", "--attention=flash", "auto|xla|blockwise|cudnn|splash"),
    # data
    ("train --dataset=shakespear", "unknown dataset 'shakespear'", "did you mean 'shakespeare'"),
    ("ladder --dataset=text:DIR/b.txt", "b.txt matches no file", "did you mean 'a.txt'"),
    ("ladder --dataset=text:DIR/none/*.txt", "matches no file", "there is no folder DIR/none"),
    # folders and files
    ("ladder --out=DIR/file", "--out=DIR/file", "expected a folder"),
    ("train --out=DIR/file/below", "--out=DIR/file/below", "DIR/file is a file; expected a folder"),
    ("forecast --facts=DIR/none.toml", "none.toml", "cannot be read"),
    ("ladder --facts=DIR/broken.toml", "broken.toml is not TOML"),
    ("forecast --facts=DIR/typo.toml", "unknown key 'hbm_byte_per_s'", "did you mean 'hbm_bytes_per_s'"),
    ("cost DIR/none", "no records.jsonl in", "experiments.ladder or experiments.forecast"),
    ("cost DIR/corrupt", "corrupt/records.jsonl:2", "not a JSON object"),
    ("report DIR/corrupt", "corrupt/records.jsonl:2", "not a JSON object"),
    ("cost DIR/other", "other/records.jsonl:1", "schema 7, this version reads 1"),
    ("report DIR/empty", "holds no record"),
    ("cost DIR/unknown", "'h100-sxn'", "did you mean 'h100-sxm'"),
    ("cost DIR/fine --usd_per_kwh=0", "--usd_per_kwh=0", "expected a number above 0"),
    ("cost DIR/fine --tokens=3OOe9", "--tokens=3OOe9", "expected a finite number"),
    ("cost DIR/fine --term=spto", "--term=spto", "on_demand|spot"),
    ("cost", "missing argument: ", " with records.jsonl"),
    ("report DIR/fine --tokens=-1", "--tokens=-1", "expected a positive number"),
    ("submit DIR/none.toml", "cannot read", "No such file"),
    ("submit DIR/broken.toml", "broken.toml is not TOML"),
    ("submit DIR/verb.toml", "verb = 'laddr'", "did you mean 'ladder'"),
    ("submit DIR/key.toml", "unknown key 'device_per_process'", "did you mean 'devices_per_process'"),
    ("submit DIR/count.toml", "2 is not a multiple of devices_per_process = 3", "the nearest are 3"),
    ("submit DIR/flag.toml", "'micro-batch' is not a flag's name", "underscores"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _cache(folder, monkeypatch):
    monkeypatch.setenv("LADDER_CACHE", str(folder / "cache"))


def arguments(line: str, folder: Path) -> tuple[str, list[str]]:
    """The verb and its argv; what is written goes to DIR/out, what is read is DIR/a.txt, unless the line says more."""
    verb, *argv = line.replace("DIR", str(folder)).split()
    defaults = {"--dataset": f"text:{folder}/a.txt", "--out": f"{folder}/out"}
    if verb in ("train", "ladder"):
        argv = [f"{flag}={value}" for flag, value in defaults.items()] + argv
    elif verb == "forecast":
        argv = [f"--out={folder}/out", *argv]
    return verb, argv


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the cache's, with what is in them."""
    files = (path for path in folder.rglob("*") if "cache" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


@pytest.mark.parametrize(("line", "fragments"), [(line, said) for line, *said in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_request_is_refused_by_name_and_changes_nothing(folder, line, fragments):
    before = tree(folder)
    verb, argv = arguments(line, folder)
    kind, main = VERBS[verb]
    with pytest.raises(RequestError) as caught:
        main(entry.parse(kind, argv))
    for fragment in fragments:
        assert fragment.replace("DIR", str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train --preset=gpt2-125m", "unknown preset 'gpt2-125m'"),
        ("train --stpes=3", "unknown flag --stpes"),
        ("ladder --devices=1,16", "8 devices are attached"),
        ("ladder --out=DIR/file", "expected a folder"),
        ("forecast --facts=DIR/typo.toml", "unknown key 'hbm_byte_per_s'"),
        ("cost DIR/corrupt", "records.jsonl:2"),
        ("report DIR/other", "schema 7"),
        ("submit DIR/none.toml", "cannot read"),
    ],
)
def test_program_ends_with_2_and_one_line(folder, line, said):
    before = tree(folder)
    verb, argv = arguments(line, folder)
    module = {"submit": "launch.submit"}.get(verb, f"experiments.{verb}")
    command = [sys.executable, "-m", module, *argv]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert tree(folder) == before


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read (No such file or directory)"), (b"\xfd7zXZ\x00 cut", "is damaged (")]
)
@pytest.mark.parametrize("verb", ["train", "ladder"])
def test_missing_or_damaged_corpus_is_refused(folder, tmp_path, monkeypatch, verb, content, said):
    if content is not None:
        (tmp_path / "shakespeare.txt.xz").write_bytes(content)
    monkeypatch.setattr(datasets, "CORPORA", tmp_path)
    kind, main = VERBS[verb]
    with pytest.raises(RequestError) as caught:
        main(entry.parse(kind, ["--devices=1", f"--out={folder}/out"]))
    assert str(tmp_path / "shakespeare.txt.xz") in str(caught.value)
    assert said in str(caught.value)
    assert "reinstall the package" in str(caught.value)
    assert not (folder / "out").exists()


def test_cache_that_cannot_be_written_is_refused(folder, monkeypatch):
    monkeypatch.setenv("LADDER_CACHE", str(folder / "file"))
    with pytest.raises(RequestError, match="the cache .*file cannot be written .*: set LADDER_CACHE"):
        data.tokens(f"text:{folder}/a.txt", "train")


@pytest.mark.parametrize("verb", ["train", "ladder"])
def test_folder_that_may_not_be_written_is_refused(folder, monkeypatch, verb):
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and allowed(path, mode))
    kind, main = VERBS[verb]
    with pytest.raises(RequestError, match=f"--out={folder}/out: {folder} is not writable; choose another --out"):
        main(entry.parse(kind, [*arguments(verb, folder)[1], "--devices=1"]))
