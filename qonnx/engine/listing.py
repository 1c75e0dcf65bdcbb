"""Reads the compiler's layer listing, and tells which ONNX nodes it runs on INT8.

One layer a line, as TensorRT-RTX 1.7 prints it with detailed verbosity:

    Name: fc_myl0_1, LayerType: gemm, Inputs: [ { Name: .., Datatype: Int8, .. }], Constants: [ .. ], Outputs: [ .. ],
    TacticName: .., StreamId: 0, Metadata: [ONNX Layer: fc]<unit separator>[ONNX Layer: x_DQ]

One ONNX node is spread over several engine layers: operands are padded, multiplied, and the product is scaled and
gets its bias, and each of these layers names the node. Only the layer that multiplies decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
import onnx_ir as ir

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<rest>.*)"
)
_TYPE = re.compile(r"Datatype: (\w+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)
_TYPES = {
    "Float": ir.DataType.FLOAT,
    "Half": ir.DataType.FLOAT16,
    "BFloat16": ir.DataType.BFLOAT16,
    "Int8": ir.DataType.INT8,
    "UInt8": ir.DataType.UINT8,
    "Int4": ir.DataType.INT4,
    "Int32": ir.DataType.INT32,
    "Int64": ir.DataType.INT64,
    "Bool": ir.DataType.BOOL,
    "FP8": ir.DataType.FLOAT8E4M3FN,
    "FP4": ir.DataType.FLOAT4E2M1,
}


# What multiplies, in the compiler's listing and in the inspector's words.
_PRODUCTS = frozenset(
    {"gemm", "correlation", "deconv", "convolution", "deconvolution", "matrixmultiply", "fullyconnected"}
)


class EngineLayer(msgspec.Struct, frozen=True):
    """One kernel of the engine.

    Attributes:
        name: the compiler's name for it.
        type: the compiler's kind: "gemm", "correlation" (a convolution), "kgen" (generated, mostly pointwise) ...
        inputs: types of the tensors that it reads; UNDEFINED for one that ONNX does not know.
        constants: types of the weights, scales and biases that it holds.
        outputs: types of the tensors that it writes.
        onnx_layers: names of the ONNX nodes that it does, or helps to do. A node without a name is called
            `node_of_` and the name of its first output.
    """

    name: str
    type: str
    inputs: tuple[ir.DataType, ...]
    constants: tuple[ir.DataType, ...]
    outputs: tuple[ir.DataType, ...]
    onnx_layers: tuple[str, ...]


class NodePrecision(msgspec.Struct, frozen=True):
    """How the engine runs one Conv, Gemm or MatMul.

    Attributes:
        node: the ONNX node.
        int8: whether it multiplies INT8 by INT8.
        layer: the engine layer that tells, or None if no layer names the node: it was folded away or never compiled.
    """

    node: str
    int8: bool
    layer: str | None


def parse_listing(text: str) -> tuple[EngineLayer, ...]:
    r"""The layers of a listing in order of execution; lines that describe no layer are passed over.

    >>> line = (
    ...     "Name: fc_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [4,8], Datatype: Int8, Format: Row }], "
    ...     "Constants: [ { Name: w, Dimensions: [8,2], Datatype: Int8, Format: Row }], "
    ...     "Outputs: [ { Name: y, Dimensions: [4,2], Datatype: Float, Format: Row }], TacticName: t, StreamId: 0, "
    ...     "Metadata: [ONNX Layer: fc]\x1f[ONNX Layer: x_DQ]"
    ... )
    >>> (layer,) = parse_listing("Layers:\n" + line)
    >>> layer.type, layer.inputs, layer.outputs, layer.onnx_layers
    ('gemm', (INT8,), (FLOAT,), ('fc', 'x_DQ'))
    """
    layers = []
    for line in text.split("\n"):  # names may hold other separators
        if match := _LAYER.search(line):
            layers.append(
                EngineLayer(
                    name=match["name"],
                    type=match["type"],
                    inputs=_types(match["inputs"]),
                    constants=_types(match["constants"] or ""),
                    outputs=_types(match["outputs"]),
                    onnx_layers=_onnx_layers(match["rest"]),
                )
            )
    return tuple(layers)


def int8_nodes(layers: Iterable[EngineLayer], nodes: Iterable[str]) -> tuple[NodePrecision, ...]:
    """For each Conv, ConvTranspose, Gemm or MatMul node, whether its product runs on INT8.

    Args:
        layers: the layers of the engine.
        nodes: names of ONNX nodes, as the file has them.

    Returns:
        One answer per node, in their order. A node that several layers multiply for is INT8 if all of them are;
        otherwise the answer names the first that is not.
    """
    carriers: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        for name in layer.onnx_layers:
            carriers.setdefault(name, []).append(layer)
    return tuple(_precision(node, carriers.get(node, [])) for node in nodes)


def _precision(node: str, carriers: list[EngineLayer]) -> NodePrecision:
    products = [layer for layer in carriers if _is_product(layer)]
    in_float = [layer for layer in products if not _multiplies_int8(layer)]
    telling = (in_float or products or carriers)[:1]
    return NodePrecision(node=node, int8=bool(products) and not in_float, layer=telling[0].name if telling else None)


def _is_product(layer: EngineLayer) -> bool:
    """Whether the layer multiplies matrices or convolves; otherwise it pads, scales, casts or moves."""
    return layer.type in _PRODUCTS or _is_attention(layer) or _is_fused_product(layer)


def _is_attention(layer: EngineLayer) -> bool:
    """One kernel for softmax(Q K') V."""
    return "_mha_" in layer.name


def _is_fused_product(layer: EngineLayer) -> bool:
    """A kernel generated around one product, named after its steps: `__myl_CastMulFcAdd_..` ("fully connected")."""
    return layer.type == "runtime_fusion" or re.match(r"__myl_(?:[A-Z][a-z]+)*?Fc(?![a-z])", layer.name) is not None


def _multiplies_int8(layer: EngineLayer) -> bool:
    """Whether the operands of the product are INT8 when it multiplies.

    A product reads at least two INT8 operands, inputs or constants; what else it reads is scales, a bias, a residual.
    Attention reads three (Q, K, V), and masks of other types. A generated kernel that casts before it multiplies has
    dequantized: it reads INT8 and multiplies floats, as with weight scales along the wrong axis.
    """
    operands = (layer.inputs + layer.constants).count(ir.DataType.INT8)
    if _is_attention(layer):
        return operands >= 3
    return operands >= 2 and not (_is_fused_product(layer) and "Cast" in layer.name.partition("Fc")[0])


def _types(tensors: str) -> tuple[ir.DataType, ...]:
    return tuple(_TYPES.get(name, ir.DataType.UNDEFINED) for name in _TYPE.findall(tensors))


def _onnx_layers(rest: str) -> tuple[str, ...]:
    metadata = rest.partition("Metadata: ")[2]
    return tuple(match[1] for entry in metadata.split("\x1f") if (match := _ONNX_LAYER.match(entry)))
