"""The compiled schedule, read from XLA's text: what each instruction moves and multiplies.

XLA prints scheduled modules in execution order (`is_scheduled=true`). Nothing here knows a device:
bytes and FLOPs only. Text, because no HLO proto schema is packaged outside TensorFlow.
"""

import re
from dataclasses import dataclass

from experiments.forecast.instructions import FREE, HOST, Computation, Instruction, Shape, instruction
from experiments.forecast.kernels import (
    Attention,
    Grouped,
    Product,
    attention,
    called_product,
    convolution,
    dot,
    grouped,
)
from experiments.forecast.loops import Trips


@dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int | None:
        """Iterations of a `while`: as the GPU compiler prints them, or by counting. None if data decides."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        return int(known) if known else Trips(self.computations).of(loop)

    def products(self, computation: Computation, instruction: Instruction) -> list[Product]:
        """The matrix products of one execution, fused ones included; attention kernels are none of them."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in ("dot", "scaled-dot", "ragged-dot"):
            left, right, *_ = computation.operand_shapes(instruction)
            return [dot(left, right, instruction.attributes)]
        if opcode == "convolution":
            left, right = computation.operand_shapes(instruction)
            return [convolution(left, right, instruction.shapes[0], instruction.attributes)]
        if opcode == "custom-call":
            if experts := self.grouped(computation, instruction):
                return [experts.product]
            target = instruction.target
            found = called_product(target, instruction.attributes, computation.operand_shapes(instruction))
            return [found] if found else []
        if opcode in ("fusion", "call", "async"):
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
        kernel = self.attention(computation, instruction)
        return kernel.flops if kernel else sum(product.flops for product in self.products(computation, instruction))

    def attention(self, computation: Computation, instruction: Instruction) -> Attention | None:
        """The fused attention kernel that a custom call is."""
        operands = [shape for shape in computation.operand_shapes(instruction) if "f" in shape.dtype]
        return attention(instruction.target, instruction.attributes, operands) if instruction.target else None

    def grouped(self, computation: Computation, instruction: Instruction) -> Grouped | None:
        """The experts' product that a custom call is."""
        return grouped(instruction.target, instruction.attributes, computation.operand_shapes(instruction))

    def to_host(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether it moves something to the host's memory or from it; its traffic on the device is what is moved."""
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        return any(shape.space == HOST for i in (instruction, *operands) for shape in i.shapes)

    def traffic_bytes(self, computation: Computation, instruction: Instruction) -> float:
        """Bytes read from and written to device memory by one execution.

        A fusion that slices a large operand reads the slice; one that updates a slice in place writes
        the slice. Counting whole operands would charge every layer with all layers' parameters. Of experts' rows
        those are moved that are likely to be multiplied.
        """
        operands = [computation.by_name[name] for name in instruction.operands if name in computation.by_name]
        opcode, made = instruction.opcode, instruction.shapes
        if opcode in ("async-start", "call-start", "call"):
            wrapped = self.computations[instruction.called[0]]
            return sum(self.traffic_bytes(wrapped, i) for i in wrapped.instructions if i.opcode not in FREE)
        if opcode.endswith("-start"):  # what it is given stands before what it makes, and the state of the pair after
            opcode = opcode.removesuffix("-start")
            made = tuple(s for s in made[sum(len(o.shapes) for o in operands) :] if s.dims)
        if opcode == "fusion":
            inner = self.computations[instruction.called[0]]
            read = sum(
                self._read_bytes(inner, parameter)
                for parameter, operand in zip(inner.parameters, operands, strict=True)
                if not any(s.space for s in operand.shapes)
            )
            return read + self._written_bytes(inner, inner.root, made)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(s.hbm_bytes for s in made)
        if opcode in ("dynamic-update-slice", "scatter"):
            return 2 * sum(s.hbm_bytes for o in operands[1:] for s in o.shapes)
        if instruction.target.startswith("__cu"):
            made = (made[0], *(s for s in made[1:] if s.dtype not in ("s8", "u8")))  # but for the workspace
        moved = [*made, *(s for o in operands for s in o.shapes)]
        if experts := self.grouped(computation, instruction):
            n_dims = max(len(s.dims) for s in moved)  # of the matrices; rows have one less
            return sum(s.hbm_bytes * (1 if len(s.dims) == n_dims else experts.part) for s in moved)
        return sum(s.hbm_bytes for s in moved)

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
            current.instructions.append(instruction(line))
    return Module(computations, entry)
