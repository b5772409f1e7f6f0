"""A ``.pt2`` file: what ``torch.export.save`` writes.

``torch.export.load`` falls back to unrestricted pickle for several entries of the archive, so a prepared file
could run code. The archive is checked first: the graph is JSON and the weights are raw bytes in what
``torch.export.save`` writes today, and the example inputs must load with ``weights_only=True``. A file
that needs more is refused.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ptq.preprocessing import Preprocessing
from ptq.sources.parts import Parts, image_size
from quantizers.errors import ModelError, UsageError

_EXPORT_AGAIN = "export it again with torch.export.save of a current torch, from a model of plain tensors"

#: The attribute that holds the exported module.
WRAPPED = "exported"
#: How the JSON of a program names a quantize or dequantize operator.
_QUANTIZED = b"torch.ops.quantized_decomposed."


def load_exported(path: Path) -> Parts:
    """Read an exported program; its example input gives the input size.

    Raises:
        ModelError: missing, damaged, in need of pickle, not of one image input, or of a fixed batch size.
        UsageError: it is quantized already.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected an exported program")
    try:
        _refuse_pickles(path)
        _refuse_quantized(path)
        program = torch.export.load(path)
    except (ModelError, UsageError):
        raise
    # A damaged archive surfaces as one of several unrelated types.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{path}: not a readable exported program: {type(error).__name__}: {reason}") from error
    examples: tuple[Any, ...] = program.example_inputs or ((), {})
    arguments, keywords = examples
    if len(arguments) != 1 or keywords or not isinstance(arguments[0], Tensor) or arguments[0].ndim != 4:
        raise ModelError(f"{path}: expected a program with one example input (batch, channels, height, width)")
    _require_dynamic_batch(program, path)
    # The guards of the export would become part of the graph; tracing checks the shapes anew.
    module = _InItsOwnMode(program.module(check_guards=False))
    size = image_size(arguments[0])
    return Parts(module, Preprocessing.identity(size), example=arguments[0], measure_classes=True)


class _InItsOwnMode(nn.Module):
    """An exported module cannot change its mode; it was exported in the one it has."""

    def __init__(self, exported: nn.Module) -> None:
        super().__init__()
        self.exported = exported

    def train(self, mode: bool = True) -> _InItsOwnMode:
        """Keep the mode of the export."""
        del mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Run the program."""
        result: Tensor = self.exported(images)
        return result


def _refuse_pickles(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if "archive_format" not in names:
            raise ModelError(f"{path}: an old or foreign format that would need pickle: {_EXPORT_AGAIN}")
        for entry, name in names.items():
            folder, file = PurePosixPath(entry).parent.as_posix(), PurePosixPath(entry).name
            if folder in ("data/weights", "data/constants"):
                if file.endswith("_config.json"):
                    pickled = _needs_pickle(json.loads(archive.read(name)))
                else:
                    pickled = not file.startswith(("weight_", "tensor_"))
                if pickled:
                    raise ModelError(f"{path}: {entry} would need pickle, which can run any code: {_EXPORT_AGAIN}")
            if folder == "data/sample_inputs":
                _require_plain_tensors(archive.read(name), f"{path}: {entry}")


def _refuse_quantized(path: Path) -> None:
    # Before torch reads the file: it does where nobody declared these operators, and then it names no reason.
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            entry = PurePosixPath(name)
            if entry.parent.name == "models" and _QUANTIZED in archive.read(name):
                raise UsageError(
                    f"{path} is quantized already: it holds operators of torch.ops.quantized_decomposed, as "
                    "'ptq export --format pt2' writes them; run it with torch, or quantize the float model it came from"
                )


def _needs_pickle(document: Any) -> bool:
    if isinstance(document, dict):
        return bool(document.get("use_pickle")) or any(_needs_pickle(value) for value in document.values())
    return isinstance(document, list) and any(_needs_pickle(value) for value in document)


def _require_plain_tensors(data: bytes, where: str) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    # The restricted unpickler raises UnpicklingError, and for damaged bytes anything.
    except Exception as error:
        raise ModelError(f"{where} would need pickle, which can run any code: {_EXPORT_AGAIN}") from error


def _require_dynamic_batch(program: ExportedProgram, path: Path) -> None:
    name = program.graph_signature.user_inputs[0]
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    if isinstance(shape[0], int):
        raise ModelError(
            f"{path}: was exported for batches of exactly {shape[0]}; export it with a dynamic batch axis:\n"
            "  torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
        )
