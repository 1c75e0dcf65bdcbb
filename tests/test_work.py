"""Arithmetic and traffic of single products, against figures computed by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.devices import DEVICES, Device, Format, device
from qonnx.work import Bound, Scheme, Work, conv, gemm

A800 = device("a800")

# FLOP per byte of [m, 4096] x [4096, 4096] with results in FP16: FP16, W8A8, W4A16 and W4A8 in blocks of 128.
TABLE = {
    1: ("1.0", "2.0", "3.9", "3.9"),
    8: ("8.0", "15.9", "30.6", "30.7"),
    16: ("15.9", "31.6", "60.2", "60.7"),
    32: ("31.5", "62.5", "117", "119"),
    64: ("62.1", "122", "221", "228"),
    128: ("120", "234", "400", "420"),
    256: ("228", "431", "669", "728"),
    512: ("410", "745", "1008", "1150"),
    2048: ("1024", "1638", "1628", "2032"),
}


@pytest.mark.parametrize("m", TABLE)
def test_intensity_of_a_4096_by_4096_layer(m: int) -> None:
    for scheme, printed in zip(Scheme, TABLE[m], strict=True):
        digits = len(printed.partition(".")[2])
        assert f"{gemm(m, 4096, 4096, scheme).intensity:.{digits}f}" == printed


def test_what_a_gemm_moves() -> None:
    # 3 tokens, 256 inputs, 10 outputs.
    assert gemm(3, 10, 256) == Work(flop=15360, inputs=1536, weights=5120, scales=0, outputs=60)
    assert gemm(3, 10, 256, Scheme.W8A8) == Work(15360, 768, 2560, 0, 60, Format.INT8)
    assert gemm(3, 10, 256, Scheme.W4A16) == Work(15360, 1536, 1280, 40, 60, Format.FP16)  # two blocks per output
    assert gemm(3, 10, 256, Scheme.W4A8, output_bits=8) == Work(15360, 768, 1280, 40, 30, Format.INT8)


def test_a_last_block_that_is_not_full_has_a_scale_too() -> None:
    assert gemm(1, 10, 129, Scheme.W4A16).scales == 10 * 2 * 2


@pytest.mark.parametrize(
    ("filters", "output", "flop", "size", "intensity"),
    [
        ([1, 1, 3, 3], [1, 1, 62, 62], 69_192, 15_898, 4.35),  # (4096 + 9 + 3844) * 2 bytes
        ([1, 1, 1, 1], [1, 1, 64, 64], 8_192, 16_386, 0.50),
    ],
)
def test_one_channel_of_64_by_64(filters: list[int], output: list[int], flop: int, size: int, intensity: float) -> None:
    work = conv([1, 1, 64, 64], filters, output)
    assert (work.flop, work.bytes, round(work.intensity, 2)) == (flop, size, intensity)


def test_without_the_result_the_same_convolution_looks_twice_as_dense() -> None:
    work = conv([1, 1, 64, 64], [1, 1, 3, 3], [1, 1, 62, 62])
    assert work.flop / (work.bytes - work.outputs) == pytest.approx(8.43, abs=0.005)


def test_a_depthwise_convolution_is_bound_by_memory_everywhere() -> None:
    image, filters = [32, 96, 112, 112], [96, 1, 3, 3]
    floats = conv(image, filters, image)
    integers = conv(image, filters, image, Scheme.W8A8, output_bits=8)
    assert floats.intensity == pytest.approx(4.5, rel=1e-3)  # 2 * 9 operations for 2 * 2 bytes
    assert integers.intensity == pytest.approx(9, rel=1e-3)
    for known in DEVICES:
        assert floats.bound(known) is integers.bound(known) is Bound.MEMORY
        assert floats.seconds(known) / integers.seconds(known) == pytest.approx(2, rel=1e-3)


def test_a_convolution_of_one_pixel_is_a_gemm() -> None:
    for scheme in Scheme:
        assert conv([5, 256, 1, 1], [10, 256, 1, 1], [5, 10, 1, 1], scheme) == gemm(5, 10, 256, scheme)


def test_weights_of_7b_parameters_bound_a_token_from_below() -> None:
    def milliseconds(bits: float) -> float:
        size = round(13.5e9 * bits / 16)
        return Work(flop=0, inputs=0, weights=size, scales=0, outputs=0).seconds(A800) * 1e3

    assert round(milliseconds(16), 1) == 6.6
    assert round(1e3 / milliseconds(16)) == 151
    assert round(milliseconds(8), 1) == 3.3
    assert round(milliseconds(4.25), 1) == 1.8  # with a scale and a zero point for 128 weights


def first(condition: dict[int, bool]) -> int:
    return next(m for m, holds in condition.items() if holds)


def test_where_4096_by_4096_layers_meet_their_ridges_on_a800() -> None:
    tokens = range(1, 512)
    assert first({m: gemm(m, 4096, 4096, Scheme.W4A16).bound(A800) is Bound.COMPUTE for m in tokens}) == 43
    assert first({m: gemm(m, 4096, 4096, Scheme.W8A8).bound(A800) is Bound.COMPUTE for m in tokens}) == 173
    # W4A16 needs 0.108 us for each token there, W8A8 still waits for its weights.
    slower = {
        m: gemm(m, 4096, 4096, Scheme.W4A16).seconds(A800) > gemm(m, 4096, 4096, Scheme.W8A8).seconds(A800)
        for m in tokens
    }
    assert first(slower) == 82
    assert gemm(1000, 4096, 4096, Scheme.W4A16).seconds(A800) * 1e3 == pytest.approx(0.1076, abs=5e-5)


# The products of Llama-2-7B: (outputs, inputs, how many in 32 layers), and the head over 32000 tokens.
LLAMA_2_7B = [(4096, 4096, 4 * 32), (11008, 4096, 2 * 32), (4096, 11008, 32), (32000, 4096, 1)]


def llama_seconds(tokens: int, scheme: Scheme) -> float:
    return sum(count * gemm(tokens, n, k, scheme).seconds(A800) for n, k, count in LLAMA_2_7B)


def test_llama_has_6_6_billion_weights_in_its_products() -> None:
    assert sum(count * n * k for n, k, count in LLAMA_2_7B) == 6_607_077_376


def test_weight_only_wins_when_decoding_and_w8a8_at_prefill() -> None:
    decode = {scheme: llama_seconds(1, scheme) for scheme in (Scheme.FP16, Scheme.W8A8, Scheme.W4A16)}
    assert sorted(decode, key=decode.__getitem__) == [Scheme.W4A16, Scheme.W8A8, Scheme.FP16]
    assert decode[Scheme.FP16] * 1e3 == pytest.approx(6.607077376 * 2 / 2.039, rel=1e-3)
    assert decode[Scheme.FP16] / decode[Scheme.W8A8] == pytest.approx(2, rel=2e-3)
    # 4 bits and a scale of 16 for 128 weights: 4.125 bits
    assert decode[Scheme.FP16] / decode[Scheme.W4A16] == pytest.approx(16 / 4.125, rel=2e-3)

    prefill = {scheme: llama_seconds(2048, scheme) for scheme in (Scheme.FP16, Scheme.W8A8, Scheme.W4A16)}
    assert min(prefill, key=prefill.__getitem__) == Scheme.W8A8
    assert prefill[Scheme.FP16] / prefill[Scheme.W8A8] == pytest.approx(2, rel=1e-3)
    assert prefill[Scheme.W4A16] == pytest.approx(prefill[Scheme.FP16])


def test_w4a8_is_never_slower_than_either() -> None:
    for tokens in (1, 40, 80, 160, 2048):
        best = llama_seconds(tokens, Scheme.W4A8)
        assert best <= llama_seconds(tokens, Scheme.W4A16)
        assert best <= llama_seconds(tokens, Scheme.W8A8)


sizes = st.integers(1, 5000)


@settings(max_examples=50, deadline=None)
@given(m=sizes, n=sizes, k=sizes, known=st.sampled_from(DEVICES))
def test_time_is_the_longer_of_the_two_and_the_bound_says_which(m: int, n: int, k: int, known: Device) -> None:
    for scheme in Scheme:
        work = gemm(m, n, k, scheme)
        compute, memory = work.flop / known.peak(work.format), work.bytes / known.bandwidth
        assert work.seconds(known) == max(compute, memory)
        if not math.isclose(compute, memory):
            assert (work.bound(known) is Bound.COMPUTE) == (compute > memory)
        # The general form of the intensity, without scales.
        rates = (scheme.activation_bits / 8 / n, scheme.weight_bits / 8 / m, 2 / k)
        traffic = work.bytes - work.scales
        assert work.flop / traffic == pytest.approx(2 / sum(rates), rel=1 / traffic)  # half bytes are rounded up


def test_no_traffic_is_bound_by_arithmetic() -> None:
    assert Work(1, 0, 0, 0, 0).bound(A800) is Bound.COMPUTE
