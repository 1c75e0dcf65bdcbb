import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from qonnx import runtime
from qonnx.comparison import compare
from qonnx.errors import DataError, DependencyError, ModelError
from qonnx.graph import load
from qonnx.runtime import Device, InputSpec, Optimization, Session, input_specs, session, with_outputs

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def open_text(text: str, **options: Any) -> Session:
    return session(ir.from_onnx_text(f"{HEADER} {text}"), threads=1, **options)


def set_weights(model: ir.Model, **arrays: Any) -> ir.Model:
    for name, array in arrays.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(array, name=name)
        value.shape = ir.Shape(array.shape)
    return model


@pytest.fixture
def linear(rng: np.random.Generator) -> tuple[ir.Model, np.ndarray[Any, Any]]:
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    text = f"{HEADER} g (float[batch, 64] x) => (float[batch, 32] y) <float[1] w = {{0}}> {{ y = MatMul(x, w) }}"
    return set_weights(ir.from_onnx_text(text), w=weight), weight


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_inputs_and_outputs_are_described() -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (float16[batch, 3, ?] x, int64[batch] n, bfloat16[2] b)"
        "=> (float16[batch, 3, ?] y, int64[batch] m, bfloat16[2] c)"
        "{ y = Identity(x) m = Identity(n) c = Identity(b) }"
    )
    opened = session(model)
    assert opened.inputs == input_specs(model)
    assert opened.inputs == (
        InputSpec("x", np.dtype(np.float16), ("batch", 3, None)),
        InputSpec("n", np.dtype(np.int64), ("batch",)),
        InputSpec("b", np.dtype(ml_dtypes.bfloat16), (2,)),
    )
    assert opened.outputs == ("y", "m", "c")
    assert opened.optimization is Optimization.ALL


@pytest.mark.parametrize("name", ["?", "-1", "None"])
def test_sizes_that_are_called_unknown_need_not_be_equal(name: str, tmp_path: Path) -> None:
    """Paddle's exporter writes '?' for the height and for the width."""
    model = onnx.parser.parse_model(f"{HEADER} g (float[n,3,h,w] x) => (float[n,3,h,w] y) {{ r = Relu(x) y = Abs(r) }}")
    for value in (*model.graph.input, *model.graph.output):
        for dimension in list(value.type.tensor_type.shape.dim)[2:]:
            dimension.dim_param = name
    onnx.save(model, tmp_path / "m.onnx")
    x = np.ones((2, 3, 4, 5), np.float32)
    unnamed = InputSpec("x", np.dtype(np.float32), ("n", 3, None, None))
    assert session(tmp_path / "m.onnx").inputs == input_specs(ir.load(tmp_path / "m.onnx")) == (unnamed,)
    sizes = load(tmp_path / "m.onnx").graph.inputs[0].shape
    assert sizes is not None
    assert [getattr(size, "value", size) for size in sizes] == ["n", 3, None, None]
    assert compare(tmp_path / "m.onnx", tmp_path / "m.onnx", [{"x": x}]).outputs[0].max_error == 0


def test_an_initializer_that_is_also_an_input_need_not_be_fed() -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {{3, 4}}> {{ y = Mul(x, w) }}"
    )
    opened = session(model)
    assert [spec.name for spec in opened.inputs] == ["x"]
    assert opened.inputs == input_specs(model)
    np.testing.assert_array_equal(opened.run({"x": np.ones(2, np.float32)})["y"], [3, 4])


def test_outputs_are_returned_by_name_and_can_be_chosen() -> None:
    text = "g (float[2] x) => (float[2] a, float[2] b) { a = Neg(x) b = Abs(x) }"
    x = np.array([1, -2], np.float32)
    assert list(open_text(text).run({"x": x})) == ["a", "b"]
    chosen = open_text(text, outputs=["b"])
    assert chosen.outputs == ("b",)
    np.testing.assert_array_equal(chosen.run({"x": x})["b"], [1, 2])
    with pytest.raises(ModelError, match="no tensor output is called 'c'; it has a, b"):
        open_text(text, outputs=["c"])


def test_unknown_ranks_and_scalars_are_told_apart_by_the_graph() -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float x, float[] y) => (float z) {{ z = Add(x, y) }}")
    assert [spec.shape for spec in input_specs(model)] == [(), None]
    assert [spec.shape for spec in session(model).inputs] == [None, None]


def test_inputs_that_are_not_tensors_are_refused() -> None:
    model = ir.from_onnx_text(f"{HEADER} g (seq(float[2]) s) => (int64 n) {{ n = SequenceLength(s) }}")
    with pytest.raises(ModelError, match="g: input 's' is not declared as a tensor"):
        input_specs(model)
    with pytest.raises(ModelError, match=r"g: input 's' is a seq\(tensor\(float\)\); only tensors can be fed"):
        session(model)


def test_sequence_outputs_are_left_out() -> None:
    opened = open_text("g (float[2] x) => (seq(float[2]) s, float[2] y) { s = SequenceConstruct(x) y = Neg(x) }")
    assert opened.outputs == ("y",)
    assert list(opened.run({"x": np.ones(2, np.float32)})) == ["y"]


def test_a_graph_without_tensor_outputs_returns_nothing() -> None:
    opened = open_text("g (float[2] x) => (seq(float[2]) s) { s = SequenceConstruct(x) }")
    assert opened.outputs == ()
    assert opened.run({"x": np.ones(2, np.float32)}) == {}


def test_strings_are_fed_as_objects() -> None:
    opened = open_text('g (string[n] x) => (bool[n] y) <string[1] a = {"a"}> { y = Equal(x, a) }', optimize=False)
    assert opened.inputs[0].dtype == np.dtype(object)
    np.testing.assert_array_equal(opened.run({"x": np.array(["a", "b"], object)})["y"], [True, False])


def test_a_bfloat16_graph_that_has_no_kernels_says_what_to_do() -> None:
    text = "g (bfloat16[2] x) => (bfloat16[2] y) { y = Pow(x, x) }"
    with pytest.raises(ModelError, match=r"export the model in float32, .* and build the engine with --float bf16"):
        open_text(text)


def test_weights_in_memory_are_lent_and_not_serialized(linear: tuple[ir.Model, np.ndarray[Any, Any]]) -> None:
    model, weight = linear
    skeleton, buffers = runtime._skeleton(model, "g")
    assert len(skeleton) < 1000
    assert [np.shares_memory(buffer, weight) for buffer in buffers.values()] == [True]
    x = np.ones((3, 64), np.float32)
    np.testing.assert_allclose(session(model).run({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-5)
    assert isinstance(model.graph.initializers["w"].const_value, ir.Tensor)


def test_weights_in_files_stay_there(linear: tuple[ir.Model, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    model, weight = linear
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    loaded = ir.load(tmp_path / "model.onnx")
    x = np.ones((3, 64), np.float32)
    for source in (loaded, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        np.testing.assert_allclose(session(source).run({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-5)
    tensor = loaded.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert tensor.raw is None  # nothing has read it into Python
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_two_weights_of_one_file_share_one_mapping(rng: np.random.Generator, tmp_path: Path) -> None:
    text = (
        f"{HEADER} g (float[2, 64] x) => (float[2, 8] y) <float[1] a = {{0}}, float[1] b = {{0}}, float[1] c = {{0}}>"
    )
    text += "{ h = MatMul(x, a) i = MatMul(h, b) y = Add(i, c) }"
    a, b = rng.standard_normal((64, 64)).astype(np.float32), rng.standard_normal((64, 8)).astype(np.float32)
    c = np.arange(8, dtype=np.float32)
    ir.save(
        set_weights(ir.from_onnx_text(text), a=a, b=b, c=c),
        tmp_path / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    loaded = ir.load(tmp_path / "m.onnx")
    assert len(runtime._skeleton(loaded, "g")[1]) == 1
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(session(loaded).run({"x": x})["y"], x @ a @ b + c, rtol=1e-4, atol=1e-3)


def test_weights_of_subgraphs_may_be_external(rng: np.random.Generator, tmp_path: Path) -> None:
    text = f"""{HEADER} g (float[2, 64] x, bool c) => (float[2, 32] y) {{
        y = If (c) <
            then_branch = t () => (float[2, 32] p) <float[1] v = {{0}}> {{ p = MatMul(x, v) }},
            else_branch = e () => (float[2, 32] q) <float[1] w = {{0}}> {{ q = MatMul(x, w) }}
        >
    }}"""
    model = ir.from_onnx_text(text)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    for graph in model.graph.subgraphs():
        for value in graph.initializers.values():
            value.const_value, value.shape = ir.tensor(weight, name=value.name), ir.Shape(weight.shape)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    x = np.ones((2, 64), np.float32)
    result = session(ir.load(tmp_path / "m.onnx")).run({"x": x, "c": np.array(True)})
    np.testing.assert_allclose(result["y"], x @ weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (ml_dtypes.bfloat16, [1, 2.5, -3, 4, 5]),
        (ml_dtypes.float8_e4m3fn, [1, 2.5, -3, 4, 5]),
        (ml_dtypes.float8_e5m2, [1, 2.5, -3, 4, 5]),
        (ml_dtypes.int4, [-8, 7, 0, 3, -1]),
        (ml_dtypes.uint4, [15, 7, 0, 3, 1]),
        (np.float16, [1, 2.5, -3, 4, 5]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_types_that_numpy_lacks_come_back_exactly(dtype: type, values: list[float]) -> None:
    name = ir.DataType.from_numpy(np.dtype(dtype))
    spelling = name.name.lower()
    opened = open_text(f"g (float[5] x) => ({spelling}[5] y) {{ y = Cast <to = {int(name)}> (x) }}")
    result = opened.run({"x": np.array(values, np.float32)})["y"]
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.astype(np.float32), values)


def test_four_bit_inputs_are_refused() -> None:
    with pytest.raises(ModelError, match=r"g: input 'x' is tensor\(int4\); feed int8 and cast in the graph"):
        open_text("g (int4[4] x) => (float[4] y) { y = Cast <to = 1> (x) }")


def test_bfloat16_can_be_fed() -> None:
    opened = open_text("g (bfloat16[3] x, float[3] s) => (float[3] y) { f = Cast <to = 1> (x) y = Add(f, s) }")
    feeds = {"x": np.array([1, 2.5, -3], ml_dtypes.bfloat16), "s": np.ones(3, np.float32)}
    np.testing.assert_array_equal(opened.run(feeds)["y"], [2, 3.5, -2])


def quantized(readers: int, rng: np.random.Generator) -> ir.Model:
    second = "e = DequantizeLinear <axis = 1> (w, ws) z = MatMul(d, e)" if readers == 2 else "z = Identity(y)"
    text = f"""{HEADER} g (float[4, 256] x) => (float[4, 32] y, float[4, 32] z)
        <float s = {{0.1}}, int8 zp = {{0}}, int8[1] w = {{0}}, float[1] ws = {{0}}> {{
        q = QuantizeLinear(x, s, zp)
        d = DequantizeLinear(q, s, zp)
        f = DequantizeLinear <axis = 1> (w, ws)
        y = MatMul(d, f)
        {second}
    }}"""
    weight = rng.integers(-127, 128, (256, 32)).astype(np.int8)
    return set_weights(ir.from_onnx_text(text), w=weight, ws=np.full(32, 0.01, np.float32))


@pytest.mark.parametrize(("readers", "expected"), [(1, Optimization.ALL), (2, Optimization.BASIC)])
def test_int8_is_exact_and_a_shared_weight_falls_back(
    readers: int, expected: Optimization, rng: np.random.Generator, capfd: pytest.CaptureFixture[str]
) -> None:
    model = quantized(readers, rng)
    opened = session(model, threads=1)
    assert opened.optimization is expected
    assert capfd.readouterr().err == ""
    x = rng.uniform(-12, 12, (4, 256)).astype(np.float32)
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    reference = np.clip(np.rint(x / np.float32(0.1)), -128, 127) * 0.1 @ (weight.numpy() * 0.01)
    np.testing.assert_allclose(opened.run({"x": x})["y"], reference, rtol=1e-4, atol=1e-3)
    plain = session(model, optimize=False)
    assert plain.optimization is Optimization.NONE
    np.testing.assert_allclose(plain.run({"x": x})["z"], reference, rtol=1e-4, atol=1e-3)


def test_four_bit_weights_do_not_quantize_the_activations(rng: np.random.Generator) -> None:
    text = f"""{HEADER} g (float[4, 256] x) => (float[4, 64] y) <int4[1] w = {{0}}, float[1] s = {{0}}> {{
        d = DequantizeLinear <axis = 0, block_size = 32> (w, s)
        y = MatMul(x, d)
    }}"""
    weight = rng.integers(-8, 8, (256, 64)).astype(ml_dtypes.int4)
    model = set_weights(ir.from_onnx_text(text), w=weight, s=np.full((8, 64), 0.1, np.float32))
    x = rng.standard_normal((4, 256)).astype(np.float32)
    reference = x.astype(np.float64) @ (weight.astype(np.float64) * np.float32(0.1))
    result = session(model, threads=1).run({"x": x})["y"]
    assert np.linalg.norm(result - reference) / np.linalg.norm(reference) < 1e-5


def test_with_outputs_exposes_intermediates_and_leaves_the_model_alone() -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (float[2] x) => (float[2] y) <float[2] w = {{3, 4}}>"
        "{ a = Mul(x, w) i = Cast <to = 7> (a) y = Neg(a) }"
    )
    exposed = with_outputs(model, ["i", "a", "y", "a"])
    assert [value.name for value in exposed.graph.outputs] == ["y", "i", "a"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert exposed.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    result = session(exposed).run({"x": np.ones(2, np.float32)})
    np.testing.assert_array_equal(result["a"], [3, 4])
    assert result["i"].dtype == np.int64
    with pytest.raises(ModelError, match="g: no node of the main graph computes a value 'w'"):
        with_outputs(model, ["w"])


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def graph_bytes(body: str) -> bytes:
    proto = onnx.parser.parse_model(f"{HEADER} g (float[4, 3] x) => (float[4, 4] y) {{ {body} }}")
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, world\n", "ONNX Runtime cannot load this graph: "),
        (graph_bytes("y = Relu(x)")[:-9], "ONNX Runtime cannot load this graph: "),
        (graph_bytes("[first] y = Missing(x)"), "first.*No Op registered for Missing"),
        (graph_bytes("[product] y = MatMul(x, x)"), "product.*Incompatible dimensions"),
    ],
    ids=["text", "truncated", "unknown operator", "shapes"],
)
def test_a_file_that_does_not_load_is_a_model_error(content: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", content)
    with pytest.raises(ModelError, match=message) as caught:
        session(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    assert "onnxruntime_src" not in text


def test_a_missing_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        session(tmp_path / "none.onnx")


def test_a_value_that_nothing_defines_is_a_model_error() -> None:
    model = ir.from_onnx_text(f"{HEADER} g (float[2] x) => (float[2] y) {{ [sum] y = Add(x, x) }}")
    model.graph.node("sum").replace_input_with(1, ir.Value(name="nowhere"))
    with pytest.raises(ModelError, match=r"g: not a valid graph: .*nowhere") as caught:
        session(model)
    assert "\n" not in str(caught.value)


def test_weights_that_vanished_are_a_model_error(linear: tuple[ir.Model, np.ndarray[Any, Any]], tmp_path: Path) -> None:
    ir.save(linear[0], tmp_path / "m.onnx", external_data="m.data")
    loaded = ir.load(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"m\.data: the weights cannot be read"):
        session(loaded)


def test_an_input_that_is_not_fed_is_a_data_error() -> None:
    opened = open_text("g (float[2] a, float[2] b) => (float[2] y) { y = Add(a, b) }")
    with pytest.raises(DataError, match="g: input 'b' is not fed; given a, c"):
        opened.run({"a": np.ones(2, np.float32), "c": np.ones(2, np.float32)})


def test_values_that_the_graph_cannot_take_are_a_data_error() -> None:
    opened = open_text("g (int64[n] i) => (float[n] y) <float[2] w = {1, 2}> { [lookup] y = Gather(w, i) }")
    with pytest.raises(DataError, match=r"does not run on this batch .*lookup.*indices element out of data bounds"):
        opened.run({"i": np.array([7])})


def test_a_missing_provider_is_a_dependency_error() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it is there")
    with pytest.raises(DependencyError, match=r"no CUDAExecutionProvider; .* 'qonnx-pipeline\[gpu\]'"):
        open_text("g (float[2] x) => (float[2] y) { y = Neg(x) }", device=Device.CUDA)


def test_a_gpu_computes_in_float32_and_leaves_the_rest_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = onnxruntime.InferenceSession
    given: dict[str, dict[str, str]] = {}

    def on_the_cpu(source: Any, options: Any, providers: Any, provider_options: Any, **others: Any) -> Any:
        given.update(zip(providers, provider_options, strict=True))
        return opened(source, options, providers=["CPUExecutionProvider"], **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(Device.CUDA.providers))
    open_text("g (float[2] x) => (float[2] y) { y = Neg(x) }", device=Device.CUDA)
    assert list(given.items()) == [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]


def test_a_missing_onnxruntime_is_a_dependency_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DependencyError, match=r"pip install 'qonnx-pipeline\[cpu\]'"):
        open_text("g (float[2] x) => (float[2] y) { y = Neg(x) }")


PADDED = (
    "g (float[1,1,4,4] x) => (float[1,1,2,2] y) <int64[8] p = {0,0,1,1,0,0,1,1}> "
    "{ padded = Pad(x, p) y = MaxPool <kernel_shape = [3,3], strides = [2,2]> (padded) }"
)


def test_zeros_in_front_of_a_maxpool_stay_zeros() -> None:
    """ONNX Runtime lets the MaxPool pad instead, which takes no part in a maximum of negative numbers."""
    x = -np.ones((1, 1, 4, 4), np.float32)
    assert open_text(PADDED).run({"x": x})["y"].reshape(-1).tolist() == [0, 0, 0, -1]


def test_default_options_are_those_of_onnx_runtime() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 4, 4)).astype(np.float32) - 3
    model = ir.from_onnx_text(f"{HEADER} {PADDED}")
    native = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    opened = session(model, default_options=True)
    found = opened.run({"x": x})["y"]
    with pytest.raises(RuntimeError):
        opened._native.get_session_options().get_session_config_entry("session.x64quantprecision")
    np.testing.assert_array_equal(found, native.run(None, {"x": x})[0])


def test_why_a_graph_was_optimized_less_is_known() -> None:
    text = (
        "g (float[n,4] x, float[n,4] z) => (float[n,4] y, float[n,4] v) "
        "<float s = {0.1}, int8 o = {0}, int8[4,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> { "
        "q = QuantizeLinear(x, s, o) d = DequantizeLinear(q, s, o) p = QuantizeLinear(z, s, o) "
        "e = DequantizeLinear(p, s, o) f = DequantizeLinear(w, s, o) y = MatMul(d, f) v = MatMul(e, f) }"
    )
    opened = open_text(text)
    assert (opened.optimization is Optimization.ALL) == (opened.refusal == "")
    if opened.refusal:
        assert "Attempt to replace the existing tensor" in opened.refusal
    assert open_text(text, optimize=False).refusal == ""
