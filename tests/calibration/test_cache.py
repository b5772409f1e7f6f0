"""Laws of the activation cache: what goes in comes out, memory stays below the limit, and files do not outlive it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibration.cache import ActivationCache, Key

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None, max_examples=50)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@UNTIMED
@given(
    steps=st.lists(st.tuples(st.integers(0, 6), SHAPES), max_size=20),
    limit=st.sampled_from([0, 1, 40, 200, 1 << 20]),
)
def test_a_cache_is_a_mapping_at_any_limit(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, tuple[int, ...]]], limit: int
) -> None:
    """Puts and drops in any order: contents are those of a dictionary, bit for bit, and memory is within the limit."""
    folder = tmp_path_factory.mktemp("cache")
    known: dict[Key, Tensor] = {}
    with ActivationCache(limit, folder) as cache:
        for seed, (index, shape) in enumerate(steps):
            key = ("run", "value", index)
            if key in known:
                cache.drop(key)
                del known[key]
            else:
                known[key] = tensor(shape, seed)
                cache.put(key, known[key])
            assert cache.memory_bytes <= limit
            for other in range(7):
                assert (("run", "value", other) in cache) == (("run", "value", other) in known)
            for present, expected in known.items():
                assert torch.equal(cache.get(present), expected)
                assert cache.get(present).shape == expected.shape
        for key in known:
            cache.drop(key)
        assert cache.memory_bytes == 0
        assert not [path for path in folder.rglob("*") if path.is_file()]
    assert not list(folder.iterdir())


def test_values_keep_their_bits(tmp_path: Path) -> None:
    """Negative zero, denormals, infinities and NaN come back from a file as they went in."""
    values = torch.tensor([-0.0, 1e-45, float("inf"), -float("inf"), float("nan"), 3.4e38])
    with ActivationCache(0, tmp_path) as cache:
        cache.put(("run", "value", 0), values)
        assert torch.equal(cache.get(("run", "value", 0)).view(torch.int32), values.view(torch.int32))


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_memory_layout_is_no_part_of_a_value(limit: int, tmp_path: Path) -> None:
    """Transposed, strided and expanded tensors come back with their values."""
    whole = tensor((6, 8), 0)
    views = (whole.T, whole[:, ::2], whole[::3], whole[:1].expand(4, 8), whole[2])
    with ActivationCache(limit, tmp_path) as cache:
        for index, view in enumerate(views):
            cache.put(("run", "value", index), view)
        for index, view in enumerate(views):
            assert torch.equal(cache.get(("run", "value", index)), view)


def test_a_view_keeps_no_larger_tensor_alive() -> None:
    """Memory that is counted is memory that is held."""
    with ActivationCache() as cache:
        cache.put(("run", "value", 0), tensor((1000, 8), 0)[3])
        kept = cache.get(("run", "value", 0))
        assert kept.untyped_storage().nbytes() == kept.nbytes == cache.memory_bytes == 32


def test_files_go_with_the_cache_however_it_ends(tmp_path: Path) -> None:
    """Also when calibration fails in the middle."""
    folder = tmp_path / "made" / "on demand"

    def fail() -> None:
        with ActivationCache(0, folder) as cache:
            cache.put(("run", "value", 0), tensor((3,), 0))
            assert [path for path in folder.rglob("*") if path.is_file()]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not list(folder.iterdir())


def test_what_fits_needs_no_file(tmp_path: Path) -> None:
    """To the last byte."""
    with ActivationCache(32, tmp_path) as cache:
        cache.put(("run", "value", 0), tensor((8,), 0))
        assert not list(tmp_path.iterdir())
        cache.put(("run", "value", 1), tensor((1,), 0))
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_memory_that_is_free_again_is_used_again(tmp_path: Path) -> None:
    with ActivationCache(32, tmp_path) as cache:
        for index in range(5):
            cache.put(("run", "value", index), tensor((8,), index))
            cache.drop(("run", "value", index))
        cache.drop(("run", "never kept", 0))
        assert not list(tmp_path.iterdir())
