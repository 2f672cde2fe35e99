"""From argv to a request, and from an exception to an exit code."""

import subprocess
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from experiments import entry
from transformer.errors import RequestError

PROGRAM = """
    \"\"\"What it does.

        python verb.py DIR
    \"\"\"
    from dataclasses import dataclass
    from collections.abc import Mapping
    from experiments import entry
    from transformer.errors import RequestError

    @dataclass(frozen=True, kw_only=True)
    class Request:
        folder: str = entry.positional("DIR, a folder")
        steps: int = entry.flag(3, "how many")
        model: Mapping[str, str] = entry.overrides("model", "a key of the model")

    def main(request):
        if request.steps == 1:
            return 1
        if request.steps == 2:
            raise RequestError("--steps=2:\\n   expected another")
        if request.steps == 4:
            raise OSError("the disk is full")
        print(request.folder, request.steps, dict(request.model))

    if __name__ == "__main__":
        entry.start(main, Request)
"""


@dataclass(frozen=True, kw_only=True)
class Request:
    folder: str = entry.positional("the folder", "here")
    steps: int = entry.flag(3, "how many")
    rate: float | None = entry.flag(None, "how fast")
    name: str = entry.flag("x", "a text")
    quiet: bool = entry.flag(False, "whether")
    counts: tuple[int, ...] = entry.flag((1, 2), "several")
    precision: Literal["bf16", "f32"] = entry.flag("bf16", "which")
    model: Mapping[str, str] = entry.overrides("model", "a key of the model")


def parse(*argv: str) -> Request:
    return entry.parse(Request, list(argv))


@pytest.fixture(scope="module")
def verb(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("verb") / "verb.py"
    path.write_text(textwrap.dedent(PROGRAM))
    return path


def run(verb: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(verb), *argv], capture_output=True, text=True, check=False)


@pytest.mark.smoke
def test_defaults_stand_in_the_dataclass():
    assert parse() == Request()
    assert (parse().folder, parse().counts, parse().rate) == ("here", (1, 2), None)


@pytest.mark.parametrize(
    ("argument", "field", "value"),
    [
        ("--steps=-7", "steps", -7),
        ("--rate=3e-4", "rate", 3e-4),
        ("--name=a=b", "name", "a=b"),
        ("--quiet", "quiet", True),
        ("--noquiet", "quiet", False),
        ("--quiet=true", "quiet", True),
        ("--counts=8", "counts", (8,)),
        ("--counts=1, 2,,4", "counts", (1, 2, 4)),
        ("--counts=", "counts", ()),
        ("--precision=f32", "precision", "f32"),
        ("there", "folder", "there"),
    ],
)
def test_flag_has_the_type_of_its_field(argument, field, value):
    assert getattr(parse(argument), field) == value


def test_value_may_follow_its_flag_and_the_last_one_counts():
    assert parse("--steps", "4", "there", "--steps=5").steps == 5


def test_dotted_flags_are_one_mapping():
    assert parse("--model.n_layers=2", "--model.ffn=gelu").model == {"n_layers": "2", "ffn": "gelu"}
    with pytest.raises(TypeError):
        parse("--model.n_layers=2").model["n_layers"] = "3"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--stesp=3", "unknown flag --stesp: did you mean 'steps'?"),
        ("--zzz=3", "unknown flag --zzz: known: counts, name, precision, quiet, rate, steps"),
        ("--mdoel.n_layers=3", "unknown flag '--mdoel.n_layers=3': did you mean 'model'?"),
        ("--model.n_layers", "'--model.n_layers' needs a value, as in --model.n_layers=12"),
        ("--model.n_layers=", "'--model.n_layers=' needs a value"),
        ("--steps", "Missing value for flag --steps"),
        ("--steps=", "flag --steps=: expected a whole number"),
        ("--steps=2.5", "flag --steps=2.5: expected a whole number, such as 8"),
        ("--rate=fast", "flag --rate=fast: expected a finite number"),
        ("--rate=nan", "flag --rate=nan: expected a finite number"),
        ("--quiet=maybe", "flag --quiet=maybe: expected true or false"),
        ("--counts=1;2", "--counts=1;2: expected ints with commas between, such as 1,2,4,8"),
        ("--precision=f16", "flag --precision=f16: value should be one of <bf16|f32>"),
    ],
)
def test_wrong_argument_is_named_with_what_was_expected(argument, message):
    with pytest.raises(RequestError) as caught:
        parse(argument)
    assert message in str(caught.value)


def test_argument_too_many_is_named():
    with pytest.raises(RequestError, match="unexpected argument 'there': flags are written --name=value"):
        parse("here", "there")


@pytest.mark.parametrize(("argv", "code"), [(["d"], 0), (["d", "--steps=1"], 1), (["d", "--steps=2"], 2)])
def test_exit_code(verb, argv, code):
    assert run(verb, *argv).returncode == code


def test_request_reaches_main(verb):
    done = run(verb, "d", "--model.n_layers=2")
    assert (done.stdout, done.stderr) == ("d 3 {'n_layers': '2'}\n", "")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["d", "--steps=2"], "error: --steps=2: expected another\n"),
        (["d", "--stesp=2"], "error: unknown flag --stesp: did you mean 'steps'?\n"),
        ([], "error: missing argument: DIR, a folder\n"),
    ],
)
def test_wrong_request_is_one_line_on_stderr(verb, argv, line):
    done = run(verb, *argv)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_what_is_not_the_users_fault_shows_where_it_happened(verb):
    done = run(verb, "d", "--steps=4")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "the disk is full" in done.stderr


@pytest.mark.smoke
def test_help_lists_the_verbs_flags_and_succeeds(verb):
    done = run(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("What it does.")
    named = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("  --")]
    assert named == ["  --steps", "  --model.KEY=VALUE"]
    assert "FOLDER, without a flag: DIR, a folder" in done.stdout
