"""The example's --average: what is averaged, judged, kept and exported."""

import csv
from pathlib import Path

import cifar_resnet20
import pytest
import torch
from resnet20 import checkpoint, data, training
from resnet20.data import Data
from resnet20.distributed import Team
from resnet20.errors import UserError
from resnet20.settings import Settings
from resnet20.straight_through import TernaryConv2d, layers, plain_state
from resnet20.training import Run, train
from test_example_training import assert_same
from torch import nn

PAIRS = pytest.mark.parametrize(
    ("net", "optimizer"),
    [("float", "dfw"), ("xnor", "dfw"), ("ternary", "dfw"), ("ternary", "sgd"), ("xnor", "adam")],
)


def choose(**given: object) -> Settings:
    small = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 2, "average": 0.5}
    return Settings.choose(small | given)


@PAIRS
def test_resumed_run_ends_bit_for_bit_the_same(
    net: str, optimizer: str, digits: Data, tmp_path: Path
) -> None:
    settings = choose(net=net, optimizer=optimizer)
    straight = Run(settings, digits)
    for _ in range(2):
        straight.train_epoch()

    first = Run(settings, digits)
    first.train_epoch()
    checkpoint.save(tmp_path, first.state_dict())
    second = train(settings, digits, tmp_path, resume=True)
    assert_same(second.state_dict(), straight.state_dict())
    assert_same(second.result.state_dict(), straight.result.state_dict())


@PAIRS
def test_training_does_not_notice(net: str, optimizer: str, digits: Data) -> None:
    with_average = Run(choose(net=net, optimizer=optimizer), digits)
    without = Run(choose(net=net, optimizer=optimizer, average=None), digits)
    torch.manual_seed(3)
    for run in (with_average, without):
        run.train_epoch()
        run.train_epoch()
    assert_same(with_average.model.state_dict(), without.model.state_dict())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("optimizer", ["dfw", "sgd"])
def test_latents_are_averaged_and_the_average_is_quantized(optimizer: str, digits: Data) -> None:
    run = Run(choose(net="ternary", optimizer=optimizer, lr=1.0), digits)

    def latents() -> list[torch.Tensor]:
        if optimizer == "sgd":
            return [layer.weight.detach().clone() for layer in layers(run.model)]
        return [
            run.optimizer.state[p]["latent"].clone()
            for p in run.optimizer.param_groups[0]["params"]
        ]

    images, labels = next(run.augmenter.epoch(0, 0, 16))
    expected: list[torch.Tensor] = []
    for _ in range(3):
        run.train_step(images, labels)
        new = latents()
        expected = [(a + b) / 2 for a, b in zip(expected or new, new, strict=True)]
    assert run.average is not None
    if optimizer == "sgd":
        found = [layer.weight for layer in layers(run.average.model)]
    else:
        found = [v for k, v in run.average.state_dict().items() if k.endswith("/latent")]
    assert len(found) == len(expected) == 18
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b)
    weights = plain_state(run.average.model)
    inner = [v for k, v in weights.items() if "conv" in k and k.startswith("blocks")]
    assert len(inner) == 18
    assert all(len(set(w.flatten().tolist())) == 3 for w in inner)


def test_norms_are_estimated_on_the_average_itself(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_BATCHES_FOR_NORMS", 2)
    run = Run(choose(net="xnor", optimizer="dfw", epochs=1), digits)
    row = run.train_epoch()
    assert run.average is not None
    norm, trained = (m.get_submodule("norm") for m in (run.average.model, run.model))
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(trained, nn.BatchNorm2d)
    first = run.average.model.get_submodule("conv")
    batches = [images for images, _ in run.augmenter.epoch(0, 0, 16)][:2]
    means = torch.stack([first(images).mean((0, 2, 3)) for images in batches])
    assert norm.running_mean is not None
    assert trained.running_mean is not None
    torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained.running_mean, norm.running_mean)
    assert (row["average_loss"], row["average_accuracy"]) == run.evaluate(run.average.model)
    assert row["average_loss"] != row["held_out_loss"]


def test_what_it_leaves_and_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--limit=64", "--batch-size=16", "--threads=1", "--device=cpu", "--amp=off"]
    job += ["--net=ternary", "--optimizer=sgd", "--epochs=2", "--average=0.5"]
    out, file = tmp_path / "run", tmp_path / "net.dfw"
    assert cifar_resnet20.main([*job, "--out", str(out), "--export", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    with (out / "metrics.csv").open() as table:
        row = list(csv.DictReader(table))[-1]
    own, average = (100 * float(row[name]) for name in ("test_accuracy", "average_accuracy"))
    assert "cross-entropy loss, average 0.5;" in printed[1]
    assert printed[-3] == (
        f"test accuracy {own:.2f} %, of the average {average:.2f} % after 2 epochs"
    )
    assert printed[-1].endswith(f"test accuracy after reloading {average:.2f} %")

    state = checkpoint.load(out)
    run = Run(Settings.of_checkpoint(state["settings"]), data.load(None, limit=64))
    run.load_state_dict(state)
    assert any(isinstance(layer, TernaryConv2d) for layer in layers(run.result))
    before = file.read_bytes()
    assert cifar_resnet20.main(["--resume", "--out", str(out), "--export", str(file)]) == 0
    assert file.read_bytes() == before


def test_a_run_from_before_averages(digits: Data, tmp_path: Path) -> None:
    run = Run(choose(average=None), digits)
    run.train_epoch()
    state = run.state_dict()
    del state["average"], state["settings"]["average"], state["settings"]["arch"]
    checkpoint.save(tmp_path, state)
    settings = Settings.of_checkpoint(checkpoint.load(tmp_path)["settings"])
    assert settings == run.settings
    train(settings, digits, tmp_path, resume=True)
    with (tmp_path / "metrics.csv").open() as table:
        assert [row["average_loss"] for row in csv.DictReader(table)] == ["", ""]


def test_where_there_is_none(digits: Data) -> None:
    assert "average_loss" not in Run(choose(average=None, epochs=1), digits).train_epoch()
    with pytest.raises(UserError, match="--average is for one process"):
        Run(choose(), digits, Team(0, 2))
    with pytest.raises(UserError, match=r"has --average 0\.5, not 0\.9"):
        choose().moved({"average": 0.9})
