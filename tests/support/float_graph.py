"""A graph of every float operator, in which operands broadcast as samples do."""

from __future__ import annotations

from calibration.graph import Operation

FLOAT_INPUTS = (("a", (4, 6)), ("b", (6,)))
CONSTANT_SHAPES = {"token": (1, 6), "row": (6,), "cube": (2, 1, 6), "output": (6,)}
FLOAT_OPERATIONS = (
    Operation("add", "add", ("a", "b"), {}, (4, 6)),
    Operation("wide", "multiply", ("add", "cube"), {}, (2, 4, 6)),
    Operation("norm", "layer_norm", ("add", "row", "output"), {"eps": 1e-5}, (4, 6)),
    Operation("cat", "concat", ("token", "norm", "token"), {"axis": 0}, (6, 6)),
    Operation("constants", "concat", ("token", "token"), {"axis": 0}, (2, 6)),
    Operation("sum", "add", ("constants", "b"), {}, (2, 6)),
    Operation("turned", "permute", ("cat",), {"axes": (1, 0)}, (6, 6)),
    Operation("every", "slice", ("turned",), {"axis": 1, "start": 1, "stop": 6, "step": 2}, (6, 3)),
    Operation("mean", "mean", ("every",), {"axis": 0}, (3,)),
    Operation("scale", "scale", ("mean",), {"factor": -0.3}, (3,)),
    Operation("soft", "softmax", ("scale",), {}, (3,)),
    Operation("flat", "reshape", ("wide",), {"shape": (48,)}, (48,)),
)
# One value under two names, an input that is handed through, and a constant of the name of an output.
FLOAT_OUTPUTS = (
    ("output", "flat"),
    ("again", "flat"),
    ("same", "a"),
    *((f"{name}_out", name) for name in ("sum", "every", "scale", "soft")),
)
