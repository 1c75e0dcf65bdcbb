"""Which layer is to blame: what each quantized layer, alone, does to the outputs.

Every quantized edge gets a switch, so that one session serves all measurements:

    Where(switch, DequantizeLinear(QuantizeLinear(x)), x)

With n quantized layers that costs n + 1 passes over one batch, and no graph is built or loaded twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.attention import MOVES
from qonnx.comparison import difference
from qonnx.graph import Names, constant
from qonnx.linear import CONVOLUTIONS
from qonnx.passes.insert_qdq import InsertQDQ
from qonnx.placement import Edge, written_edges
from qonnx.plan import QuantPlan
from qonnx.runtime import session
from qonnx.targets import target

# On the way from the place where a value is quantized to the layer that needs it.
_LEADS_TO_LAYER = MOVES | {"Cast", "Concat", "DequantizeLinear", "MaxPool", "QuantizeLinear"}


class LayerCost(msgspec.Struct, frozen=True):
    """What one layer does to the outputs when only it is quantized.

    Attributes:
        node: the layer's node name.
        op: its operator.
        path: the path of the module that made it, or "".
        sqnr_db: the lowest signal-to-noise ratio over the floating-point outputs.
    """

    node: str
    op: str
    path: str
    sqnr_db: float


def layer_costs(model: ir.Model, plan: QuantPlan, batch: Mapping[str, npt.NDArray[Any]]) -> tuple[LayerCost, ...]:
    """Measures every quantized layer alone on one batch; the most costly comes first.

    Args:
        model: the prepared float model that the plan was made for; it is not changed.
        plan: the plan whose quantized layers are measured.
        batch: one batch of inputs.
    """
    layers = plan.quantized_layers
    if not layers:
        return ()
    switched, name = _with_switches(model, plan)
    runner = session(switched)
    off = np.zeros(len(layers), bool)
    reference = runner.run({**batch, name: off})
    costs = []
    for index, layer in enumerate(layers):
        switches = off.copy()
        switches[index] = True
        outputs = runner.run({**batch, name: switches})
        ratios = [difference(key, reference[key], outputs[key]).sqnr_db for key in outputs]
        sqnr = min((ratio for ratio in ratios if not math.isnan(ratio)), default=math.inf)
        costs.append(LayerCost(layer.node, layer.op, layer.path, sqnr))
    return tuple(sorted(costs, key=lambda cost: cost.sqnr_db))


def _with_switches(model: ir.Model, plan: QuantPlan) -> tuple[ir.Model, str]:
    """The quantized graph with a boolean input [layers] that turns each layer's quantization on."""
    switched = model.clone()
    graph = switched.graph
    nodes = {node.name: node for node in graph}
    edges = {edge for tensor in (*plan.activations, *plan.weights) for edge in tensor.edges}
    edges |= {bias.edge for bias in plan.biases}
    before = {edge: _read(nodes[edge.node], edge.input) for edge in edges}
    weights = dict(graph.initializers)
    InsertQDQ(plan)(switched)
    for value in weights.values():
        if value.name not in graph.initializers:
            graph.register_initializer(value)
    names = Names(switched)
    switches = ir.Value(
        name=names.fresh("quantized_layers"),
        type=ir.TensorType(ir.DataType.BOOL),
        shape=ir.Shape([len(plan.quantized_layers)]),
    )
    graph.inputs.append(switches)
    layers_of = _layers_of_edges(model.graph, graph, plan, edges)
    for edge in sorted(edges):
        node, original = nodes[edge.node], before[edge]
        quantized = node.inputs[edge.input]
        if quantized is None:
            continue
        if original is None and (bias := constant(quantized)) is not None:  # of a layer that had none
            original = _constant(graph, names.fresh("no_bias"), np.zeros_like(bias))
        if original is None:
            continue
        chosen = original
        if layers_of[edge]:
            switch = _switch(graph, names, switches, layers_of[edge], quantized, original)
            graph.insert_before(node, switch)
            chosen = switch[-1].outputs[0]
        node.replace_input_with(edge.input, chosen)
    return switched, switches.name or ""


def _read(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _layers_of_edges(
    model: ir.Graph, quantized: ir.Graph, plan: QuantPlan, edges: Collection[Edge]
) -> dict[Edge, set[int]]:
    """The layers that each are reason enough to quantize an edge: who needs it, and the convolution that writes it.

    The latter where the target runs a convolution on integers only if it writes integers.
    """
    layer_of = _layer_of_nodes(quantized, plan)
    layers = {edge: {layer_of[edge.node]} if edge.node in layer_of else set[int]() for edge in edges}
    if target(plan.target).quantize_outputs:
        for node in model:
            if node.op_type in CONVOLUTIONS and node.name in layer_of:
                for edge in layers.keys() & set(written_edges(node)[1]):
                    layers[edge].add(layer_of[node.name])
    return layers


def _layer_of_nodes(graph: ir.Graph, plan: QuantPlan) -> dict[str, int]:
    """Which quantized layer is the reason why inputs of a node are quantized, by the name of the node.

    Edges that do not end at a layer end on the way to one (the path of a weight, pools, concatenations), or behind one
    (skip connections, biases, what reads the result of a convolution or of an attention).
    """
    index = {layer.node: number for number, layer in enumerate(plan.quantized_layers)}
    nodes = [node for node in graph if node.name]
    for node in reversed(nodes):
        if node.name not in index and node.op_type in _LEADS_TO_LAYER:
            behind = [index[reader.name] for reader in node.successors() if reader.name in index]
            index.update({node.name or "": behind[0]} if behind else {})
    for node in nodes:
        if node.name not in index:
            before = [index[maker.name] for maker in node.predecessors() if maker.name in index]
            index.update({node.name or "": max(before)} if before else {})
    return index


def _switch(
    graph: ir.Graph, names: Names, switches: ir.Value, layers: Collection[int], quantized: ir.Value, original: ir.Value
) -> list[ir.Node]:
    """The nodes that choose between the quantized and the float value: the former where one of the layers is on."""
    nodes: list[ir.Node] = []
    for layer in sorted(layers):
        number = _constant(graph, names.fresh(f"layer_{layer}"), np.array(layer, np.int64))
        nodes.append(_node(names, "Gather", [switches, number], "switch"))
        if len(nodes) > 1:
            nodes.append(_node(names, "Or", [nodes[-2].outputs[0], nodes[-1].outputs[0]], "switch"))
    return [*nodes, _node(names, "Where", [nodes[-1].outputs[0], quantized, original], "switched")]


def _node(names: Names, op: str, inputs: Sequence[ir.Value], stem: str) -> ir.Node:
    node = ir.node(op, inputs, name=names.fresh(stem))
    node.outputs[0].name = names.fresh(f"{stem}_value")
    return node


def _constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def most_costly(costs: Sequence[LayerCost], reached_db: float, goal_db: float, at_most: int) -> tuple[LayerCost, ...]:
    """The fewest layers to leave in float so that the outputs are expected to reach a goal.

    The noise of the layers is taken to add up, scaled so that all together they make the noise that was measured.

    Args:
        costs: the quantized layers, the most costly first.
        reached_db: the signal-to-noise ratio of the outputs with all of them quantized.
        goal_db: what is wanted.
        at_most: how many may be left at most.

    Returns:
        At least one layer while `at_most` allows it, unless none costs anything.

    Example:
        >>> costs = [LayerCost(name, "MatMul", "", db) for name, db in [("a", 10.0), ("b", 20.0), ("c", 30.0)]]
        >>> [cost.node for cost in most_costly(costs, reached_db=9.5, goal_db=16, at_most=3)]
        ['a']
    """
    noise = [10 ** (-cost.sqnr_db / 10) for cost in costs]
    total = math.fsum(noise)
    if not math.isfinite(total) or not math.isfinite(reached_db):
        return tuple(costs[: min(at_most, sum(share > 1 for share in noise) or 1)]) if at_most > 0 else ()
    wanted = total * 10 ** ((reached_db - goal_db) / 10)
    left: list[LayerCost] = []
    remaining = total
    for cost, share in zip(costs, noise, strict=True):
        if (left and remaining <= wanted) or len(left) >= at_most or share == 0:
            break
        left.append(cost)
        remaining -= share
    return tuple(left)
