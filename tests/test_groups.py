"""param_groups: which weights are quantized, and that it can be seen."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),  # 0: the first
        nn.BatchNorm2d(4),  # 1
        nn.Conv2d(4, 4, 3),  # 2
        nn.ReLU(),  # 3
        nn.Conv2d(4, 4, 1, bias=False),  # 4
        nn.Flatten(),  # 5
        nn.Linear(4, 6),  # 6
        nn.Linear(6, 2),  # 7: the last
    )


def names(model: nn.Module, groups: list[dict[str, Any]]) -> tuple[set[str], set[str]]:
    """Names in the quantized and in the float group; every parameter is in exactly one."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    result = []
    for wanted in ("quantized", "float"):
        members: list[Tensor] = [p for g in groups if g["name"] == wanted for p in g["params"]]
        assert len({id(p) for p in members}) == len(members)
        result.append({by_id[id(p)] for p in members})
    assert not result[0] & result[1]
    assert result[0] | result[1] == set(by_id.values())
    return result[0], result[1]


def test_first_and_last_stay_float() -> None:
    model = small_net()
    groups = param_groups(model)
    assert [group["name"] for group in groups] == ["quantized", "float"]
    quantized, _ = names(model, groups)
    assert quantized == {"2.weight", "4.weight", "6.weight"}


def test_settings_of_the_groups() -> None:
    """The quantized group leaves the settings to the optimizer; the float group is plain DFW."""
    quantized, rest = param_groups(small_net())
    assert set(quantized) == {"name", "params"}
    assert rest["quantizer"] is None
    assert rest["radius"] is None


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        pytest.param(["0", "7"], {"2.weight", "4.weight", "6.weight"}, id="names of modules"),
        pytest.param("4", {"0.weight", "2.weight", "6.weight", "7.weight"}, id="one name"),
        pytest.param(
            ["4.weight"], {"0.weight", "2.weight", "6.weight", "7.weight"}, id="name of a weight"
        ),
        pytest.param(
            [], {"0.weight", "2.weight", "4.weight", "6.weight", "7.weight"}, id="nothing"
        ),
        pytest.param(
            lambda name, module: isinstance(module, nn.Linear),
            {"0.weight", "2.weight", "4.weight"},
            id="predicate on the module",
        ),
        pytest.param(
            lambda name, module: name in ("0", "2"),
            {"4.weight", "6.weight", "7.weight"},
            id="predicate on the name",
        ),
    ],
)
def test_skip(skip: Any, expected: set[str]) -> None:
    model = small_net()
    assert names(model, param_groups(model, skip=skip))[0] == expected


def test_skip_takes_a_generator() -> None:
    model = small_net()
    quantized, _ = names(model, param_groups(model, skip=(name for name in ("0", "7"))))
    assert quantized == {"2.weight", "4.weight", "6.weight"}


def test_skip_a_container() -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)))
    model.add_module("body", nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)))
    model.add_module("body2", nn.Conv2d(2, 2, 3))
    quantized, _ = names(model, param_groups(model, skip=["stem", "body.0"]))
    assert quantized == {"body.1.weight", "body2.weight"}
    # A name is a name, not a prefix of characters.
    quantized, _ = names(model, param_groups(model, skip=["body", "stem"]))
    assert quantized == {"body2.weight"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 2, 3),
        nn.Conv2d(2, 2, 3),
        nn.Conv3d(2, 2, 3),
        nn.ConvTranspose1d(2, 2, 3),
        nn.ConvTranspose2d(2, 2, 3),
        nn.ConvTranspose3d(2, 2, 3),
        nn.Linear(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_kinds_of_layers(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), layer, nn.Linear(2, 2))
    assert names(model, param_groups(model))[0] == {"1.weight"}


def test_other_parameters_stay_float() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.matrix = nn.Parameter(torch.randn(2, 2))
            self.embedding = nn.Embedding(3, 2)
            self.middle = nn.Linear(2, 2)
            self.norm = nn.LayerNorm([2, 2])
            self.last = nn.Linear(2, 2)

    model = Net()
    assert names(model, param_groups(model))[0] == {"middle.weight"}


def test_subclasses_count() -> None:
    class MyConv(nn.Conv2d):
        pass

    model = nn.Sequential(nn.Conv2d(1, 1, 1), MyConv(1, 1, 1), nn.Conv2d(1, 1, 1))
    assert names(model, param_groups(model))[0] == {"1.weight"}


@pytest.mark.parametrize("skip", [["nothing"], "layer1", ["0", "7", "8"], ["2.bais"], ["0", "0.w"]])
def test_name_that_matches_nothing(skip: Any) -> None:
    wrong = skip if isinstance(skip, str) else skip[-1]
    with pytest.raises(ValueError, match=wrong.replace(".", r"\.")):
        param_groups(small_net(), skip=skip)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(nn.Linear(2, 2)),
        nn.Sequential(nn.BatchNorm1d(2)),
    ],
)
def test_nothing_left_to_quantize(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"(?i)quantize"):
        param_groups(model)


def test_predicate_that_skips_everything() -> None:
    with pytest.raises(ValueError, match=r"(?i)quantize"):
        param_groups(small_net(), skip=lambda name, module: True)


def test_tied_with_an_embedding_stays_float() -> None:
    """The embedding would look up quantized rows."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 2)
            self.first = nn.Linear(2, 2)
            self.middle = nn.Linear(2, 2)
            self.tied = nn.Linear(2, 4)
            self.tied.weight = self.embedding.weight
            self.last = nn.Linear(4, 2)

    model = Tied()
    quantized, rest = names(model, param_groups(model))
    assert quantized == {"middle.weight"}
    assert "embedding.weight" in rest


def test_tied_with_a_skipped_layer_stays_float() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    groups = param_groups(model)
    assert [id(p) for p in groups[0]["params"]] == [id(model[2].weight)]


def test_shared_module_appears_once() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2), shared, nn.ReLU(), shared, nn.Linear(2, 2))
    groups = param_groups(model)
    assert [id(p) for p in groups[0]["params"]] == [id(shared.weight)]


def test_no_other_parameters() -> None:
    """Then there is no float group."""
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(2)))
    groups = param_groups(model, skip=[])
    assert [group["name"] for group in groups] == ["quantized"]
    ProjectedDFW(groups)


def test_choice_is_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """At INFO, on the package's logger; nothing is printed."""
    with caplog.at_level(logging.INFO, logger="dfw_opt"):
        param_groups(small_net())
    text = "\n".join(r.getMessage() for r in caplog.records if r.name.split(".")[0] == "dfw_opt")
    assert all(record.levelno == logging.INFO for record in caplog.records)
    for name in ("2.weight", "4.weight", "6.weight"):
        assert name in text or name.removesuffix(".weight") in text
    captured = capsys.readouterr()
    assert not captured.out
    assert not captured.err


def test_frozen_weights_keep_their_place() -> None:
    """They are grouped like the others, so that they can be unfrozen later."""
    model = small_net()
    model[4].weight.requires_grad_(False)
    assert "4.weight" in names(model, param_groups(model))[0]


def test_model_is_not_changed() -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    param_groups(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])
def test_groups_fit_the_optimizers(optimizer_class: Any) -> None:
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_class(param_groups(model), lr=0.1)
    levels = 2 if optimizer_class is ProjectedDFW else 3
    for name, p in model.named_parameters():
        if name in ("2.weight", "4.weight", "6.weight"):
            assert "latent" in optimizer.state[p]
            for channel in p.detach():
                assert len(set(channel.flatten().tolist())) <= levels
        else:
            assert torch.equal(p, before[name])
    x = torch.randn(2, 3, 5, 5)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert 0 <= float(optimizer.gamma) <= 1


def test_names_survive_in_the_groups() -> None:
    """What was chosen can be seen in the optimizer."""
    optimizer = ProjectedDFW(param_groups(small_net()))
    assert [group["name"] for group in optimizer.param_groups] == ["quantized", "float"]


def test_dfw_takes_the_model_itself() -> None:
    model = small_net()
    optimizer = DFW(model.parameters())
    assert len(optimizer.param_groups) == 1


def test_tied_under_another_name_in_a_layer_stays_float() -> None:
    """A linear layer whose own weight would be quantized uses that of another as it is."""

    class Decoder(nn.Linear):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__(4, 4)
            self.back = other.weight

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert isinstance(model[1], nn.Linear)
    model.append(Decoder(model[1]))
    model.append(nn.Linear(4, 4))
    groups = param_groups(model)
    assert [id(p) for p in groups[0]["params"]] == [id(model[2].weight), id(model[3].weight)]
