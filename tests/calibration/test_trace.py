"""Every model family traces to the normal form; what cannot be traced says why."""

from __future__ import annotations

import collections
from collections.abc import Callable

import pytest
import torch
from support.models import MODELS, Formula, images, model, spread, traced
from torch import Tensor, nn
from torch.nn import functional

from calibration.graph import EXECUTORS, Graph, execute
from calibration.sites import find_sites
from calibration.trace import trace
from quantizers.errors import DataError, ModelError, UnsupportedOperatorError


def counts(graph: Graph) -> dict[str, int]:
    return dict(collections.Counter(operation.op for operation in graph.operations))


def formula(function: Callable[..., object], *layers: nn.Module, shape: tuple[int, ...] = (3, 6, 8)) -> Graph:
    """Trace a formula, whose layers get random weights, on images of a shape."""
    return trace(spread(Formula(function, *layers)), (torch.ones(2, *shape),))


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_the_graph_equals_the_module(name: str, batch: int) -> None:
    """One trace serves every batch size and gives the module's output, to float32 rounding."""
    x = images(name, batch, seed=batch)
    with torch.no_grad():
        expected = model(name)(x)
    (found,) = execute(traced(name), (x,))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_only_the_normal_form(name: str) -> None:
    """Every operator is one of the table, attention is decomposed, and names are defined once, before use."""
    graph = traced(name)
    known = {name for name, _ in graph.inputs} | set(graph.constants)
    for operation in graph.operations:
        assert operation.op in EXECUTORS
        assert set(operation.inputs) <= known
        assert operation.name not in known
        known.add(operation.name)
    assert counts(graph)["softmax"] == len([o for o in graph.operations if o.op == "matmul"]) / 2


@pytest.mark.parametrize("name", MODELS)
def test_shapes_are_those_of_one_sample(name: str) -> None:
    """The shape that an operation states is the shape it computes, without the batch."""
    graph, seen = traced(name), {}
    execute(graph, (images(name, 3),), lambda operation, position, x: seen.setdefault(operation.inputs[position], x))
    shapes = graph.shapes()
    for value, tensor in seen.items():
        assert tuple(tensor.shape[1:]) == shapes[value], value


#: What does work in the two blocks of a plain ViT; views are left out.
PLAIN = {
    "conv2d": 1, "linear": 9, "matmul": 4, "scale": 2, "softmax": 2, "layer_norm": 5, "unary": 2, "add": 5, "concat": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", PLAIN),
        ("vit", PLAIN),
        # Two heads, whose logits are averaged.
        ("deit", {**PLAIN, "linear": 10, "add": 6, "scale": 3}),
        # LayerScale is folded: no multiply; and there is no head.
        ("dinov2", {**PLAIN, "linear": 8}),
        # Separate projections of queries, keys and values.
        ("transformers", {**PLAIN, "linear": 13}),
        # Two stages, relative position biases, one mask, cyclic shifts as concats, a mean at the end.
        (
            "swin",
            {
                "conv2d": 1, "linear": 18, "matmul": 8, "scale": 4, "softmax": 4, "layer_norm": 11, "unary": 4,
                "add": 13, "concat": 4, "mean": 1,
            },
        ),
    ],
)  # fmt: skip
def test_operators(name: str, expected: dict[str, int]) -> None:
    """Nothing is left of dropout, of layer scales, or of fused attention."""
    found = counts(traced(name))
    assert {op: n for op, n in found.items() if op not in ("reshape", "permute", "slice")} == expected


def test_dropout_is_removed() -> None:
    """Dropout is nothing in eval mode, which the trace sets."""
    module = Formula(lambda x, a, b: b(a(x)), nn.Linear(8, 8), nn.Dropout(0.5)).train()
    assert counts(trace(module, (torch.ones(2, 8),))) == {"linear": 1}


def test_batch_norm_is_folded() -> None:
    """A BatchNorm after a convolution becomes its weight and bias."""
    graph = formula(lambda x, a, b: functional.relu(b(a(x))), nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4))
    assert counts(graph) == {"conv2d": 1, "unary": 1}


def test_batch_norm_without_a_layer_before_it_is_kept_as_arithmetic() -> None:
    """Behind an activation there is nothing to fold into: multiply and add."""
    graph = formula(lambda x, a, b: b(functional.relu(a(x))), nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4))
    assert counts(graph) == {"conv2d": 1, "unary": 1, "multiply": 1, "add": 1}


@pytest.mark.parametrize("left", [False, True])
def test_layer_scale_is_folded(left: bool) -> None:
    """A per-channel factor after a linear is folded, on whichever side of the product it is written."""
    gamma = torch.linspace(-1, 2, 8)
    graph = formula(lambda x, a: x + (gamma * a(x) if left else a(x) * gamma), nn.Linear(8, 8))
    assert counts(graph) == {"linear": 1, "add": 1}


def test_a_layer_with_two_readers_is_not_folded_into() -> None:
    """A factor on one of two paths stays where it is."""

    def both(x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x)
        return y * torch.arange(1.0, 9.0) + y

    graph = formula(both, nn.Linear(8, 8))
    assert counts(graph) == {"linear": 1, "multiply": 1, "add": 1}


def test_a_shared_weight_is_folded_apart() -> None:
    """One linear, used twice and scaled differently, becomes two weights."""
    first, second = torch.linspace(1, 2, 8), torch.linspace(-1, 1, 8)
    graph = formula(lambda x, a: a(functional.gelu(a(x) * first)) * second, nn.Linear(8, 8))
    assert counts(graph) == {"linear": 2, "unary": 1}


def test_shared_inputs_are_one_site() -> None:
    """Queries, keys and values from one LayerNorm read it in one format; the residual has one before both readers."""
    sites = {site.name: site for site in find_sites(traced("transformers"))}
    first = "model.vit.layers.0"
    assert sites[f"{first}.attention.q_proj.input"].edges == (("linear", 0), ("linear_1", 0), ("linear_2", 0))
    assert [operation for operation, _ in sites[f"{first}.layernorm_before.input"].edges] == ["layer_norm", "add_117"]
    assert not any(name.endswith(("k_proj.input", "v_proj.input")) for name in sites)


def test_all_unsupported_operators_are_listed() -> None:
    """One error names every operator without a converter, how often and where it is used."""
    with pytest.raises(UnsupportedOperatorError) as caught:
        formula(lambda x, a: torch.fft.fft(a(x)).real.sort(-1).values.cumsum(1).cumsum(2), nn.Linear(8, 8))
    assert caught.value.nodes["aten.cumsum.default"] == ["cumsum", "cumsum_1"]
    assert caught.value.nodes["aten.sort.default"] == ["sort"]
    assert any("fft" in operator for operator in caught.value.nodes)
    text = str(caught.value)
    assert "aten.cumsum.default (2): cumsum, cumsum_1" in text
    assert "aten.sort.default (1): sort" in text
    assert "aten.fft_fft.default (1): fft_fft" in text


def test_unsupported_operators_name_their_module() -> None:
    """A node inside a submodule is shown with the module's path."""
    inner = Formula(lambda x: x.cumsum(-1))
    with pytest.raises(UnsupportedOperatorError, match=r"aten\.cumsum\.default \(1\): cumsum in layers\.0"):
        formula(lambda x, a: a(x), inner)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, a: a(x) - a(x).mean(0, keepdim=True), r"aten\.mean\.dim mean.*works along the batch \(axis 0\)"),
        (lambda x, a: a(x).softmax(0), r"aten\.softmax\.int softmax.*works along the batch"),
        (lambda x, a: a(x).mean((1, 2)) @ x.mean((1, 2)).T, r"batch appears in several axes"),
        (lambda x, a: a(x)[1:], r"torch\.export cannot trace Formula"),
        (lambda x, a: a(x).reshape(-1, 8), "the model returns a tensor whose first axis is not the batch"),
        (lambda x, a: (a(x), torch.ones(3)), "the model returns a value that does not depend on its input"),
        (lambda x, a: a(x) + torch.randn(6, 8), "differs from the model by"),
    ],
)
def test_models_that_mix_samples_are_refused(function: Callable[..., object], message: str) -> None:
    """What is not one function of one sample is refused, with the node and the reason."""
    with pytest.raises(ModelError, match=message):
        formula(function, nn.Linear(8, 8))


def test_data_dependent_control_flow_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    """torch.export's failure becomes one error with the module and the shapes, and nothing else is printed."""

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ModelError) as caught:
        trace(Branching(), (torch.ones(1, 4),))
    assert str(caught.value).startswith("torch.export cannot trace Branching with inputs of shapes [(2, 4)]: ")
    assert "data-dependent" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_wrong_example_inputs_are_refused() -> None:
    """An example of another shape fails in the model; the message holds the shape. No example is a mistake."""
    with pytest.raises(ModelError, match=r"cannot trace Linear with inputs of shapes \[\(2, 7\)\]"):
        trace(nn.Linear(8, 8), (torch.ones(2, 7),))
    with pytest.raises(ModelError, match="trace needs example inputs"):
        trace(nn.Linear(8, 8), ())


def test_several_inputs_and_outputs() -> None:
    """Inputs keep their names and order; outputs of any nesting are numbered."""

    class TwoInputs(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> dict[str, object]:
            return {"sum": left + right, "both": (left * right, right)}

    graph = trace(TwoInputs(), (torch.ones(2, 4), torch.ones(2, 4)))
    assert graph.inputs == (("left", (4,)), ("right", (4,)))
    assert [name for name, _ in graph.outputs] == ["output_0", "output_1", "output_2"]
    left, right = torch.randn(3, 4), torch.randn(3, 4)
    for found, expected in zip(execute(graph, (left, right)), (left + right, left * right, right), strict=True):
        assert torch.equal(found, expected)


def test_tracing_leaves_the_module_alone() -> None:
    """Weights keep their values although folding changed the graph's."""
    module = spread(Formula(lambda x, a, b: b(a(x)), nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4)))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trace(module, (torch.ones(2, 3, 6, 8),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "takes 1 inputs, got 0"),
        ((torch.ones(2, 1, 8, 9),), r"expected float32 of shape \(batch, 1, 8, 8\), got float32 of shape \(2, 1, 8, 9"),
        ((torch.ones(1, 8, 8),), r"got float32 of shape \(1, 8, 8\)"),
        ((torch.ones(2, 1, 8, 8, dtype=torch.float64),), "got float64"),
    ],
)
def test_other_inputs_are_refused(inputs: tuple[Tensor, ...], message: str) -> None:
    """Executing checks count, shape and dtype and names what was expected."""
    with pytest.raises(DataError, match=message):
        execute(traced("ours"), inputs)
