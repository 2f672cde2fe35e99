import sys
from pathlib import Path

import pytest

from launch import spec
from transformer.errors import RequestError

EXAMPLES = sorted((Path(spec.__file__).parent / "examples").glob("*.toml"))
GOOD = {"name": "t", "out": "runs/t", "devices": [8, 64], "devices_per_process": 4, "processes_per_node": 2}


def test_a_ladder_becomes_one_job_a_rung():
    flags = {
        "preset": "tiny",
        "steps": 5,
        "model": {"n_layers": 4},
        "exact": True,
        "axes": ["data", "fsdp"],
        "lr": 3e-4,
    }
    small, large = spec.parse(GOOD | {"flags": flags}).jobs()
    assert (small.n_processes, small.processes_per_node, small.devices_per_process) == (2, 2, 4)
    assert (large.n_processes, large.processes_per_node) == (16, 2)
    assert (small.name, small.folder) == ("t-0008", Path("runs/t/rung-0008"))
    assert small.argv == (
        sys.executable, "-m", "experiments.ladder", "--devices=8", "--out=runs/t/rung-0008", "--preset=tiny",
        "--steps=5", "--model.n_layers=4", "--exact=true", "--axes=data,fsdp", "--lr=0.0003",
    )  # fmt: skip


def test_a_rung_smaller_than_a_node_takes_part_of_it():
    (job,) = spec.parse(GOOD | {"devices": [4]}).jobs()
    assert (job.n_processes, job.processes_per_node) == (1, 1)


def test_train_is_launched_the_same_way():
    (job, _) = spec.parse(GOOD | {"verb": "train"}).jobs()
    assert job.argv[1:] == ("-m", "experiments.train", "--devices=8", "--out=runs/t/rung-0008")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_specs(path):
    assert spec.read(path).jobs()


def test_there_are_examples():
    assert {path.name for path in EXAMPLES} == {"ladder.toml", "h100.toml"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devcies": [8]}, "unknown key 'devcies': did you mean 'devices'?"),
        ({"slurm": {"partitoin": "gpu"}}, "unknown key of [slurm] 'partitoin': did you mean 'partition'?"),
        ({"slurm": {"nodes": 3}}, "unknown key of [slurm] 'nodes'"),
        ({"slurm": {"exclusive": False}}, "[slurm] exclusive = False: expected text in quotes, a whole number or true"),
        ({"slurm": {"setup": "module load cuda"}}, "[slurm] setup = 'module load cuda': expected a list"),
        ({"slurm": {"extra": ["-N2"]}}, "[slurm] extra = '-N2': expected an sbatch option"),
        ({"slurm": {"extra": ["--x\nrm -rf ~"]}}, "line breaks"),
        ({"slurm": {"account": "a\n#SBATCH --qos=x"}}, "line breaks"),
        ({"verb": "laddr"}, "verb = 'laddr' does not run on clusters; did you mean 'ladder'?"),
        ({"devices": []}, "devices = []"),
        ({"devices": [0]}, "devices: 0 is not a count"),
        ({"devices": [8, -8]}, "devices: -8 is not a count"),
        ({"devices": [True]}, "devices: True is not a count"),
        ({"devices": 8}, "devices = 8: expected a list"),
        ({"devices": [8, 8]}, "has 8 twice"),
        ({"devices": [10]}, "devices: 10 is not a multiple of devices_per_process = 4; the nearest are 8 and 12"),
        ({"devices": [2]}, "the nearest are 4 and 4"),
        ({"devices": [12]}, "12 makes 3 processes, not a multiple of processes_per_node = 2; whole nodes have 8"),
        ({"devices_per_process": 0}, "devices_per_process: 0 is not a count"),
        ({"devices_per_process": "4"}, "devices_per_process = '4': expected a whole number"),
        ({"name": "a b"}, "name = 'a b': expected letters"),
        ({"out": ""}, "out = '' is empty"),
        ({"out": "a\nb"}, "line breaks"),
        ({"out": "a\\b"}, "backslash"),
        ({"env": {"A B": "x"}}, "[env] 'A B' is not a variable's name"),
        ({"env": {"A": 1}}, "[env] A = 1: expected text in quotes"),
        ({"env": {"A": "x\ny"}}, "line breaks"),
        ({"env": {"LADDER_PROCESS_ID": "0"}}, "[env] LADDER_PROCESS_ID is set by the launcher"),
        ({"flags": {"out": "x"}}, "[flags] out differs by rung"),
        ({"flags": {"devices": "8"}}, "[flags] devices differs by rung"),
        ({"flags": {"a b": 1}}, "[flags] 'a b' is not a flag's name"),
        ({"flags": {"steps": [[1]]}}, "[flags] steps = [[1]]"),
        ({"flags": {"text": "a\x00b"}}, "control characters"),
    ],
    ids=str,
)
def test_wrong_value_is_named(change, message):
    with pytest.raises(RequestError) as caught:
        spec.parse(GOOD | change)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["name", "out", "devices"])
def test_missing_key_is_named(key):
    with pytest.raises(RequestError, match=f"{key} is missing"):
        spec.parse({k: v for k, v in GOOD.items() if k != key})


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match=r"cannot read '.*none\.toml': No such file"):
        spec.read(tmp_path / "none.toml")


def test_file_that_is_not_toml(tmp_path):
    (tmp_path / "x.toml").write_text("name = oops")
    with pytest.raises(RequestError, match=r"x\.toml is not TOML: .*line 1"):
        spec.read(tmp_path / "x.toml")


def test_errors_in_a_file_name_the_file(tmp_path):
    (tmp_path / "x.toml").write_text('name = "t"\nout = "o"\ndevices = [0]')
    with pytest.raises(RequestError, match=r"x\.toml: devices: 0 is not a count"):
        spec.read(tmp_path / "x.toml")
