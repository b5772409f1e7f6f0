"""Laws of the vote of nearest neighbours, and features on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import run
from torch import nn

from ptq.nearest_neighbours import FeatureBank, make_bank, nearest_neighbours
from quantizers.errors import DataError


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12))
def test_it_is_a_vote(seed: int, size: int, neighbours: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (torch.randn(count, 5, generator=generator) for count in (size, 7))
    labels = torch.randint(0, 4, (size,), generator=generator)
    found = nearest_neighbours(bank, labels, queries, neighbours)
    for query, answer in zip(queries, found.tolist(), strict=True):
        similar = torch.nn.functional.cosine_similarity(query[None], bank, dim=1)
        voters = labels[similar.argsort(descending=True)[:neighbours]]
        votes = torch.bincount(voters, minlength=4)
        # The lower class in a tie.
        assert answer == int(torch.nonzero(votes == votes.max())[0])


def test_only_directions_count() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    queries = torch.tensor([[100.0, 1.0], [1e-3, 1e-2]])
    assert nearest_neighbours(bank, labels, queries, 1).tolist() == [0, 1]


def test_a_bank_needs_labelled_features() -> None:
    x = torch.randn(4, 3)
    bank = make_bank(lambda images: 2 * images, [(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([5, 1]))])
    assert isinstance(bank, FeatureBank)
    assert torch.equal(bank.features, 2 * x)
    assert bank.num_classes == 6
    with pytest.raises(DataError, match="need labels"):
        make_bank(lambda images: images, [(x, None)])
    with pytest.raises(DataError, match=r"one feature for each image, \(batch, K\); the network gives \(4, 3, 1\)"):
        make_bank(lambda images: images[..., None], [(x, torch.zeros(4))])
    with pytest.raises(DataError, match="at least one labelled image"):
        make_bank(lambda images: images, [])
    with pytest.raises(DataError, match="must not be negative"):
        make_bank(lambda images: images, [(x, torch.tensor([0, 1, -1, 2]))])


class _Pixels(nn.Module):
    """Features that are the image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def pixels() -> tuple[nn.Module, torch.Tensor, None]:
    return _Pixels(), torch.zeros(1, 1, 2, 2), None


def test_features_are_evaluated_by_their_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels far beyond the width of the features are fine; classes that the bank lacks are not."""
    rng = np.random.default_rng(0)
    classes = rng.standard_normal((10, 1, 2, 2)).astype(np.float32)
    index = np.arange(200) % 10
    noisy = classes[index] + 0.01 * rng.standard_normal((200, 1, 2, 2)).astype(np.float32)
    np.savez(tmp_path / "bank.npz", images=classes[index], labels=index + 300)
    np.savez(tmp_path / "test.npz", images=noisy[:50], labels=index[:50] + 300)
    np.savez(tmp_path / "wrong.npz", images=noisy[:50], labels=index[:50] + 310)
    arguments = ("evaluate", f"{__name__}:pixels", "--backend", "float", "--bank", tmp_path / "bank.npz", "--json")
    assert run(*arguments, "--data", tmp_path / "test.npz") == 0
    assert json.loads(capsys.readouterr().out)["top1"] == 100.0
    assert run(*arguments, "--data", tmp_path / "wrong.npz") == 1
    assert "out of range" in capsys.readouterr().err
