"""The torch.export program: standard operators, the QDQ file's numbers, any batch, the kernels of torch.compile."""

from __future__ import annotations

import collections
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from support.codebooks import with_codebooks
from support.command_line import run as run_command
from support.float_graph import CONSTANT_SHAPES, FLOAT_INPUTS, FLOAT_OPERATIONS, FLOAT_OUTPUTS
from support.models import calibrated, images, model, recipe, traced
from support.products import FAMILIES, RECIPES, calibrated_formula, codebook_model, product_cases
from torch import Tensor, nn

import ptq
from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import EXECUTORS, UNARY_FUNCTIONS, Graph, Operation, execute
from calibration.rules import Recipe, Rule
from calibration.simulate import simulate
from ptq.onnx_export import export_onnx
from ptq.pt2_export import export_pt2
from ptq.pt2_export.network import STEPS
from ptq.sources.exported import load_exported
from quantizers.codebook import Codebook
from quantizers.errors import UsageError
from quantizers.logarithm import log_sqrt2
from quantizers.spec import QuantSpec
from quantizers.tangent import tangent

ROOT = Path(__file__).resolve().parents[2]
METADATA = {"recipe": "w8a8", "calibration_fingerprint": "00ff", "tool_version": "1.2"}
QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor.default"
DEQUANTIZE_WEIGHT = "quantized_decomposed.dequantize_per_channel.default"


def export(source: Calibrated, directory: Path) -> Path:
    path = directory / "model.pt2"
    export_pt2(source, path, METADATA)
    return path


def outputs(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        result = torch.export.load(path).module()(*inputs)
    return [tensor.numpy() for tensor in (result if isinstance(result, tuple | list) else (result,))]


def qdq_outputs(source: Calibrated, directory: Path, *inputs: Tensor) -> np.ndarray:
    """Run the QDQ file as it is written: no operator is fused or replaced."""
    path = directory / "model.onnx"
    export_onnx(source, path, METADATA)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    runner = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in runner.get_inputs()]
    return runner.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


def operators(path: Path) -> collections.Counter[str]:
    graph = torch.export.load(path).graph
    return collections.Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


# The file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_pairs_stand_at_the_operands_of_products_only(name: str, tmp_path: Path) -> None:
    found = operators(export(calibrated(name), tmp_path))
    assert {target.partition(".")[0] for target in found} == {"aten", "quantized_decomposed"}
    products = collections.Counter(operation.op for operation in traced(name).operations)
    layers = products["linear"] + products["conv2d"]
    assert found[DEQUANTIZE_WEIGHT] == layers
    assert found[QUANTIZE] == found[DEQUANTIZE] == layers + 2 * products["matmul"]
    assert found["aten.linear.default"] == layers
    assert found["aten.matmul.default"] == products["matmul"]


def test_levels_are_a_table_between_the_pair(tmp_path: Path) -> None:
    path = export(codebook_model("ours"), tmp_path)
    assert {target.partition(".")[0] for target in operators(path)} == {"aten", "quantized_decomposed"}
    graph = torch.export.load(path).graph
    tables = [node for node in graph.nodes if str(node.target) == "aten.index.Tensor"]
    # Two blocks with probabilities, values and the input of fc2 each.
    assert len(tables) == 6
    assert {str(user.target) for node in tables for user in node.users} == {DEQUANTIZE}


def test_buffers_are_named_as_in_the_checkpoint(tmp_path: Path) -> None:
    source = calibrated("ours")
    stored = torch.export.load(export(source, tmp_path)).state_dict
    for name, tensor in source.graph.constants.items():
        if name.endswith(".weight") and tensor.ndim > 1:
            codes = stored[f"{name}_quantized"]
            assert codes.dtype == torch.int8
            assert codes.numel() == tensor.numel()
            assert len(stored[f"{name}_scale"]) == len(tensor)
        else:
            assert stored[name].dtype == torch.float32
    assert stored["pos_embed"].shape == (1, 5, 24)


def test_shared_and_folded_weights_have_buffers_of_their_own(tmp_path: Path) -> None:
    module = _SharedAndScaled()
    source = calibrated_formula(module, 5, 8)
    assert {"layer.bias", "layer.bias.folded"} <= set(source.graph.constants)
    x = torch.randn((3, 5, 8), generator=torch.Generator().manual_seed(0))
    found, expected = outputs(export(source, tmp_path), x)[0], qdq_outputs(source, tmp_path, x)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


class _SharedAndScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu()) * self.gamma


def test_file_says_what_it_is_and_not_where_it_was_made(tmp_path: Path) -> None:
    path = export(calibrated("ours"), tmp_path)
    extra = {"metadata.json": ""}
    graph = torch.export.load(path, extra_files=extra).graph
    assert json.loads(extra["metadata.json"]) == METADATA
    modules = {key for node in graph.nodes for key in node.meta.get("nn_module_stack", {})}
    assert {"blocks.0.attn", "blocks.1.mlp.fc2", "head"} <= modules
    with zipfile.ZipFile(path) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
    assert b"stack_trace" not in text
    assert str(ROOT).encode() not in text
    assert b"QuantizedNetwork" not in text


_WRITE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from support.models import calibrated
from ptq.pt2_export import export_pt2
export_pt2(calibrated("ours"), Path({path!r}), {metadata!r})
"""


def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    here, there = export(calibrated("ours"), tmp_path), tmp_path / "there.pt2"
    metadata = dict(reversed(METADATA.items()))
    code = _WRITE.format(root=str(ROOT), tests=str(ROOT / "tests"), path=str(there), metadata=metadata)
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment, cwd=tmp_path)
    assert there.read_bytes() == here.read_bytes()


def test_existing_file_is_kept_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"model\.pt2 exists; choose another path"):
        export_pt2(calibrated("ours"), path, METADATA)
    assert path.read_bytes() == b"mine"
    path.unlink()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_pt2(calibrated("ours"), path, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_published_forms_are_refused(tmp_path: Path) -> None:
    source = calibrated("ours")
    published = Calibrated(**{**vars(source), "recipe": Recipe("ivit-w8a8", source.recipe.rules, "published")})
    with pytest.raises(UsageError, match="recipe ivit-w8a8 uses the published integer forms"):
        export_pt2(published, tmp_path / "model.pt2", METADATA)
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_pickle_and_is_refused_as_a_model(tmp_path: Path) -> None:
    path = export(calibrated("ours"), tmp_path)
    with zipfile.ZipFile(path) as archive:
        names = [Path(name) for name in archive.namelist()]
        for name in names:
            if name.name.endswith("_config.json"):
                assert b'"use_pickle": true' not in archive.read(str(name))
        (example,) = (name for name in names if name.parent.name == "sample_inputs")
        torch.load(io.BytesIO(archive.read(str(example))), weights_only=True)
    with pytest.raises(UsageError, match=r"model\.pt2 is quantized already.*quantize the float model"):
        load_exported(path)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, out, path = images("ours", 4), tmp_path / "out", tmp_path / "model.pt2"
    quantized = ptq.quantize(model("ours"), x, method="minmax")
    quantized.save(out)
    assert run_command("export", out, "--format", "pt2", "-o", path) == 0
    quantized.export_pt2(tmp_path / "again.pt2")
    assert path.read_bytes() == (tmp_path / "again.pt2").read_bytes()
    assert run_command("export", out, "--format", "pt2", "-o", path) == 2
    assert run_command("quantize", path, "--data", tmp_path, "-o", tmp_path / "more") == 2
    assert "model.pt2 is quantized already" in capsys.readouterr().err


# The numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_networks_compute_what_the_qdq_file_computes(name: str, chosen: str, tmp_path: Path) -> None:
    source = calibrated(name, RECIPES[chosen])
    _compare_with_qdq(source, tmp_path, images(name, 12, seed=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_codebooks_compute_what_the_qdq_file_computes(name: str, tmp_path: Path) -> None:
    _compare_with_qdq(codebook_model(name), tmp_path, images(name, 12, seed=3))


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 8)])
def test_narrow_formats_compute_what_the_qdq_file_computes(bits: tuple[int, int], tmp_path: Path) -> None:
    _compare_with_qdq(calibrated("ours", recipe(*bits, symmetric=False)), tmp_path, images("ours", 12, seed=3))


def _compare_with_qdq(source: Calibrated, directory: Path, x: Tensor) -> None:
    found, expected = outputs(export(source, directory), x)[0], qdq_outputs(source, directory, x)
    real, simulated = execute(source.float_graph(), (x,))[0].numpy(), simulate(source, (x,))[0].numpy()
    # One multiplies by a reciprocal where the other divides, and float operators differ in last bits. Where that moves
    # a value to the neighbouring code, an output moves by about the step that eight bits have over the outputs' range;
    # without such a move the difference is about 1e-6.
    step = float(np.abs(expected).max()) / 127
    assert np.abs(found - expected).max() <= step
    assert distance(found, expected) <= 0.1 * distance(expected, real)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    # The simulation has formats at all sites: two errors with nothing in common would be 1.4 apart.
    assert distance(found, simulated) <= 1.25 * distance(simulated, real)


@pytest.mark.parametrize("case", product_cases())
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 3)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_products_are_exact(case: str, weight_bits: int, activation_bits: int, symmetric: bool, tmp_path: Path) -> None:
    module, shape = product_cases()[case]
    source = calibrated_formula(module, *shape, chosen=recipe(weight_bits, activation_bits, symmetric=symmetric))
    _compare_products(source, shape, tmp_path)


@pytest.mark.parametrize("case", product_cases())
@pytest.mark.parametrize("codebook", [log_sqrt2(3), tangent(8, 1.2)])
def test_levels_are_exact(case: str, codebook: Codebook, tmp_path: Path) -> None:
    module, shape = product_cases()[case]
    kinds = ("image", "linear_input", "query", "key", "value", "probability", "matmul_left", "matmul_right")
    source = with_codebooks(calibrated_formula(module, *shape), dict.fromkeys(kinds, codebook))
    _compare_products(source, shape, tmp_path)


def _compare_products(source: Calibrated, shape: tuple[int, ...], directory: Path) -> None:
    # Twice what calibration saw, so that every format saturates.
    x = 2 * torch.randn((3, *shape), generator=torch.Generator().manual_seed(3))
    found, expected = outputs(export(source, directory), x)[0], qdq_outputs(source, directory, x)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


_LOAD = """
import sys
import torch
import torch.ao.quantization.fx._decomposed
program = torch.export.load({path!r}).module()
x = torch.load({images!r})
with torch.no_grad():
    rows = [program(x[:batch]) for batch in (1, 2, 5)]
assert not {{"ptq", "calibration", "quantizers", "onnx"}} & set(sys.modules)
torch.save(rows, {results!r})
"""


def test_it_runs_where_only_torch_is_at_every_batch_size(tmp_path: Path) -> None:
    path, x = export(calibrated("ours"), tmp_path), images("ours", 5)
    torch.save(x, tmp_path / "x.pt")
    names = {"path": str(path), "images": str(tmp_path / "x.pt"), "results": str(tmp_path / "y.pt")}
    subprocess.run([sys.executable, "-c", _LOAD.format(**names)], check=True, timeout=120, cwd=tmp_path)
    expected = outputs(path, x)[0]
    for rows in torch.load(tmp_path / "y.pt"):
        np.testing.assert_allclose(rows.numpy(), expected[: len(rows)], rtol=0, atol=1e-5)


def test_every_operator_has_a_step() -> None:
    assert STEPS.keys() == EXECUTORS.keys()


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
        (tmp_path / "model.pt2").unlink(missing_ok=True)
        inputs = [torch.randn((batch, *shape), generator=generator) for _, shape in graph.inputs]
        _compare_with_float(graph, tmp_path, *inputs)


def _compare_with_float(graph: Graph, directory: Path, *inputs: Tensor) -> None:
    source = calibrate(graph, [tuple(x[0] for x in inputs)], Recipe("t", (Rule(QuantSpec(8)),)))
    for found, expected in zip(outputs(export(source, directory), *inputs), execute(source.graph, inputs), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)


# The kernels ----------------------------------------------------------------------------------------

_COMPILE = """
import json, re, sys
import torch
import torch.ao.quantization.fx._decomposed
import torch._inductor.config
from torch._inductor.utils import run_and_get_code
torch.set_num_threads(1)
torch._inductor.config.freezing = True
program = torch.export.load({path!r}).module()
x = torch.load({images!r})
with torch.no_grad():
    result, code = run_and_get_code(torch.compile(program, dynamic={dynamic}), x)
    error = float((result - program(x)).abs().max())
kernels = re.findall(r"onednn\\.(\\w+)|extern_kernels\\.(\\w+)", "".join(code))
print(json.dumps([["".join(kernel) for kernel in kernels], error]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_takes_all_linears(dynamic: bool, tmp_path: Path) -> None:
    """Ten linears, patch embedding included, run in integers; torch.compile has no such kernel for attention."""
    path = export(calibrated("ours"), tmp_path)
    torch.save(images("ours", 4), tmp_path / "x.pt")
    code = _COMPILE.format(path=str(path), images=str(tmp_path / "x.pt"), dynamic=dynamic)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    kernels, error = json.loads(done.stdout)
    assert collections.Counter(kernels) == {"qlinear_pointwise": 10, "bmm": 4}
    assert error <= 1e-5
