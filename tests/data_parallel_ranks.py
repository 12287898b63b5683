"""One rank of trainings under DistributedDataParallel; run by test_data_parallel.py."""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from helpers import KINDS, MAIN_KINDS, PATHS, Kind, fingerprint
from ranks import World, digest, flat, recorded_communication, run, share, weight, whole
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfw_opt import MultiClassHingeLoss

STEPS = 50
FEW = 10
# So large that most steps have to be shortened: then γ depends on the loss and everything else.
LR = 6.0
BOX = next(kind for kind in KINDS if kind.name == "box")
BIT_KINDS = [*MAIN_KINDS, BOX]
PARTS = 3
"""How many micro-batches add up to a step's gradient."""

# What goes wrong in which step, on one rank only.
NAN_INPUT, INFINITE_GRADIENT, NAN_LOSS, INFINITE_LOSS = 2, 4, 5, 7
BAD_STEPS, BAD = 10, (NAN_INPUT, INFINITE_GRADIENT, NAN_LOSS, INFINITE_LOSS)


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return model.to(dtype)


def make_batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The joined batch of all ranks."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (12,), generator=generator)


class Training:
    """A model, an optimizer with the settings, and what is seen of their steps."""

    def __init__(
        self,
        kind: Kind,
        world: World,
        dtype: torch.dtype = torch.float64,
        *,
        parallel_group: Any = None,
        **settings: Any,
    ) -> None:
        self.world, self.dtype = world, dtype
        self.model = make_model(dtype)
        defaults = {"lr": LR, "weight_decay": 1e-3}
        self.optimizer = kind.make(self.model.parameters(), **(defaults | settings))
        self.network: nn.Module = self.model
        if world.ranks > 1:
            self.network = DistributedDataParallel(self.model, process_group=parallel_group)
        self.criterion = MultiClassHingeLoss()
        self.digests: list[str] = []
        self.gammas: list[float] = []
        self.losses: list[float] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = make_batch(step, self.dtype)
        rank, ranks = self.world.rank, self.world.ranks
        return share(inputs, rank, ranks), share(labels, rank, ranks)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.network(inputs), labels)
        return loss * weight(self.world.rank, self.world.ranks)

    def backward(self, step: int) -> Tensor:
        loss = self.loss(*self.batch(step))
        self.optimizer.zero_grad()
        loss.backward()
        return loss

    def step(self, loss: Tensor | float) -> None:
        assert self.optimizer.step(loss=loss) is loss
        self.note(loss)

    def note(self, loss: Tensor | float) -> None:
        self.digests.append(digest(self.optimizer))
        self.gammas.append(float(self.optimizer.gamma))
        self.losses.append(torch.as_tensor(loss).detach().item())

    def run(self, steps: int) -> Training:
        for step in range(steps):
            self.step(self.backward(step))
        return self

    def outcome(self) -> dict[str, Any]:
        return {
            "digests": self.digests,
            "gammas": self.gammas,
            "losses": self.losses,
            "skipped": int(self.optimizer.skipped_steps),
            "values": {name: whole(value) for name, value in flat(self.optimizer).items()},
        }


def joined_batch(world: World) -> dict[str, Any]:
    return {str(kind): Training(kind, world).run(STEPS).outcome() for kind in KINDS}


def every_path(world: World) -> dict[str, list[str]]:
    """In the types that people train in, by each implementation of a step."""
    runs: dict[str, tuple[Kind, torch.dtype, int, dict[str, Any]]] = {}
    for kind in BIT_KINDS:
        runs[f"{kind} default"] = kind, torch.float32, STEPS, {}
        for path in ("single", "fused"):
            runs[f"{kind} {path}"] = kind, torch.float32, FEW, PATHS[path]
        runs[f"{kind} bfloat16"] = kind, torch.bfloat16, FEW, {}
    return {
        name: Training(kind, world, dtype, **settings).run(steps).digests
        for name, (kind, dtype, steps, settings) in runs.items()
    }


def bad_numbers(world: World) -> dict[str, Any]:
    every, good = range(BAD_STEPS), [step for step in range(BAD_STEPS) if step not in BAD]

    def spoil(gradient: Tensor) -> Tensor:
        """One element, on this rank only, before the gradients are averaged."""
        gradient = gradient.clone()
        gradient.view(-1)[1] = math.inf
        return gradient

    def train(kind: Kind, steps: Any) -> dict[str, Any]:
        training = Training(kind, world, torch.float32)
        for step in steps:
            inputs, labels = training.batch(step)
            here = world.rank == 1
            if step == NAN_INPUT and here:
                inputs[0, 4] = math.nan
            loss = training.loss(inputs, labels)
            training.optimizer.zero_grad()
            handles = []
            if step == INFINITE_GRADIENT and here:
                handles.append(training.model.get_parameter("2.weight").register_hook(spoil))
            loss.backward()
            for handle in handles:
                handle.remove()
            # Their gradients are good: only the loss can tell.
            if step == NAN_LOSS and here:
                loss = loss * math.nan
            if step == INFINITE_LOSS and world.rank == world.ranks - 1:
                loss = loss + math.inf
            training.step(loss)
        outcome = training.outcome()
        return outcome | {"end": repr(fingerprint(outcome["values"]))}

    return {
        str(kind): {"all": train(kind, every), "good": train(kind, good)} for kind in MAIN_KINDS
    }


def rank_local(world: World) -> dict[str, Any]:
    """``process_group=None`` and other weights on each rank, as many steps as it likes."""
    alone = World()
    result = {}
    for kind in MAIN_KINDS:
        with recorded_communication() as calls:
            training = Training(kind, alone, process_group=None)
            for step in range(2 + 3 * world.rank):
                training.step(training.backward(step + 100 * world.rank))
        result[str(kind)] = training.outcome() | {"calls": calls}
    return result


def drift(world: World) -> dict[str, Any]:
    """The same under DistributedDataParallel: each rank has a γ of its own."""
    training = Training(MAIN_KINDS[0], world, process_group=None)
    calls = []
    for step in range(5):
        loss = training.backward(step)
        with recorded_communication() as step_calls:
            training.step(loss)
        calls += step_calls
    return training.outcome() | {"calls": calls}


def subgroups(world: World) -> dict[str, Any]:
    """Two halves, each a data-parallel training of its own."""
    half = world.ranks // 2
    groups = [dist.new_group(list(range(first, first + half))) for first in (0, half)]
    mine, inside = groups[world.rank // half], World(world.rank % half, half)
    result = {}
    for kind in MAIN_KINDS:
        training = Training(kind, inside, parallel_group=mine, process_group=mine)
        assert training.optimizer.process_group is mine
        for step in range(8):
            training.step(training.backward(step + 100 * (world.rank // half)))
        result[str(kind)] = training.outcome()
    return result


def accumulation(world: World) -> dict[str, Any]:
    """Micro-batches, whose gradients meet in the last one's backward pass."""

    def train(kind: Kind) -> dict[str, Any]:
        training = Training(kind, world)
        for step in range(8):
            training.optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for part in range(PARTS):
                inputs, labels = training.batch(PARTS * step + part)
                last = part == PARTS - 1
                with nullcontext() if last else training.network.no_sync():  # type: ignore[operator]
                    loss = training.loss(inputs, labels) / PARTS
                    loss.backward()
                total += loss.detach()
            training.step(total)
        return training.outcome()

    return {str(kind): train(kind) for kind in MAIN_KINDS}


def large_batches(kind: Kind) -> dict[str, Any]:
    """What :func:`accumulation` must come to, in one process."""
    training = Training(kind, World())
    for step in range(8):
        parts = [make_batch(PARTS * step + part) for part in range(PARTS)]
        inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        training.optimizer.zero_grad()
        loss = training.loss(inputs, labels)
        loss.backward()
        training.step(loss)
    return training.outcome()


def communication(world: World) -> dict[str, Any]:
    """What a step says to the other ranks; the third loss is NaN on one of them."""

    def calls(kind: Kind, settings: dict[str, Any]) -> list[Any]:
        training = Training(kind, world, torch.float32, **settings)
        result = []
        for step in range(4):
            loss = training.backward(step)
            if step == 2 and world.rank == 0:
                loss = loss * math.nan
            with recorded_communication() as calls:
                training.optimizer.step(loss=loss)
            result.append(calls)
        return result

    return {
        f"{kind} {path}": calls(kind, settings)
        for kind in MAIN_KINDS
        for path, settings in PATHS.items()
    }


def ways_to_give_the_loss(world: World) -> dict[str, list[str]]:
    def tensor(training: Training, step: int) -> None:
        training.step(training.backward(step))

    def one_element(training: Training, step: int) -> None:
        training.step(training.backward(step).reshape(1))

    def number(training: Training, step: int) -> None:
        training.step(training.backward(step).item())

    def closure(training: Training, step: int) -> None:
        training.note(training.optimizer.step(lambda: training.backward(step)))

    ways: list[Callable[[Training, int], None]] = [tensor, one_element, number, closure]
    digests = {}
    for way in ways:
        training = Training(MAIN_KINDS[1], world)
        for step in range(4):
            way(training, step)
        digests[way.__name__] = training.digests
    return digests


def watched(world: World) -> dict[str, list[str]]:
    """A bare ``step()``, with micro-batches: the sums of the ranks are averaged."""
    digests: dict[str, list[str]] = {}
    for way in ("given", "watched"):
        training = Training(MAIN_KINDS[0], world)
        if way == "watched":
            training.optimizer.watch_loss(training.criterion)
        for step in range(4):
            training.optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for part in range(2):
                inputs, labels = training.batch(2 * step + part)
                with training.network.no_sync() if part == 0 else nullcontext():  # type: ignore[operator]
                    # A power of two, so that the order of the products is all the same.
                    loss = training.loss(inputs, labels) / 2
                    loss.backward()
                total += loss.detach()
            training.optimizer.step(**({"loss": total} if way == "given" else {}))
            training.note(total)
        digests[way] = training.digests
    return digests


COMMON = [
    joined_batch,
    every_path,
    bad_numbers,
    rank_local,
    drift,
    subgroups,
    accumulation,
    communication,
    ways_to_give_the_loss,
    watched,
]

if __name__ == "__main__":
    run({2: COMMON, 4: COMMON})
