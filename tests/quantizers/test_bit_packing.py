"""Codes of a few bits in files: dense, and the same after a round trip."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.programs import ProgramBuilder, saturate

from quantizers.errors import ArtifactError
from quantizers.integer.bit_packing import NARROW_BITS, narrowest, pack_bits, unpack_bits
from quantizers.integer.program import IntegerProgram
from quantizers.integer.serialize import program_from_bytes, program_to_bytes


@given(st.sampled_from([*NARROW_BITS, 8]), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_round_trip(bits: int, count: int, seed: int) -> None:
    half = 1 << (bits - 1)
    codes = np.random.default_rng(seed).integers(-half, half, count).astype(np.int8)
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes, strict=True)


def test_four_bit_codes_by_hand() -> None:
    packed = pack_bits(np.int8([1, -1, -8]), 4)
    assert packed.tolist() == [0xF1, 0x08]


@pytest.mark.parametrize(("codes", "bits"), [([-4, 3], 3), ([-5, 3], 4), ([7], 4), ([8], 5), ([-2, 1], 2), ([32], 8)])
def test_narrowest(codes: list[int], bits: int) -> None:
    assert narrowest(np.int8(codes)) == bits


@pytest.mark.parametrize(
    ("packed", "message"), [([0] * 3, "3 codes of 4 bits take 2 bytes"), ([0, 0x10], "bits after the last code")]
)
def test_wrong_bytes(packed: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_bits(np.uint8(packed), 4, 3)


def narrow_program(bits: int) -> IntegerProgram:
    b = ProgramBuilder(5, 96)
    x = b.node("quantize", ("image",), "int8", (5, 96), scale=1.0, **saturate("int8"))
    half = 1 << (bits - 1)
    weight = np.random.default_rng(0).integers(1 - half, half, (64, 96)).astype(np.int8)
    bias = b.constant(np.zeros(64, np.int32))
    return b.build(b.node("linear", (x, b.constant(weight), bias), "int32", (5, 64)))


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_programs_store_the_bits_that_weights_need(bits: int) -> None:
    program = narrow_program(bits)
    structure, constants = program_to_bytes(program)
    whole = program_to_bytes(narrow_program(8))[1]
    assert len(whole) - len(constants) == pytest.approx(64 * 96 * (8 - bits) // 8, abs=64)
    assert program_from_bytes(structure, constants) == program


@pytest.mark.parametrize("entry", [{"bits": 7, "shape": [64, 96]}, {"bits": 4, "shape": []}, {"bits": 4}])
def test_bad_entries_are_refused(entry: dict[str, object]) -> None:
    structure, constants = program_to_bytes(narrow_program(4))
    document = json.loads(structure)
    document["packed"] = dict.fromkeys(document["packed"], entry)
    with pytest.raises(ArtifactError, match=r"packed constant c1: "):
        program_from_bytes(json.dumps(document).encode(), constants)


def test_a_shape_of_another_size_is_refused() -> None:
    structure, constants = program_to_bytes(narrow_program(4))
    document = json.loads(structure)
    document["packed"] = {name: {"bits": 4, "shape": [64, 95]} for name in document["packed"]}
    with pytest.raises(ArtifactError, match=r"6080 codes of 4 bits take 3040 bytes"):
        program_from_bytes(json.dumps(document).encode(), constants)
