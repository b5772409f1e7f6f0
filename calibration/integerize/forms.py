"""Which operations have an integer form; asked before any work is done."""

from __future__ import annotations

from calibration.graph import Graph, Operation
from calibration.sites import Structure
from quantizers.errors import UnsupportedOperatorError


def require_integer_forms(graph: Graph, nonlinear: str = "corrected") -> None:
    """Check that every operation of a graph has an integer form.

    Args:
        graph: the float graph.
        nonlinear: which forms the recipe asks for.

    Raises:
        UnsupportedOperatorError: lists all that have none, with their names.
    """
    structure = Structure(graph)
    found: dict[str, list[str]] = {}
    for operation in graph.operations:
        reason = _obstacle(structure, operation) or _published_obstacle(graph, operation, nonlinear)
        if reason is not None:
            where = f"{operation.name} in {operation.module}" if operation.module else operation.name
            found.setdefault(reason, []).append(where)
    if found:
        raise UnsupportedOperatorError("integerize", found)


def _obstacle(structure: Structure, operation: Operation) -> str | None:
    if operation.op == "conv2d" and operation.integer("groups") != 1:
        return "grouped conv2d"
    if operation.op == "conv2d" and set(operation.integers("dilation")) != {1}:
        return "dilated conv2d"
    if operation.op == "scale" and operation.real("factor") <= 0 and not structure.is_accumulator(operation.name):
        return "scale by a number that is not positive"
    return None


def _published_obstacle(graph: Graph, operation: Operation, nonlinear: str) -> str | None:
    if nonlinear != "published" or operation.op != "layer_norm":
        return None
    gamma, beta = (graph.constants[name] for name in operation.inputs[1:])
    # The published form holds beta as a multiple of gamma.
    if bool(((gamma == 0) & (beta != 0)).any()):
        return "published layer_norm with a gamma of zero (recipes with 'nonlinear: corrected' have a form)"
    return None
