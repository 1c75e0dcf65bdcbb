"""Running graphs and passes: what a pass does must not change what a graph computes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]

# The size of dynamic dimensions in `random_feeds`.
DYNAMIC = 3


def _saturates() -> bool:
    """Whether products of uint8 and int8 lose their largest sums here where nothing is optimized."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (uint8[1, 4] x) => (int32[1, 1] y)
        <int8[4, 1] w = {127, 127, 127, 127}> { y = MatMulInteger(x, w) }"""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    native = ort.InferenceSession(
        ir.to_proto(ir.from_onnx_text(text)).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return bool(native.run(None, {"x": np.full((1, 4), 255, np.uint8)})[0] != 4 * 255 * 127)


# Whether integer operators are run optimized. On x86 without VNNI they are exact with optimizations only, one of which
# `session.x64quantprecision` is.
LEVELS = (True,) if _saturates() else (False, True)


def run(model: ir.Model, feeds: Feeds, optimize: bool = False) -> dict[str, Array]:
    """All outputs of a model by name, from ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")
    model = ir.external_data.load_to_model(model.clone())
    native = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in native.get_outputs()]
    return dict(zip(names, native.run(None, dict(feeds)), strict=True))


def random_feeds(model: ir.Model, seed: int = 0, **sizes: int) -> dict[str, Array]:
    """Standard normal floats, and zeros or ones of other types, for every input without a default value.

    Args:
        model: whose inputs to feed.
        seed: of the random numbers.
        sizes: of dynamic dimensions, by name; 3 by default.
    """
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer() or value.shape is None or value.dtype is None:
            continue
        shape = [size if isinstance(size, int) else sizes.get(str(size.value), DYNAMIC) for size in value.shape]
        floating = value.dtype.is_floating_point()
        data = rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)
        feeds[value.name or ""] = np.asarray(data).astype(value.dtype.numpy())
    return feeds


def assert_same_function(before: ir.Model, after: ir.Model, feeds: Feeds | None = None, rtol: float = 1e-5) -> None:
    """Both models return the same outputs: names, order, types, shapes, and values relative to the largest one."""
    feeds = random_feeds(before) if feeds is None else feeds
    expected, actual = run(before, feeds), run(after, feeds)
    assert list(actual) == list(expected)
    for name, reference in expected.items():
        result = actual[name]
        assert (result.dtype, result.shape) == (reference.dtype, reference.shape), name
        if np.issubdtype(reference.dtype, np.floating) and reference.size:
            scale = float(np.abs(reference[np.isfinite(reference)]).max(initial=0.0))
            np.testing.assert_allclose(result, reference, rtol=rtol, atol=rtol * scale, err_msg=name)
        else:
            np.testing.assert_array_equal(result, reference, err_msg=name)


def apply(step: ir.passes.InPlacePass, model: ir.Model, feeds: Feeds | None = None, rtol: float = 1e-5) -> list[str]:
    """Applies a pass that must change the graph and nothing that it computes; returns the operators afterwards.

    Checked besides: a second run changes nothing, and the result is valid ONNX.
    """
    before = model.clone()
    assert step(model).modified
    assert not step(model).modified
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_function(before, model, feeds, rtol)
    return operators(model)


def leave_alone(step: ir.passes.InPlacePass, model: ir.Model) -> None:
    """Applies a pass that must not touch the graph."""
    before = ir.to_onnx_text(model)
    assert not step(model).modified
    assert ir.to_onnx_text(model) == before


def operators(model: ir.Model) -> list[str]:
    """The operators of the main graph, in order."""
    return [node.op_type for node in model.graph]
