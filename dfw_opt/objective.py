"""Which loss a step is made for: the one that was passed, a closure's, or the watched one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfw_opt.watch import LossWatch

__all__ = ["value_of_loss"]

_USAGE = (
    "write optimizer.step(loss=loss) after loss.backward(), or optimizer.step(closure) with a "
    "closure that calls backward() and returns the loss, or optimizer.watch_loss(criterion) once "
    "where the loop that calls step() is not yours"
)


def value_of_loss(
    name: str,
    closure: Callable[[], Tensor | float | None] | None,
    loss: Tensor | float | None,
    watch: LossWatch,
) -> tuple[Tensor | float, Tensor | float | None]:
    """The loss of a step of the optimizer called ``name``.

    Returns:
        The loss by which to step, and what the step is to return: what was passed, or what the
        closure returned. A closure may return ``None`` where the loss is watched.

    Raises:
        TypeError: both of ``closure`` and ``loss`` were given, or neither and none is watched; or
            the closure cannot be called; or the loss is no real number.
        ValueError: the loss is not a scalar.
        RuntimeError: the loss is watched, but has taken part in no ``backward()``.
    """
    if closure is not None and loss is not None:
        raise TypeError(f"{name}.step takes a closure or a loss, not both: {_USAGE}")
    if closure is None and loss is None and not watch.active:
        raise TypeError(f"{name}.step needs the loss: {_USAGE}")
    if closure is not None:
        if not callable(closure):
            raise TypeError(f"{name}.step: the closure, {closure!r}, cannot be called: {_USAGE}")
        with torch.enable_grad():
            loss = closure()
        # Frameworks that call backward() themselves pass closures that return nothing.
        if loss is not None or not watch.active:
            _check("the closure's result", loss)
    elif loss is not None:
        _check("the loss", loss)
        return loss, loss
    if watch.active:
        # Rather than the closure's result, which may be that of the last micro-batch alone.
        return watch.value(name), loss
    assert loss is not None
    return loss, loss


def _check(source: str, loss: Any) -> None:
    if not isinstance(loss, Tensor | int | float):
        raise TypeError(f"{source} is {loss!r}; it must be a real scalar tensor or a number")
    if isinstance(loss, Tensor) and loss.is_complex():
        raise TypeError(f"{source} has dtype {loss.dtype}; it must be real")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(
            f"{source} has shape {tuple(loss.shape)}; it must be a scalar: reduce it before "
            "backward(), for example with loss.mean()"
        )
