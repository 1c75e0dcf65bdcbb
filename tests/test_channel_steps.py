"""Channels are followed through any change of shape: what is rescaled at random computes what it did."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.smoothing import prepared, rescale_everything

Draw = Callable[[Any], Any]


class Chain:
    """Nodes between two products, in ONNX's textual form, and the shape behind the last of them."""

    def __init__(self) -> None:
        self.shape, self.value = [2, 3, 12], "v0"
        self.nodes: list[str] = []
        self._constants: list[str] = []

    def ints(self, values: list[int]) -> str:
        name = f"i{len(self._constants)}"
        self._constants.append(f"int64[{len(values)}] {name} = {{{', '.join(map(str, values))}}}")
        return name

    def then(self, text: str, shape: list[int]) -> None:
        """Adds a node that reads `{}`."""
        self.nodes.append(f"v{len(self.nodes) + 1} = {text.format(self.value)}")
        self.value, self.shape = f"v{len(self.nodes)}", shape

    def replaced(self, axis: int, *sizes: int, count: int = 1) -> list[int]:
        return [*self.shape[:axis], *sizes, *self.shape[axis + count :]]

    def text(self) -> str:
        if len(self.shape) == 1:
            self.then(f"Unsqueeze({{}}, {self.ints([0])})", [1, *self.shape])
        result = ",".join("ABCDEFGHIJK"[: len(self.shape)])
        constants = f"<{', '.join(self._constants)}>" if self._constants else ""
        return (
            f"g (float[2,3,8] x, float[8,12] w1, float[12] b1, float[{self.shape[-1]},5] w2) => (float[{result}] y) "
            f"{constants} {{ m = MatMul(x, w1) v0 = Add(m, b1) {' '.join(self.nodes)} y = MatMul({self.value}, w2) }}"
        )


def split_axis(chain: Chain, axis: int, draw: Draw) -> None:
    size = chain.shape[axis]
    outer = draw(st.sampled_from([number for number in range(1, size + 1) if size % number == 0]))
    shape = chain.replaced(axis, outer, size // outer)
    chain.then(f"Reshape({{}}, {chain.ints(shape)})", shape)


def merge_axes(chain: Chain, axis: int, draw: Draw) -> None:
    if axis + 1 < len(chain.shape):
        shape = chain.replaced(axis, chain.shape[axis] * chain.shape[axis + 1], count=2)
        chain.then(f"Reshape({{}}, {chain.ints(shape)})", shape)


def transpose(chain: Chain, axis: int, draw: Draw) -> None:
    order = draw(st.permutations(range(len(chain.shape))))
    chain.then(f"Transpose <perm = [{', '.join(map(str, order))}]> ({{}})", [chain.shape[old] for old in order])


def half(chain: Chain, axis: int, draw: Draw) -> None:
    if chain.shape[axis] % 2 == 0:
        name = f"p{len(chain.nodes)}"
        first, second = draw(st.permutations([name, f"{name}_other"]))
        split = f"{first}, {second} = Split <axis = {axis}, num_outputs = 2> ({chain.value}) "
        chain.then("Identity({})", chain.replaced(axis, chain.shape[axis] // 2))
        chain.nodes[-1] = f"{split} {chain.value} = Identity({name})"


def swap_halves(chain: Chain, axis: int, draw: Draw) -> None:
    if chain.shape[axis] % 2 == 0:
        name, other = f"p{len(chain.nodes)}", draw(st.integers(0, len(chain.shape) - 1))
        split = f"{name}, {name}_other = Split <axis = {axis}, num_outputs = 2> ({chain.value})"
        shape = chain.replaced(axis, chain.shape[axis] // 2)
        shape[other] *= 2
        chain.then("Identity({})", shape)
        chain.nodes[-1] = f"{split} {chain.value} = Concat <axis = {other}> ({name}_other, {name})"


def squeeze(chain: Chain, axis: int, draw: Draw) -> None:
    if chain.shape[axis] == 1 and len(chain.shape) > 1:
        chain.then(f"Squeeze({{}}, {chain.ints([axis])})", chain.replaced(axis))


def unsqueeze(chain: Chain, axis: int, draw: Draw) -> None:
    chain.then(f"Unsqueeze({{}}, {chain.ints([axis])})", chain.replaced(axis, 1, count=0))


def pick_one(chain: Chain, axis: int, draw: Draw) -> None:
    if len(chain.shape) > 1:
        number = draw(st.integers(0, chain.shape[axis] - 1))
        constant = f"s{len(chain.nodes)}"
        chain.then(f"Gather <axis = {axis}> ({{}}, {constant})", chain.replaced(axis))
        chain.nodes[-1] = f"{constant} = Constant <value_int = {number}> () {chain.nodes[-1]}"


def pick_some(chain: Chain, axis: int, draw: Draw) -> None:
    numbers = draw(st.lists(st.integers(0, chain.shape[axis] - 1), min_size=1, max_size=4))
    chain.then(f"Gather <axis = {axis}> ({{}}, {chain.ints(numbers)})", chain.replaced(axis, len(numbers)))


def cut(chain: Chain, axis: int, draw: Draw) -> None:
    size = chain.shape[axis]
    start, stride = draw(st.integers(0, size - 1)), draw(st.integers(1, 3))
    arguments = ", ".join(chain.ints([number]) for number in (start, size, axis, stride))
    chain.then(f"Slice({{}}, {arguments})", chain.replaced(axis, len(range(start, size, stride))))


def relu(chain: Chain, axis: int, draw: Draw) -> None:
    chain.then("Relu({})", chain.shape)


def expand(chain: Chain, axis: int, draw: Draw) -> None:
    if chain.shape[axis] == 1:
        shape = chain.replaced(axis, 3)
        chain.then(f"Expand({{}}, {chain.ints(shape)})", shape)


STEPS = (
    split_axis,
    merge_axes,
    transpose,
    half,
    swap_halves,
    squeeze,
    unsqueeze,
    pick_one,
    pick_some,
    cut,
    relu,
    expand,
)


@st.composite
def chains(draw: Draw) -> str:
    chain = Chain()
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=6)):
        step(chain, draw(st.integers(0, len(chain.shape) - 1)), draw)
    return chain.text()


@given(chains())
@settings(max_examples=150, deadline=None)
def test_channels_are_followed_through_any_change_of_shape(text: str) -> None:
    rescale_everything(prepared(text, "w1 b1 w2"), check=False)


@pytest.mark.parametrize(("axis", "number", "left"), [(2, 1, 6), (3, 0, 4)])
def test_queries_keys_and_values_of_each_head_side_by_side(axis: int, number: int, left: int) -> None:
    """One head, or the queries of all."""
    graph = (
        f"g (float[2,3,8] x, float[8,12] w1, float[12] b1, float[{left},5] w2) => (float[2,3,5] y) "
        "<int64[5] heads = {0, 0, 2, 3, 2}, int64[3] whole = {0, 0, -1}> "
        "{ m = MatMul(x, w1) a = Add(m, b1) r = Reshape(a, heads) "
        f"n = Constant <value_int = {number}> () q = Gather <axis = {axis}> (r, n) f = Reshape(q, whole) "
        "y = MatMul(f, w2) }"
    )
    groups = rescale_everything(prepared(graph, "w1 b1 w2"))
    assert [int(group.free.sum()) for group in groups if not group.reason] == [left]
