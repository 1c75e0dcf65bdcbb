"""The driver uses nothing that the Python bindings of TensorRT 8.6, 10 and 11 do not have: the real ones are asked."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.fetch import wheel
from qonnx.engine.execution import RunReply, RunRequest
from qonnx.engine.protocol import Calibration, Profile, Refusal, Request, Step
from qonnx.engine.settings import Backend, Calibrator, FloatType, Settings
from tests.tensorrt_double import Transcript

pytestmark = pytest.mark.trt

WHEELS = {
    "8.6.1": ("tensorrt-bindings", "8.6.1"),
    "10.16": ("tensorrt-cu12-bindings", "10.16.1.11"),
    "11.4": ("tensorrt-cu12-bindings", "11.4.0.106"),
}
CUDA = (("cuda-bindings", "13.5.0"), ("cuda-pathfinder", "1.9.0"))
PROFILES: dict[str, Profile] = {"x": ((1, 8), (4, 8), (16, 8))}


def driven(version: str, tmp_path: Path, *options: str, **changes: object) -> Transcript:
    """What the driver does with a version."""
    (transcript,) = all_driven(version, tmp_path, [changes], *options)
    return transcript


def all_driven(
    version: str, tmp_path: Path, requests: Sequence[Mapping[str, object]], *options: str
) -> list[Transcript]:
    """The same for several requests, in one process of their own: all versions share one module name."""
    request = Request(
        model=str(tmp_path / "net.onnx"),
        plan=str(tmp_path / "net.plan"),
        backend=Backend.TENSORRT,
        compute_capability=(8, 0),
        profiles=PROFILES,
    )
    changed = [msgspec.structs.replace(request, **changes) for changes in requests]
    command = [sys.executable, "-m", "tests.tensorrt_double", str(wheel(*WHEELS[version])), *options]
    done = subprocess.run(command, input=msgspec.json.encode(changed), capture_output=True, check=False)
    assert done.stdout, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=list[Transcript])


def flags(transcript: Transcript) -> set[str]:
    return {call.split("(")[1].rstrip(")") for call in transcript.calls if ".set_flag(" in call}


@pytest.mark.parametrize(
    ("version", "network", "expected"),
    [("8.6.1", 1 << 0, {"INT8"}), ("10.16", 1 << 1, set()), ("11.4", 1 << 0, set())],
)
def test_a_graph_with_qdq(version: str, network: int, expected: set[str], tmp_path: Path) -> None:
    done = driven(version, tmp_path)
    assert f"Builder.create_network({network})" in done.calls  # strong typing, where there is any
    assert flags(done) == expected
    assert "IOptimizationProfile.set_shape('x', (1, 8), (4, 8), (16, 8))" in done.calls
    assert done.reply.compiler.startswith(f"tensorrt {version}")
    assert done.reply.refusals == ()
    assert '"Name": "a"' in done.reply.inspection
    assert (tmp_path / "net.plan").read_bytes() == b"engine"
    expected_steps = [Step("Building engine", done, 2) for done in (0, 1, 2, 2)]
    assert done.steps == ([] if version == "8.6.1" else expected_steps)  # its builder has no monitor


@pytest.mark.parametrize("version", WHEELS)
def test_every_setting(version: str, tmp_path: Path) -> None:
    timing = tmp_path / "timing.cache"
    timing.write_bytes(b"measured")
    settings = Settings(
        workspace_mib=64,
        level=5,
        timing_cache=str(timing),
        version_compatible=True,
        hardware_compatible=True,
        refit=True,
        weight_streaming=version != "8.6.1",
    )
    done = driven(version, tmp_path, settings=settings)
    assert done.reply.refusals == ()
    assert flags(done) >= {"REFIT", "VERSION_COMPATIBLE"}
    assert ("WEIGHT_STREAMING" in flags(done)) == (version != "8.6.1")
    for call in (
        "IBuilderConfig.set_memory_pool_limit(WORKSPACE, 67108864)",
        "IBuilderConfig.builder_optimization_level = (5)",
        "IBuilderConfig.hardware_compatibility_level = (AMPERE_PLUS)",
        "IBuilderConfig.create_timing_cache(b'measured')",
        "IBuilderConfig.set_timing_cache(ITimingCache, False)",
    ):
        assert call in done.calls
    assert timing.read_bytes() == b"engine"


@pytest.mark.parametrize(("version", "short"), [("8.6.1", FloatType.FP16), ("10.16", FloatType.BF16)])
def test_implicit_int8_from_a_cache(version: str, short: FloatType, tmp_path: Path) -> None:
    requests = [{"calibration": Calibration(each, cache="TRT-..."), "float_type": short} for each in Calibrator]
    for done in all_driven(version, tmp_path, requests):
        assert done.reply.refusals == ()
        assert flags(done) == {"INT8", short.upper()}
        assert f"Builder.create_network({1 << 0})" in done.calls
        assert any("int8_calibrator" in call for call in done.calls)


@pytest.mark.parametrize("version", ["8.6.1", "10.16"])
def test_implicit_int8_from_batches(version: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", x=np.zeros((4, 8), np.float32))
    files = (str(tmp_path / "batch.npz"),)
    requests = [{"calibration": Calibration(each, batches=files, shapes={"x": (4, 8)})} for each in Calibrator]
    for done in all_driven(version, tmp_path, requests):
        assert done.reply.refusals == ()
        assert flags(done) == {"INT8"}
        assert "IOptimizationProfile.set_shape('x', (4, 8), (4, 8), (4, 8))" in done.calls
        assert "IBuilderConfig.set_calibration_profile(IOptimizationProfile)" in done.calls


def test_a_float_graph_asks_for_no_integers(tmp_path: Path) -> None:
    assert flags(driven("8.6.1", tmp_path, quantized=False, float_type=FloatType.FP16)) == {"FP16"}


@pytest.mark.parametrize("version", WHEELS)
def test_errors(version: str, tmp_path: Path) -> None:
    text = "Assertion failed: ok: it is wrong"
    expected = Refusal(text, "#0") if version == "8.6.1" else Refusal(text, "a", "Relu")
    assert driven(version, tmp_path, "--unparsable").reply.refusals == (expected,)
    (refusal,) = driven(version, tmp_path, "--unbuildable").reply.refusals
    assert "no way" in refusal.text
    assert not (tmp_path / "net.plan").exists()


def test_the_double_refuses_what_the_bindings_lack(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="IInt8EntropyCalibrator2"):
        driven("11.4", tmp_path, calibration=Calibration(Calibrator.ENTROPY_2, cache="TRT-..."))
    with pytest.raises(AssertionError, match="WEIGHT_STREAMING"):
        driven("8.6.1", tmp_path, settings=Settings(weight_streaming=True))


@pytest.mark.parametrize("version", WHEELS)
def test_an_engine_runs(version: str, tmp_path: Path) -> None:
    batch = np.arange(32, dtype=np.float32).reshape(4, 8)
    np.savez(tmp_path / "batch.npz", x=batch)
    (tmp_path / "net.plan").write_bytes(b"engine")
    files = (str(tmp_path / "batch.npz"),)
    request = RunRequest(Backend.TENSORRT, str(tmp_path / "net.plan"), files, str(tmp_path), warmup=2, runs=5)
    command = [sys.executable, "-m", "tests.tensorrt_double", str(wheel(*WHEELS[version])), "--run"]
    done = subprocess.run(command, input=msgspec.json.encode(request), capture_output=True, check=False)
    assert done.stdout, done.stderr.decode()
    reply, calls = msgspec.json.decode(done.stdout, type=tuple[RunReply, list[str]])
    assert reply == RunReply((1.0,) * 5, 1.0)
    assert "IExecutionContext.set_input_shape('x', (4, 8))" in calls
    assert {"IExecutionContext.set_tensor_address('x', 4096)", "IExecutionContext.set_tensor_address('y', 8192)"} <= {
        *calls
    }
    assert calls.count("IExecutionContext.execute_async_v3(7)") == 1 + 2 + 5 + 5
    np.testing.assert_array_equal(np.load(tmp_path / "0.npz")["y"], batch)


def test_the_cuda_runtime_is_called_as_it_wants_to_be(tmp_path: Path) -> None:
    """Without a driver it checks its arguments, and answers with an error."""
    code = """
import numpy as np
from qonnx.engine.device_memory import DeviceMemory
from qonnx.errors import EngineError
device = DeviceMemory()
device._held["x"] = (4096, 64)
for call in (
    lambda: device.put("x", np.zeros(8)), lambda: device.put("new", np.zeros(8)), lambda: device.get("x", np.zeros(8)),
    lambda: device.call("cudaStreamCreate"), lambda: device.call("cudaEventCreate"), lambda: device.call("cudaFree", 8),
    lambda: device.call("cudaStreamSynchronize", 0), lambda: device.call("cudaEventRecord", 0, 0),
    lambda: device.call("cudaEventSynchronize", 0), lambda: device.call("cudaEventElapsedTime", 0, 0),
):
    try:
        call()
    except EngineError as error:
        print(error)
"""
    paths = [Path(__file__).parents[1], *(wheel(*each) for each in CUDA)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 10
    assert all(" failed on the GPU: cudaError" in line for line in done.stdout.splitlines())
