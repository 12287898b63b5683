"""All of torch's schedulers: they write into the groups what they write into SGD's, and it counts.

The classes are looked up in torch, so that a scheduler that is new there fails a test here.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import reference
import torch
from helpers import (
    KINDS,
    MAIN_KINDS,
    PATHS,
    WIDEST,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    make_params,
    same_bits,
    to_numpy,
)
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, lr_scheduler, swa_utils

from dfw_opt import DFW

STEPS = 12
# Falls, then stays: ReduceLROnPlateau reduces more than once.
METRICS = (1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.85, 0.7, 0.9, 0.9, 0.6, 0.6)


class Case(NamedTuple):
    """A scheduler with settings, for an optimizer of two groups."""

    scheduler: type
    settings: str
    make: Callable[[Any], Any]

    def __str__(self) -> str:
        return " ".join(filter(None, (self.scheduler.__name__, self.settings)))


CASES = [
    Case(
        lr_scheduler.LambdaLR,
        "one function",
        lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    ),
    Case(
        lr_scheduler.LambdaLR,
        "a function a group",
        lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 0.9**step]),
    ),
    Case(
        lr_scheduler.MultiplicativeLR,
        "a function a group",
        lambda o: lr_scheduler.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 1.1]),
    ),
    Case(lr_scheduler.StepLR, "", lambda o: lr_scheduler.StepLR(o, 2, 0.5)),
    Case(lr_scheduler.MultiStepLR, "", lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4], 0.5)),
    Case(lr_scheduler.ConstantLR, "", lambda o: lr_scheduler.ConstantLR(o, 0.5, 3)),
    Case(lr_scheduler.LinearLR, "", lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5)),
    Case(lr_scheduler.ExponentialLR, "", lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
    Case(lr_scheduler.PolynomialLR, "", lambda o: lr_scheduler.PolynomialLR(o, 7, 2.0)),
    Case(lr_scheduler.CosineAnnealingLR, "", lambda o: lr_scheduler.CosineAnnealingLR(o, 6)),
    Case(
        lr_scheduler.CosineAnnealingWarmRestarts,
        "",
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    ),
    Case(
        lr_scheduler.CyclicLR,
        "momentum",
        lambda o: lr_scheduler.CyclicLR(
            o, [0.01, 0.02], [0.3, 0.5], 3, base_momentum=0.7, max_momentum=0.95
        ),
    ),
    Case(
        lr_scheduler.CyclicLR,
        "without momentum",
        lambda o: lr_scheduler.CyclicLR(
            o, 0.01, 0.3, 2, 3, mode="exp_range", gamma=0.9, cycle_momentum=False
        ),
    ),
    Case(
        lr_scheduler.OneCycleLR,
        "momentum",
        lambda o: lr_scheduler.OneCycleLR(
            o, [0.3, 0.6], total_steps=STEPS + 1, base_momentum=[0.7, 0.8], max_momentum=0.95
        ),
    ),
    Case(
        lr_scheduler.OneCycleLR,
        "three phases, without momentum",
        lambda o: lr_scheduler.OneCycleLR(
            o,
            0.3,
            total_steps=STEPS + 1,
            three_phase=True,
            anneal_strategy="linear",
            cycle_momentum=False,
        ),
    ),
    Case(
        lr_scheduler.ReduceLROnPlateau,
        "",
        lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[0.03, 0.01]),
    ),
    Case(
        lr_scheduler.SequentialLR,
        "",
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
        ),
    ),
    Case(
        lr_scheduler.SequentialLR,
        "momentum",
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.CyclicLR(o, 0.01, 0.3, 3)], [3]
        ),
    ),
    Case(
        lr_scheduler.ChainedScheduler,
        "",
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.5, 2)]
        ),
    ),
    Case(
        lr_scheduler.ChainedScheduler,
        "momentum",
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.CyclicLR(o, 0.01, 0.3, 3), lr_scheduler.ExponentialLR(o, 0.9)]
        ),
    ),
    Case(
        swa_utils.SWALR,
        "",
        lambda o: swa_utils.SWALR(
            o,
            [0.01, 0.5],  # type: ignore[arg-type]
            anneal_epochs=4,
            anneal_strategy="linear",
        ),
    ),
]
# Those that say "momentum" in their settings have to change it.
SETS_MOMENTUM = {case for case in CASES if case.settings == "momentum"}
ALL_CASES = pytest.mark.parametrize("case", CASES, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)


def two_groups(params: list[Parameter], as_lr: Callable[[float], Any] = float) -> list[Any]:
    return [
        {"params": [params[0]], "lr": as_lr(0.1)},
        {"params": [params[1]], "lr": as_lr(0.2), "momentum": 0.8},
    ]


def matrices(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return make_params(((3, 4), (2, 5)), dtype)


def advance(scheduler: Any, number: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(METRICS[number])
    else:
        scheduler.step()


def test_every_scheduler_of_torch_is_listed() -> None:
    base = lr_scheduler.LRScheduler
    found = {
        cls
        for module in (lr_scheduler, swa_utils)
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, base)
    }
    # The base class, and its old name.
    found = {cls for cls in found if cls is not base and not cls.__name__.startswith("_")}
    assert len(found) >= 16
    assert {case.scheduler for case in CASES} == found


def schedule(
    optimizer: Any, params: list[Parameter], case: Case
) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """What a scheduler has written into each group, from its construction on, and its warnings."""
    own = {*SGD(params).defaults, *optimizer.defaults, "params"} - {"lr", "momentum"}
    written = []

    def look() -> None:
        written.append(
            [
                {
                    key: float(value) if isinstance(value, Tensor) else value
                    for key, value in group.items()
                    if key not in own
                }
                for group in optimizer.param_groups
            ]
        )

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler = case.make(optimizer)
        look()
        for number in range(STEPS):
            draw_gradients(params, number)
            if isinstance(optimizer, SGD):
                optimizer.step()
            else:
                optimizer.step(loss=0.3)
            advance(scheduler, number)
            look()
    return written, [str(warning.message) for warning in caught]


@THREE
@ALL_CASES
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_writes_what_it_writes_for_sgd(kind: Kind, case: Case, lr: str) -> None:
    """lr, momentum and the scheduler's own keys, of every group and after every step."""

    def as_lr(value: float) -> Any:
        return value if lr == "number" else torch.tensor(value, dtype=torch.float64)

    params = matrices()
    ours = kind.optimizer(two_groups(params, as_lr), momentum=0.9)
    tensors = [group["lr"] for group in ours.param_groups]
    found = schedule(ours, params, case)
    if lr == "tensor":
        for group, tensor in zip(ours.param_groups, tensors, strict=True):
            assert group["lr"] is tensor
    assert_consistent(ours)

    params = matrices()
    sgd = SGD(two_groups(params, as_lr), lr=as_lr(0.1), momentum=0.9, foreach=False)
    expected = schedule(sgd, params, case)
    assert found == expected
    for changing in ("lr", "momentum") if case in SETS_MOMENTUM else ("lr",):
        for index in range(2):
            assert len({groups[index][changing] for groups in found[0]}) > 1


@THREE
@pytest.mark.parametrize("path", PATHS)
@ALL_CASES
def test_each_step_goes_by_what_is_written(kind: Kind, path: str, case: Case) -> None:
    """Against the reference, which is given lr and momentum of the groups."""
    params = matrices(WIDEST[path])
    settings = [
        reference.Settings(
            weight_decay=0.1,
            quantizer=kind.name if kind.quantized else None,
            radius=1.0 if kind.quantized else None,
        )
        for _ in params
    ]
    expected = [
        reference.make_parameter(to_numpy(p), s) for p, s in zip(params, settings, strict=True)
    ]
    optimizer = kind.optimizer(two_groups(params), weight_decay=0.1, **PATHS[path])
    scheduler = case.make(optimizer)
    seen = set()
    for number in range(STEPS):
        draw_gradients(params, number)
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            setting.lr, setting.momentum = float(group["lr"]), group["momentum"]
            seen.add((setting.lr, setting.momentum))
        gradients = [to_numpy(p.grad) for p in params if p.grad is not None]
        reference.step(expected, 0.3, gradients)
        optimizer.step(loss=0.3)
        advance(scheduler, number)
    assert len(seen) > 2
    for p, e in zip(params, expected, strict=True):
        rtol, atol = (1e-9, 1e-10) if p.dtype == torch.float64 else (1e-3, 1e-4)
        after = torch.tensor(e.forward()).to(p)
        torch.testing.assert_close(p.detach(), after, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@ALL_CASES
def test_training_runs(kind: Kind, case: Case) -> None:
    """With a closure, which a scheduler's wrapper of `step` has to pass on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(64, 6)
    labels = (x @ torch.randn(6, 3)).argmax(1)
    optimizer = kind.make(model.parameters())
    if len(optimizer.param_groups) == 1:
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2, 2))]})
    scheduler = case.make(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    losses = []
    for number in range(STEPS):
        losses.append(float(optimizer.step(closure).detach()))
        advance(scheduler, number)
    assert min(losses[-3:]) < 0.9 * losses[0]
    assert_consistent(optimizer)


@THREE
@pytest.mark.parametrize("when", [1, 5])
@ALL_CASES
def test_resumes_bit_for_bit(kind: Kind, case: Case, when: int) -> None:
    """A new process loads parameters, optimizer and scheduler, and goes on as if never stopped."""
    outcomes = []
    for interrupted in (False, True):
        params = matrices()
        optimizer = kind.optimizer(two_groups(params), weight_decay=0.1)
        scheduler = case.make(optimizer)
        for number in range(STEPS):
            if interrupted and number == when:
                model, state = io.BytesIO(), io.BytesIO()
                torch.save(([p.detach() for p in params], optimizer.state_dict()), model)
                torch.save(scheduler.state_dict(), state)
                model.seek(0)
                state.seek(0)
                values, saved = torch.load(model, weights_only=True)
                params = [Parameter(value) for value in values]
                optimizer = kind.optimizer(two_groups(params), weight_decay=0.1)
                scheduler = case.make(optimizer)
                optimizer.load_state_dict(saved)
                # What a scheduler saves is torch's affair.
                scheduler.load_state_dict(torch.load(state, weights_only=False))
            draw_gradients(params, number)
            optimizer.step(loss=0.3)
            advance(scheduler, number)
        outcomes.append(everything(optimizer))
    assert outcomes[0] == outcomes[1]


class TestZero:
    @THREE
    def test_warm_up_from_zero_leaves_the_weights(self, kind: Kind) -> None:
        params = matrices()
        optimizer = kind.optimizer(two_groups(params), weight_decay=0.1)
        scheduler = lr_scheduler.LambdaLR(
            optimizer, [lambda step: float(step >= 2), lambda step: float(step >= 3)]
        )
        before = clone_params(params)
        for number in range(4):
            draw_gradients(params, number)
            optimizer.step(loss=0.3)
            for index, (p, q) in enumerate(zip(params, before, strict=True)):
                assert same_bits(p, q) == (number < 2 + index)
            scheduler.step()

    @THREE
    def test_in_mid_training_without_momentum(self, kind: Kind) -> None:
        params = matrices()
        optimizer = kind.optimizer(two_groups(params), weight_decay=0.1, momentum=0.0)
        optimizer.param_groups[1]["momentum"] = 0.0
        scheduler = lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.0)
        for number in range(4):
            before = clone_params(params)
            draw_gradients(params, number)
            optimizer.step(loss=0.3)
            for p, q in zip(params, before, strict=True):
                assert same_bits(p, q) == (number >= 2)
            scheduler.step()

    def test_in_mid_training_momentum_runs_out(self) -> None:
        """Momentum is made of steps, not gradients: what is under way has the lr it started with.

        torch's SGD stops at once. Here, after z, come μ²z, μ³z, ...
        """
        params = matrices(torch.float64)
        others = clone_params(params)
        optimizer, sgd = DFW(params, momentum=0.5), SGD(others, 0.1, momentum=0.5, nesterov=True)
        schedulers = [lr_scheduler.MultiStepLR(o, [3], gamma=0.0) for o in (optimizer, sgd)]
        for number in range(60):
            if number == 3:
                assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"] == 0.0
                starts = clone_params(params)
                stopped = clone_params(others)
                momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
            draw_gradients(params, number)
            draw_gradients(others, number)
            optimizer.step(loss=0.3)
            sgd.step()
            for scheduler in schedulers:
                scheduler.step()
        for p, start, z in zip(params, starts, momenta, strict=True):
            assert z.abs().min() > 1e-4
            torch.testing.assert_close(p.detach(), start.detach() + z * 0.5**2 / (1 - 0.5))
        assert all(same_bits(p, q) for p, q in zip(others, stopped, strict=True))
