"""Devices: units times clock beside what is published, ridges, sources, and descriptions in YAML."""

from pathlib import Path

import msgspec
import pytest
import yaml

from qonnx.devices import DATA_SHEET, DEVICES, Device, Format, Rates, device
from qonnx.errors import TargetError


@pytest.mark.parametrize(
    ("name", "fmt", "tera"),
    [
        ("a100", "fp16", 311.9),  # 108 * 4 * 256 * 2 * 1.41e9
        ("a100", "int8", 623.7),
        ("a100", "int4", 1247.5),
        ("a800", "fp16", 311.9),
        ("h100-sxm", "fp16", 989.4),  # 132 * 4 * 512 * 2 * 1.83e9
        ("h100-pcie", "fp16", 756.4),  # 114 * 4 * 512 * 2 * 1.62e9
        ("t4", "fp16", 65.1),  # 40 * 8 * 64 * 2 * 1.59e9
        ("rtx3090", "fp16", 71.2),  # 82 * 4 * 64 * 2 * 1.695e9
        ("rtx4090", "fp16", 165.2),  # 128 * 4 * 64 * 2 * 2.52e9
        ("l4", "fp16", 121.2),  # 58 * 4 * 128 * 2 * 2.04e9
        ("orin", "int8", 85.2),  # 16 * 4 * 512 * 2 * 1.3e9
        ("h20", "fp16", 632.6),  # 78 * 4 * 512 * 2 * 1.98e9
    ],
)
def test_the_peak_of_units_and_clock(name: str, fmt: str, tera: float) -> None:
    derived = device(name).derived(Format(fmt))
    assert derived is not None
    assert round(derived / 1e12, 1) == tera


def test_a100_publishes_312_624_and_1248() -> None:
    a100 = device("a100")
    for fmt, published in ((Format.FP16, 312), (Format.INT8, 624), (Format.INT4, 1248)):
        assert a100.peak(fmt) == published * 1e12
        assert (a100.derived(fmt) or 0) / 1e12 == pytest.approx(published, rel=5e-4)


def test_published_and_derived_agree_except_where_the_row_says_so() -> None:
    apart = set()
    for known in DEVICES:
        for fmt in Format:
            published, derived = known.peaks_tflops.of(fmt), known.derived(fmt)
            assert (published is None) == (derived is None), known.name
            if published is not None and derived is not None and abs(derived / 1e12 / published - 1) > 0.015:
                apart.add((known.name, str(fmt)))
                assert known.note
    assert apart == {(name, fmt) for name in ("h20", "l20") for fmt in ("fp16", "int8", "fp8")} | {("l40s", "int4")}


@pytest.mark.parametrize(
    ("names", "fp16", "int8", "int4", "fp8"),
    [
        ("a100-sxm-80 a800-sxm-80", 153, 306, 612, None),
        ("a100-pcie-80 a800-pcie-80", 161, 322, 645, None),
        ("a100-sxm-40 a100-pcie-40", 201, 401, 803, None),
        ("a800-pcie-40", 201, 401, 802, None),
        ("h100-sxm h800", 295, 591, None, 591),
        ("h100-pcie", 378, 756, None, 756),
        ("h200", 206, 412, None, 412),
        ("h20", 37, 74, None, 74),
        ("l40s", 419, 848, 848, 848),
        ("l20", 138, 277, None, 277),
        ("l4", 403, 808, 1617, 808),
        ("t4", 203, 406, 812, None),
        ("rtx4090", 164, 655, 1311, 328),
        ("rtx3090", 76, 303, 607, None),
        ("orin", 208, 415, 830, None),
    ],
)
def test_ridges(names: str, fp16: int, int8: int, int4: int | None, fp8: int | None) -> None:
    for name in names.split():
        for fmt, ridge in zip(Format, (fp16, int8, int4, fp8), strict=True):
            if ridge is None:
                assert not device(name).supports(fmt)
            else:
                assert device(name).ridge(fmt) == pytest.approx(ridge, abs=0.51)


def test_every_device_has_its_ridges_tested() -> None:
    assert len(DEVICES) == len({known.name for known in DEVICES}) == 19


def test_int4_is_gone_in_hopper_and_fp8_begins_with_ada() -> None:
    for known in DEVICES:
        assert known.supports(Format.FP8) == (known.compute_capability >= (8, 9))
        if known.compute_capability >= (9, 0):
            assert not known.supports(Format.INT4)


def test_only_rows_from_data_sheets_say_so() -> None:
    certain = {known.name for known in DEVICES if known.source == DATA_SHEET}
    assert certain == {
        "a100-sxm-80",
        "a100-sxm-40",
        "a100-pcie-40",
        "h100-sxm",
        "h100-pcie",
        "h200",
        "l40s",
        "l4",
        "t4",
        "rtx3090",
        "rtx4090",
    }
    assert "bandwidth: recalled" in device("a100-pcie-80").source
    assert device("h800").source.startswith("recalled")


def test_a_name_without_variant_is_the_first_one() -> None:
    assert device("a800").name == "a800-sxm-80"
    assert device("h20").name == "h20"
    assert device("h200").name == "h200"


MINE = """
name: mine
description: a test
compute_capability: [8, 6]
sms: 10
tensor_cores: 4
clock_mhz: 1000
fma: {fp16: 128, int8: 256}
bandwidth_gb_s: 100
memory_gb: 8
"""


def test_a_device_in_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    mine = device(file)
    assert mine.sm == "sm_86"
    assert mine.source == "given by the user"
    # 10 * 4 * 128 * 2 * 1e9 = 10.24e12, over 1e11 bytes per second
    assert mine.peak(Format.FP16) == mine.derived(Format.FP16) == 10.24e12
    assert mine.ridge(Format.FP16) == pytest.approx(102.4)
    assert not mine.supports(Format.FP8)


@pytest.mark.parametrize("known", DEVICES, ids=lambda known: known.name)
def test_every_row_reads_back_from_yaml(known: Device, tmp_path: Path) -> None:
    file = tmp_path / "device.yaml"
    file.write_text(yaml.safe_dump(msgspec.to_builtins(known)))
    assert device(file) == known


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sms: 10", "sms: 10\ncores: 3", "unknown field `cores`"),
        ("sms: 10\n", "", "missing required field `sms`"),
        ("sms: 10", "sms: many", "Expected `int`, got `str`"),
        ("sms: 10", "sms: 0", "device mine: sms is 0; give a positive number"),
        ("bandwidth_gb_s: 100", "bandwidth_gb_s: .nan", "bandwidth_gb_s is nan"),
        ("int8: 256", "int8: -1", "device mine: fma.int8 is -1"),
        (", int8: 256", "", "device mine: no peak for int8; give fma.int8 or peaks_tflops.int8"),
        ("[8, 6]", "8.6", "compute_capability"),
        ("name: mine", "name: [", "not readable as YAML"),
        (MINE, "- a", "Expected `object`"),
    ],
)
def test_a_wrong_description_is_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(MINE.replace(old, new))
    with pytest.raises(TargetError) as error:
        device(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match=r"unknown device 'b100': neither a file nor one of a800-sxm-80, "):
        device("b100")


def test_a_missing_format_is_refused_with_the_alternative() -> None:
    with pytest.raises(TargetError, match=r"device a800-sxm-80 \(sm_80\) does not compute in fp8; use int8"):
        device("a800").peak(Format.FP8)


def test_figures_given_in_python_are_checked_too() -> None:
    with pytest.raises(TargetError, match=r"peaks_tflops\.int8 is -1"):
        msgspec.structs.replace(device("t4"), peaks_tflops=Rates(fp16=1, int8=-1))
