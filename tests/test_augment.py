import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import CheckerPass

from qonnx.errors import ModelError
from qonnx.passes.augment import AddObservers, Observer, Statistic, observers
from qonnx.runtime import session

OPSETS = [11, 12, 13, 17, 18, 20, 21, 25]


def relu(opset: int = 21, dtype: str = "float", shape: str = "n, c, 4") -> ir.Model:
    return ir.from_onnx_text(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        relu ({dtype}[{shape}] x) => ({dtype}[{shape}] z) <{dtype}[{shape}] y> {{
            y = Relu(x)
            z = Neg(y)
        }}
    """)


def run(model: ir.Model, x: np.ndarray) -> dict[tuple[str, Statistic], np.ndarray]:
    outputs = session(model).run({"x": x})
    return {(o.value, o.statistic): outputs[o.output] for o in observers(model)}


@pytest.mark.parametrize("opset", OPSETS)
def test_the_outputs_hold_what_numpy_computes(opset: int) -> None:
    model = relu(opset)
    result = AddObservers(("x", "y"), {"y": 1})(model)
    assert result.modified
    CheckerPass(full_check=True)(model)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    found = run(model, x)
    for name, array in (("x", x), ("y", np.maximum(x, 0))):
        assert found[name, Statistic.COUNT] == 24
        assert found[name, Statistic.MINIMUM] == array.min()
        assert found[name, Statistic.MAXIMUM] == array.max()
        np.testing.assert_allclose(found[name, Statistic.SUM_SQUARES], np.square(array).sum(), rtol=1e-6)
    np.testing.assert_array_equal(found["y", Statistic.CHANNEL_MINIMUM], np.maximum(x, 0).min((0, 2)))
    np.testing.assert_array_equal(found["y", Statistic.CHANNEL_MAXIMUM], np.maximum(x, 0).max((0, 2)))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_an_empty_tensor_does_not_break_the_run(opset: int, shape: tuple[int, ...]) -> None:
    model = relu(opset)
    AddObservers(("y",), {"y": 2})(model)
    found = run(model, np.zeros(shape, np.float32))
    assert found["y", Statistic.COUNT] == 0
    assert found["y", Statistic.MINIMUM] == np.inf
    assert found["y", Statistic.MAXIMUM] == -np.inf
    assert found["y", Statistic.SUM_SQUARES] == 0
    np.testing.assert_array_equal(found["y", Statistic.CHANNEL_MINIMUM], np.full(4, np.inf))


@pytest.mark.parametrize(("dtype", "onnx"), [("float16", "float16"), ("float64", "double")])
def test_other_float_types_are_reduced_in_float32(dtype: str, onnx: str) -> None:
    model = relu(dtype=onnx)
    AddObservers(("x",), {"x": -1})(model)
    x = np.full((1, 1000, 4), 100, np.dtype(dtype))  # squares add up to 4e7: beyond float16
    found = run(model, x)
    assert found["x", Statistic.SUM_SQUARES] == 4e7
    assert found["x", Statistic.CHANNEL_MAXIMUM].dtype == np.float32


def test_bfloat16_is_reduced_in_float32() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 21]>
        cast (float[n] x) => (float[n] z) { y = Cast<to = 16>(x)
            z = Cast<to = 1>(y) }
    """)
    AddObservers(("y",))(model)
    assert run(model, np.array([1.00001, -3], np.float32))["y", Statistic.MAXIMUM] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 11, 23])
def test_the_sum_of_squares_gives_non_finite_elements_away(bad: float, position: int) -> None:
    model = relu()
    AddObservers(("x",))(model)
    x = np.ones(24, np.float32)
    x[position] = bad
    assert not np.isfinite(run(model, x.reshape(2, 3, 4))["x", Statistic.SUM_SQUARES])


def test_what_is_returned_whole_is_not_reduced() -> None:
    model = relu()
    AddObservers(("x", "y"), elements=frozenset({"y"}))(model)
    x = np.array([[[3, -1, 2, 0]]], np.float32)
    found = run(model, x)
    assert [statistic for name, statistic in found if name == "y"] == [Statistic.ELEMENTS]
    assert {Statistic.COUNT, Statistic.MINIMUM, Statistic.MAXIMUM, Statistic.SUM_SQUARES} == {
        statistic for name, statistic in found if name == "x"
    }
    np.testing.assert_array_equal(found["y", Statistic.ELEMENTS], np.maximum(x, 0))


def test_a_vector_per_channel_is_its_own_extremes() -> None:
    model = relu(shape="n")
    AddObservers(("x",), {"x": 0})(model)
    x = np.array([3, -1, 2], np.float32)
    np.testing.assert_array_equal(run(model, x)["x", Statistic.CHANNEL_MINIMUM], x)


def test_each_value_is_observed_once_and_names_do_not_clash() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 21]>
        relu (float[n] x) => (float[n] z) { "x/minimum" = Relu(x)
            z = Neg("x/minimum") }
    """)
    AddObservers(("x", "x/minimum", "x"))(model)
    CheckerPass(full_check=True)(model)
    assert len(list(observers(model))) == 8
    assert Observer("x/minimum_1", "x", Statistic.MINIMUM) in list(observers(model))


def test_observed_values_and_outputs_stay_what_they_were() -> None:
    plain, observed = relu(), relu()
    AddObservers(("x", "y", "z"), {"y": 1})(observed)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(session(plain).run({"x": x})["z"], session(observed).run({"x": x})["z"])


@pytest.mark.parametrize(
    ("values", "axes", "message"),
    [
        (("nothing",), {}, "value 'nothing' is not computed in the main graph"),
        (("n",), {}, "value 'n' holds int64: only float values"),
        (("inner",), {}, "value 'inner' is not computed in the main graph"),
        (("y",), {"y": 1}, "value 'y' has 1 axes: there is no axis 1"),
        (("y",), {"y": -2}, "value 'y' has 1 axes: there is no axis -2"),
    ],
)
def test_what_cannot_be_observed_is_refused(values: tuple[str, ...], axes: dict[str, int], message: str) -> None:
    model = ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 21]>
        branch (float[k] x, bool b) => (float[k] y, int64 n) {
            n = Size(x)
            y = If(b) <then_branch = t () => (float[k] inner) { inner = Relu(x) },
                       else_branch = e () => (float[k] other) { other = Neg(x) }>
        }
    """)
    with pytest.raises(ir.passes.PassError) as caught:
        ir.passes.Sequential(AddObservers(values, axes))(model)
    assert isinstance(caught.value.__cause__, ModelError)
    assert message in str(caught.value.__cause__)


def test_an_unknown_rank_is_refused_per_channel_only() -> None:
    model = relu()
    y = model.graph.node(0).outputs[0]
    y.shape = None
    with pytest.raises(ModelError, match="value 'y' has no known rank"):
        AddObservers(("y",), {"y": 1})(model)
    model = relu()
    model.graph.node(0).outputs[0].shape = None
    AddObservers(("y",))(model)
    assert run(model, np.ones((2, 3, 4), np.float32))["y", Statistic.COUNT] == 24


def test_nothing_to_observe_changes_nothing() -> None:
    model = relu()
    assert not AddObservers(())(model).modified
    assert len(model.graph.outputs) == 1


def test_values_are_returned_whole_where_asked_for() -> None:
    model = relu(dtype="float16")
    AddObservers(("x", "y", "z"), elements=frozenset({"x", "y", "z"}))(model)
    CheckerPass(full_check=True)(model)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float16)
    found = run(model, x)
    for name, expected in (("x", x), ("y", np.maximum(x, 0)), ("z", -np.maximum(x, 0))):
        assert found[name, Statistic.ELEMENTS].dtype == np.float32
        np.testing.assert_array_equal(found[name, Statistic.ELEMENTS], expected)


def test_inputs_and_outputs_are_returned_whole_too() -> None:
    model = relu()
    AddObservers(("x", "z"), elements=frozenset({"x", "z"}))(model)
    CheckerPass(full_check=True)(model)
    x = np.ones((1, 2, 4), np.float32)
    found = run(model, x)
    np.testing.assert_array_equal(found["x", Statistic.ELEMENTS], x)
    np.testing.assert_array_equal(found["z", Statistic.ELEMENTS], -x)
