"""Whether a checkpoint is one of this optimizer, for these parameters: decided before loading."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dfw_opt.quantizers import QUANTIZERS
from dfw_opt.sharding import all_finite, is_sharded, placed_alike
from dfw_opt.validate import SETTINGS, check_hyperparameters, options_of

__all__ = ["check_checkpoint", "momentum_key"]


_REMEDY = (
    "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict "
    "(StateDictOptions(full_state_dict=True) if it is whole)"
)


def momentum_key(variable: str) -> str:
    """Where the state keeps the momentum of ``variable``: a key, or "" for the parameter itself."""
    return "momentum_buffer" if variable in ("", "latent") else f"{variable}_momentum_buffer"


def check_checkpoint(
    incoming: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
) -> None:
    """Checks a state dict against the groups that are to take it.

    Raises:
        ValueError: it is not a state dict, or of another optimizer, or of other parameters.
    """
    if not (
        isinstance(incoming.get("param_groups"), list) and isinstance(incoming.get("state"), dict)
    ):
        raise ValueError(
            "not an optimizer's state dict: it needs 'state' and 'param_groups', as "
            f"optimizer.state_dict() returns them, but has {sorted(map(str, incoming))}"
        )
    saved_groups = incoming["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, "
            f"but this optimizer has {len(groups)}"
        )
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_group(number, saved, group, defaults)
        for index, p in zip(saved["params"], group["params"], strict=True):
            _check_state(incoming["state"].get(index, {}), p, saved, number)


def _check_group(
    number: int, saved: Mapping[str, Any], group: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
        raise ValueError(f"the checkpoint's parameter group {number} is none: it lacks 'params'")
    # Other defaults (foreach, and those that torch adds) do not change what a step computes.
    # Nor do options of quantizers that neither side uses: a checkpoint may be older than they are.
    quantizers = (saved.get("quantizer"), group.get("quantizer"))
    needed = SETTINGS | {option.name for q in quantizers for option in options_of(q)}
    missing = sorted((needed & set(defaults)) - set(saved))
    if missing:
        raise ValueError(
            f"the checkpoint is of another optimizer: its parameter group {number} lacks {missing}"
        )
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            f"loaded state dict contains a parameter group that doesn't match the size of "
            f"optimizer's group: group {number} has {len(saved['params'])} parameters, "
            f"but here {len(group['params'])}"
        )
    check_hyperparameters(saved, defaults)


def _check_state(
    state: Mapping[str, Any], p: Tensor, saved: Mapping[str, Any], number: int
) -> None:
    where = f"the checkpoint's state of a parameter of shape {tuple(p.shape)} in group {number}"
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} is {state!r}, not a dictionary")
    shapes = _state_shapes(p, saved)
    if p.requires_grad and not set(shapes) <= set(state):
        raise ValueError(
            f"{where} lacks {sorted(set(shapes) - set(state))}; if it was frozen when this was "
            "saved: freeze it, load, then unfreeze"
        )
    trained = [""] if saved.get("quantizer") is None else QUANTIZERS[saved["quantizer"]].variables
    shapes |= {momentum_key(key): shapes.get(key, p.shape) for key in trained}
    unknown = set(state) - set(shapes)
    if unknown:
        raise ValueError(f"{where} is of another optimizer: it holds {sorted(unknown)}")
    for key, value in state.items():
        shape = shapes[key]
        if not isinstance(value, Tensor) or value.shape != shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where} has {key} of shape {found}, not {tuple(shape)}")
        # A single number is the same on all processes, whether it says so or not.
        if is_sharded(value) != is_sharded(p) and (is_sharded(value) or value.dim() > 0):
            is_not = "not sharded" if is_sharded(p) else "sharded"
            raise ValueError(f"{where} has {key} that is {is_not}, unlike the parameter; {_REMEDY}")
        if shape == p.shape and not placed_alike(value, p):
            raise ValueError(
                f"{where} has {key} that is sharded otherwise than the parameter; {_REMEDY}"
            )
        if not value.is_floating_point():
            raise ValueError(f"{where} has {key} of dtype {value.dtype}, not floating point")
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{where} has {key} that is sparse, or without values")
        if not all_finite(value):
            raise ValueError(f"{where} has {key} with NaN or infinite values")


def _state_shapes(p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
    """What a quantizer keeps for ``p``."""
    if group.get("quantizer") is None:
        return {}
    meta = torch.empty(p.shape, dtype=p.dtype, device="meta")
    started = QUANTIZERS[group["quantizer"]].start(meta, group)
    return {key: value.shape for key, value in started.items()}
