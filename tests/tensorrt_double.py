"""Stands in for TensorRT's library, with the interface of its real Python bindings.

The bindings of each version are a small wheel; the library is not. `load` imports the bindings without it. `Library`
then answers in its place: every attribute, keyword, argument type and enum member that is used must exist in the
bindings, which pybind11 describes in docstrings such as

    set_timing_cache(self: IBuilderConfig, cache: ITimingCache, ignore_mismatch: bool) -> bool

Run as `python -m tests.tensorrt_double BINDINGS < requests.json`, it lets the driver build engines with such a library,
and prints the replies and what was called.
"""

import importlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from qonnx.engine.compile_child import compile_model
from qonnx.engine.execution import RunRequest, run
from qonnx.engine.protocol import Reply, Request, Step

# The functions of the library that the bindings are linked to, and the names of the library.
_LINKED = re.compile(
    rb"(?<=\0)(?:create\w+_INTERNAL|get\w*PluginRegistry|getNvOnnxParserVersion|initLibNvInferPlugins|_ZN\d+nv\w+parser\w+"
    rb"|libnv[a-z_]+\.so\.\d+)(?=\0)"
)
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((?P<parameters>.*)\) -> (?P<result>.+)$", re.MULTILINE)

# What the driver asks a network or parser about, as if there was one input.
ANSWERS: dict[str, Any] = {
    "INetworkDefinition.num_inputs": 1,
    "ITensor.name": "x",
    "OnnxParser.num_errors": 1,
    "ParserError.desc": "Assertion failed: ok: it is wrong",
    "ParserError.node": 0,
    "ParserError.node_name": "a",
    "ParserError.node_operator": "Relu",
    "ICudaEngine.num_io_tensors": 2,
    "IExecutionContext.get_tensor_shape": (4, 8),
    "EngineInspector.get_engine_information": '{"Layers": [{"Name": "a", "LayerType": "gemm"}]}',
}


# Name, type, and whether there is a default.
Parameter = tuple[str, str, bool]


class Transcript(msgspec.Struct):
    """What came of a request, and every call and assignment in order."""

    reply: Reply
    steps: list[Step]
    calls: list[str]


def load(bindings: Path) -> Any:
    """The module `tensorrt_bindings` of an unpacked wheel, linked to the C library in place of TensorRT's.

    All that is missing is replaced by a function that takes one number, and for most gives back 0.
    """

    def stand_in(match: re.Match[bytes]) -> bytes:
        name = b"libc.so.6" if match[0].startswith(b"libnv") else b"getauxval"
        return name.ljust(len(match[0]), b"\0")

    folder = Path(tempfile.mkdtemp()) / "bindings"
    shutil.copytree(bindings, folder)
    library = folder / "tensorrt_bindings" / "tensorrt.so"
    library.write_bytes(_LINKED.sub(stand_in, library.read_bytes()))
    sys.path.insert(0, str(folder))
    return importlib.import_module("tensorrt_bindings")


class Library:
    """A module like TensorRT, whose classes that need the library are doubles. Everything else is the real thing."""

    def __init__(self, bindings: Any, parses: bool = True, builds: bool = True) -> None:
        self.bindings, self.calls = bindings, list[str]()
        self.answers = {**ANSWERS, "OnnxParser.parse_from_file": parses}
        self.builds = builds
        self.monitor: Any = None
        self.calibrator: Any = None
        self.recorder: Any = None

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.bindings, name)
        return self.maker(name) if name in ("Builder", "OnnxParser", "Runtime") else found

    def maker(self, name: str) -> Callable[..., Any]:
        cls = getattr(self.bindings, name)

        def make(*arguments: Any) -> Double:
            self.check(f"{name}", cls.__init__, (None, *arguments), {})
            return Double(self, name)

        return make

    def check(self, name: str, function: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> str:
        """The type that the call gives back.

        Raises:
            TypeError: no overload takes these arguments.
        """
        signatures = list(_SIGNATURE.finditer(function.__doc__ or ""))
        for signature in signatures:
            if self._fits(_parameters(signature["parameters"]), arguments, keywords):
                self.calls.append(f"{name}({', '.join(map(_shown, (*arguments[1:], *keywords.values())))})")
                return signature["result"]
        raise TypeError(f"{name}{tuple(arguments[1:])} {keywords}: takes {[found[0] for found in signatures]}")

    def _fits(self, parameters: list[Parameter], arguments: Sequence[Any], keywords: dict[str, Any]) -> bool:
        names = [name for name, _, _ in parameters]
        if len(arguments) > len(parameters) or not set(keywords) <= set(names[len(arguments) :]):
            return False
        given = dict(zip(names, arguments, strict=False)) | keywords
        return all(
            (self._is(given[name], kind) if name in given else optional) or name in ("self", "arg0")
            for name, kind, optional in parameters
        )

    def _is(self, value: Any, kind: str) -> bool:
        kind = kind.rpartition(".")[2] if "[" not in kind else kind
        kind = kind.rpartition("::")[2]
        if kind in ("int", "SupportsInt"):
            return isinstance(value, int) and not isinstance(value, bool)
        simple = {
            "bool": bool,
            "str": str,
            "float": float,
            "buffer": bytes,
            "Buffer": bytes,
            "object": object,
            "tuple": tuple,
            "list": list,
        }
        if kind in simple:
            return isinstance(value, simple[kind])
        if kind == "Dims" or "[" in kind:
            return isinstance(value, tuple | list) and all(isinstance(size, int) for size in value)
        if isinstance(value, Double):
            return bool(value._name == kind)
        return isinstance(value, getattr(self.bindings, kind))

    def result(self, name: str, kind: str, argument: Any = None) -> Any:
        if name in self.answers:
            return self.answers[name]
        if name == "ICudaEngine.get_tensor_name":
            return "xy"[argument]
        if name == "ICudaEngine.get_tensor_mode":
            return self.bindings.TensorIOMode.INPUT if argument == "x" else self.bindings.TensorIOMode.OUTPUT
        if name == "ICudaEngine.get_tensor_dtype":
            return self.bindings.DataType.FLOAT
        kind = kind.rpartition(".")[2].rpartition("::")[2]
        if kind == "IHostMemory":
            return b"engine"  # which has the buffer interface, as bytes do
        simple = {"bool": True, "str": "", "int": 0, "None": None}
        return simple[kind] if kind in simple else Double(self, kind)

    def build(self) -> Any:
        """What the builder does with the objects that it was given."""
        if self.monitor is not None:
            self.monitor.phase_start("Building engine", None, 2)
            for step in range(2):
                assert self.monitor.step_complete("Building engine", step) is True
            self.monitor.phase_finish("Building engine")
        if self.calibrator is not None:
            assert self.calibrator.get_batch_size() >= 1
            cache = self.calibrator.read_calibration_cache()
            assert cache is None or isinstance(cache, bytes)
            while cache is None and (addresses := self.calibrator.get_batch(["x"])):
                assert all(isinstance(address, int) for address in addresses)
            if hasattr(self.calibrator, "get_quantile"):
                assert 0 < self.calibrator.get_quantile() <= 1
        if self.builds:
            return b"engine"
        code = self.bindings.ErrorCodeTRT.INTERNAL_ERROR
        self.recorder.report_error(code, "Error Code 2: Internal Error (a: no way)")
        assert self.recorder.get_error_code(self.recorder.num_errors() - 1) == code
        assert self.recorder.get_error_desc(0)
        assert self.recorder.has_overflowed() is False
        return None


class Double:
    """An object of a class of the library."""

    def __init__(self, library: Library, name: str) -> None:
        if not hasattr(library.bindings, name):  # as C++ calls it
            name = name.removeprefix("I")
        self.__dict__.update(_library=library, _name=name, _class=getattr(library.bindings, name))

    def __getattr__(self, name: str) -> Any:
        library, found = self._library, getattr(self._class, name)  # raises where the bindings lack it
        where = f"{self._name}.{name}"
        if isinstance(found, property):
            kind = _SIGNATURE.search(found.fget.__doc__ or "") if found.fget else None
            return library.result(where, kind["result"] if kind else "None")

        def call(*arguments: Any, **keywords: Any) -> Any:
            kind = library.check(where, found, (self, *arguments), keywords)
            if name == "build_serialized_network":
                return library.build()
            return library.result(where, kind, *arguments[:1])

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        found = getattr(self._class, name)
        if not isinstance(found, property) or found.fset is None:
            raise AttributeError(f"{self._name}.{name} cannot be set")
        self._library.check(f"{self._name}.{name} = ", found.fset, (self, value), {})
        role = {"progress_monitor": "monitor", "int8_calibrator": "calibrator", "error_recorder": "recorder"}.get(name)
        if role:
            setattr(self._library, role, value)


def _parameters(text: str) -> list[Parameter]:
    parts = re.split(r", (?=\w+: )", text)
    found = [re.match(r"(\w+): (.*?)( = .*)?$", part) for part in parts]
    return [(match[1], match[2], bool(match[3])) for match in found if match]


def _shown(value: Any) -> str:
    if isinstance(value, Double):
        return str(value._name)
    return str(getattr(value, "name", "")) or repr(value)


class FakeDevice:
    """A GPU whose engine gives back what it is fed, and takes one millisecond for it."""

    def __init__(self) -> None:
        self.fed: Any = None
        self.enqueued = 0

    def put(self, name: str, array: Any) -> int:
        self.fed = array
        return 4096

    def reserve(self, name: str, size: int) -> int:
        assert size == 4 * 8 * 4
        return 8192

    def get(self, name: str, into: Any) -> None:
        into[:] = self.fed

    def call(self, name: str, *arguments: Any) -> Any:
        assert name.startswith("cuda")
        return {"cudaEventElapsedTime": 1.0}.get(name, 7)


def main() -> None:
    parses, builds = (word not in sys.argv for word in ("--unparsable", "--unbuildable"))
    bindings = load(Path(sys.argv[1]))
    if "--run" in sys.argv:
        library = Library(bindings)
        ran = run(library, msgspec.json.decode(sys.stdin.buffer.read(), type=RunRequest), FakeDevice())
        sys.stdout.buffer.write(msgspec.json.encode((ran, library.calls)))
        sys.stdout.flush()
        os._exit(0)
    transcripts = []
    for request in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Request]):
        library, steps = Library(bindings, parses, builds), list[Step]()
        reply = compile_model(library, request, steps.append, FakeDevice())
        transcripts.append(Transcript(reply, steps, library.calls))
    sys.stdout.buffer.write(msgspec.json.encode(transcripts))
    sys.stdout.flush()
    os._exit(0)  # the bindings end the process badly without their library


if __name__ == "__main__":
    main()
