"""Train ResNet-20 with float, binary, XNOR or ternary weights on CIFAR-10, or on digits.

Without --data it trains on the handwritten digits that come with scikit-learn:

    python cifar_resnet20.py --net xnor --optimizer dfw --export xnor.packed
    python cifar_resnet20.py --table

CIFAR-10 is downloaded once, and from then on it is --data data:

    python cifar_resnet20.py --net xnor --optimizer dfw --download --data data

N processes, each with its own GPU if there are any, share every batch:

    torchrun --nproc-per-node N cifar_resnet20.py --net xnor --optimizer dfw
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common import LEADS, Parser, UserError, check_new, how_to_resume, number, resumed, run

JOB = ("out", "resume", "export", "table", "download")
at_least_0 = number(float, least=0)
above_0 = number(float, least=1e-9)
count = number(int, least=1)


def parser() -> Parser:
    """The command line. What is not given stays out of the result, so that we know what was."""
    out = Parser(__doc__)
    switch = argparse.BooleanOptionalAction
    add = out.add_argument_group("what to train").add_argument
    add("--arch", choices=("resnet20", "wrn16-2", "densenet28"), help="default: resnet20")
    nets = ("float", "binary", "xnor", "ternary", "uniform")
    add("--net", choices=nets, help="default: xnor, or binary where that cannot be")
    add("--bits", type=int, choices=range(2, 9), help="of a weight, for uniform (default: 4)")
    add("--shortcut", choices=("resnet", "bireal"), help="around two convolutions, or around each")
    add("--optimizer", choices=("dfw", "adam", "sgd", "muon", "parq"), help="default: dfw")
    add("--norm", choices=("spectral", "euclidean"), help="of dfw's steps (default: spectral)")
    add("--loss", choices=("ce", "svm"), help="cross-entropy (default) or multi-class hinge")
    add("--smooth", action=switch, help="the svm loss smoothed (default; --no-smooth: not)")
    add("--lr", type=at_least_0, help="default: dfw's own; sgd, parq 0.1; adam, muon 0.005")
    add("--momentum", type=number(float, least=0, below=1), help="default: dfw's own; 0.9")
    add("--weight-decay", type=at_least_0, help="of float weights; with dfw and parq of all")
    add("--radius", type=above_0, help="of dfw's box (default: its own)")
    share = number(float, least=1e-9, below=1)
    add("--threshold", type=share, help="of dfw's ternary weights, from 0 to 1 (default: its own)")
    add("--relax", type=share, metavar="SHARE", help="of the run, in which dfw goes from float")
    add("--epochs", type=count, help="default: 20")
    add("--batch-size", type=count, help="default: 128; digits 32")
    schedules = ("none", "cosine", "step", "parq")
    add("--schedule", choices=schedules, help="of lr (default: dfw none, parq its own, cosine)")
    add("--average", action=switch, help="judge the mean weights of the last tenth of all steps")
    add("--seed", type=number(int, least=0), help="default: 0")

    add = out.add_argument_group("on what").add_argument
    add("--data", metavar="DIR", help="CIFAR-10's binary version (default: digits)")
    add("--download", action="store_true", help="fetch CIFAR-10 to --data (default: data) first")
    add("--limit", type=count, metavar="N", help="train on the first N images only")
    add("--validate", action="store_true", help="judge on the last tenth of the training images")

    add = out.add_argument_group("how and where").add_argument
    add("--device", help="default: cuda if there is one, else cpu")
    add("--threads", type=count, help="on the cpu (default: torch's)")
    add("--amp", choices=("bf16", "off"), help="default: bf16 on cuda")
    add("--out", metavar="DIR", help="default: runs/NET-OPTIMIZER or runs/table")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--export", metavar="FILE", help="write the trained network as a packed file")
    add("--table", action="store_true", help="compare DFW with usual optimizers")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = vars(parser().parse_args(arguments))
    job = {name: given.pop(name, None) for name in JOB}
    name = f"{given.get('net', 'xnor')}-{given.get('optimizer', 'dfw')}"
    out = Path(job["out"] or f"runs/{'table' if job['table'] else name}")
    if job["table"] and not (job["out"] or job["resume"]):  # which may be run again and again
        names = ("table", *(f"table-{i}" for i in range(2, 1000)))
        out = next(path for name in names if not (path := out.with_name(name)).exists())
    more = ["--table"] * bool(job["table"]) + ["--export", job["export"]] * bool(job["export"])
    return run(partial(start, given, job, out), partial(how_to_resume, out, *more))


def start(given: dict[str, Any], job: dict[str, Any], out: Path) -> None:
    """Do the job, alone or as one of several processes."""
    from resnet20 import data, settings, table, training

    resume, file = bool(job["resume"]), job["export"]
    if job["table"] and (file or training.RANKS > 1):
        raise UserError("--table goes neither with --export nor with torchrun; leave them out")
    with training.together():
        if job["download"] or "data" in given:  # a run may be resumed from another folder
            given["data"] = str(Path(given.get("data", "data")).resolve())
        if job["download"] and LEADS:
            data.download(Path(given["data"]))
        if job["table"]:
            return table.run_table(given, out, resume)
        if resume:
            chosen = resumed(settings.Settings, out, given, settings.PLACE)
        else:
            chosen = settings.Settings.choose(given)
            check_new(out, "--out")
            check_new(Path(file or ""), "--export")
        training.meet()  # all have looked, and the images are there
        run = training.train(chosen, training.load_data(chosen), out, resume)
        if file and LEADS:
            print(training.export(run, Path(file)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
