"""What a compiled program says of itself: its loops, its collectives, where each op comes from."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Collective", "Loop", "loops_of", "op_names"]

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:to_apply|calls|called_computation|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective.

    Attributes:
        kind: as HLO calls it, ``"all-reduce"`` and so on.
        bytes: what it takes or what it gives on one device, whichever is more. What crosses the
            wires depends on the algorithm: a ring moves up to twice that for an all-reduce.
        op_name: the scopes of the JAX program that it comes from.
    """

    kind: str
    bytes: int
    op_name: str


@dataclasses.dataclass
class Loop:
    """A while loop of a compiled program, or the program itself.

    Attributes:
        op_name: the scopes of the JAX program that it comes from; empty for the program.
        collectives: those of one pass, without those of the loops inside. Every branch of a
            conditional counts.
        loops: the loops directly inside.
    """

    op_name: str = ""
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    loops: list[Loop] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Loop]:
        """This loop and all inside it."""
        yield self
        for loop in self.loops:
            yield from loop.walk()

    @property
    def height(self) -> int:
        """1 for the innermost loop that has collectives, 2 for the one around it; 0 without any."""
        inner = max((loop.height for loop in self.loops), default=0)
        return inner + 1 if inner or self.collectives else 0

    def bytes(self) -> Counter[str]:
        """Bytes of one pass by kind of collective."""
        total: Counter[str] = Counter()
        for collective in self.collectives:
            total[collective.kind] += collective.bytes
        return total


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: str
    rest: str

    @property
    def op_name(self) -> str:
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


def loops_of(text: str) -> Loop:
    """The loops and collectives of a compiled program.

    Args:
        text: HLO, as ``jax.jit(f).lower(...).compile().as_text()`` gives it.

    Returns:
        The program as the outermost "loop", of one pass.

    Raises:
        ValueError: ``text`` is not HLO.
    """
    computations, entry = _computations(text)
    program = Loop()
    _collect(computations, entry, program)
    return program


def op_names(text: str) -> dict[str, str]:
    """For each op of a compiled program, by its name there, the JAX scopes that it comes from.

    A fused op has the name of the one that XLA took for the whole.

    Args:
        text: HLO, as for `loops_of`.

    Raises:
        ValueError: ``text`` is not HLO.
    """
    computations, _ = _computations(text)
    return {
        instruction.name: instruction.op_name
        for instructions in computations.values()
        for instruction in instructions
    }


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[1], found[2]))
    if entry is None:
        raise ValueError("text: not the HLO of a compiled program: it has no ENTRY computation")
    return computations, entry


def _instruction(name: str, line: str) -> _Instruction:
    """``shape op(operands), attributes``; the shape may be a tuple of tuples."""
    end = _closing(line, 0) if line.startswith("(") else line.index(" ")
    shape, line = line[:end], line[end:].lstrip()
    start = line.index("(")
    end = _closing(line, start)
    return _Instruction(name, shape, line[:start], line[start + 1 : end - 1], line[end:])


def _closing(line: str, start: int) -> int:
    """One past the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"text: a bracket is not closed in {line[:80]!r}")


def _collect(computations: dict[str, list[_Instruction]], name: str, loop: Loop) -> None:
    shapes = {instruction.name: instruction.shape for instruction in computations[name]}
    for instruction in computations[name]:
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS:
            size = _payload(instruction, shapes)
            loop.collectives.append(Collective(kind, size, instruction.op_name))
        elif instruction.op == "while":
            inner = Loop(instruction.op_name)
            loop.loops.append(inner)
            for part in ("condition", "body"):
                found = re.search(rf"\b{part}=%?([\w.\-]+)", instruction.rest)
                assert found is not None
                _collect(computations, found[1], inner)
        else:
            called = _CALLED.findall(instruction.rest)
            for branches in _BRANCHES.findall(instruction.rest):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            for computation in called:
                _collect(computations, computation, loop)


def _payload(instruction: _Instruction, shapes: dict[str, str]) -> int:
    """Bytes in or bytes out, whichever is more."""
    # Operands come with their shape or, in newer versions, as a name alone.
    given = _bytes(instruction.operands)
    if not given:
        names = re.findall(r"[\w.\-]+", instruction.operands)
        given = sum(_bytes(shapes.get(name, "")) for name in names)
    taken = _bytes(instruction.shape)
    if instruction.op.endswith("-start") and instruction.op != "all-reduce-start":
        taken -= given  # the outcome of a start is a tuple of what goes in and what comes out
    return max(given, taken)


def _bytes(shape: str) -> int:
    return sum(
        math.ceil(_bits(dtype) * math.prod(int(d) for d in dims.split(",") if d) / 8)
        for dtype, dims in _ARRAY.findall(shape)
    )


def _bits(dtype: str) -> int:
    """Bits of an HLO type: ``pred``, ``bf16``, ``f8e4m3fn``, ``s32``, ``c64``, ``u4``."""
    if dtype == "pred":
        return 8
    found = re.match(r"(?:bf|f|s|u|c)(\d+)", dtype)
    return int(found[1]) if found else 0
