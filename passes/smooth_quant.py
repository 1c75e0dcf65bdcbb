"""SmoothQuant: factors that share the difficulty of a tensor between its channels and the weights that read them.

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)

From: Xiao et al., "SmoothQuant", ICML 2023, equation 4. alpha = 1 makes all channels equally wide; alpha = 0 does that
to the rows of the weights. The maximum over the weights is taken over all layers that read the tensor.

What the paper leaves open:

* a common factor changes nothing for a scale per tensor: factors are divided by their geometric mean, so that weights
  and activations keep their size;
* a row of weights next to zero, or a channel that was silent in calibration, would get a factor without bounds: maxima
  count as 1e-5 of the largest at least, and factors stay within 1e-3 and 1e3;
* `auto` takes the alpha with the least error in the results of the layers, `qonnx.group_error.GroupError`, or none.
"""

from __future__ import annotations

import enum

import msgspec
import numpy as np

from qonnx.errors import RecipeError
from qonnx.group_error import Choice, GroupError, Ranges, Samples, Vector, best
from qonnx.groups import SmoothGroup

_SMALLEST = 1e-5
_LIMIT = 1e3

# Every tenth, then the neighbours of the best in between.
_COARSE = tuple(alpha / 10 for alpha in range(11))
_FINE = 0.05


class Alpha(enum.StrEnum):
    """How alpha is found where it is not given."""

    AUTO = "auto"


class SmoothQuant(msgspec.Struct, frozen=True, tag_field="kind", tag="smoothquant", forbid_unknown_fields=True):
    """See the module docstring.

    Attributes:
        alpha: between 0 and 1, or `auto`. Common values are 0.5, and 0.75 to 0.9 for models with many outliers.
        nodes: whether a group may cost a Mul at run time.
    """

    alpha: float | Alpha = Alpha.AUTO
    nodes: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, Alpha) and not 0 <= self.alpha <= 1:
            raise RecipeError(f"smoothquant: alpha must be between 0 and 1, or auto, not {self.alpha}")

    def choose(self, group: SmoothGroup, ranges: Ranges, error: GroupError, samples: Samples) -> Choice | None:
        """The factors of a group; None where it is best left alone."""
        if group.no_scale:
            return None
        if not isinstance(self.alpha, Alpha):
            return self._choice(group, ranges, self.alpha)
        if not error.measurable:
            return None
        coarse = best((self._choice(group, ranges, alpha) for alpha in _COARSE), error)
        near = [a for a in (coarse.parameter - _FINE, coarse.parameter + _FINE) if 0 <= a <= 1]
        return best((coarse, *(self._choice(group, ranges, alpha) for alpha in near)), error)

    def _choice(self, group: SmoothGroup, ranges: Ranges, alpha: float) -> Choice:
        scale = np.ones(group.producer.size)
        scale[group.free] = smoothing_factors(ranges.reach[group.free], ranges.weight[group.free], alpha)
        return Choice(scale, np.zeros_like(scale), round(alpha, 3), f"SmoothQuant, alpha {alpha:g}")


def smoothing_factors(reach: Vector, weight: Vector, alpha: float) -> Vector:
    """[channels] the factors s, with a geometric mean of 1.

    Args:
        reach: [channels] max |X_j|.
        weight: [channels] max |W_j|.
        alpha: between 0 and 1.

    >>> smoothing_factors(np.array([1.0, 16.0]), np.array([1.0, 1.0]), 0.5)
    array([0.5, 2. ])
    """
    reach, weight = (np.maximum(values, _SMALLEST * (values.max(initial=0) or 1.0)) for values in (reach, weight))
    logarithm = alpha * np.log(reach) - (1 - alpha) * np.log(weight)
    return np.asarray(np.clip(np.exp(logarithm - logarithm.mean()), 1 / _LIMIT, _LIMIT))
