r"""Several processes: data parallel training, and parameters in parts (DTensors: FSDP2, HSDP, TP).

**The loss** of a step is the mean of the ranks' losses. Data parallel training averages the
gradients, so they are those of the mean loss, and :math:`\gamma` needs its value. A rank that took
its own would compute another :math:`\gamma`, and its weights would drift away from the others'.

**Parameters in parts.** An operation on a DTensor is one on the whole tensor and communicates by
itself, so the core is written as for one process. :func:`adapt` puts in what differs: partial sums
are settled before Python or a plain tensor sees them, in one message for all terms alike; tensors
with fewer rows than ranks are made whole; and matrices are gathered for their orthogonal factor
such that each rank computes it for its share of a batch of matrices, rather than all for all.

A process that branched differently from the others would leave them waiting. So Python decides by
numbers only that are the same on all processes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dfw_opt import norms
from dfw_opt.variables import stack

if TYPE_CHECKING:
    from dfw_opt.lifecycle import LatentOptimizer

if dist.is_available():
    from torch.distributed import ProcessGroup
else:

    class ProcessGroup:  # type: ignore[no-redef]
        """What a torch that was built without torch.distributed has no instance of."""


__all__ = [
    "Ranks",
    "adapt",
    "all_finite",
    "beside",
    "check_process_group",
    "is_probe",
    "is_sharded",
    "mean_loss",
    "place",
    "placed_alike",
    "placed_as_state",
    "whole",
]

Ranks = ProcessGroup | Literal["world"] | None
"""Over which ranks a loss is averaged: all, those of a group, or no others."""


# Data parallel ------------------------------------------------------------------------------------


def check_process_group(process_group: object) -> None:
    """Checks an argument of an optimizer.

    Raises:
        TypeError: it is neither a process group of which this process is a member, nor ``"world"``,
            nor ``None``.
    """
    if process_group not in (None, "world") and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group={process_group!r} must be 'world' (all ranks, if torch.distributed is "
            "initialised), a ProcessGroup that this rank is a member of, or None (this rank alone)"
        )


def mean_loss(loss: Tensor, process_group: Ranks) -> Tensor:
    """The mean over the ranks, the same number on all of them."""
    if process_group is None or not (dist.is_available() and dist.is_initialized()):
        return loss
    group = None if isinstance(process_group, str) else process_group
    if (ranks := dist.get_world_size(group)) == 1:
        return loss
    total = loss.clone()
    dist.all_reduce(total, group=group)
    return total / ranks


def beside(optimizer: "LatentOptimizer", loss: Any) -> Tensor:
    """The loss as a 0-dim tensor, where the parameters are; the optimizer's own tensors follow."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    p = next((p for p in params if p.grad is not None), next(iter(params), optimizer._gamma))
    if optimizer._gamma.device != p.device and not p.is_meta:
        for name in ("_gamma", "_height", "_skipped"):
            setattr(optimizer, name, getattr(optimizer, name).to(p.device))
    if isinstance(loss, Tensor):
        ell = whole(loss.detach()).reshape(()).to(optimizer._gamma)
    else:  # which waits for no device; torch refuses to round what no float32 can hold
        ell = torch.full_like(optimizer._gamma, loss if abs(loss) < 3e38 else float("inf") * loss)
    optimizer._ell = ell
    return ell


def is_probe(optimizer: "LatentOptimizer") -> bool:
    """Whether this is a step as torch.distributed.checkpoint makes one, to see what state there is:
    of length 0, with gradients of 0 everywhere.
    """
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return all(float(group["lr"]) == 0 for group in optimizer.param_groups) and all(
        p.grad is not None and not whole(p.grad).any() for p in params
    )


# Parameters in parts ------------------------------------------------------------------------------


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor. (Its class need not have been imported for this.)"""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def whole(x: Tensor) -> Tensor:
    """All of ``x``, on each process."""
    return cast(Tensor, cast(Any, x).full_tensor()) if is_sharded(x) else x


def place(p: Tensor, state: dict[str, Tensor]) -> tuple[Any, ...]:
    """What tensors must have in common to be stacked; moves the state to where the parameter is.

    Raises:
        RuntimeError: the gradient is sparse.
    """
    if p.grad is not None and p.grad.layout != torch.strided:
        raise RuntimeError(
            f"sparse gradients are not supported (parameter of shape {tuple(p.shape)}); make the "
            "layer with sparse=False"
        )
    for key, value in state.items():
        if value.device == p.device:
            break  # all of a state is on one device
        state[key] = torch.zeros_like(value, device=p.device) if value.is_meta else value.to(p.device)
    parts = (cast(Any, p).device_mesh, cast(Any, p).placements) if is_sharded(p) else ()
    return (p.shape, p.dtype, p.device, *parts)


def placed_alike(x: Tensor, other: Tensor) -> bool:
    """Whether processes hold the same parts of ``x`` as of ``other``; both are sharded, or none."""
    if not (is_sharded(x) and is_sharded(other)):
        return is_sharded(x) == is_sharded(other)
    a, b = cast(Any, x), cast(Any, other)
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


def placed_as_state(x: Tensor, p: Tensor) -> Tensor:
    """``x``, loaded for ``p``: a number of a sharded parameter is a DTensor too."""
    if not is_sharded(p) or is_sharded(x):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = cast(Any, p).device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def all_finite(x: Tensor) -> bool:
    """Whether no part of ``x`` holds NaN or infinity; the same on all processes."""
    return bool(whole((~x.isfinite()).sum()) == 0)


def adapt(optimizer: "LatentOptimizer", p: Tensor) -> None:
    """Prepares an optimizer for a parameter: for one in parts, or on another device than others."""
    if is_sharded(p):
        optimizer._stack, optimizer._norm = _stack, _norms
        optimizer._copy, optimizer._settle = _copy, _settled
        optimizer._gather, optimizer._steepest = _gather, _steepest
    elif p.device != optimizer._gamma.device:
        optimizer._gather = _gather


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    batch = stack(tensors)
    if is_sharded(batch):
        from torch.distributed.tensor import Replicate

        # A rank that has no part of it could not take a maximum.
        mesh, placements = cast(Any, batch).device_mesh, cast(Any, batch).placements
        small = [
            not p.is_replicate() and (p.is_partial() or batch.shape[p.dim] <= mesh.size(i) * (mesh.size(i) - 1))
            for i, p in enumerate(placements)
        ]
        if any(small):
            return _redistributed(batch, [Replicate()] * len(placements))
    return batch


def _steepest(gradient: Tensor, layout: str, present: Tensor) -> Tensor:
    """:func:`dfw_opt.norms.spectral`, with matrices whole, and shared out among the ranks."""
    if not is_sharded(gradient) or gradient.dim() < 3 or layout == "rows":
        return norms.spectral(gradient, layout, present)
    from torch.distributed.tensor import Replicate, Shard

    placements = list(cast(Any, gradient).placements)
    parts = [i for i, p in enumerate(placements) if not p.is_replicate()]
    by_matrix: list[Any] = [Replicate()] * len(placements)
    if parts:
        by_matrix[parts[0]] = Shard(0)
    direction = norms.spectral(_redistributed(gradient, by_matrix), layout, present)
    return _redistributed(direction, placements)


def _settled(x: Tensor) -> Tensor:
    """``x`` with no sum or maximum over processes left to be done."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate

    placements = cast(Any, x).placements
    return _redistributed(x, [Replicate() if p.is_partial() else p for p in placements])


def _norms(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    return [torch.linalg.vector_norm(x, order) for x in tensors]


def _gather(terms: Sequence[Tensor]) -> Tensor:
    """Numbers on any device, or partial sums, as one plain tensor: a message for terms alike."""
    result: list[Tensor | None] = [None] * len(terms)
    alike: dict[Any, list[int]] = {}
    for i, term in enumerate(terms):
        if is_sharded(term):
            key = (cast(Any, term).device_mesh, cast(Any, term).placements, term.dtype)
            alike.setdefault(key, []).append(i)
        else:
            result[i] = term
    for indices in alike.values():
        settled = whole(torch.stack([terms[i] for i in indices]))
        for i, value in zip(indices, settled.unbind(), strict=True):
            result[i] = value
    first = cast(Tensor, result[0])
    return torch.stack([cast(Tensor, value).to(first) for value in result])


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def _redistributed(x: Tensor, placements: Sequence[Any]) -> Tensor:
    if list(cast(Any, x).placements) == list(placements):
        return x
    return cast(Tensor, cast(Any, x).redistribute(placements=placements))
