"""A step on an accelerator that is not there, in a process that test_operations.py starts.

Torch lets Python register a type of device, and keeps it until the process ends. A fake tensor on
it has a shape and no values, so that a step fails as soon as it asks for one or mixes devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers import SHAPES
from kinds import ALL_KINDS, FLOAT_GROUP, MAIN, Kind
from test_operations import watched
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.nn import Parameter
from torch.utils import backend_registration

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, checkpoint, validate

register: Any = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
if register is None:
    pytest.skip("this torch cannot register a device from Python", allow_module_level=True)
register("fake")


@pytest.fixture(autouse=True)
def _fake_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Construction and loading may look at values, so their checks of them are left out."""
    monkeypatch.setattr(validate, "_check_parameter", lambda *_: None)
    monkeypatch.setattr(checkpoint, "_check_state", lambda *_: None)
    with FakeTensorMode():
        yield


def fake_params(*devices: str, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    shapes = [(device, shape) for device in devices for shape in SHAPES]
    return [Parameter(torch.empty(shape, device=d, dtype=dtype)) for d, shape in shapes]


def give_gradients(optimizer: Any) -> None:
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)


def assert_beside(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        assert {value.device for value in optimizer.state[p].values()} <= {p.device}


def test_the_world_is_strict() -> None:
    value = torch.ones(3, device="fake:0")
    with pytest.raises(DataDependentOutputException):
        value.sum().item()
    with pytest.raises(FakeTensorDeviceMismatchError):
        value + torch.ones(3, device="fake:1")
    assert watched(value.cpu).copies == ["_to_copy"]


@ALL_KINDS
def test_no_look_and_no_copy(kind: Kind) -> None:
    """Momentum, decay, relaxation, a tensor lr; a loss that is a number, and one that is not."""
    params = fake_params("fake:0", dtype=torch.bfloat16)
    settings: dict[str, Any] = {"relaxation": 0.5} if kind.quantized else {}
    lr = torch.full((), 0.1, device="fake:0")
    optimizer = kind.make(params, weight_decay=0.1, lr=lr, **settings)
    give_gradients(optimizer)
    optimizer.step(loss=1.0)  # the first one brings γ to the device
    for loss in (torch.ones((), device="fake:0"), 1.0):
        watch = watched(partial(optimizer.step, loss=loss))
        assert (watch.looks, watch.copies) == ([], [])
    assert_beside(optimizer, params)
    assert optimizer.gamma.device == optimizer.skipped_steps.device == params[0].device


@MAIN
def test_several_devices(kind: Kind) -> None:
    """One γ for parameters on two of them, and a loss on either or on the CPU."""
    params = fake_params("fake:0", "fake:1")
    optimizer = kind.make(params, weight_decay=0.1)
    give_gradients(optimizer)
    for where in ("fake:1", "cpu"):
        loss = torch.ones((), device=where)
        assert watched(partial(optimizer.step, loss=loss)).looks == []
    assert_beside(optimizer, params)


@MAIN
@pytest.mark.parametrize("loaded", [False, True])
def test_state_follows_the_parameters(kind: Kind, loaded: bool) -> None:
    """A checkpoint of another device; or what is left there after model.to(device)."""
    params, others = fake_params("fake:0"), fake_params("fake:1")
    optimizer, other = kind.make(params), kind.make(others)
    if loaded:
        optimizer.load_state_dict(other.state_dict())
        assert_beside(other, others)
    else:
        for p, q in zip(params, others, strict=True):
            optimizer.state[p] = other.state[q]
        for name in ("_gamma", "_plane", "_skipped"):
            setattr(optimizer, name, getattr(optimizer, name).to("fake:1"))
    give_gradients(optimizer)
    optimizer.step(loss=1.0)
    assert_beside(optimizer, params)
    assert optimizer.gamma.device == optimizer.skipped_steps.device == params[0].device


def operations(optimizer: Any) -> int:
    give_gradients(optimizer)
    loss = torch.ones((), device="fake:0")
    optimizer.step(loss=loss)  # the first one may make state
    return len(watched(lambda: optimizer.step(loss=loss)).operations)


@pytest.mark.parametrize(
    ("optimizer_class", "settings", "ceiling"),
    [
        (DFW, {"norm": "euclidean"}, 60),
        (ProjectedDFW, {"norm": "euclidean", "step_size": "exact"}, 500),
        (ProjectedDFW, {"norm": "euclidean", "step_size": "closed_form"}, 250),
        (TernaryDFW, {"norm": "euclidean", "step_size": "exact"}, 900),
        (DFW, {"norm": "spectral"}, 250),
        (ProjectedDFW, {"norm": "spectral"}, 500),
        (TernaryDFW, {"norm": "spectral"}, 800),
    ],
)
def test_operations(optimizer_class: Any, settings: dict[str, Any], ceiling: int) -> None:
    """Of 20 convolutions and 20 BatchNorms; twice as many of each take not one more."""
    counts = []
    for layers in (20, 40):
        matrices = [Parameter(torch.empty(8, 8, 3, 3, device="fake:0")) for _ in range(layers)]
        vectors = [Parameter(torch.empty(8, device="fake:0")) for _ in range(2 * layers)]
        floats = {} if optimizer_class is DFW else FLOAT_GROUP
        groups = [{"params": matrices}, {"params": vectors, **floats}]
        counts.append(operations(optimizer_class(groups, **settings)))
    assert 10 < counts[0] == counts[1] <= ceiling


@MAIN
def test_operations_of_groups(kind: Kind) -> None:
    """One tensor a group: one more costs as much as one did, and nothing if set alike."""
    counts = []
    for number, lr in ((1, 0.1), (2, 0.1), (3, 0.1), (2, 0.0)):
        weights = [Parameter(torch.empty(4, 6, device="fake:0")) for _ in range(number)]
        groups = [{"params": [w], "lr": 0.1 + i * lr} for i, w in enumerate(weights)]
        counts.append(operations(kind.optimizer(groups, norm=kind.norm)))
    assert counts[2] - counts[1] == counts[1] - counts[0]
    assert counts[3] == counts[0]
