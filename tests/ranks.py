"""One rank of a data-parallel training in which one rank meets NaN; run by test_trust.py. Usage:

    ranks.py RANK RANKS FOLDER

Leaves RANK.pt in FOLDER: how each optimizer's run went and where it ended.
"""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import MAIN_KINDS, Kind, everything
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from dfw_opt import MultiClassHingeLoss

STEPS = 8
NAN_INPUT, INFINITE_GRADIENT = 3, 5
BAD = (NAN_INPUT, INFINITE_GRADIENT)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def spoil(gradient: Tensor) -> Tensor:
    """One element, on this rank only, before the gradients are averaged."""
    gradient = gradient.clone()
    gradient.view(-1)[1] = math.inf
    return gradient


def train(kind: Kind, rank: int, ranks: int, steps: list[int]) -> dict[str, Any]:
    model = make_model()
    parallel = DistributedDataParallel(model)
    optimizer = kind.make(model.parameters(), lr=3.0)  # γ is often below 1
    gammas = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        inputs = torch.randn(8, 6, generator=generator)
        labels = torch.randint(3, (8,), generator=generator)
        if step == NAN_INPUT and rank == 1:
            inputs[2, 4] = math.nan
        loss = MultiClassHingeLoss()(parallel(inputs), labels)
        optimizer.zero_grad()
        handles = []
        if step == INFINITE_GRADIENT and rank == 1:
            handles.append(model.get_parameter("2.weight").register_hook(spoil))
        loss.backward()
        for handle in handles:
            handle.remove()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        optimizer.step(loss=mean / ranks)
        gammas.append(float(optimizer.gamma))
    return {
        "skipped": int(optimizer.skipped_steps),
        "gammas": gammas,
        "end": repr(everything(optimizer)),
    }


def main() -> None:
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    every, good = list(range(STEPS)), [step for step in range(STEPS) if step not in BAD]
    results = {
        str(kind): {
            "all": train(kind, rank, ranks, every),
            "good": train(kind, rank, ranks, good),
        }
        for kind in MAIN_KINDS
    }
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
