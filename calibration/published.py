"""The published forms of I-ViT in the simulation: the integer arithmetic itself, on the codes of fake-quantized values.

What float still does here is the rescaling around the operators, and the rounding of each side of a sum to the steps of
the format in which the sum is read. A sum that is read in several formats is left real: there each reader has its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from calibration.calibrated import QParams
from calibration.graph import EXECUTORS, VIEWS, Executor, Graph, Operation
from calibration.heads import rescaled
from calibration.integerize.operands import OperandQParams
from calibration.integerize.published import SHIFT_GELU_FUNCTIONS, i_layer_norm_constants
from calibration.sites import OUTPUT, Edge
from quantizers.codebook import CodebookQParams
from quantizers.integer import ivit
from quantizers.integer.interpret_ivit import normalize, shift_gelu, shiftmax
from quantizers.uniform import UniformQParams

#: Operators of the graph that have a published form.
PUBLISHED_OPERATORS = ("softmax", "unary", "layer_norm", "add")


def reading_formats(graph: Graph, formats: Mapping[Edge, QParams], value: str) -> set[UniformQParams]:
    """Return the formats in which a value is read, behind views, scalings and concatenations, as it has them itself.

    Where a codebook is read, this is its carrier: the format that the value is rounded to first.
    """
    consumers = graph.consumers()

    def read(name: str) -> set[OperandQParams]:
        found = {formats[OUTPUT, i] for i, (_, v) in enumerate(graph.outputs) if v == name and (OUTPUT, i) in formats}
        for reader, position in consumers.get(name, []):
            if reader.op in VIEWS or reader.op == "concat":
                found |= read(reader.name)
            elif reader.op == "scale" and reader.real("factor") > 0:
                found |= {rescaled(qparams, 1 / reader.real("factor")) for qparams in read(reader.name)}
            elif (reader.name, position) in formats:
                found.add(formats[reader.name, position])
        return {qparams for qparams in found if isinstance(qparams, UniformQParams | CodebookQParams)}

    return {qparams.carrier if isinstance(qparams, CodebookQParams) else qparams for qparams in read(value)}


def published_executors(graph: Graph, formats: Mapping[Edge, QParams]) -> Mapping[str, Executor]:
    """Return the executors of softmax, GELU, LayerNorm and sums.

    Args:
        graph: the float graph.
        formats: by edge; the inputs of these operators are fake-quantized in them before they are called.
    """
    steps = {
        operation.name: {s for qparams in reading_formats(graph, formats, operation.name) for s in qparams.scale}
        for operation in graph.operations
        if operation.op == "add"
    }

    def source_of(operation: Operation) -> UniformQParams:
        qparams = formats[operation.name, 0]
        assert isinstance(qparams, UniformQParams), operation.name
        return qparams

    def softmax(operation: Operation, x: Tensor) -> Tensor:
        source = source_of(operation)
        # Narrower probabilities are these cut off, which the site does that reads them.
        bits = 16
        codes = shiftmax(_codes(x, source), ivit.inverse_scale(source.scale[0]), ivit.SHIFTMAX_WINDOW, bits)
        return codes.to(torch.float32) * 2.0 ** (1 - bits)

    def unary(operation: Operation, x: Tensor) -> Tensor:
        if operation.attributes["function"] not in SHIFT_GELU_FUNCTIONS:
            return EXECUTORS["unary"](operation, x)
        source, bits = source_of(operation), ivit.SIGMOID_BITS
        inverse = ivit.inverse_scale(ivit.SIGMOID_SLOPE * source.scale[0])
        codes = shift_gelu(_codes(x, source), inverse, ivit.SHIFT_GELU_WINDOW, bits)
        return (codes.to(torch.float64) * (source.scale[0] * 2.0 ** (1 - bits))).to(torch.float32)

    def layer_norm(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        source = source_of(operation)
        gamma, beta = (tensor[0].cpu().numpy().astype(np.float64) for tensor in (weight, bias))
        made = i_layer_norm_constants(gamma, beta, operation.module or operation.name)
        codes = normalize(_codes(x, source) + source.zero_point, ivit.PAPER_START, ivit.NEWTON_ITERATIONS)
        offset, gain = (torch.from_numpy(entry).to(x.device) for entry in (made.bias, made.gain))
        values = (codes + offset).to(torch.float64) * gain
        return values.to(torch.float32)

    def add(operation: Operation, a: Tensor, b: Tensor) -> Tensor:
        if len(steps[operation.name]) != 1:
            return EXECUTORS["add"](operation, a, b)
        (step,) = steps[operation.name]
        sides = ((x.to(torch.float64) / step + 0.5).floor() for x in (a, b))
        total: Tensor = EXECUTORS["add"](operation, *sides)
        return (total * step).to(torch.float32)

    return {"softmax": softmax, "unary": unary, "layer_norm": layer_norm, "add": add}


def _codes(x: Tensor, source: UniformQParams) -> Tensor:
    """Return the codes of fake-quantized values, int64, without their zero point."""
    return (x.to(torch.float64) / source.scale[0]).round().to(torch.int64)
