"""Layouts: what each runtime makes its integer kernels of.

The formats that calibration has chosen are the same in all of them; what differs is where the pairs of QuantizeLinear
and DequantizeLinear stand, how products and their biases are written, and which zero points the runtime takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from calibration.calibrated import Calibrated, QParams
from calibration.sites import Edge
from quantizers.errors import UsageError
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams

#: Where pairs of QuantizeLinear and DequantizeLinear stand: at each product, or behind what makes the values.
PLACEMENTS = ("product", "producer")
_ATTENTION = frozenset({"query", "key", "value", "matmul_left", "matmul_right"})


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of :data:`LAYOUTS`.

    Args:
        summary: one line for people.
        placement: a member of :data:`PLACEMENTS`.
        gemm: whether a linear is a Gemm on rows; otherwise a MatMul and an Add.
        rows: whether what lies between two linears works on rows too, see :mod:`ptq.onnx_export.rows`.
        probability_codes: the largest code of a probability, 255 or 127.
        integer_bias: whether biases are int32 codes; otherwise float32 values, of the same grid.
        unsigned: whether QuantizeLinear may make uint8, the type of levels; otherwise these are looked up in float32,
            and their products are float.
        zero_points: kinds of activations that may have one: ``all``, ``linear`` (not those of attention), ``none``.
    """

    summary: str
    placement: str
    gemm: bool
    rows: bool
    probability_codes: int
    integer_bias: bool
    unsigned: bool
    zero_points: str


#: By runtime. Measured with benchmarks/export_presets.py; TensorRT by its documentation.
LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "onnxruntime": Layout("ONNX Runtime on CPUs", "product", True, True, 255, True, True, "all"),
        "openvino": Layout("OpenVINO on CPUs", "producer", False, False, 255, True, True, "linear"),
        "tensorrt": Layout("TensorRT", "product", False, False, 127, False, False, "none"),
        "portable": Layout("any runtime with opset 20", "product", True, False, 127, True, True, "none"),
    }
)
DEFAULT_TARGET = "onnxruntime"


def get_layout(target: str) -> Layout:
    """Return the layout of a runtime.

    Raises:
        UsageError: unknown.
    """
    if target not in LAYOUTS:
        known = "; ".join(f"{name} ({layout.summary})" for name, layout in LAYOUTS.items())
        raise UsageError(f"unknown target {target!r} of an ONNX file; known: {known}")
    return LAYOUTS[target]


def formats_of(calibrated: Calibrated, layout: Layout) -> dict[Edge, QParams]:
    """Return the format of every edge as a layout stores it: the calibrated ranges, on other grids where needed."""
    found: dict[Edge, QParams] = {}
    for entry in calibrated.sites:
        qparams = entry.qparams
        if isinstance(qparams, RowRelativeQParams) and qparams.codebook.family == "uniform":
            found.update(dict.fromkeys(entry.site.edges, probability_format(qparams, layout.probability_codes)))
            continue
        if isinstance(qparams, UniformQParams) and _loses_zero_point(layout, entry.site.kind):
            qparams = without_zero_point(qparams)
        found.update(dict.fromkeys(entry.site.edges, qparams))
    return found


def _loses_zero_point(layout: Layout, kind: str) -> bool:
    return layout.zero_points == "none" or (layout.zero_points == "linear" and kind in _ATTENTION)


def probability_format(qparams: RowRelativeQParams, largest: int) -> UniformQParams:
    """Return the format of a softmax output: codes 0 to the largest level for probabilities 0 to 1.

    Runtimes fuse attention only around a fixed scale with zero point 0, which leaves no place for a maximum
    of each row. uint8 keeps the one bit that int8 would lose to signs that probabilities do not have.
    """
    peak = min(qparams.peak, largest)
    scale = float(np.float32(1 / peak))
    # No probability exceeds 1, so that a narrower format needs no clipping.
    low, high = (0, 255) if largest > 127 else (-128, 127)
    return UniformQParams((scale,), 0, low, high)


def without_zero_point(qparams: UniformQParams) -> UniformQParams:
    """Return the symmetric format of the same width that holds the same values."""
    if qparams.zero_point == 0:
        return qparams
    half = 1 << (qparams.bits - 1)
    reach = max(qparams.zero_point - qparams.qmin, qparams.qmax - qparams.zero_point)
    scale = tuple(float(np.float32(step * reach / (half - 1))) for step in qparams.scale)
    return dataclasses.replace(qparams, scale=scale, zero_point=0, qmin=-half, qmax=half - 1)
