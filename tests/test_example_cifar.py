"""The image example as its user runs it, on a few digits: trainings, refusals, resumed runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import cifar_resnet20
import pytest
import torch
from common import interpreter, load_checkpoint
from helpers import fingerprint
from resnet20 import data, report, table
from resnet20.data import Data
from resnet20.report import Row
from resnet20.settings import Settings
from resnet20.training import Run, train

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "cifar_resnet20.py"
SMALL = ["--limit=32", "--batch-size=16", "--threads=1", "--device=cpu", "--epochs=2"]


def main(*arguments: str, out: Path) -> int:
    return cifar_resnet20.main([*arguments, f"--out={out}"])


def ending(out: Path) -> str:
    """Everything in a checkpoint, bit for bit, but for how long the epochs took."""
    state = load_checkpoint(out)
    for row in state["history"]:
        del row["seconds"]
    return repr(fingerprint(state))  # where NaN is NaN


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations would otherwise take most of the time."""
    train, test = data.read_digits()
    monkeypatch.setattr(data, "read_digits", lambda: (train.part(0, 320), test.part(0, 40)))


JOBS = [
    "--net=float",
    "--net=xnor",
    "--net=binary --relax=0.5 --schedule=step",
    "--net=ternary --threshold=0.4",
    "--net=uniform --bits=3 --radius=0.5",
    "--net=xnor --optimizer=adam --shortcut=bireal --average",
    "--net=ternary --optimizer=sgd --loss=svm --smooth",
    "--net=ternary --optimizer=muon",
    "--net=float --optimizer=muon --validate",
]


@pytest.mark.parametrize("job", JOBS)
def test_resumed_is_as_never_stopped(job: str, tmp_path: Path) -> None:
    """To the bit: weights, optimizer, average and metrics; and the network is exported."""
    arguments = [*SMALL, *job.split()]
    assert main(*arguments, out=tmp_path / "whole") == 0

    # The other one is stopped after its first epoch, as if by Ctrl-C.
    class Stopped(Run):
        def advance(self) -> dict[str, float]:
            if self.history:
                raise KeyboardInterrupt
            return super().advance()

    given = vars(cifar_resnet20.parser().parse_args(arguments))
    settings = Settings.choose(given)
    images = data.load(None, settings.limit, settings.validate)
    with pytest.raises(KeyboardInterrupt):
        Stopped(settings, images).train(tmp_path / "broken", False)
    packed = tmp_path / "x.packed"
    assert main("--resume", f"--export={packed}", out=tmp_path / "broken") == 0
    assert ending(tmp_path / "broken") == ending(tmp_path / "whole")
    assert packed.stat().st_size < (1.1e6 if "float" in job else 2.5e5)
    names = {path.name for path in (tmp_path / "broken").iterdir()}
    assert names == {"checkpoint.pt", "metrics.csv"}


def test_export_is_the_average(digits: Data, tmp_path: Path, capsys: Any) -> None:
    settings = Settings.choose({"net": "ternary", "epochs": 1, "batch_size": 16, "device": "cpu"})
    run = train(settings, digits, tmp_path)
    assert run.average is not None
    assert run.result is run.average.module
    text = capsys.readouterr().out
    assert f"of the average {100 * run.history[-1]['average_accuracy']:.2f} %" in text
    assert text.rstrip().endswith("after 1 epoch")


def test_average_is_judged_with_statistics_of_its_own(digits: Data) -> None:
    settings = Settings.choose({"net": "float", "epochs": 1, "batch_size": 16, "device": "cpu"})
    run = Run(settings, digits)
    row = run.advance()
    loss, accuracy = run.evaluate(run.result)
    assert (loss, accuracy) == (row["average_loss"], row["average_accuracy"])
    statistics = [b for name, b in run.model.named_buffers() if name.endswith("running_mean")]
    others = [b for name, b in run.result.named_buffers() if name.endswith("running_mean")]
    assert not any(torch.equal(a, b) for a, b in zip(statistics, others, strict=True))


def test_defaults_follow_from_each_other() -> None:
    dfw, adam = Settings.choose({}), Settings.choose({"optimizer": "adam"})
    assert (dfw.net, dfw.lr, dfw.schedule, dfw.average) == ("xnor", None, "none", True)
    assert (adam.net, adam.lr, adam.schedule, adam.average) == ("xnor", 0.005, "cosine", False)
    assert not Settings.choose({"schedule": "cosine"}).average
    assert {(x.loss, x.smooth) for x in (dfw, adam)} == {("ce", False)}
    assert Settings.choose({"loss": "svm"}).smooth
    assert Settings.choose({"optimizer": "parq"}).net == "binary"


@pytest.mark.parametrize("norm", ["spectral", "euclidean"])
def test_norm_is_passed_on(norm: str, digits: Data) -> None:
    given = {"net": "xnor", "norm": norm, "batch_size": 16, "device": "cpu", "lr": 0.01}
    run = Run(Settings.choose(given), digits)
    assert all(group["norm"] == norm for group in run.groups())
    assert all(group["lr"] == 0.01 for group in run.groups())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--smooth --loss=ce", "--smooth needs --loss svm"),
        ("--bits=4", "--bits needs --net uniform"),
        ("--net=uniform --optimizer=adam", "--net uniform needs --optimizer dfw"),
        ("--arch=wrn16-2 --net=xnor", "--net xnor needs --arch resnet20"),
        ("--arch=densenet28 --shortcut=bireal", "--shortcut bireal needs --arch resnet20"),
        ("--optimizer=parq --net=xnor", "--optimizer parq needs --net binary or ternary"),
        ("--optimizer=parq --average", "--average needs --optimizer dfw, adam, sgd or muon"),
        ("--optimizer=sgd --norm=spectral", "--norm needs --optimizer dfw"),
        ("--net=binary --threshold=0.3", "--threshold needs --optimizer dfw --net ternary"),
        ("--net=float --relax=0.5", "--relax needs --optimizer dfw and quantized weights"),
        ("--batch-size=99 --limit=50", "--batch-size 99 is more than the 50 training images"),
        ("--device=toaster", "--device toaster cannot be used here"),
        ("--data=nowhere", "data_batch_1.bin is missing"),
        ("--resume", "checkpoint.pt; leave --resume out to start"),
        ("--table --lr=1", "--lr does not go with --table"),
        ("--table --export=x", "--table goes neither with --export nor with torchrun"),
    ],
)
def test_refusals(arguments: str, reason: str, tmp_path: Path, capsys: Any) -> None:
    assert main(*arguments.split(), out=tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argument", ["--net=quaternary", "--epochs=0", "--momentum=1", "--lr=-1"])
def test_arguments_that_are_none(argument: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argument, out=tmp_path)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert argument.split("=")[0] in error
    assert len(error.splitlines()) == 1


def test_nothing_is_overwritten(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    job = [*SMALL, "--net=float", "--optimizer=sgd"]
    assert main(*job, out=out) == 0
    assert main(*job, out=out) == 2
    assert "already exists; choose another, or add --resume" in capsys.readouterr().err
    assert main("--resume", "--lr=0.5", out=out) == 2
    assert "--lr 0.5: the run to resume has 0.1" in capsys.readouterr().err
    (tmp_path / "x").write_text("mine")
    assert main(*job, f"--export={tmp_path / 'x'}", out=tmp_path / "other") == 2
    (out / "checkpoint.pt").write_bytes(b"broken")
    assert main("--resume", out=out) == 2
    assert "cannot be read; choose another --out" in capsys.readouterr().err


TABLE = ["--table", "--limit=32", "--epochs=1", "--device=cpu"]


def test_table_goes_on_where_it_stopped(tmp_path: Path, capsys: Any) -> None:
    assert main(*TABLE, "--threads=1", out=tmp_path) == 0
    table, printed = (tmp_path / "table.md").read_text(), capsys.readouterr().out
    assert table in printed
    assert "1 epoch of 1 step;" in table.replace("\n", " ")
    assert all(len(line) < 80 or str(tmp_path) in line for line in printed.splitlines())
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    _, *rows = [[cell.strip() for cell in line] for line in lines]
    names = "float SGD, float DFW, binary Adam, binary DFW, ternary SGD, ternary DFW"
    assert ", ".join(f"{row[0]} {row[1]}" for row in rows) == f"{names}, xnor Adam, xnor DFW"
    found = [row[3] for row in rows[::2]]
    assert found == ["any", "2 per channel", "3 per layer", "2 per channel"]
    assert found == [row[3] for row in rows[1::2]]
    sizes = [int(row[4].replace(",", "")) for row in rows]
    assert sizes[0] > 1e6 > 1.5e5 > max(sizes[2:])
    assert (tmp_path / "table.png").stat().st_size > 50_000
    (tmp_path / "xnor-dfw" / "checkpoint.pt").unlink()
    before = ending(tmp_path / "ternary-dfw")
    assert main(*TABLE, out=tmp_path) == 2
    assert main("--table", "--resume", "--threads=1", out=tmp_path) == 0
    assert ending(tmp_path / "ternary-dfw") == before
    assert len(load_checkpoint(tmp_path / "xnor-dfw")["history"]) == 1


def test_table_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_table = mock.Mock(side_effect=lambda _, out, resume: out.mkdir(parents=True, exist_ok=True))
    monkeypatch.setattr(table, "run_table", run_table)
    monkeypatch.chdir(tmp_path)
    for arguments in ([], [], ["--resume"], []):
        assert cifar_resnet20.main(["--table", *arguments]) == 0
    folders = [call.args[1].name for call in run_table.call_args_list]
    assert folders == ["table", "table-2", "table", "table-3"]


def test_table_has_a_sweep_on_digits_only() -> None:
    on_digits, elsewhere = table.planned({}, Path("x")), table.planned({"data": "x"}, Path("x"))
    assert [len(elsewhere), elsewhere[0][0].epochs] == [8, 20]
    assert [len(on_digits), on_digits[0][0].epochs] == [20, 3]
    assert on_digits[-1][0].lr == pytest.approx(30 * 0.07)


def test_what_is_said_is_what_was_measured() -> None:
    """Also where DFW is behind."""
    told = "float SGD 1 97.5, float DFW 1 97.1, xnor Adam 0.1 20, xnor Adam 1 80, xnor Adam 10 85"
    told += ", xnor DFW 0.1 80, xnor DFW 1 92, xnor DFW 10 88"
    cells = [it.split() for it in told.split(", ")]
    every = [Row(a, b, float(x), [10.0, float(y)], 5, "any", 1, 1.0) for a, b, x, y in cells]
    rows = [row for row in every if row.factor == 1]
    text = "By so many points DFW is ahead (+) or behind (-): after 1 epoch float -0.4, xnor +12.0."
    assert report.seen(rows, []) == text
    assert report.seen(rows, every[2:]) == (
        f"{text} Of 3 values of lr, from 0.1 to 10 times the default, 0 with Adam and 2 with DFW "
        "bring xnor within 5 points of the best run, 92.0 %."
    )


@pytest.mark.parametrize("net", ["binary", "ternary"])
def test_parq(net: str, tmp_path: Path) -> None:
    """From three quarters of the run on, the weights in the network are quantized."""
    pytest.importorskip("torchao")
    assert main(*SMALL, f"--net={net}", "--optimizer=parq", "--epochs=4", out=tmp_path) == 0
    model = load_checkpoint(tmp_path)["model"]
    for channel in model["blocks.0.half1.0.weight"]:
        assert len(channel.unique()) <= (2 if net == "binary" else 3)


# Processes ---------------------------------------------------------------------------------------


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    # Tests that run as a background job ignore Ctrl-C, and what they start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", ["--net=float --optimizer=sgd", "--table --threads=2"])
def test_ctrl_c_says_how_to_go_on(kind: str, tmp_path: Path) -> None:
    """And no more than that; the processes of a table end at once."""
    job, table = [*SMALL, *kind.split(), "--epochs=5000", "--out=my run"], "--table" in kind
    process = start(str(SCRIPT), *job, cwd=tmp_path)
    run = tmp_path / "my run" / ("float-sgd" if table else "")
    metrics, deadline = run / "metrics.csv", time.monotonic() + 100
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 130
    assert error.strip() == (
        f"Interrupted. To go on: {sys.executable} {SCRIPT} --out 'my run' --resume"
        + " --table" * table
    )
    assert out.endswith("20 trainings of 5,000 epochs, 2 at a time:\n") == table


def test_interpreter_is_named_as_in_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(Path.cwd() / ".venv" / "bin" / "python"))
    assert interpreter() == ".venv/bin/python"


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="a torch without distributed")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """All ranks share each batch and one γ; one process goes on with what two have begun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    job = ["--net=ternary", "--export=x.packed", "--out=team"]
    process = start(*torchrun, *SMALL, *job, cwd=tmp_path)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "2 processes" in out
    assert out.count("epoch 2 ") == 1
    history = load_checkpoint(tmp_path / "team")["history"]
    assert all(0 < row["gamma_mean"] <= 1 for row in history)
    assert main("--resume", out=tmp_path / "team") == 0
