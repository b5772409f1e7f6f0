"""One requantize for readers that take disjoint channels of a layer in different formats.

Queries, keys and values of a fused projection have a scale each. Seen from the projection they are sets of
channels, so one multiplier per channel serves all three, and the int32 sums are read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.engine import QParams
from calibration.graph import VIEWS, Operation
from calibration.integerize.operands import OperandQParams
from calibration.integerize.scales import Scales, viewed
from calibration.sites import Edge, Structure
from quantizers.codebook import CodebookQParams
from quantizers.uniform import UniformQParams


@dataclass(frozen=True, slots=True, eq=False)
class SharedRequantize:
    """A requantize that serves several formats.

    Args:
        scale: target scale of each channel, shaped to broadcast with the layer's result.
        members: the formats it serves.
    """

    scale: Scales
    members: frozenset[UniformQParams]


def plan_shared_requantize(
    structure: Structure, formats: Mapping[Edge, QParams], operation: Operation
) -> SharedRequantize | None:
    """Return the shared requantize of a linear or convolution, or None where one reader or overlap forbids it."""
    channel_axis = len(operation.shape) - 1 if operation.op == "linear" else 0
    extents = [1] * len(operation.shape)
    extents[channel_axis] = channels = operation.shape[channel_axis]
    index = np.broadcast_to(np.arange(channels).reshape(extents), operation.shape)
    demands: list[_Demand] = []
    _collect(structure, formats, operation.name, index, 1.0, demands)
    scale, taken = np.ones(channels), np.zeros(channels, bool)
    for demand in demands:
        if taken[demand.channels].any() or saturation(demand.qparams) != saturation(demands[0].qparams):
            return None
        taken[demand.channels] = True
        scale[demand.channels] = demand.qparams.scale[0]
    if len(demands) < 2:
        return None
    return SharedRequantize(scale.reshape(extents), frozenset(demand.qparams for demand in demands))


def saturation(qparams: UniformQParams) -> dict[str, int]:
    """Return the attributes with which program nodes saturate to a format."""
    return {"zero_point": qparams.zero_point, "qmin": qparams.qmin, "qmax": qparams.qmax}


def rescaled(qparams: OperandQParams, factor: float) -> OperandQParams:
    """Return the format in which ``factor * x`` has the codes that ``x`` has in ``qparams``."""
    if isinstance(qparams, CodebookQParams):
        # A codebook keeps a float32 scale: rounding it moves no threshold by more than 2^-16 of a step.
        return dataclasses.replace(qparams, scale=float(np.float32(qparams.scale * factor)))
    return dataclasses.replace(qparams, scale=tuple(scale * factor for scale in qparams.scale))


@dataclass(frozen=True, slots=True, eq=False)
class _Demand:
    qparams: UniformQParams
    channels: npt.NDArray[np.int64]


def _collect(
    structure: Structure,
    formats: Mapping[Edge, QParams],
    value: str,
    index: npt.NDArray[np.int64],
    factor: float,
    demands: list[_Demand],
) -> None:
    """Follow views and scalings from a layer to the formats that its readers want for its channels."""
    for reader, position in structure.consumers.get(value, []):
        if reader.op in VIEWS:
            _collect(structure, formats, reader.name, viewed(reader, index), factor, demands)
        elif reader.op == "scale" and reader.real("factor") > 0:
            _collect(structure, formats, reader.name, index, factor * reader.real("factor"), demands)
        elif (reader.name, position) in formats:
            qparams = formats[reader.name, position]
            assert isinstance(qparams, UniformQParams | CodebookQParams)
            # Seen from the layer, before the scaling, a step is that much larger.
            wanted = qparams if factor == 1.0 else rescaled(qparams, 1 / factor)
            if isinstance(wanted, CodebookQParams):
                # A table turns the layer's carrier codes into levels, so these are what it is asked for.
                wanted = wanted.carrier
            channels = np.unique(index)
            if not any(wanted == known.qparams and np.array_equal(channels, known.channels) for known in demands):
                demands.append(_Demand(wanted, channels))
