"""What a fused attention computes, whatever machine it is written for."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantizers.integer.program import Node
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import literal
from tvm_backend.kernels.shared.function import Expr
from tvm_backend.strides import Strided


@dataclass(frozen=True)
class ScoreStage:
    """One step from the sums of queries and keys to the codes that the table of exponentials reads.

    Args:
        node: ``requantize``, or ``add`` of a constant such as a position bias or a mask.
        multiplier: of the scores, one entry or one for each of the leading axes.
        narrow: whether the result is proved to fit int32 before it is clipped.
        position: which of the node's operands the scores are.
        addend: what ``add`` adds, broadcasting to the scores.
        addend_multiplier: one entry.
    """

    node: Node
    multiplier: Array = field(repr=False)
    narrow: bool
    position: int = 0
    addend: Array | None = field(default=None, repr=False)
    addend_multiplier: int = 0


@dataclass(frozen=True)
class Divided:
    """Exponentials multiply the values as they are, and each row is divided once by its sum.

    Args:
        table: of ``exponentials``.
        node: ``normalize_rows``.
        numerator: of ``normalize_rows``, one entry or one for each of the leading axes.
        narrow_reciprocal: whether ``numerator // sum`` and the quotients are proved to fit int32.
    """

    table: Array = field(repr=False)
    node: Node
    numerator: Array = field(repr=False)
    narrow_reciprocal: bool


@dataclass(frozen=True)
class Published:
    """I-ViT's ``shiftmax``: probabilities of up to 16 bits multiply the values, and the sums are rescaled.

    Args:
        shiftmax: the node.
        last: ``requantize`` of the sums.
    """

    shiftmax: Node
    last: ScoreStage

    @property
    def node(self) -> Node:
        """The node that makes the codes."""
        return self.last.node


@dataclass(frozen=True)
class Attention:
    """The operators of one attention, and where their operands lie in the kernel's arguments.

    Args:
        scores: ``matmul`` of queries and keys.
        stages: what turns their sums into 8-bit codes.
        softmax: what turns codes into probabilities, and the product with the values into codes.
        product: ``matmul`` of the probabilities and the values.
        levels: table of the ``lookup`` that alone reads its codes, if one does.
        query: queries in operand 0, axes (*lead, queries, depth).
        key: keys in operand 1, axes (*lead, keys, depth).
        value: values in operand 2, axes (*lead, keys, channels).
        result: the mixture in the result, axes (*lead, queries, channels).
        result_node: last node, that of ``softmax``, its ``lookup`` or a view, whose value the kernel computes.
        depth: channels of queries and keys.
    """

    scores: Node
    stages: tuple[ScoreStage, ...]
    softmax: Divided | Published
    product: Node
    levels: Array | None = field(repr=False)
    query: Strided
    key: Strided
    value: Strided
    result: Strided
    result_node: Node
    depth: int

    @property
    def lead(self) -> tuple[int, ...]:
        """Leading axes of the scores: windows and heads, one attention for each."""
        return self.scores.type.shape[:-2]

    @property
    def queries(self) -> int:
        """Rows of the scores."""
        return self.scores.type.shape[-2]

    @property
    def keys(self) -> int:
        """Columns of the scores."""
        return self.scores.type.shape[-1]

    @property
    def channels(self) -> int:
        """Columns of the values."""
        return self.product.type.shape[-1]


def item_offset(position: Expr, lead: tuple[int, ...], view: Strided) -> Expr:
    """Return where an attention's first element lies in its sample.

    Args:
        position: index into the leading axes, flattened.
        lead: leading axes.
        view: operand or result.
    """
    index, below = literal(view.offset, "int64"), 1
    for extent, stride in zip(reversed(lead), reversed(view.strides[:-2]), strict=True):
        if extent > 1 and stride:
            index = index + ((position // below) % extent) * stride
        below *= extent
    return index


def addend_item(head: Expr, lead: tuple[int, ...], own: tuple[int, ...]) -> Expr:
    """Return the index into an addend's leading axes, flattened, some of which may have extent 1.

    Args:
        head: index into ``lead``, flattened.
        lead: leading axes of the scores.
        own: those of the addend, as many.
    """
    index: Expr = 0
    below, stride = 1, 1
    for extent, held in zip(reversed(lead), reversed(own), strict=True):
        if held > 1:
            index = index + ((head // below) % extent) * stride
        below, stride = below * extent, stride * held
    return index
