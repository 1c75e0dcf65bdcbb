import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.calibrators import Average, MinMax, Percentile
from qonnx.engine.calibration_cache import Algorithm, dumps, loads, magnitudes, read, read_ranges, version_number, write
from qonnx.errors import DataError, OutputError, TargetError
from qonnx.sketch import sketch
from qonnx.statistics import Statistics, TensorStatistics, from_batch

NAMES = ["input", "x:0", "a: b", "(Unnamed Layer* 64) [Shuffle]_output", "größe", "deep/block.0/Relu_output_0"]


def reference(text: str) -> dict[str, float]:
    """The usual way to read a cache, with struct."""
    entries = [line.rsplit(": ", 1) for line in text.splitlines()[1:]]
    return {name: struct.unpack("!f", bytes.fromhex(digits))[0] * 127 for name, digits in entries}


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.floats(1e-35, 1e38, width=64)))
def test_what_is_written_is_read_back(amax: dict[str, float]) -> None:
    text = dumps(amax)
    assert loads(text) == reference(text)
    assert list(loads(text)) == list(amax)
    assert loads(text) == pytest.approx(amax, rel=1e-7)
    assert all(len(line.rsplit(": ", 1)[1]) == 8 for line in text.splitlines()[1:])


def test_small_scales_keep_their_leading_zeros() -> None:
    scale = struct.unpack("!f", bytes.fromhex("00000a14"))[0]
    assert dumps({"x": scale * 127}).splitlines()[1] == "x: 00000a14"
    assert loads("TRT-8601-EntropyCalibration2\nx: a14\n") == {"x": scale * 127}


def test_zero_is_left_out() -> None:
    assert dumps({"x": 0.0, "y": 1e-60}) == "TRT-101601-EntropyCalibration2\n"
    assert loads("TRT-7103-EntropyCalibration2\nx: 0\ny: 00000000") == {}


@pytest.mark.parametrize(
    ("version", "number"),
    [("7.1.3", 7103), ("8.6.1", 8601), ("8.6.1.6", 8601), ("10.0.1", 100001), ("10.16.1", 101601)],
)
def test_version(version: str, number: int) -> None:
    assert version_number(version) == number


@pytest.mark.parametrize("version", ["", "10", "10.16", "ten", "10.x.1", "10.-1.1", "11.0.0", "1.2.3.4.5", "²0.1.1"])
def test_no_such_version(version: str) -> None:
    with pytest.raises(TargetError) as caught:
        version_number(version)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("algorithm", Algorithm)
def test_header(algorithm: Algorithm) -> None:
    assert dumps({}, "10.14.1", algorithm) == f"TRT-101401-{algorithm.value}\n"


@pytest.mark.parametrize(
    ("name", "amax"),
    [("", 1.0), ("a\nb", 1.0), ("a\u2028b", 1.0), (" a", 1.0), ("x", -1.0), ("x", float("nan")), ("x", float("inf"))],
)
def test_refuses_to_write(tmp_path: Path, name: str, amax: float) -> None:
    with pytest.raises(DataError, match="tensor") as caught:
        write(tmp_path / "calibration.cache", {"good": 1.0, name: amax})
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "first line"),
        (b"x 1.0\n", "first line"),
        (b"TRT-8601-EntropyCalibration2\nx\n", "line 2"),
        (b"TRT-8601-EntropyCalibration2\nx: 3c010a14\ny: no\n", "line 3"),
        (b"TRT-8601-EntropyCalibration2\nx: 3c010a14ff\n", "line 2"),
        (b"TRT-8601-EntropyCalibration2\nx: bc010a14\n", "'x' has scale -"),
        (b"TRT-8601-EntropyCalibration2\nx: 7fc00000\n", "'x' has scale nan"),
        (b"TRT-8601-EntropyCalibration2\nx: 1\nx: 1\n", "second time"),
        (b"\xff\xfe", "not text"),
    ],
)
def test_refuses_to_read(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "calibration.cache"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "calibration.cache"
    write(path, dict.fromkeys(NAMES, 254.0), "8.6.1", Algorithm.MINMAX)
    assert path.read_bytes().startswith(b"TRT-8601-MinMaxCalibration\ninput: 40000000\nx:0: 40000000\n")
    assert read(path) == dict.fromkeys(NAMES, 254.0)
    assert {(r.low, r.high) for r in read_ranges(path).values()} == {(-254.0, 254.0)}
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read(path) == dict.fromkeys(NAMES, 254.0)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read(tmp_path / "absent.cache")
    with pytest.raises(OutputError, match="does not exist"):
        write(tmp_path / "absent" / "calibration.cache", {})


def test_magnitudes() -> None:
    x = np.arange(-1000, 501, dtype=np.float32)

    def tensor(distribution: bool, low: float = -1000.0) -> TensorStatistics:
        measured = from_batch(x.size, low, 500.0, float(np.square(x).sum()))
        return dataclasses.replace(measured, sketch=sketch(x) if distribution else None)

    statistics = Statistics({"b": tensor(False), "a": tensor(True), "infinite": tensor(True, low=-np.inf)})
    assert magnitudes(statistics, MinMax()) == {"b": 1000.0, "a": 1000.0}
    assert magnitudes(statistics, Average()) == {"b": 1000.0, "a": 1000.0}
    clipped = magnitudes(statistics, Percentile(80.0))
    assert list(clipped) == ["b", "a"]
    assert clipped["b"] == 1000.0
    assert clipped["a"] == pytest.approx(np.sort(np.abs(x))[int(np.ceil(0.8 * x.size)) - 1], rel=1e-3)
