"""Tiles of products: every one computes the same integers, the fastest is kept and used."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from support.attention import Shape, mlp_program, tied_attention
from support.cuda_emulated import emulate_for, emulated_driver, emulated_driver_library
from support.machine_code import needs_compiler
from support.operator_programs import codes
from support.programs import ProgramBuilder, random_block, random_images

from quantizers.errors import ArtifactError, TargetError, UsageError
from quantizers.integer.interpret import interpret
from quantizers.integer.program import IntegerProgram
from tvm_backend.build import build as build_bundle
from tvm_backend.bundle import Bundle
from tvm_backend.gpu.machines import LocalMachine, Machine, RemoteMachine, served
from tvm_backend.gpu.nvcc import code_flags
from tvm_backend.gpu.tile_database import Entry, TileDatabase, default_path, known_tiles
from tvm_backend.gpu.tune import linear_shapes, tune
from tvm_backend.kernels.cuda.tiles import DEFAULT, VARIANTS, LinearShape, Tile, Tiles
from tvm_backend.targets import CudaTarget

pytestmark = pytest.mark.tvm

SMALL, WIDE = Tile(16, 64, 64, 1, 2, 4), Tile(64, 128, 64, 2, 2, 3)
GROUPED = Tile(64, 64, 64, 4, 1, 4, groups=True)
SHAPE = LinearShape(1152, 384, 8)


def entry(**changes: object) -> Entry:
    return dataclasses.replace(Entry("sm_90", "a GPU", SHAPE, SMALL, {1: 0.5, 8: 2.0}, {1: 1.0, 8: 2.0}), **changes)


def build(program: IntegerProgram, target: CudaTarget) -> Bundle:
    return emulate_for(program, target).bundle


def prepared(program: IntegerProgram) -> tuple[np.ndarray, list[np.ndarray]]:
    images = random_images(program, 3, seed=0)
    return images, [value.numpy() for value in interpret(program, torch.from_numpy(images))]


@pytest.mark.parametrize("tile", VARIANTS, ids=str)
def test_every_tile_computes_the_same(tile: Tile, check) -> None:
    """Sums as they are, which nothing clips or hides, of weights of every width; then linears with epilogues."""
    rng = np.random.default_rng(11)
    b = ProgramBuilder(70, 144)
    x, outputs = codes(b, "uint8", 70, 144), []
    for bits in (8, 4, 3):
        half = 1 << (bits - 1)
        weight, bias = rng.integers(-half, half, (150, 144)).astype(np.int8), np.zeros(150, np.int32)
        outputs.append(b.node("linear", (x, b.constant(weight), b.constant(bias)), "int32", (70, 150)))
    target = CudaTarget(("sm_90",) if tile.groups else ("sm_80",), Tiles(default=tile))
    for program in (b.build(*outputs), mlp_program(Shape(70, 3, 48, 11))):
        assert len(set(linear_shapes(program).values())) > 1
        check(program, emulate_for(program, target), random_images(program, 2, seed=1))


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        ((60, 64, 64, 2, 2, 3), "whole products"),
        ((64, 48, 64, 2, 2, 3), "whole products"),
        ((64, 64, 48, 2, 2, 3), "whole products"),
        ((64, 64, 64, 2, 2, 1), "whole products"),
        ((0, 64, 64, 1, 1, 2), "whole products"),
        ((128, 128, 128, 2, 4, 3), "more threads, registers or shared memory"),
        ((256, 128, 32, 2, 2, 2), "more threads, registers or shared memory"),
        ((64, 64, 64, 2, 2, 3, True), "groups of four warps"),
        ((128, 64, 64, 4, 1, 3, True), "groups of four warps"),
        ((64, 64, 128, 4, 1, 3, True), "groups of four warps"),
        ((64, 64, 64, 4, 1, 2, True), "groups of four warps"),
    ],
)
def test_tiles_that_fit_no_gpu_are_refused(tile: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tile(*tile)


class Stopwatch:
    """A machine whose clock is a table: the times of a call by tile, linear and batch."""

    def __init__(self, machine: Machine, times: dict[tuple[Tile, int], float], wrong: Tile | None = None) -> None:
        self._machine, self._times, self._wrong = machine, times, wrong
        self.built: list[Tile] = []

    def describe(self) -> tuple[str, str]:
        return "sm_90", "a GPU"

    def load(self, bundle: Bundle) -> int:
        return self._machine.load(bundle)

    def run(self, program: int, images: np.ndarray) -> list[np.ndarray]:
        found = self._machine.run(program, images)
        return [found[0] + 1, *found[1:]] if self.built[program] == self._wrong else found

    def time_calls(self, program: int, batch: int, positions: Sequence[int], count: int) -> list[float]:
        assert count > 1
        return [self._times[self.built[program], batch] for _ in positions]


def run_tuner(times: dict[tuple[Tile, int], float], wrong: Tile | None = None, **options: object) -> list[Entry]:
    program = random_block(0)
    images, expected = prepared(program)
    machine = Stopwatch(LocalMachine(emulated_driver()), times, wrong)

    def build_tile(target: CudaTarget) -> Bundle:
        machine.built.append(target.tiles.default)
        return build(program, target)

    settings = {"budget": 0, "variants": (SMALL, WIDE), "report": lambda _: None, **options}
    return tune(program, images, expected, machine, build_tile, (1, 8), **settings)


def test_the_fastest_over_all_batches_is_kept() -> None:
    times = {(DEFAULT, 1): 1.0, (DEFAULT, 8): 4.0, (SMALL, 1): 0.5, (SMALL, 8): 9.0, (WIDE, 1): 1.0, (WIDE, 8): 2.0}
    # Half the time at one batch is worth as much as half at the other: the small tile loses more than it gains.
    found = run_tuner(times, budget=1e-3)
    assert {e.tile for e in found} == {DEFAULT}
    found = run_tuner(times, budget=1e-3, variants=(WIDE,))
    assert {e.tile for e in found} == {WIDE}
    assert found[0].ms == {1: 1.0, 8: 2.0}
    assert found[0].default_ms == {1: 1.0, 8: 4.0}
    assert [e.shape for e in found] == sorted(set(linear_shapes(random_block(0)).values()))


def test_groups_of_warps_are_for_hopper_alone() -> None:
    """And for weights of 8 bits; bundles that have to serve others do without."""
    tiles = Tiles({SHAPE: GROUPED, dataclasses.replace(SHAPE, depth=64): WIDE}, GROUPED)
    assert CudaTarget(("sm_90",), tiles).tiles == tiles
    assert tiles.of(dataclasses.replace(SHAPE, bits=4)) == DEFAULT
    assert tiles.of(dataclasses.replace(SHAPE, columns=64)) == GROUPED
    for architectures in (("sm_80",), ("sm_80", "sm_90"), ("sm_100",)):
        plain = CudaTarget(architectures, tiles).tiles
        assert not plain.groups
        assert plain.of(dataclasses.replace(SHAPE, depth=64)) == WIDE
        assert plain.of(SHAPE) == DEFAULT
    assert code_flags(CudaTarget(("sm_90",), tiles)) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_a_product_that_is_not_waited_for_is_noticed() -> None:
    """Of the emulator: products of groups happen no sooner than they are waited for."""
    rng = np.random.default_rng(0)
    b = ProgramBuilder(64, 128)
    weight, bias = rng.integers(-128, 128, (64, 128)).astype(np.int8), np.zeros(64, np.int32)
    operands = (codes(b, "int8", 64, 128), b.constant(weight), b.constant(bias))
    program = b.build(b.node("linear", operands, "int32", (64, 64)))
    target = CudaTarget(("sm_90",), Tiles(default=GROUPED))
    images, expected = prepared(program)
    wait = "  tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0();\n"

    def without(source: str) -> str:
        assert wait in source
        return source.replace(wait, "")

    found = [emulate_for(program, target, change)(images) for change in (None, without)]
    equal = [all(np.array_equal(*pair) for pair in zip(outputs, expected, strict=True)) for outputs in found]
    assert equal == [True, False]


def test_noise_changes_nothing() -> None:
    times = {(tile, batch): 1.0 if tile == DEFAULT else 0.995 for tile in (DEFAULT, SMALL) for batch in (1, 8)}
    assert {e.tile for e in run_tuner(times, variants=(SMALL,))} == {DEFAULT}


def test_wrong_integers_are_never_timed() -> None:
    with pytest.raises(TargetError, match="computes other integers than the interpreter on a GPU; please report it"):
        run_tuner({}, wrong=SMALL)


def test_time_that_runs_out_is_said() -> None:
    lines: list[str] = []
    times = {(tile, batch): 1.0 for tile in (DEFAULT, SMALL, WIDE) for batch in (1, 8)}
    run_tuner(times, report=lines.append)
    assert any("2 of 3 tiles fit the time" in line for line in lines)


def test_a_program_without_linears_is_refused() -> None:
    program = tied_attention((1,), 8)
    with pytest.raises(UsageError, match="no linear layer"):
        tune(program, np.zeros(1), [], LocalMachine(emulated_driver()), lambda _: None, (1,), 1, print)


# Another machine -----------------------------------------------------------------------------------------


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteMachine]:
    # Emulated programs look there for what their launches become.
    monkeypatch.setenv("LD_PRELOAD", emulated_driver_library())
    with served("127.0.0.1", 19090, emulated_driver_library()) as port:
        yield RemoteMachine("127.0.0.1", port)


def test_another_machine_answers_as_this_one_does(remote: RemoteMachine) -> None:
    program = random_block(0)
    images, expected = prepared(program)
    assert remote.describe() == ("sm_90", "emulated device")
    number = remote.load(build(program, CudaTarget(("sm_90",))))
    for found, wanted in zip(remote.run(number, images), expected, strict=True):
        np.testing.assert_array_equal(found, wanted, strict=True)
    times = remote.time_calls(number, 2, [0, 1], 3)
    assert len(times) == 2
    assert all(math.isfinite(ms) and ms >= 0 for ms in times)


def test_refusals_of_another_machine_are_quoted(remote: RemoteMachine) -> None:
    program = random_block(0)
    number = remote.load(build(program, CudaTarget(("sm_90",))))
    with pytest.raises(TargetError, match=r"the remote machine refuses: .*NaN or infinity"):
        remote.run(number, np.full_like(random_images(program, 1, seed=0), np.nan))


def test_what_a_server_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    missing = "cloudpickle"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    with (
        pytest.raises(UsageError, match=r"needs the package cloudpickle: pip install"),
        served("127.0.0.1", 19090, emulated_driver_library()),
    ):
        pass


def test_a_machine_that_does_not_answer_is_named() -> None:
    with pytest.raises(TargetError, match=r"no machine answers at 127\.0\.0\.1:9 .*; start ptq serve there"):
        RemoteMachine("127.0.0.1", 9)


# The database --------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path) -> None:
    path = tmp_path / "folder" / "tiles.json"
    database = TileDatabase([entry(), entry(architecture="sm_80", tile=WIDE)])
    database.write(path)
    assert TileDatabase.read(path).entries == database.entries
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]


def test_later_entries_replace_earlier_ones_of_the_same_linear() -> None:
    other = entry(shape=LinearShape(384, 384, 8))
    database = TileDatabase([entry(), other]).updated([entry(tile=WIDE)])
    assert database.entries == (other, entry(tile=WIDE))


def test_the_newest_architecture_of_a_target_counts() -> None:
    database = TileDatabase([entry(), entry(architecture="sm_80", tile=WIDE)])
    assert database.tiles(("sm_80", "sm_90")).of(SHAPE) == SMALL
    assert database.tiles(("sm_80",)).of(SHAPE) == WIDE
    assert database.tiles(("sm_75",)).of(SHAPE) == DEFAULT
    assert database.tiles(("sm_90",)).of(LinearShape(384, 384, 8)) == DEFAULT


def test_builds_look_where_tuning_writes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert known_tiles(("sm_90",)) == Tiles()
    TileDatabase([entry()]).write(default_path())
    assert known_tiles(("sm_90",)).of(SHAPE) == SMALL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "format version None, this version reads 1"),
        ('{"format_version": 2}', "format version 2, this version reads 1"),
        ('{"format_version": 1}', "entry of the wrong form"),
        ('{"format_version": 1, "entries": [{"architecture": "sm_90"}]}', "entry of the wrong form"),
    ],
)
def test_damaged_databases_are_refused(content: str, message: str, tmp_path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match=message):
        TileDatabase.read(path)


def test_a_tile_that_cannot_be_is_refused(tmp_path) -> None:
    path = tmp_path / "tiles.json"
    TileDatabase([entry()]).write(path)
    document = json.loads(path.read_text())
    document["entries"][0]["tile"]["rows"] = 7
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"entry of the wrong form: .*whole products"):
        TileDatabase.read(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        known_tiles(("sm_90",), tmp_path / "none.json")


@needs_compiler
def test_bundles_are_built_with_what_was_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = random_block(0)
    plain = build_bundle(program, "cuda:sm_90")
    deep = Tile(64, 64, 128, 2, 2, 2)
    entries = [entry(shape=shape, tile=deep) for shape in linear_shapes(program).values()]
    TileDatabase(entries).write(default_path())
    tuned = build_bundle(program, "cuda:sm_90")
    packed = [
        sum(array.nbytes for array in bundle.constants if array.dtype == np.uint8 and array.ndim == 3)
        for bundle in (plain, tuned)
    ]
    # Weights are padded to whole steps of the depth.
    assert packed[0] < packed[1]
    assert build_bundle(program, "cuda:sm_80").constants[0].shape == plain.constants[0].shape
