r"""One :math:`\gamma` for all ranks: the loss of a step is the mean of the ranks' losses.

Data parallel training averages the gradients over the ranks, so they are those of the mean loss,
and :math:`\gamma` needs its value. A rank that took its own loss instead would compute another
:math:`\gamma`, and its weights would drift away from the others' without a word. One number is all
that has to be sent. It travels while gradients are pulled back and summed.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed import ProcessGroup
else:

    class ProcessGroup:  # type: ignore[no-redef]
        """What a torch that was built without torch.distributed has no instance of."""


__all__ = ["ProcessGroup", "Ranks", "check_process_group", "mean_loss", "scalar"]

Ranks = ProcessGroup | Literal["world"] | None
"""Over which ranks a loss is averaged: all, those of a group, or no others."""


def check_process_group(process_group: object) -> None:
    """Checks an argument of an optimizer.

    Raises:
        TypeError: it is neither a process group of which this process is a member, nor ``"world"``,
            nor ``None``.
    """
    if process_group is None or process_group == "world":
        return
    if not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group={process_group!r} must be 'world' (all ranks, if torch.distributed is "
            "initialised), a ProcessGroup that this rank is a member of, or None (this rank alone)"
        )


def mean_loss(
    loss: Tensor | float, device: torch.device, process_group: Ranks
) -> Callable[[], Tensor | float]:
    """Starts to average ``loss`` over the ranks.

    Args:
        loss: this rank's, a scalar.
        device: where to send it from.
        process_group: as :func:`check_process_group` allows it.

    Returns:
        A function that waits for the mean and returns it. It is the same number on all ranks.
    """
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return lambda: loss
    group = None if isinstance(process_group, str) else process_group
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return lambda: loss
    # In one type on all ranks, whatever they were given.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = scalar(loss, device, dtype)
    work = dist.all_reduce(total, group=group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return total / ranks

    return wait


def scalar(loss: Tensor | float, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """A loss as a new 0-dim tensor."""
    if isinstance(loss, Tensor):
        return loss.detach().reshape(()).to(device, dtype, copy=True)
    if abs(loss) > torch.finfo(dtype).max:  # which torch refuses to round
        loss = math.inf
    return torch.full((), loss, device=device, dtype=dtype)  # which waits for no device
