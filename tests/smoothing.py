"""Random factors and offsets for every group of a graph: whatever they are, the function must stay."""

import numpy as np
import onnx
import onnx_ir as ir

from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.passes.prepare import prepare
from qonnx.passes.rescale_channels import RescaleChannels, Rescaling
from tests.graphs import model_of
from tests.helpers import Feeds, assert_same_function


def prepared(text: str, weights: str, opset: int = 21) -> ir.Model:
    """The graph in normal form; normalisations are fused where the opset has them."""
    model = model_of(text, weights=weights, opset=opset, scale=0.5)
    prepare(model, fuse=False)
    return model


def random_rescaling(group: SmoothGroup, rng: np.random.Generator) -> Rescaling:
    """Factors between about 0.2 and 5 where the group takes factors, offsets around 0 where it takes offsets."""
    size = group.producer.size
    scale = np.where(group.free, np.exp(0.8 * rng.standard_normal(size)), 1.0)
    shift = np.where(group.free, rng.standard_normal(size), 0.0)
    if group.no_scale:
        scale = np.ones(size)
    if group.clips:  # one bound for all channels
        shift = 0.3 * scale * group.free.all()
    return Rescaling(group, scale, None if group.no_shift else shift)


def rescale_everything(
    model: ir.Model,
    residual: Residual = Residual.REFUSE,
    explicit: bool = False,
    feeds: Feeds | None = None,
    rtol: float = 1e-5,
    check: bool = True,
) -> tuple[SmoothGroup, ...]:
    """Changes all groups of a model at once, and checks that it computes what it did; returns the groups."""
    before = model.clone()
    groups = find_groups(model, residual=residual, explicit=explicit)
    rng = np.random.default_rng(1)
    usable = [group for group in groups if not group.reason]
    modified = RescaleChannels(tuple(random_rescaling(group, rng) for group in usable))(model).modified
    assert modified == bool(usable)
    if check:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert_same_function(before, model, feeds, rtol)
    return groups


def layers(group: SmoothGroup) -> list[str]:
    """The weights of the linear layers of a group."""
    return [consumer.linear.weight.name or "" for consumer in group.consumers]
