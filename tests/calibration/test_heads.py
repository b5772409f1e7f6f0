"""A scale for each head of queries, keys and values: where it comes from, where it goes, and what it is good for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.heads import KINDS, head_recipe, uneven_heads
from support.models import MODELS, Formula, calibrated, images, recipe, spread, traced
from support.stepwise import steps_apart
from torch import Tensor, nn

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import EXECUTORS, Operation, execute
from calibration.heads import before_concat, before_view
from calibration.integerize import integerize
from calibration.progress import ProgressStore
from calibration.rules import Recipe, Rule
from calibration.search.ranges import search_activation, search_heads
from calibration.serialize import calibrated_from_bytes, calibrated_to_bytes
from calibration.simulate import simulate
from calibration.statistics import Histogram, empty, update
from calibration.trace import trace
from quantizers.errors import RecipeError
from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram, Node
from quantizers.spec import RANGE_SEARCHES, QuantSpec
from quantizers.uniform import HEAD_AXIS, UniformQParams

UNTIMED = settings(deadline=None)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def formats(result: Calibrated) -> dict[str, UniformQParams]:
    """The formats of queries, keys and values by the name of their site."""
    return {entry.site.name: entry.qparams for entry in result.sites if entry.site.kind in KINDS}


def nodes(program: IntegerProgram, op: str) -> list[Node]:
    return [node for node in program.nodes if node.op == op]


# Formats before a view --------------------------------------------------------------------------------


@st.composite
def viewed(draw: st.DrawFn) -> tuple[Operation, tuple[int, ...], int]:
    """A view, the shape of its operand, and an axis of its result that has more than one index."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    match draw(st.sampled_from(["reshape", "permute", "slice"])):
        case "permute":
            axes = tuple(draw(st.permutations(range(len(shape)))))
            operation = Operation("y", "permute", ("x",), {"axes": axes}, tuple(shape[axis] for axis in axes))
        case "slice":
            axis = draw(st.integers(0, len(shape) - 1))
            start = draw(st.integers(0, shape[axis] - 1))
            stop, step = draw(st.integers(start + 1, shape[axis])), draw(st.integers(1, 2))
            attributes = {"axis": axis, "start": start, "stop": stop, "step": step}
            extents = (*shape[:axis], len(range(start, stop, step)), *shape[axis + 1 :])
            operation = Operation("y", "slice", ("x",), attributes, extents)
        case _:
            rest, extents = int(np.prod(shape)), []
            while rest > 1:
                extents.append(draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
                rest //= extents[-1]
            extents = tuple(extents) or (1,)
            operation = Operation("y", "reshape", ("x",), {"shape": extents}, extents)
    axes = [axis for axis, extent in enumerate(operation.shape) if extent > 1]
    if not axes:
        return draw(viewed())
    return operation, shape, draw(st.sampled_from(axes)) - len(operation.shape)


@UNTIMED
@given(viewed())
def test_a_format_before_a_view_gives_each_element_the_scale_that_it_has_behind(
    case: tuple[Operation, tuple[int, ...], int],
) -> None:
    """Whatever the view, the scales of the operand, viewed, are the result's; None only where no axis has them."""
    operation, shape, axis = case
    qparams = UniformQParams(tuple(1.0 + i for i in range(operation.shape[axis])), 0, -128, 127, axis)
    wanted = torch.from_numpy(np.broadcast_to(qparams.scales(), operation.shape).copy())
    before = before_view(operation, shape, qparams)
    if before is not None:
        scales = torch.from_numpy(np.broadcast_to(before.scales(), shape).copy())
        assert torch.equal(EXECUTORS[operation.op](operation, scales[None])[0], wanted)
        return
    assert operation.op == "reshape"
    scales = wanted.reshape(shape)
    constant = [bool((scales == scales.narrow(i, 0, 1)).all()) for i in range(len(shape))]
    assert constant.count(False) > 1


def test_a_concatenation_splits_the_scales_of_its_axis() -> None:
    """Along the joined axis each part has its own scales; along any other, all of them."""
    operation = Operation("y", "concat", ("a", "b"), {"axis": 0}, (3, 4, 5))
    qparams = UniformQParams((1.0, 2.0, 3.0), 0, -128, 127, -3)
    parts = before_concat(operation, [(1, 4, 5), (2, 4, 5)], qparams)
    assert [part.scale for part in parts] == [(1.0,), (2.0, 3.0)]
    other = UniformQParams((1.0, 2.0, 3.0, 4.0), 0, -128, 127, -2)
    assert before_concat(operation, [(1, 4, 5), (2, 4, 5)], other) == [other, other]


# Ranges -----------------------------------------------------------------------------------------------


def statistics(heads: Tensor) -> list[Histogram]:
    return [update(empty(), head) for head in heads]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("search", RANGE_SEARCHES)
def test_each_symmetric_head_has_the_format_that_it_has_alone(search: str, bits: int) -> None:
    heads = torch.randn((3, 5000), generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.1], [30.0]])
    alone = [search_activation(stats, QuantSpec(bits, search=search)) for stats in statistics(heads)]
    found = search_heads(statistics(heads), QuantSpec(bits, granularity="head", search=search))
    assert found == UniformQParams(tuple(q.scale[0] for q in alone), 0, alone[0].qmin, alone[0].qmax, HEAD_AXIS)


RANGES = st.lists(st.tuples(st.floats(-1e4, 0), st.floats(0, 1e4)), min_size=2, max_size=4)


@UNTIMED
@given(RANGES, st.integers(2, 8))
def test_heads_share_a_zero_point_with_which_no_range_is_clipped(ranges: list[tuple[float, float]], bits: int) -> None:
    """Every range fits, and no scale is finer than that of a zero point of the head's own."""
    stats = statistics(torch.tensor(ranges))
    found = search_heads(stats, QuantSpec(bits, symmetric=False, granularity="head"))
    for head, scale in zip(stats, found.scale, strict=True):
        slack = 1 + 1e-6
        assert (found.qmin - found.zero_point) * scale * slack <= head.low
        assert (found.qmax - found.zero_point) * scale * slack >= head.high
        assert scale * slack >= (head.high - head.low) / (found.qmax - found.qmin)


def test_heads_of_equal_proportions_lose_nothing_by_their_zero_point() -> None:
    """Ranges that differ by a factor have the scales of their own."""
    stats = statistics(torch.tensor([[-1.0, 2.0], [-10.0, 20.0], [-0.1, 0.2]]))
    spec = QuantSpec(8, symmetric=False, granularity="head")
    found = search_heads(stats, spec)
    assert found.zero_point == -128 + 85
    assert np.allclose(found.scale, [3 / 255, 30 / 255, 0.3 / 255], rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_head_without_values_has_the_largest_scale_of_the_others(symmetric: bool) -> None:
    """A scale of 1 beside others of 1e-6 would take 20 bits from the multipliers that share its shift."""
    stats = statistics(torch.tensor([[-1e-6, 1e-6], [0.0, 0.0], [-1e-7, 1e-7]]))
    found = search_heads(stats, QuantSpec(8, symmetric=symmetric, granularity="head"))
    assert found.scale[1] == found.scale[0] < 1e-7
    nothing = search_heads(statistics(torch.zeros(2, 3)), QuantSpec(8, symmetric=symmetric, granularity="head"))
    assert nothing.scale == (1.0, 1.0)


@pytest.mark.parametrize("name", ["ours", "swin"])
def test_statistics_are_those_of_the_heads(name: str) -> None:
    """``minmax`` of each head is its largest magnitude among all images, tokens and windows."""
    result, x = calibrated(name, head_recipe()), images(name, 16, seed=1)
    peaks: dict[str, Tensor] = {}
    names = {entry.site.edges[0]: entry.site.name for entry in result.sites if entry.site.kind in KINDS}

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        if (operation.name, position) in names:
            heads = value.movedim(HEAD_AXIS, 0).flatten(1)
            peaks[names[operation.name, position]] = heads.abs().amax(1)
        return value

    execute(result.float_graph(), (x,), on_edge)
    for site, qparams in formats(result).items():
        assert np.allclose(qparams.scale, peaks[site].numpy() / 127, rtol=1e-5), site


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    """Formats with a scale for each head are kept and restored as others are."""
    x, store, chosen = [(image,) for image in images("ours", 19)], ProgressStore(tmp_path, "key"), head_recipe()
    names = [operation.name for operation in traced("ours").operations]
    sites = [entry.site for entry in calibrated("ours", chosen).sites if entry.site.kind in KINDS]
    last = max(names.index(site.edges[0][0]) for site in sites)

    def progress(stage: str, done: int, _total: int) -> None:
        if (stage, done) == ("calibrate", last + 1):
            raise KeyboardInterrupt

    whole = calibrate(traced("ours"), x, chosen)
    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), x, chosen, store=store, progress=progress)
    again = calibrate(traced("ours"), x, chosen, store=store)
    assert calibrated_to_bytes(again) == calibrated_to_bytes(whole)


def test_a_round_trip_keeps_the_axis() -> None:
    result = calibrated("ours", head_recipe())
    files = calibrated_to_bytes(result)
    again = calibrated_from_bytes(*files)
    assert again.sites == result.sites
    assert {qparams.axis for qparams in formats(again).values()} == {HEAD_AXIS}
    assert calibrated_to_bytes(again) == files


# Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight", "probability", "scores", "linear_input", "residual"])
def test_other_kinds_have_no_heads(kind: str) -> None:
    expected = "'channel'" if kind == "weight" else "'tensor'"
    with pytest.raises(RecipeError, match=rf"\({kind}\) needs granularity {expected}, the rule says 'head'"):
        calibrated("ours", Recipe("r", (Rule(QuantSpec(8, granularity="head"), kind), *recipe().rules)))


def test_queries_have_a_scale_or_one_for_each_head() -> None:
    with pytest.raises(RecipeError, match="needs granularity 'tensor' or 'head', the rule says 'channel'"):
        calibrated("ours", Recipe("r", (Rule(QuantSpec(8, granularity="channel"), "query"), *recipe().rules)))


def _attention(x: Tensor, *layers: nn.Module) -> Tensor:
    scores = layers[0](x) @ layers[1](x).transpose(-1, -2)
    return layers[-1](scores.softmax(-1) @ layers[2](x))


def _windows(x: Tensor, *layers: nn.Module) -> Tensor:
    """One head in four windows of an image, so that axis -3 of the operands is made of two axes of the tokens."""
    batch, side, _, width = x.shape
    parts = [
        layer(x)
        .reshape(batch, 2, side // 2, 2, side // 2, width)
        .permute(0, 1, 3, 2, 4, 5)
        .reshape(batch, 4, -1, width)
        for layer in layers[:3]
    ]
    return layers[3]((parts[0] @ parts[1].transpose(-1, -2)).softmax(-1) @ parts[2])


def _activated(x: Tensor, *layers: nn.Module) -> Tensor:
    parts = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in layers[:3]]
    mixed = (parts[0].relu() @ parts[1].transpose(-1, -2)).softmax(-1) @ parts[2]
    return layers[3](mixed.transpose(1, 2).flatten(2))


def _raw(x: Tensor, *layers: nn.Module) -> Tensor:
    split = x.unflatten(-1, (2, 4)).transpose(1, 2)
    parts = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in layers[:2]]
    return ((split @ parts[0].transpose(-1, -2)).softmax(-1) @ parts[1]).flatten(2)


IMPOSSIBLE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], str]] = {
    "no head axis": (_attention, (5, 8), "its shape (5, 8) is not (..., heads, rows, columns)"),
    "windows instead of heads": (_windows, (4, 4, 8), "its heads are no axis of "),
    "a table": (_activated, (5, 8), "unary relu makes codes of one scale"),
    "the image": (_raw, (5, 8), "it is an image, which has one scale"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_sites_that_cannot_tell_heads_apart_are_refused_by_name(case: str) -> None:
    """Before any image is run."""
    function, shape, message = IMPOSSIBLE[case]
    module = Formula(function, *(nn.Linear(8, 8) for _ in range(4)))
    graph = trace(spread(module), (torch.randn(2, *shape),))
    with pytest.raises(
        RecipeError, match=r"recipe heads: site \S+ \(query\) cannot have a scale for each head: " + re.escape(message)
    ) as caught:
        calibrate(graph, [], head_recipe())
    assert str(caught.value).endswith("; give it granularity 'tensor'")


# The program ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "search", "symmetric", "nonlinear"),
    [
        (8, "minmax", True, "corrected"),
        (4, "mse", False, "corrected"),
        (8, "percentile", False, "corrected"),
        (8, "minmax", True, "published"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_each_operator_is_the_simulations(name: str, bits: int, search: str, symmetric: bool, nonlinear: str) -> None:
    """Given the same input codes, every operator's codes are the simulation's to one step, and mostly equal.

    One in fifty differs at most, and two more: the smallest results have a hundred values.
    """
    result = calibrated(name, head_recipe(bits, search, symmetric=symmetric, nonlinear=nonlinear))
    for site, steps in steps_apart(result, images(name, 4, seed=9)).items():
        assert float(steps.max()) <= 1, site
        assert int((steps > 0).sum()) <= steps.numel() / 50 + 2, site


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_integers_are_as_good_as_the_simulation(name: str, symmetric: bool) -> None:
    x = images(name, 8, seed=5)
    result = calibrated(name, head_recipe(search="mse", symmetric=symmetric))
    (exact,), (simulated,) = execute(result.float_graph(), (x,)), simulate(result, (x,))
    (integers,) = interpret(integerize(result), x)
    assert relative(integers, simulated) < relative(simulated, exact)
    assert relative(integers, exact) < 1.3 * relative(simulated, exact)


@pytest.mark.parametrize("name", ["ours", "swin"])
def test_scales_of_heads_cost_no_operator(name: str) -> None:
    """The program has the operators of one scale a tensor; only constants have an entry for each head."""
    single, program = (integerize(calibrated(name, chosen)) for chosen in (recipe(), head_recipe()))
    assert [node.op for node in program.nodes] == [node.op for node in single.nodes]
    for node, other in zip(nodes(program, "normalize_rows"), nodes(single, "normalize_rows"), strict=True):
        assert program.constants[node.inputs[2]].shape == (node.type.shape[HEAD_AXIS], 1, 1)
        assert single.constants[other.inputs[2]].shape == (1,)


def test_equal_heads_have_one_numerator() -> None:
    """Kernels have a single numerator as an immediate."""
    result = calibrated("ours", head_recipe())
    equal = [
        type(entry)(
            entry.site,
            entry.spec,
            UniformQParams((entry.qparams.scale[0],) * 3, 0, -128, 127, HEAD_AXIS)
            if entry.site.kind in KINDS
            else entry.qparams,
        )
        for entry in result.sites
    ]
    program = integerize(Calibrated(result.graph, result.recipe, tuple(equal), 1, ""))
    assert {program.constants[node.inputs[2]].shape for node in nodes(program, "normalize_rows")} == {(1,)}


def _normed(x: Tensor, *layers: nn.Module) -> Tensor:
    """Queries of a norm over the channels, keys with a token in front, values that are a sum."""
    batch, tokens, heads = *x.shape[:2], (2, 4)
    query = layers[4](layers[0](x)).unflatten(-1, heads).transpose(1, 2)
    key = torch.cat([layers[5].bias.expand(batch, 1, 8), layers[1](x)[:, 1:]], 1).unflatten(-1, heads).transpose(1, 2)
    value = (layers[2](x) + layers[5](x)).reshape(batch, tokens, *heads).permute(0, 2, 1, 3)
    mixed = ((query @ key.transpose(-1, -2)) * 0.5).softmax(-1) @ value
    return layers[3](mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("nonlinear", ["corrected", "published"])
def test_heads_behind_a_norm_a_concatenation_and_a_sum(nonlinear: str) -> None:
    """Not only linears make codes of several scales."""
    linears = [nn.Linear(8, 8) for _ in range(4)]
    module = spread(Formula(_normed, *linears, nn.LayerNorm(8), nn.Linear(8, 8)))
    x = torch.randn((8, 5, 8), generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0] * 4 + [8.0] * 4)
    result = calibrate(trace(module, (x[:2],)), [(image,) for image in x], head_recipe(nonlinear=nonlinear))
    assert all(len(qparams.scale) == 2 for qparams in formats(result).values())
    assert all(float(steps.max()) <= 1 for steps in steps_apart(result, x).values())
    (exact,), (integers,) = execute(result.float_graph(), (x,)), interpret(integerize(result), x)
    assert relative(integers, exact) < 0.1


# The promise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("search", [*RANGE_SEARCHES, "output"])
def test_heads_of_different_magnitude_are_better_served_by_scales_of_their_own(search: str, bits: int) -> None:
    """Heads whose queries, keys and values differ by ten, in simulation and in integers alike."""
    graph, x = uneven_heads()
    errors = {}
    for granularity in ("tensor", "head"):
        result = calibrate(graph, [(i,) for i in x], head_recipe(bits, search, granularity=granularity, rest=8))
        (exact,), (simulated,) = execute(graph, (x,)), simulate(result, (x,))
        (integers,) = interpret(integerize(result), x)
        errors[granularity] = relative(simulated, exact), relative(integers, exact)
    for single, heads in zip(errors["tensor"], errors["head"], strict=True):
        assert heads < single
