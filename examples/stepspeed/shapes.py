"""Lists of tensors to take steps on, and whether they fit into memory."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from resnet20 import nets
from torch import Tensor

MATRICES = 96
LEAST = 1000
"""The smallest size: below it there are not enough weights for so many matrices."""


@dataclass(frozen=True)
class Shape:
    """The tensors of a network, by their dimensions."""

    name: str
    dimensions: tuple[tuple[int, ...], ...]
    real: bool = False
    """Whether it is the example's network, rather than matrices alone."""

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.dimensions))

    def draw(self, device: torch.device) -> list[Tensor]:
        """Weights as they are at the start of a training; the same at every call."""
        if self.real:
            return [p.detach().to(device) for p in _resnet20()]
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(size, generator=generator, device=device).div_(math.sqrt(size[-1]))
            for size in self.dimensions
        ]


def shapes(sizes: list[int]) -> Iterator[Shape]:
    """The example's network, then each size as many matrices and as one."""
    yield Shape("resnet20", tuple(tuple(p.shape) for p in _resnet20()), real=True)
    for size in dict.fromkeys(sizes):
        yield Shape(f"{size_name(size)} many", (_matrix(size // MATRICES),) * MATRICES)
        yield Shape(f"{size_name(size)} one", (_matrix(size),))


def size_name(size: int) -> str:
    for unit, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if size >= unit:
            return f"{size / unit:.4g}{letter}"
    return str(size)


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated on ``device``; ``None`` if the system does not say."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line), None)


def _matrix(elements: int) -> tuple[int, int]:
    """Nearly square."""
    rows = math.isqrt(elements)
    return rows, elements // rows


def _resnet20() -> list[Tensor]:
    return list(nets.build("float", "resnet", seed=0).parameters())
