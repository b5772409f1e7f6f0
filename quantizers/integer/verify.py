"""The verifier: every rule of the contract, and the proof that no input can overflow an accumulator.

The rules of single operators stand in :mod:`quantizers.integer.rules`; here they are applied in order,
with the rules about names, definitions and constants that hold for all operators.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from quantizers.errors import ProgramError
from quantizers.integer.bounds import Interval, Operand
from quantizers.integer.checks import require_fits
from quantizers.integer.ops import OPS
from quantizers.integer.program import INTEGER_RANGES, IntegerProgram, Node, TensorType
from quantizers.integer.rules import RULES


def verify(program: IntegerProgram) -> dict[str, Interval]:
    """Check every rule and return the bounds of every integer value.

    Raises:
        ProgramError: names the node, the rule it breaks, and what was found.
    """
    known: dict[str, Operand] = {}
    for name, kind in program.inputs:
        if kind.dtype != "float32":
            raise ProgramError(f"input {name}: expected float32, got {kind.dtype}; quantize is the only entrance")
        if name in known:
            raise ProgramError(f"input {name}: the name is already taken; each value is defined once")
        if min(kind.shape, default=1) < 1:
            raise ProgramError(f"input {name}: {kind} has no elements")
        known[name] = Operand(name, kind, Interval(0, 0))
    for name, array in program.constants.items():
        if name in known:
            raise ProgramError(f"constant {name}: the name is already taken; each value is defined once")
        known[name] = _constant(name, array)
    for node in program.nodes:
        if node.name in known:
            raise ProgramError(f"{node.op} {node.name}: the name is already taken; each value is defined once")
        known[node.name] = _check(node, known)
    for public, value in program.outputs:
        if value not in known or known[value].node is None:
            raise ProgramError(f"output {public}: {value} is not the result of an operator")
    if not program.outputs:
        raise ProgramError("the program has no output")
    if len({public for public, _ in program.outputs}) < len(program.outputs):
        raise ProgramError(f"two outputs share a name: {', '.join(public for public, _ in program.outputs)}")
    return {name: operand.interval for name, operand in known.items() if operand.type.dtype != "float32"}


def _constant(name: str, array: npt.NDArray[np.generic]) -> Operand:
    kind = TensorType(array.dtype.name, tuple(array.shape))
    if not array.dtype.isnative:
        raise ProgramError(f"constant {name}: has the other byte order; convert it with astype({kind.dtype!r})")
    if array.size == 0:
        raise ProgramError(f"constant {name}: has no elements")
    if kind.dtype == "float32":
        if not np.isfinite(array).all():
            raise ProgramError(f"constant {name}: holds NaN or infinity")
        return Operand(name, kind, Interval(0, 0), array)
    if kind.dtype not in INTEGER_RANGES:
        raise ProgramError(f"constant {name}: dtype {kind.dtype} is not one of {', '.join(INTEGER_RANGES)}")
    return Operand(name, kind, Interval(int(array.min()), int(array.max())), array)


def _check(node: Node, known: Mapping[str, Operand]) -> Operand:
    signature = OPS.get(node.op)
    if signature is None:
        raise ProgramError(f"{node.name}: unknown operator {node.op}; known are {', '.join(OPS)}")
    if set(node.attributes) != set(signature.attributes):
        raise ProgramError(
            f"{node.op} {node.name}: expected attributes {sorted(signature.attributes)}, got {sorted(node.attributes)}"
        )
    missing = [name for name in node.inputs if name not in known]
    if missing:
        raise ProgramError(f"{node.op} {node.name}: {', '.join(missing)} is not defined before it is used")
    fixed = len(signature.values) + len(signature.constants)
    if len(node.inputs) < fixed or (len(node.inputs) > fixed and not signature.variadic):
        raise ProgramError(f"{node.op} {node.name}: expected {fixed} operands, got {len(node.inputs)}")
    operands = [known[name] for name in node.inputs]
    if all(operand.array is not None for operand in operands[: len(signature.values)]) and not signature.variadic:
        raise ProgramError(f"{node.op} {node.name}: all operands are constant; fold it when the program is built")
    first_constant = len(node.inputs) - len(signature.constants)
    for operand, slot in zip(operands[first_constant:], signature.constants, strict=True):
        if operand.array is None:
            raise ProgramError(f"{node.op} {node.name}: {slot} must be a constant, got the value {operand.name}")
    try:
        kind, interval = RULES[node.op](node, *operands)
    except TypeError as error:
        raise ProgramError(str(error)) from error
    if kind != node.type:
        raise ProgramError(f"{node.op} {node.name}: declared {node.type}, but its operands give {kind}")
    if node.op not in ("quantize", "dequantize"):
        require_fits(node, interval, kind.dtype)
    return Operand(node.name, kind, interval, None, node)
