import msgspec
import numpy as np
import pytest

from qonnx.calibrators import Average, Calibrator, MinMax
from qonnx.errors import DataError
from qonnx.numerics import Dtype
from qonnx.statistics import TensorStatistics, from_batch


def of(*batches: list[float]) -> TensorStatistics:
    parts = []
    for batch in batches:
        x = np.array(batch, np.float32)
        parts.append(
            from_batch(x.size, float(x.min(initial=np.inf)), float(x.max(initial=-np.inf)), float(np.square(x).sum()))
        )
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged


def test_minmax_is_the_extremes() -> None:
    statistics = of([1, -2], [3, 0])
    assert MinMax().range(statistics, Dtype.INT8, symmetric=True) == (-3, 3)
    assert MinMax().range(statistics, Dtype.UINT8, symmetric=False) == (-2, 3)


def test_average_is_the_mean_of_the_batches() -> None:
    statistics = of([1, -2], [], [3, 0])
    assert Average().range(statistics, Dtype.INT8, symmetric=True) == (-2, 2)
    assert Average().range(statistics, Dtype.UINT8, symmetric=False) == (-1, 2)


def test_average_does_not_depend_on_the_order_of_batches() -> None:
    batches = [[float(x), 1.0] for x in np.random.default_rng(0).normal(size=50) * 1e-3]
    assert Average().range(of(*batches), Dtype.INT8, symmetric=False) == Average().range(
        of(*reversed(batches)), Dtype.INT8, symmetric=False
    )


@pytest.mark.parametrize("calibrator", [MinMax(), Average()])
class TestEveryCalibrator:
    def test_zero_is_in_the_range(self, calibrator: Calibrator) -> None:
        assert calibrator.range(of([2, 3]), Dtype.UINT8, symmetric=False) == (0, 3)
        assert calibrator.range(of([-2, -3]), Dtype.UINT8, symmetric=False) == (-3, 0)
        assert calibrator.range(of([2, 3]), Dtype.UINT8, symmetric=True) == (0, 3)

    def test_zeros_have_an_empty_range(self, calibrator: Calibrator) -> None:
        assert calibrator.range(of([0, 0]), Dtype.INT8, symmetric=True) == (0, 0)

    def test_what_has_no_range_is_refused(self, calibrator: Calibrator) -> None:
        with pytest.raises(DataError, match="no element was observed"):
            calibrator.range(of([], []), Dtype.INT8, symmetric=True)
        with pytest.raises(DataError, match="NaN or infinite"):
            calibrator.range(of([1, np.nan]), Dtype.INT8, symmetric=True)

    def test_recipes_carry_it(self, calibrator: Calibrator) -> None:
        assert msgspec.json.decode(msgspec.json.encode(calibrator), type=Calibrator) == calibrator


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.convert({"kind": "average", "bins": 3}, Calibrator)
