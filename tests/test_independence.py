"""What the graph tells of samples must be so, and of common operators it must be told."""

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qonnx.independence import _ALONG_AXES, _ALONG_AXIS, _BATCHED, _ELEMENTWISE, independent
from tests.helpers import random_feeds, run

# x is [samples, 8, 4, 6], r is [samples, 4]; k, l, ... are constants.
BY_SAMPLE = {
    "a chain": "a = Conv <kernel_shape = [1, 1]> (x, w) b = Relu(a) y = GlobalAveragePool(b)",
    "a residual": "a = Conv <kernel_shape = [1, 1]> (x, w) y = Add(a, x)",
    "a gate": "a = GlobalAveragePool(x) b = Sigmoid(a) y = Mul(b, x)",
    "constants that broadcast": "a = Add(c, x) b = Mul(a, d) y = Where(m, b, a)",
    "windows": """a = MaxPool <kernel_shape = [2, 2]> (x) b = AveragePool <kernel_shape = [2, 2]> (a)
        y = LRN <size = 3> (b)""",
    "normalized": "a = BatchNormalization(x, s, s, s, v) b = InstanceNormalization(a, s, s) y = Identity(b)",
    "transposed windows": """a = ConvTranspose(x, w) b = DepthToSpace <blocksize = 2> (a)
        y = SpaceToDepth <blocksize = 2> (b)""",
    "a mean over all but the first": "y = ReduceMean <axes = [1, -1], keepdims = 0> (x)",
    "a softmax": "a = Softmax(x) b = Softmax <axis = 1> (a) y = LogSoftmax <axis = -3> (b)",
    "layers": "a = LayerNormalization(x, six) y = LayerNormalization <axis = 2> (a, image)",
    "flattened": "a = Flatten(x) y = MatMul(a, wide)",
    "a linear layer": "y = Gemm(r, square, four)",
    "a linear layer, transposed": "y = Gemm <transB = 1> (r, square, one_row)",
    "rows": "y = MatMul(x, w6)",
    "samples times samples": "a = Transpose <perm = [0, 1, 3, 2]> (x) y = MatMul(x, a)",
    "parts": "a, b = Split <axis = 1> (x) e = Relu(b) y = Concat <axis = 1> (a, e)",
    "reshaped behind the first axis": "y = Reshape(x, behind)",
    "more and fewer axes": "a = Unsqueeze(x, axes) y = Squeeze(a, axes)",
    "fewer axes, counted from the end": "a = ReduceMean <axes = [2, 3], keepdims = 0> (x) y = Softmax <axis = -1> (a)",
    "more axes, counted from the end": "a = Unsqueeze(x, axes) y = Softmax <axis = -4> (a)",
    "padded": "y = Pad(x, pads)",
    "resized": "y = Resize(x, , twice)",
}

NOT = {
    "a mean over samples": "y = ReduceMean <axes = [0]> (x)",
    "a mean over samples, by its other number": "y = ReduceMean <axes = [-4]> (x)",
    "a mean over everything": "y = ReduceMean(x)",
    "less a mean over samples": "a = ReduceMean <axes = [0]> (x) y = Sub(x, a)",
    "a softmax over samples": "y = Softmax <axis = 0> (x)",
    "samples moved": "y = Transpose <perm = [1, 0, 2, 3]> (x)",
    "samples moved to the end": "y = Transpose(x)",
    "samples merged with channels": "y = Reshape(x, merged)",
    "samples merged by flattening": "y = Flatten <axis = 2> (x)",
    "rows of samples": "y = Flatten <axis = 0> (x)",
    "samples joined": "y = Concat <axis = 0> (x, x)",
    "a constant joined": "y = Concat <axis = 1> (x, image_of_three)",
    "samples times other samples": "a = Transpose <perm = [1, 0]> (r) y = MatMul(r, a)",
    "columns": "y = Gemm <transA = 1> (r, of_three)",
    "a constant with a row for each": "y = Add(r, rows)",
    "a bias with a row for each": "y = Gemm(r, square, rows)",
    "more axes than x": "y = Add(r, three_axes)",
    "samples against channels": "a = ReduceMean <axes = [1, 2, 3], keepdims = 0> (x) y = Add(r, a)",
    "a sample more": "y = Pad(x, pads_first)",
    "twice the samples": "y = Resize(x, , twice_first)",
    "an axis before": "y = Unsqueeze(x, first)",
    "an axis before, by its other number": "y = Unsqueeze(x, before)",
    "what came before": "y = CumSum(x, zero)",
    "places": "a, b = MaxPool <kernel_shape = [2, 2]> (x) y = Cast <to = 1> (b)",
    "constants only": "y = Relu(four)",
    "weights from samples": "y = Conv(w, x)",
    "weights from the same samples": "y = Conv <kernel_shape = [4, 6]> (x, x)",
    "constants alone": "y = Softmax(w)",
    "one row": "y = Relu(one_row)",
    "samples that are none": "y = Reshape <allowzero = 1> (x, behind)",
    "as many rows as fit": "y = Reshape(x, as_many)",
    "three samples": "y = Reshape(x, three)",
    "a mean over samples and more": "y = ReduceMean <axes = [0, 1]> (x)",
    "samples times samples of fewer axes": "a = MatMul(r, square) y = MatMul(x, a)",
    "samples times samples, as matrices": "y = MatMul(r, r)",
    "parts of the samples": "y, a = Split(x)",
    "a sample before": "y = Pad(x, pads_before)",
    "half the samples": "y = Resize(x, , half)",
    "a region of samples": 'y = Resize <coordinate_transformation_mode = "tf_crop_and_resize"> (x, crop, twice)',
    "one axis of the softmax": "y = Softmax <axis = -4> (x)",
    "fewer axes, counted from the end": "a = ReduceMean <axes = [2, 3], keepdims = 0> (x) y = Softmax <axis = -2> (a)",
    "more axes, counted from the end": "a = Unsqueeze(x, axes) y = Softmax <axis = -5> (a)",
    "two axes, counted from the end": "a = Flatten(x) y = Softmax <axis = -2> (a)",
    "three axes, counted from the end": "a = Reshape(x, behind) y = Softmax <axis = -3> (a)",
    "a constant of more axes, with one row": "y = Add(r, three_axes)",
    "another domain": "y = com.microsoft.Flatten(x)",
}

CONSTANTS = {
    "w": np.ones((8, 8, 1, 1)),
    "c": np.arange(4.0).reshape(4, 1),
    "d": np.arange(8.0).reshape(1, 8, 1, 1),
    "m": np.array([True, False, True, True, False, True]),
    "s": np.arange(8.0),
    "v": np.ones(8),
    "six": np.arange(6.0),
    "image": np.arange(24.0).reshape(4, 6),
    "image_of_three": np.ones((3, 8, 4, 6)),
    "wide": np.linspace(-1, 1, 8 * 24 * 3).reshape(-1, 3),
    "square": np.arange(16.0).reshape(4, 4),
    "of_three": np.arange(6.0).reshape(3, 2),
    "four": np.arange(4.0),
    "one_row": np.arange(4.0).reshape(1, 4),
    "rows": np.arange(12.0).reshape(3, 4),
    "three_axes": np.ones((1, 1, 4)),
    "w6": np.linspace(-1, 1, 12).reshape(6, 2),
    "behind": np.array([0, 4, -1]),
    "as_many": np.array([-1, 12, 16]),
    "three": np.array([3, 8, 24]),
    "crop": np.array([0.0, 0, 0, 0, 0.5, 1, 1, 1]),
    "half": np.array([0.5, 1, 1, 1]),
    "merged": np.array([-1, 4, 6]),
    "axes": np.array([1]),
    "last": np.array([-1]),
    "axes_of_four": np.array([1, 2, 3, 0]),
    "first": np.array([0]),
    "before": np.array([-5]),
    "zero": np.array(0),
    "pads": np.array([0, 1, 1, 0, 0, 0, 2, 1]),
    "pads_before": np.array([1, 0, 0, 0, 0, 0, 0, 0]),
    "pads_first": np.array([0, 0, 0, 0, 1, 0, 0, 0]),
    "twice": np.array([1, 1, 2, 2.0]),
    "twice_first": np.array([2, 1, 1, 1.0]),
}


def model_of(body: str, opset: int = 17) -> ir.Model:
    words = re.findall(r"\w+", body)
    constants = [_text(name, np.asarray(array)) for name, array in CONSTANTS.items() if name in words]
    text = f"g (float[n, 8, 4, 6] x, float[n, 4] r) => (z) <{', '.join(constants)}> {{ {body} z = Identity(y) }}"
    return ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft": 1]> {text}')


def _text(name: str, array: np.ndarray) -> str:
    kind = {"f": "float", "i": "int64", "b": "bool"}[array.dtype.kind]
    elements = ", ".join(str(int(x) if kind == "bool" else x) for x in array.reshape(-1))
    shape = f"[{', '.join(map(str, array.shape))}]" if array.ndim else ""
    return f"{kind}{shape} {name} = {{{elements}}}"


@pytest.mark.parametrize("name", BY_SAMPLE)
def test_what_is_computed_by_sample_is_found_and_is_so(name: str) -> None:
    model = model_of(BY_SAMPLE[name])
    assert independent(model, ["y"])
    feeds = random_feeds(model, n=3)
    whole = run(model, feeds)["z"]
    assert whole.shape[0] == 3
    for sample in range(3):
        alone = run(model, {name: array[sample : sample + 1] for name, array in feeds.items()})["z"]
        np.testing.assert_allclose(alone, whole[sample : sample + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOT)
def test_whatever_else_is_not_told(name: str) -> None:
    model = model_of(NOT[name])
    assert not independent(model, ["y"])
    assert not independent(model, ["x", "y"])
    assert independent(model, ["x"])


def test_what_reads_something_else_is_not_told_either() -> None:
    model = model_of("a = ReduceMean <axes = [0]> (x) b = Relu(a) y = Mul(x, b) e = Relu(x)")
    assert not independent(model, ["b"])
    assert not independent(model, ["y", "e"])
    assert independent(model, ["e"])


def test_an_input_of_unknown_rank_is_not_told() -> None:
    model = model_of("y = Add(r, four)")
    assert independent(model, ["y"])
    model.graph.inputs[1].shape = None
    assert not independent(model, ["y"])


def test_a_rank_that_the_file_declares_is_not_believed() -> None:
    """ONNX Runtime only warns of it."""
    model = model_of("y = ReduceMean <axes = [-2], keepdims = 1> (r)")
    next(iter(model.graph)).outputs[0].shape = ir.Shape(["a", "b", "c"])
    assert not independent(model, ["y"])


def test_what_later_opsets_pad_and_resize_by_axes_is_not_told() -> None:
    for body in ("y = Pad(x, pads_first, , axes_of_four)", "y = Resize <axes = [1, 2, 3, 0]> (x, , twice)"):
        assert not independent(model_of(body, opset=18), ["y"])


def test_an_initializer_that_doubles_as_an_input_is_a_constant() -> None:
    model = model_of("y = Add(r, one_row)")
    constant = model.graph.initializers["one_row"]
    model.graph.inputs.append(constant)
    assert independent(model, ["y"])
    assert not independent(model, ["one_row"])


def test_a_batch_normalization_that_trains_is_not_told() -> None:
    model = model_of("y = BatchNormalization(x, s, s, s, v)")
    assert independent(model, ["y"])
    next(iter(model.graph)).attributes.add(ir.AttrInt64("training_mode", 1))
    assert not independent(model, ["y"])


def test_every_operator_that_is_named_exists() -> None:
    names = {*_ELEMENTWISE, *_BATCHED, *_ALONG_AXES, *_ALONG_AXIS}
    assert [name for name in names if not onnx.defs.has(name)] == []


OTHERS = {
    "BatchNormalization": "x, s, s, s, v",
    "Conv": "x, w",
    "ConvTranspose": "x, w",
    "GroupNormalization": "x, s, s",
    "InstanceNormalization": "x, s, s",
    "LayerNormalization": "x, six",
    "RMSNormalization": "x, six",
    "Squeeze": "GlobalAveragePool(x), last",
    "Unsqueeze": "x, last",
}
ATTRIBUTES = {
    "AveragePool": "kernel_shape = [2, 2]",
    "Cast": "to = 1",
    "DepthToSpace": "blocksize = 2",
    "GroupNormalization": "num_groups = 2",
    "LRN": "size = 3",
    "LpPool": "kernel_shape = [2, 2]",
    "MaxPool": "kernel_shape = [2, 2]",
    "SpaceToDepth": "blocksize = 2",
}
KNOWN = (_ELEMENTWISE | _BATCHED | {*_ALONG_AXES, *_ALONG_AXIS}) - {"Where", "Split"}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_operator_that_is_named_is_told(name: str) -> None:
    inputs = OTHERS.get(
        name, "x, last" if name in _ALONG_AXES else "x" + ", x" * (onnx.defs.get_schema(name).min_input - 1)
    )
    head = "p = GlobalAveragePool(x) " if "Global" in inputs else ""
    inputs = inputs.replace("GlobalAveragePool(x)", "p")
    attributes = f"<{ATTRIBUTES[name]}>" if name in ATTRIBUTES else ""
    model = model_of(f"{head}y = {name} {attributes} ({inputs})", opset=24)
    assert independent(model, ["y"])
