"""Bundles for GPUs: what is compiled for them, and what is said where they cannot be built or run."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch
from support.cuda_emulated import emulate, emulate_for, emulated_driver, other_stream
from support.machine_code import needs_compiler, needs_no_driver
from support.models import ours, recipe, spread
from support.operator_programs import codes, extremes
from support.programs import ProgramBuilder, random_block, random_images
from tvm_ffi import from_dlpack

from calibration.engine import calibrate
from calibration.integerize import integerize
from calibration.trace import trace
from quantizers.errors import DataError, TargetError
from quantizers.integer.interpret import interpret
from tvm_backend.build import build
from tvm_backend.bundle import load_bundle, save_bundle
from tvm_backend.gpu.driver import Driver
from tvm_backend.gpu.nvcc import code_flags, compiler_version, find_compiler
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.gpu.tensors import DeviceArray, borrow
from tvm_backend.kernels.cuda.tiles import Tile, Tiles
from tvm_backend.lower import lower
from tvm_backend.runtime import CompiledProgram, load
from tvm_backend.targets import CUDA_ARCHITECTURES, CudaTarget, get_target

pytestmark = pytest.mark.tvm


def placed(array: np.ndarray) -> DeviceArray:
    """Return an array as a tensor of the emulated device, which is never freed."""
    driver = emulated_driver()
    address = driver.allocate(array.nbytes)
    driver.upload(address, np.ascontiguousarray(array))
    return DeviceArray(address, array.shape, array.dtype.name)


def test_names_of_targets() -> None:
    assert get_target("cuda") == CudaTarget(CUDA_ARCHITECTURES)
    assert get_target("cuda:sm_90,sm_80") == CudaTarget(("sm_80", "sm_90"))
    assert CudaTarget(("sm_75", "sm_80", "sm_90")).generations() == (
        CudaTarget(("sm_80", "sm_90")),
        CudaTarget(("sm_75",)),
    )
    assert CudaTarget(("sm_90",)).generations() == (CudaTarget(("sm_90",)),)
    assert get_target("cuda:sm_120").name == "cuda:sm_120"


@pytest.mark.parametrize("name", ["cuda:", "cuda:90", "cuda:sm_80,", "cuda:sm_80,sm_80", "cuda:sm_90a b"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(TargetError, match=r"expected cuda or cuda: and architectures .* as cuda:sm_75,sm_80,sm_90"):
        get_target(name)


def test_old_architectures_are_refused() -> None:
    with pytest.raises(TargetError, match=r"sm_61 .* the oldest supported architecture is sm_75"):
        get_target("cuda:sm_61,sm_80")


def test_machine_code_for_each_and_ptx_of_the_newest() -> None:
    assert code_flags(CudaTarget(("sm_80", "sm_90"))) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


@needs_compiler
def test_a_bundle_for_all_architectures_needs_no_gpu(tmp_path) -> None:
    program = random_block(0)
    save_bundle(build(program, "cuda"), tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    assert bundle.target == f"cuda:{','.join(CUDA_ARCHITECTURES)}"
    for architecture in CUDA_ARCHITECTURES:
        assert architecture.encode() in bundle.library
    with pytest.raises(TargetError, match="was built for cuda:"):
        CompiledProgram(bundle)


@needs_compiler
def test_the_compiler_is_quoted_when_it_refuses() -> None:
    with pytest.raises(TargetError, match=r"nvcc cannot compile for target cuda:sm_79: .*compute_79"):
        build(random_block(0), "cuda:sm_79")


def test_a_missing_compiler_is_named(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(TargetError, match=r"targets cuda need nvcc, .* install the CUDA toolkit"):
        build(random_block(0), "cuda")


@needs_no_driver
def test_a_missing_driver_is_named() -> None:
    with pytest.raises(TargetError, match="this machine has no NVIDIA driver"):
        Driver()


@needs_compiler
@needs_no_driver
def test_a_bundle_is_refused_without_a_driver(tmp_path) -> None:
    save_bundle(build(random_block(0), "cuda:sm_80"), tmp_path / "bundle")
    with pytest.raises(TargetError, match="no NVIDIA driver"):
        load(tmp_path / "bundle")


# On a device that the CPU emulates --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        CudaTarget(("sm_75",)),
        CudaTarget(("sm_80",)),
        CudaTarget(("sm_90",), Tiles(default=Tile(64, 64, 64, 4, 1, 4, True))),
    ],
    ids=["sm_75", "sm_80", "warp groups"],
)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("depth", [16, 27, 64, 72, 588])
def test_products_on_tensor_cores(depth: int, dtype: str, target: CudaTarget, check) -> None:
    """Depths that end inside a step or a word, rows and columns that end inside a tile, the extremes of operands."""
    rng = np.random.default_rng(depth)
    b = ProgramBuilder(67, depth)
    x = codes(b, dtype, 67, depth)
    outputs = []
    for count in (1, 63, 64, 131):
        weight = rng.choice([-128, -127, -1, 0, 1, 127], (count, depth)).astype(np.int8)
        bias = rng.integers(-1000, 1000, count).astype(np.int32)
        outputs.append(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (67, count)))
    program = b.build(*outputs)
    compiled = emulate_for(program, target)
    for batch in (1, 2, 3):
        check(program, compiled, extremes(rng, batch, 67, depth))


def test_layers_share_their_kernels() -> None:
    """Multipliers, shifts and zero points are arguments: nvcc sees each shape of layer once."""
    counts = []
    for depth in (2, 3):
        x = torch.randn((4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        result = calibrate(trace(spread(ours(depth=depth)), (x[:2],)), [(image,) for image in x], recipe())
        counts.append(len(lower(integerize(result), CudaTarget(("sm_80",))).module.functions))
    assert counts[0] == counts[1]


def test_tensors_of_the_device(check) -> None:
    """Inputs and outputs stay there, on a stream of the caller's, one run after the other."""
    program = random_block(0)
    compiled, driver = emulate(program), emulated_driver()
    stream = other_stream()
    pending = []
    for batch in (2, 1, 2):
        images = random_images(program, batch, seed=batch)
        inputs = [placed(images)]
        outputs = [placed(np.full((batch, *kind.shape), 7, kind.dtype)) for _, kind in compiled.bundle.outputs]
        pending.append((compiled.enqueue(inputs, outputs, stream), images, outputs))
    for run, images, outputs in pending:
        run.wait()
        for output, wanted in zip(outputs, interpret(program, torch.from_numpy(images)), strict=True):
            lent = borrow(output, "output")
            np.testing.assert_array_equal(driver.download(lent.address, lent.shape, lent.dtype), wanted.numpy())
    check(program, compiled, random_images(program, 3, seed=3))


def test_poisoned_memory_changes_nothing() -> None:
    program = random_block(0)
    compiled, images = emulate(program), random_images(program, 2, seed=0)
    compiled.poison(3, 0x5A)
    expected = interpret(program, torch.from_numpy(images))
    for found, wanted in zip(compiled(images), expected, strict=True):
        np.testing.assert_array_equal(found, wanted.numpy(), strict=True)


def test_what_was_in_memory_is_gone_once_it_is_poisoned() -> None:
    """Of the poison: without its last kernel a program gives its last answer again, until that is overwritten."""
    program = random_block(0)
    compiled, images = emulate(program), random_images(program, 2, seed=0)
    first = compiled(images)[0]
    calls = compiled.bundle.schedule.calls
    written = compiled.bundle.schedule.outputs[0]
    kept = tuple(call for call in calls if call.arguments[-1].position != written.position)
    schedule = dataclasses.replace(compiled.bundle.schedule, calls=kept)
    stale = CudaProgram(dataclasses.replace(compiled.bundle, schedule=schedule), emulated_driver())
    stale.poison(2, 0x5A)
    (poisoned, *_) = stale(images)
    assert set(poisoned.tobytes()) == {0x5A}
    assert set(first.tobytes()) != {0x5A}


def test_bytes_of_the_device_are_set() -> None:
    driver = emulated_driver()
    address = driver.allocate(16)
    driver.upload(address, np.arange(16, dtype=np.uint8))
    driver.fill(address + 4, 0xA5, 8, driver.stream)
    expected = np.r_[np.arange(4), np.full(8, 0xA5), np.arange(12, 16)]
    np.testing.assert_array_equal(driver.download(address, (16,), "uint8"), expected)
    driver.free(address)


def test_the_device_and_the_driver_say_what_they_are() -> None:
    driver = emulated_driver()
    assert (driver.name(), driver.version(), driver.processors()) == ("emulated device", "12.4", 1)


@needs_compiler
def test_the_compiler_says_what_it_is() -> None:
    assert re.fullmatch(r"release \d+\.\d+, V[\d.]+", compiler_version(find_compiler()))


def test_values_that_are_not_finite_are_said_after_waiting() -> None:
    program = random_block(0)
    compiled = emulate(program)
    images = random_images(program, 2, seed=0)
    outputs = [placed(np.zeros((2, *kind.shape), kind.dtype)) for _, kind in compiled.bundle.outputs]
    damaged = images.copy()
    damaged[1, 0, -1, -1] = np.nan
    run = compiled.enqueue([placed(damaged)], outputs, other_stream())
    with pytest.raises(DataError, match="NaN or infinity"):
        run.wait()
    del run
    compiled.enqueue([placed(images)], outputs, other_stream()).wait()


def test_tensors_that_do_not_fit_are_refused() -> None:
    program = random_block(0)
    compiled = emulate(program)
    images = random_images(program, 2, seed=0)
    good = [placed(np.zeros((2, *kind.shape), kind.dtype)) for _, kind in compiled.bundle.outputs]
    with pytest.raises(DataError, match="input 0 is a list; expected a tensor on the GPU"):
        compiled.enqueue([images.tolist()], good, other_stream())
    with pytest.raises(DataError, match="input 0 does not lie on GPU 0"):
        compiled.enqueue([torch.from_numpy(images)], good, other_stream())
    with pytest.raises(DataError, match="outputs are none; expected"):
        compiled.enqueue([placed(images)], [], other_stream())
    with pytest.raises(DataError):
        compiled.enqueue([placed(images[..., :-1])], good, other_stream())


def test_a_missing_barrier_is_noticed() -> None:
    """Of the emulator: threads run in random order, and copies arrive late."""
    rng = np.random.default_rng(0)
    b = ProgramBuilder(64, 512)
    x = codes(b, "int8", 64, 512)
    weight, bias = rng.integers(-128, 128, (64, 512)).astype(np.int8), np.zeros(64, np.int32)
    program = b.build(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (64, 64)))
    images = extremes(rng, 1, 64, 512)
    (expected,) = interpret(program, torch.from_numpy(images))
    barrier = "  tvm_builtin_cuda_cta_sync();\n"
    assert np.array_equal(emulate(program)(images)[0], expected.numpy())
    assert not np.array_equal(
        emulate(program, change=lambda text: text.replace(barrier, ""))(images)[0], expected.numpy()
    )


def test_batches_in_any_order() -> None:
    """Memory grows with the largest batch and serves the smaller ones; results do not depend on what came before."""
    program = random_block(0)
    compiled = emulate(program)
    for batch in (3, 1, 5, 2, 3):
        images = random_images(program, batch, seed=batch)
        for found, expected in zip(compiled(images), interpret(program, torch.from_numpy(images)), strict=True):
            np.testing.assert_array_equal(found, expected.numpy(), strict=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    program = random_block(0)
    compiled = emulate(program)
    images = random_images(program, 2, seed=0)
    expected = compiled(images)
    damaged = images.copy()
    damaged[1, 0, -1, -1] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        compiled(damaged)
    for one, other in zip(compiled(images), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_other_shapes_are_refused() -> None:
    program = random_block(0)
    compiled = emulate(program)
    with pytest.raises(DataError):
        compiled(random_images(program, 2, seed=0)[..., :-1])


def test_device_memory_that_runs_out_is_said() -> None:
    driver = emulated_driver()
    with pytest.raises(TargetError, match="the NVIDIA driver refuses cuMemAlloc_v2: out of memory"):
        driver.allocate(1 << 40)
    assert driver.architecture() == "sm_90"


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "float32"])
def test_device_memory_is_lent_as_it_lies(dtype: str) -> None:
    driver = emulated_driver()
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    address = driver.allocate(array.nbytes)
    driver.upload(address, array)
    lent = DeviceArray(address, array.shape, dtype)
    tensor = from_dlpack(lent)
    assert (tuple(tensor.shape), str(tensor.dtype), str(tensor.device)) == (array.shape, dtype, "cuda:0")
    np.testing.assert_array_equal(driver.download(address, array.shape, dtype), array)
    driver.free(address)


def test_host_code_of_another_machine_is_refused() -> None:
    bundle = dataclasses.replace(emulate(random_block(0)).bundle, arch="riscv64")
    with pytest.raises(TargetError, match="host code was built for riscv64"):
        CudaProgram(bundle, emulated_driver())


def test_a_capture_that_fails_leaves_the_stream_usable() -> None:
    driver = emulated_driver()
    with pytest.raises(RuntimeError, match="a launch failed"), driver.capture():
        raise RuntimeError("a launch failed")
    with driver.capture() as graph:
        pass
    driver.launch(graph, driver.stream)
    driver.drop(graph)
