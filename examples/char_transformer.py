"""Train a small transformer with float or ternary weights on the text of Python's manual.

    python char_transformer.py --optimizer dfw
    python char_transformer.py --optimizer adamw

The ternary weights of dfw are TernaryDFW's own; adamw and sgd train them as BitNet b1.58 does, by
straight-through gradients. All see the same batches. Embeddings, norms and last layer are float.
"""

import argparse
import contextlib
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet20.command_line import INTERRUPTED, Parser, fail, missing, whole
from resnet20.errors import UserError

_CHECKPOINT = "checkpoint.pt"


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
    positive, least_0 = _real(0, math.inf), _real(0, math.inf, True)
    add = out.add_argument_group("what to train").add_argument
    add("--net", choices=("float", "ternary"), help="default: ternary")
    add("--optimizer", choices=("dfw", "adamw", "sgd"), help="default: dfw")
    add("--lr", type=positive, help="default: dfw and sgd 0.1, adamw 0.003")
    add(
        "--attention-lr",
        type=positive,
        help="of queries and keys (default: --lr, x 10 in ternary dfw)",
    )
    add("--float-lr", type=positive, help="of embeddings, norms and last layer (default: --lr)")
    add("--momentum", type=_real(0, 1, True), help="default: 0.9; adamw's first beta")
    add("--weight-decay", type=least_0, help="of the blocks' matrices (default: adamw 0.1, else 0)")
    add("--clip", type=positive, metavar="NORM", help="clip the gradient; for adamw and sgd")
    add("--steps", type=whole(1), help="default: 1000")
    add("--batch-size", type=whole(1), help="default: 32")
    add("--schedule", choices=("none", "cosine"), help="of the lr (default: cosine)")
    add(
        "--warmup",
        type=whole(0),
        metavar="STEPS",
        help="in which lr rises (default: 20)",
    )
    add("--evaluate-every", type=whole(1), metavar="STEPS", help="default: 100")
    add("--seed", type=whole(0), help="default: 0")

    add = out.add_argument_group("jobs and results").add_argument
    add("--threads", type=whole(1), help="default: torch's")
    add("--out", metavar="DIR", help="default: runs/chars-NET-OPTIMIZER")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--sample", type=whole(0), metavar="N", help="at the end, make up N characters: 200")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = vars(parser().parse_args(arguments))
    for stream in (sys.stdout, sys.stderr):  # a terminal that has no γ shows a question mark
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    name = f"chars-{given.get('net', 'ternary')}-{given.get('optimizer', 'dfw')}"
    out = Path(given.pop("out", f"runs/{name}"))
    resume, sample = given.pop("resume", False), given.pop("sample", 200)
    try:
        _run(given, out, resume, sample)
    except ModuleNotFoundError as error:
        return missing(error)
    except UserError as error:
        return fail(str(error))
    except OSError as error:  # what no part of the example has more to say about
        return fail(f"{error}; check that path")
    except KeyboardInterrupt:
        print(_after_interrupt(out), file=sys.stderr)
        return INTERRUPTED
    return 0


def _run(given: dict[str, Any], out: Path, resume: bool, sample: int) -> None:
    from chars import text
    from chars.settings import Settings
    from chars.training import train
    from resnet20 import checkpoint

    if (out / _CHECKPOINT).exists() and not resume:
        raise UserError(f"{out} already holds a run; add --resume or choose another --out")
    if resume:
        settings = Settings.of_checkpoint(checkpoint.load(out)["settings"]).moved(given)
    else:
        settings = Settings.choose(given)
    run = train(settings, text.load(), out, resume)
    if sample and math.isfinite(run.history[-1]["val_loss"]):  # else there are no odds to draw by
        print(run.sample(sample), flush=True)


def _after_interrupt(out: Path) -> str:
    if not (out / _CHECKPOINT).exists():
        return "Interrupted before the training; run the same command again."
    command = [Path(sys.executable).name, sys.argv[0], "--out", str(out), "--resume"]
    return f"Interrupted. To go on: {shlex.join(command)}"


if __name__ == "__main__":
    sys.exit(main())
