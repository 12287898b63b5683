"""Train ResNet-20 with float, binary, XNOR or ternary weights on CIFAR-10, or on digits.

A Wide ResNet and a DenseNet can be had too, with --arch, and PARQ to compare with.

Without --data it trains on the handwritten digits that come with scikit-learn:

    python cifar_resnet20.py --net xnor --optimizer dfw --export xnor.dfw
    python cifar_resnet20.py --table

CIFAR-10 is downloaded once, and from then on it is --data data:

    python cifar_resnet20.py --net xnor --optimizer dfw --download --data data

N processes, each with its own GPU if there are any, share every batch:

    torchrun --nproc-per-node N cifar_resnet20.py --net xnor --optimizer dfw
"""

import argparse
import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet20.command_line import (
    INTERRUPTED,
    Parser,
    default_net,
    fail,
    has_partners,
    missing,
    whole,
)
from resnet20.errors import UserError

if TYPE_CHECKING:
    from resnet20.data import Data
    from resnet20.distributed import Team
    from resnet20.settings import Settings

_JOB = ("out", "resume", "export", "table", "bench", "download")
# Of a single run, and of a table.
_SIGNS_OF_A_RUN = ("checkpoint.pt", "table.json")


def _real(above: float, below: float, including: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = float(text)
        if not (above < value < below or (including and value == above)):
            bounds = f"{'at least' if including else 'above'} {above:g} and below {below:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    convert.__name__ = "number"
    return convert


def parser() -> argparse.ArgumentParser:
    """The command line. What is not given stays out of the result, so that we know what was."""
    out = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = out.add_argument_group("what to train").add_argument
    add("--arch", choices=("resnet20", "wrn16-2", "densenet28"), help="default: resnet20")
    add(
        "--net",
        choices=("float", "binary", "xnor", "ternary", "uniform"),
        help="default: xnor, which is for resnet20 and not for parq; there binary",
    )
    add("--bits", type=int, choices=range(2, 9), help="of a weight, for uniform (default: 4)")
    add("--shortcut", choices=("resnet", "bireal"), help="around two convolutions, or around each")
    add("--optimizer", choices=("dfw", "adam", "sgd", "parq"), help="default: dfw")
    add("--loss", choices=("svm", "ce"), help="default: svm for dfw, else ce")
    add(
        "--smooth",
        action=argparse.BooleanOptionalAction,
        help="smooth the svm loss (default: for dfw)",
    )
    add(
        "--lr",
        type=_real(0, math.inf),
        help="default: 0.1; xnor with dfw 0.3; adam 0.005, float 0.001",
    )
    add("--momentum", type=_real(0, 1, True), help="default: 0.9; adam's first beta")
    add(
        "--weight-decay",
        type=_real(0, math.inf, True),
        help="of float weights (default: 1e-4 in the float net with dfw or sgd, else 0); "
        "with parq of all (2e-4)",
    )
    add("--radius", type=_real(0, math.inf), help="of dfw's box (default: 1)")
    add("--step-size", choices=("exact", "closed_form"), help="of dfw in its box (default: exact)")
    add("--epochs", type=whole(1), help="default: 20")
    add(
        "--float-epochs",
        type=whole(0),
        metavar="N",
        help="train float weights for the first N of them, and quantize them then (default: 0)",
    )
    add(
        "--relax",
        type=_real(0, 1),
        metavar="SHARE",
        help="with dfw, go from float weights to quantized ones over this share of the run, such "
        "as 0.75",
    )
    add("--batch-size", type=whole(1), help="default: 128; digits 32")
    add(
        "--schedule",
        choices=("none", "cosine", "step", "parq"),
        help="of the lr (default: cosine; parq has its own)",
    )
    add(
        "--average",
        type=_real(0, 1),
        metavar="DECAY",
        help="also judge a moving average of the latents, such as 0.995",
    )
    add("--seed", type=whole(0), help="default: 0")

    add = out.add_argument_group("on what").add_argument
    add("--data", metavar="DIR", help="CIFAR-10's binary version (default: digits)")
    add("--download", action="store_true", help="fetch CIFAR-10 to --data (default: data) first")
    add("--limit", type=whole(1), metavar="N", help="train on the first N images only")
    add(
        "--validate",
        action="store_true",
        help="judge on the last tenth of the training images, not trained on, for tuning",
    )

    add = out.add_argument_group("how").add_argument
    add("--device", help="default: cuda if there is one, else cpu")
    add("--threads", type=whole(1), help="on the cpu (default: torch's)")
    add("--amp", choices=("bf16", "off"), help="default: bf16 where the hardware has it")
    add("--compile", action="store_true", help="compile the network (needs a C++ compiler)")

    add = out.add_argument_group("jobs and results").add_argument
    add("--out", metavar="DIR", help="default: runs/NET-OPTIMIZER or runs/table")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--export", metavar="FILE", help="write the trained network as a packed file")
    add("--table", action="store_true", help="train the poster's five rows under one budget")
    add("--bench", type=whole(1), metavar="STEPS", help="only measure the time of a step")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = vars(parser().parse_args(arguments))
    job = {name: given.pop(name, None) for name in _JOB}
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no γ shows a question mark
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    out = Path(job["out"] or _default_out(given, bool(job["table"])))
    try:
        _run_in_team(given, job, out)
    except ModuleNotFoundError as error:
        return missing(error)
    except UserError as error:
        return fail(str(error))
    except OSError as error:  # what no part of the example has more to say about
        return fail(f"{error}; check that path")
    except KeyboardInterrupt:
        print(_after_interrupt(job, out), file=sys.stderr)
        return INTERRUPTED
    return 0


def _run_in_team(given: dict[str, Any], job: dict[str, Any], out: Path) -> None:
    from resnet20 import distributed

    with distributed.team() as team:
        _run(given, job, out, team)


def _run(given: dict[str, Any], job: dict[str, Any], out: Path, team: "Team") -> None:
    from resnet20 import checkpoint, export, table
    from resnet20.bench import bench
    from resnet20.settings import Settings, option
    from resnet20.training import train

    resume = bool(job["resume"])
    for name in ("table", "bench"):
        if job["export"] and job[name]:
            raise UserError(f"--export does not go with --{name}, which trains no single network")
        if job[name] and team.size > 1:
            raise UserError(f"--{name} is for one process; start it without torchrun")
    for name in ("float_epochs", "relax"):
        if job["bench"] and given.get(name):
            raise UserError(f"{option(name)} does not go with --bench; leave it out")
    if job["download"]:
        given.setdefault("data", "data")
    if team.leads:
        if not job["bench"]:
            _check_out(out, resume, bool(job["table"]))
        if job["download"]:
            _download(Path(given["data"]))
    team.meet()
    if "data" in given:  # a run may be resumed from another directory
        given["data"] = str(Path(given["data"]).resolve())
    if job["bench"]:
        net = {} if given.get("optimizer") == "parq" else {"net": "float"}
        settings = Settings.choose(net | given)
        print(bench(settings, _load(settings), job["bench"]))
    elif job["table"]:
        table.run_table(given, _load, out, resume)
    else:
        finished = False
        if resume:
            stored = checkpoint.load(out)
            settings = Settings.of_checkpoint(stored["settings"]).moved(given)
            finished = len(stored["history"]) == settings.epochs
        else:
            settings = Settings.choose(given)
        data = _load(settings, team.leads)
        if job["export"] and team.leads:
            export.check(Path(job["export"]), finished)
        run = train(settings, data, out, resume, team)
        if job["export"] and team.leads:
            print(export.export(run, Path(job["export"])), flush=True)


def _check_out(out: Path, resume: bool, is_table: bool) -> None:
    """Nothing that a run has left behind is overwritten, and a table is not taken for a run."""
    run, table = ((out / name).exists() for name in _SIGNS_OF_A_RUN)
    if (run or table) and not resume:
        raise UserError(f"{out} already holds a run; add --resume or choose another --out")
    if table and not is_table:
        raise UserError(f"{out} holds a table; add --table or choose another --out")
    if run and is_table:
        raise UserError(f"{out} holds one run, not a table; choose another --out")


def _load(settings: "Settings", speaks: bool = True) -> "Data":
    from resnet20.data import load

    if settings.data is None and speaks:
        print(
            "No --data, so this trains on scikit-learn's handwritten digits, enlarged to 32x32; "
            "for CIFAR-10 add: --download --data data",
            flush=True,
        )
    directory = None if settings.data is None else Path(settings.data)
    return load(directory, settings.limit, settings.validate)


def _download(directory: Path) -> None:
    from resnet20 import download
    from resnet20.progress import DownloadBar

    print(f"CIFAR-10 from {download.CIFAR10.url} to {directory}", flush=True)
    bar = DownloadBar(download.CIFAR10.name)
    try:
        download.fetch(download.CIFAR10, directory, bar)
    finally:
        bar.close()


def _default_out(given: dict[str, Any], is_table: bool) -> str:
    name = f"{given.get('net', default_net(given))}-{given.get('optimizer', 'dfw')}"
    if "arch" in given:
        name = f"{given['arch']}-{name}"
    return f"runs/{'table' if is_table else name}"


def _after_interrupt(job: dict[str, Any], out: Path) -> str:
    if job["bench"]:
        return "Interrupted."
    if not any((out / name).exists() for name in _SIGNS_OF_A_RUN):
        return "Interrupted before the training; run the same command again."
    command = [Path(sys.executable).name]
    if has_partners():
        processes = os.environ["LOCAL_WORLD_SIZE"]
        command += ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    command += [sys.argv[0], "--out", str(out), "--resume"]
    command += ["--table"] * bool(job["table"])
    command += ["--export", job["export"]] if job["export"] else []
    return f"Interrupted. To go on: {shlex.join(command)}"


if __name__ == "__main__":
    sys.exit(main())
