"""Fixing the sizes of dynamic dimensions."""

import onnx_ir as ir
import pytest

from qonnx.errors import DataError
from qonnx.sizes import at_sizes, elements, resolve_dims
from tests.graphs import model_of

FLATTEN = (
    "g (float[batch,length,8] x) => (float[batch,features] y) { s = Shape<start=0, end=1>(x) "
    "m = Constant<value=int64[1] {-1}>() t = Concat<axis=0>(s, m) r = Reshape(x, t) y = Relu(r) }"
)


def shapes(model: ir.Model) -> dict[str, str]:
    return {value.name or "": str(value.shape) for node in model.graph for value in node.outputs}


def test_every_value_gets_a_size_through_computed_shapes_and_declared_outputs() -> None:
    model = model_of(FLATTEN)
    fixed = at_sizes(model, {"batch": 3, "length": 5})
    assert str(fixed.graph.inputs[0].shape) == "[3,5,8]"
    assert shapes(fixed)["r"] == shapes(fixed)["y"] == "[3,40]"
    assert str(model.graph.inputs[0].shape) == "[batch,length,8]"
    assert str(model.graph.outputs[0].shape) == "[batch,features]"


def test_sizes_that_the_file_declares_for_other_inputs_are_not_believed() -> None:
    model = model_of("g (float[n,4] x) => (float[1,4] y) { a = Relu(x) y = Neg(a) }")
    model.graph.node(0).outputs[0].shape = ir.Shape([1, 4])
    assert shapes(at_sizes(model, {"n": 7})) == {"a": "[7,4]", "y": "[7,4]"}


def test_the_first_axis_is_one_unless_given() -> None:
    model = model_of("g (float[batch,4] x, float[4,batch] z) => (float[batch,batch] y) { y = MatMul(x, z) }")
    assert resolve_dims(model) == {"batch": 1}
    assert shapes(at_sizes(model)) == {"y": "[1,1]"}


def test_a_dimension_without_a_name_is_called_by_input_and_axis() -> None:
    model = model_of("g (float[?,4,?] x) => (float[?,4,?] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape([None, 4, None])
    assert resolve_dims(model, {"x.2": 6}) == {"x.0": 1, "x.2": 6}
    assert shapes(at_sizes(model, {"x.2": 6})) == {"y": "[1,4,6]"}


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({}, "dimension 'length' of input 'x' is dynamic: give its size, such as length=128"),
        ({"length": 3, "bath": 2}, "dims names 'bath', which no input has; they have 'batch', 'length'"),
        ({"length": 0}, "dims gives 'length' the size 0; give 1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(dims: dict[str, int], message: str) -> None:
    with pytest.raises(DataError) as error:
        at_sizes(model_of(FLATTEN), dims)
    assert str(error.value) == message


def test_a_fixed_model_has_nothing_to_size() -> None:
    model = model_of("g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }")
    assert resolve_dims(model) == {}
    with pytest.raises(DataError, match="they have no dynamic dimension"):
        resolve_dims(model, {"n": 1})


def test_an_input_without_rank_is_refused() -> None:
    model = model_of("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = None
    with pytest.raises(DataError, match="input 'x' has no declared rank; export the model with shapes"):
        at_sizes(model)


def test_elements() -> None:
    assert elements(ir.Value(name="v", shape=ir.Shape([2, 3]))) == 6
    assert elements(ir.Value(name="v", shape=ir.Shape([]))) == 1
    assert elements(ir.Value(name="v", shape=ir.Shape([2, "n"]))) is None
    assert elements(ir.Value(name="v")) is None
    assert elements(None) is None
