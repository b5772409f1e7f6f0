"""The promise of the method ``auto``: at each site, on what the site sees, no method that it contains is better."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.models import images, traced
from torch import Tensor

from calibration import choices, layer_weights
from calibration.engine import calibrate
from calibration.moments import Moments
from calibration.search.operands import OperandQParams
from calibration.search.ranges import search_activation, search_weight
from calibration.search.weights import nearest, search_weight_output
from calibration.statistics import Histogram
from ptq.recipes import named_recipe
from quantizers.families import FAMILIES
from quantizers.row_relative import RowRelativeQParams, fake_quantize_rows
from quantizers.spec import RANGE_SEARCHES, QuantSpec
from quantizers.uniform import UniformQParams, fake_quantize

#: Each search of the method as calibration calls it, and what it ended with.
Calls = dict[str, list[tuple[tuple[Any, ...], Any]]]
#: Where each search is called.
SEARCHES = {
    "search_operand": choices,
    "search_attention_operand": choices,
    "search_probabilities": choices,
    "search_weight_feedback": layer_weights,
}


@pytest.fixture(scope="module", params=["w8a8", "w4a4", "w3a3"])
def calls(request: pytest.FixtureRequest) -> Calls:
    """Calibrate a small ViT and record every search, with the inputs that it had."""
    seen: Calls = collections.defaultdict(list)

    def recorded(name: str, search: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = search(*arguments)
            seen[name].append((arguments, result))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, module in SEARCHES.items():
            patch.setattr(module, name, recorded(name, getattr(module, name)))
        samples = [(image,) for image in images("ours", 16, seed=1)]
        calibrate(traced("ours"), samples, named_recipe("auto", request.param))
    # At 8 bits even levels are all there are, so that nothing is searched.
    assert len(seen["search_probabilities"]) == (0 if request.param == "w8a8" else 2)
    return seen


def test_every_site_is_searched(calls: Calls) -> None:
    """Of two blocks: three operands of attention, one softmax, four linears; and the patches and the head."""
    assert {name: len(found) for name, found in calls.items()}.items() >= {
        ("search_attention_operand", 6),
        ("search_weight_feedback", 10),
    }
    # Inputs of qkv, proj, fc1, fc2 of either block, and of the head; the image has its range.
    linear_inputs = [entry for entry in calls["search_operand"] if entry[0][1].search == "output"]
    assert len(linear_inputs) >= 9


def test_no_row_of_a_weight_is_worse(calls: Calls) -> None:
    """On the error at the layer's output, to the rounding of a float64 sum."""
    for (weight, _, moments, spec), (scale, codes) in calls["search_weight_feedback"]:
        assert isinstance(moments, Moments)
        qmax = 2 ** (spec.bits - 1) - 1
        errors = moments.output_errors(weight, codes * scale[:, None])
        slack = 1e-9 * moments.output_errors(weight, torch.zeros_like(weight)) + 1e-9
        output = search_weight_output(weight, moments, spec)
        others: dict[str, Tensor] = {"output": nearest(weight, output, qmax) * output[:, None]}
        for search in ("minmax", "percentile", "mse"):
            plain = search_weight(weight, QuantSpec(spec.bits, granularity="channel", search=search))
            others[search] = fake_quantize(weight, plain)
        for name, values in others.items():
            assert bool((errors <= moments.output_errors(weight, values) + slack).all()), name


def test_no_input_is_worse(calls: Calls) -> None:
    """On the error at the result of what reads it: any range search, and any family of levels alone."""
    for (stats, spec, error, families), found in calls["search_operand"]:
        assert isinstance(stats, Histogram)
        others: list[OperandQParams] = [
            search_activation(stats, dataclasses.replace(spec, search=search)) for search in RANGE_SEARCHES
        ]
        others += [choices.search_operand(stats, spec, error, (family,)) for family in families]
        assert "uniform" in families
        for qparams in others:
            assert error(found) <= error(qparams)


def test_no_operand_of_attention_is_worse(calls: Calls) -> None:
    """On the error of the product, head by head."""
    for (operand, measure, spec, formats), found in calls["search_attention_operand"]:
        assert spec.granularity == "head"
        assert len(formats) == len(RANGE_SEARCHES)

        def errors(
            qparams: UniformQParams, operand: Tensor = operand, measure: Callable[[Tensor], Tensor] = measure
        ) -> Tensor:
            squared = measure(fake_quantize(operand, qparams) - operand).double()
            return squared.reshape(-1, operand.shape[-3]).sum(0)

        for qparams in formats:
            assert bool((errors(found) <= errors(qparams)).all())


def test_no_family_of_probabilities_is_worse(calls: Calls) -> None:
    """On the error of their product with the values; sums are rounded before they are compared, or after."""
    for (probabilities, values, bits, families), found in calls["search_probabilities"]:

        def error(qparams: RowRelativeQParams, probabilities: Tensor = probabilities, values: Tensor = values) -> float:
            rows = fake_quantize_rows(probabilities, qparams)
            return float((rows @ values - probabilities @ values).square().mean())

        assert families == tuple(FAMILIES)
        alone: Sequence[RowRelativeQParams] = [
            choices.search_probabilities(probabilities, values, bits, (family,)) for family in families
        ]
        for qparams in alone:
            assert error(found) <= error(qparams) * (1 + 1e-6)
