"""Declares the opset and the file version that the types and granularities of a plan need, and no more.

    int8, uint8 per tensor           opset 10         float8                       opset 19, ir_version  9
                per axis             opset 13         int4, uint4, int16, uint16   opset 21, ir_version 10
                blocked              opset 21         float4e2m1                   opset 23, ir_version 11
    float16 or bfloat16 operands     opset 19         int2, uint2                  opset 25, ir_version 13

Source: the ONNX specification of QuantizeLinear and DequantizeLinear, and onnx's table of releases.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qonnx.errors import TargetError
from qonnx.graph import FLOAT_TYPES
from qonnx.passes.raise_opset import RaiseOpset
from qonnx.plan import QuantPlan

_SHORT_FLOAT_OPSET = 19
_IR_VERSIONS = {19: 9, 21: 10, 23: 11, 25: 13}


@dataclass(frozen=True)
class AllowTypes(ir.passes.InPlacePass):
    """See the module docstring. To be run before the nodes of the plan are inserted.

    Attributes:
        plan: whose types are to be written.
        opset: what the operators of the format need besides.
    """

    plan: QuantPlan
    opset: int = 1

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Raises both numbers where they are too low.

        Raises:
            ModelError: the graph cannot be converted to that opset.
        """
        tensors = (*self.plan.activations, *self.plan.weights)
        needed = [max(tensor.dtype.opset, tensor.granularity.opset) for tensor in tensors]
        if _computes_in_short_floats(model.graph, {edge.node for tensor in tensors for edge in tensor.edges}):
            needed.append(_SHORT_FLOAT_OPSET)
        raised = RaiseOpset(max(needed, default=1))(model).modified | RaiseOpset(self.opset)(model).modified
        version = max((_IR_VERSIONS.get(tensor.dtype.opset, 0) for tensor in tensors), default=0)
        raised |= version > model.ir_version
        model.ir_version = max(model.ir_version, version)
        return ir.passes.PassResult(model, raised)


def _computes_in_short_floats(graph: ir.Graph, nodes: set[str]) -> bool:
    short = FLOAT_TYPES - {ir.DataType.FLOAT}
    readers = (node for node in graph if node.name in nodes)
    return any(value is not None and value.dtype in short for node in readers for value in node.inputs)


def need_onnxruntime(plan: QuantPlan, what: str) -> None:
    """Refuses to write operators for TensorRT that its importer does not know.

    Raises:
        TargetError: the plan is for another target than ONNX Runtime.
    """
    if not plan.target.startswith("ort-"):
        raise TargetError(f"{what} cannot be imported on target {plan.target}; use format qdq, or target ort-cpu")
