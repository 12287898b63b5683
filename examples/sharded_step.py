"""Take steps on sharded parameters (FSDP2), and compare them with those of one process.

    torchrun --nproc-per-node 2 sharded_step.py

prints, for each optimizer, how far the weights are from those of one process that holds all of
them, and what a step sends: how many messages, and the bytes that one process hands over.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from common import Parser, UserError, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups

WIDTH = 256
OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "DFW": lambda model: DFW(param_groups(model)),
    "ProjectedDFW": lambda model: ProjectedDFW(param_groups(model)),
    "TernaryDFW": lambda model: TernaryDFW(param_groups(model)),
}


class Messages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collective operations, and the bytes of their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # ask again, with the local parts
        sends = not any(word in func.__name__ for word in ("wait", "wrap"))
        if func.namespace in ("c10d", "_c10d_functional") and sends:
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.count += 1
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def train(name: str, sharded: bool) -> tuple[list[Tensor], Messages]:
    """Weights after three steps, and what the last of them has sent."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    images = torch.randn(8, WIDTH)  # the same in all processes, as is then their mean gradient
    if sharded:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    optimizer = OPTIMIZERS[name](model)
    for _ in range(3):
        loss = (model(images) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        with Messages() as messages:
            optimizer.step(loss=loss)
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return weights, messages


def compare() -> None:
    """Print a row for each optimizer."""
    if "RANK" not in os.environ:
        raise UserError("start this with torchrun: torchrun --nproc-per-node 2 sharded_step.py")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in OPTIMIZERS:
        (weights, messages), (expected, _) = (train(name, sharded) for sharded in (True, False))
        pairs = zip(weights, expected, strict=True)
        furthest = max(float((a - b).abs().max().detach()) for a, b in pairs)
        if dist.get_rank() == 0:
            sent = f"{messages.count} messages of {messages.bytes:,} bytes a step"
            print(f"{name:12}  largest difference {furthest:.1e}  {sent}", flush=True)
    dist.barrier()  # none leaves while another still talks
    dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    Parser(__doc__).parse_args(arguments)
    return run(compare, str)


if __name__ == "__main__":
    sys.exit(main())
