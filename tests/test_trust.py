"""What a user may rely on: when numbers are bad, disks full, files damaged, and in threads.

What takes minutes is in test_trust_slow.py.
"""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cifar_resnet20
import full_disk
import pytest
import torch
from helpers import (
    KINDS,
    MAIN_KINDS,
    Kind,
    everything,
    fingerprint,
    make_params,
)
from helpers import train as take_steps
from resnet20 import checkpoint, data
from resnet20.data import Data
from resnet20.errors import UserError
from resnet20.settings import Settings
from resnet20.training import Run, train
from runs import ending
from torch import Tensor, nn

from dfw_opt import MultiClassHingeLoss

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "examples", ROOT / "tests"))),
}
THREE = pytest.mark.parametrize("kind", MAIN_KINDS, ids=str)
# So large that some steps have to be shortened: then γ depends on everything else.
LR = 3.0
SMALL: dict[str, Any] = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 2}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def draw_batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


class TestNotFinite:
    """See also test_invariants.py, for a loss and single elements of synthetic gradients, and
    test_data_parallel.py and test_sharded.py, for one of several ranks.
    """

    @THREE
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["input", "gradient", "loss"])
    def test_one_micro_batch(self, kind: Kind, bad: float, where: str) -> None:
        """Of four whose gradients add up: their step is skipped, and that is all."""

        def run(steps: list[int]) -> Any:
            model = make_model()
            optimizer = kind.make(model.parameters(), lr=LR)
            for step in steps:
                optimizer.zero_grad()
                total = torch.zeros(())
                for part in range(4):
                    inputs, labels = draw_batch(4 * step + part)
                    spoiled = step == 2 and part == 1
                    if spoiled and where == "input":
                        inputs[3, 2] = bad
                    loss = MultiClassHingeLoss()(model(inputs), labels) / 4
                    loss.backward()
                    if spoiled and where == "gradient":
                        model[2].weight.grad.view(-1)[5] = bad  # type: ignore[union-attr, operator]
                    total += bad if spoiled and where == "loss" else loss.detach()
                optimizer.step(loss=total)
                assert optimizer.gamma.isnan() == (step == 2)
            assert int(optimizer.skipped_steps) == (2 in steps)
            return everything(optimizer)

        assert run([0, 1, 2, 3, 4]) == run([0, 1, 3, 4])
        assert run([2, 0, 1]) == run([0, 1])


@pytest.fixture(scope="module")
def digits() -> Data:
    return data.load(None, limit=32)


@pytest.fixture(scope="module")
def begun(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after the first of two epochs."""
    out = tmp_path_factory.mktemp("begun")
    run = Run(Settings.choose(SMALL | {"net": "ternary", "limit": 32}), digits)
    run.train_epoch()
    checkpoint.save(out, run.state_dict())
    return out


def resume(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cifar_resnet20.main(["--resume", "--out", str(out)])
    return code, capsys.readouterr().err


class TestDisk:
    def test_a_file_that_may_not_grow(
        self, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The write of the next checkpoint fails in the middle; later the run goes on."""
        resource = pytest.importorskip("resource")
        shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
        before = (tmp_path / checkpoint.NAME).read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        try:
            code, err = resume(tmp_path, capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "File too large" in err
        assert "the file that is there is unchanged" in err
        assert (tmp_path / checkpoint.NAME).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]
        assert resume(tmp_path, capsys) == (0, "")
        assert len(checkpoint.load(tmp_path)["history"]) == 2

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a tmpfs")
    def test_a_full_and_a_read_only_file_system(
        self, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        mountpoint = tmp_path / "mount"
        mountpoint.mkdir()
        shutil.copytree(begun, tmp_path / "begun")
        before = tmp_path / "begun" / checkpoint.NAME
        command = ["unshare", "-rm", sys.executable, full_disk.__file__, before, mountpoint]
        try:
            result = subprocess.run(
                list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True
            )
        except FileNotFoundError:
            pytest.skip("no unshare here")
        if result.returncode == full_disk.NOT_ALLOWED or "unshare failed" in result.stderr:
            pytest.skip(f"not allowed to mount: {result.stdout}{result.stderr}")
        assert result.returncode == 0, result.stderr
        ends = json.loads(result.stdout.splitlines()[-1])
        for name, reason in (
            ("full", "No space left on device"),
            ("read_only", "Read-only file system"),
        ):
            assert ends[name]["code"] == 2
            assert len(ends[name]["errors"].splitlines()) == 1
            assert reason in ends[name]["errors"]
            assert ends[name]["epochs"] == 1
            assert ends[name]["files"] == [checkpoint.NAME]
            assert ends[name]["digest"] == hashlib.sha256(before.read_bytes()).hexdigest()
        assert ends["enough"]["code"] == 0
        assert ends["enough"]["epochs"] == 2
        assert resume(before.parent, capsys)[0] == 0
        assert ending(before.parent) == ending(before.parent / "after")

    def test_leftovers_of_killed_runs_are_removed(
        self, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Not those of a run that lives, and not what others call so."""
        shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        rest = f"{gone.pid}-0badcafe.part"
        dead = [f".checkpoint.pt.{rest}", f".metrics.csv.{rest}"]
        # A process in a container often gets the number that the one before it had.
        dead += [f".checkpoint.pt.{os.getpid()}-0badcafe.part"]
        alive = [f".checkpoint.pt.{os.getppid()}-0badcafe.part", f".notes.{rest}", "file.part"]
        for name in dead + alive:
            (tmp_path / name).write_bytes(b"half")
        assert resume(tmp_path, capsys) == (0, "")
        left = {path.name for path in tmp_path.iterdir()}
        assert not left & set(dead)
        assert left >= set(alive)


class TestDamage:
    """Nothing is loaded, and an error says why. The file is always refused as a whole."""

    def test_every_bit_counts(self, tmp_path: Path) -> None:
        """torch.load by itself takes most flips for weights."""
        content = {"weights": torch.linspace(-1, 1, 50), "epoch": 3}
        stored = checkpoint.save(tmp_path, content).read_bytes()
        for bit in range(8 * len(stored)):
            assert checkpoint.decode(_flipped(stored, bit)) is None
        assert fingerprint(checkpoint.decode(stored)) == fingerprint({"format": 2} | content)

    def test_every_length_counts(self, tmp_path: Path) -> None:
        stored = checkpoint.save(tmp_path, {"epoch": 3}).read_bytes()
        for length in range(len(stored)):
            assert checkpoint.decode(stored[:length]) is None
            assert checkpoint.decode(stored[length + 1 :]) is None
        for more in (b"\0", b"\n", stored):
            assert checkpoint.decode(stored + more) is None
        assert checkpoint.decode(stored) == {"format": 2, "epoch": 3}

    def test_flips_and_cuts_of_a_real_one(self, begun: Path, tmp_path: Path) -> None:
        whole = (begun / checkpoint.NAME).read_bytes()
        draw = random.Random(0)
        for _ in range(50):
            self.refuse(tmp_path, _flipped(whole, draw.randrange(8 * len(whole))))
            self.refuse(tmp_path, whole[: draw.randrange(len(whole))])

    def refuse(self, folder: Path, content: bytes) -> None:
        (folder / checkpoint.NAME).write_bytes(content)
        with pytest.raises(UserError, match="is no checkpoint of this example, or is damaged"):
            checkpoint.load(folder)

    def test_it_is_still_a_file_of_torch(self, begun: Path) -> None:
        assert torch.load(begun / checkpoint.NAME, weights_only=True)["format"] == 2

    @pytest.mark.parametrize("sealed", [False, True])
    @pytest.mark.parametrize(
        "foreign", ["adam", "model", "tensor", "list", "code", "format 1", "empty", "text"]
    )
    def test_foreign(
        self, foreign: str, sealed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Also with a valid seal, which anyone can make."""
        evidence = tmp_path / "code has run"
        content = {
            "adam": lambda: _saved(torch.optim.Adam(make_model().parameters()).state_dict()),
            "model": lambda: _saved(make_model().state_dict()),
            "tensor": lambda: _saved(torch.zeros(3)),
            "list": lambda: _saved([1, 2]),
            "code": lambda: pickle.dumps(_Code(evidence), protocol=2),
            "format 1": lambda: _saved({"format": 1, "settings": {}}),
            "empty": lambda: b"",
            "text": lambda: b"no checkpoint\n" * 20,
        }[foreign]()
        self.refuse(tmp_path, content + checkpoint.seal(content) * sealed)
        before = (tmp_path / checkpoint.NAME).read_bytes()
        code, err = resume(tmp_path, capsys)
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "choose another --out" in err
        assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]
        assert (tmp_path / checkpoint.NAME).read_bytes() == before

    def test_the_code_would_run(self, tmp_path: Path) -> None:
        """So that its not having run above says something."""
        pickle.loads(pickle.dumps(_Code(tmp_path / "code has run")))
        assert (tmp_path / "code has run").exists()

    def test_a_directory(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / checkpoint.NAME).mkdir()
        code, err = resume(tmp_path, capsys)
        assert code == 2
        assert err.startswith("error: cannot read ")
        assert len(err.splitlines()) == 1

    def test_of_another_network(self, begun: Path, digits: Data, tmp_path: Path) -> None:
        """As after a change to the example: whole, sealed, and not for this code."""
        for part, value in (
            ("model", make_model().state_dict()),
            ("optimizer", torch.optim.Adam(make_model().parameters()).state_dict()),
        ):
            state = checkpoint.load(begun) | {part: value}
            checkpoint.save(tmp_path, state)
            settings = Settings.of_checkpoint(state["settings"])
            with pytest.raises(UserError, match="another version of this example"):
                train(settings, digits, tmp_path, resume=True)

    @THREE
    def test_one_entry_of_an_optimizers_state(self, kind: Kind) -> None:
        """Whichever it is, neither the optimizer nor its parameters have changed."""
        params = make_params()
        source = kind.make(params)
        take_steps(source, params, 2)
        others = make_params(seed=5)
        optimizer = kind.make(others)
        take_steps(optimizer, others, 3)
        before = everything(optimizer)
        count = 0
        for damaged in _damaged(source.state_dict()):
            with pytest.raises(ValueError, match=r"."):
                optimizer.load_state_dict(damaged)
            assert everything(optimizer) == before
            count += 1
        assert count > 20
        optimizer.load_state_dict(source.state_dict())
        assert everything(optimizer)[1:] == everything(source)[1:]

    @THREE
    def test_values_that_no_optimizer_has(self, kind: Kind) -> None:
        params = make_params()
        optimizer = kind.make(params)
        take_steps(optimizer, params, 2)
        before = everything(optimizer)
        saved = optimizer.state_dict()
        for index, state in saved["state"].items():
            for key, value in state.items():
                infinite = value.clone()
                infinite.view(-1)[0] = math.inf
                for bad in (infinite, value * math.nan, value.to_sparse(), value.to("meta")):
                    damaged = copy.deepcopy(saved)
                    damaged["state"][index][key] = bad
                    with pytest.raises(ValueError, match=key):
                        optimizer.load_state_dict(damaged)
                    assert everything(optimizer) == before


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _damaged(saved: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Copies of an optimizer's state, each with one entry spoiled."""
    for index, state in saved["state"].items():
        for key, value in state.items():
            for bad in (None, value.tolist(), value.long(), value.new_zeros(7), value > 0):
                copied = copy.deepcopy(saved)
                copied["state"][index][key] = bad
                yield copied
        copied = copy.deepcopy(saved)
        copied["state"][index]["exp_avg"] = torch.zeros(3)
        yield copied
        yield saved | {"state": {**saved["state"], index: None}}
    for number, group in enumerate(saved["param_groups"]):
        # Nothing depends on these: how a step is made, options of other quantizers, and what older
        # checkpoints do not have.
        unused = {"foreach", "fused", "bits", "threshold", "relaxation"}
        if group.get("quantizer") == "ternary":
            unused.remove("threshold")
        for key in group.keys() - unused:
            copied = copy.deepcopy(saved)
            del copied["param_groups"][number][key]
            yield copied
        for key in ("lr", "momentum", "weight_decay", "eps"):
            for bad in (-1.0, math.nan, "x", None):
                copied = copy.deepcopy(saved)
                copied["param_groups"][number][key] = bad
                yield copied


class _Code:
    """What a malicious pickle holds."""

    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.evidence),)


def _saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_two_processes_end_alike(tmp_path: Path) -> None:
    """The same command twice on one machine: every bit, of the exported file too."""
    job = ["--net=ternary", "--limit=32", "--batch-size=16", "--epochs=2", "--threads=1"]
    for name, hash_seed in (("one", "1"), ("two", "2")):
        places = [f"--out={tmp_path / name}", f"--export={tmp_path / name}.dfw"]
        script = [sys.executable, cifar_resnet20.__file__, *job, *places]
        environment = ENVIRONMENT | {"PYTHONHASHSEED": hash_seed}
        subprocess.run(script, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert ending(tmp_path / "one") == ending(tmp_path / "two")
    assert (tmp_path / "one.dfw").read_bytes() == (tmp_path / "two.dfw").read_bytes()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_threads_do_not_disturb_each_other(kind: Kind) -> None:
    """Two optimizers, each with its model in a thread, end as they do one after the other."""
    start = threading.Barrier(2)

    def run(model: nn.Module, seed: int, together: bool) -> Any:
        optimizer = kind.make(model.parameters(), lr=LR, weight_decay=1e-3)
        gammas = []
        if together:
            start.wait()
        for step in range(300):
            inputs, labels = draw_batch(1000 * seed + step)
            if step == 50:
                inputs[0, 0] = math.nan
            loss = MultiClassHingeLoss()(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
            gammas.append(float(optimizer.gamma))
        assert sum(0 < gamma < 1 for gamma in gammas) > 10
        return everything(optimizer), repr(gammas), int(optimizer.skipped_steps)

    seeds = (0, 1)
    expected = [run(make_model(seed), seed, together=False) for seed in seeds]
    assert expected[0] != expected[1]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(run, map(make_model, seeds), seeds, (True, True)))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected
