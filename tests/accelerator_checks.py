"""A step on an accelerator that is not there, in a process that test_operations.py starts.

Torch lets Python register a type of device, and keeps it until the process ends. A fake tensor on
it has a shape and no values, so that a step fails as soon as it asks for one or mixes devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import FLOAT_GROUP, KINDS, SHAPES, Kind
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

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
NORMS = pytest.mark.parametrize("norm", ["spectral", "euclidean"])


@pytest.fixture(autouse=True)
def _fake_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Construction may look at values, so the check of the weights is left out."""
    monkeypatch.setattr(validate, "_check_parameter", lambda *_: None)
    with FakeTensorMode():
        yield


def fake_params(*devices: str, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    shapes = [(device, shape) for device in devices for shape in SHAPES]
    return [Parameter(torch.empty(shape, device=d, dtype=dtype)) for d, shape in shapes]


def give_gradients(params: list[Parameter]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def assert_beside(optimizer: Any, params: list[Parameter]) -> None:
    for p in params:
        assert {value.device for value in optimizer.state[p].values()} <= {p.device}


class TestDevices:
    def test_the_world_is_strict(self) -> None:
        value = torch.ones(3, device="fake:0")
        with pytest.raises(DataDependentOutputException):
            value.sum().item()
        with pytest.raises(FakeTensorDeviceMismatchError):
            value + torch.ones(3, device="fake:1")
        assert watched(value.cpu).copies == ["_to_copy"]

    @ALL_KINDS
    @pytest.mark.parametrize("relaxation", [0.0, 0.5])
    @pytest.mark.parametrize(
        ("dtype", "loss_as", "lr"),
        [(torch.float32, "tensor", 0.1), (torch.bfloat16, "number", "tensor")],
    )
    def test_no_look_and_no_copy(
        self, kind: Kind, relaxation: float, dtype: torch.dtype, loss_as: str, lr: Any
    ) -> None:
        """A whole step, momentum, weight decay and a tensor lr included, stays on the device."""
        params = fake_params("fake:0", dtype=dtype)
        settings: dict[str, Any] = {"relaxation": relaxation} if kind.quantized else {}
        lr = torch.full((), 0.1, device="fake:0") if lr == "tensor" else lr
        optimizer = kind.make(params, weight_decay=0.1, lr=lr, **settings)
        loss = torch.ones((), device="fake:0") if loss_as == "tensor" else 1.0
        give_gradients(params)
        optimizer.step(loss=loss)
        watch = watched(lambda: optimizer.step(loss=loss))
        assert (watch.looks, watch.copies) == ([], [])
        assert_beside(optimizer, params)
        assert optimizer.gamma.device == optimizer.skipped_steps.device == params[0].device

    @ALL_KINDS
    def test_several_devices(self, kind: Kind) -> None:
        """One γ for parameters on two of them, and a loss on either or on the CPU."""
        params = fake_params("fake:0", "fake:1")
        optimizer = kind.make(params, weight_decay=0.1)
        give_gradients(params)
        for device in ("fake:0", "fake:1", "cpu"):
            loss = torch.ones((), device=device)
            assert watched(lambda loss=loss: optimizer.step(loss=loss)).looks == []
        assert_beside(optimizer, params)

    @ALL_KINDS
    def test_state_follows_a_moved_model(self, kind: Kind) -> None:
        """Left on another device, as after model.to(device), which should come first."""
        params = fake_params("fake:0")
        optimizer = kind.make(params)
        give_gradients(params)
        optimizer.step(loss=1.0)
        for state in optimizer.state.values():
            state.update({key: value.to("fake:1") for key, value in state.items()})
        for name in ("_gamma", "_height", "_skipped"):
            setattr(optimizer, name, getattr(optimizer, name).to("fake:1"))
        optimizer.step(loss=torch.ones((), device="fake:0"))
        assert_beside(optimizer, params)
        assert optimizer.gamma.device == optimizer.skipped_steps.device == params[0].device

    @ALL_KINDS
    def test_loaded_state_comes_to_the_parameters(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A checkpoint of another device, as of torch.load without map_location; it stays there."""
        monkeypatch.setattr(checkpoint, "_check_state", lambda *_: None)
        params, others = fake_params("fake:0"), fake_params("fake:1")
        optimizer, other = kind.make(params), kind.make(others)
        saved = optimizer.state_dict()
        other.load_state_dict(saved)
        assert_beside(other, others)
        assert all(
            other.state[q].keys() == optimizer.state[p].keys()
            for p, q in zip(params, others, strict=True)
        )
        give_gradients(others)
        other.step(loss=1.0)
        for state in saved["state"].values():
            assert {value.device for k, value in state.items() if k != "plane_height"} <= {
                params[0].device
            }


def fake_net(optimizer_class: Any, layers: int = 20, **settings: Any) -> Any:
    """An optimizer of convolutions and BatchNorms, all of one shape."""
    convolutions = [Parameter(torch.empty(8, 8, 3, 3, device="fake:0")) for _ in range(layers)]
    norms = [Parameter(torch.empty(8, device="fake:0")) for _ in range(2 * layers)]
    floats = {} if optimizer_class is DFW else FLOAT_GROUP
    groups = [{"params": convolutions}, {"params": norms, **floats}]
    return optimizer_class(groups, **settings)


def operations(optimizer: Any) -> int:
    give_gradients([p for group in optimizer.param_groups for p in group["params"]])
    loss = torch.ones((), device="fake:0")
    optimizer.step(loss=loss)  # the first one may make state
    return len(watched(lambda: optimizer.step(loss=loss)).operations)


EXACT, CLOSED = {"step_size": "exact"}, {"step_size": "closed_form"}
CEILINGS: list[tuple[Any, str, dict[str, Any], int]] = [
    (DFW, "euclidean", {}, 60),
    (ProjectedDFW, "euclidean", EXACT, 500),
    (ProjectedDFW, "euclidean", CLOSED, 250),
    (TernaryDFW, "euclidean", EXACT, 900),
    (DFW, "spectral", {}, 250),
    (ProjectedDFW, "spectral", {}, 500),
    (TernaryDFW, "spectral", {}, 800),
]


class TestOperations:
    @pytest.mark.parametrize(("optimizer_class", "norm", "settings", "ceiling"), CEILINGS)
    def test_ceiling(
        self, optimizer_class: Any, norm: str, settings: dict[str, Any], ceiling: int
    ) -> None:
        """20 convolutions and 20 BatchNorms. SGD's foreach has a dozen, views of lists included."""
        number = operations(fake_net(optimizer_class, norm=norm, **settings))
        assert 10 < number <= ceiling

    @pytest.mark.parametrize(("optimizer_class", "norm", "settings", "ceiling"), CEILINGS)
    def test_tensors_alike_cost_nothing(
        self, optimizer_class: Any, norm: str, settings: dict[str, Any], ceiling: int
    ) -> None:
        """Twice as many of each: not one operation more."""
        few, many = (
            operations(fake_net(optimizer_class, layers, norm=norm, **settings))
            for layers in (20, 40)
        )
        assert many == few

    @NORMS
    @pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
    def test_linear_in_groups(self, optimizer_class: Any, norm: str) -> None:
        """One tensor a group: each five cost as much as five did; and alike ones nothing."""
        counts = []
        for number in (5, 10, 15):
            weights = [Parameter(torch.empty(4, 6, device="fake:0")) for _ in range(number)]
            groups = [{"params": [w], "lr": 0.1 + i / 1000} for i, w in enumerate(weights)]
            counts.append(operations(optimizer_class(groups, norm=norm)))
        assert counts[2] - counts[1] == counts[1] - counts[0]
        alike = [Parameter(torch.empty(4, 6, device="fake:0")) for _ in range(15)]
        assert operations(
            optimizer_class([{"params": [w]} for w in alike], norm=norm)
        ) == operations(optimizer_class(alike, norm=norm))
