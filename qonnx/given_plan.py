"""Layers that a person left in float by a reason in a plan: what is quantized for their sake goes with them."""

from __future__ import annotations

import msgspec
import onnx_ir as ir

from qonnx.layers import is_rounded
from qonnx.placement import edges_of
from qonnx.plan import QuantPlan, TensorPlan
from qonnx.recipe import Recipe
from qonnx.targets import Target


def without_left_layers(plan: QuantPlan, graph: ir.Graph, recipe: Recipe, target: Target) -> QuantPlan:
    """The plan without the edges of layers that got a reason to stay in float by hand: their operands are still there.

    A layer that was in float when the plan was made lacks its weight, or one of two activations. What else it reads
    is rounded because other layers need that, and stays so.

    Args:
        plan: the plan.
        graph: the main graph of what it is for, in normal form.
        recipe: what it wants around quantized layers, such as results of products, stays with these.
        target: the consumer of the quantized graph.
    """
    nodes = {node.name or "": node for node in graph}
    edges = {edge for tensor in (*plan.activations, *plan.weights) for edge in tensor.edges}
    reasons = {layer.node for layer in plan.float_layers}
    left = {name for name in reasons & nodes.keys() if is_rounded(nodes[name], edges)}
    if not left:
        return plan
    recipe = msgspec.structs.replace(recipe, format=plan.format)
    quantized = {layer.node for layer in plan.quantized_layers}
    before = edges_of(graph, quantized | left, recipe, target) | {edge for edge in edges if edge.node in left}
    dropped = before - edges_of(graph, quantized, recipe, target)

    def kept(tensors: tuple[TensorPlan, ...]) -> tuple[TensorPlan, ...]:
        thinned = [
            msgspec.structs.replace(tensor, edges=tuple(edge for edge in tensor.edges if edge not in dropped))
            for tensor in tensors
        ]
        return tuple(new for new, old in zip(thinned, tensors, strict=True) if new.edges or not old.edges)

    return msgspec.structs.replace(
        plan,
        activations=kept(plan.activations),
        weights=kept(plan.weights),
        biases=tuple(bias for bias in plan.biases if bias.node not in left),
    )
