"""The rules E1 to E14: what TensorRT refuses, and what it silently computes differently.

Each rule looks at one node. "Parser" and "builder" below are those of TensorRT-RTX 1.7, whose ONNX parser TensorRT 10
and 11 share; "header" is NvInfer.h of TensorRT 11.1, IQuantizeLayer and IDequantizeLayer.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qonnx.graph import FLOAT_TYPES
from qonnx.linter.findings import Finding, Repair, Severity
from qonnx.linter.fixes import bias_repair, scale_repair
from qonnx.linter.grid import regrid_repair
from qonnx.linter.moves import move_repair
from qonnx.linter.retype import retype_repair
from qonnx.linter.view import (
    ONNX_DOMAINS,
    Quantizer,
    Rule,
    Site,
    dequantizer_of,
    is_constant,
    is_op,
    quantizer_of,
    size_of,
    sizes_of,
)
from qonnx.sizes import dynamic_dimensions

_ACCEPTED = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
_READS_UINT8 = frozenset({"Cast", "Equal", "Identity", "Shape", "Size"})
_UNKNOWN_TYPES = frozenset({
    ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64, ir.DataType.STRING,
    ir.DataType.COMPLEX64, ir.DataType.COMPLEX128, ir.DataType.FLOAT8E5M2, ir.DataType.UINT4,
})  # fmt: skip
_HALVES = frozenset({ir.DataType.INT4, ir.DataType.FLOAT4E2M1})

# The smallest compute capability whose tensor cores multiply a type.
_NEEDS_CAPABILITY = {ir.DataType.FLOAT8E4M3FN: (8, 9), ir.DataType.FLOAT4E2M1: (10, 0)}

# What TensorRT's own operators, which NVIDIA's tools write into ONNX, begin with.
_TENSORRT_OPS = {"TRT_FP8": ("float8e4m3fn", (8, 9)), "TRT_MXFP8": ("mxfp8", (10, 0)), "TRT_FP4": ("fp4", (10, 0))}

# Operators of ONNX that the parser does not have, among them all that compute on integers with zero points.
_INTEGER_OPS = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
_MISSING_OPS = _INTEGER_OPS | {
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
    "Col2Im", "Compress", "ConcatFromSequence", "DFT", "DeformConv", "Det", "ImageDecoder", "MaxRoiPool", "MaxUnpool",
    "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement",
    "OptionalHasElement", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase",
    "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
    "StringNormalizer", "StringSplit", "TfIdfVectorizer", "Unique",
}  # fmt: skip

# The parser looks operators up by name alone: these of ONNX Runtime's are also its own.
_CONTRIB_OPS = frozenset({
    "Attention", "DequantizeLinear", "Gelu", "GridSample", "GroupQueryAttention", "MultiHeadAttention", "Pad",
    "QuantizeLinear", "Range", "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "Trilu",
})  # fmt: skip

# Operators all of whose float inputs must have one type.
_ONE_TYPE_OPS = frozenset({
    "Add", "BatchNormalization", "Concat", "Conv", "ConvTranspose", "Div", "Gemm", "InstanceNormalization",
    "LayerNormalization", "MatMul", "Max", "Min", "Mul", "PRelu", "Sub", "Where",
})  # fmt: skip


def e1_zero_point(site: Site) -> Finding | None:
    """E1: every zero point is 0.

    The parser asserts that all elements are zeros; the header says that quantization is symmetric.
    """
    quantizer = _own(site)
    if quantizer is None or quantizer.dtype in (ir.DataType.INT32, None) or _is_bad_type(quantizer):
        return None
    zeros = quantizer.zero_points
    if zeros is None or not np.any(zeros):
        return None
    first = int(zeros.reshape(-1)[np.flatnonzero(zeros.reshape(-1))[0]])
    repair = regrid_repair(quantizer)
    remedy = "quantize with symmetric ranges"
    if repair is Repair.APPROXIMATE:
        remedy += " (no exact repair: another zero point means another scale)"
    return site.error("E1", f"{_named(quantizer)} have zero point {first}, and TensorRT only has 0", remedy, repair)


def e2_type(site: Site) -> Finding | None:
    """E2: codes are int8; int4, float8e4m3fn and float4e2m1 where the device has them.

    The parser cannot import constants of other types: "unsupported datatype", "unsupported input type of UINT8".
    """
    quantizer = _own(site)
    if quantizer is None or quantizer.dtype is None or not _is_bad_type(quantizer):
        return None
    return site.error(
        "E2",
        f"{_named(quantizer)} are {quantizer.dtype.name.lower()}, which TensorRT does not quantize to",
        "quantize to int8 with zero point 0",
        regrid_repair(quantizer),
    )


def e3_unsigned_activation(site: Site) -> Finding | None:
    """E3: activations are signed. Silent.

    The parser warns that UINT8 is for DLA, takes INT8, and clips codes 128 to 255 to 127. A QuantizeLinear with
    neither zero point nor `output_dtype` writes uint8 in ONNX and INT8 in TensorRT, without a warning.
    """
    quantizer = _own(site)
    if quantizer is None or quantizer.dtype is not ir.DataType.UINT8 or quantizer.weight is not None:
        return None
    if quantizer.zero_points is not None and np.any(quantizer.zero_points):
        return None  # E1
    why = "" if quantizer.zero_point is not None else ", since there is no zero point to give them a type"
    return site.error(
        "E3",
        f"{_named(quantizer)} are uint8{why}; TensorRT takes them for int8 and clips 128..255 to 127",
        "quantize to int8 with an int8 zero point of 0",
        regrid_repair(quantizer),
    )


def e4_scale(site: Site) -> Finding | None:
    """E4: every scale is positive and finite.

    The parser asserts that scales are positive, which also refuses NaN. Infinity is silent: every code becomes 0.
    """
    quantizer = _own(site)
    if quantizer is None or quantizer.scales is None:
        return None
    scales = quantizer.scales.reshape(-1).astype(np.float64)
    bad = np.flatnonzero(~((scales > 0) & np.isfinite(scales)))
    if not bad.size:
        return None
    where = f" at index {bad[0]}" if scales.size > 1 else ""
    return site.error(
        "E4",
        f"the scale of {_named(quantizer)} is {scales[bad[0]]:g}{where}",
        "calibrate again; where a range is empty any positive scale will do",
        scale_repair(quantizer),
    )


def e5_zero_point_shape(site: Site) -> Finding | None:
    """E5: the zero point is a constant, and has as many elements as the scale.

    The parser asserts equal volumes. The builder wants an initializer; Cast and Identity of one will do, Unsqueeze of
    one will not.
    """
    quantizer = _own(site)
    if quantizer is None or quantizer.zero_point is None or quantizer.dtype is ir.DataType.INT32:
        return None
    if quantizer.zero_points is None:
        return site.error(
            "E5",
            f"the zero point of {_named(quantizer)} is computed by the graph",
            "store it as an initializer",
        )
    scales, zeros = size_of(quantizer.scale), size_of(quantizer.zero_point)
    if scales is None or zeros is None or scales == zeros:
        return None
    repair = Repair.EXACT if zeros == 1 else Repair.NONE
    message = f"{_named(quantizer)} have {scales} scales and {zeros} zero points"
    return site.error("E5", message, "give each scale its zero point", repair)


def e6_scale_shape(site: Site) -> Finding | None:
    """E6: the scale is a scalar or [1], or has one element per index of an axis that exists.

    The parser asserts each of these; a size that is only known at run time fails too. Blocks are the matter of E13.
    """
    quantizer = _own(site)
    if quantizer is None or quantizer.block_size:
        return None
    shape, data = sizes_of(quantizer.scale), sizes_of(quantizer.data)
    if shape in ((), (1,)) or shape is None:
        return None
    problem = ""
    if None in shape or len(shape) > 1:
        problem = f"a scale of shape {_shown(shape)}"
    elif data is not None and not -len(data) <= quantizer.axis < len(data):
        problem = f"axis {quantizer.axis}, and {len(data)} dimensions"
    elif data is not None and data[quantizer.axis] not in (None, shape[0]):
        problem = f"{shape[0]} scales for {data[quantizer.axis]} elements along axis {quantizer.axis}"
    if not problem:
        return None
    remedy = "give a scalar, or one scale for every index of `axis`"
    return site.error("E6", f"{_named(quantizer)} have {problem}", remedy)


def e7_quantized_bias(site: Site) -> Finding | None:
    """E7: a bias is stored in float.

    The parser refuses a DequantizeLinear that reads INT32. TensorRT adds the bias in float, so that integers gain
    nothing.
    """
    quantizer = site.quantizer
    if quantizer is None or quantizer.quantizes or quantizer.dtype is not ir.DataType.INT32:
        return None
    message = f"bias {quantizer.data.name!r} is quantized to int32"
    return site.error("E7", message, "store it in float", bias_repair(quantizer))


def e8_constant_before_dequantize(site: Site) -> Finding | None:
    """E8: an int8 constant is read by a DequantizeLinear and by nothing else.

    The builder: a quantized constant is only allowed before DQ or a plugin. Any operator between them is refused,
    Identity too.
    """
    node = site.node
    if site.quantizer is not None or node.domain not in ONNX_DOMAINS or _makes_zero_point(node) or e9_operator(site):
        return None
    # Bounds of a Clip and the fill of a Pad become parameters of the layer.
    for value in node.inputs[:1] if is_op(node, frozenset({"Clip", "Pad"})) else node.inputs:
        if value is None or value.dtype not in _ACCEPTED or not is_constant(value):
            continue
        return site.error(
            "E8",
            f"{node.op_type} reads the {value.dtype.name.lower()} constant {value.name!r}, which only a "
            "DequantizeLinear may",
            f"dequantize first, then {node.op_type}",
            move_repair(node),
        )
    return None


def e9_operator(site: Site) -> Finding | None:
    """E9: TensorRT has the operator.

    Found by asking the parser for every operator of ONNX and of ONNX Runtime. It has none that takes zero points
    (QLinear..., ...Integer), and few of ONNX Runtime's own; MatMulNBits is a plugin for FP16 that is not always there.
    """
    node = site.node
    if node.domain in ONNX_DOMAINS and node.op_type in _MISSING_OPS:
        remedy = "quantize in QDQ format" if node.op_type in _INTEGER_OPS else "replace or remove it"
        return site.error("E9", f"TensorRT does not have the operator {node.op_type}", remedy)
    if node.domain == "ai.onnx.ml":
        remedy = "compute it outside of the graph, or write it with ONNX operators"
        return site.error("E9", f"TensorRT has no classical machine learning: {node.op_type} of ai.onnx.ml", remedy)
    if node.domain == "com.microsoft" and node.op_type not in _CONTRIB_OPS:
        message = f"TensorRT does not have ONNX Runtime's operator {node.op_type}"
        remedy = "use ONNX operators: do not optimize the graph for ONNX Runtime before, quantize in QDQ format"
        if node.op_type == "MatMulNBits":
            remedy = "store the weight as int4 with blocks, behind a DequantizeLinear"
        return site.error("E9", message, remedy)
    return None


def e10_float_type(site: Site) -> Finding | None:
    """E10: a DequantizeLinear writes the float type that its reader computes in.

    It writes the type of its scale (of `output_dtype` where given), and strong typing converts nothing: "must have
    same input types", "`input` type is Half but `kernel` is of type Float".
    """
    node = site.node
    if not is_op(node, _ONE_TYPE_OPS):
        return None
    floats = [value for value in node.inputs if value is not None and value.dtype in FLOAT_TYPES]
    types = dict.fromkeys(value.dtype.name.lower() for value in floats if value.dtype is not None)
    dequantized = [value for value in floats if dequantizer_of(value) is not None]
    if len(types) < 2 or not dequantized:
        return None
    found = ", ".join(f"{value.name!r} is {value.dtype.name.lower()}" for value in floats if value.dtype is not None)
    return site.error(
        "E10",
        f"{node.op_type} mixes float types: {found}",
        "give scales the type that the graph computes in",
        retype_repair(node),
    )


def e11_dynamic_inputs(model: ir.Model) -> Iterator[Finding]:
    """E11: the builder knows the range of every dynamic size.

    Without an optimization profile it refuses: "Network has dynamic or shape inputs, but no optimization profile has
    been defined". An input of unknown rank can have no profile: an error. Anything else is a warning, because the
    graph is fine and an argument of the build cures it. The batch has a default there: a name that comes first in an
    input.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    batch = {name for value in inputs for axis, name in dynamic_dimensions(value) if axis == 0}
    asked: set[str] = set()
    for value in inputs:
        if value.shape is None:
            message, remedy = f"input {value.name!r} has no declared rank", "export the model with shapes"
            yield Finding("E11", Severity.ERROR, value.name or "", message, remedy)
            continue
        for axis, name in dynamic_dimensions(value):
            if axis == 0 or name in batch or name in asked:
                continue
            asked.add(name)
            message = f"dimension {name!r} of input {value.name!r} is dynamic"
            argument = f"dims={{{name!r}: (1, 128, 256)}} or --dim {name}=1,128,256"
            remedy = f"give its range when the engine is built: {argument}"
            yield Finding("E11", Severity.WARNING, value.name or "", message, remedy)


def e12_format(site: Site) -> Finding | None:
    """E12: the device has the type.

    The builder refuses FP8 for sm_80, because the model "contains HW-specific datatypes". Tensor cores multiply FP8
    from sm_89 on, and FP4 from sm_100 on.
    """
    quantizer, operator = _own(site), site.node.op_type
    dtype = quantizer.dtype if quantizer is not None else None
    what, name, needed = "", "", (0, 0)
    if quantizer is not None and dtype is not None and dtype in _NEEDS_CAPABILITY:
        what, name, needed = f"{_named(quantizer)} are", dtype.name.lower(), _NEEDS_CAPABILITY[dtype]
    for prefix, (computes_in, capability) in _TENSORRT_OPS.items():
        if operator.startswith(prefix):
            what, name, needed = f"{operator} computes in", computes_in, capability
    if site.capability >= needed:
        return None
    have, want = "".join(map(str, site.capability)), "".join(map(str, needed))
    message = f"{what} {name}, which needs sm_{want}; the target is sm_{have}"
    return site.error("E12", message, f"use int8, or a target of sm_{want} or later")


def e13_blocks(site: Site) -> Finding | None:
    """E13: int4 is for weights, and blocks cut one of the last two axes evenly.

    The parser asserts an even number of 4-bit elements, whole blocks, one blocked axis, and that it is the last or the
    one before. Silent: it derives the size of a block from the shapes and never reads `block_size`, so that a short
    last block moves every boundary; and int4 activations build, although the header knows INT4 as a weight type only.
    """
    quantizer = _own(site)
    if quantizer is None:
        return None
    problem = _bad_blocks(quantizer) if quantizer.block_size else ""
    if quantizer.dtype is ir.DataType.INT4 and quantizer.weight is None:
        problem = "are an activation, and int4 is for weights"
    elif quantizer.dtype is ir.DataType.INT4 and site.opset < 21:
        problem = f"are int4, which came with opset 21; the model has {site.opset}"
    elif quantizer.dtype in _HALVES and (size_of(quantizer.data) or 0) % 2:
        problem = f"have an odd number of elements, {_shown(sizes_of(quantizer.data) or ())}"
    if not problem:
        return None
    remedy = "use int4 for weights at opset 21, with a block size that divides the summed axis, or int8 per channel"
    return site.error("E13", f"{_named(quantizer)} {problem}", remedy)


def e14_type(site: Site) -> Finding | None:
    """E14: TensorRT has the type; it has uint8 for inputs that are cast at once, and for outputs that are.

    The parser cannot convert other types: "failed to convert ONNX date type", "first input has type UInt8". Codes of
    Q/DQ are the matter of E2 and E3.
    """
    node = site.node
    if site.quantizer is not None or node.domain not in ONNX_DOMAINS or _makes_zero_point(node) or e9_operator(site):
        return None
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype in _UNKNOWN_TYPES:
            message = f"{value.name!r} is {value.dtype.name.lower()}, a type that TensorRT does not have"
            numeric = value.dtype is not ir.DataType.STRING
            remedy = "use int32, int64 or float, also for inputs" if numeric else "compute it outside of the graph"
            return site.error("E14", message, remedy)
    for index, value in enumerate(node.inputs if node.op_type not in _READS_UINT8 else ()):
        if value is None or value.dtype is not ir.DataType.UINT8 or not value.is_graph_input():
            continue
        if (node.op_type, index) == ("CastLike", 0):
            continue
        message = f"{node.op_type} reads {value.name!r}, which is uint8: TensorRT has a Cast for that and little else"
        return site.error("E14", message, f"cast to float first, then {node.op_type}")
    written = node.outputs[0] if node.op_type in ("Cast", "Identity") else None
    if written is not None and written.dtype is ir.DataType.UINT8 and not written.is_graph_output():
        message = f"{node.op_type} makes {written.name!r}, which is uint8: TensorRT has it for inputs and outputs only"
        return site.error("E14", message, "cast to int32 instead" if node.op_type == "Cast" else "remove the Identity")
    return None


def _bad_blocks(quantizer: Quantizer) -> str:
    data, scale, axis = sizes_of(quantizer.data), sizes_of(quantizer.scale), quantizer.axis
    if data is None or scale is None:
        return ""
    if len(data) != len(scale) or not -len(data) <= axis < len(data):
        return f"have shape {_shown(data)}, scales of shape {_shown(scale)} and blocks along axis {axis}"
    axis %= len(data)
    if axis < len(data) - 2:
        return f"have blocks along axis {axis}; TensorRT has them along the last two axes"
    others = [index for index in range(len(data)) if index != axis and data[index] != scale[index]]
    if others:
        return f"have blocks along two axes: scales of shape {_shown(scale)} for {_shown(data)}"
    length, blocks = data[axis], scale[axis]
    if length is not None and blocks is not None and length != blocks * quantizer.block_size:
        return f"have {length} elements along axis {axis}, not {blocks} whole blocks of {quantizer.block_size}"
    return ""


def _own(site: Site) -> Quantizer | None:
    """The Q/DQ node, unless its parameters are the matter of the node before."""
    return None if site.quantizer is None or site.quantizer.mirrors else site.quantizer


def _makes_zero_point(node: ir.Node) -> bool:
    """Whether a Q/DQ node reads what this one writes as its zero point: the matter of E5."""
    return any(usage.idx == 2 and quantizer_of(usage.node) for value in node.outputs for usage in value.uses())


def _is_bad_type(quantizer: Quantizer) -> bool:
    if quantizer.dtype is ir.DataType.UINT8:
        return quantizer.weight is not None
    return quantizer.dtype not in _ACCEPTED | {ir.DataType.INT32, None}


def _named(quantizer: Quantizer) -> str:
    return f"the codes {quantizer.codes.name!r}"


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{','.join('?' if size is None else str(size) for size in shape)}]"


ERRORS: tuple[Rule, ...] = (
    e1_zero_point,
    e2_type,
    e3_unsigned_activation,
    e4_scale,
    e5_zero_point_shape,
    e6_scale_shape,
    e7_quantized_bias,
    e8_constant_before_dequantize,
    e9_operator,
    e10_float_type,
    e12_format,
    e13_blocks,
    e14_type,
)
