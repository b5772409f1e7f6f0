"""Scale reparameterization: the channels of a LayerNorm's output take one format, and the next linears take it back.

RepQ-ViT (arXiv 2212.08254, section 3) quantizes the output X of a LayerNorm with a scale ``s`` and a zero point ``z``
for each channel and then moves what differs between channels into the layers around: with one ``s~`` and ``z~``,
``r1 = s / s~`` and ``r2 = z - z~``,

    gamma' = gamma / r1     beta' = (beta + s r2) / r1     W' = W diag(r1)     bias' = bias - W (s r2)

the LayerNorm gives ``X' = (X + s r2) / r1`` and the linears give what they gave. ``X' / s~ = X / s + r2``, so an
integer ``r2`` leaves the codes as they were: a format for the whole tensor with the codes of one for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibration.graph import Graph, Operation
from calibration.reparam.channels import MOVES, follow, label
from calibration.reparam.constants import as_stored, require_vector, why_not_owned
from quantizers.errors import DataError, UsageError
from quantizers.spec import MIN_BITS, WIDE_BITS

#: Quantiles that end the candidate ranges, as the authors' code has them.
_SHARES = (0.999, 0.9999, 0.99999)
#: A scale lies within this ratio of the median of all. The ratio goes into a weight column, where a larger one
#: leaves no code to the other columns.
_LARGEST_RATIO = 64.0
#: float64 values that are held at once while fitting.
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class NormGroup:
    """A LayerNorm and the linears that read it.

    Args:
        norm: name of the layer_norm.
        linears: names of the linears that read all its channels in order, in execution order.
        refusal: why its channels cannot be rescaled, or None where they can.
    """

    norm: str
    linears: tuple[str, ...]
    refusal: str | None


@dataclass(frozen=True, slots=True, eq=False)
class ChannelFormat:
    """A uniform format for each channel: ``code = clip(round(x / scale) + zero_point, 0, 2^bits - 1)``.

    Args:
        scale: float64 (C,), positive.
        zero_point: int64 (C,); outside of the codes where a channel's values are all of one sign.
    """

    scale: Tensor
    zero_point: Tensor


def find_norm_groups(graph: Graph) -> tuple[NormGroup, ...]:
    """Return one group for each layer_norm, in execution order.

    A group is refused where anything but a linear reads the norm's output behind views and concatenations, where a
    linear does not read all channels in their order, or where a constant is read by another operation too.
    """
    return tuple(_group(graph, operation) for operation in graph.operations if operation.op == "layer_norm")


def _group(graph: Graph, norm: Operation) -> NormGroup:
    channels = torch.arange(norm.shape[-1])
    linears: list[Operation] = []
    refusal = None
    for read in follow(graph, norm.name, channels.expand(norm.shape), MOVES):
        if read.reader is None or read.reader.op != "linear":
            refusal = refusal or f"{label(graph, read)} reads it, and only a linear can take back a change of channels"
        elif read.channels.shape[-1:] != channels.shape or bool((read.channels != channels).any()):
            refusal = refusal or f"{label(graph, read)} reads a part of its channels, or reads them in another order"
        else:
            linears.append(read.reader)
    refusal = refusal or why_not_owned(graph, (norm, *linears), (1, 2))
    return NormGroup(norm.name, tuple(linear.name for linear in linears), refusal)


def fit_channels(rows: Tensor, bits: int) -> ChannelFormat:
    """Fit a format to each channel by RepQ-ViT's search.

    Of the ranges between the quantiles ``1 - p`` and ``p`` (linear interpolation), for p of 0.999, 0.9999 and 0.99999,
    each channel takes the one with the least mean squared error; the first wins ties. Then every scale is limited to
    [median / 64, 64 median] of the channels whose range has a width. A channel without one (it is constant, or all
    three ranges are empty) takes the median; where there is no other channel at all, scale 1. Where a scale was changed
    so, the zero point puts the middle of the codes on the middle of the range, or, where the range is now too wide for
    the codes, on the median of the values. Medians of an even count of scales are the lower of the two in the middle.

    Args:
        rows: float (R, C), a row for each token of each image, R at least 1.
        bits: width of a code, 2 to 16.

    Raises:
        UsageError: ``rows`` has no two axes or is empty, or ``bits`` is out of range.
        DataError: a value is not finite.
    """
    if rows.ndim != 2 or rows.numel() == 0:
        raise UsageError(f"expected rows of shape (tokens, channels), neither of them 0, got {tuple(rows.shape)}")
    if not MIN_BITS <= bits <= WIDE_BITS:
        raise UsageError(f"bits is {bits}, expected {MIN_BITS} to {WIDE_BITS}")
    if not bool(rows.isfinite().all()):
        channel = int((~rows.isfinite()).any(0).nonzero()[0])
        raise DataError(f"channel {channel} holds a value that is not finite; check the images and the weights")
    width = max(1, _CHUNK // rows.shape[0])
    fits = [
        _least_error(part.to(torch.float64).contiguous().numpy(), (1 << bits) - 1)
        for part in torch.split(rows.T, width)
    ]
    scale, zero_point, middle, median = (np.concatenate(column) for column in zip(*fits, strict=True))
    live = scale > 0
    typical = _lower_median(scale[live]) if live.any() else 1.0
    fitted = np.where(live, scale, typical)
    limited = np.clip(fitted, typical / _LARGEST_RATIO, typical * _LARGEST_RATIO)
    centre = np.where(limited < fitted, median, middle)
    centred = np.rint(((1 << bits) - 1) / 2 - centre / limited)
    zero_point = np.where(live & (limited == scale), zero_point, centred)
    return ChannelFormat(torch.from_numpy(limited), torch.from_numpy(zero_point.astype(np.int64)))


_Column = npt.NDArray[np.float64]


def _least_error(values: npt.NDArray[np.float64], highest: int) -> tuple[_Column, _Column, _Column, _Column]:
    """Return scale (0 where no range has a width), zero point, middle of the range and median of channels (c, R)."""
    median, *bounds = np.quantile(values, (0.5, *(1 - p for p in _SHARES), *_SHARES), axis=1)
    scale, zero_point, middle = np.zeros_like(median), np.zeros_like(median), median.copy()
    best = np.full_like(median, np.inf)
    for low, high in zip(bounds[: len(_SHARES)], bounds[len(_SHARES) :], strict=True):
        live = high > low
        step = np.where(live, (high - low) / highest, 1.0)
        zero = np.rint(-low / step)
        codes = np.clip(np.rint(values / step[:, None]) + zero[:, None], 0, highest)
        error = np.square((codes - zero[:, None]) * step[:, None] - values).mean(1)
        better = live & (error < best)
        for kept, found in ((best, error), (scale, step), (zero_point, zero), (middle, (low + high) / 2)):
            kept[better] = found[better]
    return scale, zero_point, middle, median


def _lower_median(values: npt.NDArray[np.float64]) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def mean_target(fmt: ChannelFormat) -> tuple[float, int]:
    """Return RepQ-ViT's format of the whole tensor: mean scale and mean zero point.

    The mean of the zero points is rounded, half to even, which the paper does not do: only then are the codes exactly
    those of the channels' formats.
    """
    return float(fmt.scale.mean()), int(np.rint(float(fmt.zero_point.to(torch.float64).mean())))


def median_target(fmt: ChannelFormat) -> tuple[float, int]:
    """Return the median scale and zero point, DopQ-ViT's MOSF (arXiv 2408.03291), which outlier channels do not move.

    Of an even count both are the lower of the two in the middle, so that each is one that a channel has.
    """
    return float(fmt.scale.median()), int(fmt.zero_point.median())


def rescale_norm(graph: Graph, group: NormGroup, fmt: ChannelFormat, target: tuple[float, int]) -> dict[str, Tensor]:
    """Return the constants with which one format serves all channels of a norm's output (section 3 of RepQ-ViT).

    Args:
        graph: the graph.
        group: of :func:`find_norm_groups`, not refused.
        fmt: the channels' formats, C of them.
        target: scale and zero point of the whole tensor. A value has under them the code that it had under ``fmt``.

    Raises:
        UsageError: the group is refused, the formats are not of its channels, or a scale is not positive.
    """
    scale, zero_point = target
    if not 0 < scale < float("inf"):
        raise UsageError(f"the target scale is {scale}, expected a positive number")
    return rescale_channels(graph, group, fmt.scale / scale, fmt.scale * (fmt.zero_point - zero_point))


def rescale_channels(graph: Graph, group: NormGroup, ratio: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """Return the constants with which a norm gives ``(X + shift) / ratio`` and its linears give what they gave.

    Args:
        graph: the graph.
        group: of :func:`find_norm_groups`, not refused.
        ratio: positive float (C,).
        shift: float (C,).

    Returns:
        Weight and bias of the norm and of each of its linears, float32, by name.

    Raises:
        UsageError: the group is refused, a vector has another shape, a number is not finite, or a ratio not positive.
    """
    if group.refusal is not None:
        raise UsageError(f"the channels of layer_norm {group.norm} cannot be rescaled: {group.refusal}")
    producers = graph.producers()
    gamma, beta = producers[group.norm].inputs[1:]
    channels = graph.constants[gamma].shape[0]
    ratio, shift = require_vector("ratio", ratio, channels), require_vector("shift", shift, channels)
    if not bool((ratio > 0).all()):
        raise UsageError("ratio: expected positive numbers")
    changed = {
        gamma: graph.constants[gamma].to(torch.float64) / ratio,
        beta: (graph.constants[beta].to(torch.float64) + shift) / ratio,
    }
    for linear in group.linears:
        weight, bias = producers[linear].inputs[1:]
        columns = graph.constants[weight].to(torch.float64)
        changed[weight] = columns * ratio
        changed[bias] = graph.constants[bias].to(torch.float64) - columns @ shift
    return as_stored(changed)
