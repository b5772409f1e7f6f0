"""Layouts of INT8 ONNX files: what each runtime is promised, weights in 4 bits, and a fixed batch."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from support.codebooks import with_codebooks
from support.command_line import run
from support.embedded import write_images, write_model
from support.heads import head_recipe
from support.models import calibrated, images, recipe
from torch import Tensor

from calibration.calibrated import Calibrated
from calibration.graph import execute
from ptq.deployment import check_deployment
from ptq.onnx_export import export_onnx
from ptq.onnx_export.layout import LAYOUTS, formats_of, get_layout, probability_format, without_zero_point
from ptq.onnx_export.model import build_model
from quantizers.codebook import uniform_codebook
from quantizers.errors import UsageError
from quantizers.logarithm import log_sqrt2
from quantizers.row_relative import RowRelativeQParams
from quantizers.uniform import UniformQParams, fake_quantize

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
FAMILIES = ("ours", "deit", "dinov2", "swin", "transformers")


def export(source: Calibrated, directory: Path, target: str, *, int4: bool = False) -> onnx.ModelProto:
    path = directory / f"{target}.onnx"
    export_onnx(source, path, {}, target, int4=int4)
    return onnx.load(path)


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}


def quantizers(model: onnx.ModelProto) -> list[np.ndarray]:
    """Return the zero point of every QuantizeLinear."""
    arrays = stored(model)
    return [arrays[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"]


# Formats --------------------------------------------------------------------------------------------


@given(
    scale=st.floats(2**-10, 2**10, width=32),
    zero_point=st.integers(-128, 127),
    bits=st.integers(2, 8),
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=9),
)
def test_a_format_without_zero_point_holds_the_same_range(
    scale: float, zero_point: int, bits: int, values: list[float]
) -> None:
    half = 1 << (bits - 1)
    zero = max(-half, min(half - 1, zero_point))
    before = UniformQParams((scale,), zero, -half, half - 1)
    after = without_zero_point(before)
    assert (after.zero_point, after.qmin, after.qmax, after.bits) == (0, -half, half - 1, bits)
    low, high = ((code - zero) * scale for code in (before.qmin, before.qmax))
    held = torch.tensor([low + (high - low) * (value + 1) / 2 for value in values])
    # Whatever the old format held is at most half a step of the new one away.
    error = (fake_quantize(held, after) - held).abs().max()
    assert float(error) <= 0.5 * after.scale[0] * (1 + 1e-5)
    # At most twice as coarse: one bit, where the old range was one-sided.
    assert after.scale[0] <= before.scale[0] * (2 * half - 1) / (half - 1) * (1 + 1e-6)


def test_a_symmetric_format_stays_as_it_is() -> None:
    qparams = UniformQParams((0.1, 0.2), 0, -8, 7, -3)
    assert without_zero_point(qparams) is qparams


@pytest.mark.parametrize(("largest", "dtype"), [(255, "uint8"), (127, "int8")])
@pytest.mark.parametrize("bits", [3, 8])
def test_probabilities_have_a_fixed_scale(largest: int, dtype: str, bits: int) -> None:
    qparams = probability_format(RowRelativeQParams(uniform_codebook(bits)), largest)
    peak = min(largest, uniform_codebook(bits).levels[-1])
    assert (qparams.dtype, qparams.zero_point, qparams.scale) == (dtype, 0, (float(np.float32(1 / peak)),))
    values = fake_quantize(torch.tensor([0.0, 1.0]), qparams)
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("target", LAYOUTS)
def test_only_what_the_layout_says_is_changed(target: str) -> None:
    layout, source = LAYOUTS[target], calibrated("ours", head_recipe(symmetric=False))
    before, after = source.by_edge(), formats_of(source, layout)
    kinds = {edge: entry.site.kind for entry in source.sites for edge in entry.site.edges}
    attention = ("query", "key", "value")
    assert any(before[edge].zero_point for edge in before if kinds[edge] in attention)
    for edge, qparams in after.items():
        kind = kinds[edge]
        loses = layout.zero_points == "none" or (layout.zero_points == "linear" and kind in attention)
        if kind == "probability":
            assert qparams.scale == (float(np.float32(1 / layout.probability_codes)),)
        elif not loses or before[edge].zero_point == 0:
            assert qparams == before[edge], edge
        else:
            assert qparams == without_zero_point(before[edge]), edge


def test_an_unknown_target_lists_all() -> None:
    with pytest.raises(UsageError, match=r"unknown target 'tflite' .* onnxruntime .* openvino .* tensorrt .* portable"):
        get_layout("tflite")


# Files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_file_is_valid_and_carries_its_batch(target: str, tmp_path: Path) -> None:
    model = export(calibrated("ours"), tmp_path, target)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    made = {*makers(model), *stored(model), *(entry.name for entry in model.graph.input)}
    read = {name for node in model.graph.node for name in node.input} | {entry.name for entry in model.graph.output}
    assert read <= made
    # Nothing stands in the file that no output needs.
    assert {name for node in model.graph.node for name in node.output} <= read
    assert {entry.name for entry in model.graph.initializer} <= read
    export_onnx(calibrated("ours"), tmp_path / "three.onnx", {}, target, batch_size=3)
    (entry,) = onnxruntime.InferenceSession(str(tmp_path / "three.onnx")).get_inputs()
    assert entry.shape == [3, 1, 8, 8]


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
@pytest.mark.parametrize("chosen", ["tensor", "head"])
def test_zero_points_are_zero_where_the_runtime_has_none(target: str, chosen: str, tmp_path: Path) -> None:
    asked = recipe(symmetric=False) if chosen == "tensor" else head_recipe(symmetric=False)
    zeros = quantizers(export(calibrated("ours", asked), tmp_path, target))
    assert {zero.dtype.name for zero in zeros} == {"int8"}
    assert not any(zeros)


def test_openvino_keeps_zero_points_of_linears_and_none_of_attention(tmp_path: Path) -> None:
    model = export(calibrated("ours", recipe(symmetric=False)), tmp_path, "openvino")
    assert any(quantizers(model))
    made, arrays = makers(model), stored(model)
    for product in (node for node in model.graph.node if node.op_type == "MatMul"):
        if product.input[1] in made and made[product.input[1]].input[0] in arrays:
            continue
        for name in product.input:
            node = made[name]
            while node.op_type != "DequantizeLinear":
                node = made[node.input[0]]
            assert not arrays[node.input[2]].any()


def test_tensorrt_has_float_biases_and_pairs_that_touch_products(tmp_path: Path) -> None:
    model = export(calibrated("ours"), tmp_path, "tensorrt")
    assert not any(array.dtype == np.int32 for array in stored(model).values())
    made = makers(model)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 14
    assert {made[name].op_type for product in products for name in product.input} == {"DequantizeLinear"}


def test_tensorrt_gets_levels_without_uint8(tmp_path: Path) -> None:
    source = with_codebooks(calibrated("ours"), {"probability": log_sqrt2(4), "linear_input": log_sqrt2(4)})
    model = export(source, tmp_path, "tensorrt")
    assert {zero.dtype.name for zero in quantizers(model)} == {"int8"}
    tables = [stored(model)[node.input[0]] for node in model.graph.node if node.op_type == "Gather"]
    assert {table.dtype.name for table in tables} == {"float32"}


def test_openvino_quantizes_behind_what_makes_the_values(tmp_path: Path) -> None:
    """LayerNorm, GELU, the fused projection and both attention products end in codes: nothing stands between."""
    model = export(calibrated("ours"), tmp_path, "openvino")
    made = makers(model)
    sources = collections.Counter(
        made[node.input[0]].op_type if node.input[0] in made else "image"
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    )
    # In each of two blocks: two norms, GELU, the projection of queries, keys and values, probabilities, and the heads
    # once they stand side by side again. Behind the last norm the class token is taken first.
    assert sources == {"image": 1, "LayerNormalization": 4, "Gelu": 2, "Add": 2, "Softmax": 2, "Reshape": 2, "Slice": 1}


def test_one_quantizer_serves_queries_keys_and_values(tmp_path: Path) -> None:
    """The fused projection's weights are in steps of its codes, so that these have scale 1."""
    source = calibrated("ours", head_recipe())
    model = export(source, tmp_path, "openvino")
    made, arrays = makers(model), stored(model)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and made.get(node.input[0], node).op_type == "Add":
            assert arrays[node.input[1]] == 1
    formats = source.by_edge()
    (layer,) = (o for o in source.graph.operations if o.op == "linear" and o.module == "blocks.0.attn.qkv")
    folded = arrays[f"{layer.inputs[1]}_scale"].astype(np.float64)
    steps = np.array(formats[layer.name, 1].scale) / folded
    own = {
        kind: np.array(entry.qparams.scale)
        for entry in source.sites
        for kind in ("query", "key", "value")
        if entry.site.kind == kind and entry.site.name.startswith("blocks.0.")
    }
    heads = [scale for kind in ("query", "key", "value") for scale in own[kind]]
    np.testing.assert_allclose(steps, np.repeat(heads, len(steps) // len(heads)), rtol=1e-6)


def test_the_stream_stays_on_rows_between_linears(tmp_path: Path) -> None:
    """Of a block, Reshapes are left around attention: behind the projection, and of each operand and the result."""
    counts = {
        target: collections.Counter(node.op_type for node in export(calibrated("ours"), tmp_path, target).graph.node)
        for target in ("onnxruntime", "portable")
    }
    assert {kind: count for kind, count in counts["onnxruntime"].items() if kind != "Reshape"} == {
        kind: count for kind, count in counts["portable"].items() if kind != "Reshape"
    }
    # Around GELU, around the norms, and behind proj and fc2; the sum that the stream begins with still has its batch.
    assert counts["portable"]["Reshape"] - counts["onnxruntime"]["Reshape"] == 9


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_change_no_bit(name: str) -> None:
    source = calibrated(name, head_recipe(symmetric=False))
    layout = LAYOUTS["onnxruntime"]
    x = images(name, 3, seed=3)
    found = []
    for rows in (True, False):
        model = build_model(source, dataclasses.replace(layout, rows=rows), {}, int4=False, batch_size=None)
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        found.append(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    np.testing.assert_array_equal(found[0], found[1])


# In OpenVINO ----------------------------------------------------------------------------------------


def run_openvino(path: Path, x: Tensor) -> np.ndarray:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.array(compiled({0: x.numpy()})[0])


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
@pytest.mark.parametrize("chosen", ["tensor", "head", "affine head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_openvino_runs_every_product_on_integers(name: str, chosen: str, tmp_path: Path) -> None:
    recipes = {"tensor": recipe(), "head": head_recipe(), "affine head": head_recipe(symmetric=False)}
    source = calibrated(name, recipes[chosen])
    export(source, tmp_path, "openvino")
    path = tmp_path / "openvino.onnx"
    assert check_deployment(path, "openvino", calls=1).integer_share == 1.0
    x = images(name, 24, seed=3)
    found, real = run_openvino(path, x), execute(source.float_graph(), (x,))[0].detach().numpy()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options)
    meant = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    # As two runtimes of one file differ: values on the edge of two codes go to either.
    assert np.linalg.norm(found - meant) <= 0.5 * np.linalg.norm(meant - real)


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
def test_openvino_takes_levels_and_int4(tmp_path: Path) -> None:
    source = with_codebooks(calibrated("ours", recipe(4, 8)), {"probability": log_sqrt2(4)})
    x = images("ours", 3, seed=3)
    real = execute(source.float_graph(), (x,))[0].detach().numpy()
    found = []
    for int4 in (False, True):
        export(source, tmp_path / str(int4), "openvino", int4=int4)
        found.append(run_openvino(tmp_path / str(int4) / "openvino.onnx", x))
    assert np.linalg.norm(found[0] - found[1]) <= np.linalg.norm(found[0] - real)


# Weights in 4 bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_int4_stores_the_same_codes(bits: int, tmp_path: Path) -> None:
    source = calibrated("ours", recipe(bits, 8))
    narrow, wide = (export(source, tmp_path / str(int4), "onnxruntime", int4=int4) for int4 in (True, False))
    assert (narrow.opset_import[0].version, wide.opset_import[0].version) == (21, 20)
    onnx.checker.check_model(narrow, full_check=True)
    codes, expected = stored(narrow), stored(wide)
    types = {entry.name: entry.data_type for entry in narrow.graph.initializer}
    # Inputs of 24 values are no whole blocks: these layers stay int8.
    depths = {
        o.inputs[1]: source.graph.constants[o.inputs[1]].shape[1] for o in source.graph.operations if o.op == "linear"
    }
    assert collections.Counter(depths.values()) == {24: 7, 48: 2}
    for weight, depth in depths.items():
        name = f"{weight}_quantized"
        if depth % 16:
            assert types[name] == TensorProto.INT8
            continue
        assert types[name] == TensorProto.INT4
        np.testing.assert_array_equal(codes[name].astype(np.int8).T, expected[name])
        scales = codes[f"{weight}_scale"]
        assert scales.shape == (depth // 16, len(expected[f"{weight}_scale"]))
        assert (scales == expected[f"{weight}_scale"]).all()
    assert types["patch_embed.proj.weight_quantized"] == TensorProto.INT8
    size = [(tmp_path / str(int4) / "onnxruntime.onnx").stat().st_size for int4 in (True, False)]
    assert size[0] < size[1]


@pytest.mark.parametrize("target", ["onnxruntime", "portable", "tensorrt"])
def test_int4_reaches_the_kernel_of_onnxruntime(target: str, tmp_path: Path) -> None:
    source = calibrated("ours", recipe(4, 8))
    export(source, tmp_path, target, int4=True)
    found = check_deployment(tmp_path / f"{target}.onnx", "onnxruntime", calls=1)
    kernels = collections.Counter(report.kernel for report in found.products)
    assert kernels["MatMulNBits"] == 2
    assert not any("is not quantized" in text for report in found.products for text in report.findings)


def test_int4_computes_with_float_activations(tmp_path: Path) -> None:
    source = calibrated("ours", recipe(4, 8))
    model = export(source, tmp_path, "onnxruntime", int4=True)
    # The patches, three linears and both operands of two products in two blocks, and the head.
    assert len(quantizers(model)) == 1 + 2 * (3 + 4) + 1
    made = makers(model)
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    kernels = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and types.get(made[node.input[1]].input[0]) == TensorProto.INT4
    ]
    # What the second linear of each MLP reads is GELU's result, as it is.
    read = [made[node.input[0]] for node in kernels]
    assert [made[node.input[0]].op_type if node.op_type == "Reshape" else node.op_type for node in read] == ["Gelu"] * 2


def test_int4_needs_weights_that_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no linear whose weights have at most 4 bits .* --bits w4a8"):
        export_onnx(calibrated("ours"), tmp_path / "model.onnx", {}, int4=True)
    assert not list(tmp_path.iterdir())


# The command line -----------------------------------------------------------------------------------


def test_the_command_line_takes_target_int4_and_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    write_images(tmp_path / "data.npz")
    out = tmp_path / "out"
    asked = ("--method", "minmax", "--bits", "w4a8")
    assert run("quantize", tmp_path / "model", "--data", tmp_path / "data.npz", "-o", out, *asked) == 0
    arguments = ("export", out, "--format", "onnx", "-o")
    assert run(*arguments, tmp_path / "ov.onnx", "--target", "openvino", "--batch-size", "2") == 0
    assert onnx.load(tmp_path / "ov.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    assert run(*arguments, tmp_path / "int4.onnx", "--int4") == 0
    assert onnx.load(tmp_path / "int4.onnx").opset_import[0].version == 21
    capsys.readouterr()
    for wrong, said in (
        ((*arguments, tmp_path / "x.onnx", "--target", "tflite"), "unknown target 'tflite'"),
        (("export", out, "--format", "tvm", "-o", tmp_path / "x", "--int4"), "are for --format onnx"),
        (
            ("export", out, "--format", "onnx-integer", "-o", tmp_path / "x.onnx", "--target", "openvino"),
            "the same for every target",
        ),
    ):
        assert run(*wrong) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.onnx").exists()
