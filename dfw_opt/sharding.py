r"""Sharded parameters: DTensors, as FSDP2 and tensor parallelism make them.

A step has two kinds of sums. Those over one tensor (a channel's scale, a threshold, the gradient of
a ternary scale) are the quantizers' business; these are written as for one process, since an
operation on a DTensor is one on the whole tensor, and communicates by itself. Those over all
tensors (the sums for :math:`\gamma`, and each evaluation of the search) are made of the local parts
and then added up over the processes by :func:`over_shards`: a few numbers in one message, whatever
the size of the model. Everything else is done by each process on its own part.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Groups",
    "groups_of",
    "is_sharded",
    "largest",
    "local",
    "over_shards",
    "placed_like",
    "replicated",
    "settled",
    "whole",
]

Groups = tuple[Any, ...]
"""The process groups over which the parts of a tensor have to be added up, one after the other."""


class Sharded(Protocol):
    """What knows over which processes it is spread."""

    @property
    def groups(self) -> Groups: ...


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor. (Its class need not have been imported for this.)"""
    return hasattr(x, "device_mesh")


def local(x: Tensor) -> Tensor:
    """This process's part of ``x``, in the same memory; ``x`` itself where it is whole."""
    return cast(Tensor, x.to_local()) if is_sharded(x) else x  # type: ignore[attr-defined]


def groups_of(x: Tensor) -> Groups:
    """The groups whose members hold different parts of ``x``; none if it is whole everywhere."""
    if not is_sharded(x):
        return ()
    mesh, placements = cast(Any, x).device_mesh, cast(Any, x).placements
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def settled(x: Tensor) -> Tensor:
    """``x`` with no sum or maximum over processes left to be done."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate

    placements = cast(Any, x).placements
    return _redistributed(x, [Replicate() if p.is_partial() else p for p in placements])


def whole(x: Tensor) -> Tensor:
    """All of ``x``, on each process."""
    return cast(Tensor, cast(Any, x).full_tensor()) if is_sharded(x) else x


def replicated(x: Tensor, mesh: Any) -> Tensor:
    """``x``, which is the same on all processes of ``mesh``, as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def placed_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` in parts that are those of ``other``."""
    return _redistributed(x, cast(Any, other).placements) if is_sharded(other) else x


def largest(x: Tensor) -> Tensor:
    """The largest magnitude in ``x``, 0-dim; 0 if ``x`` is empty."""
    part = local(x)
    result = part.abs().amax() if part.numel() else part.new_zeros(())
    if not is_sharded(x):
        return result
    # A process may have no part at all, which DTensor's own amax does not allow.
    for group in groups_of(x):
        dist.all_reduce(result, dist.ReduceOp.MAX, group)
    return replicated(result, cast(Any, x).device_mesh)


def over_shards(
    of: Sequence[Sharded], terms: Sequence[tuple[Tensor, ...]]
) -> list[tuple[Tensor, ...]]:
    """Adds up over processes what each computed of its own parts.

    Args:
        of: where the terms are from.
        terms: for each of these a tuple of 0-dim tensors, all of one dtype and device.

    Returns:
        Tuples like ``terms``, the same on all processes.
    """
    totals = list(terms)
    for groups in dict.fromkeys(x.groups for x in of if x.groups):
        those = [i for i, x in enumerate(of) if x.groups == groups]
        message = torch.stack([term for i in those for term in terms[i]])
        for group in groups:
            dist.all_reduce(message, group=group)
        summed = iter(message.unbind())
        for i in those:
            totals[i] = tuple(next(summed) for _ in terms[i])
    return totals


def _redistributed(x: Tensor, placements: Sequence[Any]) -> Tensor:
    if list(cast(Any, x).placements) == list(placements):
        return x
    return cast(Tensor, cast(Any, x).redistribute(placements=placements))
