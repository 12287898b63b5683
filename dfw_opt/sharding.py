r"""Several processes: data parallel training, and parameters in parts (DTensors: FSDP2, HSDP, TP).

Data parallel training averages the gradients: they are those of the ranks' mean loss, by which
:math:`\gamma` has to go too, or ranks would drift apart.

An operation on a DTensor is one on the whole tensor and communicates by itself, so the core is
written as for one process. :func:`adapt` puts in what differs: partial sums are settled before
Python or a plain tensor sees them, in one message for all terms alike; latents of which a rank
would hold nothing are made whole for their maximum; and matrices of one shape are dealt out to be
orthogonalised, by an all-to-all, and come back by another (torch has none on CPUs but gathers).
Python decides only by numbers that are the same on all processes, or some would wait for others.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dfw_opt.variables import squares

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup

    from dfw_opt.lifecycle import LatentOptimizer
else:
    ProcessGroup = getattr(dist, "ProcessGroup", type(None))  # not every torch has one

Ranks = ProcessGroup | Literal["world"] | None  # over which a loss is averaged


def mean(optimizer: "LatentOptimizer", x: Tensor, among: Ranks) -> Tensor:
    """The mean over some ranks, and all that have parts of the same parameters."""
    apart = among is None or not (dist.is_available() and dist.is_initialized())
    groups: list[Any] = [] if apart else [None if among == "world" else among]
    if among != "world":  # ranks that share a parameter cannot have a step of their own
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for mesh in dict.fromkeys(p.device_mesh for p in params if is_sharded(p)):
            x, groups = x.to(mesh.device_type), [*groups, *mesh.get_all_groups()]
    for group in dict.fromkeys(groups):  # a mesh and a part of it have some in common
        if (ranks := dist.get_world_size(group)) > 1:
            dist.all_reduce(x := x.clone(), group=group)
            x /= ranks
    return x


def is_probe(optimizer: "LatentOptimizer") -> bool:
    """Whether torch.distributed.checkpoint makes this step, to see what state there is."""
    gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
    idle = not any(float(group["lr"]) for group in optimizer.param_groups)
    return idle and all(g is not None and not whole(g).any() for g in gradients)


def agreed(optimizer: "LatentOptimizer", check: Callable[[], Any]) -> Any:
    """The result of a check that sends no message. All ranks raise where one does."""
    result, error = None, None
    try:
        result = check()
    except Exception as raised:
        error = raised
    if mean(optimizer, torch.tensor(float(error is not None)), among=None):
        raise error or ValueError("another rank cannot load this checkpoint, and says why")
    return result


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor. (Its class need not have been imported for this.)"""
    return type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "device_mesh")


def whole(x: Any) -> Any:
    """All of ``x``, on each process."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def local(x: Any) -> Any:
    """What this process has of ``x``."""
    return x.to_local() if is_sharded(x) else x


def cut(x: Any) -> tuple[Any, ...]:
    """Over which ranks ``x`` is cut, and how."""
    return (x.device_mesh, x.placements) if is_sharded(x) else ()


def place(p: Tensor, state: dict[str, Tensor]) -> tuple[Any, ...]:
    """What tensors must have in common to be stacked; moves the state to where the parameter is."""
    if p.grad is not None and p.grad.layout != torch.strided:
        raise RuntimeError(f"sparse gradient of shape {tuple(p.shape)}: use sparse=False")
    for key, value in state.items():
        if value.device == p.device and value.dtype.itemsize >= p.dtype.itemsize:
            break  # all of a state is on one device, and of one dtype
        state[key] = value.to(p.device, torch.promote_types(value.dtype, p.dtype))
    return p.shape, p.dtype, p.device


def placed_as_state(x: Tensor, p: Any) -> Tensor:
    """``x``, loaded for ``p``: a number of a sharded parameter is a DTensor too."""
    return type(p).from_local(x, p.device_mesh) if is_sharded(p) and not is_sharded(x) else x


def adapt(optimizer: "LatentOptimizer", p: Any) -> None:
    """Prepares an optimizer for a parameter: for one in parts, or on another device than others."""
    if is_sharded(p) and optimizer._settle is not _settled:
        optimizer._squares, optimizer._settle = partial(_squares, p.device_mesh), _settled
        optimizer._place = _place
        optimizer._copy = lambda to, of: [*map(Tensor.copy_, to, of)]  # type: ignore[assignment]
        optimizer._steepest = partial(_steepest, optimizer._steepest)
    if is_sharded(p) or p.device != optimizer._gamma.device:
        optimizer._gather = _gather


def _place(p: Tensor, state: dict[str, Tensor]) -> tuple[Any, ...]:
    """:func:`place`, and how it is cut. A gradient may be a sum yet to be made over the ranks."""
    p.grad = _settled(p.grad)
    return (*place(p, state), *cut(p))


def _squares(mesh: Any, batch: Sequence[Any]) -> Any:
    """The sum of all squares, yet to be summed over the ranks: NaN on one is NaN on all."""
    from torch.distributed.tensor import DTensor, Partial

    mesh, placements = cut(batch[0]) or (mesh, ())
    parts = [not p.is_replicate() for p in placements] or [False] * mesh.ndim
    copies = math.prod(n for n, apart in zip(mesh.shape, parts, strict=True) if not apart)
    here = squares([*map(local, batch)]) / copies
    return DTensor.from_local(here, mesh, [Partial()] * mesh.ndim, run_check=False)


def _settled(x: Any, whole: bool = False) -> Any:
    """``x`` with no sum left to do; whole, where a rank has nothing, of which is no maximum."""
    if not is_sharded(x):
        return x
    from torch.distributed.tensor import Replicate

    there = [*x.placements]
    for i, (p, ranks) in enumerate(zip(there, x.device_mesh.shape, strict=True)):
        length = x.shape[p.dim] if hasattr(p, "dim") else ranks
        if p.is_partial() or (whole and length <= -(-length // ranks) * (ranks - 1)):
            there[i] = Replicate()
    return x.redistribute(placements=there)


def _gather(terms: Sequence[Any]) -> Tensor:
    """Numbers on any device, or partial sums, as one plain tensor: a message for terms alike."""
    alike: dict[Any, list[Any]] = {}
    for x in terms:
        alike.setdefault(cut(x), []).append(x)
    found = {id(x): x for x in alike.pop((), [])}
    for mesh_and_sums, same in alike.items():
        sums = type(same[0]).from_local(torch.stack([*map(local, same)]), *mesh_and_sums)
        found |= zip(map(id, same), sums.full_tensor(), strict=True)
    return torch.stack([found[id(x)].to(terms[0].device, terms[0].dtype) for x in terms])


def _steepest(of_whole: Callable[..., list[Tensor]], planes: list[Any]) -> list[Tensor]:
    """The direction of each. Matrices or rows in parts are dealt out, whole; vectors go to all."""
    from torch.distributed.tensor import Replicate, Shard

    alike: dict[Any, list[Any]] = {}
    for x, layout, present in planes:
        alike.setdefault((layout, x.dtype, x.shape[1:], cut(x)), []).append((x, present))
    for (layout, _, shape, placed), same in alike.items():
        parts: list[Any] = [torch.cat(xs) for xs in zip(*same, strict=True) if xs[0] is not None]
        if placed:
            last = min({"rows": 1, "stack": len(shape) - 2}.get(layout, 0), len(shape) - 1)
            goal = Shard(last) if len(shape) > 1 else Replicate()
            there = [goal if getattr(p, "dim", 0) > last else p for p in placed[1]]
            parts = [x.redistribute(placements=there) for x in parts]
        sizes = [len(x) for x, _ in same]  # and no more at once than in one process
        for own, *now in zip(*(local(x).split(sizes[0]) for x in parts), strict=True):
            own.copy_(of_whole([(own, layout, *(now or [None]))])[0])
        D = parts[0].redistribute(placements=placed[1]) if placed else parts[0]
        torch._foreach_copy_([local(x) for x, _ in same], local(D).split(sizes))
    return [x for x, _, _ in planes]
