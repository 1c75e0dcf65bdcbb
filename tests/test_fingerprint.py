from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.fingerprint import fingerprint
from qonnx.graph import load, save
from tests.graphs import model_of

TEXT = (
    "g (float[n,32] x, float[32,64] w, float[64] b) => (float[n,64] y) "
    "{ k = Constant<value = float[2] {1.0, 2.0}>() m = MatMul(x, w) y = Add(m, b) }"
)


def made(text: str = TEXT, seed: int = 0) -> ir.Model:
    return model_of(text, weights="w b", seed=seed)


def test_where_the_weights_are_stored_makes_no_difference(tmp_path: Path) -> None:
    save(made(), tmp_path / "inside.onnx")
    save(made(), tmp_path / "beside.onnx", external_data_bytes=0)
    files = [load(tmp_path / f"{name}.onnx") for name in ("inside", "beside")]
    assert {fingerprint(model) for model in (*files, made(), made().clone())} == {fingerprint(made())}


@pytest.mark.parametrize(
    "change",
    [
        ("MatMul(x, w)", "MatMul(w, x)"),
        ("Add(m, b)", "Sub(m, b)"),
        ("y = Add", "z = Identity(m) y = Add"),
        ("2.0", "3.0"),
        ("MatMul(x, w) y = Add(m,", "MatMul(x, w) y = Add(m,"),
    ],
)
def test_other_graphs_and_weights_are_told_apart(change: tuple[str, str]) -> None:
    text = TEXT.replace(*change)
    assert (fingerprint(made(text)) == fingerprint(made())) == (text == TEXT)
    assert fingerprint(made(text, seed=1)) != fingerprint(made(text))


def test_large_weights_are_sampled_to_their_ends() -> None:
    model = made()
    weight = model.graph.initializers["w"]
    assert weight.const_value is not None
    array = np.zeros((1000, 1000), np.float32)
    weight.const_value = ir.tensor(array)
    before = fingerprint(model)
    array[:] = np.random.default_rng(0).normal(size=array.shape)
    assert fingerprint(model) != before
