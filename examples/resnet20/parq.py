"""PARQ (Jin et al., ICML 2025, arXiv 2503.15748), with which the DFW optimizers are compared.

torchao's QuantOptimizer holds the latents and puts weights into the network that are drawn ever
closer to the quantized ones. From three quarters of the run on they are the quantized ones, to the
bit, so the network is evaluated and saved as it is.

From the authors' recipe for ResNet-20 on CIFAR-10 (github.com/facebookresearch/parq): SGD, lr 0.1,
momentum 0.9, weight decay 2e-4, of latents too but not of biases, batch size 128, cross-entropy;
least-squares binary quantization, its levels renewed every 10 steps, for ternary weights the
heuristic that it has for them; the slope annealed with steepness 100. The least squares of one bit
are the mean of the magnitudes, so we take UnifQuantizer, which has the same levels: LSBQuantizer
gets them by subtraction, with rounding errors that would make more than two values of them.

From the budget: what the recipe counts in epochs or steps (200 epochs of 391 steps) are shares of
the run, namely the learning rate's drops, the warm-up of 200 steps and the end of the annealing,
150 epochs.

From this example: the first and the last layer stay float, which the recipe quantizes, and levels
are those of an output channel. The recipe has them per layer on CIFAR-10, per channel on ImageNet.
"""

import logging

import torch
from torch import nn

from dfw_opt import param_groups

from .errors import UserError
from .settings import Settings

_BITS = {"binary": 1, "ternary": 0}  # 0 is what the library calls ternary
_PERIOD = 10
_STEEPNESS = 100
_STEPS_PER_WARM_UP_STEP = 391  # 200 of 200 * 391
_END = 0.75
_LEAST_STEPS = 2  # for an annealing that is over before the last one


def attach(model: nn.Module, settings: Settings, steps: int) -> torch.optim.Optimizer:
    """Make the optimizer for ``model`` and a run of so many ``steps``."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels that stay unused
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer, UnifQuantizer

    if steps < _LEAST_STEPS:
        raise UserError("--optimizer parq needs more steps; make --epochs larger")
    quantized = param_groups(model)[0]["params"]
    for p in quantized:
        # It is written to through a flat view, which would be a copy if channels were last.
        p.data = p.data.contiguous()
    chosen = {id(p) for p in quantized}
    others = [(name, p) for name, p in model.named_parameters() if id(p) not in chosen]
    groups = [
        {"params": quantized, "quant_bits": _BITS[settings.net]},
        {"params": [p for name, p in others if not name.endswith("bias")]},
        {"params": [p for name, p in others if name.endswith("bias")], "weight_decay": 0.0},
    ]
    base = torch.optim.SGD(
        groups, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    optimizer: torch.optim.Optimizer = QuantOptimizer(
        base,
        UnifQuantizer() if settings.net == "binary" else LSBQuantizer(),
        ProxPARQ(anneal_start=0, anneal_end=int(_END * steps), steepness=_STEEPNESS),
        warmup_steps=max(1, steps // _STEPS_PER_WARM_UP_STEP),
        quant_period=_PERIOD,
        quant_per_channel=True,
    )
    return optimizer
