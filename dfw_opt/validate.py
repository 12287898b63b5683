"""Checks of settings, parameters and the loss: errors name the argument, its value, what to do."""

import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfw_opt import sharding
from dfw_opt.quantizers import QUANTIZERS, quantizer_of

if TYPE_CHECKING:
    from dfw_opt.lifecycle import LatentOptimizer

# Name: (test of a finite number, what the number must be).
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "lr": (lambda x: x >= 0, "at least 0"),
    "momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "eps": (lambda x: x >= 0, "at least 0"),
    "radius": (lambda x: x > 0, "greater than 0, or None for no box"),
    "relaxation": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "threshold": (lambda x: 0 <= x < 1, "in [0, 1)"),
    "bits": (
        lambda x: isinstance(x, int) and 2 <= x <= 8,
        'a whole number from 2 to 8; for 1 bit, quantizer="binary"',
    ),
    "scale_groups": (lambda x: isinstance(x, int) and x >= 1, "a whole number, at least 1"),
}
_CHOICES = {
    "norm": ("spectral", "euclidean"),
    "step_size": ("exact", "closed_form"),
    "layout": ("matrix", "rows", "stack"),
}
FIXED = ("norm", "quantizer", "layout", "scale_axis", "scale_groups")
"""Settings that decide what the state of a parameter means."""
_CHANGING = ("lr", "momentum", "weight_decay", "eps", "radius", "step_size", "relaxation")
# Settings that not all optimizers have, and one that does.
_BOTH = dict.fromkeys(
    ("quantizer", "radius", "step_size", "relaxation"), "ProjectedDFW or TernaryDFW"
)
_HOMES = {**_BOTH, "threshold": "TernaryDFW", "bits": "ProjectedDFW"}
_USAGE = (
    "write optimizer.step(loss=loss) after loss.backward(), or optimizer.step(closure) with a "
    "closure that calls backward() and returns the loss, or optimizer.watch_loss(criterion) once "
    "where the loop that calls step() is not yours"
)


def check_group(
    group: Mapping[str, Any], given: Mapping[str, Any], optimizer: "LatentOptimizer"
) -> None:
    """Checks a new group, and what the user gave for it."""
    check_settings(group, optimizer.defaults)
    if given.get("bits") is not None and group["quantizer"] != "uniform":
        raise ValueError(
            f"bits={given['bits']!r} is for quantizer='uniform', but the group has "
            f"quantizer={group['quantizer']!r}"
        )
    _check_shared(group, optimizer.param_groups[0])
    for p in group["params"]:
        if p.requires_grad:
            _check_parameter(p, group)


def _check_shared(group: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    for name in ("norm", "eps", *(("momentum",) if group["norm"] == "spectral" else ())):
        if group[name] != first[name]:
            raise ValueError(
                f"{name}={group[name]!r} differs from the first group's {first[name]!r}, but "
                "counts once for all groups; give it to the optimizer"
            )


def check_groups(optimizer: "LatentOptimizer") -> None:
    """Checks what only all groups of a new optimizer together tell."""
    groups, default = optimizer.param_groups, optimizer.defaults
    quantized = [group for group in groups if group.get("quantizer") is not None]
    if default.get("bits") is not None and all(g["quantizer"] != "uniform" for g in quantized):
        raise ValueError(
            f"bits={default['bits']!r} needs quantizer='uniform', but it is "
            f"quantizer={default['quantizer']!r}"
        )
    if quantized and not any(group["params"] for group in quantized):
        raise ValueError(
            f"the group {quantized[0].get('name')!r} to be quantized is empty: by default "
            "dfw_opt.param_groups leaves the first and last Conv and Linear layer in float, "
            "and layers whose weight is computed; param_groups(model, skip=[]) leaves out "
            f"none, and {type(optimizer).__name__}(..., quantizer=None) quantizes none"
        )


def check_settings(group: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Checks the values in ``group`` for an optimizer whose defaults are ``known``."""
    for name, home in _HOMES.items():
        if name not in known and group.get(name) is not None:
            raise ValueError(f"{name}={group[name]!r} is no setting of this optimizer; use {home}")
    for name in _RANGES.keys() & known.keys() & group.keys():
        if not (name in ("radius", "bits") and group[name] is None):
            _check_number(name, group[name], *_RANGES[name])
    for choice in _CHOICES.keys() & known.keys():
        if group.get(choice) not in _CHOICES[choice]:
            raise ValueError(
                f"{choice}={group.get(choice)!r} must be one of {list(_CHOICES[choice])}"
            )
    axes = group.get("scale_axis", 0)
    axes = axes if isinstance(axes, tuple) else (axes,)
    if not axes or any(type(axis) is not int or axis < 0 for axis in axes):
        raise ValueError(
            f"scale_axis={group['scale_axis']!r} must be a dimension, at least 0, or a tuple of "
            "them"
        )
    if (kind := group.get("quantizer")) is not None and "quantizer" in known:
        available = [key for key, (_, keys) in QUANTIZERS.items() if {*keys} <= known.keys()]
        if kind not in available:
            homes = [_HOMES[key] for key in QUANTIZERS.get(kind, (None, ()))[1] if key in _HOMES]
            remedy = f"; use {homes[0]}" if homes else ""
            raise ValueError(f"quantizer={kind!r} must be None or one of {available}{remedy}")


def _check_number(name: str, value: Any, test: Callable[[float], bool], meaning: str) -> None:
    if isinstance(value, Tensor):
        if name != "lr":
            raise ValueError(f"{name}={value!r} must be a plain number, not a tensor")
        if value.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, but has shape {tuple(value.shape)}")
        if value.device.type != "cpu":  # reading it would wait for the device
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r} must be a plain number, {meaning}")
    # Not math.isfinite(), which overflows for an integer that no float can hold.
    if not (-sys.float_info.max <= value <= sys.float_info.max and test(value)):
        raise ValueError(f"{name}={value!r} must be {meaning}")


def _check_parameter(p: Tensor, group: Mapping[str, Any]) -> None:
    where, name = f"a parameter of shape {tuple(p.shape)}", group.get("quantizer")
    if not p.is_floating_point():
        raise TypeError(
            f"{where} has dtype {p.dtype}; only real floating-point parameters can be trained"
        )
    if getattr(p, "_fsdp_flattened", False):
        raise TypeError(
            f"{where} is a piece of several that FullyShardedDataParallel has joined; shard the "
            "model with torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    quantizer = quantizer_of(group)
    if quantizer is None:
        return
    if p.dim() < 2 or max(quantizer.axis, default=0) >= p.dim():
        raise ValueError(
            f"{where} is in a group with quantizer={name!r} and "
            f"scale_axis={group['scale_axis']!r}, which needs at least 2 dimensions; leave biases "
            "and norms in a float group, as dfw_opt.param_groups(model) does"
        )
    if p.shape[0] % quantizer.groups:
        raise ValueError(f"scale_groups={quantizer.groups} does not divide the first of {where}")
    if p.is_meta:
        raise ValueError(
            f"{where} in a group with quantizer={name!r} is on the meta device and has no values "
            "to quantize; make the model real (to_empty(), then initialise it) before the optimizer"
        )
    if sharding.is_sharded(p) and quantizer.groups > 1:
        raise ValueError(f"scale_groups={quantizer.groups}: {where} must not be sharded")
    if not p.numel():
        return
    if not sharding.all_finite(p):
        raise ValueError(
            f"{where} in a group with quantizer={name!r} holds NaN or infinity; initialise the "
            "model before making the optimizer"
        )
    levels = {"binary": 2, "ternary": 3}.get(str(name), 2 ** (group.get("bits") or 1))
    if sharding.is_sharded(p) or p.numel() < 8 * levels:
        return
    channels = p.numel() // quantizer.channel_size(p.detach().unsqueeze(0))
    if 1 < torch.unique(p.detach()).numel() <= min(p.numel() // 4, channels * levels):
        warnings.warn(
            f"{where} in a group with quantizer={name!r} is quantized already, so the latents "
            "start at its levels, far from where they could flip. If this is a second optimizer "
            "for the same model, make the model anew first, or load the state of the first one",
            stacklevel=7,
        )


def groups_to_relax(optimizer: "LatentOptimizer", relaxation: float) -> list[dict[str, Any]]:
    """The quantized groups, if ``relaxation`` can be set."""
    _check_number("relaxation", relaxation, *_RANGES["relaxation"])
    groups = [group for group in optimizer.param_groups if group.get("quantizer") is not None]
    if not groups:
        raise ValueError(
            f"relaxation={relaxation!r}: no group of this {type(optimizer).__name__} is quantized, "
            "so there is nothing to relax"
        )
    return groups


def describe(optimizer: torch.optim.Optimizer) -> str:
    """As torch's ``repr()``, without the options that a group has no use for."""
    lines = []
    for number, group in enumerate(optimizer.param_groups):
        name, norm = group.get("quantizer"), group.get("norm")
        idle = {"params", "param_names"} | ({"step_size"} if norm == "spectral" else {"layout"})
        if name is None:
            idle |= {"relaxation", "scale_axis", "scale_groups"}
            idle |= set() if group.get("radius") else {"step_size"}
        own = QUANTIZERS[name][1] if name in QUANTIZERS else ()
        idle |= {key for _, keys in QUANTIZERS.values() for key in keys} - {*own}
        lines += [f"Parameter Group {number}: {len(group['params'])} parameters"]
        lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in idle]
    return "\n".join([f"{type(optimizer).__name__} (", *lines, ")"])


def loss_of_step(optimizer: "LatentOptimizer", closure: Any, loss: Any) -> tuple[Any, Any]:
    """What a step is to return, and the loss to step by: passed, the closure's, or watched."""
    name, watch = type(optimizer).__name__, optimizer._watch
    if closure is not None and loss is not None:
        raise TypeError(f"{name}.step takes a closure or a loss, not both: {_USAGE}")
    if loss is not None:
        return loss, _checked("the loss", loss)
    if closure is None:
        if watch.active:
            return None, watch.value(name)
        if sharding.is_probe(optimizer):
            return None, 0.0
        raise TypeError(f"{name}.step needs the loss: {_USAGE}")
    if not callable(closure):
        raise TypeError(f"{name}.step: the closure, {closure!r}, cannot be called: {_USAGE}")
    with torch.enable_grad():
        loss = closure()
    # Frameworks that call backward() themselves pass closures that return nothing. The closure's
    # result may be that of the last micro-batch alone, so that what was watched comes first.
    if loss is not None or not watch.active:
        _checked("the closure's result", loss)
    return loss, watch.value(name) if watch.active else loss


def _checked(source: str, loss: Any) -> Any:
    if not isinstance(loss, Tensor | int | float):
        raise TypeError(f"{source} is {loss!r}; it must be a real scalar tensor or a number")
    if isinstance(loss, Tensor) and loss.is_complex():
        raise TypeError(f"{source} has dtype {loss.dtype}; it must be real")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"{source} has shape {tuple(loss.shape)}; it must be a scalar: reduce it before "
            "backward(), for example with loss.mean()"
        )
    return loss


def before_step(optimizer: "LatentOptimizer", *_: Any) -> None:
    """Checks what may have been changed since the last step: settings, and parameters."""
    if torch.compiler.is_compiling():
        return
    for number, group in enumerate(optimizer.param_groups):
        seen = _settings(group)
        before = optimizer._seen.get(number, seen)
        if seen != before:
            check_settings(group, optimizer.defaults)
            for name, value, old in zip(FIXED, seen, before, strict=False):
                if value != old:
                    raise ValueError(
                        f"{name}={value!r} was {old!r}: it cannot change once it has been chosen; "
                        "make a new optimizer"
                    )
            _check_shared(group, optimizer.param_groups[0])
            optimizer._seen[number] = seen
        for p in group["params"]:
            unfrozen = p.grad is not None and p not in optimizer.state
            if unfrozen and group.get("quantizer") is not None:
                _check_parameter(p, group)
    optimizer._late = overwritten(optimizer)  # other ranks wait for this one: warn when they have


def _settings(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a group may not change, and what may; tensors are not looked at."""
    values = map(group.get, (*FIXED, *_CHANGING, "bits", "threshold"))
    return tuple(None if isinstance(value, Tensor) else value for value in values)


def after_step(optimizer: "LatentOptimizer", *_: Any) -> None:
    """Warns, once each, of steps that cannot do what they are meant to."""
    if torch.compiler.is_compiling():
        return
    note_written(optimizer)
    optimizer._watch.clear()
    warn(optimizer._late)
    if optimizer._ell.device.type == "cpu" and -math.inf < float(optimizer._ell) < 0:
        _warn_once(
            optimizer,
            f"the loss is negative ({float(optimizer._ell):.3g}): a step goes to where the loss, "
            "made linear, reaches zero, so γ is 0 and nothing is learnt. Pass the loss less a "
            "lower bound: optimizer.step(loss=loss - bound)",
        )
    if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
        _warn_once(
            optimizer,
            "no parameter has a gradient, so that the step changed nothing; was loss.backward() "
            "called, after optimizer.zero_grad()?",
        )


def _warn_once(optimizer: "LatentOptimizer", text: str) -> None:
    if (kind := text[:20]) not in optimizer._warned:
        optimizer._warned.add(kind)
        warnings.warn(text, stacklevel=4)


def note_written(optimizer: "LatentOptimizer") -> None:
    """Remembers at which version each quantized parameter was written, and new groups' settings."""
    for number in range(len(optimizer._seen), len(optimizer.param_groups)):
        optimizer._seen[number] = _settings(optimizer.param_groups[number])
    for p in _whole_quantized(optimizer):
        optimizer._written[p] = p._version


def overwritten(optimizer: "LatentOptimizer") -> list[str]:
    """Puts back Q(u) where others have written to a quantized parameter, and says so.

    Parameters in parts are not looked at: to compare them all ranks are needed, and one rank alone
    may have been written to.
    """
    texts = []
    for p in _whole_quantized(optimizer):
        if optimizer._written.get(p, p._version) == p._version:
            continue
        optimizer._written[p] = p._version
        before = p.detach().clone()
        (group,) = (g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        with torch.no_grad():
            optimizer._quantize(group, [p])
        if not torch.equal(p, before):
            texts.append(
                f"a quantized parameter of shape {tuple(p.shape)} was changed from outside since "
                "the last step. The change is lost: the optimizer's latents know nothing of it. "
                "Load weights before making the optimizer"
            )
    return texts


def warn(texts: list[str]) -> None:
    """Warns of each."""
    for text in texts:
        warnings.warn(text, stacklevel=4)


def _whole_quantized(optimizer: "LatentOptimizer") -> list[Tensor]:
    return [
        p
        for group in optimizer.param_groups
        if group.get("quantizer") is not None
        for p in group["params"]
        if p in optimizer.state and not sharding.is_sharded(p)
    ]
