"""What stands in the machine code for GPUs: tensor cores where they are promised, no float arithmetic, no spills."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.attention import Shape, attention_program, mlp_program
from support.machine_code import instructions, needs_compiler, needs_disassembler, resources
from support.programs import random_block
from support.published_programs import random_published_block
from tvm_ffi import libinfo

from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build
from tvm_backend.gpu.nvcc import COMPILER, code_flags
from tvm_backend.gpu.source import library_source
from tvm_backend.gpu.tune import linear_shapes
from tvm_backend.kernels.cuda.tiles import SHARED_MEMORY, VARIANTS, Tile, Tiles
from tvm_backend.targets import CUDA_ARCHITECTURES, CudaTarget

pytestmark = [pytest.mark.tvm, needs_compiler]

#: Registers of a multiprocessor, all of which one block may take.
REGISTERS = 65536
#: Operations on floats. An integer division asks for the reciprocal of a converted divisor and mends the quotient, so
#: conversions and MUFU.RCP may stand anywhere.
FLOATING = re.compile(r"^(D|F|H|HF|B)(ADD|MUL|FMA|MMA|SET|SETP|MNMX|SEL|CHK)\d*(\.|$)|^[HD]MMA|^MUFU\.(?!RCP)")
TENSOR_CORES = {"sm_75": "IMMA.8816.", "sm_80": "IMMA.16832.", "sm_90": "IMMA.16832."}


def compiled(program: IntegerProgram, target: CudaTarget, folder: Path) -> str:
    """Compile for all architectures and return what the assembler says."""
    _, source = library_source(program, target)
    (folder / "model.cu").write_text(source)
    folders = [f"-I{found}" for found in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    command = [COMPILER, "-std=c++17", "-O3", "-w", "-c", "-Xptxas", "-v", *code_flags(target), *folders]
    arguments = [*command, str(folder / "model.cu"), "-o", str(folder / "model.o")]
    return subprocess.run(arguments, capture_output=True, text=True, check=True).stderr


def check_resources(report: str, kernels: int, architectures: tuple[str, ...] = CUDA_ARCHITECTURES) -> None:
    # The compiler says where it has to wait for each product of a group of warps.
    assert "serializ" not in report
    found = resources(report)
    assert {architecture for architecture, _ in found} == set(architectures)
    assert len(found) >= kernels * len(architectures)
    for place, used in found.items():
        assert used.spilled == 0, place
        assert used.shared <= SHARED_MEMORY, place


@needs_disassembler
@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        (random_block(3, tokens=17, head_dim=48, patch=4), {"linear", "layer", "quantize", "dequantize"}),
        (attention_program(Shape(40, 2, 32, 1)), {"attention"}),
        (mlp_program(Shape(40, 2, 32, 2)), {"linear", "layer"}),
    ],
    ids=["block", "attention", "mlp"],
)
def test_products_are_on_tensor_cores_and_nothing_is_float(
    program: IntegerProgram, kernels: set[str], tmp_path: Path
) -> None:
    bundle = build(program, "cuda")
    (tmp_path / "model.so").write_bytes(bundle.library)
    found = instructions(tmp_path / "model.so")
    assert {architecture for architecture, _ in found} == set(CUDA_ARCHITECTURES)
    for (architecture, kernel), operations in found.items():
        floating = [name for name in operations if FLOATING.match(name)]
        if re.match(r"(de)?quantize_", kernel):
            assert floating, (architecture, kernel)
            continue
        assert not floating, (architecture, kernel, floating)
        if re.match(r"(linear|attention)_", kernel):
            assert any(name.startswith(TENSOR_CORES[architecture]) for name in operations), (architecture, kernel)
    assert {kernel.split("_")[0] for _, kernel in found} >= kernels


@needs_disassembler
def test_groups_of_warps_multiply_weights_of_8_bits(tmp_path: Path) -> None:
    program = mlp_program(Shape(70, 3, 48, 11))
    bits = [shape.bits for shape in linear_shapes(program).values()]
    assert 8 in bits
    compiled(program, CudaTarget(("sm_90",), Tiles(default=next(tile for tile in VARIANTS if tile.groups))), tmp_path)
    found = instructions(tmp_path / "model.o")
    grouped = [name for name, operations in found.items() if any(op.startswith("IGMMA.") for op in operations)]
    assert len(grouped) == bits.count(8)
    assert all(architecture == "sm_90a" and kernel.startswith("linear_") for architecture, kernel in grouped)


@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        (random_block(3, tokens=17, head_dim=48, patch=4), 10),
        # As long as rows of scores get, and values as wide as heads usually are.
        (attention_program(Shape(864, 1, 64, 1)), 2),
        (attention_program(Shape(197, 2, 80, 2)), 2),
        (random_published_block(1, tokens=197, heads=1, head_dim=64, inner=False), 8),
    ],
    ids=["block", "long", "wide", "published"],
)
def test_registers_are_not_spilled(program: IntegerProgram, kernels: int, tmp_path: Path) -> None:
    check_resources(compiled(program, CudaTarget(CUDA_ARCHITECTURES), tmp_path), kernels)


@pytest.mark.parametrize("tile", VARIANTS, ids=str)
def test_every_tile_fits_every_architecture(tile: Tile, tmp_path: Path) -> None:
    architectures = ("sm_90",) if tile.groups else CUDA_ARCHITECTURES
    target = CudaTarget(architectures, Tiles(default=tile))
    report = compiled(mlp_program(Shape(70, 3, 48, 11)), target, tmp_path)
    check_resources(report, kernels=3, architectures=("sm_90a",) if tile.groups else CUDA_ARCHITECTURES)
    for (_, kernel), used in resources(report).items():
        if kernel.startswith("linear_"):
            assert used.registers * tile.threads <= REGISTERS
