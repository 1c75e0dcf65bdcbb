"""Edges beyond the operands of products: their results, and what residual connections add.

With these on integers an encoder writes and reads one byte a value between its kernels, at the price of accuracy: the
result of a product is rounded before its bias is added, and what a residual connection carries is rounded again and
again. Queries, keys and values that one tensor is projected to share one scale, so that the three products can be one.

Source: NVIDIA FasterTransformer, INT8 BERT, mode 2.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qonnx.attention import projection
from qonnx.graph import is_float, is_initializer, rank
from qonnx.layers import Edge

Activations = dict[str, set[Edge]]


def add_product_outputs(
    graph: ir.Graph, quantized: set[str], activations: Activations, tie: Callable[[str, str], None]
) -> None:
    """Quantizes what every quantized MatMul with a weight writes, before anything else is done with it.

    Args:
        graph: the main graph.
        quantized: the names of the quantized layers.
        activations: by value the edges to quantize; is added to.
        tie: gives two values one scale.
    """
    projections: dict[ir.Value, str] = {}
    for node in graph:
        if node.name not in quantized or node.op_type != "MatMul" or not _has_weight(node):
            continue
        output, data = node.outputs[0], node.inputs[0]
        uses = list(output.uses())
        if output.is_graph_output() or not uses or any(usage.node.graph is not graph for usage in uses):
            continue
        activations.setdefault(output.name or "", set()).update(
            Edge(usage.node.name or "", usage.idx) for usage in uses
        )
        if data is not None:
            tie(projections.setdefault(data, output.name or ""), output.name or "")


def add_residuals(graph: ir.Graph, quantized: set[str], activations: Activations) -> None:
    """Quantizes what a sum adds to the result of a quantized product.

    Args:
        graph: the main graph.
        quantized: the names of the quantized layers.
        activations: by value the edges to quantize; is added to.
    """
    for node in graph:
        if node.op_type != "Add" or any(value is None or is_initializer(value) for value in node.inputs):
            continue
        made_by = [projection(value) for value in node.inputs]
        branches = [index for index, maker in enumerate(made_by) if maker is not None and maker.name in quantized]
        if not branches:
            continue
        skip = 1 - branches[-1]
        value = node.inputs[skip]
        if value is not None and is_float(value) and (rank(value) or 0) >= 2:
            activations.setdefault(value.name or "", set()).add(Edge(node.name or "", skip))


def _has_weight(node: ir.Node) -> bool:
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    return is_initializer(weight) or (producer is not None and is_initializer(producer.inputs[0]))
