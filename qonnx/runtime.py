"""ONNX Runtime sessions whose INT8 results can be trusted, opened from a file or from a graph in memory."""

from __future__ import annotations

import ctypes
import enum
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import DataError, DependencyError, ModelError
from qonnx.graph import PLACEHOLDERS, all_graphs, first_line, load

Array = npt.NDArray[Any]

# Weights above this size are lent to ONNX Runtime as buffers; smaller ones (shapes, axes, scales) travel inside the
# serialized graph, where its shape inference can read them.
INLINE_BYTES = 1024

# Without these two the figures describe the machine and not the model:
# * on x86 without VNNI the kernel for uint8 times int8 saturates its 16-bit partial sums; "1" takes the exact one;
# * DequantizeLinear(int4) + MatMul becomes a kernel that by default also quantizes the activations to int8 (level 4);
#   level 1 computes in float32.
HONEST_OPTIONS = {
    "session.x64quantprecision": "1",
    "session.qdq_matmulnbits_accuracy_level": "1",
}

# ONNX Runtime quantizes float biases, and float weights beside a quantized activation (these per tensor), on its own
# account. That costs MobileNetV2 2 dB, and the figure would not be about the file. It also lets a MaxPool pad where a
# Pad with zeros stood in front of it, which computes something else where a window holds negative numbers alone.
DISABLED_OPTIMIZERS = ("WeightBiasQuantization", "Pad_Fusion")

# Types that numpy lacks: ONNX Runtime's Python interface takes and gives them as raw bytes only.
_RAW_TYPES = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E4M3FNUZ,
        ir.DataType.FLOAT8E5M2,
        ir.DataType.FLOAT8E5M2FNUZ,
        ir.DataType.FLOAT8E8M0,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT2,
        ir.DataType.UINT2,
    }
)


_FLOAT8 = frozenset(kind for kind in ir.DataType if kind.name.startswith("FLOAT8"))


class Optimization(enum.Enum):
    """How far ONNX Runtime rewrote the graph before running it. The value is the name of its optimization level."""

    ALL = "ORT_ENABLE_ALL"
    BASIC = "ORT_ENABLE_BASIC"
    NONE = "ORT_DISABLE_ALL"


class Device(enum.StrEnum):
    """Where a graph runs. What a provider lacks runs on the CPU."""

    CPU = "cpu"
    CUDA = "cuda"

    @property
    def providers(self) -> tuple[str, ...]:
        """ONNX Runtime's execution providers, best first."""
        return ("CPUExecutionProvider",) if self is Device.CPU else ("CUDAExecutionProvider", "CPUExecutionProvider")


# TensorFloat-32 keeps ten bits of a float32 product: what would be measured is not the float model.
_PROVIDER_OPTIONS: Mapping[str, dict[str, str]] = {"CUDAExecutionProvider": {"use_tf32": "0"}}


class InputSpec(msgspec.Struct, frozen=True):
    """What a model expects of one input.

    Attributes:
        name: the input's name.
        dtype: the element type; types that numpy lacks come from `ml_dtypes` (bfloat16, int4 ...), strings are object.
        shape: one entry per dimension: a size, the name of a dynamic dimension, or None where it has no name.
            The whole shape is None where even the rank is unknown (ONNX Runtime does not tell that from a scalar).
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None


class Session:
    """A graph that is ready to run. Made by `session`.

    Attributes:
        inputs: what must be fed, in graph order; initializers that double as inputs are not among them.
        outputs: the names that `run` returns. Outputs that are not tensors (sequences, maps, optionals) are left out.
        optimization: what the graph was loaded with: less than asked where ONNX Runtime could not load it otherwise.
        refusal: for that, what ONNX Runtime said; "" where the graph was loaded as asked.
    """

    def __init__(
        self,
        native: Any,
        optimization: Optimization,
        buffers: Iterable[Any] = (),
        outputs: Sequence[str] | None = None,
        origin: str = "model",
        refusal: str = "",
    ) -> None:
        self._native = native
        self._buffers = tuple(buffers)  # ONNX Runtime reads the weights straight from these: they must outlive it
        self._origin = origin
        self._types = {value.name: _data_type(value.type) for value in (*native.get_inputs(), *native.get_outputs())}
        self.optimization = optimization
        self.refusal = refusal
        self.inputs = tuple(self._input_spec(value) for value in native.get_inputs())
        available = tuple(value.name for value in native.get_outputs() if self._types[value.name] is not None)
        unknown = sorted(set(outputs or ()).difference(available))
        if unknown:
            raise ModelError(f"{origin}: no tensor output is called {unknown[0]!r}; it has {', '.join(available)}")
        self.outputs = available if outputs is None else tuple(outputs)
        self._raw = any(self._types[name] in _RAW_TYPES for name in (*(i.name for i in self.inputs), *self.outputs))

    def _input_spec(self, value: Any) -> InputSpec:
        dtype = self._types[value.name]
        if dtype is None:
            raise ModelError(f"{self._origin}: input {value.name!r} is a {value.type}; only tensors can be fed")
        if dtype is not ir.DataType.STRING and dtype.bitwidth < 8:
            raise ModelError(f"{self._origin}: input {value.name!r} is {value.type}; feed int8 and cast in the graph")
        return InputSpec(value.name, np.dtype(dtype.numpy()), tuple(map(_size, value.shape)) or None)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the graph once.

        Args:
            feeds: one array per input, of exactly its type.
            outputs: return these only; all of `Session.outputs` by default.

        Returns:
            One array per output name, in that order. bfloat16, float8, int4 and the like come back as arrays of
            the `ml_dtypes` types.

        Raises:
            DataError: an input is missing, or the graph does not run on these shapes and values.
        """
        missing = [spec.name for spec in self.inputs if spec.name not in feeds]
        if missing:
            raise DataError(f"{self._origin}: input {missing[0]!r} is not fed; given {', '.join(feeds) or 'nothing'}")
        convert = self._to_native if self._raw else lambda _, array: array
        fed = {spec.name: convert(spec.name, feeds[spec.name]) for spec in self.inputs}
        run = self._native.run_with_ort_values if self._raw else self._native.run
        names = list(self.outputs if outputs is None else outputs)
        if not names:  # ONNX Runtime would return all outputs, those that are no tensors too
            return {}
        try:
            values = run(names, fed)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise DataError(
                f"{self._origin}: does not run on this batch ({_reason(error)}); check the values and shapes fed"
            ) from error
        return dict(zip(names, map(_from_native, values) if self._raw else values, strict=True))

    def _to_native(self, name: str, array: Array) -> Any:
        import onnxruntime as ort

        dtype = self._types[name]
        array = np.asarray(array, order="C")
        if dtype not in _RAW_TYPES:
            return ort.OrtValue.ortvalue_from_numpy(array)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"u{array.itemsize}"), int(dtype))


def session(
    model: ir.Model | str | os.PathLike[str],
    *,
    optimize: bool = True,
    outputs: Sequence[str] | None = None,
    threads: int = 0,
    device: Device = Device.CPU,
    optimized: os.PathLike[str] | None = None,
    default_options: bool = False,
) -> Session:
    """Opens a model in ONNX Runtime, with the options that keep integer results exact on every CPU.

    A graph in memory is not written to disk and its weights are not copied: they are lent to ONNX Runtime where they
    lie, in memory or in a mapped file. Do not change them while the session is in use.

    ONNX Runtime 1.31 cannot load some graphs in which one quantized weight has two readers together with
    `session.x64quantprecision`. Such graphs are loaded with fewer optimizations, which compute the same in float;
    `Session.optimization` tells.

    Args:
        model: the path of an ONNX file, or a graph.
        optimize: whether ONNX Runtime may rewrite the graph (fuse Q/DQ pairs into integer kernels, fold constants).
        outputs: the names that `run` shall return; all tensor outputs by default.
        threads: threads within one operator; 0 lets ONNX Runtime choose.
        device: where the graph runs; inputs and outputs of `run` are in the memory of the CPU.
        optimized: a file to which the graph is written with all weights, as ONNX Runtime rewrote it for this CPU.
        default_options: leave ONNX Runtime's options as they are, `optimize` too: what comes out may depend on the CPU.

    Raises:
        ModelError: the file is missing or damaged, the graph is not valid, or uses what ONNX Runtime lacks.
        DependencyError: ONNX Runtime, or its part for the device, is not installed.
    """
    providers = list(device.providers)
    ort = _import(providers)
    graph, origin = _opened(model)
    source: str | bytes = origin
    buffers: dict[str, Any] = {}
    if graph is not None and (graph is model or _has_shapes_outside(graph)):
        source, buffers = _skeleton(graph, origin)
    refusal = ""
    for level in _levels(graph, optimize=optimize, default_options=default_options):
        options = ort.SessionOptions()
        options.log_severity_level = 4  # whatever goes wrong arrives as an exception, once
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # it holds a tenth more memory and, measured, takes as long
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level.value)
        for key, entry in () if default_options else HONEST_OPTIONS.items():
            options.add_session_config_entry(key, entry)
        options.add_session_config_entry("session.use_external_initializer_file_buffers_directly", "1")
        if optimized is not None:
            options.optimized_model_filepath = os.fspath(optimized)
        if buffers:
            sizes = [len(buffer) for buffer in buffers.values()]
            options.add_external_initializers_from_files_in_memory(list(buffers), list(buffers.values()), sizes)
        try:
            native = ort.InferenceSession(
                source,
                options,
                providers=providers,
                provider_options=[_PROVIDER_OPTIONS.get(provider, {}) for provider in providers],
                enable_fallback=0,
                disabled_optimizers=() if default_options else DISABLED_OPTIMIZERS,
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            refusal = refusal or _reason(error)
            if level is Optimization.NONE or default_options:
                raise ModelError(
                    f"{origin}: ONNX Runtime cannot load this graph: {_reason(error)}{_remedy(model)}"
                ) from error
        else:
            break
    return Session(native, level, buffers.values(), outputs, origin, refusal)


def _levels(graph: ir.Model | None, *, optimize: bool, default_options: bool) -> tuple[Optimization, ...]:
    """How far ONNX Runtime is asked to rewrite a graph, in the order in which it is tried."""
    if default_options:
        return (Optimization.ALL,)
    if not optimize or (graph is not None and _misoptimized(graph)):
        return (Optimization.NONE,)
    return tuple(Optimization)


def _remedy(model: ir.Model | str | os.PathLike[str]) -> str:
    """What to do about a graph that ONNX Runtime has no kernels for; "" where that is not known."""
    try:
        graph = (model if isinstance(model, ir.Model) else load(model)).graph
    except ModelError:  # a damaged file
        return ""
    if any(value.dtype is ir.DataType.BFLOAT16 for value in (*graph.initializers.values(), *graph.inputs)):
        return (
            "; it has hardly any bfloat16 kernel for the CPU: export the model in float32, which holds the same "
            "weights, and build the engine with --float bf16"
        )
    return ""


def _opened(model: ir.Model | str | os.PathLike[str]) -> tuple[ir.Model | None, str]:
    """The graph, and what to call it; None for a file that cannot be read: ONNX Runtime says what is wrong with it."""
    if isinstance(model, ir.Model):
        return model, model.graph.name or "model"
    origin = os.fspath(model)
    if not Path(model).is_file():
        raise ModelError(f"{origin}: no such file; give the path of an ONNX model")
    try:
        return ir.load(model), origin
    except Exception:  # a damaged file
        return None, origin


def _has_shapes_outside(model: ir.Model) -> bool:
    """Whether small tensors lie outside the model's file, where ONNX Runtime finds no shapes."""
    stored = (value.const_value for value in model.graph.initializers.values())
    return any(isinstance(tensor, ir.ExternalTensor) and tensor.nbytes <= INLINE_BYTES for tensor in stored)


def _misoptimized(model: ir.Model) -> bool:
    """Whether a graph holds what ONNX Runtime 1.31 gets wrong when it optimizes: float8, or activations of many scales.

    It drops a Relu before a QuantizeLinear to float8, and makes products of both that it has no kernels for.
    """
    weights = model.graph.initializers
    return any(value.dtype in _FLOAT8 for value in weights.values()) or any(map(_has_many_scales, model.graph))


def _has_many_scales(node: ir.Node) -> bool:
    if node.op_type != "QuantizeLinear" or len(node.inputs) < 2:
        return False
    data, scale = node.inputs[:2]
    stored = None if scale is None else scale.const_value
    return stored is not None and stored.size > 1 and data is not None and data.const_value is None


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """What a graph expects to be fed, without opening it in ONNX Runtime.

    Raises:
        ModelError: an input is not a tensor, or its type is not declared.
    """
    specs = []
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or not isinstance(value.type, ir.TensorType):
            raise ModelError(f"{model.graph.name or 'model'}: input {value.name!r} is not declared as a tensor")
        sizes = (size if isinstance(size, int) else size.value for size in value.shape or ())
        shape = None if value.shape is None else tuple(map(_size, sizes))
        specs.append(InputSpec(value.name or "", np.dtype(value.dtype.numpy()), shape))
    return tuple(specs)


def _size(size: int | str | None) -> int | str | None:
    """A size or its name; None where there is neither."""
    return None if size in PLACEHOLDERS or (isinstance(size, int) and size < 0) else size


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of the graph that also returns the named intermediate values; the weights are shared, not copied.

    Args:
        model: left as it is.
        names: values of the main graph; those that are graph outputs already are not added twice.

    Raises:
        ModelError: the graph computes no value of such a name.
    """
    copy = _clone(model, model.graph.name or "model")
    values = {value.name: value for node in copy.graph for value in node.outputs if value.name}
    present = {value.name for value in copy.graph.outputs}
    for name in names:
        if name in present:
            continue
        if name not in values:
            raise ModelError(f"{model.graph.name or 'model'}: no node of the main graph computes a value {name!r}")
        present.add(name)
        copy.graph.outputs.append(values[name])
    return copy


def _import(providers: Sequence[str]) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DependencyError(
            "running a graph needs ONNX Runtime: pip install 'qonnx-pipeline[cpu]', or [gpu] with CUDA"
        ) from error
    missing = [provider for provider in providers if provider not in ort.get_available_providers()]
    if missing:
        raise DependencyError(
            f"this ONNX Runtime has no {missing[0]}; for CUDA: pip install 'qonnx-pipeline[gpu]' in place of [cpu]"
        )
    return ort


def _skeleton(model: ir.Model, origin: str) -> tuple[bytes, dict[str, Any]]:
    """The graph serialized without its large weights, and the buffers that hold those, by the file name it gives them.

    The file names are made up; ONNX Runtime looks them up among the buffers. A mapped file is one buffer.
    """
    copy = _clone(model, origin)
    buffers: dict[str, Any] = {}
    mapped: dict[str, str] = {}
    for graph in all_graphs(copy):
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            # ONNX Runtime finds no buffers for weights inside If, Loop and Scan, nor for overridable defaults.
            if graph is not copy.graph or value.is_graph_input() or tensor.nbytes <= INLINE_BYTES:
                if isinstance(tensor, ir.ExternalTensor):
                    value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
                continue
            location, offset = f"weights {len(buffers)}", 0
            if isinstance(tensor, ir.ExternalTensor):
                path, offset = str(tensor.path), tensor.offset or 0
                location = mapped.setdefault(path, location)
                if location not in buffers:
                    buffers[location] = _mapped(path)
            else:
                buffers[location] = _bytes(tensor)
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
            )
    try:
        return ir.to_proto(copy).SerializeToString(), buffers
    except Exception as error:  # protobuf and onnx_ir raise several types
        raise ModelError(f"{origin}: cannot be written as ONNX ({first_line(error)})") from error


def _clone(model: ir.Model, origin: str) -> ir.Model:
    try:
        return model.clone()
    except RuntimeError as error:  # a node that reads a value which nothing defines
        raise ModelError(f"{origin}: not a valid graph: {first_line(error)}") from error


def _mapped(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: the weights cannot be read ({first_line(error)}); restore the file") from error


def _bytes(tensor: ir.TensorProtocol) -> Array:
    """The bytes of a tensor as ONNX lays them out; a view where elements are whole bytes, packed otherwise."""
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _data_type(text: str) -> ir.DataType | None:
    """Reads ONNX Runtime's spelling of a type, such as `tensor(float16)`; None for what is not a tensor.

    >>> _data_type("tensor(float)"), _data_type("seq(tensor(float))")
    (FLOAT, None)
    """
    match = re.fullmatch(r"tensor\((\w+)\)", text)
    return ir.DataType[match[1].upper()] if match else None


def _from_native(value: Any) -> Array:
    dtype = _data_type(value.data_type())
    if dtype not in _RAW_TYPES:
        return np.asarray(value.numpy())
    shape = tuple(value.shape())
    raw = np.frombuffer(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()), np.uint8)
    if dtype.bitwidth < 8:
        return np.asarray(ir.PackedTensor(raw, dtype, shape=ir.Shape(shape)).numpy())
    return raw.view(dtype.numpy()).reshape(shape)


def _reason(error: BaseException) -> str:
    """What ONNX Runtime complains about, in one line, without its error numbers and its own source positions."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", first_line(error))
    text = re.sub(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=[A-Z])", "", text)
    return text.strip().rstrip(".,")
