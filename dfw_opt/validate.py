"""Checks of settings: every error names the argument, its value, and what to write instead."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dfw_opt.quantizers import QUANTIZERS, Option
from dfw_opt.sharding import all_finite

__all__ = [
    "SETTINGS",
    "all_options",
    "check_hyperparameters",
    "check_options",
    "check_parameters",
    "check_relaxation",
    "options_of",
]

STEP_SIZES = ("exact", "closed_form")

# Name: (test of a finite number, what the number must be).
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: x >= 0, "at least 0"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "eps": (lambda x: x >= 0, "at least 0"),
    "radius": (lambda x: x > 0, "greater than 0, or None for no box"),
    "relaxation": (lambda x: 0 <= x <= 1, "in [0, 1]"),
}

SETTINGS = frozenset({*_RANGES, "quantizer", "step_size"} - {"relaxation"})
"""The hyper-parameters that decide what a step computes, but for options of quantizers, and but for
the relaxation, which counts as 0 where a checkpoint is older than it."""

# Settings that not all optimizers have, and one that does.
_SPECIAL = {
    "quantizer": "ProjectedDFW or TernaryDFW",
    "radius": "ProjectedDFW or TernaryDFW",
    "step_size": "ProjectedDFW or TernaryDFW",
    "relaxation": "ProjectedDFW or TernaryDFW",
}


def check_hyperparameters(group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Checks the values in ``group`` for an optimizer whose defaults are ``known``.

    Raises:
        ValueError: a value is out of range, or names nothing.
    """
    options = all_options()
    homes = _SPECIAL | {name: option.optimizer for name, option in options.items()}
    for name, optimizer in homes.items():
        if name not in known and group.get(name) is not None:
            raise ValueError(
                f"{name}={group[name]!r} is no setting of this optimizer; use {optimizer}"
            )
    for name in known:
        if name in _RANGES and name in group and not (name == "radius" and group[name] is None):
            _check_number(name, group[name], *_RANGES[name])
        elif name in options and name in group:
            _check_number(name, group[name], options[name].test, options[name].meaning)
    for name in ("foreach", "fused"):
        if not (group.get(name) is None or isinstance(group[name], bool)):
            raise ValueError(f"{name}={group[name]!r} must be True, False or None")
    if group.get("foreach") and group.get("fused"):
        raise ValueError("foreach=True and fused=True: choose one of the two")
    if "step_size" in known and group["step_size"] not in STEP_SIZES:
        raise ValueError(f"step_size={group['step_size']!r} must be one of {list(STEP_SIZES)}")
    if "quantizer" in known:
        _check_quantizer(group["quantizer"], known)


def check_options(group: Mapping[str, Any]) -> None:
    """Checks what the quantizer of ``group`` reads anew at every step.

    Raises:
        ValueError: a value is out of range.
    """
    for option in options_of(group.get("quantizer")):
        _check_number(option.name, group[option.name], option.test, option.meaning)
    if group.get("quantizer") is not None:
        check_relaxation(group.get("relaxation", 0.0))


def check_relaxation(value: Any) -> None:
    """Checks what quantized parameters are relaxed by.

    Raises:
        ValueError: it is not a number in [0, 1].
    """
    _check_number("relaxation", value, *_RANGES["relaxation"])


def all_options() -> dict[str, Option]:
    """The options of all quantizers, by name."""
    return {option.name: option for q in QUANTIZERS for option in options_of(q)}


def options_of(quantizer: Any) -> tuple[Option, ...]:
    """The options of the quantizer of that name; none if there is no such."""
    known = isinstance(quantizer, str) and quantizer in QUANTIZERS
    return QUANTIZERS[quantizer].options if known else ()


def check_parameters(group: Mapping[str, Any]) -> None:
    """Checks that the parameters of ``group`` suit its quantizer.

    Raises:
        TypeError: a parameter is complex, not floating point, or flattened by FSDP1.
        ValueError: a parameter to be quantized has fewer than two dimensions, or is not finite.
    """
    quantizer = group.get("quantizer")
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}; "
                "only real floating-point parameters can be trained"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} is a piece of several that "
                "FullyShardedDataParallel has joined; shard the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2) instead"
            )
        if quantizer is None:
            continue
        if p.dim() < 2:
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is in a group with "
                f"quantizer={quantizer!r}, which needs at least 2 dimensions; leave biases and "
                "norms in a float group, as dfw_opt.param_groups(model) does"
            )
        if p.device.type != "meta" and not all_finite(p):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} in a group with quantizer={quantizer!r} "
                "holds NaN or infinity; initialise the model before making the optimizer"
            )


def _check_number(name: str, value: Any, test: Callable[[float], bool], meaning: str) -> None:
    if isinstance(value, Tensor):
        if name != "lr":
            raise ValueError(f"{name}={value!r} must be a plain number, not a tensor")
        if value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, but has shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r} must be a plain number, {meaning}")
    if not (_finite(value) and test(value)):
        raise ValueError(f"{name}={value!r} must be {meaning}")


def _finite(value: float) -> bool:
    # Not math.isfinite(), at which torch.compile would break its graph, and which overflows for an
    # integer that no float can hold.
    return -sys.float_info.max <= value <= sys.float_info.max


def _check_quantizer(quantizer: Any, known: Mapping[str, Any]) -> None:
    if quantizer is None:
        return
    available = [
        name for name in QUANTIZERS if {option.name for option in options_of(name)} <= set(known)
    ]
    if quantizer not in available:
        lacking = [o for o in options_of(quantizer) if o.name not in known]
        remedy = f"; use {lacking[0].optimizer}" if lacking else ""
        raise ValueError(f"quantizer={quantizer!r} must be None or one of {available}{remedy}")
