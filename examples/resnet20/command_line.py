"""What the command lines of the examples share: how they read whole numbers, and how they fail."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

BAD_INPUT = 2
INTERRUPTED = 130
# Of a process whose error another one is about to report, in seconds: torchrun ends all that it has
# started as soon as one of them has failed.
PATIENCE = 10


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        if has_partners() and os.environ["RANK"] != "0":
            time.sleep(PATIENCE)  # the first process has the same command line
        self.exit(BAD_INPUT, f"error: {message}; --help lists the options\n")


def has_partners() -> bool:
    """Whether torchrun has started this process, and others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number, not below ``least``."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    convert.__name__ = "whole number"
    return convert


def default_net(given: dict[str, Any]) -> str:
    """The net, if the command line leaves it open: xnor wherever there is one."""
    is_resnet = given.get("arch", "resnet20") == "resnet20"
    return "xnor" if is_resnet and given.get("optimizer") != "parq" else "binary"


def fail(message: str) -> int:
    """Say what is wrong; return the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT


def missing(error: ModuleNotFoundError) -> int:
    """Say how to get the package that is not there; return the exit code."""
    extra = "peers" if str(error.name).startswith("torchao") else "examples"
    return fail(
        f"the Python package {error.name} is missing; in a copy of the repository run: "
        f"{shlex.quote(sys.executable)} -m pip install -e '.[{extra}]'"
    )
