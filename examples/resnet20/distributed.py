"""Several processes that train as one: each takes its rows of every batch, the first one reports.

torchrun starts them. DistributedDataParallel averages their gradients, and BatchNorm sees the rows
of all, so a step is that of one process with the whole batch. All read the same checkpoint, so
machines have to share the folder of the run.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .command_line import BAD_INPUT, INTERRUPTED, PATIENCE, has_partners
from .errors import UserError

_LOOK_EVERY = 0.05  # seconds


@dataclass(frozen=True)
class Team:
    """Which process this is, and of how many. With one, every method leaves things as they are."""

    rank: int = 0
    size: int = 1
    store: Any = None  # torch.distributed's, which not every torch has

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device called ``name``; each process has a GPU of its own that is called cuda."""
        if self.size > 1 and name not in ("cpu", "cuda"):
            raise UserError(f"--device {name} is for one process; write cpu or cuda")
        if self.size > 1 and name == "cuda" and _local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"there are more processes than the {torch.cuda.device_count()} GPUs here; "
                "lower --nproc-per-node"
            )
        return torch.device(name)

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that are for this process."""
        start, stop = (batch_size * rank // self.size for rank in (self.rank, self.rank + 1))
        return slice(start, stop)

    def weigh(self, loss: Tensor, batch_size: int) -> Tensor:
        """The mean loss of these rows, scaled so that its mean over the processes is the batch's.

        The parts of a batch may be unequal, and DistributedDataParallel gives all the same weight.
        """
        if self.size == 1:
            return loss
        rows = self.rows(batch_size)
        weight: float = self.size * (rows.stop - rows.start) / batch_size
        return loss * weight

    def meet(self) -> None:
        """Wait for all, however long that takes.

        Not by a collective, which has a time limit and cannot be interrupted; and a thread of its
        group may still hold a tensor for a moment, which must not be the last moment of Python.
        """
        if self.store is None:
            return
        arrived = self.store.add("arrived", 1)
        wanted = math.ceil(arrived / self.size) * self.size
        while arrived < wanted:
            time.sleep(_LOOK_EVERY)
            arrived = self.store.add("arrived", 0)

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the processes."""
        return mine if self.size == 1 else _sum(mine)

    def mean(self, mine: Tensor) -> Tensor:
        """The mean over the processes."""
        return mine if self.size == 1 else _sum(mine) / self.size

    def share_statistics(self, model: nn.Module) -> None:
        """Let each BatchNorm in ``model`` see the rows of all; its state stays as it is."""
        if self.size == 1:
            return
        if next(model.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            return
        for parent in model.modules():
            for name, child in parent.named_children():
                if type(child) is nn.BatchNorm2d:
                    norm = CommonBatchNorm2d(child.num_features, child.eps, child.momentum)
                    norm.load_state_dict(child.state_dict())
                    setattr(parent, name, norm)

    def parallel(self, model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same network, whose ``backward()`` averages the gradients over the processes."""
        if self.size == 1:
            return model
        assert isinstance(model, nn.Module)
        return DistributedDataParallel(model)


ALONE = Team()


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """Join the processes that torchrun has started, if it has.

    If some fail, the first one to do so says why, and the others, which then only lack a partner,
    say nothing.
    """
    if not has_partners():
        yield ALONE
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    gpus = dist.is_nccl_available() and torch.cuda.is_available()
    if gpus and _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        together = Team(rank, size, store)
        yield together
        together.meet()  # so that none leaves while another can still fail
    except BaseException as error:
        if store.add("failed", 1) == 1:
            raise
        if isinstance(error, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(PATIENCE)  # torchrun ends all as soon as one has left
        sys.exit(BAD_INPUT)
    dist.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ["LOCAL_RANK"])  # among the processes of this machine


class CommonBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the rows of all processes: torch.nn.SyncBatchNorm, which refuses the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        result: Tensor
        # In float32, as BatchNorm computes, whatever x is.
        result, mean, variance = _Normalise.apply(  # type: ignore[no-untyped-call]
            x.float(), self.weight, self.bias, self.eps
        )
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1
        return result.to(x.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return also the mean and the (unbiased) variance of each channel."""
        pixels = x.new_tensor([x.numel() / x.shape[1]])
        sums = _sum(torch.cat((x.sum((0, 2, 3)), pixels)))
        count = sums[-1]
        mean = sums[:-1] / count
        normal = x - _wide(mean)
        variance = _sum(normal.square().sum((0, 2, 3))) / count
        inverse = (variance + eps).rsqrt()
        normal *= _wide(inverse)
        ctx.save_for_backward(normal, inverse * weight, count)
        result = torch.addcmul(_wide(bias), normal, _wide(weight))
        unbiased = variance * count / (count - 1)
        ctx.mark_non_differentiable(mean, unbiased)
        return result, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        gradient = gradients[0]
        normal, scale, count = ctx.saved_tensors
        of_bias = gradient.sum((0, 2, 3))
        of_weight = (gradient * normal).sum((0, 2, 3))
        # What the mean and the variance of all rows, which this row is part of, take away.
        mean_b, mean_w = (_sum(torch.stack((of_bias, of_weight))) / count).unbind()
        of_x = (gradient - _wide(mean_b)).addcmul_(normal, _wide(mean_w), value=-1)
        return of_x.mul_(_wide(scale)), of_weight, of_bias, None


def _wide(channels: Tensor) -> Tensor:
    return channels.view(-1, 1, 1)


def _sum(mine: Tensor) -> Tensor:
    total = mine.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total
