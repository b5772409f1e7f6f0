"""Decider: what calibration decides at each operation, and the two runs of the network that it decides it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.cache import ActivationCache
from calibration.calibrated import QParams
from calibration.graph import EXECUTORS, Graph, Operation
from calibration.heads import head_counts
from calibration.layer_weights import (
    LayerMoments,
    LayerWeights,
    choose_by_moments,
    choose_in_range,
    fit_to_bias,
    round_bias,
)
from calibration.moments import MomentSums
from calibration.progress import Decisions
from calibration.rewriting import Rewriter
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
from calibration.sites import OUTPUT, Edge, Site, Structure
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


class Decider:
    """Decides an operation at a time; the operations have to come in the graph's order.

    Args:
        graph: the float graph.
        sites: its sites.
        specs: by site.
        recipe: rewrites, propagation and correction.
        cache: where activations are kept.
        device: where operations run.
    """

    def __init__(
        self,
        graph: Graph,
        sites: Sequence[Site],
        specs: Mapping[str, QuantSpec],
        recipe: Recipe,
        cache: ActivationCache,
        device: torch.device,
    ) -> None:
        self.formats: dict[str, QParams] = {}
        self.notes: list[str] = []
        self._graph, self._recipe, self._specs, self._device = graph, recipe, specs, device
        # The constants change while the runs go on, in these dicts; operations and names do not.
        self._float_constants, self._network_constants = dict(graph.constants), dict(graph.constants)
        self._float = dataclasses.replace(graph, constants=self._float_constants)
        self._network = dataclasses.replace(graph, constants=self._network_constants)
        self._structure = Structure(graph)
        self._sites_at: dict[str, list[tuple[int, Site]]] = {}
        for site in sites:
            operation, position = site.edges[0]
            self._sites_at.setdefault(operation, []).append((position, site))
        self._site_of: dict[Edge, Site] = {edge: site for site in sites for edge in site.edges}
        self._heads = head_counts(graph, sites, specs, recipe)
        self._reference = Stream(self._float, "float", cache, device)
        self._quantized: Stream | None = None
        if recipe.propagation == "quantized":
            self._quantized = Stream(self._network, "quantized", cache, device, self._read)
        self._rewriter = Rewriter(self._float, recipe)
        self._batch_sizes: list[int] = []

    def add_images(self, batch: tuple[Tensor, ...]) -> None:
        """Take a micro-batch of images, float32 ``(batch, *shape)`` for each input."""
        self._reference.add_batch(batch)
        self._batch_sizes.append(len(batch[0]))
        if self._quantized is not None:
            self._quantized.share_inputs(self._reference)

    def network(self) -> Graph:
        """Return the graph with all rewrites and corrections."""
        return self._network

    def float_constants(self) -> dict[str, Tensor]:
        """Return the float values of the constants that differ in :meth:`network`."""
        return {
            name: tensor
            for name, tensor in self._graph.constants.items()
            if not torch.equal(tensor, self._network_constants[name])
        }

    def rewritten_constants(self) -> dict[str, Tensor]:
        """Return what rewrites made of constants, before any correction or rounding."""
        return {
            name: tensor
            for name, tensor in self._float_constants.items()
            if not torch.equal(tensor, self._graph.constants[name])
        }

    def decide(self, operation: Operation) -> Decisions:
        """Decide everything at an operation, then run it."""
        made = Decisions()
        for position, site in sorted(self._sites_at.get(operation.name, []), key=lambda entry: entry[0]):
            if site.kind != "weight":
                self._decide_format(made, site, self._choose(site, operation, position))
        # What a rewrite replaces is read by this operation, though by none of its sites, or by later ones.
        self._rewrite(made, operation)
        if operation.op in ("linear", "conv2d"):
            self._decide_layer(made, operation)
        self._run(operation)
        return made

    def apply(self, operation: Operation, made: Decisions) -> Decisions:
        """Take over decisions of an interrupted run at an operation, then run it."""
        self._replace({}, made.rewritten)
        self._network_constants.update(made.corrected)
        self.formats.update(made.formats)
        self.notes.extend(made.notes)
        self._run(operation)
        return made

    def decide_outputs(self) -> None:
        """Decide the formats of outputs that are not accumulators."""
        source = self.source
        for index, (name, value) in enumerate(self._graph.outputs):
            for batch in range(source.batches):
                self._require_finite(source.value(value, batch), f"output {name}", batch)
            for position, site in self._sites_at.get(OUTPUT, []):
                if position == index and site.name not in self.formats:
                    stats = empty()
                    for batch in range(source.batches):
                        stats = update(stats, source.value(value, batch))
                    self.formats[site.name] = search_activation(stats, self._specs[site.name])

    @property
    def source(self) -> Stream:
        """The run whose activations get formats: the quantized one where the recipe propagates it."""
        return self._reference if self._quantized is None else self._quantized

    def _rewrite(self, made: Decisions, operation: Operation) -> None:
        if operation.op == "layer_norm" and self._recipe.layer_norm_scale != "none":
            note = self._rewriter.refusal(operation)
            readers = self._rewriter.linears_of(operation)
            if note is None and readers:
                specs = [self._specs[self._site_of[readers[0], position].name] for position in (0, 1)]
                rewritten, note = self._rewriter.layer_norm_scale(operation, self.source, *specs)
                self._replace(made.rewritten, rewritten)
            if note is not None:
                made.notes.append(note)
                self.notes.append(note)
        elif operation.op == "linear" and self._recipe.centring:
            self._replace(made.rewritten, self._rewriter.centring(operation, self._reference))

    # Running ----------------------------------------------------------------------------------------

    def _read(self, operation: Operation, position: int, value: Tensor) -> Tensor:
        site = self._site_of.get((operation.name, position))
        # Weights and tables of the network lie on their grids already.
        if site is None or operation.inputs[position] in self._graph.constants:
            return value
        return apply(self.formats[site.name], value)

    def _run(self, operation: Operation) -> None:
        streams = [self._reference] if self._quantized is None else [self._reference, self._quantized]
        for stream in streams:
            stream.keep(operation)
        for stream in streams:
            stream.release(operation)

    def _replace(self, record: dict[str, Tensor], constants: Mapping[str, Tensor]) -> None:
        record.update(constants)
        self._float_constants.update(constants)
        self._network_constants.update(constants)

    def _require_finite(self, value: Tensor, where: str, batch: int) -> None:
        if not bool(torch.isfinite(value).all()):
            first = sum(self._batch_sizes[:batch])
            raise ModelError(
                f"NaN or infinity at {where} while calibrating images {first} to "
                f"{first + self._batch_sizes[batch] - 1}; "
                "check the preprocessing and run the model in float32"
            )

    # Operands ---------------------------------------------------------------------------------------

    def _decide_format(self, made: Decisions, site: Site, qparams: QParams) -> None:
        self.formats[site.name] = made.formats[site.name] = qparams
        if site.value in self._graph.constants:
            value = apply(qparams, self._network_constants[site.value])
            made.corrected[site.value] = self._network_constants[site.value] = value

    def _choose(self, site: Site, operation: Operation, position: int) -> QParams:
        spec = self._specs[site.name]
        if site.kind == "probability":
            return self._choose_probabilities(operation, spec)
        if site.value in self._graph.constants:
            constant = self._graph.constants[site.value]
            if spec.granularity == "head":
                rows = constant.movedim(HEAD_AXIS, 0).flatten(1)
                return qparams_from_range(rows.amin(1).numpy(), rows.amax(1).numpy(), spec)
            return qparams_from_range(float(constant.min()), float(constant.max()), spec)
        stats = self._histograms(site, operation, position)
        if spec.search in RANGE_SEARCHES and spec.format == "uniform":
            return search_heads(stats, spec) if spec.granularity == "head" else search_activation(stats[0], spec)
        if site.kind in ("query", "key", "value") and families_of(spec.format) == ("uniform",):
            return self._choose_attention_operand(operation, position, spec, stats)
        error = self._error_at_result(site, operation, position)
        if spec.search == "percentile_output" and spec.format == "uniform":
            return search_percentiles(stats[0], spec, error)
        return search_operand(stats[0], spec, error, families_of(spec.format))

    def _histograms(self, site: Site, operation: Operation, position: int) -> list[Histogram]:
        heads = self._heads.get(site.name)
        stats = [empty() for _ in range(heads or 1)]
        name = operation.inputs[position]
        for batch in range(self.source.batches):
            value = self.source.value(name, batch)
            self._require_finite(value, f"site {site.name}", batch)
            parts = (value,) if heads is None else value.unbind(HEAD_AXIS)
            stats = [update(known, part) for known, part in zip(stats, parts, strict=True)]
        return stats

    def _error_at_result(self, site: Site, operation: Operation, position: int) -> Error:
        """Return the error of an operand's format at the result of what reads it."""
        name = operation.inputs[position]
        if operation.op in ("linear", "conv2d") and not _is_grouped(operation):
            weight = torch.cat([self._float_constants[name].flatten(1) for name in self._weights_that_read(site)])
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
        kernel = self._graph.constants[readers[0].inputs[1]].shape[1:]
        alike = [
            reader.inputs[1]
            for reader in readers
            if reader.inputs[0] == readers[0].inputs[0]
            and self._graph.constants[reader.inputs[1]].shape[1:] == kernel
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
        other = self.formats.get(self._site_of[operation.name, 1 - position].name)
        if other is not None:
            operands[1 - position] = apply(other, operands[1 - position])

        def product_error(error: Tensor) -> Tensor:
            sides = [error, operands[1]] if position == 0 else [operands[0], error]
            return EXECUTORS["matmul"](operation, *sides).square().sum((-2, -1))

        return search_attention_operand(operands[position], product_error, spec, incumbents)

    def _choose_probabilities(self, operation: Operation, spec: QuantSpec) -> QParams:
        if self._recipe.nonlinear == "published":
            return ShiftmaxQParams(spec.bits)
        families = families_of(spec.format)
        if families == ("uniform",):
            return RowRelativeQParams(uniform_codebook(spec.bits))
        # The scores as the softmax reads them, for what it makes of them is recomputed.
        probabilities, values = (self.source.value(name, 0)[:_FEW_IMAGES] for name in operation.inputs)
        return search_probabilities(probabilities, values, spec.bits, families)

    # Layers -----------------------------------------------------------------------------------------

    def _decide_layer(self, made: Decisions, operation: Operation) -> None:
        """Choose the weights of a layer and round its bias to the steps that the program has for it."""
        site = self._site_of[operation.name, 1]
        spec = self._specs[site.name]
        _, weight_name, bias_name = operation.inputs
        weight, bias = (self._float_constants[name].to(self._device) for name in (weight_name, bias_name))
        rows, input_scale = weight.flatten(1), self._input_scale(operation)
        owned = [len(self._structure.consumers[name]) == 1 for name in (weight_name, bias_name)]
        # What other layers read as well cannot make up for the errors of one layer's inputs.
        correct = self._recipe.correction != "none" and all(owned)
        if site.edges[0][0] != operation.name:
            # Weights that several layers share were decided at the first of them.
            known = self.formats[site.name]
            assert isinstance(known, UniformQParams)
            scale = scales_of(known, rows)
            values = self._network_constants[weight_name].to(self._device).flatten(1)
            chosen = LayerWeights(scale, nearest(values, scale, bounds(spec)[1]), bias)
        elif _is_grouped(operation) or (spec.search in RANGE_SEARCHES and not correct):
            # The rows that a channel of a grouped convolution reads are not those of its neighbours.
            chosen = choose_in_range(rows, bias, spec)
        else:
            chosen = choose_by_moments(rows, bias, spec, self._moments(operation, rows.shape[1]), correct=correct)
        chosen = fit_to_bias(chosen, input_scale, spec)
        qmax = bounds(spec)[1]
        qparams = UniformQParams(tuple(float(s) for s in chosen.scale.cpu()), 0, -qmax, qmax)
        self.formats[site.name] = made.formats[site.name] = qparams
        made.corrected[weight_name] = chosen.values().reshape(weight.shape).cpu()
        if owned[1]:
            # Layers that share a bias have steps of their own for it; it stays as it is.
            made.corrected[bias_name] = round_bias(chosen, input_scale).cpu()
        self._network_constants.update(made.corrected)

    def _moments(self, operation: Operation, width: int) -> LayerMoments:
        """Return moments of what the layer reads in float, and quantized: of every other image, and of all."""
        halves = (MomentSums(width, self._device), MomentSums(width, self._device))
        seen, counts = 0, [0, 0]
        site = self._site_of[operation.name, 0]
        for batch in range(self.source.batches):
            x = self._reference.value(operation.inputs[0], batch)
            quantized = apply(self.formats[site.name], self.source.value(operation.inputs[0], batch))
            for values in (x, quantized):
                self._require_finite(values.square().sum(), f"the squares of site {site.name}", batch)
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

    def _input_scale(self, operation: Operation) -> float:
        qparams = self.formats[self._site_of[operation.name, 0].name]
        assert isinstance(qparams, UniformQParams | CodebookQParams)
        return qparams.scale[0] if isinstance(qparams, UniformQParams) else qparams.scale


def _is_grouped(operation: Operation) -> bool:
    return operation.op == "conv2d" and operation.integer("groups") > 1
