"""Engines are really compiled here; what can be tested on captured text is."""

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.engine import EngineLayer, EngineReport, build, build_engine
from qonnx.engine.listing import NodePrecision, int8_nodes, parse_listing
from qonnx.engine.messages import reason
from qonnx.engine.profiles import profiles_of, sizes_in
from qonnx.errors import DependencyError, EngineError, ModelError, OutputError, QonnxError, TargetError

DIMS = {"batch": (1, 4, 16), "sequence": (1, 64, 128)}
LISTING = Path(__file__).parent / "data" / "engine_listing.txt"


def tensor(declaration: str, *shape: int, value: float = 1) -> str:
    """An initializer in textual ONNX: `int8[2,3] w = {1,1,1,1,1,1}`."""
    dtype, name = declaration.split()
    return f"{dtype}[{','.join(map(str, shape))}] {name} = {{{','.join([str(value)] * int(np.prod(shape)))}}}"


def weight(name: str, *shape: int, axis: int) -> str:
    """An INT8 weight with its scales; `dq(name, axis)` reads it."""
    scales = shape[axis]
    return f"{tensor(f'int8 {name}', *shape)}, {tensor(f'float {name}_s', scales, value=0.01)}, " + tensor(
        f"int8 {name}_z", scales, value=0
    )


def dq(name: str, axis: int) -> str:
    return f"[{name}_DQ] {name}_d = DequantizeLinear<axis={axis}>({name}, {name}_s, {name}_z)"


def qdq(value: str, scale: str = "s") -> str:
    return f"""[{value}_Q] {value}_q = QuantizeLinear({value}, {scale}, z)
               [{value}_DQ] {value}_d = DequantizeLinear({value}_q, {scale}, z)"""


def saved(text: str, path: Path) -> Path:
    ir.save(ir.from_onnx_text(text), path)
    return path


# A residual block, a classifier and one attention layer with residual and normalization: all products quantized.
QUANTIZED = f"""<ir_version: 10, opset_import: ["": 21]>
net (float[batch,16,16,16] image, float[batch,sequence,64] tokens, float[batch,1,1,sequence] mask)
    => (float[batch,10] scores, float[batch,sequence,64] states)
<float s = {{0.02}}, float s127 = {{0.007874}}, int8 z = {{0}}, {tensor("float ones", 64)}, {tensor("float bias", 64)},
 {weight("w1", 16, 16, 3, 3, axis=0)}, {weight("w2", 16, 16, 3, 3, axis=0)}, {weight("w3", 16, 16, 1, 1, axis=0)},
 {weight("wf", 10, 16, axis=0)}, {weight("wq", 64, 64, axis=1)}, {weight("wk", 64, 64, axis=1)},
 {weight("wv", 64, 64, axis=1)}, {weight("wo", 64, 64, axis=1)},
 int64[4] heads = {{0, 0, 4, 16}}, int64[3] joined = {{0, 0, 64}}>
{{
  {qdq("image")} {dq("w1", 0)} {dq("w2", 0)} {dq("w3", 0)} {dq("wf", 0)}
  [conv1] c1 = Conv<pads=[1,1,1,1]>(image_d, w1_d)
  r1 = Relu(c1)
  {qdq("r1")}
  [conv2] c2 = Conv<pads=[1,1,1,1]>(r1_d, w2_d)
  [conv3] c3 = Conv(image_d, w3_d)
  {qdq("c3")}
  [residual] sum = Add(c2, c3_d)
  r2 = Relu(sum)
  pooled = GlobalAveragePool(r2)
  features = Flatten(pooled)
  {qdq("features")}
  [classify] scores = Gemm<transB=1>(features_d, wf_d)

  {qdq("tokens")} {dq("wq", 1)} {dq("wk", 1)} {dq("wv", 1)} {dq("wo", 1)}
  [query] q1 = MatMul(tokens_d, wq_d)   q2 = Add(q1, bias)   q3 = Reshape(q2, heads)
  [key] k1 = MatMul(tokens_d, wk_d)     k2 = Add(k1, bias)   k3 = Reshape(k2, heads)
  [value] v1 = MatMul(tokens_d, wv_d)   v2 = Add(v1, bias)   v3 = Reshape(v2, heads)
  qt = Transpose<perm=[0,2,1,3]>(q3)    kt = Transpose<perm=[0,2,3,1]>(k3)    vt = Transpose<perm=[0,2,1,3]>(v3)
  {qdq("qt")} {qdq("kt")} {qdq("vt")}
  [qk] qk = MatMul(qt_d, kt_d)
  masked = Add(qk, mask)
  p = Softmax<axis=-1>(masked)
  {qdq("p", "s127")}
  [pv] pv = MatMul(p_d, vt_d)
  pt = Transpose<perm=[0,2,1,3]>(pv)    context = Reshape(pt, joined)
  {qdq("context")}
  [project] o1 = MatMul(context_d, wo_d)   o2 = Add(o1, bias)
  o3 = Add(o2, tokens)
  states = LayerNormalization(o3, ones, bias)
}}"""
INT8 = ["conv1", "conv2", "conv3", "classify", "query", "key", "value", "qk", "pv", "project"]

# Float twins, and every way to quantize that looks right and multiplies floats.
UNQUANTIZED = f"""<ir_version: 10, opset_import: ["": 21]>
net (float[batch,16,16,16] image, float[batch,sequence,64] tokens, float[batch,sequence,64] others)
    => (float[batch,16,14,14] y1, float[batch,16,14,14] y2, float[batch,16,14,14] y3, float[batch,sequence,64] y4,
        float[batch,sequence,64] y5, float[batch,sequence,64] y6, float[batch,sequence,64] y7,
        float[batch,sequence,sequence] y8)
<float s = {{0.02}}, int8 z = {{0}}, {tensor("float w", 16, 16, 3, 3)}, {tensor("float m", 64, 64)},
 {weight("w0", 16, 16, 3, 3, axis=0)}, {weight("w1", 16, 16, 3, 3, axis=1)},
 {weight("m0", 64, 64, axis=0)}, {weight("m1", 64, 64, axis=1)}>
{{
  {qdq("image")} {qdq("tokens")} {qdq("others")} {dq("w0", 0)} {dq("w1", 1)} {dq("m0", 0)} {dq("m1", 1)}
  [conv_float] y1 = Conv(image, w)
  [conv_weight_only] y2 = Conv(image, w0_d)
  [conv_wrong_axis] y3 = Conv(image_d, w1_d)
  [matmul_float] y4 = MatMul(tokens, m)
  [matmul_weight_only] y5 = MatMul(tokens, m1_d)
  [matmul_activation_only] y6 = MatMul(tokens_d, m)
  [matmul_wrong_axis] y7 = MatMul(others_d, m0_d)
  t = Transpose<perm=[0,2,1]>(tokens)
  [product_half] y8 = MatMul(tokens_d, t)
}}"""
FLOAT = [
    "conv_float",
    "conv_weight_only",
    "conv_wrong_axis",
    "matmul_float",
    "matmul_weight_only",
    "matmul_activation_only",
    "matmul_wrong_axis",
    "product_half",
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> EngineReport:
    folder = tmp_path_factory.mktemp("quantized")
    report = build_engine(saved(QUANTIZED, folder / "net.onnx"), folder / "net.plan", dims=DIMS)
    assert sorted(path.name for path in folder.iterdir()) == ["net.onnx", "net.plan"]
    return report


@pytest.mark.rtx
def test_report_says_what_was_built(quantized: EngineReport) -> None:
    assert Path(quantized.plan).stat().st_size == quantized.bytes > 0
    assert quantized.compute_capability == (8, 0)
    assert quantized.compiler.startswith("tensorrt-rtx 1.")
    assert quantized.profiles["tokens"] == ((1, 1, 64), (4, 64, 64), (16, 128, 64))
    assert quantized.profiles["mask"] == ((1, 1, 1, 1), (4, 1, 1, 64), (16, 1, 1, 128))


@pytest.mark.rtx
def test_quantized_products_run_on_int8(quantized: EngineReport) -> None:
    assert [answer.node for answer in int8_nodes(quantized.layers, INT8) if not answer.int8] == []


@pytest.mark.rtx
def test_attention_is_one_kernel(quantized: EngineReport) -> None:
    scores, context = int8_nodes(quantized.layers, ["qk", "pv"])
    assert scores.layer == context.layer
    assert scores.layer is not None
    assert "_mha_" in scores.layer


@pytest.mark.rtx
def test_float_products_run_in_float(tmp_path: Path) -> None:
    report = build_engine(saved(UNQUANTIZED, tmp_path / "net.onnx"), tmp_path / "net.plan", dims=DIMS)
    answers = int8_nodes(report.layers, FLOAT)
    assert [answer.node for answer in answers if answer.int8 or answer.layer is None] == []


@pytest.mark.rtx
def test_external_data_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 21]>
        net (float[batch,64] x) => (float[batch,64] y) <{tensor("float w", 64, 64)}> {{ [fc] y = MatMul(x, w) }}""")
    (tmp_path / "inner").mkdir()
    ir.save(model, tmp_path / "inner" / "net.onnx", external_data="net.onnx.data", size_threshold_bytes=0)
    monkeypatch.chdir(tmp_path)
    report = build_engine("inner/net.onnx", "net.plan")
    assert report.profiles == {"x": ((1, 64), (8, 64), (32, 64))}
    assert int8_nodes(report.layers, ["fc"])[0].layer is not None


ZERO_POINT_3 = """<ir_version: 10, opset_import: ["": 21]>
net (float[4,8] x) => (float[4,8] y) <float s = {0.1}, int8 z = {3}>
{ [input_Q] q = QuantizeLinear(x, s, z)  [input_DQ] y = DequantizeLinear(q, s, z) }"""
UNKNOWN_OPERATOR = """<ir_version: 10, opset_import: ["": 21, "com.acme": 1]>
net (float[4,8] x) => (float[4,8] y) { [middle] y = com.acme.Wobble(x) }"""
QLINEAR = f"""<ir_version: 10, opset_import: ["": 21]>
net (int8[4,8] x) => (int8[4,8] y) <float s = {{0.1}}, int8 z = {{0}}, {tensor("int8 w", 8, 8)}>
{{ [product] y = QLinearMatMul(x, s, z, w, s, z, s, z) }}"""

NOT_BEFORE_DQ = f"""<ir_version: 10, opset_import: ["": 21]>
net (float[4,8] x) => (float[4,8] y) <float s = {{0.1}}, int8 z = {{0}}, {tensor("int8 w", 8, 8)}>
{{ same = Identity(w)  w_d = DequantizeLinear(same, s, z)  y = MatMul(x, w_d) }}"""


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ZERO_POINT_3, "node 'input_Q' (QuantizeLinear): Non-zero zero point is not supported; quantize with target="),
        (UNKNOWN_OPERATOR, "node 'middle' (Wobble): the compiler has no such operator"),
        (QLINEAR, "node 'product' (QLinearMatMul): TensorRT does not have this operator; replace"),
        (NOT_BEFORE_DQ, "Quantized constant (w) is only allowed before DQ"),
    ],
)
def test_refused_graph_names_node_and_reason(text: str, expected: str, tmp_path: Path) -> None:
    plan = tmp_path / "net.plan"
    plan.write_text("an older plan")
    with pytest.raises(EngineError) as caught:
        build_engine(saved(text, tmp_path / "net.onnx"), plan)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'net.onnx'}: ")
    assert "\n" not in str(caught.value)
    assert plan.read_text() == "an older plan"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed (SIGKILL): the machine is probably"),
        ("raise ImportError('libcudart.so not found')", "failed: ImportError: libcudart.so not found"),
        ("import os; os._exit(7)", "ended with exit code 7"),
        ("", "ended with exit code 0"),
    ],
)
def test_death_of_the_child_is_an_error(
    code: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(EngineError) as caught:
        build_engine(saved(ZERO_POINT_3, tmp_path / "net.onnx"), tmp_path / "net.plan")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.rtx
def test_a_slow_compiler_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHILD", (sys.executable, "-c", "import time; time.sleep(60)"))
    with pytest.raises(EngineError, match=r"net.onnx: the compiler was stopped after 0.1 s; give it a longer timeout$"):
        build_engine(saved(ZERO_POINT_3, tmp_path / "net.onnx"), tmp_path / "net.plan", timeout=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("model", "plan", "target", "error", "expected"),
    [
        ("missing.onnx", "net.plan", "a800", ModelError, "missing.onnx: no such file"),
        ("text.onnx", "net.plan", "a800", ModelError, "text.onnx"),
        ("net.onnx", "net.plan", "ort-cpu", TargetError, "'ort-cpu' runs no TensorRT engine; choose one of a800"),
        ("net.onnx", "net.plan", "h9000", TargetError, "unknown target 'h9000'"),
        ("net.onnx", "nowhere/net.plan", "a800", OutputError, "nowhere"),
    ],
)
def test_bad_arguments(
    model: str, plan: str, target: str, error: type[QonnxError], expected: str, tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    saved(ZERO_POINT_3, tmp_path / "net.onnx")
    with pytest.raises(error) as caught:
        build_engine(tmp_path / model, tmp_path / plan, target=target)
    assert expected in str(caught.value)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DependencyError, match=r"pip install 'qonnx-pipeline\[rtx\]'"):
        build_engine(saved(ZERO_POINT_3, tmp_path / "net.onnx"), tmp_path / "net.plan")


def inputs(declaration: str) -> ir.Model:
    return ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 21]>
        net ({declaration}) => (float y) {{ y = Identity(x) }}""")


@pytest.mark.parametrize(
    ("declaration", "dims", "given", "expected"),
    [
        ("float[2,3] x", None, None, {}),
        ("float x", None, None, {}),
        ("float[N,3] x", None, None, {"x": ((1, 3), (8, 3), (32, 3))}),
        ("float[N,3] x", {"N": (2, 2, 4)}, None, {"x": ((2, 3), (2, 3), (4, 3))}),
        ("float[?,3] x", None, None, {"x": ((1, 3), (8, 3), (32, 3))}),
        ("float[N,T] x", {"T": (1, 5, 9)}, None, {"x": ((1, 1), (8, 5), (32, 9))}),
        # The name tells the batch, wherever it stands.
        ("float[N,3] x, float[3,N] m", None, None, {"x": ((1, 3), (8, 3), (32, 3)), "m": ((3, 1), (3, 8), (3, 32))}),
        ("float[N,?] x", None, {"x": ((1, 2), (3, 4), (5, 6))}, {"x": ((1, 2), (3, 4), (5, 6))}),
        ("float[N,?] x", {"x.1": (1, 5, 9)}, None, {"x": ((1, 1), (8, 5), (32, 9))}),
        ("float[?,?] x", {"x.0": (1, 2, 3), "x.1": (1, 5, 9)}, None, {"x": ((1, 1), (2, 5), (3, 9))}),
    ],
)
def test_profiles(declaration: str, dims: object, given: object, expected: object) -> None:
    assert profiles_of(inputs(declaration), dims, given) == expected  # type: ignore[arg-type]


def test_sizes_are_taken_from_data_whether_dimensions_have_names_or_not() -> None:
    model = inputs("float[?,?] x, float[N,T] m")
    shapes = [{"x": (4, 5), "m": (4, 7)}, {"x": (4, 9), "m": (4, 7)}, {"x": (2, 9), "m": (2, 8)}]
    assert sizes_in(model, shapes) == {"x.0": (1, 4, 4), "x.1": (5, 9, 9), "N": (1, 4, 4), "T": (7, 7, 8)}


def test_a_weight_that_is_also_an_input_has_no_profile() -> None:
    model = inputs("float[N,3] x, float[K] w")
    model.graph.inputs[1].const_value = ir.tensor(np.ones(3, np.float32))
    model.graph.register_initializer(model.graph.inputs[1])
    assert list(profiles_of(model)) == ["x"]


@pytest.mark.parametrize(
    ("declaration", "dims", "given", "expected"),
    [
        ("float[N,T] x", None, None, "dimension 'T' of input 'x' is dynamic: give .* dims={'T': "),
        ("float[N,?] x", None, None, r"dimension 'x.1' of input 'x' is dynamic: give .* --dim x.1=1,128,256"),
        ("float[N,3] x", {"M": (1, 2, 3)}, None, "dims names 'M', which the model does not have; it has 'N'"),
        ("float[2,3] x", {"M": (1, 2, 3)}, None, "it has none"),
        ("float[N,3] x", {"N": (4, 2, 8)}, None, r"\(4, 2, 8\) is not \(smallest, usual, largest\)"),
        ("float[N,3] x", {"N": (4, 8)}, None, r"\(4, 8\) is not"),
        ("float[N,3] x", None, {"z": ((1, 3),) * 3}, "profiles names 'z'.* it has 'x'"),
        ("float[N,3] x", None, {"x": ((1,),) * 3}, "three shapes of rank 2"),
        ("float[N,3] x", None, {"x": ((1, 3),) * 2}, "three shapes of rank 2"),
        ("float[N,3] x", None, {"x": ((1, 4),) * 3}, "axis 1: the model fixes it at 3"),
        ("float[N,3] x", None, {"x": ((2, 3), (1, 3), (4, 3))}, r"axis 0: \(2, 1, 4\) is not"),
    ],
)
def test_bad_profiles(declaration: str, dims: object, given: object, expected: str) -> None:
    with pytest.raises(EngineError, match=expected):
        profiles_of(inputs(declaration), dims, given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile "
            "for target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3. In "
            "compileGraph at /_src/c.cpp:2)",
            "Cannot compile for target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3",
        ),
        (
            "Invalid Node - b\nITensor::getDimensions: Error Code 4: API Usage Error (b: input has type Int32 but must "
            "have type FP8, FP4, Int4, Int8, or UInt8. In checkType at /_src/nodeBase.cpp:456)\n"
            "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at /_src/c.cpp:250)",
            "b: input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8",
        ),
        (
            "Failed to import initializer: In node -1 with name:  and operator:  (importInitializers): "
            "UNSUPPORTED_NODE: Assertion failed: ctx->getWeightsContext().convertOnnxWeights(initializer, &weights): "
            "Failed to import initializer: w",
            "Failed to import initializer: w",
        ),
        (
            'Assertion failed: convertDtype(dtype, &trtDtype) && "Failed to convert ONNX date type."',
            "Failed to convert ONNX date type",
        ),
        ("ModelImporter.cpp:1071: Make sure input ids has Int64 binding.", "Make sure input ids has Int64 binding"),
    ],
)
def test_reason_is_one_plain_line(text: str, expected: str) -> None:
    assert reason(text) == expected


def test_parse_listing() -> None:
    layers = parse_listing(LISTING.read_text())
    assert [layer.type for layer in layers] == [
        *("shape_call", "kgen", "correlation", "kgen"),  # a convolution: padded, multiplied, scaled
        *("gemm", "kgen", "gemm", "kgen"),  # Q, K and V at once, attention, projection, normalization
        *("runtime_fusion", "runtime_fusion", "correlation", "correlation", "gemm"),
    ]
    assert layers[0] == EngineLayer("__mye108_0_myl0_0", "shape_call", (), (), (), ())
    int8, float32 = ir.DataType.INT8, ir.DataType.FLOAT
    assert layers[2] == EngineLayer(
        name="stem_myl0_2",
        type="correlation",
        inputs=(int8,),
        constants=(int8, float32, float32),
        outputs=(float32,),
        onnx_layers=("stem", "x_DQ", "w_DQ"),
    )
    assert layers[-1].outputs == (ir.DataType.FLOAT16,)


def test_parse_listing_of_unknown_text() -> None:
    assert parse_listing("") == ()
    assert parse_listing("Layers:\nName: x, Kind: new format\n") == ()
    unknown = LISTING.read_text().replace("Datatype: Int8", "Datatype: Int3")
    assert parse_listing(unknown)[2].inputs == (ir.DataType.UNDEFINED,)


@pytest.mark.parametrize(
    ("node", "int8", "layer"),
    [
        ("stem", True, "stem_myl0_2"),  # not the float kernels before and after it that also name the node
        ("query", True, "value+key+query_myl0_2"),
        ("qk", True, "_gemm_mha_v2_myl0_6"),  # beside Q, K and V it reads a float mask
        ("project", True, "project_myl0_7"),
        ("x[3]][y]", True, "x[3]][y]_myl0_1"),
        ("half", True, "half_myl0_2"),
        ("conv_wrong_axis", False, "conv_wrong_axis_myl0_32"),
        ("matmul_weight_only", False, "__myl_CastMulCastFc_myl0_12"),
        ("matmul_wrong_axis", False, "__myl_CastMulCastMulCastFc_myl0_22"),  # reads INT8 twice, multiplies floats
        ("node_of_states", False, "__myl_MulAddReshReshTranReshAddMeanSubMulMean_myl0_8"),
        ("stranger", False, None),
    ],
)
def test_int8_nodes(node: str, int8: bool, layer: str | None) -> None:
    assert int8_nodes(parse_listing(LISTING.read_text()), [node]) == (NodePrecision(node, int8, layer),)
