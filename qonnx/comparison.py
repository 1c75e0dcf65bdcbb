"""How far a quantized model is from the original, per graph output and per layer, over a stream of batches."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qonnx.custom_operators import runnable
from qonnx.data import batches
from qonnx.errors import ModelError
from qonnx.graph import RESCALED, load
from qonnx.linear import LINEAR_OPS
from qonnx.runtime import Optimization, session, with_outputs

Array = npt.NDArray[Any]
ModelSource = ir.Model | str | os.PathLike[str]

# Results of layers are fetched in groups of about this many bytes per model, so that a batch of large activations does
# not fill the memory; the graph runs once per group.
GROUP_BYTES = 512 * 1024 * 1024

# An output is mostly constant where its mean over the samples has ten times the power of what differs from it. That is
# worth a warning where little is kept of the latter, by the goal that recipes have.
_MOSTLY_CONSTANT_DB = 10.0
_LITTLE_DB = 16.0

# Of float32, which has 24 bits, what differs by less than this is rounding.
ROUNDING_DB = 100.0

# Elements that are converted to float64 at a time.
_CHUNK = 1 << 20


class Difference(msgspec.Struct, frozen=True):
    """How far one value of the candidate is from the same value of the reference, over all batches.

    Elements that are not finite in either model are counted and left out of the sums.

    Attributes:
        name: the value's name.
        sqnr_db: 10 log10(sum x^2 / sum (x - y)^2) for reference x and candidate y, in dB. inf when nothing differs;
            -inf when the reference is all zero and the candidate is not, or when the candidate has no finite element
            left; nan when nothing can be compared: integers, or shapes that differ in every batch.
        cosine: sum x y / sqrt(sum x^2 sum y^2); nan where either is all zero and they differ, and for integers.
        max_error: the largest |x - y|; nan for integers.
        mean_error: the mean |x - y|; nan for integers.
        agreement: for integers, booleans and strings the share of equal elements; nan for floats.
        elements: how many elements went into the figures.
        nonfinite_reference: NaN and infinite elements of the reference.
        nonfinite: NaN and infinite elements of the candidate.
        mismatched_batches: batches in which the two had different shapes (detections, for example), or one floats and
            the other integers; they count for nothing else.
        node: for a layer, the name of the node that computes it.
        op: for a layer, the operator of that node.
        variation_db: for an output, the same as `sqnr_db` of what differs between samples alone, x - mean x; the mean
            is that of each position over the first axis. -inf where all samples are equal; nan where the other axes
            change, with one sample or samples of more than a million elements, and where one is not a finite float.
    """

    name: str
    sqnr_db: float
    cosine: float
    max_error: float
    mean_error: float
    agreement: float
    elements: int
    nonfinite_reference: int
    nonfinite: int
    mismatched_batches: int
    node: str = ""
    op: str = ""
    variation_db: float = math.nan


class Comparison(msgspec.Struct, frozen=True):
    """What `compare` found.

    Attributes:
        outputs: one entry per graph output, in the order of the reference.
        layers: one entry per layer found in both models, in network order; empty unless asked for. Errors accumulate:
            each entry holds what all layers before it have done.
        unmatched_layers: results of layers of the reference that the candidate has no float value of that name for, or
            one that smoothing has scaled.
        batches: how many batches were compared.
        optimization: how ONNX Runtime ran the candidate; less than `ALL` means that integers were simulated in float.
        refusal: for that, what ONNX Runtime said of optimizing it; "" where it was not asked to, or did.
    """

    outputs: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    unmatched_layers: tuple[str, ...]
    batches: int
    optimization: Optimization
    refusal: str = ""

    @property
    def worst(self) -> Difference | None:
        """The output with the lowest SQNR, or None when no output has one."""
        return min(_measured(self.outputs), key=lambda output: output.sqnr_db, default=None)

    def worst_layers(self, count: int = 10) -> tuple[Difference, ...]:
        """The layers with the lowest SQNR, the worst first."""
        return tuple(sorted(_measured(self.layers), key=lambda layer: layer.sqnr_db)[:count])


NOTHING_COMPARED = Comparison((), (), (), 0, Optimization.NONE)
"""What stands in the place of a comparison where there were no data."""


def compare(
    reference: ModelSource,
    candidate: ModelSource,
    data: Any,
    *,
    layers: bool = False,
    max_batches: int | None = None,
    default_options: bool = False,
) -> Comparison:
    """Runs two models on the same data and measures how far the second is from the first.

    Sums are kept in float64 and one batch is in memory at a time. Layers are compared under their value names: the
    results of Conv, ConvTranspose, Gemm and MatMul in either model that exist in the other too, whatever computes them
    there (a DequantizeLinear in the graphs of some tools). They are measured in a second run that computes what the
    Q/DQ nodes say in float; the outputs are always those of the graph as it is deployed. In place of what operators
    compute that ONNX Runtime does not have, what they read is compared.

    Args:
        reference: the float model, as a path or a graph.
        candidate: the quantized model, with the same inputs and outputs.
        data: see `qonnx.data.batches`.
        layers: whether to compare layers too.
        max_batches: compare on at most this many batches.
        default_options: run the candidate as ONNX Runtime does where no option is set, see `qonnx.runtime`.

    Raises:
        ModelError: a model does not load, or the two differ in their inputs or outputs.
        DataError: the data do not fit the reference.
    """
    parts = _runnable(reference), _runnable(candidate)
    whole, (reference, candidate) = parts == (reference, candidate), parts
    original, quantized = session(reference), session(candidate, default_options=default_options)
    _check_same_names("input", [spec.name for spec in original.inputs], [spec.name for spec in quantized.inputs])
    names = original.outputs
    if not whole:  # constants that are read may be folded in one of them only
        names = tuple(name for name in names if name in quantized.outputs)
    if whole or not names:
        _check_same_names("output", original.outputs, quantized.outputs)
    outputs = {name: _Sums(_Variation()) for name in names}
    inner = _Layers(_graph(reference), _graph(candidate)) if layers else None
    count = 0
    for batch in batches(data, original.inputs, max_batches=max_batches):
        count += 1
        adapted = next(batches(batch, quantized.inputs))  # the candidate may take float16 where the reference does not
        expected, given = original.run(batch), quantized.run(adapted)
        for name, sums in outputs.items():
            sums.add(expected[name], given[name])
        if inner is not None:
            inner.add(batch, adapted)
    return Comparison(
        outputs=tuple(sums.result(name) for name, sums in outputs.items()),
        layers=inner.results() if inner else (),
        unmatched_layers=inner.unmatched() if inner else (),
        batches=count,
        optimization=quantized.optimization,
        refusal=quantized.refusal,
    )


def difference(name: str, reference: Array, candidate: Array) -> Difference:
    """The difference between two arrays.

    >>> found = difference("x", np.array([3.0, 4.0]), np.array([3.0, 3.5]))
    >>> found.sqnr_db, found.max_error, found.elements
    (20.0, 0.5, 2)
    """
    sums = _Sums()
    sums.add(reference, candidate)
    return sums.result(name)


def mostly_constant(outputs: Sequence[Difference]) -> tuple[str, ...]:
    """Warnings of outputs whose figures are about what all samples have in common.

    Not of one among several that is computed exactly: the positions of anchors, for example.
    """
    constant = all(output.variation_db == -math.inf for output in outputs)
    return tuple(
        _common(output)
        for output in outputs
        if output.variation_db < min(_LITTLE_DB, output.sqnr_db - _MOSTLY_CONSTANT_DB)
        and (constant or output.sqnr_db < math.inf)
    )


def _common(output: Difference) -> str:
    if output.variation_db < output.sqnr_db - ROUNDING_DB:
        return (
            f"output {output.name} is the same for every sample, but for rounding: its {output.sqnr_db:.1f} dB say "
            "nothing; check the model and the data"
        )
    return (
        f"output {output.name} is almost the same for every sample: it keeps {output.sqnr_db:.1f} dB, but "
        f"{output.variation_db:.1f} dB of what differs: measure the task before you use this file"
    )


def _measured(differences: Iterable[Difference]) -> list[Difference]:
    return [difference for difference in differences if not math.isnan(difference.sqnr_db)]


class _Sums:
    """What a `Difference` is computed from, added up over batches in float64."""

    def __init__(self, variation: _Variation | None = None) -> None:
        self.variation = variation
        self.signal = self.noise = self.other = self.product = self.absolute = self.largest = 0.0
        self.elements = self.nonfinite_reference = self.nonfinite = self.mismatched = self.equal = 0
        self.real = True
        self.kinds_differ = False

    def add(self, reference: Array, candidate: Array) -> None:
        self.real = _is_real(reference) and _is_real(candidate)
        self.kinds_differ = _is_real(reference) != _is_real(candidate)
        if self.kinds_differ or reference.shape != candidate.shape:
            self.mismatched += 1
            return
        if not self.real:
            self.elements += reference.size
            self.equal += int(np.sum(reference == candidate))
            return
        if self.variation is not None:
            self.variation.add(reference)
        flat, other = reference.reshape(-1), candidate.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._add(_float64(flat[part]), _float64(other[part]))

    def _add(self, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> None:
        finite_x, finite_y = np.isfinite(x), np.isfinite(y)
        self.nonfinite_reference += x.size - int(finite_x.sum())
        self.nonfinite += y.size - int(finite_y.sum())
        usable = finite_x & finite_y
        if not usable.all():
            x, y = x[usable], y[usable]
        if not x.size:
            return
        error = np.abs(x - y)
        self.elements += x.size
        self.signal += float(x @ x)
        self.other += float(y @ y)
        self.product += float(x @ y)
        self.noise += float(error @ error)
        self.absolute += float(error.sum())
        self.largest = max(self.largest, float(error.max()))

    def result(self, name: str, node: str = "", op: str = "") -> Difference:
        measured = self.real and self.elements > 0
        return Difference(
            name=name,
            sqnr_db=self._sqnr_db(),
            cosine=self._cosine(),
            max_error=self.largest if measured else math.nan,
            mean_error=self.absolute / self.elements if measured else math.nan,
            agreement=self.equal / self.elements if not self.real and self.elements else math.nan,
            elements=self.elements,
            nonfinite_reference=self.nonfinite_reference,
            nonfinite=self.nonfinite,
            mismatched_batches=self.mismatched,
            node=node,
            op=op,
            variation_db=self._variation_db(),
        )

    def _variation_db(self) -> float:
        power = self.variation.power() if self.variation is not None else None
        if power is None:
            return math.nan
        if power <= 0:
            return -math.inf
        return 10 * math.log10(power / self.noise) if self.noise > 0 else math.inf

    def _sqnr_db(self) -> float:
        if not self.real or not self.elements:  # nothing to compare, perhaps because the candidate is all NaN
            return -math.inf if self.nonfinite > self.nonfinite_reference else math.nan
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf

    def _cosine(self) -> float:
        if not self.real or not self.elements:
            return math.nan
        if self.noise == 0:
            return 1.0
        length = math.sqrt(self.signal) * math.sqrt(self.other)
        return self.product / length if length > 0 else math.nan


class _Variation:
    """How far an output is from its mean over all samples, each position for itself."""

    def __init__(self) -> None:
        self.rows, self.squares, self.known = 0, 0.0, True
        self._first: npt.NDArray[np.float64] | None = None
        self._sum: npt.NDArray[np.float64] = np.zeros(0)

    def add(self, output: Array) -> None:
        if not self.known or not output.size:
            return
        if output.ndim == 0 or output[0].size > _CHUNK or not np.isfinite(output).all():
            self.known = False
            return
        if self._first is None:
            self._first = _float64(output[0])
            self._sum = np.zeros_like(self._first)
        if output.shape[1:] != self._first.shape:
            self.known = False
            return
        samples = max(1, _CHUNK // self._first.size)
        for start in range(0, len(output), samples):  # less the first one, so that what is constant is 0
            offset = _float64(output[start : start + samples]) - self._first
            self._sum += offset.sum(axis=0)
            self.squares += float(np.square(offset).sum())
        self.rows += len(output)

    def power(self) -> float | None:
        """Over all samples: of n, one went into the mean. None where it is not known."""
        if not self.known or self.rows < 2:
            return None
        spread = self.squares - float(np.square(self._sum).sum()) / self.rows
        return spread * self.rows / (self.rows - 1)


class _Layers:
    """The layers that two graphs have in common, and their differences so far."""

    def __init__(self, reference: ir.Model, candidate: ir.Model) -> None:
        original, quantized = _results(reference), _results(candidate)
        layers = {name: node for name, node in original.items() if _is_layer(node) or _is_layer(quantized.get(name))}
        # Smoothing gives the same name to other numbers: what it did is undone further on.
        rescaled = {name for name, node in quantized.items() if RESCALED in node.metadata_props}
        self._nodes = {
            name: node if _is_layer(node) else quantized[name]
            for name, node in layers.items()
            if name in quantized and name not in rescaled
        }
        # A convolution that has absorbed its BatchNormalization carries the latter's value name: it is not missing.
        found = {quantized[name].name for name in self._nodes}
        self._missing = [
            name
            for name, node in layers.items()
            if name in rescaled or (name not in quantized and node.name not in found)
        ]
        self._sums = {name: _Sums() for name in self._nodes}
        self._bytes: dict[str, int] = {}
        self._given = {name: _behind_codes(original[name], quantized[name], name) for name in self._nodes}
        self._reference = session(with_outputs(reference, self._nodes))
        self._candidate = session(with_outputs(candidate, self._given.values()))

    def add(self, batch: Mapping[str, Array], adapted: Mapping[str, Array]) -> None:
        pending = list(self._nodes)
        while pending:
            group = _group(pending, self._bytes)
            pending = pending[len(group) :]
            expected = self._reference.run(batch, group)
            given = self._candidate.run(adapted, [self._given[name] for name in group])
            for name in group:
                self._bytes[name] = expected[name].nbytes
                self._sums[name].add(expected[name], given[self._given[name]])

    def results(self) -> tuple[Difference, ...]:
        return tuple(
            self._sums[name].result(name, node.name or "", node.op_type)
            for name, node in self._nodes.items()
            if not self._sums[name].kinds_differ
        )

    def unmatched(self) -> tuple[str, ...]:
        return (*self._missing, *(name for name, sums in self._sums.items() if sums.kinds_differ))


def _runnable(model: ModelSource) -> ModelSource:
    whole = _graph(model)
    part = runnable(whole)
    return model if part is whole else part


def _graph(model: ModelSource) -> ir.Model:
    return model if isinstance(model, ir.Model) else load(model)


def _group(pending: Sequence[str], known: Mapping[str, int]) -> list[str]:
    """The first of the pending values that fit into `GROUP_BYTES`, at least one, going by the sizes seen so far.

    A value that was not seen yet counts as the largest one seen; before any was, as an eighth of the limit.

    >>> _group(["a", "b", "c"], {"a": GROUP_BYTES, "b": 1, "c": 1}), _group(["b", "c", "d"], {"b": 1, "c": 1})
    (['a'], ['b', 'c', 'd'])
    """
    unseen = max(known.values(), default=GROUP_BYTES // 8)
    group: list[str] = []
    total = 0
    for name in pending:
        total += known.get(name, unseen)
        if group and total > GROUP_BYTES:
            break
        group.append(name)
    return group


def _results(model: ir.Model) -> dict[str, ir.Node]:
    """The node that computes each value of the main graph, in network order."""
    return {value.name: node for node in model.graph for value in node.outputs if value.name}


def _behind_codes(reference: ir.Node, candidate: ir.Node, name: str) -> str:
    """The value of the candidate that stands for that of the reference with this name.

    ONNX Runtime's quantizer drops a Relu or Clip in front of codes that end at the same bounds, and the layer's result
    takes over the name: it is what it was behind the codes only.
    """
    if reference.op_type not in ("Clip", "Relu") or not _is_layer(candidate):
        return name
    quantizers = [usage.node for usage in candidate.outputs[0].uses()]
    if not all(node.op_type == "QuantizeLinear" for node in quantizers):
        return name
    read = [usage.node for node in quantizers for usage in node.outputs[0].uses()]
    return next((node.outputs[0].name or name for node in read if node.op_type == "DequantizeLinear"), name)


def _is_layer(node: ir.Node | None) -> bool:
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in LINEAR_OPS


def _is_real(array: Array) -> bool:
    """Whether an array holds floating-point numbers, those of ml_dtypes included."""
    return array.dtype.kind in "fc" or (array.dtype.kind == "V" and "float" in array.dtype.name)


def _float64(array: Array) -> npt.NDArray[np.float64]:
    return (array.view(array.real.dtype) if array.dtype.kind == "c" else array).astype(np.float64)


def _check_same_names(kind: str, reference: Iterable[str], candidate: Iterable[str]) -> None:
    expected, given = list(reference), list(candidate)
    for name in expected:
        if name not in given:
            raise ModelError(f"the candidate has no {kind} {name!r}, it has {', '.join(given)}; compare like with like")
    for name in given:
        if name not in expected:
            raise ModelError(f"the candidate has an {kind} {name!r} that the reference lacks; compare like with like")
