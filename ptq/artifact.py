"""The artifact: a directory that holds everything a quantized model is, and says what it is.

=====================  ==========================================================================
manifest.json          format version, recipe as resolved, preprocessing, sites, provenance, hashes
program.json           the IntegerProgram's structure
program.safetensors    its integer constants: what runs
model.json             the float graph and the formats of its sites: what is simulated
model.safetensors      the float weights
=====================  ==========================================================================

The same run writes the same bytes. Reading checks every hash, the manifest's own included, before it
looks at anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantizers.errors import ArtifactError, UsageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILES = ("program.json", "program.safetensors", "model.json", "model.safetensors")
_KEYS = {"format_version", "kind", "tool_version", "recipe", "preprocessing", "sites", "provenance", "files", "digest"}
KIND = "vit-ptq-artifact"


def write_artifact(directory: Path, description: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write an artifact beside its place, then rename it there.

    Args:
        directory: must not exist.
        description: the manifest without format version, kind, files and digest.
        files: the bytes of each of :data:`FILES`.

    Raises:
        UsageError: the directory exists.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        **description,
        "files": {name: {"sha256": _sha256(files[name]), "bytes": len(files[name])} for name in FILES},
    }
    manifest["digest"] = _manifest_digest(manifest)
    write_directory(directory, {**{name: files[name] for name in FILES}, MANIFEST: _dump(manifest)})


def write_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write a directory beside its place, then rename it there; its parent is made if absent.

    Args:
        directory: must not exist.
        files: content by name.

    Raises:
        UsageError: the directory exists.
    """
    refuse_existing(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file beside its place, then rename it there; its directory is made if absent.

    Raises:
        UsageError: the path exists.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_artifact(directory: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the manifest and the files of an artifact.

    Raises:
        ArtifactError: not an artifact, of another format version, or truncated or edited, with the file's name.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} is not a quantized model: it has no {MANIFEST}; make one with 'ptq quantize'")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}; quantize the model again") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        remedy = "give the directory that 'ptq quantize' wrote"
        if isinstance(manifest, dict) and "schedule" in manifest:
            raise ArtifactError(
                f"{directory} is a compiled bundle: it runs by tvm_backend.runtime.load, and here {remedy}"
            )
        raise ArtifactError(f"{path} is not the manifest of a quantized model; {remedy}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {manifest.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "quantize the model again"
        )
    if set(manifest) != _KEYS:
        raise ArtifactError(f"{path}: expected the keys {sorted(_KEYS)}, found {sorted(manifest)}")
    if manifest["digest"] != _manifest_digest(manifest):
        raise ArtifactError(f"{path} was edited: its digest does not match; quantize the model again")
    files = {}
    for name in FILES:
        try:
            files[name] = (directory / name).read_bytes()
        except OSError as error:
            raise ArtifactError(
                f"{directory / name} cannot be read: {error.strerror}; quantize the model again"
            ) from error
        if _sha256(files[name]) != manifest["files"][name]["sha256"]:
            raise ArtifactError(
                f"{directory / name} was truncated or edited: its hash does not match the manifest; "
                "quantize the model again"
            )
    return manifest, files


def refuse_existing(path: Path) -> None:
    """Raise UsageError if a path that is to be written exists."""
    if path.exists():
        raise UsageError(f"{path} exists; choose another path or remove it first")


def _dump(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    return _sha256(_dump({key: value for key, value in manifest.items() if key != "digest"}))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
