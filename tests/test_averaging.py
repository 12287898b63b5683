"""``AveragedModel``: averages of latents, quantized; never averages of quantized weights."""

# torch leaves backward(), split() and swa_utils untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from helpers import KINDS, Kind, everything, fingerprint, same_bits, to_numpy
from reference import Array
from test_copies import fit, make_model, make_optimizer
from test_training import digits
from torch import Tensor, nn
from torch.optim import SGD, swa_utils

from dfw_opt import (
    DFW,
    AveragedModel,
    ProjectedDFW,
    TernaryDFW,
    load_packed,
    param_groups,
    save_packed,
)
from dfw_opt.quantizers import QUANTIZERS, Pulled
from dfw_opt.quantizers.base import normalised_latent

# How γ is found makes no difference to an average.
_, BOX, BINARY, TERNARY = SOME = [kind for kind in KINDS if "closed_form" not in kind.name]
ALL_KINDS = pytest.mark.parametrize("kind", SOME, ids=str)
QUANTIZED = pytest.mark.parametrize("kind", [BINARY, TERNARY], ids=str)

# --------------------------------------------------------------------------------------------------
# The average, literally
# --------------------------------------------------------------------------------------------------

Mean = Callable[[Sequence[Array]], Array]


def equal_weights(values: Sequence[Array]) -> Array:
    return np.asarray(sum(values) / len(values))


def moving(values: Sequence[Array]) -> Array:
    average = values[0]
    for value in values[1:]:
        average = 0.7 * average + (1 - 0.7) * value
    return average


def ascending(values: Sequence[Array]) -> Array:
    """Weights 1, 2, 3, ..."""
    total = sum(weight * value for weight, value in enumerate(values, 1))
    return np.asarray(total / (len(values) * (len(values) + 1) / 2))


def ascending_avg_fn(average: Tensor, current: Tensor, number: Any) -> Tensor:
    result = average + (current - average) * 2 / (number + 2)
    assert isinstance(result, Tensor)
    return result


AVERAGES: dict[str, tuple[dict[str, Any], Mean]] = {
    "equal": ({}, equal_weights),
    "swa avg_fn": ({"avg_fn": swa_utils.get_swa_avg_fn()}, equal_weights),
    "swa multi": ({"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()}, equal_weights),
    "ema avg_fn": ({"avg_fn": swa_utils.get_ema_avg_fn(0.7)}, moving),
    "ema multi": ({"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.7)}, moving),
    "custom": ({"avg_fn": ascending_avg_fn}, ascending),
}
ALL_AVERAGES = pytest.mark.parametrize("average", AVERAGES)
VARIABLES = {
    None: (),
    "binary": ("latent",),
    "ternary": ("latent", "scale_pos", "scale_neg"),
}


class Literal:
    """Remembers what the optimizer holds; averages and quantizes it in float64 numpy."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.history: dict[str, list[dict[str, Array]]] = {}

    def group_of(self, p: Tensor) -> dict[str, Any]:
        for group in self.optimizer.param_groups:
            if any(p is other for other in group["params"]):
                assert isinstance(group, dict)
                return group
        return {"quantizer": None}

    def collect(self) -> None:
        for name, p in self.model.named_parameters():
            state = self.optimizer.state.get(p, {})
            keys = VARIABLES[self.group_of(p).get("quantizer")]
            values = {key: to_numpy(state[key]) for key in keys} or {"": to_numpy(p)}
            self.history.setdefault(name, []).append(values)

    def weights(self, mean: Mean) -> dict[str, Array]:
        result = {}
        for name, p in self.model.named_parameters():
            past = self.history[name]
            averages = {key: mean([values[key] for values in past]) for key in past[0]}
            group = self.group_of(p)
            if group.get("quantizer") is None:
                result[name] = averages[""]
            else:
                unit = float(self.optimizer.state[p]["unit"])
                result[name] = quantized(averages, unit, group)
        return result

    def mean_of_weights(self) -> dict[str, Array]:
        """What must not be: the mean of Q(u)."""
        result = {}
        for name, p in self.model.named_parameters():
            group = self.group_of(p)
            if group.get("quantizer") is not None:
                unit = float(self.optimizer.state[p]["unit"])
                past = [quantized(values, unit, group) for values in self.history[name]]
                result[name] = equal_weights(past)
        return result


class InUnits(Literal):
    """Remembers latents in the network's own scale, for a unit that changes."""

    def units(self) -> dict[str, float]:
        parameters = self.model.named_parameters()
        states = {name: self.optimizer.state.get(p, {}) for name, p in parameters}
        return {name: float(state["unit"]) for name, state in states.items() if "unit" in state}

    def collect(self) -> None:
        super().collect()
        for name, unit in self.units().items():
            self.history[name][-1] = {k: unit * v for k, v in self.history[name][-1].items()}

    def weights(self, mean: Mean) -> dict[str, Array]:
        kept = self.history
        self.history = dict(kept)
        for name, unit in self.units().items():
            self.history[name] = [{k: v / unit for k, v in x.items()} for x in kept[name]]
        result = super().weights(mean)
        self.history = kept
        return result


def quantized(values: dict[str, Array], unit: float, group: dict[str, Any]) -> Array:
    settings = reference.Settings(
        quantizer=group["quantizer"], radius=group["radius"], threshold=group.get("threshold", 0)
    )
    parameter = reference.make_parameter(values["latent"], settings)
    assert not isinstance(parameter, reference.FloatParameter)
    parameter.unit, parameter.latent.value = unit, values["latent"]
    if isinstance(parameter, reference.TernaryParameter):
        parameter.scale_pos.value = values["scale_pos"]
        parameter.scale_neg.value = values["scale_neg"]
    return parameter.forward()


def assert_weights(averaged: AveragedModel, expected: dict[str, Array], rtol: float = 1e-6) -> None:
    """To what torch's equal weights are good for: it rounds 1/n to float32."""
    names = [name for name, _ in averaged.module.named_parameters()]
    assert names == list(expected)
    for name, p in averaged.module.named_parameters():
        value = torch.from_numpy(expected[name])
        torch.testing.assert_close(p.detach().double(), value, rtol=rtol, atol=rtol)


def quantized_names(model: nn.Module, optimizer: Any) -> dict[str, str]:
    """Which parameters are quantized, and how."""
    literal = Literal(model, optimizer)
    how = {name: literal.group_of(p).get("quantizer") for name, p in model.named_parameters()}
    return {name: quantizer for name, quantizer in how.items() if quantizer is not None}


def assert_quantized(module: nn.Module, names: dict[str, str]) -> None:
    """One magnitude in each channel of a binary weight, two in a ternary one beside 0."""
    assert names
    for name, quantizer in names.items():
        weight = module.get_parameter(name).detach()
        if quantizer == "binary":
            for channel in weight:
                assert len(channel.abs().unique()) == 1
        else:
            assert len(weight[weight > 0].unique()) <= 1
            assert len(weight[weight < 0].unique()) <= 1


def state_of(averaged: AveragedModel) -> Any:
    return fingerprint(dict(averaged.state_dict()))


class TestFormula:
    @ALL_KINDS
    @ALL_AVERAGES
    def test_literal(self, kind: Kind, average: str) -> None:
        settings, mean = AVERAGES[average]
        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer, **settings), Literal(model, optimizer)
        for number in range(8):
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_weights(averaged, literal.weights(mean), 1e-6 if mean is equal_weights else 1e-9)
            if kind.quantized:
                assert_quantized(averaged.module, quantized_names(model, optimizer))
        assert averaged.n_averaged == 8
        for name, weights in literal.mean_of_weights().items():
            difference = to_numpy(averaged.module.get_parameter(name)) - weights
            assert np.abs(difference).max() > 1e-3 * np.abs(weights).max()

    @ALL_KINDS
    @pytest.mark.parametrize("fused", [False, True])
    def test_in_float32(self, kind: Kind, fused: bool) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model, lr=1.0, fused=fused)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(6):
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_weights(averaged, literal.weights(equal_weights), rtol=2e-5)

    @QUANTIZED
    def test_options_of_the_group(self, kind: Kind) -> None:
        """Its threshold and its radius are those of the average."""
        options = {"threshold": 0.4} if "ternary" in kind.name else {}
        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0, radius=0.8, **options)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(5):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
        assert_weights(averaged, literal.weights(equal_weights))

    def test_two_quantizers_in_one_optimizer(self) -> None:
        model = make_model().double()
        first, *others = param_groups(model)
        assert len(first["params"]) == 2
        groups = [
            first | {"params": first["params"][:1], "quantizer": "binary"},
            first | {"params": first["params"][1:], "quantizer": "ternary"},
            *others,
        ]
        optimizer = TernaryDFW(groups, lr=1.0)
        assert set(quantized_names(model, optimizer).values()) == {"binary", "ternary"}
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(5):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
        assert_weights(averaged, literal.weights(equal_weights))
        assert_quantized(averaged.module, quantized_names(model, optimizer))

    @ALL_KINDS
    def test_first_is_the_model(self, kind: Kind) -> None:
        """To the bit: at construction, and after the first update."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 2)
        averaged = AveragedModel(model, optimizer)
        for _ in range(2):
            for mine, p in zip(averaged.module.parameters(), model.parameters(), strict=True):
                assert mine is not p
                assert same_bits(mine, p)
            fit(model, optimizer, 3)
            averaged.update_parameters(model)

    @ALL_KINDS
    @pytest.mark.parametrize("average", ["equal", "ema multi"])
    def test_of_equals(self, kind: Kind, average: str) -> None:
        """No training, no change: to the bit."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        fit(model, optimizer, 3)
        averaged = AveragedModel(model, optimizer, **AVERAGES[average][0])
        for _ in range(7):
            averaged.update_parameters(model)
        for mine, p in zip(averaged.module.parameters(), model.parameters(), strict=True):
            assert same_bits(mine, p)

    @ALL_AVERAGES
    def test_of_float_networks_is_torchs(self, average: str) -> None:
        settings, _ = AVERAGES[average]
        model = make_model().double()
        optimizer = DFW(model.parameters(), lr=1.0)
        averaged = AveragedModel(model, optimizer, **settings)
        expected = swa_utils.AveragedModel(model, **settings)
        for number in range(6):
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
            expected.update_parameters(model)
            ours, theirs = averaged.module.state_dict(), expected.module.state_dict()
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)

    def test_box(self) -> None:
        model = make_model()
        optimizer = make_optimizer(BOX, model, lr=10.0)
        averaged = AveragedModel(model, optimizer)
        for number in range(20):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            assert all((p.abs() <= 0.5).all() for p in averaged.module.parameters())

    def test_quantizer_of_ones_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its state holds nothing but a latent and a unit."""

        class Quarters:
            variables = {"latent": None}  # noqa: RUF012
            derived = ()
            options = ()

            def start(self, weight: Tensor, group: Any) -> dict[str, Tensor]:
                latent, unit = normalised_latent(weight, group["radius"])
                return {"latent": latent, "unit": unit}

            def derive(self, state: dict[str, Tensor], group: Any) -> dict[str, Tensor]:
                return {}

            def quantize(self, state: dict[str, Tensor], group: Any) -> Tensor:
                return state["unit"] * (state["latent"] * 4).round() / 4

            def pull_back(self, grad: Tensor, state: dict[str, Tensor], group: Any) -> Any:
                unit = state["unit"]
                return {"latent": Pulled(grad / unit, unit.square())}

        monkeypatch.setitem(QUANTIZERS, "quarters", Quarters())
        model = make_model().double()
        optimizer = ProjectedDFW(param_groups(model), lr=1.0, quantizer="quarters")
        averaged, latents = AveragedModel(model, optimizer), []
        weight = model.get_parameter("3.weight")
        for number in range(5):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            latents.append(to_numpy(optimizer.state[weight]["latent"]))
        expected = float(optimizer.state[weight]["unit"]) * (4 * equal_weights(latents)).round() / 4
        found = averaged.module.get_parameter("3.weight").detach()
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=0)


class TestAlwaysQuantized:
    @QUANTIZED
    @ALL_AVERAGES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_at_any_time(self, kind: Kind, average: str, dtype: torch.dtype) -> None:
        model = make_model().to(dtype)
        optimizer = make_optimizer(kind, model, lr=1.0)
        names = quantized_names(model, optimizer)
        averaged = AveragedModel(model, optimizer, **AVERAGES[average][0])
        assert_quantized(averaged.module, names)
        for number in range(5):
            fit(model, optimizer, 1, seed=number)
            assert_quantized(averaged.module, names)
            averaged.update_parameters(model)
            assert_quantized(averaged.module, names)
            assert all(p.dtype == dtype for p in averaged.module.parameters())

    def test_latents_are_averaged_in_float32(self) -> None:
        """In a bfloat16 model too, where a small change of the mean would be rounded away."""
        model = make_model().bfloat16()
        optimizer = make_optimizer(BINARY, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(20):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
        expected = literal.weights(equal_weights)
        for name in quantized_names(model, optimizer):
            value = torch.from_numpy(expected[name]).bfloat16()
            found = averaged.module.get_parameter(name).detach()
            assert same_bits(found.sign(), value.sign())
            torch.testing.assert_close(found, value, rtol=2**-8, atol=0)  # one rounding


class TestBuffers:
    @ALL_KINDS
    def test_copied(self, kind: Kind) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer)
        for number in range(3):
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
            mine = dict(averaged.module.named_buffers())
            for name, buffer in model.named_buffers():
                assert same_bits(mine[name], buffer)
                assert mine[name] is not buffer

    @ALL_KINDS
    @ALL_AVERAGES
    def test_averaged(self, kind: Kind, average: str) -> None:
        """As torch does it, whole numbers included."""
        if average == "swa multi":
            pytest.skip("which torch cannot apply to the number of batches")
        model = make_model()
        optimizer = make_optimizer(kind, model)
        settings = AVERAGES[average][0]
        averaged = AveragedModel(model, optimizer, use_buffers=True, **settings)
        expected = swa_utils.AveragedModel(model, use_buffers=True, **settings)
        for number in range(4):
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
            expected.update_parameters(model)
            mine = dict(averaged.module.named_buffers())
            for name, buffer in expected.module.named_buffers():
                torch.testing.assert_close(mine[name], buffer, rtol=1e-5, atol=1e-7)

    def test_update_bn(self) -> None:
        """On real digits: afterwards the statistics are those of the averaged network's inputs."""
        torch.manual_seed(0)
        images = digits()[0][:300].reshape(300, 64)
        model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        optimizer = ProjectedDFW([{"params": [model[0].weight]}, rest_of(model, "0.weight")])
        averaged = AveragedModel(model, optimizer)
        for number in range(4):
            optimizer.zero_grad()
            labels = digits()[1][:300]
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step(loss=loss)
            averaged.update_parameters(model)
            assert averaged.n_averaged == number + 1
        before = [p.detach().clone() for p in averaged.module.parameters()]
        state = everything(optimizer), fingerprint(dict(model.state_dict()))
        swa_utils.update_bn([(batch,) for batch in images.split(100)], averaged)
        assert (everything(optimizer), fingerprint(dict(model.state_dict()))) == state
        for p, old in zip(averaged.module.parameters(), before, strict=True):
            assert same_bits(p, old)
        with torch.no_grad():
            weight = averaged.module.get_parameter("0.weight")
            inputs = images @ weight.T + averaged.module.get_parameter("0.bias")
        batches = inputs.split(100)
        mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
        variance = torch.stack([batch.var(0) for batch in batches]).mean(0)
        buffers = dict(averaged.module.named_buffers())
        torch.testing.assert_close(buffers["1.running_mean"], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(buffers["1.running_var"], variance, rtol=1e-4, atol=1e-5)
        assert buffers["1.num_batches_tracked"] == 3


def rest_of(model: nn.Module, *names: str) -> dict[str, Any]:
    """All parameters but these, as floats."""
    params = [p for name, p in model.named_parameters() if name not in names]
    return {"params": params, "quantizer": None, "radius": None}


class TestOriginal:
    @ALL_KINDS
    @pytest.mark.parametrize("fused", [False, True])
    def test_is_not_disturbed(self, kind: Kind, fused: bool) -> None:
        """Not by a bit, nor the random numbers."""
        results = []
        for averaging in (False, True):
            model = make_model()
            torch.manual_seed(3)
            optimizer = make_optimizer(kind, model, fused=fused)
            if averaging:
                averaged = AveragedModel(model, optimizer, use_buffers=False)
            for number in range(4):
                fit(model, optimizer, 1, seed=number)
                if averaging:
                    averaged.update_parameters(model)
                    averaged(torch.zeros(2, 1, 4, 4)).sum().backward()
                    swa_utils.update_bn([torch.ones(4, 1, 4, 4)], averaged)
                    averaged.load_state_dict(averaged.state_dict())
            state = dict(model.state_dict()), torch.get_rng_state()
            results.append((everything(optimizer), fingerprint(state)))
        assert results[0] == results[1]

    @QUANTIZED
    def test_shares_no_memory(self, kind: Kind) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer)
        averaged.update_parameters(model)
        state = state_of(averaged)
        own = {t.untyped_storage().data_ptr() for t in averaged.state_dict().values()}
        others = [*model.state_dict().values()]
        others += [value for p in model.parameters() for value in optimizer.state[p].values()]
        assert not own & {t.untyped_storage().data_ptr() for t in others}
        fit(model, optimizer, 3)
        assert state_of(averaged) == state

    def test_forward(self) -> None:
        model = make_model()
        optimizer = make_optimizer(BINARY, model)
        averaged = AveragedModel(model, optimizer)
        x = torch.randn(5, 1, 4, 4)
        averaged.eval()
        assert not averaged.module.training
        assert model.training
        assert same_bits(averaged(x), averaged.module(x))


class TestStateDict:
    @ALL_KINDS
    @ALL_AVERAGES
    def test_continues(self, kind: Kind, average: str) -> None:
        """A whole run is saved, loaded into fresh objects, and goes on to the bit."""
        settings = AVERAGES[average][0]
        model = make_model()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer, **settings)
        for number in range(3):
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), averaged.state_dict()], file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        torch.manual_seed(99)
        other = make_model()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)  # so that nothing is right unless it has been loaded
        its_optimizer = make_optimizer(kind, other)
        its_average = AveragedModel(other, its_optimizer, **settings)
        its_average.load_state_dict(saved[2], strict=True)
        other.load_state_dict(saved[0])
        its_optimizer.load_state_dict(saved[1])
        assert state_of(its_average) == state_of(averaged)
        for number in range(3, 6):
            fit(model, optimizer, 2, seed=number)
            fit(other, its_optimizer, 2, seed=number)
            averaged.update_parameters(model)
            its_average.update_parameters(other)
            assert state_of(its_average) == state_of(averaged)
        assert its_average.n_averaged == 6

    @QUANTIZED
    def test_carries_the_latents(self, kind: Kind) -> None:
        """All that is averaged, and no momentum."""
        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(3):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
        state = averaged.state_dict()
        averages = {key: value for key, value in state.items() if key.startswith("averages.")}
        assert not any("momentum" in key for key in averages)
        expected = set(state) - set(averages)
        assert expected == {"n_averaged", *(f"module.{name}" for name in model.state_dict())}
        for name in quantized_names(model, optimizer):
            latent = equal_weights([values["latent"] for values in literal.history[name]])
            assert any(
                value.shape == latent.shape and np.allclose(to_numpy(value), latent, rtol=1e-6)
                for value in averages.values()
            )

    def test_of_another_model_is_refused(self) -> None:
        model, other = make_model(), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        averaged = AveragedModel(model, make_optimizer(BINARY, model))
        its_average = AveragedModel(other, DFW(other.parameters()))
        with pytest.raises(RuntimeError, match="Missing key"):
            averaged.load_state_dict(its_average.state_dict())


class TestChanges:
    """What may happen to a model and its optimizer between two updates."""

    @QUANTIZED
    def test_unfrozen_later(self, kind: Kind) -> None:
        model = make_model().double()
        weight = model.get_parameter("3.weight").requires_grad_(False)
        frozen = weight.detach().clone()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged = AveragedModel(model, optimizer, **AVERAGES["ema multi"][0])
        for number in range(3):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            torch.testing.assert_close(averaged.module.get_parameter("3.weight"), frozen)

        weight.requires_grad_(True)
        literal = Literal(model, optimizer)
        for number in range(3, 7):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_quantized(averaged.module, quantized_names(model, optimizer))
            # An average begins with the first latents that there are.
            expected = torch.from_numpy(literal.weights(moving)["3.weight"])
            found = averaged.module.get_parameter("3.weight").detach()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @QUANTIZED
    def test_unfrozen_later_and_saved(self, kind: Kind) -> None:
        model = make_model()
        weight = model.get_parameter("3.weight").requires_grad_(False)
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer)
        fit(model, optimizer, 1)
        averaged.update_parameters(model)
        weight.requires_grad_(True)
        fit(model, optimizer, 1)
        averaged.update_parameters(model)

        other = make_model()
        its_average = AveragedModel(other, make_optimizer(kind, other))
        its_average.load_state_dict(averaged.state_dict(), strict=True)
        assert state_of(its_average) == state_of(averaged)

    @QUANTIZED
    def test_frozen_later(self, kind: Kind) -> None:
        """It has latents still, and they are averaged on."""
        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(6):
            if number == 3:
                model.get_parameter("3.weight").requires_grad_(False)
                model.zero_grad()
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_weights(averaged, literal.weights(equal_weights))

    @QUANTIZED
    def test_group_added_later(self, kind: Kind) -> None:
        model = make_model().double()
        late = model.get_parameter("3.weight")
        first, *others = param_groups(model)
        early = [p for p in first["params"] if p is not late]
        assert len(early) == 1
        optimizer = kind.optimizer([first | {"params": early}, *others], lr=1.0, **kind.settings)
        averaged = AveragedModel(model, optimizer, **AVERAGES["ema avg_fn"][0])
        for number in range(2):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
        optimizer.add_param_group(first | {"params": [late]})
        literal = Literal(model, optimizer)
        for number in range(2, 5):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_quantized(averaged.module, quantized_names(model, optimizer))
            expected = torch.from_numpy(literal.weights(moving)["3.weight"])
            found = averaged.module.get_parameter("3.weight").detach()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    @ALL_KINDS
    def test_checkpoint_of_the_same_run(self, kind: Kind) -> None:
        """Going back a few steps, as after a NaN, is just another model to average."""
        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(6):
            if number == 2:
                saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            if number == 4:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            fit(model, optimizer, 2, seed=number)
            averaged.update_parameters(model)
            literal.collect()
        assert_weights(averaged, literal.weights(equal_weights))

    @ALL_KINDS
    def test_checkpoint_of_another_run(self, kind: Kind) -> None:
        """Loaded when everything has been made, before the first update: units differ."""
        torch.manual_seed(5)
        origin = make_model().double()
        with torch.no_grad():
            for p in origin.parameters():
                p.mul_(torch.rand(()) + 0.5)
        its_optimizer = make_optimizer(kind, origin, lr=1.0)
        fit(origin, its_optimizer, 3)

        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        model.load_state_dict(origin.state_dict())
        optimizer.load_state_dict(its_optimizer.state_dict())
        for number in range(3):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_weights(averaged, literal.weights(equal_weights))

    @QUANTIZED
    @pytest.mark.parametrize("average", ["equal", "ema avg_fn", "ema multi"])
    @pytest.mark.parametrize("whose", ["optimizer's", "average's"])
    def test_checkpoint_in_other_units(self, kind: Kind, average: str, whose: str) -> None:
        """Of another run, loaded between two updates: what is averaged is unit times latent."""
        settings, mean = AVERAGES[average]
        model = make_model().double()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer, **settings), InUnits(model, optimizer)
        for number in range(3):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()

        torch.manual_seed(5)
        other = make_model().double()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(3 * torch.rand(()) + 0.5)
        its_optimizer = make_optimizer(kind, other, lr=1.0)
        fit(other, its_optimizer, 2)
        if whose == "optimizer's":
            model.load_state_dict(other.state_dict())
            optimizer.load_state_dict(its_optimizer.state_dict())
        else:  # the other run takes the average over
            state = averaged.state_dict()
            averaged = AveragedModel(other, its_optimizer, **settings)
            averaged.load_state_dict(state)
            model, optimizer = other, its_optimizer
            literal.model, literal.optimizer = model, optimizer
        for number in range(3):
            if number:
                fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            literal.collect()
            assert_weights(averaged, literal.weights(mean))
            assert_quantized(averaged.module, quantized_names(model, optimizer))

    @QUANTIZED
    def test_skipped_steps(self, kind: Kind) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer)
        fit(model, optimizer, 2)
        averaged.update_parameters(model)
        module = fingerprint(dict(averaged.module.state_dict()))
        optimizer.step(loss=float("nan"))
        assert optimizer.skipped_steps == 1
        averaged.update_parameters(model)
        assert fingerprint(dict(averaged.module.state_dict())) == module


class TestModels:
    def test_wrapped(self) -> None:
        """A wrapper has the same parameters, so it is the same model."""
        model = make_model().double()
        optimizer = make_optimizer(BINARY, model, lr=1.0)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        wrappers = model, nn.Sequential(model), torch.compile(model, backend="eager")
        for number, wrapper in enumerate(wrappers):
            fit(model, optimizer, 1, seed=number)
            assert isinstance(wrapper, nn.Module)
            averaged.update_parameters(wrapper)
            literal.collect()
        assert_weights(averaged, literal.weights(equal_weights))

    def test_tied(self) -> None:
        """One parameter twice is one average."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        model[2].weight = model[0].weight
        optimizer = ProjectedDFW([{"params": [model[0].weight]}, rest_of(model, "0.weight")])
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(4):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step(loss=loss)
            averaged.update_parameters(model)
            literal.collect()
        assert_weights(averaged, literal.weights(equal_weights))
        module = averaged.module
        assert isinstance(module, nn.Sequential)
        assert module[0].weight is module[2].weight

    def test_other_optimizer_beside_it(self) -> None:
        """Float parameters may be trained by any other; they are averaged too."""
        model = make_model().double()
        quantized_group, *rest = param_groups(model)
        optimizer = ProjectedDFW([quantized_group], lr=1.0)
        other = SGD([p for group in rest for p in group["params"]], lr=0.05)
        averaged, literal = AveragedModel(model, optimizer), Literal(model, optimizer)
        for number in range(4):
            other.zero_grad()
            fit(model, optimizer, 1, seed=number)
            other.step()
            averaged.update_parameters(model)
            literal.collect()
            assert_weights(averaged, literal.weights(equal_weights))

    def test_frozen_everything(self) -> None:
        model = make_model().requires_grad_(False)
        optimizer = DFW(model.parameters())
        averaged = AveragedModel(model, optimizer)
        averaged.update_parameters(model)
        averaged.update_parameters(model)
        for mine, p in zip(averaged.module.parameters(), model.parameters(), strict=True):
            assert same_bits(mine, p)


class TestPlacement:
    def test_device(self) -> None:
        model = make_model()
        optimizer = make_optimizer(TERNARY, model)
        averaged = AveragedModel(model, optimizer, device=torch.device("cpu"))
        fit(model, optimizer, 1)
        averaged.update_parameters(model)
        assert all(value.is_cpu for value in averaged.state_dict().values())

    def test_meta(self) -> None:
        """All of it is placed where it was asked for."""
        model = make_model()
        optimizer = make_optimizer(TERNARY, model)
        before = everything(optimizer)
        averaged = AveragedModel(model, optimizer, device=torch.device("meta"))
        assert all(value.is_meta for value in averaged.state_dict().values())
        assert everything(optimizer) == before

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    @QUANTIZED
    def test_on_the_host(self, kind: Kind) -> None:
        """Training on a GPU, averages on the CPU; then both moved."""
        model = make_model().cuda()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer, device=torch.device("cpu"))
        beside = AveragedModel(model, optimizer)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step(loss=1.0)
            averaged.update_parameters(model)
            beside.update_parameters(model)
        for mine, p in zip(averaged.module.parameters(), beside.module.parameters(), strict=True):
            assert mine.is_cpu
            assert p.is_cuda
            torch.testing.assert_close(mine, p.cpu())

    @QUANTIZED
    @pytest.mark.parametrize("average", ["equal", "ema avg_fn"])
    def test_wider_averages(self, kind: Kind, average: str) -> None:
        """Of a bfloat16 model, in float32: as with torch, the average may be of another dtype."""
        settings, mean = AVERAGES[average]
        model = make_model().bfloat16()
        optimizer = make_optimizer(kind, model, lr=1.0)
        averaged = AveragedModel(model, optimizer, **settings).float()
        expected = swa_utils.AveragedModel(model, **settings).float()
        literal = Literal(model, optimizer)
        for number in range(4):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
            expected.update_parameters(model)
            literal.collect()
        weights, names = literal.weights(mean), quantized_names(model, optimizer)
        for name, p in averaged.module.named_parameters():
            assert p.dtype == torch.float32
            if name in names:
                value = torch.from_numpy(weights[name]).float()
                torch.testing.assert_close(p.detach(), value, rtol=1e-4, atol=1e-6)
            else:
                torch.testing.assert_close(p, expected.module.get_parameter(name))


class TestCopies:
    @pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_is_a_model(self, way: Callable[[Any], Any]) -> None:
        """A copy is as good for inference; it has no optimizer, and says so."""
        model = make_model()
        optimizer = make_optimizer(BINARY, model)
        averaged = AveragedModel(model, optimizer)
        for number in range(3):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
        twin = way(averaged)
        assert state_of(twin) == state_of(averaged)
        x = torch.randn(3, 1, 4, 4)
        assert same_bits(twin.eval()(x), averaged.eval()(x))
        before = state_of(twin)
        with pytest.raises(RuntimeError, match=r"is a copy.*AveragedModel\(.*load_state_dict"):
            twin.update_parameters(model)
        assert state_of(twin) == before

        # A new one takes over.
        heir = AveragedModel(model, optimizer)
        heir.load_state_dict(twin.state_dict())
        fit(model, optimizer, 1, seed=9)
        heir.update_parameters(model)
        averaged.update_parameters(model)
        assert state_of(heir) == state_of(averaged)

    def test_optimizer_is_no_more(self) -> None:
        """The average does not keep it alive."""
        model = make_model()
        optimizer = make_optimizer(BINARY, model)
        averaged = AveragedModel(model, optimizer)
        averaged.update_parameters(model)
        before = state_of(averaged)
        del optimizer
        with pytest.raises(RuntimeError, match=r"optimizer .* is no more"):
            averaged.update_parameters(model)
        assert state_of(averaged) == before
        averaged(torch.zeros(2, 1, 4, 4))


class TestErrors:
    """Refused before anything changes."""

    @pytest.mark.parametrize("other", [None, SGD, "model"])
    def test_optimizer_of_another_kind(self, other: Any) -> None:
        model = make_model()
        optimizer: Any = SGD(model.parameters(), lr=0.1) if other is SGD else other
        with pytest.raises(TypeError, match=r"torch\.optim\.swa_utils\.AveragedModel"):
            AveragedModel(model, optimizer)

    def test_two_functions(self) -> None:
        model = make_model()
        both: dict[str, Any] = {
            "avg_fn": swa_utils.get_ema_avg_fn(),
            "multi_avg_fn": swa_utils.get_ema_multi_avg_fn(),
        }
        with pytest.raises(AssertionError, match="Only one"):
            AveragedModel(model, make_optimizer(BINARY, model), **both)

    @ALL_KINDS
    @pytest.mark.parametrize("updates", [0, 2])
    @pytest.mark.parametrize(
        "change",
        ["fewer", "more", "another shape", "a shape that could be broadcast", "buffers"],
    )
    def test_model_of_another_structure(self, kind: Kind, updates: int, change: str) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer)
        for number in range(updates):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
        layers = list(model)
        if change == "fewer":
            layers[-1] = nn.Linear(8, 3, bias=False)
        elif change == "more":
            layers.append(nn.Linear(3, 3))
        elif change == "another shape":
            layers[-1] = nn.Linear(8, 5)
        elif change == "a shape that could be broadcast":
            layers[-1] = nn.Linear(8, 1)
        else:
            layers[4] = nn.BatchNorm2d(6, track_running_stats=False)
        other = nn.Sequential(*layers)
        fit(model, optimizer, 1, seed=5)
        before = state_of(averaged)
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            averaged.update_parameters(other)
        assert state_of(averaged) == before

    @pytest.mark.parametrize("updates", [0, 2])
    def test_parameters_for_buffers(self, updates: int) -> None:
        """As many tensors of the same shapes in the same order, but of another kind."""

        class Scale(nn.Module):
            def __init__(self, trained: bool) -> None:
                super().__init__()
                self.scale: Tensor
                if trained:
                    self.scale = nn.Parameter(torch.ones(8))
                else:
                    self.register_buffer("scale", torch.ones(8))

        first = nn.Linear(8, 8)
        model = nn.Sequential(first, Scale(trained=True))
        optimizer = ProjectedDFW([{"params": [first.weight]}, rest_of(model, "0.weight")])
        averaged = AveragedModel(model, optimizer)
        for _ in range(updates):
            averaged.update_parameters(model)
        before = state_of(averaged)
        other = nn.Sequential(first, Scale(trained=False))
        with pytest.raises(ValueError, match="parameters is 2, but 3 in the average"):
            averaged.update_parameters(other)
        assert state_of(averaged) == before
        other = nn.Sequential(*model, Scale(trained=False))
        with pytest.raises(ValueError, match="buffers is 1, but 0 in the average"):
            averaged.update_parameters(other)
        assert state_of(averaged) == before

    @QUANTIZED
    @pytest.mark.parametrize("updates", [0, 2])
    def test_model_of_others(self, kind: Kind, updates: int) -> None:
        """A copy: its parameters are not the optimizer's, and would be averaged as floats."""
        model = make_model()
        optimizer = make_optimizer(kind, model)
        averaged = AveragedModel(model, optimizer)
        for number in range(updates):
            fit(model, optimizer, 1, seed=number)
            averaged.update_parameters(model)
        fit(model, optimizer, 3, seed=5)
        before = state_of(averaged)
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            averaged.update_parameters(copy.deepcopy(model))
        assert state_of(averaged) == before

    @QUANTIZED
    def test_model_of_another_optimizer(self, kind: Kind) -> None:
        model = make_model()
        optimizer = make_optimizer(kind, model)
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            AveragedModel(make_model(), optimizer)


class TestPacked:
    @QUANTIZED
    def test_is_small(self, kind: Kind, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 128), nn.Linear(128, 4))
        optimizer = kind.optimizer(param_groups(model), lr=1.0)
        averaged = AveragedModel(model, optimizer)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(16, 8, generator=generator)
            loss = (model(x) - x[:, :4]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
            averaged.update_parameters(model)
        path = tmp_path / "averaged.dfw"
        save_packed(averaged.module, path)
        bits = 1 if kind is BINARY else 1.6
        floats = sum(p.numel() for p in model.parameters()) - 128 * 128
        assert path.stat().st_size < 4 * floats + bits * 128 * 128 / 8 + 4 * 128 + 1000
        loaded = load_packed(
            nn.Sequential(nn.Linear(8, 128), nn.Linear(128, 128), nn.Linear(128, 4)), path
        )
        for (name, value), mine in zip(
            loaded.state_dict().items(), averaged.module.state_dict().values(), strict=True
        ):
            assert same_bits(value, mine), name


class TestDigits:
    """With a learning rate that stays large the weights keep jumping; their average does not."""

    @pytest.mark.parametrize(
        ("optimizer", "seed"),
        [(ProjectedDFW, 0), (ProjectedDFW, 1), (ProjectedDFW, 2), (TernaryDFW, 0), (TernaryDFW, 1)],
    )
    def test_average_is_better(self, optimizer: Any, seed: int) -> None:
        x, y, x_test, y_test = digits()
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 64, bias=False),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        trained = optimizer(param_groups(model), lr=1.0)
        averaged = AveragedModel(model, trained)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(4):
            for batch in torch.randperm(len(y), generator=generator).split(32):
                trained.zero_grad()
                loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
                loss.backward()
                trained.step(loss=loss)
                if epoch >= 2:
                    averaged.update_parameters(model)
        results = []
        for network in (model, averaged):
            # Both with the statistics of the training data: the weights alone make the difference.
            swa_utils.update_bn(x.split(350), network)
            network.eval()
            with torch.no_grad():
                scores = network(x_test)
            results.append(
                (
                    nn.functional.cross_entropy(scores, y_test).item(),
                    (scores.argmax(1) == y_test).float().mean().item(),
                )
            )
        (last_loss, last_accuracy), (loss_of_average, accuracy) = results
        assert_quantized(averaged.module, quantized_names(model, trained))
        assert loss_of_average < 0.75 * last_loss
        assert accuracy > last_accuracy
        assert accuracy > 0.95
