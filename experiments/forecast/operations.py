"""What a schedule computes beside products, by class, so that a device that is slow at some of it can be timed.

An accelerator computes all of this faster than its memory delivers, and no class is measured for it. A CPU's core takes
ten times as long for an exponential as for a sum, and as much for an element that it reads across its array. Classes,
of elements:

    arithmetic  sums, products, comparisons, choices, quotients: what a vector unit does
    function    exponentials, logarithms, hyperbolic and other functions
    reduction   elements that are summed or compared away
    dotted      those of a sum of products where a dim of size 1 stands before the last two, as the softmax's gradient
                of one query head a key head has it: XLA's CPU library makes a product of vectors of each row
    crossing    elements read across, one array turned into another in tiles
    scattered   elements read across, or from several arrays in turn, one by one
    scattered_far  those read across so far that what lies beside them has left the first cache when its turn comes

XLA's CPU compiler turns in tiles what has nothing but operands in its fusion, and goes element by element where it has
a constant, a broadcast or a concatenation in it too.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from experiments.forecast.constants import CACHE_LINE_BYTES, FIRST_CACHE_BYTES
from experiments.forecast.instructions import FREE, Computation, Instruction

FUNCTIONS = frozenset({
    "exponential", "exponential-minus-one", "log", "log-plus-one", "logistic", "tanh", "erf", "rsqrt", "cbrt", "power",
    "sine", "cosine", "tan", "atan2",
})  # fmt: skip
ARITHMETIC = frozenset({
    "add", "subtract", "multiply", "divide", "negate", "abs", "maximum", "minimum", "clamp", "compare", "select", "and",
    "or", "xor", "not", "convert", "sqrt", "floor", "ceil", "round-nearest-even", "round-nearest-afz", "sign",
    "is-finite", "remainder", "shift-left", "shift-right-logical", "shift-right-arithmetic", "popcnt",
})  # fmt: skip
_SAME = frozenset({"bitcast", "reshape", "copy", "transpose"})
"""What hands elements on as they are."""
_IN_TURN = frozenset({"concatenate", "pad", "reverse", "gather"})
_ONE_BY_ONE = frozenset({"constant", "broadcast", *_IN_TURN})
"""What keeps a fusion from being turned in tiles."""


def elements(computations: Mapping[str, Computation], place: Computation, line: Instruction) -> Counter[str]:
    """Of one execution of an instruction in its computation, by class; of a fusion those of all that is in it."""
    if line.opcode not in ("fusion", "call", "async-start", "call-start"):
        return _of(place, line, in_tiles=True)
    found = Counter[str]()
    for fused in (computations[name] for name in line.called):
        in_tiles = not any(inner.opcode in _ONE_BY_ONE for inner in fused.instructions)
        for inner in fused.instructions:
            nested = inner.opcode in ("fusion", "call")
            found += elements(computations, fused, inner) if nested else _of(fused, inner, in_tiles=in_tiles)
    return found


def _of(place: Computation, line: Instruction, *, in_tiles: bool) -> Counter[str]:
    if line.opcode in FREE or not line.shapes:
        return Counter()
    n = line.shapes[0].elements
    if line.opcode in FUNCTIONS:
        return Counter(function=n)
    if line.opcode in ARITHMETIC:
        return Counter(arithmetic=n)
    if line.opcode in _IN_TURN:
        return Counter(scattered=n)
    if line.opcode == "reduce":
        return _reduced(place, line)
    if line.opcode in ("copy", "transpose") and _crosses(place, line):
        is_far = _walked(place, line) * CACHE_LINE_BYTES.value > FIRST_CACHE_BYTES.value
        of = "crossing" if in_tiles else "scattered_far" if is_far else "scattered"
        return Counter({of: _read_across(place, line)})
    return Counter()


def _reduced(place: Computation, line: Instruction) -> Counter[str]:
    given = place.by_name.get(line.operands[0])
    if given is None:
        return Counter()
    shape = given.shapes[0]
    is_dotted = given.opcode == "multiply" and len(set(given.operands)) > 1 and 1 in shape.dims[:-2]
    return Counter({"dotted" if is_dotted else "reduction": shape.elements})


def _across(line: Instruction) -> int | None:
    """The dim of what `line` turns that its result is written along; None of a single number."""
    return next((_turned(line)[d] for d in line.shapes[0].order[:1]), None)


def _crosses(place: Computation, line: Instruction) -> bool:
    """Whether what is read along is written across. Rows that move whole cost no more than their bytes."""
    given = place.by_name.get(line.operands[0])
    return given is not None and given.shapes[0].order[:1] not in ((), (_across(line),))


def _walked(place: Computation, line: Instruction) -> int:
    """Elements that are written until the next is read beside the first."""
    beside = place.by_name[line.operands[0]].shapes[0].order[0]
    (made,) = line.shapes
    order, turned = made.order, _turned(line)
    return math.prod(made.dims[d] for d in order[: [turned[d] for d in order].index(beside)])


def _read_across(place: Computation, line: Instruction) -> int:
    """Elements of all arrays that `line` turns. What repeats one number a row or column is not read across."""
    leaves: dict[str, int] = {}
    waiting = [(name, _across(line)) for name in line.operands]
    while waiting:
        name, across = waiting.pop()
        one = place.by_name[name]
        if one.opcode in ARITHMETIC or one.opcode in FUNCTIONS or one.opcode in _SAME:
            through = _through(place, one, across)
            waiting += [(operand, through) for operand in one.operands]
        elif one.opcode != "constant" and (one.opcode != "broadcast" or _is_across(place, one, across)):
            leaves[one.name] = one.shapes[0].elements
    return sum(leaves.values()) or line.shapes[0].elements


def _through(place: Computation, one: Instruction, across: int | None) -> int | None:
    """Which dim of its operand a dim of a result is; None where dims are merged or split."""
    if one.opcode in ("bitcast", "reshape"):
        return across if place.by_name[one.operands[0]].shapes[0].dims == one.shapes[0].dims else None
    return None if across is None else _turned(one)[across]


def _is_across(place: Computation, repeated: Instruction, across: int | None) -> bool:
    """Whether an array that is repeated along other dims lies across this one; of an unknown one, if it has rows."""
    given = place.by_name[repeated.operands[0]].shapes[0]
    if across is None:
        return len(given.order) > 1
    to = _numbers(repeated) if given.dims else ()
    return across in to and [to[d] for d in given.order[:1]] != [across]


def _turned(line: Instruction) -> Sequence[int]:
    """Of each dim of a result, which of the operand's it is."""
    return _numbers(line) or range(len(line.shapes[0].dims))


def _numbers(line: Instruction) -> tuple[int, ...]:
    found = line.attribute(r"dimensions=\{([\d,]*)\}")
    return tuple(map(int, found.split(","))) if found else ()
