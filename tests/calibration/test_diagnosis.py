"""Laws of the diagnosis: errors are what they say, the worst layer is the one with the fault, changes are real."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.models import MODELS, images, spread, traced
from torch import Tensor, nn

from calibration.calibrated import Calibrated
from calibration.diagnosis.changes import ChangeMaker, possible_changes, with_format
from calibration.diagnosis.details import DetailsMeter
from calibration.diagnosis.gradients import run_float
from calibration.diagnosis.measure import measure
from calibration.diagnosis.readings import LayerReading, decibel
from calibration.diagnosis.suggest import combine, output_error, run, suggest
from calibration.engine import calibrate
from calibration.graph import EXECUTORS, execute
from calibration.integerize import integerize, multipliers_of
from calibration.simulate import simulate
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.integer.interpret import interpret
from quantizers.uniform import UniformQParams

LIMIT = 1 << 27


def network(name: str, method: str, bits: str) -> Calibrated:
    return calibrate(traced(name), [(image,) for image in images(name, 8, seed=1)], named_recipe(method, bits))


def batches(name: str, count: int = 8) -> list[tuple[Tensor, ...]]:
    return [(batch,) for batch in images(name, count, seed=2).split(4)]


def scaled(calibrated: Calibrated, site: str, factor: float) -> Calibrated:
    """Multiply the scale of a site, and with it what the codes of a weight stand for."""
    entry = next(entry for entry in calibrated.sites if entry.site.name == site)
    assert isinstance(entry.qparams, UniformQParams)
    qparams = dataclasses.replace(entry.qparams, scale=tuple(factor * scale for scale in entry.qparams.scale))
    constants = {}
    if entry.site.kind == "weight":
        constants[entry.site.value] = factor * calibrated.graph.constants[entry.site.value]
    return with_format(calibrated, site, entry.spec, qparams, constants)


def effect(calibrated: Calibrated, site: str) -> float:
    """Return what the layer that reads a site does to the network's result."""
    return next(layer.effect for layer in measure(calibrated, batches("ours")).layers if site in layer.sites)


def lost(good: Calibrated, bad: Calibrated) -> float:
    """Return what a fault costs the network's result, decibel."""
    expected = measure(good, batches("ours")).results[0]
    before, after = (decibel(output_error(expected, run(entry, batches("ours")))) for entry in (good, bad))
    return before - after


def test_gradients_price_an_error_of_a_linear_network_exactly() -> None:
    """With one result a sign is a sign: ``(u J d)^2 = |J d|^2``."""
    layers = spread(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1)))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(layers, (x,))
    first, last = (operation for operation in graph.operations if operation.op == "linear")
    ran = run_float(graph, (x,), {first.name, last.name}, 3, torch.Generator().manual_seed(1))
    error = torch.randn(7, 5, generator=torch.Generator().manual_seed(2))
    expected = (error @ layers[1].weight.detach().T).square().to(torch.float64)  # type: ignore[union-attr]
    found = ran.dots(first.name, error).square()
    assert found.shape == (3, 7)
    torch.testing.assert_close(found, expected.T.expand(3, 7), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ran.dots(last.name, torch.ones(7, 1)).square(), torch.ones(3, 7, dtype=torch.float64))
    torch.testing.assert_close(ran.results, execute(graph, (x,))[0])


def test_signs_price_many_results_in_the_mean() -> None:
    layers = spread(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 9)))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(layers, (x,))
    first = next(operation for operation in graph.operations if operation.op == "linear")
    ran = run_float(graph, (x,), {first.name}, 2000, torch.Generator().manual_seed(1))
    error = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    expected = (error @ layers[1].weight.detach().T).square().sum(1)  # type: ignore[union-attr]
    # The mean of 2,000 squares deviates by a thirtieth: five times that.
    torch.testing.assert_close(ran.dots(first.name, error).square().mean(0).float(), expected, rtol=0.15, atol=0.0)


@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
def test_the_errors_of_one_layer_are_those_of_the_layer(bits: str) -> None:
    """It inherits nothing, and its total is the error of the network."""
    layer = spread(nn.Linear(12, 5))
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    result = calibrate(trace(layer, (x,)), [(row,) for row in x], named_recipe("minmax", bits))
    readings = measure(result, [(x,)])
    (only,) = readings.layers
    assert only.inherited == 0
    assert only.weight is not None
    assert only.weight > 0
    assert only.activation > 0
    assert only.total == pytest.approx(readings.output, rel=1e-4)
    expected, found = layer(x).detach(), simulate(result, (x,))[0]
    assert readings.output == pytest.approx(output_error(expected, found), rel=1e-4)
    assert torch.equal(readings.results[1], found)
    # Two independent errors: their squares add, to what they happen to have in common.
    assert 0.5 < only.total / (only.weight + only.activation) < 2.0


@pytest.mark.parametrize("method", ["minmax", "repq", "auto", "adalog"])
@pytest.mark.parametrize("name", MODELS)
def test_sites_explain_the_error_of_the_network(name: str, method: str) -> None:
    """At 8 bits errors are small, so that what each site does to first order adds up to about what is there."""
    result = network(name, method, "w8a8")
    readings = measure(result, batches(name), multipliers_of(result))
    assert readings.images == 8
    effects = sum(site.effect for site in readings.sites)
    assert 0.3 < effects / readings.output < 3.0
    assert all(site.effect >= 0 and site.own >= 0 for site in readings.sites)
    read = {name for layer in readings.layers for name in layer.sites}
    assert read == {site.name for site in readings.sites if site.entry.site.edges[0][0] != "@output"}
    expected = torch.cat([simulate(result, batch, multipliers=multipliers_of(result))[0] for batch in batches(name)])
    assert torch.equal(readings.results[1][:, : expected[0].numel()], expected.flatten(1))


def test_the_same_images_give_the_same_readings() -> None:
    result = network("ours", "auto", "w4a4")
    first, second = (measure(result, batches("ours")) for _ in range(2))
    assert first.layers == second.layers
    assert [site.effect for site in first.sites] == [site.effect for site in second.sites]


@pytest.mark.parametrize("method", ["minmax", "repq", "auto"])
def test_a_scale_that_is_eight_times_too_large_is_found_and_repaired(method: str) -> None:
    """In every layer with weights it is the first row, and its site the first suggestion, which regains the loss."""
    good = network("ours", method, "w8a8")
    for entry in good.sites:
        if entry.site.kind != "weight":
            continue
        bad = scaled(good, entry.site.name, 8.0)
        readings = measure(bad, batches("ours"))
        worst = readings.worst()[0]
        assert entry.site.name in worst.sites, (entry.site.name, worst)
        found = suggest(bad, readings, batches("ours"), 2)
        assert found[0].change.site == entry.site.name
        # In decibel; the last of them depends on how this site's rounding meets that of all others.
        assert found[0].gain > 0.9 * lost(good, bad), entry.site.name


@pytest.mark.parametrize("factor", [8.0, 0.125])
def test_a_wrong_range_of_an_activation_is_found_and_repaired(factor: float) -> None:
    """Too large a step is coarse, too small a one cuts off; the report shows how much of its range is used."""
    good = network("ours", "minmax", "w8a8")
    for name in ("blocks.0.mlp.fc1.input", "blocks.1.attn.qkv.input", "blocks.1.mlp.fc2.input"):
        bad = scaled(good, name, factor)
        readings = measure(bad, batches("ours"))
        assert name in readings.worst()[0].sites
        used = next(site for site in readings.sites if site.name == name).range_used()
        assert used is not None
        assert used < 0.3 if factor > 1 else used > 3
        found = suggest(bad, readings, batches("ours"), 1)
        assert found[0].change.site == name
        assert effect(bad, name) > 20 * effect(good, name)
        assert effect(found[0].network, name) < 2 * effect(good, name)


@pytest.mark.parametrize("method", ["minmax", "repq", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_every_possible_change_runs_in_integers(name: str, method: str) -> None:
    """Of every kind of site: the changed network has a program, and the simulation predicts it."""
    result = network(name, method, "w4a4")
    first_of_kind = {entry.site.kind: entry.site.name for entry in reversed(result.sites)}
    changes = [change for site in first_of_kind.values() for change in possible_changes(result, site)]
    assert {change.kind for change in changes} == set(first_of_kind) - {"output"}
    made = list(ChangeMaker(result, LIMIT).make(changes, batches(name)))
    assert len(made) == len(changes)
    (x,) = batches(name)[0]
    for change, changed in made:
        program = integerize(changed)
        expected = simulate(changed, (x,), multipliers=multipliers_of(changed))
        for found, wanted in zip(interpret(program, x), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        entry = next(entry for entry in changed.sites if entry.site.name == change.site)
        assert entry.spec == change.after
        assert entry.qparams.bits >= change.before.bits


def test_changes_are_what_calibration_would_choose() -> None:
    """A recipe with the rule of a change gives the site the format that the change gave it."""
    recipe = named_recipe("minmax", "w4a4")
    result = network("ours", "minmax", "w4a4")
    site = "blocks.0.mlp.fc2.input"
    change = possible_changes(result, site)[0]
    samples = [(batch,) for batch in images("ours", 8, seed=1).split(8)]
    ((_, changed),) = ChangeMaker(result, LIMIT).make([change], samples)
    rule = dataclasses.replace(recipe.rules[-1], name=site, spec=change.after)
    again = calibrate(
        traced("ours"),
        [(image,) for image in images("ours", 8, seed=1)],
        dataclasses.replace(recipe, rules=(rule, *recipe.rules)),
    )
    expected, found = (
        next(entry for entry in calibrated.sites if entry.site.name == site) for calibrated in (again, changed)
    )
    assert found == expected


def test_combined_changes_are_each_of_them() -> None:
    result = network("ours", "minmax", "w4a4")
    found = suggest(result, measure(result, batches("ours")), batches("ours"), 6)
    assert len(found) > 1
    assert list(found) == sorted(found, key=lambda entry: -entry.gain)
    together = combine(result, found)
    changed = {entry.change.site for entry in found}
    for before, after in zip(result.sites, together.sites, strict=True):
        first = next((entry for entry in found if entry.change.site == before.site.name), None)
        assert (first is not None) == (before.site.name in changed)
        assert after.spec == (before.spec if first is None else first.change.after)
    expected = measure(result, batches("ours")).results[0]
    assert output_error(expected, run(together, batches("ours"))) < min(entry.output for entry in found)
    integerize(together)


def test_more_bits_have_to_be_worth_more_than_none() -> None:
    result = network("ours", "minmax", "w4a4")
    found = suggest(result, measure(result, batches("ours")), batches("ours"), 8)
    for entry in found:
        for other in found:
            if other.change.site == entry.change.site and other.change.after.bits > entry.change.after.bits:
                assert other.gain > entry.gain


def test_details_are_those_of_the_traced_network() -> None:
    result = network("ours", "repq", "w4a4")
    meter = DetailsMeter(result)
    measure(result, batches("ours"), watch=meter.add)
    x = torch.cat([batch[0] for batch in batches("ours")])
    seen: dict[str, Tensor] = {}
    graph = result.float_graph()

    def keep(executor: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(operation: object, *operands: Tensor) -> Tensor:
            value: Tensor = executor(operation, *operands)
            seen[operation.name] = value  # type: ignore[attr-defined]
            return value

        return call

    execute(graph, (x,), executors={op: keep(executor) for op, executor in EXECUTORS.items()})
    norms = [operation for operation in graph.operations if operation.op == "layer_norm"]
    for norm, found in zip(norms, meter.channels(), strict=True):
        rows = seen[norm.name].flatten(0, -2)
        torch.testing.assert_close(torch.tensor(found.traced[0]), rows.amin(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(found.traced[1]), rows.amax(0), rtol=1e-4, atol=1e-4)
    # The rewrite makes the channels' ranges alike.
    first = meter.channels()[0]
    widths = [torch.tensor(ends[1]) - torch.tensor(ends[0]) for ends in (first.traced, first.rewritten)]
    assert float(widths[1].std() / widths[1].mean()) < float(widths[0].std() / widths[0].mean())
    for attention in meter.heads():
        assert len(attention.entropy) == len(attention.error) == 3
        assert all(0 < share <= 1 for share in attention.entropy)
        assert all(0 < share < 1 for share in attention.error)


def test_published_forms_are_measured_without_suggestions() -> None:
    result = network("ours", "ivit", "w8a8")
    readings = measure(result, batches("ours"))
    assert readings.output > 0
    assert suggest(result, readings, batches("ours"), 4) == ()


def test_a_network_without_attention_has_no_heads() -> None:
    graph = trace(spread(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))), (torch.zeros(1, 4),))
    result = calibrate(graph, [(torch.randn(4),) for _ in range(4)], named_recipe("auto", "w4a4"))
    meter = DetailsMeter(result)
    readings = measure(result, [(torch.randn(3, 4),)], watch=meter.add)
    assert meter.heads() == ()
    assert meter.channels() == ()
    assert all(isinstance(layer, LayerReading) for layer in readings.layers)


def test_a_table_of_constants_is_measured_too() -> None:
    """Its error is the same for every image, and moves the result of each."""
    readings = measure(network("ours", "minmax", "w4a4"), batches("ours"))
    tables = [site for site in readings.sites if site.entry.site.kind == "constant"]
    assert tables
    assert all(site.effect > 0 and site.own > 0 for site in tables)
