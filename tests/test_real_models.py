"""The promise, on networks with real weights: accuracy kept, layers on INT8 for sm_80, small files, honest figures."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import qonnx
import qonnx.graph
from models.common import Batch
from qonnx import group_error
from qonnx.engine.listing import int8_nodes
from qonnx.equalization import equalize
from qonnx.graph import parameters
from qonnx.group_error import Quantizers, channel_axes
from qonnx.group_samples import collect_inputs
from qonnx.groups import Residual, SmoothGroup, find_groups
from qonnx.linear import linear_of
from qonnx.observation import observe
from qonnx.passes import outlier_suppression
from qonnx.passes.equalize import Equalization
from qonnx.passes.outlier_suppression import OutlierSuppression
from qonnx.passes.prepare import prepare
from qonnx.passes.rescale_channels import RescaleChannels
from qonnx.passes.smooth_quant import SmoothQuant
from qonnx.passes.split_channels import Split, SplitChannels, find_region
from qonnx.runtime import session
from qonnx.smoothing import Method, smooth
from qonnx.statistics import Statistics

DIMS = {"minilm": {"sequence": (1, 128, 256)}, "mobilenet": {}, "residual": {}}
# Fewer test items than the benchmark has: one standard error is about 1.5 points, and both forms read the same items.
ITEMS = {"minilm": {"test": 300}, "mobilenet": {"test": 1000}, "residual": {"test": 1000}}


@pytest.mark.models
@pytest.mark.rtx
@pytest.mark.parametrize("name", DIMS)
def test_from_torch_to_an_int8_engine(name: str, tmp_path: Path) -> None:
    model = importlib.import_module(f"models.{name}")
    example = model.build()
    source = qonnx.export(
        example.module, example.args, tmp_path / "model.onnx", dynamic_shapes=example.dynamic_shapes, verify=False
    )
    result = qonnx.quantize(source, model.calibration(batches=16), tmp_path / "quantized.onnx")
    onnx.checker.check_model(result.output, full_check=True)

    assert min(output.sqnr_db for output in result.comparison.outputs) >= 16
    assert len(result.plan.quantized_layers) >= 0.75 * len(result.plan.layers)
    assert all(layer.reason for layer in result.plan.float_layers)
    without_tables = (result.quantized_bytes - result.lookup_bytes) / (result.float_bytes - result.lookup_bytes)
    assert without_tables < 0.30 or name == "residual"  # 15 kB, of which scales and float biases are a part
    assert parameters(qonnx.graph.load(result.output))[1] == result.quantized_bytes

    before = model.evaluate(session(source).run, **ITEMS[name])
    after = model.evaluate(session(result.output).run, **ITEMS[name])
    assert after.value >= before.value - 1.5

    (batch,) = model.calibration(batches=1)
    plain, fused = (session(result.output, optimize=optimize).run(batch) for optimize in (False, True))
    for output, values in plain.items():
        error = np.sum((values - fused[output]) ** 2) / np.sum(values**2)
        assert error < 10**-2.0, output  # codes next to a rounding boundary fall to either side

    engine = qonnx.build_engine(result.output, tmp_path / "model.plan", dims=DIMS[name])
    planned = int8_nodes(engine.layers, [layer.node for layer in result.plan.quantized_layers])
    assert [layer.node for layer in planned if not layer.int8] == []


# How much of a network is enough to see every form of group that it has.
PARTS = {"mobilenet": {}, "minilm": {}, "ocr": {}, "smollm2": {"layers": 2}}
EXCERPTS = {"smollm2": {"batch_size": 1, "length": 48}}


@pytest.fixture(scope="module", params=PARTS)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.Model, list[Batch]]:
    """A prepared network with real weights, and three batches."""
    module = importlib.import_module(f"models.{request.param}")
    if hasattr(module, "onnx_file"):
        source = module.onnx_file()
    else:
        example, source = module.build(**PARTS[request.param]), tmp_path_factory.mktemp("network") / "model.onnx"
        qonnx.export(example.module, example.args, source, dynamic_shapes=example.dynamic_shapes, verify=False)
    model = qonnx.graph.load(source)
    prepare(model)
    return model, list(module.calibration(batches=3, **EXCERPTS.get(request.param, {"batch_size": 2})))


@pytest.mark.models
@pytest.mark.parametrize("pad", [False, True])
def test_equalization_changes_nothing_before_quantization(
    network: tuple[ir.Model, list[Batch]], pad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = network
    groups = find_groups(model, explicit=True, pad=pad, bounds=True)
    monkeypatch.setattr(group_error, "_BUDGET", 1 << 20)
    statistics, samples = _measured(model, groups, batches[:2])
    rescalings, reports = equalize(groups, Equalization(pad=pad), statistics, samples, Quantizers())
    assert len(rescalings) >= 2
    assert all(report.method or report.reason for report in reports)
    changed = model.clone()
    find = {group.value: group for group in find_groups(changed, explicit=True, pad=pad, bounds=True)}
    RescaleChannels(tuple(replace(each, group=find[each.group.value]) for each in rescalings))(changed)
    _assert_exact(model, changed, batches[2])


@pytest.mark.models
@pytest.mark.parametrize("method", [SmoothQuant(0.8), OutlierSuppression(percentile=99.9)], ids=["smoothquant", "os+"])
def test_smoothing_changes_nothing_before_quantization(
    network: tuple[ir.Model, list[Batch]], method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any threshold must do: two are tried, on a few results of each layer.
    monkeypatch.setattr(outlier_suppression, "_COARSE", np.array([0.5, 0.125]))
    monkeypatch.setattr(outlier_suppression, "_FINE", 2)
    monkeypatch.setattr(group_error, "_BUDGET", 1 << 20)
    model, batches = network
    changed = model.clone()
    groups = find_groups(changed, residual=Residual.MUL, explicit=True)
    statistics, samples = _measured(model, groups, batches[:2])
    sought = isinstance(method, OutlierSuppression)
    reports = smooth(changed, groups, method, statistics, samples if sought else {})
    assert sum(bool(report.method) for report in reports) >= 5
    _assert_exact(model, changed, batches[2])


@pytest.mark.models
def test_repeated_channels_change_nothing_before_quantization(network: tuple[ir.Model, list[Batch]]) -> None:
    model, batches = network
    changed = model.clone()
    layers = [node.name or "" for node in changed.graph if (region := find_region(node)) and region.makers]
    sizes = {node.name: linear.input_channels for node in changed.graph if (linear := linear_of(node))}
    SplitChannels(tuple(Split(layer, (1,) * (sizes[layer] - 2) + (3, 2)) for layer in layers))(changed)
    _assert_exact(model, changed, batches[2])
    # The pass is for what lies between matrix products; between convolutions it finds nothing.
    assert bool(layers) == any(node.op_type == "Gelu" or node.op_type == "Sigmoid" for node in model.graph)


def _measured(
    model: ir.Model, groups: Sequence[SmoothGroup], batches: Sequence[Batch]
) -> tuple[Statistics, dict[str, NDArray[np.float32]]]:
    axes = channel_axes(groups)
    return observe(model, list(axes), batches, channel_axes=axes), collect_inputs(model, groups, batches, tokens=32)


def _assert_exact(before: ir.Model, after: ir.Model, batch: Batch) -> None:
    expected, found = (session(model).run(batch) for model in (before, after))
    for output, values in expected.items():
        error = np.abs(found[output] - values)
        assert error.max() < 1e-4 * np.abs(values).max(), output
        assert np.median(error) < 1e-5 * np.abs(values).max(), output
