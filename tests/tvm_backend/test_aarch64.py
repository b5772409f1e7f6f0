"""The ARM targets: cross-compiled here, run by QEMU with the real runtime, and compared with the interpreter.

``make aarch64`` installs what these tests need. They say nothing about speed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import support.aarch64_run
import torch
from support.attention import Shape, attention_program, mlp_program
from support.programs import random_block, random_images
from support.published_programs import random_published_block

import tvm_backend
from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.bundle import Bundle, save_bundle
from tvm_backend.targets import TARGETS

pytestmark = [pytest.mark.tvm, pytest.mark.slow]

SYSROOT = Path(sys.prefix) / "aarch64"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
LINKER = shutil.which("aarch64-linux-gnu-ld") or shutil.which("ld.lld")
OBJDUMP = shutil.which("aarch64-linux-gnu-objdump")

#: Target and a processor that offers it and nothing beyond: without dot products an sdot would be a fault.
PROCESSORS = {"aarch64": "cortex-a53", "aarch64-dotprod": "cortex-a76"}
PROGRAMS = {
    "fused": lambda: random_block(5, tokens=9, heads=3, head_dim=11, probabilities=False),
    "apart": lambda: random_block(0),
    "whole-vectors": lambda: random_block(3, tokens=18, heads=2, head_dim=32, patch=3, probabilities=False),
    "published": lambda: random_published_block(1, tokens=7, heads=2, head_dim=9),
    "biased-attention": lambda: attention_program(Shape(tokens=17, heads=2, head_dim=31, seed=6)),
    "attention": lambda: attention_program(Shape(tokens=65, heads=1, head_dim=16, seed=5)),
    "3-bit-mlp": lambda: mlp_program(Shape(tokens=7, heads=2, head_dim=31, seed=2)),
    "4-bit-mlp": lambda: mlp_program(Shape(tokens=13, heads=1, head_dim=48, seed=6)),
}
BATCHES = (1, 3)
#: Instructions that compute with floats or convert them; a move through a float register is none, nor is fneg,
#: which flips the sign bits of integer constants.
FLOAT = re.compile(r"f(add|sub|mul|n?ml[as]|n?madd|div|sqrt|cvt|rint|cm|ac|max|min|abs|rec|rsq)|[su]cvtf")

needs_linker = pytest.mark.skipif(LINKER is None, reason="no aarch64-linux-gnu-ld or ld.lld; run `make aarch64`")
needs_emulator = pytest.mark.skipif(
    QEMU is None or not (SYSROOT / ".ready").exists(),
    reason=("no qemu-aarch64" if QEMU is None else f"no sysroot at {SYSROOT}") + "; run `make aarch64`",
)


@pytest.fixture(scope="module", params=PROCESSORS)
def target(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def programs() -> dict[str, IntegerProgram]:
    return {name: make() for name, make in PROGRAMS.items()}


@pytest.fixture(scope="module")
def bundles(target, programs) -> dict[str, Bundle]:
    return {name: build(program, target) for name, program in programs.items()}


def images_of(program: IntegerProgram, batch: int) -> np.ndarray:
    # Whole ranges of codes also where their scale is 1.
    return random_images(program, batch, seed=batch) * np.float32(30)


@pytest.fixture(scope="module")
def results(target, programs, bundles, tmp_path_factory) -> Path:
    """One emulated process for all programs: starting Python takes it longer than running them."""
    root = tmp_path_factory.mktemp(target)
    for name, bundle in bundles.items():
        (root / name).mkdir()
        save_bundle(bundle, root / name / "bundle")
        for batch in BATCHES:
            np.save(root / name / f"images-{batch}.npy", images_of(programs[name], batch))
    done = subprocess.run(
        [
            *(QEMU, "-cpu", PROCESSORS[target], "-L", str(SYSROOT), str(SYSROOT / "usr" / "bin" / "python3")),
            *(support.aarch64_run.__file__, *(str(root / name) for name in bundles)),
        ],
        env={"PYTHONPATH": str(Path(tvm_backend.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return root


@needs_linker
@needs_emulator
@pytest.mark.parametrize("name", PROGRAMS)
def test_emulated_code_equals_interpreter(name, programs, results):
    program = programs[name]
    for batch in BATCHES:
        wanted = interpret(program, torch.from_numpy(images_of(program, batch)))
        files = sorted((results / name).glob(f"output-{batch}-*-0.npy"))
        assert files
        for threads in (file.stem.split("-")[2] for file in files):
            for index, want in enumerate(wanted):
                given = np.load(results / name / f"output-{batch}-{threads}-{index}.npy")
                np.testing.assert_array_equal(
                    given, want.numpy(), err_msg=f"batch {batch}, {threads} threads", strict=True
                )


@needs_linker
@pytest.mark.skipif(OBJDUMP is None, reason="no aarch64-linux-gnu-objdump; run `make aarch64`")
def test_instructions_are_those_of_the_target(target, bundles, tmp_path):
    library = tmp_path / "model.so"
    library.write_bytes(bundles["fused"].library)
    listing = subprocess.run(
        [OBJDUMP, "--disassemble", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    )
    counts: dict[str, Counter[str]] = {}
    for line in listing.stdout.splitlines():
        if symbol := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            name = symbol[1]
        elif instruction := re.match(r"\s*[0-9a-f]+:\s+([a-z]\w*)", line):
            counts.setdefault(name, Counter())[instruction[1]] += 1
    linear = sum((found for name, found in counts.items() if name.startswith("linear")), Counter())
    attention = sum((found for name, found in counts.items() if name.startswith("attention")), Counter())
    for found in (linear, attention):
        assert (found["sdot"] > 0) == ("asimddp" in TARGETS[target].features)
    floats = {name: [i for i in found if FLOAT.match(i)] for name, found in counts.items()}
    assert {name for name, used in floats.items() if used} == {
        name for name in counts if re.match("(de)?quantize_.*_compute_$", name)
    }
