"""What the linter reports."""

from __future__ import annotations

import enum

import msgspec


class Severity(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """TensorRT refuses the graph, or computes something else than the graph says."""

    WARNING = "warning"
    """TensorRT runs the graph as it is, but slower, larger or less accurate than it could."""


class Repair(enum.StrEnum):
    """Whether `fix` can repair a finding."""

    NONE = "none"
    """A person has to."""

    EXACT = "exact"
    """The graph computes the same afterwards, within float rounding."""

    APPROXIMATE = "approximate"
    """Values are rounded to another grid of the same range afterwards, or no longer."""


class Finding(msgspec.Struct, frozen=True):
    """One place where a graph breaks one rule.

    Attributes:
        rule: "E1" to "E14", "W1" to "W13".
        severity: see `Severity`.
        node: the name of the ONNX node or graph input; `node_of_` and the name of its first output where it has none,
            as TensorRT calls it.
        message: what is wrong.
        remedy: what to do.
        repair: whether `fix` does it.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    remedy: str
    repair: Repair = Repair.NONE

    @property
    def fixable(self) -> bool:
        """Whether `fix` repairs it."""
        return self.repair is not Repair.NONE


class Fix(msgspec.Struct, frozen=True):
    """One repair that was made.

    Attributes:
        rule: the rule that the graph broke.
        node: where, named as in `Finding`.
        description: what was done.
        exact: whether the graph computes the same as before, within float rounding.
    """

    rule: str
    node: str
    description: str
    exact: bool
