"""Batches that are calibrated a few samples at a time: where that changes nothing, and nowhere else."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import pytest

import qonnx.pieces
from qonnx.observation import observe
from qonnx.passes.augment import Statistic
from qonnx.pieces import pieces, run_apart
from qonnx.rebatch import Batch
from qonnx.runtime import Session, session, with_outputs
from qonnx.statistics import Statistics

APART = {
    "elements": "y = Relu(x)",
    "a linear layer": "y = MatMul(x, w)",
    "samples merged with another axis": "k = Constant <value_ints = [-1, 2]> () y = Reshape(x, k)",
}

TOGETHER = {
    "a mean over all samples": "m = ReduceMean <axes = [0], keepdims = 1> (x) y = Sub(x, m)",
    "samples behind another axis": "y = Transpose <perm = [1, 0]> (x)",
    "one row for all samples": "m = ReduceMax <axes = [0], keepdims = 1> (x) y = Neg(m)",
    "one number for all samples": "y = ReduceMax <keepdims = 0> (x)",
    "what came before": "a = Constant <value_int = 0> () y = CumSum(x, a)",
    "what comes after": "a = Constant <value_int = 0> () y = CumSum <reverse = 1> (x, a)",
    "a mean over all samples, beside a mask": """
        m = ReduceMean <axes = [0], keepdims = 1> (x) c = Sub(x, m) z = Constant <value_float = 0.0> ()
        l = Constant <value_float = -3.4e38> () k = Equal(x, z) y = Where(k, l, c)""",
    "an even number of samples only": "a, b = Split <axis = 0> (x) y = Concat <axis = 0> (a, b)",
    "eight samples only": "k = Constant <value_ints = [8, 4]> () y = Reshape(x, k)",
}


def model_of(body: str, inputs: str = "float[n, 4] x") -> ir.Model:
    w = ", ".join(map(str, np.random.default_rng(1).standard_normal(12).round(3)))
    graph = f"g ({inputs}) => (float[a, b] y) <float[4, 3] w = {{{w}}}> {{ {body} }}"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    if "ReduceMax <keepdims" in body:
        model.graph.outputs[0].shape = ir.Shape([])
    return model


def batch(samples: int = 8) -> Batch:
    x = np.random.default_rng(0).standard_normal((samples, 4)).astype(np.float32)
    x[:, 1] = 0
    return {"x": x}


def found(
    model: ir.Model, feeds: Batch, statistic: Statistic = Statistic.ELEMENTS, independent: bool = False
) -> float | None:
    runner = session(with_outputs(model, ["y"]))
    with ThreadPoolExecutor(2) as pool:
        apart = run_apart(runner, feeds, {"y": statistic}, pool, independent)()
    return None if apart is None else apart.per_byte


@pytest.mark.parametrize("name", APART)
def test_samples_that_are_independent_are_run_apart(name: str) -> None:
    model = model_of(APART[name])
    assert found(model, batch()) == (0.75 if "w" in APART[name] else 1.0)


@pytest.mark.parametrize("name", TOGETHER)
def test_samples_that_are_not_stay_together(name: str) -> None:
    assert found(model_of(TOGETHER[name]), batch()) is None


def test_a_recurrent_network_that_reads_time_along_the_first_axis_stays_whole() -> None:
    rng = np.random.default_rng(2)
    w, r = (", ".join(map(str, rng.standard_normal(size).round(3))) for size in (36, 27))
    weights = f"<float[1, 9, 4] w = {{{w}}}, float[1, 9, 3] r = {{{r}}}>"
    graph = f"g (float[t, 1, 4] x) => (float[t, 1, 1, 3] y) {weights} {{ y = GRU <hidden_size = 3> (x, w, r) }}"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    assert found(model, {"x": rng.standard_normal((9, 1, 4)).astype(np.float32)}) is None


def test_what_lies_behind_the_elements_that_are_compared_has_the_same_number() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[n, m] x) => (float[a] y) {
            k = Constant <value_ints = [-1]> () f = Reshape(x, k) z = Constant <value_float = 0.0> ()
            c = Greater(f, z) y = Compress(f, c) }"""
    )
    x = np.random.default_rng(0).standard_normal((4, 1 << 18)).astype(np.float32)
    assert found(model, {"x": x}) is None


@pytest.mark.parametrize("size", [128, 2000, 150_000])
@pytest.mark.parametrize("part", ["f, l", "l, f"], ids=["at the end", "at the beginning"])
def test_of_large_activations_all_parts_are_compared(part: str, size: int) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[n, 300000] x) => (float[n, 300000] y) {{
            k = Constant <value_ints = [{300_000 - size}, {size}]> () f, l = Split <axis = 1> (x, k)
            m = ReduceMean <axes = [0], keepdims = 1> (l) l2 = Sub(l, m)
            y = Concat <axis = 1> ({part.replace("l", "l2")}) }}"""
    )
    x = np.random.default_rng(0).standard_normal((3, 300_000)).astype(np.float32)
    assert found(model, {"x": x}) is None


@pytest.mark.parametrize("samples", [0, 1])
def test_few_samples_stay_together(samples: int) -> None:
    assert found(model_of(APART["elements"]), batch(samples)) is None


def test_equal_samples_tell_nothing_but_the_graph_does() -> None:
    model, feeds = model_of(APART["elements"]), {"x": np.ones((8, 4), np.float32)}
    assert found(model, feeds) is None
    assert found(model, feeds, independent=True) == 1.0


def test_what_is_reduced_counts_as_observed() -> None:
    model = model_of("s = Relu(x) y = Size(s)")
    model.graph.outputs[0].shape, model.graph.outputs[0].dtype = ir.Shape([]), ir.DataType.INT64
    assert found(model, batch(), Statistic.COUNT, independent=True) == (4 * 4 * 2 + 8 * 2) / (4 * 4 * 2)


def test_samples_without_elements_stay_together() -> None:
    model, empty = model_of("y = Relu(x)", "float[n, m] x"), np.zeros((4, 0), np.float32)
    assert found(model, {"x": empty}, independent=True) is None
    assert observe(model, ["x", "y"], [{"x": empty}]).tensors["y"].count == 0


def test_a_fixed_number_of_samples_stays_together() -> None:
    assert found(model_of(APART["elements"], "float[8, 4] x"), batch()) is None


def test_in_pieces_little_enough_is_observed_whatever_the_size_of_the_batch() -> None:
    for shape, count in {(4, 1000): 1, (16, 1 << 20): 1, (16, 1 << 21): 2, (3, 1 << 26): 3}.items():
        one = np.broadcast_to(np.float32(0), shape)
        assert len(list(pieces({"x": one}, 1.0))) == count


def test_a_batch_whose_inputs_have_other_numbers_of_samples_is_not_cut() -> None:
    shapes = {"x": (8, 1 << 24), "y": (1, 1 << 24)}
    assert len(list(pieces({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}, 1.0))) == 1


@pytest.mark.parametrize("extremes_only", ["", "x", "y", "xy"])
@pytest.mark.parametrize("name", [*APART, *TOGETHER])
def test_statistics_are_those_of_whole_batches(name: str, extremes_only: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**APART, **TOGETHER}[name]
    runs_on_one, scalar = "samples only" not in name, "one number" in name
    stream = [batch(8), {"x": 3 * batch(8)["x"]}] if not runs_on_one else [batch(8), {"x": 3 * batch(5)["x"]}, batch(1)]
    sizes, run = list[int](), Session.run

    def counted(self: Session, feeds: Batch) -> dict[str, np.ndarray]:
        sizes.append(len(feeds["x"]))
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", counted)
    axes = {"x": 1} | ({} if scalar or "Transpose" in body else {"y": 1})
    counted_values = [value for value in ("x", "y") if value not in extremes_only]

    def observed(limit: int) -> Statistics:
        monkeypatch.setattr(qonnx.pieces, "_BYTES", limit)
        return observe(model_of(body), ["x", "y"], stream, distributions=counted_values, channel_axes=axes)

    in_pieces = observed(40)
    assert max(sizes) < 8 or name in TOGETHER
    assert_equal(in_pieces, observed(1 << 30))


@pytest.mark.parametrize("samples", [2, 3, 8])
@pytest.mark.parametrize(("name", "twice"), {"elements": 0, "samples merged with another axis": 2}.items())
def test_two_samples_are_run_twice_only_where_the_graph_does_not_tell(
    name: str, twice: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, run = list[int](), Session.run

    def counted(self: Session, feeds: Batch) -> dict[str, np.ndarray]:
        sizes.append(len(feeds["x"]))
        return run(self, feeds)

    monkeypatch.setattr(Session, "run", counted)
    stream = [batch(samples), batch(5)]
    statistics = observe(model_of(APART[name]), ["x", "y"], stream, distributions=["y"])
    assert sum(sizes) == samples + twice + 5
    assert 0 not in sizes
    assert (statistics.samples, statistics.tensors["x"].count) == (samples + 5, 4 * (samples + 5))
    found = statistics.tensors["y"].sketch
    assert found is not None
    assert found.count == 4 * (samples + 5)


def test_channels_along_the_axis_of_the_samples_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qonnx.pieces, "_BYTES", 40)
    statistics = observe(model_of(APART["elements"]), ["y"], [batch()], distributions=["y"], channel_axes={"y": 0})
    np.testing.assert_array_equal(statistics.tensors["y"].channel_maximum, np.maximum(batch()["x"], 0).max(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_element_shows_wherever_it_lies(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = batch()
    feeds["x"][3, 2] = bad

    def observed(limit: int) -> Statistics:
        monkeypatch.setattr(qonnx.pieces, "_BYTES", limit)
        return observe(model_of(APART["elements"]), ["x", "y"], [feeds], distributions=["y"], channel_axes={"y": 1})

    assert not observed(40).tensors["y"].finite
    assert_equal(observed(40), observed(1 << 30))


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert (one.batches, one.samples, one.data) == (other.batches, other.samples, other.data)
    for name, tensor in one.tensors.items():
        expected = other.tensors[name]
        assert (tensor.count, tensor.finite) == (expected.count, expected.finite)
        if tensor.finite:
            assert (tensor.minimum, tensor.maximum) == (expected.minimum, expected.maximum)
            np.testing.assert_allclose(tensor.sum_squares, expected.sum_squares, rtol=1e-6)
            np.testing.assert_array_equal(tensor.channel_minimum, expected.channel_minimum)
            np.testing.assert_array_equal(tensor.channel_maximum, expected.channel_maximum)
        np.testing.assert_array_equal(tensor.batch_minima, expected.batch_minima)
        np.testing.assert_array_equal(tensor.batch_maxima, expected.batch_maxima)
        assert (tensor.sketch is None) == (expected.sketch is None)
        if tensor.sketch is not None and expected.sketch is not None:
            np.testing.assert_array_equal(tensor.sketch.cells, expected.sketch.cells)
            np.testing.assert_array_equal(tensor.sketch.counts, expected.sketch.counts)
