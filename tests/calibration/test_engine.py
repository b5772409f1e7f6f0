"""Calibration: reproducible, independent of batching, and clear about what it cannot use."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.models import Formula, calibrated, images, model, ours, recipe, spread, traced
from torch import Tensor, nn
from torch.nn import functional

from calibration.cache import ActivationCache
from calibration.calibrated import Calibrated
from calibration.engine import Options, calibrate
from calibration.graph import execute
from calibration.integerize import integerize
from calibration.progress import ProgressStore
from calibration.rules import Recipe, Rule
from calibration.serialize import calibrated_to_bytes
from calibration.simulate import simulate
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.codebook import uniform_codebook
from quantizers.errors import ArtifactError, DataError, ModelError
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


BATCHED = [recipe(), recipe(search="percentile"), recipe(search="mse"), named_recipe("auto", "w4a4")]


@pytest.mark.parametrize("chosen", BATCHED, ids=["minmax", "percentile", "mse", "auto"])
def test_the_callers_batches_do_not_matter(chosen: Recipe) -> None:
    """Images from batches of 1, 3, 7 or all at once give the same bytes."""
    x = images("ours", 19)

    def batched(size: int) -> Iterator[tuple[Tensor, ...]]:
        for batch in x.split(size):
            yield from samples(batch)

    results = [calibrate(traced("ours"), batched(size), chosen) for size in (1, 3, 7, 19)]
    files = {calibrated_to_bytes(result) for result in results}
    assert len(files) == 1
    assert results[0].num_images == 19


@pytest.mark.parametrize("count", [8, 17])
@pytest.mark.parametrize("method", ["mse", "auto"])
def test_the_memory_limit_does_not_matter(method: str, count: int, tmp_path: Path) -> None:
    """Activations in files, some in memory, or all in memory: the same bytes, and no file stays."""
    x, chosen = samples(images("ours", count)), named_recipe(method, "w4a4")
    results = [
        calibrate(traced("ours"), x, chosen, options=Options(limit, tmp_path / "scratch"))
        for limit in (0, 1 << 14, 1 << 30)
    ]
    assert len({calibrated_to_bytes(result) for result in results}) == 1
    assert not list((tmp_path / "scratch").iterdir())


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No more than the limit is ever held, and less is held than without one."""
    held: list[int] = []
    put = ActivationCache.put

    def watched(self: ActivationCache, key: tuple[str, str, int], tensor: Tensor) -> None:
        put(self, key, tensor)
        held.append(self.memory_bytes)

    monkeypatch.setattr(ActivationCache, "put", watched)
    x, chosen = samples(images("ours", 17)), named_recipe("auto", "w8a8")
    peaks = []
    for limit in (0, 1 << 14, 1 << 30):
        held.clear()
        calibrate(traced("ours"), x, chosen, options=Options(limit, tmp_path))
        peaks.append(max(held))
    assert peaks[0] == 0 < peaks[1] <= 1 << 14 < peaks[2]


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
    """Progress counts images, towards the total where it is known, then operations."""
    told: list[tuple[str, int, int]] = []
    calibrate(traced("ours"), samples(images("ours", 10)), recipe(), total=12, progress=lambda *step: told.append(step))
    operations = len(traced("ours").operations)
    assert told[:3] == [("read images", 8, 12), ("read images", 10, 12), ("calibrate", 1, operations)]
    assert told[2:] == [("calibrate", done, operations) for done in range(1, operations + 1)]


@pytest.mark.parametrize("chosen", BATCHED, ids=["minmax", "percentile", "mse", "auto"])
def test_one_image_is_enough(chosen: Recipe) -> None:
    """A calibration set of one image works with every search."""
    result = calibrate(traced("ours"), samples(images("ours", 1)), chosen)
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


@pytest.mark.parametrize("chosen", BATCHED, ids=["minmax", "percentile", "mse", "auto"])
def test_constant_images(chosen: Recipe) -> None:
    """Black images, and images of one value, work with every search."""
    for value in (0.0, 0.7):
        x = torch.full((2, 1, 8, 8), value)
        assert_usable(calibrate(traced("ours"), samples(x), chosen), x)


@pytest.mark.parametrize("dead", ["mlp.fc1.weight", "attn.qkv.weight", "weight"])
@pytest.mark.parametrize("bits", ["w8a8", "w3a3"])
def test_constant_activations(dead: str, bits: str) -> None:
    """Layers behind weights of zero read the same row always, from which no correction can be fitted."""
    broken = copy.deepcopy(model("ours"))
    for name, parameter in broken.named_parameters():
        if name.endswith(dead) and parameter.ndim > 1:
            parameter.data.zero_()
    x = images("ours", 9)
    assert_usable(calibrate(trace(broken, (x[:2],)), samples(x), named_recipe("auto", bits)), x)


def test_a_layer_that_is_used_twice() -> None:
    """It is not corrected for the inputs of one of its uses: both read the weights and the bias of the model."""
    layer = spread(nn.Linear(8, 8))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    graph = trace(Formula(lambda x, a: a(functional.gelu(a(x))), layer), (x,))
    result = calibrate(graph, samples(x), named_recipe("auto", "w8a4"))
    (name,) = (name for name, tensor in graph.constants.items() if tensor.ndim == 1)
    assert torch.equal(result.graph.constants[name], layer.bias)
    assert_usable(result, x)


def test_layers_of_different_kernels_may_read_one_site() -> None:
    """And one value in several views."""
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Linear(108, 4), nn.Conv2d(3, 3, 1)

    def formula(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, d: nn.Module) -> Tensor:
        x = d(x)
        return (a(x) + b(x)).flatten(2).mean(-1) + c(x.flatten(1))

    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    graph = trace(spread(Formula(formula, *layers)), (x,))
    for method in ("auto", "adalog"):
        assert_usable(calibrate(graph, samples(x), named_recipe(method, "w8a8")), x)


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


def interrupt_after(operations: int) -> Callable[[str, int, int], None]:
    """Return a progress function that stops calibration once it is done with some operations."""

    def progress(stage: str, done: int, total: int) -> None:
        assert done <= total
        if stage == "calibrate" and done == operations:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("killed_after", [2, 7, 20, 40])
@pytest.mark.parametrize("chosen", [recipe(search="mse"), named_recipe("auto", "w4a4")], ids=["mse", "auto"])
def test_resume_gives_the_same_result(chosen: Recipe, killed_after: int, tmp_path: Path) -> None:
    """A run that was killed anywhere, and goes on from its store, ends with the bytes of an unbroken run."""
    x, store = samples(images("ours", 19)), ProgressStore(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), x, chosen, store=store, progress=interrupt_after(killed_after))
    assert 1 <= len(list(tmp_path.glob("operation-*"))) <= killed_after
    resumed = calibrate(traced("ours"), x, chosen, store=store)
    assert calibrated_to_bytes(resumed) == calibrated_to_bytes(calibrate(traced("ours"), x, chosen))


def test_a_finished_run_decides_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeated, it reads every decision from the store."""
    x, store, chosen = samples(images("ours", 9)), ProgressStore(tmp_path, "key"), named_recipe("auto", "w8a8")
    first = calibrate(traced("ours"), x, chosen, store=store)
    decided = {entry.site.edges[0][0] for entry in first.sites}
    assert len(decided) <= len(list(tmp_path.glob("operation-*"))) <= len(traced("ours").operations)
    monkeypatch.delattr("calibration.progress.ProgressStore.save")
    monkeypatch.delattr("calibration.decisions.Decider._decide_format")
    monkeypatch.delattr("calibration.decisions.Decider._decide_layer")
    assert calibrated_to_bytes(calibrate(traced("ours"), x, chosen, store=store)) == calibrated_to_bytes(first)


def test_other_images_than_those_of_the_interrupted_run_are_refused(tmp_path: Path) -> None:
    """Going on with other images, fewer or more would mix two data sets."""
    x, store = images("ours", 16), ProgressStore(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), samples(x), recipe(), store=store, progress=interrupt_after(3))
    for other in (x.flip(0), x[:5], torch.cat([x, x[:1]])):
        with pytest.raises(DataError, match="the images differ from those of the interrupted run"):
            calibrate(traced("ours"), samples(other), recipe(), store=store)


def test_another_model_or_recipe_than_the_interrupted_runs_is_refused(tmp_path: Path) -> None:
    """Decisions of one recipe are worth nothing in another."""
    x = samples(images("ours", 4))
    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), x, recipe(), store=ProgressStore(tmp_path, "key"), progress=interrupt_after(3))
    with pytest.raises(ArtifactError, match="the interrupted run was made with another model or recipe"):
        calibrate(traced("ours"), x, recipe(), store=ProgressStore(tmp_path, "another key"))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"key": "key"}', b"3", b"\xff\xfe"])
def test_a_damaged_list_of_images_is_refused(data: bytes, tmp_path: Path) -> None:
    store = ProgressStore(tmp_path, "key")
    (tmp_path / "images.json").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"images\.json of the interrupted run is damaged: .*; start without"):
        calibrate(traced("ours"), samples(images("ours", 4)), recipe(), store=store)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "another operation's"])
def test_a_damaged_decision_is_refused(damage: str, tmp_path: Path) -> None:
    """The file is named; nothing is taken from it."""
    x, store = samples(images("ours", 4)), ProgressStore(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), x, recipe(), store=store, progress=interrupt_after(6))
    first, second = sorted(tmp_path.glob("operation-*"))[:2]
    data = first.read_bytes()
    changed = {"empty": b"", "cut": data[: len(data) // 2], "noise": b"\x55" * len(data)}
    first.write_bytes(changed.get(damage, second.read_bytes()))
    with pytest.raises(ArtifactError, match=rf"{first.name} of the interrupted run is damaged: .*start without resume"):
        calibrate(traced("ours"), x, recipe(), store=store)


def test_a_file_that_was_being_written_is_written_again(tmp_path: Path) -> None:
    """A run killed in the middle of a file leaves it under another name."""
    x, store = samples(images("ours", 4)), ProgressStore(tmp_path, "key")
    with pytest.raises(KeyboardInterrupt):
        calibrate(traced("ours"), x, recipe(), store=store, progress=interrupt_after(6))
    last = max(tmp_path.glob("operation-*"))
    last.with_name(last.name + ".tmp").write_bytes(last.read_bytes()[:100])
    last.unlink()
    resumed = calibrate(traced("ours"), x, recipe(), store=store)
    assert calibrated_to_bytes(resumed) == calibrated_to_bytes(calibrate(traced("ours"), x, recipe()))
    assert not list(tmp_path.glob("*.tmp"))


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


@pytest.mark.parametrize("method", ["mse", "auto"])
def test_an_image_that_overflows_inside_the_network_is_told(method: str) -> None:
    """Long after the images are no longer held: the site and the micro-batch."""
    x = images("ours", 19)
    x[17] *= 1e38
    message = r"NaN or infinity at (the squares of )?site \S+ while calibrating images 16 to 18; check the preproc"
    with pytest.raises(ModelError, match=message):
        calibrate(traced("ours"), samples(x), named_recipe(method, "w8a8"))


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
