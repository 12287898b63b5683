"""Whether a checkpoint is one of this optimizer, for these parameters: decided before loading."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dfw_opt import sharding
from dfw_opt.validate import FIXED, check_settings, check_shared, settings

_WRAP = re.compile(r"^(?:_orig_mod\.|module\.)+|_orig_mod\.")  # of wrappers, in names
_HOW = "load it with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"


def aligned(incoming: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """A state dict in the order of the optimizer's groups, or a ValueError. Sends no message."""
    theirs, states = incoming.get("param_groups"), incoming.get("state")
    if not isinstance(theirs, list) or not isinstance(states, dict):
        keys = sorted(map(str, incoming))
        raise ValueError(f"not an optimizer's state dict with 'state' and 'param_groups': {keys}")
    ours, groups = optimizer.param_groups, []
    a, b = len(theirs), len(ours)
    _need(a == b, f"the checkpoint has another number of parameter groups: {a}, not {b}")
    for number, (saved, group) in enumerate(zip(theirs, ours, strict=True)):
        where = f"the checkpoint's parameter group {number}"
        groups.append(_aligned(saved, group, optimizer, where))
        check_shared(groups[-1], groups[0])
        for index, p in zip(groups[-1]["params"], group["params"], strict=True):
            _check_state(states.get(index, {}), p, optimizer, where)
    return {**incoming, "param_groups": groups}


def _need(condition: Any, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _aligned(saved: Any, group: dict[str, Any], optimizer: Any, where: str) -> Any:
    """``saved``, in the order of ``group`` where both have names."""
    good = isinstance(saved, dict) and isinstance(saved.get("params"), list)
    _need(good, f"{where} is none: it lacks 'params'")
    lacks = sorted(optimizer.defaults.keys() & group.keys() - saved.keys() - {"differentiable"})
    _need(not lacks, f"{where} lacks {lacks}: it is of another optimizer")
    a, b = len(saved["params"]), len(group["params"])
    _need(a == b, f"{where} has {a} parameters, but here {b}")
    check_settings(saved, optimizer.defaults)
    for name in FIXED:
        was, now = saved.get(name), group.get(name)
        has = f"{where} has {name}={was!r}, but here {name}={now!r}"
        _need(was == now, f"{has}; make the optimizer as it was")
    theirs, ours = ([*(x.get("param_names") or ())] for x in (saved, group))
    if sorted(theirs) != sorted(ours):
        theirs, ours = ([_WRAP.sub("", name) for name in names] for names in (theirs, ours))
    if not theirs or not ours:
        return saved
    has = f"{where} is of the parameters {theirs}, but here it is of {ours}"
    _need(sorted(theirs) == sorted({*ours}), f"{has}; make the groups as they were")
    index = dict(zip(theirs, saved["params"], strict=True))
    return saved | {"params": [index[name] for name in ours], "param_names": group["param_names"]}


def _check_state(state: Any, p: Tensor, optimizer: Any, group: str) -> None:
    where = f"the state of a parameter of shape {tuple(p.shape)} in {group}"
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} is {state!r}, not a dictionary")
    _need(not state or not p.is_meta, f"{where} has no place on meta; call to_empty() first")
    own = optimizer.state.get(p, {})
    known = {"plane": optimizer._plane} | own
    differ = (state.keys() ^ own.keys()) - {"plane"}
    differ = sorted(k for k in differ if not k.endswith("momentum_buffer"))  # it may have been 0
    has = f"{where} and the optimizer's do not both have {differ}"
    how = "if it was frozen when this was saved: freeze it, load, then unfreeze"
    _need(not own or not differ, f"{has}; {how}")
    for key, value in state.items():
        has = f"{where} has {key}"
        _need(isinstance(value, Tensor), f"{has} that is a {type(value).__name__}, not a tensor")
        shape = known[key].shape if key in known else p.shape if value.dim() else torch.Size()
        _need(value.shape == shape, f"{has} of shape {tuple(value.shape)}, not {tuple(shape)}")
        # A single number is the same on all processes, whether it says so or not.
        placed = key == "plane" or not value.dim() or sharding.cut(value) == sharding.cut(p)
        _need(placed, f"{has} that is not sharded as the parameter is; {_HOW}")
        usable = value.layout == torch.strided and value.is_floating_point() and not value.is_meta
        _need(usable, f"{has} that is sparse, not floating point, or has no values")
        _need(sharding.local(value).isfinite().all(), f"{has} with NaN or infinite values")


@torch.inference_mode(False)
@torch.no_grad()
def restore(optimizer: Any, loaded: Mapping[str, Any]) -> None:
    """Undoes what torch does to a loaded state: casts to the parameter's dtype, and sharing."""
    optimizer._written.clear()
    for saved, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
        for index, p in zip(saved["params"], group["params"], strict=True):
            state = {key: value.detach() for key, value in loaded["state"].get(index, {}).items()}
            if "plane" in state:
                optimizer._plane.copy_(sharding.whole(state.pop("plane")))
            optimizer.state.pop(p, None)
            for key, value in state.items():
                wide = value.to(p.device, torch.promote_types(p.dtype, torch.float32), copy=True)
                optimizer.state[p][key] = sharding.placed_as_state(wide, p)
            if "latent" in state:
                optimizer._write(p, group)
    optimizer._seen[:] = [settings(group) for group in optimizer.param_groups]
