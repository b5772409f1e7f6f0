"""Keys and values may be moved by a vector a head: softmax ignores the one, the next bias takes back the other."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support.models import Formula, images, spread, traced
from support.rewrites import moved, replaced, value_of
from torch import Tensor, nn
from torch.nn import functional

from calibration.graph import Graph
from calibration.reparam.centring import (
    KeyGroup,
    ValueGroup,
    centre_keys,
    centre_values,
    find_key_groups,
    find_value_groups,
)
from calibration.reparam.layer_norm_scale import find_norm_groups, rescale_channels
from calibration.trace import trace
from quantizers.errors import UsageError

#: Fused projection; distillation token; separate projections; shifted windows with position biases and masks.
FAMILIES = ("ours", "deit", "transformers", "swin")


def heads(y: Tensor) -> Tensor:
    """Split six tokens of width 8 into two heads of width 4."""
    return y.reshape(-1, 6, 2, 4).transpose(1, 2)


def joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(-1, 6, 8)


def formula(function: Callable[..., object], *layers: nn.Module) -> Graph:
    """Trace a formula on six tokens of width 8; without layers of its own it gets four linears of width 8."""
    return trace(spread(Formula(function, *(layers or [nn.Linear(8, 8) for _ in range(4)]))), (torch.ones(2, 6, 8),))


def tokens(count: int = 4) -> Tensor:
    return torch.randn(count, 6, 8, generator=torch.Generator().manual_seed(2))


def centre_of(graph: Graph, group: KeyGroup | ValueGroup, seed: int = 0) -> Tensor:
    width = graph.shapes()[group.linear][-1]
    return 3 * torch.randn(width, generator=torch.Generator().manual_seed(seed))


# Structure ------------------------------------------------------------------------------------------


def test_groups_of_a_fused_projection() -> None:
    """Keys are the second third of the projection's channels, values the last, both by head."""
    graph = traced("ours")
    modules = {operation.name: operation.module for operation in graph.operations}
    keys, values = find_key_groups(graph), find_value_groups(graph)
    assert [modules[group.linear] for group in keys] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert [modules[group.linear] for group in values] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert torch.equal(keys[0].channels, torch.arange(24, 48).reshape(3, 8))
    assert torch.equal(values[0].channels, torch.arange(48, 72).reshape(3, 8))
    (reader,) = values[1].readers
    assert (modules[reader.linear], reader.factor) == ("blocks.1.attn.proj", 1.0)
    assert torch.equal(reader.columns, torch.arange(48, 72))


def test_groups_of_separate_projections() -> None:
    graph = traced("transformers")
    modules = {operation.name: operation.module for operation in graph.operations}
    (keys, _), (values, _) = find_key_groups(graph), find_value_groups(graph)
    assert modules[keys.linear].endswith("layers.0.attention.k_proj")
    assert modules[values.linear].endswith("layers.0.attention.v_proj")
    assert torch.equal(keys.channels, torch.arange(24).reshape(3, 8))
    assert torch.equal(values.channels, torch.arange(24).reshape(3, 8))


def test_groups_of_windows() -> None:
    """The channels of a head are the same in each window; position biases and masks are sums that do no harm."""
    keys, values = find_key_groups(traced("swin")), find_value_groups(traced("swin"))
    assert [tuple(group.channels.shape) for group in keys] == [(4, 2, 8), (4, 2, 8), (4, 8), (4, 8)]
    assert torch.equal(keys[1].channels, torch.arange(16, 32).reshape(2, 8).expand(4, 2, 8))
    assert torch.equal(values[1].channels, torch.arange(32, 48).reshape(2, 8).expand(4, 2, 8))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_group_of_a_plain_model_is_refused(name: str) -> None:
    keys, values = find_key_groups(traced(name)), find_value_groups(traced(name))
    assert len(keys) == len(values) > 0
    assert all(group.refusal is None for group in (*keys, *values))


def test_a_model_without_attention_has_no_groups() -> None:
    graph = formula(lambda x, a, *_: a(x).softmax(-1))
    assert find_key_groups(graph) == find_value_groups(graph) == ()


# The law --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_float_output_is_unchanged(name: str) -> None:
    """All keys and values of a model, moved by three times what they are, one group after the other."""
    graph = after = traced(name)
    for seed, group in enumerate(find_key_groups(graph)):
        after = replaced(after, centre_keys(after, group, centre_of(graph, group, seed)))
    for seed, group in enumerate(find_value_groups(graph)):
        after = replaced(after, centre_values(after, group, centre_of(graph, group, 100 + seed)))
    assert moved(graph, after, images(name, 4)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_keys_and_values_move_by_what_was_asked(name: str) -> None:
    """Everything else that the projection gives stays: the queries, and each time the other group."""
    graph, x = traced(name), images(name, 2)
    key, value = find_key_groups(graph)[1], find_value_groups(graph)[1]
    for group, after in (
        (key, replaced(graph, centre_keys(graph, key, centre_of(graph, key)))),
        (value, replaced(graph, centre_values(graph, value, centre_of(graph, value)))),
    ):
        mine = torch.zeros(graph.shapes()[group.linear][-1], dtype=torch.bool)
        mine[group.channels.unique()] = True
        expected = value_of(graph, group.linear, x) - centre_of(graph, group) * mine
        torch.testing.assert_close(value_of(after, group.linear, x), expected, rtol=1e-5, atol=1e-5)


def test_the_middle_of_the_range_makes_it_symmetric() -> None:
    """What the freedom is for: with the middle as centre, a channel reaches as far down as up."""
    graph, x = traced("ours"), images("ours", 8)
    group = find_key_groups(graph)[0]
    values = value_of(graph, group.linear, x).reshape(-1, 72)
    after = replaced(graph, centre_keys(graph, group, (values.amax(0) + values.amin(0)) / 2))
    keys = value_of(after, group.linear, x).reshape(-1, 72)[:, group.channels.flatten()]
    torch.testing.assert_close(keys.amax(0), -keys.amin(0), rtol=1e-4, atol=1e-5)


def test_rewrites_follow_one_another() -> None:
    """Rescaled norms and centred attention share the projection's bias; each starts from the last one's constants."""
    graph = after = traced("ours")
    norm, key, value = find_norm_groups(graph)[0], find_key_groups(graph)[0], find_value_groups(graph)[0]
    after = replaced(after, rescale_channels(after, norm, torch.linspace(0.1, 10, 24), torch.linspace(-1, 1, 24)))
    after = replaced(after, centre_keys(after, key, centre_of(graph, key)))
    after = replaced(after, centre_values(after, value, centre_of(graph, value)))
    assert moved(graph, after, images("ours", 4)) < 1e-5


def scaled(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
    """Scalings on every way, a transposed product of the keys, and a sum with a mask."""
    scores = heads(q(x)) @ (heads(k(x)) * 0.5).transpose(-1, -2) - torch.arange(6.0)
    return out(joined((scores * 0.7).softmax(-1) @ (heads(v(x)) * -0.25)) * 3)


def halved(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
    """Two linears read the product, one only some of its channels."""
    y = joined(functional.scaled_dot_product_attention(heads(q(x)), heads(k(x)), heads(v(x))))
    return out(y) + functional.linear(y[..., 2:6], 2 * out.weight[:, 2:6])


def shared_by_heads(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
    """Both heads have the same keys and values, as with multi-query attention."""
    keys, values = (heads(layer(x))[:, :1] for layer in (k, v))
    keys, values = torch.cat([keys, keys], 1), torch.cat([values, values], 1)
    return out(joined((heads(q(x)) @ keys.transpose(-1, -2)).softmax(-1) @ values))


def sum_of_scores(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
    """Scores are summed with others and with their own multiple; both keep what all of a row has."""
    queries, values = heads(q(x)), heads(v(x))
    scores = queries @ heads(k(x)).transpose(-1, -2)
    return out(joined((scores + 0.5 * scores + queries @ queries.transpose(-1, -2)).softmax(-1) @ values))


@pytest.mark.parametrize("attention", [scaled, halved, shared_by_heads, sum_of_scores])
def test_other_ways_to_write_an_attention(attention: Callable[..., Tensor]) -> None:
    graph = after = formula(attention)
    (key,) = [group for group in find_key_groups(graph) if group.refusal is None]
    (value,) = find_value_groups(graph)
    after = replaced(after, centre_keys(after, key, centre_of(graph, key, 1)))
    after = replaced(after, centre_values(after, value, centre_of(graph, value, 2)))
    assert moved(graph, after, tokens()) < 1e-5
    producers = graph.producers()
    for group in (key, value):
        bias = producers[group.linear].inputs[2]
        changed = (after.constants[bias] != graph.constants[bias]).nonzero().flatten()
        assert torch.equal(changed, group.channels.unique())


def test_scalings_reach_the_readers() -> None:
    (group,) = find_value_groups(formula(scaled))
    assert [reader.factor for reader in group.readers] == [-0.75]
    assert len(find_value_groups(formula(halved))[0].readers) == 2


# Refusals -------------------------------------------------------------------------------------------

_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def _keys_are_values(x: Tensor, q: nn.Module, k: nn.Module, _: nn.Module, out: nn.Module) -> object:
    keys = heads(k(x))
    return out(joined(attend(heads(q(x)), keys, keys)))


def _keys_are_queries(x: Tensor, q: nn.Module, _: nn.Module, v: nn.Module, out: nn.Module) -> object:
    queries = heads(q(x))
    return out(joined(attend(queries, queries, heads(v(x)))))


def _keys_are_given(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    keys = k(x)
    return out(joined(attend(heads(q(x)), heads(keys), heads(v(x))))), keys


def _normed_keys(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    keys = functional.layer_norm(heads(k(x)), (4,))
    return out(joined(attend(heads(q(x)), keys, heads(v(x)))))


def _mixed_keys(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    keys = k(x).reshape(-1, 2, 6, 4)
    return out(joined(attend(heads(q(x)), keys, heads(v(x)))))


def _one_more_key(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    keys, values = (torch.cat([heads(layer(x)), heads(x)[:, :, :1]], 2) for layer in (k, v))
    return out(joined(attend(heads(q(x)), keys, values)))


def _one_linear_twice(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    del k
    return out(joined(attend(heads(q(x)), heads(v(x * x)), heads(v(x)))))


def _given_scores(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    scores = heads(q(x)) @ heads(k(x)).transpose(-1, -2)
    return scores, out(joined(scores.softmax(-1) @ heads(v(x))))


def _gated_scores(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    scores = heads(q(x)) @ heads(k(x)).transpose(-1, -2)
    return out(joined((scores + scores.sigmoid()).softmax(-1) @ heads(v(x))))


def _softmax_over_queries(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    scores = heads(q(x)) @ heads(k(x)).transpose(-1, -2)
    return out(joined(scores.transpose(-1, -2).softmax(-1) @ heads(v(x))))


def _softmax_over_all(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    scores = (heads(q(x)) @ heads(k(x)).transpose(-1, -2)).reshape(-1, 2, 36).softmax(-1)
    return out(joined(scores.reshape(-1, 2, 6, 6) @ heads(v(x))))


def _sink(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    scores = heads(q(x)) @ heads(k(x)).transpose(-1, -2)
    return out(joined(functional.pad(scores, (1, 0)).softmax(-1)[..., 1:] @ heads(v(x)))), scores.softmax(-1)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (_keys_are_values, "matmul matmul_1 reads the same channels of linear .* of layers.1"),
        (_keys_are_queries, "matmul matmul reads the same channels of linear .* of layers.0"),
        (_keys_are_given, "graph output 'output_1' reads the same channels"),
        (_normed_keys, "its keys come from layer_norm layer_norm, and only a linear's bias can move them"),
        (_mixed_keys, "the channels of its keys differ between tokens"),
        (_one_more_key, "its keys come from linear .* of layers.1 and from something else"),
        (_one_linear_twice, "constant layers.2.bias of linear .* of layers.2 is shared with linear"),
        (_given_scores, "graph output 'output_0' reads the scores, and only a softmax ignores"),
        (_gated_scores, "unary sigmoid reads the scores"),
        (_softmax_over_queries, "softmax softmax does not run over the keys"),
        (_softmax_over_all, "softmax softmax does not run over the keys"),
        (_sink, "concat pad.* reads the scores"),
    ],
)
def test_refused_keys(attention: Callable[..., object], message: str) -> None:
    """Where a row of the softmax, or anything else, would see the move, the group is refused with the reader."""
    graph = formula(attention)
    (group,) = find_key_groups(graph)
    with pytest.raises(UsageError, match="the keys of matmul matmul cannot be centred: .*" + message):
        centre_keys(graph, group, torch.zeros(8))


def _values_given(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    values = heads(v(x))
    return out(joined(attend(heads(q(x)), heads(k(x)), values))), values.mean(2)


def _mixed_values(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    return out(joined(attend(heads(q(x)), heads(k(x)), v(x).reshape(-1, 2, 6, 4))))


def _values_with_skip(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    return out(joined(attend(heads(q(x)), heads(k(x)), heads(v(x)))) + x)


def _normed_product(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    return out(functional.layer_norm(joined(attend(heads(q(x)), heads(k(x)), heads(v(x)))), (8,)))


def _given_product(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    y = joined(attend(heads(q(x)), heads(k(x)), heads(v(x))))
    return y, out(y)


def _heads_not_moved_back(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    return out(attend(heads(q(x)), heads(k(x)), heads(v(x))).reshape(-1, 6, 8))


def _scaled_probabilities(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    return out(joined((heads(q(x)) @ heads(k(x)).transpose(-1, -2)).softmax(-1) * 0.5 @ heads(v(x))))


def _cut_probabilities(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    scores = heads(q(x)) @ heads(k(x)).transpose(-1, -2)
    return out(joined(scores.softmax(-1)[..., 1:] @ heads(v(x))[:, :, 1:]))


def _shared_reader(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> object:
    return out(functional.gelu(out(joined(attend(heads(q(x)), heads(k(x)), heads(v(x)))))))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (_values_given, "mean mean.* reads the same channels of linear .* of layers.2"),
        (_keys_are_values, "matmul matmul reads the same channels"),
        (_mixed_values, "the channels of its values differ between tokens"),
        (_one_more_key, "its values come from linear .* of layers.2 and from something else"),
        (_values_with_skip, "add add.* reads the product, and only a linear's bias can take the shift back"),
        (_normed_product, "layer_norm layer_norm.* reads the product"),
        (_given_product, "graph output 'output_0' reads the product"),
        (_heads_not_moved_back, "linear .* of layers.3 reads other channels of the product for other tokens"),
        (_scaled_probabilities, "its left side is not softmax softmax itself"),
        (_cut_probabilities, "its left side is not softmax softmax itself"),
        (_shared_reader, "constant layers.3.bias of linear .* of layers.3 is shared with linear"),
    ],
)
def test_refused_values(attention: Callable[..., object], message: str) -> None:
    """Where rows may not sum to 1, or no bias can take the move back, the group is refused with the reader."""
    graph = formula(attention)
    (group,) = find_value_groups(graph)
    with pytest.raises(UsageError, match="the values of matmul matmul_1 cannot be centred: .*" + message):
        centre_values(graph, group, torch.zeros(8))


@pytest.mark.parametrize(
    ("centre", "message"),
    [
        (torch.zeros(24), r"centre: expected one number for each of 72 channels, got shape \(24,\)"),
        (torch.full((72,), float("inf")), "centre: a number is not finite"),
    ],
)
def test_wrong_centres_are_refused(centre: Tensor, message: str) -> None:
    graph = traced("ours")
    for call in (
        functools.partial(centre_keys, graph, find_key_groups(graph)[0]),
        functools.partial(centre_values, graph, find_value_groups(graph)[0]),
    ):
        with pytest.raises(UsageError, match=message):
            call(centre)
