"""An IntegerProgram as two files: ``program.json`` (structure) and ``program.safetensors`` (constants).

Weights take the bits that their codes need: 4-bit codes are half a byte in the file, and ``packed`` in the
structure says which constants are stored so, with their bits and shape.

The same program gives the same bytes: keys are sorted and nothing depends on time or machine. Reading
trusts nothing: an unknown key, a missing constant or a broken rule is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from quantizers.errors import ArtifactError
from quantizers.integer.bit_packing import NARROW_BITS, narrowest, pack_bits, unpack_bits
from quantizers.integer.program import Attribute, IntegerProgram, Node, TensorType
from quantizers.integer.verify import verify

FORMAT_VERSION = 3
_T = TypeVar("_T")
#: Keys of each kind of entry and the JSON type of its value.
_PROGRAM_KEYS = {"format_version": int, "inputs": list, "nodes": list, "outputs": list, "packed": dict}
_PACKED_KEYS = {"bits": int, "shape": list}
_INPUT_KEYS = {"name": str, "dtype": str, "shape": list}
_NODE_KEYS = {
    "name": str,
    "op": str,
    "inputs": list,
    "attributes": dict,
    "dtype": str,
    "shape": list,
    "source": str,
}
_OUTPUT_KEYS = {"name": str, "value": str}


def program_to_bytes(program: IntegerProgram) -> tuple[bytes, bytes]:
    """Return the JSON and the safetensors bytes of a program."""
    structure: dict[str, object] = {
        "format_version": FORMAT_VERSION,
        "inputs": [{"name": n, "dtype": t.dtype, "shape": list(t.shape)} for n, t in program.inputs],
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "inputs": list(node.inputs),
                "attributes": {k: list(v) if isinstance(v, tuple) else v for k, v in node.attributes.items()},
                "dtype": node.type.dtype,
                "shape": list(node.type.shape),
                "source": node.source,
            }
            for node in program.nodes
        ],
        "outputs": [{"name": name, "value": value} for name, value in program.outputs],
        "packed": {},
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(program.constants.items())}
    packed: dict[str, dict[str, object]] = {}
    for name in {node.inputs[1] for node in program.nodes if node.op == "linear"}:
        array = arrays[name].astype(np.int8, copy=False)
        if arrays[name].dtype == np.int8 and (bits := narrowest(array)) < 8:
            packed[name] = {"bits": bits, "shape": list(array.shape)}
            arrays[name] = pack_bits(array, bits)
    structure["packed"] = packed
    return (json.dumps(structure, indent=1, sort_keys=True) + "\n").encode(), safetensors.numpy.save(arrays)


def program_from_bytes(structure: bytes, constants: bytes) -> IntegerProgram:
    """Rebuild and verify a program.

    Raises:
        ArtifactError: the bytes are not a program of this format version.
        ProgramError: the program breaks a rule of the contract.
    """
    try:
        document = json.loads(structure)
        arrays: Mapping[str, npt.NDArray[np.generic]] = safetensors.numpy.load(constants)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ArtifactError(f"the program cannot be read: {error}; export or quantize it again") from error
    # The version comes first: another version may have other keys.
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise ArtifactError(
            f"the program has format version {version}, this version reads {FORMAT_VERSION}; quantize it again"
        )
    _expect_keys("program", document, _PROGRAM_KEYS)
    for what, keys in (("input", _INPUT_KEYS), ("node", _NODE_KEYS), ("output", _OUTPUT_KEYS)):
        for entry in document[f"{what}s"]:
            _expect_keys(what, entry, keys)
    constants_read = dict(sorted(arrays.items()))
    for name, entry in document["packed"].items():
        constants_read[name] = _unpacked(name, entry, arrays)
    program = IntegerProgram(
        inputs=tuple((i["name"], _type(i)) for i in document["inputs"]),
        constants=constants_read,
        nodes=tuple(_node(node) for node in document["nodes"]),
        outputs=tuple((o["name"], o["value"]) for o in document["outputs"]),
    )
    verify(program)
    return program


def _unpacked(name: str, entry: dict[str, Any], arrays: Mapping[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.int8]:
    what = f"packed constant {name}"
    _expect_keys(what, entry, _PACKED_KEYS)
    shape = _all(what, entry["shape"], int)
    if name not in arrays or entry["bits"] not in NARROW_BITS or not shape or min(shape) < 1:
        raise ArtifactError(f"{what}: expected bytes with {NARROW_BITS} bits a code and a shape, found {entry}")
    try:
        return unpack_bits(arrays[name], entry["bits"], math.prod(shape)).reshape(shape)
    except ValueError as error:
        raise ArtifactError(f"{what}: {error}; export or quantize it again") from error


def _node(entry: dict[str, Any]) -> Node:
    attributes: dict[str, Attribute] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in entry["attributes"].items()
    }
    return Node(
        name=entry["name"],
        op=entry["op"],
        inputs=_all("inputs", entry["inputs"], str),
        attributes=attributes,
        type=_type(entry),
        source=entry["source"],
    )


def _type(entry: dict[str, Any]) -> TensorType:
    return TensorType(entry["dtype"], _all("shape", entry["shape"], int))


def _all(what: str, entries: list[Any], kind: type[_T]) -> tuple[_T, ...]:
    if not all(type(entry) is kind for entry in entries):
        raise ArtifactError(f"{what}: expected a list of {kind.__name__}, found {entries}")
    return tuple(entries)


def _expect_keys(what: str, entry: object, expected: Mapping[str, type]) -> None:
    if not isinstance(entry, dict) or set(entry) != set(expected):
        found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise ArtifactError(f"{what}: expected the keys {sorted(expected)}, found {found}")
    for key, kind in expected.items():
        if type(entry[key]) is not kind:
            raise ArtifactError(f"{what}: {key} is {entry[key]!r}, expected {kind.__name__}")
