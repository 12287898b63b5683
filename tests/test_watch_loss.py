"""Steps without an argument, against a twin that is given the value of what is in ``.grad``."""

# torch leaves backward() and its hooks untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import math
import pickle
import weakref
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kinds import Kind
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW

LR = 1e3  # so large that γ, and with it every step, depends on the loss


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return model.double()


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs.requires_grad_(), torch.randint(4, (12,), generator=generator)


def make(model: nn.Module, kind: type[Any] = DFW) -> Any:
    return Kind(kind.__name__, kind, {"lr": LR}, kind is not DFW).make(model.parameters())


def pair(kind: type[Any] = DFW) -> Any:
    models = make_model(), make_model()
    return models, [make(model, kind) for model in models]


def assert_same(watched: Any, given: Any) -> None:
    assert type(watched) is not DFW or 0 < watched.gamma < 1
    torch.testing.assert_close(watched.gamma, given.gamma, rtol=1e-6, atol=0)
    params = [[p for g in o.param_groups for p in g["params"]] for o in (watched, given)]
    torch.testing.assert_close(*params, rtol=1e-6, atol=1e-9)


LOOPS = """plain, accumulation, divided in place, weighted sum in one backward, same graph twice,
by sample, evaluation in between, attack before each part, penalty on the gradient, frozen then not,
backward of inputs, zeroed by the model, backward that failed, model recomputed, both recomputed,
criterion recomputed, model recomputed reentrant, both recomputed reentrant, compiled"""


def run(name: str, model: Any, criterion: Any, optimizer: Any) -> Tensor:
    """One step of a loop, but for ``step()``: returns the function whose gradient is in place."""
    total = torch.zeros((), dtype=torch.float64)
    x, y = batch(0)

    def loss(number: int) -> Any:
        x, y = batch(number)
        return criterion(model(x), y)

    def back(f: Any, **options: Any) -> None:
        f.backward(**options)
        total.add_(f.detach())

    match name:
        case "accumulation":
            for number in range(3):
                back(loss(number) / 3)
        case "divided in place":
            for number in range(3):
                f: Any = loss(number)
                f /= 3
                back(f)
        case "weighted sum in one backward":
            back(loss(7))
            back(loss(0) + 2 * loss(1) + 3 * loss(2))
        case "same graph twice":
            f = loss(0)
            back(f, retain_graph=True)
            back(f)
        case "by sample":  # one of which is infinite, and left out
            criterion.reduction = "none"
            forbidden = torch.zeros(12, 4, dtype=torch.float64)
            forbidden[3, y[3]] = -math.inf
            losses = criterion(model(x) + forbidden, y)
            back((losses * torch.linspace(0.1, 2, 12))[losses.isfinite()].mean())
        case "evaluation in between":
            back((loss(0), loss(5), torch.no_grad()(loss)(5))[0])
        case "attack before each part":  # neither of the gradients comes to be in .grad
            for x, y in map(batch, range(3)):
                x = x + torch.autograd.grad(criterion(model(x), y), x)[0].sign()
                torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
                back(criterion(model(x), y))
        case "penalty on the gradient":
            f = criterion(model(x), y)
            (gradient,) = torch.autograd.grad(f, x, create_graph=True)
            (0.5 * f + gradient.square().sum()).backward()
            total += 0.5 * f.detach()
        case "backward of inputs":
            criterion(model(x), y).backward(inputs=[x])
            back(loss(0), inputs=[model[2].weight])
        case "zeroed by the model":
            loss(1).backward()
            f = loss(0)
            model.zero_grad()
            back(f)
            back(loss(2))
        case "backward that failed":
            scores = model(x)
            scores.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                criterion(scores, y).backward()
            optimizer.zero_grad()
            back(loss(0))
        case "frozen then not":
            for frozen in (slice(4), slice(4, 5)):
                model.requires_grad_(True)[frozen].requires_grad_(False)
                back(loss(1))
        case "plain" | "compiled":
            back(loss(0))
        case "twelve":
            back(torch.stack([loss(number) for number in range(12)]).sum())
        case _:
            part = partial(checkpoint, use_reentrant="reentrant" in name)
            evaluate: Any = {
                "model": lambda x, y: criterion(part(model, x), y),
                "criterion": lambda x, y: part(criterion, model(x), y),
                "both": lambda x, y: part(lambda x, y: criterion(model(x), y), x, y),
            }[name.split()[0]]
            for number in (0, 2):
                back(evaluate(*batch(number)) + 0.5 * evaluate(*batch(number + 1)))
    return total


@pytest.mark.parametrize("kind", [DFW, ProjectedDFW, TernaryDFW])
@pytest.mark.parametrize("name", LOOPS.replace("\n", " ").split(", "))
def test_loops(name: str, kind: type[Any]) -> None:
    (model, twin), (watched, given) = pair(kind)
    watched.watch_loss(criterion := nn.CrossEntropyLoss())
    step, clear = watched.step, watched.zero_grad
    if name == "compiled":  # and zeroed behind the optimizer's back
        step, clear = torch.compile(step, backend="eager"), partial(model.zero_grad, False)
    for _ in range(2):
        clear()
        given.zero_grad()
        run(name, model, criterion, watched)
        assert step() is None
        given.step(loss=run(name, twin, nn.CrossEntropyLoss(), given))
        assert_same(watched, given)
    with pytest.raises(RuntimeError, match="no watched loss has been part of a backward"):
        watched.step()


@pytest.mark.parametrize("joint", [False, True])
def test_several_criteria_one_of_a_part(joint: bool) -> None:
    models, (watched, given) = pair()
    criterion, other = MultiClassHingeLoss(smooth=True), nn.MSELoss()
    handles = [watched.watch_loss(module) for module in (criterion, other)]
    for model, optimizer in zip(models, (watched, given), strict=True):
        hidden = model[:2](batch(0)[0])
        losses = [criterion(model[2:](hidden), batch(0)[1]), other(hidden, torch.ones_like(hidden))]
        for f in [losses[0] + losses[1]] if joint else losses:
            f.backward(retain_graph=True)
        optimizer.step(**({} if optimizer is watched else {"loss": sum(losses)}))
    assert_same(watched, given)
    for handle in handles:
        handle.remove()
    assert not watched._watch.active


@pytest.mark.parametrize("zero", ["module", "optimizer"])
def test_gan(zero: str) -> None:
    """One criterion: each optimizer has the losses that reach its own parameters, and no other."""
    results = []
    for watch in (True, False):
        judge, forger, criterion = make_model(), nn.Linear(6, 6).double(), nn.CrossEntropyLoss()
        optimizers = make(judge), make(forger)
        for optimizer in optimizers if watch else ():
            optimizer.watch_loss(criterion)
        for number in range(3):
            (real, y), fake = batch(number), forger(batch(number)[0])
            (judge if zero == "module" else optimizers[0]).zero_grad()
            losses = [criterion(judge(x), y) for x in (real, fake.detach())]
            for loss in losses:
                loss.backward()
            optimizers[0].step(**({} if watch else {"loss": sum(losses)}))
            (forger if zero == "module" else optimizers[1]).zero_grad()
            loss = criterion(judge(fake), y)
            loss.backward()
            optimizers[1].step(**({} if watch else {"loss": loss}))
        results.append(optimizers)
    for watched, given in zip(*results, strict=True):
        assert_same(watched, given)


@pytest.mark.parametrize("joint", [False, True])
def test_two_nets_one_criterion(joint: bool) -> None:
    nets, criterion = [pair(), pair()], nn.CrossEntropyLoss()
    for _, (watched, _) in nets:
        watched.watch_loss(criterion)
    losses = [criterion(models[0](batch(0)[0]), batch(i)[1]) for i, (models, _) in enumerate(nets)]
    for f in [losses[0] + losses[1]] if joint else losses:
        f.backward()
    for i, (models, (watched, given)) in enumerate(nets):
        cross_entropy(models[1](batch(0)[0]), batch(i)[1]).backward()
        watched.step()
        given.step(loss=losses[i])
        assert_same(watched, given)


def test_two_optimizers_one_net_and_a_later_group() -> None:
    """Each has the whole loss, as their gradients are its gradients."""
    models, criterion = (make_model(), make_model()), nn.CrossEntropyLoss()
    optimizers = [[DFW(m[:2].parameters(), lr=LR), DFW(m[2].parameters(), lr=LR)] for m in models]
    for optimizer in optimizers[0]:
        optimizer.watch_loss(criterion)
    for model, (_, second) in zip(models, optimizers, strict=True):
        second.add_param_group({"params": model[4].parameters()})
    run("plain", models[0], criterion, None)
    loss = run("plain", models[1], nn.CrossEntropyLoss(), None)
    for watched, given in zip(*optimizers, strict=True):
        watched.step()
        given.step(loss=loss)
        assert_same(watched, given)


def test_forward_in_threads() -> None:
    """As in DataParallel."""
    (model, twin), (watched, given) = pair()
    watched.watch_loss(criterion := nn.CrossEntropyLoss())
    with ThreadPoolExecutor(4) as pool:
        losses = list(pool.map(lambda i: criterion(model(batch(i)[0]), batch(i)[1]), range(12)))
    torch.stack(losses).sum().backward()
    watched.step()
    given.step(loss=run("twelve", twin, nn.CrossEntropyLoss(), given))
    assert_same(watched, given)


class WithLoss(nn.Module):
    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.wrap = make_model(), wrap

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        return self.wrap(None if labels is None else cross_entropy(self.net(inputs), labels))


@pytest.mark.parametrize(
    ("wrap", "find"),
    [
        (lambda loss: loss, lambda output: output),
        (lambda loss: UserDict(loss=loss), lambda output: output["loss"]),
        (lambda loss: SimpleNamespace(loss=loss), lambda output: output.loss),
        ((lambda loss: (0, [loss])), lambda output: output[1][0]),
    ],
)
def test_model_that_returns_its_loss(wrap: Any, find: Any) -> None:
    model, twin = WithLoss(wrap), make_model()
    watched, given = make(model), make(twin)
    watched.watch_loss(model, **({"get": find} if isinstance(wrap(0), tuple) else {}))
    model(batch(0)[0])
    find(model(*batch(0))).backward()
    watched.step()
    given.step(loss=run("plain", twin, nn.CrossEntropyLoss(), given))
    assert_same(watched, given)


@pytest.mark.parametrize("enabled", [False, True])
def test_scaler(enabled: bool) -> None:
    models, (watched, given) = pair()
    scaler, criterion = GradScaler("cpu", 1024.0, enabled=enabled), nn.CrossEntropyLoss()
    watched.watch_loss(criterion, scaler=scaler)
    for x, y in map(batch, range(3)):
        scaler.scale(criterion(models[0](x), y).float() / 3).backward()
    scaler.step(watched)
    given.step(loss=run("accumulation", models[1], nn.CrossEntropyLoss(), given))
    assert_same(watched, given)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_not_watched(duplicate: Any) -> None:
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = make(model)
    optimizer.watch_loss(criterion, get=lambda output: output, scaler=GradScaler("cpu"))
    run("plain", model, criterion, optimizer)
    twin, own, other = duplicate((model, criterion, optimizer))
    run("plain", twin, own, other)
    run("plain", model, own, optimizer)
    with pytest.raises(TypeError, match="needs the loss"):
        other.step()
    other.watch_loss(own)


def test_errors() -> None:
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = make(model)
    with pytest.raises(TypeError, match=r"module=.*nn\.Module"):
        optimizer.watch_loss(cross_entropy)
    with pytest.raises(TypeError, match="get=1 cannot be called"):
        optimizer.watch_loss(criterion, get=1)
    with pytest.raises(TypeError, match=r"scaler=1024\.0 must be"):
        optimizer.watch_loss(criterion, scaler=1024.0)
    with optimizer.watch_loss(criterion), pytest.raises(ValueError, match="watched already"):
        optimizer.watch_loss(criterion)
    for output in ((criterion, 0), 1.0, {"scores": 1}, torch.ones(2, dtype=torch.int64)):
        module = WithLoss(partial(lambda output, _: output, output))
        with optimizer.watch_loss(module), pytest.raises(TypeError, match=r"get=lambda output"):
            module(*batch(0))


def test_module_or_optimizer_that_is_no_more() -> None:
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = make(model)
    gone = optimizer.watch_loss(nn.CrossEntropyLoss())
    with pytest.raises(RuntimeError, match=r"the watched CrossEntropyLoss is no more: keep a ref"):
        optimizer.step()
    optimizer.step(loss=1.0)
    gone.remove()
    assert not optimizer._watch.active
    optimizer.watch_loss(criterion)
    run("plain", model, criterion, optimizer)
    reference = weakref.ref(optimizer)
    del optimizer
    assert reference() is None
    run("plain", model, criterion, None)
