"""Where an instruction of a program comes from: the module and the source line, as XLA's text tells them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import transformer

_ROOT = Path(transformer.__file__).parents[1]
_PLACING = str(Path("transformer", "placement.py"))
"""Who places a tensor is known: the question is who asked for it."""
_TRANSFORM = re.compile(r"^(?:jit|jvp|vmap|transpose|checkpoint|custom_vjp_call|custom_jvp_call)\((.*)\)$")
_PRIMITIVE = re.compile(
    r"^(?:|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr|checkpoint|rematted_computation|shard_map|"
    r"custom_vjp_call|custom_jvp_call|_\w+|\w+_static|\w+,.*->.*)$"
)
"""Parts of a path that JAX's own control flow adds, and einsums."""


@dataclass(frozen=True)
class Origin:
    """What made an instruction."""

    module: str = ""  # "decoder/layer_0/attention"; where no module did, the function
    dims: tuple[str, ...] = ()  # of the tensor, where a rule placed it
    phase: str = "forward"  # "backward", or "recomputed" in it
    where: str = ""  # "transformer/layers.py:92"
    callers: tuple[str, ...] = ()  # of ours, innermost first

    @property
    def known(self) -> bool:
        return bool(self.module or self.where)


class Sources:
    """The origins of a program's instructions, from its text: the tables of stack frames that newer XLA prints in
    front of it, or the file and line beside each instruction."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _frames(self) -> Mapping[int, tuple[str, str, int]]:
        """File and line, function and caller of each frame."""
        files = {int(i): name for i, name in re.findall(r'^(\d+) "(.*)"$', _table(self._text, "FileNames"), re.M)}
        functions = {
            int(i): name for i, name in re.findall(r'^(\d+) "(.*)"$', _table(self._text, "FunctionNames"), re.M)
        }
        places = {
            int(i): (_short(files[int(f)], int(line)), functions[int(g)])
            for i, f, g, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)",
                _table(self._text, "FileLocations"),
                re.M,
            )
        }
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", _table(self._text, "StackFrames"), re.M
        )
        # A frame without a caller is printed as the first one's own caller is: counted from 0 or from 1.
        none = int(frames[0][2] or 0) if frames else 0
        return {int(i): (*places[int(place)], int(caller or none) - none) for i, place, caller in frames}

    def origin(self, metadata: str) -> Origin:
        """Of an instruction, from its line or what follows `metadata=` in it."""
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata)
        frame = re.search(r"stack_frame_id=(\d+)", metadata)
        stack = list(self._stack(int(frame[1]))) if frame else []
        line = re.search(r'source_file="([^"]*)" source_line=(\d+)', metadata)
        if line:
            stack = [(_short(line[1], int(line[2])), "")]
        ours = [(where, function) for where, function in stack if _is_ours(where)] or stack[:1]
        asked = [(w, f) for w, f in ours if not w.startswith(_PLACING)] or ours
        path, dims = module_path(name[1]) if name else ("", ())
        where, function = asked[0] if asked else ("", "")
        return Origin(path or function, dims, phase(name[1] if name else ""), where, tuple(w for w, _ in asked[1:4]))

    def _stack(self, frame: int) -> Iterator[tuple[str, str]]:
        seen: set[int] = set()
        while frame in self._frames and frame not in seen:
            seen.add(frame)
            where, function, frame = self._frames[frame]
            yield where, function.replace(".<locals>", "").replace(".<lambda>", "")

    def named(self, op_name: str) -> list[Origin]:
        """Of the instructions whose path ends most like this one: a function that is called from several places has
        one path in a program and many once they are inlined, and frames are numbered anew."""
        wanted, backward = parts(op_name), phase(op_name)
        scored = [(_alike(parts(name), wanted), phase(name) == backward, line) for name, line in self._named]
        best = max((s[:2] for s in scored), default=None)
        if best is None or best[0] < 2:
            return []
        return sorted({self.origin(line) for *score, line in scored if tuple(score) == best}, key=lambda o: o.where)

    @cached_property
    def _named(self) -> list[tuple[str, str]]:
        found = {}
        for line in self._text.splitlines():
            name = re.search(r'metadata=\{op_name="((?:[^"\\]|\\.)*)".*', line)
            if name:
                found.setdefault(name.group(), name[1])
        return [(name, metadata) for metadata, name in found.items()]


def parts(op_name: str) -> list[str]:
    """The names of a path, without what JAX's transformations and control flow add.

    >>> parts("jit(_step)/while/body/transpose(jvp(Decoder))/checkpoint/layer_0/ffn/[batch,ffn]/sharding_constraint")
    ['Decoder', 'layer_0', 'ffn', '[batch,ffn]', 'sharding_constraint']
    """
    names = []
    one = re.sub(r"/\(([^:]*):.*\)$", r"/\1", op_name.split(";")[0])  # of several that were combined, the first
    for part in one.split("/"):
        while found := _TRANSFORM.match(part):
            part = "" if part.startswith("jit(") else found[1]
        if not _PRIMITIVE.match(part):
            names.append(part)
    return names


def module_path(op_name: str) -> tuple[str, tuple[str, ...]]:
    """The modules of a path, and the dims that a rule placed.

    >>> module_path("jvp(Decoder)/layer_0/layer_0._add/ffn/[batch,length,ffn]/sharding_constraint")
    ('Decoder/layer_0/ffn', ('batch', 'length', 'ffn'))
    """
    names, dims = [], ()
    for name in parts(op_name)[:-1]:
        if name.startswith("["):
            dims = tuple(name[1:-1].split(","))
        elif "." not in name and names[-1:] != [name]:  # a method's name has its module's in front
            names.append(name)
    return "/".join(names), dims


def phase(op_name: str) -> str:
    """ "forward", "backward", or "recomputed": what the forward pass forgot."""
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def _alike(some: list[str], others: list[str]) -> int:
    """Names that two paths end with alike."""
    n = 0
    for a, b in zip(reversed(some), reversed(others), strict=False):
        if a != b:
            break
        n += 1
    return n


def _table(text: str, name: str) -> str:
    found = re.search(rf"^{name}\n((?:\d+ .*\n?)*)", text, re.M)
    return found[1] if found else ""


def _short(file: str, line: int) -> str:
    path = Path(file)
    return f"{path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else path}:{line}"


def _is_ours(where: str) -> bool:
    return (not where.startswith("/") and "site-packages" not in where) or "/tests/" in where
