"""Quantized weights in the naming of compressed-tensors: their layout, and the network that they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.command_line import run as run_command
from support.models import calibrated, images, model, recipe
from support.products import FAMILIES, calibrated_formula, codebook_model
from torch import Tensor, nn

import ptq
from calibration.calibrated import Calibrated
from calibration.graph import Graph, Operation, execute
from calibration.rules import Rule
from ptq.compressed_tensors import export_compressed_tensors
from ptq.compressed_tensors.packing import PACKED_BITS, pack_rows
from ptq.recipes import named_recipe
from ptq.sources.prefix import checkpoint_prefix
from ptq.sources.torchvision_shim import define_torchvision_schemas
from quantizers.errors import UsageError
from quantizers.spec import QuantSpec
from quantizers.uniform import fake_quantize

METADATA = {"recipe": "w8a8", "source_weights_sha256": "00ff"}
RECIPES = {
    "w8a8": recipe(),
    "w4a8": recipe(4, 8),
    "w2a4": recipe(2, 4),
    "w3a8 affine": recipe(3, 8, symmetric=False),
    "repq": named_recipe("repq", "w4a4"),
}


def export(source: Calibrated, directory: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write the two files and read them back: tensors and config."""
    out = directory / "compressed"
    export_compressed_tensors(source, out, METADATA, prefix)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    return safetensors.torch.load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def groups_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(config["quantization_config"]["config_groups"].values())


def unpacked(words: Tensor, bits: int, shape: Tensor) -> Tensor:
    """Read codes bit by bit, in Python integers, as the layout is described."""
    rows = []
    for row in words.numpy().view(np.uint32):
        number = sum(int(word) << (32 * index) for index, word in enumerate(row))
        rows.append([(number >> (bits * k)) % (1 << bits) - (1 << (bits - 1)) for k in range(int(shape[1]))])
    return torch.tensor(rows)


def dequantized(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the float tensors that a reader gets, under the names of the checkpoint."""
    result = dict(tensors)
    for group in groups_of(config):
        for module in group["targets"]:
            scale = result.pop(f"{module}.weight_scale")
            if group["format"] == "pack-quantized":
                shape, words = result.pop(f"{module}.weight_shape"), result.pop(f"{module}.weight_packed")
                codes = unpacked(words, group["weights"]["num_bits"], shape)
            else:
                codes = result.pop(f"{module}.weight")
                assert codes.dtype == torch.int8
            result[f"{module}.weight"] = codes.float() * scale
            if group["input_activations"] is not None:
                assert result.pop(f"{module}.input_scale").shape == (1,)
                if not group["input_activations"]["symmetric"]:
                    assert result.pop(f"{module}.input_zero_point").dtype == torch.int8
    return result


def weight_quantized(source: Calibrated) -> Graph:
    """Return the graph with weights on the grids of their formats; activations are float."""
    constants = dict(source.graph.constants)
    for entry in source.sites:
        if entry.site.kind == "weight":
            constants[entry.site.value] = fake_quantize(constants[entry.site.value], entry.qparams)
        # Tables that tracing computed have no place in the file: they stay the checkpoint's.
        if entry.site.kind == "constant" and entry.site.value.endswith(".constant"):
            constants[entry.site.value] = source.float_constants.get(entry.site.value, constants[entry.site.value])
    return replace(source.graph, constants=constants)


# The network ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_into_the_model_they_are_the_weight_quantized_network(name: str, chosen: str, tmp_path: Path) -> None:
    source = calibrated(name, RECIPES[chosen])
    tensors, config = export(source, tmp_path)
    state, module = dequantized(tensors, config), copy.deepcopy(model(name))
    for path in config["vit_ptq"]["new_biases"]:
        module.get_submodule(path).bias = nn.Parameter(torch.zeros(len(state[f"{path}.bias"])))
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith((".gamma", "relative_position_bias_table")) for key in missing), missing
    assert bool(config["vit_ptq"]["folded"]) == any(key.endswith(".gamma") for key in missing)
    for key, parameter in module.named_parameters():
        if key in missing and key.endswith(".gamma"):
            nn.init.ones_(parameter)
    x = images(name, 3, seed=5)
    with torch.no_grad():
        found = module(x)
    (expected,) = execute(weight_quantized(source), (x,))
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_rewrites_and_corrections_are_in_the_tensors(tmp_path: Path) -> None:
    source = calibrated("ours", RECIPES["repq"])
    changed = {name for name in source.rewritten_constants if name.endswith("norm1.weight")}
    assert changed
    tensors, _ = export(source, tmp_path)
    for name in changed:
        assert torch.equal(tensors[name], source.graph.constants[name])
        assert not torch.equal(tensors[name], model("ours").state_dict()[name])


# The layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_codes(bits: int, tmp_path: Path) -> None:
    source = calibrated("ours", recipe(bits, 8))
    tensors, config = export(source, tmp_path)
    (group,) = groups_of(config)
    assert group["weights"] == {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    packed = bits in PACKED_BITS
    assert (
        group["format"] == config["quantization_config"]["format"] == ("pack-quantized" if packed else "int-quantized")
    )
    assert config["quantization_config"]["quantization_status"] == "compressed"
    width = -(-24 * bits // 32)
    expected = {"weight_packed": (72, width), "weight_shape": (2,)} if packed else {"weight": (72, 24)}
    expected |= {"weight_scale": (72, 1), "input_scale": (1,), "bias": (72,)}
    prefix = "blocks.0.attn.qkv."
    assert {
        key.removeprefix(prefix): tuple(tensor.shape) for key, tensor in tensors.items() if key.startswith(prefix)
    } == expected
    values = dequantized(tensors, config)
    for entry in source.sites:
        if entry.site.kind == "weight":
            assert torch.equal(
                values[entry.site.value], fake_quantize(source.graph.constants[entry.site.value], entry.qparams)
            )


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 33])
def test_rows_are_packed_apart(bits: int, width: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, width), generator=torch.Generator().manual_seed(width))
    words = pack_rows(codes.float(), bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-width * bits // 32))
    assert torch.equal(unpacked(words, bits, torch.tensor(codes.shape)), codes)


def test_formats_of_inputs_are_the_sites(tmp_path: Path) -> None:
    source = calibrated("ours", recipe(8, 8, symmetric=False))
    tensors, config = export(source, tmp_path)
    (group,) = groups_of(config)
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "tensor",
        "dynamic": False,
    }
    formats = source.by_edge()
    for operation in source.graph.operations:
        if operation.op == "linear":
            module, qparams = operation.inputs[1].removesuffix(".weight"), formats[operation.name, 0]
            assert float(tensors[f"{module}.input_scale"]) == qparams.scale[0]
            assert int(tensors[f"{module}.input_zero_point"]) == qparams.zero_point


def test_each_combination_of_widths_is_a_group(tmp_path: Path) -> None:
    base = recipe(4, 8)
    wide = Rule(QuantSpec(8, granularity="channel"), name="head.weight")
    _, config = export(calibrated("ours", replace(base, rules=(wide, *base.rules))), tmp_path)
    found = {tuple(group["targets"]): (group["format"], group["weights"]["num_bits"]) for group in groups_of(config)}
    assert found[("head",)] == ("int-quantized", 8)
    assert sorted(found.values()) == [("int-quantized", 8), ("pack-quantized", 4)]
    assert config["quantization_config"]["format"] == "mixed-precision"


def test_inputs_with_a_codebook_have_no_format(tmp_path: Path) -> None:
    tensors, config = export(codebook_model("ours"), tmp_path)
    without = [
        module for group in groups_of(config) if group["input_activations"] is None for module in group["targets"]
    ]
    assert without == ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]
    assert not any(f"{module}.input_scale" in tensors for module in without)


def test_convolutions_and_tables_are_float(tmp_path: Path) -> None:
    source = calibrated("ours")
    tensors, _ = export(source, tmp_path)
    kernel = source.graph.constants["patch_embed.proj.weight"]
    assert torch.equal(tensors["patch_embed.proj.weight"], fake_quantize(kernel, source.by_edge()[_conv(source)]))
    assert {name: tuple(tensors[name].shape) for name in ("pos_embed", "cls_token")} == {
        "pos_embed": (1, 5, 24),
        "cls_token": (1, 1, 24),
    }


def _conv(source: Calibrated) -> tuple[str, int]:
    return next((operation.name, 1) for operation in source.graph.operations if operation.op == "conv2d")


def test_a_weight_that_is_no_modules_is_float(tmp_path: Path) -> None:
    tensors, config = export(calibrated_formula(_RawWeight(), 5, 8), tmp_path)
    assert tensors["kernel"].dtype == torch.float32
    assert groups_of(config) == []


class _RawWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kernel)


class _Shared(nn.Module):
    def __init__(self, *, scaled: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.rand(8)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(self.layer(x).relu())
        return result if self.gamma is None else result * self.gamma


def test_shared_weights(tmp_path: Path) -> None:
    tensors, config = export(calibrated_formula(_Shared(scaled=False), 5, 8), tmp_path)
    # Two inputs in two formats share a module, which has place for one.
    assert [(group["targets"], group["input_activations"]) for group in groups_of(config)] == [(["layer"], None)]
    assert "layer.input_scale" not in tensors
    with pytest.raises(UsageError, match=r"layer\.bias has two values in the quantized network"):
        export_compressed_tensors(calibrated_formula(_Shared(scaled=True), 5, 8), tmp_path / "out", METADATA)
    assert not (tmp_path / "out").exists()


def test_a_bias_that_calibration_made_belongs_to_its_layer(tmp_path: Path) -> None:
    source = calibrated_formula(nn.Sequential(nn.Linear(8, 8, bias=False)), 5, 8)
    tensors, config = export(source, tmp_path / "zero")
    assert not any("bias" in name or "constant" in name for name in tensors)
    assert config["vit_ptq"]["new_biases"] == []
    (layer,) = (operation for operation in source.graph.operations if isinstance(operation, Operation))
    corrected = {**source.graph.constants, layer.inputs[2]: torch.ones(8)}
    tensors, config = export(replace(source, graph=replace(source.graph, constants=corrected)), tmp_path / "one")
    assert config["vit_ptq"]["new_biases"] == ["0"]
    assert torch.equal(tensors["0.bias"], torch.ones(8))


# The files ------------------------------------------------------------------------------------------


def test_same_bytes_and_metadata(tmp_path: Path) -> None:
    _, config = export(calibrated("ours"), tmp_path / "first")
    export_compressed_tensors(calibrated("ours"), tmp_path / "second", dict(reversed(METADATA.items())))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / "compressed" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert config["vit_ptq"] == {**METADATA, "folded": [], "new_biases": []}
    assert safetensors.torch.load_file(tmp_path / "second" / "model.safetensors")


def test_existing_directory_is_kept_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match=r"out exists; choose another path"):
        export_compressed_tensors(calibrated("ours"), out, METADATA)
    out.rmdir()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        export_compressed_tensors(calibrated("ours"), out, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_command_line(tmp_path: Path) -> None:
    quantized = ptq.quantize(model("ours"), images("ours", 4), method="minmax", bits="w4a8")
    quantized.save(tmp_path / "out")
    arguments = ("export", tmp_path / "out", "--format", "compressed-tensors", "-o", tmp_path / "weights")
    assert run_command(*arguments) == 0
    quantized.export_compressed_tensors(tmp_path / "again")
    for path in (tmp_path / "weights").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert run_command(*arguments) == 2


@pytest.mark.parametrize(
    ("source", "prefix"), [("hf:vit", "model."), ("a.pt2", "exported."), ("timm:vit_tiny", ""), ("directory", "")]
)
def test_names_are_those_of_the_checkpoint(source: str, prefix: str, tmp_path: Path) -> None:
    assert checkpoint_prefix(source) == prefix
    traced = calibrated_formula(nn.ModuleDict({"model": nn.Linear(8, 4)})["model"], 5, 8)
    renamed = {f"{prefix}{name}": tensor for name, tensor in traced.graph.constants.items()}
    operations = tuple(
        replace(
            entry, inputs=tuple(f"{prefix}{name}" if name in traced.graph.constants else name for name in entry.inputs)
        )
        for entry in traced.graph.operations
    )
    sites = tuple(
        replace(entry, site=replace(entry.site, value=f"{prefix}{entry.site.value}"))
        if entry.site.value in traced.graph.constants
        else entry
        for entry in traced.sites
    )
    graph = replace(traced.graph, constants=renamed, operations=operations)
    tensors, _ = export(replace(traced, graph=graph, sites=sites), tmp_path, prefix)
    assert {"weight", "bias"} <= set(tensors)


# The library ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", RECIPES)
@pytest.mark.parametrize("name", ["ours", "dinov2", "transformers"])
def test_the_library_reads_the_same_values(name: str, chosen: str, tmp_path: Path) -> None:
    define_torchvision_schemas()
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.model_compressors.model_compressor import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    source = calibrated(name, RECIPES[chosen])
    tensors, config = export(source, tmp_path)
    settings = QuantizationConfig.model_validate(config["quantization_config"])
    module = copy.deepcopy(model(name)).requires_grad_(False)
    apply_quantization_config(module, settings)
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(module)
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(key.endswith(".gamma") for key in missing), missing
    compressor.decompress_model(module)
    found = module.state_dict()
    for key, values in dequantized(tensors, config).items():
        assert torch.equal(found[key], values), key
