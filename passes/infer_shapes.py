"""Types and shapes of every value, inferred anew from the graph's inputs.

Shapes that a file declares for inner values are only trusted when inference contradicts none of them: scripts that
make a batch dimension dynamic tend to edit the inputs and to leave the old sizes inside, and folding a `Shape` over
those would change what the graph computes. Trusted or not, what inference cannot know (the outputs of operators of
other domains) is kept, and so is everything when inference fails.

Graph inputs and outputs keep what they declare.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from qonnx.errors import ModelError
from qonnx.graph import all_graphs, constant, first_line
from qonnx.skeleton import skeleton

# The prefix of the names that onnx invents for dimensions of which it knows nothing. They are dropped: their numbers
# start anew in every run, and equal names must mean equal sizes.
_INVENTED = "unk__"

# onnx infers nothing for a Reshape to a computed shape, although the length of that shape is the rank of the result.
# Each round tells it so for the first such Reshape on every path.
_ROUNDS = 16


@dataclass(frozen=True)
class InferShapes(ir.passes.InPlacePass):
    """See the module docstring. Values inside subgraphs are inferred too; weights are never read.

    Attributes:
        data: propagate the values of shapes through the operators that compute them.
    """

    data: bool = True

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Writes what was inferred into the values.

        Raises:
            ModelError: onnx cannot infer shapes for this graph at all. The graph is unchanged.
        """
        try:
            inferred = self._infer(model)
        except Exception as error:  # the C++ code raises several types
            raise ModelError(f"shapes cannot be inferred: {first_line(error)}") from error
        pairs = [(value, inferred[key]) for key, value in _inner_values(model) if key in inferred]
        trusted = not any(_contradict(value.shape, source.shape) for value, source in pairs)
        modified = False
        for value, source in pairs:
            declared = value.shape if trusted or not _inferable(value) else None
            shape = _merge(source.shape, declared)
            if shape != value.shape:
                value.shape = shape
                modified = True
            if source.type is not None and source.type != value.type:
                value.type = source.type
                modified = True
        return ir.passes.PassResult(model, modified)

    def _infer(self, model: ir.Model) -> dict[tuple[int, str], ir.Value]:
        """Every inner value with its inferred type and shape, by the number of its graph and its name."""
        proto, _ = skeleton(model)
        bare = ir.from_proto(proto)
        _make_unknown(bare)
        for _ in range(_ROUNDS):
            inferred = ir.from_proto(
                onnx.shape_inference.infer_shapes(ir.to_proto(bare), strict_mode=False, data_prop=self.data)
            )
            found = dict(_inner_values(inferred))
            if not _reshape_to_computed(bare, found):
                break
        return found


def _inner_values(model: ir.Model) -> Iterator[tuple[tuple[int, str], ir.Value]]:
    """The outputs of all nodes, but for those of the main graph, whose types are declared by the caller."""
    for number, graph in enumerate(all_graphs(model)):
        for node in graph:
            for value in node.outputs:
                if value.name and not (graph is model.graph and value.is_graph_output() and value.type is not None):
                    yield (number, value.name), value


def _make_unknown(model: ir.Model) -> None:
    """Forgets the declared shapes of inner values, so that inference starts from the inputs."""
    for value in model.graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])
    for _, value in _inner_values(model):
        if _inferable(value):
            value.shape = None


def _inferable(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.domain in ("", "ai.onnx.ml")


def _reshape_to_computed(bare: ir.Model, found: dict[tuple[int, str], ir.Value]) -> bool:
    """Declares what is known of the result of each Reshape of which nothing was inferred; False if there is none."""
    added = False
    for key, value in _inner_values(bare):
        result = found.get(key)
        reshape = result.producer() if result is not None else None
        if result is None or result.shape is not None or reshape is None or reshape.op_type != "Reshape":
            continue
        sizes = _elements(reshape.inputs[1]) if len(reshape.inputs) > 1 else None
        if sizes is not None and result.dtype is not None:
            value.type = ir.TensorType(result.dtype)  # types are shared with the model that this is a clone of
            value.shape = ir.Shape([size if size is not None and size > 0 else None for size in sizes])
            added = True
    return added


def _elements(target: ir.Value | None) -> list[int | None] | None:
    """The elements of a vector as far as they are constant, or None where even its length is unknown."""
    if target is None:
        return None
    array, producer = constant(target), target.producer()
    if array is not None:
        return [int(element) for element in array.reshape(-1)]
    if producer is not None and producer.op_type == "Concat":
        parts = [_elements(value) for value in producer.inputs]
        return [size for part in parts for size in part or ()] if None not in parts else None
    length = target.shape[0] if target.shape is not None and len(target.shape) == 1 else None
    return [None] * length if isinstance(length, int) else None


def _sizes(shape: ir.Shape) -> list[int | str | None]:
    """The sizes of a shape, None where nothing is known of one."""
    sizes = [size if isinstance(size, int) else size.value for size in shape]
    return [
        None if (size < 0 if isinstance(size, int) else str(size).startswith(_INVENTED)) else size for size in sizes
    ]


def _contradict(declared: ir.Shape | None, inferred: ir.Shape | None) -> bool:
    """Whether a declared size differs from one that was inferred from the inputs, or the ranks differ."""
    if declared is None or inferred is None:
        return False
    if len(declared) != len(inferred):
        return True
    pairs = zip(_sizes(declared), _sizes(inferred), strict=True)
    return any(isinstance(ours, int) and theirs is not None and ours != theirs for ours, theirs in pairs)


def _merge(inferred: ir.Shape | None, declared: ir.Shape | None) -> ir.Shape | None:
    """What was inferred, completed with what is declared.

    >>> str(_merge(ir.Shape(["batch", "unk__0", None]), ir.Shape(["batch", 16, "length"])))
    '[batch,16,length]'
    """
    if inferred is None or declared is None or len(inferred) != len(declared):
        shape = inferred if inferred is not None else declared
        return None if shape is None else ir.Shape(_sizes(shape))
    pairs = zip(_sizes(inferred), _sizes(declared), strict=True)
    return ir.Shape([theirs if theirs is not None else ours for theirs, ours in pairs])
