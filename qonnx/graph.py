"""The handful of questions that passes ask of a graph: constants, names, module paths, loading and saving."""

from __future__ import annotations

import ast
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.errors import ModelError, OutputError

# Above this many bytes of weights they are written beside the model, in <name>.onnx.data: the file stays quick to
# open, and neither writing nor reading it ever holds all weights in memory.
EXTERNAL_DATA_BYTES = 64 * 1024 * 1024

# Where a quantized file keeps the reason for a layer in float: the metadata of its node.
FLOAT_REASON = "qonnx.float_reason"

# The metadata of a node whose result is scaled or shifted per channel, compared with the float model of that name.
RESCALED = "qonnx.rescaled"

# The types that QuantizeLinear takes; float64 is not one of them.
FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Names:
    """Every value and node name of a model, subgraphs and functions included, to make names that clash with none."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        self._last: dict[str, int] = {}
        for graph in all_graphs(model):
            if isinstance(graph, ir.Graph):
                self._taken.update(graph.initializers)
            self._taken.update(value.name for value in graph.inputs if value.name)
            for node in graph:
                self._taken.update(value.name for value in node.outputs if value.name)
                if node.name:
                    self._taken.add(node.name)

    def fresh(self, stem: str) -> str:
        """Returns `stem`, or `stem_1`, `stem_2` ... where that is taken, and reserves it."""
        name, number = stem, self._last.get(stem, 0)
        while name in self._taken:
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name)
        self._last[stem] = number
        return name


def all_graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, the bodies of If, Loop and Scan at any depth, and the model's functions."""
    pending: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while pending:
        graph = pending.pop()
        yield graph
        for node in graph:
            pending.extend(subgraphs(node))


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs that a node holds as attributes: the bodies of If, Loop and Scan."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array behind an initializer or a Constant node, or None for a value that is computed or can be fed."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else array(tensor, value.name or "")


def array(tensor: ir.TensorProtocol, name: str) -> npt.NDArray[Any]:
    """The elements of a stored tensor.

    Args:
        tensor: stored in the model or beside it.
        name: what to call it in errors.

    Raises:
        ModelError: it does not have as many bytes as its shape says.
    """
    try:
        return tensor.numpy()
    except (TypeError, ValueError) as error:
        raise ModelError(f"weight {name!r} cannot be read ({first_line(error)}); export the model again") from error


def is_initializer(value: ir.Value | None) -> bool:
    """Whether the value is a constant stored in the graph (and not a default that a caller may override)."""
    return value is not None and value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def is_float(value: ir.Value | None) -> bool:
    """Whether the value is known to be a tensor (and no sequence of some) of float32, float16 or bfloat16 elements."""
    return value is not None and value.dtype in FLOAT_TYPES and isinstance(value.type, ir.TensorType)


def rank(value: ir.Value | None) -> int | None:
    """The number of dimensions, or None where it is not known."""
    return None if value is None or value.shape is None else value.shape.rank()


def module_path(node: ir.Node) -> str:
    """The path of the module that made the node, such as `encoder.layer.0.attention.self.query`, or "".

    Taken from the metadata that torch's exporter writes; failing that, from a slash-separated node name
    (`/encoder/layer.0/MatMul`), as older exporters write it.
    """
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        try:
            names = ast.literal_eval(scopes)
        except (ValueError, SyntaxError):
            names = []
        if isinstance(names, list) and len(names) >= 2:
            return str(names[-2])
    if node.name and "/" in node.name:
        return ".".join(part for part in node.name.split("/")[:-1] if part)
    return ""


def parameters(model: ir.Model) -> tuple[int, int]:
    """How many elements and bytes the initializers hold, subgraphs included."""
    tensors = [
        value.const_value
        for graph in all_graphs(model)
        if isinstance(graph, ir.Graph)
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    return sum(int(tensor.size) for tensor in tensors), sum(int(tensor.nbytes) for tensor in tensors)


# What exporters write for a size that they do not know, in the place of a name: two such sizes need not be equal.
PLACEHOLDERS = frozenset({"?", "-1", "None"})


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Reads a model; weights in external data stay on disk and are mapped when touched.

    Raises:
        ModelError: the file is missing, is not an ONNX model, is cut short, or its external data are; or the graph is
            none that can be run, see `qonnx.validity`.
    """
    from qonnx.validity import check_graph, sort  # which walks graphs with what stands above

    path = Path(path)
    if path.is_dir():
        raise ModelError(f"{path}: is a folder; give an ONNX file, such as `qonnx export` makes of a Hugging Face one")
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    try:
        model = ir.load(path)
    except Exception as error:  # the protobuf runtime and onnx_ir raise many types for a damaged file
        raise ModelError(f"{path}: not a readable ONNX model ({first_line(error)}); export it again") from error
    if not model.opset_imports or not model.graph.outputs:
        raise ModelError(f"{path}: not an ONNX model: it declares no opset or no output; export it again")
    _add_sparse_weights(model, path)
    _check_external_data(model, path)
    _forget_placeholders(model)
    sort(model, str(path))
    check_graph(model, str(path))
    return model


def _forget_placeholders(model: ir.Model) -> None:
    """Takes the name off dimensions that are called unknown, each of which may have another size."""
    for graph in all_graphs(model):
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            sizes = [size if isinstance(size, int) else size.value for size in value.shape or ()]
            if not PLACEHOLDERS.isdisjoint(sizes):
                value.shape = ir.Shape([None if size in PLACEHOLDERS else size for size in sizes])


def _add_sparse_weights(model: ir.Model, path: Path) -> None:
    """Registers the weights that the file stores as sparse tensors, which onnx_ir does not read, as dense ones."""
    if not any(_is_undefined(value, model.graph) for node in model.graph for value in node.inputs):
        return
    import onnx

    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for sparse in onnx.load(str(path)).graph.sparse_initializer:
        if sparse.values.name in values:
            value = values[sparse.values.name]
            value.const_value = ir.tensor(_dense(sparse), name=value.name)
            value.dtype, value.shape = value.const_value.dtype, ir.Shape(sparse.dims)
            model.graph.register_initializer(value)


def _is_undefined(value: ir.Value | None, graph: ir.Graph) -> bool:
    """Whether nothing in the main graph says what the value is."""
    if value is None or value.producer() is not None or value.name in graph.initializers:
        return False
    return not value.is_graph_input()


def _dense(sparse: Any) -> npt.NDArray[Any]:
    """A SparseTensorProto as an array: coordinates are one linear index each, or one row each."""
    from onnx import numpy_helper

    indices, values = numpy_helper.to_array(sparse.indices), numpy_helper.to_array(sparse.values)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def _check_external_data(model: ir.Model, path: Path) -> None:
    for graph in all_graphs(model):
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            file = Path(tensor.path)
            if not file.is_file():
                raise ModelError(
                    f"{path}: weight {value.name!r} is stored in {file.name}, which is not beside the model"
                )
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            if file.stat().st_size < end:
                raise ModelError(f"{path}: {file.name} is cut short: weight {value.name!r} ends at byte {end}")


def save(model: ir.Model, path: str | os.PathLike[str], *, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> None:
    """Writes a model, weights one after the other; either all files appear, or none.

    Weights go into `<name>.onnx.data` beside the model when they hold more than `external_data_bytes`.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    external = path.name + ".data" if parameters(model)[1] > external_data_bytes else None
    with staging(path) as folder:
        ir.save(model if external else _with_weights_inside(model), folder / path.name, external_data=external)
        publish(folder, path.parent)


def _with_weights_inside(model: ir.Model) -> ir.Model:
    """A copy of the graph whose weights are written into the file itself, wherever they are stored now."""
    copy = model.clone()
    for graph in all_graphs(copy):
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
    return copy


class staging:  # noqa: N801 - used as a function, `with staging(path) as folder`
    """A temporary folder beside `path`, so that moving a finished file into place is one rename.

    Raises:
        OutputError: the folder of `path` does not exist or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)

    def __enter__(self) -> Path:
        parent = self._path.parent
        if self._path.is_dir():
            raise OutputError(f"{self._path}: is a folder; give the name of a file to write")
        if not parent.is_dir():
            raise OutputError(f"{self._path}: the folder {parent} does not exist; create it first")
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._path.name}.", dir=parent))
        except OSError as error:
            raise OutputError(f"{self._path}: cannot write here ({error.strerror}); choose another folder") from error
        return self._folder

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def publish(folder: Path, destination: Path) -> None:
    """Moves every file of a staging folder into place; data files first, so that a model never lacks its weights."""
    for file in sorted(folder.iterdir(), key=lambda file: file.suffix == ".onnx"):
        try:
            os.replace(file, destination / file.name)
        except OSError as error:
            raise OutputError(f"{destination / file.name}: cannot be written ({error.strerror})") from error


def first_line(error: BaseException) -> str:
    """The innermost cause of an exception, in one line: pass managers and runtimes wrap the real one."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def dtype_name(value: ir.Value | None) -> str:
    """The element type as ONNX spells it in lower case, or "unknown"."""
    return "unknown" if value is None or value.dtype is None else value.dtype.name.lower()


def float32(tensor: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """A weight as float32, whatever float type it is stored in; no copy where it already is."""
    return tensor.astype(np.float32, copy=False)
