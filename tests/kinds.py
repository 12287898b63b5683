"""Ready-made optimizers, and the marks that run a test for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

FLOAT_GROUP: dict[str, Any] = {"quantizer": None, "radius": None}

NORMS = ("spectral", "euclidean")


@dataclass(frozen=True, eq=False)
class Kind:
    """An optimizer with settings; if it quantizes, vectors go into a float group."""

    name: str
    optimizer: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    quantized: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def norm(self) -> str:
        return str(self.settings["norm"])

    def groups(self, params: Iterable[Tensor]) -> list[dict[str, Any]]:
        params = list(params)
        if not self.quantized:
            return [{"params": params}]
        matrices = [p for p in params if p.dim() >= 2]
        rest = [p for p in params if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}] if matrices else []
        return groups + ([{"params": rest, **FLOAT_GROUP}] if rest else [])

    def make(self, params: Iterable[Tensor], **overrides: Any) -> Any:
        return self.optimizer(self.groups(params), **{**self.settings, **overrides})


def _kinds(norm: str) -> list[Kind]:
    """All networks in one norm."""
    closed = {"step_size": "closed_form"}
    kinds: list[tuple[str, Any, dict[str, Any], bool]] = [
        ("dfw", DFW, {}, False),
        ("box", ProjectedDFW, {"quantizer": None, "radius": 0.5}, False),
        ("binary", ProjectedDFW, {}, True),
        ("uniform", ProjectedDFW, {"quantizer": "uniform", "bits": 3}, True),
        ("ternary", TernaryDFW, {}, True),
    ]
    if norm == "euclidean":  # the spectral norm has no search
        kinds += [
            ("binary_closed_form", ProjectedDFW, closed, True),
            ("ternary_closed_form", TernaryDFW, closed, True),
        ]
    return [
        Kind(f"{name}-{norm}", optimizer, {"norm": norm, **settings}, quantized)
        for name, optimizer, settings, quantized in kinds
    ]


KINDS = [kind for norm in NORMS for kind in _kinds(norm)]
QUANTIZED_KINDS = [kind for kind in KINDS if kind.quantized]
MAIN_KINDS = [kind for kind in KINDS if kind.name.split("-")[0] in ("dfw", "binary", "ternary")]

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
MAIN = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
BOTH_NORMS = pytest.mark.parametrize("norm", NORMS)
CLASSES = pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
QUANTIZING = pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
