"""The INT8 ONNX file: valid, named as the model, equal to its own arithmetic, and run on integer kernels."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from support.codebooks import with_codebooks
from support.float_graph import CONSTANT_SHAPES, FLOAT_INPUTS, FLOAT_OPERATIONS, FLOAT_OUTPUTS
from support.heads import KINDS, head_recipe
from support.models import Formula, calibrated, images, recipe, traced
from support.products import FAMILIES, RECIPES, calibrated_formula, codebook_model, heads, product_cases
from torch import Tensor, nn

from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import EXECUTORS, UNARY_FUNCTIONS, Graph, Operation, execute
from calibration.rules import Recipe, Rule
from calibration.simulate import simulate
from ptq.onnx_export import export_onnx
from ptq.onnx_export.layout import DEFAULT_TARGET, LAYOUTS, formats_of
from ptq.onnx_export.operators import UNARY_WRITERS, WRITERS
from ptq.version import tool_version
from quantizers.adalog import adalog
from quantizers.codebook import Codebook, CodebookQParams, carrier_table, uniform_codebook
from quantizers.errors import UsageError
from quantizers.logarithm import log_sqrt2
from quantizers.row_relative import RowRelativeQParams
from quantizers.spec import QuantSpec
from quantizers.tangent import tangent
from quantizers.uniform import fake_quantize, quantize

METADATA = {"recipe": "w8a8", "calibration_fingerprint": "00ff", "tool_version": "1.2"}
PRODUCTS = frozenset({"linear", "conv2d", "matmul"})


def session(path: Path, optimized: Path | None = None, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    # The optimized model holds kernels of this machine, about which ONNX Runtime warns.
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Tensor, optimize: bool = True) -> list[np.ndarray]:
    runner = session(path, optimize=optimize)
    names = [entry.name for entry in runner.get_inputs()]
    return runner.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def export(source: Calibrated, directory: Path, target: str = DEFAULT_TARGET) -> Path:
    path = directory / "model.onnx"
    export_onnx(source, path, METADATA, target)
    return path


def kernels(path: Path) -> Mapping[str, int]:
    """Return how often each operator stands in what ONNX Runtime makes of a file."""
    optimized = path.with_name("optimized.onnx")
    session(path, optimized)
    return collections.Counter(node.op_type for node in onnx.load(optimized).graph.node)


def emulate(source: Calibrated, *inputs: Tensor, target: str = DEFAULT_TARGET) -> list[np.ndarray]:
    """Run what the file means in torch: operands of products in their formats, all else in float."""
    layout = LAYOUTS[target]
    formats = formats_of(source, layout)

    def on_edge(operation: Operation, position: int, value: Tensor) -> Tensor:
        if operation.op not in PRODUCTS:
            return value
        if position == 2 and not layout.integer_bias:
            return value
        if position == 2:
            step = torch.from_numpy(np.float32(formats[operation.name, 0].scales())) * torch.tensor(
                formats[operation.name, 1].scale
            )
            return (value.double() / step.double()).round().float() * step
        qparams = formats[operation.name, position]
        if isinstance(qparams, CodebookQParams):
            return nearest_in_steps(value, qparams)
        if isinstance(qparams, RowRelativeQParams):
            relative = CodebookQParams(qparams.codebook, float(np.float32(1 / qparams.peak)), 0)
            levels = nearest_in_steps(value / value.amax(-1, keepdim=True), relative)
            return levels / levels.sum(-1, keepdim=True)
        if len(qparams.scale) > 1 and qparams.axis == 0:
            return fake_quantize(value[0], qparams)[None]
        return fake_quantize(value, qparams)

    with torch.no_grad():
        return [result.numpy() for result in execute(source.graph, inputs, on_edge)]


def nearest_in_steps(value: Tensor, qparams: CodebookQParams) -> Tensor:
    """Round to whole steps of a level, then to the nearest level: integers, in which ties are exact."""
    levels = torch.from_numpy(carrier_table(qparams.codebook))[quantize(value, qparams.carrier).long()]
    return (levels.float() - qparams.zero_point) * torch.tensor(qparams.scale)


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {entry.name: numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer}


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


# The file -------------------------------------------------------------------------------------------


def test_file_is_valid_and_says_what_it_is(tmp_path: Path) -> None:
    path = export(calibrated("ours"), tmp_path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
    assert (model.producer_name, model.producer_version) == ("vit-ptq", tool_version())
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    assert {node.domain for node in model.graph.node} == {""}
    assert any(node.doc_string == "blocks.0.attn" for node in model.graph.node)
    assert session(path).get_modelmeta().custom_metadata_map == METADATA


def test_names_and_free_batch_size(tmp_path: Path) -> None:
    source = calibrated("ours")
    runner = session(export(source, tmp_path))
    assert [(entry.name, entry.shape) for entry in runner.get_inputs()] == [("images", ["batch", 1, 8, 8])]
    assert [(entry.name, entry.shape) for entry in runner.get_outputs()] == [("output", ["batch", 10])]
    stored = initializers(tmp_path / "model.onnx")
    for name, tensor in source.graph.constants.items():
        if name.endswith(".weight") and tensor.ndim > 1:
            assert stored[f"{name}_quantized"].dtype == np.int8
            assert len(stored[f"{name}_scale"]) == len(stored[f"{name}_zero_point"]) == len(tensor)
            assert abs(stored[f"{name}_quantized"].astype(int)).max() == 127


def test_same_bytes(tmp_path: Path) -> None:
    for name in ("first.onnx", "second.onnx"):
        export_onnx(calibrated("ours"), tmp_path / name, dict(reversed(METADATA.items())))
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


def test_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"model\.onnx exists; choose another path"):
        export_onnx(calibrated("ours"), path, METADATA)
    assert path.read_bytes() == b"mine"


def test_nothing_is_left_where_the_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("refused")

    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(onnx.checker.ValidationError):
        export_onnx(calibrated("ours"), tmp_path / "model.onnx", METADATA)
    assert list(tmp_path.iterdir()) == []


# The numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("chosen", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_networks_compute_what_the_file_means(name: str, chosen: str, target: str, tmp_path: Path) -> None:
    source = calibrated(name, RECIPES[chosen])
    runner = session(export(source, tmp_path, target))
    (entry,) = runner.get_inputs()
    found, meant, real = [], [], []
    for batch in (1, 3):
        x = images(name, batch, seed=batch)
        found += runner.run(None, {entry.name: x.numpy()})
        meant += emulate(source, x, target=target)
        real += [result.detach().numpy() for result in execute(source.float_graph(), (x,))]
    found, meant, real = (np.concatenate(parts) for parts in (found, meant, real))
    # Float operators of two libraries differ in last bits, which moves a value that lies on the edge of two
    # codes to the other one. Such moves are few, and each is no larger than the rounding of every value that
    # separates `meant` from `real`; without any, the difference is about 1e-6 of the outputs.
    assert distance(found, meant) <= 0.5 * distance(meant, real)
    assert distance(meant, real) <= 0.2 * np.linalg.norm(real)
    assert (found.argmax(-1) == meant.argmax(-1)).mean() >= 0.75


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)])
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_of_heads_are_exact(
    target: str, shape: tuple[int, ...], bits: int, symmetric: bool, tmp_path: Path
) -> None:
    layers = [nn.Linear(8, 8) for _ in range(3)]
    source = calibrated_formula(Formula(heads, *layers), *shape, chosen=head_recipe(bits, symmetric=symmetric))
    assert {len(entry.qparams.scale) for entry in source.sites if entry.site.kind in KINDS} == {2}
    path = export(source, tmp_path, target)
    for batch in (1, 3):
        x = 2 * torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))
        (found,), (meant,) = run(path, x), emulate(source, x, target=target)
        assert distance(found, meant) <= 1e-5 * np.linalg.norm(meant)


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("case", product_cases())
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 3)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_exact(
    target: str, case: str, weight_bits: int, activation_bits: int, symmetric: bool, tmp_path: Path
) -> None:
    module, shape = product_cases()[case]
    source = calibrated_formula(module, *shape, chosen=recipe(weight_bits, activation_bits, symmetric=symmetric))
    path = export(source, tmp_path, target)
    for batch in (1, 3):
        # Twice what calibration saw, so that every format saturates.
        x = 2 * torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))
        (found,), (meant,) = run(path, x), emulate(source, x, target=target)
        assert found.shape == meant.shape
        # Sums are exact in int32, and codes agree unless a value lies on their edge, which none of these does.
        assert np.abs(found - meant).max() <= 1e-5 * np.abs(meant).max()


@pytest.mark.parametrize("name", FAMILIES)
def test_codebooks_compute_what_the_file_means(name: str, tmp_path: Path) -> None:
    source = codebook_model(name)
    runner = session(export(source, tmp_path))
    (entry,) = runner.get_inputs()
    found, meant, simulated, real = [], [], [], []
    for batch in (1, 3, 12):
        x = images(name, batch, seed=batch)
        found += runner.run(None, {entry.name: x.numpy()})
        meant += emulate(source, x)
        simulated += [result.numpy() for result in simulate(source, (x,))]
        real += [result.detach().numpy() for result in execute(source.float_graph(), (x,))]
    found, meant, simulated, real = (np.concatenate(parts) for parts in (found, meant, simulated, real))
    # As for uniform formats: last bits of float operators move few values over a threshold.
    assert distance(found, meant) <= 0.5 * distance(meant, real)
    # The simulation has formats before LayerNorm, softmax and GELU as well, and takes the nearest level without
    # rounding to whole steps first; a value beside a threshold then has the other level, which is as near. So the two
    # err alike: two errors that had nothing in common would be 1.4 apart.
    assert distance(found, simulated) <= 1.25 * distance(simulated, real)
    assert distance(found, real) <= 1.25 * distance(simulated, real)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("case", product_cases())
@pytest.mark.parametrize("codebook", [log_sqrt2(3), adalog(4, 20), tangent(8, 1.2), uniform_codebook(4)])
def test_levels_are_exact(target: str, case: str, codebook: Codebook, tmp_path: Path) -> None:
    module, shape = product_cases()[case]
    kinds = ("image", "linear_input", "query", "key", "value", "probability", "matmul_left", "matmul_right")
    source = with_codebooks(calibrated_formula(module, *shape), dict.fromkeys(kinds, codebook))
    path = export(source, tmp_path, target)
    # onnxruntime rounds float operands of products with int8 weights to 8 bits of its own.
    optimize = target != "tensorrt"
    for batch in (1, 3):
        x = 2 * torch.randn((batch, *shape), generator=torch.Generator().manual_seed(batch))
        (found,), (meant,) = run(path, x, optimize=optimize), emulate(source, x, target=target)
        assert np.abs(found - meant).max() <= 1e-5 * np.abs(meant).max()


def test_codebooks_need_standard_operators_only(tmp_path: Path) -> None:
    """Between the ends of an ordinary pair stand Cast and Gather; the table holds the nearest level to each byte."""
    source = codebook_model("ours")
    path = export(source, tmp_path)
    model, stored = onnx.load(path), initializers(path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    readers = {name: node for node in model.graph.node for name in node.input}
    gathers = [node for node in model.graph.node if node.op_type == "Gather"]
    # Two blocks with probabilities, values and the input of fc2 each.
    assert len(gathers) == 6
    for gather in gathers:
        assert readers[gather.output[0]].op_type == "DequantizeLinear"
        assert stored[gather.input[0]].dtype == np.uint8
    tables = [log_sqrt2(4), tangent(6, 1.2), adalog(6, 20)]
    expected = {carrier_table(codebook).tobytes() for codebook in tables}
    assert {stored[gather.input[0]].tobytes() for gather in gathers} == expected
    (total,) = (node for node in model.graph.node if node.op_type == "ReduceSum" and node.doc_string == "blocks.0.attn")
    assert readers[total.output[0]].op_type == "Div"


def test_even_probabilities_keep_their_form(tmp_path: Path) -> None:
    """Runtimes fuse attention around plain probabilities."""
    nodes = onnx.load(export(calibrated("ours"), tmp_path)).graph.node
    assert not {"Gather", "ReduceMax", "ReduceSum", "Div"} & {node.op_type for node in nodes}


def test_every_operator_has_a_writer() -> None:
    assert WRITERS.keys() == EXECUTORS.keys()
    assert UNARY_WRITERS.keys() == UNARY_FUNCTIONS.keys()


def _compare_with_float(graph: Graph, directory: Path, *inputs: Tensor) -> None:
    """Export a graph without products, whose file is a float one, and run it beside the graph that it holds."""
    source = calibrate(graph, [tuple(x[0] for x in inputs)], Recipe("t", (Rule(QuantSpec(8)),)))
    path = export(source, directory)
    assert not any("Quantize" in node.op_type for node in onnx.load(path).graph.node)
    for found, expected in zip(run(path, *inputs), execute(source.graph, inputs), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", UNARY_FUNCTIONS)
def test_unary_functions(function: str, tmp_path: Path) -> None:
    operation = Operation("y", "unary", ("x",), {"function": function}, (201,))
    graph = Graph((("x", (201,)),), {}, (operation,), (("y", "y"),))
    _compare_with_float(graph, tmp_path, torch.linspace(-10, 10, 603).reshape(3, 201))


def test_float_operators_broadcast_as_samples_do(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    constants = {name: torch.randn(shape, generator=generator) for name, shape in CONSTANT_SHAPES.items()}
    graph = Graph(FLOAT_INPUTS, constants, FLOAT_OPERATIONS, FLOAT_OUTPUTS)
    for batch in (1, 3, 4):
        (tmp_path / "model.onnx").unlink(missing_ok=True)
        inputs = [torch.randn((batch, *shape), generator=generator) for _, shape in graph.inputs]
        _compare_with_float(graph, tmp_path, *inputs)


def test_bias_is_in_steps_of_input_times_weight(tmp_path: Path) -> None:
    source = calibrated("ours")
    formats = source.by_edge()
    stored = initializers(export(source, tmp_path))
    layers = [operation for operation in source.graph.operations if operation.op in ("linear", "conv2d")]
    assert len(layers) == 10
    for layer in layers:
        step = np.float32(formats[layer.name, 0].scale[0]) * np.array(formats[layer.name, 1].scale, np.float32)
        bias = source.graph.constants[layer.inputs[2]].numpy().astype(np.float64)
        np.testing.assert_array_equal(stored[f"{layer.inputs[2]}_scale"], step)
        assert stored[f"{layer.inputs[2]}_quantized"].dtype == np.int32
        np.testing.assert_array_equal(stored[f"{layer.inputs[2]}_quantized"], np.rint(bias / step.astype(np.float64)))


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_narrow_formats_use_their_codes_only(bits: int, tmp_path: Path) -> None:
    path = export(calibrated("ours", recipe(bits, bits)), tmp_path)
    model = onnx.load(path)
    codes = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in codes)
    watched = tmp_path / "watched.onnx"
    onnx.save(model, watched)
    half = 1 << (bits - 1)
    for name, found in zip(codes, run(watched, 3 * images("ours", 4)), strict=True):
        lowest, highest = (0, 2 * half - 1) if found.dtype == np.uint8 else (-half, half - 1)
        assert lowest <= found.min(), name
        assert found.max() <= highest, name
    for name, stored in initializers(path).items():
        if name.endswith(".weight_quantized"):
            assert abs(stored.astype(int)).max() == half - 1


def test_zero_points_are_zero_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    for symmetric in (True, False):
        directory = tmp_path / str(symmetric)
        path = export(calibrated("ours", recipe(symmetric=symmetric)), directory)
        stored = initializers(path)
        nodes = [node for node in onnx.load(path).graph.node if node.op_type == "QuantizeLinear"]
        zeros = [int(stored[node.input[2]]) for node in nodes]
        assert {stored[node.input[2]].dtype.name for node in nodes} == {"int8", "uint8"}
        assert any(zeros) != symmetric


# The kernels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_runs_on_integers(name: str, chosen: str, tmp_path: Path) -> None:
    found = kernels(export(calibrated(name, RECIPES[chosen]), tmp_path))
    expected = collections.Counter(operation.op for operation in traced(name).operations)
    assert not {"Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Conv", "FusedConv", "DequantizeLinear"} & set(found)
    assert found["QGemm"] == expected["linear"] + expected["conv2d"]
    assert found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == expected["matmul"]


@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_levels_run_on_integers(name: str, tmp_path: Path) -> None:
    found = kernels(export(codebook_model(name), tmp_path))
    expected = collections.Counter(operation.op for operation in traced(name).operations)
    assert not {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(found)
    assert found["QGemm"] == expected["linear"] + expected["conv2d"]
    assert found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == expected["matmul"]


@pytest.mark.parametrize("bits", [4, 6])
def test_narrow_formats_run_on_integers_too(bits: int, tmp_path: Path) -> None:
    found = kernels(export(calibrated("ours", recipe(bits, bits)), tmp_path))
    assert found["QGemm"] == 10
    assert found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 4


@pytest.mark.parametrize("shape", [(16,), (5, 16)])
def test_linears_that_share_an_input_run_on_integers(shape: tuple[int, ...], tmp_path: Path) -> None:
    layers = [nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)]
    found = kernels(export(calibrated_formula(Formula(_two_heads, nn.LayerNorm(16), *layers), *shape), tmp_path))
    assert found["QGemm"] == 4
    assert "Gemm" not in found


def _two_heads(x: Tensor, norm: nn.Module, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> object:
    shared = norm(x)
    return c(a(shared)), d(b(shared))
