r"""Averages of what is trained, with quantized weights.

The average of binary weights is not binary. So the dual variables are averaged, in the unit of the
weights, :math:`c\,u`, the scales :math:`c\,W` and the float parameters with them, and the average
is quantized: :math:`Q(\overline{c\,u})`, not the mean of :math:`Q(u_t)`.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from dfw_opt.optimizer import FrankWolfe
from dfw_opt.quantizers import Quantizer, quantizer_of

__all__ = ["LAST", "AveragedModel", "average_of_last"]

LAST = 10.0
"""K of the default average."""

Trained = tuple[Tensor, Quantizer | None, dict[str, tuple[Tensor, Tensor]]]
"""A parameter of the average, its quantizer, and of all that is trained for it average and value."""


class AveragedModel(swa_utils.AveragedModel):
    r"""``torch.optim.swa_utils.AveragedModel`` for models with quantized weights.

    By default the average over about the last tenth of all steps, at any time:
    :math:`\bar v \leftarrow \bar v + \frac{K}{t + K}(v - \bar v)`, :math:`K = 10`, which stands in
    for a learning rate schedule. ``module`` is a copy of the model with the averaged parameters,
    quantized where the optimizer quantizes (never relaxed): ready for use, but for the running
    statistics of BatchNorm, which ``torch.optim.swa_utils.update_bn`` measures anew.

    Args:
        model: the model that ``optimizer`` trains.
        optimizer: holds its latents. It is not kept alive.
        device: where to keep the averages; by default where the parameters are.
        avg_fn: as in torch: the new average, from average, current value and number of values so
            far.
        multi_avg_fn: as in torch: the same for lists, in place; for example
            ``torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)``.
        use_buffers: whether buffers are averaged too, rather than copied.

    Raises:
        TypeError: ``optimizer`` is none of this package.
        ValueError: it trains no parameter of ``model``; in ``update_parameters``, also if that is
            not like the model that the average was made of.
        RuntimeError: in ``update_parameters``, the optimizer is no more, or this is a copy.

    The state dict holds the averaged latents, below ``averages``; so, in float32, those of
    parameters in half precision.

    >>> from dfw_opt import AveragedModel, ProjectedDFW, param_groups
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    >>> optimizer = ProjectedDFW(param_groups(model, skip="1"))
    >>> averaged = AveragedModel(model, optimizer)
    >>> averaged.update_parameters(model)  # after each step
    >>> averaged.module[0].weight.abs().unique(dim=1).shape  # binary
    torch.Size([4, 1])

    Source: Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*,
    UAI 2018 (arXiv 1803.05407), for float networks; Shamir and Zhang, ICML 2013 (arXiv 1212.1824),
    Section 4, for the average (polynomial decay).
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        optimizer: FrankWolfe,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[Any, Any, Tensor | int], None] | None = None,
        use_buffers: bool = False,
    ) -> None:
        if not isinstance(optimizer, FrankWolfe):
            raise TypeError(
                f"optimizer is a {type(optimizer).__name__}, which holds no latents; for it "
                "torch.optim.swa_utils.AveragedModel is right"
            )
        if avg_fn is None and multi_avg_fn is None:
            multi_avg_fn = average_of_last
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self._optimizer: Callable[[], FrankWolfe | None] = weakref.ref(optimizer)
        self.averages = nn.Module()
        self._quantize([*self._trained(model)])

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the present state of ``model`` and its optimizer into the average."""
        trained = [*self._trained(model)]
        pairs = [pair for *_, values in trained for pair in values.values()]
        buffers = [*zip(self.module.buffers(), model.buffers(), strict=True)]
        if self.use_buffers:
            pairs += buffers
        if self.n_averaged == 0:
            for mine, current in pairs:
                mine.copy_(current)
        else:
            self._average(pairs)
        if not self.use_buffers:
            for mine, current in buffers:
                mine.copy_(current)
        self._quantize(trained)
        self.n_averaged += 1

    def _average(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for mine, current in pairs:
            lists = kinds.setdefault((mine.device, mine.dtype, type(mine)), ([], []))
            lists[0].append(mine)
            lists[1].append(current.to(mine.device, mine.dtype))
        for (device, *_), (averages, values) in kinds.items():
            count = self.n_averaged.to(device)
            if self.multi_avg_fn is not None:
                self.multi_avg_fn(averages, values, count)
                continue
            for mine, value in zip(averages, values, strict=True):
                mine.copy_(self.avg_fn(mine, value, count))  # type: ignore[misc]

    def _trained(self, model: nn.Module) -> Iterator[Trained]:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer whose latents are averaged is no more; keep it alive")
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        ours, theirs = dict(self.module.named_parameters()), [*model.parameters()]
        kind = type(model).__name__
        if not any(p in groups for p in theirs):
            raise ValueError(f"model: the optimizer trains none of the parameters of this {kind}")
        if [p.shape for p in ours.values()] != [p.shape for p in theirs]:
            raise ValueError(
                f"model: this {kind} has parameters of other shapes than the average; pass the "
                "model that the average was made of"
            )
        for (name, mine), p in zip(ours.items(), theirs, strict=True):
            state, quantizer, values = optimizer.state.get(p, {}), None, {"": p.detach()}
            if "latent" in state:
                quantizer = quantizer_of(groups[p] | {"relaxation": 0.0})
                keys = ("latent", *quantizer.scales) if quantizer else ()
                values = {key: state["unit"] * state[key] for key in keys}
            elif torch.finfo(p.dtype).bits >= 32:
                yield mine, None, {"": (mine.detach(), values[""])}
                continue
            own = {key: self._buffer(name, key, value, mine) for key, value in values.items()}
            yield mine, quantizer, {key: (own[key], values[key]) for key in values}

    def _buffer(self, name: str, key: str, value: Tensor, mine: Tensor) -> Tensor:
        """Where an average that is no parameter is kept."""
        buffer = f"{name.replace('.', '/')}/{key or 'float'}"
        if buffer not in self.averages._buffers:
            dtype = torch.promote_types(value.dtype, torch.float32)
            self.averages.register_buffer(buffer, value.to(mine.device, dtype, copy=True))
        return self.averages.get_buffer(buffer)

    def _quantize(self, trained: list[Trained]) -> None:
        for mine, quantizer, values in trained:
            if quantizer is None:
                mine.copy_(values[""][0])
                continue
            numbers = [1] * mine.dim()
            latent = values["latent"][0].unsqueeze(0)
            state = {key: average.view(1, *numbers) for key, (average, _) in values.items() if key != "latent"}
            unit = torch.ones_like(latent[(slice(1),) * latent.dim()])
            mine.copy_(quantizer.quantize(state | {"latent": latent, "unit": unit})[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_optimizer": _gone}


def average_of_last(averages: Any, values: Any, count: Tensor | int) -> None:
    r""":math:`\bar v \leftarrow \bar v + \frac{K}{t + K}(v - \bar v)` for lists, in place."""
    change = torch._foreach_sub(values, averages)
    torch._foreach_mul_(change, LAST / (count + LAST))
    torch._foreach_add_(averages, change)


def _gone() -> NoReturn:
    """What a copy or an unpickled average knows of its optimizer."""
    raise RuntimeError(
        "this average is a copy, or was unpickled, and knows no optimizer whose latents it could "
        "take; make a new one, AveragedModel(model, optimizer), and give it this one's state with "
        "load_state_dict"
    )
