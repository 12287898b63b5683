"""What torch's own optimizers do in torch's company: hooks, schedulers, scalers, compilation.

Where torch ships checks of its optimizers they are taken from there; its schedulers are looked up,
so that a new one fails a test here.
"""

# torch leaves backward() untyped, and what torch.compile returns.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import inspect
import math
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    MAIN_KINDS,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    same_bits,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims
from torch.utils.checkpoint import checkpoint

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
MAIN = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
CLASSES = pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def make_batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 6, generator=generator)
    return inputs, torch.randint(4, (16,), generator=generator)


def loss_of(model: nn.Module, number: int) -> Tensor:
    inputs, labels = make_batch(number)
    return nn.functional.cross_entropy(model(inputs), labels)


# As torch checks its own --------------------------------------------------------------------------


class TestHarness:
    @CLASSES
    def test_errors_of_all_optimizers(self, optimizer_class: Any) -> None:
        """Torch's own cases: tensors for lists, no parameters, twice the same, a bad lr."""
        for case in get_error_inputs_for_all_optims("cpu", torch.float32):
            given = case.optimizer_error_input
            warns = issubclass(case.error_type, Warning)
            expect: Any = pytest.warns if warns else pytest.raises
            with expect(case.error_type, match=case.error_regex):
                optimizer_class(given.params, **given.kwargs)

    @ALL_KINDS
    @pytest.mark.parametrize("strided", [False, True])
    def test_right_direction(self, kind: Kind, strided: bool) -> None:
        """A least-squares problem of torch's tests, whose parameters may be views of others."""
        generator = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weight = nn.Parameter(randn(5, 10).t() if strided else randn(10, 5))
        bias = nn.Parameter(randn(10, 2)[:, :1] if strided else randn(10, 1))
        x, y = randn(5, 16), randn(10, 16)
        optimizer = kind.make([weight, bias])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight @ x + bias - y).square().mean()
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
        assert min(losses[10:]) < losses[0]
        assert_consistent(optimizer)

    @MAIN
    def test_closure_runs_once_with_gradients_enabled(self, kind: Kind) -> None:
        """At the weights that the model holds, and its result comes back as it is."""
        params = make_params()
        optimizer = kind.make(params)
        before = [p.detach().clone() for p in params]
        calls = []

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            assert all(map(same_bits, params, before))
            calls.append(sum(p.square().sum() for p in params))
            calls[-1].backward()
            return calls[-1]

        with torch.no_grad():
            result = optimizer.step(closure)
            assert not torch.is_grad_enabled()
        assert len(calls) == 1
        assert result is calls[0]
        for loss in (0.5, torch.tensor(0.5), torch.tensor([0.5])):
            assert optimizer.step(loss=loss) is loss

    @MAIN
    def test_zero_gradients_move_nothing(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        before = clone_params(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step(loss=torch.tensor(1.0))
        assert all(map(same_bits, params, before))

    @MAIN
    def test_step_hooks(self, kind: Kind) -> None:
        """Own and global ones, before and after, in order; one may replace the loss."""
        params = make_params()
        optimizer = kind.make(params)
        calls: list[str] = []

        def remember(name: str) -> Callable[..., None]:
            return lambda opt, args, kwargs: calls.append(name if opt is optimizer else "other")

        handles = [
            optimizer.register_step_pre_hook(remember("pre")),
            optimizer.register_step_post_hook(remember("post")),
            register_optimizer_step_pre_hook(remember("global pre")),
            register_optimizer_step_post_hook(remember("global post")),
        ]
        try:
            draw_gradients(params, 0)
            optimizer.step(loss=1.0)
        finally:
            for handle in handles:
                handle.remove()
        assert calls == ["global pre", "pre", "post", "global post"]
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, {"loss": 0.25}))
        assert optimizer.step(loss=1.0) == 0.25
        assert len(calls) == 4

    @MAIN
    def test_state_dict_hooks(self, kind: Kind) -> None:
        """A user's hook may repair a checkpoint before it is checked, and sees it restored."""
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        optimizer.step(loss=1.0)
        saved = copy.deepcopy(optimizer.state_dict())
        before = everything(optimizer)
        key = "momentum_buffer" if kind.norm == "euclidean" else "mean_gradient"
        taken = saved["state"][0].pop(key)
        calls: list[str] = []

        def bring_back(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            calls.append("pre")
            incoming["state"][0][key] = taken
            return incoming

        def look(opt: Any) -> None:
            calls.append("post")
            assert fingerprint(opt.state[params[0]][key]) == fingerprint(taken)

        optimizer.register_load_state_dict_pre_hook(bring_back)
        optimizer.register_load_state_dict_post_hook(look, prepend=True)
        optimizer.register_load_state_dict_post_hook(look)
        optimizer.load_state_dict(saved)
        assert calls == ["pre", "post", "post"]
        assert everything(optimizer) == before


# Schedulers ---------------------------------------------------------------------------------------

STEPS = 12
# Falls, then stays: ReduceLROnPlateau reduces more than once.
METRICS = (1.0, 0.9, 0.9, 0.9, 0.8, 0.8, 0.85, 0.7, 0.9, 0.9, 0.6, 0.6)
S = lr_scheduler
SCHEDULERS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "LambdaLR": (S.LambdaLR, lambda o: S.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t])),
    "MultiplicativeLR": (S.MultiplicativeLR, lambda o: S.MultiplicativeLR(o, lambda t: 0.9)),
    "StepLR": (S.StepLR, lambda o: S.StepLR(o, 2, 0.5)),
    "MultiStepLR": (S.MultiStepLR, lambda o: S.MultiStepLR(o, [2, 4, 4], 0.5)),
    "ConstantLR": (S.ConstantLR, lambda o: S.ConstantLR(o, 0.5, 3)),
    "LinearLR": (S.LinearLR, lambda o: S.LinearLR(o, 0.1, 1.0, 5)),
    "warm-up from 0": (S.LambdaLR, lambda o: S.LambdaLR(o, lambda t: t / 6)),
    "ExponentialLR": (S.ExponentialLR, lambda o: S.ExponentialLR(o, 0.8)),
    "PolynomialLR": (S.PolynomialLR, lambda o: S.PolynomialLR(o, 7, 2.0)),
    "CosineAnnealingLR": (S.CosineAnnealingLR, lambda o: S.CosineAnnealingLR(o, 6)),
    "CosineAnnealingWarmRestarts": (
        S.CosineAnnealingWarmRestarts,
        lambda o: S.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    ),
    "CyclicLR, momentum": (
        S.CyclicLR,
        lambda o: S.CyclicLR(o, [0.01, 0.02], [0.3, 0.5], 3, base_momentum=0.7, max_momentum=0.95),
    ),
    "CyclicLR": (S.CyclicLR, lambda o: S.CyclicLR(o, 0.01, 0.3, 2, 3, cycle_momentum=False)),
    "OneCycleLR, momentum": (
        S.OneCycleLR,
        lambda o: S.OneCycleLR(o, [0.3, 0.6], total_steps=STEPS + 1, base_momentum=0.7),
    ),
    "OneCycleLR": (
        S.OneCycleLR,
        lambda o: S.OneCycleLR(
            o, 0.3, total_steps=STEPS + 1, three_phase=True, cycle_momentum=False
        ),
    ),
    "ReduceLROnPlateau": (
        S.ReduceLROnPlateau,
        lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=0, min_lr=[0.03, 0.01]),
    ),
    "SequentialLR, momentum": (
        S.SequentialLR,
        lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.5, 3), S.CyclicLR(o, 0.01, 0.3, 3)], [3]),
    ),
    "ChainedScheduler": (
        S.ChainedScheduler,
        lambda o: S.ChainedScheduler([S.ExponentialLR(o, 0.9), S.ConstantLR(o, 0.5, 2)]),
    ),
    "SWALR": (swa_utils.SWALR, lambda o: swa_utils.SWALR(o, 0.01, anneal_epochs=4)),
}


def advance(scheduler: Any, number: int) -> None:
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(METRICS[number])
    else:
        scheduler.step()


class TestSchedulers:
    def test_every_one_of_torch_is_here(self) -> None:
        base = lr_scheduler.LRScheduler
        found = {
            cls
            for module in (lr_scheduler, swa_utils)
            for cls in vars(module).values()
            if inspect.isclass(cls) and issubclass(cls, base)
        }
        # But the base class, and its old name.
        found = {cls for cls in found if cls is not base and not cls.__name__.startswith("_")}
        assert len(found) >= 16
        assert {scheduler for scheduler, _ in SCHEDULERS.values()} == found

    @MAIN
    @pytest.mark.parametrize("lr", ["number", "tensor"])
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_each_step_goes_by_what_it_would_write_for_sgd(
        self, kind: Kind, name: str, lr: str
    ) -> None:
        """The twin's groups are written to by hand, with lr and momentum as SGD's groups had them.

        The run stops in the middle, and goes on from state dicts of optimizer and scheduler.
        """

        def as_lr(value: float) -> Any:
            return torch.tensor(value, dtype=torch.float64) if lr == "tensor" else value

        def groups(params: list[Any]) -> list[dict[str, Any]]:
            return [
                {"params": [p], "lr": as_lr(value)}
                for p, value in zip(params, (0.1, 0.2), strict=True)
            ]

        _, make = SCHEDULERS[name]
        params, twins, others = (make_params(((3, 4), (2, 5))) for _ in range(3))
        sgd = SGD(groups(others), lr=as_lr(0.1), momentum=0.9, foreach=False)
        ours = kind.optimizer(groups(params), weight_decay=0.1, norm=kind.norm)
        twin = kind.optimizer(groups(twins), weight_decay=0.1, norm=kind.norm)
        seen = set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, on schedules of tensors
            scheduler, theirs = make(ours), make(sgd)
            for number in range(STEPS):
                if number == 5:
                    saved = copy.deepcopy((ours.state_dict(), scheduler.state_dict()))
                    ours = kind.optimizer(groups(params), norm=kind.norm)
                    scheduler = make(ours)
                    ours.load_state_dict(saved[0])
                    scheduler.load_state_dict(saved[1])
                for group, model in zip(twin.param_groups, sgd.param_groups, strict=True):
                    seen.add((float(model["lr"]), model["momentum"]))
                    group["lr"], group["momentum"] = float(model["lr"]), model["momentum"]
                for optimizer, ps in ((ours, params), (twin, twins), (sgd, others)):
                    draw_gradients(ps, number)
                    optimizer.step(**({} if optimizer is sgd else {"loss": 0.3}))
                advance(scheduler, number)
                advance(theirs, number)
        assert len(seen) > 2
        assert ("momentum" in name) == (len({momentum for _, momentum in seen}) > 1)
        for p, q in zip(params, twins, strict=True):
            # A tensor and a number multiply in another order.
            assert_same = torch.testing.assert_close if lr == "tensor" else assert_bits
            assert_same(p.detach(), q.detach())
        assert_consistent(ours)

    def test_different_momenta(self) -> None:
        """Of the plane there is one, and a schedule that says otherwise is refused."""
        params = make_params()[:2]
        groups = [{"params": [p]} for p in params]
        optimizer = DFW(groups)
        lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=9, max_momentum=[0.9, 0.8])
        draw_gradients(params, 0)
        with pytest.raises(ValueError, match=r"momentum=0.8 .*0.9, but counts once"):
            optimizer.step(loss=1.0)

    @MAIN
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_lr_of_zero(self, kind: Kind, momentum: float) -> None:
        """Nothing moves, but for the momentum of the Euclidean norm, which is made of steps."""
        params = make_params()
        optimizer = kind.make(params, momentum=momentum, weight_decay=0.1)
        draw_gradients(params, 0)
        optimizer.step(loss=0.3)
        before = clone_params(params)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step(loss=0.3)
        still = all(map(same_bits, params, before))
        assert still == (kind.norm == "spectral" or momentum == 0)


def assert_bits(left: Tensor, right: Tensor) -> None:
    assert same_bits(left, right)


# Scalers, clipping, accumulation ------------------------------------------------------------------


class TestScaler:
    @MAIN
    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_bad_gradients_leave_no_trace(self, kind: Kind, bad: float) -> None:
        """Found by the scaler, which halves its scale; later steps are as if they never were."""
        ends = []
        for numbers in ([0, 1, 2, 3], [0, 1, 3]):
            params = make_params()
            optimizer = kind.make(params, weight_decay=1e-3)
            scaler = GradScaler("cpu", init_scale=2.0**10)
            for number in numbers:
                optimizer.zero_grad()
                draw_gradients(params, number, scaler.get_scale())
                if number == 2:
                    assert params[1].grad is not None
                    params[1].grad.view(-1)[3] = bad
                before = everything(optimizer)
                scaler.scale(torch.zeros(()))  # which begins a step; the gradients are drawn
                scaler.step(optimizer, loss=torch.tensor(0.5))
                scaler.update()
                assert (everything(optimizer) == before) == (number == 2)
            assert scaler.get_scale() == (2.0**9 if 2 in numbers else 2.0**10)
            # The scaler does not call step at all, so there is no step to be counted as skipped.
            assert int(optimizer.skipped_steps) == 0
            ends.append(everything(optimizer))
        assert ends[0] == ends[1]

    @MAIN
    @pytest.mark.parametrize("clip", [False, True])
    def test_scale_makes_no_difference(self, kind: Kind, clip: bool) -> None:
        """A power of 2 is exact: the same bits as without a scaler, with clipping in between."""
        ends = []
        for scale in (None, 2.0**16):
            model = make_model()
            optimizer = kind.make(model.parameters(), lr=100.0)
            scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
            gammas = []
            for number in range(4):
                optimizer.zero_grad()
                loss = loss_of(model, number)
                scaler.scale(loss).backward()
                factor: Any = 1.0
                if clip:  # a clipped gradient is that of the loss times as much
                    scaler.unscale_(optimizer)
                    norm = clip_grad_norm_(model.parameters(), 0.1)
                    factor = (0.1 / (norm + 1e-6)).clamp(max=1.0)
                    assert factor < 1
                scaler.step(optimizer, loss=factor * loss)
                scaler.update()
                gammas.append(float(optimizer.gamma))
            assert any(0 < gamma < 1 for gamma in gammas)
            ends.append((gammas, everything(optimizer)))
        assert ends[0] == ends[1]


class TestLoops:
    @ALL_KINDS
    def test_accumulation(self, kind: Kind) -> None:
        """Four parts of a batch, their mean losses summed: the step of the whole batch."""
        ends = []
        for parts in (1, 4):
            model = make_model().double()
            optimizer = kind.make(model.parameters())
            for number in range(2):
                inputs, labels = make_batch(number)
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for x, y in zip(inputs.double().chunk(parts), labels.chunk(parts), strict=True):
                    loss = nn.functional.cross_entropy(model(x), y) / parts
                    loss.backward()
                    total += loss.detach()
                optimizer.step(loss=total)
            ends.append([p.detach() for p in model.parameters()])
        for p, q in zip(*ends, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)  # sums in another order

    @MAIN
    def test_loss_tensor_number_and_closure(self, kind: Kind) -> None:
        """Three ways to say the same."""
        ends = []
        for way in ("tensor", "number", "closure"):
            model = make_model()
            optimizer = kind.make(model.parameters())

            def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, 0)
                loss.backward()
                return loss

            for _ in range(2):
                if way == "closure":
                    optimizer.step(closure)
                else:
                    loss = closure()
                    optimizer.step(loss=loss if way == "tensor" else loss.item())
            ends.append(everything(optimizer))
        assert ends[0] == ends[1] == ends[2]

    @MAIN
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_recomputed_activations(self, kind: Kind, reentrant: bool) -> None:
        """With dropout, under autocast: the weights are the same when they are used again."""
        ends = []
        for recomputed in (False, True):
            model = make_model()
            optimizer = kind.make(model.parameters())
            body = nn.Sequential(model[:4], nn.Dropout(0.3))
            torch.manual_seed(1)
            for number in range(2):
                inputs, labels = make_batch(number)
                inputs.requires_grad_()  # which a reentrant checkpoint needs
                with torch.autocast("cpu", torch.bfloat16):
                    hidden: Any = (
                        checkpoint(body, inputs, use_reentrant=reentrant)
                        if recomputed
                        else body(inputs)
                    )
                    loss = nn.functional.cross_entropy(model[4](hidden), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(loss=loss)
            ends.append(everything(optimizer))
        assert ends[0] == ends[1]

    @MAIN
    def test_backward_hooks_that_clear_gradients(self, kind: Kind) -> None:
        """A parameter without a gradient is left out of a step, and keeps what it has."""
        params = make_params()
        optimizer = kind.make(params, weight_decay=0.1)
        draw_gradients(params, 0)
        optimizer.step(loss=0.5)
        draw_gradients(params, 1)
        params[0].grad = None
        before = fingerprint([params[0].detach(), optimizer.state[params[0]]])
        optimizer.step(loss=0.5)
        assert fingerprint([params[0].detach(), optimizer.state[params[0]]]) == before


# Compilation --------------------------------------------------------------------------------------


class TestCompiled:
    @ALL_KINDS
    def test_one_graph(self, kind: Kind) -> None:
        self.check(kind, "aot_eager")

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile finds no C++ compiler")
    @MAIN
    def test_with_generated_code(self, kind: Kind) -> None:
        self.check(kind, "inductor")

    @staticmethod
    def check(kind: Kind, backend: str) -> None:
        """No new compilation when lr (a tensor), loss and γ change, or when a step is skipped."""
        torch._dynamo.reset()
        params = make_params()
        twins = clone_params(params)
        plain, other = (
            kind.make(ps, lr=torch.tensor(0.1), weight_decay=1e-2) for ps in (params, twins)
        )
        counter = CompileCounterWithBackend(backend)
        step = torch.compile(other.step, backend=counter, fullgraph=True)
        for twin in twins:
            twin.grad = torch.zeros_like(twin)
        gammas = []
        for number, loss in enumerate((0.02, 0.006, 0.05, math.nan, 1e-3, 30.0)):
            draw_gradients(params, number, 0.3)
            for p, twin in zip(params, twins, strict=True):
                assert p.grad is not None
                assert twin.grad is not None
                twin.grad.copy_(p.grad)
            for optimizer in (plain, other):
                for group in optimizer.param_groups:
                    group["lr"].fill_(0.1 / (1 + number))
            plain.step(loss=torch.tensor(loss))
            step(loss=torch.tensor(loss))
            assert counter.frame_count == 1
            gammas.append(other.gamma.item())
            # Products are fused, and rounded in another order; Newton-Schulz repeats that.
            torch.testing.assert_close(
                other.gamma, plain.gamma, rtol=1e-4, atol=1e-7, equal_nan=True
            )
            assert int(other.skipped_steps) == int(plain.skipped_steps)
        assert int(plain.skipped_steps) == 1
        assert len({gamma for gamma in gammas if not math.isnan(gamma)}) > 2
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(twin, p, rtol=1e-4, atol=1e-5)

    @MAIN
    def test_a_compiled_model_sees_each_step(self, kind: Kind) -> None:
        """Weights are changed in place: it is compiled once, and trains as if it were not."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        ends = []
        for compiled in (False, True):
            model = make_model()
            optimizer = kind.make(model.parameters())
            net: Any = torch.compile(model, backend=counter) if compiled else model
            for number in range(4):
                optimizer.zero_grad()
                loss = loss_of(net, number)
                loss.backward()
                optimizer.step(loss=loss)
            ends.append([p.detach().clone() for p in model.parameters()])
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-6)
        assert counter.frame_count == 1
