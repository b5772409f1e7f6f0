"""simulate: run the float graph with every site fake-quantized, which is what papers report.

Where the recipe asks for the published forms of I-ViT, they are computed as in :mod:`calibration.published`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.calibrated import Calibrated
from calibration.graph import Operation, execute
from calibration.published import PUBLISHED_OPERATORS, published_executors
from calibration.sites import OUTPUT


@torch.no_grad()
def simulate(
    calibrated: Calibrated, inputs: Sequence[Tensor], published: Collection[str] = PUBLISHED_OPERATORS
) -> tuple[Tensor, ...]:
    """Run the simulation.

    Args:
        calibrated: a graph with formats.
        inputs: float32 tensors ``(batch, *shape)``.
        published: the operators that take their published form where the recipe asks for it; all by default. The others
            are float functions of fake-quantized values, so that one operator's share of a loss can be told.

    Returns:
        One float32 tensor for each output.
    """
    formats = calibrated.by_edge()
    constants = calibrated.graph.constants
    cache: dict[str, Tensor] = {}

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        qparams = formats.get((operation.name, position))
        if qparams is None:
            return value
        name = operation.inputs[position]
        if name in constants:
            # Weights carry their channels on axis 0; the leading batch axis of a constant is set aside.
            if name not in cache:
                cache[name] = apply(qparams, value[0])[None]
            return cache[name]
        return apply(qparams, value)

    executors = published_executors(calibrated.graph, formats) if calibrated.recipe.nonlinear == "published" else {}
    executors = {operator: executor for operator, executor in executors.items() if operator in published}
    results = execute(calibrated.graph, inputs, on_edge, executors)
    return tuple(
        apply(formats[OUTPUT, index], result) if (OUTPUT, index) in formats else result
        for index, result in enumerate(results)
    )
