"""Export a network with torch.export, without what would tell where and by whom it was written."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping

import torch
from torch.export import ExportedProgram

from calibration.calibrated import Calibrated
from calibration.trace import quiet
from ptq.pt2_export.network import MODULE, QuantizedNetwork

#: The extra file of torch.export.save that holds the metadata.
METADATA = "metadata.json"


def build_program(calibrated: Calibrated) -> ExportedProgram:
    """Return the program; its batch size is free, from 1.

    Args:
        calibrated: a graph with formats, none of them published.
    """
    network = QuantizedNetwork(calibrated).eval()
    # torch.export burns a batch of one into the graph.
    examples = tuple(torch.zeros(2, *shape) for _, shape in calibrated.graph.inputs)
    shapes = (tuple({0: torch.export.Dim("batch", min=1)} for _ in examples),)
    with quiet(), torch.no_grad(), torch.fx.traceback.preserve_node_meta():
        program = torch.export.export(network, examples, dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        _name_module(node)
    return program


def program_to_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of the file."""
    file = io.BytesIO()
    extra = {METADATA: json.dumps(dict(metadata), indent=1, sort_keys=True)}
    torch.export.save(program, file, extra_files=extra)
    return file.getvalue()


def _name_module(node: torch.fx.Node) -> None:
    """Put the module that an operator came from, a path in the traced model, in the place of lines of this package."""
    module = node.meta.pop("custom", {}).get(MODULE, "")
    node.meta.pop("stack_trace", None)
    if "nn_module_stack" in node.meta:
        stack = {"L__self__": ("", "torch.nn.Module")}
        node.meta["nn_module_stack"] = stack | ({module: (module, "torch.nn.Module")} if module else {})
