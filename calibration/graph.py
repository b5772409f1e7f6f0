"""Graph: a frozen SSA program of a few float operators, the normal form of every traced model.

Like an IntegerProgram, each value has a leading batch axis that the graph does not mention: shapes and
axes are those of *one sample*, so every graph runs at any batch size. Constants have no batch axis.

============  ========================================  ===============================================
operator      operands                                  attributes
============  ========================================  ===============================================
linear        x[..., K], weight[N, K], bias[N]
conv2d        x[C, H, W], weight[N, C/groups, kh, kw],  stride, padding, dilation (pairs), groups
              bias[N]
matmul        a[..., M, K], b[..., K, N]                transpose_b: b is [..., N, K]
layer_norm    x[..., C], weight[C], bias[C]             eps
softmax       x, over the last axis
unary         x                                         function: a key of :data:`UNARY_FUNCTIONS`
add           a, b (broadcast from the right)
multiply      a, b (broadcast from the right)
scale         x                                         factor: a real number
mean          x                                         axis, which goes
reshape       x                                         shape
permute       x                                         axes
slice         x                                         axis, start, stop, step
concat        one or more                               axis
============  ========================================  ===============================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from quantizers.errors import DataError

Attribute = int | float | str | bool | tuple[int, ...]

#: Operators that move or rename elements and compute nothing.
VIEWS = frozenset({"reshape", "permute", "slice"})

UNARY_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu6": functional.relu6,
        "silu": functional.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "hardswish": functional.hardswish,
        "hardsigmoid": functional.hardsigmoid,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
)


@dataclass(frozen=True)
class Operation:
    """One operator application; the result has the operation's name.

    Args:
        name: unique in the graph.
        op: an operator of the table above.
        inputs: names of graph inputs, constants or earlier operations.
        attributes: as the table lists them.
        shape: shape of one sample of the result.
        module: dotted path of the module it came from, for people and for site names.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]
    shape: tuple[int, ...]
    module: str = ""

    def integer(self, key: str) -> int:
        """Return an integer attribute."""
        value = self.attributes[key]
        assert isinstance(value, int), (self.name, key, value)
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Return an attribute that is a tuple of integers."""
        value = self.attributes[key]
        assert isinstance(value, tuple), (self.name, key, value)
        return value

    def real(self, key: str) -> float:
        """Return an attribute that is a real number."""
        value = self.attributes[key]
        assert isinstance(value, int | float), (self.name, key, value)
        return float(value)


@dataclass(frozen=True, eq=False)
class Graph:
    """A traced model.

    Args:
        inputs: name and sample shape of each float32 input, in call order.
        constants: name to float32 tensor.
        operations: in execution order.
        outputs: public name of each result and the value that holds it.
    """

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    constants: Mapping[str, Tensor] = field(repr=False)
    operations: tuple[Operation, ...] = field(repr=False)
    outputs: tuple[tuple[str, str], ...]

    def producers(self) -> dict[str, Operation]:
        """Return the operation of each computed value."""
        return {operation.name: operation for operation in self.operations}

    def consumers(self) -> dict[str, list[tuple[Operation, int]]]:
        """Return for each value the operations that read it, with the operand's position."""
        readers: dict[str, list[tuple[Operation, int]]] = {}
        for operation in self.operations:
            for position, name in enumerate(operation.inputs):
                readers.setdefault(name, []).append((operation, position))
        return readers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the sample shape of every value, constants included."""
        shapes = dict(self.inputs)
        shapes.update({name: tuple(tensor.shape) for name, tensor in self.constants.items()})
        shapes.update({operation.name: operation.shape for operation in self.operations})
        return shapes


def cuts_patches(operation: Operation, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a convolution cuts its input into patches that neither overlap nor leave a rest: a linear on each patch.

    Args:
        operation: a conv2d.
        shapes: sample shapes of its operands by name.
    """
    kernel, image = shapes[operation.inputs[1]][2:], shapes[operation.inputs[0]][1:]
    return (
        operation.integers("stride") == kernel
        and set(operation.integers("padding")) == {0}
        and set(operation.integers("dilation")) == {1}
        and operation.integer("groups") == 1
        and image == tuple(count * extent for count, extent in zip(operation.shape[1:], kernel, strict=True))
    )


#: Called with an operation, an operand's position and its value; returns the value the operation reads.
EdgeHook = Callable[[Operation, int, Tensor], Tensor]


#: Computes an operation from its operands.
Executor = Callable[..., Tensor]


def execute(
    graph: Graph,
    inputs: Sequence[Tensor],
    on_edge: EdgeHook | None = None,
    executors: Mapping[str, Executor] | None = None,
) -> tuple[Tensor, ...]:
    """Run a graph in float32.

    Args:
        graph: the graph.
        inputs: float32 tensors ``(batch, *shape)`` on one device; constants are taken there.
        on_edge: sees, and may replace, every operand just before it is read.
        executors: by operator, called instead of those of :data:`EXECUTORS`.

    Returns:
        One tensor ``(batch, *shape)`` for each output.

    Raises:
        DataError: count, shape or dtype of the inputs differ from the graph's.
    """
    check_shapes(graph, inputs)
    table = EXECUTORS if executors is None else {**EXECUTORS, **executors}
    device = inputs[0].device
    values: dict[str, Tensor] = {name: tensor[None].to(device) for name, tensor in graph.constants.items()}
    values.update({name: tensor for (name, _), tensor in zip(graph.inputs, inputs, strict=True)})
    last_use = {name: operation.name for operation in graph.operations for name in operation.inputs}
    kept = {value for _, value in graph.outputs}
    for operation in graph.operations:
        operands = [values[name] for name in operation.inputs]
        if on_edge is not None:
            operands = [on_edge(operation, position, operand) for position, operand in enumerate(operands)]
        values[operation.name] = table[operation.op](operation, *operands)
        for name in operation.inputs:
            if last_use[name] == operation.name and name not in kept:
                values.pop(name, None)
    return tuple(values[value] for _, value in graph.outputs)


def check_shapes(graph: Graph, inputs: Sequence[Tensor]) -> None:
    """Compare inputs with the graph's.

    Raises:
        DataError: count, shape or dtype differs.
    """
    if len(inputs) != len(graph.inputs):
        raise DataError(f"the model takes {len(graph.inputs)} inputs, got {len(inputs)}")
    for (name, shape), tensor in zip(graph.inputs, inputs, strict=True):
        if tuple(tensor.shape[1:]) != shape or tensor.dtype != torch.float32 or tensor.ndim != len(shape) + 1:
            raise DataError(
                f"input {name}: expected float32 of shape (batch, {', '.join(map(str, shape))}), "
                f"got {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
            )


def _linear(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight[0], bias[0])


def _conv2d(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.conv2d(
        x,
        weight[0],
        bias[0],
        operation.integers("stride"),
        operation.integers("padding"),
        operation.integers("dilation"),
        operation.integer("groups"),
    )


def _matmul(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    return a @ (b.transpose(-1, -2) if operation.integer("transpose_b") else b)


def _layer_norm(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(x, weight[0].shape, weight[0], bias[0], operation.real("eps"))


def _unary(operation: Operation, x: Tensor) -> Tensor:
    return UNARY_FUNCTIONS[str(operation.attributes["function"])](x)


def aligned(operation: Operation, *operands: Tensor) -> list[Tensor]:
    """Give operands the rank of the result, with axes of extent 1 behind the batch."""
    # Operands of lower rank broadcast over leading sample axes, which stand after the batch axis.
    rank = len(operation.shape)
    return [
        x if x.ndim == rank + 1 else x.reshape(x.shape[0], *(1,) * (rank + 1 - x.ndim), *x.shape[1:]) for x in operands
    ]


def _add(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    left, right = aligned(operation, a, b)
    return left + right


def _multiply(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
    left, right = aligned(operation, a, b)
    return left * right


def _slice(operation: Operation, x: Tensor) -> Tensor:
    index = [slice(None)] * x.ndim
    start, stop, step = (operation.integer(key) for key in ("start", "stop", "step"))
    index[operation.integer("axis") + 1] = slice(start, stop, step)
    return x[tuple(index)]


def _concat(operation: Operation, *parts: Tensor) -> Tensor:
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], operation.integer("axis") + 1)


EXECUTORS: Mapping[str, Executor] = MappingProxyType(
    {
        "linear": _linear,
        "conv2d": _conv2d,
        "matmul": _matmul,
        "layer_norm": _layer_norm,
        "softmax": lambda _, x: x.softmax(-1),
        "unary": _unary,
        "add": _add,
        "multiply": _multiply,
        "scale": lambda operation, x: x * operation.real("factor"),
        "mean": lambda operation, x: x.mean(operation.integer("axis") + 1),
        "reshape": lambda operation, x: x.reshape(x.shape[0], *operation.integers("shape")),
        "permute": lambda operation, x: x.permute(0, *(axis + 1 for axis in operation.integers("axes"))),
        "slice": _slice,
        "concat": _concat,
    }
)
