"""The loss that a loop backpropagates, for loops that call ``step()`` without an argument.

A term counts when a parameter of the optimizer next gets a gradient, if its loss's graph has one.
Not right: a watched module in another (both count); a criterion alone in a reentrant checkpoint (it
is not seen); gradients that others than the optimizer set to 0, not ``None`` (the sum goes on); two
``backward()`` at once, by threads; a loss whose gradient went elsewhere (``torch.autograd.grad()``,
an error) between forward and backward of another, or, if sharded, before (it counts with that).
"""

import weakref
from collections import OrderedDict, abc
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def loss_of(output: Any) -> Any:
    """The loss in what a criterion or a model returns: its ``"loss"``, its ``.loss``, or itself."""
    has_key = isinstance(output, abc.Mapping) and "loss" in output
    return output["loss"] if has_key else getattr(output, "loss", output)


class LossWatch:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._handles = weakref.ref(optimizer), list[RemovableHandle]()
        self._modules = OrderedDict[int, tuple[str, weakref.ref[torch.nn.Module]]]()
        self._terms: list[torch.Tensor] = []
        self._pending: dict[torch.Tensor, torch.Tensor] = {}  # by losses, what may yet count

    active = property(lambda self: len(self._modules) > 0)  # whether a module is watched

    def add(self, module: torch.nn.Module, get: Any, scaler: Any) -> RemovableHandle:
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"{module=} must be a torch.nn.Module, such as nn.CrossEntropyLoss()")
        if not callable(get):
            raise TypeError(f"{get=} cannot be called; write get=lambda output: output[0], say")
        if not isinstance(scaler, torch.amp.GradScaler | None):
            raise TypeError(f"{scaler=} must be the loop's torch.amp.GradScaler, or None")
        if any(known() is module for _, known in self._modules.values()):
            raise ValueError(f"this {type(module).__name__} is watched already")
        handle = module.register_forward_hook(_Hook(LossWatch._see, self, get, scaler))
        handle.extra_dict_ref += (weakref.ref(self._modules),)  # remove() ends both
        self._modules[handle.id] = type(module).__name__, weakref.ref(module)
        return handle

    def value(self, name: str) -> torch.Tensor:
        if self._terms:
            return sum((term.to(self._terms[0]) for term in self._terms[1:]), self._terms[0])
        why = "no watched loss has been part of a backward() since the last step or zero_grad()"
        for kind in (kind for kind, known in self._modules.values() if known() is None):
            why = f"the watched {kind} is no more: keep a reference to it, and call that one"
        raise RuntimeError(f"{name}.step: {why} in the loop; or write optimizer.step(loss=loss)")

    def clear(self) -> None:
        self._terms, self._pending = [], {}

    def _see(self, get: Any, scaler: Any, module: Any, _: Any, output: Any) -> None:
        loss: Any = get(output) if self and torch.is_grad_enabled() else None
        if loss is not None and not getattr(loss, "is_floating_point", bool)():
            kinds = f"{type(module).__name__} has {type(loss).__name__}"
            raise TypeError(f"the output of {kinds} for a loss: pass get=lambda output: output[0]")
        if loss is None or not loss.requires_grad or (optimizer := self._optimizer()) is None:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        sharded = any(hasattr(p, "device_mesh") for p in params)  # the graph has others for them
        nodes, seen = [] if sharded else [loss.view_as(loss).grad_fn], set[Any]()
        ends = {"CheckpointFunctionBackward", *map(id, params)}  # reentrant: hides what it holds
        while nodes and ends.isdisjoint([id(getattr(nodes[-1], "variable", 0)), nodes[-1].name()]):
            nodes += (new := {node for node, _ in nodes.pop().next_functions if node} - seen)
            seen |= new
        before = {} if sharded else {**self._pending}
        value = loss.detach().to(torch.promote_types(loss.dtype, torch.float32), copy=True)

        def weigh(grad: torch.Tensor) -> None:
            for old in (old for old, term in before.items() if self._pending.get(old) is term):
                del self._pending[old]  # whose backward() is over, and reached no parameter
            if not sharded and all(p.grad is None for p in params):
                self._terms.clear()
            while self._handles and not self._pending:
                self._handles.pop().remove()
            live = [p for p in params if p.requires_grad and not self._handles]
            self._handles += [p.register_post_accumulate_grad_hook(self._count) for p in live]
            term = torch.where(grad == 0, 0, grad.detach() * value).sum()  # 0 * inf is not 0
            self._pending[value] = term / scaler.scale(torch.ones_like(term)) if scaler else term

        if nodes or sharded:
            loss.register_hook(weigh)

    def _count(self, *_: Any) -> None:
        pending, self._pending = self._pending, {}
        self._terms += pending.values()


class _Hook(partial[None]):
    def __reduce__(self) -> Any:  # copies of a module are not watched
        return _Hook, (LossWatch._see, None, loss_of, None)
