"""IntegerProgram: a frozen SSA program over integer tensors, the contract between all backends.

Every value has a leading batch axis that the program does not mention: a :class:`TensorType` is the
shape of *one sample*, and a value of shape ``(197, 384)`` is held as ``(batch, 197, 384)``. Constants
have no batch axis; where one stands for a value (a class token, a position table) it is the same for
each sample. Axes in attributes count the axes of a sample, from 0.

Float appears only in ``quantize`` (image to codes) and ``dequantize`` (accumulator to result).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

Attribute = int | float | str | tuple[int, ...]

INTEGER_RANGES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "int8": (-(2**7), 2**7 - 1),
        "uint8": (0, 2**8 - 1),
        "int16": (-(2**15), 2**15 - 1),
        "int32": (-(2**31), 2**31 - 1),
        "int64": (-(2**63), 2**63 - 1),
    }
)


def _is_integer(value: object) -> TypeGuard[int]:
    # Equal programs have equal bytes, so that a bool, which equals 0 or 1 but is written otherwise, is refused.
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and the shape of one sample.

    Args:
        dtype: a key of :data:`INTEGER_RANGES`, or ``float32`` at the two doors.
        shape: extents of one sample, without the batch axis.
    """

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Node:
    """One operation: its result has the node's name.

    Args:
        name: name of the result, unique in the program.
        op: a key of :data:`quantizers.integer.ops.OPS`.
        inputs: names of inputs, constants or earlier nodes, in the order of the operator's signature.
        attributes: plain numbers, as the operator's signature lists them.
        type: type of the result.
        source: where in the model it comes from, for people; no effect on the result.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    type: TensorType
    source: str = ""

    def integer(self, key: str) -> int:
        """Return an integer attribute."""
        value = self.attributes[key]
        if not _is_integer(value):
            raise TypeError(f"{self.op} {self.name}: attribute {key} is {value!r}, expected an integer")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Return an attribute that is a tuple of integers."""
        value = self.attributes[key]
        if not isinstance(value, tuple) or not all(_is_integer(element) for element in value):
            raise TypeError(f"{self.op} {self.name}: attribute {key} is {value!r}, expected a tuple of integers")
        return value

    def real(self, key: str) -> float:
        """Return an attribute that is a real number (doors only)."""
        value = self.attributes[key]
        if not isinstance(value, float):
            raise TypeError(f"{self.op} {self.name}: attribute {key} is {value!r}, expected a real number such as 1.0")
        return value


@dataclass(frozen=True)
class IntegerProgram:
    """A whole network on integers.

    Args:
        inputs: name and type (float32) of each input, in call order.
        constants: name to array; integer arrays, and float32 scales of ``dequantize``.
        nodes: in execution order.
        outputs: public name of each result and the value that holds it.
    """

    inputs: tuple[tuple[str, TensorType], ...]
    constants: Mapping[str, npt.NDArray[np.generic]] = field(repr=False)
    nodes: tuple[Node, ...] = field(repr=False)
    outputs: tuple[tuple[str, str], ...]

    def types(self) -> dict[str, TensorType]:
        """Return the type of every value, constants included."""
        types = dict(self.inputs)
        types.update({k: TensorType(v.dtype.name, tuple(v.shape)) for k, v in self.constants.items()})
        types.update({node.name: node.type for node in self.nodes})
        return types

    def to_text(self) -> str:
        """Return the program as text, one line an operation; constants by type."""
        types = self.types()
        lines = [f"input {name}: {kind}" for name, kind in self.inputs]
        lines += [f"constant {name}: {types[name]}" for name in self.constants]
        for node in self.nodes:
            attributes = ", ".join(f"{k}={v}" for k, v in sorted(node.attributes.items()))
            lines.append(f"{node.name}: {node.type} = {node.op}({', '.join(node.inputs)}) {{{attributes}}}")
        lines += [f"output {name} = {value}" for name, value in self.outputs]
        return "\n".join(lines) + "\n"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IntegerProgram):
            return NotImplemented
        return (
            (self.inputs, self.nodes, self.outputs) == (other.inputs, other.nodes, other.outputs)
            and self.constants.keys() == other.constants.keys()
            and all(
                value.dtype == other.constants[name].dtype and np.array_equal(value, other.constants[name])
                for name, value in self.constants.items()
            )
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have no hash
