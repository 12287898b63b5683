"""Averages of what is trained, with quantized weights."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from dfw_opt.optimizer import FrankWolfe
from dfw_opt.quantizers import quantizer_of

LAST = 10  # K of the default average


class AveragedModel(swa_utils.AveragedModel):
    r"""``torch.optim.swa_utils.AveragedModel`` for models with quantized weights.

    Latents are averaged, in the unit of the weights, with the scales :math:`c\,W` and the float
    parameters, and the average is quantized: :math:`Q(\overline{c\,u})`, never relaxed; a mean of
    :math:`Q(u_t)` would not be binary. By default it is over about the last tenth of all steps, at
    any time, as a schedule would: :math:`\bar v \leftarrow \bar v + \frac{K}{t + K}(v - \bar v)`,
    :math:`K = 10`, with :math:`t` values so far. ``module`` is a copy of the model with the
    averages, ready for use but for BatchNorm's statistics (``torch.optim.swa_utils.update_bn``).

    Args:
        model: what ``optimizer`` trains. Call ``update_parameters(model)`` after each step.
        optimizer: holds the latents. It is not kept alive.
        args, kwargs: ``device``, ``avg_fn``, ``multi_avg_fn`` and ``use_buffers``, as in torch; for
            example ``multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)``.

    Raises:
        TypeError: ``optimizer`` is none of this package.
        ValueError: it trains no part of ``model``, or ``update_parameters`` is given another model.
        RuntimeError: in ``update_parameters``: the optimizer is no more, or this is a copy.

    The state dict has the averages of latents, and in float32 those of half precision parameters.
    Sources: Izmailov et al., UAI 2018 (arXiv 1803.05407); Shamir and Zhang, ICML 2013 (1212.1824).
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # frameworks wrap it
        if not isinstance(optimizer, FrankWolfe):
            kind, right = type(optimizer).__name__, "torch.optim.swa_utils.AveragedModel"
            raise TypeError(f"optimizer is a {kind}, without latents; for it {right} is right")
        super().__init__(model, *args, **kwargs)
        self._optimizer: Any = weakref.ref(optimizer)
        self.averages = nn.Module()
        self._take(model)

    def update_parameters(self, model: nn.Module) -> None:
        """Takes the present state of ``model`` and its optimizer into the average."""
        self._take(model)
        self.n_averaged += 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_optimizer": type(None)}  # which gives None, as what is no more

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take(self, model: nn.Module) -> None:
        if (optimizer := self._optimizer()) is None:
            why = "the optimizer whose latents are averaged is no more, or this is a copy"
            raise RuntimeError(f"{why}: make a new AveragedModel, and load this one's state dict")
        groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        names = [name.replace(".", "/") for name, _ in self.module.named_parameters()]
        params = [*zip(names, self.module.parameters(), model.parameters(), strict=False)]
        both = ((m.parameters(), m.buffers()) for m in (self.module, model))
        shapes, others = ([[x.shape for x in kind] for kind in kinds] for kinds in both)
        kept, count = self.averages._buffers, int(self.n_averaged)
        lost = any(f"{name}/latent" in kept and p not in optimizer.state for name, _, p in params)
        if lost or shapes != others or not any(p in groups for *_, p in params):
            kind = type(model).__name__
            raise ValueError(f"model: this {kind} is not the one that is trained and averaged")
        for name, mine, p in params:
            own: dict[str, Tensor] = {"": mine}
            state, values = optimizer.state.get(p, {}), {"": p.detach()}
            group = groups[p] | {"relaxation": 0.0} if "latent" in state else {}
            if quantizer := quantizer_of(group):
                values = {key: state["unit"] * state[key] for key in ("latent", *quantizer.scales)}
            if quantizer or (p.is_floating_point() and p.dtype.itemsize < 4):
                for key in (key for key in values if f"{name}/{key}" not in kept):
                    first = values[key].to(mine.device, torch.promote_types(p.dtype, torch.float32))
                    self.averages.register_buffer(f"{name}/{key}", first)
                own = {key: self.averages.get_buffer(f"{name}/{key}") for key in values}
            for key, average in own.items():
                self._average(average, values[key], count)
            if quantizer:
                own = {key: x.unsqueeze(0) for key, x in own.items()}
                own[""] = quantizer.quantize(own | {"unit": mine.new_ones(())})[0]
            mine.copy_(own[""])
        for buffer, value in zip(self.module.buffers(), model.buffers(), strict=True):
            self._average(buffer, value, count if self.use_buffers else 0)

    def _average(self, mine: Tensor, value: Tensor, count: int) -> None:
        value = value.to(mine.device, mine.dtype)
        if count and self.multi_avg_fn is not None:
            self.multi_avg_fn([mine], [value], count)
        elif count and self.avg_fn is not None:
            mine.copy_(self.avg_fn(mine, value, count))
        elif count and mine.is_floating_point():
            mine.lerp_(value, LAST / (count + LAST))
        else:
            mine.copy_(value)
