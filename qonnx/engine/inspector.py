"""Reads what TensorRT's engine inspector says of an engine that was built on this machine's GPU.

The JSON is that of `IEngineInspector` with detailed verbosity, TensorRT 8.6 and later: per layer Name, LayerType,
Inputs and Outputs with their "Format/Datatype" in words, Weights and Bias with their Type, and since 8.6 Metadata with
the names of the ONNX nodes. Where there is no metadata, the layer's own name is made of the nodes that it fuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from qonnx.engine.listing import EngineLayer

_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]*)\]")
_WRAPPED = re.compile(r"^(?:PWN|\{ForeignNode|Reformatting CopyNode)\W*|[)\]}]+$")
# In words of TensorRT 8 and 10; the longer ones first.
_TYPES = (
    ("BFloat16", ir.DataType.BFLOAT16),
    ("BF16", ir.DataType.BFLOAT16),
    ("FP16", ir.DataType.FLOAT16),
    ("Half", ir.DataType.FLOAT16),
    ("FP32", ir.DataType.FLOAT),
    ("Float", ir.DataType.FLOAT),
    ("UInt8", ir.DataType.UINT8),
    ("Int8", ir.DataType.INT8),
    ("Int4", ir.DataType.INT4),
    ("FP8", ir.DataType.FLOAT8E4M3FN),
    ("FP4", ir.DataType.FLOAT4E2M1),
    ("Int32", ir.DataType.INT32),
    ("Int64", ir.DataType.INT64),
    ("Bool", ir.DataType.BOOL),
)


def parse_inspection(text: str) -> tuple[EngineLayer, ...]:
    r"""The layers in order of execution.

    >>> text = '''{"Layers": [{"Name": "fc", "LayerType": "gemm",
    ...   "Inputs": [{"Format/Datatype": "Row major Int8 format"}],
    ...   "Outputs": [{"Format/Datatype": "Row major linear FP16 format"}], "Weights": {"Type": "Int8", "Count": 4},
    ...   "Metadata": "[ONNX Layer: fc]\\u001e[ONNX Layer: x_DQ]"}]}'''
    >>> (layer,) = parse_inspection(text)
    >>> layer.inputs, layer.constants, layer.outputs, layer.onnx_layers
    ((INT8,), (INT8,), (FLOAT16,), ('fc', 'x_DQ'))
    """
    layers = json.loads(text).get("Layers", []) if text else []
    return tuple(_layer(entry) for entry in layers if isinstance(entry, dict))  # only names: built without details


def _layer(entry: Mapping[str, Any]) -> EngineLayer:
    name = str(entry.get("Name", ""))
    held = [entry[key].get("Type", "") for key in ("Weights", "Bias") if isinstance(entry.get(key), dict)]
    held += [constant.get("Format/Datatype", "") for constant in entry.get("Constants", ())]
    return EngineLayer(
        name=name,
        type=str(entry.get("ParameterType") or entry.get("LayerType", "")).lower(),
        inputs=_types(entry.get("Inputs", ())),
        constants=tuple(map(_type, held)),
        outputs=_types(entry.get("Outputs", ())),
        onnx_layers=tuple(_ONNX_LAYER.findall(str(entry.get("Metadata", "")))) or _fused(name),
    )


def _types(tensors: Iterable[Mapping[str, Any]]) -> tuple[ir.DataType, ...]:
    return tuple(_type(str(tensor.get("Format/Datatype") or tensor.get("Datatype", ""))) for tensor in tensors)


def _type(words: str) -> ir.DataType:
    """The type that a description names.

    >>> _type("Thirty-two wide channel vectorized row major Int8 format"), _type("Row major linear FP32"), _type("")
    (INT8, FLOAT, UNDEFINED)
    """
    return next((dtype for word, dtype in _TYPES if word in words), ir.DataType.UNDEFINED)


def _fused(name: str) -> tuple[str, ...]:
    """The nodes in a name such as `Conv_12 + PWN(Clip_16)`.

    >>> _fused("features.0.weight + QuantizeLinear_8 + Conv_12 + PWN(Clip_16)")
    ('features.0.weight', 'QuantizeLinear_8', 'Conv_12', 'Clip_16')
    """
    return tuple(_WRAPPED.sub("", part.strip()) for part in name.split(" + "))
