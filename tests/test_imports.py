"""One street, one direction: what may import what."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("transformer", "experiments", "launch")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

FACTS = ("entry", "records", "hardware", "facts_check", "upkeep", "goodput", "runs", "cost", "report")
"""Of experiments: what needs no JAX, and so none of the rooms' rest."""
ASKED = (
    "config", "step", "gradients", "optimizer", "compiler", "data", "objectives", "packing", "tokenizer", "sources", "datasets",
    "memory", "distributed", "attached",
)  # fmt: skip
"""Of experiments: what a run is; FACTS may not, the others may build on it."""
MAINS = (
    "train", "ladder", "calibrate", "forecast.__main__", "cost", "report.__main__", "architectures", "retrieve",
    "compile_check", "compare", "validate", "plan",
)  # fmt: skip
"""Of experiments: entry points."""
WITHOUT_JAX = ("cost", "report.__main__", "runs", "records", "hardware", "entry", "compare")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """Every name that a file imports, also inside functions: `from a import b` is `a.b`, and `a`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports name their room"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    return {name for name in imported(path) if name in MODULES and name not in ROOMS}


def of(prefixes: tuple[str, ...]) -> list[str]:
    """Modules of experiments by name, folders with all that is in them."""
    full = tuple(f"experiments.{prefix}" for prefix in prefixes)
    return [name for name in MODULES if name in full or name.startswith(tuple(f"{prefix}." for prefix in full))]


def touches(name: str, forbidden: tuple[str, ...] | list[str]) -> list[str]:
    return sorted(
        found for found in imported(MODULES[name]) if any(found == f or found.startswith(f"{f}.") for f in forbidden)
    )


@pytest.mark.smoke
def test_there_is_something_to_check():
    assert {"transformer.attention", "experiments.step", "launch.spec"} <= MODULES.keys()
    for name in (*FACTS, *ASKED, *MAINS):
        assert of((name,)), f"{name} is gone: tell this test"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("transformer")])
def test_model_knows_neither_experiment_nor_cluster_nor_argv(name):
    assert touches(name, ("experiments", "launch", "absl", "argparse")) == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("experiments")])
def test_experiment_does_not_know_where_it_runs(name):
    assert touches(name, ("launch",)) == []


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("launch")])
def test_launch_sees_command_lines_and_never_arrays(name):
    known = {module for module in ours(MODULES[name]) if not module.startswith("launch.")}
    assert known <= {"experiments.entry", "experiments.records", "transformer.errors"}


@pytest.mark.parametrize("name", of(FACTS))
def test_reporting_does_not_know_what_runs(name):
    known = {module for module in ours(MODULES[name]) if module.startswith("experiments.")}
    assert known <= set(of(FACTS))
    assert touches(name, ("jax", "flax", "optax")) == []


@pytest.mark.parametrize("name", of(ASKED))
def test_what_is_asked_does_not_know_who_runs_it(name):
    known = {module for module in ours(MODULES[name]) if module.startswith("experiments.")}
    assert known <= set(of(ASKED)) | set(of(FACTS))


@pytest.mark.parametrize("main", of(MAINS))
def test_nobody_imports_an_entry_point(main):
    importers = {name for name, path in MODULES.items() if main in ours(path)}
    pricing = {"experiments.report.__main__", "experiments.plan"} if main == "experiments.cost" else set()
    assert importers <= pricing


def test_no_circle():
    graph = {name: ours(path) - {name} for name, path in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("name", list(MODULES))
def test_jax_is_used_as_the_design_says(name):
    assert touches(name, ("jax.experimental.pjit", "jax.experimental.maps", "jax.pmap")) == []
    assert "pjit" not in {found.rpartition(".")[2] for found in imported(MODULES[name])}
    if not name.startswith("transformer."):
        assert touches(name, ("flax",)) == []
    assert [found for found in touches(name, ("flax",)) if not found.startswith("flax.linen")] in ([], ["flax"])
    if name not in ("experiments.forecast.topology", "transformer.cudnn_calls"):
        assert touches(name, ("jax._src", "jaxlib")) == []
        assert "_src" not in attributes(MODULES[name])


def attributes(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.smoke
def test_what_only_reads_records_starts_without_jax():
    modules = [f"experiments.{name}" for name in WITHOUT_JAX] + [n for n in MODULES if n.startswith("launch.")]
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'jax', 'jaxlib', 'flax', 'optax', 'tensorflow', 'grain', 'orbax'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_is_short_and_named_for_what_it_does(path):
    assert path.stem.strip("_") not in {"utils", "util", "helpers", "helper", "misc", "common", "manager"}
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= 400, f"{path.name} has {n_lines} lines: what does it do twice?"
