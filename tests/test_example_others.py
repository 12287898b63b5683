"""The quick start, the character transformer, and step times."""

from pathlib import Path
from typing import Any

import char_transformer
import pytest
import quick_start
import step_speed
import torch
from char_transformer import CharTransformer, Run, Settings, TernaryLinear, Text
from common import load_checkpoint
from test_example_cifar import ending
from torch import nn

from dfw_opt import load_packed

SMALL = ["--steps=4", "--batch-size=2", "--evaluate-every=2", "--threads=1"]


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(quick_start, "train", quick_start.train[:600])
    quick_start.main([f"--out={tmp_path}"])
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["float", "binary", "ternary", "gamma:", "figure"]
    assert (tmp_path / "training.png").stat().st_size > 10_000
    net = quick_start.make_net()
    load_packed(net, tmp_path / "ternary.packed")
    assert len(set(net.get_parameter("3.weight").flatten().tolist())) == 3
    assert quick_start.accuracy(net) > 0.5


# The character transformer -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def text() -> Text:
    """A little of it, so that evaluations are short."""
    text = Text()
    text.train, text.validation = text.train[:5000], text.validation[:300]
    return text


JOBS = ["", "--net=float", "--schedule=cosine", "--optimizer=adamw --average", "--optimizer=sgd"]
JOBS += ["--optimizer=muon"]


@pytest.mark.parametrize("job", JOBS)
def test_chars_resumed_is_as_never_stopped(
    job: str, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(char_transformer, "Text", lambda: text)
    arguments = [*SMALL, *job.split()]
    assert char_transformer.main([*arguments, f"--out={tmp_path / 'whole'}"]) == 0
    settings = Settings.choose(vars(char_transformer.parser().parse_args(arguments)))
    run = Run(settings, text)
    run.history.append(run.advance())
    run.save(tmp_path / "broken")
    assert char_transformer.main(["--resume", f"--out={tmp_path / 'broken'}"]) == 0
    assert ending(tmp_path / "broken") == ending(tmp_path / "whole")
    row = load_checkpoint(tmp_path / "whole")["history"][-1]
    assert 1 < row["val_loss"] < 7
    assert ("average_loss" in row) == (job in JOBS[:2] or "--average" in job)


def test_chars_refusals(tmp_path: Path, capsys: Any) -> None:
    out = f"--out={tmp_path}"
    assert char_transformer.main(["--resume", out]) == 2
    assert "leave --resume out to start" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        char_transformer.main(["--net=binary"])


def test_text_is_split_and_batches_follow_from_seed_and_step(text: Text) -> None:
    x, y = text.batch(0, 3, 5)
    assert x.shape == y.shape == (5, char_transformer.CONTEXT)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(x, text.batch(0, 3, 5)[0])
    assert not torch.equal(x, text.batch(0, 4, 5)[0])
    inputs, targets = text.windows()
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])


def test_transformer_sees_no_later_character() -> None:
    model = CharTransformer(30)
    text = torch.randint(30, (1, 20))
    scores = model(text)
    text[0, 10] = (text[0, 10] + 1) % 30
    assert torch.equal(model(text)[0, :10], scores[0, :10])
    assert not torch.equal(model(text)[0, 10:], scores[0, 10:])


def test_ternary_linear() -> None:
    layer = nn.Linear(6, 5, bias=False)
    layer.__class__ = TernaryLinear
    weight = layer(torch.eye(6)).T
    scale = layer.weight.abs().mean()
    torch.testing.assert_close(weight, scale * (layer.weight / scale).round().clamp(-1, 1))
    weight.sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(5, 6))  # type: ignore[arg-type]


# Steps -------------------------------------------------------------------------------------------


def test_step_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(step_speed.SIZES, "tiny", [(3, 4), (5,), (2, 3, 1, 1)])
    path = tmp_path / "new" / "speed.csv"
    arguments = ["--sizes", "tiny", "--rounds=2", "--threads=1", f"--csv={path}"]
    assert step_speed.main(arguments) == 0
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines())
    header, *rows = path.read_text().splitlines()
    assert header == "size,optimizer,ms,min,max,of SGD,of AdamW,extra MB"
    assert len(rows) == len(step_speed.OPTIMIZERS)


def test_step_speed_refusals(capsys: Any) -> None:
    if not torch.cuda.is_available():
        assert step_speed.main(["--device=cuda"]) == 2
        assert "--device cuda cannot be used here" in capsys.readouterr().err
    for bad in (["--sizes", "none"], ["--sizes"], ["--rounds=0"], ["--threads=two"]):
        with pytest.raises(SystemExit, match="2"):
            step_speed.main(bad)
        error = capsys.readouterr().err
        assert error.startswith(f"error: argument {bad[0].split('=')[0]}: ")
        assert len(error.splitlines()) == 1


def test_peak_bytes() -> None:
    def step() -> None:
        x = torch.zeros(1000)
        y = x + 1
        del x, y

    assert 8000 <= step_speed.peak_bytes(step, torch.device("cpu")) < 8100
