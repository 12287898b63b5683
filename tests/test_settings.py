"""Settings: a wrong one is refused with its name and value, at every door; a right one counts.

A refusal leaves everything as it was. What cannot be meant, and is no error, is warned of once.
"""

import copy
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from helpers import clone_params, draw_gradients, everything, make_params, refused, same_bits, train
from kinds import ALL_KINDS, BOTH_NORMS, CLASSES, FLOAT_GROUP, MAIN, MAIN_KINDS, QUANTIZING, Kind
from torch import Tensor
from torch.nn import Parameter

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

SECOND: list[Any] = [(ProjectedDFW, {}), (TernaryDFW, {}), (TernaryDFW, {"quantizer": "binary"})]
SECOND += [(ProjectedDFW, {"quantizer": "uniform", "bits": bits}) for bits in (2, 4)]
NUMBERS = (math.nan, math.inf, 10**400, True, "0.1", [0.1], torch.tensor(0.5))
BAD: dict[str, tuple[Any, ...]] = {
    "lr": (-0.1, None, *NUMBERS[:-1], torch.tensor(-0.5), torch.tensor(math.nan), torch.ones(2)),
    "momentum": (-0.1, 1.0, None, *NUMBERS),
    "weight_decay": (-1e-9, None, *NUMBERS),
    "eps": (-1e-9, None, *NUMBERS),
    "norm": ("frobenius", None, ["spectral"]),
    "layout": ("columns", None),
}
BOXED: dict[str, tuple[Any, ...]] = {
    "radius": (0.0, -1.0, *NUMBERS),
    "relaxation": (-0.1, 1.1, None, *NUMBERS),
    "step_size": ("newton", None),
    "scale_axis": (-1, 1.0, True, "0", None, [0], (), (0, -1)),
    "scale_groups": (0, 1.5, None),
}
OWN: dict[Any, dict[str, tuple[Any, ...]]] = {
    DFW: {"quantizer": ("binary",), "radius": (1.0,), "bits": (4,), "threshold": (0.1,)},
    ProjectedDFW: BOXED
    | {"quantizer": ("ternary", "Binary", 1), "bits": (1, 9, 2.5, True, "4", 4), "threshold": (0,)},
    TernaryDFW: BOXED
    | {"quantizer": ("uniform", "octal", 1), "bits": (4,), "threshold": (-0.1, 1.0, *NUMBERS)},
}
ALL_BAD = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{number}")
    for cls, own in OWN.items()
    for name, values in (BAD | own).items()
    for number, value in enumerate(values)
]
FIXED = {"quantizer": "uniform", "layout": "rows", "scale_axis": 1, "scale_groups": 2}


def named(name: str, value: Any) -> str:
    if name == "lr" and isinstance(value, Tensor):
        return r"must be 1-element.*\(2,\)" if value.numel() > 1 else f"lr={value.item()}"
    return re.escape(f"{name}={value!r}")


class TestRefused:
    @pytest.mark.parametrize(("optimizer_class", "name", "value"), ALL_BAD)
    def test_at_every_door(self, optimizer_class: Any, name: str, value: Any) -> None:
        """As an argument, in a group, in one that is added, and put into one between steps."""
        params = make_params()[:2]
        start, match = clone_params(params), named(name, value)
        with pytest.raises(ValueError, match=match):
            optimizer_class([{"params": params[:1]}, {"params": params[1:], name: value}])
        defaults = optimizer_class(clone_params(params)).defaults
        if name in defaults.keys() - FIXED.keys() | {"quantizer"} and optimizer_class is not DFW:
            with pytest.raises(ValueError, match=match):
                optimizer_class(params, **{name: value})
        assert all(map(same_bits, params, start))

        optimizer = optimizer_class(params[:1])
        with refused(optimizer, match):
            optimizer.add_param_group({"params": params[1:], name: value})
        assert same_bits(params[1], start[1])
        train(optimizer, params[:1], 1)
        optimizer.param_groups[0][name] = value
        if name not in defaults or (name, value) in (("bits", 4), ("radius", True)):
            return  # of no use, or what it was
        with refused(optimizer, match):
            train(optimizer, params[:1], 1)

    @BOTH_NORMS
    @pytest.mark.parametrize(
        "setting", [{"norm": None}, {"eps": 1e-3}, {"momentum": 0.5}, {"lr": 0.2}], ids=str
    )
    def test_what_counts_once_is_alike_in_all_groups(self, norm: str, setting: Any) -> None:
        """Momentum is one for all in the spectral norm only, lr in neither."""
        ((name, value),) = setting.items()
        value = value or {"spectral": "euclidean", "euclidean": "spectral"}[norm]
        first, second = make_params()[:2]
        groups: list[Any] = [{"params": [first]}, {"params": [second], name: value}]
        if name == "lr" or (name == "momentum" and norm == "euclidean"):
            train(DFW(groups, norm=norm), [first, second], 1)
            return
        with pytest.raises(ValueError, match=rf"{name}={value!r}.*differs.*counts once"):
            DFW(groups, norm=norm)
        for number in (0, 1):
            optimizer = DFW([{"params": [first]}, {"params": [second]}], norm=norm)
            optimizer.param_groups[number][name] = value
            with refused(optimizer, f"{name}=.*(counts once|cannot change)"):
                train(optimizer, [first, second], 1)

    @pytest.mark.parametrize("kind", [k for k in MAIN_KINDS if k.quantized], ids=str)
    @pytest.mark.parametrize("steps", [0, 1])
    @pytest.mark.parametrize("copied", [False, True])
    @pytest.mark.parametrize("name", FIXED)
    def test_what_state_is_made_for_cannot_change(
        self, kind: Kind, steps: int, copied: bool, name: str
    ) -> None:
        params = make_params()
        optimizer = kind.make(params)
        if copied:
            params, optimizer = copy.deepcopy((params, optimizer))
        train(optimizer, params, steps)
        value = "binary" if (name, kind.optimizer) == ("quantizer", TernaryDFW) else FIXED[name]
        optimizer.param_groups[0][name] = value
        with refused(optimizer, f"{name}={value!r} was .* cannot change"):
            train(optimizer, params, 1)

    @QUANTIZING
    @pytest.mark.parametrize(
        ("weight", "settings", "error", "match"),
        [
            (torch.ones(5), {}, ValueError, r"\(5,\).*at least 2 dim.*dfw_opt.param_groups"),
            (torch.eye(3), {"scale_axis": 2}, ValueError, r"\(3, 3\).*scale_axis=2"),
            (torch.eye(3), {"scale_groups": 2}, ValueError, "scale_groups=2, which must divide"),
            (torch.full((3, 3), math.nan), {}, ValueError, r"\(3, 3\).*NaN or infinity"),
            (torch.eye(3, device="meta"), {}, ValueError, r"\(3, 3\).*meta device.*to_empty"),
            (torch.eye(3, dtype=torch.complex64), {}, TypeError, r"\(3, 3\).*complex64"),
        ],
    )
    def test_parameters(
        self, optimizer_class: Any, weight: Tensor, settings: Any, error: Any, match: str
    ) -> None:
        """At construction, when added, and when one that was frozen is unfrozen: not before."""
        good, bad = make_params()[0], Parameter(weight)
        start = good.detach().clone()
        with pytest.raises(error, match=match):
            optimizer_class([{"params": [good]}, {"params": [bad], **settings}])
        assert same_bits(good, start)
        optimizer = optimizer_class([good])
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": [bad], **settings})
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": [bad.requires_grad_(False)], **settings})
        train(optimizer, [good], 2)
        assert not optimizer.state.get(bad)
        bad.requires_grad_(True).grad = torch.zeros_like(bad)
        before = good.detach().clone()
        with pytest.raises(error, match=match):
            train(optimizer, [good], 1)
        assert same_bits(good, before)

    @CLASSES
    @pytest.mark.parametrize("lr", [0.1, 0.0])
    def test_step(self, optimizer_class: Any, lr: float) -> None:
        """Also in a warm-up from 0, where a loss that is forgotten would not be missed."""
        params = make_params()[:2]
        optimizer = optimizer_class(params, lr=lr)
        draw_gradients(params, 0)
        name, numbers = optimizer_class.__name__, torch.ones(1, 2)
        cases: list[tuple[dict[str, Any], Any, str]] = [
            ({}, TypeError, rf"{name}.step needs the loss: write optimizer.step\(loss=loss\)"),
            ({"closure": lambda: 1.0, "loss": 1.0}, TypeError, "a closure or a loss, not both"),
            ({"closure": 1.0}, TypeError, "closure, 1.0, cannot be called"),
            ({"closure": lambda: None}, TypeError, "closure's result is None"),
            ({"closure": lambda: numbers}, ValueError, r"\(1, 2\).*must be a scalar"),
            ({"loss": "1"}, TypeError, "loss is '1'"),
            ({"loss": torch.ones((), dtype=torch.complex64)}, TypeError, "a real scalar tensor"),
        ]
        for arguments, error, match in cases:
            with refused(optimizer, match, error):
                optimizer.step(**arguments)
        params[0].grad = torch.eye(4, 6).to_sparse()
        with refused(optimizer, r"sparse.*\(4, 6\)", RuntimeError):
            optimizer.step(loss=1.0)

    def test_relax_and_bits(self) -> None:
        weights = make_params()[:2]
        start = clone_params(weights)
        for quantizer in ("binary", None):
            with pytest.raises(ValueError, match=f"bits=4 needs quantizer='unif.*{quantizer!r}"):
                ProjectedDFW(weights, bits=4, quantizer=quantizer)
        assert all(map(same_bits, weights, start))
        for floats in (DFW(make_params()), ProjectedDFW(make_params(), quantizer=None)):
            with pytest.raises(ValueError, match=r"relaxation=0.5.*no group .* is quantized"):
                floats.relax(0.5)
        optimizer = ProjectedDFW(weights, quantizer="uniform")
        assert optimizer.param_groups[0]["bits"] == 4
        for value in (-0.1, 1.1, math.nan):
            with refused(optimizer, f"relaxation={value!r}"):
                optimizer.relax(value)


@pytest.mark.filterwarnings("error")
class TestWarned:
    @MAIN
    @pytest.mark.parametrize("loss", [-1.0, torch.tensor(-1.0)], ids=["number", "tensor"])
    def test_a_negative_loss(self, kind: Kind, loss: Any) -> None:
        """Once; γ is 0. A skipped step is no reason, and zero none."""
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        for harmless in (0.0, np.float32(1.0), math.nan, -math.inf):
            optimizer.step(loss=harmless)
        with pytest.warns(UserWarning, match=r"negative \(-1\).*γ is 0.*loss - bound") as record:
            optimizer.step(loss=loss)
        assert [warning.filename for warning in record] == [__file__]
        optimizer.step(loss=loss)

    @MAIN
    def test_no_gradient_at_all(self, kind: Kind) -> None:
        optimizer = kind.make(make_params())
        before = everything(optimizer)
        with pytest.warns(UserWarning, match=r"no parameter has a gradient.*backward") as record:
            assert optimizer.step(loss=1.0) == 1.0
        assert [warning.filename for warning in record] == [__file__]
        optimizer.step(loss=1.0)
        assert everything(optimizer) == before

    @pytest.mark.parametrize(("optimizer_class", "settings"), SECOND)
    def test_a_second_optimizer(self, optimizer_class: Any, settings: Any) -> None:
        """Its latents would start at the levels; nothing is said of weights as they begin."""
        matrices = make_params(((32, 64), (8, 4, 3, 3)))
        copy.deepcopy(optimizer_class(matrices, **settings))
        optimizer_class([Parameter(torch.zeros(16, 16)), Parameter(torch.eye(2))], **settings)
        optimizer_class([Parameter(torch.randn(64, 4096).bfloat16())], **settings)  # 1,000 values
        optimizer_class([{"params": make_params(((4, 6),)), "scale_axis": (0, 1)}], **settings)
        with pytest.warns(UserWarning, match=r"\(32, 64\).*quantized already.*second"):
            optimizer_class(matrices[:1], **settings)

    @QUANTIZING
    @pytest.mark.parametrize("how", ["step", "relax"])
    def test_weights_written_from_outside(self, optimizer_class: Any, how: str) -> None:
        """Once, at a step, also a skipped one, or at relax(); what rounding does is no change."""
        params = make_params()[:2]
        optimizer = optimizer_class([*params, Parameter(torch.ones(2, 2), requires_grad=False)])
        assert not optimizer.state[optimizer.param_groups[0]["params"][2]]  # which makes one
        expected = clone_params(params)
        draw_gradients(params, 0)
        with torch.no_grad():
            params[0].mul_(2)
            params[1].mul_(1 + 2**-22)
        with pytest.warns(UserWarning, match=r"\(4, 6\).*changed from outside") as record:
            optimizer.step(loss=math.nan) if how == "step" else optimizer.relax(0.0)
        assert [warning.filename for warning in record] == [__file__]
        assert same_bits(params[0], expected[0])
        optimizer.step(loss=math.nan)


class TestCount:
    @ALL_KINDS
    def test_a_group_added_later(self, kind: Kind) -> None:
        """Before the first step it is as if it had been there; after it, it is trained too."""
        params, twins = make_params(), make_params()
        optimizer = kind.make(params[:1])
        optimizer.add_param_group({"params": params[1], "lr": 0.5})
        groups = [{"params": twins[:1]}, {"params": [twins[1]], "lr": 0.5}]
        other = kind.optimizer(groups, **kind.settings)
        train(optimizer, params[:2], 3)
        train(other, twins[:2], 3)
        assert everything(optimizer) == everything(other)
        before = params[2].detach().clone()
        floats = FLOAT_GROUP if kind.quantized else {}
        optimizer.add_param_group({"params": [params[2]], **floats})
        train(optimizer, params, 2)
        assert not torch.equal(params[2], before)

    @CLASSES
    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
    def test_frozen_parameters_may_be_anything(self, optimizer_class: Any, dtype: Any) -> None:
        """As torch's SGD takes them; they are left alone. So is a tensor without elements."""
        good, frozen = make_params()[:2]
        odd = Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
        start = frozen.requires_grad_(False).detach().clone()
        optimizer = optimizer_class([good, odd, frozen, Parameter(torch.zeros(0, 4))])
        train(optimizer, [good], 2)
        optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())
        train(optimizer, [good], 1)
        assert same_bits(frozen, start)
        assert torch.equal(odd, torch.ones(3, 3).to(dtype))
        assert set(optimizer.state_dict()["state"]) == {0}

    @ALL_KINDS
    def test_repr_has_what_applies_and_nothing_else(self, kind: Kind) -> None:
        text = repr(kind.make(make_params()))
        assert text.startswith(f"{kind.optimizer.__name__} (\nParameter Group 0: ")
        shown = [set(re.findall(r"^ +(\w+):", part, re.M)) for part in text.split("Group ")[1:]]
        usual = {"lr", "momentum", "weight_decay", "eps", "norm"}
        usual |= {"layout"} if kind.norm == "spectral" else set()
        box = {"quantizer", "radius"} | ({"step_size"} if kind.norm == "euclidean" else set())
        name = kind.name.split("-")[0].split("_")[0]
        own = {"uniform": {"bits"}, "ternary": {"threshold"}}.get(name, set())
        quantized = usual | box | own | {"relaxation", "scale_axis", "scale_groups"}
        floats = {"dfw": [usual], "box": [usual | box]}
        assert shown == floats.get(name, [quantized, usual | {"quantizer", "radius"}])


@MAIN
def test_momentum_and_freezing(kind: Kind) -> None:
    """A layer is unfrozen at another momentum than its like, its state looked at before."""
    shapes = ((4, 6), (4, 6), (5,))
    params = make_params(shapes)
    params[1].requires_grad_(False)
    optimizer = kind.make(params, lr=1.0)
    train(optimizer, [params[0], params[2]], 2)
    assert optimizer.state[params[1]] == {}
    params[1].requires_grad_(True)
    for momentum in (0.0, 0.9):
        for group in optimizer.param_groups:
            group["momentum"] = momentum
        train(optimizer, params, 2)
    others = make_params(shapes)
    resumed = kind.make(others, momentum=0.0)
    resumed.load_state_dict(optimizer.state_dict())
    for p, other in zip(params, others, strict=True):
        other.data.copy_(p.data)
    train(optimizer, params, 1, seed=1)
    train(resumed, others, 1, seed=1)
    assert all(map(same_bits, params, others))


def test_a_warning_that_is_an_error(recwarn: Any) -> None:
    optimizer, levels = ProjectedDFW(make_params(((16, 16),))), torch.ones(16, 16)
    warnings.simplefilter("error")
    with refused(optimizer, "quantized already", UserWarning):
        optimizer.add_param_group({"params": [Parameter(levels.triu() - levels.tril(-1))]})
    assert len(optimizer.param_groups) == 1
