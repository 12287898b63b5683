r"""Averages of what is trained, with quantized weights.

The average of binary weights is not binary. So the latents are averaged, the scales and the float
parameters with them, and the average is quantized: :math:`Q(\bar u)`, not the mean of
:math:`Q(u_t)`.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from dfw_opt.checkpoint import momentum_key
from dfw_opt.optimizer import FrankWolfe
from dfw_opt.quantizers import QUANTIZERS, Group, State

__all__ = ["AveragedModel"]


class AveragedModel(swa_utils.AveragedModel):
    r"""``torch.optim.swa_utils.AveragedModel`` for models with quantized weights.

    ``module`` is a copy of the model whose quantized parameters are :math:`Q(\bar u)`, with
    :math:`\bar u` the average of the latents (and, for ternary weights, with averaged scales); its
    other parameters are averages themselves. So it is always ready for use, but for the running
    statistics of BatchNorm, which ``torch.optim.swa_utils.update_bn`` adapts.

    Args:
        model: the model that ``optimizer`` trains.
        optimizer: holds its latents. It is not kept alive.
        device: where to keep the averages; by default where the parameters are.
        avg_fn: as in torch: the new average, from average, current value and number of values so
            far. By default, the mean of all.
        multi_avg_fn: as in torch: the same for lists, in place; for example
            ``torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)``.
        use_buffers: whether buffers are averaged too, rather than copied.

    Raises:
        TypeError: ``optimizer`` is none of this package.
        ValueError: it trains no parameter of ``model``; in ``update_parameters``, also if that is
            not like the model that the average was made of.
        RuntimeError: in ``update_parameters``, the optimizer is no more, or this is a copy.

    The state dict holds the averaged latents, below ``averages``. They are :math:`u` in the
    optimizer's unit :math:`c`; what is averaged are the :math:`c\,u`, also if a checkpoint with
    another unit is loaded into the optimizer.

    >>> from dfw_opt import AveragedModel, ProjectedDFW, param_groups
    >>> from torch.optim.swa_utils import get_ema_multi_avg_fn
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 3))
    >>> optimizer = ProjectedDFW(param_groups(model, skip="1"), lr=0.1)
    >>> averaged = AveragedModel(model, optimizer, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    >>> averaged.update_parameters(model)  # after each step
    >>> averaged.module[0].weight.abs().unique(dim=1).shape  # binary
    torch.Size([4, 1])

    Source: Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*,
    UAI 2018 (arXiv 1803.05407), for float networks.
    """

    averages: nn.Module

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
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self._optimizer: Callable[[], FrankWolfe | None] = weakref.ref(optimizer)
        self.averages = nn.Module()
        self._check(model)
        self._register_states(model)
        with torch.no_grad():
            self._quantize(model)  # the model's may be relaxed

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the present state of ``model`` and its optimizer into the average."""
        self._check(model)
        self._register_states(model)
        self._adopt_units(model)
        pairs = list(self._pairs(model))
        buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
        if self.use_buffers:
            pairs += buffers
        if self.n_averaged == 0:
            for averaged, current in pairs:
                averaged.copy_(current)
        else:
            self._average(pairs)
        if not self.use_buffers:
            for averaged, current in buffers:
                averaged.copy_(current)
        self._quantize(model)
        self.n_averaged += 1

    def _check(self, model: nn.Module) -> None:
        """Refuses another model, before anything has changed."""
        trained = {id(p) for group in self._living().param_groups for p in group["params"]}
        if not any(id(p) in trained for p in model.parameters()):
            raise ValueError(
                f"model: the optimizer trains none of the parameters of this {type(model).__name__}"
            )
        self._check_like("parameters", self.module.named_parameters(), model.parameters())
        self._check_like("buffers", self.module.named_buffers(), model.buffers())

    def _check_like(
        self, what: str, ours: Iterable[tuple[str, Tensor]], theirs: Iterable[Tensor]
    ) -> None:
        mine, others = list(ours), list(theirs)
        if len(mine) != len(others):
            raise ValueError(
                f"model: the number of its {what} is {len(others)}, but {len(mine)} in the "
                "average; pass the model that the average was made of"
            )
        for (name, own), other in zip(mine, others, strict=True):
            if own.shape != other.shape:
                raise ValueError(
                    f"model: {name} has shape {tuple(other.shape)}, but {tuple(own.shape)} in the "
                    "average; pass the model that the average was made of"
                )

    def _register_states(self, model: nn.Module) -> None:
        """Makes a buffer of each state that has none yet, with its present value."""
        for name, mine, p, group in self._parameters_of(model):
            if group is None:
                continue
            for key, value in self._living().state[p].items():
                buffer = _buffer_name(name, key)
                if not key.endswith(momentum_key("")) and buffer not in self.averages._buffers:
                    copied = value.detach().to(mine.device, copy=True)
                    self.averages.register_buffer(buffer, copied)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """What is averaged and its present value, for everything that is trained."""
        for name, mine, p, group in self._parameters_of(model):
            if group is None:
                yield mine.detach(), p.detach()
                continue
            state, current = self._state(name, p), self._living().state[p]
            for key in QUANTIZERS[group["quantizer"]].variables:
                yield state[key], current[key]

    def _adopt_units(self, model: nn.Module) -> None:
        r"""Takes what is not trained from the optimizer, which may have loaded a checkpoint.

        The average is one of :math:`c\,u`: for another unit :math:`c` it is expressed in that.
        """
        for name, _, p, group in self._parameters_of(model):
            if group is None:
                continue
            trained = QUANTIZERS[group["quantizer"]].variables
            state, current = self._state(name, p), self._living().state[p]
            if "unit" in state:
                factor = _ratio(state["unit"], current["unit"])
                for key in trained:
                    state[key].mul_(factor)
            for key in state.keys() - trained.keys():
                state[key].copy_(current[key])

    def _average(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        if self.multi_avg_fn is None:
            function = self.avg_fn or swa_utils.get_swa_avg_fn()  # type: ignore[no-untyped-call]
            for averaged, current in pairs:
                device = averaged.device
                averaged.copy_(function(averaged, current.to(device), self.n_averaged.to(device)))
            return
        kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for averaged, current in pairs:
            lists = kinds.setdefault((averaged.device, averaged.dtype), ([], []))
            lists[0].append(averaged)
            lists[1].append(current.to(averaged.device))
        for (device, _), (averages, values) in kinds.items():
            self.multi_avg_fn(averages, values, self.n_averaged.to(device))

    def _quantize(self, model: nn.Module) -> None:
        for name, mine, p, group in self._parameters_of(model):
            if group is not None:
                quantizer = QUANTIZERS[group["quantizer"]]
                state = self._state(name, p)
                for key, value in quantizer.derive(state, group).items():
                    state[key].copy_(value)
                mine.copy_(quantizer.quantize(state, group))

    def _parameters_of(
        self, model: nn.Module
    ) -> Iterator[tuple[str, Tensor, Tensor, Group | None]]:
        """Name, average, parameter of ``model``, and its group if it is quantized."""
        optimizer = self._living()
        quantized = {
            id(p): group
            for group in optimizer.param_groups
            if group.get("quantizer") is not None
            for p in group["params"]
            if "latent" in optimizer.state.get(p, ())
        }
        parameters = zip(self.module.named_parameters(), model.parameters(), strict=True)
        for (name, mine), p in parameters:
            yield name, mine, p, quantized.get(id(p))

    def _state(self, name: str, p: Tensor) -> State:
        """The averaged state of a parameter, in this module's buffers."""
        buffers = {key: _buffer_name(name, key) for key in self._living().state[p]}
        return {
            key: self.averages.get_buffer(buffer)
            for key, buffer in buffers.items()
            if buffer in self.averages._buffers
        }

    def _living(self) -> FrankWolfe:
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the optimizer whose latents are averaged is no more; keep it alive")
        return optimizer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_optimizer": _gone}


def _buffer_name(name: str, key: str) -> str:
    """Where the average of a parameter's state is kept."""
    return f"{name.replace('.', '/')}/{key}"


def _ratio(old: Tensor, new: Tensor) -> Tensor:
    """``old / new``, exactly 1 where they are equal, without waiting for the device."""
    new = new.to(old)
    return torch.where(old == new, torch.ones_like(old), old / new)


def _gone() -> NoReturn:
    """What a copy or an unpickled average knows of its optimizer."""
    raise RuntimeError(
        "this average is a copy, or was unpickled, and knows no optimizer whose latents it could "
        "take; make a new one, AveragedModel(model, optimizer), and give it this one's state with "
        "load_state_dict"
    )
