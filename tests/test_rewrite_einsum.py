"""Einsum that is a matrix product becomes MatMul, whatever the order of its letters."""

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.rewrite_einsum import RewriteEinsum
from tests.graphs import model_of
from tests.helpers import apply, leave_alone

SIZES = {"b": "B", "s": "S", "i": 5, "j": 6, "h": 2, "d": 4, "e": 3, "k": 7}


def einsum(equation: str, *, constant: str = "", sizes: dict[str, object] | None = None) -> ir.Model:
    """One Einsum; `constant` names the operand, x or w, that is an initializer."""
    known = {**SIZES, **(sizes or {})}
    operands, _, result = equation.replace(" ", "").partition("->")
    left, right = operands.split(",")
    x, w, y = (", ".join(str(known[letter]) for letter in term) for term in (left, right, result or "bes"))
    model = model_of(
        f'g (float[{x}] x, float[{w}] w) => (float[{y}] y) {{ [product] y = Einsum <equation = "{equation}"> (x, w) }}',
        weights=constant,
    )
    InferShapes()(model)
    return model


@pytest.mark.parametrize(
    ("equation", "constant", "operators"),
    [
        ("bsd,de->bse", "w", ["MatMul"]),
        ("bsd, ed -> bse", "w", ["MatMul"]),  # the constant is transposed, not the graph
        ("de,bsd->bse", "x", ["MatMul"]),
        ("bsd,de", "w", ["MatMul", "Transpose"]),  # the result is implied: bes
        ("bsd,dhk->bshk", "w", ["MatMul", "Reshape"]),  # projection to heads
        ("bsd,hdk->bhsk", "w", ["MatMul", "Reshape", "Transpose"]),
        ("bshk,hkd->bsd", "w", ["MatMul", "Reshape"]),  # projection from heads
        ("bhsk,dhk->bsd", "w", ["MatMul", "Reshape", "Transpose"]),
        ("bds,de->bse", "w", ["MatMul", "Transpose"]),
        ("d,de->e", "w", ["MatMul"]),
        ("bij,ij->b", "w", ["MatMul", "Reshape", "Reshape"]),  # no column
        ("bhid,bhjd->bhij", "", ["MatMul", "Transpose"]),  # queries by keys
        ("bhij,bhjd->bhid", "", ["MatMul"]),
        ("bihd,bjhd->bhij", "", ["MatMul", "Transpose", "Transpose"]),
        ("bhij,bjhd->bihd", "", ["MatMul", "Transpose", "Transpose"]),
        ("id,dj->ij", "", ["MatMul"]),
        ("besd,edk->besk", "w", ["MatMul"]),  # an expert each
        ("bsed,edk->bsek", "w", ["MatMul", "Transpose", "Transpose"]),
        ("edk,bsed->bsek", "x", ["MatMul", "Transpose", "Transpose"]),
        ("bhid,hjd->bhij", "", ["MatMul", "Transpose"]),  # keys that all samples share
        ("hjd,bhid->bhij", "", ["MatMul", "Transpose"]),
        ("hjd,bhid->bhji", "", ["MatMul", "Transpose", "Transpose"]),
    ],
)
def test_products(equation: str, constant: str, operators: list[str]) -> None:
    assert sorted(apply(RewriteEinsum(), einsum(equation, constant=constant))) == operators


@pytest.mark.parametrize("right", ["".join(order) for order in itertools.permutations("dhk")])
@pytest.mark.parametrize("result", ["bshk", "bkhs", "hbsk"])
def test_every_order_of_a_weight_with_three_axes(right: str, result: str) -> None:
    assert "Einsum" not in apply(RewriteEinsum(), einsum(f"bsd,{right}->{result}", constant="w"))


@pytest.mark.parametrize(
    ("equation", "constant", "sizes"),
    [
        ("bd,e->bde", "w", {}),  # outer product
        ("bsd,bsd->bsd", "", {}),  # elementwise
        ("bsd,de->be", "w", {}),  # s is summed over in one operand alone
        ("iid,de->ie", "w", {"d": 4}),  # a diagonal
        ("bid,bijd->bij", "", {}),  # two letters on the right are none on the left
        ("bihd,bjhd->bij", "", {}),  # two summed letters, no constant
    ],
)
def test_leaves_alone(equation: str, constant: str, sizes: dict[str, object]) -> None:
    leave_alone(RewriteEinsum(), einsum(equation, constant=constant, sizes=sizes))


def test_leaves_alone_what_is_broadcast() -> None:
    model = model_of(
        'g (float[B,1] x, float[4,3] w) => (float[B,3] y) { y = Einsum <equation = "bd,de->be"> (x, w) }', weights="w"
    )
    leave_alone(RewriteEinsum(), model)


@pytest.mark.parametrize("equation", ["...d,de->...e", "bd->db"])
def test_leaves_alone_other_equations(equation: str) -> None:
    second = ", w" if "," in equation else ""
    text = f'g (float[B,4] x, float[4,3] w) => (float[B,M] y) {{ y = Einsum <equation = "{equation}"> (x{second}) }}'
    leave_alone(RewriteEinsum(), model_of(text, weights="w"))


def test_keeps_the_name_and_a_weight_that_fits() -> None:
    model = einsum("bsd,de->bse", constant="w")
    weight = model.graph.initializers["w"].const_value
    RewriteEinsum()(model)
    (node,) = model.graph
    assert (node.name, node.inputs[1].name) == ("product", "w")  # type: ignore[union-attr]
    assert model.graph.initializers["w"].const_value is weight


def test_the_weight_is_read_when_it_is_written() -> None:
    model = einsum("bsd,ed->bse", constant="w")
    tensor = model.graph.initializers["w"].const_value
    RewriteEinsum()(model)
    node = model.graph.node("product")
    assert isinstance(node.inputs[1].const_value, ir.LazyTensor)  # type: ignore[union-attr]
    assert np.array_equal(node.inputs[1].const_value.numpy(), tensor.numpy().T)  # type: ignore[union-attr]
