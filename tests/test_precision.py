"""Autocast, gradient scalers, gradient clipping, recomputed and compiled models.

The loss is passed to each step here; tests/test_watch_loss.py has the same for watched losses.
"""

# torch leaves backward() untyped, and what torch.compile returns.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import math
import shutil
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import (
    MAIN_KINDS,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    to_numpy,
)
from test_training import digits, small_net
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups

THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def make_batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 6, generator=generator)
    return inputs, torch.randint(4, (16,), generator=generator)


def train_on_digits(
    optimizer_class: Any,
    dtype: torch.dtype,
    scaler: GradScaler,
) -> tuple[float, Any, list[float]]:
    """Returns the accuracy on images not seen, the optimizer, and the scales of the steps."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits()
    model = small_net(nn.ReLU)
    float_net = optimizer_class is DFW
    optimizer = optimizer_class(model.parameters() if float_net else param_groups(model))
    criterion = MultiClassHingeLoss(smooth=True)
    generator = torch.Generator().manual_seed(1)
    scales = []
    for _ in range(3):
        for batch in torch.randperm(len(y), generator=generator).split(64):
            with torch.autocast("cpu", dtype):
                scores = model(x[batch])
                loss = criterion(scores, y[batch])
            assert scores.dtype == dtype
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scales.append(scaler.get_scale())
            scaler.step(optimizer, loss=loss)
            scaler.update()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_consistent(optimizer)
    model.eval()
    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean()
    return float(accuracy), optimizer, scales


OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])


class TestAutocast:
    @OPTIMIZERS
    @NARROW
    def test_digits(self, optimizer_class: Any, dtype: torch.dtype) -> None:
        """Float16 from a scale that is too large, so that the first steps are skipped."""
        scaled = dtype == torch.float16
        scaler = GradScaler(
            "cpu", init_scale=2.0**32, backoff_factor=2.0**-4, growth_interval=25, enabled=scaled
        )
        accuracy, optimizer, scales = train_on_digits(optimizer_class, dtype, scaler)
        assert accuracy >= 0.93
        assert int(optimizer.skipped_steps) == 0
        if scaled:
            changes = [later / earlier for earlier, later in pairwise(scales)]
            assert {2.0**-4, 1.0, 2.0} >= set(changes)
            assert changes.count(2.0**-4) >= 2
            assert changes.count(2.0) >= 1

    @THREE
    @NARROW
    def test_step_is_that_of_loss_and_gradients(self, kind: Kind, dtype: torch.dtype) -> None:
        """What was computed in 16 bits is taken as it is, in float32."""
        model = make_model()
        start = [to_numpy(p) for p in model.parameters()]
        optimizer = kind.make(model.parameters(), lr=3.0)
        quantizer = {"dfw": None, "binary": "binary", "ternary": "ternary"}[kind.name]
        settings = reference.Settings(lr=3.0, quantizer=quantizer, radius=1.0)
        plain = reference.Settings(lr=3.0)
        parameters = [
            reference.make_parameter(w, settings if quantizer and w.ndim == 2 else plain)
            for w in start
        ]
        gammas = []
        for number in range(3):
            inputs, labels = make_batch(number)
            with torch.autocast("cpu", dtype):
                loss = 20 * nn.CrossEntropyLoss()(model(inputs), labels)  # γ is below 1
            optimizer.zero_grad()
            loss.backward()
            gradients = [to_numpy(p.grad) for p in model.parameters() if p.grad is not None]
            gammas.append(reference.step(parameters, loss.item(), gradients))
            optimizer.step(loss=loss)
            assert float(optimizer.gamma) == pytest.approx(gammas[-1], rel=1e-5)
        for p, expected in zip(model.parameters(), parameters, strict=True):
            np.testing.assert_allclose(to_numpy(p), expected.forward(), rtol=1e-4, atol=1e-6)
        assert 0 < gammas[0] < 1

    @NARROW
    def test_narrow_loss(self, dtype: torch.dtype) -> None:
        """A loss of 16 bits is not rounded again."""
        params = make_params()
        optimizer = DFW(params, lr=1.0, eps=0.0, momentum=0.0)
        draw_gradients(params, 0)
        squares = sum(float(p.grad.square().sum()) for p in params if p.grad is not None)
        loss = torch.tensor(0.3, dtype=dtype)
        optimizer.step(loss=loss)
        assert float(optimizer.gamma) == pytest.approx(float(loss) / squares, rel=1e-6)


class TestGradScaler:
    @THREE
    @pytest.mark.parametrize("bad", [math.inf, math.nan])
    def test_bad_gradients_leave_no_trace(self, kind: Kind, bad: float) -> None:
        """Not one bit changes, and the steps after are those of a run that never met them."""
        ends = []
        for numbers in ([0, 1, 2, 3, 4], [0, 1, 3, 4]):
            params = make_params()
            optimizer = kind.make(params, lr=1.0, weight_decay=1e-3)
            scaler = GradScaler("cpu", init_scale=2.0**10)
            for number in numbers:
                optimizer.zero_grad()
                draw_gradients(params, number, scaler.get_scale())
                if number == 2:
                    assert params[1].grad is not None
                    params[1].grad.view(-1)[3] = bad
                before = everything(optimizer), fingerprint(optimizer.gamma)
                scaler.scale(torch.zeros(()))  # which begins a step; the gradients are drawn
                scaler.step(optimizer, loss=torch.tensor(0.5))
                scaler.update()
                after = everything(optimizer), fingerprint(optimizer.gamma)
                assert (after == before) == (number == 2)
            assert scaler.get_scale() == (2.0**9 if 2 in numbers else 2.0**10)
            # The scaler does not call step at all, so there is no step to be counted as skipped.
            assert int(optimizer.skipped_steps) == 0
            ends.append(everything(optimizer))
        assert ends[0] == ends[1]

    @THREE
    @pytest.mark.parametrize("unscale", [False, True])
    def test_scale_makes_no_difference(self, kind: Kind, unscale: bool) -> None:
        """A power of 2 is exact: the same bits as without a scaler."""
        ends = []
        for scale in (None, 1.0, 2.0**16):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = kind.make(model.parameters(), lr=10.0)
            scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
            gammas = []
            for number in range(6):
                inputs, labels = make_batch(number)
                loss = criterion(model(inputs), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer, loss=loss)
                scaler.update()
                gammas.append(float(optimizer.gamma))
            assert any(0 < gamma < 1 for gamma in gammas)
            ends.append((gammas, everything(optimizer)))
        assert ends[0] == ends[1] == ends[2]

    @THREE
    def test_scaled_loss_is_wrong(self, kind: Kind) -> None:
        """The gradients are unscaled, so γ comes out too large by the scale, until it is 1."""
        gammas = {}
        for passed in (1.0, 4.0, 2.0**16):
            params = make_params()
            optimizer = (
                kind.make(params, lr=1.0, step_size="closed_form", eps=0.0)
                if (kind.quantized)
                else kind.make(params, lr=1.0, eps=0.0)
            )
            scaler = GradScaler("cpu", init_scale=passed)
            draw_gradients(params, 0, scaler.get_scale())
            loss = torch.tensor(0.01)
            scaler.step(optimizer, loss=scaler.scale(loss))
            gammas[passed] = float(optimizer.gamma)
        assert 0 < gammas[1.0] < 0.2
        assert gammas[4.0] == pytest.approx(4 * gammas[1.0], rel=1e-5)
        assert gammas[2.0**16] == 1.0


class TestClipping:
    @THREE
    @pytest.mark.parametrize("loss", [0.02, 0.2, 20.0])
    def test_clipped_gradient_and_loss(self, kind: Kind, loss: float) -> None:
        """With s·ℓ for s·g the step is min(s, γ) of the full one: the cap is lowered, no more."""
        params = make_params()
        twins = clone_params(params)
        settings: dict[str, Any] = {"lr": 0.3, "eps": 0.0, "momentum": 0.0}
        free = kind.make(params, **settings)
        draw_gradients(params, 0)
        grads = [p.grad for p in params]
        for p, grad in zip(twins, grads, strict=True):
            assert grad is not None
            p.grad = grad.clone()
        free.step(loss=loss)
        gamma = float(free.gamma)

        other = kind.make(twins, **settings)
        norm = clip_grad_norm_(twins, 2.0)
        factor = (2.0 / (norm + 1e-6)).clamp(max=1.0)
        assert factor < 0.5
        other.step(loss=factor * loss)
        assert float(factor * other.gamma) == pytest.approx(min(float(factor), gamma), rel=1e-5)
        for p, grad in zip(twins, grads, strict=True):
            assert p.grad is not None
            assert grad is not None
            torch.testing.assert_close(p.grad, factor * grad)
        if gamma < factor:  # the step was short enough
            for p, twin in zip(params, twins, strict=True):
                torch.testing.assert_close(twin, p, rtol=1e-4, atol=1e-6)

    @THREE
    def test_with_a_scaler(self, kind: Kind) -> None:
        """Unscale, clip, step with the clipped loss."""
        ends = []
        for scaled in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = kind.make(model.parameters(), lr=3.0)
            scaler = GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
            clipped = 0
            for number in range(6):
                inputs, labels = make_batch(number)
                loss = criterion(model(inputs), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                norm = clip_grad_norm_(model.parameters(), 0.5)
                factor = (0.5 / (norm + 1e-6)).clamp(max=1.0)
                clipped += int(factor < 1)
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                assert float(get_total_norm(gradients)) <= 0.5 * (1 + 1e-5)
                scaler.step(optimizer, loss=factor * loss)
                scaler.update()
            assert clipped > 0
            ends.append(everything(optimizer))
        assert ends[0] == ends[1]


class TestRecomputed:
    @THREE
    @pytest.mark.parametrize("reentrant", [False, True])
    def test_with_dropout_under_autocast(self, kind: Kind, reentrant: bool) -> None:
        ends = []
        for recomputed in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = kind.make(model.parameters(), lr=3.0)
            body = nn.Sequential(model[:4], nn.Dropout(0.3))
            torch.manual_seed(1)
            for number in range(4):
                inputs, labels = make_batch(number)
                inputs.requires_grad_()  # which a reentrant checkpoint needs
                with torch.autocast("cpu", torch.bfloat16):
                    if recomputed:
                        hidden: Any = checkpoint(body, inputs, use_reentrant=reentrant)
                    else:
                        hidden = body(inputs)
                    loss = criterion(model[4](hidden), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(loss=loss)
            ends.append((float(optimizer.gamma), everything(optimizer)))
        assert ends[0] == ends[1]


class TestCompiledModel:
    """torch.compile(model): the weights are changed in place, which it must see, by no other code.

    (A compiled optimizer is tests/test_compile.py.)
    """

    @THREE
    @pytest.mark.parametrize("fused", [False, True])
    def test_sees_each_step(self, kind: Kind, fused: bool) -> None:
        """The same training, compiled once; also where compiled kernels write the weights."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        gammas: list[list[float]] = []
        ends = []
        for compiled in (False, True):
            model, criterion = make_model(), nn.CrossEntropyLoss()
            optimizer = kind.make(model.parameters(), lr=10.0, fused=fused)
            net: Any = torch.compile(model, backend=counter) if compiled else model
            gammas.append([])
            for number in range(6):
                inputs, labels = make_batch(number)
                loss = criterion(net(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(loss=loss)
                gammas[-1].append(float(optimizer.gamma))
            ends.append([p.detach().clone() for p in model.parameters()])
            with torch.no_grad():
                torch.testing.assert_close(net(inputs), copy.deepcopy(model)(inputs))
        assert gammas[1] == pytest.approx(gammas[0], rel=1e-4)
        assert any(0 < gamma < 1 for gamma in gammas[0])
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-5)
        assert counter.frame_count == 2  # in training, and without gradients

    @pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile finds no C++ compiler")
    @OPTIMIZERS
    def test_digits_with_generated_code(self, optimizer_class: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        x, y, x_test, y_test = digits()
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        float_net = optimizer_class is DFW
        optimizer = optimizer_class(model.parameters() if float_net else param_groups(model))
        net: Any = torch.compile(model, backend="inductor")
        criterion = MultiClassHingeLoss(smooth=True)
        for _ in range(6):
            for start in range(0, 1400, 50):
                loss = criterion(net(x[start : start + 50]), y[start : start + 50])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step(loss=loss)
        with torch.no_grad():
            assert float((model(x_test).argmax(1) == y_test).float().mean()) >= 0.85
