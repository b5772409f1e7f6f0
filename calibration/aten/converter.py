"""Walk the ATen graph of torch.export and build a :class:`calibration.graph.Graph`.

All operators without a converter are collected first and reported in one error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from calibration.aten.table import CONVERTERS
from calibration.aten.value import Value
from calibration.graph import Attribute, Graph, Operation
from calibration.layout import Layout, layout_of
from quantizers.errors import ModelError, UnsupportedOperatorError


class Converter:
    """Walks one exported program; :meth:`convert` returns the graph."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.constants: dict[str, Tensor] = {}
        self.operations: list[Operation] = []
        self.node: torch.fx.Node = next(iter(program.graph.nodes))
        self._values: dict[torch.fx.Node, Any] = {}
        self._names: set[str] = set()
        self._names_of_constants: dict[int, str] = {}
        self._constness: dict[torch.fx.Node, bool] = {}

    def convert(self) -> Graph:
        """Convert every node in order.

        Raises:
            UnsupportedOperatorError: lists all operators without a converter.
            ModelError: an operator is used in a way that has no normal form.
        """
        self._require_known()
        signature = self.program.graph_signature
        bound = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        bound.update(signature.inputs_to_lifted_tensor_constants)
        tensors = {**self.program.state_dict, **self.program.constants}
        inputs: list[tuple[str, tuple[int, ...]]] = []
        outputs: list[tuple[str, str]] = []
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                if node.name in bound:
                    self._values[node] = tensors[bound[node.name]].detach()
                    self._names_of_constants[id(self._values[node])] = bound[node.name]
                    continue
                layout, shape = self._layout(node)
                self._names.add(node.name)
                self._values[node] = Value(node.name, shape, layout)
                inputs.append((node.name, shape))
            elif node.op == "output":
                results = [leaf for leaf in tree_leaves(node.args) if leaf is not None]
                for index, result in enumerate(results):
                    outputs.append((self._output_name(index, len(results)), self._output(result)))
            else:
                self._values[node] = self._convert_call(node)
        return Graph(tuple(inputs), self.constants, tuple(self.operations), tuple(outputs))

    def _require_known(self) -> None:
        unknown: dict[str, list[str]] = {}
        for node in self.program.graph.nodes:
            if node.op == "call_function" and str(node.target) not in CONVERTERS and not self._is_constant(node):
                unknown.setdefault(str(node.target), []).append(self._where(node))
            self._constness[node] = node.op == "call_function" and self._is_constant(node)
        if unknown:
            raise UnsupportedOperatorError("convert the model", unknown)

    def _is_constant(self, node: torch.fx.Node) -> bool:
        """Whether a call reads no model input, so that it can be evaluated now."""
        signature = self.program.graph_signature
        user = set(signature.user_inputs)
        for source in node.all_input_nodes:
            if source.op == "placeholder" and source.name in user:
                return False
            if source.op == "call_function" and not self._constness.get(source, False):
                return False
        return True

    def _where(self, node: torch.fx.Node) -> str:
        module = self._module(node)
        return f"{node.name} in {module}" if module else node.name

    @staticmethod
    def _module(node: torch.fx.Node) -> str:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]) if stack else ""
        return "" if path.startswith("_empty") else path.removeprefix("L['self'].").removeprefix("L['self']")

    @staticmethod
    def _output_name(index: int, count: int) -> str:
        return "output" if count == 1 else f"output_{index}"

    def _output(self, node: object) -> str:
        value = self._values[node] if isinstance(node, torch.fx.Node) else node
        if not isinstance(value, Value):
            raise ModelError("the model returns a value that does not depend on its input")
        if value.layout.axis != 0 or value.layout.multiplicity != 1:
            raise ModelError("the model returns a tensor whose first axis is not the batch")
        return value.name

    def _layout(self, node: torch.fx.Node) -> tuple[Layout, tuple[int, ...]]:
        meta = node.meta.get("val")
        if not isinstance(meta, Tensor):
            raise ModelError(f"{self._where(node)}: expected a tensor, got {type(meta).__name__}")
        found = layout_of(meta.shape)
        if found is None:
            raise ModelError(f"{self._where(node)}: the result does not keep the batch; samples must not mix")
        return found

    def _convert_call(self, node: torch.fx.Node) -> Any:
        args = torch.fx.map_arg(node.args, self._lookup)
        kwargs = torch.fx.map_arg(node.kwargs, self._lookup)
        if self._constness[node] and not self._mentions_batch(node):
            assert callable(node.target)
            return node.target(*args, **kwargs)
        converter = CONVERTERS.get(str(node.target))
        if converter is None:
            raise UnsupportedOperatorError("convert the model", {str(node.target): [self._where(node)]})
        try:
            return converter(self, *args, **kwargs)
        except ModelError as error:
            raise ModelError(f"{node.target} {self._where(node)}: {error}") from error

    @staticmethod
    def _mentions_batch(node: torch.fx.Node) -> bool:
        return any(isinstance(source.meta.get("val"), torch.SymInt) for source in node.all_input_nodes)

    def _lookup(self, node: torch.fx.Node) -> Any:
        if isinstance(node.meta.get("val"), torch.SymInt):
            return node.meta["val"]
        return self._values[node]

    # Building blocks for the converters -------------------------------------------------------------

    def result(self) -> tuple[Layout, tuple[int, ...]]:
        """Return the layout and the sample shape of the node being converted."""
        return self._layout(self.node)

    def emit(self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], /, **attributes: Attribute) -> str:
        """Append an operation named after the node being converted; return its unique name."""
        name, index = self.node.name, 1
        while name in self._names:
            name, index = f"{self.node.name}_{op}_{index}", index + 1
        self._names.add(name)
        self.operations.append(Operation(name, op, inputs, attributes, shape, self._module(self.node)))
        return name

    def value(self, op: str, inputs: tuple[str, ...], /, **attributes: Attribute) -> Value:
        """Append an operation whose result is the node being converted."""
        layout, shape = self.result()
        return Value(self.emit(op, inputs, shape, **attributes), shape, layout)

    def constant(self, tensor: Tensor, origin: Tensor | None = None) -> str:
        """Store a constant as float32; return its name, the parameter's where it has one."""
        name = self._names_of_constants.get(id(tensor if origin is None else origin), f"{self.node.name}.constant")
        stored, base, index = tensor.detach().to(torch.float32).contiguous(), name, 1
        while name in self.constants:
            if self.constants[name].shape == stored.shape and torch.equal(self.constants[name], stored):
                return name
            name, index = f"{base}.{index}", index + 1
        self.constants[name] = stored
        return name

    def operand(self, x: Value | Tensor | float, layout: Layout) -> str:
        """Return the name of an operand of an elementwise operation whose result has ``layout``."""
        if isinstance(x, Value):
            return x.name
        tensor = x if isinstance(x, Tensor) else torch.tensor([float(x)])
        return self.constant(layout.constant(tensor) if isinstance(x, Tensor) else tensor, tensor)

    def last_operation(self, name: str) -> Operation | None:
        """Return the operation that made a value, if one did."""
        return next((operation for operation in reversed(self.operations) if operation.name == name), None)
