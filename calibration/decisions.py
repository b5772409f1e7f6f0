"""Decider: what calibration decides at each operation, and the two runs of the network that it decides it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from calibration.apply import apply
from calibration.cache import ActivationCache
from calibration.calibrated import QParams
from calibration.correct.least_squares import least_squares
from calibration.graph import EXECUTORS, Graph, Operation
from calibration.heads import head_counts
from calibration.moments import Moments, MomentSums
from calibration.progress import Decisions
from calibration.rewriting import Rewriter
from calibration.rules import Recipe
from calibration.sampling import layer_rows, sample_rows
from calibration.search.heads import search_attention_operand
from calibration.search.operands import apply_operand, output_error, search_operand
from calibration.search.probabilities import search_probabilities
from calibration.search.ranges import search_activation, search_heads, search_weight
from calibration.search.weights import nearest, scales_of, search_weight_feedback, search_weight_output
from calibration.sites import OUTPUT, Edge, Site, Structure
from calibration.statistics import Histogram, empty, update
from calibration.stream import Stream
from quantizers.codebook import uniform_codebook
from quantizers.errors import ModelError
from quantizers.families import families_of
from quantizers.row_relative import RowRelativeQParams
from quantizers.shiftmax import ShiftmaxQParams
from quantizers.spec import RANGE_SEARCHES, QuantSpec
from quantizers.uniform import HEAD_AXIS, UniformQParams, qparams_from_range

#: Rows, and images, on which errors of operands are measured.
_SAMPLED_ROWS, _SAMPLED_IMAGES = 512, 8
#: Rows and images for functions of single values, whose errors vary little from row to row.
_FEW_ROWS, _FEW_IMAGES = 256, 2
#: A bias of this many weight-and-input steps still leaves room for the products in int32.
_LARGEST_BIAS = 2**30
#: Largest bias, in steps, of a layer without weights: precise, and no step so small that multipliers vanish.
_BIAS_OF_DEAD_WEIGHTS = 2**20


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
        self._original = dict(graph.constants)
        # The constants change while the runs go on; operations and names do not.
        self._float = dataclasses.replace(graph, constants=dict(graph.constants))
        self._network = dataclasses.replace(graph, constants=dict(graph.constants))
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
            for name, tensor in self._original.items()
            if not torch.equal(tensor, self._network.constants[name])
        }

    def decide(self, operation: Operation) -> Decisions:
        """Decide everything at an operation, then run it."""
        made = Decisions()
        # What a rewrite replaces is read by this operation or by later ones.
        self._rewrite(made, operation)
        for position, site in sorted(self._sites_at.get(operation.name, []), key=lambda entry: entry[0]):
            if site.kind != "weight":
                self._decide_format(made, site, self._choose(site, operation, position))
        if operation.op in ("linear", "conv2d"):
            self._decide_layer(made, operation)
        self._run(operation)
        return made

    def apply(self, operation: Operation, made: Decisions) -> Decisions:
        """Take over decisions of an interrupted run at an operation, then run it."""
        self._replace({}, made.rewritten)
        self._network.constants.update(made.corrected)  # type: ignore[attr-defined]  # a dict of this object's own
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
        for graph in (self._float, self._network):
            graph.constants.update(constants)  # type: ignore[attr-defined]  # a dict of this object's own

    def _require_finite(self, value: Tensor, where: str, batch: int) -> None:
        if not bool(torch.isfinite(value).all()):
            first = sum(self._batch_sizes[:batch])
            raise ModelError(
                f"NaN or infinity at {where} while calibrating images {first} to {first + len(value) - 1}; "
                "check the preprocessing and run the model in float32"
            )

    # Operands ---------------------------------------------------------------------------------------

    def _decide_format(self, made: Decisions, site: Site, qparams: QParams) -> None:
        self.formats[site.name] = made.formats[site.name] = qparams
        if site.value in self._graph.constants:
            value = apply(qparams, self._network.constants[site.value])
            made.corrected[site.value] = value
            self._network.constants[site.value] = value  # type: ignore[index]  # a dict of this object's own

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
            return self._choose_attention_operand(site, operation, position, spec, stats)
        error = self._error_at_result(site, operation, position)
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

    def _error_at_result(self, site: Site, operation: Operation, position: int):  # type: ignore[no-untyped-def]
        """Return the error of an operand's format at the result of what reads it."""
        name = operation.inputs[position]
        producers = self._graph.producers()
        readers = [producers[edge[0]] for edge in site.edges if edge[0] in producers]
        if operation.op in ("linear", "conv2d") and not any(map(_is_grouped, readers)):
            weight = torch.cat(
                [self._float.constants[reader.inputs[1]].flatten(1) for reader in readers]
            ).to(self._device)
            return output_error(sample_rows(self.source, operation, _SAMPLED_ROWS), weight)
        if operation.op == "unary":
            x = sample_rows(self.source, operation, _FEW_ROWS)
        else:
            x = self.source.value(name, 0)[: _FEW_IMAGES if operation.op == "softmax" else _SAMPLED_IMAGES]
        if operation.op not in ("unary", "softmax"):
            return lambda qparams: float((apply_operand(x, qparams) - x).square().mean())
        executor = EXECUTORS[operation.op]
        expected = executor(operation, x)
        return lambda qparams: float((executor(operation, apply_operand(x, qparams)) - expected).square().mean())

    def _choose_attention_operand(
        self, site: Site, operation: Operation, position: int, spec: QuantSpec, stats: Sequence[Histogram]
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
        spec, first = self._specs[site.name], site.edges[0][0] == operation.name
        _, weight_name, bias_name = operation.inputs
        weight, bias = (self._float.constants[name].to(self._device) for name in (weight_name, bias_name))
        rows = weight.flatten(1)
        qmax = 2 ** (spec.bits - 1) - 1
        moments = None
        if not first:
            # Weights that several layers share were decided at the first of them.
            known = self.formats[site.name]
            assert isinstance(known, UniformQParams)
            scale = scales_of(known, rows)
            codes = nearest(self._network.constants[weight_name].to(self._device).flatten(1), scale, qmax)
        elif _is_grouped(operation) or (spec.search in RANGE_SEARCHES and self._recipe.correction == "none"):
            # The rows that a channel of a grouped convolution reads are not those of its neighbours.
            scale = scales_of(search_weight(weight, spec), rows)
            codes = nearest(rows, scale, qmax)
        else:
            halves, moments = self._moments(operation, rows.shape[1])
            alone = len(site.edges) == 1
            target = rows
            if self._recipe.correction == "least_squares" and alone:
                target = least_squares(rows, halves, moments)
            if spec.search == "feedback":
                scale, codes = search_weight_feedback(rows, target, moments, spec)
            elif spec.search == "output":
                scale = search_weight_output(target, moments, spec)
                codes = nearest(target, scale, qmax)
            else:
                scale = scales_of(search_weight(target, spec), rows)
                codes = nearest(target, scale, qmax)
            if self._recipe.correction != "none":
                bias = bias + moments.bias_change(rows, codes * scale[:, None]).to(torch.float32)
        scale, codes = self._fit_to_bias(operation, scale, codes, bias, qmax)
        qparams = UniformQParams(tuple(float(s) for s in scale.cpu()), 0, -qmax, qmax)
        self.formats[site.name] = made.formats[site.name] = qparams
        values = (codes * scale[:, None]).reshape(weight.shape).cpu()
        step = scale.to(torch.float64) * self._input_scale(operation)
        rounded = ((bias.to(torch.float64) / step).round() * step).to(torch.float32).cpu()
        for name, tensor in ((weight_name, values), (bias_name, rounded)):
            made.corrected[name] = tensor
            self._network.constants[name] = tensor  # type: ignore[index]  # a dict of this object's own

    def _moments(self, operation: Operation, width: int) -> tuple[tuple[MomentSums, MomentSums] | None, Moments]:
        """Return moments of every other image, and of all: what the layer reads in float, and quantized."""
        halves = (MomentSums(width, self._device), MomentSums(width, self._device))
        seen = 0
        site = self._site_of[operation.name, 0]
        for batch in range(self.source.batches):
            x = self._reference.value(operation.inputs[0], batch)
            quantized = apply(self.formats[site.name], self.source.value(operation.inputs[0], batch))
            for half, sums in enumerate(halves):
                mine = slice((half + seen) % 2, None, 2)
                if len(x[mine]):
                    sums.add(layer_rows(operation, x[mine], self._float), layer_rows(operation, quantized[mine], self._float))
            seen += len(x)
        if sum(self._batch_sizes) < 2:
            return None, halves[0].finish()
        return halves, (halves[0] + halves[1]).finish()

    def _input_scale(self, operation: Operation) -> float:
        qparams = self.formats[self._site_of[operation.name, 0].name]
        return float(qparams.scale[0] if isinstance(qparams, UniformQParams) else qparams.scale)  # type: ignore[union-attr]

    def _fit_to_bias(
        self, operation: Operation, scale: Tensor, codes: Tensor, bias: Tensor, qmax: int
    ) -> tuple[Tensor, Tensor]:
        """Make steps of input times weight, in which a bias is held as int32, large and small enough for it.

        Too small a step would overflow: it is raised. A channel whose weights are all zero has no step of its own and
        its scale of 1 would round the bias away: it gets the largest step of the other channels.
        """
        steps = bias.abs().to(torch.float64) / self._input_scale(operation)
        dead = (codes == 0).all(1)
        fitted = scale.to(torch.float64)
        if not bool(dead.all()):
            fitted = torch.where(dead, fitted[~dead].max(), fitted)
        elif bool((steps > 0).any()):
            fitted = torch.full_like(fitted, float(steps.max()) / _BIAS_OF_DEAD_WEIGHTS)
        fitted = torch.maximum(fitted, steps / _LARGEST_BIAS).to(torch.float32)
        raised = fitted > scale
        refitted = nearest(codes * scale[:, None], fitted, qmax)
        return fitted, torch.where((raised & ~dead)[:, None], refitted, codes)


def _is_grouped(operation: Operation) -> bool:
    return operation.op == "conv2d" and operation.integer("groups") > 1
