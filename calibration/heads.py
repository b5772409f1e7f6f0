"""Formats with a scale for each head: how they look from before a view, and which sites can have them.

Readers ask for codes in their format, and the request goes backwards through views to what makes the values. The
heads of an operand are channels of the projection before it: seen from there, the format has a scale for each channel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from calibration.graph import VIEWS, Graph, Operation
from calibration.rules import Recipe
from calibration.sites import Site, Structure
from quantizers.codebook import CodebookQParams
from quantizers.errors import RecipeError
from quantizers.spec import QuantSpec
from quantizers.uniform import HEAD_AXIS, UniformQParams

#: A format of an operand; what only moves or scales it keeps the kind of format.
Operand = TypeVar("Operand", bound=UniformQParams | CodebookQParams)

_SUMS = frozenset({"linear", "matmul", "multiply", "mean", "add"})


def rescaled(qparams: Operand, factor: float) -> Operand:
    """Return the format in which ``factor * x`` has the codes that ``x`` has in ``qparams``."""
    if isinstance(qparams, CodebookQParams):
        # A codebook keeps a float32 scale: rounding it moves no threshold by more than 2^-16 of a step.
        return dataclasses.replace(qparams, scale=float(np.float32(qparams.scale * factor)))
    return dataclasses.replace(qparams, scale=tuple(scale * factor for scale in qparams.scale))


def before_view(operation: Operation, shape: tuple[int, ...], qparams: Operand) -> Operand | None:
    """Return the format of a view's operand in which the view's result has a given format.

    Args:
        operation: a view.
        shape: sample shape of its operand.
        qparams: format of its result, with one scale or with several along an axis that counts from the end.

    Returns:
        The format, or None where the scales of the operand would differ along more than one axis. Elements that a
        slice drops have the first scale.
    """
    if isinstance(qparams, CodebookQParams) or len(qparams.scale) == 1:
        return qparams
    axis, rank = qparams.axis + len(operation.shape), len(shape)
    match operation.op:
        case "permute":
            return dataclasses.replace(qparams, axis=operation.integers("axes")[axis] - rank)
        case "slice":
            if operation.integer("axis") != axis:
                return qparams
            scale = [qparams.scale[0]] * shape[axis]
            scale[operation.integer("start") : operation.integer("stop") : operation.integer("step")] = qparams.scale
            return dataclasses.replace(qparams, scale=tuple(scale))
    # A reshape. The scale of an element follows from its position in the flat sample; an axis of the operand has the
    # scales if neither the axes behind it nor those before it change them.
    inner = math.prod(operation.shape[axis + 1 :])
    period = inner * len(qparams.scale)
    for found, extent in enumerate(shape):
        stride, outer = math.prod(shape[found + 1 :]), math.prod(shape[:found])
        if inner % stride == 0 and (outer == 1 or extent * stride % period == 0):
            scales = tuple(qparams.scale[index * stride % period // inner] for index in range(extent))
            return dataclasses.replace(qparams, scale=scales, axis=found - rank)
    return None


def before_concat(operation: Operation, shapes: Sequence[tuple[int, ...]], qparams: Operand) -> list[Operand]:
    """Return the formats of a concatenation's operands, of the given sample shapes, for that of its result."""
    axis = operation.integer("axis")
    if isinstance(qparams, CodebookQParams):
        return [qparams] * len(shapes)
    if len(qparams.scale) == 1 or qparams.axis + len(operation.shape) != axis:
        return [qparams] * len(shapes)
    formats: list[Operand] = []
    start = 0
    for shape in shapes:
        formats.append(dataclasses.replace(qparams, scale=qparams.scale[start : start + shape[axis]]))
        start += shape[axis]
    return formats


def head_counts(graph: Graph, sites: Sequence[Site], specs: Mapping[str, QuantSpec], recipe: Recipe) -> dict[str, int]:
    """Return the number of heads of each site of granularity ``head``.

    Raises:
        RecipeError: a site that has no heads, or whose values are made by an operator that cannot tell them apart.
    """
    structure, shapes = Structure(graph), graph.shapes()
    counts: dict[str, int] = {}
    for site in sites:
        if specs[site.name].granularity != "head":
            continue
        values = {structure.producers[name].inputs[position] for name, position in site.edges}
        read = sorted({shapes[value] for value in values})
        reason = None
        if len(values) > 1:
            reason = f"it is read in {len(values)} views, of shape {' and '.join(map(str, read))}"
        elif len(read[0]) < -HEAD_AXIS:
            reason = f"its shape {read[0]} is not (..., heads, rows, columns)"
        else:
            counts[site.name] = heads = read[0][HEAD_AXIS]
            distinct = UniformQParams(tuple(1.0 + head for head in range(heads)), 0, -128, 127, HEAD_AXIS)
            reason = _obstacle(structure, shapes, site.value, distinct)
        if reason is not None:
            raise RecipeError(
                f"recipe {recipe.name}: site {site.name} ({site.kind}) cannot have a scale for each head: {reason}; "
                "give it granularity 'tensor'"
            )
    return counts


def _obstacle(
    structure: Structure, shapes: Mapping[str, tuple[int, ...]], value: str, qparams: UniformQParams
) -> str | None:
    """Return why no operation can make a value in a format that has one scale or several, or None if one can."""
    if len(qparams.scale) == 1 or value in structure.graph.constants:
        return None
    operation = structure.producers.get(value)
    if operation is None:
        return "it is an image, which has one scale"
    if operation.op in VIEWS:
        source = operation.inputs[0]
        before = before_view(operation, shapes[source], qparams)
        if before is None:
            return f"its heads are no axis of {source}, of shape {shapes[source]}"
        return _obstacle(structure, shapes, source, before)
    if operation.op == "scale" and operation.real("factor") > 0:
        return _obstacle(structure, shapes, operation.inputs[0], qparams)
    if operation.op == "concat":
        formats = before_concat(operation, [shapes[name] for name in operation.inputs], qparams)
        parts = zip(operation.inputs, formats, strict=True)
        return next((found for name, part in parts if (found := _obstacle(structure, shapes, name, part))), None)
    if structure.is_row_relative(operation) or operation.op == "softmax":
        possible = qparams.axis <= HEAD_AXIS
    elif operation.op == "layer_norm":
        possible = qparams.axis == -1
    elif operation.op == "conv2d":
        possible = qparams.axis == -len(operation.shape)
    else:
        possible = operation.op in _SUMS or operation.op == "scale"
    return None if possible else f"{operation.op} {operation.name} makes codes of one scale"
