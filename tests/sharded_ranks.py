"""One rank of trainings whose weights are sharded over the ranks; run by test_sharded.py."""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import KINDS, MAIN_KINDS, Kind, fingerprint
from ranks import World, digest, flat, local, recorded_communication, run, share, weight, whole
from torch import Tensor, nn
from torch.distributed.checkpoint import load as dcp_load  # type: ignore[attr-defined]
from torch.distributed.checkpoint import save as dcp_save  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import relu

from dfw_opt import DFW, MultiClassHingeLoss, param_groups

# A step that finds a quantized parameter changed from outside would say so: nothing here does that.
warnings.filterwarnings("error", message=".*quantized parameter")

STEPS, FEW = 20, 8
# So large that some steps have to be shortened: then γ depends on the loss and all sums.
LR = 6.0
BOX = next(kind for kind in KINDS if kind.name == "box")
FOUR = [*MAIN_KINDS, BOX]
FALL = 0.9
"""What a step leaves of the relaxation, if there is some."""
HALF = 3
"""A training is saved after so many steps, and goes on for as many."""


# --------------------------------------------------------------------------------------------------
# What is trained
# --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Five channels and ``width`` rows: over four ranks the last one holds none of 5 or 9."""

    def __init__(self, width: int = 9, channels: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, 3)
        self.norm = nn.GroupNorm(1, channels)
        self.hidden = nn.Linear(4 * channels, width)
        self.last = nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features = relu(self.norm(self.conv(inputs)))
        result: Tensor = self.last(relu(self.hidden(features.flatten(1))))
        return result


class SequenceNet(nn.Module):
    """A norm on sequences, and two layers; what tensor parallelism is used for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        sequences = inputs.flatten(2)[..., :8]
        result: Tensor = self.last(relu(self.hidden(self.norm(sequences)))).mean(1)
        return result


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """The joined batch of all ranks."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(12, 4, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (12,), generator=generator)


@dataclass(frozen=True)
class Layout:
    """How a model is sharded, and over how many ranks its batches are split."""

    shard: Callable[[Any, int], None]
    width: int = 9
    net: Callable[[], nn.Module] | None = None
    data_ranks: Callable[[World], tuple[int, int]] = field(default=lambda w: (w.rank, w.ranks))

    def make(self, world: World, dtype: torch.dtype, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = (Net(self.width) if self.net is None else self.net()).to(dtype)
        if world.ranks > 1:
            self.shard(model, world.ranks)
        return model


def _rows(model: Net, ranks: int) -> None:
    fully_shard(model.hidden)
    fully_shard(model)


def _columns(model: Net, ranks: int) -> None:
    """The second dimension, where the ranks divide it: each channel then lies on all of them."""

    def place(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.dim() > 1 and p.shape[1] % ranks == 0 else None

    fully_shard(model.hidden, shard_placement_fn=place)
    fully_shard(model, shard_placement_fn=place)


def _hybrid(model: Net, ranks: int) -> None:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(model.hidden, mesh=mesh)
    fully_shard(model, mesh=mesh)


_STYLES: dict[str, Any] = {"hidden": ColwiseParallel(), "last": RowwiseParallel()}


def _tensor(model: Net, ranks: int) -> None:
    """The other layers stay plain tensors, with the same gradient on each rank."""
    parallelize_module(model, init_device_mesh("cpu", (ranks,)), _STYLES)


def _tensor_and_rows(model: Net, ranks: int) -> None:
    """Two meshes in one optimizer: the weights of two layers are split in both directions."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], _STYLES)
    fully_shard(model, mesh=mesh["data"])


def _sequence(model: SequenceNet, ranks: int) -> None:
    styles: dict[str, Any] = {
        "norm": SequenceParallel(),
        "hidden": ColwiseParallel(input_layouts=Shard(1)),
        "last": RowwiseParallel(),
    }
    parallelize_module(model, init_device_mesh("cpu", (ranks,)), styles)


def _nobody(world: World) -> tuple[int, int]:
    return 0, 1


LAYOUTS = {
    "rows": Layout(_rows),
    "columns": Layout(_columns),
    "hybrid": Layout(_hybrid),
    "tensor": Layout(_tensor, width=8, data_ranks=_nobody),
    "tensor_and_rows": Layout(
        _tensor_and_rows, width=8, data_ranks=lambda w: (w.rank // 2, max(1, w.ranks // 2))
    ),
    "sequence": Layout(_sequence, net=SequenceNet, data_ranks=_nobody),
}


class Training:
    """A sharded model, an optimizer with the settings, and what is seen of their steps.

    In a world of one rank it is a plain one.
    """

    def __init__(
        self,
        kind: Kind,
        world: World,
        layout: str = "rows",
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.world, self.layout = world, LAYOUTS[layout]
        self.data_rank, self.data_ranks = self.layout.data_ranks(world)
        self.model = self.layout.make(world, dtype, seed)
        self.dtype = dtype
        defaults: dict[str, Any] = {"lr": LR, "weight_decay": 1e-3}
        self.optimizer = kind.make(self.model.parameters(), **(defaults | settings))
        self.gammas: list[float] = []
        self.digests: list[str] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, labels = (share(t, self.data_rank, self.data_ranks) for t in make_batch(step))
        return inputs.to(self.dtype), labels

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = MultiClassHingeLoss()(self.model(inputs), labels)
        return loss * weight(self.data_rank, self.data_ranks)

    def backward(self, step: int) -> Tensor:
        loss = self.loss(*self.batch(step))
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def step(self, loss: Any) -> None:
        assert self.optimizer.step(loss=loss) is loss
        self.gammas.append(float(local(self.optimizer.gamma)))
        self.digests.append(digest(self.optimizer))

    def run(self, steps: int, start: int = 0) -> Training:
        for step in range(start, start + steps):
            self.step(self.backward(step))
            if (theta := self.optimizer.param_groups[0].get("relaxation", 0.0)) > 0:
                self.optimizer.relax(FALL * theta)
        return self

    def outcome(self) -> dict[str, Any]:
        """The whole tensors, on every rank."""
        return {
            "gammas": self.gammas,
            "skipped": int(local(self.optimizer.skipped_steps)),
            "values": {name: whole(value) for name, value in flat(self.optimizer).items()},
        }


# --------------------------------------------------------------------------------------------------
# Equal to one process
# --------------------------------------------------------------------------------------------------

Settings = dict[str, tuple[Kind, int, dict[str, Any]]]
"""By name: kind, number of steps, and settings."""

SETTINGS: Settings = {
    **{str(kind): (kind, STEPS, {"weight_decay": 1e-2}) for kind in KINDS},
    **{
        f"{kind} one by one": (
            kind,
            FEW,
            {"foreach": False, "momentum": 0.0, "weight_decay": 0.0},
        )
        for kind in FOUR
    },
    **{f"{kind} decay": (kind, FEW, {"momentum": 0.0, "weight_decay": 0.1}) for kind in MAIN_KINDS},
    **{f"{kind} lr tensor": (kind, FEW, {"lr": torch.tensor([LR])}) for kind in MAIN_KINDS},
    "binary in a small box": (MAIN_KINDS[1], FEW, {"radius": 0.3}),
    "ternary far from zero": (MAIN_KINDS[2], FEW, {"threshold": 0.4}),
    **{f"{kind} relaxed": (kind, FEW, {"relaxation": 0.6}) for kind in MAIN_KINDS[1:]},
}
ON_FOUR: Settings = {str(kind): SETTINGS[str(kind)] for kind in FOUR}
"""What four ranks train as well: two have shown that the settings make no difference."""
FOUR_SETTINGS: Settings = {str(kind): (kind, FEW, {}) for kind in FOUR}


def train_all(settings: Settings, layout: str, world: World) -> dict[str, Any]:
    return {
        name: Training(kind, world, layout, **own).run(steps).outcome()
        for name, (kind, steps, own) in settings.items()
    }


def rows(world: World) -> dict[str, Any]:
    return train_all(SETTINGS if world.ranks == 2 else ON_FOUR, "rows", world)


def columns(world: World) -> dict[str, Any]:
    return train_all(FOUR_SETTINGS, "columns", world)


def hybrid(world: World) -> dict[str, Any]:
    return train_all(FOUR_SETTINGS, "hybrid", world)


def tensor(world: World) -> dict[str, Any]:
    return train_all(FOUR_SETTINGS, "tensor", world)


def tensor_and_rows(world: World) -> dict[str, Any]:
    return train_all(FOUR_SETTINGS, "tensor_and_rows", world)


def sequence(world: World) -> dict[str, Any]:
    return train_all(FOUR_SETTINGS, "sequence", world)


def clipped(kind: Kind, world: World) -> dict[str, Any]:
    """Gradients scaled by s belong to the loss s·ℓ."""
    training = Training(kind, world)
    for step in range(6):
        loss = training.backward(step)
        # As the gradients are, the norm is sharded.
        norm = whole(nn.utils.clip_grad_norm_(training.model.parameters(), 0.5))
        training.step(loss * (0.5 / (norm + 1e-6)).clamp(max=1.0))
    return training.outcome()


def frozen(kind: Kind, world: World) -> dict[str, Any]:
    """A layer that has no gradient for some steps, and a bias that never has."""
    training = Training(kind, world)
    for step in range(6):
        loss = training.backward(step)
        training.model.get_parameter("last.bias").grad = None
        if step < 3:
            training.model.get_parameter("hidden.weight").grad = None
        training.step(loss)
    return training.outcome()


LARGEST_ON_ONE_OF_TWO = 4
"""A seed at which the largest weights of all matrices are on one of two ranks."""


def smaller_box(kind: Kind, world: World) -> dict[str, Any]:
    """Where only some shards are outside of a new box, all ranks must still do the same."""
    training = Training(kind, world, momentum=0.0, seed=LARGEST_ON_ONE_OF_TWO)
    for radius in (0.999, 0.99, 0.4):
        training.optimizer.param_groups[0]["radius"] = radius
        training.run(2, start=len(training.gammas))
    return training.outcome()


def averaged_by_the_caller(kind: Kind, world: World) -> dict[str, Any]:
    """``process_group=None`` and a loss that is the same on all ranks."""
    training = Training(kind, world, process_group=None)
    for step in range(6):
        loss = training.backward(step)
        if world.ranks > 1:
            dist.all_reduce(loss)
        training.step(loss / world.ranks)
    return training.outcome()


def last_digits(kind: Kind, world: World) -> dict[str, Any]:
    """Kernels that differ from rank to rank in the last digits, in the weights that all have."""
    training = Training(kind, world, "tensor")
    for step in range(STEPS):
        loss = training.backward(step)
        for p in training.model.parameters():
            assert p.grad is not None
            if not isinstance(p, DTensor):
                p.grad.mul_(1 + 1e-12 * world.rank)
        training.optimizer.step(loss=loss)
        training.gammas.append(float(training.optimizer.gamma))
    return {"gammas": training.gammas}


def several_kinds(function: Callable[[Kind, World], Any]) -> Callable[[World], dict[str, Any]]:
    def check(world: World) -> dict[str, Any]:
        # Plain DFW has no box.
        kinds = FOUR[1:] if function is smaller_box else FOUR
        return {str(kind): function(kind, world) for kind in kinds}

    check.__name__ = function.__name__
    return check


# --------------------------------------------------------------------------------------------------
# What the ranks hold and send
# --------------------------------------------------------------------------------------------------


def placements(world: World) -> list[str]:
    """What is wrong with the state's meshes, placements and memory; before and after a step."""
    problems = []
    layouts = {2: ("rows", "columns", "tensor"), 4: ("rows", "hybrid")}[world.ranks]
    for layout in layouts:
        for kind in FOUR:
            training = Training(kind, world, layout)
            for moment in ("new", "stepped"):
                for index, p in enumerate(training.model.parameters()):
                    for key, value in training.optimizer.state.get(p, {}).items():
                        problem = _misplaced(key, value, p)
                        if problem:
                            problems.append(f"{layout} {kind} {moment} {index}.{key}: {problem}")
                training.run(1)
    return problems


def _misplaced(key: str, value: Tensor, p: Tensor) -> str:
    if not isinstance(p, DTensor):
        return "a DTensor for a plain parameter" if isinstance(value, DTensor) else ""
    if not isinstance(value, DTensor):
        return "not a DTensor"
    if value.device_mesh != p.device_mesh:
        return f"on {value.device_mesh}"
    wanted: tuple[Any, ...] = tuple(Replicate() for _ in p.placements)
    if key in ("latent", "momentum_buffer"):
        wanted = p.placements
    elif key == "scale":
        wanted = tuple(s if s in (Shard(0), Replicate()) else Replicate() for s in p.placements)
    if value.placements != wanted:
        return f"{value.placements} instead of {wanted}"
    shard = value.to_local()
    # A view of more than the shard would keep the whole alive.
    if shard.untyped_storage().nbytes() != shard.nbytes:
        return f"{shard.untyped_storage().nbytes()} bytes for {shard.nbytes}"
    if key in ("latent", "momentum_buffer") and shard.shape != p.to_local().shape:
        return f"{tuple(shard.shape)} for {tuple(p.to_local().shape)}"
    return ""


def _layers(width: int, ranks: int, **shard: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 8))
    model = nn.Sequential(*layers)
    if ranks > 1:
        fully_shard(model, **shard)
    return model


def memory(world: World) -> dict[str, tuple[int, int, int]]:
    """Bytes of shards on this rank, on all, and bytes that each rank has.

    In float32, and large enough that one process would use the compiled kernels.
    """
    result = {}
    for kind in FOUR:
        model = _layers(256, world.ranks)
        optimizer = kind.make(model.parameters())
        model(torch.ones(2, 256)).square().mean().backward()
        optimizer.step(loss=1.0)
        values = flat(optimizer).values()
        sharded = [v for v in values if isinstance(v, DTensor) and v.placements != (Replicate(),)]
        result[str(kind)] = (
            sum(v.to_local().untyped_storage().nbytes() for v in sharded),
            sum(v.numel() * v.itemsize for v in sharded),
            sum(local(v).nbytes for v in values if v not in _identities(sharded)),
        )
    return result


class _identities:  # noqa: N801
    """``in`` by identity: == of tensors is another thing."""

    def __init__(self, values: list[Any]) -> None:
        self.ids = {id(value) for value in values}

    def __contains__(self, value: object) -> bool:
        return id(value) in self.ids


def communication(world: World) -> dict[str, Any]:
    """Each step's collectives for a narrow model and for one with 64 times the elements."""

    def across(p: nn.Parameter) -> Shard | None:
        return Shard(1) if p.dim() > 1 else None

    result = {}
    for kind in KINDS:
        for place in ("rows", "columns"):
            for width in (32, 256):
                shard = {"shard_placement_fn": across} if place == "columns" else {}
                model = _layers(width, world.ranks, **shard)
                # An lr at which the search has to go on for a while.
                optimizer = kind.make(model.parameters(), lr=3.0 * width, weight_decay=1e-6)
                steps = []
                for step in range(3):
                    torch.manual_seed(step + 10 * world.rank)
                    loss = model(torch.randn(4, width)).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    with recorded_communication() as calls:
                        optimizer.step(loss=loss)
                    steps.append(calls)
                result[f"{kind} {place} {width}"] = steps
    return result


# --------------------------------------------------------------------------------------------------
# Bad numbers
# --------------------------------------------------------------------------------------------------

NAN_INPUT, NAN_LOSS, INFINITE_SHARD, NAN_SHARD = 1, 3, 4, 6
BAD_STEPS, BAD = 8, (NAN_INPUT, NAN_LOSS, INFINITE_SHARD, NAN_SHARD)


def bad_numbers(kind: Kind, world: World) -> dict[str, Any]:
    """On one rank only: in the end, what a run without those steps leaves."""

    def train(steps: Any) -> dict[str, Any]:
        training = Training(kind, world)
        here = world.rank == 1
        for step in steps:
            inputs, labels = training.batch(step)
            if step == NAN_INPUT and here:
                inputs[0, 1, 2, 3] = math.nan
            loss = training.loss(inputs, labels)
            training.optimizer.zero_grad()
            loss.backward()
            loss = loss.detach()
            if step == NAN_LOSS and here:
                loss = loss * math.nan
            if step in (INFINITE_SHARD, NAN_SHARD) and here:
                gradient = training.model.get_parameter("hidden.weight").grad
                assert gradient is not None
                local(gradient)[0, 0] = math.inf if step == INFINITE_SHARD else math.nan
            training.step(loss)
        return training.outcome() | {"digests": training.digests}

    every = train(range(BAD_STEPS))
    good = train([step for step in range(BAD_STEPS) if step not in BAD])
    ends = [repr(fingerprint(outcome["values"])) for outcome in (every, good)]
    return {"every": every, "good": good, "same_end": ends[0] == ends[1]}


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------

# "bare" has no state at all.
SAVED: dict[str, tuple[Kind, dict[str, Any]]] = {
    **{str(kind): (kind, {}) for kind in FOUR},
    "bare": (MAIN_KINDS[0], {"momentum": 0.0}),
    "binary without momentum": (MAIN_KINDS[1], {"momentum": 0.0}),
}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _save(training: Training, folder: Path) -> None:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    dcp_save({"model": model, "optimizer": optimizer}, checkpoint_id=str(folder))


def _load(training: Training, folder: Path) -> None:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    dcp_load({"model": model, "optimizer": optimizer}, checkpoint_id=str(folder))
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=model,
        optim_state_dict=optimizer,
    )


def fresh(name: str, world: World, **settings: Any) -> Training:
    """Of another seed, as it is before a checkpoint is loaded."""
    kind, own = SAVED[name]
    return Training(kind, world, seed=7, **(own | settings))


def save(world: World, folder: Path) -> dict[str, Any]:
    """Checkpoints of new trainings and of some steps, and where those come to that go on."""
    result = {}
    for name, (kind, settings) in SAVED.items():
        training = Training(kind, world, **settings)
        _save(training, folder / f"{name} new")
        training.run(HALF)
        _save(training, folder / name)
        full = {
            "model": get_model_state_dict(training.model, options=FULL),
            "optimizer": get_optimizer_state_dict(training.model, training.optimizer, options=FULL),
        }
        if world.rank == 0:
            torch.save(full, folder / f"{name}.full.pt")
            if world.ranks == 1:
                plain = training.optimizer.state_dict()
                torch.save(plain, folder / f"{name}.plain.pt")
        result[name] = training.run(HALF, HALF).outcome()
    return result


def load(name: str, world: World, folder: Path) -> dict[str, Any]:
    """Where trainings come to that begin with the checkpoints in ``folder``."""
    begun = fresh(name, world)
    _load(begun, folder / f"{name} new")
    used = fresh(name, world).run(2, start=50)  # with a state of its own
    _load(used, folder / name)
    used.gammas.clear()
    return {
        "new": begun.run(2 * HALF).outcome(),
        "half": used.run(HALF, HALF).outcome(),
    }


def load_full(name: str, world: World, folder: Path, *, broadcast: bool) -> dict[str, Any]:
    """The same from whole tensors, which all ranks have read, or the first one."""
    training = fresh(name, world)
    full: dict[str, Any] = {"model": {}, "optimizer": {}}
    if world.rank == 0 or not broadcast:
        full = torch.load(folder / f"{name}.full.pt", weights_only=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    model, optimizer = training.model, training.optimizer
    set_model_state_dict(model, full["model"], options=options)
    set_optimizer_state_dict(model, optimizer, full["optimizer"], options=options)
    return training.run(HALF, HALF).outcome()


WITH_STATE = [name for name in SAVED if name != "bare"]
"""torch cannot load a full state dict with no state in it, that of SGD neither."""


def saved(world: World) -> dict[str, Any]:
    return save(world, world.folder / "saved")


def load_checks() -> Iterator[Callable[[World], dict[str, Any]]]:
    """Loads what another number of ranks has saved: one in two, two in four."""

    def from_others(
        name: str, function: Callable[..., dict[str, Any]], *args: Any, **settings: Any
    ) -> Callable[[World], dict[str, Any]]:
        def check(world: World) -> dict[str, Any]:
            return function(*args, world, world.folder / "others", **settings)

        check.__name__ = name
        return check

    for name in SAVED:
        yield from_others(f"load {name}", load, name)
    for name in WITH_STATE:
        for broadcast in (False, True):
            check = f"load whole {name} {broadcast}"
            yield from_others(check, load_full, name, broadcast=broadcast)


def own_state_dict(kind: Kind, world: World) -> dict[str, Any]:
    """``state_dict`` and ``load_state_dict`` alone, with each rank's shards in its own file."""
    path = world.folder / f"own.{world.rank}.pt"
    training = Training(kind, world).run(HALF)
    torch.save([training.model.state_dict(), training.optimizer.state_dict()], path)
    training.run(HALF, HALF)
    other = Training(kind, world, seed=7)
    model, optimizer = torch.load(path, weights_only=True)
    other.model.load_state_dict(model)
    other.optimizer.load_state_dict(optimizer)
    other.run(HALF, HALF)
    return {"stayed": training.digests[HALF:], "came_back": other.digests}


def plain_state_dict(world: World) -> dict[str, Any]:
    """A checkpoint of one process given to ``load_state_dict`` of a sharded optimizer."""
    result = {}
    for name in SAVED:
        training = fresh(name, world)
        plain = torch.load(world.folder / "others" / f"{name}.plain.pt", weights_only=True)
        full = torch.load(world.folder / "others" / f"{name}.full.pt", weights_only=True)
        set_model_state_dict(
            training.model, full["model"], options=StateDictOptions(full_state_dict=True)
        )
        before = digest(training.optimizer)
        try:
            training.optimizer.load_state_dict(plain)
        except (TypeError, ValueError) as error:
            unchanged = digest(training.optimizer) == before
            result[name] = {"error": str(error), "unchanged": unchanged}
        else:
            result[name] = training.run(HALF, HALF).outcome()
    return result


def another_layout(kind: Kind, world: World) -> dict[str, Any]:
    """A checkpoint of columns for an optimizer of rows."""
    other = Training(kind, world, "columns").run(1).optimizer.state_dict()
    training = Training(kind, world, "rows")
    return refused(training, lambda: training.optimizer.load_state_dict(other))


def nan_in_a_checkpoint(kind: Kind, world: World) -> dict[str, Any]:
    """In the last rank's shard alone."""
    training = Training(kind, world).run(1)
    state = copy.deepcopy(training.optimizer.state_dict())
    if world.rank == world.ranks - 1:
        momentum = next(s["momentum_buffer"] for s in state["state"].values())
        momentum.to_local().fill_(math.nan)
    return refused(training, lambda: training.optimizer.load_state_dict(state))


def nan_in_a_model(kind: Kind, world: World) -> dict[str, Any]:
    """In the last rank's shard alone, before the optimizer is made."""
    training = Training(kind, world)
    model = LAYOUTS["rows"].make(world, torch.float64, 0)
    if world.rank == world.ranks - 1:
        with torch.no_grad():
            local(model.get_parameter("conv.weight")).fill_(math.nan)
    return refused(training, lambda: kind.make(model.parameters()))


def refused(training: Training, function: Callable[[], object]) -> dict[str, Any]:
    before = digest(training.optimizer)
    try:
        function()
    except ValueError as error:
        return {"error": str(error), "unchanged": digest(training.optimizer) == before}
    return {"error": "", "unchanged": False}


# --------------------------------------------------------------------------------------------------
# As people make their models
# --------------------------------------------------------------------------------------------------


def usual_way(world: World) -> dict[str, Any]:
    """param_groups, mixed precision, a model that is made on the meta device."""
    result = {}
    for kind in MAIN_KINDS[1:]:
        with torch.device("meta"):
            layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
            model = nn.Sequential(*layers)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mp_policy=policy)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        optimizer = kind.optimizer(param_groups(model), lr=0.1)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(12, 16, generator=generator)
        labels = inputs[:, :3].argmax(1)
        losses, shared = [], []
        for _ in range(30):
            mine, targets = (share(t, world.rank, world.ranks) for t in (inputs, labels))
            loss = MultiClassHingeLoss()(model(mine).float(), targets)
            loss = loss * weight(world.rank, world.ranks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(float(mean) / world.ranks)
            shared.append(float(local(optimizer.gamma)))
        middle = model.get_parameter("2.weight")
        state = optimizer.state[middle]
        levels = whole(middle).abs().unique(dim=1 if str(kind) == "binary" else None)
        result[str(kind)] = {
            "losses": losses,
            "gammas": shared,
            "latent": str(state["latent"].dtype),
            "levels": levels,
        }
    return result


def initialised_by_a_bare_step(world: World) -> dict[str, bool]:
    """What ``get_optimizer_state_dict`` does to an optimizer without a state changes nothing."""
    result = {}
    for kind in FOUR:
        for momentum in (0.0, 0.9):
            training = Training(kind, world, momentum=momentum)
            optimizer = training.optimizer
            before = {name: whole(value) for name, value in flat(optimizer).items()}
            get_optimizer_state_dict(training.model, optimizer)
            after = {name: whole(value) for name, value in flat(optimizer).items()}
            same = fingerprint(before) == fingerprint(after) and not optimizer.skipped_steps
            result[f"{kind} {momentum}"] = same and optimizer.param_groups[0]["lr"] == LR
    return result


def changed_from_outside(world: World) -> dict[str, list[str]]:
    """Weights that are loaded when the optimizer has its latents: what it warns of."""
    result = {}
    for kind in MAIN_KINDS[1:]:
        training = Training(kind, world).run(1)
        with torch.no_grad():
            training.model.get_parameter("hidden.weight").mul_(1.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.run(1, start=1)
        result[str(kind)] = [str(w.message) for w in caught if "quantized" in str(w.message)]
    return result


def gradients_left_out(world: World) -> bool:
    """A model none of whose parameters has a gradient: nothing to be done, on all ranks."""
    training = Training(MAIN_KINDS[0], world)
    before = {key: whole(value) for key, value in flat(training.optimizer).items()}
    optimizer: DFW = training.optimizer
    optimizer.step(loss=1.0)
    after = {key: whole(value) for key, value in flat(training.optimizer).items()}
    return bool(fingerprint(before) == fingerprint(after))


ON_BOTH: list[Callable[[World], Any]] = [
    rows,
    columns,
    several_kinds(bad_numbers),
    several_kinds(smaller_box),
    placements,
    memory,
    communication,
    saved,
    *load_checks(),
]
ON_TWO: list[Callable[[World], Any]] = [
    tensor,
    sequence,
    *map(several_kinds, (clipped, frozen, averaged_by_the_caller, own_state_dict)),
    *map(several_kinds, (last_digits, another_layout, nan_in_a_checkpoint, nan_in_a_model)),
    plain_state_dict,
    usual_way,
    initialised_by_a_bare_step,
    changed_from_outside,
    gradients_left_out,
]
CHECKS = {2: [*ON_BOTH, *ON_TWO], 4: [*ON_BOTH, hybrid, tensor_and_rows]}

if __name__ == "__main__":
    run(CHECKS)
