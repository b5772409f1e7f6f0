"""The float graph in the coordinates of the quantized one, and files that hold codes instead of rounded weights."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from support.models import images, traced
from support.rewrites import moved

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.serialize import calibrated_from_bytes, calibrated_to_bytes
from ptq.recipes import named_recipe
from quantizers.uniform import UniformQParams


def calibrated(name: str, method: str, bits: str = "w8a8") -> Calibrated:
    samples = [(image,) for image in images(name, 8, seed=1)]
    return calibrate(traced(name), samples, named_recipe(method, bits))


@pytest.mark.parametrize("method", ["minmax", "repq", "auto"])
@pytest.mark.parametrize("name", ["ours", "swin", "transformers"])
def test_it_is_the_same_function(name: str, method: str) -> None:
    result = calibrated(name, method)
    assert moved(result.float_graph(), result.rewritten_graph(), images(name, 4, seed=7)) < 1e-5


@pytest.mark.parametrize("method", ["minmax", "repq"])
def test_its_weights_are_those_that_were_rounded(method: str) -> None:
    """Without corrections a code is the nearest: half a step away, or at the end of the grid."""
    result = calibrated("ours", method, "w4a4")
    source = result.rewritten_graph().constants
    for entry in result.sites:
        if entry.site.kind != "weight":
            continue
        assert isinstance(entry.qparams, UniformQParams)
        value, exact = result.graph.constants[entry.site.value].flatten(1), source[entry.site.value].flatten(1)
        scale = torch.tensor(entry.qparams.scale)[:, None]
        ends = value.abs() >= entry.qparams.qmax * scale * 0.999
        assert bool((((value - exact).abs() <= 0.501 * scale) | ends).all()), entry.site.name


@pytest.mark.parametrize("method", ["minmax", "auto"])
def test_files_hold_weights_as_codes(method: str) -> None:
    result = calibrated("ours", method, "w4a8")
    written = calibrated_to_bytes(result)
    stored = safetensors.torch.load(written[1])
    weights = [entry.site.value for entry in result.sites if entry.site.kind == "weight"]
    for name in weights:
        assert stored[f"codes/{name}"].dtype == torch.int8
        assert name not in stored
        assert int(stored[f"codes/{name}"].abs().max()) <= 7
    again = calibrated_from_bytes(*written)
    assert calibrated_to_bytes(again) == written
    for found, expected in (
        (again.graph.constants, result.graph.constants),
        (again.rewritten_constants, result.rewritten_constants),
        (again.float_constants, result.float_constants),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
