"""Where the files of one network lie; the parent, the preparation and the workers agree on it here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Runtimes that this project lays its INT8 ONNX files out for.
TARGETS = ("onnxruntime", "openvino", "tensorrt", "portable")
#: Settings of onnxruntime's ``quantize_static``: its own, and the fastest that were found.
STATIC: dict[str, dict[str, Any]] = {"default": {}, "best": {"per_channel": True, "activation_type": "QUInt8"}}
#: Of the preparation, in an order that works.
STEPS = (
    "bundle",
    *(f"preset:{target}" for target in TARGETS),
    "float_onnx",
    "nncf",
    *(f"static:{settings}" for settings in STATIC),
)


@dataclass(frozen=True, slots=True)
class Files:
    """Paths inside the folder of one network.

    Args:
        folder: made by whoever writes first.
    """

    folder: Path

    @property
    def images(self) -> Path:
        """Images to time and to check with, float32 ``.npy``."""
        return self.folder / "images.npy"

    @property
    def float_outputs(self) -> Path:
        """Answers of the float network in torch, float32 ``.npy``."""
        return self.folder / "float.npy"

    @property
    def integer_outputs(self) -> Path:
        """Answers of the reference interpreter, float32 ``.npy``; what our engine must give in every bit."""
        return self.folder / "integer.npy"

    @property
    def bundle(self) -> Path:
        """What our engine loads, a directory."""
        return self.folder / "bundle"

    def preset(self, target: str) -> Path:
        """Return the INT8 ONNX file that this project exports for a runtime."""
        return self.folder / f"int8-{target}.onnx"

    @property
    def float_onnx(self) -> Path:
        """The float network as ONNX, with a free batch size called ``batch``."""
        return self.folder / "float.onnx"

    @property
    def nncf(self) -> Path:
        """OpenVINO's model as NNCF quantized it; a ``.bin`` lies beside it."""
        return self.folder / "nncf.xml"

    def static(self, settings: str) -> Path:
        """Return what onnxruntime's ``quantize_static`` makes of the float network, ``default`` or ``best``."""
        return self.folder / f"static-{settings}.onnx"

    def made_by(self, step: str) -> Path:
        """Return what a step of :data:`STEPS` makes."""
        kind, _, variant = step.partition(":")
        match kind:
            case "preset":
                return self.preset(variant)
            case "static":
                return self.static(variant)
        return {"bundle": self.bundle, "float_onnx": self.float_onnx, "nncf": self.nncf}[step]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of what engines load; files that do not exist are left out."""
        parts = {
            "ours": [self.bundle],
            "int8 ONNX": [self.preset("onnxruntime")],
            "float ONNX": [self.float_onnx],
            "OpenVINO NNCF": [self.nncf, self.nncf.with_suffix(".bin")],
        }
        found = {title: sum(_size(path) for path in paths) for title, paths in parts.items()}
        return {title: size for title, size in found.items() if size}


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0
