"""Weights of a few bits: `ProjectedDFW(..., quantizer="uniform", bits=...)`."""

# torch leaves backward() and the application of a Function untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import pickle
from pathlib import Path
from typing import Any

import cifar_resnet20
import pytest
import reference
import torch
import uniform_ranks
from helpers import (
    FLOAT_GROUP,
    PATHS,
    TORCH_PATHS,
    UNIFORM,
    assert_consistent,
    clone_params,
    draw_gradients,
    everything,
    make_params,
    same_bits,
    to_numpy,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Results, World, launch
from reference import Settings
from resnet20.settings import Settings as ExampleSettings
from test_sharded import assert_equal_runs
from test_trajectories import assert_state, walk
from torch import Tensor, nn

from dfw_opt import (
    DFW,
    AveragedModel,
    ProjectedDFW,
    TernaryDFW,
    load_packed,
    param_groups,
    save_packed,
    summary,
)
from dfw_opt.fused import KINDS
from dfw_opt.quantizers import QUANTIZERS, Option, uniform

BITS = range(2, 9)
ALL_BITS = pytest.mark.parametrize("bits", BITS)
ALL_PATHS = pytest.mark.parametrize("path", PATHS)
UNIT = torch.tensor(0.37, dtype=torch.float64)


def draw(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Latents in the open box and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    latent = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
    return latent, torch.randn(shape, generator=generator, dtype=torch.float64)


def quantize(latent: Tensor, unit: Tensor, bits: int) -> Tensor:
    return uniform.quantize(latent, unit, uniform.largest_of_channel(latent), bits)


class RoundStraightThrough(torch.autograd.Function):
    """round forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gradient,) = grads
        return gradient


def surrogate(u: Tensor, bits: int) -> Tensor:
    """Q, whose rounding and whose scale autograd takes for what the module says of them."""
    q = (1 << (bits - 1)) - 1
    a = u.detach().abs().amax(dim=tuple(range(1, u.dim())), keepdim=True)
    rounded: Tensor = RoundStraightThrough.apply(q * u / a)
    return UNIT * a * rounded / q


shapes = st.sampled_from([(1, 1), (1, 5), (4, 1), (3, 4), (2, 3, 3), (4, 2, 3, 3)])


class TestFormula:
    @given(shapes, st.integers(0, 10**6), st.sampled_from(BITS))
    def test_pull_back_equals_autograd(self, shape: tuple[int, ...], seed: int, bits: int) -> None:
        latent, gradient = draw(shape, seed)
        u = latent.clone().requires_grad_()
        values = surrogate(u, bits)
        torch.testing.assert_close(quantize(latent, UNIT, bits), values.detach())
        (values * gradient).sum().backward()
        d, metric = uniform.pull_back(gradient, latent, UNIT)
        assert u.grad is not None
        assert metric is not None
        assert metric.dim() == 0
        torch.testing.assert_close(metric * d, u.grad, rtol=1e-12, atol=1e-14)

    @ALL_BITS
    def test_metric(self, bits: int) -> None:
        """M is the squared change of all weights per unit of a latent: by autograd."""
        latent, gradient = draw((3, 4), 1)
        jacobian = torch.autograd.functional.jacobian(lambda u: surrogate(u, bits), latent)
        changes = jacobian.square().sum(dim=(0, 1))
        _, metric = uniform.pull_back(gradient, latent, UNIT)
        assert metric is not None
        torch.testing.assert_close(changes, metric.expand(3, 4))

    def test_values(self) -> None:
        latent = torch.tensor([[1.0, 0.49, -0.51, -0.1], [0.1, 0.06, -0.04, -0.2]])
        expected = 2 * torch.tensor([[1.0, 1 / 3, -2 / 3, 0.0], [0.4 / 3, 0.2 / 3, -0.2 / 3, -0.2]])
        torch.testing.assert_close(quantize(latent, torch.tensor(2.0), 3), expected)
        # 0.1 lies in the middle of 0 and 0.2: it goes to 0, and above to 2/3 of 0.2, the even ones.
        expected = 2 * torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 0.0, 0.0, -0.2]])
        torch.testing.assert_close(quantize(latent, torch.tensor(2.0), 2), expected)

    @ALL_BITS
    def test_levels(self, bits: int) -> None:
        """2^bits − 1 of them in a channel, symmetric, all in use, the nearest one taken."""
        latent = draw((3, 20_000), bits)[0].float()
        unit = torch.tensor(0.37)
        values = quantize(latent, unit, bits)
        q = 2 ** (bits - 1) - 1
        for u, channel in zip(latent, values, strict=True):
            levels = channel.unique()
            assert len(levels) == 2 * q + 1
            assert torch.equal(levels, -levels.flip(0))
            assert levels[-1] == unit * u.abs().max()
            half = levels[-1].double() / q / 2
            assert ((channel.double() - 0.37 * u.double()).abs() <= half * (1 + 1e-4)).all()
        assert torch.equal(quantize(-latent, unit, bits), -values)

    @given(shapes, st.integers(0, 10**6), st.sampled_from(BITS))
    def test_whole_numbers_and_scale_give_every_bit(
        self, shape: tuple[int, ...], seed: int, bits: int
    ) -> None:
        """These and the largest weight of the channel are enough to make the weights anew."""
        values = quantize(draw(shape, seed)[0].float(), torch.tensor(0.37), bits)
        q = 2 ** (bits - 1) - 1
        most = uniform.largest_of_channel(values)
        k = (values / most * q).round().to(torch.int8)
        assert same_bits(torch.where(k == 0, 0.0, most * (k / q)), values)

    def test_zero_channel(self) -> None:
        """It stays 0, has no −0 in it, and can come back, as every latent has its gradient."""
        latent = torch.tensor([[0.0, -0.0], [0.5, -0.01]])
        values = quantize(latent, torch.tensor(1.0), 4)
        assert same_bits(values, torch.tensor([[0.0, 0.0], [0.5, 0.0]]))
        d, _ = uniform.pull_back(torch.ones(2, 2), latent, torch.tensor(2.0))
        assert torch.equal(d, torch.full((2, 2), 0.5))

    def test_tiny_channel(self) -> None:
        """The smallest number there is has a grid like any other."""
        latent = torch.tensor([[1e-45, -1e-45, 0.0]])
        values = quantize(latent, torch.tensor(1.0), 8)
        assert torch.equal(values, latent)


def uniform_group(**own: Any) -> dict[str, Any]:
    return {"quantizer": "uniform", "radius": 1.0, **own}


GROUPS: list[tuple[list[tuple[int, ...]], dict[str, Any]]] = [
    ([(3, 4), (2, 2, 2, 2)], uniform_group(lr=0.1)),
    ([(2, 6)], uniform_group(lr=0.5, momentum=0.5, weight_decay=0.1, radius=0.5, bits=2)),
    ([(2, 3)], uniform_group(lr=0.3, radius=None, bits=8)),
    ([(2, 5)], uniform_group(step_size="closed_form", bits=3)),
    ([(1, 1)], uniform_group(lr=0.03, momentum=0.0)),
    ([(5,)], {**FLOAT_GROUP, "lr": 0.2, "weight_decay": 1e-2}),
]


class TestSteps:
    @pytest.mark.parametrize("path", TORCH_PATHS)
    def test_trajectory(self, path: str) -> None:
        """A hundred steps against the literal transcription, in float64."""
        groups: list[dict[str, Any]] = []
        params: list[Any] = []
        own = []
        for number, (sizes, options) in enumerate(GROUPS):
            members = make_params(sizes, torch.float64, seed=number)
            groups.append({"params": members, **options})
            params += members
            own += [Settings(**options) for _ in members]
        expected = [
            reference.make_parameter(to_numpy(p), s) for p, s in zip(params, own, strict=True)
        ]
        optimizer: Any = ProjectedDFW(groups, **PATHS[path])
        tolerance = {"rtol": 1e-10, "atol": 1e-11}
        gammas = set()
        for _, loss, gradients in walk(expected):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = None if gradient is None else torch.tensor(gradient)
            gamma = reference.step(expected, loss, gradients)
            optimizer.step(loss=loss)
            assert float(optimizer.gamma) == pytest.approx(gamma, rel=1e-10, abs=1e-11)
            for p, e in zip(params, expected, strict=True):
                assert_state(optimizer, p, e, tolerance)
            gammas.add(gamma if gamma in (0.0, 1.0) else 0.5)
        assert gammas == {0.0, 0.5, 1.0}

    @ALL_PATHS
    @settings(max_examples=40)
    @given(data=st.data())
    def test_promises(self, path: str, data: st.DataObject) -> None:
        """After any step: latents in the box, parameters exactly Q of them, on their grid."""
        shape = data.draw(st.sampled_from([(1, 1), (1, 3), (4, 1), (3, 4), (2, 2, 3, 3)]))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
        bits = data.draw(st.sampled_from(BITS))
        params = make_params(
            (shape, (3,)), dtype, scale=data.draw(st.sampled_from([0.0, 1e-20, 0.3]))
        )
        optimizer = UNIFORM.make(
            params,
            bits=bits,
            lr=data.draw(st.sampled_from([1e-3, 0.1, 30.0])),
            momentum=data.draw(st.sampled_from([0.0, 0.9])),
            weight_decay=data.draw(st.sampled_from([0.0, 1e-2])),
            radius=data.draw(st.sampled_from([0.3, 1.0, None])),
            **PATHS[path],
        )
        for number in range(data.draw(st.integers(1, 4))):
            draw_gradients(params, number, data.draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6])))
            before = everything(optimizer)[0]
            optimizer.step(loss=data.draw(st.sampled_from([0.0, 1e-3, 1.0, 1e10, math.nan])))
            if math.isnan(float(optimizer.gamma)):
                assert everything(optimizer)[0] == before
            assert_consistent(optimizer)
            for channel in params[0]:
                assert len(channel.unique()) <= 2**bits - 1

    def test_kernels_leave_it_to_torch(self) -> None:
        """They do not know it: fused=True takes the same steps, to the bit."""
        assert "uniform" not in KINDS
        params = make_params(((40, 60), (50,)))
        twins = clone_params(params)
        left = UNIFORM.make(params, fused=True, foreach=None)
        right = UNIFORM.make(twins, fused=False, foreach=None)
        # The float group has kernels, whose sums are rounded otherwise: here it has no gradient.
        for number in range(4):
            for those, optimizer in ((params, left), (twins, right)):
                draw_gradients(those, number)
                those[1].grad = None
                optimizer.step(loss=0.5)
        assert same_bits(params[0], twins[0])
        assert same_bits(left.state[params[0]]["latent"], right.state[twins[0]]["latent"])

    def test_bits_of_a_group(self) -> None:
        """Two groups may differ, and a group may change: the next step has the new grid."""
        first, second = make_params(((2, 5000), (2, 5000)))
        groups: list[dict[str, Any]] = [{"params": [first], "bits": 2}, {"params": [second]}]
        optimizer = ProjectedDFW(groups, quantizer="uniform")
        assert [len(p[0].unique()) for p in (first, second)] == [3, 15]
        optimizer.param_groups[0]["bits"] = 3
        train(optimizer, [first, second], 1)
        assert [len(p[0].unique()) for p in (first, second)] == [7, 15]
        assert_consistent(optimizer)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


def trained(bits: int, steps: int = 3, **own: Any) -> tuple[nn.Sequential, Any]:
    model = make_model()
    optimizer = ProjectedDFW(param_groups(model), quantizer="uniform", bits=bits, **own)
    train(optimizer, list(model.parameters()), steps)
    return model, optimizer


class TestKeeping:
    def test_state_dict(self) -> None:
        """`bits` is a plain number of the group; one that loads it goes on as the other does."""
        model, optimizer = trained(3)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert [g["bits"] for g in saved["optimizer"]["param_groups"]] == [3, 3]
        fresh = make_model()
        fresh.load_state_dict(saved["model"])
        other = ProjectedDFW(param_groups(fresh), quantizer="uniform", bits=8)
        other.load_state_dict(saved["optimizer"])
        assert everything(other) == everything(optimizer)
        for m, o in ((model, optimizer), (fresh, other)):
            train(o, list(m.parameters()), 2, seed=1)
        assert everything(other) == everything(optimizer)
        assert_consistent(other)

    @pytest.mark.parametrize("quantizer", ["binary", "uniform"])
    def test_checkpoint_from_before_there_were_bits(self, quantizer: str) -> None:
        """Loads where nothing reads them, with the default; else they are missed."""
        model = make_model()
        optimizer = ProjectedDFW(param_groups(model), quantizer=quantizer)
        train(optimizer, list(model.parameters()), 2)
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            del group["bits"]
        fresh = make_model()
        fresh.load_state_dict(model.state_dict())
        other = ProjectedDFW(param_groups(fresh), quantizer=quantizer)
        if quantizer == "uniform":
            with pytest.raises(ValueError, match=r"lacks \['bits'\]"):
                other.load_state_dict(saved)
            return
        other.load_state_dict(saved)
        assert [group["bits"] for group in other.param_groups] == [4, 4]
        train(optimizer, list(model.parameters()), 2, seed=1)
        train(other, list(fresh.parameters()), 2, seed=1)
        weights = (m.get_parameter("2.weight") for m in (fresh, model))
        assert same_bits(*weights)

    def test_bad_bits_in_a_checkpoint(self) -> None:
        _, optimizer = trained(3)
        saved = optimizer.state_dict()
        saved["param_groups"][0]["bits"] = 9
        before = everything(optimizer)
        with pytest.raises(ValueError, match="bits=9 must be"):
            optimizer.load_state_dict(saved)
        assert everything(optimizer) == before

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, way: Any) -> None:
        model, optimizer = trained(3)
        twin, its_optimizer = way((model, optimizer))
        for m, o in ((model, optimizer), (twin, its_optimizer)):
            train(o, list(m.parameters()), 2, seed=1)
        assert everything(its_optimizer) == everything(optimizer)
        assert len(twin[2].weight[0].unique()) > 3

    def test_average(self) -> None:
        """The average of the latents is quantized like them."""
        model, optimizer = trained(3)
        averaged = AveragedModel(model, optimizer)
        for number in range(3):
            train(optimizer, list(model.parameters()), 1, seed=number)
            averaged.update_parameters(model)
        for channel in averaged.module.get_parameter("2.weight"):
            assert 3 < len(channel.unique()) <= 7

    @ALL_BITS
    def test_packed(self, bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Every bit comes back, and a weight takes as many bits as it was trained with."""
        model, _ = trained(bits)
        sizes = summary(model)
        expected = [("raw", 32), (f"uniform{bits}", bits), ("raw", 32)]
        assert [(layer.encoding, layer.bits) for layer in sizes.layers] == expected
        weights = model.get_parameter("2.weight").numel()
        assert sizes.quantized_weights == weights
        assert sizes.quantized_bytes == 16 * 4 + -(-weights * bits // 8)
        assert f"2      16x8x3x3     {bits}" in capsys.readouterr().out
        save_packed(model, tmp_path / "model.dfw")
        assert (tmp_path / "model.dfw").stat().st_size == sizes.file_bytes
        fresh = load_packed(make_model(), tmp_path / "model.dfw")
        images = torch.randn(5, 1, 8, 8)
        assert torch.equal(fresh(images), model(images))
        for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
            assert same_bits(p, q)


class TestErrors:
    @pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, 2.5, True, "4", None, math.nan])
    def test_bits(self, bits: Any) -> None:
        params = make_params(((3, 4), (2, 5)))
        before = clone_params(params)
        with pytest.raises(ValueError, match=r"^bits=.* must be .*a whole number from 2 to 8") as e:
            ProjectedDFW(params, quantizer="uniform", bits=bits)
        assert f"bits={bits!r} " in str(e.value)
        assert 'for 1 bit, quantizer="binary"' in str(e.value)
        with pytest.raises(ValueError, match="bits"):
            ProjectedDFW([{"params": params[:1]}, {"params": params[1:], "bits": bits}])
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))

    @pytest.mark.parametrize("bits", [1, 9, 0, 4.0, 10**400])
    def test_bits_that_turn_bad_during_training(self, bits: Any) -> None:
        """They are refused before a closure runs or anything moves."""
        model, optimizer = trained(3)
        before = clone_params(list(model.parameters()))
        quantized = optimizer.param_groups[0]["params"]
        latents = [optimizer.state[p]["latent"].clone() for p in quantized]
        optimizer.param_groups[0]["bits"] = bits
        with pytest.raises(ValueError, match="a whole number from 2 to 8"):
            optimizer.step(lambda: pytest.fail("the closure ran"))
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), before, strict=True))
        for p, latent in zip(quantized, latents, strict=True):
            assert same_bits(optimizer.state[p]["latent"], latent)

    @pytest.mark.parametrize(("before", "after"), [("uniform", "binary"), ("binary", "uniform")])
    def test_another_quantizer_during_training(self, before: str, after: str) -> None:
        """Both keep a latent and one number a channel, but not the same number."""
        (p,) = make_params(((3, 4),))
        optimizer = ProjectedDFW([p], quantizer=before)
        train(optimizer, [p], 2)
        kept = p.detach().clone()
        optimizer.param_groups[0]["quantizer"] = after
        with pytest.raises(ValueError, match=f"quantizer='{after}': the quantizer of a group"):
            train(optimizer, [p], 1)
        assert same_bits(p, kept)

    @pytest.mark.parametrize("optimizer", [DFW, TernaryDFW])
    def test_other_optimizers(self, optimizer: Any) -> None:
        (p,) = make_params(((3, 4),))
        with pytest.raises(ValueError, match=r"bits=4 is no setting .*; use ProjectedDFW"):
            optimizer([{"params": [p], "bits": 4}])

    def test_ternary_optimizer(self) -> None:
        (p,) = make_params(((3, 4),))
        with pytest.raises(ValueError, match=r"'uniform' must be .*; use ProjectedDFW"):
            TernaryDFW([p], quantizer="uniform")
        with pytest.raises(ValueError, match=r"'ternary' must be .*; use TernaryDFW"):
            ProjectedDFW([p], quantizer="ternary")

    def test_next_quantizer_brings_its_own_checks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An option is checked as its quantizer says, without a word of it anywhere else."""

        class Another(uniform._Uniform):
            options = (*uniform._Uniform.options, Option("offset", lambda x: x > 0, "big", "Mine"))

        class Mine(ProjectedDFW):
            def __init__(self, params: Any, offset: float) -> None:
                groups = [{"params": params, "quantizer": "another", "offset": offset}]
                super(ProjectedDFW, self).__init__(
                    groups, {**ProjectedDFW(make_params()[:1]).defaults, "offset": 1.0}
                )

        monkeypatch.setitem(QUANTIZERS, "another", Another())
        (p,) = make_params(((3, 4),))
        with pytest.raises(ValueError, match="offset=-1 must be big"):
            Mine([p], -1)
        with pytest.raises(ValueError, match=r"'another' must be .*; use Mine"):
            ProjectedDFW([p], quantizer="another")
        with pytest.raises(ValueError, match=r"offset=2 is no setting .*; use Mine"):
            ProjectedDFW([{"params": [p], "offset": 2}])
        assert Mine([p], 2).param_groups[0]["offset"] == 2


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(uniform_ranks.__file__, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(uniform_ranks.__file__, 4, tmp_path_factory.mktemp("four"))


@functools.cache
def alone(layout: str) -> dict[str, Any]:
    result: dict[str, Any] = getattr(uniform_ranks, layout)(World())
    return result


class TestSharded:
    @pytest.mark.parametrize(
        ("ranks", "layout"),
        [
            *itertools.product(("two", "four"), ("rows", "columns")),
            ("two", "tensor"),
            ("four", "tensor_and_rows"),
        ],
    )
    def test_equal_to_one_process(
        self, ranks: str, layout: str, request: pytest.FixtureRequest
    ) -> None:
        results: Results = request.getfixturevalue(ranks)
        for name in uniform_ranks.SETTINGS:
            assert_equal_runs([r[name] for r in results[layout]], alone(layout)[name])

    @pytest.mark.parametrize("ranks", ["two", "four"])
    def test_largest_of_a_channel(self, ranks: str, request: pytest.FixtureRequest) -> None:
        results: Results = request.getfixturevalue(ranks)
        assert set(results["parts"]) == {None}


class TestExample:
    def test_bits(self) -> None:
        assert ExampleSettings.choose({"net": "uniform"}).bits == 4
        assert ExampleSettings.choose({"net": "uniform", "bits": 2}).bits == 2
        assert ExampleSettings.choose({"net": "xnor"}).bits is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--net", "xnor", "--bits", "3"], "--bits is for --net uniform"),
            (["--net", "uniform", "--optimizer", "adam"], "--net uniform is for --optimizer dfw"),
        ],
    )
    def test_refused(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert cifar_resnet20.main([*arguments, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err

    def test_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        job = ["--net", "uniform", "--bits", "3", "--limit", "64", "--epochs", "1", "--amp", "off"]
        assert cifar_resnet20.main([*job, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
        saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
        weight = saved["model"]["blocks.0.conv1.weight"]
        assert {len(channel.unique()) for channel in weight} <= set(range(4, 8))
