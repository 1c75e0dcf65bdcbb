"""Q/DQ and integer operators of one plan compute the same: codes differ by one step at most, tensor by tensor."""

import importlib
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.formats import insert
from qonnx.graph import load
from qonnx.passes.prepare import prepare
from qonnx.plan import QuantPlan
from qonnx.recipe import Format
from qonnx.runtime import session, with_outputs
from tests.helpers import LEVELS


def written(source: Path, plan: QuantPlan, kind: Format) -> ir.Model:
    model = load(source)
    prepare(model)
    insert(model, msgspec.structs.replace(plan, format=kind))
    return model


def code_values(model: ir.Model, plan: QuantPlan) -> dict[str, ir.Value]:
    """The values that hold the codes of planned tensors, by the name of the tensor, as far as the graph has them."""
    made = {value.name: value for node in model.graph for value in node.outputs}
    names = {tensor.value: f"{tensor.value}_quantized" for tensor in plan.activations}
    return {value: made[name] for value, name in names.items() if name in made}


def with_codes_fed(model: ir.Model, values: list[ir.Value]) -> None:
    """Makes everything that reads these codes read an input instead: what differs does not add up."""
    for value in values:
        fed = ir.Value(name=f"{value.name}_fed", type=value.type, shape=value.shape)
        for usage in list(value.uses()):
            usage.node.replace_input_with(usage.idx, fed)
        model.graph.inputs.append(fed)
        if not value.is_graph_output():
            model.graph.outputs.append(value)


@pytest.mark.parametrize(
    "name", ["residual", *(pytest.param(name, marks=pytest.mark.models) for name in ("mobilenet", "minilm"))]
)
def test_codes_differ_by_one_step_at_most(name: str, tmp_path: Path) -> None:
    model = importlib.import_module(f"models.{name}")
    example = model.build()
    shapes = example.dynamic_shapes
    source = qonnx.export(example.module, example.args, tmp_path / "m.onnx", dynamic_shapes=shapes, verify=False)
    settings = ["activations.calibrator.kind=minmax", "goal_sqnr_db=0"]
    data = list(model.calibration(batches=3, batch_size=2))
    plan = qonnx.quantize(
        source, data, tmp_path / "q.onnx", recipe="int8-unsmoothed", target="ort-cpu", settings=settings
    ).plan
    pairs, integers = (written(source, plan, kind) for kind in (Format.QDQ, Format.QOPERATOR))
    expected, found = code_values(pairs, plan), code_values(integers, plan)
    shared = sorted(expected.keys() & found.keys())
    assert len(shared) >= 0.9 * len(plan.activations)
    names = [expected[value].name or "" for value in shared]
    codes = session(with_outputs(pairs, names), optimize=False).run(data[0], names)
    with_codes_fed(integers, [found[value] for value in shared])
    feeds = {f"{found[value].name}_fed": codes[expected[value].name or ""] for value in shared}
    outputs = session(integers, optimize=LEVELS[0]).run({**data[0], **feeds})
    for value in shared:
        steps = outputs[found[value].name or ""].astype(np.int32) - codes[expected[value].name or ""]
        assert np.abs(steps).max() <= 1, value
        assert (steps != 0).mean() < 0.01, value
