"""Steps without an argument: the loss of ``watch_loss`` is the function whose gradient is there."""

# torch leaves backward() and its hooks untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import time
import weakref
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import KINDS, MAIN_KINDS, Kind, everything, fingerprint
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_copies import ALL_WAYS, WAYS
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.checkpoint import checkpoint

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)

# So large that every step is shortened: then γ, and with it everything, depends on the loss.
LR = 50.0
STEPS = 4
Batch = tuple[Tensor, Tensor]


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    return model.to(dtype)


def make_batch(number: int, size: int = 12, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(4, (size,), generator=generator)


def used(optimizer: Any) -> float:
    """The loss of the last step of a plain DFW, from γ = ℓ/(η‖g‖² + ε)."""
    (group,) = optimizer.param_groups
    assert group["momentum"] == group["weight_decay"] == 0
    gradients = [p.grad for p in group["params"] if p.grad is not None]
    squares = sum(float(gradient.square().sum()) for gradient in gradients)
    gamma = float(optimizer.gamma)
    assert 0 < gamma < 1
    return float(gamma * (group["lr"] * squares + group["eps"]))


def make(kind: Kind, model: nn.Module, **settings: Any) -> Any:
    """With a box that is no bound to the steps, where weights and not latents are in it."""
    box = {"radius": 20.0} if kind.name == "box" else {}
    return kind.make(model.parameters(), **{"lr": LR, **box, **settings})


def plain(model: nn.Module, lr: float = 1e4) -> DFW:
    """The optimizer for :func:`used`."""
    return DFW(model.parameters(), lr=lr, momentum=0.0)


def assert_nothing_seen(optimizer: Any) -> None:
    """A bare step is an error that changes nothing."""
    before = everything(optimizer), fingerprint([optimizer.gamma, optimizer.skipped_steps])
    with pytest.raises(RuntimeError, match=r"watched loss.*step\(loss=loss\)"):
        optimizer.step()
    after = everything(optimizer), fingerprint([optimizer.gamma, optimizer.skipped_steps])
    assert after == before


def assert_not_watching(optimizer: Any) -> None:
    before = everything(optimizer)
    with pytest.raises(TypeError, match=r"needs the loss.*step\(loss=loss\).*watch_loss"):
        optimizer.step()
    assert everything(optimizer) == before


class WithLoss(nn.Module):
    """A model that computes its own loss, as those of Hugging Face do."""

    def __init__(self, wrap: Callable[[Tensor | None, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrap = make_model(), wrap

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.body(inputs)
        loss = None if labels is None else nn.functional.cross_entropy(scores, labels)
        return self.wrap(loss, scores)


class Output(NamedTuple):
    loss: Tensor | None
    scores: Tensor


class ModelOutput(OrderedDict[str, Tensor]):
    """As in Hugging Face's transformers: what is ``None`` is an attribute, but not a key."""

    def __init__(self, loss: Tensor | None, scores: Tensor) -> None:
        super().__init__({} if loss is None else {"loss": loss}, scores=scores)
        self.loss = loss


WRAPS: dict[str, Callable[[Any, Any], Any]] = {
    "namespace": lambda loss, scores: SimpleNamespace(loss=loss, scores=scores),
    "named tuple": Output,
    "dict": lambda loss, scores: {"loss": loss, "scores": scores},
    "mapping": lambda loss, scores: UserDict({"loss": loss, "scores": scores}),
    "mapping with attributes": ModelOutput,
    "tensor": lambda loss, scores: loss,
}


def loss_in(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    loss = output["loss"] if loss is None else loss
    assert isinstance(loss, Tensor)
    return loss


class TestEqualToPassing:
    """The same loop twice, with ``step(loss=loss)`` and with ``step()``: equal to the bit."""

    @ALL_KINDS
    @pytest.mark.parametrize(
        "criterion",
        [nn.CrossEntropyLoss(), MultiClassHingeLoss(), MultiClassHingeLoss(smooth=True)],
        ids=["cross entropy", "hinge", "smooth hinge"],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_criterion(self, kind: Kind, criterion: nn.Module, dtype: torch.dtype) -> None:
        results = []
        for watched in (False, True):
            model, own = make_model(dtype), copy.deepcopy(criterion)
            optimizer = make(kind, model, weight_decay=1e-3)
            if watched:
                optimizer.watch_loss(own)
            for number in range(STEPS):
                inputs, labels = make_batch(number, dtype=dtype)
                optimizer.zero_grad()
                loss = own(model(inputs), labels)
                loss.backward()
                result = optimizer.step() if watched else optimizer.step(loss=loss)
                assert result is (None if watched else loss)
                assert 0 < optimizer.gamma < 1
            results.append((everything(optimizer), float(optimizer.gamma)))
        assert results[0] == results[1]

    @THREE
    @pytest.mark.parametrize("wrap", WRAPS)
    def test_model_that_returns_its_loss(self, kind: Kind, wrap: str) -> None:
        results = []
        for watched in (False, True):
            model = WithLoss(WRAPS[wrap])
            optimizer = make(kind, model)
            if watched:
                optimizer.watch_loss(model)
            for number in range(STEPS):
                optimizer.zero_grad()
                loss = loss_in(model(*make_batch(number)))
                loss.backward()
                optimizer.step(**({} if watched else {"loss": loss}))
            results.append(everything(optimizer))
        assert results[0] == results[1]

    def test_get(self) -> None:
        """It may find the loss anywhere, or none."""
        model = WithLoss(lambda loss, scores: (scores, [loss]))
        optimizer = plain(model)
        optimizer.watch_loss(model, get=lambda output: output[1][0])
        model(make_batch(1)[0])  # the loss is None
        loss = model(*make_batch(0))[1][0]
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_loss_of_one_element(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss(reduction="none")
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0, size=1)
        loss = criterion(model(inputs), labels)
        assert loss.shape == (1,)
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_narrow_loss(self, dtype: torch.dtype) -> None:
        """Its value is not rounded again: micro-batches add up in float32."""
        model, criterion = make_model(torch.float32), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        total = 0.0
        for number in range(20):
            inputs, labels = make_batch(number, dtype=torch.float32)
            loss = criterion(model(inputs).to(dtype), labels)
            assert loss.dtype == dtype
            loss.backward()
            total += loss.item()
        optimizer.step()
        assert used(optimizer) == pytest.approx(total, rel=1e-5)


class TestSums:
    """⟨∂f/∂ℓ, ℓ⟩, added up as gradients are."""

    @THREE
    @pytest.mark.parametrize("in_place", [False, True])
    def test_accumulation_is_the_large_batch(self, kind: Kind, in_place: bool) -> None:
        parts, results = 4, []
        for watched in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = make(kind, model)
            if watched:
                optimizer.watch_loss(criterion)
            for number in range(STEPS):
                inputs, labels = make_batch(number, size=16)
                optimizer.zero_grad()
                if not watched:
                    loss = criterion(model(inputs), labels)
                    loss.backward()
                    optimizer.step(loss=loss)
                    continue
                for x, y in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
                    loss = criterion(model(x), y)
                    if in_place:
                        loss /= parts
                    else:
                        loss = loss / parts
                    loss.backward()
                optimizer.step()
            results.append((optimizer.gamma, list(model.parameters())))
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)

    def test_micro_batches_of_different_sizes(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0, size=16)
        for x, y in zip(inputs.split([1, 4, 11]), labels.split([1, 4, 11]), strict=True):
            (criterion(model(x), y) * (len(y) / 16)).backward()
        optimizer.step()
        whole = nn.functional.cross_entropy(make_model()(inputs), labels)
        assert used(optimizer) == pytest.approx(whole.item(), rel=1e-10)

    @pytest.mark.parametrize("earlier", [False, True], ids=["first backward", "second backward"])
    def test_two_criteria_in_one_backward(self, earlier: bool) -> None:
        """Also in the first, when no parameter has a gradient yet."""
        model = make_model()
        criteria = nn.CrossEntropyLoss(), MultiClassHingeLoss()
        optimizer = plain(model)
        for criterion in criteria:
            optimizer.watch_loss(criterion)
        value = 0.0
        if earlier:
            loss = criteria[0](model(make_batch(1)[0]), make_batch(1)[1])
            loss.backward()
            value += loss.item()
        inputs, labels = make_batch(0)
        scores = model(inputs)
        f = 0.3 * criteria[0](scores, labels) + 0.7 * criteria[1](scores, labels)
        f.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(value + f.item(), rel=1e-10)

    def test_two_criteria_each_with_its_backward(self) -> None:
        model = make_model()
        criteria = nn.CrossEntropyLoss(), MultiClassHingeLoss()
        optimizer = plain(model)
        for criterion in criteria:
            optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        losses = [criterion(model(inputs), labels) for criterion in criteria]
        for factor, loss in zip((0.3, 0.7), losses, strict=True):
            (factor * loss).backward()
        optimizer.step()
        f = 0.3 * losses[0].item() + 0.7 * losses[1].item()
        assert used(optimizer) == pytest.approx(f, rel=1e-10)

    def test_several_batches_in_one_backward(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        losses = [criterion(model(x), y) for x, y in map(make_batch, range(3))]
        f = torch.stack(losses).mean()
        f.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(f.item(), rel=1e-10)

    def test_parts_of_a_model(self) -> None:
        """An auxiliary loss that reaches some of the parameters only."""
        model, criterion, auxiliary = make_model(), nn.CrossEntropyLoss(), nn.MSELoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        optimizer.watch_loss(auxiliary)
        inputs, labels = make_batch(0)
        hidden = model[:2](inputs)
        main, other = criterion(model[2:](hidden), labels), auxiliary(hidden, torch.ones(12, 8))
        f = main + 0.5 * other
        f.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(f.item(), rel=1e-10)

    def test_unreduced(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss(reduction="none")
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        weights = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)
        losses = criterion(model(inputs), labels)
        f = (weights * losses).sum() / weights.sum()
        f.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(f.item(), rel=1e-10)

    def test_unreduced_in_two_dimensions(self) -> None:
        """Losses by pixel or word, masked, one mean each."""
        model, criterion = make_model(), nn.MSELoss(reduction="none")
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        losses = criterion(model(make_batch(0)[0]), torch.ones(12, 4, dtype=torch.float64))
        mask = torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.5
        f = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        f.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(f.item(), rel=1e-10)

    def test_unreduced_with_infinite_losses_left_out(self) -> None:
        """What ``f`` does not contain adds nothing, whatever its value."""
        model, criterion = make_model(), nn.CrossEntropyLoss(reduction="none")
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        scores = model(inputs)
        forbidden = torch.zeros_like(scores)
        forbidden[3, labels[3]] = -math.inf
        losses = criterion(scores + forbidden, labels)
        assert losses.isinf().sum() == 1
        f = losses[losses.isfinite()].mean()
        f.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        assert used(optimizer) == pytest.approx(f.item(), rel=1e-10)

    def test_backward_twice_through_one_graph(self) -> None:
        """The gradient doubles, so the loss does."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        loss = criterion(model(inputs), labels)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(2 * loss.item(), rel=1e-10)

    def test_backward_with_a_gradient(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        loss = criterion(model(inputs), labels)
        loss.backward(gradient=torch.tensor(0.25, dtype=torch.float64))
        optimizer.step()
        assert used(optimizer) == pytest.approx(0.25 * loss.item(), rel=1e-10)

    def test_frozen_part(self) -> None:
        """The first parameter has no gradient, at any time."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        model[0].weight.requires_grad_(False)
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        total = 0.0
        for inputs, labels in map(make_batch, range(3)):
            loss = criterion(model(inputs), labels)
            loss.backward()
            total += loss.item()
        optimizer.step()
        assert used(optimizer) == pytest.approx(total, rel=1e-10)


class TestAutogradGrad:
    """``torch.autograd.grad()`` puts nothing into ``.grad``, and is no part of the step."""

    @pytest.mark.parametrize("of", ["inputs", "hidden", "parameters", "one parameter"])
    def test_in_every_micro_batch(self, of: str) -> None:
        """Such as attacks, norms and penalties, with gradients of earlier ones in place."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        total = 0.0
        for inputs, labels in map(make_batch, range(3)):
            inputs.requires_grad_()
            hidden = model[:2](inputs)
            others: dict[str, Any] = {
                "inputs": inputs,
                "hidden": hidden,
                "parameters": list(model.parameters()),
                "one parameter": model[2].weight,
            }
            torch.autograd.grad(criterion(model[2:](hidden), labels), others[of])
            loss = criterion(model((inputs + 0.1).detach()), labels)
            loss.backward()
            total += loss.item()
        optimizer.step()
        assert used(optimizer) == pytest.approx(total, rel=1e-10)

    def test_through_which_one_backward_goes(self) -> None:
        """A penalty on the gradient: the loss itself counts once."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        inputs.requires_grad_()
        loss = criterion(model(inputs), labels)
        (gradient,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + gradient.square().sum()).backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_gradients_that_the_loop_writes(self) -> None:
        """Nobody can tell them from others; the loop has to pass its loss, and is told so."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer, params = plain(model), list(model.parameters())
        optimizer.watch_loss(criterion)
        loss = criterion(model(make_batch(0)[0]), make_batch(0)[1])
        for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = gradient
        assert_nothing_seen(optimizer)
        optimizer.step(loss=loss)
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    @pytest.mark.parametrize("which", range(6))
    def test_backward_of_one_parameter(self, which: int) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        loss = criterion(model(make_batch(0)[0]), make_batch(0)[1])
        loss.backward(inputs=[list(model.parameters())[which]])
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_backward_of_other_parameters(self) -> None:
        """Each player has the loss of its own gradients, through whatever they go."""
        judge, forger, criterion = make_model(), nn.Linear(6, 6).double(), nn.CrossEntropyLoss()
        optimizers = plain(judge), plain(forger)
        for optimizer in optimizers:
            optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        own = criterion(judge(inputs), labels)
        own.backward()
        forged = criterion(judge(forger(inputs)), labels + 0)
        forged.backward(inputs=list(forger.parameters()))
        for optimizer, loss in zip(optimizers, (own, forged), strict=True):
            optimizer.step()
            assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)


Part = tuple[int, float, bool]
"""Which criterion, its weight, and whether it is multiplied in place."""


def value_of(plan: Sequence[Sequence[Part]], model: nn.Module) -> Tensor:
    """The function of a plan in one expression, without any module that is watched."""
    total = torch.zeros((), dtype=torch.float64)
    number = 0
    for parts in plan:
        for which, weight, _ in parts:
            inputs, labels = make_batch(number)
            scores = model(inputs)
            if which == 0:
                term = nn.functional.cross_entropy(scores, labels)
            elif which == 1:
                term = MultiClassHingeLoss()(scores, labels)
            else:
                losses = nn.functional.cross_entropy(scores, labels, reduction="none")
                term = losses @ torch.linspace(0, 1, 12, dtype=torch.float64)
            total = total + weight * term
            number += 1
    return total


def check_plan(plan: Sequence[Sequence[Part]], evaluate: bool) -> None:
    """Each part of the plan is one ``backward()`` of a sum of weighted losses."""
    criteria = nn.CrossEntropyLoss(), MultiClassHingeLoss(), nn.CrossEntropyLoss(reduction="none")
    model = make_model()
    optimizer = plain(model, lr=1e6)
    for criterion in criteria:
        optimizer.watch_loss(criterion)
    expected = value_of(plan, model)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    number = 0
    for parts in plan:
        terms = []
        for which, weight, in_place in parts:
            inputs, labels = make_batch(number)
            term = criteria[which](model(inputs), labels)
            if which == 2:
                term = term @ torch.linspace(0, 1, 12, dtype=torch.float64)
            if in_place:
                term *= weight
            else:
                term = weight * term
            terms.append(term)
            number += 1
        if evaluate:
            inputs, labels = make_batch(100)
            criteria[0](model(inputs), labels)
            with torch.no_grad():
                criteria[1](model(inputs), labels)
        sum(terms, torch.zeros((), dtype=torch.float64)).backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12)
    optimizer.step()
    assume(optimizer.gamma < 1)
    assert used(optimizer) == pytest.approx(expected.item(), rel=1e-8)


PARTS = st.tuples(st.integers(0, 2), st.floats(0.01, 10.0), st.booleans())


@settings(max_examples=50)
@given(st.lists(PARTS, min_size=1, max_size=5), st.booleans())
def test_one_loss_in_each_backward(parts: list[Part], evaluate: bool) -> None:
    """The step's loss is the function whose gradient is in ``.grad``."""
    check_plan([[part] for part in parts], evaluate)


@settings(max_examples=50)
@given(st.lists(st.lists(PARTS, min_size=1, max_size=3), min_size=1, max_size=3), st.booleans())
def test_any_losses_in_each_backward(plan: list[list[Part]], evaluate: bool) -> None:
    """The same where one ``backward()`` is of several losses."""
    check_plan(plan, evaluate)


class TestEvaluation:
    """What is evaluated without ``backward()`` adds nothing."""

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("when", ["before", "between", "after"])
    def test_adds_nothing(self, mode: Callable[[], Any], when: str) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)

        def evaluate(now: str) -> None:
            with mode():
                if now == when:
                    criterion(model(make_batch(7)[0]), make_batch(7)[1])

        evaluate("before")
        inputs, labels = make_batch(0)
        loss = criterion(model(inputs), labels)
        evaluate("between")
        loss.backward()
        evaluate("after")
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
    def test_alone_is_no_loss(self, mode: Callable[[], Any]) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        with mode():
            criterion(model(make_batch(7)[0]), make_batch(7)[1])
        assert_nothing_seen(optimizer)

    @pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "tensor"])
    def test_of_a_model_without_labels(self, wrap: str) -> None:
        """Its loss is ``None``: there is nothing to be seen, with gradients or without."""
        model = WithLoss(WRAPS[wrap])
        optimizer = plain(model)
        optimizer.watch_loss(model)
        inputs, labels = make_batch(0)
        with torch.no_grad():
            model(inputs)
        model(inputs)
        loss = loss_in(model(inputs, labels))
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_of_a_loss_without_gradient(self) -> None:
        """Constant scores, in training mode and with gradients enabled."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        criterion(torch.zeros(2, 4), torch.tensor([0, 1]))
        assert_nothing_seen(optimizer)


def seen(kind: Kind = KINDS[0], **settings: Any) -> tuple[nn.Module, nn.Module, Any]:
    """Model, criterion and optimizer after one ``backward()``."""
    model, criterion = make_model(), nn.CrossEntropyLoss()
    optimizer = make(kind, model, **settings)
    optimizer.watch_loss(criterion)
    backward(model, criterion, 0)
    return model, criterion, optimizer


def backward(model: nn.Module, criterion: nn.Module, number: int) -> float:
    inputs, labels = make_batch(number)
    loss = criterion(model(inputs), labels)
    loss.backward()
    return float(loss.detach())


class TestNothingStale:
    @ALL_KINDS
    def test_before_the_first_backward(self, kind: Kind) -> None:
        optimizer = kind.make(make_model().parameters())
        optimizer.watch_loss(nn.CrossEntropyLoss())
        assert_not_watching(optimizer)  # nobody keeps that module alive

        criterion = nn.CrossEntropyLoss()
        optimizer.watch_loss(criterion)
        assert_nothing_seen(optimizer)

    @ALL_KINDS
    def test_second_step(self, kind: Kind) -> None:
        model, criterion, optimizer = seen(kind)
        optimizer.step()
        assert_nothing_seen(optimizer)
        backward(model, criterion, 1)
        optimizer.step()

    @pytest.mark.parametrize("set_to_none", [False, True])
    def test_zero_grad_discards(self, set_to_none: bool) -> None:
        model, criterion, optimizer = seen(momentum=0.0)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert_nothing_seen(optimizer)
        loss = backward(model, criterion, 1)
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)

    def test_zero_grad_of_the_model_discards(self) -> None:
        model, criterion, optimizer = seen(momentum=0.0)
        for number in (1, 2):
            backward(model, criterion, number)
        model.zero_grad()
        losses = [backward(model, criterion, number) for number in (3, 4)]
        optimizer.step()
        assert used(optimizer) == pytest.approx(sum(losses), rel=1e-10)

    def test_zero_grad_of_the_model_after_the_forward(self) -> None:
        """The order of many loops: loss, ``zero_grad()``, ``backward()``."""
        model, criterion, optimizer = seen(momentum=0.0)
        inputs, labels = make_batch(1)
        loss = criterion(model(inputs), labels)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_zero_grad_of_the_model_with_several_losses(self) -> None:
        """A new beginning is one for the first loss of a ``backward()`` only."""
        model, criterion, optimizer = seen(momentum=0.0)
        model.zero_grad()
        losses = [criterion(model(x), y) for x, y in map(make_batch, (1, 2))]
        (losses[0] + losses[1]).backward()
        optimizer.step()
        expected = float(losses[0].detach() + losses[1].detach())
        assert used(optimizer) == pytest.approx(expected, rel=1e-10)

    def test_zero_grad_of_the_model_between_two_backwards(self) -> None:
        """Through one graph, so that no forward pass is in between."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        loss = criterion(model(make_batch(0)[0]), make_batch(0)[1])
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    @pytest.mark.parametrize("forward", [False, True])
    def test_zero_grad_of_the_model_after_a_backward_that_failed(self, forward: bool) -> None:
        """As by a lack of memory; also if the next loss has been computed before."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)

        def fail(_: Tensor) -> None:
            raise MemoryError

        scores = model(make_batch(0)[0])
        scores.register_hook(fail)
        losses = [criterion(scores, make_batch(0)[1])]
        if not forward:
            losses.append(criterion(model(make_batch(1)[0]), make_batch(1)[1]))
        with pytest.raises(MemoryError):
            losses[0].backward()
        model.zero_grad()
        if forward:
            losses.append(criterion(model(make_batch(1)[0]), make_batch(1)[1]))
        losses[1].backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(losses[1].item(), rel=1e-10)

    def test_zero_grad_between_forward_and_backward(self) -> None:
        """It discards what was, not what is to come."""
        model, criterion, optimizer = seen(momentum=0.0)
        inputs, labels = make_batch(1)
        loss = criterion(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_gradients_kept_over_a_step(self) -> None:
        """Whoever does not clear the gradients still makes each step with new losses only."""
        model, criterion, optimizer = seen(momentum=0.0)
        optimizer.step()
        loss = backward(model, criterion, 1)
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)

    def test_failed_step_loses_nothing(self) -> None:
        model, criterion, optimizer = seen(momentum=0.0)
        other = backward(model, criterion, 1)
        first = float(criterion(model(make_batch(0)[0]), make_batch(0)[1]).detach())
        weight = model.get_parameter("0.weight")
        gradient = weight.grad
        assert gradient is not None
        weight.grad = gradient.to_sparse()
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        assert everything(optimizer) == before
        weight.grad = gradient
        optimizer.step()
        assert used(optimizer) == pytest.approx(first + other, rel=1e-10)
        assert_nothing_seen(optimizer)

    def test_nan_loss_skips_and_clears(self) -> None:
        model, criterion, optimizer = seen()
        inputs, labels = make_batch(1)
        (math.nan * criterion(model(inputs), labels)).backward()
        before = everything(optimizer)
        optimizer.step()
        assert everything(optimizer) == before
        assert optimizer.gamma.isnan()
        assert optimizer.skipped_steps == 1
        assert_nothing_seen(optimizer)
        optimizer.zero_grad()
        backward(model, criterion, 2)
        optimizer.step()
        assert 0 < optimizer.gamma < 1
        assert optimizer.skipped_steps == 1

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_bad_loss_with_good_gradients_skips(self, bad: float) -> None:
        model, criterion, optimizer = seen()
        inputs, labels = make_batch(1)
        inputs[0] = bad
        loss = criterion(model(inputs), labels)
        loss.backward()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = everything(optimizer)
        optimizer.step()
        assert everything(optimizer) == before
        assert optimizer.skipped_steps == 1


class TestGivenLoss:
    """``step(loss=...)`` and closures, while a module is watched."""

    @ALL_KINDS
    def test_overrides_and_clears(self, kind: Kind) -> None:
        results = []
        for watched in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = make(kind, model)
            if watched:
                optimizer.watch_loss(criterion)
            loss = 0.5 * backward(model, criterion, 0)
            assert optimizer.step(loss=loss) is loss
            results.append((everything(optimizer), float(optimizer.gamma)))
        assert results[0] == results[1]
        assert_nothing_seen(optimizer)

    def test_needs_nothing_seen(self) -> None:
        model, _, optimizer = seen()
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(loss=1.0)
        assert 0 < optimizer.gamma < 1

    @ALL_KINDS
    def test_closure_that_returns_the_last_part(self, kind: Kind) -> None:
        """As with Lightning's accumulation: the step is by the sum, and returns what it got."""
        results = []
        for watched in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = make(kind, model)
            if watched:
                optimizer.watch_loss(criterion)
            returned: list[Tensor] = []

            def closure(
                model: nn.Module = model,
                criterion: nn.Module = criterion,
                optimizer: Any = optimizer,
                watched: bool = watched,
                returned: list[Tensor] = returned,
            ) -> Tensor:
                optimizer.zero_grad()
                assert torch.is_grad_enabled()
                losses = [criterion(model(x), y) / 2 for x, y in map(make_batch, (0, 1))]
                for loss in losses:
                    loss.backward()
                returned.append(losses[-1] if watched else losses[0] + losses[1])
                return returned[-1]

            assert optimizer.step(closure) is returned[0]
            assert len(returned) == 1
            results.append((everything(optimizer), float(optimizer.gamma)))
        assert results[0][0] == results[1][0]
        assert results[0][1] == results[1][1] < 1

    def test_closure_that_returns_nothing(self) -> None:
        """Frameworks pass such closures, where ``backward()`` has been called before."""
        model, criterion, optimizer = seen(momentum=0.0)
        loss = float(criterion(model(make_batch(0)[0]), make_batch(0)[1]).detach())
        assert optimizer.step(lambda: None) is None
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)

        with pytest.raises(RuntimeError, match="watched loss"):
            optimizer.step(lambda: None)

    def test_closure_that_returns_nothing_where_nothing_is_watched(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer: Any = plain(model)
        backward(model, criterion, 0)
        with pytest.raises(TypeError, match=r"closure's result is None"):
            optimizer.step(lambda: None)

    @pytest.mark.parametrize("result", ["loss", torch.ones(2), 1j * torch.ones(())])
    def test_closure_that_returns_no_loss(self, result: Any) -> None:
        _, _, optimizer = seen()
        with pytest.raises((TypeError, ValueError), match=r"closure's result"):
            optimizer.step(lambda: result)

    def test_closure_that_uses_something_else(self) -> None:
        """A closure in which nothing watched takes part is a mistake, and no step is made."""
        model, _, optimizer = seen()

        def closure() -> Tensor:
            optimizer.zero_grad()
            inputs, labels = make_batch(1)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="watched loss"):
            optimizer.step(closure)
        torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)

    def test_both_are_refused(self) -> None:
        _, _, optimizer = seen()
        with pytest.raises(TypeError, match="not both"):
            optimizer.step(lambda: 1.0, loss=1.0)
        optimizer.step()  # the sum is still there


class TestStepOfLengthZero:
    """``lr=0`` everywhere: nothing depends on the loss."""

    @ALL_KINDS
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
    def test_needs_no_loss(self, kind: Kind, momentum: float, lr: Any) -> None:
        model = make_model()
        optimizer = kind.make(model.parameters(), lr=lr, momentum=momentum, weight_decay=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = everything(optimizer)
        assert optimizer.step() is None
        assert everything(optimizer) == before
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert everything(optimizer) == before

    @THREE
    def test_moves_by_momentum_only(self, kind: Kind) -> None:
        """After some training it is what it is with any loss."""
        results = []
        for loss in (None, 0.0, 0.1, 100.0):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = make(kind, model)
            optimizer.step(loss=backward(model, criterion, 0))
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            if loss is None:
                optimizer.step()
            else:
                optimizer.step(loss=loss)
            results.append(everything(optimizer))
        assert all(result == results[0] for result in results)

    def test_one_other_group_needs_it(self) -> None:
        model = make_model()
        first, *others = model.parameters()
        groups: list[dict[str, Any]] = [{"params": [first], "lr": 0.0}, {"params": others}]
        optimizer = DFW(groups)
        assert_not_watching(optimizer)

    def test_while_a_module_is_watched(self) -> None:
        """A checkpoint may be taken before the first batch."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model, lr=0.0)
        optimizer.watch_loss(criterion)
        before = everything(optimizer)
        optimizer.step()
        assert everything(optimizer) == before

    @pytest.mark.parametrize("watched", [False, True])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_distributed_checkpoint(self, watched: bool, momentum: float) -> None:
        """Without a process group: it is what torch recommends for any model."""
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = DFW(model.parameters(), lr=LR, momentum=momentum)
        if watched:
            optimizer.watch_loss(criterion)
        before = everything(optimizer)
        state = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(model, optimizer, state)
        assert everything(optimizer) == before

    def test_schedule_that_begins_at_zero(self) -> None:
        model, criterion, optimizer = seen()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
        for group in optimizer.param_groups:
            group["lr"] = LR
        assert_nothing_seen(optimizer)
        optimizer.zero_grad()
        backward(model, criterion, 1)
        optimizer.step()
        assert 0 < optimizer.gamma < 1


class TestGradScaler:
    @THREE
    @pytest.mark.parametrize("zero", ["optimizer", "model"])
    @pytest.mark.parametrize("unscale", [False, True])
    def test_float16(self, kind: Kind, zero: str, unscale: bool) -> None:
        """The scale is no part of the loss, also when it changes; infinities leave no trace."""
        results = []
        for watched in (False, True):
            model, criterion = make_model(torch.float32), nn.CrossEntropyLoss()
            optimizer = make(kind, model)
            scaler = GradScaler(
                "cpu", init_scale=2.0**24, backoff_factor=2.0**-5, growth_interval=3
            )
            if watched:
                optimizer.watch_loss(criterion, scaler=scaler)
            scales, steps = [], 0
            for number in range(16):
                inputs, labels = make_batch(number, dtype=torch.float32)
                scales.append(scaler.get_scale())
                with torch.autocast("cpu", torch.float16):
                    loss = criterion(model(inputs), labels)
                {"optimizer": optimizer, "model": model}[zero].zero_grad()
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                before = optimizer.gamma
                scaler.step(optimizer, **({} if watched else {"loss": loss}))
                steps += optimizer.gamma is not before
                scaler.update()
            assert 4 <= steps <= 15, "some steps, but not all, are made"
            assert max(scales[4:]) > min(scales[4:]), "the scale grows again"
            assert 0 < optimizer.gamma < 1
            assert optimizer.skipped_steps == 0
            results.append((everything(optimizer), float(optimizer.gamma), scales))
        assert results[0] == results[1]

    def test_accumulation(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        scaler = GradScaler("cpu", init_scale=1000.0)
        optimizer.watch_loss(criterion, scaler=scaler)
        total = 0.0
        for x, y in map(make_batch, range(3)):
            loss = criterion(model(x), y) / 3
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(optimizer)
        scaler.update()
        assert used(optimizer) == pytest.approx(total, rel=1e-6)  # a float32 scale

    def test_disabled(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        scaler = GradScaler("cpu", enabled=False)
        optimizer.watch_loss(criterion, scaler=scaler)
        inputs, labels = make_batch(0)
        loss = criterion(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_bfloat16_autocast(self) -> None:
        results = []
        for watched in (False, True):
            model, criterion = make_model(torch.float32), nn.CrossEntropyLoss()
            optimizer = DFW(model.parameters(), lr=LR)
            if watched:
                optimizer.watch_loss(criterion)
            for number in range(STEPS):
                inputs, labels = make_batch(number, dtype=torch.float32)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = criterion(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(**({} if watched else {"loss": loss}))
            results.append(everything(optimizer))
        assert results[0] == results[1]


class TestEnd:
    def test_remove(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        hooks = len(criterion._forward_hooks)
        handle = optimizer.watch_loss(criterion)
        backward(model, criterion, 0)
        handle.remove()
        handle.remove()
        assert len(criterion._forward_hooks) == hooks
        assert_not_watching(optimizer)
        backward(model, criterion, 1)
        assert_not_watching(optimizer)
        optimizer.step(loss=1.0)

    def test_as_a_context(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        with optimizer.watch_loss(criterion):
            backward(model, criterion, 0)
            optimizer.step()
        assert_not_watching(optimizer)

    def test_one_of_two(self) -> None:
        model = make_model()
        criteria = nn.CrossEntropyLoss(), MultiClassHingeLoss()
        optimizer = plain(model)
        first, _ = [optimizer.watch_loss(criterion) for criterion in criteria]
        first.remove()
        loss = backward(model, criteria[1], 0)
        backward(model, criteria[0], 0)
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)

    def test_other_hooks_stay(self) -> None:
        """Those of others neither see a difference nor make one."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        outputs: list[Any] = []
        criterion.register_forward_hook(lambda _, __, output: outputs.append(output))
        optimizer = plain(model)
        handle = optimizer.watch_loss(criterion)
        criterion.register_forward_hook(lambda _, __, output: outputs.append(output))
        inputs, labels = make_batch(0)
        loss = criterion(model(inputs), labels)
        assert outputs[0] is outputs[1] is loss
        handle.remove()
        criterion(model(inputs), labels)
        assert len(outputs) == 4

    def test_module_is_no_more(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        backward(model, criterion, 0)
        with uncollected():
            del criterion
            assert_not_watching(optimizer)

    @ALL_KINDS
    @pytest.mark.parametrize("when", ["unused", "after a step", "with a graph"])
    def test_optimizer_is_no_more(self, kind: Kind, when: str) -> None:
        """It goes with its last reference, and its module works as before."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = kind.make(model.parameters())
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        loss = criterion(model(inputs), labels)
        if when == "after a step":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
        reference = weakref.ref(optimizer)
        with uncollected():
            del optimizer
            assert reference() is None
        if when == "with a graph":
            loss.backward()
        model.zero_grad()
        backward(model, criterion, 1)
        assert all(p.grad is not None for p in model.parameters())

    def test_no_graph_is_kept(self) -> None:
        """What backward() would have needed goes with the loop's own references."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        inputs, labels = make_batch(0)
        saved: list[weakref.ref[Saved]] = []

        def pack(tensor: Tensor) -> Saved:
            packed = Saved(tensor.detach())  # an output with its graph would keep itself
            saved.append(weakref.ref(packed))
            return packed

        with uncollected(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.tensor):
            loss = criterion(model(inputs), labels)
            assert saved
            assert all(reference() is not None for reference in saved)
            del loss
            assert all(reference() is None for reference in saved)


class Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the cycle collector: what goes, goes by reference counts."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class TestSeveralOptimizers:
    def test_one_criterion(self) -> None:
        """One for the weights and one for the biases, each with the whole loss."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        params = list(model.parameters())
        parts = [[p for p in params if p.dim() == dim] for dim in (1, 2)]
        optimizers = [DFW(part, lr=1e4, momentum=0.0) for part in parts]
        for optimizer in optimizers:
            optimizer.watch_loss(criterion)
        for number in range(3):
            model.zero_grad()
            loss = backward(model, criterion, number)
            for optimizer in optimizers:
                optimizer.step()
                assert used(optimizer) == pytest.approx(loss, rel=1e-10)

    def test_end_of_one(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        first, second = plain(model), plain(model)
        handle = first.watch_loss(criterion)
        second.watch_loss(criterion)
        handle.remove()
        backward(model, criterion, 0)
        assert_not_watching(first)
        second.step()

    def test_one_that_is_gone(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        first, second = plain(model), plain(model)
        first.watch_loss(criterion)
        second.watch_loss(criterion)
        del first
        loss = backward(model, criterion, 0)
        second.step()
        assert used(second) == pytest.approx(loss, rel=1e-10)

    def test_two_players(self) -> None:
        """Each ``backward()`` of one is discarded by the other's ``zero_grad()``."""
        criterion = nn.CrossEntropyLoss()
        players = [make_model(), make_model()]
        optimizers = [plain(player) for player in players]
        for optimizer in optimizers:
            optimizer.watch_loss(criterion)
        for number in range(3):
            for player, optimizer in zip(players, optimizers, strict=True):
                optimizer.zero_grad()
                inputs, labels = make_batch(number)
                scores = 0.5 * players[0](inputs) + 0.5 * players[1](inputs)
                loss = criterion(scores, labels)
                loss.backward()
                optimizer.step()
                assert all(p.grad is not None for p in player.parameters())
                assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)


class TestCopies:
    """A copy of a watched module computes its losses for others."""

    @ALL_WAYS
    def test_of_a_criterion(self, way: str) -> None:
        model, criterion, optimizer = seen()
        loss = float(criterion(model(make_batch(0)[0]), make_batch(0)[1]).detach())
        twin = WAYS[way](criterion)
        backward(model, twin, 1)
        optimizer.zero_grad()
        backward(model, twin, 1)
        assert_nothing_seen(optimizer)
        optimizer.zero_grad()
        assert backward(model, criterion, 0) == loss
        optimizer.step()

    @ALL_WAYS
    def test_of_a_model(self, way: str) -> None:
        whole = nn.Sequential(make_model(), nn.LogSoftmax(1), MeanOfFirst())
        optimizer = plain(whole)
        optimizer.watch_loss(whole)
        twin = WAYS[way](whole)
        twin(make_batch(0)[0]).backward()
        assert_nothing_seen(optimizer)
        loss = whole(make_batch(0)[0])
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    def test_shallow(self) -> None:
        """It has the very hooks of the original, and outlives it."""
        model, criterion, optimizer = seen(momentum=0.0)
        loss = float(criterion(model(make_batch(0)[0]), make_batch(0)[1]).detach())
        twin = copy.copy(criterion)
        assert twin._forward_hooks is criterion._forward_hooks
        backward(model, twin, 1)
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)
        backward(model, twin, 1)
        assert_nothing_seen(optimizer)
        loss = backward(model, criterion, 1)
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)
        del criterion
        backward(model, twin, 2)
        assert_nothing_seen(optimizer)

    def test_replicas(self) -> None:
        """What DataParallel makes for each batch is no copy: its losses are the module's."""
        model = WithLoss(WRAPS["dict"])
        optimizer = plain(model)
        optimizer.watch_loss(model)
        losses = []
        for x, y in map(make_batch, range(2)):
            replica = model._replicate_for_data_parallel()
            replica.body = model.body
            losses.append(replica(x, y)["loss"])
        loss = torch.stack(losses).mean()
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)

    @ALL_WAYS
    def test_of_all_together(self, way: str) -> None:
        """A pair that is copied is told its losses anew."""
        model, criterion, optimizer = seen(momentum=0.0)
        before = everything(optimizer)
        twin, its_criterion, its_optimizer = WAYS[way]((model, criterion, optimizer))
        its_optimizer.zero_grad()
        backward(twin, its_criterion, 1)
        assert_not_watching(its_optimizer)
        its_optimizer.watch_loss(its_criterion)
        its_optimizer.zero_grad()
        loss = backward(twin, its_criterion, 1)
        its_optimizer.step()
        assert used(its_optimizer) == pytest.approx(loss, rel=1e-10)
        assert everything(optimizer) == before
        optimizer.step()

    def test_get_need_not_be_picklable(self) -> None:
        criterion = nn.CrossEntropyLoss()
        optimizer = plain(make_model())
        optimizer.watch_loss(criterion, get=lambda output: output, scaler=GradScaler("cpu"))
        pickle.dumps(criterion)
        copy.deepcopy(criterion)

    def test_state_dict_is_as_before(self) -> None:
        model = WithLoss(WRAPS["dict"])
        keys = list(model.state_dict())
        optimizer = plain(model)
        optimizer.watch_loss(model)
        assert list(model.state_dict()) == keys
        assert set(optimizer.state_dict()) == {"state", "param_groups"}

    def test_load_state_dict_goes_on_watching(self) -> None:
        model, criterion, optimizer = seen(momentum=0.0)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.zero_grad()
        loss = backward(model, criterion, 1)
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss, rel=1e-10)


class MeanOfFirst(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return -scores[:, 0].mean()


class TestCheckpoint:
    """torch.utils.checkpoint computes the forward pass again, in backward()."""

    @THREE
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("what", ["model", "model and criterion", "criterion"])
    def test_trains_the_same(self, kind: Kind, reentrant: bool, what: str) -> None:
        results = []
        for watched in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = make(kind, model)
            if watched:
                optimizer.watch_loss(criterion)

            def whole(
                x: Tensor, y: Tensor, model: nn.Module = model, criterion: nn.Module = criterion
            ) -> Tensor:
                result = criterion(model(x), y)
                assert isinstance(result, Tensor)
                return result

            for number in range(STEPS):
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for part in (0, 1):  # gradient accumulation
                    inputs, labels = make_batch(2 * number + part)
                    inputs.requires_grad_()  # which a reentrant checkpoint needs
                    if not watched:
                        loss = whole(inputs, labels) / 2
                    elif what == "model":
                        scores = checkpoint(model, inputs, use_reentrant=reentrant)
                        loss = criterion(scores, labels) / 2
                    elif what == "criterion":
                        scores = model(inputs)
                        loss = checkpoint(criterion, scores, labels, use_reentrant=reentrant) / 2
                    else:
                        loss = checkpoint(whole, inputs, labels, use_reentrant=reentrant) / 2
                    loss.backward()
                    total += loss.detach()
                optimizer.step(**({} if watched else {"loss": total}))
            results.append((everything(optimizer), float(optimizer.gamma)))
        assert results[0] == results[1]
        assert results[0][1] < 1

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_model_that_returns_its_loss(self, reentrant: bool) -> None:
        model = WithLoss(WRAPS["tensor"])
        optimizer = plain(model)
        optimizer.watch_loss(model)
        inputs, labels = make_batch(0)
        inputs.requires_grad_()
        loss = checkpoint(model, inputs, labels, use_reentrant=reentrant)
        loss.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(loss.item(), rel=1e-10)


class TestReentrant:
    """A reentrant checkpoint calls ``backward()`` within ``backward()``: that is no new one."""

    def recomputed(self, what: str, model: nn.Module, criterion: nn.Module, number: int) -> Tensor:
        inputs, labels = make_batch(number)
        inputs.requires_grad_()

        def whole(x: Tensor) -> Tensor:
            result = criterion(model(x), labels)
            assert isinstance(result, Tensor)
            return result

        def nested(x: Tensor) -> Any:
            return checkpoint(whole, x, use_reentrant=True)

        if what == "plain":
            loss: Any = whole(inputs)
        elif what == "criterion":
            loss = checkpoint(criterion, model(inputs), labels, use_reentrant=True)
        elif what == "nested criterion":
            loss = checkpoint(
                lambda scores: checkpoint(criterion, scores, labels, use_reentrant=True),
                model(inputs),
                use_reentrant=True,
            )
        else:
            function = whole if what == "whole" else nested
            loss = checkpoint(function, inputs, use_reentrant=True)
        assert isinstance(loss, Tensor)
        return loss

    @pytest.mark.parametrize("before", ["nothing", "a backward", "what was discarded"])
    @pytest.mark.parametrize(
        "parts",
        [
            *itertools.product(["plain", "criterion", "whole", "nested"], repeat=2),
            ("nested criterion", "nested criterion"),
            ("criterion", "plain", "criterion"),
            ("nested", "criterion", "plain", "whole"),
        ],
        ids="+".join,
    )
    def test_one_backward(self, parts: tuple[str, ...], before: str) -> None:
        """Of several losses, recomputed or not."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        expected = 0.0
        if before != "nothing":
            expected = backward(model, criterion, 9)
        if before == "what was discarded":
            model.zero_grad()
            expected = 0.0
        losses = [self.recomputed(what, model, criterion, i) for i, what in enumerate(parts)]
        f = torch.stack([weight * loss for weight, loss in enumerate(losses, 1)]).sum()
        f.backward()
        optimizer.step()
        assert used(optimizer) == pytest.approx(expected + f.item(), rel=1e-10)

    @pytest.mark.parametrize("what", ["criterion", "whole", "nested"])
    def test_several_backwards(self, what: str) -> None:
        """Before a step, with what was discarded first."""
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        for number in range(2):
            self.recomputed(what, model, criterion, number).backward()
        model.zero_grad()
        total = 0.0
        for number in (2, 4):
            f = self.recomputed(what, model, criterion, number)
            f = f + self.recomputed("plain", model, criterion, number + 1)
            f.backward()
            total += f.item()
        optimizer.step()
        assert used(optimizer) == pytest.approx(total, rel=1e-10)


class Slow(Tensor):
    """Lets other threads in between the reading of two terms and the writing of their sum."""

    @classmethod
    def __torch_function__(cls, func: Any, *others: Any) -> Any:
        if "add" in func.__name__:
            time.sleep(0.001)
        return super().__torch_function__(func, *others)


class SlowLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).as_subclass(Slow)


class TestThreads:
    def test_lose_nothing(self) -> None:
        """Devices have their threads, in one ``backward()`` or in several."""
        model, criterion = make_model(), SlowLoss()
        optimizer = plain(model, lr=1e6)
        optimizer.watch_loss(criterion)
        first = backward(model, criterion, 0)
        parts, threads = 5, 8
        start = Barrier(threads)
        # Not of the model: torch adds to one gradient in one thread at a time only.
        scores = [model(make_batch(0)[0]).detach().requires_grad_() for _ in range(threads)]

        def work(number: int) -> None:
            start.wait()
            for _ in range(parts):
                loss = criterion(scores[number], make_batch(0)[1])
                loss.as_subclass(Tensor).backward()  # or nothing is slow within

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        optimizer.step()
        assert used(optimizer) == pytest.approx((1 + parts * threads) * first, rel=1e-9)

    @ALL_WAYS
    def test_optimizer_can_be_copied(self, way: str) -> None:
        _, _, optimizer = seen()
        assert everything(WAYS[way](optimizer)) == everything(optimizer)


class TestCompile:
    """With the backend that only traces."""

    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def check(self, optimizer: Any, evaluate: Callable[[Tensor, Tensor], Tensor]) -> None:
        for number in range(3):
            optimizer.zero_grad()
            losses = []
            for part in (0, 1):
                losses.append(evaluate(*make_batch(2 * number + part)) / 2)
                losses[-1].backward()
            with torch.no_grad():
                evaluate(*make_batch(99))
            optimizer.step()
            expected = float(losses[0].detach() + losses[1].detach())
            assert used(optimizer) == pytest.approx(expected, rel=1e-10)
            assert_nothing_seen(optimizer)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_model(self, in_place: bool) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        compiled: Any = model
        if in_place:
            model.compile(backend="eager")
        else:
            compiled = torch.compile(model, backend="eager", fullgraph=True)
        self.check(optimizer, lambda x, y: criterion(compiled(x), y))

    @pytest.mark.parametrize("watched", ["compiled", "original", "compiled in place"])
    @pytest.mark.parametrize("wrap", ["dict", "tensor"])
    def test_watched_module(self, watched: str, wrap: str) -> None:
        model = WithLoss(WRAPS[wrap])
        optimizer = plain(model)
        called: Any = model
        if watched == "compiled in place":
            model.compile(backend="eager")
        else:
            called = torch.compile(model, backend="eager")
        optimizer.watch_loss(called if watched == "compiled" else model)
        self.check(optimizer, lambda x, y: loss_in(called(x, y)))

    @pytest.mark.parametrize("in_place", [False, True])
    def test_criterion(self, in_place: bool) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        compiled: Any = criterion
        if in_place:
            criterion.compile(backend="eager")
        else:
            compiled = torch.compile(criterion, backend="eager")
        optimizer.watch_loss(compiled)
        self.check(optimizer, lambda x, y: compiled(model(x), y))

    def test_criterion_in_what_is_compiled(self) -> None:
        model, criterion = make_model(), nn.CrossEntropyLoss()
        optimizer = plain(model)
        optimizer.watch_loss(criterion)
        evaluate = torch.compile(lambda x, y: criterion(model(x), y), backend="eager")
        self.check(optimizer, evaluate)


class TestWrongArguments:
    @pytest.mark.parametrize(
        "module",
        [nn.functional.cross_entropy, None, "loss", nn.CrossEntropyLoss],
        ids=["function", "None", "string", "class"],
    )
    def test_no_module(self, module: Any) -> None:
        optimizer = plain(make_model())
        with pytest.raises(TypeError, match=r"module=.*torch\.nn\.Module.*CrossEntropyLoss\(\)"):
            optimizer.watch_loss(module)
        assert_not_watching(optimizer)

    @pytest.mark.parametrize("get", [None, "loss", 1])
    def test_no_function(self, get: Any) -> None:
        optimizer, criterion = plain(make_model()), nn.CrossEntropyLoss()
        with pytest.raises(TypeError, match=r"get=.*cannot be called.*lambda output"):
            optimizer.watch_loss(criterion, get=get)
        assert_not_watching(optimizer)

    @pytest.mark.parametrize("scaler", [1024.0, torch.ones(()), GradScaler, "cpu", False])
    def test_no_scaler(self, scaler: Any) -> None:
        optimizer, criterion = plain(make_model()), nn.CrossEntropyLoss()
        with pytest.raises(TypeError, match=r"scaler=.*torch\.amp\.GradScaler.*None"):
            optimizer.watch_loss(criterion, scaler=scaler)
        assert_not_watching(optimizer)

    @pytest.mark.parametrize(
        ("wrap", "found"),
        [
            (lambda _, scores: SimpleNamespace(scores=scores), "SimpleNamespace"),
            (lambda _, scores: {"scores": scores}, "dict"),
            (lambda loss, scores: (loss, scores), "tuple"),
            (lambda _, scores: scores.argmax(1), "Tensor"),
            (lambda loss, _: {"loss": loss.item()}, "float"),
        ],
        ids=["object", "dict", "tuple", "integers", "number"],
    )
    def test_output_without_a_loss(self, wrap: Any, found: str) -> None:
        model = WithLoss(wrap)
        optimizer = plain(model)
        optimizer.watch_loss(model)
        with pytest.raises(TypeError, match=rf"WithLoss has {found} where.*get=lambda output"):
            model(*make_batch(0))

    @pytest.mark.parametrize("optimizer", [DFW, ProjectedDFW, TernaryDFW])
    def test_without_anything(self, optimizer: Any) -> None:
        """The error names all three ways."""
        made = optimizer([nn.Parameter(torch.ones(2, 2))])
        with pytest.raises(TypeError) as raised:
            made.step()
        for way in ("step(loss=loss)", "step(closure)", "watch_loss(criterion)"):
            assert way in str(raised.value)


def spread(losses: Iterable[float]) -> float:
    values = list(losses)
    return max(values) - min(values)


class TestTraining:
    @THREE
    def test_frozen_loop(self, kind: Kind) -> None:
        """A loop that knows no optimizer's arguments learns what the other one learns."""
        finals = []
        for watched in (False, True):
            model, criterion = make_model(torch.float32), nn.CrossEntropyLoss()
            optimizer = kind.make(model.parameters(), lr=0.5)
            if watched:
                optimizer.watch_loss(criterion)
            inputs, _ = make_batch(0, size=64, dtype=torch.float32)
            labels = inputs[:, :4].argmax(1)
            for number in range(60):
                loss = criterion(model(inputs), labels)
                if number == 0:
                    first = loss.item()
                model.zero_grad()
                loss.backward()
                optimizer.step(**({} if watched else {"loss": loss}))
            finals.append(loss.item())
        assert spread(finals) == 0
        assert finals[0] < 0.75 * first
