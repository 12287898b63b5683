"""The example's --relax: weights that go from float to quantized over a share of the run."""

import itertools
from pathlib import Path

import cifar_resnet20
import pytest
from resnet20.data import Data
from resnet20.errors import UserError
from resnet20.schedule import relaxation
from resnet20.settings import Settings
from resnet20.training import Run
from test_example_float_epochs import assert_resumes, levels


def choose(**given: object) -> Settings:
    small = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 4, "relax": 0.5}
    return Settings.choose(small | {"net": "ternary"} | given)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("steps", [2, 7, 100])
def test_schedule(share: float, steps: int) -> None:
    """Evenly from 1 to 0, which it is at the end whatever the share."""
    values = [relaxation(share, step, steps) for step in range(-1, steps)]
    assert values[0] == 1
    assert values[-1] == 0
    falls = [a - b for a, b in itertools.pairwise(values) if b > 0]
    assert falls == pytest.approx([1 / max(1, round(share * steps))] * len(falls))
    zeros = sum(value == 0 for value in values)
    assert zeros == pytest.approx(steps * (1 - share), abs=1.5 + 1e-9)


@pytest.mark.parametrize("net", ["binary", "xnor", "ternary", "uniform"])
def test_weights_are_float_at_first_and_quantized_at_the_end(net: str, digits: Data) -> None:
    run = Run(choose(net=net), digits)
    plain = Run(choose(net=net, relax=0.0), digits)
    assert max(levels(run)) > 10 > max(levels(plain))
    quantized, rest = run.optimizer.param_groups
    seen = []
    for many in (True, False, False, False):
        run.train_epoch()
        assert (max(levels(run)) > 10) == many
        seen.append(quantized["relaxation"])
        assert rest["relaxation"] == 0.0  # which is not quantized
    assert seen == [0.5, 0.0, 0.0, 0.0]
    assert run.optimizer.state_dict()["param_groups"][0]["quantizer"] is not None


@pytest.mark.parametrize("stopped_after", [1, 2])
@pytest.mark.parametrize(("net", "average"), [("binary", None), ("ternary", 0.5)])
def test_resumed_run_ends_bit_for_bit_the_same(
    net: str, average: float | None, stopped_after: int, digits: Data, tmp_path: Path
) -> None:
    settings = choose(net=net, average=average, relax=0.75)
    assert_resumes(settings, stopped_after, digits, tmp_path)


def test_flips_are_those_of_the_quantized_weights(digits: Data) -> None:
    """Relaxed weights are hardly ever 0, but their latents may be in the zone of 0."""
    run = Run(choose(net="ternary"), digits)
    zones = run.watch._zones()
    assert all((zone == 0).any() for zone in zones)
    assert all((zone == -1).any() for zone in zones)
    for step, _ in enumerate(run.steps(0)):
        assert run.watch.flip_rate() < 0.1, step


def test_without_it_nothing_is_set(digits: Data) -> None:
    run = Run(choose(relax=0.0), digits)
    assert run.optimizer.param_groups[0]["relaxation"] == 0.0
    run.optimizer.param_groups[0]["relaxation"] = 0.25
    next(run.steps(0))
    assert run.optimizer.param_groups[0]["relaxation"] == 0.25


def test_what_it_says_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--limit=64", "--batch-size=16", "--threads=1", "--device=cpu", "--amp=off"]
    job += ["--net=binary", "--epochs=2", "--relax=0.75"]
    out, file = tmp_path / "run", tmp_path / "net.dfw"
    assert cifar_resnet20.main([*job, "--out", str(out), "--export", str(file)]) == 0
    assert "smoothed SVM loss, relaxed for 75% of the run;" in capsys.readouterr().out
    assert len(file.read_bytes()) < 60_000  # a bit a weight


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"net": "float"}, "--relax is for --optimizer dfw with quantized weights"),
        ({"optimizer": "adam"}, "--relax is for --optimizer dfw with quantized weights"),
        ({"optimizer": "parq"}, "--relax is for --optimizer dfw with quantized weights"),
        ({"float_epochs": 1}, "choose one"),
    ],
)
def test_what_does_not_go_together(given: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose(**given)


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan", "much"])
def test_bad_share(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cifar_resnet20.main([f"--relax={share}"])
    assert "--relax" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["--table", "--bench=1"])
def test_not_with_other_jobs(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cifar_resnet20.main([job, "--relax=0.5"]) == 2
    assert f"--relax does not go with {job.partition('=')[0]}" in capsys.readouterr().err


def test_it_is_part_of_the_run() -> None:
    with pytest.raises(UserError, match=r"has --relax 0\.5, not 0\.7"):
        choose().moved({"relax": 0.7})
    stored = choose(relax=0.0).to_dict()
    del stored["relax"]
    assert Settings.of_checkpoint(stored).relax == 0.0
