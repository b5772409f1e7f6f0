"""The file format of programs: equal after a round trip, the same bytes every time, and no trust in what is read."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support.programs import random_block

from quantizers.errors import ArtifactError, ProgramError, PtqError
from quantizers.integer.program import IntegerProgram
from quantizers.integer.serialize import FORMAT_VERSION, program_from_bytes, program_to_bytes


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_round_trip_gives_an_equal_program(seed: int) -> None:
    program = random_block(seed)
    again = program_from_bytes(*program_to_bytes(program))
    assert again == program
    assert program_to_bytes(again) == program_to_bytes(program)


def test_the_same_program_gives_the_same_bytes_whatever_the_order_and_layout_of_its_constants() -> None:
    program = random_block(3)
    turned = {name: np.asfortranarray(array) for name, array in reversed(program.constants.items())}
    same = IntegerProgram(program.inputs, turned, program.nodes, program.outputs)
    assert same == program
    assert program_to_bytes(same) == program_to_bytes(program)


def test_programs_differ_in_every_part() -> None:
    program = random_block(0)
    changed = dict(program.constants)
    changed["c0"] = changed["c0"].copy()
    changed["c0"].flat[0] += 1
    wider = program.constants | {"c0": program.constants["c0"].astype(np.int64)}
    for other in (
        IntegerProgram(program.inputs, changed, program.nodes, program.outputs),
        IntegerProgram(program.inputs, wider, program.nodes, program.outputs),
        IntegerProgram(program.inputs, program.constants, program.nodes[:-1], program.outputs),
        IntegerProgram(program.inputs, program.constants, program.nodes, program.outputs[:-1]),
    ):
        assert other != program
    assert program != "a program"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("part", [0, 1])
def test_truncated_files_are_refused(part: int, share: float) -> None:
    files = list(program_to_bytes(random_block(0)))
    files[part] = files[part][: int(len(files[part]) * share)]
    with pytest.raises(ArtifactError, match=r"the program cannot be read: .*; export or quantize it again"):
        program_from_bytes(*files)


Edit = Callable[[dict], object]

EDITS: dict[str, tuple[Edit, type[PtqError], str]] = {
    "other version": (
        lambda d: d.update(format_version=FORMAT_VERSION + 1),
        ArtifactError,
        f"the program has format version {FORMAT_VERSION + 1}, this version reads {FORMAT_VERSION}",
    ),
    "version before numerators of heads": (
        lambda d: d.update(format_version=2),
        ArtifactError,
        f"the program has format version 2, this version reads {FORMAT_VERSION}; quantize it again",
    ),
    "version as text": (lambda d: d.update(format_version="1"), ArtifactError, "format_version is '1', expected int"),
    "unknown key": (lambda d: d.update(extra=1), ArtifactError, "program: expected the keys .*, found .*'extra'"),
    "missing key": (lambda d: d.pop("outputs"), ArtifactError, "program: expected the keys .*'outputs'"),
    "unknown key of a node": (
        lambda d: d["nodes"][0].update(x=1),
        ArtifactError,
        "node: expected the keys .*, found .*'x'",
    ),
    "missing key of a node": (lambda d: d["nodes"][0].pop("op"), ArtifactError, "node: expected the keys .*'op'"),
    "unknown key of an input": (lambda d: d["inputs"][0].update(x=1), ArtifactError, "input: expected the keys"),
    "missing key of an output": (lambda d: d["outputs"][0].pop("value"), ArtifactError, "output: expected the keys"),
    "node that is a list": (lambda d: d["nodes"].append([]), ArtifactError, "node: expected the keys .*, found list"),
    "nodes that are a number": (lambda d: d.update(nodes=3), ArtifactError, "program: nodes is 3, expected list"),
    "name that is a number": (lambda d: d["nodes"][0].update(name=3), ArtifactError, "node: name is 3, expected str"),
    "operands that are numbers": (
        lambda d: d["nodes"][0].update(inputs=[3]),
        ArtifactError,
        r"inputs: expected a list of str, found \[3\]",
    ),
    "shape of floats": (
        lambda d: d["inputs"][0].update(shape=[3.0]),
        ArtifactError,
        r"shape: expected a list of int, found \[3.0\]",
    ),
    "shape of booleans": (lambda d: d["nodes"][0].update(shape=[True]), ArtifactError, "shape: expected a list of int"),
    "unknown operator": (lambda d: d["nodes"][0].update(op="conv"), ProgramError, "v0: unknown operator conv"),
    "edited shift": (
        lambda d: d["nodes"][3]["attributes"].update(shift=63),
        ProgramError,
        "shift is 63, expected 1 to 62",
    ),
    "attribute that is an object": (
        lambda d: d["nodes"][3]["attributes"].update(shift={}),
        ProgramError,
        "attribute shift is {}, expected an integer",
    ),
    "attribute of nested lists": (
        lambda d: d["nodes"][1]["attributes"].update(kernel=[[1], 2]),
        ProgramError,
        "expected a tuple of integers",
    ),
    "scale that is not a number": (
        lambda d: d["nodes"][0]["attributes"].update(scale=float("nan")),
        ProgramError,
        "scale is nan",
    ),
    "edited operand": (lambda d: d["nodes"][5].update(inputs=["c9", "c0"]), ProgramError, "v5"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_structure_is_refused_with_its_message(case: str) -> None:
    edit, error, message = EDITS[case]
    structure, constants = program_to_bytes(random_block(0))
    document = json.loads(structure)
    edit(document)
    with pytest.raises(error, match=message):
        program_from_bytes(json.dumps(document).encode(), constants)


@pytest.mark.parametrize("structure", [b"[]", b"3", b"null", b'"text"'])
def test_a_structure_that_is_no_object_is_refused(structure: bytes) -> None:
    with pytest.raises(ArtifactError, match="program: expected the keys"):
        program_from_bytes(structure, program_to_bytes(random_block(0))[1])


@pytest.mark.parametrize("structure", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_structure_that_is_no_json_is_refused(structure: bytes) -> None:
    with pytest.raises(ArtifactError, match="the program cannot be read"):
        program_from_bytes(structure, program_to_bytes(random_block(0))[1])


def test_a_missing_constant_is_named() -> None:
    program = random_block(0)
    arrays = {name: array for name, array in program.constants.items() if name != "c4"}
    with pytest.raises(ProgramError, match="c4 is not defined before it is used"):
        program_from_bytes(program_to_bytes(program)[0], safetensors.numpy.save(arrays))


def test_a_constant_of_another_type_is_refused() -> None:
    program = random_block(0)
    arrays = program.constants | {"c0": program.constants["c0"].astype(np.float64)}
    with pytest.raises(ProgramError, match="constant c0: dtype float64 is not one of"):
        program_from_bytes(program_to_bytes(program)[0], safetensors.numpy.save(arrays))


@given(part=st.integers(0, 1), position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_an_edited_byte_is_an_error_of_ours_or_another_valid_program(part: int, position: float, byte: int) -> None:
    files = [bytearray(file) for file in program_to_bytes(random_block(0))]
    files[part][int(position * len(files[part]))] = byte
    try:
        program = program_from_bytes(*map(bytes, files))
    except (ArtifactError, ProgramError):
        return
    assert program_from_bytes(*program_to_bytes(program)) == program
