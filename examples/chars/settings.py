"""What a run is: every choice that decides its weights."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from resnet20.errors import UserError
from resnet20.settings import option

# What may differ when a run is resumed: where it happens, not what happens.
_PLACE = frozenset({"threads"})

# For ternary weights with dfw and adamw the best of those tried, a factor of two or three apart, in
# 1000 steps with batches of 8. The others follow from these.
_LEARNING_RATES = {
    ("ternary", "dfw"): 0.1,
    ("ternary", "adamw"): 3e-3,
    ("ternary", "sgd"): 0.1,
    ("float", "dfw"): 0.1,
    ("float", "adamw"): 3e-3,
    ("float", "sgd"): 0.1,
}


# The lr of ternary queries and keys with dfw, in multiples of that of the other matrices. The loss
# sees them only through a softmax that is nearly uniform at first: their gradients start 30 times
# smaller than those of values. AdamW divides by that. A step of DFW is as long as the gradient, and
# attention hardly began to learn. Float weights, which no box holds, did worse with it.
_ATTENTION = 10


@dataclass(frozen=True)
class Settings:
    """The settings of one run, all of them plain values."""

    lr: float
    attention_lr: float
    float_lr: float
    weight_decay: float
    warmup: int
    net: str = "ternary"
    optimizer: str = "dfw"
    momentum: float = 0.9
    clip: float | None = None
    steps: int = 1000
    batch_size: int = 32
    schedule: str = "cosine"
    evaluate_every: int = 100
    seed: int = 0
    threads: int | None = None

    @classmethod
    def choose(cls, given: dict[str, Any]) -> "Settings":
        """Complete what the user gave by defaults."""
        net = given.get("net", cls.net)
        optimizer = given.get("optimizer", cls.optimizer)
        lr = given.get("lr", _LEARNING_RATES[net, optimizer])
        ternary_dfw = (net, optimizer) == ("ternary", "dfw")
        defaults = {
            "lr": lr,
            "attention_lr": lr * (_ATTENTION if ternary_dfw else 1),
            "float_lr": lr,
            "weight_decay": 0.1 if optimizer == "adamw" else 0.0,  # as for most language models
            "warmup": min(20, given.get("steps", cls.steps) // 10),
        }
        chosen = cls(**(defaults | given))
        if chosen.clip is not None and optimizer == "dfw":
            raise UserError(
                "--clip is for adamw and sgd; dfw needs gradients as they are, as γ is computed "
                "from them"
            )
        if chosen.warmup >= chosen.steps:
            raise UserError(
                f"--warmup {chosen.warmup} leaves none of the {chosen.steps} steps; make it smaller"
            )
        return chosen

    @classmethod
    def of_checkpoint(cls, stored: dict[str, Any]) -> "Settings":
        """The settings that `to_dict` gave."""
        try:
            return cls(**stored)
        except TypeError as error:
            raise UserError(
                "the checkpoint is from another version of this example; choose another --out"
            ) from error

    def moved(self, given: dict[str, Any]) -> "Settings":
        """The settings of a run that is resumed with ``given`` on its command line."""
        for name, value in given.items():
            if name not in _PLACE and value != getattr(self, name):
                raise UserError(
                    f"the run to resume has {option(name)} {getattr(self, name)}, "
                    f"not {value}; leave the option out or choose another --out"
                )
        return dataclasses.replace(self, **{k: v for k, v in given.items() if k in _PLACE})

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return dataclasses.asdict(self)
