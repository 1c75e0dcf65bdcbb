"""QuantPlan: for every tensor edge what is quantized and how, and for everything left in float the reason.

The plan is the one source of the Q/DQ nodes and of the report. It is JSON with one tensor or layer a line, so that a
person can read it, compare two of them, edit one, and feed it back with `--plan`.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from qonnx.errors import RecipeError
from qonnx.graph import publish, staging
from qonnx.numerics import Dtype, Granularity
from qonnx.placement import Edge
from qonnx.recipe import Format, Operators, Rounding


class TensorPlan(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one tensor is quantized on some of its edges.

    Attributes:
        value: the name of the value in the prepared graph.
        edges: the inputs that read the quantized tensor; the others keep reading the float one.
        dtype: the type of the codes.
        granularity: which elements share a scale.
        scale: one scale per tensor, channel or block, as a flat list.
        zero_point: as many as there are scales, or empty when all are 0.
        low: the smallest value the grid was made for; for a weight 0.
        high: the largest value the grid was made for; for a weight 0.
        sqnr_db: signal over rounding noise, estimated; what the range cuts off is not in it. None for a weight.
        source: where the range comes from.
        rounding: of a weight, how the code of each element is chosen.
    """

    value: str
    edges: tuple[Edge, ...]
    dtype: Dtype
    granularity: Granularity
    scale: tuple[float, ...]
    zero_point: tuple[int, ...] = ()
    low: float = 0.0
    high: float = 0.0
    sqnr_db: float | None = None
    source: str = ""
    rounding: Rounding = Rounding.NEAREST


class BiasPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is added to the bias of a layer so that quantization leaves the mean of its result alone.

    Attributes:
        node: the layer.
        edge: the input that reads the bias; of a convolution or Gemm without bias, the one that will.
        shift: one value per output channel.
    """

    node: str
    edge: Edge
    shift: tuple[float, ...]


class SmoothPlan(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a group of channels is divided by before anything is quantized: see `qonnx.smooth_choice.apply`.

    Attributes:
        value: the tensor of the prepared graph that the producer of the group makes.
        method: how factors and offsets were found.
        scale: one factor per channel.
        shift: one offset per channel, in units of the tensor before; empty when all are 0.
        nodes: whether the group was looked for with nodes at run time allowed.
        bounds: whether it was looked for with a bound for each channel allowed.
        pad: whether it was looked for with padding in nodes of its own allowed.
        copies: how often each input channel of the one layer that reads them is there: see
            `qonnx.passes.split_channels`; empty for as it was. Factors and offsets are those of all copies.
    """

    value: str
    method: str
    scale: tuple[float, ...]
    shift: tuple[float, ...] = ()
    nodes: bool = True
    bounds: bool = False
    pad: bool = False
    copies: tuple[int, ...] = ()


class LayerPlan(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A matrix product or convolution, and why it stays in float if it does."""

    node: str
    op: str
    output: str
    path: str = ""
    reason: str = ""

    @property
    def quantized(self) -> bool:
        """Whether all its operands are quantized."""
        return not self.reason


class FloatOperators(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All operators of one kind that stay in float."""

    op: str
    count: int
    reason: str


class QuantPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decisions for one model, target and recipe."""

    target: str
    recipe: str
    activations: tuple[TensorPlan, ...]
    weights: tuple[TensorPlan, ...]
    layers: tuple[LayerPlan, ...]
    float_operators: tuple[FloatOperators, ...] = ()
    biases: tuple[BiasPlan, ...] = ()
    format: Format = Format.QDQ
    operators: Operators = Operators.ONNX
    smoothing: tuple[SmoothPlan, ...] = ()

    @property
    def quantized_layers(self) -> tuple[LayerPlan, ...]:
        """The layers that run on integers."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def float_layers(self) -> tuple[LayerPlan, ...]:
        """The layers that stay in float, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.quantized)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; the file appears whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        with staging(path) as folder:
            (folder / Path(path).name).write_text(self.to_json(), encoding="utf-8")
            publish(folder, Path(path).parent)

    def to_json(self) -> str:
        """JSON with one tensor, layer or kind of operator a line."""
        fields = []
        for name, value in msgspec.to_builtins(self).items():
            if isinstance(value, list | tuple):
                lines = ",\n".join("    " + _compact(entry) for entry in value)
                fields.append(f'  "{name}": [\n{lines}\n  ]' if value else f'  "{name}": []')
            else:
                fields.append(f'  "{name}": {_compact(value)}')
        return "{\n" + ",\n".join(fields) + "\n}\n"

    @staticmethod
    def load(path: str | os.PathLike[str]) -> QuantPlan:
        """Reads a plan back.

        Raises:
            RecipeError: the file is missing or is not a plan.
        """
        try:
            return msgspec.json.decode(Path(path).read_bytes(), type=QuantPlan)
        except OSError as error:
            raise RecipeError(f"plan {path}: cannot be read ({error.strerror})") from error
        except (msgspec.DecodeError, RecipeError) as error:
            raise RecipeError(f"plan {path}: not a valid plan ({error})") from error


def unsigned(tensor: TensorPlan) -> TensorPlan:
    """The same grid in uint8 where it is one of int8, and else the tensor as it is.

    >>> from qonnx.numerics import PerTensor
    >>> tensor = unsigned(TensorPlan("x", (), Dtype.INT8, PerTensor(), (0.1,)))
    >>> tensor.dtype.value, tensor.zero_point
    ('uint8', (128,))
    """
    if tensor.dtype is not Dtype.INT8:
        return tensor
    zero_point = tuple(zero + 128 for zero in tensor.zero_point or (0,) * len(tensor.scale))
    return msgspec.structs.replace(tensor, dtype=Dtype.UINT8, zero_point=zero_point)


def _compact(value: object) -> str:
    return msgspec.json.encode(value).decode()
