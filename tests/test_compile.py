"""torch.compile(optimizer.step): the same steps, compiled once."""

# torch leaves what torch.compile returns untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math

import pytest
import torch
from helpers import KINDS, Kind, clone_params, draw_gradients, make_params
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_traced_step(kind: Kind) -> None:
    check(kind, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name == "binary"], ids=str)
def test_compiled_step(kind: Kind) -> None:
    """With generated code, which takes minutes to make."""
    check(kind, "inductor")


def check(kind: Kind, backend: str) -> None:
    """No new compilation when lr (a tensor), loss and γ change, or when a step is skipped."""
    torch._dynamo.reset()
    params = make_params()
    twins = clone_params(params)
    plain = kind.make(params, foreach=True, lr=torch.tensor(0.1), weight_decay=1e-2)
    other = kind.make(twins, lr=torch.tensor(0.1), weight_decay=1e-2)
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(other.step, backend=counter)
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    frames, gammas = [], []
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
        frames.append(counter.frame_count)
        gammas.append(other.gamma.item())
        torch.testing.assert_close(other.gamma, plain.gamma, rtol=1e-5, atol=0, equal_nan=True)
        assert int(other.skipped_steps) == int(plain.skipped_steps)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, p, rtol=1e-5, atol=1e-6)
    assert len({gamma for gamma in gammas if not math.isnan(gamma)}) > 2
    assert frames == [1] * 6
