"""Views as index arithmetic and as strides, against what numpy makes of the same chain."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantizers.integer.program import Node, TensorType
from tvm_backend.strides import Strided, source_index, strided_source, strided_target

Chain = list[Node]


def view(op: str, shape: tuple[int, ...], /, **attributes) -> Node:
    return Node("v", op, ("x",), attributes, TensorType("int8", shape), "")


def in_numpy(node: Node, array: np.ndarray) -> np.ndarray:
    if node.op == "reshape":
        return array.reshape(node.integers("shape"))
    if node.op == "permute":
        return array.transpose(node.integers("axes"))
    window = [slice(None)] * array.ndim
    window[node.integer("axis")] = slice(node.integer("start"), node.integer("stop"), node.integer("step"))
    return array[tuple(window)]


def apply(chain: Chain, shape: tuple[int, ...]) -> np.ndarray:
    """Positions in a flat source of every element of the last view."""
    array = np.arange(math.prod(shape)).reshape(shape)
    for node in chain:
        array = in_numpy(node, array)
    return array


def at(view: Strided, shape: tuple[int, ...]) -> np.ndarray:
    """Positions that strides name, one for each index of a shape."""
    positions = np.full(shape, view.offset)
    for index, stride in zip(np.indices(shape), view.strides, strict=True):
        positions += index * stride
    return positions


def even(positions: np.ndarray) -> bool:
    """Whether a step along an axis moves equally far wherever it is taken."""
    moves = [np.diff(positions, axis=axis) for axis in range(positions.ndim)]
    return all((move == move.flat[0]).all() for move in moves if move.size)


@st.composite
def reshapes(draw: st.DrawFn, shape: tuple[int, ...]) -> Node:
    """One axis split, two neighbours merged, or all of them in one."""
    splits = [
        (*shape[:axis], factor, extent // factor, *shape[axis + 1 :])
        for axis, extent in enumerate(shape)
        for factor in range(1, extent + 1)
        if extent % factor == 0
    ]
    merges = [(*shape[:a], shape[a] * shape[a + 1], *shape[a + 2 :]) for a in range(len(shape) - 1)]
    # Samples without axes have one element.
    chosen = draw(st.sampled_from([*splits, *merges, (math.prod(shape),), *([()] if math.prod(shape) == 1 else [])]))
    return view("reshape", chosen, shape=chosen)


@st.composite
def permutations(draw: st.DrawFn, shape: tuple[int, ...]) -> Node:
    axes = tuple(draw(st.permutations(range(len(shape)))))
    return view("permute", tuple(shape[axis] for axis in axes), axes=axes)


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...]) -> Node:
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    stop, step = draw(st.integers(start + 1, shape[axis])), draw(st.integers(1, 3))
    kept = (*shape[:axis], -(-(stop - start) // step), *shape[axis + 1 :])
    return view("slice", kept, axis=axis, start=start, stop=stop, step=step)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Chain, tuple[int, ...]]:
    """Up to four views, and the shape that they start from."""
    source = shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    chain: Chain = []
    for _ in range(draw(st.integers(0, 4))):
        kinds = [reshapes(shape), permutations(shape), *([slices(shape)] if shape else [])]
        chain.append(draw(st.one_of(kinds)))
        shape = chain[-1].type.shape
    return chain, source


@given(chains())
def test_an_index_of_the_result_names_the_element_that_numpy_puts_there(drawn) -> None:
    chain, source = drawn
    wanted = apply(chain, source)
    for index in np.ndindex(wanted.shape):
        place = source_index(chain, source, index)
        assert np.arange(math.prod(source)).reshape(source)[place] == wanted[index]


@given(chains())
def test_strides_of_a_source_are_found_wherever_there_are_any(drawn) -> None:
    chain, source = drawn
    wanted = apply(chain, source)
    found = strided_source(chain, source)
    assert (found is not None) == even(wanted)
    if found is not None:
        np.testing.assert_array_equal(at(found, wanted.shape), wanted)


@given(chains())
def test_strides_of_a_target_are_found_wherever_there_are_any(drawn) -> None:
    chain, source = drawn
    sources = apply(chain, source).reshape(-1)
    found = strided_target(chain, source)
    whole = sources.size == math.prod(source)
    # Where each element goes undoes where each comes from.
    targets = np.argsort(sources).reshape(source) if whole else None
    assert (found is not None) == (targets is not None and even(targets))
    if found is not None:
        np.testing.assert_array_equal(at(found, source), targets)


def test_heads_of_a_fused_projection_are_strides() -> None:
    """Keys, the second third of (tokens, 3 * heads * size), as (heads, tokens, size)."""
    tokens, heads, size = 5, 2, 4
    chain = [
        view("reshape", (tokens, 3, heads, size), shape=(tokens, 3, heads, size)),
        view("permute", (3, heads, tokens, size), axes=(1, 2, 0, 3)),
        view("slice", (1, heads, tokens, size), axis=0, start=1, stop=2, step=1),
        view("reshape", (heads, tokens, size), shape=(heads, tokens, size)),
    ]
    width = 3 * heads * size
    assert strided_source(chain, (tokens, width)) == Strided(heads * size, (size, width, 1))


def test_heads_side_by_side_are_strides() -> None:
    """(heads, tokens, size) into (tokens, heads * size)."""
    tokens, heads, size = 5, 2, 4
    chain = [
        view("permute", (tokens, heads, size), axes=(1, 0, 2)),
        view("reshape", (tokens, heads * size), shape=(tokens, heads * size)),
    ]
    assert strided_target(chain, (heads, tokens, size)) == Strided(0, (size, heads * size, 1))


@pytest.mark.parametrize("find", [strided_source, strided_target])
def test_no_view_is_the_layout_itself(find) -> None:
    assert find((), (2, 3, 4)) == Strided(0, (12, 4, 1))
    assert find((), ()) == Strided(0, ())


def test_what_strides_cannot_say() -> None:
    turned = [view("permute", (3, 2), axes=(1, 0)), view("reshape", (6,), shape=(6,))]
    assert strided_source(turned, (2, 3)) is None
    # A transpose has strides; joined to one axis its elements have none, seen from either side.
    assert strided_target(turned, (2, 3)) == Strided(0, (1, 2))
    halved = [view("slice", (2,), axis=0, start=0, stop=4, step=2)]
    assert strided_source(halved, (4,)) == Strided(0, (2,))
    assert strided_target(halved, (4,)) is None, "two elements are dropped"
