"""Which compiler is used for what; the GPU of this machine is made up."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qonnx.engine import backends, build_engine, gpu
from qonnx.engine.backends import RTX_BUILDS_FOR, Compiler, check_settings, find_compiler
from qonnx.engine.calibrate import from_batches, from_cache
from qonnx.engine.calibration_cache import Algorithm, write
from qonnx.engine.protocol import Calibration, Step
from qonnx.engine.settings import Backend, Calibrator, FloatType, Settings
from qonnx.errors import DataError, DependencyError, EngineError, QonnxError, TargetError
from qonnx.graph import save
from qonnx.targets import target
from tests.graphs import model_of

RTX, TRT = Backend.RTX, Backend.TENSORRT
RELU = "net (float[N,8] x) => (float[N,8] y) { [act] y = Relu(x) }"


def installed(monkeypatch: pytest.MonkeyPatch, *modules: str, here: tuple[int, int] | None = None) -> None:
    monkeypatch.setattr(backends, "_installed", lambda module: module in modules)
    monkeypatch.setattr(
        backends, "_version", lambda module: {"tensorrt": (10, 16, 1), "tensorrt_rtx": (1, 7, 1)}[module]
    )
    monkeypatch.setattr(gpu, "compute_capability", lambda: here)


@pytest.mark.parametrize(
    ("wanted", "name", "modules", "here", "expected"),
    [
        (None, "a800", {"tensorrt_rtx"}, None, RTX),
        (None, "a800", {"tensorrt_rtx", "tensorrt"}, None, RTX),
        (None, "a800", {"tensorrt_rtx", "tensorrt"}, (8, 9), RTX),
        (None, "a800", {"tensorrt_rtx", "tensorrt"}, (8, 0), TRT),
        (None, "orin", {"tensorrt"}, (8, 7), TRT),
        (RTX, "a800", {"tensorrt_rtx", "tensorrt"}, (8, 0), RTX),
        (TRT, "h100", {"tensorrt"}, (9, 0), TRT),
    ],
)
def test_the_compiler_that_is_used(
    wanted: Backend | None,
    name: str,
    modules: set[str],
    here: tuple[int, int] | None,
    expected: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, *modules, here=here)
    assert find_compiler(wanted, target(name)).backend is expected


@pytest.mark.parametrize(
    ("wanted", "name", "modules", "here", "error", "message"),
    [
        (None, "orin", {"tensorrt_rtx"}, None, TargetError, "'orin'.* not build for sm_87.*backend 'tensorrt'"),
        (None, "h100", {"tensorrt_rtx"}, None, TargetError, "'h100'.* not build for sm_90"),
        (RTX, "h100", {"tensorrt_rtx"}, (9, 0), TargetError, "sm_75, sm_80, sm_86, sm_89, sm_120, sm_121; build on"),
        (TRT, "a800", {"tensorrt"}, None, TargetError, "no GPU or no driver; .*use backend 'tensorrt-rtx'"),
        (TRT, "orin", {"tensorrt"}, None, TargetError, "build on a machine with orin$"),
        (TRT, "a800", {"tensorrt"}, (9, 0), TargetError, "is sm_80 and .* is sm_90.*hardware-compatible"),
        (TRT, "t4", {"tensorrt"}, (9, 0), TargetError, "build on the target$"),
        (TRT, "a800", set(), (8, 0), DependencyError, r"pip install 'qonnx-pipeline\[tensorrt\]'"),
        (None, "a800", set(), (8, 0), DependencyError, r"pip install 'qonnx-pipeline\[rtx\]'"),
        (None, "ort-cpu", {"tensorrt_rtx"}, None, TargetError, "runs no TensorRT engine"),
    ],
)
def test_what_cannot_be_built_names_what_can(
    wanted: Backend | None,
    name: str,
    modules: set[str],
    here: tuple[int, int] | None,
    error: type[QonnxError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, *modules, here=here)
    with pytest.raises(error, match=message) as caught:
        find_compiler(wanted, target(name))
    assert "\n" not in str(caught.value)


def test_a_compatible_engine_is_built_on_any_gpu_from_ampere_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "tensorrt", here=(9, 0))
    assert find_compiler(TRT, target("a800"), hardware_compatible=True).backend is TRT
    with pytest.raises(TargetError):
        find_compiler(TRT, target("t4"), hardware_compatible=True)


@pytest.mark.rtx
def test_tensorrt_for_rtx_builds_for_what_is_said() -> None:
    import tensorrt_rtx as trt

    members = {name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert members == {f"{major}{minor}" for major, minor in RTX_BUILDS_FOR}


OLD, TEN, ELEVEN, RTX_1 = (Compiler(TRT, version) for version in ((8, 6, 1), (10, 16, 1), (11, 4, 0), (1, 7, 1)))
RTX_1 = Compiler(RTX, (1, 7, 1))


@pytest.mark.parametrize(
    ("compiler", "settings", "float_type", "implicit", "message"),
    [
        (RTX_1, Settings(timing_cache="t"), FloatType.FP32, False, "timing_cache: tensorrt-rtx cannot"),
        (RTX_1, Settings(version_compatible=True), FloatType.FP32, False, "version_compatible: tensorrt-rtx cannot"),
        (RTX_1, Settings(hardware_compatible=True), FloatType.FP32, False, "hardware_compatible: tensorrt-rtx cannot"),
        (RTX_1, Settings(refit=True), FloatType.FP32, False, "refit: tensorrt-rtx cannot"),
        (RTX_1, Settings(), FloatType.FP32, True, "tensorrt-rtx 1.7.1 has no calibration: `qonnx quantize`"),
        (ELEVEN, Settings(), FloatType.FP32, True, "tensorrt 11.4.0 has no calibration: `qonnx quantize`"),
        (TEN, Settings(weight_streaming=True), FloatType.FP32, True, "strongly typed graphs only"),
        (OLD, Settings(weight_streaming=True), FloatType.FP32, False, "TensorRT 10 or later"),
        (OLD, Settings(), FloatType.BF16, False, "use fp16, or TensorRT 10"),
    ],
)
def test_what_a_compiler_cannot_do_is_refused(
    compiler: Compiler, settings: Settings, float_type: FloatType, implicit: bool, message: str
) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        check_settings(compiler, settings, float_type, implicit)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("compiler", "settings", "float_type", "implicit"),
    [
        (RTX_1, Settings(workspace_mib=64, level=5, weight_streaming=True), FloatType.BF16, False),
        (OLD, Settings(timing_cache="t", version_compatible=True, refit=True), FloatType.FP16, True),
        (TEN, Settings(weight_streaming=True, hardware_compatible=True), FloatType.BF16, False),
        (ELEVEN, Settings(timing_cache="t", refit=True), FloatType.FP16, False),
    ],
)
def test_what_a_compiler_can_do_is_not(
    compiler: Compiler, settings: Settings, float_type: FloatType, implicit: bool
) -> None:
    check_settings(compiler, settings, float_type, implicit)


@pytest.mark.parametrize(("field", "value"), [("level", 6), ("level", -1), ("workspace_mib", 0)])
def test_figures_out_of_range(field: str, value: int) -> None:
    with pytest.raises(EngineError, match=field):
        Settings(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backend": "onnx"}, EngineError, "unknown backend 'onnx'; choose one of tensorrt-rtx, tensorrt"),
        ({"float_type": "fp8"}, EngineError, "unknown float_type 'fp8'; choose one of fp32, fp16, bf16"),
        ({"calibrator": "minmax", "data": "not read"}, TargetError, "has no calibration"),
        ({"calibrator": "minmax", "data": np.zeros((2, 8), np.float32)}, TargetError, "has no calibration"),
        ({"calibrator": "minmax"}, EngineError, "calibrator 'minmax' needs data"),
        ({"target": "orin"}, TargetError, "sm_87"),
        ({"settings": Settings(refit=True)}, TargetError, "refit"),
    ],
)
def test_bad_arguments_of_build_engine(
    arguments: dict[str, object], error: type[QonnxError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "tensorrt_rtx")
    save(model_of(RELU), tmp_path / "net.onnx")
    with pytest.raises(error, match=message):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.plan", **arguments)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.rtx
def test_the_builder_says_how_far_it_is_and_takes_sizes_from_data(tmp_path: Path) -> None:
    save(model_of("net (float[N,T] x) => (float[N,T] y) { [act] y = Relu(x) }"), tmp_path / "net.onnx")
    steps: list[Step] = []
    shapes = [(4, 7), (4, 9), (2, 9)]
    report = build_engine(
        tmp_path / "net.onnx",
        tmp_path / "net.plan",
        data=[np.zeros(shape, np.float32) for shape in shapes],
        dims={"N": (1, 2, 3)},
        settings=Settings(workspace_mib=64, level=1, weight_streaming=True),
        progress=steps.append,
    )
    assert report.profiles == {"x": ((1, 7), (2, 9), (3, 9))}
    assert max(step.done for step in steps if step.phase == "Building engine") == steps[0].total


def test_ranges_from_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    write(path, {"x": 1.0}, "10.16.1", Algorithm.MINMAX)
    assert from_cache(path, TEN) == Calibration(Calibrator.MINMAX, cache=path.read_text())
    with pytest.raises(DataError, match=r"version number 101601, which TensorRT 8\.6\.1 .* --tensorrt-version 8\.6\.1"):
        from_cache(path, OLD)
    for text, message in (
        ("x", "first line"),
        ("TRT-101601-Other\n", "first line"),
        ("TRT-101601-MinMaxCalibration\nx", "line 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            from_cache(path, TEN)
    with pytest.raises(DataError, match="No such file"):
        from_cache(tmp_path / "absent", TEN)


def test_ranges_from_batches(tmp_path: Path) -> None:
    def batches() -> Iterator[dict[str, np.ndarray]]:
        yield from ({"x": np.full((4, 8), value, np.float32)} for value in (1, 2))

    calibration = from_batches(model_of(RELU), batches(), Calibrator.LEGACY, tmp_path)
    assert calibration.shapes == {"x": (4, 8)}
    assert [np.load(file)["x"][0, 0] for file in calibration.batches] == [1, 2]
    with pytest.raises(DataError, match="batch 2 has other shapes"):
        from_batches(
            model_of(RELU), [np.zeros((4, 8), np.float32), np.zeros((3, 8), np.float32)], Calibrator.MINMAX, tmp_path
        )


def test_a_graph_with_qdq_takes_no_calibrator(tmp_path: Path) -> None:
    text = """net (float[N,8] x) => (float[N,8] y) <float s = {0.1}, int8 z = {0}>
        { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"""
    save(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> {text}'), tmp_path / "net.onnx")
    with pytest.raises(EngineError, match="holds Q/DQ nodes"):
        build_engine(tmp_path / "net.onnx", tmp_path / "net.plan", calibration_cache="cache")
