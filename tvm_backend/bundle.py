"""A compiled program, in memory and as a directory of three files.

``model.so`` is the code, ``constants.safetensors`` its weights and tables in the order of their names,
``manifest.json`` says what they are, which functions are called in which order, and holds the hashes. The
hashes find damage, not malice: a library is code, so load bundles only from where you would run a program.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError

from quantizers.errors import ArtifactError, UsageError
from quantizers.integer.program import TensorType
from tvm_backend.kernels.kernel import Array
from tvm_backend.schedule import Schedule, check_places, from_json, to_json

FORMAT_VERSION = 2
MANIFEST, LIBRARY, CONSTANTS = "manifest.json", "model.so", "constants.safetensors"
_REMEDY = "build the bundle again"


@dataclass(frozen=True)
class Bundle:
    """A compiled program.

    Args:
        target: name of the target it was built for.
        arch: architecture, as ``platform.machine()`` names it.
        cpu_features: flags that the processor must have.
        program_sha256: hash of the program's serialized structure and constants.
        inputs: name and type of each input.
        outputs: name and type of each output.
        tvm_version: version that compiled it; the same one must run it.
        schedule: which functions of the library are called, with what.
        library: the shared library.
        constants: arrays that the schedule refers to by position.
    """

    target: str
    arch: str
    cpu_features: tuple[str, ...]
    program_sha256: str
    inputs: tuple[tuple[str, TensorType], ...]
    outputs: tuple[tuple[str, TensorType], ...]
    tvm_version: str
    schedule: Schedule = field(repr=False)
    library: bytes = field(repr=False)
    constants: tuple[Array, ...] = field(repr=False)


def save_bundle(bundle: Bundle, directory: Path | str) -> None:
    """Write a bundle; the directory appears whole or not at all.

    Raises:
        UsageError: the directory exists, or its parent does not.
    """
    destination = Path(directory)
    if destination.exists():
        raise UsageError(f"{destination} exists; choose another name or remove it first")
    if not destination.parent.is_dir():
        raise UsageError(f"{destination.parent} is not a directory; create it first")
    constants = safetensors.numpy.save({f"{i:06d}": array for i, array in enumerate(bundle.constants)})
    manifest = {
        "format_version": FORMAT_VERSION,
        "target": bundle.target,
        "arch": bundle.arch,
        "cpu_features": list(bundle.cpu_features),
        "program_sha256": bundle.program_sha256,
        "inputs": [_tensor(*entry) for entry in bundle.inputs],
        "outputs": [_tensor(*entry) for entry in bundle.outputs],
        "tvm_version": bundle.tvm_version,
        "schedule": to_json(bundle.schedule),
        "library_sha256": _sha256(bundle.library),
        "constants_sha256": _sha256(constants),
    }
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        (partial / LIBRARY).write_bytes(bundle.library)
        (partial / CONSTANTS).write_bytes(constants)
        (partial / MANIFEST).write_text(json.dumps(manifest, sort_keys=True) + "\n")
        partial.chmod(0o755)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load_bundle(directory: Path | str) -> Bundle:
    """Read and check a bundle; does not load its code.

    Raises:
        ArtifactError: a file is missing, damaged, or of another format; names the file and the remedy.
    """
    root = Path(directory)
    manifest = _read_manifest(root / MANIFEST)
    library = _read_hashed(root / LIBRARY, manifest["library_sha256"])
    serialized = _read_hashed(root / CONSTANTS, manifest["constants_sha256"])
    try:
        arrays: Mapping[str, Array] = safetensors.numpy.load(serialized)
    except SafetensorError as error:
        raise ArtifactError(f"{root / CONSTANTS} cannot be read: {error}; {_REMEDY}") from error
    inputs, constants = manifest["inputs"], tuple(arrays[name] for name in sorted(arrays))
    return Bundle(
        target=manifest["target"],
        arch=manifest["arch"],
        cpu_features=tuple(manifest["cpu_features"]),
        program_sha256=manifest["program_sha256"],
        inputs=tuple(_typed(entry) for entry in inputs),
        outputs=tuple(_typed(entry) for entry in manifest["outputs"]),
        tvm_version=manifest["tvm_version"],
        schedule=_schedule(root / MANIFEST, manifest["schedule"], len(inputs), constants),
        library=library,
        constants=constants,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tensor(name: str, kind: TensorType) -> dict[str, object]:
    return {"name": name, "dtype": kind.dtype, "shape": list(kind.shape)}


def _typed(entry: dict[str, Any]) -> tuple[str, TensorType]:
    return entry["name"], TensorType(entry["dtype"], tuple(entry["shape"]))


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_tensors(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and set(entry) == {"name", "dtype", "shape"}
        and isinstance(entry["name"], str)
        and isinstance(entry["dtype"], str)
        and isinstance(entry["shape"], list)
        and all(isinstance(extent, int) for extent in entry["shape"])
        for entry in value
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_CHECKS = {
    "format_version": lambda value: isinstance(value, int),
    "target": _is_text,
    "arch": _is_text,
    "cpu_features": _is_strings,
    "program_sha256": _is_text,
    "inputs": _is_tensors,
    "outputs": _is_tensors,
    "tvm_version": _is_text,
    "schedule": lambda value: isinstance(value, dict),
    "library_sha256": _is_text,
    "constants_sha256": _is_text,
}


def _schedule(path: Path, document: dict[str, Any], inputs: int, constants: tuple[Array, ...]) -> Schedule:
    try:
        schedule = from_json(document)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: schedule has a value of the wrong form: {error}; {_REMEDY}") from error
    # No hash covers the manifest itself.
    try:
        check_places(schedule, inputs, constants)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: schedule does not fit the bundle: {error}; {_REMEDY}") from error
    return schedule


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}; {_REMEDY}") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path}: expected an object, found {type(manifest).__name__}; {_REMEDY}")
    # The version comes first: another version may have other keys.
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path}: format version {version}, this version reads {FORMAT_VERSION}; {_REMEDY}")
    unknown, missing = sorted(set(manifest) - set(_CHECKS)), sorted(set(_CHECKS) - set(manifest))
    if unknown or missing:
        found = [f"unknown keys {', '.join(unknown)}"] * bool(unknown) + [f"no {', '.join(missing)}"] * bool(missing)
        raise ArtifactError(f"{path}: {' and '.join(found)}; {_REMEDY}")
    for key, check in _CHECKS.items():
        if not check(manifest[key]):
            raise ArtifactError(f"{path}: {key} has a value of the wrong form, {manifest[key]!r}; {_REMEDY}")
    return manifest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); {_REMEDY}") from error


def _read_hashed(path: Path, expected: str) -> bytes:
    content = _read(path)
    if _sha256(content) != expected:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; copy it again or {_REMEDY}")
    return content
