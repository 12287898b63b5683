"""The measurement of steps as a user runs it, at sizes that take seconds. No time is asserted."""

import csv
import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import step_speed
import torch
from helpers import clone_params, draw_gradients, make_params
from stepspeed import contenders, measure, report, shapes
from stepspeed.contenders import CAP, CONTENDERS, NONE, REFERENCES, SEARCH
from stepspeed.measure import Job, peak_bytes
from stepspeed.original import OriginalDFW
from torch.nn import Parameter

from dfw_opt import DFW

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "step_speed.py"
CPU = torch.device("cpu")
TINY = ["--threads", "1", "--repeats", "2"]
JOBS = [(c.name, situation) for c in CONTENDERS for situation in c.situations]
Row = dict[str, str]


def read(out: Path) -> list[Row]:
    with (out / report.TABLE).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = step_speed.main(list(arguments))
    except SystemExit as stop:
        code = int(str(stop.code))
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from a checkout, its folder and what it printed."""
    out = tmp_path_factory.mktemp("speed")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *TINY, "--sizes", "70k", "--out", "here"],
        cwd=out,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return out / "here", result.stdout


class TestRun:
    def test_every_optimizer_in_every_shape(self, done: tuple[Path, str]) -> None:
        rows = read(done[0])
        assert tuple(rows[0]) == report.COLUMNS
        names = ["resnet20", "70k many", "70k one"]
        expected = [(shape, *job) for shape in names for job in JOBS]
        assert [(r["shape"], r["optimizer"], r["situation"]) for r in rows] == expected
        assert {r["shape"]: r["tensors"] for r in rows} == dict(
            zip(names, ("59", "96", "1"), strict=True)
        )
        for r in rows:
            assert float(r["ms_quartile_1"]) <= float(r["ms"]) <= float(r["ms_quartile_3"])
            for column, name in zip(("of_adamw_fused", "of_sgd_foreach"), REFERENCES, strict=True):
                assert float(r[column]) > 0
                assert r["optimizer"] != name or float(r[column]) == 1
            assert (r["repeats"], r["threads"], r["device"]) == ("2", "1", "cpu")

    def test_prints_the_same(self, done: tuple[Path, str]) -> None:
        out, printed = done
        lines = [line for line in printed.splitlines() if line.startswith("| ")]
        names = [line.split(" | ")[0].strip("| ") for line in lines]
        assert names == ["optimizer", *(", ".join(filter(None, job)) for job in JOBS)] * 3
        assert "70k many: 69,984 parameters, tensors: 96" in printed
        assert "not as wanted" not in printed
        assert "left out" not in printed
        assert (out / report.FIGURE).read_bytes().startswith(b"\x89PNG")

    def test_situations(self, done: tuple[Path, str]) -> None:
        for r in read(done[0]):
            if r["situation"] == NONE:
                assert r["gamma"] == r["gamma_min"] == r["gamma_max"] == ""
            elif r["situation"] == CAP:
                assert r["gamma"] == r["gamma_min"] == r["gamma_max"] == "1"
            elif r["optimizer"] == "binary-closed":
                assert float(r["gamma"]) == pytest.approx(0.5, abs=1e-4)
            else:  # above the closed form: some weights are at their walls
                assert 0.5 < float(r["gamma_min"]) <= float(r["gamma_max"]) < 1

    def test_state(self, done: tuple[Path, str]) -> None:
        expected = {"sgd": 4, "adamw": 8, "dfw": 4, "box": 4, "binary": 8, "ternary": 8}
        for r in read(done[0]):
            kind = r["optimizer"].split("-")[0]
            # In the networks the first and last tensor have no latent.
            assert float(r["state_bytes_per_parameter"]) == pytest.approx(expected[kind], rel=0.03)
            assert int(r["state_bytes"]) >= 4 * int(r["parameters"])

    def test_memory_of_known_optimizers(self, done: tuple[Path, str]) -> None:
        """In units of the parameters: AdamW(foreach) makes one more copy, the first DFW three."""
        percent = {
            (r["shape"], r["optimizer"]): float(r["extra_percent"])
            for r in read(done[0])
            if r["situation"] != SEARCH
        }
        assert percent["70k one", "adamw-foreach"] == pytest.approx(100, abs=3)
        assert 100 < percent["70k many", "adamw-foreach"] < 120
        assert percent["70k one", "adamw"] == pytest.approx(200, abs=3)
        assert percent["70k one", "dfw-original"] == pytest.approx(300, abs=3)
        assert percent["70k one", "sgd-fused"] < 3
        assert percent["70k one", "adamw-fused"] < 3


class TestPeakBytes:
    SIZE = 1 << 20
    SLACK = 1 << 13  # Python's own objects

    def check(self, step: Callable[[], object], expected: int) -> None:
        assert expected <= peak_bytes(step, CPU) <= expected + self.SLACK

    def test_nothing(self) -> None:
        self.check(lambda: None, 0)

    def test_one_after_the_other(self) -> None:
        def step() -> None:
            for _ in range(3):
                x = torch.empty(self.SIZE, dtype=torch.uint8)
                del x

        self.check(step, self.SIZE)

    def test_at_the_same_time(self) -> None:
        def step() -> None:
            x = torch.ones(self.SIZE // 4)
            y = x + x
            del x
            torch.empty(self.SIZE // 2, dtype=torch.uint8)
            del y

        self.check(step, 2 * self.SIZE)

    def test_buffers_of_python(self) -> None:
        self.check(lambda: bytearray(self.SIZE), self.SIZE)
        self.check(lambda: (ctypes.c_double * (self.SIZE // 8))(), self.SIZE)

    def test_what_was_there_before_does_not_count(self) -> None:
        held: list[Any] = [torch.empty(self.SIZE, dtype=torch.uint8), bytearray(self.SIZE)]

        def step() -> None:
            held.clear()
            torch.empty(self.SIZE // 2, dtype=torch.uint8)

        assert peak_bytes(step, CPU) <= self.SIZE // 2 + self.SLACK


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str
)
def test_original_is_dfw(
    momentum: float, weight_decay: float, dtype: torch.dtype, tolerance: float
) -> None:
    ours = make_params(dtype=dtype)
    theirs = clone_params(ours)
    settings: Any = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    dfw, original = DFW(ours, **settings), OriginalDFW(theirs, **settings)
    gammas = []
    for number in range(20):
        draw_gradients(ours, number)
        draw_gradients(theirs, number)
        loss = torch.tensor((50.0, 1.0, 0.3)[number % 3], dtype=dtype)
        dfw.step(loss=loss)
        original.step(loss=loss)
        assert original.gamma == pytest.approx(float(dfw.gamma or 0), rel=tolerance)
        gammas.append(original.gamma)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(q, p, rtol=tolerance, atol=tolerance)
    assert 1 in gammas
    assert min(gammas) < 0.5


def test_what_is_quantized() -> None:
    """Vectors and the first and last matrix are not; a single matrix is."""
    kinds = {c.name: c for c in CONTENDERS}
    for name in ("binary", "binary-closed", "ternary"):
        params = [Parameter(torch.randn(size)) for size in ((4, 3), (4,), (3, 4), (2, 3), (2,))]
        optimizer = kinds[name].make(params)
        assert [("latent" in optimizer.state[p]) for p in params] == [0, 0, 1, 0, 0]
        one = Parameter(torch.randn(4, 3))
        assert "latent" in kinds[name].make([one]).state[one]


def test_box_holds_all_weights() -> None:
    params = [Parameter(scale * torch.randn(8, 8)) for scale in (1.0, 2.0, 3.0)]
    optimizer = next(c for c in CONTENDERS if c.name == "box").make(params)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == 3
    assert params[0].abs().max() < group["radius"]
    assert params[2].abs().max() == group["radius"]


def test_shapes() -> None:
    net, many, one = shapes.shapes([1_000_000, 1_000_000])
    assert net.parameters == 269_722
    assert (len(many.dimensions), many.name) == (96, "1M many")
    assert one.dimensions == ((1000, 1000),)
    for shape in (net, many, one):
        weights, again = shape.draw(CPU), shape.draw(CPU)
        assert [tuple(w.shape) for w in weights] == list(shape.dimensions)
        assert all(map(torch.equal, weights, again))
        assert 0.97e6 < many.parameters <= 1e6
    assert [shapes.size_name(n) for n in (999, 70_000, 2_500_000)] == ["999", "70k", "2.5M"]


def test_strays_are_counted() -> None:
    def job(situation: str, *gammas: float) -> Job:
        return Job(CONTENDERS[0], situation, None, gammas=list(gammas))

    assert job(NONE).strays == 0
    assert job(CAP, 1.0, 0.9, 1.0).strays == 1
    assert job(SEARCH, 0.0, 1.0, 0.5, float("nan")).strays == 3


def test_shared_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large unconstrained weights are held once; the situations stay."""
    monkeypatch.setattr(measure, "SHARED_FROM", 1)
    *_, one = shapes.shapes([70_000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of weights that others have changed
        jobs = measure.measure(one, contenders.choose(None), CPU, repeats=3)
    first = {job.contender: job.optimizer.param_groups[0]["params"][0] for job in jobs}
    free = {id(p) for contender, p in first.items() if not contender.constrained}
    own = {id(p) for contender, p in first.items() if contender.constrained}
    assert (len(free), len(own)) == (1, 4)
    assert not free & own
    assert [job.strays for job in jobs] == [0] * len(jobs)
    assert all(len(job.milliseconds) == 3 for job in jobs)


def test_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code, printed, err = run(
        capsys, *TINY, "--sizes", "--only", "dfw", "ternary", "--out", str(out)
    )
    assert (code, err) == (0, "")
    rows = read(out)
    assert {r["optimizer"] for r in rows} == {"dfw", "ternary", *REFERENCES}
    assert {r["shape"] for r in rows} == {"resnet20"}
    assert str(out / report.FIGURE) in printed


def test_what_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    available = shapes.available_bytes(CPU)
    assert available is None or available > 1 << 20
    job = [*TINY, "--only", "sgd", "--sizes", "30k", "5M", "--out"]
    monkeypatch.setattr(shapes, "available_bytes", lambda device: 100 << 20)
    code, printed, err = run(capsys, *job, str(tmp_path / "some"))
    assert (code, err) == (0, "")
    for name in ("5M many", "5M one"):
        assert f"{name}: left out, as it needs about " in printed
    assert {r["shape"] for r in read(tmp_path / "some")} == {"resnet20", "30k many", "30k one"}

    monkeypatch.setattr(shapes, "available_bytes", lambda device: 1000)
    code, _, err = run(capsys, *job, str(tmp_path / "none"))
    assert code == 2
    assert "not enough memory for any shape" in err


def test_interrupted_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = measure.measure

    def second_is_interrupted(shape: shapes.Shape, *arguments: Any) -> list[Job]:
        if shape.name != "resnet20":
            raise KeyboardInterrupt
        return whole(shape, *arguments)

    monkeypatch.setattr(measure, "measure", second_is_interrupted)
    job = [*TINY, "--only", "sgd", "--sizes", "2k", "--out", str(tmp_path)]
    code, _, err = run(capsys, *job)
    assert code == 130
    assert str(tmp_path) in err
    assert len(read(tmp_path)) == 3
    before = (tmp_path / report.TABLE).read_bytes()

    code, _, err = run(capsys, *job)
    assert code == 2
    assert "already holds a step_speed.csv; choose another --out" in err
    assert (tmp_path / report.TABLE).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--sizes", "1X"], "--sizes: must be a number such as 500k or 25M, not '1X'"),
        (["--sizes", "-5k"], "-5k"),
        (["--sizes", "10"], "--sizes: must be at least 1k"),
        (["--repeats", "1"], "--repeats: must be at least 2"),
        (["--repeats", "few"], "--repeats: invalid whole number value"),
        (["--threads", "0"], "--threads: must be at least 1"),
        (["--device", "abacus"], "--device: invalid choice"),
        (["--only", "sgd", "adam"], "--only: there is no 'adam'; choose from sgd "),
        (["--speed", "high"], "unrecognized arguments: --speed"),
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
    code, printed, err = run(capsys, *arguments)
    assert (code, printed) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert reason in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "--device", "cuda", "--out", str(tmp_path / "out"))
    assert code == 2
    assert err == "error: --device cuda cannot be used here; --device cpu always can\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = 1 << 20
    device = torch.device("cuda")
    peak = peak_bytes(lambda: torch.empty(size, dtype=torch.uint8, device=device), device)
    assert size <= peak < 2 * size
    job = [*TINY, "--device", "cuda", "--sizes", "70k", "--out", str(tmp_path)]
    code, printed, err = run(capsys, *job)
    assert (code, err) == (0, "")
    assert "not as wanted" not in printed
    rows = read(tmp_path)
    assert len(rows) == 3 * len(JOBS)
    assert {r["device"] for r in rows} == {torch.cuda.get_device_name()}


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    for out in ("file", "file/below"):
        code, _, err = run(capsys, *TINY, "--sizes", "--out", str(tmp_path / out))
        assert code == 2
        assert len(err.splitlines()) == 1
        assert "choose another --out" in err
    assert (tmp_path / "file").read_text() == "kept"


def test_help_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('loaded')")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert "--sizes" in result.stdout


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
