"""A step on an accelerator that does not exist; run by test_dataflow.py in a process of its own.

torch lets Python register a device type. With fake tensors, which have a device and a shape but
no values, a step on it fails as soon as it asks for a value or mixes devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import KINDS, Kind
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.nn import Parameter
from torch.utils import backend_registration
from watch import Watch

import dfw_opt.optimizer
import dfw_opt.state
import dfw_opt.step_size

register: Any = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
if register is None:
    pytest.skip("this torch cannot register a device from Python", allow_module_level=True)
register("fake")

SHAPES = ((4, 6), (5,))
ALL_KINDS = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name != "binary_closed_form"], ids=str
)
BOTH_PATHS = pytest.mark.parametrize("foreach", [False, True])


@pytest.fixture(autouse=True)
def _fake_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Construction may look at values, so the check of the weights is left out."""
    monkeypatch.setattr(dfw_opt.optimizer, "check_parameters", lambda group: None)
    with FakeTensorMode():
        yield


def fake_params(*devices: str, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [
        Parameter(torch.empty(shape, device=device, dtype=dtype))
        for device in devices
        for shape in SHAPES
    ]


def give_gradients(params: list[Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def test_the_world_is_strict() -> None:
    value = torch.ones(3, device="fake:0")
    with pytest.raises(DataDependentOutputException):
        value.sum().item()
    with pytest.raises(FakeTensorDeviceMismatchError):
        value + torch.ones(3, device="fake:1")
    watch = Watch()
    with watch:
        value.cpu()
    assert watch.copies == ["_to_copy"]


@ALL_KINDS
@BOTH_PATHS
@pytest.mark.parametrize(
    ("dtype", "loss_as"), [(torch.float32, "tensor"), (torch.bfloat16, "number")]
)
def test_no_look_and_no_copy(kind: Kind, foreach: bool, dtype: torch.dtype, loss_as: str) -> None:
    """A whole step, momentum and weight decay included, stays on the device."""
    params = fake_params("fake:0", dtype=dtype)
    optimizer = kind.make(params, foreach=foreach, weight_decay=0.1)
    loss = torch.ones((), device="fake:0") if loss_as == "tensor" else 1.0
    for _ in range(2):
        give_gradients(params)
        watch = Watch()
        with watch:
            optimizer.step(loss=loss)
        assert watch.copies == []
    for p in params:
        for value in optimizer.state[p].values():
            assert value.device == p.device
    assert optimizer.gamma.device == params[0].device
    assert optimizer.skipped_steps.device == params[0].device


@ALL_KINDS
def test_several_devices(kind: Kind) -> None:
    """One γ for parameters on two accelerators and the CPU."""
    params = fake_params("fake:0", "fake:1", "cpu")
    optimizer = kind.make(params, weight_decay=0.1)
    give_gradients(params)
    for loss in (torch.ones((), device="fake:1"), 1.0):
        optimizer.step(loss=loss)
    for p in params:
        for value in optimizer.state[p].values():
            assert value.device == p.device


@ALL_KINDS
def test_loss_on_the_cpu(kind: Kind) -> None:
    """A loss that has already been fetched."""
    params = fake_params("fake:0")
    optimizer = kind.make(params)
    give_gradients(params)
    optimizer.step(loss=torch.ones(()))
    assert optimizer.gamma.device == params[0].device


@ALL_KINDS
def test_state_follows_a_moved_model(kind: Kind) -> None:
    """As after model.to(device), which should come before the optimizer and often does not."""
    params = fake_params("fake:0")
    optimizer = kind.make(params)
    give_gradients(params)
    optimizer.step(loss=1.0)
    for p in params:
        for name, value in optimizer.state[p].items():
            optimizer.state[p][name] = value.to("fake:1")
    optimizer.skipped_steps = optimizer.skipped_steps.to("fake:1")
    optimizer.step(loss=torch.ones((), device="fake:0"))
    for p in params:
        for value in optimizer.state[p].values():
            assert value.device == p.device
    assert optimizer.gamma.device == optimizer.skipped_steps.device == params[0].device


@pytest.fixture
def _loading_may_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so may a step on the CPU, which has no values here either."""
    monkeypatch.setattr(dfw_opt.state, "check_checkpoint", lambda *arguments: None)
    for module in (dfw_opt.optimizer, dfw_opt.step_size):
        monkeypatch.setattr(module, "readable", lambda tensor: False)


@ALL_KINDS
@pytest.mark.usefixtures("_loading_may_look")
@pytest.mark.parametrize(
    ("source", "target"), [("cpu", "fake:0"), ("fake:0", "cpu"), ("fake:0", "fake:1")]
)
def test_loaded_state_comes_to_the_parameters(kind: Kind, source: str, target: str) -> None:
    """A checkpoint of another device, as of torch.load without map_location; it stays there."""
    params = fake_params(source)
    optimizer = kind.make(params)
    give_gradients(params)
    optimizer.step(loss=1.0)
    saved = optimizer.state_dict()
    others = fake_params(target)
    other = kind.make(others)
    other.load_state_dict(saved)
    for p, q in zip(params, others, strict=True):
        assert other.state[q].keys() == optimizer.state[p].keys() != set()
        for value in other.state[q].values():
            assert value.device == q.device
    give_gradients(others)
    other.step(loss=torch.ones((), device=target))
    for state in saved["state"].values():
        for value in state.values():
            assert value.device == params[0].device
