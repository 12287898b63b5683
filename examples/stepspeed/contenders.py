"""The optimizers that are compared."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

from .original import OriginalDFW

NONE, CAP, SEARCH = "", "cap", "search"
"""Where γ lies: there is none, at its end point 1, between 0 and 1."""


@dataclass(frozen=True)
class Contender:
    """An optimizer with its settings."""

    name: str
    make: Callable[[list[Parameter]], Optimizer]
    state: int
    """How many numbers it keeps per parameter; for the estimate of the memory."""
    situations: tuple[str, ...] = (NONE,)

    @property
    def constrained(self) -> bool:
        """Whether it decides what values its parameters have, so that it must have its own."""
        return SEARCH in self.situations


def _boxed(params: list[Parameter]) -> Optimizer:
    """All weights in one box, which is about as large as they are."""
    radius = statistics.median(float(p.detach().abs().max()) for p in params if p.dim() > 1)
    return ProjectedDFW(params, quantizer=None, radius=radius)


def _quantized(
    optimizer: Callable[..., Optimizer], **settings: Any
) -> Callable[[list[Parameter]], Optimizer]:
    """Leaves vectors and the first and last matrix in float, unless that leaves none."""

    def make(params: list[Parameter]) -> Optimizer:
        matrices = [p for p in params if p.dim() > 1]
        chosen = set(matrices[1:-1] or matrices)
        rest = [p for p in params if p not in chosen]
        groups: list[dict[str, Any]] = [{"params": [p for p in params if p in chosen]}]
        if rest:
            groups.append({"params": rest, "quantizer": None, "radius": None})
        return optimizer(groups, **settings)

    return make


_BOTH = (CAP, SEARCH)

CONTENDERS = (
    Contender("sgd", partial(SGD, momentum=0.9), 1),
    Contender("sgd-foreach", partial(SGD, momentum=0.9, foreach=True), 1),
    Contender("sgd-fused", partial(SGD, momentum=0.9, fused=True), 1),
    Contender("adamw", AdamW, 2),
    Contender("adamw-foreach", partial(AdamW, foreach=True), 2),
    Contender("adamw-fused", partial(AdamW, fused=True), 2),
    Contender("dfw-original", OriginalDFW, 1, (CAP,)),
    Contender("dfw-unfused", partial(DFW, fused=False), 1, (CAP,)),
    Contender("dfw", DFW, 1, (CAP,)),
    Contender("dfw-decay", partial(DFW, weight_decay=1e-4), 1, (CAP,)),
    Contender("box", _boxed, 1, _BOTH),
    Contender("binary", _quantized(ProjectedDFW), 2, _BOTH),
    Contender("binary-closed", _quantized(ProjectedDFW, step_size="closed_form"), 2, _BOTH),
    Contender("ternary", _quantized(TernaryDFW), 2, _BOTH),
)
REFERENCES = ("adamw-fused", "sgd-foreach")
"""What the others are divided by; always measured."""


def choose(names: Sequence[str] | None) -> list[Contender]:
    """Those called ``names`` and the references; all if ``names`` is ``None``."""
    return [c for c in CONTENDERS if names is None or c.name in names or c.name in REFERENCES]
