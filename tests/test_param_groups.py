"""param_groups: where each weight goes, as what it is stepped, and that it can be seen."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
from helpers import assert_consistent, same_bits
from kinds import BOTH_NORMS, CLASSES, QUANTIZING
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dfw_opt import DFW, param_groups

LOGGER = "dfw_opt.param_groups"


def around(*layers: nn.Module) -> nn.Sequential:
    """Layers between a first and a last one, which stay float."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 2))


def chosen(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    """The names in each group, in order; each parameter is in one, and the names are right."""
    groups = param_groups(model, **options)
    by_name = dict(model.named_parameters())
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(by_name)
    assert [id(by_name[name]) for name in names] == [id(p) for g in groups for p in g["params"]]
    return {group["name"]: group["param_names"] for group in groups}


class Experts(nn.Module):
    """Stacked matrices, a table of positions, and a weight that is tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.positions = nn.Parameter(torch.randn(3, 4))
        self.experts = nn.Parameter(torch.randn(3, 4, 4))
        self.gain = nn.Parameter(torch.ones(()))
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(5, 2)

    def loss(self) -> Tensor:
        x = self.embedding(torch.arange(3)) + self.positions
        x = self.norm(torch.einsum("td,tde->te", x, self.experts)) * self.gain
        x = x + self.bag(torch.arange(5), torch.tensor([0, 1, 2]))
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        result: Tensor = self.last(self.head(x)).square().mean() + 0.1
        return result


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *TRANSPOSED])
@pytest.mark.parametrize("groups", [1, 2])
@QUANTIZING
def test_convolutions_have_a_scale_per_output_channel(
    layer: Any, groups: int, optimizer_class: Any
) -> None:
    """Of a transposed one they lie along the second dimension, once for each group of inputs.

    Against the layer itself: which weights an output depends on, autograd knows.
    """
    conv = layer(4, 6, 2, groups=groups, bias=False)
    model = around(conv)
    name = "quantized transposed" if layer in TRANSPOSED else "quantized"
    assert chosen(model)[name] == ["1.weight"]
    assert_consistent(optimizer_class(param_groups(model), quantizer="binary"))
    x = torch.ones(1, 4, *[2] * (conv.weight.dim() - 2))
    for channel in range(6):
        (own,) = torch.autograd.grad(conv(x)[0, channel].sum(), conv.weight)
        magnitudes = conv.weight.detach()[own != 0].abs()
        assert magnitudes.numel() == conv.weight.numel() // 6
        assert magnitudes.max() == magnitudes.min()


def test_other_parameters() -> None:
    """Every kind has the group in which its steps suit it; what is shared is not quantized."""
    model = Experts()
    assert chosen(model) == {
        "quantized": ["middle.weight"],
        "float": [
            *("positions", "gain", "embedding.weight", "first.weight", "first.bias"),
            *("norm.weight", "norm.bias", "head.bias", "last.weight", "last.bias"),
        ],
        "embedding": ["bag.weight"],
        "stack": ["experts"],
    }
    layouts = {"float": "matrix", "embedding": "rows", "stack": "stack"}
    for group in param_groups(model)[1:]:
        assert group["quantizer"] is group["radius"] is None
        assert group["layout"] == layouts[group["name"]]


def test_shared_weights() -> None:
    """With a layer of its kind: quantized, once. With the first, which is float: float."""
    shared = nn.Linear(4, 4)
    model = around(shared, nn.ReLU(), shared, nn.Linear(4, 4))
    model[4].weight = shared.weight
    assert chosen(model)["quantized"] == ["1.weight"]
    model[4].weight = model[0].weight
    assert chosen(model)["quantized"] == ["1.weight"]
    assert chosen(model)["float"][:2] == ["0.weight", "0.bias"]
    transposed = around(*[nn.ConvTranspose1d(4, 4, 1, groups=groups) for groups in (1, 2, 1)])
    names = [(g["param_names"], g.get("scale_groups")) for g in param_groups(transposed)]
    assert names[0] == ([], None)
    assert names[2:] == [(["1.weight", "3.weight"], 1), (["2.weight"], 2)]


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.MultiheadAttention(4, 2), ["1.in_proj_weight"]),
        (nn.LSTM(4, 4), ["1.weight_ih_l0", "1.weight_hh_l0"]),
        (nn.GRUCell(4, 4), ["1.weight_ih", "1.weight_hh"]),
        (nn.Bilinear(4, 4, 4), ["1.weight"]),
        (nn.ParameterList([torch.ones(2, 2), torch.ones(2)]), ["1.0"]),
        (nn.BatchNorm1d(4), []),
        (nn.Embedding(4, 4), []),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_said(
    layer: nn.Module, names: list[str], caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    """All groups at INFO, and matrices that cannot be quantized as warnings; nothing is printed."""
    with caplog.at_level(logging.INFO, logger=LOGGER):
        groups = chosen(around(layer))
    warned = [f"{name} stays float: it is no Conv or Linear layer's" for name in names]
    told = [f"{name}: {', '.join(members) or 'none'}" for name, members in groups.items()]
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == warned
    assert [r.getMessage() for r in caplog.records if r.levelname == "INFO"] == told
    assert not any(name in groups["quantized"] for name in names)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),  # type: ignore[no-untyped-call]
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
    ],
    ids=["pruned", "weight_norm", "spectral_norm"],
)
@QUANTIZING
def test_computed_weights(
    compute: Any, optimizer_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They stay float, with a warning; where all layers are such, an error says so."""
    model = around(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    compute(model[2])
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        assert chosen(model)["quantized"] == ["1.weight", "3.weight"]
    assert "2 stays float: its weight is computed" in caplog.text
    for number in (0, 1, 3, 4):
        compute(model[number])
    assert chosen(model)["quantized"] == []
    DFW(param_groups(model))
    with pytest.raises(ValueError, match=r"'quantized'.*empty.*whose weight is computed"):
        optimizer_class(param_groups(model))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
        self.body = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
        self.body2 = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


WEIGHTS = ["stem.0", "stem.1", "body.0", "body.2", "body2", "head"]


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        (None, {"stem.0", "head"}),
        ([], set()),
        ("body2", {"body2"}),
        (["head.weight", "body2"], {"head", "body2"}),
        ("body", {"body.0", "body.2"}),  # a container, not a prefix
        (("stem", "body.0"), {"stem.0", "stem.1", "body.0"}),
        ((name for name in ["head"]), {"head"}),
        (lambda name, module: isinstance(module, nn.Linear), {"body2", "head"}),
        (lambda name, module: name.startswith("stem"), {"stem.0", "stem.1"}),
        (lambda name, module: True, {*WEIGHTS}),
    ],
)
def test_skip(skip: Any, skipped: set[str]) -> None:
    expected = [f"{name}.weight" for name in WEIGHTS if name not in skipped]
    assert chosen(Net(), skip=skip)["quantized"] == expected


@pytest.mark.parametrize(
    ("skip", "error", "match"),
    [
        (["stem", "nothing"], ValueError, "'nothing' matches no .*'stem.0', 'stem.1', 'body.0"),
        ("stem.0.bias", ValueError, "'stem.0.bias' matches no"),
        ("bod", ValueError, "'bod' matches no"),
        (["body.1"], ValueError, "'body.1' matches no"),
        ([2], TypeError, "2 must be a name"),
        (nn.Linear, TypeError, "must be names, or a predicate such as"),
        (nn.Linear(2, 2), TypeError, "must be names, or a predicate such as"),
    ],
)
def test_refused(skip: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        param_groups(Net(), skip=skip)
    for wrong in (Net().parameters(), list(Net().named_parameters())):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=rf"model={kind} must .*param_groups\(model\)"):
            param_groups(wrong)  # type: ignore[arg-type]


@BOTH_NORMS
@CLASSES
def test_serves_all_optimizers(optimizer_class: Any, norm: str) -> None:
    """The list is left as it is; all is trained, each group by its settings."""
    torch.manual_seed(0)
    model = Experts()
    groups = param_groups(model)
    before = [dict(group) for group in groups]
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_class(groups, norm=norm)
    assert groups == before
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        values.append(float(optimizer.step(loss=loss).detach()))
    assert min(values[-5:]) < values[0]
    assert not any(map(torch.equal, start, model.parameters()))
    levels = {abs(x) for x in model.middle.weight.flatten().tolist()}
    assert (len(levels) <= 4) == (optimizer_class is not DFW)
    assert [g["name"] for g in optimizer.param_groups] == [g["name"] for g in before]


@pytest.mark.parametrize("layers", [2, 1, 0])
@QUANTIZING
def test_nothing_to_quantize(layers: int, optimizer_class: Any) -> None:
    """DFW takes it. The others refuse it, and what the message advises works."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(layers)], nn.BatchNorm1d(2))
    start = copy.deepcopy(model.state_dict())
    DFW(param_groups(model))
    advice = f"remove that first; or {optimizer_class.__name__}(..., quantizer=None)"
    with pytest.raises(ValueError, match=f"'quantized' to be.* empty.*{re.escape(advice)}"):
        optimizer_class(param_groups(model))
    optimizer_class(param_groups(model), quantizer=None, radius=None)
    for name, value in model.state_dict().items():
        assert same_bits(value, start[name])
    if layers:
        optimizer_class(param_groups(model, skip=[]), quantizer="binary")
        weight = next(model.parameters())
        assert weight[0].abs().max() == weight[0].abs().min()
