"""What a user may rely on in the long run: many kills, and many steps. Takes minutes."""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import kill_runs
import pytest
import torch
from helpers import MAIN_KINDS, Kind, assert_consistent
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, linear

from dfw_opt.quantizers.ternary import SCALE_MIN

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KILLS = 120
STEPS, WARM_UP = 100_000, 10_000
STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Every run goes on from where it was killed, and ends bit for bit as if it had not been."""
    paths = (ROOT, ROOT / "examples", ROOT / "tests")
    result = subprocess.run(
        [sys.executable, kill_runs.__file__, str(tmp_path), str(KILLS), "0", "xnor", "ternary"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",  # numpy's threads do not survive a fork either
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    print(counts)
    assert counts["kills"] == KILLS
    assert counts["within_writes"] >= KILLS // 20


@pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
def test_a_hundred_thousand_steps(kind: Kind) -> None:
    """Memory does not grow, nothing drifts, and every thousandth batch is skipped for its NaN."""
    generator = torch.Generator().manual_seed(0)
    weight = Parameter(0.5 * torch.randn(3, 4, generator=generator))
    bias = Parameter(torch.zeros(3))
    inputs = torch.randn(1024, 4, generator=generator)
    noise = torch.randn(1024, 3, generator=generator)
    labels = (inputs @ torch.randn(4, 3, generator=generator) + 0.3 * noise).argmax(1)
    batches = list(zip(inputs.split(8), labels.split(8), strict=True))
    optimizer = kind.make([weight, bias])

    def steps(start: int, stop: int) -> None:
        for step in range(start, stop):
            batch, answers = batches[step % len(batches)]
            if step % 1000 == 999:
                batch = batch * math.nan
            loss = cross_entropy(linear(batch, weight, bias), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
            if step % 100 == 0:
                check(step)
            if step % 1000 == 0:
                # From steps of full length to such as the search has to shorten.
                for group in optimizer.param_groups:
                    group["lr"] = (0.1, 1.0, 3.0)[step // 1000 % 3]

    gammas = set()

    def check(step: int) -> None:
        assert_consistent(optimizer)
        assert int(optimizer.skipped_steps) == step // 1000
        for name in ("scale_pos", "scale_neg"):
            if name in optimizer.state[weight]:
                assert optimizer.state[weight][name] >= torch.tensor(SCALE_MIN)
        gammas.add("inside" if 0 < optimizer.gamma < 1 else float(optimizer.gamma))

    steps(0, WARM_UP)
    tensors, resident = _live_tensors(), _resident()
    steps(WARM_UP, STEPS - 5000)
    tracemalloc.start()
    steps(STEPS - 5000, STEPS - 4000)
    gc.collect()
    traced, _ = tracemalloc.get_traced_memory()
    steps(STEPS - 4000, STEPS)
    gc.collect()
    growth = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    print(f"growth: {growth} bytes traced, {_resident() - resident} bytes resident")
    assert growth < 4000 * sys.getsizeof(1.0)  # less than the smallest object a step
    assert _resident() - resident < 2_000_000  # 20 bytes a step
    assert _live_tensors() == tensors
    assert int(optimizer.skipped_steps) == STEPS // 1000
    assert gammas >= {"inside", 1.0}


def _live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(value), Tensor) for value in gc.get_objects())


def _resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say so in a file."""
    if not STATM.exists():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
