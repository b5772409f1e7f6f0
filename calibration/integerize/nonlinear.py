"""Which integer forms softmax, GELU, LayerNorm and sums take, by the recipe's ``nonlinear``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from calibration.graph import Operation
from calibration.integerize import corrected, published
from calibration.integerize.context import Form

#: ``nonlinear`` of a recipe to the forms of the operators of the graph; ``attention_product`` is a matmul whose left
#: side is a softmax.
FORMS: Mapping[str, Mapping[str, Form]] = MappingProxyType(
    {
        "corrected": MappingProxyType(
            {
                "layer_norm": corrected.layer_norm,
                "softmax": corrected.softmax,
                "attention_product": corrected.attention_product,
                "unary": corrected.unary,
                "add": corrected.add,
            }
        ),
        "published": MappingProxyType(
            {
                "layer_norm": published.layer_norm,
                "softmax": published.softmax,
                "attention_product": published.attention_product,
                "unary": published.unary,
                "add": published.add,
            }
        ),
    }
)


def ends_in_table(operation: Operation, nonlinear: str) -> bool:
    """Whether an operation's form is a table of 256 entries, which may hold the levels of a codebook as well."""
    if operation.op != "unary":
        return False
    return nonlinear == "corrected" or operation.attributes["function"] not in published.SHIFT_GELU_FUNCTIONS
