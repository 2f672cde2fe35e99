"""The lines of XLA's text: shapes, instructions, computations. Nothing here knows what a line costs."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property

BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3": 8,
    "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f4e2m1fn": 4, "f8e8m0fnu": 8, "token": 0, "opaque": 0,
}  # fmt: skip

HOST = 5
"""The memory space that XLA prints for the host's."""

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "iota", "add-dependency", "domain",
})  # fmt: skip

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<= ]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_PARENTHESIS = re.compile(r"[()]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """One array: element type, dims, and whether it lies in the chip's fast memory (TPU's VMEM, space 1) or the host's
    (HOST). `layout`: its dims from the fastest to the slowest, as XLA prints them ("1,0"); "" is "the last is the
    fastest"."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0
    layout: str = field(default="", compare=False)

    @property
    def order(self) -> tuple[int, ...]:
        """Dims from the fastest to the slowest; those of size 1 lie nowhere and are left out."""
        known = tuple(map(int, self.layout.split(","))) if self.layout else tuple(reversed(range(len(self.dims))))
        return tuple(d for d in known if self.dims[d] != 1)

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def n_bytes(self) -> int:
        return self.elements * BITS[self.dtype] // 8

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.space else self.n_bytes


@dataclass(slots=True)
class Instruction:
    """One line of a computation. `operands` are names; `attributes` is the rest of the line as printed."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False
    value: str = ""  # what stands in the parentheses of a constant or parameter

    @property
    def called(self) -> tuple[str, ...]:
        names = []
        for single, several in _CALLED.findall(self.attributes):
            names += [single] if single else [n.strip().lstrip("%") for n in several.split(",")]
        return tuple(names)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression over the attributes."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def target(self) -> str:
        """What a custom call calls, "" for any other instruction."""
        return (self.attribute(r'custom_call_target="([^"]*)"') or "") if self.opcode == "custom-call" else ""

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's own estimate of one execution; None where it prints none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0) or None

    @property
    def op_name(self) -> str:
        """The path of JAX modules and primitives that this came from."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def collective(self) -> str | None:
        """The collective that this line is or starts."""
        base = self.opcode.removesuffix("-start")
        return base if base in COLLECTIVES else None


@dataclass
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for operand in instruction.operands:
                if operand in users:
                    users[operand].append(instruction)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        """What the computation is given, in order."""
        return sorted((i for i in self.instructions if i.opcode == "parameter"), key=lambda i: int(i.value))

    @property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Of all operands, tuples laid flat."""
        return [s for name in instruction.operands if name in self.by_name for s in self.by_name[name].shapes]


def instruction(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    rest = _COMMENT.sub("", rest)
    kind_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:kind_end], rest[kind_end:].lstrip()
    open_at = rest.index("(")
    close_at = _closing(rest, open_at)
    inside = rest[open_at + 1 : close_at]
    opcode = rest[:open_at]
    literal = opcode in ("constant", "parameter", "iota")
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        shapes=tuple(_shape(*found) for found in _SHAPE.findall(kind)),
        operands=() if literal else tuple(_NAME.findall(inside)),
        attributes=rest[close_at + 1 :],
        is_root=head.startswith("ROOT "),
        value=inside if literal else "",
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = _SPACE.search(layout)
    sizes = tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())
    return Shape(dtype, sizes, int(space.group(1)) if space else 0, layout.partition(":")[0])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unclosed parenthesis in {text[:80]!r}")
