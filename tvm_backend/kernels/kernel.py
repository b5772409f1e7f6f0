"""What a kernel emitter takes and returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quantizers.integer.program import TensorType

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Layout:
    """A value of the program as a kernel sees it: a row-major array ``(batch * rows, *tail)``."""

    rows: int
    tail: tuple[int, ...]

    @classmethod
    def natural(cls, shape: tuple[int, ...]) -> Layout:
        """``(batch, *shape)``."""
        return cls(1, shape)

    @classmethod
    def matrix(cls, shape: tuple[int, ...], axes: int = 1) -> Layout:
        """All axes but the last few folded into the batch; a sample without axes counts as ``(1,)``."""
        shape = shape or (1,)
        return cls(math.prod(shape[:-axes]), shape[-axes:])


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand of a node.

    Args:
        type: element type and shape of one sample.
        array: the values, if it is a constant of the program.
        batched: whether it differs between samples; otherwise its batch extent is 1.
    """

    type: TensorType
    array: Array | None = field(default=None, repr=False)
    batched: bool = True

    def constant(self) -> Array:
        """Return the values of an operand that the verifier has proved constant."""
        assert self.array is not None
        return self.array


@dataclass(frozen=True, slots=True)
class Argument:
    """Operand number ``index`` of the node, in the layout that the kernel wants."""

    index: int
    layout: Layout


@dataclass(frozen=True, slots=True)
class Kernel:
    """A TIR function and how to call it.

    Args:
        function: ``tirx.PrimFunc``; takes the arguments, then the result.
        arguments: operands of the node, and constants prepared for this kernel.
        layout: layout of the result.
        flags: layout of an int32 array that the function takes before the result, if it does, and in which it writes
            anything but 0 where it met NaN or infinity.
    """

    function: Any
    arguments: tuple[Argument | Array, ...] = field(repr=False)
    layout: Layout
    flags: Layout | None = None
