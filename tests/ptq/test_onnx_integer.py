"""The integer program as an ONNX file: the interpreter's bits in ONNX Runtime, and integer operators only."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.models import calibrated, images, recipe
from support.operator_programs import CASES, WIDTH, Case, case, codes
from support.programs import ProgramBuilder, random_block, random_images, saturate
from support.published_programs import random_published_block, random_tokens

from calibration.integerize import integerize
from ptq.onnx_integer import build_integer_model, export_onnx_integer
from ptq.onnx_integer.operators import WRITERS
from quantizers.errors import UsageError
from quantizers.integer.interpret import interpret
from quantizers.integer.ops import OPS
from quantizers.integer.program import IntegerProgram

METADATA = {"recipe": "w8a8", "tool_version": "1.2"}
FAMILIES = ("ours", "deit", "dinov2", "swin", "transformers")
#: What may touch float numbers: the two doors.
DOORS = {"Div", "Round", "Clip", "Cast", "Mul", "Identity"}


def session(program: IntegerProgram, *, optimized: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    model = build_integer_model(program, METADATA)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(program: IntegerProgram, runtime: onnxruntime.InferenceSession, *batch: np.ndarray) -> None:
    wanted = interpret(program, *map(torch.from_numpy, batch))
    names = [name for name, _ in program.inputs]
    found = runtime.run(None, dict(zip(names, batch, strict=True)))
    assert [output.name for output in runtime.get_outputs()] == [name for name, _ in program.outputs]
    for (name, _), got, want in zip(program.outputs, found, wanted, strict=True):
        np.testing.assert_array_equal(got, want.numpy(), err_msg=name, strict=True)


def test_every_operator_has_a_writer() -> None:
    assert set(WRITERS) == set(OPS)


@pytest.mark.parametrize("name", CASES)
def test_operators_equal_the_interpreter(name: str) -> None:
    chosen = CASES[name]()
    runtime = session(chosen.program)
    for batch in chosen.batches:
        check(chosen.program, runtime, *batch)


def published(dtype: str) -> Case:
    """Shiftmax, ShiftGELU and I-LayerNorm with small and large settings, on all ends."""
    b = ProgramBuilder(4, WIDTH)
    x = codes(b, dtype, 4, WIDTH)
    outputs = []
    for inverse, window in itertools.product((1, 12, 255), (1, 15, 23)):
        settings = {"inverse_scale": inverse, "window": window}
        outputs += [b.node("shiftmax", (x,), f"int{bits}", (4, WIDTH), bits=bits, **settings) for bits in (8, 16)]
        outputs += [
            b.node("shift_gelu", (x,), "int32", (4, WIDTH), bits=8, input_zero_point=zero, **settings)
            for zero in (0, 100)
        ]
    rng = np.random.default_rng(1)
    weight = b.constant(rng.integers(-(2**15), 2**15, WIDTH).astype(np.int32))
    bias = b.constant(rng.integers(-(2**20), 2**20, WIDTH).astype(np.int32))
    outputs += [
        b.node(
            "i_layer_norm", (x, weight, bias), "int8", (4, WIDTH), start=start, iterations=steps, shift=30,
            **saturate("int8"),
        )
        for start, steps in ((16, 10), (-1, 10), (-1, 1))
    ]  # fmt: skip
    return case(b, outputs)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_published_operators_equal_the_interpreter(dtype: str) -> None:
    chosen = published(dtype)
    runtime = session(chosen.program)
    for batch in chosen.batches:
        check(chosen.program, runtime, *batch)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_programs_equal_the_interpreter(seed: int, *, optimized: bool) -> None:
    """Whatever the runtime's optimizer does, and for every batch size."""
    sizes = ({}, {"tokens": 2, "heads": 3, "head_dim": 5}, {"tokens": 18, "heads": 1, "head_dim": 32})[seed]
    made = [(random_block(seed, **sizes), random_images), (random_published_block(seed, **sizes), random_tokens)]
    for program, draw in made:
        runtime = session(program, optimized=optimized)
        for batch in (1, 3):
            check(program, runtime, draw(program, batch, seed=batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_networks_equal_the_interpreter(family: str, bits: int) -> None:
    program = integerize(calibrated(family, recipe(bits, bits)))
    runtime = session(program)
    for batch in (1, 5):
        check(program, runtime, images(family, batch, seed=batch).numpy())


def test_between_the_doors_no_node_makes_a_float() -> None:
    """Nodes with a float result belong to a door."""
    program = integerize(calibrated("ours"))
    model = onnx.shape_inference.infer_shapes(build_integer_model(program, METADATA))
    kinds = {info.name: info.type.tensor_type.elem_type for info in (*model.graph.value_info, *model.graph.output)}
    doors = [node.name for node in program.nodes if node.op in ("quantize", "dequantize")]
    doors += [name for name, _ in program.outputs]
    floats = [node for node in model.graph.node if onnx.TensorProto.FLOAT in {kinds[name] for name in node.output}]
    assert {node.op_type for node in floats} == DOORS
    for node in floats:
        assert any(node.name == door or node.name.startswith(f"{door}_") for door in doors), node.name


def test_the_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    program = random_block(0)
    first, second = tmp_path / "a" / "model.onnx", tmp_path / "b.onnx"
    for path in (first, second):
        export_onnx_integer(program, path, METADATA)
    assert first.read_bytes() == second.read_bytes()
    assert {p.key: p.value for p in onnx.load(first).metadata_props} == METADATA
    with pytest.raises(UsageError, match="exists"):
        export_onnx_integer(program, first, METADATA)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
