"""Changes of a site's spec that could help, and a quantized network with one of them made.

Formats and weights are chosen as calibration chooses them, by :class:`calibration.choices.Chooser`, on two runs of the
network as it stands; nothing else of the network changes, so that what a change is worth can be measured by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.cache import ActivationCache
from calibration.calibrated import Calibrated, CalibratedSite, QParams
from calibration.choices import Chooser
from calibration.device import default_device
from calibration.graph import Graph, Operation
from calibration.heads import head_counts
from calibration.layer_weights import LayerWeights, round_bias
from calibration.rules import is_possible
from calibration.sites import OUTPUT, Edge, Site, Structure
from calibration.stream import Stream
from quantizers.errors import RecipeError
from quantizers.spec import QuantSpec

#: Widths that a change may go up to, the next one first.
_WIDTHS = (3, 4, 6, 8)
_ATTENTION = frozenset({"query", "key", "value"})


@dataclass(frozen=True, slots=True)
class Change:
    """Another spec for a site.

    Args:
        site: its name.
        kind: of the site.
        before: spec that it has.
        after: spec that it gets.
    """

    site: str
    kind: str
    before: QuantSpec
    after: QuantSpec

    def describe(self) -> str:
        """Return the keys of the spec that change, for people."""
        keys = [field.name for field in dataclasses.fields(QuantSpec)]
        changed = [
            f"{key} {getattr(self.before, key)} -> {getattr(self.after, key)}"
            for key in keys
            if getattr(self.before, key) != getattr(self.after, key)
        ]
        return ", ".join(changed) or "search again"


def possible_changes(calibrated: Calibrated, site: str) -> tuple[Change, ...]:
    """Return what may help a site: at the same width all that its kind allows, then the next width.

    The first change of a site that has all of that already is to search again, on the images at hand.
    """
    entry = next(entry for entry in calibrated.sites if entry.site.name == site)
    if entry.site.edges[0][0] == OUTPUT or calibrated.recipe.nonlinear == "published":
        return ()
    richest = _richest(calibrated, entry)
    specs = [richest]
    wider = [bits for bits in _WIDTHS if bits > entry.spec.bits]
    if wider:
        specs.append(dataclasses.replace(richest, bits=wider[0]))
    return tuple(Change(site, entry.site.kind, entry.spec, spec) for spec in specs)


def _richest(calibrated: Calibrated, entry: CalibratedSite) -> QuantSpec:
    spec, kind = entry.spec, entry.site.kind
    if kind == "weight":
        return dataclasses.replace(spec, search="feedback")
    if kind in ("residual", "constant", "output"):
        return dataclasses.replace(spec, search="minmax")
    if kind == "image":
        return dataclasses.replace(spec, search="mse")
    richest = dataclasses.replace(spec, search="output")
    if kind in _ATTENTION:
        heads = dataclasses.replace(richest, granularity="head", symmetric=True)
        return heads if _can_have_heads(calibrated, entry.site, heads) else richest
    affine = dataclasses.replace(richest, symmetric=False)
    coded = dataclasses.replace(affine, format="any")
    return next(s for s in (coded, affine, richest) if is_possible(calibrated.recipe, entry.site, s))


def _can_have_heads(calibrated: Calibrated, site: Site, spec: QuantSpec) -> bool:
    try:
        head_counts(calibrated.graph, [site], {site.name: spec}, calibrated.recipe)
    except RecipeError:
        return False
    return True


class ChangeMaker:
    """Makes changes of one network, at several sites in one pass over the images.

    Args:
        calibrated: the network.
        memory_limit: bytes of activations held in memory; the rest goes to files.
    """

    def __init__(self, calibrated: Calibrated, memory_limit: int) -> None:
        self._calibrated, self._memory_limit = calibrated, memory_limit
        self._sites = {entry.site.name: entry.site for entry in calibrated.sites}
        self._site_of: dict[Edge, Site] = {edge: e.site for e in calibrated.sites for edge in e.site.edges}
        self._formats: Mapping[str, QParams] = {e.site.name: e.qparams for e in calibrated.sites}
        self._structure = Structure(calibrated.graph)

    def make(
        self, changes: Sequence[Change], batches: Iterable[tuple[Tensor, ...]]
    ) -> Iterator[tuple[Change, Calibrated]]:
        """Choose each change's parameters, alone; yield the networks that have them, in execution order.

        Args:
            changes: of sites of the network.
            batches: float32 ``(batch, *shape)`` for each input.
        """
        wanted: dict[str, list[Change]] = {}
        for change in changes:
            wanted.setdefault(self._sites[change.site].edges[0][0], []).append(change)
        device = default_device()
        with ActivationCache(self._memory_limit) as cache, torch.no_grad():
            float_graph = self._calibrated.rewritten_graph()
            reference = Stream(float_graph, "float", cache, device)
            source, streams = reference, [reference]
            if self._calibrated.recipe.propagation == "quantized":
                source = Stream(self._calibrated.graph, "quantized", cache, device, self._read)
                streams.append(source)
            for batch in batches:
                reference.add_batch(batch)
            if source is not reference:
                source.share_inputs(reference)
            chooser = Chooser(
                float_graph, self._calibrated.recipe, reference, source, self._formats, self._site_of, device
            )
            for operation in self._calibrated.graph.operations:
                yield from self._make_at(chooser, float_graph, operation, wanted.pop(operation.name, []))
                if not wanted:
                    return
                for stream in streams:
                    stream.keep(operation)
                for stream in streams:
                    stream.release(operation)

    def _read(self, operation: Operation, position: int, value: Tensor) -> Tensor:
        site = self._site_of.get((operation.name, position))
        if site is None or operation.inputs[position] in self._calibrated.graph.constants:
            return value
        return apply(self._formats[site.name], value)

    def _make_at(
        self, chooser: Chooser, float_graph: Graph, operation: Operation, changes: Sequence[Change]
    ) -> Iterator[tuple[Change, Calibrated]]:
        """Make the changes of sites that an operation is the first to read."""
        specs = [change.after for change in changes if change.kind == "weight"]
        weights = iter(chooser.layer_at_each(operation, specs) if specs else ())
        for change in changes:
            site = self._sites[change.site]
            if change.kind == "weight":
                qparams, constants = self._layer(chooser, float_graph, operation, next(weights), change.after)
            else:
                qparams, constants = self._operand(chooser, float_graph, operation, site, change.after)
            yield change, with_format(self._calibrated, site.name, change.after, qparams, constants)

    def _layer(
        self, chooser: Chooser, float_graph: Graph, operation: Operation, chosen: LayerWeights, spec: QuantSpec
    ) -> tuple[QParams, dict[str, Tensor]]:
        _, weight, bias = operation.inputs
        constants = {weight: chosen.values().reshape(float_graph.constants[weight].shape).cpu()}
        if len(self._structure.consumers[bias]) == 1:
            constants[bias] = round_bias(chosen, chooser.input_scale(operation)).cpu()
        return chosen.qparams(spec), constants

    def _operand(
        self, chooser: Chooser, float_graph: Graph, operation: Operation, site: Site, spec: QuantSpec
    ) -> tuple[QParams, dict[str, Tensor]]:
        position = next(place for name, place in site.edges if name == operation.name)
        heads = None
        if spec.granularity == "head":
            heads = head_counts(float_graph, [site], {site.name: spec}, self._calibrated.recipe)[site.name]
        qparams = chooser.operand(site, operation, position, spec, heads)
        if site.value not in float_graph.constants:
            return qparams, {}
        return qparams, {site.value: apply(qparams, float_graph.constants[site.value])}


def with_format(
    calibrated: Calibrated, site: str, spec: QuantSpec, qparams: QParams, constants: Mapping[str, Tensor]
) -> Calibrated:
    """Return the network with another format of one site, and the constants that go with it."""
    entries = tuple(
        CalibratedSite(entry.site, spec, qparams) if entry.site.name == site else entry for entry in calibrated.sites
    )
    graph = dataclasses.replace(calibrated.graph, constants={**calibrated.graph.constants, **constants})
    return dataclasses.replace(calibrated, graph=graph, sites=entries)
