"""The example under torchrun: several processes train as one does with the whole batch."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cifar_resnet20
import pytest
import team_ranks
import torch
from helpers import fingerprint
from resnet20 import checkpoint, data
from resnet20.settings import Settings
from resnet20.training import Run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="a torch without torch.distributed"
)

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "cifar_resnet20.py"
SMALL = ["--limit=64", "--threads=1", "--device=cpu", "--amp=off"]


def start(processes: int, script: Path, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    paths = (ROOT, ROOT / "examples", ROOT / "tests")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*torchrun, f"--nproc-per-node={processes}", str(script), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.terminate()  # which it passes on to those that it has started
    return process.returncode, out, err


def torchrun(processes: int, script: Path, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    return finish(start(processes, script, *arguments, cwd=cwd))


def metrics(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: float(row[key] or math.nan) for key in row if key != "seconds"} for row in rows]


# float64 -----------------------------------------------------------------------------------------
#
# In float32, one process and several differ by as much as one process does from the truth, and the
# differences grow from step to step: torch's BatchNorm rounds to about 1e-4 there, so some ReLUs
# and signs fall to the other side. In float64 this does not happen in so few steps, and all kinds
# of network can be compared tightly.


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for row, other in zip(actual["history"], expected["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-8, nan_ok=True)
    torch.testing.assert_close(actual["model"], expected["model"], rtol=1e-8, atol=1e-8)
    # Momentum and latents too.
    torch.testing.assert_close(
        actual["optimizer"]["state"], expected["optimizer"]["state"], rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize(
    ("processes", "jobs"),
    [
        (2, ["float dfw 1", "xnor dfw 3", "ternary dfw 1", "ternary sgd 0.01", "xnor adam 0.005"]),
        (3, ["xnor dfw 3"]),
    ],
)
def test_as_one_process(processes: int, jobs: list[str], tmp_path: Path) -> None:
    """Metrics, weights and optimizer, also if resumed with more or fewer; all ranks the same."""
    code, _, err = torchrun(processes, Path(team_ranks.__file__), str(tmp_path), *jobs, cwd=ROOT)
    assert code == 0, err
    for words in jobs:
        name = "-".join(words.split()[:2])
        alone = load(tmp_path / f"{name}-alone.pt")
        for ending in ("", "-on"):
            team = [load(tmp_path / f"{name}-{rank}{ending}.pt") for rank in range(processes)]
            assert len({repr(fingerprint(state)) for state in team}) == 1
            assert_close(team[0], alone)
        assert_close(load(tmp_path / f"{name}-back.pt"), alone)
        if "dfw" in words:  # then the step size depends on the losses of all
            assert all(0 < row["gamma_mean"] < 0.9 for row in alone["history"])


# The command line --------------------------------------------------------------------------------


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32, with steps so short that rounding does not grow much."""
    job = [*SMALL, "--net=float", "--lr=0.001", "--epochs=2", "--batch-size=32"]
    code, out, err = torchrun(2, SCRIPT, *job, "--out=team", "--export=team.dfw", cwd=tmp_path)
    assert code == 0, err
    assert "Warning" not in err
    assert cifar_resnet20.main([*job, f"--out={tmp_path / 'one'}"]) == 0
    expected = capsys.readouterr().out.splitlines()
    *lines, exported = out.splitlines()
    assert len(lines) == len(expected)
    assert lines[1] == expected[1] + ", 2 processes"
    assert exported.startswith("exported team.dfw")
    assert {p.name for p in (tmp_path / "team").iterdir()} == {
        "checkpoint.pt",
        "curves.png",
        "metrics.csv",
    }
    for row, other in zip(metrics(tmp_path / "team"), metrics(tmp_path / "one"), strict=True):
        for key, value in other.items():
            images = 359 if key == "test_accuracy" else 64
            tolerance = {"abs": 3 / images} if "accuracy" in key else {"rel": 1e-3}
            assert row[key] == pytest.approx(value, nan_ok=True, **tolerance), key
    # The other way round: one process goes on with the team's.
    assert cifar_resnet20.main(["--resume", f"--out={tmp_path / 'team'}"]) == 0
    assert "2 of 2 epochs done" in capsys.readouterr().out


def test_ctrl_c_between_one_process_and_one(tmp_path: Path) -> None:
    """Begun by one process, resumed by two, interrupted, and resumed by one."""
    out = tmp_path / "my run"
    digits = data.load(None, limit=64)
    settings = Settings.choose({"device": "cpu", "amp": "off", "limit": 64, "epochs": 500})
    run = Run(settings, digits)
    run.train_epoch()
    out.mkdir()
    checkpoint.save(out, run.state_dict())

    process = start(2, SCRIPT, "--resume", "--out=my run", "--threads=1", cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not (out / "metrics.csv").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, printed, err = finish(process)
    assert code != 0
    assert "2 processes; 1 of 500 epochs done" in printed
    assert not from_the_example(err)
    (line,) = [line for line in err.splitlines() if "Interrupted" in line]
    command = f"torch.distributed.run --nproc-per-node 2 {SCRIPT} --out 'my run' --resume"
    assert line == f"Interrupted. To go on: {Path(sys.executable).name} -m {command}"
    assert not [p for p in out.iterdir() if p.name.endswith(".part")]

    stored = checkpoint.load(out)
    done = len(stored["history"])
    assert done >= 2
    run = Run(settings, digits)
    run.load_state_dict(stored)
    assert run.train_epoch()["epoch"] == done + 1


# Errors ------------------------------------------------------------------------------------------


def from_the_example(err: str) -> list[str]:
    """Lines of tracebacks of what torchrun has started; when that fails, it has one of its own."""
    return [line for line in err.splitlines() if f'File "{ROOT / "examples"}' in line]


def the_error(processes: int, script: Path, *arguments: str, cwd: Path) -> str:
    """The one message of a run that fails."""
    code, _, err = torchrun(processes, script, *arguments, cwd=cwd)
    assert code != 0
    assert not from_the_example(err)
    (message,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "exitcode  : 2 " in err
    return message


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--net=quaternary"], "--net: invalid choice"),  # before torch is there
        (["--table"], "--table is for one process"),
        (["--compile", *SMALL], "--compile is for one process"),
        (["--batch-size=1", *SMALL], "--batch-size 1 is less than the 2 processes"),
    ],
)
def test_an_error_of_all(arguments: list[str], reason: str, tmp_path: Path) -> None:
    assert reason in the_error(2, SCRIPT, *arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_first(tmp_path: Path) -> None:
    """It cannot write, while the others are in the next epoch already."""
    (tmp_path / "run" / "metrics.csv").mkdir(parents=True)
    message = the_error(2, SCRIPT, *SMALL, "--out=run", cwd=tmp_path)
    assert "run/metrics.csv" in message
    assert "Is a directory" in message


def test_an_error_of_another(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("""
import os
import sys

import cifar_resnet20
from resnet20 import data
from resnet20.errors import UserError

def fail(*arguments):
    raise UserError("only here")

if os.environ["RANK"] == "1":
    data.load = fail
sys.exit(cifar_resnet20.main(sys.argv[1:]))
""")
    assert the_error(2, script, *SMALL, cwd=tmp_path) == "error: only here"
