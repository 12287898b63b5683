"""Measure what steps cost on sharded parameters (FSDP2): memory of each process, and messages.

    torchrun --nproc-per-node 2 sharded_step.py
    torchrun --nproc-per-node 4 sharded_step.py --width 1024 --layers 8 --as-accelerator

prints one row an optimizer. Bytes are those of the fullest process, times the number of processes,
over the number of parameters: what stays the same if that number grows. The last table is what
follows for large models.
"""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from resnet20.command_line import Parser, fail, whole
from stepspeed.measure import peak_bytes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups

CPU = torch.device("cpu")
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "SGD, momentum": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters()),
    "DFW": lambda model: DFW(model.parameters()),
    "ProjectedDFW, binary": lambda model: ProjectedDFW(param_groups(model, skip=[])),
    "TernaryDFW": lambda model: TernaryDFW(param_groups(model, skip=[])),
}
FRANK_WOLFE = (DFW, ProjectedDFW, TernaryDFW)
LARGE, SMALL = 1e9, 1e-9
"""A loss with which γ is 1, and one with which it has to be searched for."""


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


def main() -> int:
    """Run the command line; return the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=whole(1), default=1024, help="of a layer (default: 1024)")
    parser.add_argument("--layers", type=whole(3), default=6, help="how many (default: 6)")
    parser.add_argument(
        "--as-accelerator",
        action="store_true",
        help="take the steps of a device on which Python does not wait for values",
    )
    options = parser.parse_args()
    if "RANK" not in os.environ:
        return fail("start this with torchrun: torchrun --nproc-per-node 2 sharded_step.py")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        rows = [_row(name, mesh, options) for name in OPTIMIZERS]
        if dist.get_rank() == 0:
            _report(rows, options)
        dist.barrier()  # nobody hangs up on those who still talk
    finally:
        gc.collect()  # what still refers to the group would end it too late, and then in a crash
        dist.destroy_process_group()
    return 0


def _row(name: str, mesh: DeviceMesh, options: argparse.Namespace) -> dict[str, Any]:
    """What the optimizer called ``name`` costs, the same on all processes."""
    torch.manual_seed(0)
    width = options.width
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(options.layers)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = OPTIMIZERS[name](model)
    model(torch.randn(4, width)).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]

    with _unreadable() if options.as_accelerator else contextlib.nullcontext():
        _step(optimizer, LARGE)  # makes what state there is to be
        with Messages() as full:
            _step(optimizer, LARGE)
        if isinstance(optimizer, FRANK_WOLFE):
            assert optimizer.gamma == 1
        peak = peak_bytes(lambda: _step(optimizer, LARGE), CPU)
        with Messages() as searching:
            _step(optimizer, SMALL)
        if isinstance(optimizer, FRANK_WOLFE):
            assert 0 < optimizer.gamma < 1
    state = [t for p in model.parameters() for t in optimizer.state[p].values()]
    held = torch.tensor(
        [_bytes(model.parameters()), _bytes(gradients), _bytes(state), peak], dtype=torch.float64
    )
    dist.all_reduce(held, dist.ReduceOp.MAX)
    elements = sum(p.numel() for p in model.parameters())
    return {
        "name": name,
        "per_parameter": (held * mesh.size() / elements).tolist(),
        "full": full,
        "searching": searching,
    }


def _step(optimizer: Optimizer, loss: float) -> None:
    if isinstance(optimizer, FRANK_WOLFE):
        optimizer.step(loss=loss)
    else:
        optimizer.step()


def _bytes(tensors: Any) -> int:
    """Of this process's parts."""
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in parts)


@contextlib.contextmanager
def _unreadable() -> Iterator[None]:
    """The steps that an accelerator gets, on the CPU."""
    with (
        patch("dfw_opt.optimizer.readable", lambda _: False),
        patch("dfw_opt.step_size.readable", lambda _: False),
    ):
        yield


def _report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    processes = dist.get_world_size()
    print(
        f"{options.layers} layers of {options.width} x {options.width}, float32, on {processes} "
        f"processes{', as on an accelerator' * options.as_accelerator}\n"
    )
    print("| bytes a parameter | parameters | gradients | state | step, at its peak | sum |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        parts = row["per_parameter"]
        print(f"| {row['name']} | {' | '.join(f'{x:.2f}' for x in [*parts, sum(parts)])} |")
    print("\n| messages of a step (bytes) | γ = 1 | γ searched for |")
    print("|---|---|---|")
    for row in rows:
        full, searching = row["full"], row["searching"]
        print(
            f"| {row['name']} | {full.count} ({full.bytes}) | "
            f"{searching.count} ({searching.bytes}) |"
        )
    print("\n| GB a device | 1B on 8 | 10B on 64 | 100B on 512 |")
    print("|---|---|---|---|")
    for row in rows:
        sizes = ((1e9, 8), (1e10, 64), (1e11, 512))
        cells = [f"{sum(row['per_parameter']) * n / d / 1e9:.2f}" for n, d in sizes]
        print(f"| {row['name']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
