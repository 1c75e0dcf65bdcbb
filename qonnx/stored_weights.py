"""A network that computes in float with what the codes of its quantized weights stand for.

It shows what storing weights in few bits does to the results, whatever the type and the runtime: nothing in it needs an
operator, an opset or a kernel for the codes.
"""

from __future__ import annotations

import onnx_ir as ir

from qonnx.graph import Names, float32
from qonnx.numerics import fake_quantize
from qonnx.passes.insert_qdq import parameters
from qonnx.plan import QuantPlan, TensorPlan


def with_stored_weights(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """A copy of a model in which the layers of a plan read the rounded weights.

    Args:
        model: the prepared float model that the plan was made for. Weights that were given other codes than the
            nearest are in it as what these stand for: see `qonnx.weight_rounding.round_weights`.
        plan: its activations are not rounded.
    """
    stored = model.clone()
    names, nodes = Names(stored), {node.name: node for node in stored.graph}
    for tensor in plan.weights:
        old = stored.graph.initializers[tensor.value]
        weight = old.const_value
        assert weight is not None, tensor.value
        value = ir.Value(name=names.fresh(f"{tensor.value}_stored"), type=ir.TensorType(weight.dtype))
        value.shape, value.const_value = ir.Shape(weight.shape.numpy()), _rounded(weight, tensor)
        stored.graph.register_initializer(value)
        for edge in tensor.edges:
            nodes[edge.node].replace_input_with(edge.input, value)
        if not old.uses() and not old.is_graph_output():
            del stored.graph.initializers[tensor.value]
    return stored


def _rounded(weight: ir.TensorProtocol, tensor: TensorPlan) -> ir.LazyTensor:
    scale, zero_point = parameters(tensor, tuple(weight.shape.numpy()))

    def evaluate() -> ir.TensorProtocol:
        values = fake_quantize(float32(weight.numpy()), scale, zero_point, tensor.dtype, tensor.granularity)
        return ir.Tensor(values.astype(weight.dtype.numpy()), dtype=weight.dtype)

    return ir.LazyTensor(evaluate, dtype=weight.dtype, shape=ir.Shape(weight.shape.numpy()), name=tensor.value)
