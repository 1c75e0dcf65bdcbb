import itertools
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qonnx
from qonnx import diagnostics
from qonnx.calibrators import MSE, Average, Calibrator, Entropy, MinMax, Percentile
from qonnx.diagnostics import channel_excess, excesses, outlier_consistency, saturations
from qonnx.errors import DataError
from qonnx.numerics import Dtype
from qonnx.ranges import Range
from qonnx.sketch import sketch
from qonnx.statistics import Statistics, TensorStatistics
from qonnx.tables import result_tables
from tests.graphs import model_of


def tensor(x: Any, distribution: bool = True) -> TensorStatistics:
    x = np.asarray(x, np.float32)
    low, high = float(x.min(initial=np.inf)), float(x.max(initial=-np.inf))
    return TensorStatistics(
        count=x.size,
        minimum=low,
        maximum=high,
        finite=bool(np.isfinite(x).all()),
        sum_squares=float(np.square(x).sum()),
        batch_minima=np.array([low], np.float32),
        batch_maxima=np.array([high], np.float32),
        sketch=sketch(x) if distribution else None,
    )


def statistics(samples: int = 100, **arrays: Any) -> Statistics:
    return Statistics({name: tensor(x) for name, x in arrays.items()}, batches=1, samples=samples)


def normal(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 4), st.floats(0.1, 4))
def test_saturation_is_the_share_of_the_raw_values_beyond_the_range(seed: int, low: float, high: float) -> None:
    x = normal(4000, seed)
    (found,) = saturations(statistics(x=x), {"x": Range(-low, high, "")})
    near = np.mean([abs(abs(x) - end) < end * 2**-11 for end in (low, high)], axis=1).sum()
    assert found.below == pytest.approx(np.mean(x < -low), abs=near + 1e-12)
    assert found.above == pytest.approx(np.mean(x > high), abs=near + 1e-12)
    assert found.share == found.below + found.above


def test_nothing_saturates_at_the_extremes() -> None:
    x = normal(1000)
    (found,) = saturations(statistics(x=x), {"x": Range(float(x.min()), float(x.max()), "minmax")})
    assert found.share == 0


def test_saturations_are_sorted_and_leave_out_what_cannot_be_told() -> None:
    measured = statistics(few=[1.0, 2.0, 3.0, 4.0], many=[3.0, 3.0, 3.0, 4.0], nan=[np.nan], empty=[])
    extremes = Statistics({**measured.tensors, "extremes": tensor([9.0], distribution=False)})
    ranges = dict.fromkeys([*extremes.tensors, "unknown"], Range(-2.5, 2.5, ""))
    assert [(found.value, found.share) for found in saturations(extremes, ranges)] == [("many", 1.0), ("few", 0.5)]


def test_excesses() -> None:
    before = statistics(same=[1], little=[1, -1], more=[1], much=[1, -2], zero=[0], nan=[1], gone=[1])
    after = {"same": 1, "little": 1.19, "more": 1.3, "much": 4, "zero": 1, "nan": 1, "gone": math.nan, "new": 9}
    found = [(entry.value, entry.ratio) for entry in excesses(before, after)]
    assert found == [("zero", math.inf), ("much", 2.0), ("more", pytest.approx(1.3))]
    assert [entry.value for entry in excesses(before, after, factor=1.5)] == ["zero", "much"]


def jaccard(sets: list[set[int]]) -> float:
    pairs = [(a, b) for a, b in itertools.combinations(sets, 2) if a | b]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs) if pairs else math.nan


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 250), st.sampled_from([None, 2.0, 6.0]))
def test_consistency_agrees_with_sets(seed: int, samples: int, channels: int, threshold: float | None) -> None:
    x = np.random.default_rng(seed).lognormal(0, 2, (samples, channels)).astype(np.float32)
    found = outlier_consistency(x, threshold)
    sets = [{j for j in range(channels) if row[j] > (threshold or 20 * np.median(row))} for row in x]
    top = [set(np.argsort(row)[-max(1, round(channels / 100)) :].tolist()) for row in x]
    assert found.jaccard == pytest.approx(jaccard(sets), nan_ok=True)
    assert found.top_jaccard == pytest.approx(jaccard(top))
    assert found.outliers == pytest.approx(sum(map(len, sets)) / samples)
    assert list(found.constant) == [j for j in range(channels) if sum(j in s for s in sets) >= 0.9 * samples]


def test_outliers_that_wander() -> None:
    x = np.ones((8, 64), np.float32)
    x[np.arange(8), np.arange(8)] = 100
    found = outlier_consistency(x)
    assert (found.jaccard, found.constant, found.outliers, found.top_jaccard) == (0.0, (), 1.0, 0.0)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0])
def test_channels_of_zeros_make_no_outliers_of_the_others(share: float) -> None:
    x = np.ones((8, 64), np.float32)
    x[np.random.default_rng(0).random(x.shape) < share] = 0
    assert outlier_consistency(x).outliers == 0
    x[:, 5] = 60
    x[:, :4] = 1
    assert outlier_consistency(x).constant == (5,)


def test_many_samples_are_not_all_compared_with_each_other() -> None:
    """Matrices of one token a row have as many samples as tokens: all pairs of these were gigabytes, and minutes."""
    x = np.ones((5000, 64), np.float32)
    x[:1000, 3] = 100
    tracemalloc.start()
    found = outlier_consistency(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6  # all pairs are 100 MB, once
    assert found.outliers == pytest.approx(0.2)
    assert found.jaccard == pytest.approx(0.04 / 0.36, rel=0.02)  # a pair has it in both, and in one at least


def test_no_outliers() -> None:
    assert math.isnan(outlier_consistency(np.ones((3, 8))).jaccard)


@pytest.mark.parametrize("absmax", [[1.0], [[1.0, 2.0]], [[], []], [[1.0], [-1.0]], [[1.0], [np.nan]], [[np.inf], [1]]])
def test_no_channel_maxima(absmax: list[Any]) -> None:
    with pytest.raises(DataError, match="channel maxima"):
        outlier_consistency(absmax)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 100))
def test_channel_excess_is_one_of_the_ratios_and_above_95_percent_of_them(seed: int, channels: int) -> None:
    before, after = np.random.default_rng(seed).uniform(0.5, 2, (2, channels))
    ratios = sorted(after / before)
    assert channel_excess(before, after) == pytest.approx(ratios[math.ceil(0.95 * (channels - 1) - 1e-9)])


def test_channel_excess_of_zeros() -> None:
    assert channel_excess([0.0, 0.0], [0.0, 0.0]) == 1
    assert channel_excess([0.0, 1.0], [1.0, 1.0]) == math.inf
    with pytest.raises(DataError, match="shapes"):
        channel_excess([1.0], [1.0, 2.0])


def warned(calibrator: Calibrator, samples: int = 100, **arrays: Any) -> tuple[str, ...]:
    measured = statistics(samples, **arrays)
    found = diagnostics.warnings(list(arrays), measured, calibrator, Dtype.INT8, symmetric=True)
    assert all(len(line.splitlines()) == 1 for line in found)
    return found


@pytest.mark.parametrize("calibrator", [MinMax(), Percentile(99.9), Entropy(), MSE()])
def test_enough_data(calibrator: Calibrator) -> None:
    with_outliers = np.append(normal(200_000), np.full(50, 30.0))
    assert warned(calibrator, x=with_outliers, y=-with_outliers) == ()


def test_few_samples() -> None:
    assert warned(MinMax(), samples=31, x=normal(10)) == ("calibrated on 31 samples: too few to tell; give 32 or more",)
    assert warned(MinMax(), samples=32, x=normal(10)) == ()


@pytest.mark.parametrize("calibrator", [Percentile(99.99), Average()])
def test_a_calibrator_that_is_minmax(calibrator: Calibrator) -> None:
    (line,) = warned(calibrator, x=normal(1000), y=normal(500))
    assert "gives the range of minmax for every tensor" in line


def test_a_threshold_that_chance_decided() -> None:
    (line,) = warned(Percentile(99.9), x=normal(5000), y=normal(200_000))
    assert "1 of 2 tensors, 'x'" in line
    (line,) = warned(Entropy(), x=np.append(normal(100_000), 30.0), y=np.append(normal(100_000), np.full(50, 30.0)))
    assert "1 of 2 tensors, 'x'" in line


def test_many_equal_largest_elements_are_no_chance() -> None:
    clipped = np.clip(normal(200_000), -1, 1)
    assert warned(Percentile(99.9), x=clipped, y=normal(200_000)) == ()


def test_nothing_to_judge() -> None:
    assert warned(Entropy()) == ()
    assert warned(Entropy(), x=[np.nan], y=[]) == ()


def test_what_is_said_about_a_quantized_model(tmp_path: Path) -> None:
    """Channel 3 is an outlier in every sample; held-back batches are twice as large; percentile 60 cuts 40 % off."""
    text = (
        "g (float[n,64] x, float[64,64] w, float[64,64] w2) => (float[n,64] y) "
        "{ [fc1] a = MatMul(x, w) r = Relu(a) [fc2] y = MatMul(r, w2) }"
    )
    model = model_of(text, weights="w w2", scale=0.2)
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(16)]
    for number, batch in enumerate(data):
        batch["x"][:, 3] = 80
        batch["x"] *= 1 + (number % 4 == 1)  # those that are held back
    line = "activations.calibrator={kind: percentile, percentile: 60}"
    result = qonnx.quantize(model, data, tmp_path / "q.onnx", settings=[line, "minimum_sqnr_db=-99", "goal_sqnr_db=0"])
    found = result.diagnostics
    assert {excess.value for excess in found.excesses} == {"x", "r"}
    assert found.excesses[0].ratio == pytest.approx(2, rel=0.3)
    assert {s.value: s.share for s in found.saturations}["x"] == pytest.approx(0.4, abs=0.02)
    (outliers,) = (o for o in found.outliers if o.value == "x")
    assert outliers.consistency.constant == (3,)
    assert not found.warnings
    lines = "\n".join(map(str, result_tables(result)))
    assert re.search(r"elements beyond the range +(39|40|41)% +[xr]\n", lines)
    assert re.search(r"outliers keep their channels.*\n? +1 channel +x\n", lines)
    assert re.search(r"larger on held-back data +2\.\d\d x", lines)
    few = qonnx.quantize(model, data[:2], tmp_path / "q.onnx", settings=["goal_sqnr_db=0"])
    assert few.diagnostics.warnings == ("calibrated on 16 samples: too few to tell; give 32 or more",)
    assert "note: calibrated on 16 samples" in "\n".join(map(str, result_tables(few)))


@pytest.mark.parametrize("kind", ["entropy", "mse", "percentile"])
def test_small_probabilities_have_no_distribution_to_judge(kind: str, tmp_path: Path) -> None:
    """Over 64 keys they are about 1/64 each: their range is known without one."""
    text = "g (float[n,64] x, float[64,64] w) => (float[n,64] y) { p = Softmax(x) y = MatMul(p, w) }"
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((16, 64), dtype=np.float32) / 4} for _ in range(8)]
    settings = [f"activations.calibrator.kind={kind}"]
    result = qonnx.quantize(model_of(text, weights="w"), data, tmp_path / "q.onnx", settings=settings)
    (tensor,) = result.plan.activations
    assert tensor.source == "softmax, 2 times the largest"
    assert [s.value for s in result.diagnostics.saturations] in ([], ["p"])
