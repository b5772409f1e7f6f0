"""What stands in for torch's float layers, as far as a CPU can run it, and what is said where torch has no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_comparison.engines import SkipEngineError
from cpu_comparison.networks import build_network, make_images
from cpu_comparison.similarity import cosine
from gpu_comparison.int8_linear import Int8Linear, with_int8_linears
from gpu_comparison.peers import PEERS
from torch import nn


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 32, True), (49, 10, False)])
@pytest.mark.parametrize("shape", [(1,), (17,), (2, 3), (2, 5, 7)])
def test_an_int8_layer_multiplies_codes(inputs: int, outputs: int, bias: bool, shape: tuple[int, ...]) -> None:
    """Extents that the product does not take are filled up, and what fills them is gone."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    x = torch.rand(*shape, inputs) * 2 - 1
    scales = linear.weight.detach().abs().amax(1) / 127
    codes = torch.round(linear.weight.detach() / scales[:, None])
    expected = torch.round(x * 127) @ codes.T * (scales / 127)
    expected = expected + linear.bias.detach() if bias else expected
    found = Int8Linear(linear, 1.0, torch.float32)(x)
    assert found.shape == (*shape, outputs)
    # Both round the same sums of integers, once for each of three operations in float32.
    torch.testing.assert_close(found, expected)


def test_activations_beyond_the_scale_are_clipped() -> None:
    linear = nn.Linear(8, 8, bias=False)
    nn.init.eye_(linear.weight)
    layer = Int8Linear(linear, 0.5, torch.float32)
    torch.testing.assert_close(layer(torch.full((1, 8), 9.0)), torch.full((1, 8), 0.5))


def test_a_network_with_int8_layers_is_still_the_network() -> None:
    module, images = build_network("tiny"), make_images("tiny", 4, 2)
    made = with_int8_linears(module, torch.from_numpy(images), torch.float32)
    kinds = [type(part) for part in made.modules()]
    assert kinds.count(Int8Linear) == sum(isinstance(part, nn.Linear) for part in module.modules())
    assert nn.Linear not in kinds
    with torch.inference_mode():
        expected, found = (run(torch.from_numpy(images)).numpy() for run in (module, made))
    assert not np.array_equal(found, expected)
    assert cosine(found, expected) >= PEERS["torch-int8"].least_cosine


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has CUDA here")
@pytest.mark.parametrize("name", PEERS)
def test_peers_are_skipped_where_torch_has_no_cuda(name: str) -> None:
    images = make_images("tiny", 1, 2)
    with pytest.raises(SkipEngineError, match="torch has no CUDA here"):
        PEERS[name].load(build_network("tiny"), images, images)


def test_titles_fit_a_legend() -> None:
    assert len({peer.title for peer in PEERS.values()}) == len(PEERS)
    assert max(len(peer.title) for peer in PEERS.values()) <= 30
