"""What the step does on an accelerator, checked without one.

There Python must not look at values, since each look waits for the device. Fake and meta tensors
have no values: a step on them fails as soon as it asks for one. What the step computes on that path
is checked with real numbers on the CPU, by telling it that it may not look.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from helpers import (
    KINDS,
    MAIN_KINDS,
    SHAPES,
    Kind,
    assert_consistent,
    draw_gradients,
    everything,
    make_params,
    same_bits,
    to_numpy,
    train,
)
from test_invariants import assert_same_values
from torch.nn import Parameter
from watch import Watch

import dfw_opt.optimizer
import dfw_opt.step_size
from dfw_opt import TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
BOTH_PATHS = pytest.mark.parametrize("foreach", [False, True])


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as an accelerator: Python may not branch on values."""
    for module in (dfw_opt.optimizer, dfw_opt.step_size):
        monkeypatch.setattr(module, "readable", lambda tensor: False)


def test_on_a_fake_accelerator() -> None:
    """In a process of its own: the made-up device stays in torch until the process ends."""
    checks = Path(__file__).with_name("accelerator_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-cov", str(checks)],
        cwd=checks.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout or "skipped" in done.stdout


class TestMeta:
    """Meta tensors have no values either: another way to catch a look."""

    @ALL_KINDS
    @BOTH_PATHS
    def test_step(self, kind: Kind, foreach: bool) -> None:
        params = [Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
        optimizer = kind.make(params, foreach=foreach, weight_decay=0.1)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step(loss=torch.empty((), device="meta"))
        for p in params:
            assert all(value.device.type == "meta" for value in optimizer.state[p].values())

    @ALL_KINDS
    def test_state_follows_a_moved_model(self, kind: Kind) -> None:
        """State left behind on the CPU is fetched, as after model.to(device)."""
        params = [Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
        optimizer = kind.make(params)
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step(loss=1.0)
        for p in params:
            for name, value in optimizer.state[p].items():
                optimizer.state[p][name] = torch.zeros(value.shape)
        optimizer.step(loss=1.0)
        for p in params:
            assert all(value.device.type == "meta" for value in optimizer.state[p].values())


def test_the_watch_works() -> None:
    with pytest.raises(AssertionError, match="looks at a value"), Watch():
        bool(torch.ones(()) > 0)


@pytest.mark.usefixtures("blind")
class TestBlindPath:
    """The path for accelerators computes what the other one does."""

    @ALL_KINDS
    @BOTH_PATHS
    def test_step_does_not_look(self, kind: Kind, foreach: bool) -> None:
        params = make_params()
        optimizer = kind.make(params, foreach=foreach, weight_decay=0.1)
        draw_gradients(params, 0)
        with Watch():
            optimizer.step(loss=torch.tensor(0.5))
            optimizer.step(loss=0.5)

    @ALL_KINDS
    @BOTH_PATHS
    def test_same_numbers(self, kind: Kind, foreach: bool) -> None:
        """Against the reference, for γ = 0, γ = 1 and between."""
        params = make_params(((3, 4), (2, 5)), torch.float64)
        name = kind.name.split("_")[0]
        settings = reference.Settings(
            weight_decay=0.01,
            quantizer=name if kind.quantized else None,
            radius=kind.settings.get("radius", 1.0 if kind.quantized else None),
            step_size=kind.settings.get("step_size", "exact"),
        )
        expected = [reference.make_parameter(to_numpy(p), settings) for p in params]
        optimizer = kind.make(params, foreach=foreach, weight_decay=0.01)
        gammas = set()
        for number in range(30):
            draw_gradients(params, number)
            gradients = [to_numpy(p.grad) for p in params if p.grad is not None]
            loss = (0.0, 0.1, 0.4, 50.0)[number % 4]
            gamma = reference.step(expected, loss, gradients)
            optimizer.step(loss=loss)
            assert float(optimizer.gamma) == pytest.approx(gamma, rel=1e-10, abs=1e-13)
            gammas.add(0.0 if gamma == 0 else 1.0 if gamma == 1 else 0.5)
        assert gammas == {0.0, 0.5, 1.0}
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(e.forward()))

    @ALL_KINDS
    @BOTH_PATHS
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("first", [False, True])
    def test_not_finite_changes_nothing(
        self, kind: Kind, foreach: bool, bad: float, first: bool
    ) -> None:
        params = make_params()
        optimizer = kind.make(params, foreach=foreach, weight_decay=1e-2)
        twins = make_params()
        if not first:
            train(optimizer, params, 2)
        before = everything(optimizer)
        for where in ("loss", "gradient"):
            draw_gradients(params, 3)
            assert params[-1].grad is not None
            if where == "gradient":
                params[-1].grad[0] = bad
            optimizer.step(loss=bad if where == "loss" else 1.0)
            assert_same_values(everything(optimizer), before)
            assert math.isnan(float(optimizer.gamma))
        assert int(optimizer.skipped_steps) == 2
        train(optimizer, params, 2, seed=1)
        assert_consistent(optimizer)
        assert 0.0 <= float(optimizer.gamma) <= 1.0
        if first:
            twin = kind.make(twins, foreach=foreach, weight_decay=1e-2)
            train(twin, twins, 2, seed=1)
            assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))

    @ALL_KINDS
    @BOTH_PATHS
    def test_skipped_step_touches_nothing(self, kind: Kind, foreach: bool) -> None:
        """Not even what a step that counts would bring back: into the box, onto the levels."""
        params = make_params()
        unfrozen, infinite = params[0].requires_grad_(False), params[-1]
        optimizer = kind.make(params, foreach=foreach, weight_decay=1e-2)
        train(optimizer, params[1:], 2)
        for group in optimizer.param_groups:
            if group.get("radius") is not None:
                group["radius"] = 1e-3
        with torch.no_grad():
            infinite.view(-1)[0] = math.inf
        unfrozen.requires_grad_(True)
        draw_gradients(params, 3)
        before = [p.detach().clone() for p in params]
        states = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        optimizer.step(loss=math.nan)
        for p, value in zip(params, before, strict=True):
            assert same_bits(p.detach(), value)
        for p, state in states.items():
            for key, value in state.items():
                assert same_bits(optimizer.state[p][key], value), key

    @THREE
    def test_huge_gradients(self, kind: Kind) -> None:
        """Squares that overflow on the way must not leave NaN behind."""
        params = make_params()
        optimizer = kind.make(params)
        for power in (0, 10, 18, 20, 30, 38):
            draw_gradients(params, power, 10.0**power)
            optimizer.step(loss=1.0)
            assert_consistent(optimizer)


def test_lower_bound_of_scales_on_the_blind_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of one side, and infinite ones, in the search with a fixed number of evaluations."""
    outcomes = []
    for is_blind in (False, True):
        if is_blind:
            monkeypatch.setattr(dfw_opt.optimizer, "readable", lambda tensor: False)
            monkeypatch.setattr(dfw_opt.step_size, "readable", lambda tensor: False)
        p = make_params(((3, 4),), torch.float64)[0]
        optimizer = TernaryDFW([p], lr=1.0)
        for number in range(10):
            p.grad = 3 * p.detach().sign() + 0.1 * number
            optimizer.step(loss=0.8)
        outcomes.append((p.detach().clone(), optimizer.state[p]["scale_neg"].clone()))
    torch.testing.assert_close(outcomes[0], outcomes[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_device() -> None:
    """The device itself complains about a synchronisation; the numbers are those of the CPU."""
    for kind, foreach in itertools.product(KINDS, (False, True)):
        here = make_params(dtype=torch.float64)
        there = [Parameter(p.detach().cuda()) for p in here]
        optimizers = [kind.make(params, foreach=foreach) for params in (here, there)]
        for number in range(10):
            draw_gradients(here, number)
            for p, q in zip(here, there, strict=True):
                assert p.grad is not None
                q.grad = p.grad.cuda()
            loss = torch.tensor(0.3, dtype=torch.float64, device="cuda")
            optimizers[0].step(loss=0.3)
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizers[1].step(loss=loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for p, q in zip(here, there, strict=True):
            torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-9, atol=1e-11)
