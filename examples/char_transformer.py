"""Train a small transformer with float or ternary weights on the text of Python's manual.

    python char_transformer.py --optimizer dfw
    python char_transformer.py --optimizer adamw

The ternary weights of dfw are TernaryDFW's own; the others train them as BitNet b1.58 does, by
straight-through gradients. All see the same batches. Embeddings, norms and last layer are float.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import Parser, UserError, check_new, how_to_resume, number, resumed, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from dfw_opt import DFW, TernaryDFW, param_groups

LAYERS, WIDTH, HEADS, CONTEXT = 4, 128, 4, 128
PLACE = ("threads",)  # may differ when a run is resumed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run, all of them plain values; ``None`` is the optimizer's own choice."""

    net: str = "ternary"
    optimizer: str = "dfw"
    lr: Any = None
    steps: int = 1000
    batch_size: int = 32
    schedule: str
    average: bool
    evaluate_every: int = 100
    seed: int = 0
    threads: int | None = None

    @classmethod
    def choose(cls, given: dict[str, Any]) -> "Settings":
        """Complete what the user gave by defaults."""
        optimizer = given.get("optimizer", "dfw")
        schedule = given.get("schedule", "none" if optimizer == "dfw" else "cosine")
        lr = {"dfw": None, "adamw": 0.003, "muon": 0.003, "sgd": 0.1}[optimizer]
        average = optimizer == "dfw" and schedule == "none"
        return cls(**({"lr": lr, "schedule": schedule, "average": average} | given))


class Text:
    """Python's reference manual, as ``help()`` shows it: nothing has to be downloaded.

    It differs a little from one version of Python to the next. The last tenth is for validation.
    """

    def __init__(self) -> None:
        try:
            from pydoc_data.topics import topics
        except ModuleNotFoundError as error:
            raise UserError("this Python has no pydoc_data.topics; use another") from error
        paragraphs = (p.rstrip() for name in sorted(topics) for p in topics[name].split("\n\n"))
        # Each only once: some topics repeat what others have, which could be learnt by heart.
        text = "\n\n".join(dict.fromkeys(p for p in paragraphs if p))
        self.alphabet = "".join(sorted(set(text)))
        number_of = {character: i for i, character in enumerate(self.alphabet)}
        numbers = torch.tensor([number_of[character] for character in text])
        held_out = len(numbers) // 10
        self.train, self.validation = numbers[:-held_out], numbers[-held_out:]

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Random stretches, and the same one character further on; of ``(seed, step)`` alone."""
        starts = np.random.default_rng((seed, step)).integers(len(self.train) - CONTEXT, size=size)
        stretches = self.train[torch.from_numpy(starts)[:, None] + torch.arange(CONTEXT + 1)]
        return stretches[:, :-1], stretches[:, 1:]

    def windows(self) -> tuple[Tensor, Tensor]:
        """The validation text side by side; what does not fill a window is left out."""
        count = (len(self.validation) - 1) // CONTEXT * CONTEXT
        inputs, targets = self.validation[:count], self.validation[1 : count + 1]
        return inputs.view(-1, CONTEXT), targets.view(-1, CONTEXT)


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each normalised before and added after.

    Projections are Linear layers, of which nn.MultiheadAttention has none to quantize.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.wide = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normal = self.norm1(x)
        query, key, value = (
            layer(normal).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))
        return out


class CharTransformer(nn.Module):
    """Predicts each next character from at most ``CONTEXT`` characters before it."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)  # with torch's 1 blocks hardly count

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.position.weight[: characters.shape[1]]
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


class TernaryLinear(nn.Linear):
    """Computes with ``s * round(clip(w / s, -1, 1))``, s the mean of ``|w|`` (BitNet b1.58)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        scale = w.detach().abs().mean().clamp_min(1e-5)
        quantized = scale * (w.detach() / scale).clamp(-1, 1).round()
        # The values of the quantized weights, with the derivative of the identity.
        return linear(x, w + (quantized - w).detach(), self.bias)


def attach(model: CharTransformer, settings: Settings) -> list[Any]:
    """Make the optimizer for ``model``; with Muon there are two."""
    lr, ternary = settings.lr, settings.net == "ternary"
    if settings.optimizer == "dfw":
        # Left alone, param_groups would keep the first Linear layer float too, which is a query.
        groups, given = param_groups(model, skip="head"), {} if lr is None else {"lr": lr}
        return [(TernaryDFW if ternary else DFW)(groups, **given)]
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    rest = [p for name, p in model.named_parameters() if p.dim() < 2 or "blocks" not in name]
    for module in model.blocks.modules():
        if ternary and type(module) is nn.Linear:
            module.__class__ = TernaryLinear
    if settings.optimizer == "sgd":
        return [torch.optim.SGD([*matrices, *rest], lr, 0.9)]
    # As for most language models. Muon's steps are made as long as AdamW's: both have one lr.
    adamw = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95))
    muon = partial(torch.optim.Muon, lr=lr, adjust_lr_fn="match_rms_adamw")
    inner: Any = {"adamw": adamw, "muon": muon}[settings.optimizer]
    return [inner(matrices, weight_decay=0.1), adamw(rest, weight_decay=0.0)]


class Run(common.Run):
    """One training on text."""

    def __init__(self, settings: Settings, text: Text) -> None:
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        self.text = text
        with torch.random.fork_rng(devices=[]):  # the same start for every optimizer
            torch.manual_seed(settings.seed)
            model = CharTransformer(len(text.alphabet))
        super().__init__(settings, model, attach(model, settings))

    def describe(self) -> str:
        settings, guess = self.settings, math.log(len(self.text.alphabet))
        return (
            f"{settings.net} transformer, {settings.optimizer}, lr {self.rates[0]:g}, on Python's "
            f"manual; loss in nats a character, {guess:.2f} for a guess"
        )

    def train_step(self, step: int) -> Tensor:
        """The step with this number (from 0); return its loss and γ."""
        settings = self.settings
        loss = self.loss(self.model, *self.text.batch(settings.seed, step, settings.batch_size))
        gamma = self.step(loss, step / settings.steps)
        return torch.stack((loss.detach(), gamma))

    def advance(self) -> dict[str, float]:
        start, first = time.perf_counter(), int(self.history[-1]["step"]) if self.history else 0
        last = min(first + self.settings.evaluate_every, self.settings.steps)
        if first == last:
            return {}
        values = torch.stack([self.train_step(step) for step in range(first, last)])
        loss, gamma = values.mean(0).tolist()
        row = {"step": last, "train_loss": loss, "gamma_mean": gamma}
        row["seconds"] = time.perf_counter() - start
        row["val_loss"] = self.evaluate(self.model)
        if self.average is not None:
            row["average_loss"] = self.evaluate(self.average.module)
        return row

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """The mean loss over the validation text."""
        inputs, targets = self.text.windows()
        parts = zip(inputs.split(64), targets.split(64), strict=True)  # type: ignore[no-untyped-call]
        return sum(float(self.loss(model, x, y)) * len(x) for x, y in parts) / len(inputs)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def parser() -> Parser:
    """The command line. What is not given stays out of the result, so that we know what was."""
    out = Parser(__doc__)
    add, count = out.add_argument, number(int, least=1)
    add("--net", choices=("float", "ternary"), help="default: ternary")
    add("--optimizer", choices=("dfw", "adamw", "muon", "sgd"), help="default: dfw")
    add("--lr", type=number(float, least=0), help="default: dfw's own; sgd 0.1, else 0.003")
    add("--steps", type=count, help="default: 1000")
    add("--batch-size", type=count, help="default: 32")
    add("--schedule", choices=("none", "cosine"), help="of lr (default: dfw none, else cosine)")
    switch = argparse.BooleanOptionalAction
    add("--average", action=switch, help="judge the mean weights of the last tenth of all steps")
    add("--evaluate-every", type=count, metavar="STEPS", help="default: 100")
    add("--seed", type=number(int, least=0), help="default: 0")
    add("--threads", type=count, help="default: torch's")
    add("--out", type=Path, metavar="DIR", help="default: runs/chars-NET-OPTIMIZER")
    add("--resume", action="store_true", help="go on with the run in --out")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = vars(parser().parse_args(arguments))
    name = f"chars-{given.get('net', 'ternary')}-{given.get('optimizer', 'dfw')}"
    out, resume = given.pop("out", Path("runs") / name), given.pop("resume", False)
    return run(partial(train, given, out, resume), partial(how_to_resume, out))


def train(given: dict[str, Any], out: Path, resume: bool) -> None:
    if not resume:
        check_new(out, "--out")
    settings = resumed(Settings, out, given, PLACE) if resume else Settings.choose(given)
    Run(settings, Text()).train(out, resume)


if __name__ == "__main__":
    sys.exit(main())
