"""Networks of chosen widths, put together and compiled: no calibration, and the interpreter's bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calibration.calibrated import Calibrated
from calibration.integerize import integerize
from calibration.mixed_precision.candidates import Candidates, assemble
from ptq.mixed_precision.accuracy import Run
from quantizers.integer.program import IntegerProgram

if TYPE_CHECKING:
    from tvm_backend.runtime import CompiledProgram


class Networks:
    """Compiles what it is asked for, each choice of widths once.

    Args:
        calibrated: the network that the candidates were chosen in.
        candidates: of every weight.
        threads: worker threads; all cores where None.
    """

    def __init__(self, calibrated: Calibrated, candidates: Candidates, threads: int | None) -> None:
        self.calibrated, self._candidates, self._threads = calibrated, candidates, threads
        self._made: dict[tuple[int, ...], tuple[IntegerProgram, CompiledProgram]] = {}

    def uniform(self, width: int) -> Mapping[str, int]:
        """Return one width for every weight."""
        return dict.fromkeys(self._candidates, width)

    def compiled(self, widths: Mapping[str, int]) -> tuple[IntegerProgram, CompiledProgram]:
        """Return the integer program of a choice of widths, and it compiled."""
        key = tuple(widths[name] for name in self._candidates)
        if key not in self._made:
            from tvm_backend.build import build
            from tvm_backend.runtime import CompiledProgram

            program = integerize(assemble(self.calibrated, self._candidates, widths))
            self._made[key] = program, CompiledProgram(build(program), threads=self._threads)
        return self._made[key]

    def run(self, widths: Mapping[str, int]) -> Run:
        """Return a choice of widths as a function of images."""
        from ptq.compiled import adapt

        return first_output(adapt(self.compiled(widths)[1]))


def first_output(run: Callable[..., Any]) -> Run:
    """Let a network with several outputs give the first."""

    def call(images: Tensor) -> Tensor:
        made = run(images)
        return made[0] if isinstance(made, tuple) else made

    return call
