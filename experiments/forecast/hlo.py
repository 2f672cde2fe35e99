"""The compiled schedule, read from XLA's text: computations, instructions, what each moves and multiplies.

XLA prints scheduled modules in execution order (`is_scheduled=true`). Nothing here knows a device:
bytes and FLOPs only. Text, because no HLO proto schema is packaged outside TensorFlow.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from experiments.forecast.groups import numbers
from experiments.forecast.kernels import Product, attention_flops

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
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """One array: element type, dims, and whether it lies in the chip's fast memory (TPU's VMEM, space 1) or the host's
    (HOST)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

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
        return [s for name in instruction.operands if name in self.by_name for s in self.by_name[name].shapes]


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int:
        """Iterations of a `while`: as the GPU compiler prints it, or the bound in the TPU loop's condition."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if known:
            return int(known)
        condition = loop.attribute(r"condition=%?([\w.\-]+)")
        assert condition is not None, loop.name
        bounds = [
            int(i.value)
            for name in self._reachable(condition)
            for i in self.computations[name].instructions
            if i.opcode == "constant" and i.value.lstrip("-").isdigit()
        ]
        assert bounds, f"no trip count for {loop.name}"
        return -(-max(bounds) // self._stride(loop, self.computations[condition]))

    def _stride(self, loop: Instruction, condition: Computation) -> int:
        """What the counter gains in one iteration: loops that the TPU compiler unrolled count in twos."""
        body = self.computations[loop.attribute(r"body=%?([\w.\-]+)") or ""]
        counter = next((i for i in condition.instructions if i.opcode == "get-tuple-element"), None)
        if counter is None or body.root.opcode != "tuple":
            return 1
        gain = body.by_name[body.root.operands[int(counter.attribute(r"index=(\d+)") or 0)]]
        terms = [body.by_name[name] for name in gain.operands if name in body.by_name]
        terms += [i for name in gain.called for i in self.computations[name].instructions]
        return max((int(i.value) for i in terms if i.opcode == "constant" and i.value.isdigit()), default=1)

    def _reachable(self, name: str) -> Iterator[str]:
        yield name
        for instruction in self.computations[name].instructions:
            for called in instruction.called:
                yield from self._reachable(called)

    def products(self, computation: Computation, instruction: Instruction) -> list[Product]:
        """The matrix products of one execution, fused ones included; attention kernels are none of them."""
        if instruction.opcode == "dot":
            return [_dot(computation, instruction)]
        if instruction.opcode == "convolution":
            return [_convolution(computation, instruction)]
        if instruction.opcode in ("fusion", "fusion-start", "call", "async-start"):
            return [
                product
                for name in instruction.called
                for inner in self.computations[name].instructions
                for product in self.products(self.computations[name], inner)
            ]
        return []

    def flops(self, computation: Computation, instruction: Instruction) -> float:
        """Multiplications and additions of matrix products in one execution, fused ones included.

        Attention kernels are counted as they run (`kernels.py`)."""
        if instruction.opcode == "custom-call":
            target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
            operands = [shape.dims for shape in computation.operand_shapes(instruction) if "f" in shape.dtype]
            return attention_flops(target, instruction.attributes, operands)
        return sum(product.flops for product in self.products(computation, instruction))

    def dot_dtype(self, computation: Computation, instruction: Instruction) -> str:
        """Element type of the narrowest operand that is multiplied: it decides the peak rate."""
        if instruction.opcode in ("dot", "convolution"):
            return min((s.dtype for s in computation.operand_shapes(instruction)), key=BITS.__getitem__)
        inner = [
            self.dot_dtype(self.computations[name], i)
            for name in instruction.called
            for i in self.computations[name].instructions
            if self.flops(self.computations[name], i)
        ]
        return min(inner, key=BITS.__getitem__) if inner else instruction.shapes[0].dtype

    def to_host(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether it moves something to the host's memory or from it; its traffic on the device is what is moved."""
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        return any(shape.space == HOST for i in (instruction, *operands) for shape in i.shapes)

    def traffic_bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes read from and written to device memory by one execution.

        A fusion that slices a large operand reads the slice; one that updates a slice in place writes
        the slice. Counting whole operands would charge every layer with all layers' parameters.
        """
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        if instruction.opcode == "async-start":
            wrapped = self.computations[instruction.called[0]]
            return sum(self.traffic_bytes(wrapped, i) for i in wrapped.instructions if i.opcode not in FREE)
        if instruction.opcode in ("fusion", "fusion-start"):
            inner = self.computations[instruction.called[0]]
            read = sum(
                self._read_bytes(inner, parameter)
                for parameter, operand in zip(inner.parameters, operands, strict=True)
                if not any(s.space for s in operand.shapes)
            )  # fmt: skip
            made = (
                instruction.shapes if instruction.opcode == "fusion" else inner.root.shapes
            )  # a start's has operands too
            return read + self._written_bytes(inner, inner.root, made)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(s.hbm_bytes for s in instruction.shapes)
        if instruction.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(s.hbm_bytes for o in operands[1:] for s in o.shapes)
        return sum(s.hbm_bytes for s in instruction.shapes) + sum(s.hbm_bytes for o in operands for s in o.shapes)

    def _read_bytes(self, fused: Computation, parameter: Instruction) -> float:
        """Of what a fusion is given; a TPU's fusions have fusions inside."""
        users = fused.users[parameter.name]
        passed = [u for u in users if u.opcode in ("bitcast", "reshape")]
        if users and len(passed) == len(users):
            return sum(self._read_bytes(fused, user) for user in passed)
        total = sum(s.hbm_bytes for s in parameter.shapes)
        partial = 0.0
        for user in users:
            if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
                partial += sum(s.n_bytes for s in user.shapes)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
                continue  # updated in place: what is not replaced is not touched
            elif user.opcode == "fusion":
                inner = self.computations[user.called[0]]
                places = [i for i, name in enumerate(user.operands) if name == parameter.name]
                partial += sum(self._read_bytes(inner, inner.parameters[i]) for i in places)
            else:
                return total
        return min(total, partial)

    def _written_bytes(self, fused: Computation, root: Instruction, shapes: tuple[Shape, ...]) -> float:
        if root.opcode == "tuple":
            parts = [fused.by_name[name] for name in root.operands]
            return sum(self._written_bytes(fused, part, (shape,)) for part, shape in zip(parts, shapes, strict=True))
        if root.opcode == "fusion":
            inner = self.computations[root.called[0]]
            return self._written_bytes(inner, inner.root, shapes)
        if root.opcode in ("bitcast", "reshape", "convert") and root.operands[0] in fused.by_name:
            source = fused.by_name[root.operands[0]]
            if source.opcode in ("dynamic-update-slice", "fusion"):
                return self._written_bytes(fused, source, shapes)
        if root.opcode == "dynamic-update-slice" and not shapes[0].space:
            return sum(s.n_bytes for s in fused.by_name[root.operands[1]].shapes)
        return sum(s.hbm_bytes for s in shapes)


def _dot(computation: Computation, dot: Instruction) -> Product:
    """Result and contraction of a dot."""
    left, right = (computation.by_name[name].shapes[0] for name in dot.operands[:2])
    contracted = numbers(dot.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))
    batch = math.prod(left.dims[d] for d in numbers(dot.attribute(r"lhs_batch_dims=\{([\d,]*)\}")))
    k = math.prod(left.dims[d] for d in contracted)
    dtype = min(left.dtype, right.dtype, key=BITS.__getitem__)
    return Product(left.elements // (batch * k or 1), right.elements // (batch * k or 1), k, batch, dtype)


def _convolution(computation: Computation, conv: Instruction) -> Product:
    """Batch x output features x input features, as often as (output, kernel) positions meet data.

    The TPU compiler writes matrix products as convolutions, and batch dims as windows that mostly
    fall on padding: those positions cost nothing and are not counted.
    """
    labels = conv.attribute(r"dim_labels=([\w?]+->[\w?]+|[\w?]+_[\w?]+->[\w?]+)")
    assert labels is not None, conv.name
    inputs, out_label = labels.split("->")
    left_label, right_label = inputs.split("_")
    left, right = (computation.by_name[name].shapes[0] for name in conv.operands[:2])
    out, meetings = conv.shapes[0].dims, 1
    windows = _windows(conv.attribute(r"window=\{([^}]*)\}") or "")
    for d in sorted(c for c in out_label if c.isdigit()):
        window = windows[int(d)] if int(d) < len(windows) else {}
        sizes = left.dims[left_label.index(d)], right.dims[right_label.index(d)], out[out_label.index(d)]
        meetings *= _meetings(*sizes, **window)
    m, n = out[out_label.index("b")], out[out_label.index("f")]
    dtype = min(left.dtype, right.dtype, key=BITS.__getitem__)
    return Product(m, n, right.dims[right_label.index("i")], meetings, dtype)


def _windows(text: str) -> list[dict[str, int]]:
    fields = dict(part.split("=") for part in text.split())
    n = len(fields.get("size", "").split("x")) if fields else 0
    windows: list[dict[str, int]] = [{} for _ in range(n)]
    for key, name in (("stride", "stride"), ("lhs_dilate", "dilate"), ("rhs_dilate", "kernel_dilate"), ("pad", "pad")):
        for window, value in zip(windows, fields.get(key, "").split("x"), strict=False):
            if value:
                window[name] = int(value.split("_")[0])
    return windows


def _meetings(
    size: int, kernel: int, out: int, stride: int = 1, dilate: int = 1, kernel_dilate: int = 1, pad: int = 0
) -> int:
    """Pairs of output and kernel positions that fall on an element rather than on padding or a gap."""
    count = 0
    for k in range(kernel):
        if stride == 1 and dilate == 1:
            low = max(0, pad - k * kernel_dilate)
            count += max(0, min(out, size + pad - k * kernel_dilate) - low)
        else:
            positions = (o * stride + k * kernel_dilate - pad for o in range(out))
            count += sum(0 <= p <= (size - 1) * dilate and p % dilate == 0 for p in positions)
    return count


def parse(text: str) -> Module:
    """Read the text of a scheduled module. Raises ValueError if it is not scheduled."""
    if "is_scheduled=true" not in text[: text.index("\n")]:
        raise ValueError("the module has no schedule: compile it for a device first")
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    # What a Pallas kernel says of itself is printed on lines of its own, in the midst of its instruction's one.
    text = re.sub(
        r"kernel_metadata=\{\n.*?\n\s*\}", lambda found: found.group().replace("\n", " "), text, flags=re.DOTALL
    )
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None and line.endswith("{") and not line.startswith(("HloModule", " ")):
            head = line.removeprefix("ENTRY ").lstrip("%")
            current = Computation(re.match(r"[\w.\-]+", head).group())  # type: ignore[union-attr]
            computations[current.name] = current
            entry = current.name if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            current.instructions.append(_instruction(line))
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    rest = re.sub(r"/\*.*?\*/", "", rest)
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
        operands=() if literal else tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=rest[close_at + 1 :],
        is_root=head.startswith("ROOT "),
        value=inside if literal else "",
    )


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())
    return Shape(dtype, sizes, int(space.group(1)) if space else 0)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unclosed parenthesis in {text[:80]!r}")
