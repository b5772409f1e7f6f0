"""One operator at a time: the integer program against the simulation, both fed with the integer program's codes."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.calibrated import Calibrated
from calibration.graph import Operation, execute
from calibration.integerize.lowering import _Lowering
from calibration.published import published_executors
from calibration.simulate import apply
from calibration.sites import OUTPUT
from quantizers.codebook import CodebookQParams, levels_of
from quantizers.integer.interpret import run
from quantizers.uniform import UniformQParams, dequantize, quantize


def steps_apart(result: Calibrated, x: Tensor) -> dict[str, Tensor]:
    """Return by site how many steps the integer codes are from the simulation's, fed with the integer codes.

    Each operator of the float graph reads what the integer program computed, so that the difference is
    one operator's own and does not grow through the network. Biases are rounded as the program holds them,
    to steps of input times weight; the simulation leaves them as they are. A level of a codebook counts as one
    step apart where a carrier step to one side of the value has it as its nearest level, and as two elsewhere.
    """
    lowering = _Lowering(result)
    values = run(lowering.run(), (x,))
    formats = result.by_edge()
    names = {edge: entry.site.name for entry in result.sites for edge in entry.site.edges}
    found: dict[str, Tensor] = {}

    def compare(edge: tuple[str, int], name: str, value: Tensor) -> Tensor:
        qparams = formats[edge]
        if isinstance(qparams, CodebookQParams):
            levels = values[lowering._codes[name, qparams]]
            found[names[edge]] = _levels_apart(levels, value, qparams)
            return (levels.to(torch.float32) - qparams.zero_point) * torch.tensor(qparams.scale)
        assert isinstance(qparams, UniformQParams)
        codes = values[lowering._codes[name, qparams]].to(torch.float32)
        found[names[edge]] = (codes - quantize(value, qparams)).abs()
        return dequantize(codes, qparams)

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        edge, name = (operation.name, position), operation.inputs[position]
        if operation.op in ("linear", "conv2d") and position == 2:
            source, weight = formats[operation.name, 0], formats[operation.name, 1]
            step = torch.from_numpy(source.scales()) * torch.tensor(weight.scale).double()
            return ((value / step).round() * step).to(torch.float32)
        if edge not in formats:
            return value
        if name in result.graph.constants:
            return apply(formats[edge], value[0])[None]
        return apply(formats[edge], value) if names[edge].endswith("probability") else compare(edge, name, value)

    executors = published_executors(result.graph, formats) if result.recipe.nonlinear == "published" else None
    outputs = execute(result.graph, (x,), on_edge, executors)
    for index, ((_, name), value) in enumerate(zip(result.graph.outputs, outputs, strict=True)):
        if (OUTPUT, index) in formats:
            compare((OUTPUT, index), name, value)
    return found


def _levels_apart(levels: Tensor, value: Tensor, qparams: CodebookQParams) -> Tensor:
    lower, nearest, upper = (
        torch.from_numpy(levels_of(value.double() + offset * qparams.scale, qparams)) for offset in (-1, 0, 1)
    )
    beside = (lower <= levels) & (levels <= upper)
    return torch.where(levels == nearest, 0.0, torch.where(beside, 1.0, 2.0))
