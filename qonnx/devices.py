"""NVIDIA devices: what their tensor cores compute and their memory delivers at most, and where each figure comes from.

    peak = SMs * tensor cores per SM * FMA per tensor core and clock * 2 * clock        FLOP/s, dense
    ridge = peak / bandwidth                                                            FLOP per byte

Every device carries its units and clock beside the published peak, because the two need not agree: an H20 has 78 SMs
at 1.98 GHz and is held at less than a quarter of what they could do. Peaks are dense (data sheets print twice as much
for 2:4 sparsity), and of FP16 with sums in FP32, which is what inference engines run.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from qonnx.errors import TargetError


class Format(enum.StrEnum):
    """What a tensor core multiplies. BF16 runs at the rate of FP16."""

    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"


class Rates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One figure per format; None where the tensor cores lack the format, or nothing is known."""

    fp16: float | None = None
    int8: float | None = None
    int4: float | None = None
    fp8: float | None = None

    def of(self, fmt: Format) -> float | None:
        """The figure of one format."""
        match fmt:
            case Format.FP16:
                return self.fp16
            case Format.INT8:
                return self.int8
            case Format.INT4:
                return self.int4
            case Format.FP8:
                return self.fp8


DATA_SHEET = "data sheet"
SECONDARY = "secondary: press and GPU databases, not a data sheet"
RECALLED = "recalled, not verified"


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU.

    Attributes:
        name: the word for `--device`.
        description: for people.
        compute_capability: (8, 0) for sm_80.
        sms: the number of streaming multiprocessors.
        tensor_cores: of each of them.
        clock_mhz: the clock that peaks are stated for.
        fma: fused multiply-adds per tensor core and clock.
        peaks_tflops: the published dense peaks, in 1e12 operations per second.
        bandwidth_gb_s: of the memory, in 1e9 bytes per second.
        memory_gb: its size, in 1e9 bytes.
        source: what kind of source the figures are from; check anything but "data sheet" before you quote it.
        note: what to know about this row.

    Example:
        >>> a100 = device("a100")
        >>> round(a100.derived(Format.FP16) / 1e12, 1), a100.peak(Format.FP16) / 1e12, round(a100.ridge(Format.FP16))
        (311.9, 312.0, 153)

    Raises:
        TargetError: a figure is not positive, or there is no peak for FP16 or INT8.
    """

    name: str
    description: str
    compute_capability: tuple[int, int]
    sms: int
    tensor_cores: int
    clock_mhz: float
    fma: Rates
    peaks_tflops: Rates = Rates()
    bandwidth_gb_s: float
    memory_gb: float
    source: str = "given by the user"
    note: str = ""

    def __post_init__(self) -> None:
        for field, figure in self._figures():
            if not 0 < figure < float("inf"):
                raise TargetError(f"device {self.name}: {field} is {figure:g}; give a positive number")
        for fmt in (Format.FP16, Format.INT8):
            if self._peak(fmt) is None:
                raise TargetError(f"device {self.name}: no peak for {fmt}; give fma.{fmt} or peaks_tflops.{fmt}")

    @property
    def sm(self) -> str:
        """The architecture as the CUDA compiler spells it: sm_80."""
        return "sm_{}{}".format(*self.compute_capability)

    def derived(self, fmt: Format) -> float | None:
        """The dense peak that units and clock give, in operations per second; None where the format is missing."""
        fma = self.fma.of(fmt)
        return None if fma is None else self.sms * self.tensor_cores * fma * 2 * self.clock_mhz * 1e6

    def supports(self, fmt: Format) -> bool:
        """Whether there is a peak for the format."""
        return self._peak(fmt) is not None

    def peak(self, fmt: Format) -> float:
        """The published dense peak, or the derived one where none is published, in operations per second.

        Raises:
            TargetError: the device lacks the format.
        """
        peak = self._peak(fmt)
        if peak is None:
            raise TargetError(f"device {self.name} ({self.sm}) does not compute in {fmt}; use {Format.INT8}")
        return peak

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bandwidth_gb_s * 1e9

    def ridge(self, fmt: Format) -> float:
        """The intensity above which a kernel is bound by arithmetic, in operations per byte."""
        return self.peak(fmt) / self.bandwidth

    def _peak(self, fmt: Format) -> float | None:
        published = self.peaks_tflops.of(fmt)
        return self.derived(fmt) if published is None else published * 1e12

    def _figures(self) -> Iterator[tuple[str, float]]:
        for field in ("sms", "tensor_cores", "clock_mhz", "bandwidth_gb_s", "memory_gb"):
            yield field, float(getattr(self, field))
        for field, rates in (("fma", self.fma), ("peaks_tflops", self.peaks_tflops)):
            for fmt in Format:
                figure = rates.of(fmt)
                if figure is not None:
                    yield f"{field}.{fmt}", figure


def _ampere(name: str, description: str, bandwidth: float, memory: float, source: str, note: str = "") -> Device:
    """GA100, the chip of A100 and A800: the two differ in NVLink alone."""
    return Device(
        name=name,
        description=f"NVIDIA {description}",
        compute_capability=(8, 0),
        sms=108,
        tensor_cores=4,
        clock_mhz=1410,
        fma=Rates(fp16=256, int8=512, int4=1024),
        peaks_tflops=Rates(fp16=311.9, int8=623.7, int4=1247.5)
        if name.startswith("a800")
        else Rates(fp16=312, int8=624, int4=1248),
        bandwidth_gb_s=bandwidth,
        memory_gb=memory,
        source=source,
        note=note,
    )


def _hopper(
    name: str,
    description: str,
    sms: int,
    clock: float,
    peaks: tuple[float, float],
    memory: tuple[float, float],
    source: str,
    note: str = "",
) -> Device:
    """GH100: no INT4; INT8 and FP8 at the same rate. `peaks` of FP16 and INT8, `memory` as bandwidth and size."""
    return Device(
        name=name,
        description=f"NVIDIA {description}",
        compute_capability=(9, 0),
        sms=sms,
        tensor_cores=4,
        clock_mhz=clock,
        fma=Rates(fp16=512, int8=1024, fp8=1024),
        peaks_tflops=Rates(fp16=peaks[0], int8=peaks[1], fp8=peaks[1]),
        bandwidth_gb_s=memory[0],
        memory_gb=memory[1],
        source=source,
        note=note,
    )


_PCIE_80 = f"{DATA_SHEET}, but for the bandwidth: {RECALLED}"

DEVICES: tuple[Device, ...] = (
    _ampere("a800-sxm-80", "A800 SXM 80 GB", 2039, 80, SECONDARY),
    _ampere("a800-pcie-80", "A800 PCIe 80 GB", 1935, 80, SECONDARY),
    _ampere("a800-pcie-40", "A800 PCIe 40 GB", 1555, 40, SECONDARY),
    _ampere("a100-sxm-80", "A100 SXM 80 GB", 2039, 80, DATA_SHEET),
    _ampere("a100-sxm-40", "A100 SXM 40 GB", 1555, 40, DATA_SHEET),
    _ampere("a100-pcie-80", "A100 PCIe 80 GB", 1935, 80, _PCIE_80),
    _ampere("a100-pcie-40", "A100 PCIe 40 GB", 1555, 40, DATA_SHEET),
    _hopper("h100-sxm", "H100 SXM 80 GB", 132, 1830, (989, 1979), (3350, 80), DATA_SHEET),
    _hopper("h100-pcie", "H100 PCIe 80 GB", 114, 1620, (756, 1513), (2000, 80), DATA_SHEET, "boosts to 1755 MHz"),
    _hopper("h800", "H800 SXM 80 GB", 132, 1830, (989, 1979), (3350, 80), RECALLED, "clock taken from H100 SXM"),
    _hopper("h200", "H200 SXM 141 GB", 132, 1830, (989, 1979), (4800, 141), DATA_SHEET),
    _hopper("h20", "H20 96 GB", 78, 1980, (148, 296), (4000, 96), SECONDARY, "its units could do 4.3 times its peak"),
    Device(
        name="l40s",
        description="NVIDIA L40S 48 GB",
        compute_capability=(8, 9),
        sms=142,
        tensor_cores=4,
        clock_mhz=2520,
        fma=Rates(fp16=128, int8=256, int4=512, fp8=256),
        peaks_tflops=Rates(fp16=362, int8=733, int4=733, fp8=733),
        bandwidth_gb_s=864,
        memory_gb=48,
        source=DATA_SHEET,
        note="INT4 is listed with the rate of INT8",
    ),
    Device(
        name="l20",
        description="NVIDIA L20 48 GB",
        compute_capability=(8, 9),
        sms=92,
        tensor_cores=4,
        clock_mhz=2520,
        fma=Rates(fp16=128, int8=256, fp8=256),
        peaks_tflops=Rates(fp16=119.5, int8=239, fp8=239),
        bandwidth_gb_s=864,
        memory_gb=48,
        source=RECALLED,
        note="held at half of what its units could do; no figure for INT4",
    ),
    Device(
        name="l4",
        description="NVIDIA L4 24 GB",
        compute_capability=(8, 9),
        sms=58,
        tensor_cores=4,
        clock_mhz=2040,
        fma=Rates(fp16=128, int8=256, int4=512, fp8=256),
        peaks_tflops=Rates(fp16=121, int8=242.5, int4=485, fp8=242.5),
        bandwidth_gb_s=300,
        memory_gb=24,
        source=DATA_SHEET,
        note="halves of the sparse figures that its data sheet prints; INT4 taken as twice INT8",
    ),
    Device(
        name="t4",
        description="NVIDIA T4 16 GB",
        compute_capability=(7, 5),
        sms=40,
        tensor_cores=8,
        clock_mhz=1590,
        fma=Rates(fp16=64, int8=128, int4=256),
        peaks_tflops=Rates(fp16=65, int8=130, int4=260),
        bandwidth_gb_s=320,
        memory_gb=16,
        source=DATA_SHEET,
    ),
    Device(
        name="rtx3090",
        description="NVIDIA GeForce RTX 3090 24 GB",
        compute_capability=(8, 6),
        sms=82,
        tensor_cores=4,
        clock_mhz=1695,
        fma=Rates(fp16=64, int8=256, int4=512),
        peaks_tflops=Rates(fp16=71, int8=284, int4=568),
        bandwidth_gb_s=936,
        memory_gb=24,
        source=DATA_SHEET,
        note="FP16 with sums in FP16: 142",
    ),
    Device(
        name="rtx4090",
        description="NVIDIA GeForce RTX 4090 24 GB",
        compute_capability=(8, 9),
        sms=128,
        tensor_cores=4,
        clock_mhz=2520,
        fma=Rates(fp16=64, int8=256, int4=512, fp8=128),
        peaks_tflops=Rates(fp16=165.2, int8=660.6, int4=1321, fp8=330.3),
        bandwidth_gb_s=1008,
        memory_gb=24,
        source=DATA_SHEET,
        note="with sums in FP16: FP16 330.3, FP8 660.6",
    ),
    Device(
        name="orin",
        description="NVIDIA Jetson AGX Orin 64 GB (GPU)",
        compute_capability=(8, 7),
        sms=16,
        tensor_cores=4,
        clock_mhz=1300,
        fma=Rates(fp16=256, int8=512, int4=1024),
        peaks_tflops=Rates(fp16=42.5, int8=85, int4=170),
        bandwidth_gb_s=204.8,
        memory_gb=64,
        source=f"{SECONDARY}; bandwidth {RECALLED}",
        note="memory is shared with the CPU; its two DLA are not counted",
    ),
)


def device(name_or_file: str | os.PathLike[str]) -> Device:
    """A device of the table, or one from a YAML file with the fields of `Device`.

    A name without a variant is the first one of the table: `a800` is the A800 SXM with 80 GB.

    Raises:
        TargetError: the device is unknown, or the file is not a valid description of one.
    """
    name = str(name_or_file)
    for known in DEVICES:
        if known.name == name or known.name.startswith(f"{name}-"):
            return known
    path = Path(name_or_file)
    if path.is_file():
        return _read(path)
    names = ", ".join(known.name for known in DEVICES)
    raise TargetError(f"unknown device {name!r}: neither a file nor one of {names}")


def _read(path: Path) -> Device:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise TargetError(f"device {path}: not readable as YAML ({' '.join(str(error).split())})") from error
    try:
        return msgspec.convert(document, Device)
    except msgspec.ValidationError as error:
        raise TargetError(f"device {path}: {' '.join(str(error).split())}") from error
