r"""The value of the function whose gradient is in ``.grad``, watched on its way there.

Loops that call ``step()`` with no argument own the loss. There it is seen all the same: a forward
hook on the module that computes a loss :math:`\ell_k` puts a hook on its gradient, and when
``backward()`` is called on some :math:`f`, that hook is given :math:`g_k = \partial f/\partial
\ell_k`. Where :math:`f` is linear in the losses (their sum, mean, or any other weighting, over
modules, micro-batches or samples), :math:`f = \sum_k \langle g_k, \ell_k\rangle`. Adding up over
several calls of ``backward()``, as gradients add up in ``.grad``, gives the function that these are
the gradient of. What is evaluated without ``backward()`` adds nothing, nor does
``torch.autograd.grad()``.

Clear gradients with ``optimizer.zero_grad()``, which clears the sum with them: where others clear
them, this is noticed at the next ``backward()`` if they are ``None`` then, but not if they are
zeros, nor if parameters are sharded.
"""

import weakref
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle

from dfw_opt.backward import Backward, accumulates, in_backward
from dfw_opt.sharding import is_sharded

__all__ = ["LossWatch", "loss_of"]


class LossWatch:
    """Adds up the losses that are watched for an optimizer, from one step to the next."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._hooks: weakref.WeakSet[_ForwardHook] = weakref.WeakSet()
        self._sum: Tensor | None = None
        self._backward: Callable[[], Backward | None] = _nothing
        self._lock = Lock()  # backward() has a thread for each device

    @property
    def active(self) -> bool:
        """Whether a module is watched."""
        return any(hook.registered for hook in self._hooks)

    @property
    def has_seen(self) -> bool:
        """Whether there is a sum."""
        return self._sum is not None

    def add(
        self,
        module: nn.Module,
        get: Callable[[Any], Tensor | None],
        scaler: GradScaler | None,
    ) -> RemovableHandle:
        """Watches ``module`` from now on.

        Raises:
            TypeError: ``get`` cannot be called, or ``scaler`` is no gradient scaler.
            ValueError: ``module`` is watched already.
        """
        if not callable(get):
            raise TypeError(
                f"get={get!r} cannot be called; it must be a function that finds the loss in the "
                "output of the module, such as lambda output: output[0]"
            )
        if not isinstance(scaler, GradScaler | None):
            raise TypeError(
                f"scaler={scaler!r} must be a torch.amp.GradScaler, the one that scales the loss, "
                "or None"
            )
        if any(hook.registered and hook.module() is module for hook in self._hooks):
            raise ValueError(
                f"this {type(module).__name__} is watched already, and would count twice; remove() "
                "the handle of the first watch_loss before"
            )
        hook = _ForwardHook(self, module, get, scaler)
        self._hooks.add(hook)
        hook.handle = module.register_forward_hook(hook)
        return hook.handle

    def value(self, name: str) -> Tensor:
        """The sum since it was last cleared."""
        if self._sum is None:
            raise RuntimeError(
                f"{name}.step: no watched loss has been part of a backward() since the last step "
                "or zero_grad(). Watch the module whose output the loop calls backward() on, or "
                "pass the loss: optimizer.step(loss=loss)"
            )
        return self._sum

    def clear(self) -> None:
        """Begins a new sum."""
        self._sum = None

    def see(self, loss: Tensor, scaler: GradScaler | None, grad: Tensor) -> None:
        r"""Adds :math:`\langle g, \ell\rangle`."""
        if not accumulates(self._params()):
            return
        dtype = torch.promote_types(loss.dtype, torch.float32)
        g = grad.detach().to(dtype)
        # What does not count may be infinite.
        part = torch.where(g == 0, g, g * loss.to(dtype)).sum()
        if scaler is not None:
            part = part / scaler.scale(torch.ones_like(part))
        self.enter()
        with self._lock:
            self._sum = part if self._sum is None else self._sum + part.to(self._sum)

    def enter(self) -> None:
        """Called within a ``backward()``: when it is new, forgets what was discarded before."""
        if not in_backward():
            return
        with self._lock:
            # Reentrant checkpoints call backward() within backward(); what began first lasts.
            running = self._backward()
            if running is not None and not running.over:
                return
            backward = Backward.begun()
            self._backward = weakref.ref(backward)
            if self._discarded():
                self._sum = None

    def _discarded(self) -> bool:
        """At the start of a backward(), whether the gradients of earlier ones are no more."""
        # The gradient of a sharded parameter that is not synchronised waits elsewhere.
        return not any(p.grad is not None or is_sharded(p) for p in self._params())

    def _params(self) -> list[Tensor]:
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return [p for group in groups for p in group["params"]]


class _ForwardHook:
    """Keeps nothing alive: it may outlive the optimizer, and be copied with the module."""

    handle: RemovableHandle

    def __init__(
        self,
        watch: LossWatch,
        module: nn.Module,
        get: Callable[[Any], Tensor | None],
        scaler: GradScaler | None,
    ) -> None:
        self.watch, self.module = weakref.ref(watch), weakref.ref(module)
        self.get, self.scaler = get, scaler

    @property
    def registered(self) -> bool:
        hooks = self.handle.hooks_dict_ref()
        return hooks is not None and self.handle.id in hooks

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        watch = self.watch()
        if watch is None or not self._is_meant(module):
            return
        watch.enter()  # if it is recomputed, before a backward() within the one that does so
        if not torch.is_grad_enabled():
            return
        loss = self.get(output)
        if loss is None:
            return
        if not (isinstance(loss, Tensor) and loss.is_floating_point()):
            raise TypeError(
                f"the output of {type(module).__name__} has {type(loss).__name__} where the loss "
                "was to be watched; say where it is: optimizer.watch_loss(module, "
                "get=lambda output: ...)"
            )
        if loss.requires_grad:
            value = loss.detach().clone()  # the loop may divide it in place
            scaler = self.scaler
            loss.register_hook(  # type: ignore[no-untyped-call]
                lambda grad: watch.see(value, scaler, grad)
            )

    def _is_meant(self, module: nn.Module) -> bool:
        """Shallow copies have the same hooks; of these, only DataParallel's replicas count."""
        return module is self.module() or getattr(module, "_is_replica", False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Callable[..., None]":
        return _nothing

    def __reduce__(self) -> Any:
        return _copied, ()


def _nothing(*_: Any) -> None:
    """What a watched module's deep copy has for a hook: its loss is not the optimizer's."""


def _copied() -> Callable[..., None]:
    return _nothing


def loss_of(output: Any) -> Any:
    """The loss in what a criterion or a model returns."""
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return getattr(output, "loss", output)
