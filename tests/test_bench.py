"""What `qonnx bench` says without a GPU, and with one that is made up."""

import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from qonnx.engine import EngineReport, FloatType, bench, gpu
from qonnx.engine.backends import Compiler
from qonnx.engine.bench import Timing
from qonnx.engine.settings import Backend
from qonnx.engine_tables import bench_tables
from qonnx.errors import EngineError, TargetError
from qonnx.graph import save
from tests.graphs import model_of

NET = "net (float[N,8] x) => (float[N,8] y) { y = Neg(x) }"

# Stands in for `qonnx.engine.execution`: gives back the negative input, and takes 1 to 200 ms.
CHILD = """
import json, sys
import numpy as np
request = json.load(sys.stdin)
assert open(request["plan"]).read() == "engine"
for number, file in enumerate(request["batches"]):
    np.savez(f"{request['outputs']}/{number}.npz", y=-np.load(file)["x"] * np.float32(0.9))
json.dump({"milliseconds": list(range(1, request["runs"] + 1)), "together": 1000.0}, sys.stdout)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save(model_of(NET), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(source: Path, plan: Path, **options: object) -> EngineReport:
        plan.write_text("engine")
        assert options["float_type"] is FloatType.FP16
        return EngineReport(str(plan), 6, 1.0, "tensorrt 10.16.1", (8, 0), {}, (), (), ())

    monkeypatch.setattr(gpu, "compute_capability", lambda: (8, 0))
    monkeypatch.setattr(bench, "find_compiler", lambda *_: Compiler(Backend.TENSORRT, (10, 16, 1)))
    monkeypatch.setattr(bench, "build_engine", build)
    monkeypatch.setattr(bench, "CHILD", (sys.executable, "-c", CHILD))


DATA = [np.random.default_rng(seed).standard_normal((4, 8)).astype(np.float32) for seed in range(3)]


def test_without_a_gpu_it_says_so_and_offers_the_roofline(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "compute_capability", lambda: None)
    with pytest.raises(TargetError) as caught:
        bench.bench(model, DATA, float_model="float.onnx", target="a100")
    assert "no GPU or no driver" in str(caught.value)
    assert "`qonnx roofline float.onnx --device a100`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("a_gpu")
def test_figures(model: Path) -> None:
    report = bench.bench(model, DATA, float_model=model, runs=100)
    assert report.quantized == Timing(FloatType.FP16, 50.5, 90.1, 95.05, 99.01, 400.0, 6)
    assert report.speedup == 1.0
    assert report.shapes == {"x": (4, 8)}
    assert report.batches == 3
    for (found,) in (report.against_onnxruntime, report.against_float):
        assert found.name == "y"
        assert found.elements == 3 * 32
        assert found.sqnr_db == pytest.approx(20, abs=1e-3)  # a tenth of the signal
    assert msgspec.json.decode(msgspec.json.encode(report))["quantized"]["p50"] == 50.5
    lines = [line.plain for line in bench_tables(report)]
    assert lines[0] == "50.500 ms a batch, 1.00 times as fast as the float model in fp16"
    assert "50.500  90.100  95.050  99.010        400   6 B  quantized" in lines
    assert "outputs beside ONNX Runtime's, on 3 batches" in lines
    alone = bench.bench(model, DATA)
    assert (alone.reference, alone.speedup, alone.against_float) == (None, None, ())


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.abort()", r"net.onnx: the engine does not run \(exit code -6\)"),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
        ('print(\'{"error": "the engine does not load"}\')', "net.onnx: the engine does not load"),
    ],
)
def test_a_gpu_that_fails(code: str, message: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHILD", (sys.executable, "-c", code))
    with pytest.raises(EngineError, match=message):
        bench.bench(model, DATA)


@pytest.mark.parametrize(("option", "value"), [("backend", "onnx"), ("float_type", "fp8")])
@pytest.mark.usefixtures("a_gpu")
def test_unknown_words(option: str, value: str, model: Path) -> None:
    with pytest.raises(EngineError, match=f"unknown {option} '{value}'"):
        bench.bench(model, DATA, **{option: value})  # type: ignore[arg-type]
