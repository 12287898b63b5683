"""Whether a checkpoint is one of this optimizer, for these parameters: decided before loading."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dfw_opt import sharding
from dfw_opt.validate import FIXED, check_settings, settings

if TYPE_CHECKING:
    from dfw_opt.lifecycle import LatentOptimizer

__all__ = ["aligned", "restore"]

_REMEDY = (
    "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict "
    "(StateDictOptions(full_state_dict=True) if it is whole)"
)


def aligned(incoming: Mapping[str, Any], optimizer: "LatentOptimizer") -> dict[str, Any]:
    """A state dict with its parameters in the order of the optimizer's groups. Sends no message.

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
    saved_groups, groups = incoming["param_groups"], optimizer.param_groups
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, "
            f"but this optimizer has {len(groups)}"
        )
    result = []
    for number, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        _check_group(number, saved, group, optimizer)
        ordered = _by_name(number, saved, group)
        result.append(ordered)
        for index, p in zip(ordered["params"], group["params"], strict=True):
            _check_state(incoming["state"].get(index, {}), p, optimizer, number)
    return {**incoming, "param_groups": result}


def _check_group(
    number: int, saved: Any, group: Mapping[str, Any], optimizer: "LatentOptimizer"
) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), list):
        raise ValueError(f"the checkpoint's parameter group {number} is none: it lacks 'params'")
    missing = sorted(optimizer.defaults.keys() & group.keys() - saved.keys() - {"differentiable"})
    if missing:
        raise ValueError(
            f"the checkpoint is of another optimizer: its parameter group {number} lacks {missing}"
        )
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of "
            f"optimizer's group: group {number} has {len(saved['params'])} parameters, but here "
            f"{len(group['params'])}"
        )
    check_settings(saved, optimizer.defaults)
    for name in FIXED:
        if saved.get(name) != group.get(name):
            raise ValueError(
                f"the checkpoint's parameter group {number} has {name}={saved.get(name)!r}, but "
                f"here it is {name}={group.get(name)!r}; make the optimizer as it was"
            )


def _by_name(number: int, saved: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """``saved`` in the order of ``group``, where both have names."""
    theirs, ours = saved.get("param_names"), group.get("param_names")
    if theirs is None or ours is None or theirs == ours:
        return saved
    if sorted(theirs) != sorted(ours):
        raise ValueError(
            f"parameter group {number} is of other parameters: the checkpoint's are {theirs}, but "
            f"here they are {ours}; make the groups as they were"
        )
    index = dict(zip(theirs, saved["params"], strict=True))
    return saved | {"params": [index[name] for name in ours], "param_names": ours}


def _check_state(state: Any, p: Tensor, optimizer: "LatentOptimizer", number: int) -> None:
    where = f"the checkpoint's state of a parameter of shape {tuple(p.shape)} in group {number}"
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} is {state!r}, not a dictionary")
    own = optimizer.state.get(p)
    found = state.keys() - {"plane_height"}
    if own is not None and found != own.keys():
        lacks, more = sorted(own.keys() - found), sorted(found - own.keys())
        raise ValueError(
            f"{where} lacks {lacks} and has {more} instead; if it was frozen when this was saved: "
            "freeze it, load, then unfreeze"
        )
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where} has {key} that is a {type(value).__name__}, not a tensor")
        shape = (
            p.shape
            if value.dim() and own is None
            else (own or {}).get(key, value.new_zeros(())).shape
        )
        if value.shape != shape:
            raise ValueError(f"{where} has {key} of shape {tuple(value.shape)}, not {tuple(shape)}")
        # A single number is the same on all processes, whether it says so or not.
        if value.dim() and not sharding.placed_alike(value, p):
            raise ValueError(
                f"{where} has {key} that is not sharded as the parameter is; {_REMEDY}"
            )
        if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
            raise ValueError(
                f"{where} has {key} that is sparse, not floating point, or has no values"
            )
        # Before the first step there is no plane.
        if key != "plane_height" and not sharding.local(value).isfinite().all():
            raise ValueError(f"{where} has {key} with NaN or infinite values")


@torch.inference_mode(False)
@torch.no_grad()
def restore(optimizer: "LatentOptimizer", loaded: Mapping[str, Any]) -> None:
    """Undoes what torch does to a loaded state: casts to the parameter's dtype, and sharing."""
    for saved, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            state = dict(loaded["state"].get(index, {}))
            if "plane_height" in state:
                optimizer._height.copy_(sharding.whole(state.pop("plane_height")))
            if not state:
                optimizer.state.pop(p, None)
                optimizer._written.pop(p, None)
                continue
            dtype = torch.promote_types(p.dtype, torch.float32)
            optimizer.state[p] = {
                key: sharding.placed_as_state(value.detach().to(p.device, dtype, copy=True), p)
                for key, value in state.items()
            }
            if "latent" in state:
                optimizer._quantize(group, [p])
                optimizer._written[p] = p._version
    optimizer._seen[:] = [settings(group) for group in optimizer.param_groups]
