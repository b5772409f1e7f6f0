"""Mixed precision: the width of every weight, searched for an accuracy, a size or a time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from calibration.cache import DEFAULT_MEMORY_LIMIT
from calibration.engine import Progress
from calibration.mixed_precision.candidates import choose_candidates, weight_sites
from calibration.mixed_precision.sensitivity import sensitivities
from calibration.rules import Recipe
from ptq import api
from ptq.data import iterate_images
from ptq.mixed_precision.accuracy import Drop, Judge, Labelled
from ptq.mixed_precision.costs import measure_costs, useful_widths
from ptq.mixed_precision.front import Point, Table
from ptq.mixed_precision.goal import STORES, Goal
from ptq.mixed_precision.networks import Networks, first_output
from ptq.mixed_precision.recipe import mixed_recipe
from ptq.mixed_precision.walk import smallest_within
from ptq.nearest_neighbours import make_bank
from ptq.preprocessing import Preprocessing
from ptq.recipes import DEFAULT_METHOD, named_recipe
from quantizers.errors import DataError, UsageError
from quantizers.spec import MAX_BITS, MIN_BITS

DEFAULT_BITS = (3, 4, 6, 8)
#: Budgets along the front.
DEFAULT_POINTS = 17


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What was found.

    Args:
        goal: what was asked for.
        recipe: what ``ptq quantize --recipe`` takes.
        chosen: the point that the recipe stands for.
        front: choices of widths, cheapest first, each with less predicted error than those before it.
        table: sensitivities and costs of every weight.
        baseline: the network with all weights at 8 bits; measured where there were labels.
        quantized: the network calibrated anew with the recipe; None where nothing was measured.
        calibration_images: how many calibrated.
        measured_images: how many measured; 0 where none had labels.
        provenance: where it comes from; texts.
    """

    goal: Goal
    recipe: Recipe
    chosen: Point
    front: tuple[Point, ...]
    table: Table
    baseline: Point
    quantized: api.Quantized | None = field(repr=False)
    calibration_images: int
    measured_images: int
    provenance: Mapping[str, str]


def search(
    model: nn.Module,
    calibration: Iterable[Any],
    measured: Labelled | None = None,
    *,
    max_drop: float | None = None,
    size_budget: float | None = None,
    latency_budget: float | None = None,
    bits: Sequence[int] = DEFAULT_BITS,
    activation_bits: int = 8,
    method: str = DEFAULT_METHOD,
    store: str = STORES[0],
    bank: Labelled | None = None,
    num_classes: int | None = None,
    threads: int | None = None,
    points: int = DEFAULT_POINTS,
    example_inputs: tuple[Tensor, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, str] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> SearchResult:
    """Choose a width for every weight; give exactly one of the three goals.

    Args:
        model: as :func:`ptq.quantize` has it.
        calibration: images, as :func:`ptq.quantize` has them; read once and held, for they calibrate twice.
        measured: batches of other images, float32 (batch, C, H, W), and their labels, int64 (batch,), anew in every
            pass: a list, a data loader, or what :meth:`ptq.data.ImageData.batches` returns. Needed for ``max_drop``.
        max_drop: points of top-1 that may be lost against float, one standard error of the measurement included.
        size_budget: share, between 0 and 1, of the bytes that all weights take at 8 bits.
        latency_budget: milliseconds of all kernels at batch 1.
        bits: widths to choose from, 2 to 8 each.
        activation_bits: of everything that has the activations' width, 2 to 8.
        method: a key of :data:`ptq.recipes.RECIPES`.
        store: where bytes are counted: ``bundle`` or ``artifact``.
        bank: labelled images whose float features vote, for networks that give features; as ``measured``.
        num_classes: labels have to be less; the width of the results where absent.
        threads: with which kernels are timed and networks measured; all cores where absent.
        points: budgets along the front, at least 2.
        example_inputs: as :func:`ptq.quantize` has them.
        preprocessing: kept in the network that is measured.
        provenance: texts that are kept in the result.
        total: number of measured images if known, for progress only.
        progress: called with a stage, what is done and what there is to do.
        memory_limit: bytes of activations held in memory.

    Raises:
        UsageError: no goal or several, impossible widths, or a goal that no choice of widths reaches.
        DataError: images or labels that cannot be used.
    """
    goal = Goal(max_drop, size_budget, latency_budget)
    widths = _checked(bits, store, points)
    if goal.max_drop is not None and measured is None:
        raise UsageError("max_drop needs labelled images to measure on; give them, or a size or latency budget")
    images = _stacked(calibration)
    settings: dict[str, Any] = {
        "example_inputs": example_inputs if example_inputs is not None else (images[:1],),
        "preprocessing": preprocessing,
        "provenance": provenance,
        "total": len(images),
        "progress": progress,
        "memory_limit": memory_limit,
    }
    base_recipe = named_recipe(method, f"w{MAX_BITS}a{activation_bits}")
    base = api.quantize(model, images, recipe=base_recipe, **settings)
    needed = tuple(sorted({*widths, MAX_BITS}))
    candidates = choose_candidates(base.calibrated, needed, images, memory_limit=memory_limit, progress=progress)
    prices = sensitivities(base.calibrated, candidates, images, progress=progress)
    networks = Networks(base.calibrated, candidates, threads)
    costs = measure_costs(networks, needed, progress)
    table = Table(prices, costs, widths, store)
    baseline = Table(prices, costs, (MAX_BITS,), store).point((0,) * len(prices))
    front = table.front(points, by_time=goal.latency_budget is not None)
    # An impossible budget is refused before anything is measured.
    wanted = None if goal.max_drop is not None else table.within(goal)
    sites = {entry.site.name: entry.site for entry in weight_sites(base.calibrated)}

    def recipe_of(point: Point) -> Recipe:
        return mixed_recipe(base_recipe, sites, point.widths, f"{method}-mixed-a{activation_bits}")

    def result(chosen: Point, quantized: api.Quantized | None, images_measured: int) -> SearchResult:
        return SearchResult(
            *(goal, recipe_of(chosen), chosen, front, table, baseline, quantized),
            *(len(images), images_measured, base.metadata()),
        )

    if measured is None:
        assert wanted is not None
        return result(wanted, None, 0)
    judge = _judge(base, measured, bank, num_classes, total, progress)

    def assembled(point: Point) -> Drop:
        return judge.measure(networks.run(point.widths), f"measure {point.ratio:.2f} times smaller")

    baseline = dataclasses.replace(baseline, drop=assembled(baseline))
    runs = itertools.count(1)

    def rerun(point: Point) -> tuple[api.Quantized, Drop]:
        stage = f"recipe {next(runs)}: "
        renamed = None if progress is None else lambda name, *counts: progress(stage + name, *counts)
        quantized = api.quantize(model, images, recipe=recipe_of(point), **{**settings, "progress": renamed})
        return quantized, judge.measure(first_output(quantized.compile("cpu", threads)), f"{stage}measure")

    if wanted is not None:
        quantized, final = rerun(wanted)
        return result(dataclasses.replace(wanted, final=final), quantized, judge.images)
    assert goal.max_drop is not None
    chosen, quantized, front = smallest_within(goal.max_drop, front, assembled, rerun)
    return result(chosen, quantized, judge.images)


def _judge(
    base: api.Quantized,
    measured: Labelled,
    bank: Labelled | None,
    num_classes: int | None,
    total: int | None,
    progress: Progress | None,
) -> Judge:
    float_run = first_output(base.float)
    if bank is not None:
        made = make_bank(float_run, bank)
        return Judge(float_run, measured, made.classify, made.num_classes, total, progress)
    shape = base.calibrated.graph.shapes()[base.calibrated.graph.outputs[0][1]]
    if len(shape) != 1:
        raise UsageError(
            f"the network's result has shape {shape} for each image, no logits: top-1 needs a bank of labelled images"
        )
    return Judge(float_run, measured, lambda logits: logits.argmax(-1), num_classes or shape[0], total, progress)


def _stacked(calibration: Iterable[Any]) -> Tensor:
    images = list(iterate_images(calibration))
    if not images:
        raise DataError("calibration needs at least one image, got none")
    return torch.stack(images)


def _checked(bits: Sequence[int], store: str, points: int) -> tuple[int, ...]:
    if store not in STORES:
        raise UsageError(f"bytes are counted in {' or '.join(STORES)}, got {store!r}")
    wrong = [width for width in bits if not MIN_BITS <= width <= MAX_BITS]
    if wrong or not bits:
        found = ", ".join(map(str, bits)) or "nothing"
        raise UsageError(f"bits are widths of {MIN_BITS} to {MAX_BITS}, got {found}")
    if points < 2:
        raise UsageError(f"a front has at least 2 points, got {points}")
    return useful_widths(bits, store)


__all__ = ["DEFAULT_BITS", "DEFAULT_POINTS", "SearchResult", "search"]
