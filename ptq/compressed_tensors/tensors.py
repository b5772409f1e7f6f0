"""The tensors of a calibrated graph under the names of compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.calibrated import Calibrated, CalibratedSite
from ptq.compressed_tensors.names import CheckpointNames, with_batch_axis
from ptq.compressed_tensors.packing import PACKED_BITS, pack_rows
from quantizers.uniform import UniformQParams, dequantize, quantize


@dataclass(frozen=True, slots=True)
class InputFormat:
    """How the input of a linear is quantized: one scale, all codes of a width.

    Args:
        bits: width.
        symmetric: zero point 0.
    """

    bits: int
    symmetric: bool


@dataclass(frozen=True, slots=True)
class Scheme:
    """What linears of one group have in common.

    Args:
        bits: width of the weights, symmetric, with a scale for each output channel.
        input_format: of the inputs, or None where the layout cannot say it.
    """

    bits: int
    input_format: InputFormat | None

    @property
    def packed(self) -> bool:
        """Whether codes are packed in words."""
        return self.bits in PACKED_BITS


@dataclass(frozen=True, eq=False)
class Compressed:
    """What the two files hold.

    Args:
        tensors: by name.
        schemes: of each linear that has one, by the path of its module.
        folded: modules whose weights have taken in the scale behind them.
        new_biases: modules with a bias that the checkpoint does not have.
    """

    tensors: dict[str, Tensor]
    schemes: dict[str, Scheme]
    folded: tuple[str, ...]
    new_biases: tuple[str, ...]


def compress(calibrated: Calibrated, prefix: str = "") -> Compressed:
    """Return all tensors of a calibrated graph.

    Args:
        calibrated: a graph whose sites have formats.
        prefix: as :class:`ptq.compressed_tensors.names.CheckpointNames` has it.

    Raises:
        UsageError: a parameter has two values.
    """
    graph = calibrated.graph
    names = CheckpointNames(graph, prefix)
    weights = {entry.site.value: entry for entry in calibrated.sites if entry.site.kind == "weight"}
    inputs = _input_sites(calibrated)
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, Scheme] = {}
    constants = with_batch_axis(graph)
    # In the order of reading, which an artifact keeps.
    for constant in dict.fromkeys(name for operation in graph.operations for name in operation.inputs):
        name, site = names.get(constant), weights.get(constant)
        if name is None or constant not in constants:
            continue
        values, module = constants[constant], names.module(constant)
        qparams = None if site is None else site.qparams
        if not isinstance(qparams, UniformQParams):
            tensors[name] = values
        elif module is None or values.ndim != 2:
            tensors[name] = dequantize(quantize(values, qparams), qparams)
        else:
            source = inputs.get(constant)
            schemes[module] = scheme = Scheme(qparams.bits, None if source is None else _input_format(source))
            parts = _weight(values, qparams, scheme)
            if source is not None and scheme.input_format is not None:
                parts |= _input(source)
            tensors |= {f"{module}.{key}": tensor for key, tensor in parts.items()}
    ordered = {name: tensors[name].contiguous().clone() for name in sorted(tensors)}
    return Compressed(ordered, schemes, tuple(names.folded), tuple(names.new_biases))


def _weight(values: Tensor, qparams: UniformQParams, scheme: Scheme) -> dict[str, Tensor]:
    codes = quantize(values, qparams)
    scale = {"weight_scale": torch.tensor(qparams.scale, dtype=torch.float32).reshape(-1, 1)}
    if not scheme.packed:
        return {"weight": codes.to(torch.int8), **scale}
    shape = torch.tensor(codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_rows(codes, scheme.bits), "weight_shape": shape, **scale}


def _input_sites(calibrated: Calibrated) -> dict[str, CalibratedSite]:
    """Return the site of the input of each linear by its weight; none where linears share a weight and not the site."""
    by_edge = {edge: entry for entry in calibrated.sites for edge in entry.site.edges}
    found: dict[str, CalibratedSite | None] = {}
    for operation in calibrated.graph.operations:
        if operation.op != "linear":
            continue
        entry, weight = by_edge.get((operation.name, 0)), operation.inputs[1]
        found[weight] = entry if found.get(weight, entry) == entry else None
    return {weight: entry for weight, entry in found.items() if entry is not None}


def _input_format(entry: CalibratedSite) -> InputFormat | None:
    qparams = entry.qparams
    if not isinstance(qparams, UniformQParams) or len(qparams.scale) > 1:
        return None
    return InputFormat(qparams.bits, entry.spec.symmetric and qparams.zero_point == 0)


def _input(entry: CalibratedSite) -> dict[str, Tensor]:
    qparams = entry.qparams
    assert isinstance(qparams, UniformQParams), entry.site.name
    tensors = {"input_scale": torch.tensor(qparams.scale, dtype=torch.float32)}
    found = _input_format(entry)
    if found is not None and not found.symmetric:
        # Codes of the library are signed: -2^(b - 1) to 2^(b - 1) - 1.
        lowest = -(1 << (qparams.bits - 1))
        tensors["input_zero_point"] = torch.tensor([qparams.zero_point - qparams.qmin + lowest], dtype=torch.int8)
    return tensors
