"""The example as a user runs it: errors, interruptions, the table. All on the digits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cifar_resnet20
import pytest
import torch
from resnet20 import data, table, training
from resnet20.data import RECORD_BYTES, RECORDS_PER_FILE, TEST_FILES, TRAIN_FILES

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "cifar_resnet20.py"
SMALL = ["--limit=64", "--batch-size=16", "--threads=1", "--device=cpu", "--amp=off"]


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Run the script as a user would, from a checkout."""
    # Tests that run as a background job ignore Ctrl-C, and what they start would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for_epoch(metrics: Path, epoch: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be stopped"
        if metrics.is_file() and len(metrics.read_text().splitlines()) > epoch:
            return
        time.sleep(0.01)
    raise AssertionError(f"no epoch {epoch} in time")


def weights(out: Path) -> dict[str, torch.Tensor]:
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    state: dict[str, torch.Tensor] = content["model"]
    return state


def test_killed_and_resumed_is_as_never_killed(tmp_path: Path) -> None:
    job = [*SMALL, "--net", "xnor", "--optimizer", "dfw", "--epochs", "3"]
    code, out, err = finish(start(*job, "--out", "whole", cwd=tmp_path))
    assert (code, err) == (0, "")
    first, *_, before_last, last = out.splitlines()
    assert "handwritten digits" in first
    assert "for CIFAR-10 add: --download --data data" in first
    assert before_last.endswith("after 3 epochs")
    assert "whole/checkpoint.pt" in last
    assert "\r" not in out

    broken = start(*job, "--out", "broken", cwd=tmp_path)
    wait_for_epoch(tmp_path / "broken" / "metrics.csv", 1, broken)
    time.sleep(0.05)  # into the second epoch
    broken.send_signal(signal.SIGKILL)
    assert finish(broken)[0] == -signal.SIGKILL
    code, out, err = finish(start("--resume", "--out", "broken", cwd=tmp_path))
    assert (code, err) == (0, "")
    assert "epoch 3/3" in out
    assert "epoch 1/3" not in out

    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    rows = [
        [line.split(",")[:9] for line in (tmp_path / run / "metrics.csv").read_text().splitlines()]
        for run in ("whole", "broken")
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(*SMALL, "--epochs", "500", "--out", "my run", cwd=tmp_path)
    wait_for_epoch(tmp_path / "my run" / "metrics.csv", 1, process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert len(err.splitlines()) == 1
    command = f"{Path(sys.executable).name} {SCRIPT} --out 'my run' --resume"
    assert err.strip() == f"Interrupted. To go on: {command}"
    assert not [p for p in (tmp_path / "my run").iterdir() if p.name.endswith(".part")]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('loaded')")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "--shortcut {resnet,bireal}" in result.stdout


def test_missing_package_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-E", "-S", str(SCRIPT), "--out", str(tmp_path / "x")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "is missing" in result.stderr
    assert "pip install" in result.stderr


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run in this process; return the exit code and what is on stderr."""
    try:
        code = cifar_resnet20.main(list(arguments))
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--net", "quaternary"], "--net: invalid choice"),
        (["--lr", "-0.1"], "--lr: must be above 0"),
        (["--lr", "nan"], "--lr: must be above 0"),
        (["--lr", "fast"], "--lr: invalid number value"),
        (["--momentum", "1"], "--momentum: must be at least 0 and below 1"),
        (["--weight-decay", "-1"], "--weight-decay: must be at least 0"),
        (["--epochs", "0"], "--epochs: must be at least 1"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--batch-size", "5000"], "--batch-size 5000 is more than the 1438 training images"),
        (["--limit", "-3"], "--limit: must be at least 1"),
        (["--nets", "float"], "unrecognized arguments: --nets"),
        (["--device", "nonsense"], "--device cpu always can"),
        (["--smooth", "--loss", "ce"], "add --loss svm"),
        (["--data", "nowhere"], "is missing; give the folder"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--table"], "nothing to resume"),
        (["--net", "float", "--radius", "1"], "--radius is for --optimizer dfw with quantized"),
        (["--optimizer", "sgd", "--step-size", "exact"], "--step-size is for --optimizer dfw"),
        (["--radius", "0"], "--radius: must be above 0"),
        (["--table", "--radius", "1"], "--radius does not go with --table"),
        (["--table", "--net", "xnor"], "--net does not go with --table"),
        (["--table", "--lr", "1"], "--lr does not go with --table"),
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
    code, err = run(capsys, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert reason in err
    assert list(tmp_path.iterdir()) == []


def test_truncated_cifar10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in TRAIN_FILES + TEST_FILES:
        with (tmp_path / name).open("wb") as file:
            file.truncate(RECORDS_PER_FILE * RECORD_BYTES)
    with (tmp_path / "test_batch.bin").open("r+b") as file:
        file.truncate(1000)
    code, err = run(capsys, "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "test_batch.bin has 1,000 bytes instead of 30,730,000" in err
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    for out in ("file", "file/below"):
        code, err = run(capsys, *SMALL, "--epochs", "1", "--out", str(tmp_path / out))
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "choose another --out" in err
    assert (tmp_path / "file").read_text() == "kept"


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    job = [*SMALL, "--out", str(out), "--net", "float", "--optimizer", "sgd"]
    assert run(capsys, *job, "--epochs", "1") == (0, "")
    before = {path: path.read_bytes() for path in out.iterdir()}
    for arguments, reason in (
        ([], "already holds a run; add --resume"),
        (["--table"], "already holds a run"),
        (["--resume", "--net", "xnor"], "has --net float, not xnor"),
        (["--resume", "--epochs", "9"], "has --epochs 1, not 9"),
        (["--resume", "--table"], "holds one run, not a table"),
        (["--resume", "--data", "nowhere"], "is missing"),
    ):
        code, err = run(capsys, "--out", str(out), *arguments)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert reason in err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_table_is_interrupted_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = data.load(None, limit=32)
    small = data.Data(small.name, small.train, small.held_out.part(0, 20), "test", False)
    monkeypatch.setattr(data, "load", lambda *arguments: small)
    job = ["--table", "--epochs", "1", "--batch-size", "16", "--out", str(tmp_path / "t")]
    job += ["--amp", "off", "--device", "cpu"]

    epochs = training.Run.train_epoch
    count = 0

    def third_is_interrupted(self: training.Run) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return epochs(self)

    monkeypatch.setattr(training.Run, "train_epoch", third_is_interrupted)
    code, err = run(capsys, *job)
    assert code == 130
    assert err.endswith(f"--out {tmp_path / 't'} --resume --table\n")
    assert not (tmp_path / "t" / table.TABLE).exists()

    code, err = run(capsys, "--out", str(tmp_path / "t"), "--resume")
    assert code == 2
    assert "holds a table; add --table" in err
    code, err = run(capsys, "--table", "--resume", "--out", str(tmp_path / "t"), "--epochs", "2")
    assert code == 2
    assert "has --epochs 1, not 2" in err

    code = cifar_resnet20.main(["--table", "--resume", "--out", str(tmp_path / "t")])
    printed = capsys.readouterr().out
    assert code == 0
    assert count == 6  # five rows, one of them begun twice
    text = (tmp_path / "t" / table.TABLE).read_text()
    assert text in printed
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [(row[0].strip("| "), row[1]) for row in rows] == [("network", "optimizer"), *table.ROWS]
    assert [row[3] for row in rows[1:]] == [
        "cross-entropy",
        "cross-entropy",
        "smoothed SVM",
        "cross-entropy",
        "smoothed SVM",
    ]
    for net, optimizer in table.ROWS:
        assert (tmp_path / "t" / f"{net}-{optimizer}" / "metrics.csv").is_file()
    assert (tmp_path / "t" / table.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "t" / table.BUDGET).read_text())["epochs"] == 1


def test_bench_prints_all_nets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = [*SMALL, "--bench", "2", "--out", str(tmp_path / "none")]
    assert cifar_resnet20.main(job) == 0
    out = capsys.readouterr().out
    for name in ("bare float loop, SGD", "float, dfw", "xnor, dfw", "ternary, dfw"):
        assert f"| {name} |" in out
    assert not (tmp_path / "none").exists()
