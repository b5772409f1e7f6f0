"""One requantize for readers that take disjoint channels of a layer in different formats.

Queries, keys and values of a fused projection have a scale each, or one for each head. Seen from the projection they
are sets of channels, so one multiplier per channel serves all three, and the int32 sums are read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibration.calibrated import QParams
from calibration.graph import VIEWS, Operation
from calibration.heads import before_view, rescaled
from calibration.integerize.scales import Scales, viewed
from calibration.sites import Edge, Structure
from quantizers.codebook import CodebookQParams
from quantizers.uniform import UniformQParams


@dataclass(frozen=True, slots=True, eq=False)
class SharedRequantize:
    """A requantize that serves several formats.

    Args:
        scale: target scale of each channel, shaped to broadcast with the layer's result.
        members: the formats it serves, as they look from the layer.
    """

    scale: Scales
    members: frozenset[UniformQParams]


def plan_shared_requantize(
    structure: Structure, formats: Mapping[Edge, QParams], operation: Operation, fewest: int = 2
) -> SharedRequantize | None:
    """Return the shared requantize of a linear or convolution, or None where overlap or zero points forbid it.

    Args:
        structure: of the graph.
        formats: of its edges.
        operation: a linear or a convolution.
        fewest: formats that are worth it.
    """
    channel_axis = -1 if operation.op == "linear" else -len(operation.shape)
    extents = [1] * len(operation.shape)
    extents[channel_axis] = channels = operation.shape[channel_axis]
    index = np.broadcast_to(np.arange(channels).reshape(extents), operation.shape)
    demands: list[_Demand] = []
    for demand in _demands(structure, formats, operation.name, index):
        if not any(
            demand.qparams == known.qparams and np.array_equal(demand.channels, known.channels) for known in demands
        ):
            demands.append(demand)
    scale, taken = np.ones(channels), np.zeros(channels, bool)
    for demand in demands:
        qparams = demand.qparams
        if taken[demand.channels].any() or saturation(qparams) != saturation(demands[0].qparams):
            return None
        if len(qparams.scale) > 1 and qparams.axis != channel_axis:
            return None
        taken[demand.channels] = True
        scale[demand.channels] = np.broadcast_to(qparams.scale, channels)[demand.channels]
    if len(demands) < fewest:
        return None
    return SharedRequantize(scale.reshape(extents), frozenset(demand.qparams for demand in demands))


def saturation(qparams: UniformQParams) -> dict[str, int]:
    """Return the attributes with which program nodes saturate to a format."""
    return {"zero_point": qparams.zero_point, "qmin": qparams.qmin, "qmax": qparams.qmax}


@dataclass(frozen=True, slots=True, eq=False)
class _Demand:
    qparams: UniformQParams
    channels: npt.NDArray[np.int64]


def _demands(
    structure: Structure, formats: Mapping[Edge, QParams], value: str, index: npt.NDArray[np.int64]
) -> list[_Demand]:
    """Follow views and scalings to the formats that readers want, and return them as they look from the value."""
    found: list[_Demand] = []
    for reader, position in structure.consumers.get(value, []):
        if reader.op in VIEWS:
            for demand in _demands(structure, formats, reader.name, viewed(reader, index)):
                qparams = before_view(reader, structure.producers[value].shape, demand.qparams)
                assert qparams is not None, "calibration refuses such heads"
                found.append(_Demand(qparams, demand.channels))
        elif reader.op == "scale" and reader.real("factor") > 0:
            factor = 1 / reader.real("factor")
            inner = _demands(structure, formats, reader.name, index)
            found += [_Demand(rescaled(demand.qparams, factor), demand.channels) for demand in inner]
        elif (reader.name, position) in formats:
            wanted = formats[reader.name, position]
            assert isinstance(wanted, UniformQParams | CodebookQParams)
            if isinstance(wanted, CodebookQParams):
                # A table turns the layer's carrier codes into levels, so these are what it is asked for.
                wanted = wanted.carrier
            found.append(_Demand(wanted, np.unique(index)))
    return found
