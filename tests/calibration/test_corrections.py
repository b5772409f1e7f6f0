"""Laws of the closed-form corrections: least squares on quantized inputs, and rounding with error feedback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import images, model, traced
from torch import Tensor

from calibration.correct.error_feedback import DAMPING, feedback, round_with_feedback
from calibration.correct.least_squares import RIDGES, least_squares
from calibration.engine import calibrate
from calibration.moments import MomentSums
from calibration.search.ranges import search_weight
from calibration.search.weights import nearest, search_weight_feedback, search_weight_output
from calibration.simulate import simulate
from ptq.recipes import named_recipe
from quantizers.spec import QuantSpec
from quantizers.uniform import fake_quantize

#: The machines that run the tests are shared.
UNTIMED = settings(deadline=None, max_examples=25)
WIDTH, OUTPUTS = 12, 5


def correlated(seed: int, count: int = 200, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return rows whose inputs have much in common, and the same with errors that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(count, 3, generator=generator) @ torch.randn(3, WIDTH, generator=generator)
    x = common + 0.3 * torch.randn(count, WIDTH, generator=generator) + 2.0
    return x, 0.9 * x + noise * torch.randn(count, WIDTH, generator=generator)


def sums(x: Tensor, quantized: Tensor) -> MomentSums:
    total = MomentSums(WIDTH, torch.device("cpu"))
    total.add(x, quantized)
    return total


def weight_of(seed: int) -> Tensor:
    return torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(seed + 1))


def halves_of(x: Tensor, quantized: Tensor) -> tuple[MomentSums, MomentSums]:
    return sums(x[::2], quantized[::2]), sums(x[1::2], quantized[1::2])


def ridge_solution(weight: Tensor, x: Tensor, quantized: Tensor, ridge: float) -> np.ndarray:
    """Return what numpy's least squares gives for the change of the weights, with the ridge as further rows."""
    a, b = (v.double().numpy() for v in (x - x.mean(0), quantized - quantized.mean(0)))
    old = weight.double().numpy()
    strength = np.sqrt(ridge * np.square(b).sum(0).mean())
    left = np.vstack([b, strength * np.eye(WIDTH)])
    right = np.vstack([a @ old.T - b @ old.T, np.zeros((WIDTH, len(old)))])
    return old + np.linalg.lstsq(left, right, rcond=None)[0].T


def held_out(weight: Tensor, x: Tensor, quantized: Tensor, ridge: float) -> float:
    """Return the error of either half under the weights that the other half gives."""
    total = 0.0
    for fitted, seen in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        changed = ridge_solution(weight, x[fitted], quantized[fitted], ridge)
        a, b = x[seen].double().numpy(), quantized[seen].double().numpy()
        error = a @ weight.double().numpy().T - b @ changed.T
        total += float(np.square(error - error.mean(0)).sum())
    return total


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.3, 1.0]))
def test_least_squares_is_the_ridge_solution(seed: int, noise: float) -> None:
    """Of numpy, with the ridge that the held-out halves prefer; to float32 products."""
    x, quantized = correlated(seed, noise=noise)
    weight = weight_of(seed)
    found = least_squares(weight, halves_of(x, quantized), sums(x, quantized).finish())
    best = min(RIDGES, key=lambda ridge: held_out(weight, x, quantized, ridge))
    np.testing.assert_allclose(found.numpy(), ridge_solution(weight, x, quantized, best), rtol=0, atol=1e-4)


@UNTIMED
@given(st.integers(0, 10**6), st.integers(4, 60), st.sampled_from([0.05, 1.0, 10.0]))
def test_a_correction_is_never_worse_on_what_it_has_not_seen(seed: int, count: int, noise: float) -> None:
    """Measured as it is chosen: few rows and much noise leave the weights as they are."""
    x, quantized = correlated(seed, count, noise)
    weight = weight_of(seed)
    found = least_squares(weight, halves_of(x, quantized), sums(x, quantized).finish())
    none = sum(float(half.finish().output_errors(weight, weight).sum()) for half in halves_of(x, quantized))
    if torch.equal(found, weight):
        assert min(held_out(weight, x, quantized, ridge) for ridge in RIDGES) >= none * (1 - 1e-4)
    else:
        assert min(held_out(weight, x, quantized, ridge) for ridge in RIDGES) <= none * (1 + 1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_inputs_without_error_need_no_correction(seed: int) -> None:
    """Not a bit of the weights changes."""
    x, _ = correlated(seed, 50)
    weight = weight_of(seed)
    assert least_squares(weight, halves_of(x, x), sums(x, x).finish()) is weight


def test_one_image_is_not_corrected_for() -> None:
    """There is nothing to hold out."""
    x, quantized = correlated(0)
    weight = weight_of(0)
    assert least_squares(weight, None, sums(x, quantized).finish()) is weight


def test_inputs_that_never_change_are_not_corrected_for() -> None:
    x = torch.full((20, WIDTH), 0.7)
    weight = weight_of(0)
    quantized = x + 0.1
    assert least_squares(weight, halves_of(x, quantized), sums(x, quantized).finish()) is weight


# Error feedback -----------------------------------------------------------------------------------------


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 7, 127]))
def test_independent_inputs_round_to_the_nearest(seed: int, qmax: int) -> None:
    """Errors of one input say nothing about another: with diagonal moments no weight moves, ties to the even code."""
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(WIDTH, generator=generator, dtype=torch.float64)
    scale = 0.25 + torch.rand(OUTPUTS, generator=generator)
    weight = torch.randn(OUTPUTS, WIDTH, generator=generator)
    weight[0] = (torch.arange(WIDTH) - 5.5) * scale[0]
    found = round_with_feedback(weight, feedback(energy.diag()), scale, qmax)
    assert torch.equal(found, nearest(weight, scale, qmax))


def test_exact_ties_are_even() -> None:
    """Also where there is nothing to feed back."""
    weight = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]])
    for moments in (torch.zeros(7, 7, dtype=torch.float64), torch.eye(7, dtype=torch.float64)):
        found = round_with_feedback(weight, feedback(moments), torch.ones(1), 3)
        assert found.tolist() == [[-2.0, -2.0, -0.0, 0.0, 2.0, 2.0, 3.0]]


@UNTIMED
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 7, 127]))
def test_codes_are_integers_in_range(seed: int, qmax: int) -> None:
    x, quantized = correlated(seed)
    weight = 5 * weight_of(seed)
    found = round_with_feedback(weight, feedback(sums(x, quantized).finish().qq), torch.full((OUTPUTS,), 0.2), qmax)
    assert torch.equal(found, found.round())
    assert float(found.abs().max()) <= qmax


@pytest.mark.parametrize("qmax", [1, 3, 7])
def test_feedback_beats_the_nearest_codes_on_correlated_inputs(qmax: int) -> None:
    """Over many layers, by a third of the error and more: that is what it is for."""
    errors = torch.zeros(2, dtype=torch.float64)
    for seed in range(10):
        x, _ = correlated(seed)
        weight = weight_of(seed)
        moments = sums(x, x).finish()
        scale = weight.abs().amax(1) / qmax
        for index, codes in enumerate(
            (nearest(weight, scale, qmax), round_with_feedback(weight, feedback(moments.qq), scale, qmax))
        ):
            errors[index] += moments.output_errors(weight, codes * scale[:, None]).sum()
    assert float(errors[1]) < 0.67 * float(errors[0])


def test_feedback_is_the_published_algorithm() -> None:
    """Algorithm 1 written out with a fresh inverse for every input: the same codes."""
    for seed in range(5):
        x, quantized = correlated(seed)
        weight, moments = weight_of(seed), sums(x, quantized).finish().qq
        scale = weight.abs().amax(1) / 3
        system = (moments + DAMPING * moments.diagonal().mean() * torch.eye(WIDTH)).numpy()
        left = [int(i) for i in torch.argsort(moments.diagonal(), descending=True, stable=True)]
        rest, codes = weight.double().numpy().copy(), np.zeros((OUTPUTS, WIDTH))
        while left:
            inverse = np.linalg.inv(system[np.ix_(left, left)])
            first = left[0]
            codes[:, first] = np.clip(np.rint(rest[:, first] / scale.double().numpy()), -3, 3)
            error = rest[:, first] - codes[:, first] * scale.double().numpy()
            rest[:, left] -= np.outer(error, inverse[0] / inverse[0, 0])
            left = left[1:]
        found = round_with_feedback(weight, feedback(moments), scale, 3)
        np.testing.assert_array_equal(found.numpy(), codes)


def test_more_inputs_than_a_block() -> None:
    """Blocks change the order of operations only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator) @ torch.randn(4, 300, generator=generator)
    x += 0.5 * torch.randn(400, 300, generator=generator)
    moments = (x.T @ x).double()
    weight = torch.randn(3, 300, generator=generator)
    scale = weight.abs().amax(1) / 7
    found = round_with_feedback(weight, feedback(moments), scale, 7)
    alone = torch.cat(
        [round_with_feedback(w[None], feedback(moments), s[None], 7) for w, s in zip(weight, scale, strict=True)]
    )
    assert torch.equal(found, alone)


# Searches of weights ------------------------------------------------------------------------------------


@UNTIMED
@given(st.integers(0, 10**6), st.integers(2, 8), st.booleans())
def test_no_row_is_worse_than_under_another_search(seed: int, bits: int, corrected: bool) -> None:
    """On the error at the layer's output, to the rounding of one float64 sum."""
    x, quantized = correlated(seed)
    weight, moments = weight_of(seed), sums(x, quantized).finish()
    weight[0] *= 100.0
    weight[1, 0] = 50.0
    weight[2] = 0.0
    spec = QuantSpec(bits, granularity="channel", search="feedback")
    qmax = 2 ** (bits - 1) - 1
    target = least_squares(weight, halves_of(x, quantized), moments) if corrected else weight
    scale, codes = search_weight_feedback(weight, target, moments, spec)
    assert float(codes.abs().max()) <= qmax
    assert torch.equal(codes, codes.round())
    assert bool((scale > 0).all())
    errors = moments.output_errors(weight, codes * scale[:, None])
    output = search_weight_output(weight, moments, spec)
    others = {"output": nearest(weight, output, qmax) * output[:, None]}
    for search in ("minmax", "mse"):
        plain = search_weight(weight, QuantSpec(bits, granularity="channel", search=search))
        others[search] = fake_quantize(weight, plain)
    slack = 1e-9 * moments.output_errors(weight, torch.zeros_like(weight)) + 1e-12
    for name, values in others.items():
        assert bool((errors <= moments.output_errors(weight, values) + slack).all()), name
        if name != "output":
            output_errors = moments.output_errors(weight, others["output"])
            assert bool((output_errors <= moments.output_errors(weight, values) + slack).all()), name


@pytest.mark.parametrize("method", ["auto", "adalog"])
@pytest.mark.parametrize("value", [0.0, 0.7])
def test_images_without_contrast(method: str, value: float) -> None:
    """All images equal: nothing to measure by, and no reason to fail. The one input that there is comes out right."""
    x = torch.full((4, 1, 8, 8), value)
    result = calibrate(traced("ours"), [(image,) for image in x], named_recipe(method, "w8a8"))
    expected = model("ours")(x).detach()
    assert float((simulate(result, (x,))[0] - expected).norm() / expected.norm()) < 0.1


def test_one_image() -> None:
    """One row at the head, which differs from no other."""
    x = images("ours", 1)
    result = calibrate(traced("ours"), [(x[0],)], named_recipe("auto", "w4a4"))
    assert result.num_images == 1
