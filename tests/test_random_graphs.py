"""The whole pipeline on random networks: what holds for every model, recipe and target."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import qonnx
from qonnx.graph import load
from qonnx.linter import Severity
from qonnx.plan import QuantPlan
from qonnx.result import Result
from qonnx.runtime import DISABLED_OPTIMIZERS, HONEST_OPTIONS
from qonnx.targets import target as find_target
from tests.helpers import Feeds, random_feeds
from tests.random_graphs import SAMPLES, random_model

Array = npt.NDArray[Any]

BATCHES = 12

# One for each of the jobs below, by the last digit: networks of which most layers are quantized.
SEEDS = (170, 181, 152, 183, 104, 145, 156, 117, 138, 139)

# Recipe and target, and which of the batches the result is judged by: those that nothing was learned from.
CHOSEN_ON_NONE, LEARNED_ON_NONE, ALL = (5, 9), (1, 5, 9), tuple(range(BATCHES))
JOBS = (
    ("int8", "a800", CHOSEN_ON_NONE),
    ("int8", "ort-cpu", CHOSEN_ON_NONE),
    ("int8", "onnx", CHOSEN_ON_NONE),
    ("int8-qoperator", "ort-cpu", CHOSEN_ON_NONE),
    ("int8-dynamic", "ort-cpu", ALL),
    ("int8-smoothquant", "a800", CHOSEN_ON_NONE),
    ("int8-per-token", "ort-cpu", LEARNED_ON_NONE),
    ("w8", "ort-cpu", LEARNED_ON_NONE),
    ("fp8", "h100", CHOSEN_ON_NONE),
    ("w4", "a800", LEARNED_ON_NONE),
)


class Case(NamedTuple):
    """A model, and what became of it."""

    model: ir.Model
    before: onnx.ModelProto
    batches: Sequence[Feeds]
    judged: tuple[int, ...]
    target: str
    recipe: str
    folder: Path
    result: Result

    def again(self, plan: QuantPlan | None = None) -> Result:
        """Quantizes once more."""
        output = self.folder / "again.onnx"
        return qonnx.quantize(self.model, self.batches, output, recipe=self.recipe, target=self.target, plan=plan)


def quantized(seed: int, folder: Path) -> Case:
    recipe, target, judged = JOBS[seed % len(JOBS)]
    model = random_model(seed)
    before = written(model)
    batches = [random_feeds(model, index, n=SAMPLES) for index in range(BATCHES)]
    result = qonnx.quantize(model, batches, folder / "quantized.onnx", recipe=recipe, target=target)
    return Case(model, before, batches, judged, target, recipe, folder, result)


@pytest.fixture(scope="module", params=SEEDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return quantized(request.param, tmp_path_factory.mktemp("random"))


def written(model: ir.Model) -> onnx.ModelProto:
    """The model without the names of tensors in nodes, which nothing reads."""
    proto = ir.to_proto(model)
    for attribute in (attribute for node in proto.graph.node for attribute in node.attribute):
        if attribute.HasField("t"):
            attribute.t.ClearField("name")
    return proto


def run(model: str | bytes, feeds: Feeds, level: str = "ORT_ENABLE_ALL") -> dict[str, Array]:
    """The outputs, with the options that the README names."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    for key, value in HONEST_OPTIONS.items():
        options.add_session_config_entry(key, value)
    native = ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(DISABLED_OPTIMIZERS)
    )
    return dict(zip([output.name for output in native.get_outputs()], native.run(None, dict(feeds)), strict=True))


def sqnr_db(pairs: list[tuple[Array, Array]]) -> float:
    """Of float and quantized results, one pair for each batch; nothing is rounded above 100 dB."""
    signal = sum(float(np.square(x, dtype=np.float64).sum()) for x, _ in pairs)
    noise = sum(float(np.square(x.astype(np.float64) - y).sum()) for x, y in pairs)
    if not noise:
        return 100.0
    return min(10 * math.log10(signal / noise), 100.0) if signal else -math.inf


def test_the_file_is_valid_and_has_the_same_inputs_and_outputs(case: Case) -> None:
    onnx.checker.check_model(case.result.output, full_check=True)
    graph, before = load(case.result.output).graph, case.model.graph
    assert [str(value) for value in graph.inputs] == [str(value) for value in before.inputs]
    assert [str(value) for value in graph.outputs] == [str(value) for value in before.outputs]


def test_the_model_is_left_as_it_was(case: Case) -> None:
    assert written(case.model) == case.before


def test_the_figures_are_those_of_the_two_models(case: Case) -> None:
    comparison = case.result.comparison
    judged = [case.batches[index] for index in case.judged]
    assert comparison.batches == len(judged)
    float_runs = [run(case.before.SerializeToString(), feeds) for feeds in judged]
    runs = [run(case.result.output, feeds, comparison.optimization.value) for feeds in judged]
    for output in comparison.outputs:
        pairs = [(before[output.name], after[output.name]) for before, after in zip(float_runs, runs, strict=True)]
        assert all(np.isfinite(after).all() for _, after in pairs)
        assert min(output.sqnr_db, 100) == pytest.approx(sqnr_db(pairs), abs=0.01)


def test_low_figures_are_told(case: Case) -> None:
    for output in case.result.comparison.outputs:
        told = [warning for warning in case.result.warnings if warning.startswith(f"output {output.name} keeps only")]
        assert len(told) == (output.sqnr_db < 16)


def test_a_plan_gives_the_same_file(case: Case) -> None:
    case.result.plan.save(case.folder / "plan.json")
    result = case.again(QuantPlan.load(case.folder / "plan.json"))
    assert result.plan == case.result.plan
    assert Path(result.output).read_bytes() == Path(case.result.output).read_bytes()


def test_a_second_run_gives_the_same_file(case: Case) -> None:
    result = case.again()
    assert Path(result.output).read_bytes() == Path(case.result.output).read_bytes()


def test_with_all_layers_in_float_nothing_changes(case: Case) -> None:
    """What is done to the network before it is quantized, smoothing and all, leaves what it computes."""
    layers = tuple(msgspec.structs.replace(layer, reason="left out") for layer in case.result.plan.layers)
    plan = msgspec.structs.replace(case.result.plan, layers=layers, activations=(), weights=(), biases=())
    result = case.again(plan)
    assert all(output.sqnr_db > 100 for output in result.comparison.outputs)


def test_every_layer_is_in_the_plan_once(case: Case) -> None:
    planned = Counter(layer.node for layer in case.result.plan.layers if layer.op != "Gather")
    nodes = [node for node in case.model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    assert planned.total() == len(nodes)
    assert set(planned.values()) <= {1}
    if any(node.name for node in nodes):
        assert set(planned) == {node.name for node in nodes}


def test_the_linter_finds_no_errors(case: Case) -> None:
    if find_target(case.target).device is not None:
        findings = qonnx.lint(case.result.output, target=case.target)
        assert not [finding for finding in findings if finding.severity is Severity.ERROR]
