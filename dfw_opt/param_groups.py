"""Which weights of a model to quantize, and how each is to be read."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

_log = logging.getLogger(__name__)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_FLOAT: dict[str, Any] = {"name": "float", "quantizer": None, "radius": None, "layout": "matrix"}
Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


def param_groups(model: nn.Module, skip: Skip | None = None) -> list[dict[str, Any]]:
    """Parameter groups: weights to quantize, and everything else.

    The group named ``"quantized"`` has the weights of convolutions and Linear layers, except the
    first and the last in the order of registration, which networks need in float. Transposed
    convolutions, whose output channels lie along the second dimension, have groups of their own.
    All else is in groups with ``quantizer=None, radius=None``, plain :class:`~dfw_opt.DFW`:
    ``"float"``; ``"embedding"``, tables that are stepped row by row; ``"stack"``, parameters of
    three or more dimensions that no convolution has, such as experts, each a matrix of its own. A
    weight that another kind of module shares (a tied embedding) is float. The logger
    ``dfw_opt.param_groups`` lists the groups at level INFO, and warns of matrices that cannot be
    quantized: attention's ``in_proj_weight``, recurrent weights, experts, and computed weights.

    Args:
        model: the model, its parameters in place.
        skip: what to leave in float instead of the first and last layer: names as in
            ``model.named_modules()``, a container's for all layers in it, or one of them; or a
            predicate that is given name and module. ``[]`` leaves out none.

    Returns:
        Groups, with ``param_names``: :class:`~dfw_opt.DFW` quantizes none, the others need some.

    Raises:
        TypeError: ``model`` is no module, or ``skip`` is a module or a class.
        ValueError: a name in ``skip`` matches no such layer.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    >>> [(group["name"], group["param_names"]) for group in param_groups(model)]
    [('quantized', ['1.weight']), ('float', ['0.weight', '0.bias', '1.bias', '2.weight', '2.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={type(model).__name__} must be an nn.Module: param_groups(model)")
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, _LAYERS)]
    layers = {name: modules[name] for name in linear if "weight" in modules[name]._parameters}
    quantized = layers.keys() - _skipped(layers, skip)
    # Of each parameter, what every module that holds it makes of it: these must agree.
    uses: dict[Tensor, set[tuple[tuple[str, Any], ...]]] = {}
    for name, module in modules.items():
        if name in linear and name not in layers:
            _log.warning("%s stays float: its weight is computed, not a parameter", name)
        for key, p in [(k, p) for k, p in module._parameters.items() if p is not None]:
            use = _use(module, p, name in quantized and key == "weight")
            uses.setdefault(p, set()).add(tuple(use.items()))
            matrix = p.dim() > 1 and min(p.shape[-2:]) > 1
            if matrix and not isinstance(module, (*_LAYERS, *_TABLES)):
                full = f"{name}.{key}".lstrip(".")
                _log.warning("%s stays float: it is no Conv or Linear layer's", full)
    first = {"name": "quantized", "params": [], "param_names": []}
    groups: dict[Any, dict[str, Any]] = {(("name", "quantized"),): first}
    for name, p in model.named_parameters():
        use = _FLOAT if len(uses[p]) > 1 else dict(*uses[p])
        group = groups.setdefault(tuple(use.items()), {**use, "params": [], "param_names": []})
        group["params"].append(p)
        group["param_names"].append(name)
    for group in groups.values():
        _log.info("%s: %s", group["name"], ", ".join(group["param_names"]) or "none")
    return list(groups.values())


def _use(module: nn.Module, p: Tensor, quantizable: bool) -> dict[str, Any]:
    """The settings of the group that a parameter belongs to."""
    if quantizable and isinstance(module, _TRANSPOSED):
        return {"name": "quantized transposed", "scale_axis": 1, "scale_groups": module.groups}
    if quantizable:
        return {"name": "quantized"}
    if isinstance(module, _TABLES):
        return _FLOAT | {"name": "embedding", "layout": "rows"}
    if p.dim() > 2 and min(p.shape[-2:]) > 1 and not isinstance(module, _LAYERS):
        return _FLOAT | {"name": "stack", "layout": "stack"}
    return _FLOAT


def _skipped(layers: dict[str, nn.Module], skip: Skip | None) -> set[str]:
    names = list(layers)
    if skip is None:
        return {*names[:1], *names[-1:]}
    if isinstance(skip, type | nn.Module):
        say = "lambda name, module: isinstance(module, nn.Linear)"
        raise TypeError(f"skip={skip!r} must be names, or a predicate such as {say}")
    if callable(skip):
        return {name for name, layer in layers.items() if skip(name, layer)}
    skipped: set[str] = set()
    for wanted in [skip] if isinstance(skip, str) else skip:
        if not isinstance(wanted, str):
            raise TypeError(f"skip: {wanted!r} must be a name as in model.named_modules()")
        prefix = wanted.removesuffix(".weight")
        matches = {name for name in layers if name == prefix or name.startswith(f"{prefix}.")}
        if not matches:
            raise ValueError(f"skip: {wanted!r} matches no Conv or Linear layer; there are {names}")
        skipped |= matches
    return skipped
