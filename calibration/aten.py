"""From the ATen graph of torch.export to :class:`calibration.graph.Graph`: one table, operator to converter.

All operators without a converter are collected first and reported in one error.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from calibration.graph import Attribute, Graph, Operation
from calibration.layout import Layout, layout_of
from quantizers.errors import ModelError, UnsupportedOperatorError


class Value:
    """A batched value while converting: the graph's name for it, its sample shape, its traced layout."""

    __slots__ = ("layout", "name", "shape")

    def __init__(self, name: str, shape: tuple[int, ...], layout: Layout) -> None:
        self.name, self.shape, self.layout = name, shape, layout


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
                results = [leaf for leaf in torch.utils._pytree.tree_leaves(node.args) if leaf is not None]
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


def _batched(x: Any) -> Value:
    if not isinstance(x, Value):
        raise ModelError("expected a value that depends on the model's input")
    return x


def _weights(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise ModelError("expected constant weights; weights computed from the input have no integer form")
    return x


def _identity(c: Converter, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


def _reshape(c: Converter, x: Any, *args: Any, **kwargs: Any) -> Value:
    value = _batched(x)
    layout, shape = c.result()
    if shape == value.shape:
        return Value(value.name, shape, layout)
    return c.value("reshape", (value.name,), shape=shape)


def _permute(c: Converter, x: Value, axes: list[int]) -> Value:
    axes = [axis % x.layout.rank for axis in axes]
    sample_axes = tuple(x.layout.sample_axis(axis) for axis in axes if not x.layout.is_batch(axis))
    if sample_axes == tuple(range(len(sample_axes))):
        layout, shape = c.result()
        return Value(x.name, shape, layout)
    return c.value("permute", (x.name,), axes=sample_axes)


def _transpose(c: Converter, x: Value, first: int, second: int) -> Value:
    axes = list(range(x.layout.rank))
    axes[first], axes[second] = axes[second], axes[first]
    return _permute(c, x, axes)


def _t(c: Converter, x: Value) -> Value:
    return _transpose(c, x, 0, 1)


def _expand(c: Converter, x: Value | Tensor, sizes: list[Any], **kwargs: Any) -> Value | Tensor:
    if isinstance(x, Tensor):
        # The batch axis stays at extent 1: it is the same for each sample.
        padded = (1,) * (len(sizes) - x.ndim) + tuple(x.shape)
        return x.expand([e if isinstance(s, torch.SymInt) or s == -1 else s for s, e in zip(sizes, padded, strict=True)])
    layout, shape = c.result()
    if shape != x.shape:
        raise ModelError(f"a value of shape {x.shape} is expanded to {shape}")
    return Value(x.name, shape, layout)


def _sliced(c: Converter, x: Value, axis: int, start: int, stop: int, step: int = 1) -> tuple[str, tuple[int, ...]]:
    extent = x.shape[axis]
    start, stop, step = slice(start, stop, step).indices(extent)
    if (start, stop, step) == (0, extent, 1):
        return x.name, x.shape
    shape = (*x.shape[:axis], max(0, -(-(stop - start) // step)), *x.shape[axis + 1 :])
    return c.emit("slice", (x.name,), shape, axis=axis, start=start, stop=stop, step=step), shape


def _slice(c: Converter, x: Value, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Value:
    if x.layout.is_batch(axis):
        if (start or 0) != 0 or step != 1:
            raise ModelError("the batch is sliced; samples must not mix")
        return x
    layout, _ = c.result()
    name, shape = _sliced(c, x, x.layout.sample_axis(axis), start, stop, step)
    return Value(name, shape, layout)


def _taken(c: Converter, x: Value, axis: int, index: int, layout: Layout) -> Value:
    start = index % x.shape[axis]
    name, shape = _sliced(c, x, axis, start, start + 1)
    shape = shape[:axis] + shape[axis + 1 :]
    return Value(c.emit("reshape", (name,), shape, shape=shape), shape, layout)


def _select(c: Converter, x: Value, axis: int, index: int) -> Value:
    return _taken(c, x, x.layout.sample_axis(axis), index, c.result()[0])


def _unbind(c: Converter, x: Value, axis: int = 0) -> list[Value]:
    sample_axis, found = x.layout.sample_axis(axis), layout_of(c.node.meta["val"][0].shape)
    assert found is not None
    return [_taken(c, x, sample_axis, index, found[0]) for index in range(x.shape[sample_axis])]


def _pieces(c: Converter, x: Value, axis: int) -> list[Value]:
    """Cut along an axis into the extents that the traced results have."""
    sample_axis, start, pieces = x.layout.sample_axis(axis), 0, []
    for meta in c.node.meta["val"]:
        found = layout_of(meta.shape)
        assert found is not None
        extent = found[1][sample_axis]
        name, shape = _sliced(c, x, sample_axis, start, start + extent)
        pieces.append(Value(name, shape, found[0]))
        start += extent
    return pieces


def _split(c: Converter, x: Value, size: Any, axis: int = 0) -> list[Value]:
    return _pieces(c, x, axis)


def _cat(c: Converter, parts: list[Any], axis: int = 0) -> Value:
    layout, _ = c.result()
    return c.value("concat", tuple(c.operand(part, layout) for part in parts), axis=layout.sample_axis(axis))


def _roll(c: Converter, x: Value, shifts: list[int], axes: list[int]) -> Value:
    for shift, axis in zip(shifts, axes, strict=True):
        sample_axis = x.layout.sample_axis(axis)
        extent = x.shape[sample_axis]
        cut = -shift % extent
        if cut:
            tail, _ = _sliced(c, x, sample_axis, cut, extent)
            head, _ = _sliced(c, x, sample_axis, 0, cut)
            x = Value(c.emit("concat", (tail, head), x.shape, axis=sample_axis), x.shape, x.layout)
    return x


def _pad(c: Converter, x: Value, padding: list[int], mode: str = "constant", value: float | None = None) -> Value:
    if mode != "constant":
        raise ModelError(f"padding mode {mode}; only constant padding has an integer form")
    for index in range(len(padding) // 2):
        before, after = padding[2 * index : 2 * index + 2]
        if min(before, after) < 0:
            raise ModelError("negative padding")
        axis = x.layout.sample_axis(x.layout.rank - 1 - index)
        parts, shape = [x.name], list(x.shape)
        for extent, position in ((before, 0), (after, len(parts))):
            if extent:
                filler = torch.full((*x.shape[:axis], extent, *x.shape[axis + 1 :]), float(value or 0.0))
                parts.insert(position if position == 0 else len(parts), c.constant(filler))
                shape[axis] += extent
        if len(parts) > 1:
            x = Value(c.emit("concat", tuple(parts), tuple(shape), axis=axis), tuple(shape), x.layout)
    return x


def _linear(c: Converter, x: Any, weight: Any, bias: Any = None) -> Value:
    kernel = _weights(weight)
    offset = torch.zeros(kernel.shape[0]) if bias is None else _weights(bias)
    return c.value("linear", (_batched(x).name, c.constant(kernel), c.constant(offset)))


def _addmm(c: Converter, bias: Any, x: Any, weight: Any) -> Value:
    return _linear(c, x, _weights(weight).T, bias)


def _conv2d(
    c: Converter,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
) -> Value:
    kernel = _weights(weight)

    def pair(setting: Any) -> tuple[int, int]:
        return (setting[0], setting[-1]) if isinstance(setting, list | tuple) else (setting, setting)

    if isinstance(padding, str):
        if padding == "same":
            raise ModelError("padding 'same'; give numbers")
        padding = (0, 0)
    offset = torch.zeros(kernel.shape[0]) if bias is None else _weights(bias)
    return c.value(
        "conv2d",
        (_batched(x).name, c.constant(kernel), c.constant(offset)),
        stride=pair(stride),
        padding=pair(padding),
        dilation=pair(dilation),
        groups=groups,
    )


def _matmul(c: Converter, a: Any, b: Any) -> Value:
    left = _batched(a)
    if isinstance(b, Tensor):
        if b.ndim != 2:
            raise ModelError(f"a product with a constant of shape {tuple(b.shape)}; only matrices have an integer form")
        return _linear(c, left, b.T)
    right = _batched(b)
    turned = c.last_operation(right.name)
    if turned is not None and turned.op == "permute":
        axes = turned.integers("axes")
        rank = len(axes)
        if axes == (*range(rank - 2), rank - 1, rank - 2):
            return c.value("matmul", (left.name, turned.inputs[0]), transpose_b=True)
    return c.value("matmul", (left.name, right.name), transpose_b=False)


def _attention(
    c: Converter,
    query: Value,
    key: Value,
    value: Value,
    mask: Any = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if is_causal or enable_gqa or isinstance(mask, Value):
        raise ModelError("causal, grouped or input-dependent masked attention has no integer form here")
    layout, _ = c.result()
    shape = (*query.shape[:-1], key.shape[-2])
    scores = c.emit("matmul", (query.name, key.name), shape, transpose_b=True)
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    scores = c.emit("scale", (scores,), shape, factor=factor)
    if isinstance(mask, Tensor) and not (mask.dtype == torch.bool and bool(mask.all())):
        if mask.dtype == torch.bool:
            raise ModelError("boolean attention masks have no integer form; use an additive mask")
        scores = c.emit("add", (scores, c.operand(mask, layout)), shape)
    weights = c.emit("softmax", (scores,), shape)
    return c.value("matmul", (weights, value.name), transpose_b=False)


def _softmax(c: Converter, x: Value, axis: int, *args: Any, **kwargs: Any) -> Value:
    if x.layout.sample_axis(axis) != len(x.shape) - 1:
        raise ModelError("softmax over an axis that is not the last")
    return c.value("softmax", (x.name,))


def _layer_norm(
    c: Converter, x: Value, shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *args: Any
) -> Value:
    if len(shape) != 1:
        raise ModelError(f"LayerNorm over {len(shape)} axes; only the last axis has an integer form")
    scale = torch.ones(shape) if weight is None else _weights(weight)
    offset = torch.zeros(shape) if bias is None else _weights(bias)
    return c.value("layer_norm", (x.name, c.constant(scale), c.constant(offset)), eps=float(eps))


def _batch_norm(c: Converter, x: Value, weight: Any, bias: Any, mean: Any, variance: Any, *args: Any) -> Any:
    # (x, weight, bias, mean, variance, training, momentum, eps, cudnn) or without training and cudnn
    eps = float(args[2]) if isinstance(args[0], bool) else float(args[1])
    gain = (torch.ones_like(variance) if weight is None else weight) * torch.rsqrt(variance + eps)
    offset = (torch.zeros_like(mean) if bias is None else bias) - mean * gain
    layout, shape = x.layout, x.shape
    # Channels are axis 1 of the traced tensor, axis 0 of a sample.
    extents = (-1, *(1,) * (len(shape) - 1))
    scaled = c.emit("multiply", (x.name, c.constant(gain.reshape(extents))), shape)
    name = c.emit("add", (scaled, c.constant(offset.reshape(extents))), shape)
    result = Value(name, shape, layout)
    return [result] if isinstance(c.node.meta["val"], list | tuple) else result


def _unary(function: str) -> Callable[..., Value]:
    def convert(c: Converter, x: Value, *args: Any, **kwargs: Any) -> Value:
        return c.value("unary", (x.name,), function=function)

    return convert


def _gelu(c: Converter, x: Value, approximate: str = "none") -> Value:
    return c.value("unary", (x.name,), function="gelu_tanh" if approximate == "tanh" else "gelu")


def _scaled(c: Converter, x: Value, factor: float) -> Value:
    return c.value("scale", (x.name,), factor=factor)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, int | float) or (isinstance(x, Tensor) and x.numel() == 1)


def _add(c: Converter, a: Any, b: Any, alpha: float = 1) -> Value:
    if isinstance(b, Value) and alpha != 1:
        b = Value(c.emit("scale", (b.name,), b.shape, factor=float(alpha)), b.shape, b.layout)
    elif alpha != 1:
        b = b * alpha
    layout, _ = c.result()
    return c.value("add", (c.operand(a, layout), c.operand(b, layout)))


def _subtract(c: Converter, a: Any, b: Any, alpha: float = 1) -> Value:
    return _add(c, a, b, -alpha)


def _multiply(c: Converter, a: Any, b: Any) -> Value:
    if isinstance(a, Value) and _is_scalar(b):
        return _scaled(c, a, float(b))
    if isinstance(b, Value) and _is_scalar(a):
        return _scaled(c, b, float(a))
    layout, _ = c.result()
    return c.value("multiply", (c.operand(a, layout), c.operand(b, layout)))


def _divide(c: Converter, a: Any, b: Any) -> Value:
    if isinstance(b, Value):
        raise ModelError("division by a value that depends on the input has no integer form")
    return _multiply(c, a, 1.0 / b)


def _mean(c: Converter, x: Value, axes: list[int] | None, keepdim: bool = False, **kwargs: Any) -> Value:
    if not axes:
        raise ModelError("a mean over all axes mixes the samples of a batch")
    sample_axes = sorted(x.layout.sample_axis(axis) for axis in axes)
    if sample_axes != list(range(sample_axes[0], sample_axes[-1] + 1)):
        raise ModelError(f"a mean over the axes {sample_axes}, which are not neighbours")
    first, last = sample_axes[0], sample_axes[-1]
    name, shape = x.name, x.shape
    if first != last:
        shape = (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])
        name = c.emit("reshape", (name,), shape, shape=shape)
    shape = shape[:first] + shape[first + 1 :]
    name = c.emit("mean", (name,), shape, axis=first)
    layout, result = c.result()
    if keepdim:
        name = c.emit("reshape", (name,), result, shape=result)
    return Value(name, result, layout)


def _pool_to_one(c: Converter, x: Value, size: Any) -> Value:
    if any(extent not in (1, None) for extent in (size if isinstance(size, list | tuple) else [size])):
        raise ModelError(f"adaptive pooling to {size}; only pooling to one value has an integer form")
    return _mean(c, x, [-2, -1], keepdim=True)


def _getitem(c: Converter, values: list[Value], index: int) -> Value:
    return values[index]


def _size(c: Converter, *args: Any, **kwargs: Any) -> Any:
    return c.node.meta["val"]


CONVERTERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        str(operator.getitem): _getitem,
        str(operator.mul): _size,
        str(operator.floordiv): _size,
        str(operator.add): _size,
        str(operator.sub): _size,
        "aten.sym_size.int": _size,
        "aten.clone.default": _identity,
        "aten.contiguous.default": _identity,
        "aten.detach.default": _identity,
        "aten.alias.default": _identity,
        "aten.dropout.default": _identity,
        "aten._to_copy.default": _identity,
        "aten.to.dtype": _identity,
        "aten.lift_fresh_copy.default": _identity,
        "aten.view.default": _reshape,
        "aten._unsafe_view.default": _reshape,
        "aten.reshape.default": _reshape,
        "aten.flatten.using_ints": _reshape,
        "aten.unflatten.int": _reshape,
        "aten.squeeze.dim": _reshape,
        "aten.squeeze.dims": _reshape,
        "aten.unsqueeze.default": _reshape,
        "aten.permute.default": _permute,
        "aten.transpose.int": _transpose,
        "aten.t.default": _t,
        "aten.expand.default": _expand,
        "aten.slice.Tensor": _slice,
        "aten.select.int": _select,
        "aten.unbind.int": _unbind,
        "aten.split.Tensor": _split,
        "aten.split_with_sizes.default": _split,
        "aten.chunk.default": _split,
        "aten.cat.default": _cat,
        "aten.roll.default": _roll,
        "aten.pad.default": _pad,
        "aten.constant_pad_nd.default": lambda c, x, padding, value=0.0: _pad(c, x, padding, "constant", value),
        "aten.linear.default": _linear,
        "aten.addmm.default": _addmm,
        "aten.mm.default": _matmul,
        "aten.matmul.default": _matmul,
        "aten.bmm.default": _matmul,
        "aten.conv2d.default": _conv2d,
        "aten.conv2d.padding": _conv2d,
        "aten.scaled_dot_product_attention.default": _attention,
        "aten.softmax.int": _softmax,
        "aten._softmax.default": _softmax,
        "aten.layer_norm.default": _layer_norm,
        "aten.batch_norm.default": _batch_norm,
        "aten._native_batch_norm_legit_no_training.default": _batch_norm,
        "aten.gelu.default": _gelu,
        "aten.relu.default": _unary("relu"),
        "aten.relu6.default": _unary("relu6"),
        "aten.silu.default": _unary("silu"),
        "aten.sigmoid.default": _unary("sigmoid"),
        "aten.tanh.default": _unary("tanh"),
        "aten.hardswish.default": _unary("hardswish"),
        "aten.hardsigmoid.default": _unary("hardsigmoid"),
        "aten.add.Tensor": _add,
        "aten.add.Scalar": _add,
        "aten.sub.Tensor": _subtract,
        "aten.sub.Scalar": _subtract,
        "aten.mul.Tensor": _multiply,
        "aten.mul.Scalar": _multiply,
        "aten.div.Tensor": _divide,
        "aten.div.Scalar": _divide,
        "aten.mean.dim": _mean,
        "aten.adaptive_avg_pool2d.default": _pool_to_one,
    }
)
