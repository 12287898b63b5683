"""The example's --float-epochs: float weights first, which are then quantized."""

import math
from pathlib import Path

import cifar_resnet20
import pytest
from resnet20 import checkpoint
from resnet20.data import Data
from resnet20.distributed import Team
from resnet20.errors import UserError
from resnet20.optimizers import attach
from resnet20.settings import Settings
from resnet20.straight_through import layers, plain_state
from resnet20.training import Run, train
from test_example_training import assert_same
from torch import nn

EVERYONE = pytest.mark.parametrize(
    ("net", "optimizer"),
    [("binary", "dfw"), ("xnor", "dfw"), ("ternary", "dfw"), ("ternary", "sgd"), ("xnor", "adam")],
)


def choose(**given: object) -> Settings:
    small = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 4, "float_epochs": 2}
    return Settings.choose(small | given)


def levels(run: Run) -> set[int]:
    """How many magnitudes there are in an output channel of the inner convolutions."""
    state = plain_state(run.model)
    names = [
        f"{name}.weight"
        for name, module in run.model.named_modules()
        if isinstance(module, nn.Conv2d) and name.startswith("blocks")
    ]
    assert len(names) == 18
    return {len(set(channel.flatten().abs().tolist())) for n in names for channel in state[n]}


@EVERYONE
def test_weights_are_float_and_then_quantized(net: str, optimizer: str, digits: Data) -> None:
    run = Run(choose(net=net, optimizer=optimizer), digits)
    rows = []
    for many in (True, True, False, False):
        rows.append(run.train_epoch())
        assert (max(levels(run)) > 3) == many
        assert math.isnan(rows[-1]["flip_rate"]) == many
    rates = [row["lr"] for row in rows]
    assert rates == sorted(rates, reverse=True)  # one schedule over both parts
    assert rates[1] > 0.5 * run.settings.lr > rates[2]


@pytest.mark.parametrize("optimizer", ["dfw", "adam", "sgd"])
def test_it_is_a_float_run_and_then_one_that_starts_from_its_weights(
    optimizer: str, digits: Data
) -> None:
    settings = choose(net="ternary", optimizer=optimizer, lr=0.01, epochs=3)
    run = Run(settings, digits)
    alone = Run(
        choose(
            net="float",
            optimizer=optimizer,
            lr=0.01,
            epochs=3,
            float_epochs=0,
            weight_decay=settings.weight_decay,
        ),
        digits,
    )
    for _ in range(2):
        run.train_epoch()
        alone.train_epoch()
    assert_same(run.state_dict()["model"], alone.state_dict()["model"])
    assert_same(run.state_dict()["optimizer"], alone.state_dict()["optimizer"])

    later = Run(settings, digits)
    later.model.load_state_dict(alone.model.state_dict())
    later.optimizer = attach(later.model, settings, 3 * later.steps_per_epoch)
    later._layers = layers(later.model)
    for _ in later.steps(2):
        pass
    run.train_epoch()
    assert_same(run.model.state_dict(), later.model.state_dict())
    assert_same(run.optimizer.state_dict(), later.optimizer.state_dict())


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
@pytest.mark.parametrize(
    ("net", "optimizer", "average"),
    [
        ("xnor", "dfw", None),
        ("ternary", "dfw", 0.5),
        ("ternary", "sgd", 0.5),
        ("xnor", "adam", None),
    ],
)
def test_resumed_run_ends_bit_for_bit_the_same(
    net: str,
    optimizer: str,
    average: float | None,
    stopped_after: int,
    digits: Data,
    tmp_path: Path,
) -> None:
    settings = choose(net=net, optimizer=optimizer, average=average)
    assert_resumes(settings, stopped_after, digits, tmp_path)


def assert_resumes(settings: Settings, stopped_after: int, digits: Data, tmp_path: Path) -> None:
    """A run that stops after so many epochs and is resumed ends as one that does not stop."""
    straight = Run(settings, digits)
    for _ in range(settings.epochs):
        straight.train_epoch()

    first = Run(settings, digits)
    for _ in range(stopped_after):
        first.train_epoch()
    checkpoint.save(tmp_path, first.state_dict())
    second = train(settings, digits, tmp_path, resume=True)
    assert_same(second.state_dict(), straight.state_dict())
    assert_same(second.result.state_dict(), straight.result.state_dict())


def test_what_it_says_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--limit=64", "--batch-size=16", "--threads=1", "--device=cpu", "--amp=off"]
    job += ["--net=binary", "--epochs=2", "--float-epochs=1"]
    out, file = tmp_path / "run", tmp_path / "net.dfw"
    assert cifar_resnet20.main([*job, "--out", str(out), "--export", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "smoothed SVM loss, first 1 epochs float;" in printed[1]
    assert "flips" not in printed[2]
    assert "flips" in printed[3]
    before = file.read_bytes()
    assert len(before) < 60_000  # a bit a weight
    assert cifar_resnet20.main(["--resume", "--out", str(out), "--export", str(file)]) == 0
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"float_epochs": 4}, r"--float-epochs 4 must be less than the 4 of --epochs"),
        ({"net": "float"}, "--float-epochs is for nets whose weights are quantized later"),
        ({"optimizer": "parq", "net": "binary"}, "parq starts from float by itself"),
    ],
)
def test_what_does_not_go_together(given: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose(**given)


@pytest.mark.parametrize("job", ["--table", "--bench=1"])
def test_not_with_other_jobs(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar_resnet20.main([job, "--float-epochs=1"]) == 2
    assert f"--float-epochs does not go with {job.partition('=')[0]}" in capsys.readouterr().err


def test_it_is_part_of_the_run(digits: Data) -> None:
    with pytest.raises(UserError, match="has --float-epochs 2, not 1"):
        choose().moved({"float_epochs": 1})
    with pytest.raises(UserError, match="--float-epochs is for one process"):
        Run(choose(), digits, Team(0, 2))
    stored = choose(float_epochs=0).to_dict()
    del stored["float_epochs"]
    assert Settings.of_checkpoint(stored).float_epochs == 0
