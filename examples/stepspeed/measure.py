"""Steps in turns: their time, their γ, and the memory at their peak."""

import random
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile
from torch.nn import Parameter
from torch.optim import Optimizer

from dfw_opt.quantizers import QUANTIZERS, Pulled

from .contenders import CAP, NONE, SEARCH, Contender
from .shapes import Shape

WARM_UP = 8
SHARED_FROM = 1 << 23
"""How many parameters are too many to stay in a cache, so that it does no harm to share them."""

_TEMPORARIES = 10
# Of the decrease that a full step would bring if there were no box. γ is at least as much, and less
# than 1 as long as the weights that can move bring more.
_LOSSES = {CAP: 100.0, SEARCH: 0.5}


@dataclass(eq=False)
class Job:
    """One optimizer in one situation, and what has been measured."""

    contender: Contender
    situation: str
    optimizer: Any
    loss: Tensor | None = None
    milliseconds: list[float] = field(default_factory=list)
    gammas: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    """Beyond parameters, gradients and state, at the peak of a step."""

    def set_loss(self, device: torch.device) -> None:
        """Makes the loss such that γ lies where it should."""
        # The cap has room for all that may change, and need not be set again.
        if self.situation == SEARCH or (self.situation == CAP and self.loss is None):
            loss = _LOSSES[self.situation] * curvature(self.optimizer)
            self.loss = torch.tensor(loss, device=device)

    def step(self) -> None:
        if self.loss is None:
            self.optimizer.step()
        else:
            self.optimizer.step(loss=self.loss)

    @property
    def strays(self) -> int:
        """How many steps were not in the situation that was asked for."""
        right = [g == 1 if self.situation == CAP else 0 < g < 1 for g in self.gammas]
        return right.count(False)

    @property
    def state_bytes(self) -> int:
        states = self.optimizer.state.values()
        return sum(x.nbytes for state in states for x in state.values() if isinstance(x, Tensor))


def measure(
    shape: Shape, contenders: Sequence[Contender], device: torch.device, repeats: int
) -> list[Job]:
    """Every contender in each of its situations, ``repeats`` times, in turns.

    Each round has new gradients, the same for all, and another order, as what ran before decides
    what a step finds in the caches. The gradients keep quantized and boxed weights spread over
    their box, part of them at its walls, so that nothing needs to be reset.
    """
    weights = shape.draw(device)
    scales = [float(w.abs().max()) or 1.0 for w in weights]
    gradients = [torch.empty_like(w) for w in weights]
    generator = torch.Generator(device).manual_seed(1)
    jobs = _jobs(contenders, weights, gradients, shape.parameters >= SHARED_FROM)
    del weights
    # Apart, because a second step with the same gradient meets more walls than the first.
    turns = [[job for job in jobs if (job.situation == SEARCH) == late] for late in (False, True)]
    order = random.Random(0)

    def each(run: Callable[[Job], None]) -> None:
        for turn in turns:
            for gradient, scale in zip(gradients, scales, strict=True):
                gradient.normal_(0, scale, generator=generator)
            for job in turn:
                job.set_loss(device)
            for job in order.sample(turn, len(turn)):
                run(job)

    def take_time(job: Job) -> None:
        job.milliseconds.append(milliseconds(job.step, device))
        if job.situation != NONE:
            job.gammas.append(float(job.optimizer.gamma))

    def take_memory(job: Job) -> None:
        job.extra_bytes = peak_bytes(job.step, device)

    for _ in range(WARM_UP):
        each(Job.step)
    for _ in range(repeats):
        each(take_time)
    each(take_memory)
    return jobs


def needed_bytes(shape: Shape, contenders: Sequence[Contender]) -> int:
    """What :func:`measure` takes at most, roughly."""
    shared = shape.parameters >= SHARED_FROM
    copies = 2 + _TEMPORARIES  # the weights that were drawn, the gradients
    copies += sum(c.state + (c.constrained or not shared) for c in contenders)
    return 4 * copies * shape.parameters


def curvature(optimizer: Optimizer) -> float:
    """By how much a full step would lower the linearised loss if there were no box."""
    total = 0.0
    for group in optimizer.param_groups:
        for p in group["params"]:
            pulled = {"": Pulled(p.grad, None)}
            if group.get("quantizer") is not None:
                quantizer = QUANTIZERS[group["quantizer"]]
                pulled = quantizer.pull_back(p.grad, optimizer.state[p], group)
            for d, M in pulled.values():
                squares = torch.linalg.vector_norm(d).square()
                total += group["lr"] * float(squares if M is None else M * squares)
    return total


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """How long ``step`` takes, until the device is done with it."""
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """How much more memory is in use at the peak of ``step`` than before it.

    On CUDA what torch's allocator says of the device. On the CPU the sum of two: torch's
    allocations, which its profiler reports one by one, and Python's own, buffers for compiled code
    among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.max_memory_allocated(device)
        return peak - before
    with profile(profile_memory=True) as profiled:
        tracemalloc.start()
        try:
            step()
            python = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    results: Any = profiled.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    # What is given back is negative.
    in_use: Iterator[int] = accumulate((event.nbytes() for event in events), initial=0)
    return python + max(in_use)


def _jobs(
    contenders: Sequence[Contender], weights: list[Tensor], gradients: list[Tensor], shared: bool
) -> list[Job]:
    """All optimizers, those of unconstrained weights on the same parameters if ``shared``."""
    common = [Parameter(w) for w in weights]
    jobs = []
    # The weights that are common move only once all have got theirs.
    for contender in contenders:
        params = common
        if contender.constrained or not shared:
            params = [Parameter(w.clone()) for w in weights]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer = contender.make(params)
        jobs += [Job(contender, situation, optimizer) for situation in contender.situations]
    return jobs
