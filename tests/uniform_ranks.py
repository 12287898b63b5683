"""What test_uniform.py runs in two and four processes: sharded weights of a few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import UNIFORM
from ranks import World, run, whole
from sharded_ranks import FEW, train_all
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dfw_opt.quantizers.uniform import largest_of_channel

SETTINGS: Any = {
    "plain": (UNIFORM, FEW, {}),
    "decay": (UNIFORM, FEW, {"bits": 2, "weight_decay": 0.1, "radius": 0.5}),
    "relaxed": (UNIFORM, FEW, {"relaxation": 0.6}),
}
SHAPES = ((3, 5), (5, 3), (1, 4), (4, 1), (2, 3, 2, 2), (3, 0))


def rows(world: World) -> dict[str, Any]:
    return train_all(SETTINGS, "rows", world)


def columns(world: World) -> dict[str, Any]:
    return train_all(SETTINGS, "columns", world)


def tensor(world: World) -> dict[str, Any]:
    return train_all(SETTINGS, "tensor", world)


def tensor_and_rows(world: World) -> dict[str, Any]:
    return train_all(SETTINGS, "tensor_and_rows", world)


def parts(world: World) -> None:
    """The largest of a channel, however the tensor is cut; some processes have no part of it."""
    mesh = init_device_mesh("cpu", (world.ranks,))
    for shape in SHAPES:
        latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for dim in (0, 1):
            cut = distribute_tensor(latent, mesh, [Shard(dim)])
            assert torch.equal(whole(largest_of_channel(cut)), largest_of_channel(latent)), shape


ON_BOTH: list[Callable[[World], Any]] = [rows, columns, parts]
CHECKS = {2: [*ON_BOTH, tensor], 4: [*ON_BOTH, tensor_and_rows]}

if __name__ == "__main__":
    run(CHECKS)
