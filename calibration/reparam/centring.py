"""Centring: move the keys and the values of an attention by a vector that its result does not feel.

One vector added to all keys of a head adds one number to every score of a row, which softmax ignores. One vector added
to all values of a head is added to every row of the product, because probabilities sum to 1, and the bias of the next
linear takes it back. Both are free choices; the middle of each channel's range makes a symmetric format fit. Smooth
attention (SageAttention, arXiv 2410.02367) takes the mean off the keys at run time; here the bias of the
layer that gives the keys takes it off for nothing, and likewise for the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.graph import Graph, Operation
from calibration.reparam.channels import MOVES, Read, describe, follow, label
from calibration.reparam.constants import as_stored, require_vector, why_not_owned
from calibration.sites import Structure
from quantizers.errors import UsageError

_SCALED = MOVES | {"scale"}


@dataclass(frozen=True, slots=True, eq=False)
class KeyGroup:
    """The keys of an attention product and the linear that gives them.

    Args:
        product: name of the matmul of queries and keys.
        linear: name of the operation that gives the keys; a linear unless refused.
        channels: int64, the right operand's sample shape without the axis of tokens, for example (heads, d): the
            channel of ``linear`` that stands there. Empty where refused for lack of one.
        refusal: why they cannot be centred, or None where they can.
    """

    product: str
    linear: str
    channels: Tensor
    refusal: str | None


@dataclass(frozen=True, slots=True, eq=False)
class ProductReader:
    """A linear that reads the product of probabilities and values.

    Args:
        linear: its name.
        columns: int64 (K,): the value channel in each of its input columns.
        factor: what one unit of a value channel is there.
    """

    linear: str
    columns: Tensor
    factor: float


@dataclass(frozen=True, slots=True, eq=False)
class ValueGroup:
    """The values of an attention product, the linear that gives them and those that read the product.

    Args:
        product: name of the matmul of probabilities and values.
        linear: as in :class:`KeyGroup`.
        channels: as in :class:`KeyGroup`.
        readers: the linears behind the product.
        refusal: as in :class:`KeyGroup`.
    """

    product: str
    linear: str
    channels: Tensor
    readers: tuple[ProductReader, ...]
    refusal: str | None


def find_key_groups(graph: Graph) -> tuple[KeyGroup, ...]:
    """Return one group for each product that reaches a softmax by views, scalings and sums, in execution order.

    A group is refused where the product reaches anything else, or a softmax that does not run over the keys; where its
    keys do not come from one linear with the same channels for each token; where something else reads these channels;
    and where the linear's bias is shared.
    """
    groups = []
    for product in _matmuls(graph):
        # A number for each row: what is added to all of a row stays so as long as softmax finds one number in it.
        rows = torch.arange(math.prod(product.shape[:-1])).reshape(*product.shape[:-1], 1)
        reads = follow(graph, product.name, rows.expand(product.shape), _SCALED | {"add"})
        if any(read.reader is not None and read.reader.op == "softmax" for read in reads):
            operand = _operand(graph, product, "keys")
            refusal = operand.refusal or next(filter(None, (_why_not_softmax(graph, read) for read in reads)), None)
            groups.append(KeyGroup(product.name, operand.linear, operand.channels, refusal))
    return tuple(groups)


def find_value_groups(graph: Graph) -> tuple[ValueGroup, ...]:
    """Return one group for each product whose left side is a softmax, in execution order.

    A group is refused where the left side is not the softmax itself; where anything but a linear reads the product
    behind views and scalings, or its bias is shared; and for the reasons of :func:`find_key_groups` that concern the
    operand.
    """
    structure, groups = Structure(graph), []
    for product in _matmuls(graph):
        root = structure.root(product.inputs[0])
        if root is not None and root.op == "softmax":
            operand = _operand(graph, product, "values")
            refusal, readers = operand.refusal, tuple[ProductReader, ...]()
            if not structure.is_row_relative(product):
                refusal = refusal or f"its left side is not {describe(root)} itself, so that rows may not sum to 1"
            elif refusal is None:
                readers, refusal = _product_readers(graph, product, operand)
            groups.append(ValueGroup(product.name, operand.linear, operand.channels, readers, refusal))
    return tuple(groups)


def centre_keys(graph: Graph, group: KeyGroup, centre: Tensor) -> dict[str, Tensor]:
    """Return the bias with which the keys are smaller by ``centre``.

    Args:
        graph: the graph.
        group: of :func:`find_key_groups`, not refused.
        centre: float (N,), one number for each output channel of ``group.linear``, in its units: before a scaling
            between it and the product. Those of channels outside of the group are not used.

    Returns:
        The bias of ``group.linear``, float32, by name.

    Raises:
        UsageError: the group is refused, ``centre`` has another shape, or a number is not finite.
    """
    _require_legal("keys", group)
    bias = graph.producers()[group.linear].inputs[2]
    return as_stored({bias: graph.constants[bias].to(torch.float64) - _chosen(graph, group, centre)})


def centre_values(graph: Graph, group: ValueGroup, centre: Tensor) -> dict[str, Tensor]:
    """Return the biases with which the values are smaller by ``centre`` and the readers of the product give the same.

    Args:
        graph: the graph.
        group: of :func:`find_value_groups`, not refused.
        centre: as in :func:`centre_keys`.

    Returns:
        The bias of ``group.linear`` and those of the readers, float32, by name.

    Raises:
        UsageError: as in :func:`centre_keys`.
    """
    _require_legal("values", group)
    producers, chosen = graph.producers(), _chosen(graph, group, centre)
    bias = producers[group.linear].inputs[2]
    changed = {bias: graph.constants[bias].to(torch.float64) - chosen}
    for reader in group.readers:
        weight, bias = producers[reader.linear].inputs[1:]
        taken = graph.constants[weight].to(torch.float64) @ (reader.factor * chosen[reader.columns])
        changed[bias] = graph.constants[bias].to(torch.float64) + taken
    return as_stored(changed)


def _require_legal(what: str, group: KeyGroup | ValueGroup) -> None:
    if group.refusal is not None:
        raise UsageError(f"the {what} of matmul {group.product} cannot be centred: {group.refusal}")


def _chosen(graph: Graph, group: KeyGroup | ValueGroup, centre: Tensor) -> Tensor:
    """Return ``centre`` with zeros on the channels of others, float64 (N,)."""
    (count,) = graph.constants[graph.producers()[group.linear].inputs[2]].shape
    chosen, mine = torch.zeros(count, dtype=torch.float64), group.channels.reshape(-1)
    chosen[mine] = require_vector("centre", centre, count)[mine]
    return chosen


def _matmuls(graph: Graph) -> list[Operation]:
    return [operation for operation in graph.operations if operation.op == "matmul"]


@dataclass(frozen=True, slots=True, eq=False)
class _Operand:
    linear: str
    channels: Tensor
    factor: float
    refusal: str | None


def _operand(graph: Graph, product: Operation, what: str) -> _Operand:
    """Find the linear behind the right side of a product, and who else reads the channels that stand there."""
    producers, value = graph.producers(), product.inputs[1]
    while value in producers and producers[value].op in _SCALED:
        value = producers[value].inputs[0]
    nothing = torch.zeros(0, dtype=torch.int64)
    linear = producers.get(value)
    if linear is None or linear.op != "linear":
        origin = value if linear is None else describe(linear)
        return _Operand(value, nothing, 1.0, f"its {what} come from {origin}, and only a linear's bias can move them")
    reads = follow(graph, linear.name, torch.arange(linear.shape[-1]).expand(linear.shape), _SCALED)
    operands = [
        read for read in reads if read.reader is not None and (read.reader.name, read.position) == (product.name, 1)
    ]
    if not operands:
        return _Operand(value, nothing, 1.0, f"its {what} come from {describe(linear)} and from something else")
    (operand,) = operands
    # Stored [..., N, K] with transpose_b; seen from the product [..., K, N]. Keys are its columns, values its rows.
    matrix = operand.channels.transpose(-1, -2) if product.integer("transpose_b") else operand.channels
    tokens = -1 if what == "keys" else -2
    channels = matrix.select(tokens, 0)
    if bool((matrix != channels.unsqueeze(tokens)).any()):
        return _Operand(value, nothing, 1.0, f"the channels of its {what} differ between tokens")
    for read in reads:
        if read is not operand and bool(torch.isin(read.channels, channels).any()):
            refusal = f"{label(graph, read)} reads the same channels of {describe(linear)}"
            return _Operand(value, channels, operand.factor, refusal)
    return _Operand(value, channels, operand.factor, why_not_owned(graph, (linear,), (2,)))


def _why_not_softmax(graph: Graph, read: Read) -> str | None:
    if read.reader is None or read.reader.op != "softmax":
        return f"{label(graph, read)} reads the scores, and only a softmax ignores what is added to all of a row"
    if bool((read.channels != read.channels[..., :1]).any()):
        return f"{label(graph, read)} does not run over the keys"
    return None


def _product_readers(
    graph: Graph, product: Operation, operand: _Operand
) -> tuple[tuple[ProductReader, ...], str | None]:
    readers, linears = [], []
    for read in follow(graph, product.name, operand.channels.unsqueeze(-2).expand(product.shape), _SCALED):
        if read.reader is None or read.reader.op != "linear":
            return (), f"{label(graph, read)} reads the product, and only a linear's bias can take the shift back"
        columns = read.channels.reshape(-1, read.channels.shape[-1])[0]
        if bool((read.channels != columns).any()):
            return (), f"{label(graph, read)} reads other channels of the product for other tokens"
        linears.append(read.reader)
        readers.append(ProductReader(read.reader.name, columns, operand.factor * read.factor))
    return tuple(readers), why_not_owned(graph, linears, (2,))
