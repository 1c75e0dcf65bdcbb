"""Layers that INT8 makes no faster stay in float, through the one call and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qonnx.errors import QonnxError, RecipeError, TargetError
from qonnx.graph import FLOAT_REASON, load, save
from qonnx.pipeline import quantize
from qonnx.plan import QuantPlan
from tests.graphs import model_of

# With many rows `wide` mostly writes floats and gains nothing; with few, it reads its weight in half the bytes.
TEXT = """g (float[n,16] x, float[16] b, float[16,1024] w, float[16,64] d) => (float[n,1024] y, float[n,64] u)
    { h = LayerNormalization(x, b) [wide] y = MatMul(h, w) [small] u = MatMul(h, d) }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(model_of(TEXT, weights="b w d"), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def data() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((8, 16)).astype(np.float32)} for _ in range(4)]


@pytest.mark.parametrize(("rows", "left"), [(1024, {"wide"}), (1, set())])
def test_what_gains_nothing_at_these_sizes_stays_in_float(rows: int, left: set[str], model: Path) -> None:
    result = quantize(model, data(), model.with_name("q.onnx"), skip_unprofitable={"n": rows})
    assert {layer.node for layer in result.plan.float_layers} == left
    for layer in result.plan.float_layers:
        assert layer.reason == "int8 saves 1.5% of its time on a800-sxm-80: bound by memory at these sizes"
    reasons = {node.name: node.metadata_props.get(FLOAT_REASON) for node in load(result.output).graph}
    assert {name for name, reason in reasons.items() if reason} == left


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "ort-cpu"}, TargetError, "nothing is known of how fast ort-cpu is"),
        ({"recipe": "w4"}, RecipeError, "weighs layers on INT8, not format weight_only"),
        ({"skip_unprofitable": {"m": 1}}, QonnxError, "'m'"),
        ({"plan": QuantPlan("a800", "int8", (), (), ())}, RecipeError, "a plan decides already"),
    ],
)
def test_where_it_makes_no_sense(
    arguments: dict[str, object], error: type[QonnxError], message: str, model: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        quantize(model, data(), model.with_name("q.onnx"), **{"skip_unprofitable": {}, **arguments})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not model.with_name("q.onnx").exists()


def test_on_the_command_line(model: Path) -> None:
    folder = model.parent / "data"
    folder.mkdir()
    for number, batch in enumerate(data()):
        np.savez(folder / f"{number}.npz", allow_pickle=False, **batch)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        words = ["quantize", "model.onnx", "--data", "data", "-o", "q.onnx", "--save-plan", "plan.json", *options]
        command = [sys.executable, "-m", "qonnx", *words]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.run(command, cwd=model.parent, env=environment, capture_output=True, text=True, check=False)

    assert run("--dim", "n=8").stderr.startswith("error: --dim n=8: only serves --skip-unprofitable")
    done = run("--skip-unprofitable", "--dim", "n=1024")
    assert done.returncode == 0, done.stderr
    layers = json.loads((model.parent / "plan.json").read_text())["layers"]
    assert {layer["node"] for layer in layers if layer.get("reason")} == {"wide"}
