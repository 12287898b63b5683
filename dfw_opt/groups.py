"""Which weights of a model to quantize."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

__all__ = ["param_groups"]

_log = logging.getLogger(__name__)

_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


def param_groups(model: nn.Module, skip: Skip | None = None) -> list[dict[str, Any]]:
    """Two parameter groups: weights to quantize, and everything else.

    The group named ``"quantized"`` has the weights of convolutions and Linear layers, except the
    first and the last in the order of registration, which networks need in float. All other
    parameters, biases and norms included, are in the group named ``"float"``, whose
    ``quantizer=None, radius=None`` makes it plain :class:`~dfw_opt.DFW`. A weight that another
    kind of module shares (a tied embedding) is float too. The names are logged at level INFO by the
    logger ``dfw_opt.groups``; a layer whose weight is computed (pruned, parametrized) stays float,
    with a warning there. Frozen weights are sorted like all others; the optimizer leaves them alone
    until they are unfrozen.

    Args:
        model: the model, its parameters in place.
        skip: what to leave in float instead of the first and last layer: a name or names as in
            ``model.named_modules()``, where the name of a container stands for all layers in it; or
            a predicate that is given name and module. ``[]`` leaves out none.

    Returns:
        Groups for :class:`~dfw_opt.ProjectedDFW` or :class:`~dfw_opt.TernaryDFW`.

    Raises:
        TypeError: ``skip`` is a module or a class.
        ValueError: a name in ``skip`` matches no such layer, or nothing is left to quantize.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> [(group["name"], len(group["params"])) for group in param_groups(model)]
    [('quantized', 1), ('float', 5)]
    """
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and "weight" not in module._parameters:
            _log.warning("%s stays float: its weight is computed, not a parameter", name)
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and "weight" in module._parameters
    }
    skipped = _skipped(layers, skip)
    chosen = {
        id(layer._parameters["weight"]) for name, layer in layers.items() if name not in skipped
    }
    # A shared weight is quantized only if every module that holds it would be.
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if name not in layers or name in skipped or key != "weight":
                chosen.discard(id(p))

    quantized = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    others = {name: p for name, p in model.named_parameters() if id(p) not in chosen}
    if not quantized:
        raise ValueError(
            f"nothing is left to quantize of the {len(layers)} Conv and Linear layers "
            f"{list(layers)}: the first and last stay float by default; skip=[] quantizes all"
            if skip is None
            else f"skip={skip!r} leaves nothing to quantize of the layers {list(layers)}"
        )
    _log.info("quantized: %s", ", ".join(quantized))
    _log.info("float: %s", ", ".join(others))
    groups: list[dict[str, Any]] = [{"name": "quantized", "params": list(quantized.values())}]
    if others:
        groups.append(
            {"name": "float", "params": list(others.values()), "quantizer": None, "radius": None}
        )
    return groups


def _skipped(layers: dict[str, nn.Module], skip: Skip | None) -> set[str]:
    if skip is None:
        names = list(layers)
        return {*names[:1], *names[-1:]}
    if isinstance(skip, type | nn.Module):
        raise TypeError(
            f"skip={skip!r} must be names, or a predicate such as "
            "lambda name, module: isinstance(module, nn.Linear)"
        )
    if callable(skip):
        return {name for name, layer in layers.items() if skip(name, layer)}
    skipped: set[str] = set()
    for wanted in [skip] if isinstance(skip, str) else skip:
        if not isinstance(wanted, str):
            raise TypeError(f"skip: {wanted!r} must be a name as in model.named_modules()")
        prefix = wanted.removesuffix(".weight")
        matches = {name for name in layers if name == prefix or name.startswith(f"{prefix}.")}
        if not matches:
            raise ValueError(
                f"skip: {wanted!r} matches no Conv or Linear layer of the model; it has "
                f"{list(layers)}"
            )
        skipped |= matches
    return skipped
