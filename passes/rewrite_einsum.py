"""Writes an Einsum that is a matrix product as MatMul, which every runtime can run on integers.

The letters of `ab,bc->ac` fall into four groups: batch (in both operands and in the result), summed (in both, not in
the result), left and right (in one operand and in the result). Transposed to

    [batch ..., left ..., summed] x [batch ..., summed, right]

it is a MatMul, which repeats the second operand over letters left but the last one: these go in front of the batch. A
constant operand without batch letters is put right, and in memory [summed, right], by rewriting the constant; where it
has several letters in a group, those of the other operand are joined by Reshape.

Leaves alone

* one operand, or more than two; an ellipsis; a letter twice in one operand; a letter summed over in one operand alone;
* no summed letter: an outer or an elementwise product;
* two activations, or a constant with batch letters: more than one letter right or summed, or none in a group;
* sizes that are known and differ, which would be broadcast. Of sizes that are not known ONNX Runtime's Einsum would
  broadcast a 1, which MatMul refuses where it is summed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qonnx.graph import Names, is_float, is_initializer


@dataclass(frozen=True)
class RewriteEinsum(ir.passes.InPlacePass):
    """See the module docstring."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites every Einsum of the main graph that is a matrix product."""
        names = Names(model)
        modified = False
        for node in list(model.graph):
            if node.op_type == "Einsum" and node.domain == "" and (product := _product(node)) is not None:
                _rewrite(node, product, names)
                modified = True
        return ir.passes.PassResult(model, modified)


@dataclass(frozen=True)
class _Product:
    """A matrix product in letters.

    Attributes:
        left: the first operand.
        right: the second, a constant without batch letters where there is one.
        left_term: the letters of the first operand.
        right_term: those of the second.
        result: those of the result.
        batch: letters of both operands and the result.
        rows: letters of the first operand and the result; the second is repeated over all but the last of them.
        summed: letters of both operands alone, in the order of the first.
        columns: letters of the second operand and the result, in the order of the result.
        sizes: of the letters of a constant operand; empty for two activations.
    """

    left: ir.Value
    right: ir.Value
    left_term: str
    right_term: str
    result: str
    batch: str
    rows: str
    summed: str
    columns: str
    sizes: dict[str, int]


def _product(node: ir.Node) -> _Product | None:
    terms = _terms(node)
    left, right = node.inputs[0], node.inputs[1] if len(node.inputs) == 2 else None
    if terms is None or left is None or right is None or not is_float(left) or not _alike(left, right, *terms[:2]):
        return None
    left_term, right_term, result = terms
    if is_initializer(left) and not is_initializer(right):
        left, right, left_term, right_term = right, left, right_term, left_term
    both = set(left_term) & set(right_term)
    batch = "".join(letter for letter in result if letter in both)
    rows = "".join(letter for letter in result if letter in left_term and letter not in both)
    columns = "".join(letter for letter in result if letter in right_term and letter not in both)
    summed = "".join(letter for letter in left_term if letter in both and letter not in result)
    if set(result) | set(summed) != set(left_term) | set(right_term) or not summed:
        return None
    constant = is_initializer(right) and not batch and right.shape is not None
    if not constant and len(rows) == 1 < len(columns):  # what is repeated stands on the right
        left, right, left_term, right_term, rows, columns = right, left, right_term, left_term, columns, rows
    if not constant and not (rows and len(columns) == len(summed) == 1):
        return None
    sizes = dict(zip(right_term, right.shape.numpy(), strict=True)) if constant and right.shape is not None else {}
    return _Product(left, right, left_term, right_term, result, batch, rows, summed, columns, sizes)


def _terms(node: ir.Node) -> tuple[str, str, str] | None:
    """The letters of two operands and the result, or None for what is never a matrix product."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    operands, arrow, result = equation.partition("->")
    terms = operands.split(",")
    if len(terms) != 2 or not (terms[0] + terms[1]).isalpha():
        return None
    if not arrow:  # what occurs once, in alphabetical order
        result = "".join(sorted(letter for letter in set(operands) - {","} if operands.count(letter) == 1))
    if not result.isalpha() or any(len(set(term)) < len(term) for term in (*terms, result)):
        return None
    return terms[0], terms[1], result


def _alike(left: ir.Value, right: ir.Value, left_term: str, right_term: str) -> bool:
    """Whether no letter is known to stand for two sizes, and the ranks are those of the equation."""
    sizes: dict[str, int] = {}
    for value, term in ((left, left_term), (right, right_term)):
        if value.shape is None or len(value.shape) != len(term):
            return False
        for letter, size in zip(term, value.shape, strict=True):
            if isinstance(size, int) and sizes.setdefault(letter, size) != size:
                return False
    return True


def _rewrite(node: ir.Node, product: _Product, names: Names) -> None:
    nodes: list[ir.Node] = []
    origin = {**node.metadata_props, "qonnx.pass": "RewriteEinsum"}

    def add(op: str, inputs: Sequence[ir.Value], name: str = "", **attributes: list[int]) -> ir.Value:
        label = name or names.fresh(f"{node.name}_{op}")
        nodes.append(ir.node(op, inputs, attributes=attributes, name=label, metadata_props=origin))
        return nodes[-1].outputs[0]

    def arranged(value: ir.Value, have: str, want: str) -> ir.Value:
        return value if have == want else add("Transpose", [value], perm=[have.index(letter) for letter in want])

    def reshaped(value: ir.Value, sizes: list[int]) -> ir.Value:
        shape = ir.tensor(np.array(sizes, np.int64), name=names.fresh(f"{node.name}_shape"))
        return add("Reshape", [value, _initializer(node, shape)])

    outer = product.rows[:-1] + product.batch + product.rows[-1:]
    left = arranged(product.left, product.left_term, outer + product.summed)
    if product.sizes:
        if len(product.summed) > 1:
            left = reshaped(left, [0] * len(product.rows) + [_size(product, product.summed)])
        right = _matrix(node, product, names)
    else:
        right = arranged(product.right, product.right_term, product.batch + product.summed + product.columns)
    result = add("MatMul", [left, right], name=node.name or names.fresh("Einsum"))
    if product.sizes and len(product.columns) != 1:
        result = reshaped(result, [0] * len(product.rows) + [product.sizes[letter] for letter in product.columns])
    result = arranged(result, outer + product.columns, product.result)
    graph = node.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [result])


def _size(product: _Product, letters: str) -> int:
    return math.prod(product.sizes[letter] for letter in letters)


def _matrix(node: ir.Node, product: _Product, names: Names) -> ir.Value:
    """The constant operand as [summed, columns]; itself where it is that already."""
    order, tensor = product.summed + product.columns, product.right.const_value
    if product.right_term == order and len(product.summed) == len(product.columns) == 1:
        return product.right
    assert tensor is not None
    axes = [product.right_term.index(letter) for letter in order]
    shape = (_size(product, product.summed), _size(product, product.columns))

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(axes).reshape(shape)), dtype=tensor.dtype)

    name = names.fresh(f"{product.right.name}_matrix")
    return _initializer(node, ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=ir.Shape(shape), name=name))


def _initializer(node: ir.Node, tensor: ir.TensorProtocol) -> ir.Value:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value
