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
from helpers import KINDS, MAIN_KINDS, Kind, fingerprint, forward_weights, same_bits
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint import load as dcp_load  # type: ignore[attr-defined]
from torch.distributed.checkpoint import save as dcp_save  # type: ignore[attr-defined]
from torch.distributed.checkpoint import state_dict as whole_or_cut
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, relu
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfw_opt import DFW, AveragedModel, norms, param_groups

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
    """What the checks returned on each rank."""

    def __init__(self, by_rank: list[dict[str, Any]]) -> None:
        self.by_rank = by_rank

    def __getitem__(self, check: str) -> list[Any]:
        """Rank by rank; fails the test where a rank did not get that far."""
        if errors := [r["error"][-2500:] for r in self.by_rank if check not in r]:
            pytest.fail(f"{check} on {len(errors)} ranks, of which one:\n{errors[0]}")
        return [results[check] for results in self.by_rank]


def launch(ranks: int, folder: Path) -> Results:
    """Runs this file once a rank and returns what the checks returned."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = []
    for rank in range(ranks):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(rank), str(ranks), str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), (folder / f"{codes.index(max(codes))}.log").read_text()[-3000:]
    return Results([torch.load(folder / f"{r}.pt", weights_only=True) for r in range(ranks)])


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


def _columns(p: nn.Parameter) -> Shard | None:
    return Shard(1) if p.dim() > 1 and p.shape[1] % 2 == 0 else None


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
        settings["shard_placement_fn"] = _columns
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
        return values | {"height": self.optimizer._height, "gamma": self.optimizer.gamma}

    def outcome(self) -> dict[str, Any]:
        """The whole tensors, on every rank."""
        values = {name: whole(value) for name, value in self.tensors().items()}
        quantized = [self._quantized(group, values) for group in self.optimizer.param_groups]
        skipped = int(self.optimizer.skipped_steps)
        return {
            "gammas": self.gammas,
            "skipped": skipped,
            "values": values,
            "exact": all(quantized),
        }

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
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def trained(kind: Kind, world: World, layout: str, **settings: Any) -> dict[str, Any]:
    training = Training(kind, world, layout, **settings).run(STEPS)
    return training.outcome() | {"digests": training.digests}


def layout(name: str, kinds: Sequence[Kind] = KINDS) -> Callable[[World], dict[str, Any]]:
    def check(world: World) -> dict[str, Any]:
        return {str(kind): trained(kind, world, name) for kind in kinds}

    check.__name__ = name
    return check


def groups(world: World) -> dict[str, Any]:
    """A group of the two ranks is all of them; alone, each makes the steps of its own batch."""
    result = {}
    for kind in MAIN_KINDS:
        pair = trained(kind, world, "ddp", process_group=dist.new_group([0, 1]))
        result[str(kind)] = [pair["gammas"]]
        alone = Training(kind, World(), "ddp", process_group=None)
        with recorded_communication() as calls:
            alone.run(2 + world.rank)  # as many as it likes
        cut = Training(kind, world, "rows", process_group=None).run(STEPS)
        result[str(kind)] += [len(calls), alone.gammas, cut.gammas]
    return result


def clipped(kind: Kind, world: World) -> dict[str, Any]:
    """Gradients scaled by s belong to the loss sℓ. Then: a layer without gradients, one frozen."""
    training = Training(kind, world, "rows")
    for step in range(STEPS):
        loss = training.backward(step)
        norm = whole(nn.utils.clip_grad_norm_(training.model.parameters(), 0.5))
        training.model.conv.requires_grad_(step < 2 or step > 4)
        training.model.last.bias.grad = None
        training.step(loss * (0.5 / (norm + 1e-6)).clamp(max=1.0))
    return training.outcome()


def others(world: World) -> dict[str, Any]:
    return {str(kind): clipped(kind, world) for kind in MAIN_KINDS}


def half_precision(world: World) -> dict[str, Any]:
    """FSDP2 as it is used: a model made on the meta device, computing in bfloat16."""
    result = {}
    for kind in MAIN_KINDS:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard, low = {"mp_policy": policy}, torch.float32
        training = Training(kind, world, "rows", dtype=low, shard=shard).run(STEPS)
        dtypes = {str(v.dtype) for s in training.optimizer.state.values() for v in s.values()}
        result[str(kind)] = training.outcome() | {"dtypes": sorted(dtypes)}
    return result


BAD = {1: "loss", 2: "infinite loss", 4: "gradient", 5: "infinite gradient"}


def bad_numbers(world: World) -> dict[str, Any]:
    """On the last rank only. At the end: what a run without those steps leaves, to the bit."""

    def end(kind: Kind, layout: str, steps: Sequence[int]) -> Training:
        training = Training(kind, world, layout)
        here = world.rank == world.ranks - 1
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
        for kind in MAIN_KINDS:
            every = end(kind, layout, range(7))
            good = end(kind, layout, [step for step in range(7) if step not in BAD])
            same = every.digests[-1] == good.digests[-1]
            skipped = int(every.optimizer.skipped_steps)
            result[f"{kind} {layout}"] = [same, skipped, every.gammas]
    return result


def written(world: World) -> dict[str, Any]:
    """One rank alone writes to a quantized weight. The step is that of weights left alone."""
    result = {}
    for kind in (kind for kind in MAIN_KINDS if kind.quantized):
        runs = []
        for write in (False, True):
            training = Training(kind, world, "rows").run(1)
            loss = training.backward(1)
            if write and world.rank == 0:
                with torch.no_grad():
                    local(training.model.hidden.weight).mul_(1.5)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                training.step(loss)
            training.run(1, 2)
            runs.append(
                [training.digests, [str(w.message) for w in caught if "DTensor" not in str(w)]]
            )
        result[str(kind)] = runs
    return result


def refusals(world: World) -> dict[str, Any]:
    """What each rank says where only the last one has a reason, and whether all is as before."""
    result: dict[str, Any] = {}
    last = world.rank == world.ranks - 1

    def refused(training: Training, function: Callable[..., object], *args: Any) -> list[Any]:
        before = fingerprint(training.outcome())
        try:
            function(*args)
        except ValueError as error:
            return [str(error), fingerprint(training.outcome()) == before]
        return ["", False]

    for kind in MAIN_KINDS:
        training = Training(kind, world, "rows").run(1)
        nan, lacking = (copy.deepcopy(training.optimizer.state_dict()) for _ in range(2))
        if last:
            first = next(v for s in nan["state"].values() for v in s.values() if v.dim())
            local(first).fill_(math.nan)
            first_state = next(iter(lacking["state"].values()))
            first_state.pop(next(iter(first_state)))
        columns = Training(kind, world, "columns").run(1).optimizer.state_dict()
        for name, state in (("nan", nan), ("lacks", lacking), ("columns", columns)):
            result[f"{kind} {name}"] = refused(training, training.optimizer.load_state_dict, state)
        if kind.quantized:
            p = Training(BARE, world, "rows").model.hidden.weight
            if last:
                local(p.detach()).fill_(math.nan)
            result[f"{kind} model"] = refused(training, kind.make, [p])
    return result


def no_values(world: World) -> dict[str, Any]:
    """FSDP2 on meta, made real later: the optimizer made after that, or before it."""

    def end(kind: Kind, before: bool) -> Any:
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
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(p.shape, generator=generator)
            rows = values.chunk(world.ranks)
            with torch.no_grad():
                local(p).copy_(rows[world.rank] if world.rank < len(rows) else values[:0])
        optimizer = optimizer or make(param_groups(model, skip="last"))
        for step in range(2):
            inputs, labels = make_batch(step)
            loss = cross_entropy(model(inputs.float()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
        return [whole(p) for p in model.parameters()]

    return {
        f"{kind} {b}": end(kind, b == "before") for kind in MAIN_KINDS for b in ("before", "after")
    }


Call = tuple[str, int]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

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
def recorded_communication() -> Iterator[list[Call]]:
    """Every collective inside, whatever function started it: its name, and the bytes of the larger
    of what a rank gives and gets.

    What the reducer of DistributedDataParallel does is not seen, as it does not go through Python.
    """
    with _Recorder() as recorder:
        yield recorder.calls


@contextmanager
def counted_matrices() -> Iterator[list[tuple[int, int]]]:
    """The shapes of the matrices that this rank orthogonalises."""
    shapes: list[tuple[int, int]] = []
    polar = norms.polar

    def counting(matrix: Tensor) -> Tensor:
        if matrix.shape[1] <= matrix.shape[2]:  # others come again, transposed
            shapes.extend([(int(matrix.shape[1]), int(matrix.shape[2]))] * matrix.shape[0])
        return polar(matrix)

    with mock.patch.object(norms, "polar", counting):
        yield shapes


def layers(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)), nn.Linear(width, 8))


def communication(world: World) -> dict[str, Any]:
    """Of one step: messages, bytes and matrices."""
    result: dict[str, Any] = {}
    for kind in COUNTED if world.ranks == 2 else MAIN_KINDS[:3]:
        for width, depth in SIZES:
            for place in ("ddp", "rows") if (width, depth) == SIZES[0] else ("rows",):
                model = layers(width, depth)
                net: Any = DistributedDataParallel(model) if place == "ddp" else fully_shard(model)
                optimizer = kind.make(model.parameters(), lr=0.1, weight_decay=1e-3)
                loss = net(torch.ones(4, width)).square().mean()
                loss.backward()
                with recorded_communication() as calls, counted_matrices() as matrices:
                    optimizer.step(loss=loss)
                result[f"{kind} {place} {width} {depth}"] = [calls, matrices]
    return result


def placements(world: World) -> list[str]:
    """Where the state is not cut as its parameter is, or keeps more than its part in memory."""
    problems = []
    for layout in ("rows", "columns") if world.ranks == 2 else ("rows",):
        for kind in MAIN_KINDS:
            training = Training(kind, world, layout).run(1)
            p: Any
            for name, p in training.model.named_parameters():
                for key, value in training.optimizer.state.get(p, {}).items():
                    whole = all(place.is_replicate() for place in value.placements)
                    good = value.placements == p.placements if value.dim() else whole
                    shard = value.to_local()
                    good &= shard.untyped_storage().nbytes() == shard.nbytes
                    if not good:
                        problems.append(f"{layout} {kind} {name} {key}: {value.placements}")
    return problems


def averages(world: World) -> dict[str, Any]:
    """AveragedModel of parameters in parts: what it says, or its weights after a few steps."""
    result: dict[str, Any] = {}
    for kind in MAIN_KINDS:
        for layout in ("rows", "tensor"):
            training = Training(kind, world, layout)
            try:
                averaged = AveragedModel(training.model, training.optimizer)
                for step in range(4):
                    training.run(1, step)
                    averaged.update_parameters(training.model)
            except (AssertionError, RuntimeError, TypeError, ValueError) as error:
                result[f"{kind} {layout}"] = f"{type(error).__name__}: {error}"
            else:
                result[f"{kind} {layout}"] = [whole(p) for p in averaged.module.parameters()]
    return result


FULL = whole_or_cut.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(world: World, folder: Path) -> dict[str, Any]:
    """Checkpoints halfway, and where the trainings come to that go on."""
    result = {}
    for kind in SAVED:
        training = Training(kind, world, "rows")
        model, optimizer = training.model, training.optimizer
        before = fingerprint(training.outcome()["values"] | {"gamma": None})
        whole_or_cut.get_optimizer_state_dict(model, optimizer)  # makes a step if there is no state
        after = fingerprint(training.outcome()["values"] | {"gamma": None})
        training.run(HALF)
        weights, state = whole_or_cut.get_state_dict(model, optimizer)
        dcp_save({"model": weights, "optimizer": state}, checkpoint_id=folder / str(kind))
        full = [
            whole_or_cut.get_model_state_dict(model, options=FULL),
            whole_or_cut.get_optimizer_state_dict(model, optimizer, options=FULL),
        ]
        if world.rank == 0:
            torch.save(full, folder / f"{kind}.full.pt")
        result[str(kind)] = training.run(HALF, HALF).outcome() | {"probed": before == after}
    return result


def load(world: World, folder: Path) -> dict[str, Any]:
    """Where trainings come to that begin with the checkpoints in ``folder``, also whole ones."""
    result = {}
    for kind in SAVED:
        training = Training(kind, world, "rows", seed=7)
        model, optimizer = training.model, training.optimizer
        weights, state = whole_or_cut.get_state_dict(model, optimizer)
        dcp_load({"model": weights, "optimizer": state}, checkpoint_id=folder / str(kind))
        whole_or_cut.set_state_dict(
            model, optimizer, model_state_dict=weights, optim_state_dict=state
        )
        result[str(kind)] = training.run(HALF, HALF).outcome()
        if kind is BARE:
            continue  # torch cannot load a whole one with no state in it, that of SGD neither
        for broadcast in (False, True) if world.ranks > 1 else (False,):
            training = Training(kind, world, "rows", seed=7)
            model, optimizer = training.model, training.optimizer
            full: list[Any] = [{}, {}]
            if world.rank == 0 or not broadcast:
                full = torch.load(folder / f"{kind}.full.pt", weights_only=True)
            options = whole_or_cut.StateDictOptions(
                full_state_dict=True, broadcast_from_rank0=broadcast
            )
            whole_or_cut.set_model_state_dict(model, full[0], options=options)
            whole_or_cut.set_optimizer_state_dict(model, optimizer, full[1], options=options)
            result[f"{kind} whole {broadcast}"] = training.run(HALF, HALF).outcome()
    return result


def saved(world: World) -> dict[str, Any]:
    (world.folder / "saved").mkdir(exist_ok=True)
    dist.barrier()
    return save(world, world.folder / "saved")


def loaded(world: World) -> dict[str, Any]:
    return load(world, world.folder / "others")


CHECKS: dict[int, list[Callable[[World], Any]]] = {
    2: [
        *[layout("ddp"), layout("rows"), layout("columns", MAIN_KINDS)],
        *[layout("tensor", MAIN_KINDS), groups, others, half_precision, bad_numbers, written],
        *[refusals, no_values, communication, placements, averages, saved, loaded],
    ],
    4: [
        *[layout("rows", MAIN_KINDS), layout("hybrid", MAIN_KINDS), layout("both", MAIN_KINDS)],
        *[bad_numbers, placements, communication, loaded],
    ],
}


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
        for check in CHECKS[world.ranks]:
            start = time.perf_counter()
            results[check.__name__] = check(world)
            print(f"{check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
    except BaseException:  # which a CheckpointException is
        results["error"] = traceback.format_exc()
    torch.save(results, world.folder / f"{world.rank}.pt")
    if "error" in results:
        os._exit(0)  # a broken group may wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
