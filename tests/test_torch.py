"""What torch's own optimizers do in torch's company: hooks, schedulers, scalers, compilation.

Where torch ships checks of its optimizers they are taken from there.
"""

# torch leaves backward() untyped, and what torch.compile returns.
# mypy: disable-error-code="no-untyped-call"

import copy
import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_consistent, draw_gradients, everything, make_params, same_bits
from kinds import ALL_KINDS, CLASSES, MAIN, Kind
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, optimizer, swa_utils
from torch.optim import lr_scheduler as S  # noqa: N812
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def make_batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 6, generator=generator)
    return inputs, torch.randint(4, (16,), generator=generator)


@CLASSES
def test_errors_of_all_optimizers(optimizer_class: Any) -> None:
    """Torch's own cases: tensors for lists, no parameters, twice the same, a bad lr."""
    for case in get_error_inputs_for_all_optims("cpu", torch.float32):
        given = case.optimizer_error_input
        params = given.params or [nn.Parameter(torch.ones(1, 1))]
        warns = issubclass(case.error_type, Warning)
        expect: Any = pytest.warns if warns else pytest.raises
        with expect(case.error_type, match=case.error_regex):
            optimizer_class(params, **given.kwargs)


@MAIN
def test_closure_and_hooks(kind: Kind) -> None:
    """Once, with gradients, at the weights that the model holds; hooks around it, in order."""
    params = make_params()
    ours = kind.make(params)
    before = [p.detach().clone() for p in params]
    results: list[Tensor] = []
    calls: list[str] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        assert all(map(same_bits, params, before))
        results.append(torch.stack([p.square().sum() for p in params]).sum())
        results[-1].backward()
        return results[-1]

    def remember(name: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: calls.append(name)

    handles = [
        ours.register_step_pre_hook(remember("pre")),
        ours.register_step_post_hook(remember("post")),
        optimizer.register_optimizer_step_pre_hook(remember("global pre")),
        optimizer.register_optimizer_step_post_hook(remember("global post")),
    ]
    with torch.no_grad():
        assert ours.step(closure) is results[0]
        assert not torch.is_grad_enabled()
    for handle in handles:
        handle.remove()
    assert len(results) == 1
    assert calls == ["global pre", "pre", "post", "global post"]
    ours.register_step_pre_hook(lambda opt, args, kwargs: (args, {"loss": 0.25}))
    assert ours.step(loss=1.0) == 0.25

    # One that repairs a checkpoint comes before its check.
    saved = copy.deepcopy(ours.state_dict())
    taken, whole = saved["state"].pop(0), everything(ours)

    def repair(opt: Any, incoming: dict[str, Any]) -> None:
        incoming["state"][0] = taken

    ours.register_load_state_dict_pre_hook(repair)
    ours.load_state_dict(saved)
    assert everything(ours) == whole


STEPS = 12
# Falls, then stays: ReduceLROnPlateau reduces more than once.
METRICS = (1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.85, 0.7, 0.9, 0.9, 0.6, 0.6)
MAKE: list[Callable[[Any], Any]] = [
    lambda o: S.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t]),
    lambda o: S.LambdaLR(o, lambda t: t / 6),  # a warm-up from 0
    lambda o: S.MultiplicativeLR(o, lambda t: 0.9),
    lambda o: S.StepLR(o, 2, 0.5),
    lambda o: S.MultiStepLR(o, [2, 4, 4], 0.5),
    lambda o: S.ConstantLR(o, 0.5, 3),
    lambda o: S.LinearLR(o, 0.1, 1.0, 5),
    lambda o: S.ExponentialLR(o, 0.8),
    lambda o: S.PolynomialLR(o, 7, 2.0),
    lambda o: S.CosineAnnealingLR(o, 6),
    lambda o: S.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    lambda o: S.CyclicLR(o, 0.01, 0.3, 2, 3, cycle_momentum=False),
    lambda o: S.OneCycleLR(o, 0.3, total_steps=STEPS + 1, cycle_momentum=False),
    lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[0.03, 0.01]),
    lambda o: S.ChainedScheduler([S.ExponentialLR(o, 0.9), S.ConstantLR(o, 0.5, 2)]),
    lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4),
]
WITH_MOMENTUM: list[Callable[[Any], Any]] = [
    lambda o: S.CyclicLR(o, [0.01, 0.02], [0.3, 0.5], 3, base_momentum=0.7, max_momentum=0.95),
    lambda o: S.OneCycleLR(o, [0.3, 0.6], total_steps=STEPS + 1, base_momentum=0.7),
    lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.5, 3), S.CyclicLR(o, 0.01, 0.3, 3)], [3]),
]


def two_groups(params: list[Any], lr: Callable[[float], Any] = float) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": lr(x)} for p, x in zip(params, (0.1, 0.2), strict=True)]


@MAIN
@pytest.mark.filterwarnings("ignore")  # of torch, on schedules of tensors
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("number", range(len(MAKE + WITH_MOMENTUM)))
def test_each_step_goes_by_what_it_would_write_for_sgd(
    kind: Kind, number: int, tensor: bool
) -> None:
    """The twin's groups are written to by hand, with lr and momentum as SGD's groups had them.

    The run stops in the middle, and goes on from state dicts of optimizer and scheduler.
    """

    def lr(value: float) -> Any:
        return torch.tensor(value, dtype=torch.float64) if tensor else value

    make = (MAKE + WITH_MOMENTUM)[number]
    params, twins, others = (make_params(((3, 4), (2, 5))) for _ in range(3))
    sgd = SGD(two_groups(others, lr), lr=lr(0.1), momentum=0.9, foreach=False)
    ours = kind.optimizer(two_groups(params, lr), weight_decay=0.1, norm=kind.norm)
    twin = kind.optimizer(two_groups(twins), weight_decay=0.1, norm=kind.norm)
    seen = set()
    schedulers = [make(ours), make(sgd)]
    for step in range(STEPS):
        if step == 5:
            saved = copy.deepcopy((ours.state_dict(), schedulers[0].state_dict()))
            ours = kind.optimizer(two_groups(params, lr), norm=kind.norm)
            schedulers[0] = make(ours)
            ours.load_state_dict(saved[0])
            schedulers[0].load_state_dict(saved[1])
        for group, model in zip(twin.param_groups, sgd.param_groups, strict=True):
            group["lr"], group["momentum"] = float(model["lr"]), model["momentum"]
            seen.add((group["lr"], group["momentum"]))
        for o, ps in ((ours, params), (twin, twins), (sgd, others)):
            draw_gradients(ps, step)
            o.step(**({} if o is sgd else {"loss": 0.3}))
        for scheduler in schedulers:
            plateau = isinstance(scheduler, S.ReduceLROnPlateau)
            scheduler.step(*([METRICS[step]] if plateau else []))
    assert len(seen) > 2
    assert (make in WITH_MOMENTUM) == (len({momentum for _, momentum in seen}) > 1)
    for p, q in zip(params, twins, strict=True):
        # A tensor and a number multiply in another order.
        assert same_bits(p, q) or (tensor and torch.allclose(p, q, rtol=1e-5, atol=1e-6))
    assert_consistent(ours)


@MAIN
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_scaler_finds_bad_gradients(kind: Kind, bad: float) -> None:
    """It halves its scale, and later steps are as if they had never been."""
    ends = []
    for numbers in ([0, 1, 2, 3], [0, 1, 3]):
        params = make_params()
        ours = kind.make(params, weight_decay=1e-3)
        scaler = GradScaler("cpu", init_scale=2.0**10)
        for number in numbers:
            draw_gradients(params, number, scaler.get_scale())
            if number == 2:
                assert params[1].grad is not None
                params[1].grad.view(-1)[3] = bad
            before = everything(ours)
            scaler.scale(torch.zeros(()))  # which begins a step; the gradients are drawn
            scaler.step(ours, loss=torch.tensor(0.5))
            scaler.update()
            assert (everything(ours) == before) == (number == 2)
        assert scaler.get_scale() == (2.0**9 if 2 in numbers else 2.0**10)
        # The scaler does not call step at all, so there is no step to be counted as skipped.
        assert int(ours.skipped_steps) == 0
        ends.append(everything(ours))
    assert ends[0] == ends[1]


@MAIN
@pytest.mark.parametrize("clip", [False, True])
def test_scale_makes_no_difference(kind: Kind, clip: bool) -> None:
    """A power of 2 is exact: the same bits as without a scaler, with clipping in between."""
    ends = []
    for scale in (None, 2.0**16):
        model = make_model()
        ours = kind.make(model.parameters(), lr=100.0)
        scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        gammas = []
        for number in range(4):
            ours.zero_grad()
            inputs, labels = make_batch(number)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            factor: Any = 1.0
            if clip:  # a clipped gradient is that of the loss times as much
                scaler.unscale_(ours)
                norm = clip_grad_norm_(model.parameters(), 0.1)
                factor = (0.1 / (norm + 1e-6)).clamp(max=1.0)
            scaler.step(ours, loss=factor * loss)
            scaler.update()
            gammas.append(float(ours.gamma))
        assert any(0 < gamma < 1 for gamma in gammas)
        ends.append((gammas, everything(ours)))
    assert ends[0] == ends[1]


@ALL_KINDS
def test_accumulation(kind: Kind) -> None:
    """Four parts of a batch, their mean losses summed: the step of the whole batch."""
    ends = []
    for parts in (1, 4):
        model = make_model().double()
        ours = kind.make(model.parameters())
        for number in range(2):
            inputs, labels = make_batch(number)
            ours.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for x, y in zip(inputs.double().chunk(parts), labels.chunk(parts), strict=True):
                loss = nn.functional.cross_entropy(model(x), y) / parts
                loss.backward()
                total += loss.detach()
            ours.step(loss=total)
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-8)  # sums in another order


def check_compiled(kind: Kind, backend: str) -> None:
    """No new compilation when lr (a tensor), loss and γ change, or when a step is skipped."""
    torch._dynamo.reset()
    params, twins = make_params(), make_params()
    lrs = [torch.tensor(0.1), torch.tensor(0.1)]
    plain = kind.make(params, lr=lrs[0], weight_decay=1e-2)
    other = kind.make(twins, lr=lrs[1], weight_decay=1e-2)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(other.step, backend=counter, fullgraph=True)
    gammas = []
    for number, loss in enumerate((0.02, 0.006, 0.05, math.nan, 1e-3, 30.0)):
        for ps in (params, twins):
            draw_gradients(ps, number, 0.3)
        for lr in lrs:
            lr.fill_(0.1 / (1 + number))
        plain.step(loss=torch.tensor(loss))
        step(loss=torch.tensor(loss))
        gammas.append(other.gamma.item())
        # Products are fused, and rounded in another order; Newton-Schulz repeats that.
        torch.testing.assert_close(other.gamma, plain.gamma, rtol=1e-4, atol=1e-7, equal_nan=True)
    assert counter.frame_count == 1
    assert int(other.skipped_steps) == int(plain.skipped_steps) == 1
    assert len({gamma for gamma in gammas if not math.isnan(gamma)}) > 2
    torch.testing.assert_close(twins, params, rtol=1e-4, atol=1e-5)


@pytest.mark.no_cover
@ALL_KINDS
def test_compiled_as_one_graph(kind: Kind) -> None:
    check_compiled(kind, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile finds no C++ compiler")
@MAIN
def test_compiled_to_code(kind: Kind) -> None:
    check_compiled(kind, "inductor")
