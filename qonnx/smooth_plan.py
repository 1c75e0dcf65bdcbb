"""Does to a prepared model what a plan says about its channels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qonnx.errors import RecipeError
from qonnx.group_error import Vector
from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.passes.equalize import Equalization
from qonnx.passes.infer_shapes import InferShapes
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from qonnx.passes.split_channels import Split, SplitChannels
from qonnx.plan import SmoothPlan
from qonnx.smoothing import Method


@dataclass(frozen=True)
class Look:
    """What groups may cost: plans of one method have it in common, and it tells those of two methods apart.

    Attributes:
        nodes: whether they may take nodes at run time.
        bounds: whether a Clip may get a bound for each channel.
        pad: whether padding may become a node of its own.
    """

    nodes: bool = False
    bounds: bool = False
    pad: bool = False

    @staticmethod
    def of(what: SmoothPlan | Method | Equalization) -> Look:
        """What the groups of a method, or of a plan, were looked for with."""
        if isinstance(what, SmoothPlan):
            return Look(what.nodes, what.bounds, what.pad)
        equalizes = isinstance(what, Equalization)
        return Look(what.nodes, equalizes, isinstance(what, Equalization) and what.pad)

    def groups(self, model: ir.Model) -> tuple[SmoothGroup, ...]:
        """All groups of a model."""
        # Equalization would rather have its own node behind x * sigmoid(x) than reach back to x and repair the Sigmoid.
        residual = Residual.MUL if self.nodes and not self.bounds else Residual.REFUSE
        return find_groups(model, residual=residual, explicit=self.nodes, pad=self.pad, bounds=self.bounds)

    def plan(self, rescaling: Rescaling, splits: Mapping[str, Split]) -> SmoothPlan:
        """A rescaling as it stands in a plan, with the channels that were repeated before."""
        shift = floats(rescaling.offset) if rescaling.offset.any() else ()
        scale = floats(rescaling.scale)
        value, method = rescaling.group.value, rescaling.method
        copies = splits[value].copies if value in splits else ()
        return SmoothPlan(value, method, scale, shift, self.nodes, self.bounds, self.pad, copies)


def apply(model: ir.Model, plans: Sequence[SmoothPlan]) -> ir.Model:
    """A copy of a prepared model with the factors and offsets of a plan folded in.

    Raises:
        RecipeError: the plan does not fit the model.
        ModelError: a factor or an offset cannot be folded in.
    """
    copy = model.clone()
    for look, same in itertools.groupby(plans, Look.of):
        together = list(same)
        found = _found(look, copy, together)
        repeats = [plan for plan in together if plan.copies]
        if repeats:
            layers = {plan.value: found[plan.value].consumers[0].linear.node.name or "" for plan in repeats}
            SplitChannels(tuple(Split(layers[plan.value], plan.copies) for plan in repeats))(copy)
            found = _found(look, copy, together)
        rescalings = []
        for plan in together:
            scale = np.array(plan.scale, np.float64)
            shift = np.array(plan.shift, np.float64) if plan.shift else None
            rescalings.append(Rescaling(found[plan.value], scale, shift, plan.method))
        RescaleChannels(tuple(rescalings))(copy)
        InferShapes()(copy)
    return copy


def _found(look: Look, model: ir.Model, plans: Sequence[SmoothPlan]) -> dict[str, SmoothGroup]:
    """The groups of a model by value; every plan has one, with a layer."""
    found = {group.value: group for group in look.groups(model)}
    for plan in plans:
        if plan.value not in found or not found[plan.value].consumers:
            missing = f"the plan smooths {plan.value!r}, which this model lacks"
            raise RecipeError(f"{missing}: it was made for another model")
    return found


def floats(vector: Vector) -> tuple[float, ...]:
    """As the shortest decimals of their float32 values, so that a plan that was saved says the same."""
    return tuple(float(str(value)) for value in vector.astype(np.float32))
