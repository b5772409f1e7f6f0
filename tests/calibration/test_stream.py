"""Laws of the stream: the values of a run over the whole graph, an operation at a time, and nothing kept too long."""

from __future__ import annotations

import pytest
import torch
from support.models import images, traced
from torch import Tensor

from calibration.apply import apply
from calibration.cache import ActivationCache, Key
from calibration.calibrated import Calibrated, CalibratedSite
from calibration.decisions import Decider
from calibration.graph import VIEWS, Graph, Operation, execute
from calibration.rules import assign_specs
from calibration.simulate import simulate
from calibration.sites import find_sites
from calibration.stream import Stream
from ptq.recipes import named_recipe

CPU = torch.device("cpu")
#: What the stream computes again instead of keeping it.
CHEAP = VIEWS | {"scale", "unary", "softmax"}


class ListedCache(ActivationCache):
    """A cache that tells its keys."""

    def known(self) -> set[Key]:
        return {*self._tensors, *self._files}


def double(_: Operation, __: int, value: Tensor) -> Tensor:
    return 2 * value


def streamed(graph: Graph, cache: ActivationCache, batches: list[Tensor]) -> Stream:
    stream = Stream(graph, "float", cache, CPU)
    for batch in batches:
        stream.add_batch((batch,))
    return stream


def expected_values(graph: Graph, batch: Tensor) -> dict[tuple[str, int], Tensor]:
    """Return what every edge reads in a run of the whole graph."""
    seen: dict[tuple[str, int], Tensor] = {}

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        seen[operation.name, position] = value
        return value

    for index, result in enumerate(execute(graph, (batch,), on_edge)):
        seen["@output", index] = result
    return seen


def needed_after(graph: Graph, position: int) -> set[str]:
    """Return the inputs and results of dear operations up to a position that a later operation or an output needs."""
    producers = graph.producers()
    done = {operation.name for operation in graph.operations[: position + 1]} | {name for name, _ in graph.inputs}
    found: set[str] = set()
    visited: set[str] = set()

    def visit(name: str) -> None:
        if name in visited:
            return
        visited.add(name)
        operation = producers.get(name)
        if name in done and name not in graph.constants and (operation is None or operation.op not in CHEAP):
            found.add(name)
        elif operation is not None:
            for source in operation.inputs:
                visit(source)

    for operation in graph.operations[position + 1 :]:
        for name in operation.inputs:
            visit(name)
    for _, value in graph.outputs:
        visit(value)
    return found


@pytest.mark.parametrize(
    ("name", "limit"), [("ours", 0), ("ours", 5000), *((name, 1 << 30) for name in ("deit", "swin", "transformers"))]
)
def test_values_are_those_of_the_whole_graph(name: str, limit: int) -> None:
    """Bit for bit, on every edge, before an operation runs and as long as anything reads it."""
    graph, batches = traced(name), list(images(name, 5).split(3))
    expected = [expected_values(graph, batch) for batch in batches]
    with ActivationCache(limit) as cache:
        stream = streamed(graph, cache, batches)
        for operation in graph.operations:
            for batch, values in enumerate(expected):
                for position in range(len(operation.inputs)):
                    assert torch.equal(stream.operand(operation, position, batch), values[operation.name, position])
            stream.keep(operation)
            stream.release(operation)
        for index, (_, value) in enumerate(graph.outputs):
            for batch, values in enumerate(expected):
                assert torch.equal(stream.value(value, batch), values["@output", index])


@pytest.mark.parametrize("name", ["ours", "deit", "swin", "transformers", "dinov2"])
def test_what_is_kept_is_what_is_still_read(name: str) -> None:
    """After every operation the cache holds each value that is needed later, and no other."""
    graph, batches = traced(name), list(images(name, 2).split(1))
    with ListedCache() as cache:
        stream = streamed(graph, cache, batches)
        for index, operation in enumerate(graph.operations):
            stream.keep(operation)
            stream.release(operation)
            wanted = {("float", name, batch) for name in needed_after(graph, index) for batch in range(2)}
            assert cache.known() == wanted, operation.name


def test_streams_of_one_cache_do_not_mix() -> None:
    """Two runs under their own labels; shared inputs are held once."""
    graph, x = traced("ours"), images("ours", 2)
    with ListedCache() as cache:
        reference = streamed(graph, cache, [x])
        doubled = Stream(graph, "doubled", cache, CPU, double)
        doubled.share_inputs(reference)
        assert {key[0] for key in cache.known()} == {"float"}
        first = graph.operations[0]
        for stream in (reference, doubled):
            stream.keep(first)
        expected = execute(graph, (x,), double)
        assert not torch.equal(reference.value(first.name, 0), doubled.value(first.name, 0))
        for operation in graph.operations[1:]:
            doubled.keep(operation)
        assert torch.equal(doubled.value(graph.outputs[0][1], 0), expected[0])


@pytest.mark.parametrize(("name", "method"), [("ours", "auto"), ("swin", "repq"), ("transformers", "dopq")])
def test_the_quantized_stream_is_the_simulation(name: str, method: str) -> None:
    """What calibration has seen at the end is what the simulation gives for them, to the rounding of float32."""
    graph, batches, recipe = traced(name), list(images(name, 6).split(3)), named_recipe(method, "w4a4")
    sites = find_sites(graph)
    specs = assign_specs(sites, recipe)
    with ActivationCache() as cache, torch.no_grad():
        decider = Decider(graph, sites, specs, recipe, cache, CPU)
        for batch in batches:
            decider.add_images((batch,))
        for operation in graph.operations:
            decider.decide(operation)
        decider.decide_outputs()
        entries = tuple(CalibratedSite(site, specs[site.name], decider.formats[site.name]) for site in sites)
        result = Calibrated(decider.network(), recipe, entries, 6, "", decider.float_constants())
        formats = result.by_edge()
        for index, batch in enumerate(batches):
            simulated = simulate(result, (batch,))
            for position, (expected, (_, value)) in enumerate(zip(simulated, graph.outputs, strict=True)):
                found = decider.source.value(value, index)
                qparams = formats.get(("@output", position))
                seen = found if qparams is None else apply(qparams, found)
                torch.testing.assert_close(expected, seen, rtol=1e-4, atol=1e-4)
