"""Targets: what they take, and how what they do not take is refused."""

import pytest

from qonnx.errors import TargetError
from qonnx.numerics import Dtype
from qonnx.recipe import Recipe, load_recipe
from qonnx.resolve import resolve
from qonnx.targets import TARGETS, Target, check_types, target

GPUS = [known for known in TARGETS if known.device is not None]


def test_a800_is_sm_80_and_takes_int8_and_int4_weights() -> None:
    a800 = target("a800")
    assert a800.compute_capability == (8, 0)
    assert a800.device is not None
    assert a800.device.name == "a800-sxm-80"
    assert (a800.activations, a800.weights, a800.weight_only) == (
        (Dtype.INT8,),
        (Dtype.INT8,),
        (Dtype.INT4, Dtype.INT8),
    )


def test_ort_cpu_has_no_device() -> None:
    assert target("ort-cpu").device is None
    assert target("ort-cpu").compute_capability is None


@pytest.mark.parametrize(
    ("name", "capability"),
    [("a100", (8, 0)), ("h100", (9, 0)), ("l4", (8, 9)), ("t4", (7, 5)), ("orin", (8, 7)), ("rtx3090", (8, 6))],
)
def test_compute_capabilities(name: str, capability: tuple[int, int]) -> None:
    assert target(name).compute_capability == capability


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_tensorrt_takes_symmetric_int8_first_and_fp8_from_sm_89(gpu: Target) -> None:
    capability = gpu.compute_capability
    assert capability is not None
    assert gpu.symmetric
    assert gpu.activations[0] is gpu.weights[0] is Dtype.INT8
    assert (Dtype.FLOAT8E4M3FN in gpu.activations) == (Dtype.FLOAT8E4M3FN in gpu.weights) == (capability >= (8, 9))
    assert (Dtype.INT4 in gpu.weight_only) == (capability >= (8, 0))


@pytest.mark.parametrize("known", TARGETS, ids=lambda known: known.name)
def test_the_default_recipe_runs_everywhere(known: Target) -> None:
    recipe = resolve(Recipe(), known)
    assert recipe.activations.dtype is known.activations[0]
    check_types(known, known.activations[0], recipe.weights.dtype)
    for dtype in known.weight_only:
        check_types(known, None, dtype)


@pytest.mark.parametrize(
    ("name", "activations", "weights", "message"),
    [
        (
            "a800",
            Dtype.FLOAT8E4M3FN,
            Dtype.FLOAT8E4M3FN,
            "FP8 needs sm_89; a800 is sm_80: use int8 or target h100",
        ),
        ("t4", Dtype.INT8, Dtype.FLOAT8E4M3FN, "FP8 needs sm_89; t4 is sm_75: use int8 or target h100"),
        ("a800", None, Dtype.FLOAT8E4M3FN, "FP8 needs sm_89; a800 is sm_80: use int8 or target h100"),
        ("a800", Dtype.UINT8, Dtype.INT8, "activations in uint8 do not run on a800; use int8"),
        ("h100", Dtype.UINT8, Dtype.INT8, "activations in uint8 do not run on h100; use int8 or float8e4m3fn"),
        ("a800", Dtype.INT8, Dtype.UINT8, "weights in uint8 do not run on a800; use int8"),
        (
            "a800",
            Dtype.INT8,
            Dtype.INT4,
            "weights in int4 run on a800 with float activations only; leave activations in float or use int8",
        ),
        ("a800", None, Dtype.UINT4, "weights in uint4 with float activations do not run on a800; use int4 or int8"),
        (
            "t4",
            None,
            Dtype.INT4,
            "weights in int4 with float activations do not run on t4; quantize activations too",
        ),
        (
            "h100",
            Dtype.FLOAT8E4M3FN,
            Dtype.INT8,
            "activations in float8e4m3fn and weights in int8 do not multiply on h100; use float8e4m3fn for both",
        ),
        (
            "ort-cpu",
            Dtype.FLOAT8E4M3FN,
            Dtype.INT8,
            "activations in float8e4m3fn do not run on ort-cpu; use uint8 or int8 or uint16 or int16",
        ),
    ],
)
def test_what_does_not_run_is_refused_with_the_alternative(
    name: str, activations: Dtype | None, weights: Dtype, message: str
) -> None:
    with pytest.raises(TargetError) as error:
        check_types(target(name), activations, weights)
    assert str(error.value) == message


def test_fp8_runs_where_the_refusal_sends_the_user() -> None:
    check_types(target("h100"), Dtype.FLOAT8E4M3FN, Dtype.FLOAT8E4M3FN)


def test_a_recipe_in_fp8_is_refused_for_a800_before_any_work() -> None:
    recipe = load_recipe("int8", ["activations.dtype=float8e4m3fn", "weights.dtype=float8e4m3fn"])
    with pytest.raises(TargetError, match="a800"):
        resolve(recipe, target("a800"))


def test_an_unknown_target_names_the_known_ones() -> None:
    with pytest.raises(TargetError, match="unknown target 'a900'; choose one of a800, a100, h100"):
        target("a900")
