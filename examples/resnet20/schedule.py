"""Learning rate and relaxation by the step, so that a resumed run needs no scheduler state."""

import math

SCHEDULES = ("none", "cosine", "step", "parq")


def learning_rate(schedule: str, base: float, step: int, steps: int) -> float:
    """The rate at ``step`` of ``steps``.

    ``cosine`` falls from ``base`` to 0 over the run; ``step`` divides by ten after one half and
    again after three quarters of it; ``parq`` does so three times, as PARQ's authors do for
    ResNet-20: after two fifths, three fifths and three quarters.
    """
    if schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * step / steps))
    if schedule == "step":
        return base * 0.1 ** ((2 * step >= steps) + (4 * step >= 3 * steps))
    if schedule == "parq":
        return base * 0.1 ** sum(step >= share * steps for share in (0.4, 0.6, 0.75))
    return base


def relaxation(share: float, step: int, steps: int) -> float:
    """How far from quantized the weights are after ``step`` of ``steps``.

    It falls evenly from 1 before the first step to 0 after ``share`` of all steps, the last one at
    the latest.
    """
    relaxed = max(1, round(share * steps))  # whole, so that 0 is reached to the bit
    return max(0.0, 1 - (step + 1) / relaxed)
