"""Stream: one run of a graph over all calibration images, an operation at a time.

Results of operations that compute something are kept in an :class:`ActivationCache`; views, scalings, functions of one
value and softmax are computed again whenever they are read, for they cost less than what they would take. So every
layer can be looked at as often as its search wants, with memory that the cache bounds, and nothing runs twice from the
start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from calibration.cache import ActivationCache
from calibration.graph import EXECUTORS, VIEWS, EdgeHook, Executor, Graph, Operation

#: Operations whose result is not kept.
_RECOMPUTED = VIEWS | {"scale", "unary", "softmax"}


class Stream:
    """Values of one run, float or quantized.

    Args:
        graph: the graph; its constants may be replaced between operations by whoever owns it.
        label: tells runs that share a cache apart.
        cache: where results are kept.
        device: where operations run.
        read: replaces operands as they are read, for example by their quantized values; None reads them as they are.
        executors: by operator, called instead of those of :data:`calibration.graph.EXECUTORS`.
    """

    def __init__(
        self,
        graph: Graph,
        label: str,
        cache: ActivationCache,
        device: torch.device,
        read: EdgeHook | None = None,
        executors: Mapping[str, Executor] | None = None,
    ) -> None:
        self.graph = graph
        self._label = label
        self._cache = cache
        self._device = device
        self._read = read
        self._executors = EXECUTORS if executors is None else {**EXECUTORS, **executors}
        self._producers = graph.producers()
        self._kept_for = _last_uses(graph)
        self._stored: set[str] = set()
        self._inputs: Stream | None = None
        self.batch_sizes: list[int] = []

    @property
    def batches(self) -> int:
        """Number of micro-batches."""
        return len(self.batch_sizes)

    def add_batch(self, inputs: tuple[Tensor, ...]) -> None:
        """Append a micro-batch of the graph's inputs, float32 ``(batch, *shape)``."""
        for (name, _), tensor in zip(self.graph.inputs, inputs, strict=True):
            self._cache.put((self._label, name, self.batches), tensor)
            self._stored.add(name)
        self.batch_sizes.append(len(inputs[0]))

    def share_inputs(self, other: Stream) -> None:
        """Read the inputs of another stream instead of holding them again."""
        self._inputs = other
        self.batch_sizes = other.batch_sizes

    def value(self, name: str, batch: int) -> Tensor:
        """Return a value of a micro-batch; constants have batch extent 1."""
        if name in self.graph.constants:
            return self.graph.constants[name].to(self._device)[None]
        if name in self._stored:
            return self._cache.get((self._label, name, batch)).to(self._device)
        operation = self._producers.get(name)
        if operation is None:
            assert self._inputs is not None, name
            return self._inputs.value(name, batch)
        return self.result(operation, batch)

    def operand(self, operation: Operation, position: int, batch: int) -> Tensor:
        """Return an operand as the operation reads it."""
        value = self.value(operation.inputs[position], batch)
        return value if self._read is None else self._read(operation, position, value)

    def result(self, operation: Operation, batch: int) -> Tensor:
        """Compute an operation on a micro-batch."""
        operands = [self.operand(operation, position, batch) for position in range(len(operation.inputs))]
        return self._executors[operation.op](operation, *operands)

    def results(self, operation: Operation) -> Iterator[Tensor]:
        """Compute an operation on every micro-batch."""
        return (self.result(operation, batch) for batch in range(self.batches))

    def keep(self, operation: Operation) -> None:
        """Compute an operation on all images and keep its results, where they are kept at all."""
        if operation.op not in _RECOMPUTED:
            for batch in range(self.batches):
                self._cache.put((self._label, operation.name, batch), self.result(operation, batch))
            self._stored.add(operation.name)

    def release(self, operation: Operation) -> None:
        """Drop what no operation after this one reads."""
        for name in self._kept_for.get(operation.name, ()):
            if name in self._stored:
                self._stored.discard(name)
                for batch in range(self.batches):
                    self._cache.drop((self._label, name, batch))


def _last_uses(graph: Graph) -> dict[str, list[str]]:
    """Return for each operation the kept values that nothing reads after it, through recomputed operations included."""
    kept = {name for name, _ in graph.inputs}
    sources: dict[str, set[str]] = {name: {name} for name in kept}
    last: dict[str, str] = {}
    for operation in graph.operations:
        read = set().union(*(sources.get(name, set()) for name in operation.inputs))
        for name in read:
            last[name] = operation.name
        sources[operation.name] = read if operation.op in _RECOMPUTED else {operation.name}
    for _, value in graph.outputs:
        for name in sources.get(value, ()):
            last.pop(name, None)
    dropped: dict[str, list[str]] = {}
    for name, operation_name in last.items():
        dropped.setdefault(operation_name, []).append(name)
    return dropped
