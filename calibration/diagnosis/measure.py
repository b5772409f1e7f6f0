"""Errors of a quantized network, layer by layer and site by site, against the float network on the same images.

A *layer* is an operation that reads quantized operands. At its result four errors are measured, as powers beside that
of the float result ``f(x, w)``, with ``x^`` what the simulation computes up to there and ``Q`` the formats:

- weight: ``f(x, Q(w)) - f(x, w)``, the bias included,
- activation: ``f(Q(x), w) - f(x, w)``,
- inherited: ``f(x^, w) - f(x, w)``, what earlier layers did,
- total: what the simulation computes against ``f(x, w)``.

Float values are those of :meth:`calibration.calibrated.Calibrated.rewritten_graph`, whose coordinates are the quantized
network's. What an error means for the network's result is priced by :mod:`calibration.diagnosis.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from calibration.apply import apply
from calibration.calibrated import Calibrated, CalibratedSite
from calibration.diagnosis.gradients import VECTORS, Effects, FloatRun, run_float
from calibration.diagnosis.readings import (
    NOTHING,
    LayerReading,
    Readings,
    SiteReading,
    level_range,
)
from calibration.graph import EXECUTORS, Executor, Operation, execute
from calibration.integerize.multipliers import Multipliers
from calibration.search.operands import local_error
from calibration.search.ranges import search_activation
from calibration.simulate import Simulation
from calibration.sites import OUTPUT
from calibration.statistics import Histogram, empty, update
from quantizers.codebook import CodebookQParams
from quantizers.spec import MAX_BITS, QuantSpec
from quantizers.uniform import UniformQParams

_SEED = 0


def measure(
    calibrated: Calibrated,
    batches: Iterable[tuple[Tensor, ...]],
    multipliers: Multipliers | None = None,
    watch: Callable[[FloatRun], None] | None = None,
) -> Readings:
    """Measure every layer and every site.

    Args:
        calibrated: a graph with formats.
        batches: float32 ``(batch, *shape)`` for each input; a few images at a time, for all values of a float run and
            their gradients are held at once.
        multipliers: what :func:`calibration.integerize.multipliers_of` returns; exact ratios where None.
        watch: called with the float run of each micro-batch, which holds the values of the rewritten graph.
    """
    meter = _Meter(calibrated, multipliers)
    for batch in batches:
        run = meter.add(batch)
        if watch is not None:
            watch(run)
    return meter.readings()


class _Meter:
    def __init__(self, calibrated: Calibrated, multipliers: Multipliers | None) -> None:
        self._calibrated, self._multipliers = calibrated, multipliers
        self.float = calibrated.rewritten_graph()
        self.site_at = {edge: entry for entry in calibrated.sites for edge in entry.site.edges}
        self.layers = {
            operation.name: operation
            for operation in self.float.operations
            if any((operation.name, position) in self.site_at for position in range(len(operation.inputs)))
        }
        self._generator = torch.Generator().manual_seed(_SEED)
        self._powers: dict[str, dict[str, float]] = {
            name: dict.fromkeys(("signal", "weight", "activation", "inherited", "total", "effect"), 0.0)
            for name in self.layers
        }
        self._values: dict[str, dict[str, float]] = {
            entry.site.name: {"signal": 0.0, "own": 0.0, "effect": 0.0} for entry in calibrated.sites
        }
        self._histograms: dict[str, Histogram] = {}
        self._expected: list[Tensor] = []
        self._found: list[Tensor] = []

    def add(self, batch: tuple[Tensor, ...]) -> FloatRun:
        run = run_float(self.float, batch, self.layers, VECTORS, self._generator)
        simulation = Simulation(self._calibrated, multipliers=self._multipliers)
        with torch.no_grad():
            batch_pass = _Pass(self, run, simulation)
            results = execute(self._calibrated.graph, batch, batch_pass.read, batch_pass.executors)
            outputs = [simulation.output(index, result) for index, result in enumerate(results)]
            self._measure_outputs(run, batch_pass)
            batch_pass.add_effects()
        self._expected.append(run.results)
        self._found.append(torch.cat([output.flatten(1) for output in outputs], 1))
        return run

    def _measure_outputs(self, run: FloatRun, batch_pass: _Pass) -> None:
        for index, (_, value) in enumerate(self.float.outputs):
            entry = self.site_at.get((OUTPUT, index))
            if entry is not None:
                x = run.values[value]
                error = apply(entry.qparams, x) - x
                self.add_value(entry, x, error)
                # The result itself: what signs make of it is its square.
                batch_pass.add_output_error(entry.site.name, float(error.square().sum()))

    def add_value(self, entry: CalibratedSite, x: Tensor, error: Tensor) -> None:
        sums = self._values[entry.site.name]
        sums["signal"] += _power(x)
        sums["own"] += _power(error)
        if entry.site.kind != "weight":
            self._histograms[entry.site.name] = update(self._histograms.get(entry.site.name, empty()), x)

    def add_power(self, operation: str, kind: str, amount: float) -> None:
        self._powers[operation][kind] += amount

    def add_effect(self, site: str, amount: float) -> None:
        self._values[site]["effect"] += amount

    def readings(self) -> Readings:
        expected, found = torch.cat(self._expected), torch.cat(self._found)
        signal = max(_power(expected), NOTHING)
        sites = {entry.site.name: self._site(entry, signal) for entry in self._calibrated.sites}
        layers = tuple(self._layer(operation, sites, signal) for operation in self.layers.values())
        return Readings(
            len(expected), layers, tuple(sites.values()), _power(expected - found) / signal, (expected, found)
        )

    def _site(self, entry: CalibratedSite, signal: float) -> SiteReading:
        values, stats = self._values[entry.site.name], self._histograms.get(entry.site.name)
        misfit = None
        if stats is not None and entry.spec.bits <= MAX_BITS and level_range(entry.qparams) is not None:
            assert isinstance(entry.qparams, UniformQParams | CodebookQParams)
            best = search_activation(stats, QuantSpec(entry.spec.bits, entry.spec.symmetric, search="mse"))
            misfit = local_error(stats, entry.qparams) / max(local_error(stats, best), NOTHING)
        own = values["own"] / max(values["signal"], NOTHING)
        return SiteReading(entry, values["effect"] / signal, own, stats, misfit)

    def _layer(self, operation: Operation, sites: Mapping[str, SiteReading], signal: float) -> LayerReading:
        sums, name = self._powers[operation.name], operation.name
        own = max(sums["signal"], NOTHING)
        edges = [(name, position) for position in range(len(operation.inputs)) if (name, position) in self.site_at]
        read = [sites[self.site_at[edge].site.name] for edge in edges]
        return LayerReading(
            operation=name,
            module=operation.module,
            op=operation.op,
            sites=tuple(site.name for site, edge in zip(read, edges, strict=True) if site.entry.site.edges[0] == edge),
            effect=sums["effect"] / signal,
            weight=sums["weight"] / own if operation.op in ("linear", "conv2d") else None,
            activation=sums["activation"] / own,
            inherited=sums["inherited"] / own,
            total=sums["total"] / own,
            fits=all(site.fits for site in read),
        )


class _Pass:
    """A micro-batch on its way through the simulation, beside its float run."""

    def __init__(self, meter: _Meter, run: FloatRun, simulation: Simulation) -> None:
        self._meter, self._run, self._simulation = meter, run, simulation
        self._raw: dict[int, Tensor] = {}
        self._site_effects: Effects[str] = Effects(run)
        self._layer_effects: Effects[str] = Effects(run)
        self._output_errors: dict[str, float] = {}
        self._seen: set[str] = set()
        self.executors: dict[str, Executor] = {
            op: self._watched({**EXECUTORS, **simulation.executors}[op]) for op in EXECUTORS
        }

    def read(self, operation: Operation, position: int, value: Tensor) -> Tensor:
        self._raw[position] = value
        return self._simulation.read(operation, position, value)

    def add_output_error(self, site: str, amount: float) -> None:
        self._output_errors[site] = self._output_errors.get(site, 0.0) + amount

    def add_effects(self) -> None:
        for name, amount in self._site_effects.squares().items():
            self._meter.add_effect(name, amount)
        for name, amount in self._layer_effects.squares().items():
            self._meter.add_power(name, "effect", amount)
        for name, amount in self._output_errors.items():
            self._meter.add_effect(name, amount)

    def _watched(self, executor: Executor) -> Executor:
        def run(operation: Operation, *operands: Tensor) -> Tensor:
            result: Tensor = executor(operation, *operands)
            if operation.name in self._meter.layers:
                self._measure(operation, operands, result)
            self._raw = {}
            return result

        return run

    def _measure(self, operation: Operation, operands: tuple[Tensor, ...], result: Tensor) -> None:
        meter, name = self._meter, operation.name
        expected = self._run.values[name]
        exact = [self._float_operand(value) for value in operation.inputs]
        is_layer = operation.op in ("linear", "conv2d")

        def error_with(changed: Mapping[int, Tensor]) -> Tensor:
            taken = [changed.get(position, operand) for position, operand in enumerate(exact)]
            made: Tensor = EXECUTORS[operation.op](operation, *taken)
            return made - expected

        meter.add_power(name, "signal", _power(expected))
        meter.add_power(name, "total", _power(result.to(torch.float32) - expected))
        own: dict[int, Tensor] = {}
        weight: dict[int, Tensor] = {}
        for position, value in enumerate(operation.inputs):
            entry = meter.site_at.get((name, position))
            if entry is None:
                continue
            if is_layer and position == 1:
                # A bias is held in steps of the weight's and the input's: its rounding goes with the weight.
                weight = {1: operands[1].to(torch.float32), 2: operands[2].to(torch.float32)}
                read, error = weight[1], error_with(weight)
                meter.add_power(name, "weight", _power(error))
            else:
                # Tables lie on their grids already in the quantized graph.
                is_table = value in meter.float.constants
                read = operands[position].to(torch.float32) if is_table else apply(entry.qparams, exact[position])
                own[position] = read
                error = error_with({position: read})
            self._site_effects.add(entry.site.name, name, error)
            if entry.site.name not in self._seen:
                self._seen.add(entry.site.name)
                meter.add_value(entry, exact[position], read - exact[position])
        if own:
            meter.add_power(name, "activation", _power(error_with(own)))
        # Together: corrected weights make up for the errors of what they read.
        self._layer_effects.add(name, name, error_with({**own, **weight}))
        raw = {
            position: value.to(torch.float32)
            for position, value in self._raw.items()
            if operation.inputs[position] not in meter.float.constants
        }
        meter.add_power(name, "inherited", _power(error_with(raw)))

    def _float_operand(self, value: str) -> Tensor:
        constants = self._meter.float.constants
        return constants[value][None] if value in constants else self._run.values[value]


def _power(x: Tensor) -> float:
    return float(x.to(torch.float64).square().sum())
