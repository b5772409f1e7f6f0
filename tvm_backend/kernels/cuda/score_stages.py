"""From the sums of queries and keys to the codes of a softmax, one score at a time."""

from __future__ import annotations

import math

import numpy as np

from tvm_backend.kernels.cuda.rescale import Numbers, Rescaling
from tvm_backend.kernels.kernel import Array
from tvm_backend.kernels.shared.arithmetic import cast
from tvm_backend.kernels.shared.attention import Attention, ScoreStage, addend_item
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, script


class ScoreWriter:
    """A :class:`ScoreStage` inside a kernel: its constants are arguments."""

    def __init__(self, stage: ScoreStage, function: Function, rule: Attention) -> None:
        self._stage, self._lead, self._last_key, self._last_query = stage, rule.lead, rule.keys - 1, rule.queries - 1
        self._rescaling = Rescaling(stage.node, function, narrow=stage.narrow)
        count = math.prod(rule.lead)
        multipliers = np.broadcast_to(stage.multiplier.reshape(_aligned(stage.multiplier, rule)), (*rule.lead, 1, 1))
        self._multipliers = function.constant(multipliers.reshape(count).astype(np.int32))
        self._addend: Buffer | None = None
        if stage.addend is not None:
            array = stage.addend.reshape(_aligned(stage.addend, rule))
            self._shape = array.shape
            self._addend = function.constant(array.reshape(-1, *array.shape[-2:]))
            self._factor = Numbers(function, [stage.addend_multiplier])

    def hold(self) -> None:
        """Read what is the same for all scores of a thread."""
        self._rescaling.hold()
        if self._addend is not None:
            (self._held_factor,) = self._factor.hold()

    def code(self, value: Expr, head: Expr, query: Expr, key: Expr) -> Expr:
        """Return the code of a sum, or of the code of the stage before."""
        tirx, stage = script(), self._stage
        terms = [(stage.position, value, self._multipliers[head])]
        if self._addend is not None:
            row = tirx.min(query, self._last_query) if self._shape[-2] > 1 else 0
            item = addend_item(head, self._lead, self._shape[:-2])
            other = self._addend[item, row, tirx.min(key, self._last_key)]
            terms.append((1 - stage.position, other, cast(self._held_factor, "int32")))
        return self._rescaling.code(terms)


def _aligned(array: Array, rule: Attention) -> tuple[int, ...]:
    """Return the shape of an array with as many axes as the scores."""
    return (1,) * (len(rule.lead) + 2 - array.ndim) + array.shape
