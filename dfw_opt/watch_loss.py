r"""The loss that a loop backpropagates, for loops that call ``step()`` without an argument.

Where f is linear in the watched losses, ``f.backward()`` gives each a gradient :math:`g_k`, and
:math:`f = \sum_k\langle g_k, \ell_k\rangle`. A term counts when next a parameter of the optimizer
accumulates a gradient, if the graph of its loss has one: ``torch.autograd.grad()`` adds nothing.

Not right: a watched module in another (both count); a criterion alone in a reentrant checkpoint (it
is not seen); gradients that others than the optimizer set to 0, not ``None`` (the sum goes on); and
a loss whose gradient went elsewhere (``torch.autograd.grad()``, an error) between the forward and
the backward of another, or anywhere where parameters are sharded (it counts with the other).
"""

import weakref
from collections import OrderedDict, abc
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def loss_of(output: Any) -> Any:
    """The loss in what a criterion or a model returns: its ``"loss"``, its ``.loss``, or itself."""
    has_key = isinstance(output, abc.Mapping) and "loss" in output
    return output["loss"] if has_key else getattr(output, "loss", output)


class LossWatch:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._handles = weakref.ref(optimizer), list[RemovableHandle]()
        self._modules = OrderedDict[int, tuple[str, weakref.ref[nn.Module]]]()
        self.clear()

    @property
    def active(self) -> bool:
        return len(self._modules) > 0

    def add(self, module: nn.Module, get: abc.Callable[[Any], Any], scaler: Any) -> RemovableHandle:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{module=} must be a torch.nn.Module, such as nn.CrossEntropyLoss()")
        if not callable(get):
            raise TypeError(f"{get=} cannot be called; write get=lambda output: output[0], say")
        if not isinstance(scaler, torch.amp.GradScaler | None):
            raise TypeError(f"{scaler=} must be the loop's torch.amp.GradScaler, or None")
        if any(known() is module for _, known in self._modules.values()):
            raise ValueError(f"this {type(module).__name__} is watched already")
        handle = module.register_forward_hook(_Hook(LossWatch._see, self, get, scaler))
        handle.extra_dict_ref = (weakref.ref(self._modules),)  # remove() ends both
        self._modules[handle.id] = type(module).__name__, weakref.ref(module)
        return handle

    def value(self, name: str) -> Tensor:
        if self._terms:
            return sum((term.to(self._terms[0]) for term in self._terms[1:]), self._terms[0])
        why = "no watched loss has been part of a backward() since the last step or zero_grad()"
        for kind in (kind for kind, known in self._modules.values() if known() is None):
            why = f"the watched {kind} is no more: keep a reference to it, and call that one"
        raise RuntimeError(f"{name}.step: {why} in the loop; or write optimizer.step(loss=loss)")

    def clear(self) -> None:
        self._terms, self._pending = list[Tensor](), dict[Tensor, Tensor]()
        while self._handles:
            self._handles.pop().remove()

    def _see(self, get: Any, scaler: Any, module: nn.Module, _: Any, output: Any) -> None:
        loss: Any = get(output) if self and torch.is_grad_enabled() else None
        if loss is not None and not getattr(loss, "is_floating_point", bool)():
            kinds = f"{type(module).__name__} has {type(loss).__name__}"
            raise TypeError(f"the output of {kinds} for a loss: pass get=lambda output: output[0]")
        if loss is None or not loss.requires_grad or (optimizer := self._optimizer()) is None:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        sharded = any(hasattr(p, "device_mesh") for p in params)  # the graph has other tensors
        ends, seen, nodes = (
            {"CheckpointFunctionBackward", *params},
            set(),
            [loss.view_as(loss).grad_fn],
        )
        while (
            nodes and not sharded and getattr(nodes[-1], "variable", nodes[-1].name()) not in ends
        ):
            nodes += (new := {node for node, _ in nodes.pop().next_functions if node} - seen)
            seen |= new
        before, value = {} if sharded else {**self._pending}, loss.detach().clone()  # it may change

        def weigh(grad: Tensor) -> None:
            for old in (old for old, term in before.items() if self._pending.get(old) is term):
                del self._pending[old]  # whose backward() is over, and reached no parameter
            if not sharded and all(p.grad is None for p in params):
                self._terms.clear()
            g = grad.detach().to(torch.promote_types(value.dtype, torch.float32))
            term = torch.where(g == 0, g, g * value.to(g.dtype)).sum()  # for 0 * inf is not 0
            self._pending[value] = term / scaler.scale(torch.ones_like(term)) if scaler else term
            if not self._handles:
                live = (p for p in params if p.requires_grad)
                self._handles = [p.register_post_accumulate_grad_hook(self._count) for p in live]

        if nodes:
            loss.register_hook(weigh)

    def _count(self, *_: Any) -> None:
        pending, self._pending = self._pending, {}
        self._terms += pending.values()


class _Hook(partial[None]):
    def __reduce__(self) -> Any:  # copies of a module are not watched
        return _Hook, (LossWatch._see, None, loss_of, None)
