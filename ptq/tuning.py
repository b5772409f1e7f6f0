"""Tune the kernels of a quantized model on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantizers.errors import UsageError
from quantizers.integer.interpret import interpret

if TYPE_CHECKING:
    from ptq.api import Quantized
    from tvm_backend.gpu.machines import Machine
    from tvm_backend.gpu.tile_database import Entry

#: Images whose answers are compared with the interpreter's: an odd number, so that tiles end inside of rows.
_COMPARED = 3


@dataclass(frozen=True)
class Tuned:
    """What was found.

    Args:
        entries: one for each shape of linear.
        path: the database that they were added to.
    """

    entries: tuple[Entry, ...]
    path: Path


def tune_quantized(
    quantized: Quantized,
    batches: Sequence[int],
    budget: float,
    rpc: str | None,
    database: Path | None,
    report: Callable[[str], None],
) -> Tuned:
    """Measure, and add what was found to a database; see :func:`tvm_backend.gpu.tune.tune`.

    Args:
        quantized: the model.
        batches: sizes that count alike.
        budget: seconds.
        rpc: ``HOST:PORT`` of another machine, None for this one.
        database: None for the default one.
        report: takes lines for people.

    Raises:
        UsageError: ``rpc`` has another form, or the model has no linear.
        TargetError: no GPU, no compiler, or no such machine.
        ArtifactError: the database cannot be read.
    """
    from tvm_backend.build import build_for
    from tvm_backend.gpu.tile_database import TileDatabase, default_path
    from tvm_backend.gpu.tune import tune

    path = database or default_path()
    # Read first: a damaged file is said before minutes of measuring.
    known = TileDatabase.read(path) if path.exists() else TileDatabase()
    machine = _machine(rpc)
    program = quantized.program
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((_COMPARED, *program.inputs[0][1].shape), generator=generator)
    expected = [value.numpy() for value in interpret(program, images)]
    entries = tune(
        program,
        images.numpy(),
        expected,
        machine,
        lambda target: build_for(program, target),
        batches,
        budget,
        report,
    )
    known.updated(entries).write(path)
    return Tuned(tuple(entries), path)


def _machine(rpc: str | None) -> Machine:
    from tvm_backend.gpu.machines import LocalMachine, RemoteMachine

    if rpc is None:
        return LocalMachine()
    host, _, port = rpc.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--rpc is {rpc!r}, expected HOST:PORT, as board:9090")
    return RemoteMachine(host, int(port))
