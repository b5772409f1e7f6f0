"""``ptq check``: integer products are seen as such, and planted faults are found and named."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from support.command_line import run
from support.embedded import write_images, write_model

from ptq.deployment import UNEXPLAINED, check_deployment
from ptq.deployment.products import find_products
from quantizers.errors import ArtifactError, UsageError

HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
RUNTIMES = [
    "onnxruntime",
    pytest.param("openvino", marks=pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    write_model(folder / "model")
    write_images(folder / "data.npz")
    run("quantize", folder / "model", "--data", folder / "data.npz", "-o", folder / "out", "--method", "minmax")
    run("export", folder / "out", "--format", "onnx", "-o", folder / "model.onnx")
    return folder / "model.onnx"


def changed(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def product(model: onnx.ModelProto, module: str, op: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op and node.doc_string == module)


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def float_bias(model: onnx.ModelProto) -> None:
    """Put the real values of a bias in the place of its codes."""
    node = product(model, "blocks.0.mlp.fc1", "Gemm")
    pair = maker(model, node.input[2])
    codes, scale = (numpy_helper.to_array(initializer(model, name)) for name in pair.input[:2])
    model.graph.initializer.append(numpy_helper.from_array((codes * scale).astype(np.float32), "plain_bias"))
    node.input[2] = "plain_bias"


def missing_quantizer(model: onnx.ModelProto) -> None:
    """Let a layer read its input as it is."""
    node = product(model, "blocks.0.attn.proj", "Gemm")
    quantize = maker(model, maker(model, node.input[0]).input[0])
    assert quantize.op_type == "QuantizeLinear"
    node.input[0] = quantize.input[0]


def shifted_zero_point(model: onnx.ModelProto) -> None:
    """Give the keys of a block a zero point that is not 0."""
    node = product(model, "blocks.0.attn", "MatMul")
    for pair in (maker(model, node.input[1]), maker(model, maker(model, node.input[1]).input[0])):
        pair.input[2] = "shifted"
    model.graph.initializer.append(numpy_helper.from_array(np.array(7, np.int8), "shifted"))


def wrong_step(model: onnx.ModelProto) -> None:
    """Double the step of a bias."""
    pair = maker(model, product(model, "blocks.0.attn.qkv", "Gemm").input[2])
    tensor = initializer(model, pair.input[1])
    tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))


#: Fault, the module that has it, what is said, and whether onnxruntime still multiplies integers there.
FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str, str, bool]] = {
    "float bias": (float_bias, "blocks.0.mlp.fc1", "float bias plain_bias", False),
    "missing activation quantizer": (missing_quantizer, "blocks.0.attn.proj", "is not quantized", False),
    "zero point in attention": (shifted_zero_point, "blocks.0.attn", "zero point 7 of the right operand", True),
    "step of a bias": (wrong_step, "blocks.0.attn.qkv", "is not input step x weight step", True),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_exported_file_runs_in_integers(exported: Path, runtime: str) -> None:
    found = check_deployment(exported, runtime, calls=2)
    assert found.integer_share == 1.0
    assert [report.findings for report in found.products] == [()] * len(found.products)
    modules = [report.module for report in found.products]
    assert modules.count("blocks.0.attn") == 2
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"} <= set(modules)
    assert all(report.milliseconds is None or report.milliseconds >= 0 for report in found.products)
    assert sum(report.milliseconds or 0.0 for report in found.products) > 0
    assert found.others
    assert found.version[0].isdigit()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(exported: Path, tmp_path: Path, runtime: str, fault: str) -> None:
    change, module, said, still_integer = FAULTS[fault]
    found = check_deployment(changed(exported, tmp_path / "fault.onnx", change), runtime, calls=1)
    faulty = [report for report in found.products if report.findings]
    assert [report.module for report in faulty] == [module]
    assert said in faulty[0].findings[0]
    if runtime == "onnxruntime":
        assert faulty[0].integer == still_integer
        assert found.integer_share == pytest.approx(1.0 if still_integer else 1 - 1 / len(found.products))


@pytest.mark.skipif(not HAS_OPENVINO, reason="OpenVINO is not installed")
def test_a_zero_point_in_attention_takes_integers_from_openvino(exported: Path, tmp_path: Path) -> None:
    found = check_deployment(changed(exported, tmp_path / "fault.onnx", shifted_zero_point), "openvino", calls=1)
    (faulty,) = (report for report in found.products if report.findings)
    assert not faulty.integer


def test_the_exit_code_says_whether_enough_is_integer(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", exported, "--min-integer-share", "1") == 0
    faulty = changed(exported, tmp_path / "fault.onnx", float_bias)
    capsys.readouterr()
    assert run("check", faulty, "--min-integer-share", "1") == 1
    seen = capsys.readouterr()
    assert "FLOAT" in seen.out
    assert "float bias plain_bias" in seen.out
    assert "less than asked for" in seen.err
    assert run("check", faulty, "--json") == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["runtime"] == "onnxruntime"
    assert 0 < document["integer_share"] < 1
    assert sum(not report["integer"] for report in document["products"]) == 1


def test_a_float_model_of_another_tool_is_explained(tmp_path: Path) -> None:
    """A product with a weight, a bias that is added behind, and a view between a pair and its product."""
    rng = np.random.default_rng(0)
    tensors = {
        "weight": rng.standard_normal((8, 4)).astype(np.float32),
        "bias": rng.standard_normal(4).astype(np.float32),
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], name="first"),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("QuantizeLinear", ["sum", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"]),
        helper.make_node("Transpose", ["values"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["values", "turned"], ["y"], name="second"),
    ]
    shapes = {"x": ["batch", 3, 8], "y": ["batch", 3, 3]}
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "float.onnx")
    first, second = find_products(model)
    assert first.findings[0].startswith("the left operand x is not quantized")
    assert any(text.startswith("float right operand weight") for text in first.findings)
    assert any(text.startswith("float bias bias") for text in first.findings)
    assert any("Transpose between the right operand" in text for text in second.obstacles)
    found = check_deployment(tmp_path / "float.onnx", "onnxruntime", calls=1)
    assert not found.products[0].integer


def test_integer_files_are_integer(exported: Path, tmp_path: Path) -> None:
    """The integer program as ONNX multiplies integers in every product."""
    path = tmp_path / "integer.onnx"
    assert run("export", exported.parent / "out", "--format", "onnx-integer", "-o", path) == 0
    found = check_deployment(path, "onnxruntime", calls=1)
    assert found.integer_share == 1.0
    assert UNEXPLAINED not in {text for report in found.products for text in report.findings}


def test_wrong_use_is_told(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", tmp_path / "none.onnx") == 2
    assert "expected an ONNX file" in capsys.readouterr().err
    (tmp_path / "text.onnx").write_text("no model")
    assert run("check", tmp_path / "text.onnx") == 1
    assert "not a valid ONNX file" in capsys.readouterr().err
    with pytest.raises(UsageError, match="expected one of onnxruntime, openvino"):
        check_deployment(exported, "tensorrt")
    with pytest.raises(ArtifactError, match="onnxruntime refuses"):
        check_deployment(changed(exported, tmp_path / "new.onnx", _future), "onnxruntime")


def _future(model: onnx.ModelProto) -> None:
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", 20), helper.make_opsetid("unknown.domain", 1)])
    model.graph.node[0].domain = "unknown.domain"
    model.graph.node[0].op_type = "Nothing"
