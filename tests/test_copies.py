"""Copies and moves of a model and its optimizer, in whatever way Python and torch make them."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    KINDS,
    MAIN_KINDS,
    PATHS,
    QUANTIZED_KINDS,
    TORCH_PATHS,
    Kind,
    assert_consistent,
    everything,
    fingerprint,
    same_bits,
)
from torch import nn
from torch.optim import lr_scheduler

from dfw_opt import DFW, MultiClassHingeLoss, ProjectedDFW, TernaryDFW, param_groups

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
QUANTIZED = pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch,
}
ALL_WAYS = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """Nobody has changed a weight from outside here, so nobody may say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def make_optimizer(kind: Kind, model: nn.Module, **settings: Any) -> Any:
    groups = param_groups(model) if kind.quantized else list(model.parameters())
    return kind.optimizer(groups, weight_decay=1e-2, **kind.settings, **settings)


def fit(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 1, 4, 4, generator=generator).to(dtype)
        labels = torch.randint(3, (8,), generator=generator)
        loss = MultiClassHingeLoss()(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)


def snapshot(model: nn.Module, optimizer: Any) -> Any:
    """All that a run consists of, to the last bit, BatchNorm's statistics and γ included."""
    public = {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, torch.Tensor) and not name.startswith("_")
    }
    return fingerprint(dict(model.state_dict())), everything(optimizer), fingerprint(public)


def assert_own_parameters(model: nn.Module, optimizer: Any) -> None:
    """The optimizer trains this model, and nothing else."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in model.parameters()}


class TestPair:
    @ALL_KINDS
    @ALL_WAYS
    @pytest.mark.parametrize("path", PATHS)
    def test_goes_its_own_way_the_same_way(self, kind: Kind, way: str, path: str) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model, **PATHS[path])
        fit(model, optimizer, 3)
        before = snapshot(model, optimizer)
        twin, its_optimizer = WAYS[way]((model, optimizer))
        assert type(its_optimizer) is type(optimizer)
        assert snapshot(twin, its_optimizer) == before
        assert_own_parameters(twin, its_optimizer)

        fit(twin, its_optimizer, 3, seed=1)
        assert snapshot(model, optimizer) == before
        after = snapshot(twin, its_optimizer)
        assert after != before
        fit(model, optimizer, 3, seed=1)
        assert snapshot(model, optimizer) == after
        assert_consistent(its_optimizer)

    @THREE
    @ALL_WAYS
    def test_of_a_copy(self, kind: Kind, way: str) -> None:
        """A copy is as good as the original, also for copying, saving and new groups."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        twin, its_optimizer = WAYS[way](WAYS[way]((model, optimizer)))
        assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)
        its_optimizer.load_state_dict(optimizer.state_dict())
        for m, o in ((model, optimizer), (twin, its_optimizer)):
            late = nn.Linear(2, 2)
            with torch.no_grad():
                late.weight.fill_(0.5)
            o.add_param_group({"params": [late.weight], "lr": 0.3})
            fit(m, o, 2, seed=1)
        # A default that torch gives to unpickled optimizers.
        assert its_optimizer.param_groups[-1].pop("differentiable", False) is False
        assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)

    @THREE
    @ALL_WAYS
    def test_skipped_steps_are_counted_on(self, kind: Kind, way: str) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 1)
        optimizer.step(loss=float("nan"))
        _, its_optimizer = WAYS[way]((model, optimizer))
        assert its_optimizer.gamma.isnan()
        its_optimizer.step(loss=float("nan"))
        assert (int(optimizer.skipped_steps), int(its_optimizer.skipped_steps)) == (1, 2)

    @QUANTIZED
    @ALL_WAYS
    def test_frozen_weight(self, kind: Kind, way: str) -> None:
        """One that is float as yet is copied as such, and quantized when the copy unfreezes it."""
        model = make_model()
        frozen = model.get_parameter("3.weight").requires_grad_(False)
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        twin, its_optimizer = WAYS[way]((model, optimizer))
        assert same_bits(twin.get_parameter("3.weight"), frozen)
        for m, o in ((model, optimizer), (twin, its_optimizer)):
            m.get_parameter("3.weight").requires_grad_(True)
            fit(m, o, 2, seed=1)
        assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)
        assert len(twin.get_parameter("3.weight")[0].unique()) <= 3

    @THREE
    @ALL_WAYS
    def test_tied_weights_stay_tied(self, kind: Kind, way: str) -> None:
        model = make_model()
        model.append(nn.Linear(3, 8)).append(nn.Linear(8, 3))
        model[-1].weight = model[9].weight
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        twin, its_optimizer = WAYS[way]((model, optimizer))
        fit(twin, its_optimizer, 2, seed=1)
        assert twin[-1].weight is twin[9].weight
        assert_own_parameters(twin, its_optimizer)
        fit(model, optimizer, 2, seed=1)
        assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)

    @THREE
    @ALL_WAYS
    def test_with_a_scheduler(self, kind: Kind, way: str) -> None:
        """It wraps the optimizer's `step`; the copy's scheduler sets the copy's lr."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10)
        for number in range(3):
            fit(model, optimizer, 1, seed=number)
            scheduler.step()
        twin, its_optimizer, its_scheduler = WAYS[way]((model, optimizer, scheduler))
        assert its_scheduler.optimizer is its_optimizer
        lr = optimizer.param_groups[0]["lr"]
        for number in range(3, 7):
            fit(twin, its_optimizer, 1, seed=number)
            its_scheduler.step()
        assert optimizer.param_groups[0]["lr"] == lr
        for number in range(3, 7):
            fit(model, optimizer, 1, seed=number)
            scheduler.step()
        assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)


class TestAlone:
    @THREE
    @ALL_WAYS
    def test_optimizer(self, kind: Kind, way: str) -> None:
        """As with torch's: it takes parameters of its own along, and leaves the model's alone."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        before = snapshot(model, optimizer)
        twin = WAYS[way](optimizer)
        assert everything(twin) == everything(optimizer)
        params = [p for group in twin.param_groups for p in group["params"]]
        assert not {id(p) for p in params} & {id(p) for p in model.parameters()}
        for p in params:
            p.grad = torch.ones_like(p)
        twin.step(loss=1.0)
        assert snapshot(model, optimizer) == before
        assert everything(twin) != everything(optimizer)

    @ALL_WAYS
    def test_hooks_stay_behind(self, way: str) -> None:
        """As with torch's."""
        for make in (DFW, torch.optim.SGD):
            calls: list[Any] = []
            optimizer: Any = make(make_model().parameters(), lr=0.1)
            optimizer.register_step_post_hook(lambda *arguments, calls=calls: calls.append(1))
            twin = WAYS[way](optimizer)
            for o in (twin, optimizer):
                o.step(**({"loss": 1.0} if make is DFW else {}))
            assert len(calls) == 1

    @THREE
    @ALL_WAYS
    def test_model_is_a_model(self, kind: Kind, way: str) -> None:
        """Nothing of the optimizer goes along; a new one can be made for the copy."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        twin = WAYS[way](model)
        assert fingerprint(dict(twin.state_dict())) == fingerprint(dict(model.state_dict()))
        before = snapshot(model, optimizer)
        fresh = make_optimizer(kind, twin)
        fit(twin, fresh, 2, seed=1)
        assert_consistent(fresh)
        assert snapshot(model, optimizer) == before
        # With the state of the first, its run goes on.
        again = WAYS[way](model)
        resumed = make_optimizer(kind, again)
        resumed.load_state_dict(optimizer.state_dict())
        fit(again, resumed, 2, seed=1)
        fit(model, optimizer, 2, seed=1)
        assert everything(resumed) == everything(optimizer)

    def test_saved_model_opens_without_the_package(self, tmp_path: Path) -> None:
        """`torch.save(model)` in a process that cannot import dfw_opt: the same scores."""
        model = make_model()
        fit(model, make_optimizer(KINDS[-1], model), 2)
        model.eval()
        x = torch.randn(5, 1, 4, 4)
        torch.save(model, tmp_path / "model.pt")
        torch.save((x, model(x).detach()), tmp_path / "scores.pt")
        code = """
import sys
sys.modules["dfw_opt"] = None
import torch
model = torch.load("model.pt", weights_only=False)
x, scores = torch.load("scores.pt")
with torch.no_grad():
    assert torch.equal(model(x), scores)
print("the same")
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "the same", done.stderr


class TestMoves:
    """`model.to(...)` once the optimizer is made; before, it is made for what it finds."""

    @ALL_KINDS
    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtype_after_construction(self, kind: Kind, path: str, dtype: torch.dtype) -> None:
        """Training goes on: parameters in the new type, state in the one that it was made in."""
        model = make_model()
        optimizer = make_optimizer(kind, model, **PATHS[path])
        fit(model, optimizer, 3)
        before = everything(optimizer)[1]
        model.to(dtype)
        assert_own_parameters(model, optimizer)
        assert everything(optimizer)[1] == before
        for seed in range(1, 4):
            fit(model, optimizer, 1, seed=seed)
            assert {p.dtype for p in model.parameters()} == {dtype}
            values = [value for state in optimizer.state.values() for value in state.values()]
            assert {value.dtype for value in values} == {torch.float32}
            assert_consistent(optimizer)
        assert 0.0 < float(optimizer.gamma) <= 1.0
        assert int(optimizer.skipped_steps) == 0
        assert everything(optimizer)[1] != before

    @QUANTIZED
    @pytest.mark.parametrize("path", PATHS)
    def test_latents_go_the_way_of_a_resumed_run(self, kind: Kind, path: str) -> None:
        """bfloat16 after construction: the next step is that of the checkpoint in a new model."""
        model = make_model()
        optimizer = make_optimizer(kind, model, **PATHS[path])
        fit(model, optimizer, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        other = make_model()
        other.load_state_dict(model.state_dict())
        other.to(torch.bfloat16)
        resumed = make_optimizer(kind, other, **PATHS[path])
        resumed.load_state_dict(saved)
        model.to(torch.bfloat16)
        # Then the weights are the same, and so are gradients and γ.
        for m, o in ((model, optimizer), (other, resumed)):
            fit(m, o, 1, seed=1)
        assert same_bits(optimizer.gamma, resumed.gamma)
        for name in ("3.weight", "7.weight"):
            p, q = model.get_parameter(name), other.get_parameter(name)
            assert same_bits(optimizer.state[p]["latent"], resumed.state[q]["latent"])
            assert same_bits(p, q)

    @ALL_KINDS
    def test_state_catches_up_with_the_dtype(self, kind: Kind) -> None:
        """Loading its own checkpoint brings the state to the type of a new optimizer's."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        model.to(torch.float64)
        optimizer.load_state_dict(optimizer.state_dict())
        for state in optimizer.state.values():
            assert {value.dtype for value in state.values()} == {torch.float64}
        fit(model, optimizer, 2, seed=1)
        assert_consistent(optimizer)

    @ALL_KINDS
    @pytest.mark.parametrize("path", TORCH_PATHS)
    def test_memory_format_after_construction(self, kind: Kind, path: str) -> None:
        """Other strides than the latents have: the same numbers but for the order of sums."""
        outcomes = []
        for moved in (False, True):
            model = make_model().double()
            optimizer = make_optimizer(kind, model, **PATHS[path])
            fit(model, optimizer, 2)
            if moved:
                model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                weight = model.get_parameter("3.weight")
                assert weight.stride() != optimizer.state[weight]["momentum_buffer"].stride()
            fit(model, optimizer, 3, seed=1)
            assert_consistent(optimizer)
            outcomes.append([p.detach() for p in model.parameters()])
        for p, q in zip(*outcomes, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("path", PATHS)
    @THREE
    def test_copy_of_a_moved_model(self, kind: Kind, path: str) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model, **PATHS[path])
        fit(model, optimizer, 2)
        model.to(torch.bfloat16)
        twin, its_optimizer = copy.deepcopy((model, optimizer))
        for m, o in ((model, optimizer), (twin, its_optimizer)):
            fit(m, o, 2, seed=1)
        assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)


@pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
@ALL_WAYS
def test_large_enough_for_the_kernels(optimizer_class: Any, way: str) -> None:
    """With the default settings, where compiled kernels take over by themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256))
    model.append(nn.Linear(256, 3))
    groups = param_groups(model) if optimizer_class is not DFW else model.parameters()
    optimizer = optimizer_class(groups)
    fit(model, optimizer, 2)
    twin, its_optimizer = WAYS[way]((model, optimizer))
    fit(twin, its_optimizer, 2, seed=1)
    fit(model, optimizer, 2, seed=1)
    assert snapshot(twin, its_optimizer) == snapshot(model, optimizer)
