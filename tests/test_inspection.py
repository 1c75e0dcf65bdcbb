"""What the compiler made of each layer: from its listing, from the inspector's JSON, and from engines built here."""

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from qonnx.engine import EngineLayer, EngineReport, build_engine
from qonnx.engine.inspection import NodeInspection, inspect
from qonnx.engine.inspector import parse_inspection
from qonnx.engine.listing import int8_nodes
from qonnx.engine.messages import located, planned_reason
from qonnx.engine.protocol import Refusal
from qonnx.engine_tables import engine_tables
from qonnx.graph import FLOAT_REASON
from tests.test_engine import DIMS, INT8, QUANTIZED, UNQUANTIZED, saved

INT, FLOAT, HALF = ir.DataType.INT8, ir.DataType.FLOAT, ir.DataType.FLOAT16


def model(reason: str = "") -> ir.Model:
    parsed = ir.from_onnx_text(UNQUANTIZED)
    if reason:
        (node,) = (node for node in parsed.graph if node.name == "conv_float")
        node.metadata_props[FLOAT_REASON] = reason
    return parsed


def layer(
    name: str, *nodes: str, kind: str = "gemm", reads: ir.DataType = INT, writes: ir.DataType = FLOAT
) -> EngineLayer:
    return EngineLayer(name, kind, (reads, reads), (FLOAT,), (writes,), nodes)


def entry(layers: list[EngineLayer], node: str, reason: str = "") -> NodeInspection:
    (found,) = (each for each in inspect(model(reason), layers, "a800") if each.node == node)
    return found


def test_a_layer_with_its_neighbours() -> None:
    layers = [
        layer("__myl_ReshTran_1", "matmul_wrong_axis", kind="kgen", reads=INT, writes=INT),
        layer("k1", "matmul_wrong_axis", "others_DQ", "t", writes=HALF),
        layer("__myl_MulAdd_2", "matmul_wrong_axis", kind="kgen", reads=HALF, writes=FLOAT),
    ]
    found = entry(layers, "matmul_wrong_axis")
    assert (found.op, found.planned, found.int8, found.layer) == ("MatMul", True, True, "k1")
    assert (found.reads, found.writes) == (("int8", "float"), ("float16",))
    assert found.fused == ("t",)  # not what quantizes
    assert found.copies == ("__myl_ReshTran_1",)
    assert found.reason == ""


def test_what_is_planned_and_runs_in_float_says_what_is_wrong() -> None:
    found = entry([layer("k", "conv_wrong_axis", reads=FLOAT)], "conv_wrong_axis")
    assert found.planned
    assert not found.int8
    assert found.reason.startswith("W2: ")


def test_what_is_not_planned_says_why() -> None:
    found = entry([layer("k", "conv_float", reads=FLOAT)], "conv_float", reason="too narrow")
    assert not found.planned
    assert found.reason == "too narrow"
    assert not entry([], "matmul_weight_only").planned
    assert entry([], "matmul_weight_only").layer is None


def test_the_table_names_first_what_misses_the_plan() -> None:
    layers = [
        layer("k1", "conv_wrong_axis", reads=FLOAT),
        layer("k2", "conv_float", reads=FLOAT),
        layer("k3", "product_half"),
    ]
    nodes = inspect(model("too narrow"), layers, "a800")
    report = EngineReport("net.plan", 10, 1.0, "tensorrt 10", (8, 0), {}, nodes, tuple(layers), ())
    lines = [line.plain for line in engine_tables(report)]
    assert lines[0] == "net.plan: 1 of 8 convolutions and matrix products run on INT8"
    assert lines[1].startswith("warning: conv_wrong_axis (Conv) is quantized, and runs in float: W2: ")
    table = lines.index("layers, those in float first")
    assert "conv_wrong_axis" in lines[table + 2]
    assert "product_half (MatMul) -> k3" in lines[table + 9]
    assert "  conv_float (Conv): too narrow" in lines
    assert json.loads(report.to_json())["layers"][0]["inputs"] == ["float", "float"]


# In the words of TensorRT 8 and 10.
INSPECTED = json.dumps(
    {
        "Layers": [
            {
                "Name": "QuantizeLinear_2",
                "LayerType": "Reformat",
                "Inputs": [{"Name": "x", "Dimensions": [1, 3], "Format/Datatype": "Row major linear FP32"}],
                "Outputs": [{"Name": "q", "Format/Datatype": "Four wide channel vectorized row major Int8 format"}],
                "ParameterType": "Reformat",
                "Origin": "QDQ",
            },
            {
                "Name": "features.0.0.weight + QuantizeLinear_8 + Conv_12 + PWN(Clip_16)",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "q", "Format/Datatype": "Thirty-two wide channel row major Int8 format"}],
                "Outputs": [{"Name": "y", "Format/Datatype": "Thirty-two wide channel row major FP16 format"}],
                "ParameterType": "Convolution",
                "Weights": {"Type": "Int8", "Count": 864},
                "Bias": {"Type": "Float", "Count": 32},
            },
            {
                "Name": "Reformatting CopyNode for Input Tensor 0 to fc",
                "LayerType": "Reformat",
                "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}],
                "Outputs": [{"Format/Datatype": "Channel major FP16 format"}],
                "Metadata": "[ONNX Layer: fc]",
            },
            {
                "Name": "__myl_Fc_myl0_1",
                "LayerType": "gemm",
                "Inputs": [{"Format/Datatype": "Int8"}],
                "Constants": [{"Format/Datatype": "Int8"}],
                "Outputs": [{"Format/Datatype": "BFloat16"}],
                "Metadata": "[ONNX Layer: fc]\x1e[ONNX Layer: x_DQ]",
            },
        ],
        "Bindings": ["x", "y"],
    }
)


def test_the_words_of_the_inspector() -> None:
    quantize, conv, copy, gemm = parse_inspection(INSPECTED)
    assert (quantize.type, quantize.inputs, quantize.outputs) == ("reformat", (FLOAT,), (INT,))
    assert conv.onnx_layers == ("features.0.0.weight", "QuantizeLinear_8", "Conv_12", "Clip_16")
    assert (conv.inputs, conv.constants, conv.outputs) == ((INT,), (INT, FLOAT), (HALF,))
    assert (copy.inputs, copy.outputs, copy.onnx_layers) == ((HALF,), (HALF,), ("fc",))
    assert gemm.onnx_layers == ("fc", "x_DQ")
    assert gemm.outputs == (ir.DataType.BFLOAT16,)
    answers = int8_nodes(parse_inspection(INSPECTED), ["Conv_12", "fc"])
    assert [answer.int8 for answer in answers] == [True, True]


@pytest.mark.parametrize("text", ["", '{"Layers": []}', '{"Layers": ["only", "names"], "Bindings": []}'])
def test_no_details(text: str) -> None:
    assert parse_inspection(text) == ()


@pytest.mark.rtx
def test_an_engine(tmp_path: Path) -> None:
    report = build_engine(saved(QUANTIZED, tmp_path / "net.onnx"), tmp_path / "net.plan", dims=DIMS)
    assert sorted(node.node for node in report.nodes) == sorted(INT8)
    assert all(node.planned and node.int8 and not node.reason for node in report.nodes)
    scores = next(node for node in report.nodes if node.node == "qk")
    assert "pv" in scores.fused


@pytest.mark.rtx
def test_an_engine_of_what_looks_quantized_and_is_not(tmp_path: Path) -> None:
    report = build_engine(saved(UNQUANTIZED, tmp_path / "net.onnx"), tmp_path / "net.plan", dims=DIMS)
    planned = {node.node: node.reason for node in report.nodes if node.planned}
    assert set(planned) == {"conv_wrong_axis", "matmul_wrong_axis"}
    assert all(reason.startswith("W2: ") for reason in planned.values())


def test_an_error_finds_its_node() -> None:
    graph = model("too narrow")
    seen = located(Refusal("Could not find any implementation for node conv_float. In build"), graph)
    assert (seen.node, seen.op) == ("conv_float", "Conv")
    assert planned_reason(seen, graph) == " (the plan left it in float: too narrow)"
    first = located(Refusal("wrong", "#0"), graph)
    assert (first.node, first.op) == (graph.graph[0].name, "QuantizeLinear")
    assert planned_reason(first, graph) == ""
    for nothing in (Refusal("wrong"), Refusal("wrong", "#999"), Refusal("conv_floats")):
        assert located(nothing, graph).op == ""
