"""Which weights of a model to quantize, and how each is to be read."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["param_groups"]

_log = logging.getLogger(__name__)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


def param_groups(model: nn.Module, skip: Skip | None = None) -> list[dict[str, Any]]:
    """Parameter groups: weights to quantize, and everything else.

    The group named ``"quantized"`` has the weights of convolutions and Linear layers, except the
    first and the last in the order of registration, which networks need in float. Transposed
    convolutions, whose output channels lie along the second dimension, have groups of their own.
    All else is in groups with ``quantizer=None, radius=None``, plain :class:`~dfw_opt.DFW`:
    ``"float"``; ``"embedding"``, whose tables are stepped row by row; ``"stack"``, for parameters
    of three or more dimensions that no convolution has, such as the matrices of experts, each of
    which is a matrix of its own. A weight that another kind of module shares (a tied embedding) is
    not quantized. Frozen weights are sorted like all others.

    Groups carry ``param_names``. The logger ``dfw_opt.param_groups`` tells at level INFO which
    parameters are quantized and which are not, and warns of matrices that cannot be: attention's
    ``in_proj_weight``, recurrent weights, stacked experts, and weights that are computed (pruned,
    parametrized).

    Args:
        model: the model, its parameters in place.
        skip: what to leave in float instead of the first and last layer: a name or names as in
            ``model.named_modules()``, where the name of a container stands for all layers in it; or
            a predicate that is given name and module. ``[]`` leaves out none.

    Returns:
        Groups for any of the three optimizers. :class:`~dfw_opt.DFW` quantizes none of them; the
        other two refuse groups that leave them nothing to quantize.

    Raises:
        TypeError: ``model`` is no module, or ``skip`` is a module or a class.
        ValueError: a name in ``skip`` matches no such layer.

    >>> from torch import Tensor, nn
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> [(group["name"], group["param_names"]) for group in param_groups(model)]
    [('quantized', ['1.weight']), ('float', ['0.weight', '0.bias', '1.bias', '2.weight', '2.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={type(model).__name__} must be a torch.nn.Module; pass the model itself, as in "
            "param_groups(model), rather than its parameters"
        )
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and "weight" in module._parameters
    }
    skipped = _skipped(layers, skip)
    # Of each parameter, what every module that holds it makes of it: these must agree.
    uses: dict[int, set[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                quantizable = name in layers and name not in skipped and key == "weight"
                uses.setdefault(id(p), set()).add(_use(module, p, quantizable))
    groups: dict[tuple[str, Any], dict[str, Any]] = {("quantized", None): _group("quantized")}
    for name, p in model.named_parameters():
        use = uses[id(p)].pop() if len(uses[id(p)]) == 1 else ("float", None)
        group = groups.setdefault(use, _group(*use))
        group["params"].append(p)
        group["param_names"].append(name)
    for group in groups.values():
        _log.info("%s: %s", group["name"], ", ".join(group["param_names"]) or "none")
    _warn_of_matrices(model)
    return list(groups.values())


def _use(module: nn.Module, p: Tensor, quantizable: bool) -> tuple[str, Any]:
    """The name of the group that a parameter belongs to, and what tells it from others alike."""
    if quantizable:
        transposed = isinstance(module, _TRANSPOSED)
        return ("quantized transposed", module.groups) if transposed else ("quantized", None)
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "embedding", None
    stacked = p.dim() > 2 and min(p.shape[-2:]) > 1 and not isinstance(module, _LAYERS)
    return ("stack" if stacked else "float"), None


def _group(name: str, channels: Any = None) -> dict[str, Any]:
    group: dict[str, Any] = {"name": name, "params": [], "param_names": []}
    if name == "quantized transposed":
        return group | {"scale_axis": 1, "scale_groups": channels}
    if name == "quantized":
        return group
    layout = {"embedding": "rows", "stack": "stack"}.get(name, "matrix")
    return group | {"quantizer": None, "radius": None, "layout": layout}


def _warn_of_matrices(model: nn.Module) -> None:
    """Of what a user may expect to be quantized, and is not."""
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) and "weight" not in module._parameters:
            _log.warning("%s stays float: its weight is computed, not a parameter", name)
        for key, p in module._parameters.items():
            matrix = p is not None and p.dim() > 1 and min(p.shape[-2:]) > 1
            if matrix and not isinstance(module, (*_LAYERS, nn.Embedding, nn.EmbeddingBag)):
                full = f"{name}.{key}" if name else key
                _log.warning("%s stays float: it is no Conv or Linear layer's", full)


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
