"""param_groups: where each weight goes, as what it is stepped, and that it can be seen."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any

import pytest
import torch
from helpers import assert_consistent, same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from dfw_opt import DFW, ProjectedDFW, TernaryDFW, param_groups

NORMS = pytest.mark.parametrize("norm", ["spectral", "euclidean"])
QUANTIZING = pytest.mark.parametrize("optimizer_class", [ProjectedDFW, TernaryDFW])


def around(*layers: nn.Module) -> nn.Sequential:
    """Layers between a first and a last one, which stay float."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 2))


def chosen(model: nn.Module, **options: Any) -> dict[str, list[str]]:
    """The names in each group, in order; each parameter is in one, and the names are right."""
    groups = param_groups(model, **options)
    by_name = dict(model.named_parameters())
    for group in groups:
        assert len(group["params"]) == len(group["param_names"])
        for name, p in zip(group["param_names"], group["params"], strict=True):
            assert p is by_name[name]
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(by_name)
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
        self.norm = nn.LayerNorm([3, 4])
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(5, 2)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


class TestWhere:
    @pytest.mark.parametrize("layer", LAYERS)
    @pytest.mark.parametrize("groups", [1, 2])
    @QUANTIZING
    @NORMS
    def test_convolutions_have_a_scale_per_output_channel(
        self, layer: Any, groups: int, optimizer_class: Any, norm: str
    ) -> None:
        """Of a transposed one they lie along the second dimension, once for each group of inputs.

        Against the layer itself: which weights an output depends on, autograd knows.
        """
        conv = layer(4, 6, 2, groups=groups, bias=False)
        model = around(conv)
        transposed = isinstance(conv, TRANSPOSED)
        name = "quantized transposed" if transposed else "quantized"
        assert chosen(model)[name] == ["1.weight"]
        (group,) = (g for g in param_groups(model) if g["name"] == name)
        expected = {"scale_axis": 1, "scale_groups": groups} if transposed else {}
        assert {k: v for k, v in group.items() if k.startswith("scale")} == expected
        optimizer = optimizer_class(param_groups(model), norm=norm, quantizer="binary")
        assert_consistent(optimizer)
        for channel in range(6):
            x = torch.ones(1, 4, *[2] * (conv.weight.dim() - 2), requires_grad=True)
            conv(x)[0, channel].sum().backward()
            (own,) = torch.autograd.grad(conv(x)[0, channel].sum(), conv.weight)
            magnitudes = conv.weight.detach()[own != 0].abs()
            assert magnitudes.numel() == conv.weight.numel() // 6
            assert magnitudes.unique().numel() == 1

    def test_other_parameters(self) -> None:
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
        layouts = {g["name"]: g.get("layout", "matrix") for g in param_groups(model)}
        assert layouts == {
            **dict.fromkeys(["quantized", "float"], "matrix"),
            "embedding": "rows",
            "stack": "stack",
        }
        for group in param_groups(model)[1:]:
            assert group["quantizer"] is group["radius"] is None

    def test_shared_weights(self) -> None:
        """With a layer of its kind: quantized, once. With the first, which is float: float."""
        shared = nn.Linear(4, 4)
        model = around(shared, nn.ReLU(), shared, nn.Linear(4, 4))
        model[4].weight = shared.weight
        assert chosen(model)["quantized"] == ["1.weight"]
        model[4].weight = model[0].weight
        assert chosen(model) == {
            "quantized": ["1.weight"],
            "float": ["0.weight", "0.bias", "1.bias", "4.bias", "5.weight", "5.bias"],
        }

    @pytest.mark.parametrize(
        ("layer", "names"),
        [
            (nn.MultiheadAttention(4, 2), ["1.in_proj_weight"]),
            (nn.LSTM(4, 4), ["1.weight_ih_l0", "1.weight_hh_l0"]),
            (nn.GRUCell(4, 4), ["1.weight_ih", "1.weight_hh"]),
            (nn.Bilinear(4, 4, 4), ["1.weight"]),
            (nn.BatchNorm1d(4), []),
            (nn.Embedding(4, 4), []),
        ],
        ids=lambda x: type(x).__name__,
    )
    def test_what_cannot_be_quantized_is_said(
        self, layer: nn.Module, names: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        model = around(layer)
        with caplog.at_level(logging.WARNING, logger="dfw_opt.param_groups"):
            groups = chosen(model)
        assert not any(name in groups["quantized"] for name in names)
        said = [r.getMessage() for r in caplog.records]
        assert said == [f"{name} stays float: it is no Conv or Linear layer's" for name in names]

    @pytest.mark.parametrize(
        "compute",
        [
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            parametrizations.weight_norm,
            nn.utils.spectral_norm,
            parametrizations.orthogonal,
        ],
        ids=["pruned", "weight_norm", "spectral_norm", "orthogonal"],
    )
    @QUANTIZING
    def test_computed_weights(
        self, compute: Any, optimizer_class: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """They stay float, with a warning; where all layers are such, an error says so."""
        model = around(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        compute(model[2])
        with caplog.at_level(logging.WARNING, logger="dfw_opt.param_groups"):
            assert chosen(model)["quantized"] == ["1.weight", "3.weight"]
        assert "2 stays float: its weight is computed" in caplog.text
        optimizer_class(param_groups(model))
        for number in (0, 1, 3, 4):
            compute(model[number])
        assert chosen(model)["quantized"] == []
        DFW(param_groups(model))
        with pytest.raises(ValueError, match=r"'quantized'.*empty.*whose weight is computed"):
            optimizer_class(param_groups(model))
        assert parametrize.is_parametrized(model[1]) or len(list(model[1].parameters())) >= 2

    def test_nothing_is_changed_or_printed(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = around(nn.Linear(4, 4).requires_grad_(False))
        before = copy.deepcopy(model.state_dict())
        assert chosen(model)["quantized"] == ["1.weight"]  # frozen as it is
        assert not any(p.requires_grad for p in model[1].parameters())
        for name, value in model.state_dict().items():
            assert same_bits(value, before[name])
        assert capsys.readouterr() == ("", "")

    def test_the_choice_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="dfw_opt.param_groups"):
            groups = chosen(around(nn.Linear(4, 4)))
        assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
            ("INFO", f"{name}: {', '.join(members)}") for name, members in groups.items()
        ]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
        self.body = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3))
        self.body2 = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


WEIGHTS = ["stem.0", "stem.1", "body.0", "body.2", "body2", "head"]


class TestSkip:
    @pytest.mark.parametrize(
        ("skip", "skipped"),
        [
            pytest.param(None, {"stem.0", "head"}, id="the first and the last"),
            pytest.param([], set(), id="nothing"),
            pytest.param("body2", {"body2"}, id="one name"),
            pytest.param(["head.weight", "body2"], {"head", "body2"}, id="name of a weight"),
            pytest.param("body", {"body.0", "body.2"}, id="a container, not a prefix"),
            pytest.param(("stem", "body.0"), {"stem.0", "stem.1", "body.0"}, id="nested"),
            pytest.param((n for n in ["head"]), {"head"}, id="generator"),
            pytest.param(
                lambda name, module: isinstance(module, nn.Linear), {"body2", "head"}, id="kind"
            ),
            pytest.param(
                lambda name, module: name.startswith("stem"), {"stem.0", "stem.1"}, id="by name"
            ),
            pytest.param(lambda name, module: True, {*WEIGHTS}, id="all"),
        ],
    )
    def test_forms(self, skip: Any, skipped: set[str]) -> None:
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
    def test_refused(self, skip: Any, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            param_groups(Net(), skip=skip)

    def test_parameters_for_a_model(self) -> None:
        model = Net()
        for wrong in (model.parameters(), list(model.named_parameters()), model.state_dict()):
            with pytest.raises(
                TypeError, match=rf"model={type(wrong).__name__} must .*param_groups\(model\)"
            ):
                param_groups(wrong)  # type: ignore[arg-type]


class TestOptimizers:
    @NORMS
    @pytest.mark.parametrize("optimizer_class", [DFW, ProjectedDFW, TernaryDFW])
    def test_serves_all(self, optimizer_class: Any, norm: str) -> None:
        """One list for two of them; all is trained, each group by its settings."""
        torch.manual_seed(0)
        model = Experts()
        groups = param_groups(model)
        before = [dict(group) for group in groups]
        optimizer = optimizer_class(groups, norm=norm)
        assert groups == before
        start = [p.detach().clone() for p in model.parameters()]

        def loss() -> Tensor:
            x = model.embedding(torch.arange(3)) + model.positions
            x = model.norm(torch.einsum("td,tde->te", x, model.experts)) * model.gain
            x = x + model.bag(torch.arange(5), torch.tensor([0, 1, 2]))
            x = torch.relu(model.middle(torch.relu(model.first(x))))
            total: Tensor = model.last(model.head(x)).square().mean() + 0.1
            return total

        values = []
        for _ in range(20):
            optimizer.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            values.append(float(optimizer.step(loss=value).detach()))
        assert min(values[-5:]) < values[0]
        assert not any(map(torch.equal, start, model.parameters()))
        quantized = len(model.middle.weight.detach().abs().unique()) <= 4
        assert quantized == (optimizer_class is not DFW)
        assert [g["param_names"] for g in optimizer.param_groups] == [
            g["param_names"] for g in before
        ]

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            nn.Sequential(nn.Linear(2, 2)),
            nn.Sequential(nn.BatchNorm1d(2)),
        ],
        ids=["two layers", "one layer", "no layer"],
    )
    @QUANTIZING
    def test_nothing_to_quantize(self, model: nn.Sequential, optimizer_class: Any) -> None:
        """DFW takes it. The others refuse it, and what the message advises works."""
        model = copy.deepcopy(model)
        start = [p.detach().clone() for p in model.parameters()]
        DFW(param_groups(model))
        with pytest.raises(
            ValueError,
            match=r"'quantized' to be quantized is empty.*"
            + re.escape(
                f"skip=[]) leaves out none, and {optimizer_class.__name__}(..., quantizer="
            ),
        ):
            optimizer_class(param_groups(model))
        assert all(map(same_bits, model.parameters(), start))
        optimizer_class(param_groups(model), quantizer=None)
        if isinstance(model[0], nn.Linear):
            optimizer_class(param_groups(model, skip=[]))
            assert len(model[0].weight[0].detach().abs().unique()) <= 2
