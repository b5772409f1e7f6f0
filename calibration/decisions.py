"""Decider: what calibration decides at each operation, and the two runs of the network that it decides it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.cache import ActivationCache
from calibration.calibrated import QParams
from calibration.choices import Chooser
from calibration.graph import Graph, Operation
from calibration.heads import head_counts
from calibration.layer_weights import round_bias
from calibration.progress import Decisions
from calibration.rewriting import Rewriter
from calibration.rules import Recipe
from calibration.search.ranges import search_activation
from calibration.sites import OUTPUT, Edge, Site, Structure
from calibration.statistics import empty, update
from calibration.stream import Stream
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams


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
        source = self._reference if self._quantized is None else self._quantized
        self._chooser = Chooser(self._float, recipe, self._reference, source, self.formats, self._site_of, device)

    def add_images(self, batch: tuple[Tensor, ...]) -> None:
        """Take a micro-batch of images, float32 ``(batch, *shape)`` for each input."""
        self._reference.add_batch(batch)
        if self._quantized is not None:
            self._quantized.share_inputs(self._reference)

    @property
    def source(self) -> Stream:
        """The run whose activations get formats: the quantized one where the recipe propagates it."""
        return self._chooser.source

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
                spec, heads = self._specs[site.name], self._heads.get(site.name)
                self._decide_format(made, site, self._chooser.operand(site, operation, position, spec, heads))
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
                self._chooser.require_finite(source.value(value, batch), f"output {name}", batch)
            for position, site in self._sites_at.get(OUTPUT, []):
                if position == index and site.name not in self.formats:
                    stats = empty()
                    for batch in range(source.batches):
                        stats = update(stats, source.value(value, batch))
                    self.formats[site.name] = search_activation(stats, self._specs[site.name])

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

    def _decide_format(self, made: Decisions, site: Site, qparams: QParams) -> None:
        self.formats[site.name] = made.formats[site.name] = qparams
        if site.value in self._graph.constants:
            value = apply(qparams, self._network_constants[site.value])
            made.corrected[site.value] = self._network_constants[site.value] = value

    def _decide_layer(self, made: Decisions, operation: Operation) -> None:
        """Choose the weights of a layer and round its bias to the steps that the program has for it."""
        site = self._site_of[operation.name, 1]
        _, weight_name, bias_name = operation.inputs
        known = None
        if site.edges[0][0] != operation.name:
            # Weights that several layers share were decided at the first of them.
            qparams = self.formats[site.name]
            assert isinstance(qparams, UniformQParams)
            known = qparams, self._network_constants[weight_name]
        spec = self._specs[site.name]
        chosen = self._chooser.layer(operation, spec, known)
        self.formats[site.name] = made.formats[site.name] = chosen.qparams(spec)
        made.corrected[weight_name] = chosen.values().reshape(self._graph.constants[weight_name].shape).cpu()
        if len(self._structure.consumers[bias_name]) == 1:
            # Layers that share a bias have steps of their own for it; it stays as it is.
            made.corrected[bias_name] = round_bias(chosen, self._chooser.input_scale(operation)).cpu()
        self._network_constants.update(made.corrected)
