"""The rules W1 to W13: what TensorRT runs in float, with extra kernels, or with avoidable error.

Each rule looks at one node. "Runs in float" was seen in the layer listing of TensorRT-RTX 1.7 for sm_80; where another
source is named, this compiler did not tell the difference. "Guide" is NVIDIA's chapter on explicit quantization.
"""

from __future__ import annotations

import onnx_ir as ir

from qonnx.attention import CUTS, is_probability, projection
from qonnx.linear import CONVOLUTIONS
from qonnx.linter.findings import Finding
from qonnx.linter.fixes import clip_bounds, float_operands_repair, repeated_repair, stored_float_repair
from qonnx.linter.products import (
    dequantizer_behind,
    is_quantized_convolution,
    operands_of,
    output_axis,
    per_axis_weight,
    thin_convolution,
    thin_matrix,
)
from qonnx.linter.view import (
    PRODUCTS,
    Quantizer,
    Rule,
    Site,
    dequantizer_of,
    is_constant,
    is_op,
    name_of,
    quantizer_of,
    readers,
    same_parameters,
    same_scale,
    source_of,
)

# Weight formats that TensorRT dequantizes in front of a float product: there, only the weight is quantized.
_WEIGHT_ONLY = frozenset({ir.DataType.INT4, ir.DataType.FLOAT4E2M1})

_NORMALIZATIONS = frozenset({
    "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax",
})  # fmt: skip
_FUSED_BEHIND = frozenset({
    "BatchNormalization", "Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu", "Sigmoid",
    "Swish", "Tanh",
})  # fmt: skip
_ELEMENTWISE = (_FUSED_BEHIND - {"BatchNormalization"}) | {"Abs", "Erf", "Exp", "Gelu", "Neg", "Softplus", "Sqrt"}


def w1_activation_granularity(site: Site) -> Finding | None:
    """W1: an activation has one scale.

    Header: activations cannot be quantized per channel. It compiles, and the product runs in float. Blocks are for
    4-bit and FP8 types.
    """
    quantizer = site.quantizer
    if quantizer is None or not quantizer.quantizes or quantizer.weight is not None or quantizer.per_tensor:
        return None
    if quantizer.scales is None:
        return None  # W6
    kind = "blocks" if quantizer.block_size else f"a scale per index of axis {quantizer.axis}"
    return site.warning(
        "W1",
        f"activation {quantizer.data.name!r} is quantized with {kind}: what multiplies it runs in float",
        "quantize activations per tensor",
    )


def w2_weight_axis(site: Site) -> Finding | None:
    """W2: the scales of a weight run along its output channels.

    Along another axis they cannot be taken out of the sum: the weight is dequantized first, and the product runs in
    float. Output channels are axis 0 of Conv, axis 1 of ConvTranspose, the last axis of a MatMul's second operand, and
    for Gemm axis 1, or 0 with transB.
    """
    node = site.node
    if not is_op(node, PRODUCTS):
        return None
    for index in (0, 1):
        found = per_axis_weight(node.inputs[index] if index < len(node.inputs) else None)
        if found is None:
            continue
        quantizer, axis, rank = found
        expected = output_axis(node, index, rank)
        if expected is not None and axis != expected:
            return site.warning(
                "W2",
                f"the scales of weight {quantizer.data.name!r} run along axis {axis} of what {node.op_type} reads, "
                f"and its output channels along axis {expected}: it runs in float",
                "quantize the weight per output channel",
            )
    return None


def w3_one_operand(site: Site) -> Finding | None:
    """W3: both operands of a product are quantized, or neither.

    With one of them it multiplies in float (guide: insert Q/DQ at both inputs). A weight alone in INT8 only saves
    memory; int4 is made for that, and is no finding. Nor are the values of an attention in float that are one part of
    what a quantized projection makes: rounded, they keep the compiler from cutting the projection up into float
    products; nor the result of an attention, which is one kernel on integers only where that is rounded, too.
    """
    node = site.node
    operands = operands_of(node)
    if operands is None:
        return None
    quantized = [operand is not None for operand in operands]
    if all(quantized) or not any(quantized) or any(_is_weight_only(operand) for operand in operands):
        return None
    bare = node.inputs[quantized.index(False)]
    if _behind_elementwise(bare) is not None:
        return None  # W4
    if any(_is_rounded_for_its_producer(operand, bare) for operand in operands):
        return None
    if any(operand is not None and operand.weight is not None for operand in operands):
        return site.warning(  # the same remedy for all layers: a weight-only file is one finding for who reads it
            "W3",
            f"only the weight of {node.op_type} is quantized: it multiplies in float",
            "quantize what these read, too, unless smaller weights are all that is wanted",
        )
    return site.warning(
        "W3",
        f"only one operand of {node.op_type} is quantized: it multiplies in float",
        f"quantize {bare.name if bare is not None else ''!r} too, or leave both in float",
    )


def _is_rounded_for_its_producer(operand: Quantizer | None, bare: ir.Value | None) -> bool:
    """Whether an operand is one part of what a product on integers made, or the result of an attention on integers."""
    quantizer = None if operand is None else quantizer_of(operand.data.producer())
    if quantizer is None:
        return False
    cut, made_by = quantizer.data.producer(), projection(quantizer.data)
    factors = None if made_by is None else operands_of(made_by)
    if factors is None or any(factor is None for factor in factors):
        return False
    rounded = [quantizer_of(factor.data.producer()) for factor in factors if factor is not None]
    attends = any(is_probability(each.data) for each in rounded if each is not None)
    return attends or (is_op(cut, CUTS) and is_probability(bare))


def w4_operator_between(site: Site) -> Finding | None:
    """W4: nothing that computes stands between a DequantizeLinear and the product that it is for.

    DQ -> Relu -> MatMul runs in float. Operators that only move elements may stand there.
    """
    node = site.node
    operands = operands_of(node)
    if operands is None or any(_is_weight_only(operand) for operand in operands):
        return None
    for index, operand in enumerate(operands):
        between = _behind_elementwise(node.inputs[index]) if operand is None else None
        if between is not None and (operands[1 - index] is not None or _behind_elementwise(node.inputs[1 - index])):
            return site.warning(
                "W4",
                f"{between.op_type} {name_of(between)!r} stands between DequantizeLinear and {node.op_type}: "
                "it multiplies in float",
                f"quantize behind {between.op_type}",
            )
    return None


def w5_two_scales(site: Site) -> Finding | None:
    """W5: codes are read with the parameters that they were written with, and are not rounded twice.

    TensorRT accepts a DequantizeLinear with another scale than its QuantizeLinear and multiplies by the quotient. Two
    pairs in a row are both executed; with equal parameters the second does nothing.
    """
    quantizer = site.quantizer
    if quantizer is None:
        return None
    before = quantizer_of(quantizer.data.producer())
    if before is None or before.quantizes == quantizer.quantizes or before.scales is None or quantizer.scales is None:
        return None
    if before.quantizes:
        if same_scale(before, quantizer):
            return None
        message = f"the codes {quantizer.codes.name!r} are written with one scale and read with another"
        return site.warning("W5", message, "give the pair one scale")
    twice = "again with the same scale" if same_parameters(before, quantizer) else "again with another scale"
    message = f"{quantizer.data.name!r} is quantized {twice}"
    return site.warning("W5", message, "quantize once", repeated_repair(quantizer))


def w6_computed_scale(site: Site) -> Finding | None:
    """W6: scales are constants.

    A scale that is fed or computed (a maximum over 127) compiles, and the product runs in float: TensorRT has no
    dynamic INT8 quantization for ONNX graphs.
    """
    quantizer = site.quantizer
    if quantizer is None or quantizer.scales is not None or quantizer.mirrors:
        return None
    message = f"the scale of {quantizer.codes.name!r} is not a constant: what multiplies it runs in float"
    return site.warning("W6", message, "calibrate, and store the scale")


def w7_residual(site: Site) -> Finding | None:
    """W7: where a convolution and an Add become one kernel, the other summand is on integers too.

    Guide: quantize the residual input of skip connections; otherwise the convolution writes float, and the
    QuantizeLinear behind the Add is a kernel of its own. The convolution's own output is left alone.
    """
    node = site.node
    if not is_op(node, frozenset({"Add"})) or len(node.inputs) != 2 or not _is_quantized_behind(node.outputs[0]):
        return None
    fused = [is_quantized_convolution(value) for value in node.inputs]
    if not any(fused):
        return None
    last = len(fused) - 1 - fused[::-1].index(True)
    skip = node.inputs[1 - last]
    if skip is None or is_constant(skip) or dequantizer_behind(skip) is not None:
        return None
    return site.warning(
        "W7",
        f"the skip connection {skip.name!r} is in float, so that the convolution before cannot write integers",
        f"quantize {skip.name!r} where Add reads it",
    )


def w8_before_activation(site: Site) -> Finding | None:
    """W8: a product is quantized behind its bias, normalization and activation function, which are part of its kernel.

    Guide: do not quantize outputs of weighted operators by default. A pair in between is one more rounding, and keeps
    the two from being one kernel.
    """
    quantizer = site.quantizer
    if quantizer is None or not quantizer.quantizes:
        return None
    product = quantizer.data.producer()
    if product is None or operands_of(product) is None:
        return None
    behind = [node for codes in readers(quantizer.output) for node in readers(codes.outputs[0])]
    if not behind or not all(is_op(node, _FUSED_BEHIND) or _is_bias(node) for node in behind):
        return None
    return site.warning(
        "W8",
        f"the output of {product.op_type} {name_of(product)!r} is quantized before {behind[0].op_type}",
        f"quantize behind {behind[0].op_type}",
    )


def w9_before_normalization(site: Site) -> Finding | None:
    """W9: normalizations, Softmax and Gelu read float.

    They compute in float, so that a pair before them is work and error for nothing. Behind them it is free: their
    kernel writes the integers. A LayerNormalization behind a convolution is an exception (NVIDIA's own placement).
    """
    node = site.node
    if not is_op(node, _NORMALIZATIONS | {"Gelu"}):
        return None
    for value in node.inputs:
        dequantizer = dequantizer_of(value)
        if dequantizer is None or value is None:
            continue
        first = quantizer_of(dequantizer.data.producer())
        if first is not None and is_op(first.data.producer(), CONVOLUTIONS) and node.op_type == "LayerNormalization":
            continue
        message = f"{node.op_type} computes in float, and {value.name!r} is quantized for it"
        remedy = (
            "store it in float" if dequantizer.weight is not None else f"remove the Q/DQ pair before {node.op_type}"
        )
        return site.warning("W9", message, remedy, float_operands_repair(node))
    return None


def w10_pooling_and_concat(site: Site) -> Finding | None:
    """W10: average pooling has Q/DQ on both sides, and the inputs of a Concat have the scale of its output.

    Average pooling needs both to run on integers at all (the guide's rule; it ran in float here even so). Integers with
    one scale can be concatenated as they are; otherwise each input is rounded again. MaxPool is fine anywhere.
    """
    node = site.node
    if is_op(node, frozenset({"AveragePool", "GlobalAveragePool"})):
        if dequantizer_of(node.inputs[0]) is None or _is_quantized_behind(node.outputs[0], steps=0):
            return None
        message = f"{node.op_type} reads dequantized values and writes float: it runs in float"
        return site.warning("W10", message, "quantize its output too, or remove the pair before it")
    if not is_op(node, frozenset({"Concat"})):
        return None
    after = [found for reader in readers(node.outputs[0]) if (found := quantizer_of(reader)) is not None]
    before = [dequantizer_of(value) for value in node.inputs]
    quantized = [found for found in before if found is not None]
    if not after or not quantized:
        return None
    if len(quantized) == len(before) and all(same_scale(after[0], found) for found in quantized):
        return None
    message = "the inputs of Concat do not all have the scale of its output: they are rounded again"
    return site.warning("W10", message, "give all inputs and the output one scale")


def w11_tiny(site: Site) -> Finding | None:
    """W11: products too thin for the 16 wide tiles of integer tensor cores stay in float.

    The widths under which NVIDIA's own tool leaves them alone: products of two activations of which one has one row,
    and of matrices with a side below 16; convolutions with both channel counts below 16, or one and neither a multiple
    of 8; groups of channels whose number is no multiple of 8.
    """
    node = site.node
    operands = operands_of(node)
    if operands is None or None in operands:
        return None
    why = thin_convolution(node) if is_op(node, CONVOLUTIONS) else thin_matrix(node)
    if not why:
        return None
    return site.warning("W11", f"{node.op_type} {why}: nothing gained from integers", "leave it in float")


def w12_weight_range(site: Site) -> Finding | None:
    """W12: weights are stored as integers, and the range of INT8 is -128 to 127.

    Guide: TensorRT's INT8 has all 256 codes. Tools that leave out -128 put a Clip between QuantizeLinear and
    DequantizeLinear: one more operator for what rounding with a scale of max / 127 does anyway. A QuantizeLinear that
    reads a float constant compiles to the same engine as stored integers; the file is four times as large.
    """
    quantizer = site.quantizer
    if quantizer is not None and quantizer.quantizes and is_constant(quantizer.data):
        message = f"weight {quantizer.data.name!r} is stored in float and quantized by the graph"
        return site.warning("W12", message, "store its codes", stored_float_repair(quantizer))
    node = site.node
    first = quantizer_of(node.inputs[0].producer()) if is_op(node, frozenset({"Clip"})) and node.inputs[0] else None
    if first is None or not first.quantizes or is_constant(first.data):
        return None
    bounds = clip_bounds(node)
    shown = f"to {bounds[0].item()}..{bounds[1].item()} " if bounds is not None else ""
    message = f"Clip {shown}stands between QuantizeLinear and DequantizeLinear; INT8 is -128..127"
    return site.warning("W12", message, "remove it")


def w13_graph_ends(site: Site) -> Finding | None:
    """W13: what enters and leaves the graph is meant to be rounded.

    TensorRT accepts a DequantizeLinear as the last node, and integers as input or output. The first rounds a result
    for nothing, and with the others the caller has to know the scale.
    """
    quantizer = site.quantizer
    if quantizer is None:
        return None
    if not quantizer.quantizes and quantizer.output.is_graph_output() and not is_constant(quantizer.data):
        message = f"output {quantizer.output.name!r} is rounded to {_lower(quantizer)} for nothing"
        return site.warning("W13", message, "remove the last Q/DQ pair")
    if quantizer.codes.is_graph_output() or quantizer.codes.is_graph_input():
        side = "output" if quantizer.quantizes else "input"
        message = f"{side} {quantizer.codes.name!r} is {_lower(quantizer)}"
        return site.warning("W13", message, "hand its scale to the caller, or make it float")
    return None


def _is_weight_only(operand: Quantizer | None) -> bool:
    return operand is not None and operand.dtype in _WEIGHT_ONLY


def _behind_elementwise(value: ir.Value | None) -> ir.Node | None:
    """The operator that computes a value element by element from dequantized ones."""
    source = source_of(value)
    if source is None or not is_op(source, _ELEMENTWISE):
        return None
    return source if dequantizer_behind(source.inputs[0]) is not None else None


def _is_quantized_behind(value: ir.Value, steps: int = 2) -> bool:
    """Whether all that reads a value is a QuantizeLinear, at most so many activation functions later."""
    following = readers(value)
    if not following or value.is_graph_output():
        return False
    return all(
        ((found := quantizer_of(node)) is not None and found.quantizes)
        or (steps > 0 and is_op(node, _FUSED_BEHIND) and _is_quantized_behind(node.outputs[0], steps - 1))
        for node in following
    )


def _is_bias(node: ir.Node) -> bool:
    """Whether the node adds a constant."""
    return is_op(node, frozenset({"Add"})) and any(
        value is not None and (is_constant(value) or ((found := dequantizer_of(value)) and found.weight is not None))
        for value in node.inputs
    )


def _lower(quantizer: Quantizer) -> str:
    return "" if quantizer.dtype is None else quantizer.dtype.name.lower()


WARNINGS: tuple[Rule, ...] = (
    w1_activation_granularity,
    w2_weight_axis,
    w3_one_operand,
    w4_operator_between,
    w5_two_scales,
    w6_computed_scale,
    w7_residual,
    w8_before_activation,
    w9_before_normalization,
    w10_pooling_and_concat,
    w11_tiny,
    w12_weight_range,
    w13_graph_ends,
)
