"""Chooser: formats of operands and weights of layers, each by its spec, from two runs of the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.calibrated import QParams
from calibration.graph import EXECUTORS, Graph, Operation
from calibration.layer_weights import LayerFit, LayerMoments, LayerWeights, choose_in_range, fit_to_bias
from calibration.moments import MomentSums
from calibration.rules import Recipe
from calibration.sampling import layer_rows, sample_rows
from calibration.search.heads import search_attention_operand
from calibration.search.operands import (
    Error,
    OperandQParams,
    apply_operand,
    output_error,
    search_operand,
    search_percentiles,
)
from calibration.search.probabilities import search_probabilities
from calibration.search.ranges import search_activation, search_heads
from calibration.search.weights import nearest, scales_of
from calibration.sites import Edge, Site, Structure
from calibration.statistics import Histogram, empty, update
from calibration.stream import Stream
from quantizers.codebook import CodebookQParams, uniform_codebook
from quantizers.errors import ModelError
from quantizers.families import families_of
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import RANGE_SEARCHES, QuantSpec
from quantizers.uniform import HEAD_AXIS, UniformQParams, bounds, qparams_from_range

#: Rows, and images, on which errors of operands are measured.
_SAMPLED_ROWS, _SAMPLED_IMAGES = 512, 8
#: Rows and images for functions of single values, whose errors vary little from row to row.
_FEW_ROWS, _FEW_IMAGES = 256, 2


class Chooser:
    """Chooses by what a spec allows; nothing here remembers a choice.

    Args:
        graph: the float graph; its constants may change between choices, but not which of them there are.
        recipe: its corrections and the forms of its nonlinear operators.
        reference: the float run.
        source: the run whose activations get formats.
        formats: of the sites decided so far, by name; grows while choices are made.
        sites: by edge.
        device: where operations run.
    """

    def __init__(
        self,
        graph: Graph,
        recipe: Recipe,
        reference: Stream,
        source: Stream,
        formats: Mapping[str, QParams],
        sites: Mapping[Edge, Site],
        device: torch.device,
    ) -> None:
        self._float, self._recipe, self._device = graph, recipe, device
        self._reference, self.source = reference, source
        self._formats, self._site_of = formats, sites
        self._structure = Structure(graph)

    def operand(self, site: Site, operation: Operation, position: int, spec: QuantSpec, heads: int | None) -> QParams:
        """Choose the format of what an operation reads, no weight.

        Args:
            site: of the operand.
            operation: that reads it.
            position: where.
            spec: what to choose from.
            heads: how many scales a format of granularity ``head`` has; None for other granularities.
        """
        if site.kind == "probability":
            return self._choose_probabilities(operation, spec)
        if site.value in self._float.constants:
            constant = self._float.constants[site.value]
            if spec.granularity == "head":
                rows = constant.movedim(HEAD_AXIS, 0).flatten(1)
                return qparams_from_range(rows.amin(1).numpy(), rows.amax(1).numpy(), spec)
            return qparams_from_range(float(constant.min()), float(constant.max()), spec)
        stats = self._histograms(site, operation, position, heads)
        if spec.search in RANGE_SEARCHES and spec.format == "uniform":
            return search_heads(stats, spec) if spec.granularity == "head" else search_activation(stats[0], spec)
        if site.kind in ("query", "key", "value") and families_of(spec.format, spec.bits) == ("uniform",):
            return self._choose_attention_operand(operation, position, spec, stats)
        error = self._error_at_result(site, operation, position)
        if spec.search == "percentile_output" and spec.format == "uniform":
            return search_percentiles(stats[0], spec, error)
        return search_operand(stats[0], spec, error, families_of(spec.format, spec.bits))

    def _histograms(self, site: Site, operation: Operation, position: int, heads: int | None) -> list[Histogram]:
        stats = [empty() for _ in range(heads or 1)]
        name = operation.inputs[position]
        for batch in range(self.source.batches):
            value = self.source.value(name, batch)
            self.require_finite(value, f"site {site.name}", batch)
            parts = (value,) if heads is None else value.unbind(HEAD_AXIS)
            stats = [update(known, part) for known, part in zip(stats, parts, strict=True)]
        return stats

    def _error_at_result(self, site: Site, operation: Operation, position: int) -> Error:
        """Return the error of an operand's format at the result of what reads it."""
        name = operation.inputs[position]
        if operation.op in ("linear", "conv2d") and not _is_grouped(operation):
            weight = torch.cat([self._float.constants[name].flatten(1) for name in self._weights_that_read(site)])
            return output_error(sample_rows(self.source, operation, _SAMPLED_ROWS), weight.to(self._device))
        if operation.op == "unary":
            x = sample_rows(self.source, operation, _FEW_ROWS)
        else:
            x = self.source.value(name, 0)[: _FEW_IMAGES if operation.op == "softmax" else _SAMPLED_IMAGES]
        if operation.op not in ("unary", "softmax"):
            return lambda qparams: float((apply_operand(x, qparams) - x).square().mean())
        executor = EXECUTORS[operation.op]
        expected = executor(operation, x)

        def error(qparams: OperandQParams) -> float:
            return float((executor(operation, apply_operand(x, qparams)) - expected).square().mean())

        return error

    def _weights_that_read(self, site: Site) -> list[str]:
        """Return the weights of the layers that read a site as its first reader does: the same view, or patches."""
        readers = [self._structure.producers[operation] for operation, _ in site.edges]
        kernel = self._float.constants[readers[0].inputs[1]].shape[1:]
        alike = [
            reader.inputs[1]
            for reader in readers
            if reader.inputs[0] == readers[0].inputs[0]
            and self._float.constants[reader.inputs[1]].shape[1:] == kernel
            and not _is_grouped(reader)
        ]
        return list(dict.fromkeys(alike))

    def _choose_attention_operand(
        self, operation: Operation, position: int, spec: QuantSpec, stats: Sequence[Histogram]
    ) -> QParams:
        ranges = [dataclasses.replace(spec, search=search) for search in RANGE_SEARCHES]
        incumbents = [
            search_heads(stats, entry) if spec.granularity == "head" else search_activation(stats[0], entry)
            for entry in ranges
        ]
        operands = [self.source.value(name, 0)[:_SAMPLED_IMAGES] for name in operation.inputs]
        other = self._formats.get(self._site_of[operation.name, 1 - position].name)
        if other is not None:
            operands[1 - position] = apply(other, operands[1 - position])

        def product_error(error: Tensor) -> Tensor:
            sides = [error, operands[1]] if position == 0 else [operands[0], error]
            return EXECUTORS["matmul"](operation, *sides).square().sum((-2, -1))

        return search_attention_operand(operands[position], product_error, spec, incumbents)

    def _choose_probabilities(self, operation: Operation, spec: QuantSpec) -> QParams:
        if self._recipe.nonlinear == "published":
            return ShiftmaxQParams(spec.bits)
        families = families_of(spec.format, spec.bits)
        if families == ("uniform",):
            return RowRelativeQParams(uniform_codebook(spec.bits))
        # The scores as the softmax reads them, for what it makes of them is recomputed.
        probabilities, values = (self.source.value(name, 0)[:_FEW_IMAGES] for name in operation.inputs)
        return search_probabilities(probabilities, values, spec.bits, families)

    def layer(self, operation: Operation, spec: QuantSpec, known: tuple[UniformQParams, Tensor] | None) -> LayerWeights:
        """Choose the weights of a layer, whose input has its format, and a bias in steps of the two.

        Args:
            operation: a linear or a convolution.
            spec: of the weight.
            known: format and values (N, ...) of a weight that an earlier layer, which shares it, has chosen.
        """
        if known is None:
            return self.layer_at_each(operation, (spec,))[0]
        weight, bias = self._weights(operation)
        scale = scales_of(known[0], weight)
        values = known[1].to(self._device).flatten(1)
        chosen = LayerWeights(scale, nearest(values, scale, bounds(spec)[1]), bias)
        return fit_to_bias(chosen, self.input_scale(operation), spec)

    def layer_at_each(self, operation: Operation, specs: Sequence[QuantSpec]) -> list[LayerWeights]:
        """Choose the weights of a layer for each of several specs; its inputs are read once for all of them.

        Args:
            operation: a linear or a convolution, whose input has its format.
            specs: of the weight.
        """
        rows, bias = self._weights(operation)
        # What other layers read as well cannot make up for the errors of one layer's inputs.
        owned = all(len(self._structure.consumers[name]) == 1 for name in operation.inputs[1:])
        correct = self._recipe.correction != "none" and owned
        fit: LayerFit | None = None
        made = []
        for spec in specs:
            if _is_grouped(operation) or (spec.search in RANGE_SEARCHES and not correct):
                # The rows that a channel of a grouped convolution reads are not those of its neighbours.
                chosen = choose_in_range(rows, bias, spec)
            else:
                fit = fit or LayerFit(rows, bias, self._moments(operation, rows.shape[1]), correct=correct)
                chosen = fit.choose(spec)
            made.append(fit_to_bias(chosen, self.input_scale(operation), spec))
        return made

    def _weights(self, operation: Operation) -> tuple[Tensor, Tensor]:
        """Return a layer's float weights (N, K) and its bias (N,)."""
        weight, bias = (self._float.constants[name].to(self._device) for name in operation.inputs[1:])
        return weight.flatten(1), bias

    def _moments(self, operation: Operation, width: int) -> LayerMoments:
        """Return moments of what the layer reads in float, and quantized: of every other image, and of all."""
        halves = (MomentSums(width, self._device), MomentSums(width, self._device))
        seen, counts = 0, [0, 0]
        site = self._site_of[operation.name, 0]
        for batch in range(self.source.batches):
            x = self._reference.value(operation.inputs[0], batch)
            quantized = apply(self._formats[site.name], self.source.value(operation.inputs[0], batch))
            for values in (x, quantized):
                self.require_finite(values.square().sum(), f"the squares of site {site.name}", batch)
            for half, sums in enumerate(halves):
                mine = slice((half + seen) % 2, None, 2)
                if len(x[mine]):
                    pair = (layer_rows(operation, values[mine], self._float) for values in (x, quantized))
                    sums.add(*pair)
                    counts[half] += 1
            seen += len(x)
        # A single image, or a constant that stands before the layer in every micro-batch.
        if not all(counts):
            return LayerMoments(halves[0].finish(), None)
        return LayerMoments((halves[0] + halves[1]).finish(), halves)

    def require_finite(self, value: Tensor, where: str, batch: int) -> None:
        """Refuse NaN and infinity, with the place and the images.

        Raises:
            ModelError: a value is not finite.
        """
        if not bool(torch.isfinite(value).all()):
            first = sum(self._reference.batch_sizes[:batch])
            raise ModelError(
                f"NaN or infinity at {where} while calibrating images {first} to "
                f"{first + self._reference.batch_sizes[batch] - 1}; "
                "check the preprocessing and run the model in float32"
            )

    def input_scale(self, operation: Operation) -> float:
        """Return the step of a layer's input."""
        qparams = self._formats[self._site_of[operation.name, 0].name]
        assert isinstance(qparams, UniformQParams | CodebookQParams)
        return qparams.scale[0] if isinstance(qparams, UniformQParams) else qparams.scale


def _is_grouped(operation: Operation) -> bool:
    return operation.op == "conv2d" and operation.integer("groups") > 1
