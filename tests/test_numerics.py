import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qonnx.errors import DataError, RecipeError
from qonnx.numerics import (
    Blocked,
    Dtype,
    Granularity,
    PerAxis,
    PerTensor,
    absmax,
    dequantize,
    fake_quantize,
    minmax,
    quantize,
    scale_and_zero_point,
    scale_shape,
)

Array = npt.NDArray[Any]

INTEGERS = [d for d in Dtype if d.is_integer]
FLOATS = [d for d in Dtype if not d.is_integer]
WITH_KERNEL = [d for d in Dtype if d is not Dtype.FLOAT4E2M1]  # in ONNX Runtime 1.31 for CPU
SHAPE = (3, 7, 5)
GRANULARITIES = [
    PerTensor(),
    PerAxis(0),
    PerAxis(1),
    PerAxis(-1),
    Blocked(0, 3),
    Blocked(1, 7),
    Blocked(1, 3),  # the last block has one element
    Blocked(-1, 2),
    Blocked(2, 9),  # one block, and not a full one
]
LARGEST = float(np.finfo(np.float32).max)
QUOTIENTS = [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 126.5, 127.5, -128.5, 1e-37, 1e5, -1e5, 1e9, -1e9, 2e9, -2e9]


def same_bits(a: Array, b: Array) -> bool:
    """Equal to the bit, except that one NaN is as good as another."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    nan = np.isnan(a.astype(np.float32))
    return bool((nan == np.isnan(b.astype(np.float32))).all()) and a[~nan].tobytes() == b[~nan].tobytes()


# Scalar references: Python numbers, no numpy arithmetic, nothing shared with the implementation.


def integer_code(x: float, scale: float, zero_point: int, bits: int, signed: bool) -> int:
    quotient = float(np.float32(x / scale))  # a double quotient rounded to float32 is the float32 quotient
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    rounded = round(Fraction(quotient))  # halves to even
    return max(low, min(high, rounded + zero_point))


def float_values(exponent_bits: int, mantissa_bits: int, count: int) -> list[Fraction]:
    """The `count` smallest non-negative values of a small float format, from the formula; the index is the code."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(count):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = Fraction(mantissa, 2**mantissa_bits) + (exponent > 0)
        values.append(fraction * Fraction(2) ** (max(exponent, 1) - bias))
    return values


FLOAT_VALUES = {
    Dtype.FLOAT8E4M3FN: float_values(4, 3, 127),  # S.1111.111 is NaN
    Dtype.FLOAT8E5M2: float_values(5, 2, 124),  # S.11111.* is infinity and NaN
    Dtype.FLOAT4E2M1: float_values(2, 1, 8),
}


def float_code(x: float, dtype: Dtype) -> int:
    values = FLOAT_VALUES[dtype]
    nearest = min(range(len(values)), key=lambda code: (abs(abs(Fraction(x)) - values[code]), code % 2))
    return nearest | (int(np.signbit(x)) << (dtype.bits - 1))


# The operators themselves.


def qdq_model(dtype: Dtype, granularity: Granularity, shape: tuple[int, ...], type_: str = "float") -> onnx.ModelProto:
    """Codes (as float, which ONNX Runtime can hand over for 4 bits too) and dequantized values of `x`."""
    attributes = []
    if not isinstance(granularity, PerTensor):
        attributes.append(f"axis = {granularity.axis}")
    if isinstance(granularity, Blocked):
        attributes.append(f"block_size = {granularity.block_size}")
    attribute_text = f"<{', '.join(attributes)}>" if attributes else ""
    dims = ",".join(map(str, shape))
    scale_dims = ",".join(map(str, scale_shape(shape, granularity)))
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 25]>
        qdq ({type_}[{dims}] x, {type_}[{scale_dims}] scale, float[{scale_dims}] zero) => (float[{dims}] codes, {type_}[{dims}] y) {{
            zero_point = Cast <to = {dtype.onnx.value}> (zero)
            q = QuantizeLinear {attribute_text} (x, scale, zero_point)
            codes = Cast <to = 1> (q)
            y = DequantizeLinear {attribute_text} (q, scale, zero_point)
        }}
    """)  # noqa: E501
    return ir.to_proto(model)


def run_ort(model: onnx.ModelProto, x: Array, scale: Array, zero_point: Array) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, {"x": x, "scale": scale, "zero": zero_point.astype(np.float32)})
    return outputs


def run_reference(model: onnx.ModelProto, x: Array, scale: Array, zero_point: Array) -> list[Array]:
    outputs = ReferenceEvaluator(model).run(None, {"x": x, "scale": scale, "zero": zero_point.astype(np.float32)})
    assert isinstance(outputs, list)
    return outputs


def sample(shape: tuple[int, ...], granularity: Granularity, dtype: Dtype, seed: int) -> tuple[Array, Array, Array]:
    """Values in and beyond the grid, with halves and extremes among them; their scales, and any zero points."""
    rng = np.random.default_rng(seed)
    parameters = scale_shape(shape, granularity)
    exponent = rng.uniform(-12, 3, parameters)
    scale = np.asarray(np.exp2(np.where(rng.random(parameters) < 0.5, np.rint(exponent), exponent)), np.float32)
    low, high = (int(dtype.minimum), int(dtype.maximum)) if dtype.is_integer else (0, 0)
    zero_point = np.asarray(rng.integers(low, high, parameters, endpoint=True)).astype(dtype.numpy)
    quotients = rng.uniform(-1.5, 1.5, shape) * (dtype.maximum - dtype.minimum)
    quotients = np.where(rng.random(shape) < 0.3, np.rint(quotients) + 0.5, quotients)
    quotients.flat[: len(QUOTIENTS)] = QUOTIENTS
    per_element = dequantize(np.ones(shape, np.int8), scale, None, granularity)
    return (quotients * per_element).astype(np.float32), scale, zero_point


# Types and granularities.


@pytest.mark.parametrize("dtype", Dtype)
def test_dtype_properties_agree_with_numpy(dtype: Dtype) -> None:
    info: Any = (ml_dtypes.iinfo if dtype.is_integer else ml_dtypes.finfo)(dtype.numpy)
    assert (dtype.minimum, dtype.maximum, dtype.bits) == (float(info.min), float(info.max), info.bits)
    assert dtype.signed == (info.min < 0)
    assert dtype.onnx.numpy() == dtype.numpy
    assert dtype.value == dtype.onnx.name.lower()


@pytest.mark.parametrize("dtype", Dtype)
def test_dtype_opset_is_the_first_that_lists_it(dtype: Dtype) -> None:
    def listed(opset: int) -> bool:
        schema = onnx.defs.get_schema("QuantizeLinear", opset)
        output = schema.outputs[0].type_str
        allowed = next(t.allowed_type_strs for t in schema.type_constraints if t.type_param_str == output)
        return f"tensor({dtype.value})" in allowed

    assert dtype.opset == next(opset for opset in range(10, 30) if listed(opset))


@pytest.mark.parametrize(("granularity", "attribute"), [(PerAxis(0), "axis"), (Blocked(0, 4), "block_size")])
def test_granularity_opset_is_the_first_that_has_the_attribute(granularity: Granularity, attribute: str) -> None:
    first = next(o for o in range(10, 30) if attribute in onnx.defs.get_schema("QuantizeLinear", o).attributes)
    assert granularity.opset == first


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_granularity_survives_json(granularity: Granularity) -> None:
    assert msgspec.json.decode(msgspec.json.encode(granularity), type=Granularity) == granularity


def test_unknown_granularity_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="block"):
        msgspec.json.decode(b'{"kind": "per_axis", "axis": 1, "block": 4}', type=Granularity)


# Exhaustive small cases.


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("scale", [1.0, 0.0371, 3e-38, 1e30])
def test_every_integer_code_round_trips_at_every_end_of_the_zero_point(dtype: Dtype, scale: float) -> None:
    codes = np.arange(dtype.minimum, dtype.maximum + 1).astype(dtype.numpy)
    for zero_point in {dtype.minimum, 0.0, dtype.maximum}:
        values = dequantize(codes, scale, zero_point, PerTensor())
        assert values.dtype == np.float32
        assert same_bits(quantize(values, scale, zero_point, dtype, PerTensor()), codes)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, 0.0371, 1e30])
def test_every_float_code_round_trips_and_has_the_value_of_its_formula(dtype: Dtype, scale: float) -> None:
    magnitudes = np.array([float(v) for v in FLOAT_VALUES[dtype]], np.float32)
    codes = np.arange(len(magnitudes), dtype=np.uint8)
    codes = np.concatenate([codes, codes | (1 << (dtype.bits - 1))]).view(dtype.numpy)
    values = dequantize(codes, scale, None, PerTensor())
    assert same_bits(values, np.concatenate([magnitudes, -magnitudes]) * np.float32(scale))
    assert same_bits(quantize(values, scale, None, dtype, PerTensor()), codes)


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d.bits <= 8])
def test_integer_halves_and_their_neighbours_against_the_scalar_reference(dtype: Dtype) -> None:
    half = np.arange(2 * dtype.minimum - 3, 2 * dtype.maximum + 4, dtype=np.float32) / 2
    x = np.concatenate([half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(-np.inf))])
    for scale, zero_point in ((1.0, 0), (0.25, 1), (0.3, int(dtype.maximum)), (7e-3, int(dtype.minimum))):
        scale = float(np.float32(scale))
        values = (x * np.float32(scale)).astype(np.float32)
        expected = [integer_code(float(v), scale, zero_point, dtype.bits, dtype.signed) for v in values]
        found = quantize(values, scale, zero_point, dtype, PerTensor())
        assert found.astype(np.int64).tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_halves_and_their_neighbours_against_the_scalar_reference(dtype: Dtype) -> None:
    values = np.array([float(v) for v in FLOAT_VALUES[dtype]], np.float32)
    half = np.concatenate([values, (values[1:] + values[:-1]) / 2, values[-1:] * np.float32(1.2), [np.float32(3e38)]])
    x = np.concatenate([half, np.nextafter(half, np.float32(np.inf)), np.nextafter(half, np.float32(0))])
    x = np.concatenate([x, -x])
    found = quantize(x, 1.0, None, dtype, PerTensor()).view(np.uint8)
    assert found.tolist() == [float_code(float(v), dtype) for v in x]


def test_zero_point_is_added_after_rounding() -> None:
    # Rounding x / scale + zero_point would take both to 2: halves go to the even side of the quotient.
    assert quantize([0.5, 1.5], 1.0, 1, Dtype.INT8, PerTensor()).tolist() == [1, 3]


def test_division_is_not_multiplication_by_the_inverse() -> None:
    scale = np.float32(0.3)
    x = (np.arange(-2000, 2000, dtype=np.float32) + np.float32(0.5)) * scale
    divided, multiplied = np.rint(x / scale), np.rint(x * (np.float32(1) / scale))
    assert (divided != multiplied).any()
    assert np.array_equal(quantize(x, scale, None, Dtype.INT16, PerTensor()).astype(np.float32), divided)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_take_nan_to_the_lowest_code_and_saturate_infinity(dtype: Dtype) -> None:
    low, high = int(dtype.minimum), int(dtype.maximum)
    for zero_point in (low, 0, high):
        codes = quantize([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38], 1e-3, zero_point, dtype, PerTensor())
        assert codes.astype(np.int64).tolist() == [low, low, high, low, high, low]


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_saturate_infinity_and_keep_the_sign_of_zero(dtype: Dtype) -> None:
    values = fake_quantize([np.inf, -np.inf, 3e38, -3e38, -0.0], 0.5, None, dtype, PerTensor())
    top = dtype.maximum / 2
    assert same_bits(values, np.array([top, -top, top, -top, -0.0], np.float32))
    # The float8 formats have a NaN. float4e2m1 has none, and its specification says 6.
    nan = fake_quantize([np.nan, -np.nan], 1.0, None, dtype, PerTensor())
    assert (nan == 6).all() if dtype is Dtype.FLOAT4E2M1 else np.isnan(nan).all()


# Bit-exactness against the operators.


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", WITH_KERNEL)
def test_bit_exact_with_onnxruntime(dtype: Dtype, granularity: Granularity) -> None:
    model = qdq_model(dtype, granularity, SHAPE)
    for seed in range(4):
        x, scale, zero_point = sample(SHAPE, granularity, dtype, seed)
        codes, values = run_ort(model, x, scale, zero_point)
        found = quantize(x, scale, zero_point, dtype, granularity)
        assert same_bits(found.astype(np.float32), codes)
        assert same_bits(dequantize(found, scale, zero_point, granularity), values)
        assert same_bits(fake_quantize(x, scale, zero_point, dtype, granularity), values)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", Dtype)
def test_bit_exact_with_the_onnx_reference_evaluator(dtype: Dtype, granularity: Granularity) -> None:
    model = qdq_model(dtype, granularity, SHAPE)
    x, scale, zero_point = sample(SHAPE, granularity, dtype, 4)
    if dtype is Dtype.FLOAT4E2M1:
        x[x == 0] = 0  # it adds the zero point, 0, to this one float type: -0.0 + 0.0 is 0.0
    codes, values = run_reference(model, x, scale, zero_point)
    assert same_bits(quantize(x, scale, zero_point, dtype, granularity).astype(np.float32), codes)
    assert same_bits(fake_quantize(x, scale, zero_point, dtype, granularity), values)


@pytest.mark.parametrize(
    ("dtype", "granularity"),
    # The kernels that are left out convert to int32 on the way, which C++ does not define for these values.
    [(d, g) for d in WITH_KERNEL if d.bits >= 8 for g in (PerTensor(), PerAxis(1))]
    + [(d, Blocked(0, 4)) for d in WITH_KERNEL if not d.is_integer],
    ids=str,
)
def test_bit_exact_with_onnxruntime_on_nan_and_infinity(dtype: Dtype, granularity: Granularity) -> None:
    shape = (4, 32)
    x, scale, zero_point = sample(shape, granularity, dtype, 5)
    x[:, :7] = [np.nan, np.inf, -np.inf, 3e12, -3e12, 3e38, -3e38]
    codes, values = run_ort(qdq_model(dtype, granularity, shape), x, scale, zero_point)
    found = quantize(x, scale, zero_point, dtype, granularity)
    assert same_bits(found.astype(np.float32), codes)
    assert same_bits(dequantize(found, scale, zero_point, granularity), values)


@pytest.mark.parametrize("dtype", [d for d in WITH_KERNEL if d.bits == 8])
def test_bit_exact_with_onnxruntime_on_every_float16(dtype: Dtype) -> None:
    x = np.arange(2**16, dtype=np.uint16).view(np.float16)
    if dtype.is_integer:
        x = x[np.isfinite(x)]  # as above: this kernel converts to int32
    model = qdq_model(dtype, PerTensor(), x.shape, "float16")
    zero_point = np.array(3 if dtype.is_integer else 0, dtype.numpy)
    for scale in (np.array(0.0317, np.float16), np.array(1.0, np.float16), np.array(7e-5, np.float16)):
        codes, values = run_ort(model, x, scale, zero_point)
        found = quantize(x, scale, zero_point, dtype, PerTensor())
        assert same_bits(found.astype(np.float32), codes)
        assert same_bits(dequantize(found, scale, zero_point, PerTensor()), values)
        assert same_bits(fake_quantize(x, scale, zero_point, dtype, PerTensor()), values)


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), Blocked(1, 3)], ids=str)
@pytest.mark.parametrize("dtype", WITH_KERNEL)
def test_bit_exact_with_onnxruntime_in_float16(dtype: Dtype, granularity: Granularity) -> None:
    x, scale, zero_point = sample(SHAPE, granularity, dtype, 6)
    scale = np.asarray(np.clip(scale, 2**-4, 1), np.float16)
    x = np.clip(x, -65504, 65504).astype(np.float16)
    codes, values = run_ort(qdq_model(dtype, granularity, SHAPE, "float16"), x, scale, zero_point)
    found = quantize(x, scale, zero_point, dtype, granularity)
    assert same_bits(found.astype(np.float32), codes)
    assert same_bits(dequantize(found, scale, zero_point, granularity), values)


def test_int32_dequantizes_like_a_quantized_bias() -> None:
    q = np.array([2**31 - 1, -(2**31), 16777217, 5, 0], np.int32)
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        bias (int32[5] q, float[5] scale) => (float[5] y) { y = DequantizeLinear <axis = 0> (q, scale) }
    """)
    scale = np.array([1e-3, 0.3, 1.0, 0.1, 2.0], np.float32)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert same_bits(dequantize(q, scale, None, PerAxis(0)), session.run(None, {"q": q, "scale": scale})[0])


@pytest.mark.parametrize("type_", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_values_have_the_type_of_the_scale(type_: npt.DTypeLike) -> None:
    x, scale = np.array([0.11, 5.0], type_), np.array(0.1, type_)
    codes = quantize(x, scale, None, Dtype.INT8, PerTensor())
    expected = (codes.astype(np.float32) * scale.astype(np.float32)).astype(type_)
    assert same_bits(dequantize(codes, scale, None, PerTensor()), expected)
    assert same_bits(fake_quantize(x, scale, None, Dtype.INT8, PerTensor()), expected)


@pytest.mark.parametrize("type_", [np.float16, np.float32])
def test_a_code_times_a_huge_scale_is_infinity(type_: type[np.floating[Any]]) -> None:
    values = dequantize(np.array([0, 127, -128], np.int8), np.finfo(type_).max, None, PerTensor())
    assert values.tolist() == [0, np.inf, -np.inf]


# Properties.

finite = st.floats(-(2.0**100), 2.0**100, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=9), elements=finite)
granularities = st.one_of(
    st.just(PerTensor()),
    st.builds(PerAxis, st.sampled_from([0, -1])),
    st.builds(Blocked, st.sampled_from([0, -1]), st.integers(1, 10)),
)


@given(arrays, granularities, st.sampled_from(INTEGERS), st.booleans())
@settings(max_examples=50, deadline=None)
def test_error_inside_the_range_is_at_most_half_a_step(
    x: Array, granularity: Granularity, dtype: Dtype, symmetric: bool
) -> None:
    scale, zero_point = scale_and_zero_point(*minmax(x, granularity), dtype, symmetric=symmetric)
    step = dequantize(np.ones(x.shape, np.int8), scale, None, granularity).astype(np.float64)
    error = np.abs(fake_quantize(x, scale, zero_point, dtype, granularity).astype(np.float64) - x)
    rounding = np.abs(x) * 2.0**-23 + step * (dtype.maximum - dtype.minimum) * 2.0**-23
    assert (error <= step / 2 + rounding).all()


@given(arrays, granularities, st.sampled_from(list(Dtype)), st.booleans())
@settings(max_examples=50, deadline=None)
def test_fake_quantize_is_idempotent_and_equals_quantize_then_dequantize(
    x: Array, granularity: Granularity, dtype: Dtype, symmetric: bool
) -> None:
    scale, zero_point = scale_and_zero_point(*minmax(x, granularity), dtype, symmetric=symmetric)
    once = fake_quantize(x, scale, zero_point, dtype, granularity)
    codes = quantize(x, scale, zero_point, dtype, granularity)
    assert same_bits(once, dequantize(codes, scale, zero_point, granularity))
    assert same_bits(once, fake_quantize(once, scale, zero_point, dtype, granularity))


@given(
    hnp.arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)),
    st.floats(2.0**-100, 2.0**100, width=32),
    st.sampled_from(list(Dtype)),
)
@settings(max_examples=50, deadline=None)
def test_quantize_is_monotone(x: Array, scale: float, dtype: Dtype) -> None:
    codes = quantize(np.sort(x), scale, None, dtype, PerTensor()).astype(np.float32)
    assert (np.diff(codes) >= 0).all()


ends = st.floats(-LARGEST, LARGEST, width=32)


@given(st.tuples(ends, ends).map(sorted), st.sampled_from(list(Dtype)), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_finite_range_gives_a_normal_scale_an_exact_zero_and_finite_values(
    low_high: Sequence[float], dtype: Dtype, symmetric: bool
) -> None:
    low, high = low_high
    scale, zero_point = scale_and_zero_point(low, high, dtype, symmetric=symmetric)
    assert scale.dtype == np.float32
    assert np.finfo(np.float32).smallest_normal <= scale < np.inf
    assert zero_point.dtype == dtype.numpy
    values = fake_quantize([0.0, low, high, np.inf, -np.inf], scale, zero_point, dtype, PerTensor())
    assert values[0] == 0
    assert np.isfinite(values).all()
    if symmetric and (dtype.signed or low >= 0):
        assert zero_point == 0


@given(arrays, st.integers(-3, 2), st.integers(1, 10))
@settings(max_examples=50, deadline=None)
def test_blocks_agree_with_a_loop_over_slices(x: Array, axis: int, block_size: int) -> None:
    axis = axis % x.ndim
    blocks = [
        x.take(range(start, min(start + block_size, x.shape[axis])), axis)
        for start in range(0, x.shape[axis], block_size)
    ]
    granularity = Blocked(axis - x.ndim, block_size)
    low, high = minmax(x, granularity)
    assert np.array_equal(low, np.stack([b.min(axis) for b in blocks], axis))
    assert np.array_equal(high, np.stack([b.max(axis) for b in blocks], axis))
    scale, zero_point = scale_and_zero_point(low, high, Dtype.UINT4, symmetric=False)
    columns = np.split(scale, scale.shape[axis], axis), np.split(zero_point, scale.shape[axis], axis)
    expected = np.concatenate(
        [np.clip(np.rint(b / s) + z.astype(np.float32), 0, 15) for b, s, z in zip(blocks, *columns, strict=True)],
        axis,
    )
    assert np.array_equal(quantize(x, scale, zero_point, Dtype.UINT4, granularity).astype(np.float32), expected)


# Ranges.


@pytest.mark.parametrize(
    ("low", "high", "dtype", "symmetric", "scale", "zero_point"),
    [
        (-1.0, 0.5, Dtype.INT8, True, 1 / 127, 0),
        (-0.5, 7.0, Dtype.INT4, True, 1.0, 0),
        (2.0, 6.0, Dtype.INT8, True, 6 / 127, 0),
        (-6.0, -2.0, Dtype.INT8, True, 6 / 127, 0),
        (0.0, 6.0, Dtype.UINT8, True, 6 / 255, 0),
        (2.0, 6.0, Dtype.UINT8, True, 6 / 255, 0),
        (-0.1, 6.0, Dtype.UINT8, True, 6 / 127, 128),
        (-7.0, 3.0, Dtype.UINT4, True, 1.0, 8),
        (-1.0, 1.0, Dtype.INT2, True, 1.0, 0),
        (-1.0, 1.55, Dtype.INT8, False, 0.01, -28),
        (1.0, 2.55, Dtype.UINT8, False, 0.01, 0),
        (-2.55, -1.0, Dtype.UINT8, False, 0.01, 255),
        (-2.55, -1.0, Dtype.INT8, False, 0.01, 127),
        (-448.0, 1.0, Dtype.FLOAT8E4M3FN, False, 1.0, 0),
        (-3.0, 12.0, Dtype.FLOAT4E2M1, True, 2.0, 0),
        (0.0, 0.0, Dtype.INT8, True, 1.0, 0),
        (0.0, 0.0, Dtype.UINT8, False, 1.0, 0),
        (-1e-40, 1e-40, Dtype.INT8, False, 1.0, -128),
        (0.0, 0.0, Dtype.FLOAT8E5M2, True, 1.0, 0),
    ],
)
def test_scale_and_zero_point_values(
    low: float, high: float, dtype: Dtype, symmetric: bool, scale: float, zero_point: int
) -> None:
    found_scale, found_zero_point = scale_and_zero_point(low, high, dtype, symmetric=symmetric)
    assert found_scale == np.float32(scale)
    assert float(found_zero_point) == zero_point


@pytest.mark.parametrize("seed", range(20))
def test_affine_uint8_is_what_dynamic_quantize_linear_computes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(64) * rng.uniform(0.01, 100) + rng.uniform(-3, 3)).astype(np.float32)
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        dynamic (float[64] x) => (uint8[64] q, float scale, uint8 zero_point) {
            q, scale, zero_point = DynamicQuantizeLinear(x)
        }
    """)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    q, expected_scale, expected_zero_point = session.run(None, {"x": x})
    scale, zero_point = scale_and_zero_point(*minmax(x, PerTensor()), Dtype.UINT8, symmetric=False)
    # That kernel subtracts and divides in float32, so its scale may be off by a unit in the last place.
    assert np.isclose(scale, expected_scale, rtol=2.0**-22, atol=0)
    assert zero_point == expected_zero_point
    assert same_bits(quantize(x, expected_scale, expected_zero_point, Dtype.UINT8, PerTensor()), q)


def test_ranges_keep_their_shape() -> None:
    low, high = np.full((2, 3), -1.0), np.array([[1.0, 2.0, 3.0], [0.0, 0.5, 1e-45]])
    scale, zero_point = scale_and_zero_point(low, high, Dtype.UINT8, symmetric=True)
    assert scale.shape == zero_point.shape == (2, 3)
    assert zero_point.astype(int).tolist() == [[128] * 3] * 2


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("type_", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_ranges_of_every_granularity(granularity: Granularity, type_: npt.DTypeLike) -> None:
    x = (np.random.default_rng(0).standard_normal(SHAPE) * 40).astype(type_)
    x[0, 0, 0] = -128  # whose magnitude int8 cannot hold
    low, high = minmax(x, granularity)
    assert low.shape == high.shape == scale_shape(SHAPE, granularity)
    assert low.dtype == high.dtype == np.float32
    assert np.array_equal(absmax(x, granularity), minmax(np.abs(x.astype(np.float32)), granularity)[1])


def test_nan_and_infinity_are_not_hidden_by_a_range() -> None:
    x = np.array([[1.0, np.nan], [np.inf, 2.0]], np.float32)
    low, high = minmax(x, PerAxis(0))
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    assert high[1] == np.inf
    for granularity in (PerTensor(), PerAxis(0), Blocked(1, 2)):
        with pytest.raises(DataError, match="finite"):
            scale_and_zero_point(*minmax(x, granularity), Dtype.INT8, symmetric=True)


# Errors.


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (0.0, np.inf, "inf"),
        (np.nan, 1.0, "nan"),
        (0.0, 1e300, "inf"),
        (1.0, -1.0, r"\[1\.0, -1\.0\]"),
        ([0.0, np.nan], [1.0, 1.0], r"index \[1\]"),
        ([0.0], [1.0, 1.0], "shapes"),
    ],
)
def test_unusable_ranges_are_data_errors(low: npt.ArrayLike, high: npt.ArrayLike, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        scale_and_zero_point(low, high, Dtype.INT8, symmetric=True)
    assert "\n" not in str(caught.value)


def test_an_empty_tensor_has_no_range() -> None:
    with pytest.raises(DataError, match=r"\(0, 3\)"):
        minmax(np.empty((0, 3), np.float32), PerTensor())


def test_an_empty_tensor_quantizes_to_an_empty_tensor() -> None:
    for granularity in (PerTensor(), PerAxis(1), Blocked(0, 2), Blocked(1, 2)):
        scale = np.ones(scale_shape((0, 3), granularity), np.float32)
        assert quantize(np.empty((0, 3)), scale, None, Dtype.INT4, granularity).shape == (0, 3)
        assert fake_quantize(np.empty((0, 3)), scale, None, Dtype.INT4, granularity).shape == (0, 3)


@pytest.mark.parametrize(
    ("granularity", "scale", "zero_point", "message"),
    [
        (PerTensor(), [1.0, 1.0], None, r"scale of shape \(2,\) .* needs shape \(\)"),
        (PerAxis(1), 1.0, None, r"scale of shape \(\) .* needs shape \(6,\)"),
        (PerAxis(1), np.ones(4), None, r"scale of shape \(4,\) .*\(4, 6\) .* needs shape \(6,\)"),
        (PerAxis(0), np.ones(4), 0, r"zero point of shape \(\)"),
        (PerAxis(2), np.ones(6), None, "axis 2 does not exist"),
        (PerAxis(-3), np.ones(6), None, "axis -3 does not exist"),
        (Blocked(0, 3), np.ones((1, 6)), None, r"needs shape \(2, 6\)"),
        (Blocked(2, 3), np.ones((2, 6)), None, "axis 2 does not exist"),
        (PerTensor(), 0.0, None, "scale 0.0 is not a positive"),
        (PerTensor(), -1.0, None, "scale -1.0 is not a positive"),
        (PerTensor(), np.nan, None, "scale nan is not a positive"),
        (PerTensor(), np.inf, None, "scale inf is not a positive"),
        (PerTensor(), 1.0, 128, "zero point 128 .*int8: use -128 to 127"),
        (PerTensor(), 1.0, 0.5, "zero point 0.5 .*int8"),
    ],
)
def test_parameters_that_do_not_fit_are_recipe_errors(
    granularity: Granularity, scale: npt.ArrayLike, zero_point: npt.ArrayLike | None, message: str
) -> None:
    for function in (quantize, fake_quantize):
        with pytest.raises(RecipeError, match=message) as caught:
            function(np.zeros((4, 6), np.float32), scale, zero_point, Dtype.INT8, granularity)
        assert "\n" not in str(caught.value)


def test_float_types_have_no_zero_point() -> None:
    with pytest.raises(RecipeError, match=r"zero point 1 .*float8e4m3fn"):
        quantize([1.0], 1.0, 1, Dtype.FLOAT8E4M3FN, PerTensor())


def test_block_size_is_positive() -> None:
    with pytest.raises(RecipeError, match="block_size 0"):
        Blocked(0, 0)


def test_a_scalar_has_no_axis() -> None:
    with pytest.raises(RecipeError, match="axis 0 does not exist"):
        absmax(np.float32(3), PerAxis(0))


# Large weights.


@pytest.mark.parametrize("dtype", [Dtype.INT8, Dtype.INT4, Dtype.FLOAT8E4M3FN])
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), Blocked(0, 32), Blocked(1, 33)], ids=str)
def test_temporary_memory_is_small(dtype: Dtype, granularity: Granularity) -> None:
    x = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    reach = absmax(x, granularity)
    scale, zero_point = scale_and_zero_point(-reach, reach, dtype, symmetric=True)
    codes = quantize(x, scale, zero_point, dtype, granularity)
    tracemalloc.start()
    try:
        for call in (
            lambda: minmax(x, granularity),
            lambda: quantize(x, scale, zero_point, dtype, granularity),
            lambda: fake_quantize(x, scale, zero_point, dtype, granularity),
            lambda: dequantize(codes, scale, zero_point, granularity),
        ):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            call()
            assert tracemalloc.get_traced_memory()[1] - before < 2.2 * x.nbytes  # the result included
    finally:
        tracemalloc.stop()


def test_views_and_inputs_are_left_alone() -> None:
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    kept = base.copy()
    for x in (base.T, base[::2, 1::3], base[::-1]):
        for granularity in (PerTensor(), PerAxis(1), Blocked(0, 2), Blocked(1, 4)):
            reach = absmax(x, granularity)
            scale, zero_point = scale_and_zero_point(-reach, reach, Dtype.INT8, symmetric=True)
            found = fake_quantize(x, scale, zero_point, Dtype.INT8, granularity)
            assert same_bits(found, fake_quantize(x.copy(), scale, zero_point, Dtype.INT8, granularity))
    assert np.array_equal(base, kept)
