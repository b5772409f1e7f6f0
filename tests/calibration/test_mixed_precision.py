"""Laws of candidates and sensitivities: weights as calibration chooses them, and prices that say what they do."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.models import MODELS, images, spread, traced
from torch import nn

from calibration import choices
from calibration.calibrated import Calibrated
from calibration.diagnosis.measure import measure
from calibration.diagnosis.suggest import output_error, run
from calibration.engine import calibrate
from calibration.integerize import integerize, multipliers_of
from calibration.mixed_precision.candidates import assemble, choose_candidates, weight_sites
from calibration.mixed_precision.sensitivity import sensitivities
from calibration.mixed_precision.solver import choose_widths
from calibration.rules import Rule
from calibration.simulate import simulate
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.integer.interpret import interpret

WIDTHS = (3, 4, 6, 8)


def network(name: str, method: str = "auto") -> Calibrated:
    return calibrate(traced(name), [(image,) for image in images(name, 8, seed=1)], named_recipe(method, "w8a8"))


@pytest.mark.parametrize("method", ["minmax", "auto", "ivit"])
@pytest.mark.parametrize("name", MODELS)
def test_any_mixture_runs_in_integers(name: str, method: str) -> None:
    """Neighbouring weights of different widths: there is a program, and the simulation predicts it."""
    base = network(name, method)
    candidates = choose_candidates(base, WIDTHS, images(name, 8, seed=1))
    assert list(candidates) == [entry.site.name for entry in weight_sites(base)]
    widths = {site: WIDTHS[index % 4] for index, site in enumerate(candidates)}
    mixed = assemble(base, candidates, widths)
    found = {entry.site.name: entry.spec.bits for entry in weight_sites(mixed)}
    assert found == widths
    x = images(name, 4, seed=2)
    expected = simulate(mixed, (x,), multipliers=multipliers_of(mixed))
    for got, wanted in zip(interpret(integerize(mixed), x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_the_networks_own_width_is_the_network() -> None:
    base = network("ours")
    candidates = choose_candidates(base, (4, 8), images("ours", 8, seed=1))
    same = assemble(base, candidates, dict.fromkeys(candidates, 8))
    assert same.sites == base.sites
    assert all(torch.equal(tensor, base.graph.constants[name]) for name, tensor in same.graph.constants.items())


@pytest.mark.parametrize("method", ["minmax", "auto"])
def test_candidates_are_what_calibration_would_choose(method: str) -> None:
    """In the first layer, before which nothing differs, a recipe with another width ends with the same weights."""
    base = network("ours", method)
    site = weight_sites(base)[0]
    candidate = choose_candidates(base, (4,), images("ours", 8, seed=1))[site.site.name][4]
    recipe = base.recipe
    rule = Rule(dataclasses.replace(site.spec, bits=4), kind="weight", name=site.site.name)
    samples = [(image,) for image in images("ours", 8, seed=1)]
    again = calibrate(traced("ours"), samples, dataclasses.replace(recipe, rules=(rule, *recipe.rules)))
    found = weight_sites(again)[0]
    assert (found.spec, found.qparams) == (candidate.spec, candidate.qparams)
    assert torch.equal(candidate.values(), again.graph.constants[site.site.value])
    for name, bias in candidate.biases.items():
        assert torch.equal(bias, again.graph.constants[name])


def test_the_inputs_of_a_layer_are_read_once_for_all_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    base = network("ours")
    read: list[str] = []
    moments = choices.Chooser._moments

    def counted(chooser: choices.Chooser, operation: object, width: int) -> object:
        read.append(operation.name)  # type: ignore[attr-defined]
        return moments(chooser, operation, width)  # type: ignore[arg-type]

    monkeypatch.setattr(choices.Chooser, "_moments", counted)
    choose_candidates(base, WIDTHS, images("ours", 8, seed=1))
    assert len(read) == len(set(read)) == len(weight_sites(base))


@pytest.mark.parametrize("name", MODELS)
def test_prices_of_the_networks_own_weights_are_those_of_a_diagnosis(name: str) -> None:
    """On the same images with the same signs: the effect of each layer that has weights of its own."""
    base, x = network(name), images(name, 8, seed=2)
    prices = sensitivities(base, choose_candidates(base, (8,), images(name, 8, seed=1)), x)
    readings = measure(base, [(x[:4],), (x[4:],)])
    effects = {site: layer.effect for layer in readings.layers for site in layer.sites}
    for entry in weight_sites(base):
        assert prices[entry.site.name][8] == pytest.approx(effects[entry.site.name], rel=1e-3), entry.site.name


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_prices_add_up_to_the_error_of_the_network(bits: int) -> None:
    """With one width everywhere, for half of the weights, and for the other half; activations add their own."""
    base, x = network("ours", "minmax"), images("ours", 16, seed=2)
    candidates = choose_candidates(base, (bits, 8), images("ours", 8, seed=1))
    prices = sensitivities(base, candidates, x)
    readings = measure(base, [(x,)])
    activations = readings.output - sum(prices[site][8] for site in prices)
    names = list(candidates)
    for few in (names, names[::2], names[1::2]):
        widths = {site: bits if site in few else 8 for site in names}
        predicted = activations + sum(prices[site][width] for site, width in widths.items())
        found = output_error(readings.results[0], run(assemble(base, candidates, widths), [(x,)]))
        assert 0.5 < predicted / found < 2.0


def test_a_layer_that_matters_most_gets_the_most_bits() -> None:
    """Three equal layers side by side, of which the network's result has one a hundredfold."""

    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sides = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = (side(x) for side in self.sides)
            return first + 100.0 * second + third

    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    base = calibrate(trace(spread(Sides()), (x,)), [(row,) for row in x], named_recipe("auto", "w8a8"))
    candidates = choose_candidates(base, WIDTHS, x)
    prices = sensitivities(base, candidates, x)
    error = np.array([[prices[site][width] for width in WIDTHS] for site in prices])
    cost = np.array([WIDTHS] * 3, np.float64)
    for budget in (14, 15, 18):
        chosen = choose_widths(error, cost, budget)
        named = dict(zip(prices, chosen, strict=True))
        assert max(named, key=named.__getitem__) == "sides.1.weight", (named, budget)


def test_the_same_images_give_the_same_prices() -> None:
    base, x = network("ours"), images("ours", 8, seed=1)
    first, second = (sensitivities(base, choose_candidates(base, WIDTHS, x), x) for _ in range(2))
    assert first == second
