"""A process of the example's data-parallel training, all in float64. torchrun starts it. Usage:

    team_ranks.py FOLDER "NET OPTIMIZER LR"...

Run by test_example_torchrun.py. Leaves in FOLDER, for each of these jobs, how it ended:

    NET-OPTIMIZER-alone    by one process
    NET-OPTIMIZER-RANK     by the team
    NET-OPTIMIZER-RANK-on  by the team after an epoch by one process
    NET-OPTIMIZER-back     by one process after an epoch by the team
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from resnet20 import checkpoint, data, distributed, training
from resnet20.data import Data
from resnet20.distributed import ALONE, Team
from resnet20.settings import Settings
from resnet20.training import Run
from torch import Tensor

BATCH = 13  # gives unequal parts
EPOCHS = 2


class Job:
    def __init__(self, words: str, folder: Path, digits: Data) -> None:
        net, optimizer, lr = words.split()
        self.out = folder / f"{net}-{optimizer}"
        self.digits = digits
        self.settings = Settings.choose(
            {"net": net, "optimizer": optimizer, "lr": float(lr), "schedule": "none"}
            | {"device": "cpu", "amp": "off", "batch_size": BATCH, "epochs": EPOCHS}
        )

    def path(self, name: object) -> Path:
        return self.out.with_name(f"{self.out.name}-{name}")

    def begin(self, team: Team, checkpoint_name: str) -> Run:
        """Train for an epoch, and leave a checkpoint."""
        run = Run(self.settings, self.digits, team)
        run.train_epoch()
        if team.leads:
            self.path(checkpoint_name).mkdir()
            checkpoint.save(self.path(checkpoint_name), run.state_dict())
        return run

    def resume(self, team: Team, checkpoint_name: str) -> Run:
        run = Run(self.settings, self.digits, team)
        run.load_state_dict(checkpoint.load(self.path(checkpoint_name)))
        return run

    def finish(self, run: Run, name: object) -> None:
        while run.epoch < EPOCHS:
            run.train_epoch()
        state: dict[str, Any] = run.state_dict()
        for row in state["history"]:
            del row["seconds"]
        # They would hold the graphs of all steps.
        assert not any(buffer.requires_grad for buffer in run.model.buffers())
        torch.save(state, self.path(f"{name}.pt"))


def use_float64() -> None:
    torch.set_default_dtype(torch.float64)
    Tensor.float = Tensor.double  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    everything = data.load(None, limit=2 * BATCH)
    use_float64()
    training._EVALUATION_BATCH = 8  # several, to share, and the last of them smaller
    few = everything.held_out.part(0, 20)
    digits = Data(everything.name, everything.train, few, "test", False)
    jobs = [Job(words, Path(sys.argv[1]), digits) for words in sys.argv[2:]]

    leads = os.environ["RANK"] == "0"
    for job in jobs if leads else []:
        job.finish(job.begin(ALONE, "first-alone"), "alone")
    with distributed.team() as team:
        for job in jobs:
            job.finish(job.begin(team, "first-team"), team.rank)
            job.finish(job.resume(team, "first-alone"), f"{team.rank}-on")
    for job in jobs if leads else []:
        job.finish(job.resume(ALONE, "first-team"), "back")


if __name__ == "__main__":
    main()
