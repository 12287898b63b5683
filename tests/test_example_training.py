"""The loop of the example: schedule, metrics, checkpoints, and going on from one."""

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from resnet20 import checkpoint, files, nets, report
from resnet20.data import Data
from resnet20.errors import UserError
from resnet20.meter import Meter
from resnet20.schedule import learning_rate
from resnet20.settings import Settings
from resnet20.straight_through import layers
from resnet20.training import Run, train
from torch import Tensor, nn

CPU = torch.device("cpu")


def choose(**given: object) -> Settings:
    small = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 3}
    return Settings.choose(small | given)


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, through dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b or (a != a and b != b)


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        return [learning_rate(schedule, 0.8, step, 8) for step in range(8)]

    assert rates("none") == [0.8] * 8
    parq = [learning_rate("parq", 0.8, step, 20) for step in range(20)]
    assert parq == pytest.approx([0.8] * 8 + [0.08] * 4 + [0.008] * 3 + [0.0008] * 5)
    assert rates("step") == pytest.approx([0.8] * 4 + [0.08] * 2 + [0.008] * 2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.zeros(1)], lr=0.8), T_max=8
    )
    expected = []
    for _ in range(8):
        expected += cosine.get_last_lr()
        cosine.optimizer.step()
        cosine.step()
    assert rates("cosine") == pytest.approx(expected)


def test_meter() -> None:
    meter = Meter(CPU)
    meter.add(torch.tensor(2.0), torch.tensor(3), 4, torch.tensor(0.5))
    meter.add(torch.tensor(math.nan), torch.tensor(0), 4, torch.tensor(math.nan))
    meter.add(torch.tensor(5.0), torch.tensor(2), 2, torch.tensor(1.0))
    loss, accuracy, gamma = meter.read()
    assert loss == pytest.approx((4 * 2 + 2 * 5) / 6)
    assert accuracy == pytest.approx(5 / 10)
    assert gamma == pytest.approx((4 * 0.5 + 2 * 1) / 6)
    without = Meter(CPU)
    without.add(torch.tensor(1.0), torch.tensor(1), 1)
    assert math.isnan(without.read()[2])


@pytest.mark.parametrize(
    ("net", "optimizer"),
    [("float", "dfw"), ("xnor", "dfw"), ("ternary", "dfw"), ("ternary", "sgd"), ("xnor", "adam")],
)
def test_resumed_run_ends_bit_for_bit_the_same(
    net: str, optimizer: str, digits: Data, tmp_path: Path
) -> None:
    settings = choose(net=net, optimizer=optimizer)
    straight = Run(settings, digits)
    for _ in range(3):
        straight.train_epoch()

    first = Run(settings, digits)
    first.train_epoch()
    checkpoint.save(tmp_path, first.state_dict())
    first.train_epoch()  # lost: it was stopped before the next checkpoint
    second = train(settings, digits, tmp_path, resume=True)
    assert_same(second.state_dict(), straight.state_dict())


def test_first_row_is_what_it_says(digits: Data) -> None:
    settings = choose(net="xnor", optimizer="dfw", epochs=2, lr=0.3, schedule="step")
    run = Run(settings, digits)
    signs = [p.detach().sign() for p in _inner(run)]
    row = run.train_epoch()
    assert row["epoch"] == 1
    assert row["lr"] == 0.3
    assert run.train_epoch()["lr"] == pytest.approx(0.003)

    run = Run(settings, digits)
    row = run.train_epoch()
    weights = _inner(run)
    flipped = sum(int((p.sign() != s).sum()) for p, s in zip(weights, signs, strict=True))
    count = sum(p.numel() for p in weights)
    assert row["flip_rate"] == pytest.approx(flipped / count)
    assert flipped > 0
    latents = torch.cat([run.optimizer.state[p]["latent"].flatten() for p in weights])
    assert len(latents) == count
    assert row["at_bound"] == pytest.approx((latents.abs() == 1).float().mean().item())
    assert row["at_bound"] > 0
    assert 0 < row["gamma_mean"] <= 1
    assert row["skipped_steps"] == 0

    run.model.eval()
    with torch.no_grad():
        scores = run.model(run.augmenter.normalise(digits.held_out.images))
    right = (scores.argmax(1) == digits.held_out.labels).float().mean().item()
    assert row["held_out_accuracy"] == pytest.approx(right)
    loss = run.criterion(scores, digits.held_out.labels).item()
    assert row["held_out_loss"] == pytest.approx(loss, rel=1e-4)


def _inner(run: Run) -> list[Tensor]:
    return [m.weight for m in run.model.blocks.modules() if isinstance(m, nn.Conv2d)]


def test_share_at_bound_and_flips_of_a_baseline(digits: Data) -> None:
    run = Run(choose(net="ternary", optimizer="sgd"), digits)
    all_layers = layers(run.model)
    count = sum(layer.weight.numel() for layer in all_layers)
    assert run.watch.flip_rate() == 0
    # Each layer starts with its largest latent at the bound.
    assert run.watch.at_bound() == pytest.approx(len(all_layers) / count)
    with torch.no_grad():
        positive = all_layers[4].weight > 0.5
        all_layers[4].weight[positive] = -0.5
    assert run.watch.flip_rate() == pytest.approx(int(positive.sum()) / count)
    assert run.watch.flip_rate() == 0
    plain = Run(choose(net="float", optimizer="sgd"), digits)
    assert math.isnan(plain.watch.at_bound())
    assert math.isnan(plain.watch.flip_rate())


def test_skipped_steps_are_counted(digits: Data) -> None:
    run = Run(choose(net="xnor", optimizer="dfw"), digits)
    good, calls = run.criterion, itertools.count()

    def bad_once(scores: Tensor, labels: Tensor) -> Tensor:
        return good(scores, labels) * (math.nan if next(calls) == 1 else 1.0)

    run.criterion = bad_once
    row = run.train_epoch()
    assert row["skipped_steps"] == 1
    assert math.isfinite(row["train_loss"])
    assert math.isfinite(row["gamma_mean"])
    assert run.train_epoch()["skipped_steps"] == 0
    assert "1 steps skipped" in report.epoch_line(row, 3, "test")


@pytest.mark.parametrize(("net", "optimizer"), [("float", "sgd"), ("ternary", "dfw")])
def test_what_a_run_leaves(
    net: str, optimizer: str, digits: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(choose(net=net, optimizer=optimizer, epochs=2), digits, tmp_path / "run", resume=False)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "checkpoint.pt",
        "curves.png",
        "metrics.csv",
    }
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["test_accuracy"]) <= 1
    average = {"average_loss", "average_accuracy"}
    quantized = {"gamma_mean", "at_bound", "flip_rate", "skipped_steps"}
    empty = {key for key, value in rows[1].items() if value == ""}
    assert empty == average | (quantized if net == "float" else set())
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert len(lines) == 5
    assert "269,722 parameters" in lines[0]
    assert lines[1].startswith("epoch 1/2")
    accuracy = 100 * float(rows[1]["test_accuracy"])
    assert lines[3] == f"test accuracy {accuracy:.2f} % after 2 epochs"
    assert str(tmp_path / "run" / "checkpoint.pt") in lines[4]


def test_a_finished_run_is_left_as_it_is(digits: Data, tmp_path: Path) -> None:
    settings = choose(epochs=1)
    train(settings, digits, tmp_path, resume=False)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "metrics.csv").unlink()  # killed after the checkpoint, before the metrics
    train(settings, digits, tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "metrics.csv").is_file()


def test_other_images_are_refused(digits: Data, tmp_path: Path) -> None:
    settings = choose()
    checkpoint.save(tmp_path, Run(settings, digits).state_dict())
    other = Data("other", digits.train.part(0, 32), digits.held_out, "test", False)
    with pytest.raises(UserError, match="other images"):
        train(settings, other, tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "other"])
def test_damaged_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / checkpoint.NAME
    if content is None:
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="is no checkpoint of this example, or is damaged"):
        checkpoint.load(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*; free some space"):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_settings_defaults() -> None:
    dfw, adam = Settings.choose({}), Settings.choose({"optimizer": "adam"})
    assert (dfw.net, dfw.optimizer, dfw.loss, dfw.smooth) == ("xnor", "dfw", "svm", True)
    assert (adam.loss, adam.smooth) == ("ce", False)
    assert Settings.choose({"optimizer": "sgd", "loss": "svm"}).smooth is False
    assert Settings.choose({"net": "float", "optimizer": "sgd"}).weight_decay == 1e-4
    assert Settings.choose({"net": "ternary", "optimizer": "sgd"}).weight_decay == 0
    with pytest.raises(UserError, match="add --loss svm"):
        Settings.choose({"smooth": True, "loss": "ce"})
    with pytest.raises(UserError, match="--device nonsense cannot be used"):
        Settings.choose({"device": "nonsense"})


def test_settings_of_a_resumed_run() -> None:
    settings = Settings.choose({"net": "xnor", "lr": 0.3, "threads": 1})
    assert Settings.of_checkpoint(settings.to_dict()) == settings
    assert settings.moved({}) == settings
    assert settings.moved({"lr": 0.3, "threads": 2}).threads == 2
    with pytest.raises(UserError, match=r"has --net xnor, not float"):
        settings.moved({"net": "float"})
    with pytest.raises(UserError, match=r"has --batch-size 32, not 64"):
        settings.moved({"batch_size": 64})
    with pytest.raises(UserError, match="another version"):
        Settings.of_checkpoint({"net": "xnor"})


@pytest.mark.parametrize("net", ["binary", "xnor", "ternary"])
def test_box_and_step_size_reach_the_quantized_weights_alone(net: str, digits: Data) -> None:
    chosen = Run(choose(net=net, optimizer="dfw", radius=0.5, step_size="closed_form"), digits)
    quantized, rest = chosen.optimizer.param_groups
    assert (quantized["radius"], quantized["step_size"]) == (0.5, "closed_form")
    quantized, untouched = Run(choose(net=net, optimizer="dfw"), digits).optimizer.param_groups
    assert (quantized["radius"], quantized["step_size"]) == (1.0, "exact")
    assert (rest["radius"], rest["step_size"]) == (untouched["radius"], untouched["step_size"])


def test_batch_larger_than_the_data(digits: Data) -> None:
    with pytest.raises(UserError, match="--batch-size 64 is more than the 48 training images"):
        Run(choose(batch_size=64), digits)


def test_bfloat16_keeps_scores_and_weights_in_float32(digits: Data) -> None:
    run = Run(choose(net="xnor", optimizer="dfw", amp="bf16"), digits)
    seen: list[torch.dtype] = []
    run.model.blocks.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images, labels = next(run.augmenter.epoch(0, 0, 16))
    loss, _ = run.train_step(images, labels)
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_all_nets_are_on_the_command_line() -> None:
    import cifar_resnet20
    from resnet20.optimizers import LOSSES, OPTIMIZERS
    from resnet20.schedule import SCHEDULES

    choices = {a.dest: a.choices for a in cifar_resnet20.parser()._actions if a.choices}
    assert choices["arch"] == tuple(nets.ARCHES)
    assert choices["net"] == (*nets.NETS, "uniform")  # which dfw alone trains
    assert choices["shortcut"] == nets.SHORTCUTS
    assert choices["optimizer"] == OPTIMIZERS
    assert choices["loss"] == LOSSES
    assert choices["schedule"] == SCHEDULES
