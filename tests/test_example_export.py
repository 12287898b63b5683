"""The example's --export: the trained network in a small file, and the file in a float network."""

import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar_resnet20
import pytest
import torch
from resnet20 import checkpoint, export, nets, straight_through, training
from resnet20.data import load
from resnet20.settings import Settings
from resnet20.training import Run
from torch import Tensor

from dfw_opt import load_packed, save_packed

ROOT = Path(__file__).parent.parent
SMALL = ["--limit=320", "--batch-size=16", "--threads=1", "--device=cpu", "--amp=off", "--epochs=1"]
PAIRS = [("xnor", "dfw"), ("ternary", "dfw"), ("xnor", "adam"), ("ternary", "sgd")]
ONE_IS_ENOUGH = pytest.mark.parametrize("exported", [PAIRS[-1]], indirect=True, ids="-".join)


@dataclass(frozen=True)
class Exported:
    out: Path
    file: Path
    printed: str
    logits: Tensor
    """Of the network that was trained, as it came out of training."""


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    net, optimizer = request.param
    folder = tmp_path_factory.mktemp("exported")
    out, file = folder / "run", folder / "new" / "net.dfw"
    job = [*SMALL, "--net", net, "--optimizer", optimizer]
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert cifar_resnet20.main([*job, "--out", str(out), "--export", str(file)]) == 0
    return Exported(out, file, stream.getvalue(), logits(run_in(out)))


def run_in(out: Path) -> Run:
    state = checkpoint.load(out)
    run = Run(Settings.of_checkpoint(state["settings"]), load(None, limit=320))
    run.load_state_dict(state)
    return run


@torch.no_grad()
def logits(run: Run) -> Tensor:
    result: Tensor = run.model.eval()(run.augmenter.normalise(run.data.held_out.images[:100]))
    return result


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run in this process; return the exit code and what is on stderr."""
    code = cifar_resnet20.main(list(map(str, arguments)))
    return code, capsys.readouterr().err


def test_a_fresh_process_computes_the_same(exported: Exported, tmp_path: Path) -> None:
    """It knows the float network and the file, and gets every bit of the scores."""
    net = run_in(exported.out).settings.net
    script = f"""
import sys, torch
from dfw_opt import load_packed
from resnet20 import nets
from resnet20.augment import Augmenter
from resnet20.data import load
torch.set_num_threads(1)
model = load_packed(nets.build({net!r}, "resnet", 77), sys.argv[1]).eval()
data = load(None, limit=320)
images = Augmenter(data, torch.device("cpu")).normalise(data.held_out.images[:100])
with torch.no_grad():
    torch.save(model(images), sys.argv[2])
"""
    subprocess.run(
        [sys.executable, "-c", script, str(exported.file), str(tmp_path / "logits.pt")],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}"},
        check=True,
    )
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(found, exported.logits)
    assert len(found.unique(dim=0)) > 1


def test_what_it_says(exported: Exported) -> None:
    history = checkpoint.load(exported.out)["history"]
    accuracy = 100 * history[-1]["held_out_accuracy"]
    *_, line = exported.printed.splitlines()
    pattern = r"exported (.+): ([\d,]+) bytes, ([\d.]+) times smaller than with torch.save; (.+)"
    match = re.fullmatch(pattern, line)
    assert match, line
    path, size, times, rest = match.groups()
    assert path == str(exported.file)
    assert rest == f"test accuracy after reloading {accuracy:.2f} %"
    assert int(size.replace(",", "")) == exported.file.stat().st_size
    plain = io.BytesIO()
    torch.save(nets.build("ternary", "resnet", 0).state_dict(), plain)
    assert float(times) == pytest.approx(plain.tell() / exported.file.stat().st_size, rel=0.02)
    assert float(times) > 15


def test_a_baseline_exports_quantized_weights(exported: Exported) -> None:
    trained = run_in(exported.out)
    baselines = straight_through.layers(trained.model)
    plain = load_packed(nets.build(trained.settings.net, "resnet", 5), exported.file)
    assert not straight_through.layers(plain)
    convolutions = [m for m in plain.blocks.modules() if isinstance(m, torch.nn.Conv2d)]
    if baselines:
        assert len(baselines) == len(convolutions)
        for layer, convolution in zip(baselines, convolutions, strict=True):
            assert torch.equal(layer.quantized(), convolution.weight)
            assert not torch.equal(layer.weight, convolution.weight)
    levels = 2 if trained.settings.net == "xnor" else 3
    for convolution in convolutions:
        assert all(len(channel.unique()) <= levels for channel in convolution.weight)


@ONE_IS_ENOUGH
def test_again_after_the_end(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run exports the same bytes again, also to where they are."""
    before, other = exported.file.read_bytes(), tmp_path / "other.dfw"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".other.dfw.{gone.pid}-0a1b.part").write_bytes(b"left by a killed export")
    job = ["--resume", "--out", exported.out]
    assert run(capsys, *job, "--export", other) == (0, "")
    assert run(capsys, *job, "--export", exported.file) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["other.dfw"]
    assert other.read_bytes() == before
    assert exported.file.read_bytes() == before


@ONE_IS_ENOUGH
def test_nothing_is_overwritten(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by another run, and not by this one, if what is there is not its own network."""
    fresh = tmp_path / "fresh"
    code, err = run(capsys, *SMALL, "--out", fresh, "--export", exported.file)
    assert code == 2
    assert err == f"error: {exported.file} already exists; remove it or choose another --export\n"
    assert not fresh.exists()

    photo, other = tmp_path / "photo.png", tmp_path / "other.dfw"
    photo.write_bytes(b"\x89PNG")
    trained = run_in(exported.out)
    model = nets.build(trained.settings.net, "resnet", 0)
    model.load_state_dict(straight_through.plain_state(trained.model))
    with torch.no_grad():
        model.linear.bias[3] += 1e-6
    save_packed(model, other)
    for path in (photo, other):
        before = path.read_bytes()
        code, err = run(capsys, "--resume", "--out", exported.out, "--export", path)
        assert code == 2
        assert err == f"error: {path} is not the network of this run; choose another --export\n"
        assert path.read_bytes() == before


def test_a_path_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Noticed before the training, and one line."""
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path, tmp_path / "file" / "net.dfw"):
        code, err = run(capsys, *SMALL, "--out", tmp_path / "run", "--export", path)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "choose another --export" in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("job", ["--table", "--bench=2"])
def test_needs_a_single_run(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = run(capsys, job, "--out", tmp_path / "run", "--export", tmp_path / "net.dfw")
    assert code == 2
    assert err.startswith(f"error: --export does not go with {job.partition('=')[0]}")
    assert list(tmp_path.iterdir()) == []


@ONE_IS_ENOUGH
def test_a_disk_that_fills_up_at_the_end(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run is over and kept; only the export is to be repeated."""

    def full(model: object, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export, "save_packed", full)
    job = ["--resume", "--out", exported.out, "--export", tmp_path / "net.dfw"]
    code, err = run(capsys, *job)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "No space left on device" in err
    monkeypatch.undo()
    assert run(capsys, *job) == (0, "")


@ONE_IS_ENOUGH
def test_another_accuracy_is_an_error(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "load_packed", lambda model, path: model)
    job = ["--resume", "--out", exported.out, "--export", tmp_path / "net.dfw"]
    code, err = run(capsys, *job)
    assert code == 2
    assert "is not the network of this run" in err
    monkeypatch.setattr(export, "_same", lambda model, other: True)
    code, err = run(capsys, *job)
    assert code == 2
    accuracy = checkpoint.load(exported.out)["history"][-1]["held_out_accuracy"]
    assert f"instead of {accuracy}; do not use it" in err


def test_interrupted_run_says_where_it_was_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: training.Run) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Run, "train_epoch", interrupted)
    job = ["--out", tmp_path / "run", "--export", tmp_path / "net.dfw"]
    code, err = run(capsys, *SMALL, *job)
    assert code == 130
    assert err.endswith(f"--out {tmp_path / 'run'} --resume --export {tmp_path / 'net.dfw'}\n")
    monkeypatch.undo()
    # A file that came to be in the meantime cannot be this run's, which is not over.
    (tmp_path / "net.dfw").write_text("kept")
    code, err = run(capsys, "--resume", *job)
    assert code == 2
    assert "already exists" in err
    (tmp_path / "net.dfw").unlink()
    assert run(capsys, "--resume", *job) == (0, "")
    assert (tmp_path / "net.dfw").is_file()
