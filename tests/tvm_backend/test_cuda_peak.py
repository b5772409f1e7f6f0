"""The kernel that measures what tensor cores reach, emulated and as nvcc compiles it."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import numpy as np
import pytest
from support.cuda_emulated import emulate_source, emulated_driver
from support.machine_code import needs_compiler
from tvm_ffi import libinfo

from quantizers.errors import TargetError, UsageError
from tvm_backend.gpu.nvcc import COMPILER
from tvm_backend.gpu.peak import build_peak, expected_sums, int8_peak, lower_peak
from tvm_backend.gpu.runtime import CudaProgram
from tvm_backend.gpu.source import cuda_source
from tvm_backend.targets import CudaTarget

pytestmark = pytest.mark.tvm


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80"])
def test_the_sums_are_those_of_the_products(architecture: str) -> None:
    bundle = build_peak(CudaTarget((architecture,)), lambda source, _: emulate_source(source), repeats=3)
    rng = np.random.default_rng(0)
    left, right = (rng.integers(-128, 128, (2, *kind.shape)).astype(np.int8) for _, kind in bundle.inputs)
    (sums,) = CudaProgram(bundle, emulated_driver())(left, right)
    np.testing.assert_array_equal(sums, expected_sums(left, right, 3), strict=True)
    np.testing.assert_array_equal(sums[1, 5], 3 * left[1].astype(np.int32) @ right[1].astype(np.int32).T)


def test_a_peak_is_measured_only_where_the_sums_are_right() -> None:
    bundle = build_peak(CudaTarget(("sm_80",)), lambda source, _: emulate_source(source), repeats=1)
    assert int8_peak(bundle, emulated_driver(), rounds=1) > 0
    (call,) = bundle.schedule.calls
    twice = dataclasses.replace(call, macs=2 * call.macs)
    wrong = dataclasses.replace(bundle, schedule=dataclasses.replace(bundle.schedule, calls=(twice,)))
    with pytest.raises(TargetError, match="gives wrong sums"):
        int8_peak(wrong, emulated_driver(), rounds=1)
    with pytest.raises(UsageError, match="rounds is 0"):
        int8_peak(bundle, emulated_driver(), rounds=0)


@needs_compiler
@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90"])
def test_it_stays_in_registers_and_nothing_is_optimised_away(architecture: str, tmp_path) -> None:
    target = CudaTarget((architecture,))
    unit = tmp_path / "peak.cu"
    unit.write_text(cuda_source(lower_peak(target), target))
    assert "mma.sync.aligned" in unit.read_text()
    folders = [f"-I{folder}" for folder in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    command = [COMPILER, "-std=c++17", "-O3", "-w", "-cubin", "-Xptxas", "-v", f"-arch={architecture}", *folders]
    done = subprocess.run([*command, str(unit), "-o", str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr) == [("0", "0")]
