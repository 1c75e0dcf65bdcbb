import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from qonnx.channel_maxima import channel_maxima
from tests.graphs import model_of

TEXT = (
    "g (float[n,4,5,6] x, float[4] k, float16[n,7] h) => (float[n,20,6] r, float16[n,7] g) "
    "{ s = Sin(x) shape = Constant<value_ints=[0,20,6]>() r = Reshape(s, shape) g = Neg(h) t = Transpose(r) }"
)


@pytest.mark.parametrize("opset", [13, 18, 21])
def test_maxima_are_what_numpy_computes(opset: int) -> None:
    model = model_of(TEXT, weights="k", opset=opset)
    ShapeInferencePass()(model)
    before = ir.to_onnx_text(model)
    rng = np.random.default_rng(0)
    batches: list[dict[str, np.ndarray]] = [
        {"x": rng.normal(size=(n, 4, 5, 6)).astype(np.float32), "h": rng.normal(size=(n, 7)).astype(np.float16)}
        for n in (3, 2)
    ]
    axes = {"x": 1, "s": -1, "r": -1, "g": 1, "h": None, "t": 0, "k": 0, "unknown": 1}
    found = channel_maxima(model, axes, batches)
    x, h = (np.concatenate([batch[name] for batch in batches]) for name in ("x", "h"))
    s: np.ndarray = np.abs(np.sin(x))
    np.testing.assert_array_equal(found["x"], np.abs(x).max((2, 3)))
    np.testing.assert_allclose(found["s"], s.max((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["r"], s.reshape(5, 20, 6).max(1), rtol=1e-6)
    np.testing.assert_array_equal(found["g"], np.abs(h).astype(np.float32))
    np.testing.assert_array_equal(found["h"], [[np.abs(batch["h"]).max()] for batch in batches])
    np.testing.assert_allclose(found["t"], [[s[:3].max()], [s[3:].max()]], rtol=1e-6)
    assert found.keys() == {"x", "s", "r", "g", "h", "t"}
    assert ir.to_onnx_text(model) == before


def test_nothing_to_observe() -> None:
    assert channel_maxima(model_of(TEXT, weights="k"), {}, []) == {}
