"""Laws of the rewrites that calibration chooses: they change no output in float, and the best is the best measured."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.models import Formula, images, ours, spread, traced
from support.rewrites import moved, replaced
from torch import Tensor, nn
from torch.nn import functional

from calibration.cache import ActivationCache
from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import Graph, execute
from calibration.rewriting import Rewriter
from calibration.rules import LAYER_NORM_SCALES, Recipe
from calibration.simulate import simulate
from calibration.stream import Stream
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.spec import QuantSpec

CPU = torch.device("cpu")
NAMES = ["ours", "swin", "transformers"]


def all_rewrites(graph: Graph, x: Tensor, recipe: Recipe) -> tuple[Graph, list[str]]:
    """Make every rewrite as calibration does, operation by operation, without a correction; also return the notes."""
    current, notes = dataclasses.replace(graph, constants=dict(graph.constants)), []
    rewriter = Rewriter(current, recipe)
    with ActivationCache() as cache, torch.no_grad():
        stream = Stream(current, "float", cache, CPU)
        stream.add_batch((x,))
        for operation in graph.operations:
            made: dict[str, Tensor] = {}
            if operation.op == "layer_norm" and recipe.layer_norm_scale != "none":
                note = rewriter.refusal(operation)
                if note is None:
                    made, note = rewriter.layer_norm_scale(
                        operation, stream, QuantSpec(4, symmetric=False), QuantSpec(4)
                    )
                notes += [] if note is None else [note]
            elif operation.op == "linear" and recipe.centring:
                made = rewriter.centring(operation, stream)
            current.constants.update(replaced(current, made).constants)  # type: ignore[attr-defined]
            stream.keep(operation)
            stream.release(operation)
    return current, notes


def uneven(name: str) -> Graph:
    """Return an example model some of whose norms' channels are thirty times larger than the others."""
    graph = traced(name)
    constants = dict(graph.constants)
    for operation in graph.operations:
        if operation.op == "layer_norm":
            gamma = constants[operation.inputs[1]].clone()
            gamma[::7] *= 30.0
            constants[operation.inputs[1]] = gamma
    return dataclasses.replace(graph, constants=constants)


@pytest.mark.parametrize("centring", [False, True])
@pytest.mark.parametrize("kind", LAYER_NORM_SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_rewrites_change_no_output(name: str, kind: str, centring: bool) -> None:
    """To 1e-5 of the largest: constants are float32, and what one layer gains the next one loses to a rounding."""
    graph, x = traced(name), images(name, 4)
    recipe = Recipe("rewrites", (), layer_norm_scale=kind, centring=centring)
    rewritten, _ = all_rewrites(graph, x, recipe)
    changed = any(not torch.equal(tensor, rewritten.constants[key]) for key, tensor in graph.constants.items())
    # The best may be to leave every norm as it is.
    assert changed == (kind != "none" or centring) or kind == "best"
    assert moved(graph, rewritten, images(name, 4, seed=7)) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_best_is_the_best_measured(name: str) -> None:
    """At each norm with even and uneven channels: least error on either half of the rows, fitted on the other half."""
    specs = QuantSpec(4, symmetric=False, search="output"), QuantSpec(4, granularity="channel", search="mse")
    for graph in (traced(name), uneven(name)):
        x = images(name, 4)
        with ActivationCache() as cache, torch.no_grad():
            stream = Stream(graph, "float", cache, CPU)
            stream.add_batch((x,))
            rewriter = Rewriter(graph, Recipe("", (), layer_norm_scale="best"))
            for operation in graph.operations:
                stream.keep(operation)
                if operation.op != "layer_norm" or rewriter.refusal(operation) is not None:
                    continue
                rows = stream.value(operation.inputs[0], 0).reshape(-1, operation.shape[-1])
                group, half = rewriter._norms[operation.name], -(-len(rows) // 2)
                errors = dict.fromkeys(("none", "mean", "median", "half"), 0.0)
                for fitted, unseen in ((rows[:half], rows[half:]), (rows[half:], rows[:half])):
                    for kind, made in rewriter._candidates(operation, group, fitted, specs[0]).items():
                        errors[kind] += rewriter._joint_error(operation, group, fitted, unseen, made, *specs)
                best = min(errors, key=lambda kind: errors[kind])
                constants, note = rewriter.layer_norm_scale(operation, stream, *specs)
                share = errors[best] / errors["none"]
                assert note == f"{operation.module}: channel scales {best}, error {share:.2f} of none"
                expected = rewriter._candidates(operation, group, rows, specs[0])[best]
                assert constants.keys() == expected.keys()
                assert all(torch.equal(constants[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_best_holds_on_unseen_images(name: str) -> None:
    """Eight images of a few tokens fit any channel's scale; on others what was chosen is not much worse than none."""
    graph, unseen = traced(name), images(name, 100, seed=99)
    expected = execute(graph, (unseen,))[0]
    noise = {}
    for kind in ("none", "best"):
        recipe = dataclasses.replace(named_recipe("minmax", "w8a8"), layer_norm_scale=kind)
        result = calibrate(graph, [(image,) for image in images(name, 8, seed=1)], recipe)
        noise[kind] = float((simulate(result, (unseen,))[0] - expected).square().mean())
    assert noise["best"] < 1.25 * noise["none"]


@pytest.mark.parametrize("name", NAMES)
def test_uneven_channels_are_evened(name: str) -> None:
    """A few channels that are thirty times larger than the others: leaving them is never the best at four bits."""
    _, notes = all_rewrites(uneven(name), images(name, 16), Recipe("", (), layer_norm_scale="best"))
    chosen = [note for note in notes if "channel scales" in note]
    assert chosen
    assert not [note for note in chosen if "channel scales none" in note]


def _pooled(x: Tensor, linear: nn.Module, norm: nn.Module, head: nn.Module) -> Tensor:
    return head(norm(linear(x)).mean(1))


def _read_twice(x: Tensor, linear: nn.Module, norm: nn.Module, head: nn.Module) -> Tensor:
    normed = norm(linear(x))
    return head(normed) + functional.gelu(normed)[..., :4]


def _returned(x: Tensor, linear: nn.Module, norm: nn.Module, head: nn.Module) -> Tensor:
    del head
    return norm(linear(x))


@pytest.mark.parametrize("kind", ["mean", "median", "best"])
@pytest.mark.parametrize(
    ("function", "reader"), [(_pooled, "mean"), (_read_twice, "unary gelu"), (_returned, "output")]
)
def test_what_cannot_be_rewritten_is_noted(kind: str, function: object, reader: str) -> None:
    """With the norm's name and what stands in the way; nothing changes."""
    module = spread(Formula(function, nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)))  # type: ignore[arg-type]
    x = torch.randn((4, 5, 8), generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(named_recipe("mse", "w8a8"), layer_norm_scale=kind)
    result = calibrate(trace(module, (x[:2],)), [(row,) for row in x], recipe)
    (note,) = result.notes
    assert note.startswith("layers.1: channels keep their scales: ")
    assert reader in note
    norm = next(operation for operation in result.graph.operations if operation.op == "layer_norm")
    for constant in norm.inputs[1:]:
        assert torch.equal(result.graph.constants[constant], result.float_graph().constants[constant])


@pytest.fixture(scope="module")
def rewritten() -> Calibrated:
    return calibrate(traced("ours"), [(image,) for image in images("ours", 12)], named_recipe("auto", "w8a8"))


def test_the_float_graph_is_the_traced_one(rewritten: Calibrated) -> None:
    """Rewrites and corrections are in the quantized graph only; what was there before comes back bit for bit."""
    graph = traced("ours")
    assert set(rewritten.float_graph().constants) == set(graph.constants)
    for name, tensor in graph.constants.items():
        assert torch.equal(rewritten.float_graph().constants[name], tensor), name
    x = images("ours", 3, seed=5)
    assert torch.equal(execute(rewritten.float_graph(), (x,))[0], execute(graph, (x,))[0])


def test_every_norm_is_told_of(rewritten: Calibrated) -> None:
    """One note for each, in the order of the network."""
    norms = [operation.module for operation in traced("ours").operations if operation.op == "layer_norm"]
    assert [note.split(":")[0] for note in rewritten.notes] == norms


def test_calibration_leaves_model_and_graph_alone() -> None:
    """A graph can be calibrated again, with another recipe."""
    module = spread(ours())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    graph = trace(module, (images("ours", 2),))
    constants = {name: tensor.clone() for name, tensor in graph.constants.items()}
    samples = [(image,) for image in images("ours", 8)]
    first, _, again = (calibrate(graph, samples, named_recipe(name, "w4a4")) for name in ("auto", "repq", "auto"))
    assert all(torch.equal(tensor, constants[name]) for name, tensor in graph.constants.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert first.sites == again.sites
    x = images("ours", 2)
    assert torch.equal(simulate(first, (x,))[0], simulate(again, (x,))[0])
