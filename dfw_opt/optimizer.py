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

    m \leftarrow \mu m + (1 - \mu)\,\delta, \qquad
    h \leftarrow \mu \max\Bigl(0,\ h - \sum\eta\langle m, \lambda v\rangle
        - \gamma\sum\eta\langle m, D\rangle\Bigr) + (1 - \mu)\,\ell,

with what the step before left of its plane in the maximum (the model of Schaipp et al., *MoMo*,
2023, arXiv 2305.07583), and :math:`m = \delta`, :math:`h = \ell` at first.

Quantized weights are trained by mirror descent: the model holds :math:`Q(u)`, the optimizer, in its
state, the dual variable :math:`u`, to which gradients are pulled back (:mod:`dfw_opt.quantizers`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from dfw_opt.lifecycle import LatentOptimizer, named
from dfw_opt.norms import Plane
from dfw_opt.quantizers import SCALE_MIN, Quantizer, State, quantizer_of
from dfw_opt.step_size import closed_form, exact
from dfw_opt.variables import Variable, wide

__all__ = ["FrankWolfe"]

LARGEST_BATCH = 2**22
"""How many elements are computed with at once, so that what is made on the way stays small."""

VECTOR_SIZE = 0.1
"""The length of a step of a vector, where a matrix has its own root mean square: norms' weights
start at 1, biases at 0. Scales move by as much of their first value."""

LEAST_SIZE = 0.1
"""The least length of a step of a matrix, in units of its usual size, so that it outgrows a tiny
start: :math:`1/\\sqrt{\\text{fan in}}`."""

LATENT_SIZE = 0.5
"""The length of a step of latents, in units of what the box leaves of [-1, 1]: what counts is how
far they have to go to flip, not how their start is distributed."""

_ALIKE = (
    *("lr", "weight_decay", "momentum", "quantizer", "bits", "threshold", "relaxation"),
    *("radius", "step_size", "layout", "scale_axis", "scale_groups"),
)

T = TypeVar("T")
Batch = tuple[dict[str, Any], list[Tensor]]
"""Parameters of one shape that are trained alike, and a group that says how."""


class FrankWolfe(LatentOptimizer):
    r"""Base of :class:`~dfw_opt.DFW`, :class:`~dfw_opt.ProjectedDFW`, :class:`~dfw_opt.TernaryDFW`.

    See :class:`~dfw_opt.lifecycle.LatentOptimizer` for what it shares with other optimizers.
    """

    @overload  # type: ignore[override]
    def step(self, closure: None = None, *, loss: Tensor | float) -> Tensor | float: ...
    @overload
    def step(self, closure: Callable[[], Tensor | float]) -> Tensor | float: ...
    @overload
    def step(self, closure: Callable[[], Tensor | float | None]) -> Tensor | float | None: ...
    @overload
    def step(self) -> None: ...
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Tensor | float | None] | None = None,
        *,
        loss: Tensor | float | None = None,
    ) -> Tensor | float | None:
        """Performs one step. With neither argument the loss is that of :meth:`watch_loss`.

        Args:
            closure: clears the gradients, evaluates the loss, calls ``backward()`` and returns the
                loss (or ``None``, where that is watched). Called once, at the quantized weights.
            loss: instead of a closure, the loss whose gradients are in place: a real scalar, not
                negative, without the weight decay term.

        Returns:
            The loss, as it was passed or returned; ``None`` if it was watched.

        Raises:
            TypeError: both of ``closure`` and ``loss`` were given, or neither and none is watched;
                or the loss is not a number.
            ValueError: the loss is not a scalar; or a setting of a group has been changed to what
                it may not be.
            RuntimeError: a gradient is sparse; or the watched module has taken part in no
                ``backward()`` since the last step.

        A loss or gradient that is NaN or infinite, or too large for its square to be finite, skips
        the step: nothing changes, ``gamma`` is NaN and ``skipped_steps`` grows by one.
        """
        result, ell = self._loss(closure, loss)
        norm, mu, eps = (self.param_groups[0][key] for key in ("norm", "momentum", "eps"))
        batches = [*self._batches()]
        gradients = [[wide(p.grad) for p in params] for _, params in batches]  # type: ignore[arg-type]
        sizes = self._norm([g for grads in gradients for g in grads]) if batches else []
        skip = ~self._gather([ell, *sizes]).isfinite().all()
        if (known := self._read(skip)) is True:
            return self._report(result, torch.full_like(ell, math.nan), skip)

        h, first = ell, self._height.isnan()  # before the first step there is no plane
        if norm == "spectral":
            h = torch.where(first, ell, mu * self._height + (1 - mu) * ell)
        variables = self._variables(batches, gradients, first, None if known is False else skip)
        decay, full = self._dual_terms(variables)
        gamma = closed_form(h, decay, full, eps)
        if boxed := [v for v in variables if v.searched]:
            straight = self._dual_terms([v for v in variables if not v.searched])
            gamma = exact(h - straight[0], boxed, gamma, straight[1] + eps, self._total)
        if norm == "spectral":
            left = (h - decay - gamma * full).clamp(min=0)
            self._height.copy_(torch.where(skip, self._height, left))
        taken = self._read(gamma.masked_fill(skip, 0))
        for variable in variables:
            variable.update_(taken, 1.0 if known is False else (~skip).to(gamma))
        for group, params in batches:
            self._quantize(group, params)
        return self._report(result, gamma.masked_fill(skip, math.nan), skip)

    def _batches(self) -> Iterator[Batch]:
        """The parameters that have a gradient, by what can be computed with as one."""
        batches: dict[Any, Batch] = {}
        for number, group in enumerate(self.param_groups):
            # A tensor is no number to compare: a group with such an lr is like no other.
            alike = (number if isinstance(group["lr"], Tensor) else 0, *map(group.get, _ALIKE))
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    if p not in self.state:  # frozen until now
                        self._start(p, group)
                    key = (alike, self._place(p))
                    batches.setdefault(key, (group, []))[1].append(p)
        for group, params in batches.values():
            size = max(1, LARGEST_BATCH // params[0].numel())
            for start in range(0, len(params), size):
                yield group, params[start : start + size]

    def _variables(
        self, batches: Sequence[Batch], gradients: Any, first: Tensor, skip: Tensor | None
    ) -> list[Variable]:
        """What is trained, with its plane and its direction."""
        variables: dict[Any, Variable] = {}
        spectral: list[tuple[Variable, list[Tensor], list[Tensor], Tensor]] = []
        planes: list[Plane] = []
        if (settings := self.param_groups[0])["norm"] == "spectral":  # this batch's, in the mean
            share = torch.full_like(self._gamma, 1 - settings["momentum"]).masked_fill(first, 1)
            share = share if skip is None else share.masked_fill(skip, 0)
        for (group, params), grads in zip(batches, gradients, strict=True):
            if skip is not None:  # infinity must not reach the means, whatever it is multiplied by
                grads = self._cleared(grads, skip)
            mu, euclidean = group["momentum"], group["norm"] == "euclidean"
            for key, delta, metric in self._pull_back(group, params, grads):
                variable = self._variable_of(variables, group, params[0], key)
                values = [self.state[p][key] for p in params] if key else params
                if euclidean:
                    z = self._kept(params, key, "momentum_buffer") if mu else []
                    directions = delta if metric is None else (delta / metric).unbind()
                    variable.add(values, directions, metric=metric, velocity=z)
                    continue
                plane = self._kept(params, key, "mean_gradient")
                torch._foreach_mul_(plane, (1 - share).to(delta))
                torch._foreach_add_(plane, (share.to(delta) * delta).unbind())
                ahead = torch.lerp(delta, self._stack(plane), mu)  # Nesterov
                layout = group["layout"]
                planes.append((ahead, layout, delta if layout == "rows" else None))
                size = self._stack(self._kept(params, key, "size"))
                spectral.append((variable, values, plane, _like(size, delta)))
        directions = self._steepest(planes)
        for (variable, values, plane, size), D in zip(spectral, directions, strict=True):
            variable.add(values, D.mul_(size).unbind(), plane)
        return [*variables.values()]

    def _pull_back(
        self, group: dict[str, Any], params: list[Tensor], grads: Sequence[Tensor]
    ) -> Iterator[tuple[str, Any, Tensor | None]]:
        r"""State key, :math:`\delta` and :math:`M` of all that is trained for ``params``."""
        if (quantizer := quantizer_of(group)) is not None:
            pulled = quantizer.pull_back(self._stack(grads), self._stacked(quantizer, params))
            for key, (delta, metric) in pulled.items():
                yield key, self._settle(delta), self._settle(metric)
        else:  # in the Euclidean norm D is the gradient itself, of which no copy is needed
            yield "", grads if group["norm"] == "euclidean" else self._stack(grads), None

    def _kept(self, params: list[Tensor], variable: str, key: str) -> list[Tensor]:
        """What is kept for a variable; zeros if that has not been kept until now."""
        name = named(variable, key)
        for state, p in ((self.state[p], p) for p in params if name not in self.state[p]):
            state[name] = torch.zeros_like(state[variable] if variable else wide(p))
        return [self.state[p][name] for p in params]

    def _variable_of(
        self, variables: dict[Any, Variable], group: dict[str, Any], p: Tensor, key: str
    ) -> Variable:
        """The one in which ``key`` of a parameter is trained together with its like."""
        lr, radius, scale = group["lr"], group.get("radius"), key not in ("", "latent")
        upper = math.inf if radius is None or scale else radius
        lower = SCALE_MIN if scale else -upper
        # A scale is not pulled towards 0: two levels would merge.
        decay, mu = 0.0 if scale else group["weight_decay"], group["momentum"]
        searched = group["norm"] == "euclidean" and group.get("step_size") == "exact"
        kind = (id(lr) if isinstance(lr, Tensor) else lr, decay, mu, lower, upper, searched)
        if (place := (*kind, *self._place(p)[1:])) not in variables:
            eta = self._read(lr.reshape(()).to(self._gamma)) if isinstance(lr, Tensor) else lr
            searched = searched and lower > -math.inf
            variables[place] = Variable(eta, decay, mu, lower, upper, searched, self._stack)
        return variables[place]

    def _stacked(self, quantizer: Quantizer, params: list[Tensor]) -> State:
        """The states of a batch of parameters as one."""
        states = [self.state[p] for p in params]
        latent = self._settle(self._stack([state["latent"] for state in states]), whole=True)
        numbers = {
            key: _like(self._stack([state[key] for state in states]), latent)
            for key in ("unit", *quantizer.scales)
        }
        return {"latent": latent, **numbers}

    def _quantize(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Writes :math:`Q(u)` into the model."""
        if (quantizer := quantizer_of(group)) is None:
            return
        if quantizer.leveled and group["radius"] is not None:
            self._widen([self.state[p] for p in params], group["radius"])
        self._copy(params, quantizer.quantize(self._stacked(quantizer, params)).unbind())

    def _widen(self, states: list[State], radius: float) -> None:
        r"""Doubles the unit of latents that crowd at the bounds: their levels can grow no more.

        In the new unit all of :math:`c\,u`, its momentum and its steps are what they were, to the
        bit. Crowded is a mean of :math:`|u|` above :math:`\tfrac34 R`; latents that wander about
        the box at random have :math:`\tfrac12 R`.
        """
        latent = self._stack([state["latent"] for state in states])
        size = latent.abs().sum(tuple(range(1, latent.dim()))) / latent[0].numel()
        half = torch.where(size > 0.75 * radius, 0.5, 1.0).unbind()
        for key in states[0].keys() & {"latent", "size", "momentum_buffer"}:
            torch._foreach_mul_([state[key] for state in states], half)
        for key in states[0].keys() & {"unit", "mean_gradient"}:
            torch._foreach_div_([state[key] for state in states], half)

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
            state = quantizer.start(weight, math.inf if bound is None else bound)
            latent = torch.empty_like(wide(p)).copy_(state.pop("latent")[0])
            numbers = {key: self._settle(value.reshape(())) for key, value in state.items()}
            state = {"latent": latent, **numbers}
            values = {key: state[key] for key in ("latent", *quantizer.scales)}
        for key, value in values.items():
            if group["norm"] == "spectral":
                state[named(key, "mean_gradient")] = torch.zeros_like(value)
                state[named(key, "size")] = self._size(key, value, state, bound)
            elif group["momentum"]:
                state[named(key, "momentum_buffer")] = torch.zeros_like(value)
        if state:
            self.state[p] = state
        self._quantize(group, [p])

    def _size(self, key: str, value: Tensor, state: State, radius: float | None) -> Tensor:
        r""":math:`\rho`, the length of a step at :math:`\eta = \gamma = 1`."""
        if key not in ("", "latent"):
            usual = state["unit"].reciprocal() * LEAST_SIZE * state["latent"][0].numel() ** -0.5
            return VECTOR_SIZE * torch.maximum(value, usual)
        if key == "latent":
            return torch.full_like(state["unit"], LATENT_SIZE * min(1.0, radius or 1.0))
        rms = self._settle(value.square().mean().sqrt())
        if value.dim() < 2:
            return VECTOR_SIZE * rms.clamp(min=1)
        return rms.clamp(min=LEAST_SIZE * value[0].numel() ** -0.5)

    def _dual_terms(self, variables: Sequence[Variable]) -> tuple[Tensor, Tensor]:
        r""":math:`\sum\eta\langle m, \lambda v\rangle` and :math:`\sum\eta\langle m, D\rangle`."""
        terms = [variable.dual_terms() for variable in variables]
        decay, full = ([term for each in terms for term in each[i]] for i in (0, 1))
        if not decay:
            return self._total(decay), self._total(full)
        both = self._gather(decay + full)
        return both[: len(decay)].sum(), both[len(decay) :].sum()

    def _total(self, terms: list[Tensor]) -> Tensor:
        return self._gather(terms).sum() if terms else torch.zeros_like(self._gamma)

    def _report(self, result: T, gamma: Tensor, skip: Tensor) -> T:
        self._gamma.copy_(gamma)
        self._skipped.add_(skip)
        return result


def _like(numbers: Tensor, batch: Tensor) -> Tensor:
    """A number for each tensor of a batch, to broadcast over it."""
    return numbers.view(-1, *[1] * (batch.dim() - 1))
