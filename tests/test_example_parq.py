"""The example's --optimizer parq: torchao's optimizer, by the recipe of its authors."""

import builtins
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cifar_resnet20
import pytest
import torch
from resnet20 import checkpoint, nets
from resnet20.data import Data
from resnet20.errors import UserError
from resnet20.settings import Settings
from resnet20.training import Run, train
from test_example_training import assert_same
from torch import Tensor, nn

from dfw_opt import load_packed

LEVELS = {"binary": 2, "ternary": 3}
NETS = pytest.mark.parametrize("net", LEVELS)
ARCHES = pytest.mark.parametrize("arch", nets.ARCHES)
JOB = ["--optimizer=parq", "--limit=48", "--batch-size=16", "--threads=1", "--device=cpu"]
JOB += ["--amp=off", "--epochs=2"]


def choose(**given: object) -> Settings:
    small = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 4, "optimizer": "parq"}
    return Settings.choose(small | given)


def inner(model: nn.Module) -> list[Tensor]:
    blocks = model.get_submodule("blocks").modules()
    return [m.weight.detach() for m in blocks if isinstance(m, nn.Conv2d)]


def levels_per_channel(weight: Tensor) -> int:
    return max(len(channel.unique()) for channel in weight)


def test_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = builtins.__import__

    def without(
        name: str,
        variables: Mapping[str, object] | None = None,
        local: Mapping[str, object] | None = None,
        names: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name.partition(".")[0] == "torchao":
            raise ModuleNotFoundError("No module named 'torchao'", name="torchao")
        return original(name, variables, local, names, level)

    monkeypatch.setattr(builtins, "__import__", without)
    assert cifar_resnet20.main([*JOB, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "error: the Python package torchao is missing; in a copy of the repository run: "
        f"{shlex.quote(sys.executable)} -m pip install -e '.[peers]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_it_does_not_train() -> None:
    for net in ("float", "xnor"):
        with pytest.raises(UserError, match="--optimizer parq is for --net binary and ternary"):
            choose(net=net)
    with pytest.raises(UserError, match="--average is for the optimizers dfw, adam and sgd"):
        choose(average=0.9)


def test_recipe() -> None:
    settings = choose()
    assert (settings.net, settings.loss, settings.schedule) == ("binary", "ce", "parq")
    assert (settings.lr, settings.momentum, settings.weight_decay) == (0.1, 0.9, 2e-4)


@NETS
@ARCHES
def test_weights_end_quantized(arch: str, net: str, digits: Data) -> None:
    pytest.importorskip("torchao")
    run = Run(choose(arch=arch, net=net), digits)
    start = [weight.clone() for weight in inner(run.model)]
    run.train_epoch()
    assert max(map(levels_per_channel, inner(run.model))) > 3  # on the way
    for _ in range(3):
        run.train_epoch()
    weights = inner(run.model)
    assert len(weights) == len(start) > 10
    for weight, old in zip(weights, start, strict=True):
        assert not torch.equal(weight, old)
        for channel in weight:
            values = channel.unique()
            assert 2 <= len(values) <= LEVELS[net]
            scale = channel.abs().max()
            allowed = torch.stack(
                (-scale, scale) if net == "binary" else (-scale, 0 * scale, scale)
            )
            assert bool(torch.isin(values, allowed).all())
    for float_weight in (run.model.conv.weight, run.model.linear.weight):
        assert levels_per_channel(float_weight) > 3
    # The latents are still there, and not what the network computes with.
    latents = [run.optimizer.state[p]["latent"] for p in run.optimizer.param_groups[0]["params"]]
    assert min(map(levels_per_channel, latents)) > 3


def test_weight_decay_is_that_of_the_recipe(digits: Data) -> None:
    pytest.importorskip("torchao")
    run = Run(choose(), digits)
    names = {id(p): name for name, p in run.model.named_parameters()}
    decays = {
        names[id(p)]: group["weight_decay"]
        for group in run.optimizer.param_groups
        for p in group["params"]
    }
    assert len(decays) == len(names)
    for name, decay in decays.items():
        assert decay == (0.0 if name.endswith("bias") else 2e-4)


@NETS
@pytest.mark.parametrize("done", [1, 3], ids=["annealing", "annealed"])
def test_resumed_run_ends_bit_for_bit_the_same(
    net: str, done: int, digits: Data, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    settings = choose(net=net)
    straight = Run(settings, digits)
    first = Run(settings, digits)
    for epoch in range(4):
        straight.train_epoch()
        if epoch < done:
            first.train_epoch()
    checkpoint.save(tmp_path, first.state_dict())
    first.train_epoch()  # lost
    assert_same(train(settings, digits, tmp_path, resume=True).state_dict(), straight.state_dict())


def test_too_short_to_anneal(digits: Data) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match="--optimizer parq needs more steps"):
        Run(choose(epochs=1, batch_size=48), digits)
    run = Run(choose(epochs=2, batch_size=48), digits)
    run.train_epoch()
    run.train_epoch()
    assert max(map(levels_per_channel, inner(run.model))) == 2


@NETS
def test_from_the_command_line(
    net: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    out, file = tmp_path / "run", tmp_path / "net.dfw"
    assert cifar_resnet20.main([*JOB, "--net", net, "--out", str(out), "--export", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith(f"{net} ResNet-20 (")
    assert "parq, lr 0.1, cross-entropy loss" in printed[1]
    plain = load_packed(nets.build(net, "resnet", 5), file)
    trained = checkpoint.load(out)["model"]
    assert all(torch.equal(value, trained[key]) for key, value in plain.state_dict().items())
    assert max(map(levels_per_channel, inner(plain))) == LEVELS[net]


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    assert cifar_resnet20.main([*JOB, "--bench=1"]) == 0
    out = capsys.readouterr().out
    for name in ("float, sgd", "binary, parq", "ternary, parq"):
        assert f"| {name} |" in out
