r"""One step of Deep Frank-Wolfe: gradient → pull-back → plane → direction → γ → update → quantize.

A step minimises a plane that stands for the loss, cut off at zero because a loss is not negative,
within a ball of some norm. That gives each variable :math:`v` a full step
:math:`-\eta(\lambda v + D)`, and all of them one number, the share :math:`\gamma` of it that is
taken: to where the plane reaches zero, and no farther.

.. math::

    \gamma = \operatorname{clip}_{[0,1]}
        \frac{h - \sum\eta\langle m, \lambda v\rangle}{\sum\eta\langle m, D\rangle + \varepsilon},
    \qquad v \leftarrow \Pi\bigl(v - \eta\,(\lambda v + \gamma D)\bigr).

:math:`h` is the plane's height at :math:`v`, :math:`m` its gradient, :math:`D` the steepest
direction (:mod:`dfw_opt.norms`). In the **Euclidean** norm the plane is that of this batch:
:math:`h = \ell`, :math:`m = \delta`, :math:`D = M^{-1}\delta`, and momentum comes after
:math:`\gamma`: Berrada et al., ICLR 2019 (arXiv 1811.07591), to the letter. In the **spectral**
norm it is the running mean of the planes of all batches, and momentum is in there:

.. math::

    m &\leftarrow \mu m + (1 - \mu)\,\delta, \\
    h &\leftarrow \mu h_\text{left} + (1 - \mu)\,\ell, \\
    h_\text{left} &= \max(0,\ h - \textstyle\sum\eta\langle m, \lambda v + \gamma D\rangle)
        \text{ of the step before}

(Schaipp et al., *MoMo*, 2023, arXiv 2305.07583); :math:`m = \delta`, :math:`h = \ell` at first.
There the ball shrinks, and with it :math:`D`, by :math:`\sqrt{1 + t/100}` in the step after
:math:`t` others: where the loss cannot reach zero, only steps that shrink so let the noise of
batches average out. That needs no length of the run (Orvieto et al., *DecSPS*, NeurIPS 2022, arXiv
2205.04583).

Quantized weights are trained by mirror descent: the model holds :math:`Q(u)`, the optimizer, in its
state, the dual variable :math:`u`, to which gradients are pulled back (:mod:`dfw_opt.quantizers`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from dfw_opt.lifecycle import LatentOptimizer
from dfw_opt.quantizers import SCALE_MIN, Quantizer, State, quantizer_of
from dfw_opt.step_size import closed_form, exact
from dfw_opt.variables import Variable, stack, update_, wide

FULL_STEPS = 100  # until the ball begins to shrink; ten times what the mean plane spans
LARGEST_BATCH = 2**22  # elements computed with at once: what is made on the way must stay small
LEAST_SIZE = 0.1  # of a matrix's step, in units of the usual, 1/√(fan in), to outgrow a tiny start
LATENT_SIZE = 0.5  # of a latent's step, in units of what the box leaves of [-1, 1], the way to flip
VECTOR_SIZE = 0.1  # of a vector's step, as norms' weights start at 1; of a scale's, in units of it

_ALIKE = ["lr", "weight_decay", "momentum", "quantizer", "bits", "threshold", "relaxation"]
_ALIKE += ["radius", "step_size", "layout", "scale_axis", "scale_groups"]


class Batch(NamedTuple):
    """Parameters of one shape that are trained alike, and a group that says how."""

    group: dict[str, Any]
    quantizer: Quantizer | None
    place: Any
    params: list[Tensor]
    gradients: list[Tensor]


class FrankWolfe(LatentOptimizer):
    """The step that :class:`~dfw_opt.DFW` and the other two have in common."""

    @overload  # type: ignore[override]
    def step(self, closure: None = None, *, loss: Tensor | float) -> Tensor | float: ...
    @overload
    def step(self, closure: Callable[[], Tensor | float]) -> Tensor | float: ...
    @overload
    def step(self, closure: Callable[[], Tensor | float | None]) -> Tensor | float | None: ...
    @overload
    def step(self) -> None: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """Performs one step, and returns the loss as it was passed, or ``None`` if it was watched.

        Args:
            closure: clears the gradients, evaluates the loss, calls ``backward()`` and returns the
                loss (or ``None``, where that is watched). Called once, at the quantized weights.
            loss: instead of a closure, the loss whose gradients are in place: a real scalar, not
                negative, without the weight decay term. Without both it is :meth:`watch_loss`'s.

        Raises:
            TypeError: the loss is not real, or none is given or watched, or closure and loss are.
            ValueError: the loss is not a scalar; or a setting has been changed to a bad one.
            RuntimeError: a gradient is sparse; or a watched module has seen no ``backward()``.

        A loss, gradient or tensor ``lr`` that is NaN or infinite, or a gradient too large for its
        square to be finite, skips the step: nothing changes, ``gamma`` is NaN and ``skipped_steps``
        grows by one.
        """
        result, ell = self._loss(closure, loss)
        norm, mu, eps = (self.param_groups[0][key] for key in ("norm", "momentum", "eps"))
        batches = self._batches()
        squares = [self._squares(batch.gradients) for batch in batches]
        given = [group["lr"] for group in self.param_groups]
        rates = [lr.reshape(()).to(ell) for lr in given if isinstance(lr, Tensor)]
        skip = ~self._gather([ell, *squares, *rates]).isfinite().all()
        self._skipped.add_(skip)
        if (known := self._read(skip)) is True:
            self._gamma.fill_(math.nan)
            return result

        h = ell
        variables = self._variables(batches, squares, None if known is False else skip)
        if norm == "spectral" and variables:
            left, t = self._plane.unbind()
            h = torch.where(t == 0, ell, torch.lerp(ell, left, mu))
            share = torch.full_like(ell, 1 - mu).masked_fill(t == 0, 1).masked_fill(skip, 0)
            self._average(variables, self._read(share), self._read((1 + t / FULL_STEPS).rsqrt()))
        decay, full = self._dual_terms(variables)
        gamma = closed_form(h, decay, full, eps)
        if boxed := [v for v in variables if v.searched]:
            straight = self._dual_terms([v for v in variables if not v.searched])
            gamma = exact(h - straight[0], boxed, gamma, straight[1] + eps, self._gather)
        if norm == "spectral" and variables:
            left = (h - decay - gamma * full).clamp(min=0)
            self._plane.copy_(torch.where(skip, self._plane, torch.stack((left, t + 1))))
        taken = self._read(gamma.masked_fill(skip, 0))
        update_(variables, taken, 1.0 if known is False else (~skip).to(gamma))
        for group, quantizer, _, params, _ in batches:
            if quantizer is not None:
                self._quantize(group, quantizer, params)
        self._gamma.copy_(gamma.masked_fill(skip, math.nan))
        return result

    def _batches(self) -> list[Batch]:
        """The parameters that have a gradient, by what can be computed with as one."""
        batches: list[Batch] = []
        last: dict[Any, Batch] = {}
        for number, group in enumerate(self.param_groups):
            # A tensor is no number to compare: a group with such an lr is like no other.
            own = (number if isinstance(group["lr"], Tensor) else 0, *map(group.get, _ALIKE))
            quantizer = quantizer_of(group)
            for p in (p for p in group["params"] if p.grad is not None and p.numel()):
                place = self._place(p, self.state.get(p, {}))
                batch = last.get((own, place))
                if batch is None or (len(batch.params) + 1) * p.numel() > LARGEST_BATCH:
                    batch = last[own, place] = Batch(group, quantizer, place[1:], [], [])
                    batches.append(batch)
                batch.params.append(p)
                batch.gradients.append(wide(p.grad))
        return batches

    def _variables(
        self, batches: list[Batch], squares: list[Tensor], skip: Tensor | None
    ) -> list[Variable]:
        """What is trained, with this batch's gradients; in the Euclidean norm also a direction."""
        variables = []
        for (group, quantizer, place, params, grads), product in zip(batches, squares, strict=True):
            for p in (p for p in params if not self.state.get(p)):  # frozen until now
                self._start(p, group)
            mu, eta, radius = group["momentum"], group["lr"], group.get("radius")
            euclidean = group["norm"] == "euclidean"
            if isinstance(eta, Tensor):
                eta = self._read(eta.reshape(()).to(grads[0]))
            # Infinity must not reach the means, whatever it is multiplied by.
            delta: Any = grads if skip is None else self._cleared(grads, skip)
            if quantizer is None:  # a Euclidean step needs no copy of the gradients
                pulled: Any = {"": (delta if euclidean else stack(delta), None)}
            else:
                pulled = quantizer.pull_back(stack(delta), self._stacked(quantizer, params))
            states = [self.state.get(p, {}) for p in params]  # which makes none where none is kept
            for key, (delta, metric) in pulled.items():
                delta, metric = self._settle(delta), self._settle(metric)
                prefix = "" if key in ("", "latent") else f"{key}_"
                # A scale has no upper bound, and is not pulled towards 0: two levels would merge.
                upper = math.inf if prefix or radius is None else radius
                lower, decay = (SCALE_MIN, 0.0) if prefix else (-upper, group["weight_decay"])
                values = [state[key] for state in states] if key else params
                variable = Variable(values, delta, delta, eta, decay, lower, upper, mu)
                lr = id(group["lr"]) if isinstance(eta, Tensor) else eta
                variable.alike = (lr, decay, lower, upper, mu, place)
                variable.states, variable.prefix, variable.layout = states, prefix, group["layout"]
                variables.append(variable)
                if not euclidean:
                    continue
                variable.searched = group.get("step_size") == "exact" and lower > -math.inf
                name = f"{prefix}momentum_buffer"
                for p, v in zip(params, values, strict=True) if mu else ():
                    if name not in self.state[p]:  # momentum was 0 until now
                        self.state[p][name] = torch.zeros_like(wide(v))
                variable.velocities = [self.state[p][name] for p in params] if mu else ()
                if metric is None:
                    variable.product = product
                else:
                    variable.directions = delta / metric
        return variables

    def _average(self, variables: list[Variable], share: Any, ball: Any) -> None:
        r"""The mean plane, :math:`m \leftarrow \mu m + (1 - \mu)\,\delta`, and the direction
        that is steepest at :math:`\mu m + (1 - \mu)\,\delta`, a batch ahead (Nesterov).
        """
        planes, radii = [], []
        for v in variables:
            delta: Any = v.planes
            part, rho = (x.to(delta) if isinstance(x, Tensor) else x for x in (share, ball))
            m = [state[f"{v.prefix}mean_gradient"] for state in v.states]
            torch._foreach_mul_(m, 1 - part)
            torch._foreach_add_(m, (part * delta).unbind())
            v.planes, ahead = m, torch.lerp(delta, stack(m), v.momentum)
            planes.append((ahead, v.layout, delta if v.layout == "rows" else None))
            size = stack([state[f"{v.prefix}size"] for state in v.states])
            radii.append(rho * size.view(-1, *[1] * (ahead.dim() - 1)))
        for v, D, radius in zip(variables, self._steepest(planes), radii, strict=True):
            v.directions = D.mul_(radius)

    def _dual_terms(self, variables: Sequence[Variable]) -> tuple[Tensor, Tensor]:
        r""":math:`\sum\eta\langle m, \lambda v\rangle` and :math:`\sum\eta\langle m, D\rangle`."""
        terms = [variable.dual_terms() for variable in variables]
        decay = [d for d, _ in terms if d is not None]
        both = self._gather([*decay, *(f for _, f in terms)] or [torch.zeros_like(self._gamma)])
        return both[: len(decay)].sum(), both[len(decay) :].sum()

    def _stacked(self, quantizer: Quantizer, params: list[Tensor]) -> State:
        """The states of a batch of parameters as one."""
        keys, shape = ("unit", *quantizer.scales), (-1, *[1] * params[0].dim())
        states = [self.state[p] for p in params]
        latent = self._settle(stack([state["latent"] for state in states]), whole=True)
        numbers = {key: stack([state[key] for state in states]).view(shape) for key in keys}
        return {"latent": latent, **numbers}

    def _quantize(self, group: dict[str, Any], quantizer: Quantizer, params: list[Tensor]) -> None:
        r"""Writes :math:`Q(u)` into the model.

        Latents that crowd at the bounds, so that their levels can grow no more, get twice the unit
        first; :math:`c\,u`, its momentum and its steps stay the same, to the bit. Crowded is a mean
        of :math:`|u|` above :math:`\tfrac34 R`: at random in the box it is :math:`\tfrac12 R`.
        """
        if quantizer.leveled and group["radius"] is not None:
            states = [self.state[p] for p in params]
            latent = stack([state["latent"] for state in states])
            size = latent.abs().sum(tuple(range(1, latent.dim()))) / latent[0].numel()
            half = torch.where(size > 0.75 * group["radius"], 0.5, 1.0).unbind()
            larger, smaller = {"unit", "mean_gradient"}, {"latent", "size", "momentum_buffer"}
            for keys, scale_ in (larger, torch._foreach_div_), (smaller, torch._foreach_mul_):
                pairs = [
                    (s[k], x) for s, x in zip(states, half, strict=True) for k in s if k in keys
                ]
                scale_(*([*of] for of in zip(*pairs, strict=True)))
        self._copy(params, quantizer.quantize(self._stacked(quantizer, params)).unbind())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _start(self, p: Tensor, group: dict[str, Any]) -> None:
        """Makes the state of a parameter, and brings it into its constraint set."""
        quantizer, bound = quantizer_of(group), group.get("radius")
        if quantizer is None and bound is not None:
            p.clamp_(-bound, bound)
        state: State = {}
        values = {"": wide(p)}
        if quantizer is not None:
            weight = self._settle(wide(p).unsqueeze(0), whole=True)
            start = quantizer.start(weight, math.inf if bound is None else bound)
            state["latent"] = torch.empty_like(wide(p)).copy_(start.pop("latent")[0])
            state |= {key: self._settle(value.reshape(())) for key, value in start.items()}
            values = {key: state[key] for key in ("latent", *quantizer.scales)}
        for key, value in values.items():
            prefix = "" if key in ("", "latent") else f"{key}_"
            if group["norm"] == "spectral":
                state[f"{prefix}mean_gradient"] = torch.zeros_like(value)
                state[f"{prefix}size"] = self._size(key, value, state, group)
            elif group["momentum"]:
                state[f"{prefix}momentum_buffer"] = torch.zeros_like(value)
        if state:
            self.state[p] = state
        self._write(p, group)

    def _size(self, key: str, value: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        r""":math:`\rho`, the length of a step at :math:`\eta = \gamma = 1`."""
        if key not in ("", "latent"):
            usual = state["unit"].reciprocal() * LEAST_SIZE * state["latent"][0].numel() ** -0.5
            return VECTOR_SIZE * torch.maximum(value, usual)
        if key == "latent":
            return torch.full_like(state["unit"], LATENT_SIZE * min(1.0, group["radius"] or 1.0))
        rms: Tensor = self._settle(value.square().mean().sqrt())
        if value.dim() < 2:
            return VECTOR_SIZE * rms.clamp(min=1)
        fan_in = value.shape[-1] if group["layout"] == "stack" else value[0].numel()
        return rms.clamp(min=LEAST_SIZE * fan_in**-0.5)
