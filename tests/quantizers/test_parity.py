"""The published emulations, as they are published, and their distance from integer programs."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from quantizers.errors import DataError, UsageError
from quantizers.parity import paper_fake_quantize

ROOT = Path(__file__).resolve().parents[2]


def dense() -> torch.Tensor:
    """Return zero and shares down to 2^-300."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), 2.0 ** -torch.linspace(0, 300, 60001, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("family", "bits", "q"),
    [
        *(("log2", bits, 0) for bits in range(2, 9)),
        *(("log_sqrt2", bits, 0) for bits in range(2, 9)),
        *(("adalog", bits, 20) for bits in range(2, 7)),
        ("adalog", 7, 10),
        ("adalog", 3, 137),
    ],
)
def test_published_emulations_have_one_value_more(family: str, bits: int, q: int) -> None:
    """2^b + 1: a zero besides 2^b powers. It is why published figures need more than b bits."""
    values = paper_fake_quantize(dense(), family, bits, 0.7, q).unique()
    assert len(values) == 2**bits + 1
    assert float(values[0]) == 0
    assert float(values[-1]) == 0.7


def test_the_logarithm_is_rounded() -> None:
    """The border between 1 and 1/2 is 2^-0.5 = 0.707, not 0.75; ties of k to even; beyond the last half code, zero."""
    x = torch.tensor([0.75, 0.71, 0.70, 0.26, 0.0001, 0.09, 0.088, 5.0, -1.0], dtype=torch.float64)
    assert paper_fake_quantize(x, "log2", 2, 1.0).tolist() == [1, 1, 0.5, 0.25, 0, 0.125, 0, 1, 0]
    half = paper_fake_quantize(torch.tensor([0.6], dtype=torch.float64), "log_sqrt2", 2, 1.0)
    assert float(half) == 2**-0.5


def test_adalog_takes_its_table_and_its_clamp() -> None:
    """q = 20 at 4 bits: code 1 is 21/30; with q = 137 zero is 1e-15, code 13, a power and no zero, as in its code."""
    assert float(paper_fake_quantize(torch.tensor([0.7]), "adalog", 4, 1.0, 20)) == pytest.approx(21 / 30)
    zero = paper_fake_quantize(torch.zeros(1, dtype=torch.float64), "adalog", 4, 1.0, 137)
    assert 0 < float(zero) < 1e-14


def test_shape_and_type_are_kept() -> None:
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    result = paper_fake_quantize(x, "log2", 4, 1.0)
    assert (result.shape, result.dtype) == (x.shape, torch.float32)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_values_that_are_not_finite_are_refused_here_too(bad: float) -> None:
    with pytest.raises(DataError, match="log2 codes finite values only"):
        paper_fake_quantize(torch.tensor([bad]), "log2", 4, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tangent", 4, 1.0), "the published emulation has log2, log_sqrt2 and adalog, got 'tangent'"),
        (("log2", 9, 1.0), "a codebook has 2 to 8 bits, got 9"),
        (("log2", 4, 0.0), "scale is 0.0, expected a positive number"),
        (("adalog", 4, 1.0, 5), "q of AdaLog is 5, expected an integer from 10 to 137"),
    ],
)
def test_wrong_requests_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        paper_fake_quantize(torch.ones(1), *arguments)


def imports_parity(source: str) -> bool:
    """Return whether a module imports the published emulation in any spelling."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name == "quantizers.parity" for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (
            node.module == "quantizers.parity"
            or (node.module == "quantizers" and any(alias.name == "parity" for alias in node.names))
        ):
            return True
    return False


@pytest.mark.parametrize("package", ["calibration", "tvm_backend", "quantizers/integer"])
def test_parity_never_reaches_an_integer_program(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths
    assert not [str(path.relative_to(ROOT)) for path in paths if imports_parity(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "source",
    ["import quantizers.parity", "from quantizers import parity", "def f():\n from quantizers.parity import x"],
)
def test_the_check_finds_every_spelling(source: str) -> None:
    assert imports_parity(source)
