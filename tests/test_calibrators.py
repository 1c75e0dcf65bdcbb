"""Every calibrator against the definition it claims, computed here from all raw values in the plainest way."""

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.calibrators import EXTREMES, MSE, Average, Calibrator, Entropy, MinMax, MovingAverage, Percentile
from qonnx.calibrators.entropy import divergences, histogram, threshold_bin
from qonnx.errors import DataError, RecipeError
from qonnx.numerics import Dtype, PerTensor, fake_quantize, scale_and_zero_point
from qonnx.sketch import sketch
from qonnx.statistics import TensorStatistics, from_batch

Floats = npt.NDArray[np.float32]

ALL = [MinMax(), Average(), MovingAverage(), Percentile(), Entropy(), MSE()]
DISTRIBUTIONS = [calibrator for calibrator in ALL if not isinstance(calibrator, EXTREMES)]


def of(*batches: npt.ArrayLike) -> TensorStatistics:
    merged: TensorStatistics | None = None
    for batch in batches:
        x = np.asarray(batch, np.float32)
        with np.errstate(over="ignore"):
            squares = float(np.square(x).sum())
        part = from_batch(x.size, float(x.min(initial=np.inf)), float(x.max(initial=-np.inf)), squares)
        part = dataclasses.replace(part, sketch=sketch(x))
        merged = part if merged is None else merged.merge(part)
    assert merged is not None
    return merged


def normal(count: int = 200_000) -> Floats:
    return np.random.default_rng(0).normal(size=count).astype(np.float32)


def heavy() -> Floats:
    return np.random.default_rng(1).standard_t(3, size=200_000).astype(np.float32)


ADVERSARIAL = {
    "normal": normal(),
    "heavy tails": heavy(),
    "one-sided": np.maximum(heavy(), 0),
    "negative": -np.abs(heavy()),
    "constant": np.full(1000, -3.7, np.float32),
    "zeros": np.zeros(1000, np.float32),
    "two values": np.repeat(np.array([0.1, 6], np.float32), 500),
    "one spike": np.append(normal(), np.float32(1e30)),
    "denormals": normal() * np.float32(1e-39),
    "twelve orders of magnitude": (10.0 ** np.random.default_rng(2).uniform(-6, 6, 200_000)).astype(np.float32),
    "largest floats": normal() * np.float32(7e37),
    "clipped": np.clip(normal() * 4, 0, 6),
    "few": np.array([0.3, -2, 5], np.float32),
}


@pytest.fixture(params=ADVERSARIAL, ids=str)
def values(request: pytest.FixtureRequest) -> Floats:
    return ADVERSARIAL[request.param]


class TestEveryCalibrator:
    @pytest.mark.parametrize("calibrator", ALL, ids=repr)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_the_range_holds_zero_and_nothing_beyond_what_was_seen(
        self, calibrator: Calibrator, symmetric: bool, values: Floats
    ) -> None:
        low, high = calibrator.range(of(values), Dtype.INT8, symmetric)
        assert low <= 0 <= high
        if symmetric:
            assert low == -high
            assert high <= np.abs(values).max()
        else:
            assert low >= min(values.min(), 0)
            assert high <= max(values.max(), 0)
        assert type(low) is type(high) is float

    @pytest.mark.parametrize("calibrator", ALL, ids=repr)
    def test_unsigned_grids_start_at_zero_for_values_that_do(self, calibrator: Calibrator) -> None:
        for symmetric in (True, False):
            assert calibrator.range(of(np.abs(normal())), Dtype.UINT8, symmetric)[0] == 0

    @pytest.mark.parametrize("calibrator", ALL, ids=repr)
    def test_zeros_have_an_empty_range(self, calibrator: Calibrator) -> None:
        assert calibrator.range(of([0, 0], [0]), Dtype.INT8, symmetric=True) == (0, 0)

    @pytest.mark.parametrize("calibrator", ALL, ids=repr)
    def test_what_has_no_range_is_refused(self, calibrator: Calibrator) -> None:
        with pytest.raises(DataError, match="no element was observed"):
            calibrator.range(of([], []), Dtype.INT8, symmetric=True)
        for bad in (np.nan, np.inf, -np.inf):
            with pytest.raises(DataError, match="NaN or infinite"):
                calibrator.range(of([1, bad], [2]), Dtype.INT8, symmetric=True)

    @pytest.mark.parametrize("calibrator", DISTRIBUTIONS, ids=repr)
    def test_a_distribution_is_asked_for(self, calibrator: Calibrator) -> None:
        with pytest.raises(DataError, match="only the extremes were measured"):
            calibrator.range(dataclasses.replace(of([1, 2]), sketch=None), Dtype.INT8, symmetric=True)

    @pytest.mark.parametrize("calibrator", ALL, ids=repr)
    def test_recipes_carry_it(self, calibrator: Calibrator) -> None:
        assert msgspec.json.decode(msgspec.json.encode(calibrator), type=Calibrator) == calibrator

    @pytest.mark.parametrize("calibrator", [MinMax(), *DISTRIBUTIONS], ids=repr)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_batches_and_their_order_do_not_matter(self, calibrator: Calibrator, symmetric: bool) -> None:
        x = heavy()[:20_000]
        whole = calibrator.range(of(x), Dtype.INT8, symmetric)
        parts = np.array_split(np.random.default_rng(3).permutation(x), 7)
        assert calibrator.range(of(*parts), Dtype.INT8, symmetric) == whole


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "average", "bins": 3},
        {"kind": "percentile", "percentile": 50},
        {"kind": "percentile", "percentile": 100.1},
        {"kind": "percentile", "percentile": "99"},
        {"kind": "ema", "constant": 0},
        {"kind": "mse", "exponent": 0},
        {"kind": "unheard of"},
    ],
)
def test_impossible_parameters_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises((msgspec.ValidationError, RecipeError)) as caught:
        msgspec.convert(document, Calibrator)
    assert "\n" not in str(caught.value)


# Extremes ------------------------------------------------------------------------------------------------------------


def test_minmax_is_the_extremes() -> None:
    statistics = of([1, -2], [3, 0])
    assert MinMax().range(statistics, Dtype.INT8, symmetric=True) == (-3, 3)
    assert MinMax().range(statistics, Dtype.UINT8, symmetric=False) == (-2, 3)


@pytest.mark.parametrize("calibrator", [MinMax(), Average(), MovingAverage()], ids=repr)
def test_of_one_batch_all_three_are_its_extremes(calibrator: Calibrator, values: Floats) -> None:
    expected = (min(float(values.min()), 0.0), max(float(values.max()), 0.0))
    assert calibrator.range(of(values), Dtype.INT8, symmetric=False) == expected


def test_average_is_the_mean_of_the_batches() -> None:
    statistics = of([1, -2], [], [3, 0])
    assert Average().range(statistics, Dtype.INT8, symmetric=True) == (-2, 2)
    assert Average().range(statistics, Dtype.UINT8, symmetric=False) == (-1, 2)


def test_average_does_not_depend_on_the_order_of_batches() -> None:
    batches = [[float(x), 1.0] for x in np.random.default_rng(0).normal(size=50) * 1e-3]
    assert Average().range(of(*batches), Dtype.INT8, symmetric=False) == Average().range(
        of(*reversed(batches)), Dtype.INT8, symmetric=False
    )


def test_moving_average_is_the_recursion() -> None:
    batches = [normal()[start : start + 50] for start in range(0, 500, 50)]
    low, high = batches[0].min(), batches[0].max()
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * batch.min(), 0.9 * high + 0.1 * batch.max()
    got = MovingAverage(constant=0.1).range(of(*batches), Dtype.UINT8, symmetric=False)
    np.testing.assert_allclose(got, (low, high), rtol=1e-6)
    assert MovingAverage(constant=1).range(of([1, -2], [3, 0], []), Dtype.UINT8, symmetric=False) == (0, 3)


# Percentile ----------------------------------------------------------------------------------------------------------


def rank(x: Floats, share: float) -> float:
    """The element of rank ceil(share * count)."""
    return float(np.sort(x)[math.ceil(round(share * x.size, 6)) - 1])


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 99.99, 99.999, 100])
def test_percentile_is_the_order_statistic(percentile: float, values: Floats) -> None:
    got = Percentile(percentile).range(of(values), Dtype.INT8, symmetric=True)[1]
    expected = rank(np.abs(values), percentile / 100)
    if np.abs(values).max() >= 2.0**-126:  # below, every scale is 1 and every range the same
        assert expected <= got <= expected * (1 + 2**-11)


def test_percentile_cuts_both_ends_alike() -> None:
    x = heavy() + 1
    low, high = Percentile(99).range(of(x), Dtype.UINT8, symmetric=False)
    np.testing.assert_allclose((low, high), (-rank(-x, 0.995), rank(x, 0.995)), rtol=2**-11)


def test_a_share_that_binary_cannot_hold_is_not_one_rank_off() -> None:
    x = np.arange(1, 10_001, dtype=np.float32)
    got = Percentile(99.99).range(of(x), Dtype.INT8, symmetric=True)[1]
    assert 9999 <= got < 10_000 * (1 + 2**-11)
    assert rank(x, 0.9999) == 9999


# Entropy -------------------------------------------------------------------------------------------------------------


def reference_divergence(counts: npt.NDArray[np.float64], i: int, levels: int) -> float:
    """The definition, bin by bin."""
    kept = counts[:i].copy()
    p = kept.copy()
    p[-1] += counts[i:].sum()
    q = np.zeros(i)
    group = [sum(1 for edge in range(1, levels + 1) if j >= edge * i / levels) for j in range(i)]
    for level in range(levels):
        bins = [j for j in range(i) if group[j] == level and kept[j] > 0]
        for j in bins:
            q[j] = sum(kept[b] for b in bins) / len(bins)
    p, q = p / p.sum(), q / q.sum()
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * math.log(a / b) if b > 0 else math.inf
    return total


def fixed_histogram(bins: int) -> npt.NDArray[np.float64]:
    """A Laplace body, a few outliers and empty bins, all integers and always the same."""
    j = np.arange(bins)
    counts: npt.NDArray[np.float64] = np.floor(5000 * np.exp(-j / (bins / 12)))
    counts[j % 7 == 3] = 0
    counts[-1] = 2
    counts[bins // 2] += 5
    return counts


@pytest.mark.parametrize(("bins", "levels"), [(300, 32), (150, 128), (257, 256)])
def test_entropy_agrees_with_the_definition_bin_for_bin(bins: int, levels: int) -> None:
    counts = fixed_histogram(bins)
    changed = counts.copy()
    changed[0] = changed[1]
    expected = [reference_divergence(changed, i, levels) for i in range(levels, bins + 1)]
    np.testing.assert_allclose(divergences(changed, levels), expected, rtol=1e-9, atol=1e-12)
    least = [i for i, d in enumerate(expected, levels) if d <= min(expected) + 1e-12]
    assert threshold_bin(counts, levels) == least[-1]


def test_entropy_agrees_with_the_definition_at_its_canonical_size() -> None:
    """2048 bins and 128 levels: the best candidate, its neighbours, and every 97th of the others."""
    counts = fixed_histogram(2048)
    best = threshold_bin(counts, 128)
    counts[0] = counts[1]
    got = divergences(counts, 128)
    candidates = {*range(128, 2049, 97), *range(max(best - 2, 128), min(best + 3, 2049))}
    expected = {i: reference_divergence(counts, i, 128) for i in candidates}
    np.testing.assert_allclose([got[i - 128] for i in expected], list(expected.values()), rtol=1e-9, atol=1e-12)
    assert expected[best] <= min(expected.values()) + 1e-12


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=9, max_size=40), st.integers(2, 8))
def test_entropy_agrees_with_the_definition_on_any_histogram(numbers: list[int], levels: int) -> None:
    counts = np.array(numbers, np.float64)
    counts[-1] += 1
    expected = [reference_divergence(counts, i, levels) for i in range(levels, counts.size + 1) if counts[:i].sum()]
    got = divergences(counts, levels)[-len(expected) :]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_the_histogram_holds_what_raw_values_give(values: Floats) -> None:
    magnitudes = np.abs(values).astype(np.float64)
    if magnitudes.max() < 2.0**-126:
        return  # such values are below the resolution of the sketch; no calibrator reads their histogram
    counts, width = histogram(sketch(values), float(magnitudes.max()))
    np.testing.assert_array_equal(counts, np.bincount(np.floor(magnitudes / width).astype(np.int64)))
    assert 1536 <= counts.size <= 3073


def test_entropy_thresholds_are_edges_of_bins() -> None:
    statistics = of(heavy())
    counts, width = histogram(sketch(heavy()), statistics.absolute_maximum)
    for dtype, levels in ((Dtype.INT8, 128), (Dtype.INT4, 8), (Dtype.UINT8, 128)):
        got = Entropy().range(statistics, dtype, symmetric=dtype.signed)
        assert got[1] == min(width * threshold_bin(counts, levels), statistics.maximum if not dtype.signed else np.inf)


def test_entropy_uses_all_levels_for_values_of_one_sign() -> None:
    x = np.abs(heavy())
    counts, width = histogram(sketch(x), float(x.max()))
    assert threshold_bin(counts, 256) != threshold_bin(counts, 128)
    for symmetric in (True, False):
        assert Entropy().range(of(x), Dtype.UINT8, symmetric) == (0, width * threshold_bin(counts, 256))
    assert Entropy().range(of(-x), Dtype.INT8, False) == (-width * threshold_bin(counts, 256), 0)
    assert Entropy().range(of(x), Dtype.INT8, True)[1] == width * threshold_bin(counts, 128)


def test_entropy_clips_outliers() -> None:
    x = np.append(normal(), np.full(12, 20, np.float32))
    assert 2.5 < Entropy().range(of(x), Dtype.INT8, symmetric=True)[1] < 6


def test_fewer_bins_than_levels_are_kept_whole() -> None:
    assert threshold_bin(np.ones(100), 128) == 100
    assert threshold_bin(np.array([5.0] + [0.0] * 299), 128) == 300  # all in the first bin, which is ignored
    x = normal()
    assert Entropy().range(of(x), Dtype.INT16, symmetric=True)[1] == np.abs(x).max()


def test_entropy_refuses_float_grids() -> None:
    with pytest.raises(RecipeError, match="grids of integers only, not float8e4m3fn: choose mse"):
        Entropy().range(of([1, 2]), Dtype.FLOAT8E4M3FN, symmetric=True)


# Mean square error ---------------------------------------------------------------------------------------------------


def raw_error(x: Floats, low: float, high: float, dtype: Dtype, symmetric: bool, exponent: float) -> float:
    """The sum over all raw values, relative to the largest."""
    scale, zero_point = scale_and_zero_point(low, high, dtype, symmetric=symmetric)
    error = x.astype(np.float64) - fake_quantize(x, scale, zero_point, dtype, PerTensor()).astype(np.float64)
    return float((np.abs(error / np.abs(x).max()) ** exponent).sum())


@pytest.mark.parametrize(
    "dtype", [Dtype.INT8, Dtype.INT4, Dtype.UINT8, Dtype.FLOAT8E4M3FN, Dtype.FLOAT8E5M2, Dtype.FLOAT4E2M1]
)
@pytest.mark.parametrize("name", sorted(ADVERSARIAL.keys() - {"zeros", "denormals"}))  # their range is never used
@pytest.mark.parametrize("exponent", [2.0, 2.4])
def test_no_other_threshold_has_less_error(dtype: Dtype, name: str, exponent: float) -> None:
    x = ADVERSARIAL[name][-20_000:]
    reach = MSE(exponent).range(of(x), dtype, symmetric=True)[1]
    low = 0.0 if not dtype.signed and x.min() >= 0 else -1.0

    def error(reach: float) -> float:
        return raw_error(x, low * reach, reach, dtype, True, exponent)

    maximum = np.abs(x).max()
    candidates = np.concatenate([maximum * np.linspace(0.02, 1, 100), reach * np.linspace(0.97, 1.03, 25)])
    candidates = candidates[candidates <= maximum]
    assert error(reach) <= 1.01 * min(error(float(candidate)) for candidate in candidates) + 1e-12


@pytest.mark.parametrize("dtype", [Dtype.INT8, Dtype.INT4])
def test_the_threshold_is_that_of_the_raw_values(dtype: Dtype) -> None:
    x = normal(50_000)
    reach = MSE().range(of(x), dtype, symmetric=True)[1]
    candidates = np.linspace(0.95, 1.05, 201) * reach
    best = candidates[int(np.argmin([raw_error(x, -c, c, dtype, True, 2.0) for c in candidates]))]
    assert abs(reach / best - 1) < 0.005


def test_the_known_optimum_of_a_normal_distribution() -> None:
    """The uniform quantizer with 16 levels has its least error at a step of 0.335 (Max, 1960)."""
    low, high = MSE().range(of(normal()), Dtype.UINT4, symmetric=False)
    assert abs((high - low) / 15 - 0.335) < 0.01


def test_both_ends_are_searched() -> None:
    x = np.append(normal() + 2, np.array([30, -30], np.float32))
    low, high = MSE().range(of(x), Dtype.INT4, symmetric=False)
    assert -4 < low < -0.2
    assert 3 < high < 8


def test_sixteen_bits_lose_nothing() -> None:
    x = heavy()
    assert MSE().range(of(x), Dtype.INT16, symmetric=True)[1] == np.abs(x).max()
