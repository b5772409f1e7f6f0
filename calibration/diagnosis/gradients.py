"""Values of a float run, and what the network's result does when they change.

With ``J`` the derivative of the network's result by an operation's result, an error ``d`` there changes the network's
result by ``J d`` to first order. For signs ``u`` drawn at random ``(u J d)^2`` has the mean ``|J d|^2``, so that a few
vectors ``g = u J``, one backward pass each, price every error at every operation of the network.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from calibration.graph import EXECUTORS, Executor, Graph, Operation, execute

Key = TypeVar("Key", bound=Hashable)

#: Vectors of signs for each image; more only make estimates steadier.
VECTORS = 2


@dataclass(frozen=True, slots=True, eq=False)
class FloatRun:
    """One micro-batch.

    Args:
        values: result of every operation, and the inputs, float32 ``(batch, *shape)``.
        gradients: of the operations that were asked for, one tensor for each vector of signs, shaped as the result.
        results: of the network, float32 ``(batch, C)``: all outputs, flattened and joined.
    """

    values: dict[str, Tensor]
    gradients: dict[str, tuple[Tensor, ...]]
    results: Tensor

    def dots(self, name: str, error: Tensor) -> Tensor:
        """Return what an error at an operation's result does along each vector of signs, float64 (vectors, batch)."""
        return torch.stack([(g * error).flatten(1).to(torch.float64).sum(1) for g in self.gradients[name]])


class Effects(Generic[Key]):
    """Adds up what errors do to the network's result in one micro-batch.

    Args:
        run: the micro-batch.
    """

    def __init__(self, run: FloatRun) -> None:
        self._run = run
        self._dots: dict[Key, Tensor] = {}

    def add(self, key: Key, operation: str, error: Tensor) -> None:
        """Add an error at an operation's result, shaped as it; errors under one key are there together."""
        dots, images = self._run.dots(operation, error), len(self._run.results)
        if dots.shape[1] != images:
            # A result that is the same for every image: one error, in all of them.
            dots = dots.expand(-1, images) / images**0.5
        self._dots[key] = self._dots[key] + dots if key in self._dots else dots

    def squares(self) -> dict[Key, float]:
        """Return by key the squared error of the network's result, summed over images, to first order."""
        return {key: float(dots.square().mean(0).sum()) for key, dots in self._dots.items()}


def run_float(
    graph: Graph, inputs: Sequence[Tensor], wanted: Collection[str], vectors: int, generator: torch.Generator
) -> FloatRun:
    """Run a graph forwards, and backwards once for each vector of signs.

    Args:
        graph: a float graph.
        inputs: float32 ``(batch, *shape)``.
        wanted: operations whose gradients are kept.
        vectors: of signs.
        generator: draws them.
    """
    values: dict[str, Tensor] = {}

    def kept(executor: Executor) -> Executor:
        def run(operation: Operation, *operands: Tensor) -> Tensor:
            result: Tensor = executor(operation, *operands)
            if not result.requires_grad:
                # What depends on constants alone moves no result of the network by itself, but its error does.
                result = result.detach().requires_grad_()
            values[operation.name] = result
            return result

        return run

    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = execute(graph, leaves, executors={op: kept(executor) for op, executor in EXECUTORS.items()})
        joined = torch.cat([output.flatten(1) for output in outputs], 1)
        names = [name for name in values if name in set(wanted)]
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for _ in range(vectors):
            signs = torch.randint(0, 2, joined.shape, generator=generator, dtype=torch.int8).to(joined) * 2 - 1
            grads = torch.autograd.grad(
                joined, [values[name] for name in names], signs, retain_graph=True, allow_unused=True
            )
            for name, grad in zip(names, grads, strict=True):
                found[name].append(torch.zeros_like(values[name]) if grad is None else grad)
    held = {name: value.detach() for name, value in values.items()}
    held |= {name: x.detach() for (name, _), x in zip(graph.inputs, inputs, strict=True)}
    return FloatRun(held, {name: tuple(g) for name, g in found.items()}, joined.detach())
