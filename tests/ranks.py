"""Real processes that talk over gloo, for test_distributed.py: what each of them runs.

Started once a rank as ``ranks.py RANK RANKS FOLDER``. Each check uses the processes and returns
what there is to assert, which the tests do.
"""

# torch leaves backward() and what a dispatch mode inherits untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import itertools
import logging
import math
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import fingerprint, forward_weights, same_bits, uncovered
from kinds import KINDS, MAIN_KINDS, Kind
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint import load as dcp_load  # type: ignore[attr-defined]
from torch.distributed.checkpoint import save as dcp_save  # type: ignore[attr-defined]
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, relu
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfw_opt import DFW, AveragedModel, lifecycle, norms, param_groups, sharding

ROOT = Path(__file__).parent.parent
PATIENCE = datetime.timedelta(seconds=60)
"""How long a rank waits for the others. Where it runs out, they are not coming."""

SAMPLES = 12
SHARES = {1: (12,), 2: (3, 9), 4: (1, 2, 3, 6)}
"""How many samples of a batch each rank has."""
STEPS, HALF = 4, 2
LR = {"spectral": 2.0, "euclidean": 6.0}
"""So large that most steps have to be shortened: then γ depends on the loss and on all sums."""
COUNTED = [kind for kind in KINDS if not str(kind).startswith("box")]
SIZES = ((16, 5), (16, 10), (32, 5))
"""A net, one of twice as many layers, and one of layers twice as wide."""
BARE = Kind("bare", DFW, {"norm": "euclidean", "momentum": 0.0})
"""Has no state at all."""
SAVED = [*MAIN_KINDS, BARE]


class Results:
    """What the checks returned on each rank, for each kind."""

    def __init__(self, folder: Path, by_rank: list[dict[str, Any]]) -> None:
        self.folder, self.by_rank = folder, by_rank

    def of(self, check: str, kind: Kind) -> list[Any]:
        """Rank by rank; fails the test where a rank did not get that far."""
        if errors := [r["error"][-2500:] for r in self.by_rank if check not in r]:
            pytest.fail(f"{check} on {len(errors)} ranks, of which one:\n{errors[0]}")
        return [results[check][str(kind)] for results in self.by_rank]


def launch(ranks: int, folder: Path) -> Results:
    """Runs this file once a rank and returns what the checks returned."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    processes = []
    for rank in range(ranks):
        environment = uncovered() if rank else dict(os.environ)
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(rank), str(ranks), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), (folder / f"{codes.index(max(codes))}.log").read_text()[-3000:]
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return Results(folder, found)


@dataclass(frozen=True)
class World:
    """Where a check is run."""

    rank: int = 0
    ranks: int = 1
    folder: Path = Path()


class Net(nn.Module):
    """All layouts of a tensor. Over four ranks, the last one holds nothing of most of them."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 5, 3)
        self.norm = nn.GroupNorm(1, 5)
        self.hidden = nn.Linear(20, width)
        self.experts = nn.Parameter(torch.randn(3, width, 6) / 3)
        self.table = nn.Embedding(7, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        features = relu(self.norm(self.conv(inputs))).flatten(1)
        mixed = torch.einsum("ni,eij->nj", relu(self.hidden(features)), self.experts)
        result: Tensor = self.last(mixed + self.table((inputs[:, 0, 0, 0].abs() * 2).long() % 7))
        return result


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    """The joined batch of all ranks."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(SAMPLES, 4, 4, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (SAMPLES,), generator=generator)


def _shard(model: Net, layout: str, ranks: int, **settings: Any) -> Any:
    """Cuts the model up, and returns what is to be called."""
    styles: Any = {
        "hidden": ColwiseParallel(output_layouts=Replicate()),
        "last": RowwiseParallel(input_layouts=Replicate()),
    }
    if layout == "ddp":
        return DistributedDataParallel(model, **settings)
    if layout == "tensor":
        return parallelize_module(model, init_device_mesh("cpu", (ranks,)), styles)
    if layout == "hybrid":
        names = ("replicate", "shard")
        settings["mesh"] = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=names)
    if layout == "both":
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], styles)
        settings["mesh"] = mesh["data"]
    if layout == "columns":
        even = {p for p in model.parameters() if p.dim() > 1 and p.shape[1] % 2 == 0}
        settings["shard_placement_fn"] = lambda p: Shard(1) if p in even else None
    fully_shard(model.hidden, **settings)
    return fully_shard(model, **settings)


class Training:
    """A model, its optimizer, and what is seen of their steps. One process has the whole batch."""

    def __init__(
        self,
        kind: Kind,
        world: World,
        layout: str,
        *,
        seed: int = 0,
        shard: dict[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
        **settings: Any,
    ) -> None:
        self.rank, self.ranks, self.dtype = world.rank, world.ranks, dtype
        if layout in ("tensor", "both"):  # ranks side by side have the same samples
            others = world.ranks if layout == "tensor" else min(2, world.ranks)
            self.rank, self.ranks = world.rank // others, world.ranks // others
        torch.manual_seed(seed)
        self.model = Net(8 if layout in ("tensor", "both") else 9).to(dtype)
        self.net: nn.Module = self.model
        if world.ranks > 1:
            self.net = _shard(self.model, layout, world.ranks, **(shard or {}))
        defaults: dict[str, Any] = {"lr": LR[kind.norm], "weight_decay": 1e-2}
        groups = param_groups(self.model, skip="last")
        self.optimizer = kind.optimizer(groups, **(defaults | kind.settings | settings))
        self.gammas: list[float] = []
        self.digests: list[Any] = []

    def backward(self, step: int) -> Tensor:
        inputs, labels = (
            torch.split(t, list(SHARES[self.ranks]))[self.rank] for t in make_batch(step)
        )
        loss = cross_entropy(self.net(inputs.to(self.dtype)).to(self.dtype), labels)
        # So that the mean over ranks is that over samples.
        loss = loss * self.ranks * SHARES[self.ranks][self.rank] / SAMPLES
        self.optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    def step(self, loss: Tensor | float) -> None:
        self.optimizer.step(loss=loss)
        self.gammas.append(float(self.optimizer.gamma))
        bits = repr(fingerprint([local(v) for v in self.tensors().values()]))
        self.digests.append(hashlib.sha256(bits.encode()).hexdigest())

    def run(self, steps: int, start: int = 0) -> Training:
        for step in range(start, start + steps):
            self.step(self.backward(step))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and state by name, such as ``hidden.weight latent``."""
        values: dict[str, Tensor] = {}
        for name, p in self.model.named_parameters():
            state = self.optimizer.state.get(p, {})
            values |= {name: p.detach(), **{f"{name} {key}": state[key] for key in sorted(state)}}
        return values | {"plane": self.optimizer._plane, "gamma": self.optimizer.gamma}

    def outcome(self) -> dict[str, Any]:
        """The whole tensors, on every rank."""
        values = {name: whole(value) for name, value in self.tensors().items()}
        exact = all(self._quantized(group, values) for group in self.optimizer.param_groups)
        numbers = {"gammas": self.gammas, "skipped": int(self.optimizer.skipped_steps)}
        return numbers | {"values": values, "exact": exact}

    def _quantized(self, group: dict[str, Any], values: dict[str, Tensor]) -> bool:
        """Whether the parameters of a group are exactly Q of the latents."""
        for name in group["param_names"] if group.get("quantizer") else []:
            state = {k.split()[1]: v for k, v in values.items() if k.startswith(f"{name} ")}
            shown: Any = SimpleNamespace(state={values[name]: state})
            if not same_bits(values[name], forward_weights(shown, group, values[name])):
                return False
        return True


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all shards joined; every rank has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def trained(kind: Kind, world: World, layout: str, **settings: Any) -> dict[str, Any]:
    training = Training(kind, world, layout, **settings).run(STEPS)
    return training.outcome() | {"digests": training.digests}


def groups(kind: Kind, world: World) -> list[Any]:
    """A group of the two ranks is all of them; alone, each makes the steps of its own batch."""
    pair = Training(kind, world, "ddp", process_group=dist.new_group([0, 1])).run(STEPS)
    with pytest.raises(TypeError, match="process group of its own"):
        copy.deepcopy(pair.optimizer)
    alone = Training(kind, World(), "ddp", process_group=None)
    with Recorder() as recorder:
        alone.run(2 + world.rank)  # as many as it likes
    cut = Training(kind, world, "rows", process_group=None).run(STEPS)
    return [pair.gammas, len(recorder.calls), alone.gammas, cut.gammas]


def clipped(kind: Kind, world: World) -> dict[str, Any]:
    """Gradients scaled by s belong to the loss sℓ. A layer is frozen for a step, a bias always."""
    training = Training(kind, world, "rows")
    for step in range(STEPS):
        loss = training.backward(step)
        norm = whole(nn.utils.clip_grad_norm_(training.model.parameters(), 0.5))
        training.model.conv.requires_grad_(step != 1)
        training.model.last.bias.grad = None
        training.step(loss * (0.5 / (norm + 1e-6)).clamp(max=1.0))
    return training.outcome()


def half_precision(kind: Kind, world: World) -> dict[str, Any]:
    """FSDP2 as it is used: float32, computing in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    training = Training(kind, world, "rows", dtype=torch.float32, shard={"mp_policy": policy})
    outcome = training.run(STEPS).outcome()
    dtypes = {str(v.dtype) for state in training.optimizer.state.values() for v in state.values()}
    return outcome | {"dtypes": sorted(dtypes)}


BAD = {1: "loss", 2: "infinite loss", 4: "gradient", 5: "infinite gradient"}


def bad_numbers(kind: Kind, world: World) -> dict[str, Any]:
    """On the last rank only. At the end: what a run without those steps leaves, to the bit."""
    here = world.rank == world.ranks - 1

    def end(layout: str, steps: Sequence[int]) -> Training:
        training = Training(kind, world, layout)
        for step in steps:
            loss, bad = training.backward(step), BAD.get(step, "")
            value = math.inf if "infinite" in bad else math.nan
            if "loss" in bad and here:
                loss = torch.full_like(loss, value)
            gradients = [p.grad for p in training.model.parameters() if p.grad is not None]
            # Data parallel gradients are averaged: with one rank's, all have it.
            if "gradient" in bad and (here or layout == "ddp"):
                next(local(g) for g in gradients if local(g).numel()).view(-1)[0] = value
            training.step(loss)
        return training

    result = {}
    # Of the third, plain parameters are spoilt: the other ranks know nothing of it.
    for layout in ("ddp", "rows", "tensor")[: 3 if world.ranks == 2 else 2]:
        every, good = end(layout, range(7)), end(layout, [i for i in range(7) if i not in BAD])
        skipped = int(every.optimizer.skipped_steps)
        result[layout] = [every.digests[-1] == good.digests[-1], skipped, every.gammas]
    return result


def written(kind: Kind, world: World) -> list[Any]:
    """One rank alone writes to a quantized weight. The step is that of weights left alone."""
    runs = []
    for write in (False, True):
        training = Training(kind, world, "rows").run(1)
        loss = training.backward(1)
        if write and world.rank == 0:
            local(training.model.hidden.weight.detach()).mul_(1.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            training.step(loss)
        training.run(1, 2)
        runs.append([training.digests, [str(w) for w in caught if "quantized" in str(w)]])
    return runs


def refusals(kind: Kind, world: World) -> dict[str, list[Any]]:
    """What each rank says where only the last one has a reason, and whether all is as before."""
    training = Training(kind, world, "rows").run(1)
    last, before = world.rank == world.ranks - 1, fingerprint(training.outcome())

    def refused(function: Callable[..., object], *args: Any) -> list[Any]:
        try:
            function(*args)
        except ValueError as error:
            return [str(error), fingerprint(training.outcome()) == before]
        return ["", False]

    nan, lacking = (copy.deepcopy(training.optimizer.state_dict()) for _ in range(2))
    spoilt = Training(BARE, world, "rows").model.hidden.weight
    if last:
        local(next(v for s in nan["state"].values() for v in s.values() if v.dim())).fill_(math.nan)
        next(iter(lacking["state"].values()))["more"] = torch.zeros(())
        local(spoilt.detach()).fill_(math.nan)
    columns = Training(kind, world, "columns").run(1).optimizer.state_dict()
    states = {"nan": nan, "lacks": lacking, "columns": columns}
    result = {key: refused(training.optimizer.load_state_dict, s) for key, s in states.items()}
    return result | {"model": refused(kind.make, [spoilt]) if kind.quantized else []}


def no_values(kind: Kind, world: World) -> dict[str, Any]:
    """FSDP2 on meta, made real later: the optimizer made after that, or before it."""

    def end(before: bool) -> Any:
        with torch.device("meta"):
            model = Net()
        fully_shard(model)
        make = functools.partial(kind.optimizer, **kind.settings)
        try:
            optimizer = make(param_groups(model, skip="last")) if before else None
        except ValueError as error:
            return str(error)
        model.to_empty(device="cpu")
        for p in model.parameters():
            values = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            rows = values.chunk(world.ranks)
            local(p.detach()).copy_(rows[world.rank] if world.rank < len(rows) else values[:0])
        optimizer = optimizer or make(param_groups(model, skip="last"))
        for step in range(2):
            inputs, labels = make_batch(step)
            loss = cross_entropy(model(inputs.float()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
        return [whole(p) for p in model.parameters()]

    return {"before": end(True), "after": end(False)}


class Recorder(TorchDispatchMode):
    """Every collective inside, whatever function started it: its name, and the bytes of the larger
    of what a rank gives and gets.

    What the reducer of DistributedDataParallel does is not seen, as it does not go through Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again, as what it does with the shards
        namespace, name = func.name().split("::")
        if "c10d" in namespace and not any(word in name for word in ("wait", "wrap")):
            tensors = [t for t in tree_leaves(args[:2]) if isinstance(t, Tensor)]
            self.calls.append((name, max(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_matrices() -> Iterator[list[tuple[int, int]]]:
    """The shapes of the matrices that this rank orthogonalises."""
    shapes: list[tuple[int, int]] = []
    polar = norms.polar

    def counting(matrix: Tensor, *settings: Any) -> Tensor:
        if matrix.shape[1] <= matrix.shape[2]:  # others come again, transposed
            shapes.extend([(int(matrix.shape[1]), int(matrix.shape[2]))] * matrix.shape[0])
        return polar(matrix, *settings)

    with mock.patch.object(norms, "polar", counting):
        yield shapes


def layers(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)), nn.Linear(width, 8))


def communication(kind: Kind, world: World) -> dict[str, Any]:
    """Of one step: messages, bytes and matrices."""
    result: dict[str, Any] = {}
    for place, (width, depth) in (("ddp", SIZES[0]), *(("rows", size) for size in SIZES)):
        model = layers(width, depth)
        net: Any = DistributedDataParallel(model) if place == "ddp" else fully_shard(model)
        optimizer = kind.make(model.parameters(), lr=0.1, weight_decay=1e-3)
        loss = net(torch.ones(4, width)).square().mean()
        loss.backward()
        with Recorder() as recorder, counted_matrices() as matrices:
            optimizer.step(loss=loss)
        result[f"{place} {width} {depth}"] = [recorder.calls, matrices]
    return result


SHAPES = {
    "matrix": ((8, 5), (1, 7), (5, 3, 3, 3), (9,), ()),
    "stack": ((3, 4, 6), (5, 6), (2, 3, 4, 5)),
    "rows": ((7, 6), (3, 2, 5), (9,)),
}
PLACES: dict[int, list[Any]] = {
    2: [[Shard(1)], [Shard(2)], [Shard(3)], [Replicate()]],
    4: [[Shard(i), Shard(j)] for i in (1, 2, 3) for j in (1, 2, 3)] + [[Replicate(), Shard(1)]],
}
"""Where each dimension of a mesh cuts a batch, whose first dimension numbers its tensors."""


def directions(kind: Kind, world: World) -> list[str]:
    """Where they are not those of one process, or not where their planes are."""
    problems = []
    mesh = init_device_mesh("cpu", (2, 2)[: world.ranks // 2])
    for layout, shapes in SHAPES.items():
        for shape, places in itertools.product(shapes, PLACES[world.ranks]):
            if max(getattr(place, "dim", 0) for place in places) > len(shape):
                continue
            torch.manual_seed(0)
            planes: list[Any] = []
            for batch in (3, 1, 3):
                plane = torch.randn(batch, *shape, dtype=torch.float64)
                planes.append((plane, layout, plane.relu() if layout == "rows" else None))
            cut: list[Any] = [
                tuple(distribute_tensor(x, mesh, places) if isinstance(x, Tensor) else x for x in p)
                for p in planes
            ]
            wanted = lifecycle.steepest(planes)
            found = sharding._steepest(lifecycle.steepest, cut)
            for D, (plane, *_), one in zip(found, cut, wanted, strict=True):
                if not (torch.allclose(whole(D), one) and sharding.cut(D) == sharding.cut(plane)):
                    problems.append(f"{layout} {shape} {places}")
    return problems


def placements(kind: Kind, world: World) -> list[str]:
    """Where the state is not cut as its parameter is, or keeps more than its part in memory."""
    problems = []
    for layout in ("rows", "columns") if world.ranks == 2 else ("rows",):
        training = Training(kind, world, layout).run(1)
        p: Any
        for name, p in training.model.named_parameters():
            for key, value in training.optimizer.state.get(p, {}).items():
                everywhere = all(place.is_replicate() for place in value.placements)
                good = value.placements == p.placements if value.dim() else everywhere
                shard = value.to_local()
                if not good or shard.untyped_storage().nbytes() != shard.nbytes:
                    problems.append(f"{layout} {name} {key}: {value.placements}")
    return problems


def averages(kind: Kind, world: World) -> dict[str, Any]:
    """AveragedModel of parameters in parts: what it says, or its weights after a few steps."""
    result: dict[str, Any] = {}
    for layout in ("rows", "tensor"):
        training = Training(kind, world, layout)
        try:
            averaged = AveragedModel(training.model, training.optimizer)
            for step in range(4):
                training.run(1, step)
                averaged.update_parameters(training.model)
            result[layout] = [whole(p) for p in averaged.module.parameters()]
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            result[layout] = str(error)
    return result


def save(kind: Kind, world: World, folder: Path) -> dict[str, Any]:
    """A checkpoint halfway, and where the training comes to that goes on."""
    folder.mkdir(exist_ok=True)
    training = Training(kind, world, "rows")
    model, optimizer = training.model, training.optimizer
    before = fingerprint(training.outcome()["values"] | {"gamma": None})
    dcp_state.get_optimizer_state_dict(model, optimizer)  # makes a step if there is no state
    after = fingerprint(training.outcome()["values"] | {"gamma": None})
    training.run(HALF)
    weights, state = dcp_state.get_state_dict(model, optimizer)
    dcp_save({"model": weights, "optimizer": state}, checkpoint_id=folder / str(kind))
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = dcp_state.get_state_dict(model, optimizer, options=options)
    if world.rank == 0:
        torch.save(full, folder / f"{kind}.full.pt")
    return training.run(HALF, HALF).outcome() | {"probed": before == after}


def load(kind: Kind, world: World, folder: Path) -> dict[str, Any]:
    """Where a training comes to that begins with a checkpoint in ``folder``; also a whole one, that
    all ranks have read, or the first one.
    """
    result = {}
    for way in ("cut", "whole", "first")[: 1 if kind is BARE else 3]:  # torch needs a state
        if way == "first" and world.ranks == 1:
            continue
        training = Training(kind, world, "rows", seed=7)
        model, optimizer = training.model, training.optimizer
        weights, state = dcp_state.get_state_dict(model, optimizer)
        options = dcp_state.StateDictOptions()
        if way == "cut":
            dcp_load({"model": weights, "optimizer": state}, checkpoint_id=folder / str(kind))
        else:
            weights, state = {}, {}
            options = dcp_state.StateDictOptions(True, broadcast_from_rank0=way == "first")
            if world.rank == 0 or way == "whole":
                weights, state = torch.load(folder / f"{kind}.full.pt", weights_only=True)
        dcp_state.set_model_state_dict(model, weights, options=options)
        dcp_state.set_optimizer_state_dict(model, optimizer, state, options=options)
        result[way] = training.run(HALF, HALF).outcome()
    return result


Check = tuple[str, Callable[[Kind, World], Any], Sequence[Kind]]
QUANTIZED = [kind for kind in MAIN_KINDS if kind.quantized]
SPECTRAL = [kind for kind in MAIN_KINDS if kind.norm == "spectral"]


def checks(ranks: int) -> list[Check]:
    """A name, what is run for each kind, and the kinds."""

    def layout(name: str, kinds: Sequence[Kind] = MAIN_KINDS) -> Check:
        return name, lambda kind, world: trained(kind, world, name), kinds

    on_both: list[Check] = [
        ("bad_numbers", bad_numbers, MAIN_KINDS),
        ("communication", communication, COUNTED if ranks == 2 else SPECTRAL),
        ("placements", placements, MAIN_KINDS),
        ("directions", directions, SPECTRAL[:1]),
        ("loaded", lambda kind, world: load(kind, world, world.folder / "others"), SAVED),
    ]
    if ranks == 4:
        return [layout("rows"), layout("hybrid"), layout("both"), *on_both]
    main = [groups, clipped, half_precision, refusals, no_values, averages]
    return [
        *(layout("ddp", KINDS), layout("rows", KINDS), layout("columns"), layout("tensor")),
        *((check.__name__, check, MAIN_KINDS) for check in main),
        ("written", written, QUANTIZED),
        ("saved", lambda kind, world: save(kind, world, world.folder / "saved"), SAVED),
        *on_both,
    ]


def main() -> None:
    """Runs the checks for this number of ranks, and leaves their results in RANK.pt.

    The first one that raises is the last; where it did so on one rank alone, the others' next
    message finds nobody.
    """
    world = World(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    torch.set_num_threads(1)
    logging.disable()
    store = FileStore(str(world.folder / "store"), world.ranks)
    dist.init_process_group(
        "gloo", store=store, rank=world.rank, world_size=world.ranks, timeout=PATIENCE
    )
    results: dict[str, Any] = {}
    try:
        for name, check, kinds in checks(world.ranks):
            start = time.perf_counter()
            results[name] = {str(kind): check(kind, world) for kind in kinds}
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    except BaseException:  # which a CheckpointException is
        results["error"] = traceback.format_exc()
    torch.save(results, world.folder / f"{world.rank}.pt")
    if "error" in results:
        os._exit(0)  # a broken group may wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
