"""An average over a whole feature map, however it is written."""

import pytest

from qonnx.passes.pool_globally import PoolGlobally
from tests.graphs import model_of
from tests.helpers import apply, leave_alone

GLOBAL = {
    "as large as the map": "float[n,4,5,3] x|kernel_shape = [5, 3]",
    "larger, and cut off": "float[n,4,5,3] x|kernel_shape = [64, 64], strides = [64, 64], ceil_mode = 1",
    "padding counts, but there is none": (
        "float[n,4,2,2] x|kernel_shape = [8, 8], strides = [8, 8], ceil_mode = 1, count_include_pad = 1"
    ),
    "one axis": "float[n,4,7] x|kernel_shape = [7], pads = [0, 0], dilations = [1]",
}
OTHERS = {
    "a smaller window": "float[n,4,5,3] x|kernel_shape = [5, 2]",
    "a size that is not known": "float[n,4,h,3] x|kernel_shape = [5, 3]",
    "padding": "float[n,4,5,3] x|kernel_shape = [5, 3], pads = [1, 0, 0, 0]",
    "auto_pad": 'float[n,4,5,3] x|kernel_shape = [5, 3], auto_pad = "SAME_UPPER"',
    "dilation": "float[n,4,5,3] x|kernel_shape = [5, 3], dilations = [1, 2]",
    "not cut off": "float[n,4,5,3] x|kernel_shape = [6, 3]",
}


def pool(case: str, op: str = "AveragePool") -> str:
    value, attributes = case.split("|")
    sizes = ",".join("?" * value.partition("]")[0].count(",")) + ",?"
    return f"g ({value}) => (float[{sizes}] y) {{ y = {op} <{attributes}> (x) }}"


@pytest.mark.parametrize("case", GLOBAL.values(), ids=GLOBAL.keys())
def test_windows_that_cover_everything(case: str) -> None:
    assert apply(PoolGlobally(), model_of(pool(case))) == ["GlobalAveragePool"]


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_leaves_alone(case: str) -> None:
    leave_alone(PoolGlobally(), model_of(pool(case)))


def test_the_largest_is_no_average() -> None:
    leave_alone(PoolGlobally(), model_of(pool(GLOBAL["as large as the map"], "MaxPool")))
