"""Training stops and goes on as if it had not, and never mixes two runs in one folder."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments import entry, retrieve, train
from transformer.errors import RequestError

STEPS, STOPPED_AT, CHECKPOINT_AT = 6, 5, 3


class Stopped(Exception):
    """What a signal or a lost machine would do."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a text and a cache; LADDER_CACHE for the whole module."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "a.txt").write_text("".join(f"{i} green bottles, standing on the wall.\n" for i in range(400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LADDER_CACHE", str(folder / "cache"))
        yield folder


def request(runs: Path, out: Path, *argv: str) -> train.TrainRequest:
    flags = [
        "--model.n_layers=2", "--seq_len=32", "--global_batch_seqs=4", "--devices=2", "--remat=none", "--warmup_steps=1",
        f"--steps={STEPS}", f"--checkpoint_every={CHECKPOINT_AT}", "--validate_every=3", "--sample_tokens=0",
        f"--dataset=text:{runs}/*.txt", f"--out={out}",
    ]  # fmt: skip
    return entry.parse(train.TrainRequest, [*flags, *argv])


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def straight(runs) -> Path:
    """A run that nothing stopped."""
    assert train.main(request(runs, runs / "straight")) == 0
    return runs / "straight"


@pytest.fixture(scope="module")
def stopped_once(runs) -> Path:
    """A run that was killed in step 5, with a checkpoint of step 3, while it wrote a line."""

    class Killed(train.Log):
        def write(self, step, values):
            if step == STOPPED_AT:
                self._file.write('{"step": 5, "lo')
                raise Stopped
            super().write(step, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Log", Killed)
        with pytest.raises(Stopped):
            train.main(request(runs, runs / "stopped"))
    return runs / "stopped"


@pytest.fixture
def stopped(stopped_once, tmp_path) -> Path:
    """A copy of that run, to be gone on with."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def test_loss_falls(straight):
    losses = [line["loss"] for line in metrics(straight)]
    assert 5 < losses[0] < 6.5  # ln 264 is 5.6
    assert losses[-1] < losses[0] - 0.3


def test_one_line_a_step(straight):
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all({"loss", "grad_norm", "step_s", "time"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "validation_loss" in line] == [3, 6]
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_tensorboard_has_its_file(straight):
    (events,) = (straight / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    assert b"validation_loss" in events.read_bytes()


def test_resumed_run_is_the_uninterrupted_one_to_the_last_digit(runs, straight, stopped, capsys):
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == STOPPED_AT  # the last cut short
    assert train.main(request(runs, stopped)) == 0
    assert "resumed at step 3" in capsys.readouterr().err
    said = [
        [(line["step"], line["loss"], line.get("validation_loss")) for line in metrics(out)]
        for out in (straight, stopped)
    ]
    assert said[0] == said[1]
    assert (stopped / "metrics.jsonl").read_text().endswith("}\n")


def test_run_goes_on_under_another_layout(runs, straight, stopped):
    argv = ["--devices=8", "--layout=fsdp=2,tensor=2", "--micro_batch_seqs=1"]
    assert train.main(request(runs, stopped, *argv)) == 0
    losses = [[line["loss"] for line in metrics(out)] for out in (straight, stopped)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][:CHECKPOINT_AT] == losses[0][:CHECKPOINT_AT]


def test_finished_run_is_not_run_again(runs, straight, monkeypatch, capsys):
    before, had = metrics(straight), sorted(path.name for path in (straight / "checkpoints").iterdir())
    monkeypatch.setattr(train.TrainStep, "step", property(lambda _: pytest.fail("a step was run")))
    assert train.main(request(runs, straight)) == 0
    assert metrics(straight) == before
    assert sorted(path.name for path in (straight / "checkpoints").iterdir()) == had
    assert "validation loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rate=0.5"], "--learning_rate=0.5: the run in {out} was started with 0.003"),
        (["--steps=7"], "--steps=7: the run in {out} was started with 6"),
        (["--model.n_layers=3"], "--model.n_layers=3: the run in {out} was started with 2"),
        (["--model.d_ff=64"], "--model.d_ff=64: the run in {out} was started with its default"),
        (["--global_batch_seqs=2"], "--global_batch_seqs=2: the run in {out} was started with 4"),
        (["--seed=1"], "--seed=1: the run in {out} was started with 0"),
        (["--precision=bf16"], "--precision=bf16: the run in {out} was started with f32"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_and_changes_nothing(runs, straight, argv, message):
    before = everything(straight)
    with pytest.raises(RequestError) as caught:
        train.main(request(runs, straight, *argv))
    assert str(caught.value) == message.format(out=straight) + "; give that, or choose another --out"
    assert everything(straight) == before


def test_more_devices_at_a_fixed_micro_batch_would_learn_another_thing(runs, tmp_path):
    """Weak scaling: the global batch grows with the devices, so the folder is another run's."""
    weak = ["--devices=4", "--micro_batch_seqs=1"]
    first = entry.parse(train.TrainRequest, ["--seq_len=32", *weak])
    train.claim(tmp_path, train._learns(first, first.rung(4)), write=True)
    with pytest.raises(RequestError, match="--global_batch_seqs=8: .* started with 4"):
        train.claim(tmp_path, train._learns(first, first.rung(8)), write=True)
    same = entry.parse(train.TrainRequest, ["--seq_len=32", "--global_batch_seqs=4", "--micro_batch_seqs=2"])
    train.claim(tmp_path, train._learns(same, same.rung(2)), write=True)


def test_a_flag_that_is_newer_than_the_run_is_no_part_of_it(tmp_path):
    """But a key of the model is: it was at its default."""
    asked = entry.parse(train.TrainRequest, ["--seq_len=32"])
    learns = train._learns(asked, asked.rung(1))
    train.claim(tmp_path, {k: v for k, v in learns.items() if k != "experts"}, write=True)
    train.claim(tmp_path, learns, write=True)
    with pytest.raises(RequestError, match="--model.n_layers=3: .* started with its default"):
        train.claim(tmp_path, learns | {"model": {"n_layers": "3"}}, write=True)


@pytest.mark.parametrize("text", ["{", "[1]", "3", '"x"'])
def test_folder_with_another_programs_config_is_refused(runs, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError, match=r"config\.json: not a run's config .*: choose another --out"):
        train.main(request(runs, tmp_path))
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("--model.d_ff=64", "decoder/block_0/layer_0/ffn/w_down is (2, 384, 128) there and (2, 64, 128) here"),
        (
            "--model.n_layers=3",
            "decoder/block_0/layer_0/attention/w_k is (2, 128, 8, 16) there and (3, 128, 8, 16) here",
        ),
        ("--model.norm=layer", "decoder/block_0/layer_0/attention_norm/bias is missing there and (2, 128) here"),
    ],
)
def test_checkpoint_of_another_model_is_refused_in_one_line(runs, stopped, override, difference):
    (stopped / "config.json").unlink()
    with pytest.raises(RequestError) as caught:
        train.main(request(runs, stopped, override))
    where = f"the checkpoint of step {CHECKPOINT_AT} in {stopped / 'checkpoints'} is not of this model: "
    assert str(caught.value) == f"{where}{difference}; choose another --out"


def test_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(runs, stopped, monkeypatch):
    whole = train.TrainStep._step

    def ruined(self, state, batch):
        state, seen = whole(self, state, batch)
        return state, seen | {"loss": jnp.where(state.step == 5, jnp.nan, seen["loss"])}

    monkeypatch.setattr(train.TrainStep, "_step", ruined)
    with pytest.raises(FloatingPointError, match="loss is nan at step 5: lower --learning_rate"):
        train.main(request(runs, stopped))
    assert [line["step"] for line in metrics(stopped)] == [1, 2, 3, 4]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["3"]


def test_held_out_text_too_short_to_validate_is_said_before_any_work(runs, tmp_path):
    (tmp_path / "short.txt").write_text("green bottles\n" * 100)
    out = tmp_path / "out"
    with pytest.raises(RequestError, match="the validation split of .* too few for 4 x 32"):
        train.main(request(runs, out, f"--dataset=text:{tmp_path}/short.txt"))
    assert not out.exists()


def test_sample_is_printed(runs, straight, capsys):
    assert train.main(request(runs, straight, "--sample_tokens=8")) == 0
    assert capsys.readouterr().out.count("\n") >= 2


SMALL = [
    "--model.n_layers=1", "--model.d_model=16", "--model.n_heads=2", "--model.n_kv_heads=2", "--model.d_head=8",
    "--model.d_ff=32", "--model.vocab_size=264", "--model.vocab_multiple=8", "--seq_len=128", "--devices=1",
    "--steps=2", "--validate_every=2", "--sample_tokens=24",
]  # fmt: skip


def learnt_by(preset: str, runs: Path, *argv: str) -> Path:
    out = runs / preset.partition(" ")[0]
    flags = [*f"--preset={preset}".split(), *SMALL, "--global_batch_seqs=4", *argv, f"--out={out}"]
    assert train.main(entry.parse(train.TrainRequest, flags)) == 0
    assert [line["step"] for line in metrics(out)] == [1, 2]
    return out


def test_encoder_fills_in_what_was_hidden_and_finds_a_text_by_itself(runs, capsys):
    dataset = f"--dataset=text:{runs}/*.txt"
    out = learnt_by("bert-base", runs, dataset)
    printed = capsys.readouterr().out
    hidden, filled = (next(line for line in printed.splitlines() if line.startswith(n)) for n in ("hidden", "filled"))
    assert "_" in hidden
    assert len(filled) <= len(hidden)

    def found(query: str, top: int) -> list[dict]:
        request = [str(out), f"--query={query}", dataset, f"--top={top}", "--json"]
        assert retrieve.main(entry.parse(retrieve.Request, request)) == 0
        return json.loads(capsys.readouterr().out)

    rows = found("green bottles", 3)
    assert rows == sorted(rows, key=lambda row: -row["similarity"])
    assert all("green bottles" in row["text"] and row["similarity"] < 1 for row in rows)
    line = "399 green bottles, standing on the wall."
    first, second = found(line, 2)
    assert first["text"] == line
    assert first["similarity"] == pytest.approx(1, abs=1e-5)
    assert second["similarity"] < first["similarity"]


def test_encoder_decoder_translates(runs, capsys):
    out = learnt_by("t5-small", runs)
    printed = capsys.readouterr().out
    assert "source: In the beginning, God created the heavens and the earth." in printed
    assert "target: EN el principio" in printed
    with pytest.raises(RequestError, match="encoder_decoder"):
        retrieve.main(entry.parse(retrieve.Request, [str(out), "--query=light"]))


def test_prefix_decoder_trains(runs, capsys):
    learnt_by("tiny --model.prefix=true", runs, f"--dataset=text:{runs}/*.txt")
    assert "byte frequencies alone" in capsys.readouterr().out


def test_a_default_given_by_its_name_is_the_same_run():
    def learns(*argv: str) -> dict:
        request = entry.parse(train.TrainRequest, ["--preset=t5-small", "--model.vocab_size=264", *argv])
        return train._learns(request, request.rung(1))

    assert learns() == learns("--dataset=en_es")
    assert learns() != learns("--dataset=tsv:mine.tsv")
    halves = learns("--global_batch_seqs=8", "--micro_batch_seqs=4")
    assert halves != learns("--global_batch_seqs=8", "--micro_batch_seqs=8")  # T5 has dropout: parts draw their own
