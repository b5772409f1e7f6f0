"""Laws of the searches by the error at an operation's result: no search that they contain is better, at any site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.heads import uneven_heads
from support.models import Formula, spread
from torch import Tensor, nn
from torch.nn import functional

from calibration.engine import calibrate
from calibration.heads import head_counts
from calibration.integerize import integerize
from calibration.search.heads import search_attention_operand
from calibration.search.operands import apply_operand, output_error, search_operand, search_percentiles
from calibration.search.probabilities import search_probabilities
from calibration.search.ranges import search_activation, search_heads
from calibration.simulate import simulate
from calibration.statistics import empty, update
from calibration.trace import trace
from ptq.recipes import named_recipe
from quantizers.families import FAMILIES
from quantizers.integer.interpret import interpret
from quantizers.row_relative import RowRelativeQParams, fake_quantize_rows
from quantizers.spec import RANGE_SEARCHES, QuantSpec
from quantizers.uniform import UniformQParams, fake_quantize

BITS = (2, 3, 4, 6, 8)
INPUTS, OUTPUTS = 16, 24


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _outliers() -> Tensor:
    x = noise(1, 200, INPUTS)
    x[:, 3] *= 60.0
    x[7] *= 20.0
    return x


#: Inputs of a layer, float32 (R, K).
DATA: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: noise(0, 200, INPUTS),
    "outliers": _outliers,
    "one-sided": lambda: noise(2, 200, INPUTS).abs(),
    "negative": lambda: -noise(3, 200, INPUTS).exp(),
    "gelu": lambda: functional.gelu(2 * noise(4, 200, INPUTS)),
    "far from zero": lambda: noise(5, 200, INPUTS) + 40.0,
    "constant": lambda: torch.full((200, INPUTS), 2.5),
    "constant and negative": lambda: torch.full((200, INPUTS), -0.1),
    "zero": lambda: torch.zeros(200, INPUTS),
    "tiny": lambda: 1e-25 * noise(6, 200, INPUTS),
    "large": lambda: 1e15 * noise(7, 200, INPUTS),
    "one value": lambda: noise(8, 1, INPUTS),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", DATA)
def test_no_range_search_is_better_at_the_layers_output(name: str, symmetric: bool) -> None:
    """At every width."""
    rows, weight = DATA[name](), noise(9, OUTPUTS, INPUTS)
    stats, error = update(empty(), rows), output_error(rows, weight)
    for bits in BITS:
        spec = QuantSpec(bits, symmetric=symmetric, search="output")
        found = search_operand(stats, spec, error, ("uniform",))
        assert isinstance(found, UniformQParams)
        assert found.bits == bits
        assert found.zero_point == 0 or not symmetric
        assert found.qmin <= found.zero_point <= found.qmax
        for search in RANGE_SEARCHES:
            assert error(found) <= error(search_activation(stats, dataclasses.replace(spec, search=search))), search
        assert error(found) <= error(search_percentiles(stats, spec, error))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", DATA)
def test_percentiles_are_chosen_by_the_layers_output(name: str, bits: int) -> None:
    """No worse there than the full range, and than the percentile range with the least error of its own."""
    rows, weight = DATA[name](), noise(9, OUTPUTS, INPUTS)
    stats, error = update(empty(), rows), output_error(rows, weight)
    spec = QuantSpec(bits, symmetric=False, search="percentile_output")
    found = search_percentiles(stats, spec, error)
    for search in ("minmax", "percentile_mse"):
        assert error(found) <= error(search_activation(stats, dataclasses.replace(spec, search=search))), search


@pytest.mark.parametrize(("gain", "kept"), [(1.0, True), (0.0, False)])
def test_a_massive_value_stays_where_the_layer_reads_it(gain: float, kept: bool) -> None:
    """One value in ten thousand is large: it is cut off only where its weights are zero."""
    rows, weight = functional.gelu(noise(0, 2000, INPUTS)), 0.01 * noise(1, OUTPUTS, INPUTS)
    rows[::400, 0] = 15.0
    weight[:, 0] = gain
    spec = QuantSpec(6, symmetric=False, search="percentile_output")
    stats = update(empty(), rows)
    found = search_percentiles(stats, spec, output_error(rows, weight))
    assert (found.scale[0] * (found.qmax - found.zero_point) > 14) == kept


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_values_use_all_codes(bits: int, sign: float) -> None:
    """The zero point is at one end: no code is left for a side without values, unless the error says so.

    Uniform values from zero to one, whose best step is that of ``2^b`` levels, to the shrinking that saturation allows.
    """
    rows = sign * torch.rand(500, INPUTS, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits, symmetric=False, search="output")
    found = search_operand(update(empty(), rows), spec, output_error(rows, noise(1, OUTPUTS, INPUTS)), ("uniform",))
    assert isinstance(found, UniformQParams)
    assert found.zero_point == (found.qmin if sign > 0 else found.qmax)
    assert 0.9 / 2**bits < found.scale[0] <= 1.001 / (2**bits - 1)


@pytest.mark.parametrize("bits", [3, 4])
def test_codebooks_beat_uniform_levels_after_gelu(bits: int) -> None:
    """Most values lie near zero, few are large: levels that are dense where values are dense lose a quarter less."""
    rows = functional.gelu(3 * noise(0, 400, INPUTS) * noise(1, 400, 1).exp())
    stats, error = update(empty(), rows), output_error(rows, noise(2, OUTPUTS, INPUTS))
    spec = QuantSpec(bits, symmetric=False, search="output")
    uniform, adalog, every = (
        error(search_operand(stats, spec, error, families)) for families in (("uniform",), ("adalog",), tuple(FAMILIES))
    )
    assert adalog < 0.75 * uniform
    assert every <= adalog


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", DATA)
def test_no_family_alone_is_better_than_all(name: str, bits: int) -> None:
    """The search of every family has looked at what each search of one family ends with."""
    rows, weight = DATA[name](), noise(9, OUTPUTS, INPUTS)
    stats, error = update(empty(), rows), output_error(rows, weight)
    spec = QuantSpec(bits, symmetric=False, search="output")
    found = error(search_operand(stats, spec, error, tuple(FAMILIES)))
    for family in FAMILIES:
        assert found <= error(search_operand(stats, spec, error, (family,))), family


def test_searches_repeat_themselves() -> None:
    rows, weight = DATA["gelu"](), noise(9, OUTPUTS, INPUTS)
    stats, spec = update(empty(), rows), QuantSpec(4, symmetric=False, search="output")
    results = {search_operand(stats, spec, output_error(rows, weight), tuple(FAMILIES)) for _ in range(2)}
    assert len(results) == 1


def test_the_error_of_many_outputs_is_estimated_without_bias() -> None:
    """Along 64 random directions of 300 outputs: that over all of them, to what 64 samples leave (a fifth)."""
    rows, weight = DATA["normal"](), noise(9, 300, INPUTS)
    qparams = search_activation(update(empty(), rows), QuantSpec(4))
    exact = float(((apply_operand(rows, qparams) - rows) @ weight.T).square().sum(1).mean())
    assert output_error(rows, weight)(qparams) == pytest.approx(exact, rel=0.2)


# Attention ----------------------------------------------------------------------------------------------


def heads_of(kind: str) -> tuple[Tensor, Tensor]:
    """Return an operand (images, heads, tokens, d) whose heads differ, and the other operand of its product."""
    magnitude = torch.tensor([1.0, 10.0, 0.1]).reshape(3, 1, 1)
    shift = torch.tensor([0.0, 8.0, -0.2]).reshape(3, 1, 1) if kind == "shifted" else 0.0
    operand = noise(0, 4, 3, 5, 8) * magnitude + shift
    if kind == "outliers":
        operand[:, :, 0] *= 12.0
    if kind == "a dead head":
        operand[:, 1] = 0.0
    if kind == "one large value":
        # Few enough that percentiles leave it out, and so have another zero point.
        operand = operand.repeat(20, 1, 1, 1)
        operand[0, 1, 0, 0] = 200.0
    return operand, noise(1, *operand.shape)


def product_error(other: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda error: (error @ other.transpose(-1, -2)).square().sum((-2, -1))


def range_formats(operand: Tensor, spec: QuantSpec) -> list[UniformQParams]:
    specs = [dataclasses.replace(spec, search=search) for search in RANGE_SEARCHES]
    if spec.granularity == "tensor":
        return [search_activation(update(empty(), operand), entry) for entry in specs]
    stats = [update(empty(), head) for head in operand.unbind(-3)]
    return [search_heads(stats, entry) for entry in specs]


KINDS = ["normal", "outliers", "shifted", "a dead head", "one large value"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_head_is_worse_than_under_a_range_search(kind: str, bits: int) -> None:
    """With zero point 0, as heads have it: on the error of the attention product, each head for itself."""
    operand, other = heads_of(kind)
    measure = product_error(other)
    spec = QuantSpec(bits, granularity="head", search="output")
    formats = range_formats(operand, spec)
    found = search_attention_operand(operand, measure, spec, formats)
    assert len(found.scale) == 3
    errors = measure(fake_quantize(operand, found) - operand).double().sum(0)
    for qparams in formats:
        plain = measure(fake_quantize(operand, qparams) - operand).double().sum(0)
        assert bool((errors <= plain).all())


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_range_search_is_better_at_the_attention_product(kind: str, symmetric: bool, granularity: str) -> None:
    """Over all heads, which have a zero point in common."""
    operand, other = heads_of(kind)
    measure = product_error(other)
    for bits in BITS:
        spec = QuantSpec(bits, symmetric=symmetric, granularity=granularity, search="output")
        formats = range_formats(operand, spec)
        found = search_attention_operand(operand, measure, spec, formats)
        error = float(measure(fake_quantize(operand, found) - operand).double().sum())
        for qparams in formats:
            assert error <= float(measure(fake_quantize(operand, qparams) - operand).double().sum())


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_family_alone_is_better_for_probabilities(bits: int, sharpness: float) -> None:
    """On the error of their product with the values."""
    probabilities, values = (sharpness * noise(0, 2, 3, 9, 9)).softmax(-1), noise(1, 2, 3, 9, 8)

    def error(qparams: RowRelativeQParams) -> float:
        return float(((fake_quantize_rows(probabilities, qparams) - probabilities) @ values).square().mean())

    found = error(search_probabilities(probabilities, values, bits, tuple(FAMILIES)))
    for family in FAMILIES:
        alone = search_probabilities(probabilities, values, bits, (family,))
        # The sums of the products are rounded before they are compared, or after.
        assert found <= error(alone) * (1 + 1e-5), family


# Inputs at the edge of what there is ---------------------------------------------------------------------


def _layers(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
    return second(functional.gelu(first(x)))


@pytest.mark.parametrize("bits", ["w8a8", "w2a2"])
@pytest.mark.parametrize("method", ["auto", "adalog"])
def test_a_gelu_that_is_always_zero(method: str, bits: int) -> None:
    """Codebooks have no scale for it; any will do."""
    module = spread(Formula(_layers, nn.Linear(8, 8), nn.Linear(8, 4)))
    with torch.no_grad():
        module.layers[0].weight.zero_()
        module.layers[0].bias.zero_()
    x = noise(0, 8, 8)
    result = calibrate(trace(module, (x,)), [(row,) for row in x], named_recipe(method, bits))
    (simulated,), (integers,) = simulate(result, (x,)), interpret(integerize(result), x)
    torch.testing.assert_close(integers, simulated)


@pytest.mark.parametrize("method", ["auto", "adalog", "repq"])
def test_grouped_convolutions_are_searched_by_their_weights(method: str) -> None:
    """Each channel reads rows of its own, of which there are no common second moments; simulation needs none."""
    convolutions = (nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    module = spread(Formula(lambda x, a, b, c: c(functional.gelu(b(a(x)))), *convolutions))
    x = noise(0, 8, 4, 8, 8)
    result = calibrate(trace(module, (x[:2],)), [(image,) for image in x], named_recipe(method, "w8a8"))
    expected = module(x).detach()
    assert float((simulate(result, (x,))[0] - expected).norm() / expected.norm()) < 0.15


def test_uneven_heads_have_scales_of_their_own() -> None:
    """The whole way: a head that is ten times larger does not take the codes of the others."""
    graph, x = uneven_heads()
    result = calibrate(graph, [(image,) for image in x[:8]], named_recipe("auto", "w4a4"))
    sites = [entry.site for entry in result.sites]
    counts = head_counts(graph, sites, {entry.site.name: entry.spec for entry in result.sites}, result.recipe)
    found = {entry.site.name: entry.qparams for entry in result.sites if entry.site.name in counts}
    assert found
    for name, qparams in found.items():
        assert isinstance(qparams, UniformQParams)
        assert len(qparams.scale) == counts[name] == 3
        assert max(qparams.scale) > 4 * min(qparams.scale), name


def test_zero_points_compete() -> None:
    """Range searches may differ in their zero points; each is refined."""
    operand, _ = heads_of("one large value")
    spec = QuantSpec(3, symmetric=False, search="output")
    assert len({qparams.zero_point for qparams in range_formats(operand, spec)}) > 1
