"""The whole comparison on a device that the CPU emulates: nothing that is said of time means anything."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from cpu_comparison import networks
from gpu_comparison.comparison import Plan, failures
from gpu_comparison.correctness import POISON, check, differing_values, interpreted
from gpu_comparison.device import Device, device_here
from gpu_comparison.peers import PEERS, Peer
from support.cuda_emulated import emulate, emulate_source, emulated_driver
from support.programs import random_block, random_images

from quantizers.errors import TargetError
from quantizers.integer.program import IntegerProgram
from quantizers.integer.serialize import program_to_bytes
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.nvcc import COMPILER
from tvm_backend.gpu.runtime import CudaProgram

pytestmark = pytest.mark.tvm
SMALLEST = networks.Network(
    "smallest ViT",
    "plain",
    {"img_size": 8, "patch_size": 4, "in_chans": 3, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 10},
    image_size=8,
)
FORMS = ("minmax w8a8", "repq w4a4")
PLAN = Plan(FORMS, (1, 3), (2,), 2, turn_ms=0, profile_rounds=1, ceiling_rounds=1, copy_bytes=4096, peak_repeats=1)


#: Compiled programs, as the same ones are compared again and again.
BUILT: dict[tuple[bytes, ...], Bundle] = {}


def emulated(program: IntegerProgram, target: str) -> Bundle:
    assert target == "cuda:sm_90"
    key = program_to_bytes(program)
    if key not in BUILT:
        BUILT[key] = emulate(program, "sm_90").bundle
    return BUILT[key]


compiled = functools.cache(emulate_source)


def emulated_device(build: Callable[[IntegerProgram, str], Bundle] = emulated) -> Device:
    return Device(emulated_driver(), "release 0.0, V0.0.0", build, lambda source, _: compiled(source))


@pytest.fixture(autouse=True)
def _smallest(monkeypatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "smallest", SMALLEST)


class Answering:
    """A peer that answers as torch's float network, times ``sign``."""

    def __init__(self, module: torch.nn.Module, images: np.ndarray, sign: float) -> None:
        self._answers = sign * module(torch.from_numpy(images)).detach().numpy()

    def answer(self) -> np.ndarray:
        return self._answers

    def time(self, _count: int) -> float:
        return 5.0


class RunningOut:
    """A driver whose memory ends before the images of a batch.

    Args:
        driver: does everything else.
        at_batch: number of images.
    """

    def __init__(self, driver: Driver, at_batch: int) -> None:
        self._driver = driver
        self._limit = at_batch * 4 * SMALLEST.channels * SMALLEST.image_size**2

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def allocate(self, size: int) -> int:
        if size == self._limit:
            raise TargetError("out of memory")
        return self._driver.allocate(size)


def test_what_is_equal_is_timed_and_peers_may_be_missing(tmp_path: Path) -> None:
    peers = {
        "good": Peer("good peer", 0.9, lambda module, _, images: Answering(module, images, 1)),
        "wrong": Peer("wrong peer", 0.9, lambda module, _, images: Answering(module, images, -1)),
        "broken": Peer("broken peer", 0.9, lambda *_: 1 / 0),
        **PEERS,
    }
    lines: list[str] = []
    results = gpu.compare(("smallest",), PLAN, emulated_device(), peers, tmp_path, lines.append)
    assert failures(results["networks"], results["problems"]) == []
    assert lines[:2] == [f"smallest ViT, {form}: equal to the interpreter in every bit at batch 1, 3" for form in FORMS]
    network = results["networks"]["smallest"]
    (cell,) = network["cells"]
    for form in FORMS:
        state = cell["engines"][form]
        assert len(state["turns"]) == PLAN.rounds
        assert state["ms"]["median"] > 0
    assert cell["engines"]["minmax w8a8"]["ratio"] == {"median": 1.0, "p10": 1.0, "p90": 1.0}
    assert cell["engines"]["minmax w8a8"]["cosine"] > PEERS["torch-int8"].least_cosine
    assert cell["engines"]["good"]["ms"]["median"] == 5.0
    assert cell["engines"]["wrong"]["status"] == "failed"
    assert "it does not run the same network" in cell["engines"]["wrong"]["reason"]
    assert cell["engines"]["broken"]["reason"] == "ZeroDivisionError: division by zero"
    if not torch.cuda.is_available():
        for name in PEERS:
            assert cell["engines"][name] == {"status": "skipped", "reason": "torch has no CUDA here"}
    assert [profile["form"] for profile in network["kernels"]] == list(FORMS)
    assert json.loads((tmp_path / "gpu.json").read_text()) == json.loads(json.dumps(results))
    text = (tmp_path / "gpu.md").read_text()
    assert "| smallest ViT | 1, 3 | equal | equal |" in text
    assert "emulated device (sm_90, 1 multiprocessors), driver for CUDA 12.4, nvcc release 0.0, V0.0.0" in text
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_form_that_differs_is_named_and_nothing_is_timed(tmp_path: Path) -> None:
    def damaged(program: IntegerProgram, target: str) -> Bundle:
        """The bias of the head is another one in what is built."""
        head = next(node for node in reversed(program.nodes) if node.op == "linear")
        bias = program.constants[head.inputs[2]].copy()
        bias[3] += 1
        return emulated(dataclasses.replace(program, constants={**program.constants, head.inputs[2]: bias}), target)

    plan = dataclasses.replace(PLAN, forms=("minmax w8a8",))
    lines: list[str] = []
    results = gpu.compare(("smallest",), plan, emulated_device(damaged), {}, tmp_path, lines.append)
    expected = [
        f"smallest ViT, minmax w8a8, batch {batch}, called with {call}: "
        f"{batch} of {10 * batch} values differ from the interpreter's"
        for batch in (1, 3)
        for call in ("arrays", "device tensors")
    ]
    assert lines == failures(results["networks"], results["problems"]) == expected
    assert "cells" not in results["networks"]["smallest"]
    text = (tmp_path / "gpu.md").read_text()
    assert "| smallest ViT | 1, 3 | **differs** |" in text
    assert not (tmp_path / "gpu.png").exists()


def test_a_form_that_cannot_be_built_is_said_and_the_others_are_timed(tmp_path: Path) -> None:
    count = 0

    def second_fails(program: IntegerProgram, target: str) -> Bundle:
        nonlocal count
        count += 1
        if count == 2:
            raise ValueError("no kernel")
        return emulated(program, target)

    plan = dataclasses.replace(PLAN, rounds=1)
    results = gpu.compare(("smallest",), plan, emulated_device(second_fails), {}, tmp_path, lambda _: None)
    assert failures(results["networks"], results["problems"]) == ["smallest ViT, repq w4a4: ValueError: no kernel"]
    (cell,) = results["networks"]["smallest"]["cells"]
    assert cell["engines"]["minmax w8a8"]["status"] == "timed"
    assert cell["engines"]["repq w4a4"] == {"status": "failed", "reason": "ValueError: no kernel"}
    assert "| smallest ViT | 1, 3 | equal | **failed** |" in (tmp_path / "gpu.md").read_text()


def test_a_batch_that_cannot_be_timed_leaves_the_others(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, forms=FORMS[:1], check_batches=(1,), batches=(2, 4), rounds=1)
    driver = RunningOut(emulated_driver(), at_batch=4)
    device = dataclasses.replace(emulated_device(), driver=driver)
    results = gpu.compare(("smallest",), plan, device, {}, tmp_path, lambda _: None)
    assert failures(results["networks"], results["problems"]) == ["smallest ViT, batch 4: TargetError: out of memory"]
    assert [cell["batch"] for cell in results["networks"]["smallest"]["cells"]] == [2]
    assert "- smallest ViT, batch 4: TargetError: out of memory" in (tmp_path / "gpu.md").read_text()


def without_the_last_kernel(program: CudaProgram) -> CudaProgram:
    schedule = program.bundle.schedule
    calls = tuple(call for call in schedule.calls if call.arguments[-1].position != schedule.outputs[0].position)
    kept = dataclasses.replace(schedule, calls=calls)
    return CudaProgram(dataclasses.replace(program.bundle, schedule=kept), emulated_driver())


def test_what_an_earlier_run_left_behind_does_not_count() -> None:
    program = random_block(0)
    images = random_images(program, 3, seed=1)
    expected, driver = interpreted(program, images), emulated_driver()
    whole = emulate(program)
    assert check("form", whole, driver, images, expected, (1, 3)) == []
    stale = without_the_last_kernel(whole)
    found = check("form", stale, driver, images, expected, (1,))
    assert [difference.call for difference in found] == ["arrays", "device tensors"]
    assert all(difference.differing >= expected[0][:1].size for difference in found)
    assert set(stale(images[:1])[0].tobytes()) == {POISON}


def test_the_interpreter_answers_in_parts_as_in_one() -> None:
    program = random_block(0)
    images = random_images(program, 11, seed=1)
    for whole, part in zip(interpreted(program, images), interpreted(program, images[8:]), strict=True):
        np.testing.assert_array_equal(whole[8:], part)


def test_values_are_compared_bit_by_bit() -> None:
    zeros = np.zeros((2, 3), np.float32)
    assert differing_values(zeros, zeros.copy()) == 0
    assert differing_values(-zeros, zeros) == 6
    nan = np.full((2, 3), np.nan, np.float32)
    assert differing_values(nan, nan.copy()) == 0
    assert differing_values(zeros[:1], zeros) == differing_values(zeros.astype(np.float64), zeros) == 6
    assert differing_values(np.int16([1, 2]), np.int16([1, 3])) == 1


def said(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "ldconfig -p | grep -q libcuda.so.1"], check=False).returncode == 0,
    reason="this machine has an NVIDIA driver",
)
def test_a_machine_without_a_driver_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(gpu.main, ["--output", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "this machine has no NVIDIA driver" in said(done)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_a_compiler_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TargetError, match=f"targets cuda need {COMPILER}"):
        device_here(emulated_driver)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "tensorrt"], "unknown: tensorrt; known are: torch-fp32"),
        (["--networks", "resnet"], "unknown: resnet; known are: deit-t"),
        (["--forms", "minmax"], "form is 'minmax', expected a method and widths, as 'minmax w8a8'"),
        (["--forms", "guess w8a8"], "unknown method 'guess'"),
        (["--forms", "minmax w8a8,minmax w9a8"], "9 is outside"),
        (["--batches", "1,x"], "'1,x', expected positive numbers"),
        (["--time-batches", "0"], "'0', expected positive numbers"),
        (["--rounds", "0"], "0 is not in the range"),
    ],
)
def test_options_that_cannot_be(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(gpu.main, arguments)
    assert done.exit_code == 2
    assert message in said(done)
