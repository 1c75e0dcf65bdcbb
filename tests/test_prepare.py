"""Preparing brings any graph into one form and leaves its function, inputs and outputs alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from models.fetch import wheel
from qonnx.errors import ModelError
from qonnx.passes.fold_constants import FoldConstants
from qonnx.passes.name_nodes import NameNodes
from qonnx.passes.prepare import prepare
from qonnx.runtime import input_specs, session
from tests.graphs import model_of
from tests.helpers import Feeds, apply, assert_same_function, leave_alone, operators, random_feeds, run


def prepared(
    model: ir.Model, feeds: Feeds | None = None, rtol: float = 1e-5, minimum_opset: int = 13, fuse: bool = True
) -> tuple[str, ...]:
    """Prepares a model in place and checks that only its form changed; returns the notes."""
    before = model.clone()
    interface = declared(model)
    notes = prepare(model, minimum_opset=minimum_opset, fuse=fuse)
    assert declared(model) == interface
    assert prepare(model, minimum_opset=minimum_opset, fuse=fuse) == ()
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_function(before, model, feeds, rtol)
    names = [node.name for node in ir.traversal.RecursiveGraphIterator(model.graph)]
    assert len(set(names)) == len(names)
    assert all(names)
    return notes


def declared(model: ir.Model) -> list[tuple[str | None, str, str]]:
    return [(value.name, str(value.type), str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]


# ---------------------------------------------------------------------------------------------------- one normal form


def test_everything_at_once() -> None:
    text = """
    g (float[N,2,6] x, float[4,2,1] w, float[4] s, float[4] b, float[4] m, float[6] g1, float[6] b1)
      => (float[N,4,6] y) <float[4] v = {1, 2, 3, 4}, float two = {2}, float e = {0.001}> {
      f = Constant <value_float = 0.5> () four = Mul(two, two) sixth = Mul(f, four)
      a = Conv(x, w) n = BatchNormalization(a, s, b, m, v) i = Identity(n)
      mean = ReduceMean <axes = [-1]> (i) d = Sub(i, mean) q = Pow(d, two) var = ReduceMean <axes = [-1]> (q)
      ve = Add(var, e) r = Sqrt(ve) o = Div(d, r) h = Mul(o, g1) l = Add(h, b1) y = Mul(l, sixth) unused = Relu(y)
    }"""
    model = model_of(text, weights="w s b m g1 b1", opset=12)
    assert prepared(model, minimum_opset=13) == (
        "made 1 Constant node initializers",
        "removed 4 nodes, which nothing needs or whose result is constant",
        "opset raised 12 -> 17",
        "folded 1 BatchNormalization into the weights before them",
        "wrote 1 LayerNormalization in one node each",
    )
    assert operators(model) == ["Conv", "LayerNormalization", "Mul"]
    assert [node.name for node in model.graph] == ["Conv_0", "Add_1_LayerNormalization", "Mul_3"]
    assert [str(node.outputs[0].shape) for node in model.graph] == ["[N,4,6]"] * 3


@pytest.mark.parametrize(("minimum", "opset"), [(13, 13), (19, 19), (11, 12)])
def test_opset_is_raised_only_as_far_as_needed(minimum: int, opset: int) -> None:
    model = model_of("g (float[2,3] x) => (float[2,3] y) { y = Softmax <axis = 1> (x) }", opset=12)
    prepared(model, minimum_opset=minimum)
    assert model.opset_imports[""] == opset


def test_the_opset_stays_when_nothing_shall_be_fused() -> None:
    text = """
    g (float[N,6] x, float[6] w) => (float[N,6] y) <float two = {2}, float e = {0.001}> {
      mean = ReduceMean <axes = [-1]> (x) d = Sub(x, mean) q = Pow(d, two) var = ReduceMean <axes = [-1]> (q)
      ve = Add(var, e) r = Sqrt(ve) o = Div(d, r) y = Mul(o, w)
    }"""
    model = model_of(text, weights="w", opset=13)
    assert prepared(model, fuse=False) == ()
    assert prepared(model) == ("opset raised 13 -> 17", "wrote 1 LayerNormalization in one node each")


def test_a_format_that_the_model_cannot_reach() -> None:
    model = model_of("g (float[2,3] x) => (float[2,3] y) { a = Relu(x) y = Hardmax(a) }", opset=11)
    with pytest.raises(ModelError, match=r"opset 11 cannot be raised to 13: node 'Hardmax_0'"):
        prepare(model)
    assert prepare(model, minimum_opset=11) == ()


def test_a_fusion_that_the_model_cannot_reach_is_a_note() -> None:
    text = """
    g (float[N,6] x, float[6] w) => (float[N,6] y) <float two = {2}, float e = {0.001}> {
      h = Hardmax <axis = 1> (x) mean = ReduceMean <axes = [-1]> (h) d = Sub(h, mean) q = Pow(d, two)
      var = ReduceMean <axes = [-1]> (q) ve = Add(var, e) r = Sqrt(ve) o = Div(d, r) y = Mul(o, w)
    }"""
    model = model_of(text, weights="w", opset=12)
    (note,) = prepare(model, minimum_opset=12)
    assert note.endswith("LayerNormalization stays in elementary operators")
    assert model.opset_imports[""] == 12


def test_functions_are_inlined() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1, "other" : 1]>
    g (float[N,4] x) => (float[N,4] y) { a = local.twice(x) y = local.twice(a) }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    twice (v) => (w) { half = local.scaled <by = 2.0> (v) w = Relu(half) }
    <domain: "local", opset_import: ["" : 17]>
    scaled <by> (v) => (w) { f = Constant <value_float: float = @by> () w = Mul(v, f) }
    """)
    assert "inlined 2 functions" in prepared(model)
    assert operators(model) == ["Mul", "Relu", "Mul", "Relu"]
    assert not model.functions
    assert set(model.opset_imports) == {""}


def test_a_function_of_another_opset_stays() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N,4] x) => (float[N,4] y) { y = local.norm(x) }
    <domain: "local", opset_import: ["" : 11]> norm (v) => (w) { w = Softmax <axis = 1> (v) }
    """)
    notes = prepare(model)
    assert notes == ("function norm stays, in float: it is written for another opset than the model",)
    assert operators(model) == ["norm"]


def test_recursive_functions_are_refused() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N,4] x) => (float[N,4] y) { y = local.f(x) }
    <domain: "local", opset_import: ["local" : 1]> f (v) => (w) { w = local.f(v) }
    """)
    with pytest.raises(ModelError, match="cannot be inlined"):
        prepare(model)


def test_nodes_in_any_order() -> None:
    model = model_of("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) y = Abs(a) }")
    nodes = list(model.graph)
    model.graph.remove(nodes[0])
    model.graph.append(nodes[0])
    assert operators(model) == ["Abs", "Relu"]
    prepare(model)
    assert operators(model) == ["Relu", "Abs"]


def test_a_cycle_is_refused() -> None:
    model = model_of("g (float[N,4] x) => (float[N,4] y) { a = Relu(x) b = Add(a, x) y = Abs(b) }")
    model.graph.node(0).replace_input_with(0, model.graph.node(1).outputs[0])
    with pytest.raises(ModelError, match="cycle"):
        prepare(model)


# ---------------------------------------------------------------------------------------------- inputs with defaults


def listed(names: str, ir_version: int) -> ir.Model:
    text = "g (float[N,4] x, float[4,4] w, float k) => (float[N,4] y) { a = MatMul(x, w) y = Mul(a, k) }"
    model = model_of(text, weights="w k", opset=12)
    model.ir_version = ir_version
    model.graph.inputs.extend(model.graph.initializers[name] for name in names.split())
    return model


@pytest.mark.parametrize(("ir_version", "left"), [(3, ["x"]), (7, ["x", "k"])])
def test_weights_listed_as_inputs_become_constants(ir_version: int, left: list[str]) -> None:
    model = listed("w k", ir_version)
    before = model.clone()
    notes = prepare(model)
    assert notes[0] == f"made constants of {3 - len(left)} inputs with default values, such as 'w'"
    assert [value.name for value in model.graph.inputs] == left
    assert_same_function(before, model)


def test_a_scalar_that_a_caller_may_override_is_not_folded() -> None:
    text = "g (float[N,4] x, float k) => (float[N,4] y) <float two = {2}> { f = Mul(k, two) y = Mul(x, f) }"
    model = model_of(text, weights="k")
    model.graph.inputs.append(model.graph.initializers["k"])
    before = model.clone()
    prepared(model)
    assert operators(model) == ["Mul", "Mul"]
    for k in (1.0, -3.0):
        assert_same_function(before, model, {**random_feeds(model), "k": np.array(k, np.float32)})


def test_weights_without_an_input_in_an_old_file() -> None:
    model = listed("", ir_version=3)
    assert prepare(model) == ("opset raised 12 -> 13",)
    assert model.ir_version >= 4
    run(model, random_feeds(model))


# ------------------------------------------------------------------------------------------------------------- names


def test_names() -> None:
    model = model_of(
        "g (float[N] x) => (float[N] y) { a = Relu(x) b = Relu(a) c = Relu(b) d = Abs(c) e = Abs(d) y = Abs(e) }"
    )
    for node, name in zip(model.graph, ["same", "", "same", None, "same_1", "Relu_0"], strict=True):
        node.name = name
    assert NameNodes()(model).modified
    assert [node.name for node in model.graph] == ["same", "Relu_1", "same_2", "Abs_0", "same_1", "Relu_0"]
    leave_alone(NameNodes(), model)


def test_nodes_of_the_main_graph_keep_their_names_before_those_of_functions() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (float[N,4] x) => (float[N,4] y) { [act] y = Relu(x) }
    <domain: "local", opset_import: ["" : 11]> norm (v) => (w) { [act] w = Softmax <axis = 1> (v) }
    """)
    NameNodes()(model)
    (function,) = model.functions.values()
    assert (model.graph.node(0).name, next(iter(function)).name) == ("act", "act_1")


# ---------------------------------------------------------------------------------------------------------- subgraphs

IF = """
g (float[N,4] x, bool c, float[4,4] w) => (float[N,4] y) <float two = {2}> {
  a = Relu(x) outer = Mul(two, two)
  y = If (c) <
    then_branch = t () => (float[N,4] p) {
      k = Constant <value_float = 3.0> () b = MatMul(a, w) d = Mul(b, k) p = Add(d, outer)
    },
    else_branch = f () => (float[N,4] q) { i = Identity(a) q = Identity(i) }
  >
}"""
LOOP = """
g (float[4] x, float[4,4] w) => (float[4] y, float[3,4] z) <int64 count = {3}, bool go = {1}> {
  a = Abs(x)
  y, z = Loop(count, go, x) <body = b (int64 i, bool going, float[4] s) => (bool on, float[4] o, float[4] scan) {
    on = Identity(going) k = Constant <value_float = 0.5> () h = Mul(k, k) m = MatMul(s, w) n = Mul(m, h)
    o = Add(n, a) scan = Identity(o)
  }>
}"""


@pytest.mark.parametrize("condition", [True, False])
def test_if_with_outer_references(condition: bool) -> None:
    model = model_of(IF, weights="w")
    prepared(model, {"x": np.arange(8, dtype=np.float32).reshape(2, 4), "c": np.array(condition)})
    assert operators(model) == ["Relu", "If"]


def test_loop_with_outer_references() -> None:
    prepared(model_of(LOOP, weights="w", scale=0.3))


@pytest.mark.parametrize("condition", ["true", "false"])
def test_if_with_a_known_condition_is_replaced_by_its_branch(condition: str) -> None:
    value = int(condition == "true")
    text = IF.replace("bool c, ", "").replace("a = Relu", f"c = Constant <value = bool {{{value}}}> () a = Relu")
    model = model_of(text, weights="w")
    prepared(model)
    assert "If" not in operators(model)


# --------------------------------------------------------------------------------------------------- folding constants


def test_stale_sizes_are_not_folded() -> None:
    text = """
    g (float[N,2,3] x) => (float[N,6] y) <float[1,2,3] a, int64[1] zero = {0}, int64[1] six = {6}> {
      a = Relu(x) s = Shape(a) n = Gather(s, zero) to = Concat <axis = 0> (n, six) y = Reshape(a, to)
    }"""
    model = model_of(text)
    prepared(model)
    assert_same_function(model_of(text.replace("float[1,2,3] a, ", "")), model, {"x": np.ones((5, 2, 3), np.float32)})


def test_negative_sizes_are_not_folded() -> None:
    body = "s = Shape(x) one = ConstantOfShape <value = float[1] {1}> (s) y = Add(x, one)"
    text = f"g (float[N,2] x) => (float[N,2] y) {{ {body} }}"
    model = model_of(text)
    model.graph.inputs[0].shape = ir.Shape([-1, 2])
    before = model.clone()
    prepare(model)
    assert str(model.graph.inputs[0].shape) == "[None,2]"  # a dynamic size: -1 is none
    assert_same_function(before, model, {"x": np.ones((4, 2), np.float32)})


def test_large_weights_are_not_copied() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError

    text = "g (float[N,200] x, float[100,200] w) => (float[N,100] y) { t = Transpose(w) y = MatMul(x, t) }"
    model = model_of(text, weights="w", opset=12)
    lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([100, 200]), name="w")
    model.graph.initializers["w"].const_value = lazy
    assert prepare(model) == ("opset raised 12 -> 13",)
    assert operators(model) == ["Transpose", "MatMul"]
    assert model.graph.initializers["w"].const_value is lazy


def test_external_weights_stay_on_disk(tmp_path: Path) -> None:
    text = "g (float[N,40] x, float[40,40] w) => (float[N,40] y) { a = MatMul(x, w) y = Softmax <axis = 1> (a) }"
    ir.save(model_of(text, weights="w", opset=12), tmp_path / "m.onnx", external_data="m.data")
    model = ir.load(tmp_path / "m.onnx")
    prepare(model)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert_same_function(ir.load(tmp_path / "m.onnx"), model)


def test_a_failure_while_folding_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("node 'a' is odd\nin many lines")

    monkeypatch.setattr("onnxscript.optimizer.fold_constants_ir", fail)
    model = model_of("g (float[N,4] x) => (float[N,4] y) { a = Constant <value_float = 2.0> () y = Mul(x, a) }")
    before = model.clone()
    notes = prepare(model)
    assert "constants cannot be folded: node 'a' is odd; continuing without" in notes
    assert operators(model) == ["Mul"]
    assert_same_function(before, model)


def test_omitted_outputs_stay_omitted() -> None:
    text = """
    g (float[5,1,3] x, float[1,8,3] w, float[1,8,2] r) => (float[1,1,2] h) <float two = {2}> {
      four = Mul(two, two) a = Mul(x, four) , h = LSTM <hidden_size = 2> (a, w, r)
    }"""
    model = model_of(text, weights="w r", opset=14)
    assert apply(FoldConstants(), model) == ["Mul", "LSTM"]
    assert not model.graph.node(-1).outputs[0].name


def test_two_outputs_that_are_the_same_value_keep_their_names() -> None:
    model = model_of(
        "g (float[N] x) => (float[N] y, float[N] z, float[N] c) { y = Relu(x) z = Identity(y) c = Identity(x) }"
    )
    prepared(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z", "c"]


def test_a_constant_output() -> None:
    model = model_of(
        "g (float[N] x) => (float[N] y, float[2] z) { y = Relu(x) z = Constant <value_floats = [1.0, 2.0]> () }"
    )
    prepared(model)


def test_float16() -> None:
    text = """
    g (float16[N,2,6] x, float16[4,2,1] w, float16[4] s, float16[4] b, float16[4] m, float16[4] v)
      => (float16[N,4,6] y) {
      f = Constant <value = float16[1] {1}> () a = Conv(x, w) n = BatchNormalization(a, s, b, m, v) y = Relu(n)
    }"""
    model = model_of(text, weights="w s b m v", opset=12)
    model.graph.initializers["v"].const_value = ir.tensor(np.array([0.5, 1, 2, 3], np.float16), name="v")
    prepared(model, rtol=5e-3, minimum_opset=19)
    assert operators(model) == ["Conv", "Relu"]


def test_strings_and_sequences_pass() -> None:
    model = ir.from_onnx_text("""
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x, int64 i) => (float[A] y, string[1] s) {
      s = Constant <value_strings = ["name"]> () a = Abs(x) b = SequenceConstruct(x, a) y = SequenceAt(b, i)
    }""")
    prepared(model)


# -------------------------------------------------------------------------------------------------------- real models


def test_the_models_that_come_with_onnx() -> None:
    """Operator sets 6 to 12, weights among the inputs, no names."""
    paths = sorted(Path(onnx.__file__).parent.glob("backend/test/data/pytorch-*/*/model.onnx"))
    assert len(paths) > 100
    compared = 0
    for path in paths:
        data = path.parent / "test_data_set_0"
        model = ir.load(path)
        names = [value.name or "" for value in model.graph.inputs]
        if "PRelu" in operators(model):
            continue
        prepare(model)
        assert prepare(model) == (), path
        wanted = {value.name for value in model.graph.inputs}
        feeds = {name: tensor(data / f"input_{number}.pb") for number, name in enumerate(names) if name in wanted}
        outputs = run(model, feeds)
        for number, output in enumerate(outputs.values()):
            np.testing.assert_allclose(
                output, tensor(data / f"output_{number}.pb"), rtol=1e-3, atol=1e-5, err_msg=str(path)
            )
            compared += 1
    assert compared > 100


def tensor(path: Path) -> np.ndarray:
    proto = onnx.TensorProto()
    proto.ParseFromString(path.read_bytes())
    return onnx.numpy_helper.to_array(proto)


def random_image(batch: int, height: int, width: int) -> Feeds:
    return {"x": np.random.default_rng(0).uniform(-1, 1, (batch, 3, height, width)).astype(np.float32)}


def check_real(path: Path, *feeds: Feeds, tolerance: float = 1e-4) -> Counter[str]:
    """Prepares a real model and compares it on batches of several shapes; returns its operators."""
    model = ir.load(path)
    interface = declared(model)
    prepare(model)
    assert prepare(model) == ()
    # Negative sizes, which are none, are dynamic ones.
    assert declared(model) == [(name, kind, shape.replace("-1", "None")) for name, kind, shape in interface]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for batch in feeds:
        assert_same_function(ir.load(path), model, batch, tolerance)
    return Counter(operators(model))


@pytest.mark.models
def test_ocr_models() -> None:
    folder = wheel("rapidocr-onnxruntime", "1.4.4") / "rapidocr_onnxruntime" / "models"
    recognizer = check_real(folder / "ch_PP-OCRv4_rec_infer.onnx", random_image(1, 48, 320), random_image(2, 48, 96))
    assert recognizer["LayerNormalization"] == 5
    assert recognizer["Softmax"] == 3
    for gone in ("Constant", "BatchNormalization", "Sqrt", "Flatten"):
        assert recognizer[gone] == 0
    # Each convolution was followed by a learnable scale and shift.
    assert (recognizer["Conv"], recognizer["Mul"], recognizer["Add"]) == (38, 74, 69)

    classifier = check_real(
        folder / "ch_ppocr_mobile_v2.0_cls_infer.onnx", random_image(2, 48, 192), random_image(1, 48, 192)
    )
    assert (classifier["Conv"], classifier["BatchNormalization"], classifier["Constant"]) == (53, 0, 0)


@pytest.mark.models
def test_text_detector() -> None:
    path = wheel("rapidocr-onnxruntime", "1.4.4") / "rapidocr_onnxruntime" / "models" / "ch_PP-OCRv4_det_infer.onnx"
    model = ir.load(path)
    prepare(model)
    count = Counter(operators(model))
    assert (count["Conv"], count["ConvTranspose"], count["BatchNormalization"], count["Constant"]) == (62, 2, 0, 0)
    # Compared before the last sigmoid, which squeezes everything on noise to within one rounding step of zero.
    for batch in (random_image(1, 96, 160), random_image(2, 64, 64)):
        before, after = run(ir.load(path), batch), run(model, batch)
        for name, reference in before.items():
            np.testing.assert_allclose(after[name], reference, rtol=0, atol=1e-6)


def speech(batch: int, samples: int, rate: int | None = None) -> Feeds:
    rng = np.random.default_rng(0)
    feeds = {
        "input": rng.normal(0, 0.1, (batch, samples)).astype(np.float32),
        "state": rng.normal(0, 1, (2, batch, 128)).astype(np.float32),
    }
    return feeds if rate is None else feeds | {"sr": np.array(rate)}


@pytest.mark.models
def test_speech_models_with_conditions() -> None:
    folder = wheel("silero-vad", "6.2.3") / "silero_vad" / "data"
    both_rates = (speech(1, 576, 16000), speech(3, 576, 16000), speech(2, 288, 8000))
    assert check_real(folder / "silero_vad.onnx", *both_rates) == {"Equal": 1, "If": 1}
    assert check_real(folder / "silero_vad_op18_ifless.onnx", *both_rates)["If"] == 1
    half = check_real(folder / "silero_vad_half.onnx", speech(1, 576), speech(3, 576))
    assert (half["Conv"], half["If"], half["Constant"]) == (6, 1, 0)
    assert check_real(folder / "silero_vad_16k_op15.onnx", speech(1, 576, 16000), speech(3, 576, 16000))["Conv"] == 6
    fixed = check_real(folder / "silero_vad_openvino_16k.onnx", speech(1, 576))
    assert (fixed["Conv"], fixed["LSTM"], fixed["Constant"], fixed["Slice"]) == (6, 1, 0, 5)


def test_products_written_as_einsum_are_products() -> None:
    model = model_of(
        'g (float[B,S,8] x, float[8,2,4] w) => (float[B,S,2,4] y) { y = Einsum <equation = "bsd,dhk->bshk"> (x, w) }',
        weights="w",
    )
    assert "wrote 1 Einsum as MatMul" in prepare(model)
    assert operators(model) == ["MatMul", "Reshape"]


def test_sizes_below_0_are_dynamic_ones(tmp_path: Path) -> None:
    model = model_of("g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([-1, 4])
    ir.save(model, tmp_path / "m.onnx")
    batch = {"x": np.ones((3, 4), np.float32)}
    assert session(tmp_path / "m.onnx").inputs[0].shape == (None, 4)
    prepare(model)
    assert input_specs(model)[0].shape == (None, 4)
    assert session(model).run(batch)["y"].shape == (3, 4)
