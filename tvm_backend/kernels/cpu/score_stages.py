"""From the sums of queries and keys to the codes of a softmax: rescaling, position biases, masks."""

from __future__ import annotations

import numpy as np

from tvm_backend.kernels.cpu.rescale import rescale
from tvm_backend.kernels.shared.arithmetic import literal, minus
from tvm_backend.kernels.shared.attention import ScoreStage, addend_item
from tvm_backend.kernels.shared.epilogue import operand_zero_point
from tvm_backend.kernels.shared.function import Buffer, Expr, Function, script


class ScoreWriter:
    """A :class:`ScoreStage` inside a kernel: its constants are arguments."""

    def __init__(self, stage: ScoreStage, function: Function, lead: tuple[int, ...], keys: int, lanes: int) -> None:
        self._stage, self._lanes, self._lead = stage, lanes, lead
        self._multipliers: Buffer | None = None
        self._addend: Buffer | None = None
        if stage.multiplier.size > 1:
            self._multipliers = function.constant(np.broadcast_to(stage.multiplier, (*lead, 1, 1)).reshape(-1))
        if stage.addend is not None:
            missing = len(lead) + 2 - stage.addend.ndim
            array = stage.addend.reshape((1,) * missing + stage.addend.shape)
            self._shape = array.shape
            padded = np.zeros((*array.shape[:-1], -(-keys // lanes) * lanes), array.dtype)
            padded[..., :keys] = array
            self._addend = function.constant(padded.reshape(-1, padded.shape[-2], padded.shape[-1]))

    def apply(self, scores: Expr, head: Expr, row: Expr, column: Expr) -> Expr:
        """Return the codes of one vector of scores.

        Args:
            scores: vector of int32 sums, or of the codes of the stage before.
            head: index into the leading axes, flattened.
            row: query.
            column: first key.
        """
        tirx, stage, lanes = script(), self._stage, self._lanes
        multiplier: Expr = literal(int(stage.multiplier.reshape(-1)[0]), "int32", lanes)
        if self._multipliers is not None:
            multiplier = tirx.broadcast(self._multipliers[head], lanes)
        zero_point = operand_zero_point(stage.node, stage.position)
        terms = [(minus(scores, zero_point, "int32", lanes), multiplier)]
        if self._addend is not None:
            index = addend_item(head, self._lead, self._shape[:-2])
            query = row if self._shape[-2] > 1 else 0
            codes = self._addend[index, query, tirx.ramp(column, 1, lanes)]
            factor = literal(stage.addend_multiplier, "int32", lanes)
            addend_zero_point = operand_zero_point(stage.node, 1 - stage.position)
            terms.append((minus(codes, addend_zero_point, "int32", lanes), factor))
        return rescale(stage.node, terms, lanes, narrow=stage.narrow)
