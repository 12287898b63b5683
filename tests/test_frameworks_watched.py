"""Lightning's manual optimization with a watched loss: a step without anything is enough."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.frameworks


@pytest.mark.parametrize("kind", ["float", "binary", "ternary"])
def test_manual_optimization(kind: str) -> None:
    """Lightning then passes a closure that does nothing, and returns it."""
    runs = importlib.import_module("framework_runs")

    class Manual(runs.Lit):  # type: ignore[misc, name-defined]
        def __init__(self, **settings: Any) -> None:
            super().__init__(kind, watched=True, dtype=torch.float64, lr=0.5, **settings)
            self.automatic_optimization = False

        def training_step(self, batch: Any, number: int) -> None:
            optimizer = self.optimizers()
            for part in zip(*(values.chunk(2) for values in batch), strict=True):
                self.manual_backward(super().training_step(part, number) / 2)
            optimizer.step()
            optimizer.zero_grad()

    module, data = Manual(), (0, 960, 32, torch.float64)
    runs.lightning_trainer(max_epochs=1, precision="64-true").fit(module, runs.loader(*data))
    net = runs.mlp(torch.float64)
    wanted = runs.plain_loop(
        runs.make(kind, net, lr=0.5), runs.divided(net, module.criterion, 1), runs.loader(*data)
    )
    assert sum(0 < gamma < 1 for gamma in wanted.gammas) >= 3
    assert module.record.gammas == pytest.approx(wanted.gammas, rel=1e-9, abs=1e-12)
    for left, right in zip(module.record.numbers(), wanted.numbers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
