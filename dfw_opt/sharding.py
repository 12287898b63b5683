r"""Several processes: data parallel training, and parameters in parts (DTensors: FSDP2, HSDP, TP).

**The loss** of a step is the mean of the ranks' losses. Data parallel training averages the
gradients, so they are those of the mean loss, and :math:`\gamma` needs its value. A rank that took
its own would compute another :math:`\gamma`, and its weights would drift away from the others'.

**Parameters in parts.** An operation on a DTensor is one on the whole tensor and communicates by
itself, so the core is written as for one process. :func:`adapt` puts in what differs: partial sums
are settled before Python or a plain tensor sees them, in one message for all terms alike; latents
of which a rank would hold nothing are made whole for their maximum; and for its orthogonal factor
each matrix goes whole to one rank, and its direction back to all, in one message each.

A process that branched differently from the others would leave them waiting. So Python decides by
numbers only that are the same on all processes.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dfw_opt import norms

if TYPE_CHECKING:
    from dfw_opt.lifecycle import LatentOptimizer
if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = type("ProcessGroup", (), {})  # of which there is none

__all__ = [
    *("Ranks", "adapt", "agreed", "all_finite", "check_process_group", "is_probe", "is_sharded"),
    *("local", "mean_loss", "place", "placed_alike", "placed_as_state", "whole"),
]
Ranks = ProcessGroup | Literal["world"] | None
"""Over which ranks a loss is averaged: all, those of a group, or no others."""

_pairs: Any = partial(zip, strict=True)


def check_process_group(process_group: object) -> None:
    """Raises a TypeError for what is no such argument."""
    if process_group not in (None, "world") and not isinstance(process_group, ProcessGroup):
        raise TypeError(
            f"process_group={process_group!r} must be 'world' (all ranks, if torch.distributed is "
            "initialised), a ProcessGroup that this rank is a member of, or None (this rank alone)"
        )


def mean_loss(optimizer: "LatentOptimizer", loss: Any) -> Tensor:
    """The mean over the ranks, the same number on all of them, where the parameters are."""
    ell, among = _beside(optimizer, loss), optimizer.process_group
    if dist.is_available() and dist.is_initialized():
        groups: list[Any] = [None] if among == "world" else [among] if among is not None else []
        if among != "world":  # ranks that share a parameter cannot have a step of their own
            groups += [g for mesh in _mesh(_params(optimizer)) for g in mesh.get_all_groups()]
        for group in groups:
            if (ranks := dist.get_world_size(group)) > 1:
                dist.all_reduce(ell := ell.clone(), group=group)
                ell /= ranks
    optimizer._ell = ell
    return ell


def _beside(optimizer: "LatentOptimizer", loss: Any) -> Tensor:
    """The loss as a 0-dim tensor; the optimizer's own tensors follow the parameters."""
    params = _params(optimizer)
    p = next((p for p in params if p.grad is not None), next(iter(params), optimizer._gamma))
    if optimizer._gamma.device != p.device and not p.is_meta:
        for name in ("_gamma", "_height", "_skipped"):
            setattr(optimizer, name, getattr(optimizer, name).to(p.device))
    if isinstance(loss, Tensor):
        return cast(Tensor, whole(loss.detach()).reshape(()).to(optimizer._gamma))
    # This waits for no device; and torch refuses to round what no float32 can hold.
    return torch.full_like(optimizer._gamma, loss if abs(loss) < 3e38 else float("inf") * loss)


def is_probe(optimizer: "LatentOptimizer") -> bool:
    """Whether torch.distributed.checkpoint makes this step, to see what state there is."""
    trained = [p for p in _params(optimizer) if p.requires_grad]
    return all(float(group["lr"]) == 0 for group in optimizer.param_groups) and all(
        p.grad is not None and not whole(p.grad).any() for p in trained
    )


def all_finite(x: Tensor) -> bool:
    """Whether no part of ``x`` holds NaN or infinity; the same on all processes."""
    return bool(whole((~x.isfinite()).sum()) == 0)


def agreed(optimizer: "LatentOptimizer", check: Callable[[], Any]) -> Any:
    """The result of a check that sends no message. All ranks raise where one does."""
    result, error = None, None
    try:
        result = check()
    except Exception as raised:
        error = raised
    for mesh in _mesh(_params(optimizer)):
        failed = torch.full((), float(error is not None), device=mesh.device_type)
        if whole(_spread(failed, mesh)):
            raise error or ValueError("another rank cannot load this checkpoint, and says why")
    if error is not None:
        raise error
    return result


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor. (Its class need not have been imported for this.)"""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def whole(x: Any) -> Any:
    """All of ``x``, on each process."""
    return x.full_tensor() if is_sharded(x) else x


def local(x: Any) -> Any:
    """What this process has of ``x``."""
    return x.to_local() if is_sharded(x) else x


def place(p: Any, state: dict[str, Tensor]) -> tuple[Any, ...]:
    """What tensors must have in common to be stacked; moves the state to where the parameter is."""
    if p.grad is not None and p.grad.layout != torch.strided:
        raise RuntimeError(
            f"sparse gradients are not supported (parameter of shape {tuple(p.shape)}); make the "
            "layer with sparse=False"
        )
    for key, value in state.items():
        if value.device == p.device and value.dtype.itemsize >= p.dtype.itemsize:
            break  # all of a state is on one device, and of one dtype
        state[key] = value.to(p.device, torch.promote_types(value.dtype, p.dtype))
    if not is_sharded(p):
        return (p.shape, p.dtype, p.device)
    if p.grad is not None:
        p.grad = _settled(p.grad)  # in sequence parallelism, a sum over the ranks
    return (p.shape, p.dtype, p.device, p.device_mesh, p.placements)


def placed_alike(x: Any, other: Any) -> bool:
    """Whether processes hold the same parts of ``x`` as of ``other``; both are sharded, or none."""
    a, b = ((y.device_mesh, y.placements) if is_sharded(y) else () for y in (x, other))
    return a == b


def placed_as_state(x: Tensor, p: Any) -> Tensor:
    """``x``, loaded for ``p``: a number of a sharded parameter is a DTensor too."""
    return x if not is_sharded(p) or is_sharded(x) else _spread(x, p.device_mesh, "Replicate")


def adapt(optimizer: "LatentOptimizer", p: Tensor) -> None:
    """Prepares an optimizer for a parameter: for one in parts, or on another device than others."""
    if is_sharded(p) and optimizer._copy is not _copy:
        optimizer._norm, optimizer._copy, optimizer._settle = _norms, _copy, _settled
        optimizer._gather = _gather
        optimizer._steepest = partial(_steepest, optimizer._steepest)
    elif p.device != optimizer._gamma.device:
        optimizer._gather = _gather


def _params(optimizer: "LatentOptimizer") -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _mesh(tensors: Sequence[Tensor]) -> list[Any]:
    """The mesh of the most ranks, if there is one."""
    meshes: set[Any] = {getattr(x, "device_mesh", None) for x in tensors} - {None}
    return [max(meshes, key=lambda mesh: mesh.size())] if meshes else []


def _spread(x: Tensor, mesh: Any, placement: str = "Partial") -> Tensor:
    """The sum of ``x`` over all ranks of a mesh, yet to be done; or what is the same on all."""
    from torch.distributed import tensor

    placements = [getattr(tensor, placement)()] * mesh.ndim
    return tensor.DTensor.from_local(x, mesh, placements, run_check=False)


def _norms(tensors: Sequence[Any]) -> list[Tensor]:
    """What is finite where all tensors are, on all ranks. A sum, for a maximum may lose NaN."""
    found = [(norm * 0).float() for norm in torch._foreach_norm([*map(local, tensors)])]
    return [_spread(torch.stack(found).sum(), mesh) for mesh in _mesh(tensors)] or found


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in _pairs(targets, values):
        target.copy_(value)


def _settled(x: Any, whole: bool = False) -> Any:
    """``x`` with no sum left to do; whole, where a rank has nothing, of which is no maximum."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate

    placements: list[Any] = [Replicate() if p.is_partial() else p for p in x.placements]
    for i, p in enumerate(placements):
        if (
            whole
            and not p.is_replicate()
            and _parts(x.shape[p.dim], x.device_mesh.size(i))[-1] == 0
        ):
            placements[i] = Replicate()
    return _redistributed(x, placements)


def _parts(length: int, ranks: int) -> list[int]:
    """How much of a dimension each rank has."""
    chunk = -(-length // ranks)
    return [max(0, min(length - rank * chunk, chunk)) for rank in range(ranks)]


def _redistributed(x: Any, placements: Sequence[Any]) -> Any:
    return x if [*x.placements] == [*placements] else x.redistribute(placements=placements)


def _gather(terms: Sequence[Any]) -> Tensor:
    """Numbers on any device, or partial sums, as one plain tensor: a message for terms alike."""
    result = {i: term for i, term in enumerate(terms) if not is_sharded(term)}
    alike: dict[Any, list[int]] = {}
    for i, x in ((i, term) for i, term in enumerate(terms) if i not in result):
        alike.setdefault((type(x), x.device_mesh, x.placements), []).append(i)
    for (kind, mesh, placements), indices in alike.items():
        parts = torch.stack([local(terms[i]) for i in indices])
        settled = whole(kind.from_local(parts, mesh, placements, run_check=False))
        result |= dict(_pairs(indices, settled.unbind()))
    return torch.stack([result[i].to(result[0]) for i in range(len(terms))])


def _steepest(of_whole: Callable[..., list[Tensor]], planes: list[norms.Plane]) -> list[Tensor]:
    """The direction of each. What is cut goes whole to one rank, all in one message each way."""
    from torch.distributed.tensor import Replicate, Shard

    directions: list[Any] = [plane[0] for plane in planes]
    alike: dict[Any, list[int]] = {}
    for i, (gradient, layout, present) in enumerate(planes):
        placements = directions[i].placements if is_sharded(gradient) else ()
        axes = [axis for axis, p in enumerate(placements) if not p.is_replicate()]
        rows = layout == "rows" and gradient.dim() > 2
        least = 2 if rows else gradient.dim() - 2 if layout == "stack" else 1
        if all(placements[axis].dim < least for axis in axes):  # what is normalised is not cut
            own = local(gradient)
            own.copy_(of_whole([(own, layout, local(present))])[0])
        elif rows:
            present = _redistributed(present, [Replicate()] * len(placements))
            directions[i] = of_whole([(gradient, layout, present)])[0]
        else:  # over one axis of the mesh; along others each does the same
            one = [Shard(p.dim) if a == axes[0] else Replicate() for a, p in enumerate(placements)]
            directions[i] = _redistributed(gradient, one)
            alike.setdefault((directions[i].device_mesh, axes[0], gradient.dtype), []).append(i)
    for (mesh, axis, _), indices in alike.items():
        cut, layouts = [directions[i] for i in indices], [planes[i][1] for i in indices]
        _share_out(of_whole, mesh, axis, cut, layouts)
    placed = [getattr(plane[0], "placements", None) for plane in planes]
    return [_redistributed(D, there) if there else D for D, there in _pairs(directions, placed)]


def _share_out(
    of_whole: Any, mesh: Any, axis: int, gradients: list[Any], layouts: list[str]
) -> None:
    """Puts its direction in the place of each gradient, all of them cut along an axis of a mesh."""
    ranks, group = mesh.size(axis), mesh.get_group(axis)
    dims = [x.placements[axis].dim for x in gradients]
    shapes = [[x.shape[d], *x.shape[1:d], *x.shape[d + 1 :]] for x, d in _pairs(gradients, dims)]
    here = [local(x).movedim(d, 1) for x, d in _pairs(gradients, dims)]
    parts = [_parts(shape[0], ranks) for shape in shapes]
    # The next matrix goes to who has least to do; the largest first.
    load, owned = [0.0] * ranks, [list[tuple[int, int]]() for _ in range(ranks)]
    for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i])):
        for k in range(gradients[i].shape[0]):
            owner = load.index(min(load))
            load[owner] += math.prod(shapes[i]) ** 1.5
            owned[owner].append((i, k))
    mine = owned[mesh.get_local_rank(axis)]
    sizes = [[math.prod(shapes[i][1:]) * parts[i][rank] for i, _ in mine] for rank in range(ranks)]
    pieces = _pairs(*_exchange([[here[i][k] for i, k in of] for of in owned], sizes, group))
    answers: list[list[Tensor]] = [[here[0].new_empty(0)] for _ in range(ranks)]
    for i, batch in groupby(mine, lambda pair: pair[0]):
        matrices = torch.stack([torch.cat(next(pieces)).view(shapes[i]) for _ in batch])
        (D,) = of_whole([(matrices.movedim(1, dims[i]), layouts[i], None)])
        for answer, part in _pairs(answers, torch.split(D.movedim(dims[i], 1), parts[i], 1)):
            answer += part.unbind()
    sizes = [[here[i][k].numel() for i, k in of] for of in owned]
    for of, received in _pairs(owned, _exchange(answers, sizes, group)):
        for (i, k), direction in _pairs(of, received):
            here[i][k].copy_(direction.view_as(here[i][k]))


def _exchange(outgoing: list[list[Tensor]], sizes: list[list[int]], group: Any) -> list[Any]:
    """What the others have sent, given what goes to each and the sizes of what comes from each."""
    sent = torch.cat([t.reshape(-1) for tensors in outgoing for t in tensors])
    lengths, splits = [sum(own) for own in sizes], [sum(t.numel() for t in ts) for ts in outgoing]
    received = sent.new_empty(sum(lengths))
    dist.all_to_all_single(received, sent, lengths, splits, group=group)
    return [torch.split(part, own) for part, own in _pairs(torch.split(received, lengths), sizes)]
