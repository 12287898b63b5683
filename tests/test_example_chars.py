"""The character transformer: its text, its network, training, and going on from a checkpoint."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import char_transformer
import pytest
import torch
from chars import net, straight_through, text
from chars.schedule import factor
from chars.settings import Settings
from chars.text import Text
from chars.training import Run
from resnet20.errors import UserError
from runs import ending
from torch import nn

SCRIPT = Path(__file__).parent.parent / "examples" / "char_transformer.py"
SMALL = ["--steps=4", "--evaluate-every=2", "--batch-size=4", "--threads=1", "--sample=5"]


@pytest.fixture(scope="module")
def manual() -> Text:
    return text.load()


@pytest.fixture
def short(manual: Text, monkeypatch: pytest.MonkeyPatch) -> Text:
    """The beginning of the manual, in place of all of it."""
    beginning = Text.of(manual.decode(manual.train[:12_000]))
    monkeypatch.setattr(text, "load", lambda: beginning)
    return beginning


def main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run in this process; return the exit code, stdout and stderr."""
    try:
        code = char_transformer.main(list(arguments))
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, *capsys.readouterr()


def block_matrices(run: Run) -> dict[str, torch.Tensor]:
    """The weights that the network of ``run`` computes with, of those that may be ternary."""
    return {
        name: module.quantized()
        if isinstance(module, straight_through.TernaryLinear)
        else module.weight.detach()
        for name, module in run.model.blocks.named_modules()
        if isinstance(module, nn.Linear)
    }


def levels(weight: torch.Tensor) -> list[float]:
    """The different values in ``weight``."""
    return sorted(set(weight.flatten().tolist()))


def test_the_manual_is_long_and_repeats_no_paragraph(manual: Text) -> None:
    assert len(manual.train) > 100_000
    assert len(manual.validation) / (len(manual.train) + len(manual.validation)) == pytest.approx(
        0.1, abs=1e-3
    )
    assert text.load().digest == manual.digest
    whole = manual.decode(torch.cat((manual.train, manual.validation)))
    assert "\nThe " in whole
    paragraphs = [paragraph.rstrip() for paragraph in whole.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert 2 < manual.unigram_loss < math.log(len(manual.alphabet))


def test_a_python_without_the_manual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match="install the whole standard library"):
        text.load()


def test_batches_follow_from_seed_and_step(manual: Text) -> None:
    inputs, targets = manual.batch(0, 7, 3, 50)
    assert inputs.shape == targets.shape == (3, 50)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert manual.decode(inputs[0]) in manual.decode(manual.train)
    assert torch.equal(inputs, manual.batch(0, 7, 3, 50)[0])
    for seed, step in ((1, 7), (0, 8), (7, 0)):
        assert not torch.equal(inputs, manual.batch(seed, step, 3, 50)[0])


def test_validation_windows_are_the_validation_text(manual: Text) -> None:
    inputs, targets = manual.validation_windows(100)
    assert torch.equal(inputs.flatten(), manual.validation[: inputs.numel()])
    assert torch.equal(targets.flatten(), manual.validation[1 : inputs.numel() + 1])
    assert 0 < len(manual.validation) - inputs.numel() <= 100


def test_warmup_and_schedule() -> None:
    rise = [0.25, 0.5, 0.75]
    assert [factor("none", 3, step, 6) for step in range(6)] == [*rise, 1, 1, 1]
    assert [factor("cosine", 3, step, 5) for step in range(5)] == pytest.approx([*rise, 1, 0.5])


def test_the_network_does_not_see_what_follows() -> None:
    model = net.build(20, seed=0)
    characters = torch.randint(20, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = characters.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 20
    before, after = model(characters)[0], model(changed)[0]
    torch.testing.assert_close(before[:7], after[:7])
    assert not any(torch.allclose(before[i], after[i]) for i in range(7, 12))


def test_straight_through_values_and_gradient_by_hand() -> None:
    linear = nn.Linear(5, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[2.0, 0.4, -0.4, -1.0, 1.2]]))  # the mean of |w| is 1
    layer = straight_through.TernaryLinear.replacing(linear)
    assert layer.weight is linear.weight
    torch.testing.assert_close(layer.quantized(), torch.tensor([[1.0, 0, 0, -1, 1]]))
    x = torch.tensor([[1.0, 2, 3, 4, 5]])
    out = layer(x)
    assert out.item() == pytest.approx(1 - 4 + 5)
    out.sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, x)


@pytest.mark.parametrize("network", ["float", "ternary"])
@pytest.mark.parametrize("optimizer", ["dfw", "adamw", "sgd"])
def test_each_parameter_has_the_rate_of_its_kind(short: Text, network: str, optimizer: str) -> None:
    given = {"net": network, "optimizer": optimizer, "lr": 0.1, "schedule": "none", "warmup": 0}
    run = Run(Settings.choose(given | {"float_lr": 0.2, "batch_size": 1, "threads": 1}), short)
    run.train_step(0)
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(run.model.parameters()))
    for name, p in run.model.named_parameters():
        expected = 0.1 if name.startswith("blocks") and p.dim() > 1 else 0.2
        if (".query." in name or ".key." in name) and (network, optimizer) == ("ternary", "dfw"):
            expected = 1.0
        assert rates[id(p)] == pytest.approx(expected), name


@pytest.mark.parametrize("optimizer", ["dfw", "adamw", "sgd"])
def test_only_the_matrices_of_the_blocks_are_ternary(short: Text, optimizer: str) -> None:
    run = Run(Settings.choose({"optimizer": optimizer, "batch_size": 2, "threads": 1}), short)
    run.train_step(0)
    matrices = block_matrices(run)
    assert len(matrices) == net.LAYERS * 6
    for name, weight in matrices.items():
        negative, zero, positive = levels(weight)
        assert negative < 0 == zero < positive, name
    for module in (run.model.embedding, run.model.position, run.model.head):
        assert len(levels(module.weight)) > 1000


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [("ternary", "dfw"), ("ternary", "adamw"), ("float", "dfw")],
)
def test_learns(network: str, optimizer: str, manual: Text) -> None:
    """Better than a guess after 15 steps, and not far from who knows the frequencies."""
    given = {"net": network, "optimizer": optimizer, "batch_size": 8, "steps": 15, "threads": 1}
    run = Run(Settings.choose(given), manual)
    losses = torch.stack([run.train_step(step)[0] for step in range(15)])
    assert losses[0] > 0.95 * math.log(len(manual.alphabet))
    assert losses[-5:].mean() < manual.unigram_loss + 0.5
    ternary = all(len(levels(weight)) == 3 for weight in block_matrices(run).values())
    assert ternary == (network == "ternary")


@pytest.mark.parametrize("optimizer", ["dfw", "adamw"])
def test_resumed_is_as_never_interrupted(
    optimizer: str,
    short: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = [*SMALL, "--optimizer", optimizer, "--warmup=1", "--out"]
    code, whole, err = main(capsys, *job, str(tmp_path / "whole"))
    assert (code, err) == (0, "")
    assert short.digest[:16] in whole

    step = Run.train_step

    def interrupted(self: Run, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number == 3:  # one step after the checkpoint
            raise KeyboardInterrupt
        return step(self, number)

    broken = str(tmp_path / "broken")
    monkeypatch.setattr(Run, "train_step", interrupted)
    code, _, err = main(capsys, *job, broken)
    assert code == 130
    assert len(err.splitlines()) == 1
    assert err.endswith(f"--out {broken} --resume\n")

    monkeypatch.setattr(Run, "train_step", step)
    code, resumed, err = main(capsys, "--resume", "--threads=1", "--sample=5", "--out", broken)
    assert (code, err) == (0, "")
    assert "2 of 4 steps done" in resumed
    assert resumed[-6:] == whole[-6:]  # the sample
    ends = [ending(tmp_path / name) for name in ("broken", "whole")]
    histories = [repr(end.pop("history")) for end in ends]  # in which a NaN is equal to itself
    assert histories[0] == histories[1]
    assert ends[0] == ends[1]


def test_metrics_and_what_is_not_overwritten(
    short: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for optimizer in ("dfw", "sgd"):
        job = [*SMALL, "--optimizer", optimizer, "--out", str(tmp_path / optimizer)]
        assert main(capsys, *job)[0] == 0
        with (tmp_path / optimizer / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["2", "4"]
        for row in rows:
            assert 0 < float(row["val_loss"]) < 6
            has_box = optimizer == "dfw"
            assert has_box == bool(row["gamma_mean"]) == bool(row["at_bound"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for arguments, reason in (
        ([], "already holds a run; add --resume"),
        (["--resume", "--optimizer=adamw"], "has --optimizer sgd, not adamw"),
        (["--resume", "--weight-decay=1"], "has --weight-decay 0.0, not 1.0"),
    ):
        code, _, err = main(capsys, "--out", str(tmp_path / "sgd"), *arguments)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert reason in err
    assert {path: path.read_bytes() for path in before} == before


def test_another_text_is_not_resumed(
    manual: Text,
    short: Text,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(capsys, *SMALL, "--steps=1", "--out", str(tmp_path))[0] == 0
    monkeypatch.setattr(text, "load", lambda: manual)
    code, _, err = main(capsys, "--resume", "--out", str(tmp_path))
    assert code == 2
    assert "was on another text" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--net", "binary"], "--net: invalid choice"),
        (["--optimizer", "adam"], "--optimizer: invalid choice"),
        (["--lr", "0"], "--lr: must be above 0"),
        (["--lr", "inf"], "--lr: must be above 0"),
        (["--attention-lr", "-1"], "--attention-lr: must be above 0"),
        (["--float-lr", "x"], "--float-lr: invalid number value"),
        (["--momentum", "1"], "--momentum: must be at least 0 and below 1"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--steps", "9", "--warmup", "9"], "--warmup 9 leaves none of the 9 steps"),
        (["--clip", "1"], "--clip is for adamw and sgd"),
        (["--sample", "-1"], "--sample: must be at least 0"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = main(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert reason in err
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('loaded')")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "--optimizer {dfw,adamw,sgd}" in result.stdout
