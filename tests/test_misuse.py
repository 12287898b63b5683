"""Mistakes that users make, and that must not pass in silence."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def take_step(
    model: nn.Module, optimizer: DFW | ProjectedDFW | TernaryDFW, scale: float = 1.0
) -> None:
    optimizer.zero_grad()
    loss = scale * model(torch.ones(4, 6)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)


class TestWeightsChangedFromOutside:
    def test_loading_after_construction_warns_once(self) -> None:
        pretrained = {name: torch.randn_like(p) for name, p in make_model().named_parameters()}
        model = make_model()
        optimizer = ProjectedDFW(param_groups(model))
        model.load_state_dict(pretrained)
        with pytest.warns(UserWarning, match="Load weights before making the optimizer"):
            take_step(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            take_step(model, optimizer)

    def test_writing_the_same_values_does_not(self) -> None:
        model = make_model()
        optimizer = TernaryDFW(param_groups(model))
        take_step(model, optimizer)
        saved = {name: p.clone() for name, p in model.state_dict().items()}
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        model.load_state_dict(saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            take_step(model, optimizer)


def test_unfreezing_into_a_skipped_step_changes_nothing() -> None:
    model = make_model()
    weight = model[1].weight
    assert isinstance(weight, nn.Parameter)
    weight.requires_grad_(False)
    optimizer = ProjectedDFW(param_groups(model))
    before = weight.clone()
    weight.requires_grad_(True)
    take_step(model, optimizer, scale=float("nan"))
    assert optimizer.gamma is not None
    assert optimizer.gamma.isnan()
    assert torch.equal(weight, before)
    with torch.no_grad():
        weight.neg_()  # new weights may be loaded, as long as it is float
    take_step(model, optimizer)
    assert torch.equal(weight.abs(), weight[:, :1].abs().expand(8, 8))
    assert (weight.sign() == -before.sign()).float().mean() > 0.9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    ("kind", "group", "after"),
    [
        (TernaryDFW, 0, "binary"),
        (TernaryDFW, 0, "uniform"),
        (TernaryDFW, 0, "tenary"),
        (TernaryDFW, 0, None),
        (ProjectedDFW, 0, "ternary"),
        (ProjectedDFW, 1, "binary"),
        (DFW, 0, "binary"),
    ],
)
@pytest.mark.parametrize("how", [lambda x: x, copy.deepcopy], ids=["itself", "copy"])
def test_the_quantizer_of_a_group_cannot_change(
    how: Callable[[Any], Any],
    kind: Callable[..., DFW | ProjectedDFW | TernaryDFW],
    group: int,
    after: str | None,
    momentum: float,
) -> None:
    model = make_model()
    groups = model.parameters() if kind is DFW else param_groups(model)
    model, optimizer = how((model, kind(groups, momentum=momentum)))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.param_groups[group]["quantizer"] = after
    with pytest.raises(ValueError, match=rf"quantizer={after!r}.*cannot change"):
        take_step(model, optimizer)
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before)


class TestSkip:
    @pytest.mark.parametrize("skip", [nn.Linear, nn.Linear(2, 2)])
    def test_neither_names_nor_predicate(self, skip: object) -> None:
        with pytest.raises(TypeError, match="names, or a predicate"):
            param_groups(make_model(), skip=skip)  # type: ignore[arg-type]

    def test_not_a_name(self) -> None:
        with pytest.raises(TypeError, match="2 must be a name"):
            param_groups(make_model(), skip=[2])  # type: ignore[list-item]


def test_a_computed_weight_stays_float_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*make_model(), nn.Linear(3, 3), nn.Linear(3, 3))
    prune.l1_unstructured(model[1], "weight", 0.5)  # type: ignore[no-untyped-call]
    with caplog.at_level(logging.WARNING, logger="dfw_opt"):
        quantized, rest = param_groups(model)
    assert "1 stays float: its weight is computed" in caplog.text
    assert len(quantized["params"]) == 2
    assert any(p is model[1].weight_orig for p in rest["params"])


@pytest.mark.parametrize("groups", [[3], [{"lr": 0.1}]])
def test_a_malformed_checkpoint(groups: list[object]) -> None:
    optimizer = DFW(make_model().parameters())
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="parameter group 0 is none"):
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
    assert optimizer.state_dict() == before


def test_a_checkpoint_from_before_unfreezing_says_what_to_do() -> None:
    frozen, model = make_model(), make_model()
    frozen[1].requires_grad_(False)
    saved = ProjectedDFW(param_groups(frozen)).state_dict()
    optimizer = ProjectedDFW(param_groups(model))
    with pytest.raises(ValueError, match="freeze it, load, then unfreeze"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("loss", [1e39, 10**400, -(10**400)])
def test_a_number_that_no_float32_holds_skips_the_step(loss: float) -> None:
    model = make_model()
    optimizer = DFW(model.parameters())
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(4, 6)).square().mean().backward()
    assert optimizer.step(loss=loss) == loss
    assert optimizer.skipped_steps == 1
    torch.testing.assert_close(model.state_dict(), before)


def test_skipped_steps_do_not_warn_again() -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = ProjectedDFW([p])
    with torch.no_grad():
        p.mul_(2)
    p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="changed from outside"):
        optimizer.step(loss=math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(loss=math.nan)
