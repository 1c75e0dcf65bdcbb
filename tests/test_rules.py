"""Rules: which nodes they are about, what they change, which of two wins, what is said of those that match nothing."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

import qonnx
from qonnx.calibrators import MinMax, Percentile
from qonnx.errors import RecipeError, TargetError
from qonnx.graph import load
from qonnx.numerics import Blocked, Dtype, PerAxis, PerTensor
from qonnx.passes.prepare import prepare
from qonnx.placement import place
from qonnx.recipe import Recipe, load_recipe, to_yaml
from qonnx.resolve import resolve
from qonnx.roles import Role, roles_of
from qonnx.rules import settings_of, unmatched
from qonnx.targets import target
from tests.graphs import model_of
from tests.test_placement import FUSED

TRANSFORMER = (
    "g (int64[1,32] ids, float[300,64] table, float[64,192] wqkv, float[192] b, float[64,64] wo, float[64] s, "
    "float[64,128] up, float[128] c, float[128,64] down, float[64,300] head) => (float[1,32,300] logits) {"
    "heads = Constant <value = int64[4] {1, 32, 4, 16}> () flat = Constant <value = int64[3] {1, 32, 64}> () "
    "[embed] x = Gather(table, ids) [project] m = MatMul(x, wqkv) a = Add(m, b) "
    "q, k, v = Split <axis = -1, num_outputs = 3> (a) "
    "q4 = Reshape(q, heads) k4 = Reshape(k, heads) v4 = Reshape(v, heads) "
    "qt = Transpose <perm = [0,2,1,3]> (q4) kt = Transpose <perm = [0,2,3,1]> (k4) "
    "vt = Transpose <perm = [0,2,1,3]> (v4) "
    "[scores] sc = MatMul(qt, kt) p = Softmax(sc) [mix] o = MatMul(p, vt) "
    "ot = Transpose <perm = [0,2,1,3]> (o) r = Reshape(ot, flat) [out] y = MatMul(r, wo) "
    "z = Add(x, y) n = LayerNormalization(z, s) "
    "[fc1] h = MatMul(n, up) hb = Add(h, c) g = Gelu(hb) [fc2] d = MatMul(g, down) "
    "e = Add(n, d) f = LayerNormalization(e, s) [lm] logits = MatMul(f, head) }"
)
NAMES = "table wqkv b wo s up c down head"


def transformer() -> ir.Model:
    model = model_of(TRANSFORMER, weights=NAMES, scale=0.2)
    prepare(model)
    return model


def data(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"ids": rng.integers(0, 300, (1, 32))} for _ in range(count)]


def recipe(*rules: Mapping[str, object], **fields: object) -> Recipe:
    return msgspec.convert({"rules": list(rules), **fields}, Recipe)


def test_roles_of_a_transformer() -> None:
    roles = {name: set(found) for name, found in roles_of(transformer().graph).items()}
    assert roles == {
        "embed": {Role.EMBEDDING},
        "project": {Role.FIRST, Role.ATTENTION},
        "scores": {Role.ATTENTION},
        "mix": {Role.ATTENTION},
        "out": {Role.ATTENTION},
        "fc1": {Role.MLP},
        "fc2": {Role.MLP},
        "lm": {Role.LAST, Role.LM_HEAD},
    }


def test_roles_of_a_convolutional_network() -> None:
    model = model_of(
        "g (float[1,8,4,4] x, float[8,8,1,1] w, float[8,8,1,1] w2, float[8,8,1,1] w3, float[8,4] w4) => "
        "(float[1,4] y, float[1,8,4,4] z) { [stem] a = Conv(x, w) [left] b = Conv(a, w2) [right] c = Conv(a, w3) "
        "s = Add(b, c) z = Relu(s) p = GlobalAveragePool(z) f = Flatten(p) [head] y = Gemm(f, w4) }",
        weights="w w2 w3 w4",
    )
    assert roles_of(model.graph) == {"stem": {Role.FIRST}, "head": {Role.LAST}}


def test_a_small_table_is_no_vocabulary() -> None:
    text = TRANSFORMER.replace("300", "200")
    model = model_of(text, weights=NAMES)
    assert roles_of(model.graph)["lm"] == {Role.LAST}


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"op": "Gather"}, {"embed"}),
        ({"name": "fc*"}, {"fc1", "fc2"}),
        ({"value": "down"}, {"fc2"}),
        ({"value": "w*"}, {"project", "out"}),
        ({"role": "attention", "op": "MatMul"}, {"project", "scores", "mix", "out"}),
        ({"role": "mlp", "name": "*1"}, {"fc1"}),
        ({"role": "last"}, {"lm"}),
    ],
)
def test_everything_that_a_match_names_must_fit(match: dict[str, str], expected: set[str]) -> None:
    model = transformer()
    settings = settings_of(model.graph, recipe({"match": match, "skip": True}))
    assert {name for name, found in settings.items() if found.reason == "rule 1 of the recipe"} == expected
    assert not unmatched(model.graph, recipe({"match": match, "skip": True}))


def test_of_two_rules_the_later_wins_field_by_field() -> None:
    rules = (
        {"match": {"op": "MatMul"}, "weights": {"dtype": "int4", "clip": "mse"}, "skip": True},
        {"match": {"name": "fc1"}, "weights": {"dtype": "uint8"}},
        {"match": {"name": "fc*"}, "skip": False},
        {"match": {"name": "fc2"}, "activations": {"calibrator": {"kind": "percentile", "percentile": 99.0}}},
    )
    found = settings_of(transformer().graph, recipe(*rules))
    assert (found["fc1"].weights.dtype, found["fc1"].weights.clip, found["fc1"].reason) == (Dtype.UINT8, "mse", "")
    assert (found["fc2"].weights.dtype, found["fc2"].reason) == (Dtype.INT4, "")
    assert found["fc2"].calibrator == Percentile(99.0)
    assert found["out"].reason == "rule 1 of the recipe"
    assert settings_of(transformer().graph, recipe(*rules), {"fc1": "costly"})["fc1"].reason == "costly"


@pytest.mark.parametrize(
    ("match", "message"),
    [
        ({"op": "Matmul"}, "no operator is called 'Matmul'; nearest: MatMul"),
        ({"name": "fc3"}, "no node is called 'fc3'; nearest: fc"),
        ({"value": "wkv"}, "no value is called 'wkv'; nearest: wqkv"),
        ({"path": "encoder.*"}, "no module path is called 'encoder.*'"),
        ({"op": "Gather", "name": "fc1"}, "no single node has all that it asks for"),
    ],
)
def test_a_rule_that_matches_nothing_is_said_with_the_nearest_names(match: dict[str, str], message: str) -> None:
    (warning,) = unmatched(transformer().graph, recipe({"match": {"op": "MatMul"}}, {"match": match}))
    assert warning.startswith(f"rule 2 matches nothing: {message}")


def test_a_role_that_nobody_plays_is_said_unless_the_rule_is_optional(tmp_path: Path) -> None:
    model = model_of("g (float[n,32] x, float[32,32] w) => (float[n,32] y) { y = MatMul(x, w) }", weights="w")
    (warning,) = unmatched(model.graph, recipe({"match": {"role": "attention"}}))
    assert warning == "rule 1 matches nothing: no layer has the role attention; there are first, last"
    assert not unmatched(model.graph, load_recipe("w4"))
    batches = [{"x": np.ones((2, 32), np.float32)}]
    rule = recipe({"match": {"role": "attention"}, "skip": True}, format="dynamic")
    result = qonnx.quantize(model, batches, tmp_path / "q.onnx", recipe=rule, target="ort-cpu")
    assert warning in result.warnings


def test_weights_by_rule(tmp_path: Path) -> None:
    rules = (
        {"match": {"role": "embedding"}, "weights": {"dtype": "int8", "granularity": {"kind": "per_tensor"}}},
        {"match": {"role": "lm_head"}, "weights": {"dtype": "int8", "granularity": {"kind": "per_channel"}}},
        {"match": {"role": "mlp"}, "weights": {"dtype": "uint4", "granularity": {"kind": "blocked", "block_size": 32}}},
        {"match": {"name": "out"}, "skip": True},
    )
    base = {"format": "weight_only", "weights": {"dtype": "int4", "granularity": {"kind": "blocked", "block_size": 16}}}
    result = qonnx.quantize(transformer(), data(), tmp_path / "q.onnx", recipe=recipe(*rules, **base), target="ort-cpu")
    assert {tensor.value: (tensor.dtype, tensor.granularity) for tensor in result.plan.weights} == {
        "table": (Dtype.INT8, PerTensor()),
        "wqkv": (Dtype.INT4, Blocked(0, 16)),
        "up": (Dtype.UINT4, Blocked(0, 32)),
        "down": (Dtype.UINT4, Blocked(0, 32)),
        "head": (Dtype.INT8, PerAxis(1)),
    }
    assert any(tensor.zero_point for tensor in result.plan.weights if tensor.dtype is Dtype.UINT4)
    assert "wo" in load(tmp_path / "q.onnx").graph.initializers
    assert result.comparison.outputs[0].sqnr_db > 14


def test_one_weight_of_two_layers_may_be_stored_in_two_types(tmp_path: Path) -> None:
    model = model_of(
        "g (float[n,32] x, float[32,32] w) => (float[n,32] y) "
        "{ [a] h = MatMul(x, w) r = Relu(h) [b] y = MatMul(r, w) }",
        weights="w",
        scale=0.2,
    )
    rules = ({"match": {"name": "b"}, "weights": {"dtype": "int4"}},)
    plan = qonnx.quantize(
        model, None, tmp_path / "q.onnx", recipe=recipe(*rules, format="weight_only"), target="ort-cpu"
    ).plan
    assert {(tensor.dtype, tensor.edges[0].node) for tensor in plan.weights} == {(Dtype.INT8, "a"), (Dtype.INT4, "b")}


def test_activations_by_rule(tmp_path: Path) -> None:
    rules = (
        {"match": {"name": "fc2"}, "activations": {"dtype": "uint16"}},
        {"match": {"name": "fc1"}, "activations": {"calibrator": {"kind": "percentile", "percentile": 90}}},
    )
    chosen = recipe(*rules, activations={"calibrator": {"kind": "minmax"}}, goal_sqnr_db=0, minimum_sqnr_db=-100)
    plan = qonnx.quantize(transformer(), data(), tmp_path / "q.onnx", recipe=chosen, target="ort-cpu").plan
    by_reader = {edge.node: tensor for tensor in plan.activations for edge in tensor.edges}
    assert (by_reader["fc2"].dtype, by_reader["lm"].dtype) == (Dtype.UINT16, Dtype.UINT8)
    assert (by_reader["fc1"].source, by_reader["fc2"].source) == ("percentile 90", "minmax")
    assert load(tmp_path / "q.onnx").opset_imports[""] == 21


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("a800", {"match": {}, "activations": {"dtype": "float8e4m3fn"}}, "rule 1: FP8 needs sm_89; a800 is sm_80"),
        ("a800", {"match": {}, "activations": {"dtype": "uint16"}}, "rule 1: activations in uint16 do not run on a800"),
        ("a800", {"match": {}, "weights": {"granularity": {"kind": "blocked"}}}, "rule 1: blocked weights"),
    ],
)
def test_a_rule_is_refused_like_a_recipe(name: str, rule: dict[str, object], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        resolve(recipe(rule), target(name))


def test_a_rule_reads_back_from_yaml_and_says_only_what_it_changes(tmp_path: Path) -> None:
    text = to_yaml(recipe({"match": {"role": "mlp"}, "activations": {"calibrator": {"kind": "minmax"}}}))
    assert "skip" not in text
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(tmp_path / "mine.yaml").rules[0].activations.calibrator == MinMax()
    with pytest.raises(RecipeError, match="role"):
        load_recipe("int8", ["rules=[{match: {role: middle}, skip: true}]"])


def test_attention_of_one_projection_is_one_part() -> None:
    model = model_of(FUSED, weights="w w1 b")
    prepare(model)
    assert {name for name, found in roles_of(model.graph).items() if Role.ATTENTION in found} == {
        "project", "scores", "mix", "out",
    }  # fmt: skip


@pytest.mark.parametrize(("consumer", "looked_up"), [("a800", "float"), ("ort-cpu", "int8")])
def test_a_rule_stores_tables_in_eight_bits_beside_integer_products(
    consumer: str, looked_up: str, tmp_path: Path
) -> None:
    chosen = recipe({"match": {"role": "embedding"}, "weights": {"dtype": "int8"}}, goal_sqnr_db=0)
    result = qonnx.quantize(transformer(), data(), tmp_path / "q.onnx", recipe=chosen, target=consumer)
    assert "embed" in {layer.node for layer in result.plan.quantized_layers}
    (table,) = (tensor for tensor in result.plan.weights if tensor.value == "table")
    assert (table.granularity, len(table.scale)) == (PerAxis(0), 300)
    written = load(tmp_path / "q.onnx")
    assert result.lookup_bytes == 0
    (read,) = {
        value.dtype.name.lower()
        for node in written.graph
        for value in node.inputs[:1]
        if node.op_type == "Gather" and value is not None and value.dtype is not None and value.shape == (300, 64)
    }
    assert read == looked_up
    assert result.comparison.outputs[0].sqnr_db > 20


@pytest.mark.parametrize("rule", [{"match": {"name": "*"}}, {"match": {"role": "embedding"}, "skip": True}])
def test_other_rules_leave_tables_in_float(rule: dict[str, object]) -> None:
    model = transformer()
    chosen = recipe({**rule, "weights": {"dtype": "int8"}})
    layers = place(model, chosen, target("a800")).layers
    assert "embed" not in {layer.node for layer in layers if not layer.reason}
