"""Stores the biases of quantized convolutions and Gemms as int32, which ONNX Runtime needs to run them on integers.

    DQ(x), DQ(w) -> Conv(., ., b)      b  ->  DequantizeLinear(round(b / (sx sw)), sx sw)

A bias is added to integer sums in their steps: the product of both scales, per output channel. ONNX Runtime makes a
QLinearConv of a Conv between Q/DQ pairs, or a QGemm of a Gemm, only if the bias is stored like that; with a float bias
it computes in float, and converts to and fro besides. TensorRT on the contrary takes float biases only.

Only when

* the bias is a constant float32 vector, and both operands are integers of at most 8 bits with constant scales;
* a convolution's result is quantized too;
* the codes fit into int32, and are no coarser than a quarter of a step of the result on average, 0.6 in one channel.

Source: the ONNX specification of QLinearConv.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qonnx.graph import Names, rank
from qonnx.passes.integer_products import integers_of, scale_array
from qonnx.passes.requantize import bias_codes, ending_of
from qonnx.passes.writer import Writer, discard


@dataclass(frozen=True)
class QuantizeBiases(ir.passes.InPlacePass):
    """See the module docstring; for graphs that InsertQDQ or another tool has written."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the biases of the main graph."""
        names, modified = Names(model), False
        for node in list(model.graph):
            if node.op_type in ("Conv", "Gemm") and node.domain == "" and len(node.inputs) > 2:
                modified |= _quantize(Writer(names, node, "QuantizeBiases"))
        return ir.passes.PassResult(model, modified)


def _quantize(write: Writer) -> bool:
    node, bias = write.node, write.node.inputs[2]
    left, right, ending = integers_of(node.inputs[0]), integers_of(node.inputs[1]), ending_of(node.outputs[0])
    if bias is None or left is None or right is None or bias.dtype != ir.DataType.FLOAT or rank(bias) != 1:
        return False
    scaled = node.attributes.get_float("alpha", 1.0) != 1 or node.attributes.get_float("beta", 1.0) != 1
    codes = bias_codes(bias, left, right, None if ending is None else ending.scale)
    x, w = scale_array(left), scale_array(right)
    if codes is None or x is None or w is None or x.size > 1 or scaled or (node.op_type == "Conv" and ending is None):
        return False
    scale = np.ascontiguousarray(np.broadcast_to(x * w, codes.shape))
    operands = [write.constant(codes, f"{bias.name}_quantized"), write.constant(scale, f"{bias.name}_scale")]
    node.replace_input_with(2, write.add("DequantizeLinear", operands, ir.DataType.FLOAT, bias.shape, {"axis": 0}))
    discard(bias)
    return True
