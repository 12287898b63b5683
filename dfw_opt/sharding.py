r"""Sharded parameters: DTensors, as FSDP2 and tensor parallelism make them.

A step has two kinds of sums. Those over one tensor (a channel's scale, a threshold, the gradient of
a ternary scale) are the quantizers' business; these are written as for one process, since an
operation on a DTensor is one on the whole tensor, and communicates by itself. Those over all
tensors (the sums for :math:`\gamma`, and each evaluation of the search) are made of the local parts
and then added up over the processes by :func:`over_shards`: a few numbers in one message, whatever
the size of the model. Everything else is done by each process on its own part.

A process that branched differently from the others, be it for the last digit of a sum, would leave
them waiting. So Python decides only by numbers that are the same on all processes, to the bit.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dfw_opt.data_parallel import ProcessGroup

__all__ = [
    "Groups",
    "all_finite",
    "all_groups",
    "groups_of",
    "is_sharded",
    "largest",
    "largest_of_rows",
    "local",
    "over_shards",
    "placed_alike",
    "placed_like",
    "replicated",
    "settled",
    "whole",
]

Groups = tuple[ProcessGroup, ...]
"""The process groups over which the parts of a tensor have to be added up, one after the other."""

_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor. (Its class need not have been imported for this.)"""
    return type(x) not in _PLAIN and hasattr(x, "device_mesh")


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


def all_groups(each: Iterable[Groups]) -> Groups:
    """Every group in one of ``each``, once, in the same order on all processes."""
    return tuple(dict.fromkeys(group for groups in each for group in groups))


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


def placed_alike(x: Tensor, other: Tensor) -> bool:
    """Whether processes hold the same parts of ``x`` as of ``other``; both are sharded, or none."""
    if not is_sharded(x):
        return True
    a, b = cast(Any, x), cast(Any, other)
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


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


def largest_of_rows(x: Tensor) -> Tensor:
    """The largest magnitude for each index of the first dimension, shape ``(rows, 1, ...)``."""
    part = local(x)
    ones = [1] * (x.dim() - 1)
    if part.numel():
        result = part.abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
    else:
        result = part.new_zeros([part.shape[0], *ones])
    if not is_sharded(x):
        return result
    from torch.distributed.tensor import DTensor, Partial

    # A process may have no part of the rows, which DTensor's own amax does not allow.
    mesh, placements = cast(Any, x).device_mesh, cast(Any, x).placements
    joined = [p if p.is_replicate() or p.dim == 0 else Partial("max") for p in placements]
    shape = torch.Size([x.shape[0], *ones])
    stride = (1,) * x.dim()
    return settled(
        DTensor.from_local(result, mesh, joined, run_check=False, shape=shape, stride=stride)
    )


def all_finite(x: Tensor) -> bool:
    """Whether no part of ``x`` holds NaN or infinity; the same on all processes."""
    finite = local(x).isfinite().all()
    if groups := groups_of(x):
        flag = finite.to(torch.float32)
        for group in groups:
            dist.all_reduce(flag, dist.ReduceOp.MIN, group)
        finite = flag > 0
    return bool(finite)


def over_shards(
    each: Sequence[Groups], terms: Sequence[tuple[Tensor, ...]], among: Groups
) -> list[tuple[Tensor, ...]]:
    """Makes the same numbers on all processes of what each has computed by itself.

    The terms of a sharded tensor are added up over its groups. Where all members of a group have
    the whole tensor, the mean is taken: their kernels may differ in the last digit.

    Args:
        each: for each term the groups of the tensor that it is of.
        terms: for each of these a tuple of 0-dim tensors, all of one dtype and device.
        among: all the groups, of :func:`all_groups`.

    Returns:
        Tuples like ``terms``.
    """
    totals = list(terms)
    for group in among:
        copies = [1 if group in groups else group.size() for groups in each]
        parts = [t / n for those, n in zip(totals, copies, strict=True) for t in those]
        message = torch.stack(parts)
        dist.all_reduce(message, group=group)
        summed = iter(message.unbind())
        totals = [tuple(next(summed) for _ in those) for those in totals]
    return totals


def _redistributed(x: Tensor, placements: Sequence[Any]) -> Tensor:
    if list(cast(Any, x).placements) == list(placements):
        return x
    return cast(Tensor, cast(Any, x).redistribute(placements=placements))
