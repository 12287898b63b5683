"""Checks of settings and parameters: errors name the argument, its value, what to do."""

import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfw_opt import sharding
from dfw_opt.quantizers import QUANTIZERS, quantizer_of

if TYPE_CHECKING:
    from dfw_opt.lifecycle import LatentOptimizer

Group = Mapping[str, Any]
# Name: (test of a finite number, what the number must be).
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("lr", "weight_decay", "eps"), (lambda x: x >= 0, "at least 0")),
    **dict.fromkeys(("momentum", "threshold"), (lambda x: 0 <= x < 1, "in [0, 1)")),
    "radius": (lambda x: x > 0, "greater than 0, or None for no box"),
    "relaxation": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "bits": (lambda x: type(x) is int and 2 <= x <= 8, 'whole, 2 to 8; for 1 bit: "binary"'),
    "scale_groups": (lambda x: type(x) is int and x >= 1, "a whole number, at least 1"),
}
_CHOICES = {
    "norm": ("spectral", "euclidean"),
    "step_size": ("exact", "closed_form"),
    "layout": ("matrix", "rows", "stack"),
}
FIXED = ("norm", "quantizer", "layout", "scale_axis", "scale_groups")
"""Settings that decide what the state of a parameter means."""
# Settings that not all optimizers have, and one that does.
_HOMES = {"threshold": "TernaryDFW", "bits": "ProjectedDFW"} | dict.fromkeys(
    ("quantizer", "radius", "step_size", "relaxation"), "ProjectedDFW or TernaryDFW"
)


def check_group(group: Group, given: Group, optimizer: "LatentOptimizer") -> None:
    """Checks a new group, and what the user gave for it."""
    check_settings(group, optimizer.defaults)
    _check_bits(given.get("bits"), [group])
    check_shared(group, optimizer.param_groups[0])
    for p in (p for p in group["params"] if p.requires_grad):
        _check_parameter(p, group)


def check_shared(group: Group, first: Group) -> None:
    for name in ("norm", "eps", "momentum")[: 3 if group["norm"] == "spectral" else 2]:
        if group[name] != first[name]:
            differs = f"{name}={group[name]!r} differs from the first group's {first[name]!r}"
            raise ValueError(f"{differs}, but counts once for all: give every group the same")


def _check_bits(bits: Any, groups: Sequence[Group]) -> None:
    kinds = {str(group.get("quantizer")) for group in groups}
    if bits is not None and "uniform" not in kinds:
        raise ValueError(f"bits={bits!r} needs quantizer='uniform', but it is {sorted(kinds)}")


def check_groups(optimizer: "LatentOptimizer") -> None:
    """Checks what only all groups of a new optimizer together tell."""
    _check_bits(optimizer.defaults.get("bits"), optimizer.param_groups)
    quantized = [g for g in optimizer.param_groups if g.get("quantizer") is not None]
    if quantized and not any(group["params"] for group in quantized):
        raise ValueError(
            f"the group {quantized[0].get('name')!r} to be quantized is empty: param_groups leaves "
            "the first and last Conv and Linear layer in float (skip=[] leaves out none), and "
            "every layer whose weight is computed (weight_norm, pruning), whatever skip is: remove "
            f"that first; or {type(optimizer).__name__}(..., quantizer=None) quantizes none"
        )


def check_settings(group: Group, known: Group) -> None:
    """Checks the values in ``group`` for an optimizer whose defaults are ``known``."""
    for name, home in _HOMES.items():
        if name not in known and group.get(name) is not None:
            raise ValueError(f"{name}={group[name]!r} is no setting of this optimizer; use {home}")
    free = ["radius", "threshold"] + ["bits"] * (group.get("quantizer") != "uniform")
    for name in _RANGES.keys() & known.keys() & group.keys():
        if not (name in free and group[name] is None):
            _check_number(name, group[name], *_RANGES[name])
    for choice in _CHOICES.keys() & known.keys():
        if (value := group.get(choice)) not in _CHOICES[choice]:
            raise ValueError(f"{choice}={value!r} must be one of {list(_CHOICES[choice])}")
    axes = group.get("scale_axis", 0)
    axes = axes if isinstance(axes, tuple) else (axes,)
    if not axes or any(type(axis) is not int or axis < 0 for axis in axes):
        raise ValueError(f"scale_axis={group['scale_axis']!r} must be a dimension, or a tuple")
    if (kind := group.get("quantizer")) is not None and "quantizer" in known:
        available = [key for key, (_, keys) in QUANTIZERS.items() if {*keys} <= known.keys()]
        if kind not in available:
            homes = [_HOMES[key] for key in QUANTIZERS.get(kind, (None, ()))[1] if key in _HOMES]
            remedy = f"; use {homes[0]}" if homes else ""
            raise ValueError(f"quantizer={kind!r} must be None or one of {available}{remedy}")


def _check_number(name: str, value: Any, test: Callable[[float], bool], meaning: str) -> None:
    if isinstance(value, Tensor) and name == "lr":
        if value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, but has shape {tuple(value.shape)}")
        if value.device.type != "cpu":  # reading it would wait for the device
            return
        value = value.item()
    if isinstance(value, bool) or not issubclass(type(value), Real):
        raise ValueError(f"{name}={value!r} must be a plain number, {meaning}")
    value = value if isinstance(value, int) else float(value)
    # Not math.isfinite(), which overflows for an integer that no float can hold.
    if not (-sys.float_info.max <= value <= sys.float_info.max and test(value)):
        raise ValueError(f"{name}={value!r} must be {meaning}")


def _check_parameter(p: Tensor, group: Group) -> None:
    where, name = f"a parameter of shape {tuple(p.shape)}", group.get("quantizer")
    if not p.is_floating_point():
        raise TypeError(f"{where} has dtype {p.dtype}; it must be real floating point, or frozen")
    if getattr(p, "_fsdp_flattened", False):
        how = "torch.distributed.fsdp.fully_shard (FSDP2)"
        raise TypeError(f"{where} is flattened by FullyShardedDataParallel; shard with {how}")
    if (quantizer := quantizer_of(group)) is None:
        return
    where, sharded = f"{where} is in a group with quantizer={name!r}", sharding.is_sharded(p)
    if p.dim() < 2 or max(quantizer.axis, default=0) >= p.dim():
        how = "leave biases and norms in a float group, as dfw_opt.param_groups(model) does"
        axis = f"scale_axis={group['scale_axis']!r}"
        raise ValueError(f"{where} and {axis}, which needs at least 2 dimensions; {how}")
    if p.shape[0] % quantizer.groups or (sharded and quantizer.groups > 1):
        need = "must divide its first dimension, and be 1 if it is sharded"
        raise ValueError(f"{where} and scale_groups={quantizer.groups}, which {need}")
    if p.is_meta:
        how = "call to_empty() and initialise the model before the optimizer"
        raise ValueError(f"{where}, but on the meta device, without values; {how}")
    if sharding.whole((~p.isfinite()).sum()):
        raise ValueError(f"{where} and holds NaN or infinity; initialise it before the optimizer")
    if sharded or not p.numel():
        return
    levels = {"binary": 2, "ternary": 3}.get(str(name), 2 ** (group.get("bits") or 1))
    axes = [*(quantizer.axis or (0,))]
    some = p.detach().movedim(axes, [*range(len(axes))]).flatten(0, len(axes) - 1)[:8, ..., None]
    distinct = 1 + some.flatten(1).sort(1).values.diff(dim=1).ne(0).sum(1).max()  # in a channel
    if some[0].numel() >= 2 * levels and 1 < distinct <= levels:
        warnings.warn(
            f"{where} and quantized already, so latents would start far from where they can flip. "
            "For a second optimizer make the model anew, or load the state of the first one",
            stacklevel=7,
        )


def settings(group: Group) -> dict[str, Any]:
    """What of a group is checked; tensors are not looked at."""
    names = (*FIXED, *_RANGES, "step_size")
    return {k: Tensor if isinstance(group.get(k), Tensor) else group.get(k) for k in names}


def before_step(optimizer: "LatentOptimizer", *_: Any) -> None:
    """Checks what may have been changed since the last step: settings, and parameters."""
    if torch.compiler.is_compiling():
        return
    groups = optimizer.param_groups
    changed = [
        (group, seen)
        for group, seen in zip(groups, optimizer._seen, strict=True)
        if any(group.get(k) is not x and settings(group) != seen for k, x in seen.items())
    ]
    for group, seen in changed:
        for name in FIXED:
            if (value := group.get(name)) != seen[name]:
                was = f"{name}={value!r} was {seen[name]!r}"
                raise ValueError(f"{was} and cannot change; make a new optimizer")
        check_settings(group, optimizer.defaults)
    for group in groups if changed else ():  # once, not for each that a scheduler has changed
        check_shared(group, groups[0])
    for group, seen in changed:
        seen |= settings(group)
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and not optimizer.state.get(p):
                _check_parameter(p, group)  # frozen until now
    if any(p._version != version for p, version in optimizer._written.items()):
        optimizer._late = overwritten(optimizer)  # others wait for this rank: warn when they have


def after_step(optimizer: "LatentOptimizer", *_: Any) -> None:
    """Warns, once each, of steps that cannot do what they are meant to."""
    if optimizer._watch.active:
        optimizer._watch.clear()
    if torch.compiler.is_compiling():
        return
    for p in optimizer._written:
        optimizer._written[p] = p._version
    texts, optimizer._late = optimizer._late, []
    if optimizer._ell.device.type == "cpu" and -math.inf < float(optimizer._ell) < 0:
        texts.append(
            f"the loss is negative ({float(optimizer._ell):.3g}): a step goes to where the loss, "
            "made linear, reaches zero, so γ is 0 and nothing is learnt. Pass the loss less a "
            "lower bound: optimizer.step(loss=loss - bound)"
        )
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        texts.append("no parameter has a gradient, so nothing changed; was loss.backward() called?")
    for text in texts:
        if (kind := text[:12]) not in optimizer._warned:
            warnings.warn(text, stacklevel=3)
            optimizer._warned |= {kind} - {"a quantized "}  # of those, each


@torch.no_grad()
def overwritten(optimizer: "LatentOptimizer") -> list[str]:
    """Puts back Q(u) where others have written to a quantized parameter, and says so."""
    texts = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer._written.get(p, p._version) == p._version or sharding.is_sharded(p):
                continue  # a change on one rank alone would have to be known to all
            before = p.detach().clone()
            optimizer._write(p, group)
            if not torch.allclose(p, before, rtol=4 * torch.finfo(p.dtype).eps, atol=0.0):
                texts.append(
                    f"a quantized parameter of shape {tuple(p.shape)} was changed from outside: "
                    "its latents have undone that. Load weights before making the optimizer"
                )
    return texts
