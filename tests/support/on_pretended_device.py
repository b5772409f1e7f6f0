"""Quantize on a pretended device and on the CPU, and print what differs, a line each."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from support.models import images, model, traced
from support.pretended_device import DEVICE, PretendedDevice
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import ptq
from calibration.calibrated import Calibrated
from calibration.diagnosis import changes
from calibration.engine import Options, calibrate
from calibration.simulate import simulate
from ptq.recipes import named_recipe

NETWORK = "ours"


def differences(method: str, bits: str) -> Iterator[str]:
    """Yield what a calibration or a simulation on the device does otherwise."""
    graph, recipe = traced(NETWORK), named_recipe(method, bits)
    samples = [(image,) for image in images(NETWORK, 6, seed=1)]
    expected = calibrate(graph, samples, recipe)
    with tempfile.TemporaryDirectory() as folder, PretendedDevice():
        # Nothing is held in memory, so that activations come from files too.
        options = Options(memory_limit=1, scratch=Path(folder), device=DEVICE)
        found = calibrate(graph, samples, recipe, options=options)
    yield from calibration_differences(f"{method} {bits}", found, expected)
    x = images(NETWORK, 3, seed=5)
    with PretendedDevice():
        result = simulate(found, (x.to(DEVICE),))[0]
        if result.device != DEVICE:
            yield f"{method} {bits}: the simulation leaves the device"
        result = result.cpu()
    if not torch.equal(result, simulate(expected, (x,))[0]):
        yield f"{method} {bits}: the simulation"


def calibration_differences(title: str, found: Calibrated, expected: Calibrated) -> Iterator[str]:
    """Yield the names of formats and constants that differ."""
    for ours, theirs in zip(found.sites, expected.sites, strict=True):
        if ours != theirs:
            yield f"{title}: {ours.site.name}"
    for name, tensor in expected.graph.constants.items():
        got = found.graph.constants[name]
        if type(got) is not torch.Tensor or not torch.equal(got, tensor):
            yield f"{title}: {name}"


def suggestion_differences() -> Iterator[str]:
    """Yield where what a diagnosis suggests depends on the device."""
    quantized = ptq.quantize(model(NETWORK), images(NETWORK, 6, seed=1), method="auto", bits="w4a4")
    sites = [entry.site.name for entry in quantized.calibrated.sites][::5]
    wanted = [change for site in sites for change in changes.possible_changes(quantized.calibrated, site)]
    x = images(NETWORK, 4, seed=2)
    expected = [made for _, made in changes.ChangeMaker(quantized.calibrated, 1 << 30).make(wanted, [(x,)])]
    changes.default_device = lambda: DEVICE  # type: ignore[attr-defined]
    with PretendedDevice():
        found = [made for _, made in changes.ChangeMaker(quantized.calibrated, 1 << 30).make(wanted, [(x,)])]
    for ours, theirs in zip(found, expected, strict=True):
        yield from calibration_differences("suggestion", ours, theirs)


def model_differences() -> Iterator[str]:
    """Yield where it matters that model and images lie on the device."""
    here, x = model(NETWORK), images(NETWORK, 4, seed=1)
    with PretendedDevice():
        there, there_x = copy.deepcopy(here).to(DEVICE), x.to(DEVICE)
    if ptq.quantize(there, there_x, method="minmax") != ptq.quantize(here, x, method="minmax"):
        yield "a model on the device"
    if any(parameter.device != DEVICE for parameter in there.parameters()):
        yield "the model was moved"


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend()
    torch.set_num_threads(1)
    found = [line for entry in sys.argv[1:] for line in differences(*entry.split(":"))]
    found += [*suggestion_differences(), *model_differences()]
    sys.stdout.write("".join(f"{line}\n" for line in (*found, "compared")))
