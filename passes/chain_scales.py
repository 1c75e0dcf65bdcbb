"""Stores the scales of blocks as 8-bit integers under one float a channel: a DequantizeLinear for the scales, too.

    DequantizeLinear(codes, scale, block_size)
    DequantizeLinear(codes, DequantizeLinear(codes of scale, step, axis), block_size)

With 4-bit codes in blocks of 16 that is 4.5 bits a weight instead of 6. Only for scales that
`qonnx.block_scales.integer_scales` made, so that no value changes; float32, of weights.

What reads such weights dequantizes them when it runs: ONNX Runtime has no kernel with two levels of scales, and
TensorRT wants scales that are constants. It saves storage.

Source: Dai et al., VS-Quant: Per-Vector Scaled Quantization, MLSys 2021 (arXiv 2102.04503); the same form is the double
quantization of Dettmers et al., QLoRA, 2023 (arXiv 2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qonnx.block_scales import split_scales
from qonnx.graph import Names, constant, is_initializer, rank
from qonnx.passes.writer import Writer, discard


@dataclass(frozen=True)
class ChainScales(ir.passes.InPlacePass):
    """See the module docstring.

    Attributes:
        bits: of the codes of scales, as given to `integer_scales`.
    """

    bits: int = 8

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the blocked DequantizeLinear nodes of the main graph."""
        names, modified = Names(model), False
        for node in list(model.graph):
            if node.op_type == "DequantizeLinear" and node.domain == "" and is_initializer(node.inputs[0]):
                modified |= _chain(Writer(names, node, "ChainScales"), self.bits)
        return ir.passes.PassResult(model, modified)


def _chain(write: Writer, bits: int) -> bool:
    node, scale = write.node, write.node.inputs[1]
    stored = constant(scale)
    if scale is None or stored is None or scale.dtype != ir.DataType.FLOAT or (rank(scale) or 0) < 2:
        return False
    axis = node.attributes.get_int("axis", 1) % stored.ndim
    channels = 0 if axis != 0 else 1
    found = split_scales(stored, channels, bits)
    if found is None:
        return False
    codes, step = write.constant(found[0], f"{scale.name}_codes"), write.constant(found[1], f"{scale.name}_step")
    chained = write.add("DequantizeLinear", [codes, step], ir.DataType.FLOAT, scale.shape, {"axis": channels})
    node.replace_input_with(1, chained)
    discard(scale)
    return True
