"""Which rewrites calibration makes, and when: just before the operation whose constants they replace first."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from calibration.graph import EXECUTORS, Graph, Operation
from calibration.reparam.centring import centre_keys, centre_values, find_key_groups, find_value_groups
from calibration.reparam.layer_norm_scale import (
    NormGroup,
    find_norm_groups,
    fit_channels,
    mean_target,
    median_target,
    rescale_channels,
    rescale_norm,
)
from calibration.rules import Recipe
from calibration.sampling import sample_rows
from calibration.search.operands import apply_operand, output_error, search_operand
from calibration.search.ranges import search_weight
from calibration.statistics import empty, update
from calibration.stream import Stream
from quantizers.spec import QuantSpec
from quantizers.uniform import fake_quantize

#: Rows of a LayerNorm's input on which channels are fitted, and on which a half of them judges a rewrite.
_ROWS, _COMPARED_ROWS = 2048, 256


class Rewriter:
    """Chooses the rewrites of a recipe.

    Args:
        graph: the float graph; its constants change as rewrites are put in place.
        recipe: says which rewrites to make.
    """

    def __init__(self, graph: Graph, recipe: Recipe) -> None:
        self._graph, self._recipe = graph, recipe
        self._norms = {group.norm: group for group in find_norm_groups(graph)}
        self._keys = {group.linear: group for group in find_key_groups(graph)} if recipe.centring else {}
        self._values = {group.linear: group for group in find_value_groups(graph)} if recipe.centring else {}
        self._producers = graph.producers()

    def linears_of(self, operation: Operation) -> tuple[str, ...]:
        """Return the linears that read a LayerNorm."""
        return self._norms[operation.name].linears

    def refusal(self, operation: Operation) -> str | None:
        """Return a line that says why the channels of a LayerNorm keep their scales, or None where they need not."""
        reason = self._norms[operation.name].refusal
        return None if reason is None else f"{operation.module or operation.name}: channels keep their scales: {reason}"

    def layer_norm_scale(
        self, operation: Operation, source: Stream, input_spec: QuantSpec, weight_spec: QuantSpec
    ) -> tuple[dict[str, Tensor], str | None]:
        """Return new constants for a LayerNorm and its linears, and a line for the user where there is one to say.

        Args:
            operation: the layer_norm, not refused, with a linear behind it.
            source: the run whose activations get formats.
            input_spec: of the linears' input.
            weight_spec: of their weights.
        """
        group, kind = self._norms[operation.name], self._recipe.layer_norm_scale
        where = operation.module or operation.name
        inputs = sample_rows(source, operation, _ROWS)
        choices = self._candidates(operation, group, inputs, input_spec)
        if kind != "best":
            return choices[kind], None
        # Each half of the images judges what was fitted on the other: of two tokens per channel any scale fits well
        # those it was made from.
        errors = dict.fromkeys(choices, 0.0)
        halves = inputs.tensor_split(2) if len(inputs) > 1 else (inputs, inputs)
        for fitted, unseen in (halves, halves[::-1]):
            for name, made in self._candidates(operation, group, fitted, input_spec).items():
                errors[name] += self._joint_error(operation, group, fitted, unseen, made, input_spec, weight_spec)
        best = min(errors, key=lambda name: errors[name])
        share = errors[best] / max(errors["none"], 1e-30)
        return choices[best], f"{where}: channel scales {best}, error {share:.2f} of none"

    def centring(self, operation: Operation, reference: Stream) -> dict[str, Tensor]:
        """Return new biases of a linear that makes keys or values, and of the linears that take it back."""
        keys, values = self._keys.get(operation.name), self._values.get(operation.name)
        groups = [group for group in (keys, values) if group is not None and group.refusal is None]
        if not groups:
            return {}
        low = high = None
        for result in reference.results(operation):
            rows = result.reshape(-1, result.shape[-1])
            low = rows.amin(0) if low is None else torch.minimum(low, rows.amin(0))
            high = rows.amax(0) if high is None else torch.maximum(high, rows.amax(0))
        assert low is not None
        assert high is not None
        middle = ((low + high) / 2).cpu()
        made: dict[str, Tensor] = {}
        if keys is not None and keys.refusal is None:
            made.update(centre_keys(self._graph, keys, middle))
        if values is not None and values.refusal is None:
            graph = dataclasses.replace(self._graph, constants={**self._graph.constants, **made})
            made.update(centre_values(graph, values, middle))
        return made

    def _candidates(
        self, operation: Operation, group: NormGroup, inputs: Tensor, input_spec: QuantSpec
    ) -> dict[str, dict[str, Tensor]]:
        """Return new constants by rewrite, fitted on some inputs (R, K) of the LayerNorm."""
        rows = self._norm_rows(operation, inputs, self._graph.constants)
        fitted = fit_channels(rows.cpu(), input_spec.bits)
        made: dict[str, dict[str, Tensor]] = {
            "none": {},
            "mean": rescale_norm(self._graph, group, fitted, mean_target(fitted)),
            "median": rescale_norm(self._graph, group, fitted, median_target(fitted)),
        }
        # Half way, in the logarithm: the weights take less of what differs between channels.
        ratio = fitted.scale.sqrt()
        middle = float(fitted.zero_point.to(torch.float64).mean().round())
        shift = (fitted.zero_point - middle) * fitted.scale
        made["half"] = rescale_channels(self._graph, group, ratio / ratio.log().mean().exp(), shift)
        return made

    def _norm_rows(self, operation: Operation, inputs: Tensor, constants: Mapping[str, Tensor]) -> Tensor:
        affine = [constants[name].to(inputs.device)[None] for name in operation.inputs[1:]]
        return EXECUTORS["layer_norm"](operation, inputs, *affine)

    def _joint_error(
        self,
        operation: Operation,
        group: NormGroup,
        fitted: Tensor,
        unseen: Tensor,
        made: Mapping[str, Tensor],
        input_spec: QuantSpec,
        weight_spec: QuantSpec,
    ) -> float:
        """Return the squared error at the linears' outputs, input and weights quantized, for some constants.

        The format of the input is searched on ``fitted`` inputs (R, K) of the LayerNorm; the error is that of
        ``unseen`` ones.
        """
        constants = {**self._graph.constants, **made}
        weight = torch.cat([constants[self._producers[name].inputs[1]] for name in group.linears]).to(fitted.device)
        rows = self._norm_rows(operation, fitted, constants)
        searched = output_error(_spread(rows), weight)
        qparams = search_operand(update(empty(), rows), input_spec, searched, ("uniform",))
        rows = self._norm_rows(operation, _spread(unseen), constants)
        quantized = fake_quantize(weight, search_weight(weight, weight_spec))
        return float((apply_operand(rows, qparams) @ quantized.T - rows @ weight.T).square().mean())


def _spread(rows: Tensor) -> Tensor:
    return rows[:: max(1, len(rows) // _COMPARED_ROWS)]
