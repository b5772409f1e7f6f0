"""Calibration: reproducible, independent of batching, and clear about what it cannot use."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.models import Formula, calibrated, images, model, ours, recipe, spread, traced
from torch import Tensor, nn
from torch.nn import functional

from calibration.checkpoint import StatisticsStore
from calibration.calibrated import Calibrated
from calibration.engine import calibrate
from calibration.graph import execute
from calibration.integerize import integerize
from calibration.rules import Recipe, Rule
from calibration.simulate import simulate
from calibration.trace import trace
from quantizers.codebook import uniform_codebook
from quantizers.errors import DataError, ModelError
from quantizers.integer.interpret import interpret
from quantizers.row_relative import RowRelativeQParams
from quantizers.spec import QuantSpec
from quantizers.uniform import UniformQParams


def samples(x: Tensor) -> list[tuple[Tensor, ...]]:
    return [(image,) for image in x]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_usable(result: Calibrated, x: Tensor) -> None:
    """Simulation and integers are finite and close to each other."""
    (simulated,) = simulate(result, (x,))
    (integers,) = interpret(integerize(result), x)
    assert bool(torch.isfinite(simulated).all())
    assert relative(integers, simulated) < 0.05


@pytest.mark.parametrize("search", ["minmax", "percentile", "mse"])
def test_the_callers_batches_do_not_matter(search: str) -> None:
    """Images from batches of 1, 3, 7 or all at once give the same parameters, bit for bit."""
    x = images("ours", 19)

    def batched(size: int) -> Iterator[tuple[Tensor, ...]]:
        for batch in x.split(size):
            yield from samples(batch)

    results = [calibrate(traced("ours"), batched(size), recipe(search=search)) for size in (1, 3, 7, 19)]
    for result in results[1:]:
        assert result.sites == results[0].sites
        assert result.fingerprint == results[0].fingerprint
        assert result.num_images == 19


def test_memory_layout_does_not_matter() -> None:
    """Images whose channels lie last in memory are the same images."""
    x = images("vit", 9)
    turned = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    first, second = (calibrate(traced("vit"), samples(images), recipe()) for images in (x, turned))
    assert first.sites == second.sites
    assert first.fingerprint == second.fingerprint


def test_the_same_inputs_give_the_same_bytes() -> None:
    """A second trace and calibration of an equal model repeats every parameter and the fingerprint."""
    x = images("ours", 8)
    first, second = (calibrate(trace(spread(ours()), (x[:2],)), samples(x), recipe(search="mse")) for _ in range(2))
    assert first.sites == second.sites
    assert first.fingerprint == second.fingerprint
    assert integerize(first) == integerize(second)


def test_the_fingerprint_is_of_the_images() -> None:
    """One changed pixel, another order or one image less is another fingerprint."""
    x = images("ours", 4)
    changed = x.clone()
    changed[3, 0, 7, 7] += 1e-3
    found = {calibrate(traced("ours"), samples(x), recipe()).fingerprint for x in (x, changed, x.flip(0), x[:3])}
    assert len(found) == 4


def test_minmax_is_the_extremes_of_the_float_network() -> None:
    """Ranges come from float inputs everywhere: those of one run of the float graph over all images."""
    x = images("ours", 16, seed=1)
    seen: dict[tuple[str, int], Tensor] = {}

    def on_edge(operation, position, value):
        return seen.setdefault((operation.name, position), value)

    execute(traced("ours"), (x,), on_edge)
    for entry in calibrated("ours").sites:
        if entry.site.kind == "probability":
            assert entry.qparams == RowRelativeQParams(uniform_codebook(8))
        elif entry.site.kind not in ("weight", "constant"):
            assert isinstance(entry.qparams, UniformQParams)
            peak = float(seen[entry.site.edges[0]].abs().max())
            assert entry.qparams.scale[0] == pytest.approx(peak / entry.qparams.qmax, rel=1e-5)


def test_sites_keep_their_order_and_specs() -> None:
    """The result lists every site in execution order with the spec that the recipe gave it."""
    result = calibrated("ours", recipe(4, 6))
    assert [entry.site.name for entry in result.sites][:3] == [
        "patch_embed.proj.input",
        "patch_embed.proj.weight",
        "residual",
    ]
    assert {entry.spec.bits for entry in result.sites if entry.site.kind == "weight"} == {4}
    assert set(result.by_edge()) == {edge for entry in result.sites for edge in entry.site.edges}


def test_progress_is_told() -> None:
    """Progress counts images, towards the total where it is known, then sites."""
    told: list[tuple[str, int, int]] = []
    calibrate(traced("ours"), samples(images("ours", 10)), recipe(), total=12, progress=lambda *step: told.append(step))
    assert told[:3] == [("observe activations", 8, 12), ("observe activations", 10, 12), ("search ranges", 1, 39)]
    assert told[-1] == ("search ranges", 39, 39)


@pytest.mark.parametrize("search", ["minmax", "percentile", "mse"])
def test_one_image_is_enough(search: str) -> None:
    """A calibration set of one image works with every search."""
    result = calibrate(traced("ours"), samples(images("ours", 1)), recipe(search=search))
    assert result.num_images == 1
    assert_usable(result, images("ours", 1))


def test_several_inputs() -> None:
    """A sample is a tuple with one tensor for each input."""

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(6, 8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) + self.right(b)

    a, b = torch.randn(9, 8), torch.randn(9, 6)
    graph = trace(spread(TwoInputs()), (a, b))
    result = calibrate(graph, list(zip(a, b, strict=True)), recipe())
    assert relative(simulate(result, (a, b))[0], execute(graph, (a, b))[0]) < 0.05


@pytest.mark.parametrize("search", ["minmax", "percentile", "mse"])
def test_constant_images(search: str) -> None:
    """Black images, and images of one value, work with every search."""
    for value in (0.0, 0.7):
        x = torch.full((2, 1, 8, 8), value)
        assert_usable(calibrate(traced("ours"), samples(x), recipe(search=search)), x)


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_dead_channels(search: str) -> None:
    """Channels without weights keep their bias, through the integers too; a constant channel is kept as well."""
    layer = nn.Linear(8, 4)
    spread(layer)
    with torch.no_grad():
        layer.weight[1:3] = 0.0
        layer.weight[3] = 0.25
        layer.bias.copy_(torch.tensor([0.1, 0.003, 0.0, -0.2]))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(Formula(lambda x, a: functional.gelu(a(x)), layer), (x,))
    result = calibrate(graph, samples(x), recipe(search=search))
    (simulated,) = simulate(result, (x,))
    (integers,) = interpret(integerize(result), x)
    torch.testing.assert_close(integers, simulated, rtol=0, atol=0.02)
    graph = trace(layer, (x,))
    (integers,) = interpret(integerize(calibrate(graph, samples(x), recipe(search=search))), x)
    torch.testing.assert_close(integers[:, 1:3], torch.tensor([0.003, 0.0]).expand(16, 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bias", [0.0, 0.003, -50.0])
def test_an_all_zero_weight(bias: float) -> None:
    """A weight tensor of zeros works, and its result is the bias, to 20 bits of it."""
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, bias)
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    result = calibrate(trace(layer, (x,)), samples(x), recipe(search="mse"))
    for found in (simulate(result, (x,))[0], interpret(integerize(result), x)[0]):
        torch.testing.assert_close(found, torch.full((8, 4), bias), rtol=2**-20, atol=0)


def test_a_bias_that_dwarfs_its_weight_fits() -> None:
    """A bias of more than 2^31 steps of input times weight raises the channel's scale instead of overflowing."""
    layer = spread(nn.Linear(8, 2))
    with torch.no_grad():
        layer.weight[0] *= 1e-9
        layer.bias.copy_(torch.tensor([1000.0, 1.0]))
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    result = calibrate(trace(layer, (x,)), samples(x), recipe())
    (found,) = interpret(integerize(result), x)
    torch.testing.assert_close(found, layer(x).detach(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("killed_after", [3, 8, 13, 16])
def test_resume_gives_the_same_result(killed_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed anywhere, and goes on from its store, ends with the parameters of an unbroken run."""
    monkeypatch.setattr("calibration.engine._SAVE_INTERVAL", -1.0)
    x, store = images("ours", 19), StatisticsStore(tmp_path, "key")

    def interrupted() -> Iterator[tuple[Tensor, ...]]:
        yield from samples(x[:killed_after])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), interrupted(), recipe(search="mse"), store=store)
    resumed = calibrate(traced("ours"), samples(x), recipe(search="mse"), store=store)
    unbroken = calibrate(traced("ours"), samples(x), recipe(search="mse"))
    assert resumed.sites == unbroken.sites
    assert (resumed.fingerprint, resumed.num_images) == (unbroken.fingerprint, 19)


@pytest.mark.parametrize("count", [3, 8, 10, 16])
def test_a_finished_run_can_go_on_with_more_images(count: int, tmp_path: Path) -> None:
    """Each image is counted once, also where the first run ended inside a micro-batch."""
    x, store = images("ours", 19), StatisticsStore(tmp_path, "key")
    calibrate(traced("ours"), samples(x[:count]), recipe(search="mse"), store=store)
    longer = calibrate(traced("ours"), samples(x), recipe(search="mse"), store=store)
    assert longer.sites == calibrate(traced("ours"), samples(x), recipe(search="mse")).sites
    stats, _ = store.load() or ({}, [])
    assert stats["patch_embed.proj.input"].count == 16 * 64


def test_other_images_than_those_of_the_interrupted_run_are_refused(tmp_path: Path) -> None:
    """Going on with other images would mix two data sets."""
    x, store = images("ours", 16), StatisticsStore(tmp_path, "key")
    calibrate(traced("ours"), samples(x), recipe(), store=store)
    for other in (x.flip(0), x[:5]):
        with pytest.raises(DataError, match="the images differ from those of the interrupted run"):
            calibrate(traced("ours"), samples(other), recipe(), store=store)


def test_no_image_is_refused() -> None:
    """An empty calibration set is an error that says so."""
    with pytest.raises(DataError, match="calibration needs at least one image, got none"):
        calibrate(traced("ours"), [], recipe())


@pytest.mark.parametrize("index", [0, 5, 9])
def test_nan_in_an_image_names_the_site(index: int) -> None:
    """NaN in an image stops at the site that reads the image and tells the micro-batch."""
    x = images("ours", 10)
    x[index, 0, 2, 2] = float("nan")
    first, last = (0, 7) if index < 8 else (8, 9)
    message = rf"NaN or infinity at site patch_embed\.proj\.input while calibrating images {first} to {last}"
    with pytest.raises(ModelError, match=message):
        calibrate(traced("ours"), samples(x), recipe())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_weight_is_named(value: float) -> None:
    """A weight that is not finite is refused before any image is read."""
    damaged = copy.deepcopy(model("ours"))
    damaged.blocks[0].mlp.fc1.weight.data[3, 3] = value
    graph = trace(damaged, (images("ours", 2),))
    with pytest.raises(ModelError, match=r"weight blocks\.0\.mlp\.fc1\.weight holds NaN or infinity"):
        calibrate(graph, iter([]), recipe())


def test_an_infinite_activation_names_the_site() -> None:
    """Weights that overflow float32 inside the network: the first site that sees it is named."""
    broken = copy.deepcopy(model("ours"))
    broken.blocks[1].mlp.fc1.weight.data.fill_(3e38)
    graph = trace(broken, (images("ours", 2),))
    with pytest.raises(ModelError, match=r"NaN or infinity at site blocks\.1\.mlp\.act\.input while calibrating"):
        calibrate(graph, samples(images("ours", 3)), recipe())


def test_an_infinite_output_is_named() -> None:
    """Logits are read in no format, but infinity among them is an error as well."""
    broken = copy.deepcopy(model("ours"))
    broken.head.weight.data.fill_(3e38)
    graph = trace(broken, (images("ours", 2),))
    with pytest.raises(ModelError, match="NaN or infinity at output output while calibrating images 0 to 2"):
        calibrate(graph, samples(images("ours", 3)), recipe())


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.ones(1, 8, 9),), "calibration image 3: input images: expected float32 of shape (batch, 1, 8, 8)"),
        ((torch.ones(3, 8, 8),), "calibration image 3: input images: expected float32 of shape (batch, 1, 8, 8)"),
        ((torch.ones(1, 8, 8, dtype=torch.uint8),), "got uint8 of shape (1, 1, 8, 8)"),
        ((torch.ones(1, 8, 8), torch.ones(1)), "calibration image 3: the model takes 1 inputs, got 2"),
    ],
)
def test_images_of_another_shape_are_refused(sample: tuple[Tensor, ...], message: str) -> None:
    """One image among others of another size, channel count or dtype is named by its position."""
    mixed = [*samples(images("ours", 3)), sample, *samples(images("ours", 3))]
    with pytest.raises(DataError, match=re.escape(message)):
        calibrate(traced("ours"), mixed, recipe())


def test_the_recipe_is_checked_before_the_images_are_read() -> None:
    """A mistake in the recipe costs no calibration."""

    def never() -> Iterator[tuple[Tensor, ...]]:
        raise AssertionError("an image was read")
        yield

    with pytest.raises(Exception, match="no rule matches site"):
        calibrate(traced("ours"), never(), Recipe("empty", (Rule(QuantSpec(8), "image"),)))
