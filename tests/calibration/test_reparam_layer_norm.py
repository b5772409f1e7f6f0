"""Rescaling the channels of a LayerNorm leaves the float output and the codes as they were."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.models import Formula, images, spread, traced
from support.rewrites import moved, replaced, value_of
from torch import Tensor, nn
from torch.nn import functional

from calibration.graph import Graph
from calibration.reparam.layer_norm_scale import (
    ChannelFormat,
    NormGroup,
    find_norm_groups,
    fit_channels,
    mean_target,
    median_target,
    rescale_channels,
    rescale_norm,
)
from calibration.trace import trace
from quantizers.errors import DataError, UsageError

#: Fused projection; separate ones; shifted windows, patch merging and a mean before the head.
FAMILIES = ("ours", "transformers", "swin")


def formula(function: Callable[..., object], *layers: nn.Module) -> Graph:
    """Trace a formula, whose layers get random weights, on six tokens of width 8."""
    return trace(spread(Formula(function, *layers)), (torch.ones(2, 6, 8),))


def rows_of(graph: Graph, group: NormGroup, x: Tensor) -> Tensor:
    values = value_of(graph, group.norm, x)
    return values.reshape(-1, values.shape[-1])


def codes(rows: Tensor, fmt: ChannelFormat, bits: int) -> Tensor:
    rounded = (rows.to(torch.float64) / fmt.scale).round() + fmt.zero_point
    return rounded.clamp(0, 2**bits - 1)


def of_tensor(target: tuple[float, int]) -> ChannelFormat:
    return ChannelFormat(torch.tensor([target[0]], dtype=torch.float64), torch.tensor([target[1]]))


# Structure ------------------------------------------------------------------------------------------


def test_groups_of_a_fused_projection() -> None:
    """norm1 feeds the fused qkv, norm2 the first linear of the MLP, and the last norm the head, behind a slice."""
    graph = traced("ours")
    modules = {operation.name: operation.module for operation in graph.operations}
    found = [(modules[group.norm], [modules[name] for name in group.linears]) for group in find_norm_groups(graph)]
    assert found == [
        ("blocks.0.norm1", ["blocks.0.attn.qkv"]),
        ("blocks.0.norm2", ["blocks.0.mlp.fc1"]),
        ("blocks.1.norm1", ["blocks.1.attn.qkv"]),
        ("blocks.1.norm2", ["blocks.1.mlp.fc1"]),
        ("norm", ["head"]),
    ]
    assert all(group.refusal is None for group in find_norm_groups(graph))


def test_groups_of_separate_projections() -> None:
    """Queries, keys and values belong to one group, so they all take back the same change."""
    groups = find_norm_groups(traced("transformers"))
    assert [len(group.linears) for group in groups] == [3, 1, 3, 1, 1]
    assert all(group.refusal is None for group in groups)


def test_groups_of_shifted_windows() -> None:
    """Cyclic shifts and patch merging keep channels whole; a skip, and the mean before the head, do not."""
    graph = traced("swin")
    modules = {operation.name: operation.module for operation in graph.operations}
    groups = {modules[group.norm]: group for group in find_norm_groups(graph)}
    refused = {module: group.refusal for module, group in groups.items() if group.refusal is not None}
    assert set(refused) == {"patch_embed.norm", "norm"}
    assert refused["patch_embed.norm"].startswith("layer_norm layer_norm_1 of layers.0.blocks.0.norm1 reads it, and ")
    assert refused["norm"].startswith("mean mean_mean_1 of ")
    shifted = groups["layers.0.blocks.1.norm1"].linears
    assert [modules[name] for name in shifted] == ["layers.0.blocks.1.attn.qkv"]
    assert [modules[name] for name in groups["layers.1.downsample.norm"].linears] == ["layers.1.downsample.reduction"]


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda y, a: y + a(y), "add add.* reads it, and only a linear can take back a change of channels"),
        (lambda y, a: (y, a(y)), "graph output 'output_0' reads it"),
        (lambda y, a: a(y) + functional.gelu(y), "unary gelu.* reads it"),
        (lambda y, a: a(y.mean(1)), "mean mean.* reads it"),
        (lambda y, a: functional.linear(y[..., 2:6], a.weight[:, 2:6]), "linear linear reads a part of its channels"),
        (lambda y, a: a(y.reshape(-1, 6, 2, 4).transpose(2, 3).reshape(-1, 6, 8)), "in another order"),
        (lambda y, a: a(y * 2), "scale mul.* reads it"),
        (lambda y, a: a(functional.pad(y, (0, 0, 0, 2))), "concat pad.* reads it"),
        (lambda y, a: y @ a(y).transpose(1, 2), "matmul matmul reads it"),
        (lambda y, a: a(functional.gelu(a(y))), "constant layers.1.weight of linear .* is shared with linear linear_1"),
    ],
)
def test_refusals(read: Callable[[Tensor, nn.Module], object], message: str) -> None:
    """What a linear cannot take back is refused with the reader, and rescaling such a group raises with the reason."""
    graph = formula(lambda x, norm, layer: read(norm(x), layer), nn.LayerNorm(8), nn.Linear(8, 8))
    (group,) = find_norm_groups(graph)
    assert group.refusal is not None
    with pytest.raises(UsageError, match="layer_norm layer_norm cannot be rescaled: .*" + message):
        rescale_channels(graph, group, torch.ones(8), torch.zeros(8))


def test_a_gamma_of_two_norms_is_refused() -> None:
    """One LayerNorm called twice: what one reader takes back, the other would not."""
    graph = formula(lambda x, n, a, b: a(n(x)) + b(n(2 * x)), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
    first, second = find_norm_groups(graph)
    assert first.refusal == (
        "constant layers.0.weight of layer_norm layer_norm of layers.0 "
        "is shared with layer_norm layer_norm_1 of layers.0"
    )
    assert second.refusal is not None


def test_a_convolution_is_refused() -> None:
    """A convolution could take back a ratio, but pads with zeros, which a shift would have to become."""

    def convolve(x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        return conv(norm(x).transpose(1, 2).reshape(-1, 8, 2, 3))

    (group,) = find_norm_groups(formula(convolve, nn.LayerNorm(8), nn.Conv2d(8, 4, 1)))
    assert str(group.refusal).startswith("conv2d conv2d of layers.1 reads it, and only a linear")


def test_a_concatenation_with_something_else_is_refused() -> None:
    """Behind it the linear would take back a change that the other part never had."""
    graph = formula(lambda x, n, a: a(torch.cat([n(x), x], 1)), nn.LayerNorm(8), nn.Linear(8, 8))
    assert str(find_norm_groups(graph)[0].refusal).startswith("concat cat reads it")


def test_heads_taken_apart_and_joined_again_are_whole() -> None:
    """Channels are followed by number: split into heads, moved and put back, they are all there in order."""

    def split(x: Tensor, norm: nn.Module, layer: nn.Module) -> Tensor:
        heads = norm(x).reshape(-1, 6, 2, 4).transpose(1, 2)
        return layer(heads.transpose(1, 2).reshape(-1, 6, 8))

    graph = formula(split, nn.LayerNorm(8), nn.Linear(8, 8))
    assert find_norm_groups(graph) == (NormGroup("layer_norm", ("linear",), None),)


# The law of the float output ------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_float_output_is_unchanged(name: str) -> None:
    """Ratios over four decades and shifts in every group of the model at once; only constants of groups change."""
    graph, generator = traced(name), torch.Generator().manual_seed(3)
    after, rewritten = graph, set()
    for group in find_norm_groups(graph):
        if group.refusal is None:
            channels = graph.shapes()[group.norm][-1]
            ratio = 10 ** (4 * torch.rand(channels, generator=generator) - 2)
            changed = rescale_channels(after, group, ratio, torch.randn(channels, generator=generator))
            assert len(changed) == 2 + 2 * len(group.linears)
            rewritten |= set(changed)
            after = replaced(after, changed)
    assert len(rewritten) >= 20
    assert moved(graph, after, images(name, 4)) < 1e-5


def test_the_norm_gives_what_was_asked() -> None:
    """X' = (X + shift) / ratio."""
    graph, x = traced("ours"), images("ours", 2)
    group = find_norm_groups(graph)[1]
    ratio, shift = torch.linspace(0.1, 10, 24), torch.linspace(-3, 3, 24)
    after = replaced(graph, rescale_channels(graph, group, ratio, shift))
    expected = (value_of(graph, group.norm, x) + shift) / ratio
    torch.testing.assert_close(value_of(after, group.norm, x), expected, rtol=1e-5, atol=1e-5)


def test_separate_projections_take_the_same_ratios() -> None:
    """The weights of queries, keys and values are each multiplied with the ratios, column by column."""
    graph = traced("transformers")
    group = find_norm_groups(graph)[0]
    ratio = torch.linspace(0.5, 2, 24)
    changed = rescale_channels(graph, group, ratio, torch.zeros(24))
    producers = graph.producers()
    for linear in group.linears:
        weight = producers[linear].inputs[1]
        torch.testing.assert_close(changed[weight], graph.constants[weight] * ratio)


def test_nothing_is_mutated() -> None:
    graph = traced("ours")
    before = {name: tensor.clone() for name, tensor in graph.constants.items()}
    rescale_channels(graph, find_norm_groups(graph)[0], torch.full((24,), 3.0), torch.ones(24))
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.constants.items())


@pytest.mark.parametrize(
    ("ratio", "shift", "message"),
    [
        (torch.ones(23), torch.zeros(24), r"ratio: expected one number for each of 24 channels, got shape \(23,\)"),
        (torch.ones(24), torch.zeros(1), "shift: expected one number for each of 24 channels"),
        (torch.zeros(24), torch.zeros(24), "ratio: expected positive numbers"),
        (torch.ones(24), torch.full((24,), float("nan")), "shift: a number is not finite"),
        (torch.full((24,), 1e-300, dtype=torch.float64), torch.zeros(24), "out of float32's range"),
    ],
)
def test_wrong_vectors_are_refused(ratio: Tensor, shift: Tensor, message: str) -> None:
    graph = traced("ours")
    with pytest.raises(UsageError, match=message):
        rescale_channels(graph, find_norm_groups(graph)[0], ratio, shift)


# The law of the codes -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("target", [mean_target, median_target])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_codes_are_unchanged(name: str, target: Callable[[ChannelFormat], tuple[float, int]], bits: int) -> None:
    """One format of the tensor gives, after, the codes that each channel's own format gave before."""
    graph, x, compared = traced(name), images(name, 8), 0
    for group in find_norm_groups(graph):
        if group.refusal is not None:
            continue
        rows = rows_of(graph, group, x)
        fmt = fit_channels(rows, bits)
        after = replaced(graph, rescale_norm(graph, group, fmt, target(fmt)))
        assert moved(graph, after, x) < 1e-5
        away_from_ties = away(rows, fmt)
        before, now = codes(rows, fmt, bits), codes(rows_of(after, group, x), of_tensor(target(fmt)), bits)
        assert torch.equal(before[away_from_ties], now[away_from_ties])
        assert away_from_ties.double().mean() > 0.99
        compared += 1
    assert compared >= 5


def away(rows: Tensor, fmt: ChannelFormat) -> Tensor:
    """Return where x / s is further than 1e-4 from a tie."""
    steps = rows.to(torch.float64) / fmt.scale
    return (steps - steps.floor() - 0.5).abs() > 1e-4


def difficult() -> tuple[Graph, Tensor]:
    """Return a norm with a dead channel, two one-sided ones and an extreme outlier, and images for it."""
    norm = nn.LayerNorm(8)
    module = spread(Formula(lambda x, n, a: a(n(x)), norm, nn.Linear(8, 5)))
    norm.weight.data[0], norm.bias.data[0] = 0.0, 0.7
    norm.weight.data[1], norm.bias.data[1] = 1.0, 9.0
    norm.weight.data[2], norm.bias.data[2] = 1.0, -9.0
    norm.weight.data[3] = 1e4
    norm.weight.data[4] = 1e-5
    return trace(module, (torch.ones(2, 6, 8),)), torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("target", [mean_target, median_target])
def test_difficult_channels(target: Callable[[ChannelFormat], tuple[float, int]]) -> None:
    """Dead, one-sided, nearly dead and extreme channels: finite formats, the float output and the codes stay."""
    graph, x = difficult()
    (group,) = find_norm_groups(graph)
    rows = rows_of(graph, group, x)
    fmt = fit_channels(rows, 4)
    after = replaced(graph, rescale_norm(graph, group, fmt, target(fmt)))
    assert moved(graph, after, x) < 1e-5
    apart = away(rows, fmt)
    before, now = codes(rows, fmt, 4), codes(rows_of(after, group, x), of_tensor(target(fmt)), 4)
    assert torch.equal(before[apart], now[apart])
    # Dead: one code, in the middle. One-sided: zero lies outside of the codes.
    assert before[:, 0].unique().tolist() in ([7.0], [8.0])
    assert fmt.zero_point[1] < 0
    assert fmt.zero_point[2] > 15
    live = fmt.scale[1:].median()
    assert fmt.scale[3] <= 64 * live * (1 + 1e-12)
    assert fmt.scale[4] >= live / 64 * (1 - 1e-12)
    # The nearly dead channel keeps its values inside the codes.
    assert 0 < before[:, 4].min() <= before[:, 4].max() < 15


# Formats --------------------------------------------------------------------------------------------


def reference(channel: Tensor, bits: int) -> tuple[float, int]:
    """Fit one channel as the formulas are written."""
    best, found = float("inf"), (0.0, 0)
    for share in (0.999, 0.9999, 0.99999):
        low, high = (torch.quantile(channel, q) for q in (1 - share, share))
        scale = (high - low) / (2**bits - 1)
        zero_point = (-low / scale).round()
        quantized = ((channel / scale).round() + zero_point).clamp(0, 2**bits - 1)
        error = float(((quantized - zero_point) * scale - channel).square().mean())
        if error < best:
            best, found = error, (float(scale), int(zero_point))
    return found


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_fit_is_the_search_of_the_paper(bits: int) -> None:
    """Against the formulas written out for one channel, with outliers that make the three quantiles differ."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(3000, 12, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 4, 12) + 1
    rows[:4] *= 9
    fmt = fit_channels(rows, bits)
    for channel in range(12):
        scale, zero_point = reference(rows[:, channel], bits)
        assert float(fmt.scale[channel]) == pytest.approx(scale, rel=1e-12)
        assert int(fmt.zero_point[channel]) == zero_point


def test_the_fit_does_not_depend_on_the_channels_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are fitted a few at a time; how many is not seen in the result."""
    rows = torch.randn(100, 9, generator=torch.Generator().manual_seed(6))
    whole = fit_channels(rows, 4)
    monkeypatch.setattr("calibration.reparam.layer_norm_scale._CHUNK", 250)
    parts = fit_channels(rows, 4)
    assert torch.equal(whole.scale, parts.scale)
    assert torch.equal(whole.zero_point, parts.zero_point)


def test_dead_channels_take_the_median_of_the_live_ones() -> None:
    """Constants, at zero and far from it, are coded in the middle and come back to half a step."""
    rows = torch.randn(500, 7, generator=torch.Generator().manual_seed(7))
    rows[:, 2], rows[:, 5] = 0.0, 33.3
    fmt = fit_channels(rows, 4)
    live = fmt.scale[[0, 1, 3, 4, 6]]
    assert fmt.scale[2] == fmt.scale[5] == live.median()
    values = (codes(rows, fmt, 4) - fmt.zero_point) * fmt.scale
    assert bool(((values - rows).abs()[:, [2, 5]] <= fmt.scale[2] / 2 * (1 + 1e-6)).all())
    assert set(codes(rows, fmt, 4)[:, [2, 5]].unique().tolist()) <= {7.0, 8.0}


def test_channels_that_are_all_dead_have_scale_one() -> None:
    fmt = fit_channels(torch.full((3, 4), 2.0), 8)
    assert fmt.scale.tolist() == [1.0] * 4
    assert codes(torch.full((3, 4), 2.0), fmt, 8).unique().tolist() in ([127.0], [128.0])


def test_a_range_that_is_too_wide_is_centred_on_the_median() -> None:
    """Where the limit cuts a channel, its codes stay with the many values, not with the outliers."""
    rows = torch.randn(1000, 5, generator=torch.Generator().manual_seed(8))
    rows[:20, 0] = 1e5
    fmt = fit_channels(rows, 4)
    assert float(fmt.scale[0]) == pytest.approx(64 * float(fmt.scale[1:].sort().values[2]), rel=0.2)
    kept = codes(rows[20:, :1], ChannelFormat(fmt.scale[:1], fmt.zero_point[:1]), 4)
    assert 0 < kept.min() <= kept.max() < 15


def test_targets() -> None:
    """The mean's zero point is rounded half to even; the median of an even count is the lower of the two."""
    fmt = ChannelFormat(torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([1, 2, 3, 4]))
    assert mean_target(fmt) == (4.0, 2)
    assert median_target(fmt) == (2.0, 2)


def test_an_outlier_moves_the_mean_and_not_the_median() -> None:
    """MOSF's point: one channel with a scale 60 times the others' moves the mean, and hardly the median."""
    rows = torch.randn(1000, 33, generator=torch.Generator().manual_seed(9))
    wide = rows.clone()
    wide[:, 0] *= 60
    plain, outlier = fit_channels(rows, 4), fit_channels(wide, 4)
    assert abs(median_target(outlier)[0] / median_target(plain)[0] - 1) < 0.02
    assert mean_target(outlier)[0] / mean_target(plain)[0] > 2
    # The ratio of the channels that are no outliers stays near one with the median.
    ratios = np.asarray(outlier.scale[1:] / median_target(outlier)[0])
    assert np.abs(ratios - 1).max() < 0.3


@pytest.mark.parametrize(
    ("rows", "bits", "error", "message"),
    [
        (torch.ones(4), 4, UsageError, r"expected rows of shape \(tokens, channels\), neither of them 0, got \(4,\)"),
        (torch.ones(0, 4), 4, UsageError, "neither of them 0"),
        (torch.ones(4, 4), 1, UsageError, "bits is 1, expected 2 to 16"),
        (torch.tensor([[0.0, float("inf")]]), 4, DataError, "channel 1 holds a value that is not finite"),
    ],
)
def test_wrong_rows_are_refused(rows: Tensor, bits: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_channels(rows, bits)


def test_a_target_scale_that_is_not_positive_is_refused() -> None:
    graph, x = difficult()
    (group,) = find_norm_groups(graph)
    with pytest.raises(UsageError, match="the target scale is 0"):
        rescale_norm(graph, group, fit_channels(rows_of(graph, group, x), 4), (0.0, 0))
