"""Real processes that talk over gloo: starting them, and what their scripts share.

A script is run once a rank as ``SCRIPT RANK RANKS FOLDER``, and calls :func:`run` with its checks:
functions that use the processes and return what there is to assert, which the tests do.
"""

# torch leaves what a dispatch mode inherits untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import datetime
import hashlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import fingerprint
from torch import Tensor
from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests"))),
}
PATIENCE = datetime.timedelta(seconds=60)
"""How long a rank waits for the others. Where it runs out, they are not coming."""

SAMPLES = 12
SHARDS = {1: (12,), 2: (3, 9), 4: (1, 2, 3, 6)}
"""How many samples of a batch each rank has."""


# --------------------------------------------------------------------------------------------------
# In the tests
# --------------------------------------------------------------------------------------------------


class Results:
    """What the checks returned on each rank."""

    def __init__(self, by_rank: list[dict[str, Any]]) -> None:
        self.by_rank = by_rank

    def __getitem__(self, check: str) -> list[Any]:
        """What ``check`` returned, rank by rank; fails the test where it did not get that far."""
        errors = {rank: str(r[check]["error"]) for rank, r in self._failed(check)}
        if errors:
            first = min(errors)
            pytest.fail(f"{check}, ranks {sorted(errors)}; rank {first}:\n{errors[first][-2000:]}")
        return [results[check]["value"] for results in self.by_rank]

    def _failed(self, check: str) -> list[tuple[int, dict[str, Any]]]:
        return [(i, r) for i, r in enumerate(self.by_rank) if "error" in r[check]]


def launch(script: str, ranks: int, folder: Path, timeout: float = 300) -> Results:
    """Runs ``script`` once a rank and returns what the checks returned."""
    folder.mkdir(exist_ok=True)
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as file:
                command = [sys.executable, script, str(rank), str(ranks), str(folder)]
                processes.append(
                    subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)
                )
        end = time.monotonic() + timeout
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            time.sleep(0.05)
            if any(p.poll() not in (None, 0) for p in processes):
                end = min(end, time.monotonic() + 10)  # the others end by themselves, or never
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        output = "\n".join(f"rank {i}:\n{log.read_text()[-3000:]}" for i, log in enumerate(logs))
        pytest.fail(f"exit codes {codes} (None: was still running)\n{output}")
    return Results([torch.load(folder / f"{r}.pt", weights_only=True) for r in range(ranks)])


# --------------------------------------------------------------------------------------------------
# In the scripts
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """Where a script is run."""

    rank: int = 0
    ranks: int = 1
    folder: Path = Path()


def run(checks: Mapping[int, Sequence[Callable[[World], Any]]]) -> None:
    """Runs the checks for this number of ranks, and leaves their results in RANK.pt.

    One that raises on all ranks alike leaves the next ones in step. Where it raises on some only,
    nothing after it is run.
    """
    world = World(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    torch.set_num_threads(1)
    store = FileStore(str(world.folder / "store"), world.ranks)
    dist.init_process_group(
        "gloo", store=store, rank=world.rank, world_size=world.ranks, timeout=PATIENCE
    )
    ends = PrefixStore("ends", store)
    # A little longer than a collective waits, so that a rank left alone in one can say so.
    ends.set_timeout(PATIENCE + datetime.timedelta(seconds=10))
    results: dict[str, Any] = {}
    in_step = True
    for check in checks[world.ranks]:
        name, start = check.__name__, time.perf_counter()
        if not in_step:
            results[name] = {"error": "not run: the ranks were out of step after a failure"}
            continue
        try:
            results[name] = {"value": check(world)}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        outcome = min(results[name])
        ends.set(f"{name} {world.rank}", outcome)
        try:
            others = {ends.get(f"{name} {rank}") for rank in range(world.ranks)}
        except Exception:
            others = set()
        in_step = len(others) == 1
        print(f"{name}: {outcome}, {time.perf_counter() - start:.1f} s", flush=True)
    torch.save(results, world.folder / f"{world.rank}.pt")
    if in_step:
        dist.destroy_process_group()
    else:
        os._exit(0)  # a broken group may wait for ever


def share(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's samples of a batch."""
    parts: tuple[Tensor, ...] = torch.split(tensor, list(SHARDS[ranks]))
    return parts[rank]


def weight(rank: int, ranks: int) -> float:
    """What makes the mean over ranks of the mean losses the mean loss of the joined batch."""
    return ranks * SHARDS[ranks][rank] / SAMPLES


def local(tensor: Tensor) -> Tensor:
    """This rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all shards joined; every rank has to ask for it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def flat(optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and state by name, such as ``3.latent``, in the order of the optimizer."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    values = {str(i): p for i, p in enumerate(params)}
    for i, p in enumerate(params):
        state = optimizer.state.get(p, {})
        values |= {f"{i}.{key}": state[key] for key in sorted(state)}
    return values


def digest(optimizer: Any) -> str:
    """A short text that changes with any bit of parameters, state, γ, or this rank's shard."""
    values = {key: local(value) for key, value in flat(optimizer).items()}
    values |= {"gamma": local(optimizer.gamma), "skipped": local(optimizer.skipped_steps)}
    return hashlib.sha256(repr(fingerprint(values)).encode()).hexdigest()


Call = tuple[str, int, int]


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
            # The first argument holds what comes out: one tensor, or all of a list of lists.
            tensors = [t for t in _leaves(args[0]) if isinstance(t, Tensor)]
            elements, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
            self.calls.append((name, elements, size))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_communication() -> Iterator[list[Call]]:
    """Every collective inside, whatever function started it: its name, elements and bytes.

    What the reducer of DistributedDataParallel does is not seen, as it does not go through Python.
    """
    with _Recorder() as recorder:
        yield recorder.calls


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
