"""The text to learn: Python's own reference manual, as ``help()`` shows it.

It comes with every Python, in ``pydoc_data.topics``, so that nothing is downloaded. It differs a
little from one version of Python to the next; the digest tells which one a run was on.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from resnet20.errors import UserError
from torch import Tensor

_VALIDATION = 0.1


@dataclass(frozen=True)
class Text:
    """Characters as numbers, in two parts; ``alphabet[i]`` is the character that is ``i``."""

    alphabet: str
    train: Tensor
    validation: Tensor
    digest: str

    @classmethod
    def of(cls, text: str) -> "Text":
        """Take the last tenth of ``text`` for validation."""
        alphabet = "".join(sorted(set(text)))
        number = {character: i for i, character in enumerate(alphabet)}
        numbers = torch.tensor([number[character] for character in text])
        held_out = int(_VALIDATION * len(numbers))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(alphabet, numbers[:-held_out], numbers[-held_out:], digest)

    def decode(self, numbers: Tensor) -> str:
        """The text that ``numbers`` stand for."""
        return "".join(self.alphabet[i] for i in numbers.tolist())

    def batch(self, seed: int, step: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Random stretches of the training text, and the same one character further on.

        They follow from ``(seed, step)`` alone: all optimizers see the same batches, and a run that
        is resumed needs no state of a random generator.
        """
        starts = np.random.default_rng((seed, step)).integers(len(self.train) - context, size=size)
        rows = torch.from_numpy(starts)[:, None] + torch.arange(context + 1)
        stretches = self.train[rows]
        return stretches[:, :-1], stretches[:, 1:]

    def validation_windows(self, context: int) -> tuple[Tensor, Tensor]:
        """The validation text in windows side by side; what does not fill one is left out."""
        count = (len(self.validation) - 1) // context
        inputs, targets = self.validation[: count * context], self.validation[1:]
        return inputs.view(count, context), targets[: count * context].view(count, context)

    @property
    def unigram_loss(self) -> float:
        """The validation loss of who knows how frequent each character is, and nothing else."""
        counts = torch.bincount(self.train, minlength=len(self.alphabet)) + 1  # none has odds of 0
        return -(counts / counts.sum()).log()[self.validation].mean().item()


def load() -> Text:
    """Read the manual, each paragraph once.

    Some topics repeat what others have. A repeated paragraph could be learnt by heart in training,
    and then count as understood in validation.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise UserError(
            "this Python comes without its manual (pydoc_data.topics); install the whole standard "
            "library, or run this with another Python"
        ) from error
    paragraphs = (p for name in sorted(topics) for p in topics[name].split("\n\n"))
    return Text.of("\n\n".join(dict.fromkeys(p.rstrip() for p in paragraphs if p.strip())))
