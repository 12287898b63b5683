"""The interface: construction, errors, groups, closures and losses, hooks, copies."""

# torch leaves backward() and its hooks untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
from helpers import (
    FLOAT_GROUP,
    KINDS,
    MAIN_KINDS,
    PATHS,
    QUANTIZED_KINDS,
    SHAPES,
    TORCH_PATHS,
    WIDEST,
    Kind,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    forward_weights,
    make_params,
    same_bits,
    to_numpy,
    train,
)
from torch import Tensor, nn
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
QUANTIZED = pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)
ALL_PATHS = pytest.mark.parametrize("path", PATHS)


class TestConstruction:
    def test_defaults(self) -> None:
        """The values in the documentation, as plain values in the groups."""
        for optimizer in (DFW(make_params()), TernaryDFW(make_params()[:2])):
            group = optimizer.param_groups[0]
            for name, value in (
                ("lr", 0.1),
                ("momentum", 0.9),
                ("weight_decay", 0.0),
                ("eps", 1e-5),
                ("foreach", None),
                ("fused", None),
            ):
                assert group[name] == value
        group = ProjectedDFW(make_params()[:2]).param_groups[0]
        assert (group["quantizer"], group["radius"], group["step_size"]) == ("binary", 1.0, "exact")
        group = TernaryDFW(make_params()[:2]).param_groups[0]
        assert (group["quantizer"], group["radius"], group["step_size"], group["threshold"]) == (
            "ternary",
            1.0,
            "exact",
            0.05,
        )

    @ALL_KINDS
    def test_groups_hold_plain_values(self, kind: Kind) -> None:
        optimizer = kind.make(make_params())
        for group in optimizer.param_groups:
            for key, value in group.items():
                assert key == "params" or value is None or type(value) in (bool, int, float, str)

    @ALL_KINDS
    def test_is_an_optimizer(self, kind: Kind) -> None:
        optimizer = kind.make(make_params())
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert type(optimizer).__name__ in repr(optimizer)
        assert "lr: 0.1" in repr(optimizer)

    def test_float_parameters_are_not_touched(self) -> None:
        params = make_params()
        before = clone_params(params)
        DFW(params)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @THREE
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_quantized_from_the_start(self, kind: Kind, dtype: torch.dtype) -> None:
        """Latents are the weights over their largest magnitude, in float32 at least."""
        params = make_params(dtype=dtype)
        weights = [p.detach().clone() for p in params]
        optimizer = kind.make(params)
        assert_consistent(optimizer)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for p, w in zip(params, weights, strict=True):
            assert p.dtype == dtype
            if not kind.quantized or p.dim() < 2:
                assert same_bits(p, w)
                assert "latent" not in optimizer.state[p]
                continue
            state = optimizer.state[p]
            assert {state[name].dtype for name in state} == {wide}
            unit = w.to(wide).abs().max()
            torch.testing.assert_close(state["unit"], unit)
            torch.testing.assert_close(state["latent"], w.to(wide) / unit)
            settings = reference.Settings(quantizer=kind.name, radius=1.0)
            expected = reference.make_parameter(to_numpy(w), settings)
            torch.testing.assert_close(p.detach(), torch.tensor(expected.forward()).to(dtype))
            if kind.name == "ternary":
                assert isinstance(expected, reference.TernaryParameter)
                for name in ("scale_pos", "scale_neg"):
                    scale = getattr(expected, name).value
                    assert float(state[name]) == pytest.approx(float(scale), rel=1e-5)

    @QUANTIZED
    @pytest.mark.parametrize(
        "weights",
        [
            pytest.param([[0.0, 0.0], [0.0, -0.0]], id="zeros"),
            pytest.param([[0.5, 0.2], [0.3, 1.0]], id="no negative weight"),
            pytest.param([[-0.5, -0.2], [-0.3, -1.0]], id="no positive weight"),
            pytest.param([[0.7]], id="one element"),
            pytest.param([[1e-30, -1e-38], [1e-20, 0.0]], id="tiny"),
            pytest.param([[1e30, -1e18], [1e-20, 0.0]], id="huge"),
        ],
    )
    @ALL_PATHS
    def test_unusual_weights(self, kind: Kind, weights: list[list[float]], path: str) -> None:
        p = Parameter(torch.tensor(weights))
        optimizer = kind.make([p], **PATHS[path])
        assert_consistent(optimizer)
        state = optimizer.state[p]
        if not any(map(any, weights)):
            assert float(state["unit"]) == 1.0
            assert not p.detach().any()
        for number in range(3):
            draw_gradients([p], number)
            optimizer.step(loss=1.0)
            assert_consistent(optimizer)

    @QUANTIZED
    def test_empty_parameter(self, kind: Kind) -> None:
        """A layer without inputs has nothing to learn, and does no harm."""
        params = [Parameter(torch.zeros(3, 0)), *make_params(((2, 3),))]
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        optimizer.step(loss=1.0)
        assert_consistent(optimizer)

    @QUANTIZED
    @ALL_PATHS
    def test_memory_formats(self, kind: Kind, path: str) -> None:
        """Parameters in channels_last or transposed take the same path, and keep their strides."""
        dtype = WIDEST[path]
        plain = make_params(((3, 4, 3, 3), (4, 5)), dtype)
        other = [
            Parameter(plain[0].detach().clone().to(memory_format=torch.channels_last)),
            Parameter(plain[1].detach().clone().t().contiguous().t()),
        ]
        strides = [p.stride() for p in other]
        rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 1e-6)
        optimizers = [kind.make(params, **PATHS[path]) for params in (plain, other)]
        for number in range(5):
            draw_gradients(plain, number)
            for p, q in zip(plain, other, strict=True):
                assert p.grad is not None
                q.grad = torch.empty_like(q).copy_(p.grad)
            for optimizer in optimizers:
                optimizer.step(loss=0.5)
        for p, q in zip(plain, other, strict=True):
            torch.testing.assert_close(q, p, rtol=rtol, atol=atol)
        assert [p.stride() for p in other] == strides

    @QUANTIZED
    def test_parameters_change_in_place(self, kind: Kind) -> None:
        """A model keeps its tensors: views of them see the quantized values."""
        params = make_params()
        views = [p.detach().view(-1) for p in params]
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        for p, view in zip(params, views, strict=True):
            assert torch.equal(p.detach().view(-1), view)

    @THREE
    def test_named_parameters(self, kind: Kind) -> None:
        """A group may be made of (name, parameter) pairs."""
        params = make_params(((3, 4), (2, 5)))
        optimizer = kind.optimizer([("first", params[0]), ("second", params[1])], **kind.settings)
        assert optimizer.param_groups[0]["param_names"] == ["first", "second"]
        train(optimizer, params, 1)


BAD_VALUES: dict[str, list[Any]] = {
    "lr": [-0.1, math.nan, math.inf, 1j, "0.1", None, True, torch.tensor(-0.1)],
    "momentum": [-0.1, 1.0, math.nan, None, torch.tensor(0.9)],
    "weight_decay": [-1e-4, math.nan, math.inf, "0"],
    "eps": [-1e-5, math.nan, math.inf],
    "foreach": ["yes", 1],
    "fused": ["no", 0],
    "radius": [0.0, -1.0, math.nan, math.inf, "1"],
    "quantizer": ["quaternary", 2],
    "step_size": ["newton", None],
    "relaxation": [-0.1, 1.5, math.nan, "1", None, True, torch.tensor(0.5)],
    "threshold": [-0.1, 1.0, math.nan, None],
}
OF_DFW = ("lr", "momentum", "weight_decay", "eps", "foreach", "fused")
OF_PROJECTED = (*OF_DFW, "radius", "quantizer", "step_size", "relaxation")
SETTINGS = (OF_DFW, OF_PROJECTED, (*OF_PROJECTED, "threshold"))


class TestErrors:
    """Each names the argument and its value, and nothing has changed."""

    @pytest.mark.parametrize(
        ("kind", "name", "value"),
        [
            pytest.param(kind, name, value, id=f"{kind}-{name}={value}")
            for kind, names in zip(MAIN_KINDS, SETTINGS, strict=True)
            for name in names
            for value in BAD_VALUES[name]
        ],
    )
    def test_bad_settings(self, kind: Kind, name: str, value: Any) -> None:
        params = make_params(((3, 4), (2, 5)))
        before = clone_params(params)
        wanted = ValueError if isinstance(value, float) else (ValueError, TypeError)
        with pytest.raises(wanted, match=name) as caught:
            kind.make(params, **{name: value})
        assert isinstance(value, Tensor) or str(value) in str(caught.value)
        # The same in the second of two groups.
        with pytest.raises(wanted, match=name):
            kind.optimizer([{"params": params[:1]}, {"params": params[1:], name: value}])
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @pytest.mark.parametrize("optimizer", [ProjectedDFW, TernaryDFW])
    @pytest.mark.parametrize("shape", [(), (3,)])
    def test_vector_in_a_quantized_group(self, optimizer: Any, shape: tuple[int, ...]) -> None:
        params = [*make_params(((3, 4),)), Parameter(torch.ones(shape))]
        before = clone_params(params)
        with pytest.raises(ValueError, match="param_groups"):
            optimizer(params)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @THREE
    def test_complex_parameter(self, kind: Kind) -> None:
        params = [*make_params(((3, 4),)), Parameter(torch.ones(3, 4, dtype=torch.complex64))]
        before = clone_params(params)
        with pytest.raises(TypeError, match="complex"):
            kind.make(params)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @THREE
    def test_whole_number_parameter(self, kind: Kind) -> None:
        params = [torch.ones(3, 4, dtype=torch.int64)]
        with pytest.raises(TypeError, match="int64"):
            kind.make(params)

    @pytest.mark.parametrize("optimizer", [ProjectedDFW, TernaryDFW])
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_not_finite(self, optimizer: Any, bad: float) -> None:
        """Latents made of them could never recover."""
        params = make_params(((3, 4), (2, 5)))
        with torch.no_grad():
            params[1][1, 1] = bad
        before = clone_params(params)
        with pytest.raises(ValueError, match="NaN or inf"):
            optimizer(params)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @pytest.mark.parametrize(
        ("kind", "setting"),
        [
            (MAIN_KINDS[0], {"quantizer": "binary"}),
            (MAIN_KINDS[0], {"radius": 1.0}),
            (MAIN_KINDS[1], {"threshold": 0.1}),
            (MAIN_KINDS[1], {"quantizer": "ternary"}),
        ],
    )
    def test_setting_of_another_optimizer(self, kind: Kind, setting: dict[str, Any]) -> None:
        """In a group, where it would be ignored silently."""
        with pytest.raises(ValueError, match=f"{next(iter(setting))}.*use "):
            kind.optimizer([{"params": make_params(((3, 4),)), **setting}])

    @THREE
    def test_group_that_is_no_group(self, kind: Kind) -> None:
        optimizer = kind.make(make_params(((3, 4),)))
        with pytest.raises(TypeError, match="dict"):
            optimizer.add_param_group(make_params(((2, 2),)))

    @THREE
    def test_sparse_gradient(self, kind: Kind) -> None:
        params = make_params(((3, 4), (2, 5)))
        optimizer = kind.make(params)
        train(optimizer, params, 1)
        draw_gradients(params, 0)
        assert params[1].grad is not None
        params[1].grad = params[1].grad.to_sparse()
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step(loss=1.0)
        assert everything(optimizer) == before

    @THREE
    def test_bad_group_added(self, kind: Kind) -> None:
        """Neither the optimizer nor the parameters of the group change."""
        params = make_params(((3, 4),))
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        before = everything(optimizer)
        late = make_params(((2, 5), (3, 3)), seed=1)
        kept = clone_params(late)
        groups: list[dict[str, Any]] = [
            {"params": late, "lr": -1.0},
            {"params": late, "momentum": 1.5},
            {"params": [*late, params[0]]},
            {"params": [late[0], Parameter(torch.ones(2, 2, dtype=torch.complex64))]},
            {"params": [late[0], "weight"]},
        ]
        if kind.quantized:
            groups += [
                {"params": [*late, Parameter(torch.ones(3))]},
                {"params": late, "quantizer": "quaternary"},
                {"params": late, "radius": 0.0},
            ]
        for group in groups:
            with pytest.raises((ValueError, TypeError)):
                optimizer.add_param_group(group)
            assert everything(optimizer) == before
            assert len(optimizer.param_groups) == 1
            assert all(same_bits(p, q) for p, q in zip(late, kept, strict=True))
            assert all(p not in optimizer.state for p in late)
        train(optimizer, params, 2)
        optimizer.add_param_group({"params": late})
        train(optimizer, [*params, *late], 2)

    @THREE
    def test_no_parameters(self, kind: Kind) -> None:
        with pytest.raises(ValueError, match="empty"):
            kind.optimizer([])

    @THREE
    def test_parameter_in_two_groups(self, kind: Kind) -> None:
        params = make_params(((3, 4),))
        before = clone_params(params)
        with pytest.raises(ValueError, match="more than one parameter group"):
            kind.optimizer([{"params": params}, {"params": params}])
        assert same_bits(params[0], before[0])

    @THREE
    def test_setting_made_bad_later(self, kind: Kind) -> None:
        """Nonsense written into a group by hand: the step is skipped, nothing is poisoned."""
        params = make_params()
        optimizer = kind.make(params)
        train(optimizer, params, 1)
        before = everything(optimizer)
        optimizer.param_groups[0]["lr"] = math.nan
        draw_gradients(params, 1)
        optimizer.step(loss=1.0)
        assert math.isnan(float(optimizer.gamma))
        optimizer.param_groups[0]["lr"] = 0.1
        assert everything(optimizer) == before


class TestGroups:
    @THREE
    def test_add_param_group(self, kind: Kind) -> None:
        """The same as if the group had been there, from then on."""
        early, late = (
            make_params(((3, 4),), torch.float64),
            make_params(((2, 5),), torch.float64, 1),
        )
        settings: dict[str, Any] = {"quantizer": kind.name, "radius": 1.0} if kind.quantized else {}
        expected = [reference.make_parameter(to_numpy(early[0]), reference.Settings(**settings))]
        optimizer = kind.make(early)
        params: list[Tensor] = [*early]
        for number in range(12):
            if number == 5:
                optimizer.add_param_group({"params": late, "lr": 0.3, "weight_decay": 0.1})
                late_settings = reference.Settings(lr=0.3, weight_decay=0.1, **settings)
                expected.append(reference.make_parameter(to_numpy(make_late()), late_settings))
                params += late
                assert_consistent(optimizer)
            draw_gradients(params, number)
            gradients = [to_numpy(p.grad) for p in params if p.grad is not None]
            reference.step(expected, 0.3, gradients)
            optimizer.step(loss=0.3)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), torch.tensor(e.forward()))

    @QUANTIZED
    @ALL_PATHS
    def test_frozen_and_later_unfrozen(self, kind: Kind, path: str) -> None:
        """Left as it is until it is unfrozen and has a gradient; then like one just added."""
        params = make_params(((3, 4), (2, 5)), WIDEST[path])
        frozen = params[1].requires_grad_(False)
        weights = frozen.detach().clone()
        optimizer = kind.make(params, **PATHS[path])
        assert same_bits(frozen, weights)
        train(optimizer, params[:1], 3)
        assert same_bits(frozen, weights)

        frozen.requires_grad_(True)
        draw_gradients(params[:1], 50)
        optimizer.step(loss=1.0)
        assert same_bits(frozen, weights)

        settings = reference.Settings(
            quantizer=kind.name.split("_")[0],
            radius=1.0,
            step_size=kind.settings.get("step_size", "exact"),
            momentum=0.9,
        )
        expected = reference.make_parameter(to_numpy(weights), settings)
        for number in range(4):
            draw_gradients([frozen], number)
            params[0].grad = None
            assert frozen.grad is not None
            gamma = reference.step([expected], 0.2, [to_numpy(frozen.grad)])
            optimizer.step(loss=0.2)
            rel = 1e-10 if frozen.dtype == torch.float64 else 1e-4
            assert float(optimizer.gamma) == pytest.approx(gamma, rel=rel)
        torch.testing.assert_close(frozen.detach(), torch.tensor(expected.forward()).to(frozen))
        assert_consistent(optimizer)

    @ALL_KINDS
    @ALL_PATHS
    def test_frozen_in_mid_training(self, kind: Kind, path: str) -> None:
        """A frozen parameter with an old gradient moves neither itself nor γ."""
        params = make_params(((3, 4), (2, 5)))
        optimizer = kind.make(params, **PATHS[path])
        train(optimizer, params, 3)
        params[1].requires_grad_(False)
        params[1].grad = None
        before = params[1].detach().clone()
        train(optimizer, params[:1], 3)
        assert same_bits(params[1], before)
        params[1].requires_grad_(True)
        train(optimizer, params, 2)
        assert not same_bits(params[1], before)
        assert_consistent(optimizer)

    @ALL_KINDS
    @ALL_PATHS
    def test_no_gradient_at_all(self, kind: Kind, path: str) -> None:
        params = make_params()
        optimizer = kind.make(params, **PATHS[path], weight_decay=0.1)
        before = everything(optimizer)
        assert optimizer.step(loss=0.5) == 0.5
        assert everything(optimizer) == before
        train(optimizer, params, 2)
        before = everything(optimizer)
        optimizer.zero_grad()
        optimizer.step(loss=torch.tensor(0.5))
        assert everything(optimizer) == before

    @ALL_KINDS
    def test_all_frozen(self, kind: Kind) -> None:
        params = [p.requires_grad_(False) for p in make_params()]
        before = clone_params(params)
        optimizer = kind.make(params)
        optimizer.step(loss=0.5)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @THREE
    def test_momentum_is_there_from_the_start(self, kind: Kind) -> None:
        """Distributed checkpoints load what a new optimizer has. Only if there is to be any."""
        params = make_params(((3, 4), (2, 5), (4,)))
        params[1].requires_grad_(False)
        optimizer = kind.make(params)
        names = {name: set(optimizer.state[p]) for name, p in zip("abc", params, strict=True)}
        for p in (params[0], params[2]):
            momentum = {n: t for n, t in optimizer.state[p].items() if "momentum" in n}
            assert "momentum_buffer" in momentum
            assert all(not t.any() for t in momentum.values())
        assert not names["b"]
        train(optimizer, [params[0], params[2]], 2)
        for name, p in zip("abc", params, strict=True):
            assert set(optimizer.state[p]) == names[name]
        params[1].requires_grad_()
        train(optimizer, params, 1)
        assert "momentum_buffer" in optimizer.state[params[1]]

        params = make_params(((3, 4), (4,)))
        optimizer = kind.make(params, momentum=0.0)
        train(optimizer, params, 2)
        for p in params:
            assert not any("momentum" in name for name in optimizer.state[p])

    @THREE
    @ALL_PATHS
    def test_lr_zero(self, kind: Kind, path: str) -> None:
        """Nothing moves: what schedulers with a warm-up from 0 ask for."""
        params = make_params()
        optimizer = kind.make(params, lr=0.0, **PATHS[path])
        before = clone_params(params)
        train(optimizer, params, 2)
        for p, q in zip(params, before, strict=True):
            # Kernels add up a channel in another order: its scale may differ in the last bit.
            torch.testing.assert_close(p, q, rtol=1e-6 if path == "fused" else 0, atol=0)
        assert_consistent(optimizer)

    @pytest.mark.parametrize("name", ["binary", "ternary"])
    def test_quantized_and_float_in_one_optimizer(self, name: str) -> None:
        kind = next(k for k in KINDS if k.name == name)
        params = make_params()
        optimizer = kind.make(params)
        assert len(optimizer.param_groups) == 2
        train(optimizer, params, 3)
        assert "latent" in optimizer.state[params[0]]
        assert "latent" not in optimizer.state[params[2]]
        assert len(set(params[2].tolist())) == 5

    @ALL_PATHS
    def test_mixed_dtypes_in_one_group(self, path: str) -> None:
        """Each parameter keeps its type; all share one γ."""
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        for kind in MAIN_KINDS:
            params = [p for dtype in dtypes for p in make_params(((3, 4),), dtype)]
            optimizer = kind.make(params, **PATHS[path])
            train(optimizer, params, 5)
            assert_consistent(optimizer)
            assert tuple(p.dtype for p in params) == dtypes
            for p in params[:3]:
                assert optimizer.state[p]["momentum_buffer"].dtype == (
                    torch.float32 if kind.quantized else p.dtype
                )
            assert optimizer.gamma.dim() == 0


def make_late() -> Parameter:
    return make_params(((2, 5),), torch.float64, 1)[0]


class TestLowPrecision:
    @pytest.mark.parametrize("kind", QUANTIZED_KINDS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @ALL_PATHS
    def test_latents_follow_float32(self, kind: Kind, dtype: torch.dtype, path: str) -> None:
        """With the same gradients latents take the float32 path: small steps are not lost."""
        start = make_params(((3, 4), (2, 2, 3, 3)), dtype)
        wide = [Parameter(p.detach().float()) for p in start]
        narrow = kind.make(start, lr=1e-3, **PATHS[path])
        full = kind.make(wide, lr=1e-3, **PATHS[path])
        for number in range(30):
            draw_gradients(start, number)
            for p, q in zip(start, wide, strict=True):
                assert p.grad is not None
                q.grad = p.grad.float()
            narrow.step(loss=0.01)
            full.step(loss=0.01)
            assert_consistent(narrow)
        for p, q in zip(start, wide, strict=True):
            torch.testing.assert_close(
                narrow.state[p]["latent"], full.state[q]["latent"], rtol=1e-5, atol=1e-6
            )
            assert same_bits(p, q.to(dtype)) or torch.allclose(p.float(), q, rtol=1e-2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("path", TORCH_PATHS)
    def test_norm_is_not_summed_in_low_precision(self, dtype: torch.dtype, path: str) -> None:
        """40,000 equal squares: a float16 sum would overflow, a bfloat16 sum stop growing."""
        p = Parameter(torch.zeros(200, 200, dtype=dtype))
        optimizer = DFW([p], **PATHS[path], momentum=0.0)
        p.grad = torch.full_like(p, 2.0)
        optimizer.step(loss=torch.tensor(800.0))
        # γ = ℓ / (η Σδ²) = 800 / (0.1 · 4 · 40,000)
        assert optimizer.gamma is not None
        assert float(optimizer.gamma) == pytest.approx(0.05, rel=5e-3)


class TestStepArguments:
    @THREE
    def test_neither_loss_nor_closure(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        before = everything(optimizer)
        with pytest.raises((TypeError, ValueError), match=r"step\(loss=") as caught:
            optimizer.step()
        assert "closure" in str(caught.value)
        assert everything(optimizer) == before

    @THREE
    def test_both(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        calls = []
        with pytest.raises((TypeError, ValueError), match="closure"):
            optimizer.step(lambda: calls.append(1), loss=1.0)
        assert not calls

    @THREE
    def test_tensor_for_the_closure(self, kind: Kind) -> None:
        """step(loss) for step(loss=loss): an easy mistake."""
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        before = everything(optimizer)
        with pytest.raises((TypeError, ValueError), match="loss="):
            optimizer.step(torch.tensor(1.0))
        assert everything(optimizer) == before

    @THREE
    @pytest.mark.parametrize(
        "loss",
        [
            torch.tensor([0.5, 0.7]),
            torch.zeros(0),
            torch.tensor(0.5 + 1j),
            0.5 + 1j,
            "0.5",
            [0.5],
        ],
        ids=["two elements", "no element", "complex tensor", "complex", "text", "list"],
    )
    def test_bad_loss(self, kind: Kind, loss: Any) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        before = everything(optimizer)
        with pytest.raises((TypeError, ValueError), match="loss"):
            optimizer.step(loss=loss)
        with pytest.raises((TypeError, ValueError), match="closure"):
            optimizer.step(lambda: loss)
        assert everything(optimizer) == before

    @THREE
    def test_closure_that_returns_nothing(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        before = everything(optimizer)
        with pytest.raises((TypeError, ValueError), match="closure"):
            optimizer.step(lambda: None)
        assert everything(optimizer) == before

    @THREE
    @pytest.mark.parametrize(
        "loss",
        [
            0.25,
            torch.tensor(0.25),
            torch.tensor([0.25]),
            torch.tensor([[0.25]]),
            torch.tensor(0.25, dtype=torch.float64),
            torch.tensor(0.25, dtype=torch.bfloat16),
            torch.tensor(0.25, requires_grad=True),
        ],
        ids=["float", "0-dim", "1-dim", "2-dim", "float64", "bfloat16", "with graph"],
    )
    def test_kinds_of_loss(self, kind: Kind, loss: Any) -> None:
        """All the same number: all the same step. It is returned as it came."""
        outcomes = []
        for given in (0.25, loss):
            params = make_params()
            optimizer = kind.make(params)
            draw_gradients(params, 0)
            assert optimizer.step(loss=given) is given
            assert optimizer.step(lambda given=given: given) is given
            outcomes.append(([p.detach().clone() for p in params], float(optimizer.gamma)))
        assert outcomes[0][1] == pytest.approx(outcomes[1][1], rel=1e-6)
        for p, q in zip(outcomes[0][0], outcomes[1][0], strict=True):
            torch.testing.assert_close(p, q)

    @THREE
    def test_whole_number_loss(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        optimizer.step(loss=1)
        one = float(optimizer.gamma)
        assert 0 < one <= 1

    @ALL_KINDS
    def test_gamma(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        assert optimizer.gamma.isnan()  # there was no step yet
        draw_gradients(params, 0)
        optimizer.step(loss=torch.tensor(0.05, requires_grad=True))
        gamma = optimizer.gamma
        assert gamma.dim() == 0
        assert not gamma.requires_grad
        assert gamma.device == params[0].device
        assert 0.0 < float(gamma) < 1.0
        kept = float(gamma)
        draw_gradients(params, 1)
        optimizer.step(loss=0.0)
        # A γ that was kept is not written over.
        assert float(gamma) == kept
        assert float(optimizer.gamma) != kept

    @THREE
    def test_weights_need_gradients_still(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        optimizer.step(loss=1.0)
        for p in params:
            assert p.requires_grad
            assert p.is_leaf
            assert p.grad_fn is None
            assert all(not value.requires_grad for value in optimizer.state[p].values())

    @THREE
    def test_works_under_inference_like_modes(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        with torch.no_grad():
            optimizer.step(loss=1.0)
        with torch.enable_grad():
            optimizer.step(loss=1.0)
        assert_consistent(optimizer)


class TestClosure:
    def make(self, kind: Kind) -> tuple[Any, nn.Module, Callable[[], Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        optimizer = kind.make(model.parameters())
        x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return optimizer, model, closure

    @ALL_KINDS
    def test_equals_the_loss_argument(self, kind: Kind) -> None:
        first, model, closure = self.make(kind)
        second, twin, other = self.make(kind)
        for _ in range(5):
            first.step(closure)
            second.step(loss=other())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert same_bits(p, q)

    @ALL_KINDS
    def test_runs_once_with_gradients_at_the_quantized_weights(self, kind: Kind) -> None:
        optimizer, model, closure = self.make(kind)
        optimizer.step(closure)
        expected = [p.detach().clone() for p in model.parameters()]
        losses = []

        def watched() -> Tensor:
            assert torch.is_grad_enabled()
            for p, q in zip(model.parameters(), expected, strict=True):
                assert same_bits(p, q)
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if group.get("quantizer") is not None:
                        assert same_bits(p, forward_weights(optimizer, group, p))
            losses.append(closure())
            return losses[-1]

        with torch.no_grad():
            returned = optimizer.step(watched)
            assert not torch.is_grad_enabled()
        assert len(losses) == 1
        assert returned is losses[0]

    @ALL_KINDS
    def test_gradients_are_read_after_it(self, kind: Kind) -> None:
        """zero_grad inside the closure: the gradients that count are its own."""
        optimizer, model, closure = self.make(kind)
        for p in model.parameters():
            p.grad = torch.full_like(p, math.nan)
        optimizer.step(closure)
        assert 0.0 <= float(optimizer.gamma) <= 1.0

    @ALL_KINDS
    def test_exception_in_it(self, kind: Kind) -> None:
        optimizer, _, closure = self.make(kind)
        optimizer.step(closure)
        gamma = optimizer.gamma.clone()
        before = everything(optimizer)

        def broken() -> Tensor:
            closure()
            raise RuntimeError("the data loader died")

        with pytest.raises(RuntimeError, match="data loader"):
            optimizer.step(broken)
        assert everything(optimizer) == before
        assert torch.equal(optimizer.gamma, gamma)
        optimizer.step(closure)

    @ALL_KINDS
    def test_lowers_the_loss(self, kind: Kind) -> None:
        optimizer, _, closure = self.make(kind)
        first = float(closure().detach())
        for _ in range(60):
            optimizer.step(closure)
        assert float(closure().detach()) < 0.8 * first


@THREE
@ALL_PATHS
def test_tensor_lr(kind: Kind, path: str) -> None:
    """A tensor for lr does what the number does."""
    results = []
    for lr in (0.03, torch.tensor(0.03, dtype=torch.float64), torch.tensor([0.03])):
        params = make_params(((3, 4), (2, 5)))
        optimizer = kind.make(params, lr=lr, weight_decay=0.1, **PATHS[path])
        train(optimizer, params, 5)
        results.append([p.detach() for p in params])
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


class TestHooks:
    @ALL_KINDS
    def test_post_hook_sees_the_quantized_weights(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        seen = []

        def hook(opt: Any, args: Any, kwargs: Any) -> None:
            assert opt is optimizer
            assert_consistent(opt)
            seen.append([p.detach().clone() for p in params])

        optimizer.register_step_post_hook(hook)
        train(optimizer, params, 3)
        assert len(seen) == 3
        for p, q in zip(params, seen[-1], strict=True):
            assert same_bits(p, q)

    @THREE
    def test_pre_hook_runs_before(self, kind: Kind) -> None:
        """What a hook does to the gradients counts in the step."""
        params = make_params()
        optimizer = kind.make(params, momentum=0.0)
        before = clone_params(params)
        handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: opt.zero_grad())
        train(optimizer, params, 1)
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
        handle.remove()
        train(optimizer, params, 1)
        assert not all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @THREE
    def test_post_accumulate_grad_hook(self, kind: Kind) -> None:
        """Gradients clipped as they arrive."""
        p = make_params(((3, 4),))[0]
        optimizer = kind.make([p])

        def clip(q: Tensor) -> None:
            assert q.grad is not None
            q.grad.clamp_(-0.1, 0.1)

        p.register_post_accumulate_grad_hook(clip)
        loss = (p * 3).sum()
        loss.backward()
        optimizer.step(loss=loss.abs())
        assert p.grad is not None
        assert p.grad.max() <= 0.1


class TestCopies:
    @ALL_KINDS
    @pytest.mark.parametrize("trained", [False, True])
    def test_deepcopy(self, kind: Kind, trained: bool) -> None:
        """A copied pair of parameters and optimizer goes its own way, the same way."""
        params = make_params()
        optimizer = kind.make(params)
        if trained:
            train(optimizer, params, 3)
        twins, twin = copy.deepcopy((params, optimizer))
        assert everything(twin) == everything(optimizer)
        before = everything(optimizer)
        train(twin, twins, 3, seed=1)
        assert everything(optimizer) == before
        train(optimizer, params, 3, seed=1)
        assert everything(twin) == everything(optimizer)

    @ALL_KINDS
    def test_deepcopy_keeps_public_attributes(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        train(optimizer, params, 2)
        twin = copy.deepcopy(optimizer)
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert public == {name for name in vars(twin) if not name.startswith("_")}
        assert torch.equal(twin.gamma, optimizer.gamma)
        assert torch.equal(twin.skipped_steps, optimizer.skipped_steps)

    @ALL_KINDS
    @pytest.mark.parametrize("trained", [False, True])
    def test_pickle(self, kind: Kind, trained: bool) -> None:
        params = make_params()
        optimizer = kind.make(params)
        if trained:
            train(optimizer, params, 3)
        twins, twin = pickle.loads(pickle.dumps((params, optimizer)))
        assert everything(twin) == everything(optimizer)
        train(optimizer, params, 3, seed=1)
        train(twin, twins, 3, seed=1)
        assert everything(twin) == everything(optimizer)

    @QUANTIZED
    def test_model_needs_nothing_else(self, kind: Kind) -> None:
        """Its state_dict and its deepcopy hold the quantized weights, without the optimizer."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        optimizer = kind.make(model.parameters())
        train(optimizer, list(model.parameters()), 3)
        x = torch.randn(5, 4)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        plain.load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(plain(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        weight = plain.state_dict()["0.weight"]
        for channel in weight:
            assert len(set(channel.tolist())) <= 3


class TestTooling:
    @THREE
    def test_grad_scaler(self, kind: Kind) -> None:
        """Gradients are unscaled before the step, which gets the unscaled loss."""
        outcomes = []
        for scaled in (False, True):
            params = make_params(((3, 4), (2, 5)))
            optimizer = kind.make(params)
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
            for number in range(4):
                optimizer.zero_grad()
                draw_gradients(params, number)
                targets = [p.grad.clone() for p in params if p.grad is not None]
                optimizer.zero_grad()
                terms = [(p * t).sum() for p, t in zip(params, targets, strict=True)]
                loss = terms[0] + terms[1]
                scaler.scale(loss).backward()
                scaler.step(optimizer, loss=loss.detach().abs())
                scaler.update()
            outcomes.append([p.detach() for p in params])
        for p, q in zip(*outcomes, strict=True):
            torch.testing.assert_close(p, q)

    @THREE
    def test_clip_grad_norm(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0, 100.0)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step(loss=1.0)
        assert 0.0 < float(optimizer.gamma) <= 1.0

    @THREE
    def test_profiler_names_the_step(self, kind: Kind) -> None:
        """It goes through torch's own wrapper."""
        params = make_params(((2, 3),))
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step(loss=1.0)
        names = [event.key for event in profile.key_averages()]
        assert any(re.search(rf"{type(optimizer).__name__}\.step", name) for name in names)

    @THREE
    def test_zero_grad(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)

    def test_schedule_of_groups_by_name(self) -> None:
        """Extra keys in a group stay where they are."""
        params: Sequence[Tensor] = make_params(((2, 3), (4,)))
        optimizer = ProjectedDFW(
            [
                {"params": [params[0]], "name": "quantized"},
                {"params": [params[1]], "name": "rest", **FLOAT_GROUP},
            ]
        )
        draw_gradients(params, 0)
        optimizer.step(loss=1.0)
        assert [group["name"] for group in optimizer.param_groups] == ["quantized", "rest"]

    def test_shapes_of_the_helpers(self) -> None:
        """The parameters that most tests here use have all kinds of shapes."""
        assert {len(shape) for shape in SHAPES} == {1, 2, 4}


def test_eps_is_that_of_the_first_group() -> None:
    p, q = (Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = DFW(
        [{"params": [p], "eps": 1.0}, {"params": [q], "eps": 1e-5}], lr=0.5, momentum=0.0
    )
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    optimizer.step(loss=1.0)
    assert float(optimizer.gamma) == pytest.approx(1.0 / (0.5 + 0.5 + 1.0))


@ALL_PATHS
@ALL_KINDS
def test_momentum_switched_off_and_on(kind: Kind, path: str) -> None:
    """At μ = 0 the buffer goes on, z = −ηγ(d + r), so that nothing stale comes back with μ."""
    params = make_params(((3, 4), (5,)))
    optimizer = kind.make(params, **PATHS[path])
    train(optimizer, params, 3)
    for group in optimizer.param_groups:
        group["momentum"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(loss=1.0)
    for p in params:
        for key, value in optimizer.state[p].items():
            if "momentum_buffer" in key:
                assert not value.any(), key


@ALL_PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_search_is_not_summed_in_low_precision(dtype: torch.dtype, path: str) -> None:
    """The same γ as for float32 weights of the same values, whatever the parameters' dtype."""
    p = make_params(((40, 50),), dtype, scale=0.3)[0]
    twin = Parameter(p.detach().float())
    gammas = []
    for each in (p, twin):
        optimizer = ProjectedDFW([each], lr=1.0, quantizer=None, radius=0.5, **PATHS[path])
        draw_gradients([p], 1)
        assert p.grad is not None
        each.grad = p.grad.to(each.dtype)
        optimizer.step(loss=300.0)
        gammas.append(float(optimizer.gamma))
    assert 0 < gammas[1] < 1
    assert gammas[0] == pytest.approx(gammas[1], rel=1e-5)


@pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
@pytest.mark.parametrize("size", [1e-13, 1e-20, 1e-30])
def test_next_to_nothing_is_trained(optimizer_class: Any, size: float) -> None:
    """C is 1: of these weights' own c the square, and so the metric, would be 0."""
    p = Parameter(torch.tensor([[size, -size], [0.0, size / 2]]))
    optimizer = optimizer_class([p])
    assert float(optimizer.state[p]["unit"]) == 1.0
    p.grad = torch.tensor([[1.0, -1.0], [0.5, 1.0]])
    optimizer.step(loss=1.0)
    assert not optimizer.skipped_steps
    assert optimizer.state[p]["latent"].abs().max() > 1e-3


def test_shape_of_a_tensor_lr_is_named() -> None:
    with pytest.raises(ValueError, match=r"1-element, but has shape \(2,\)"):
        DFW(make_params(), lr=torch.tensor([0.1, 0.1]))
