"""Calibrator: for every tensor the range, of those other calibrators give, that disturbs the reading layers least."""

from __future__ import annotations

import msgspec

from qonnx.calibrators.average import Average
from qonnx.calibrators.entropy import Entropy
from qonnx.calibrators.minmax import MinMax
from qonnx.calibrators.mse import MSE
from qonnx.calibrators.percentile import Percentile
from qonnx.errors import RecipeError


class Auto(msgspec.Struct, frozen=True, tag_field="kind", tag="auto", forbid_unknown_fields=True):
    """Tries several calibrators on a held-back batch, tensor by tensor; `qonnx.auto_ranges` does the trying.

    Which calibrator is best differs between the tensors of one network: entropy is good for convolutions and harmful
    where a few large elements carry the result (Wu et al., arXiv 2004.09602, table 5). The error of the tensor itself
    does not tell; that of the layer that reads it does.

    Attributes:
        candidates: what to try.
    """

    candidates: tuple[MinMax | Average | Percentile | Entropy | MSE, ...] = (
        MinMax(),
        Average(),
        Percentile(99.999),
        Percentile(99.99),
        Percentile(99.9),
        Entropy(),
        MSE(),
    )

    def __post_init__(self) -> None:
        if not self.candidates:
            raise RecipeError("calibrator auto: candidates is empty; name at least one calibrator, or leave it out")
