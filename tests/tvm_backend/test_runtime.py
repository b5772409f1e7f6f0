"""Running: what is refused, threads, and what a process that runs a bundle must not import."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from support.programs import random_images

from quantizers.errors import DataError, UsageError
from tvm_backend.bundle import save_bundle
from tvm_backend.imports import import_tvm
from tvm_backend.runtime import CompiledProgram
from tvm_backend.targets import get_target
from tvm_backend.threads import current_threads, usable_processors

pytestmark = pytest.mark.tvm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compiled(small_bundle) -> CompiledProgram:
    return CompiledProgram(small_bundle)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], r"the program takes 1 inputs, got 0"),
        ([np.zeros((1, 3, 2, 8))], r"expected float32 of shape \(batch >= 1, 3, 2, 8\), got float64"),
        ([np.zeros((0, 3, 2, 8), np.float32)], r"got float32 of shape \(0, 3, 2, 8\)"),
        ([np.zeros((3, 2, 8), np.float32)], r"got float32 of shape \(3, 2, 8\)"),
        ([np.full((1, 3, 2, 8), np.nan, np.float32)], r"input image holds NaN or infinity"),
        ([np.full((1, 3, 2, 8), -np.inf, np.float32)], r"input image holds NaN or infinity"),
    ],
)
def test_unusable_images(compiled, images, message):
    with pytest.raises(DataError, match=message):
        compiled(*images)


def test_images_of_any_memory_order(compiled, small_program):
    images = random_images(small_program, 4, seed=1)
    strided = np.asfortranarray(images)
    for one, other in zip(compiled(images), compiled(strided), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_thread_counts_out_of_range(small_bundle, threads):
    with pytest.raises(UsageError, match=rf"threads is {threads}, expected 1 to {usable_processors()}"):
        CompiledProgram(small_bundle, threads)


def test_thread_counts_take_effect(small_bundle, small_program):
    images = random_images(small_program, 1, seed=2)
    for threads in (1, usable_processors(), 1):
        CompiledProgram(small_bundle, threads)(images)
        assert current_threads() == threads
    CompiledProgram(small_bundle)(images)
    assert current_threads() == usable_processors()


@pytest.fixture(scope="module")
def who_runs(tmp_path_factory):
    """Return a function that says how many threads shared a parallel loop of eight steps."""
    tvm = import_tvm()
    tirx = import_tvm("tvm.script.ir_builder.tirx")
    with import_tvm("tvm.script.ir_builder").IRBuilder() as builder:
        with tirx.prim_func(s_tir=True):
            tirx.func_name("who")
            tirx.func_attr({"global_symbol": "who"})
            threads = tirx.arg("threads", tirx.Buffer((8,), "int64"))
            with tirx.parallel(8) as i:
                tirx.buffer_store(threads, tirx.call_extern("int64", "pthread_self"), [i])
        function = builder.get()
    path = str(tmp_path_factory.mktemp("who") / "who.so")
    tvm.compile(tvm.IRModule({"who": function}), target=get_target("native").to_tvm()).export_library(path)
    library = tvm.runtime.load_module(path)

    def count() -> int:
        result = tvm.runtime.tensor(np.zeros(8, np.int64))
        library["who"](result)
        return len(set(result.numpy().tolist()))

    return count


def test_kernels_run_on_as_many_threads_as_asked(small_bundle, small_program, who_runs):
    images = random_images(small_program, 1, seed=4)
    for threads in (1, usable_processors(), 1):
        CompiledProgram(small_bundle, threads)(images)
        assert who_runs() == min(threads, 8)


def test_any_python_thread_may_call(compiled, small_program):
    images = random_images(small_program, 2, seed=3)
    found: list[tuple[np.ndarray, ...]] = []
    counts: list[int] = []

    def work() -> None:
        found.append(compiled(images))
        counts.append(current_threads())

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counts == [compiled.threads] * 3
    for result in found:
        assert [array.tobytes() for array in result] == [array.tobytes() for array in compiled(images)]


def test_running_a_bundle_never_imports_torch(small_bundle, tmp_path):
    save_bundle(small_bundle, tmp_path / "model")
    script = """
import sys
import tvm_backend
assert "tvm" not in sys.modules
import numpy as np
from tvm_backend.runtime import load
compiled = load(sys.argv[1], threads=1)
compiled(np.zeros((2, 3, 2, 8), np.float32))
assert "tvm" not in sys.modules, "the compiler was loaded"
assert "torch" not in sys.modules, "torch was imported"
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "done\n", result.stderr


def test_torch_works_after_a_bundle_was_run(small_bundle, tmp_path):
    save_bundle(small_bundle, tmp_path / "model")
    script = """
import sys
import numpy as np
from tvm_backend.imports import import_tvm
from tvm_backend.runtime import load
compiled = load(sys.argv[1])
import torch
images = torch.ones(2, 3, 2, 8)
print(bool(torch.isfinite(torch.from_numpy(compiled(images.numpy())[0])).all()))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "True\n", result.stderr
