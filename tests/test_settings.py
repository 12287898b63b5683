"""Settings: a wrong one is refused with its name and value, at every door; a right one counts.

A refusal leaves everything as it was. What cannot be meant, and is no error, is warned of once.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    FLOAT_GROUP,
    KINDS,
    MAIN_KINDS,
    Kind,
    clone_params,
    draw_gradients,
    everything,
    fingerprint,
    make_params,
    same_bits,
    train,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from dfw_opt import DFW, ProjectedDFW, TernaryDFW

ALL_KINDS = pytest.mark.parametrize("kind", KINDS, ids=str)
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
NORMS = pytest.mark.parametrize("norm", ["spectral", "euclidean"])
CLASSES = pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])

NUMBERS = (math.nan, math.inf, 10**400, True, "0.1", None, [0.1], torch.tensor(0.5))
BAD: dict[str, tuple[Any, ...]] = {
    "lr": (-0.1, *NUMBERS[:-1], torch.tensor(-0.5), torch.tensor(math.nan), torch.ones(2)),
    "momentum": (-0.1, 1.0, 1.5, *NUMBERS),
    "weight_decay": (-1e-9, *NUMBERS),
    "eps": (-1e-9, *NUMBERS),
    "norm": ("frobenius", None, 2, ["spectral"]),
    "layout": ("columns", None),
}
BAD_BOXED: dict[str, tuple[Any, ...]] = {
    "radius": (0.0, -1.0, *(x for x in NUMBERS if x is not None)),
    "relaxation": (-0.1, 1.1, *NUMBERS),
    "step_size": ("newton", None),
    "scale_axis": (-1, 1.0, True, "0", None, [0], (), (0, -1)),
    "scale_groups": (0, 1.5, None),
}
BAD_OF: dict[Any, dict[str, tuple[Any, ...]]] = {
    DFW: BAD,
    ProjectedDFW: BAD
    | BAD_BOXED
    | {"quantizer": ("ternary", "Binary", "octal", 1), "bits": (1, 9, 2.5, True, "4", 4)},
    TernaryDFW: BAD
    | BAD_BOXED
    | {"quantizer": ("uniform", "octal", 1), "threshold": (-0.1, 1.0, *NUMBERS)},
}
ALL_BAD = [
    pytest.param(cls, name, value, id=f"{cls.__name__}-{name}-{number}")
    for cls, settings in BAD_OF.items()
    for name, values in settings.items()
    for number, value in enumerate(values)
]
OF_GROUPS = ("layout", "scale_axis", "scale_groups")  # no arguments of a constructor
FIXED = ("norm", "quantizer", "layout", "scale_axis", "scale_groups")


def named(name: str, value: Any) -> str:
    if name == "lr" and isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if name == "lr" and isinstance(value, Tensor):
        return r"Tensor lr must be 1-element.*\(2,\)"
    return re.escape(f"{name}={value!r}")


class TestRefused:
    @pytest.mark.parametrize(("optimizer_class", "name", "value"), ALL_BAD)
    def test_at_every_door(self, optimizer_class: Any, name: str, value: Any) -> None:
        """As an argument, in a group, in one that is added, and put into one between steps."""
        params = make_params()[:2]
        start = clone_params(params)
        match = named(name, value)
        if name not in OF_GROUPS:
            with pytest.raises(ValueError, match=match):
                optimizer_class(params, **{name: value})
        with pytest.raises(ValueError, match=match):
            optimizer_class([{"params": params[:1]}, {"params": params[1:], name: value}])
        assert all(map(same_bits, params, start))

        optimizer = optimizer_class(params[:1])
        train(optimizer, params[:1], 1)
        before = everything(optimizer)
        with pytest.raises(ValueError, match=match):
            optimizer.add_param_group({"params": params[1:], name: value})
        assert everything(optimizer) == before
        assert same_bits(params[1], start[1])
        train(optimizer, params[:1], 1)

        optimizer.param_groups[0][name] = value
        if (name, value) in (("bits", 4), ("radius", True)):  # of no use; what it was
            return
        before = everything(optimizer)
        with pytest.raises(ValueError, match=match):
            train(optimizer, params[:1], 1)
        assert everything(optimizer) == before

    @pytest.mark.parametrize(
        ("optimizer_class", "name", "value", "home"),
        [
            (DFW, "quantizer", "binary", "ProjectedDFW or TernaryDFW"),
            (DFW, "radius", 1.0, "ProjectedDFW or TernaryDFW"),
            (DFW, "bits", 4, "ProjectedDFW"),
            (ProjectedDFW, "threshold", 0.1, "TernaryDFW"),
            (ProjectedDFW, "quantizer", "ternary", "TernaryDFW"),
            (TernaryDFW, "quantizer", "uniform", "ProjectedDFW"),
            (TernaryDFW, "bits", 4, "ProjectedDFW"),
        ],
    )
    def test_setting_of_another_optimizer(
        self, optimizer_class: Any, name: str, value: Any, home: str
    ) -> None:
        """The message names the one that has it."""
        with pytest.raises(ValueError, match=rf"{name}={value!r}.*use {home}$"):
            optimizer_class([{"params": make_params()[:1], name: value}])

    @NORMS
    @pytest.mark.parametrize(
        ("name", "value"), [("norm", None), ("eps", 1e-3), ("momentum", 0.5), ("lr", 0.2)]
    )
    def test_what_counts_once_is_the_same_in_all_groups(
        self, norm: str, name: str, value: Any
    ) -> None:
        """At every door; momentum is one for all in the spectral norm only, lr in neither."""
        if name == "norm":
            value = "euclidean" if norm == "spectral" else "spectral"
        first, second = make_params()[:2]
        groups = [{"params": [first]}, {"params": [second], name: value}]
        if name == "lr" or (name == "momentum" and norm == "euclidean"):
            train(DFW(groups, norm=norm), [first, second], 1)
            return
        with pytest.raises(ValueError, match=rf"{name}={value!r}.*differs.*counts once"):
            DFW(groups, norm=norm)
        optimizer = DFW([{"params": [first]}, {"params": [second]}], norm=norm)
        train(optimizer, [first, second], 1)
        optimizer.param_groups[1][name] = value
        before = everything(optimizer)
        with pytest.raises(ValueError, match=f"{name}={value!r}.*(counts once|cannot change)"):
            train(optimizer, [first, second], 1)
        assert everything(optimizer) == before

    @THREE
    @pytest.mark.parametrize("steps", [0, 1])
    @pytest.mark.parametrize("how", [lambda x: x, copy.deepcopy], ids=["itself", "copy"])
    @pytest.mark.parametrize("name", FIXED)
    def test_what_state_is_made_for_cannot_change(
        self, kind: Kind, steps: int, how: Callable[[Any], Any], name: str
    ) -> None:
        params = make_params()
        params, optimizer = how((params, kind.make(params)))
        train(optimizer, params, steps)
        other = {
            "norm": {"spectral": "euclidean", "euclidean": "spectral"}[kind.norm],
            "quantizer": {"binary": "uniform", "ternary": "binary"}.get(kind.name.split("-")[0]),
            "layout": "rows",
            "scale_axis": 1,
            "scale_groups": 2,
        }[name]
        if name not in optimizer.param_groups[0]:
            return
        optimizer.param_groups[0][name] = other
        before = everything(optimizer)
        with pytest.raises(ValueError, match=f"{name}={other!r} was .* cannot change"):
            train(optimizer, params, 1)
        assert everything(optimizer) == before

    @pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
    @pytest.mark.parametrize(
        ("weight", "settings", "error", "match"),
        [
            (torch.ones(5), {}, ValueError, r"\(5,\).*at least 2 dim.*dfw_opt.param_groups"),
            (torch.eye(3), {"scale_axis": 2}, ValueError, r"\(3, 3\).*scale_axis=2"),
            (torch.eye(3), {"scale_groups": 2}, ValueError, "scale_groups=2 does not divide"),
            (torch.full((3, 3), math.nan), {}, ValueError, r"\(3, 3\).*NaN or infinity"),
            (torch.eye(3) / 0, {}, ValueError, r"\(3, 3\).*NaN or infinity"),
            (torch.eye(3, device="meta"), {}, ValueError, r"\(3, 3\).*meta device"),
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
        before = everything(optimizer)
        with pytest.raises(error, match=match):
            optimizer.add_param_group({"params": [bad], **settings})
        assert everything(optimizer) == before
        bad.requires_grad_(False)
        optimizer.add_param_group({"params": [bad], **settings})
        train(optimizer, [good], 2)
        assert not optimizer.state.get(bad)
        bad.requires_grad_(True)
        before = fingerprint(optimizer.state[good])
        with pytest.raises(error, match=match):
            train(optimizer, [good], 1)
        assert fingerprint(optimizer.state[good]) == before

    @CLASSES
    def test_other_parameters(self, optimizer_class: Any) -> None:
        with pytest.raises(TypeError, match=r"\(2, 2\).*complex64"):
            optimizer_class([Parameter(torch.ones(2, 2, dtype=torch.complex64))])
        flattened = Parameter(torch.ones(4))
        flattened._fsdp_flattened = True  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match=r"\(4,\).*FSDP2"):
            optimizer_class(
                [{"params": [flattened], **({} if optimizer_class is DFW else FLOAT_GROUP)}]
            )
        with pytest.raises(TypeError, match="process_group='all'"):
            optimizer_class(make_params()[:1], process_group="all")
        sparse = make_params()[0]
        optimizer = optimizer_class([sparse])
        sparse.grad = torch.eye(4, 6).to_sparse()
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match=r"sparse.*\(4, 6\)"):
            optimizer.step(loss=1.0)
        assert everything(optimizer) == before

    @CLASSES
    @pytest.mark.parametrize("lr", [0.1, 0.0])
    def test_step(self, optimizer_class: Any, lr: float) -> None:
        """Also in a warm-up from 0, where a loss that is forgotten would not be missed."""
        params = make_params()[:2]
        optimizer = optimizer_class(params, lr=lr)
        draw_gradients(params, 0)
        before = everything(optimizer)
        name = optimizer_class.__name__
        cases: list[tuple[dict[str, Any], Any, str]] = [
            ({}, TypeError, rf"{name}.step needs the loss: write optimizer.step\(loss=loss\)"),
            ({"closure": lambda: 1.0, "loss": 1.0}, TypeError, "a closure or a loss, not both"),
            ({"closure": 1.0}, TypeError, "closure, 1.0, cannot be called"),
            ({"closure": lambda: None}, TypeError, "closure's result is None"),
            ({"closure": lambda: "1"}, TypeError, "closure's result is '1'"),
            ({"loss": "1"}, TypeError, "loss is '1'"),
            ({"loss": torch.ones(2)}, ValueError, r"\(2,\).*must be a scalar"),
            ({"closure": lambda: torch.ones(1, 2)}, ValueError, r"\(1, 2\).*must be a scalar"),
            ({"loss": torch.ones((), dtype=torch.complex64)}, TypeError, "complex64"),
        ]
        for arguments, error, match in cases:
            with pytest.raises(error, match=match):
                optimizer.step(**arguments)
            assert everything(optimizer) == before

    def test_relax(self) -> None:
        optimizer = ProjectedDFW(make_params()[:2])
        before = everything(optimizer)
        for value in (-0.1, 1.1, math.nan, "1"):
            with pytest.raises(ValueError, match=f"relaxation={value!r}"):
                optimizer.relax(value)  # type: ignore[arg-type]
            assert everything(optimizer) == before
        for floats in (DFW(make_params()), ProjectedDFW(make_params(), quantizer=None)):
            with pytest.raises(ValueError, match=r"relaxation=0.5.*no group .* is quantized"):
                floats.relax(0.5)

    def test_bits_without_uniform(self) -> None:
        """Binary weights would be trained instead."""
        weights = make_params()[:2]
        start = clone_params(weights)
        for quantizer in ("binary", None):
            with pytest.raises(
                ValueError, match=f"bits=4 needs quantizer='uniform'.*{quantizer!r}"
            ):
                ProjectedDFW(weights, bits=4, quantizer=quantizer)
            with pytest.raises(ValueError, match=f"bits=4 is for .*'uniform'.*{quantizer!r}"):
                ProjectedDFW([{"params": weights, "bits": 4}], quantizer=quantizer)
        assert all(map(same_bits, weights, start))
        groups = [{"params": weights[:1], "quantizer": "uniform"}, {"params": weights[1:]}]
        optimizer = ProjectedDFW(groups, bits=3)
        assert [g["bits"] for g in optimizer.param_groups] == [3, 3]
        assert ProjectedDFW(clone_params(weights), quantizer="uniform").param_groups[0]["bits"] == 4


class TestWarned:
    @THREE
    @pytest.mark.parametrize("loss", [-1.0, torch.tensor(-1.0)], ids=["number", "tensor"])
    def test_a_negative_loss(self, kind: Kind, loss: Any) -> None:
        """Once; γ is 0, and a skipped step is no reason."""
        params = make_params()
        optimizer = kind.make(params)
        draw_gradients(params, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for harmless in (0.0, 1.0, math.nan, -math.inf):
                optimizer.step(loss=harmless)
        with pytest.warns(UserWarning, match=r"negative \(-1\).*γ is 0.*loss - bound") as record:
            optimizer.step(loss=loss)
        assert [warning.filename for warning in record] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(loss=loss)

    @THREE
    def test_no_gradient_at_all(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        before = everything(optimizer)[:3]
        with pytest.warns(UserWarning, match=r"no parameter has a gradient.*backward") as record:
            assert optimizer.step(loss=1.0) == 1.0
        assert [warning.filename for warning in record] == [__file__]
        assert everything(optimizer)[:3] == before
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(loss=1.0)
        assert everything(optimizer)[:3] == before

    @pytest.mark.parametrize(
        ("optimizer_class", "settings"),
        [
            (ProjectedDFW, {}),
            (TernaryDFW, {}),
            (TernaryDFW, {"quantizer": "binary"}),
            (ProjectedDFW, {"quantizer": "uniform", "bits": 2}),
            (ProjectedDFW, {"quantizer": "uniform", "bits": 4}),
        ],
    )
    def test_a_second_optimizer(self, optimizer_class: Any, settings: Any) -> None:
        """Its latents would start at the levels; nothing is said of weights as they begin."""
        matrices = make_params(((32, 64), (8, 4, 3, 3)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first = optimizer_class(matrices, **settings)
            train(first, matrices, 1)
            optimizer_class([Parameter(torch.zeros(16, 16)), Parameter(torch.eye(2))], **settings)
            copy.deepcopy(first)
        with pytest.warns(UserWarning, match=r"\(32, 64\).*quantized already.*second"):
            optimizer_class(matrices[:1], **settings)

    @pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
    def test_weights_written_from_outside(self, optimizer_class: Any) -> None:
        """Once each time, at a step, a skipped one or relax(); the same values are no change."""
        params = make_params()[:2]
        optimizer = optimizer_class(params)
        expected = clone_params(params)
        for act in (lambda: optimizer.step(loss=math.nan), lambda: optimizer.relax(0.0)):
            draw_gradients(params, 0)
            with torch.no_grad():
                params[0].mul_(2)
            with pytest.warns(UserWarning, match=r"\(4, 6\).*changed from outside") as record:
                act()
            assert [warning.filename for warning in record] == [__file__]
            assert same_bits(params[0], expected[0])
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("error")
                params[1].copy_(params[1].clone())
                act()


class TestFrozen:
    @CLASSES
    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
    def test_what_cannot_be_trained_may_be_there(self, optimizer_class: Any, dtype: Any) -> None:
        """As torch's SGD takes it. It is left alone, and so is one that could be trained."""
        good, frozen = make_params()[:2]
        frozen.requires_grad_(False)
        odd = Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
        start = frozen.detach().clone(), odd.detach().clone()
        optimizer = optimizer_class([good, odd, frozen])
        train(optimizer, [good], 2)
        optimizer.load_state_dict(copy.deepcopy(optimizer).state_dict())
        train(optimizer, [good], 1)
        assert same_bits(frozen, start[0])
        assert torch.equal(odd, start[1])
        assert set(optimizer.state_dict()["state"]) == {0}

    @ALL_KINDS
    def test_unfrozen_is_as_if_made_then(self, kind: Kind) -> None:
        params = make_params()
        params[0].requires_grad_(False)
        twins = clone_params(params)
        optimizer, other = kind.make(params), kind.make(twins)
        train(optimizer, params[1:], 1)
        train(other, twins[1:], 1)
        params[0].requires_grad_(True)
        twins[0].requires_grad_(True)
        fresh = kind.make(clone_params(params[:1]))
        draw_gradients(params, 5)
        params[1].grad = params[2].grad = None
        optimizer.step(loss=1.0)
        keys = set(optimizer.state[params[0]])
        assert keys == set(fresh.state[fresh.param_groups[0]["params"][0]])
        if kind.quantized:
            assert not same_bits(params[0], twins[0])


class TestCount:
    @ALL_KINDS
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("lr", 0.3),
            ("lr", torch.tensor(0.3)),
            ("momentum", 0.5),
            ("momentum", 0.0),
            ("weight_decay", 0.1),
            ("eps", 0.1),
            ("step_size", "closed_form"),
            ("relaxation", 0.5),
            ("bits", 5),
        ],
    )
    @pytest.mark.parametrize("first", [False, True])
    def test_changed_before_the_first_step(
        self, kind: Kind, name: str, value: Any, first: bool
    ) -> None:
        """The same as if it had been given at construction; so too from 0 or the default."""
        params, twins = make_params(), make_params()
        if name not in kind.make(clone_params(params)).defaults or (
            name == "bits" and not kind.name.startswith("uniform")
        ):
            return
        start = {name: 0.0} if first and isinstance(value, float) else {}
        optimizer, other = kind.make(params, **start), kind.make(twins, **{name: value})
        for group in optimizer.param_groups:
            group[name] = value
        for number in range(3):
            for o, ps in ((optimizer, params), (other, twins)):
                draw_gradients(ps, number)
                o.step(loss=0.05)
        assert everything(optimizer)[0] == everything(other)[0]

    @THREE
    def test_groups_are_copied(self, kind: Kind) -> None:
        """A list of them serves two optimizers; a tensor lr is read, and never written."""
        params = make_params()
        groups = kind.groups(params)
        before = [dict(group) for group in groups]
        lr = torch.tensor([0.25])
        ends = []
        for given in (lr, 0.25):
            twins = clone_params(params)
            for group, values in zip(groups, kind.groups(twins), strict=True):
                group["params"] = values["params"]
            optimizer = kind.optimizer(groups, lr=given, norm=kind.norm)
            train(optimizer, twins, 3)
            ends.append(everything(optimizer)[:2])
            assert all(group["lr"] is given for group in optimizer.param_groups)
        assert ends[0] == ends[1]
        assert lr.item() == 0.25
        assert [g.keys() for g in groups] == [g.keys() for g in before]

    @ALL_KINDS
    def test_a_group_added_later(self, kind: Kind) -> None:
        """Before the first step it is as if it had been there; after it, it is trained too."""
        params, twins = make_params(), make_params()
        late: dict[str, Any] = {"lr": 0.5}
        optimizer = kind.make(params[:1])
        optimizer.add_param_group({"params": params[1], **late})
        other = kind.optimizer(
            [{"params": twins[:1]}, {"params": [twins[1]], **late}], **kind.settings
        )
        train(optimizer, params[:2], 3)
        train(other, twins[:2], 3)
        assert everything(optimizer) == everything(other)
        before = params[2].detach().clone()
        optimizer.add_param_group(
            {"params": [params[2]], **(FLOAT_GROUP if kind.quantized else {})}
        )
        train(optimizer, params, 2)
        assert not torch.equal(params[2], before)
        with pytest.raises(ValueError, match="more than one parameter group"):
            optimizer.add_param_group({"params": [params[2]]})

    @NORMS
    def test_relaxation_of_groups_added_later(self, norm: str) -> None:
        params = make_params()[:2]
        optimizer = ProjectedDFW(params[:1], norm=norm)
        optimizer.relax(1.0)
        floats = params[1].detach().clone()
        optimizer.add_param_group({"params": params[1:]})
        assert [group["relaxation"] for group in optimizer.param_groups] == [1.0, 1.0]
        torch.testing.assert_close(params[1].detach(), floats)

    @NORMS
    def test_no_parameters(self, norm: str) -> None:
        """An empty float group, and tensors without elements, are nothing to complain of."""
        p, none = make_params()[0], Parameter(torch.zeros(0, 4))
        optimizer = DFW([{"params": [p, none]}, {"params": []}], norm=norm)
        draw_gradients([p, none], 0)
        optimizer.step(loss=1.0)
        assert int(optimizer.skipped_steps) == 0
        optimizer.load_state_dict(optimizer.state_dict())


class TestRepr:
    @ALL_KINDS
    def test_has_what_applies_and_nothing_else(self, kind: Kind) -> None:
        text = repr(kind.make(make_params()))
        assert text.startswith(f"{kind.optimizer.__name__} (\nParameter Group 0: ")
        shown = [set(re.findall(r"^ +(\w+):", part, re.M)) for part in text.split("Group ")[1:]]
        usual = {"lr", "momentum", "weight_decay", "eps", "norm"}
        usual |= {"layout"} if kind.norm == "spectral" else set()
        name = kind.name.split("-")[0].split("_")[0]
        search = {"step_size"} if kind.norm == "euclidean" else set()
        box = {"quantizer", "radius"}
        quantized = usual | box | search | {"relaxation", "scale_axis", "scale_groups"}
        own = {"uniform": {"bits"}, "ternary": {"threshold"}}.get(name, set())
        expected = {"dfw": [usual], "box": [usual | box | search]}.get(
            name, [quantized | own, usual | box]
        )
        assert shown == expected


def test_schedulers_may_start_momentum_at_zero() -> None:
    """OneCycleLR writes momentum into every group as soon as it is made."""
    for kind in KINDS:
        ends = []
        for momentum in (0.0, 0.9):
            params = make_params()
            optimizer = kind.make(params, momentum=momentum)
            scheduler = lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9)
            for number in range(3):
                train(optimizer, params, 1, seed=number)
                scheduler.step()
            ends.append(everything(optimizer)[:2])
        assert ends[0] == ends[1], kind
