"""Kills runs of the example again and again, and compares how they end; run by test_trust_slow.py.

torch is imported once and every run is a fork of this process, which starts at once. Usage:

    kill_runs.py FOLDER KILLS SEED NET...

Prints, as JSON, how many runs were killed and how many of them while they wrote a file.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)  # before anything runs in parallel: threads do not survive a fork

import cifar_resnet20  # noqa: E402
from resnet20 import checkpoint, data, report  # noqa: E402
from runs import ending  # noqa: E402

EPOCHS = 30
JOB = ["--optimizer=dfw", f"--epochs={EPOCHS}", "--limit=16", "--batch-size=16"]
JOB += ["--threads=1", "--device=cpu", "--amp=off"]

torch.optim.SGD([torch.zeros(1)])  # the first one imports what takes a second


def start(arguments: list[str], log: Path) -> int:
    """Run the example in a fork, with its output in ``log``; return its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = cifar_resnet20.main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def is_over(pid: int) -> bool:
    """Whether the process has ended, leaving its status to be asked for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_checkpoint(pid: int, out: Path, which: int) -> None:
    """Return as soon as the process begins to write its checkpoint number ``which``, or is over."""
    name, writing = f".{checkpoint.NAME}.{pid}-*.part", False
    while which and not is_over(pid):
        before, writing = writing, any(out.glob(name))
        which -= writing and not before
        time.sleep(0.0003)


def wait_for_time(pid: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_over(pid) and time.monotonic() < deadline:
        time.sleep(0.001)


def parts(out: Path, pid: int | str = "*") -> list[Path]:
    return list(out.glob(f".*.{pid}-*.part"))


def all_of(out: Path) -> Any:
    """What a run leaves, but for how long it took."""
    rows = list(csv.DictReader((out / report.METRICS).open()))
    for row in rows:
        del row["seconds"]
    assert len(rows) == EPOCHS
    assert not parts(out), "something was left behind"
    return ending(out), rows


class Killer:
    def __init__(self, folder: Path, seed: int) -> None:
        self.log = folder / "log"
        self.random = random.Random(seed)
        self.kills = self.within_writes = 0

    def run(self, net: str, out: Path, seconds: float, wanted: int) -> None:
        """One run to its end, killed until there are ``wanted`` kills in all."""
        while True:
            begun = (out / checkpoint.NAME).exists()
            arguments = ["--resume"] if begun else [*JOB, f"--net={net}"]
            pid = start([*arguments, f"--out={out}"], self.log)
            if self.kills < wanted:
                if self.random.random() < 0.4:
                    wait_for_checkpoint(pid, out, self.random.randint(1, 4))
                    wait_for_time(pid, self.random.uniform(0, 0.1 * seconds))
                else:
                    wait_for_time(pid, self.random.uniform(0, 6 * seconds))
                # Not reaped yet, so the number is still its own, whether it is over or not.
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert len(parts(out)) <= 1, f"leftovers pile up: {parts(out)}"
            if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                self.kills += 1
                self.within_writes += bool(parts(out, pid))
                continue
            assert status == 0, f"exit code {status >> 8}:\n{self.log.read_text()}"
            return


def use_few_images() -> None:
    """Judge on fewer, so that more of the time goes into steps and checkpoints."""
    all_digits = data.load(None, limit=16)
    few = all_digits.held_out.part(0, 20)
    digits = data.Data(all_digits.name, all_digits.train, few, "test", False)
    data.load = lambda *arguments: digits


def main() -> None:
    folder, wanted, seed, *nets = sys.argv[1:]
    use_few_images()
    killer = Killer(Path(folder), int(seed))
    for number, net in enumerate(nets, 1):
        whole = Path(folder) / net / "whole"
        begin = time.monotonic()
        killer.run(net, whole, 0.0, wanted=0)
        seconds = (time.monotonic() - begin) / EPOCHS
        expected = all_of(whole)
        goal = int(wanted) * number // len(nets)
        for attempt in range(1000):
            if killer.kills >= goal:
                break
            out = Path(folder) / net / str(attempt)
            killer.run(net, out, seconds, goal)
            assert all_of(out) == expected, f"{out} has ended in another way"
    print(json.dumps({"kills": killer.kills, "within_writes": killer.within_writes}))


if __name__ == "__main__":
    main()
