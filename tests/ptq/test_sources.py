"""Every kind of MODEL, with random weights; what does not fit is named."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.embedded import MODEL_ARGS, write_model
from torch import nn

from calibration.trace import trace
from ptq.preprocessing import Preprocessing
from ptq.sources import load_model
from ptq.sources.processor_config import read_processor_config
from ptq.sources.torchvision_shim import define_torchvision_schemas
from ptq.vision_transformer import VisionTransformer
from quantizers.errors import ModelError, UsageError


def tiny() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**MODEL_ARGS).eval()


def test_directory(tmp_path: Path) -> None:
    loaded = load_model(str(write_model(tmp_path / "model")), {"mean": (0.25,), "std": None})
    assert loaded.source == "model"
    assert (loaded.num_classes, loaded.label_names) == (4, None)
    assert loaded.preprocessing == Preprocessing((1, 8, 8), (0.25,), (0.25,))
    assert loaded.example_inputs[0].shape == (2, 1, 8, 8)
    assert not loaded.module.training
    assert loaded.weights_sha256 == load_model(str(tmp_path / "model")).weights_sha256
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["head.bias"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert loaded.weights_sha256 != load_model(str(tmp_path / "model")).weights_sha256


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"found no config\.json"),
        ("{", r"config\.json: not JSON"),
        ("[]", "expected keys and values, got list"),
        ("{}", "expected the key architecture"),
        (json.dumps({"architecture": "vision_transformer", "model_args": {"depht": 1}}), "depht"),
        (
            json.dumps({"architecture": "vision_transformer", "model_args": MODEL_ARGS, "pretrained_cfg": {}}),
            "pretrained_cfg: the preprocessing configuration lacks input_size",
        ),
    ],
)
def test_directories_that_cannot_be_read(tmp_path: Path, config: str | None, message: str) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path / "model"))


def test_truncated_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
        load_model(str(tmp_path / "model"))
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: no such file"):
        load_model(str(tmp_path / "model"))


def test_input_size_that_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not run on images of \(1, 12, 12\).*check --input-size"):
        load_model(str(write_model(tmp_path / "model")), {"input_size": (12,)})


def test_a_quantized_model_is_not_a_float_one(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ModelError, match="is quantized already"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_formats_that_need_pickle(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ModelError, match="would need pickle, which can run any code"):
        load_model(str(tmp_path / f"model{suffix}"))


def export(path: Path, model: nn.Module, dynamic: bool = True) -> None:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=shapes), path)


def test_exported_program(tmp_path: Path) -> None:
    """It runs at any batch size, keeps its mode, and traces."""
    model = tiny()
    export(tmp_path / "m.pt2", model)
    loaded = load_model(str(tmp_path / "m.pt2"), {"mean": (0.5,)})
    assert (loaded.source, loaded.num_classes) == ("m.pt2", 4)
    assert loaded.preprocessing == Preprocessing((1, 8, 8), (0.5,), (1.0,))
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(loaded.module(images), model(images))
    assert trace(loaded.module, loaded.example_inputs).outputs


def test_exported_program_of_a_fixed_batch(tmp_path: Path) -> None:
    export(tmp_path / "m.pt2", tiny(), dynamic=False)
    with pytest.raises(ModelError, match=r"exactly 2; export it with a dynamic batch axis"):
        load_model(str(tmp_path / "m.pt2"))


def rewrite(path: Path, ending: str, data: bytes) -> None:
    """Replace the one entry of a zip archive whose name ends so."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in entries if name.endswith(ending)]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, data if entry == name else content)


class Hostile:
    """What unpickling must never run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("was_run"),)  # type: ignore[return-value]


def test_exported_program_never_runs_pickled_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export.load falls back to unrestricted pickle for these entries; here they are refused before."""
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(Hostile(), buffer)
    path = tmp_path / "m.pt2"

    export(path, tiny())
    rewrite(path, "sample_inputs/model.pt", buffer.getvalue())
    with pytest.raises(ModelError, match="would need pickle"):
        load_model(str(path))

    export(path, tiny())
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("model_weights_config.json")]
        config = json.loads(archive.read(name))
    next(iter(config["config"].values()))["use_pickle"] = True
    rewrite(path, "weights/weight_0", buffer.getvalue())
    rewrite(path, "model_weights_config.json", json.dumps(config).encode())
    with pytest.raises(ModelError, match="would need pickle"):
        load_model(str(path))

    path.write_bytes(buffer.getvalue())  # a plain torch.save file is a zip archive too
    with pytest.raises(ModelError, match="would need pickle"):
        load_model(str(path))
    assert not (tmp_path / "was_run").exists()


def test_damaged_exported_program(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_model(str(tmp_path / "m.pt2"))
    (tmp_path / "m.pt2").write_bytes(b"PK but no archive")
    with pytest.raises(ModelError, match=r"m\.pt2: not a readable exported program"):
        load_model(str(tmp_path / "m.pt2"))


FACTORIES = """
import torch
from ptq import Preprocessing
model, image = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)), torch.zeros(1, 1, 8, 8)
def whole(): return model, (image,), {"mean": [0.5], "std": [0.5], "note": "ignored"}
def typed(): return model, image, Preprocessing((1, 8, 8), (0.1,), (0.2,))
def silent(): return model, image, None
def alone(): return model
def wrong(): return model, image, {"std": [0]}
def listed(): return model, image, [0.5]
def flat(): return model, torch.zeros(4), None
def small(): return model, torch.zeros(1, 1, 4, 4), None
def broken(): raise KeyError("weights")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, under a name that no other test has imported."""
    name = f"given_model_{re.sub('[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_factories(module: str) -> None:
    loaded = load_model(f"{module}:whole")
    assert (loaded.source, loaded.num_classes) == (f"{module}:whole", 5)
    assert loaded.preprocessing == Preprocessing((1, 8, 8), (0.5,), (0.5,))
    assert load_model(f"{module}:typed").preprocessing.std == (0.2,)
    assert load_model(f"{module}:silent").preprocessing == Preprocessing.identity((1, 8, 8))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alone", r"expected \(module, example input, preprocessing\), got Sequential"),
        ("wrong", "preprocessing: std must be positive"),
        ("listed", "the preprocessing must be a dict, a ptq.Preprocessing or None, got list"),
        ("flat", r"with an input \(batch, channels, height, width\)"),
        ("small", r"does not run on images of \(1, 4, 4\)"),
        ("broken", "raised KeyError: 'weights'"),
        ("absent", "has no callable 'absent'"),
    ],
)
def test_factories_that_do_not_fit(module: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(f"{module}:{name}")


VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-Ti fine-tuned, so to say, for seven classes."""
    define_torchvision_schemas()
    timm = pytest.importorskip("timm")
    path = tmp_path_factory.mktemp("timm") / "weights.safetensors"
    save_file(timm.create_model(VIT, num_classes=7).state_dict(), path)
    return path


def test_timm_checkpoint(checkpoint: Path) -> None:
    """The classes are the checkpoint's, the preprocessing is timm's, and no path is kept."""
    loaded = load_model(f"timm:{VIT}@{checkpoint}")
    assert (loaded.source, loaded.num_classes) == (f"timm:{VIT}@weights.safetensors", 7)
    assert loaded.preprocessing == Preprocessing((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)


def test_timm_at_another_size(checkpoint: Path) -> None:
    loaded = load_model(f"timm:{VIT}@{checkpoint}", {"input_size": (64,)})
    assert loaded.preprocessing.input_size == (3, 64, 64)
    assert loaded.module(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_timm_checkpoint_of_another_model(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)does not fit the model.*dist_token.*pos_embed \(checkpoint"):
        load_model(f"timm:deit_tiny_distilled_patch16_224@{checkpoint}")
    with pytest.raises(UsageError, match=r"timm has no model 'vit_teeny'; names like it: .*vit"):
        load_model(f"timm:vit_teeny@{checkpoint}")
    with pytest.raises(ModelError, match=r"absent\.safetensors: no such file"):
        load_model(f"timm:{VIT}@absent.safetensors")


def test_timm_directory(checkpoint: Path, tmp_path: Path) -> None:
    """The layout that timm itself puts on the hub."""
    (tmp_path / "model.safetensors").write_bytes(checkpoint.read_bytes())
    settings = {"input_size": [3, 224, 224], "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "label_names": list("abcdefg")}
    config = {"architecture": VIT, "num_classes": 7, "pretrained_cfg": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    assert (loaded.num_classes, loaded.label_names) == (7, tuple("abcdefg"))
    assert loaded.preprocessing.mean == (0.1, 0.2, 0.3)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A transformers ViT in a directory of its own layout."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=6,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    processor = {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "vit"


def test_transformers_classifier(classifier: Path) -> None:
    loaded = load_model(f"hf:{classifier}")
    assert (loaded.source, loaded.num_classes) == ("hf:vit", 6)
    assert loaded.preprocessing == Preprocessing((3, 8, 8), (0.5,) * 3, (0.25,) * 3, "bicubic", crop_mode="squash")
    assert loaded.module(torch.zeros(3, 3, 8, 8)).shape == (3, 6)
    assert load_model(str(classifier)).weights_sha256 == loaded.weights_sha256


def test_transformers_backbone_and_missing_weights(classifier: Path) -> None:
    """A backbone gives features; a classifier whose head is missing would be random, and is refused."""
    weights = load_file(classifier / "model.safetensors")
    headless = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier")}
    save_file(headless, classifier / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 weights missing.*classifier\.bias"):
        load_model(f"hf:{classifier}")
    config = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps({**config, "architectures": ["ViTModel"]}))
    loaded = load_model(f"hf:{classifier}")
    assert loaded.num_classes is None
    assert loaded.module(torch.zeros(3, 3, 8, 8)).shape == (3, 16)


def test_transformers_without_safetensors(classifier: Path) -> None:
    (classifier / "model.safetensors").rename(classifier / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(f"hf:{classifier}")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", crop_mode="squash")),
        ({"size": 24, "do_normalize": False, "image_mean": [0.5] * 3},
         Preprocessing((3, 24, 24), (0.0,) * 3, (1.0,) * 3, "bilinear", crop_mode="squash")),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
         Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3, "bilinear", 0.8)),
        ({"size": {"shortest_edge": 20}, "crop_pct": 0.5, "resample": 0},
         Preprocessing((3, 20, 20), (0.0,) * 3, (1.0,) * 3, "nearest", 0.5)),
    ],
)  # fmt: skip
def test_processor_configurations(config: dict[str, object], expected: Preprocessing) -> None:
    assert read_processor_config(config, (3, 32, 32)) == expected


def test_unknown_models() -> None:
    with pytest.raises(ModelError, match="no such model: nothing; expected timm:NAME"):
        load_model("nothing")
