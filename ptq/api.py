"""The Python face: quantize a module, and what a quantized model can do.

q = ptq.quantize(model, images, bits="w8a8")
q(x)                  # simulate: fake-quantized float
q.integer(x)          # interpret the IntegerProgram: the definition
q.compile("cpu")(x)   # the same integers through TVM, bit for bit
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.approximation import approximations
from calibration.cache import DEFAULT_MEMORY_LIMIT, remove_left_files
from calibration.calibrated import Calibrated, QParams
from calibration.engine import Options, Progress, calibrate
from calibration.graph import execute
from calibration.integerize import integerize, multipliers_of
from calibration.integerize.forms import require_integer_forms
from calibration.integerize.multipliers import Multipliers
from calibration.progress import ProgressStore
from calibration.qparams_json import format_label, format_name
from calibration.rules import Recipe
from calibration.serialize import (
    calibrated_from_bytes,
    calibrated_to_bytes,
    graph_to_bytes,
    recipe_to_json,
)
from calibration.simulate import simulate
from calibration.trace import trace
from ptq.artifact import read_artifact, write_artifact
from ptq.data import iterate_images
from ptq.preprocessing import Preprocessing
from ptq.recipes import DEFAULT_METHOD, named_recipe
from ptq.sources.weights import hash_weights
from ptq.version import tool_version
from quantizers.errors import DataError
from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from quantizers.integer.regimes import REGIMES, find_regimes
from quantizers.integer.serialize import program_from_bytes, program_to_bytes
from quantizers.row_relative import RowRelativeQParams


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized model. Frozen; equal to another one that would be written as the same bytes.

    Args:
        calibrated: the float graph with the formats of its sites.
        program: the verified integer program.
        preprocessing: how images become inputs, if known.
        provenance: where it comes from; texts.
    """

    calibrated: Calibrated
    program: IntegerProgram
    preprocessing: Preprocessing | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Simulate: the float graph with every site fake-quantized.

        Args:
            inputs: float32 (batch, channels, height, width), preprocessed, on any device; it runs there.

        Returns:
            float32 (batch, ...) on that device; a tuple where the model has several outputs.

        Raises:
            DataError: inputs of another shape or dtype.
        """
        return _single(simulate(self.calibrated, inputs, multipliers=self._multipliers))

    @functools.cached_property
    def _multipliers(self) -> Multipliers:
        return multipliers_of(self.calibrated)

    def float(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the float graph, without any quantization; shapes as in :meth:`__call__`."""
        with torch.no_grad():
            return _single(execute(self.calibrated.float_graph(), inputs))

    def integer(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Interpret the integer program, which defines what every backend computes; shapes as in :meth:`__call__`."""
        return _single(interpret(self.program, *inputs))

    def compile(self, target: str = "cpu", threads: int | None = None) -> Callable[..., Any]:
        """Compile the integer program through TVM.

        Args:
            target: ``cpu`` for this machine, ``cuda`` for its GPU, or a name from :mod:`tvm_backend.targets`.
            threads: worker threads; all cores by default.

        Returns:
            A function of float32 inputs (batch, ...), tensors or arrays, that returns the same kind.

        Raises:
            TargetError: an unknown target, or one that this machine cannot run.
        """
        from ptq.compiled import compile_program

        return compile_program(self.program, target, threads)

    def export_tvm(self, directory: str | Path, target: str = "cpu", *, tiles: str | Path | None = None) -> None:
        """Compile and write a bundle that runs without torch.

        Args:
            directory: to write.
            target: as for :meth:`compile`, for any machine.
            tiles: for GPUs, a file that ``ptq tune`` wrote; None is the default one if it exists.

        Raises:
            UsageError: the directory exists.
            TargetError: an unknown target.
            ArtifactError: the file of tiles cannot be read.
        """
        from ptq.compiled import write_bundle

        write_bundle(self.program, Path(directory), target, None if tiles is None else Path(tiles))

    def export_onnx(
        self, path: str | Path, target: str = "onnxruntime", *, int4: bool = False, batch_size: int | None = None
    ) -> None:
        """Write an INT8 ONNX file with quantize and dequantize nodes at opset 20.

        Args:
            path: the file.
            target: the runtime that it is laid out for: ``onnxruntime``, ``openvino``, ``tensorrt`` or ``portable``.
            int4: store weights of at most 4 bits as int4, at opset 21; their layers read float activations.
            batch_size: the only one that the file takes; any where None.

        Raises:
            UsageError: the file exists, the target is unknown, or there are no weights for int4.
        """
        from ptq.onnx_export import export_onnx

        export_onnx(self.calibrated, Path(path), self.metadata(), target, int4=int4, batch_size=batch_size)

    def export_onnx_integer(self, path: str | Path) -> None:
        """Write the integer program in standard ONNX operators, equal to :meth:`integer` in every bit; opset 20.

        Raises:
            UsageError: the file exists.
        """
        from ptq.onnx_integer import export_onnx_integer

        export_onnx_integer(self.program, Path(path), self.metadata())

    def export_pt2(self, path: str | Path) -> None:
        """Write a torch.export program with standard quantize and dequantize operators, for torch.compile.

        Raises:
            UsageError: the file exists, or the recipe uses published integer forms.
        """
        from ptq.pt2_export import export_pt2

        export_pt2(self.calibrated, Path(path), self.metadata())

    def export_compressed_tensors(self, directory: str | Path) -> None:
        """Write the quantized weights of linears as the compressed-tensors library names them, the rest in float32.

        Raises:
            UsageError: the directory exists, or layers share a parameter that has two values after quantization.
        """
        from ptq.compressed_tensors import export_compressed_tensors
        from ptq.sources.prefix import checkpoint_prefix

        prefix = checkpoint_prefix(self.provenance.get("source", ""))
        export_compressed_tensors(self.calibrated, Path(directory), self.metadata(), prefix)

    def metadata(self) -> dict[str, str]:
        """Return what exported files carry: recipe, calibration fingerprint, source hash, tool version."""
        return {
            "recipe": self.calibrated.recipe.name,
            "calibration_images": str(self.calibrated.num_images),
            "calibration_fingerprint": self.calibrated.fingerprint,
            "tool_version": tool_version(),
            **self.provenance,
        }

    def save(self, path: str | Path) -> None:
        """Write the artifact directory; the same object always writes the same bytes.

        Raises:
            UsageError: the path exists.
        """
        description, files = self._artifact()
        write_artifact(Path(path), description, files)

    def describe(self) -> dict[str, Any]:
        """Return what a summary holds: operator counts, sites, sizes in bytes, recipe, provenance."""
        _, files = self._artifact()
        doors = [node for node in self.program.nodes if node.op in ("quantize", "dequantize")]
        float_nodes = [node for node in self.program.nodes if node.type.dtype == "float32" and node not in doors]
        return {
            "integer_ops": len(self.program.nodes) - len(doors) - len(float_nodes),
            "float_ops": len(float_nodes),
            "sites": self._sites(format_label),
            "size_bytes": len(files["program.json"]) + len(files["program.safetensors"]),
            "float_size_bytes": sum(t.numel() * t.element_size() for t in self.calibrated.graph.constants.values()),
            "recipe": recipe_to_json(self.calibrated.recipe),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "provenance": self.metadata(),
        }

    def nonlinearities(self) -> dict[str, Any]:
        """Return what softmax, GELU and LayerNorm cost in both integer forms, and where a published form can fail.

        Returns:
            ``approximations``: for each operator and form the error against float, absolute and in steps of the result,
            as :mod:`calibration.approximation` measures it with the calibrated scales. ``regimes``: nodes of the
            program that can enter a failure regime, as :mod:`quantizers.integer.regimes` finds them.
        """
        measured = [
            {**dataclasses.asdict(entry), "largest_steps": entry.largest_steps, "mean_steps": entry.mean_steps}
            for entry in approximations(self.calibrated)
        ]
        regimes = [
            {**dataclasses.asdict(regime), **dataclasses.asdict(REGIMES[regime.kind])}
            for regime in find_regimes(self.program)
        ]
        return {"approximations": measured, "regimes": regimes}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Quantized):
            return NotImplemented
        return self._artifact() == other._artifact()

    __hash__ = None  # type: ignore[assignment]  # weights have no cheap hash

    def _sites(self, name: Callable[[QParams], str]) -> list[dict[str, Any]]:
        return [
            {
                "name": entry.site.name,
                "kind": entry.site.kind,
                "format": name(entry.qparams),
                "bits": entry.spec.bits,
                "granularity": "row" if isinstance(entry.qparams, RowRelativeQParams) else entry.spec.granularity,
            }
            for entry in self.calibrated.sites
        ]

    def _artifact(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        program, constants = program_to_bytes(self.program)
        model, weights = calibrated_to_bytes(self.calibrated)
        description = {
            "tool_version": tool_version(),
            "recipe": recipe_to_json(self.calibrated.recipe),
            "preprocessing": None if self.preprocessing is None else self.preprocessing.to_dict(),
            "sites": self._sites(format_name),
            "provenance": self.metadata(),
        }
        return description, {
            "program.json": program,
            "program.safetensors": constants,
            "model.json": model,
            "model.safetensors": weights,
        }


def quantize(
    model: nn.Module,
    images: Iterable[Any],
    *,
    method: str = DEFAULT_METHOD,
    bits: str = "w8a8",
    recipe: Recipe | None = None,
    example_inputs: tuple[Tensor, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    provenance: Mapping[str, str] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
    work_dir: Path | None = None,
    memory_limit: int = DEFAULT_MEMORY_LIMIT,
) -> Quantized:
    """Quantize a model: trace, calibrate, integerize.

    Args:
        model: any module that maps images to logits or features; it is set to eval mode, and not changed.
        images: calibration images, preprocessed: tensors (channels, height, width) or batches of them, tuples
            whose first element is one, or dicts that hold one. Read once; how they are batched does not matter.
        method: a key of :data:`ptq.recipes.RECIPES`; ignored where ``recipe`` is given.
        bits: weight and activation widths, for example ``w4a8``; ignored where ``recipe`` is given.
        recipe: rules of your own.
        example_inputs: float32 inputs to trace with; the first image where absent.
        preprocessing: kept in the artifact.
        provenance: texts that are kept in the artifact and in exported files, beside the hash of the weights.
        total: number of images if known, for progress only.
        progress: called with a stage, what is done and what there is to do.
        work_dir: where to keep intermediate results; a killed run that is repeated goes on from there.
        memory_limit: bytes of activations held in memory; what is more goes to files in ``work_dir``, or where the
            system has its temporary files.

    Returns:
        The quantized model.

    Raises:
        UsageError: an unknown method, impossible bits, or a recipe that does not fit.
        DataError: no image, or images that cannot be used.
        ModelError: the model cannot be traced, or holds NaN or infinity.
        UnsupportedOperatorError: operators without an integer form, all of them.
        ProgramError: an accumulator could overflow.
    """
    chosen = recipe if recipe is not None else named_recipe(method, bits)
    samples: Iterator[Tensor] = iter(iterate_images(images))
    if example_inputs is None:
        first = next(samples, None)
        if first is None:
            raise DataError("calibration needs at least one image, got none")
        example_inputs, samples = (first[None],), itertools.chain([first], samples)
    if progress is not None:
        progress("trace", 0, 1)
    graph = trace(model, example_inputs)
    require_integer_forms(graph, chosen.nonlinear)
    if progress is not None:
        progress("trace", 1, 1)
    store = None
    if work_dir is not None:
        remove_left_files(work_dir)
        structure, weights = graph_to_bytes(graph)
        asked = json.dumps([tool_version(), recipe_to_json(chosen)], sort_keys=True).encode()
        store = ProgressStore(work_dir, hashlib.sha256(structure + weights + asked).hexdigest())
    calibrated = calibrate(
        graph,
        _checked(samples, graph.inputs[0][1]),
        chosen,
        total=total,
        progress=progress,
        store=store,
        options=Options(memory_limit, work_dir),
    )
    origin = {"source_weights_sha256": hash_weights(model), **(provenance or {})}
    return Quantized(calibrated, integerize(calibrated), preprocessing, dict(sorted(origin.items())))


def load(path: str | Path) -> Quantized:
    """Read an artifact directory.

    Raises:
        ArtifactError: not an artifact, of another version, truncated or edited.
    """
    manifest, files = read_artifact(Path(path))
    settings = manifest["preprocessing"]
    return Quantized(
        calibrated_from_bytes(files["model.json"], files["model.safetensors"]),
        program_from_bytes(files["program.json"], files["program.safetensors"]),
        None if settings is None else Preprocessing.from_dict(settings),
        dict(manifest["provenance"]),
    )


def _checked(samples: Iterable[Tensor], shape: tuple[int, ...]) -> Iterator[tuple[Tensor, ...]]:
    for index, sample in enumerate(samples):
        if tuple(sample.shape) != shape:
            raise DataError(
                f"image {index} has shape {tuple(sample.shape)}, the model takes {shape}; "
                "check the preprocessing and the number of channels"
            )
        yield (sample,)


def _single(results: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    return results[0] if len(results) == 1 else results
