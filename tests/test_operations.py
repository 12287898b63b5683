"""What a step asks of torch and of a device: operations, memory, and never a value.

Operations are counted, and storages followed, where torch dispatches them.
"""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import draw_gradients, make_params, uncovered
from kinds import ALL_KINDS, Kind
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dfw_opt.optimizer

LOOKS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, looks at values and copies between devices; follows live storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self.looks: list[str] = []
        self.copies: list[str] = []
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "prim":  # such as a look at .device, which is no operation
            self.operations.append(name)
        if name in LOOKS:
            self.looks.append(name)
        result = func(*args, **(kwargs or {}))
        given = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        for x in given:
            self.known.add(id(x.untyped_storage()))
        for x in _pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                # Torch takes a 0-dim tensor of the CPU as a number; only copies bring it anywhere.
                sources = [a for a in given if a.dim() or name in ("_to_copy", "copy_")]
                if any(a.device != x.device for a in sources):
                    self.copies.append(name)
                self.follow(x)
        return result

    def follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if id(storage) not in self.known and storage.nbytes():
            self.known.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage), storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def watched(step: Callable[[], Any]) -> Watch:
    gc.collect()
    watch = Watch()
    with watch:
        step()
    return watch


def test_on_a_fake_accelerator() -> None:
    """No look, no copy, several devices; and ceilings of operations: see the file that is run."""
    checks = Path(__file__).with_name("accelerator_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(checks)],
        cwd=checks.parents[1],
        env=uncovered() | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout or "skipped" in done.stdout


class TestMemory:
    @ALL_KINDS
    def test_at_most_two_lists(self, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a step needs beside parameters, gradients and state, at its peak.

        Batches are made small, as they are for a large model: what is computed for one batch is
        gone before the next one, and what is kept for all of them is no more than two lists.
        """
        monkeypatch.setattr(dfw_opt.optimizer, "LARGEST_BATCH", 1024)
        params = make_params(((16, 32),) * 64)
        optimizer = kind.make(params, weight_decay=0.1)
        draw_gradients(params, 0)
        optimizer.step(loss=0.5)
        watch = watched(lambda: optimizer.step(loss=0.5))
        whole = sum(p.numel() * p.element_size() for p in params)
        assert watch.live <= 0.01 * whole
        # Two lists, and a dozen temporaries of a batch, which is a 32nd of a list.
        assert watch.peak <= (2 + 12 / 32) * whole

    def test_the_count_is_right(self) -> None:
        """Of a sum of two: one list for the product, none for what is done in place."""
        x = torch.ones(1000)
        watch = watched(lambda: (x * 2).add_(x * 3))
        assert (watch.peak, watch.live) == (8000, 0)
