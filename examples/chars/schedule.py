"""By what the learning rate is multiplied, as a function of the step alone."""

from resnet20.schedule import learning_rate

SCHEDULES = ("none", "cosine")


def factor(schedule: str, warmup: int, step: int, steps: int) -> float:
    """Of ``step`` out of ``steps``: a line up to 1 over ``warmup`` steps, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return learning_rate(schedule, 1.0, step - warmup, steps - warmup)
