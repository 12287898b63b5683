"""Relaxed weights, between float and quantized: the group key `relaxation`."""

# torch leaves unique() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import (
    FLOAT_GROUP,
    PATHS,
    QUANTIZED_KINDS,
    TORCH_PATHS,
    UNIFORM,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    same_bits,
    to_numpy,
    train,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import Settings
from test_trajectories import assert_state, walk
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import Parameter

from dfw_opt import DFW, AveragedModel, ProjectedDFW, TernaryDFW, relaxation
from dfw_opt.quantizers import QUANTIZERS, Pulled, uniform

ALL_KINDS = [*QUANTIZED_KINDS, UNIFORM]
QUANTIZED = pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
ALL_PATHS = pytest.mark.parametrize("path", PATHS)
THETAS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def group_of(quantizer: str, theta: float) -> dict[str, Any]:
    own = {"threshold": 0.2, "bits": 2, "radius": 1.0}
    return {"quantizer": quantizer, "relaxation": theta, **own}


class TestFormula:
    @given(st.sampled_from(sorted(QUANTIZERS)), THETAS, st.integers(0, 10**6))
    def test_weights_and_gradients(self, quantizer: str, theta: float, seed: int) -> None:
        """Against the literal transcription, in float64."""
        (p,) = make_params(((3, 4),), torch.float64, seed)
        group = group_of(quantizer, theta)
        own = Settings(quantizer=quantizer, radius=1.0, threshold=0.2, bits=2, relaxation=theta)
        # For an empty zone the transcription has no scale.
        assume(p.max() > 0.2 * p.abs().max() and p.min() < -0.2 * p.abs().max())
        expected: Any = reference.make_parameter(to_numpy(p), own)
        relaxed = reference.RelaxedParameter(expected)
        state = QUANTIZERS[quantizer].start(p, group)
        close = torch.testing.assert_close
        close(relaxation.quantize(state, group), torch.tensor(relaxed.forward()))
        gradient = torch.randn(3, 4, dtype=torch.float64)
        pulled = relaxation.pull_back(gradient, state, group)
        moves = relaxed.moves(to_numpy(gradient))
        assert len(moves) == len(pulled)
        for (d, metric), move in zip(pulled.values(), moves, strict=True):
            close(d, torch.as_tensor(move.gradient))
            assert float(metric) == pytest.approx(move.metric)  # type: ignore[arg-type]

    @given(st.sampled_from(sorted(QUANTIZERS)), THETAS, st.integers(0, 10**6))
    def test_no_unit_step_moves_its_own_weight_farther(
        self, quantizer: str, theta: float, seed: int
    ) -> None:
        """The metric: mean squared change of a weight by a unit of its latent, at most M."""
        (p,) = make_params(((3, 4),), torch.float64, seed)
        group = group_of(quantizer, theta)
        state = QUANTIZERS[quantizer].start(p, group)
        ones = torch.ones(3, 4, dtype=torch.float64)
        d, metric = relaxation.pull_back(ones, state, group)["latent"]
        assert metric is not None
        own_change = metric * d  # of each weight by its latent, since the gradient is 1
        assert float(own_change.square().mean()) <= float(metric) * (1 + 1e-12)

    @QUANTIZED
    @pytest.mark.parametrize("path", TORCH_PATHS)
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_fully_relaxed_is_float_in_a_box(self, kind: Kind, path: str, momentum: float) -> None:
        """θ = 1: the steps of a float parameter with the box c R, γ included."""
        params = make_params(((4, 6), (3, 2, 3, 3)), torch.float64)
        twins = clone_params(params)
        common: dict[str, Any] = {
            "momentum": momentum,
            "lr": 1.5,
            "weight_decay": 0.02,
            "step_size": kind.settings.get("step_size", "exact"),
            **PATHS[path],
        }
        radius = 0.8
        relaxed = kind.make(params, **common, radius=radius, relaxation=1.0)
        boxes = [radius * float(p.detach().abs().max()) for p in twins]
        groups = [{"params": [p], "radius": r} for p, r in zip(twins, boxes, strict=True)]
        boxed = ProjectedDFW(groups, **common, quantizer=None)
        gammas = []
        for number in range(30):
            draw_gradients(params, number, 0.3)
            for p, twin in zip(params, twins, strict=True):
                twin.grad = p.grad
            loss = 10.0 ** (1 - number % 4)
            for optimizer in (relaxed, boxed):
                optimizer.step(loss=loss)
            gammas.append(float(boxed.gamma))
            assert float(relaxed.gamma) == pytest.approx(gammas[-1], abs=1e-10)
            for p, twin in zip(params, twins, strict=True):
                torch.testing.assert_close(p, twin, rtol=1e-9, atol=1e-11)
        assert 1.0 in gammas
        assert any(0 < gamma < 1 for gamma in gammas)
        assert any((p.detach().abs() >= r - 1e-9).any() for p, r in zip(twins, boxes, strict=True))

    def test_metric_that_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A quantizer may say None for a metric of 1."""

        class Plain(uniform._Uniform):
            def pull_back(self, grad: Any, state: Any, group: Any) -> dict[str, Pulled]:
                return {"latent": Pulled(3 * grad, None)}

        monkeypatch.setitem(QUANTIZERS, "plain", Plain())
        (p,) = make_params(((3, 4),), torch.float64)
        state = {"latent": p.detach(), "unit": torch.tensor(0.5, dtype=torch.float64)}
        gradient = torch.randn(3, 4, dtype=torch.float64)
        d, metric = relaxation.pull_back(gradient, state, group_of("plain", 0.2))["latent"]
        root = 0.8 + 0.2 * 0.5
        assert float(metric) == pytest.approx(root**2)  # type: ignore[arg-type]
        torch.testing.assert_close(d, (0.8 * 3 + 0.2 * 0.5) * gradient / root**2)


class TestSteps:
    @pytest.mark.parametrize("path", TORCH_PATHS)
    @pytest.mark.parametrize("optimizer", [ProjectedDFW, TernaryDFW])
    def test_trajectory(self, path: str, optimizer: Any) -> None:
        """A hundred steps against the transcription, while θ falls from 1 to 0 and stays there."""
        first, second = ("binary", "uniform") if optimizer is ProjectedDFW else ("ternary",) * 2
        setups: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
            ([(3, 4), (2, 2, 2, 2)], {"quantizer": first, "radius": 1.0}),
            ([(2, 7)], {"quantizer": second, "lr": 0.5, "momentum": 0.5, "radius": 0.5}),
            ([(2, 6)], {"quantizer": first, "weight_decay": 0.1, "radius": None}),
            ([(5,)], {**FLOAT_GROUP, "lr": 0.2}),
        ]
        groups, params, own = [], [], []
        for number, (shapes, options) in enumerate(setups):
            members = make_params(shapes, torch.float64, seed=number)
            groups.append({"params": members, **options})
            params += members
            own += [Settings(**options, relaxation=1.0) for _ in members]
        expected: list[reference.Parameter] = []
        for p, s in zip(params, own, strict=True):
            made: Any = reference.make_parameter(to_numpy(p), s)
            expected.append(made if s.quantizer is None else reference.RelaxedParameter(made))
        made_by = optimizer(groups, relaxation=1.0, **PATHS[path])
        tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
        gammas = set()
        for number, loss, gradients in walk(expected):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = None if gradient is None else torch.tensor(gradient)
            gamma = reference.step(expected, loss, gradients)
            made_by.step(loss=loss)
            assert float(made_by.gamma) == pytest.approx(gamma, rel=1e-9, abs=1e-10)
            gammas.add(gamma if gamma in (0.0, 1.0) else 0.5)
            theta = max(0.0, 1 - number / 80)
            made_by.relax(theta)
            for s in own:
                s.relaxation = theta
            for p, e in zip(params, expected, strict=True):
                torch.testing.assert_close(p.detach(), torch.tensor(e.forward()), **tolerance)
                if theta == 0:
                    inner = e.quantized if isinstance(e, reference.RelaxedParameter) else e
                    assert_state(made_by, p, inner, tolerance)
        assert gammas == {0.0, 0.5, 1.0}

    @QUANTIZED
    @ALL_PATHS
    def test_from_float_to_quantized(self, kind: Kind, path: str) -> None:
        """The weights as they were, then mixed ones, then levels; at once, and after a step."""
        params = make_params(((4, 60), (3, 2, 3, 3), (5,)))
        before = clone_params(params)
        optimizer = kind.make(params, lr=0.01, relaxation=1.0, **PATHS[path])
        for p, q in zip(params, before, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
        assert_consistent(optimizer)
        for theta in (1.0, 0.7, 0.3, 0.01, 0.0, 0.0, 0.5, 0.0):
            optimizer.relax(theta)
            for steps in (0, 1):
                train(optimizer, params, steps)
                assert_consistent(optimizer)
                most = 7 if kind is UNIFORM else 3
                for channel in params[0].detach():
                    assert (len(channel.unique()) <= most) == (theta == 0)

    @pytest.mark.parametrize("quantizer", sorted(QUANTIZERS))
    def test_zero_is_the_quantizer_alone(self, quantizer: str) -> None:
        """To the bit."""
        (p,) = make_params(((30, 40),))
        group = group_of(quantizer, 0.0)
        bare = QUANTIZERS[quantizer]
        state = bare.start(p, group)
        assert same_bits(relaxation.quantize(state, group), bare.quantize(state, group))
        gradient = torch.randn(30, 40)
        pulled = relaxation.pull_back(gradient, state, group)
        assert fingerprint(pulled) == fingerprint(bare.pull_back(gradient, state, group))

    @QUANTIZED
    def test_parameters_without_a_gradient_follow(self, kind: Kind) -> None:
        """Those that were frozen during training, but not those that are float still."""
        params = make_params(((4, 60), (3, 50), (4, 40)))
        params[2].requires_grad_(False)
        still = params[2].detach().clone()
        optimizer = kind.make(params, relaxation=0.5)
        params[1].requires_grad_(False)
        optimizer.relax(0.0)
        most = 7 if kind is UNIFORM else 3
        assert all(len(channel.unique()) <= most for p in params[:2] for channel in p.detach())
        assert same_bits(params[2], still)
        assert params[2] not in optimizer.state

    def test_groups_of_their_own_and_groups_that_come_later(self) -> None:
        first, second, late = make_params(((4, 60), (3, 50), (4, 40)))
        groups: list[dict[str, Any]] = [
            {"params": [first], "relaxation": 1.0},
            {"params": [second]},
        ]
        optimizer = ProjectedDFW(groups)
        magnitudes = [len(p.detach().abs().unique()) for p in (first, second)]
        assert magnitudes == [240, 3]
        optimizer.relax(0.0)
        optimizer.add_param_group({"params": [late]})
        assert [group["relaxation"] for group in optimizer.param_groups] == [0.0, 0.0, 0.0]
        magnitudes = [len(p.detach().abs().unique()) for p in (first, second, late)]
        assert magnitudes == [4, 3, 4]

    @QUANTIZED
    @pytest.mark.parametrize("theta", [0, 1])
    def test_whole_numbers(self, kind: Kind, theta: int) -> None:
        """They are numbers too; what is kept is a plain float, for checkpoints."""
        params = make_params()
        optimizer = kind.make(params, relaxation=1 - theta)
        optimizer.relax(np.float64(0.3))
        optimizer.relax(theta)
        assert type(optimizer.param_groups[0]["relaxation"]) is float
        train(optimizer, params, 1)
        assert_consistent(optimizer)

    @QUANTIZED
    @pytest.mark.parametrize("foreach", [False, True])
    def test_model_that_changes_its_dtype(self, kind: Kind, foreach: bool) -> None:
        params = make_params(((4, 6), (3, 2, 3, 3)))
        optimizer = kind.make(params, relaxation=0.5, foreach=foreach)
        for p in params:
            p.data = p.data.double()
        train(optimizer, params, 2)
        assert_consistent(optimizer)

    @QUANTIZED
    def test_kernels_leave_it_to_torch(self, kind: Kind) -> None:
        """They do not know it: while it lasts, fused=True takes the same steps, to the bit."""
        params = make_params(((40, 60), (3, 2, 3, 3)))
        twins = clone_params(params)
        left = kind.make(params, fused=True, foreach=None, relaxation=0.5)
        right = kind.make(twins, fused=False, foreach=None, relaxation=0.5)
        for optimizer, those in ((left, params), (right, twins)):
            train(optimizer, those, 4)
        assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))

    def test_float_groups_do_not_read_it(self) -> None:
        """They may have the key, from the optimizer's default; they still have their kernels."""
        params = make_params()
        twins = clone_params(params)
        left = ProjectedDFW(params, quantizer=None, radius=0.5, relaxation=0.7, fused=True)
        right = ProjectedDFW(twins, quantizer=None, radius=0.5, fused=True)
        for optimizer, those in ((left, params), (right, twins)):
            train(optimizer, those, 3)
        assert all(same_bits(p, q) for p, q in zip(params, twins, strict=True))

    @QUANTIZED
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_step_that_is_skipped_changes_nothing(self, kind: Kind, bad: float) -> None:
        params = make_params()
        optimizer = kind.make(params, relaxation=0.5)
        train(optimizer, params, 2)
        optimizer.relax(0.4)
        before = everything(optimizer)
        draw_gradients(params, 9)
        optimizer.step(loss=bad)
        assert everything(optimizer) == before


def reloaded(optimizer: Any, params: list[Parameter], kind: Kind) -> tuple[Any, list[Parameter]]:
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    fresh = [Parameter(w) for w in weights]
    other = kind.make(fresh)
    other.load_state_dict(saved)
    return other, fresh


class TestKeeping:
    @QUANTIZED
    def test_checkpoint(self, kind: Kind) -> None:
        """The parameters are as relaxed as they were, and training goes on as it would have."""
        params = make_params()
        optimizer = kind.make(params, relaxation=1.0)
        train(optimizer, params[::2], 3)
        optimizer.relax(0.4)
        draw_gradients(params, 7)
        optimizer.step(loss=math.nan)
        other, fresh = reloaded(optimizer, params, kind)
        assert [g["relaxation"] for g in other.param_groups] == [0.4, 1.0]  # the float group's
        assert everything(other) == everything(optimizer)
        for o, those in ((optimizer, params), (other, fresh)):
            o.relax(0.2)
            train(o, those, 2, seed=1)
        assert everything(other) == everything(optimizer)

    @QUANTIZED
    def test_checkpoint_from_before_there_was_relaxation(self, kind: Kind) -> None:
        """It was 0 then, whatever the optimizer that loads it was made with."""
        params = make_params()
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            del group["relaxation"]
        fresh = clone_params(params)
        other = kind.make(fresh, relaxation=0.5)
        other.load_state_dict(saved)
        assert [g["relaxation"] for g in other.param_groups] == [0.0, 0.0]
        assert all(same_bits(p, q) for p, q in zip(params, fresh, strict=True))

    @QUANTIZED
    def test_pickle_from_before_there_was_relaxation(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        del optimizer.defaults["relaxation"]
        for group in optimizer.param_groups:
            del group["relaxation"]
        twins, other = pickle.loads(pickle.dumps((params, optimizer)))
        train(other, twins, 2)
        other.relax(0.5)
        other.load_state_dict(other.state_dict())
        assert_consistent(other)

    def test_bad_checkpoint(self) -> None:
        params = make_params()
        optimizer = ALL_KINDS[0].make(params, relaxation=0.5)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["relaxation"] = 1.5
        before = everything(optimizer)
        with pytest.raises(ValueError, match=r"relaxation=1.5 must be in \[0, 1\]"):
            optimizer.load_state_dict(saved)
        assert everything(optimizer) == before

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    @QUANTIZED
    def test_copies(self, kind: Kind, way: Any) -> None:
        params = make_params()
        optimizer = kind.make(params, relaxation=0.5)
        train(optimizer, params, 2)
        twins, other = way((params, optimizer))
        for o, those in ((optimizer, params), (other, twins)):
            train(o, those, 2, seed=1)
        assert everything(other) == everything(optimizer)

    @QUANTIZED
    def test_the_same_values_again_are_no_change(self, kind: Kind) -> None:
        """As when a model is loaded after its optimizer."""
        params = make_params()
        optimizer = kind.make(params, relaxation=0.5)
        train(optimizer, params, 1)
        with torch.no_grad():
            for p in params:
                p.copy_(p.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.relax(0.25)
            train(optimizer, params, 1)
            with torch.no_grad():
                for p in params:
                    p.copy_(p.clone())
            train(optimizer, params, 1)
        for change in (lambda: optimizer.relax(0.0), lambda: train(optimizer, params, 1)):
            with torch.no_grad():
                params[0].mul_(2)
            with pytest.warns(UserWarning, match="changed from outside"):
                change()
            assert_consistent(optimizer)

    def test_average_is_quantized(self) -> None:
        """An average is for use, whatever training has come to."""
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 4, bias=False)
        optimizer = ProjectedDFW(model.parameters(), relaxation=0.9)
        average = AveragedModel(model, optimizer)
        for _ in range(3):
            for channel in average.module.get_parameter("weight"):
                assert len(channel.abs().unique()) == 1
            assert len(model.weight.abs().unique()) == 24
            train(optimizer, [model.weight], 1)
            average.update_parameters(model)


BAD = [
    *[(x, r"must be in \[0, 1\]") for x in (-0.1, 1.5, math.nan, math.inf, 10**400)],
    *[(x, r"must be a plain number, in \[0, 1\]") for x in ("1", None, True)],
    (torch.tensor(0.5), "must be a plain number, not a tensor"),
]


class TestErrors:
    @pytest.mark.parametrize(("theta", "reason"), BAD)
    def test_bad_value(self, theta: Any, reason: str) -> None:
        """It is refused before a closure runs or anything moves."""
        params = make_params()
        optimizer = QUANTIZED_KINDS[0].make(params, relaxation=0.5)
        train(optimizer, params, 2)
        before = everything(optimizer)
        with pytest.raises(ValueError, match=f"^relaxation=.*{reason}"):
            optimizer.relax(theta)
        assert everything(optimizer) == before
        weights = clone_params(params)
        optimizer.param_groups[0]["relaxation"] = theta
        with pytest.raises(ValueError, match=f"^relaxation=.*{reason}"):
            optimizer.step(lambda: pytest.fail("the closure ran"))
        assert all(same_bits(p, q) for p, q in zip(params, weights, strict=True))

    def test_nothing_to_relax(self) -> None:
        params = make_params()
        for optimizer in (DFW(params), ProjectedDFW(params, quantizer=None)):
            with pytest.raises(ValueError, match=r"relaxation=0.5: no group .* is quantized"):
                optimizer.relax(0.5)

    def test_other_optimizers(self) -> None:
        (p,) = make_params(((3, 4),))
        with pytest.raises(ValueError, match=r"relaxation=0.5 is no setting .*; use ProjectedDFW"):
            DFW([{"params": [p], "relaxation": 0.5}])


def test_compiled_step() -> None:
    """Compiled anew for a second value and for 0, but not for every one between."""
    torch._dynamo.reset()
    params = make_params(((4, 6), (3, 2, 3, 3)))
    twins = clone_params(params)
    plain = ProjectedDFW(params, foreach=True, relaxation=0.9)
    other = ProjectedDFW(twins, relaxation=0.9)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(other.step, backend=counter)
    frames = []
    for number, theta in enumerate((0.9, 0.8, 0.7, 0.6, 0.0, 0.0)):
        for optimizer, those in ((plain, params), (other, twins)):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                optimizer.relax(theta)
            draw_gradients(those, number, 0.3)
        plain.step(loss=torch.tensor(1.0))
        step(loss=torch.tensor(1.0))
        frames.append(counter.frame_count)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(twin, p, rtol=1e-5, atol=1e-6)
    assert len(twins[0].detach().abs().unique()) == 4
    assert frames[0] == 1
    assert frames[1] == frames[2] == frames[3] <= 3
    assert frames[4] == frames[5] == frames[3] + 1
