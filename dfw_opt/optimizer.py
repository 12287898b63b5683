r"""The step that all optimizers of the package share.

Data flows one way: gradients → pull-back → :math:`\gamma` → update → quantize. The optimizer owns
the latents, in its state; the model holds the quantized weights, at all times (relaxed ones, if
that is asked for).
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from dfw_opt import native, relaxation
from dfw_opt.checkpoint import momentum_key
from dfw_opt.data_parallel import Ranks, check_process_group, mean_loss, scalar
from dfw_opt.fused import KINDS, LEAST_ELEMENTS, FusedVariables, fits
from dfw_opt.objective import value_of_loss
from dfw_opt.quantizers import QUANTIZERS, Pulled, State
from dfw_opt.relaxation import relaxation_of
from dfw_opt.sharding import (
    Groups,
    all_groups,
    groups_of,
    local,
    over_shards,
    placed_like,
    settled,
    whole,
)
from dfw_opt.state import LatentOptimizer, box
from dfw_opt.step_size import climb, closed_form, maximize, readable
from dfw_opt.update import Bounds, Variables
from dfw_opt.validate import all_options, check_hyperparameters, check_options, check_parameters
from dfw_opt.watch import LossWatch, loss_of

__all__ = ["FrankWolfe"]

Batch = Variables | FusedVariables


class FrankWolfe(LatentOptimizer):
    r"""Base of :class:`~dfw_opt.DFW`, :class:`~dfw_opt.ProjectedDFW`, :class:`~dfw_opt.TernaryDFW`.

    It is a :class:`torch.optim.Optimizer`.

    Attributes:
        gamma: the last step's :math:`\gamma`, a 0-dim tensor on the device of the parameters; NaN
            if that step was skipped, or there was none. Reading its value waits for the device.
            Each step makes a new tensor, but under :func:`torch.compile` it overwrites the old one.
        skipped_steps: how many steps changed nothing because the loss or a gradient was NaN or
            infinite, a 0-dim integer tensor.
        process_group: over which ranks the loss is averaged: ``"world"``, a ``ProcessGroup``, or
            ``None``.
    """

    gamma: Tensor
    skipped_steps: Tensor
    process_group: Ranks = "world"
    _ready = False
    _elements: int | None = None
    """Of the float32 parameters, once counted."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        process_group: Ranks = "world",
    ) -> None:
        check_process_group(process_group)
        self.process_group = process_group
        self._watch = LossWatch(self)
        super().__init__(params, defaults)
        devices = [p.device for group in self.param_groups for p in group["params"]]
        device = next(iter(devices), None)
        self.gamma = torch.full((), torch.nan, device=device)
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        # Only once every group is known to be good: a failed construction must not leave
        # quantized weights behind.
        for group in self.param_groups:
            self._start(group)
        self._ready = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, see :meth:`torch.optim.Optimizer.add_param_group`.

        The dictionary is copied, so one from :func:`~dfw_opt.param_groups` can serve two
        optimizers.

        Raises:
            TypeError: a parameter is not real floating point, or flattened by FSDP1.
            ValueError: a hyper-parameter is out of range, or a parameter does not suit its
                quantizer.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
        super().add_param_group(param_group)
        self._elements = None
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group, self.defaults)
            check_parameters(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._ready:
            self._start(group)

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
        """Performs one step.

        With neither argument the loss is that of :meth:`watch_loss`; a step for which every ``lr``
        is 0 needs none.

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
            ValueError: the loss is not a scalar; or the quantizer of a group has been changed, or
                its ``relaxation`` or an option of its quantizer (``threshold``, ``bits``) has been
                set to what it may not be.
            RuntimeError: a gradient is sparse; or the watched module has taken part in no
                ``backward()`` since the last step.

        A loss or gradient that is NaN or infinite (or whose squared norm overflows) skips the step:
        nothing changes, :attr:`gamma` is NaN and :attr:`skipped_steps` grows by one.
        """
        for group in self.param_groups:  # before a closure runs, or anything moves
            self._choose(group)
            check_options(group)
        given, result = self._loss(closure, loss)
        self._check_gradients()

        average = mean_loss(given, self._device(), self.process_group)
        unstarted = self._unstarted()
        kernels = self._kernels()
        batches = [b for group in self.param_groups for b in self._pull_back(group, kernels)]
        among = all_groups(batch.groups for batch in batches)
        sums = [batch.sums() for batch in batches]
        ell = _scalar(average(), batches)
        *terms, (ell,) = over_shards(
            [*(batch.groups for batch in batches), ()],
            [*(tuple(term.to(ell) for term in pair) for pair in sums), (ell,)],
            among,
        )
        finite = torch.stack([ell, *(x for term in terms for x in term)]).isfinite().all()
        if not readable(finite) or finite:
            gamma = self._search(ell, batches, terms, among)
            finite = finite & gamma.isfinite()  # a NaN among the weights themselves
        if readable(finite) and not finite:
            for p in unstarted:  # for nothing has changed
                del self.state[p]
            self._report(torch.full_like(ell, torch.nan), finite)
            return result

        self._update(batches, gamma, finite)
        written = {
            p for batch in batches if isinstance(batch, FusedVariables) for p in batch.params
        }
        for group in self.param_groups:
            self._quantize(group, written, finite)
        self._report(torch.where(finite, gamma, torch.nan), finite)
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what has been seen of a watched loss."""
        super().zero_grad(set_to_none)
        self._watch.clear()

    def watch_loss(
        self,
        module: nn.Module,
        get: Callable[[Any], Tensor | None] = loss_of,
        scaler: torch.amp.GradScaler | None = None,
    ) -> RemovableHandle:
        r"""Takes the loss from ``module``, for loops that call ``step()`` without an argument.

        Whatever the loop does with the outputs :math:`\ell_k` of ``module`` before it calls
        ``backward()`` on a result :math:`f`, as long as :math:`f` is linear in them: the step is
        made for :math:`\sum_k \langle \partial f/\partial\ell_k, \ell_k\rangle`, the sum over
        everything since the last step or :meth:`zero_grad`. So losses divided for gradient
        accumulation, weighted sums of several watched criteria and losses by sample are right, and
        evaluation and ``torch.autograd.grad()`` add nothing.

        Args:
            module: a criterion, or a model that returns its loss.
            get: finds the loss in the output of ``module``; by default it is the output itself, or
                its ``loss``. Where that is ``None``, there is nothing to be seen.
            scaler: the gradient scaler, if one is used, for its scale is not part of the loss.

        Returns:
            A handle, whose ``remove()`` ends it.

        :meth:`step` with ``loss`` ignores what was seen; with a closure, it takes that rather than
        the closure's result. Copies of ``module`` are not watched.

        Raises:
            TypeError: ``module`` is no module, ``get`` cannot be called, or ``scaler`` is no
                ``torch.amp.GradScaler``.
            ValueError: it is watched already.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"module={module!r} must be a torch.nn.Module that computes the loss, such as "
                "nn.CrossEntropyLoss()"
            )
        return self._watch.add(module, get, scaler)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_watch", LossWatch(self))
        later: dict[str, Any] = {"foreach": None, "fused": None}
        if "quantizer" in self.defaults:
            self.defaults.setdefault("relaxation", 0.0)
            later["relaxation"] = 0.0
        for group in self.param_groups:
            for name, value in later.items():
                group.setdefault(name, value)
            # Options of quantizers that came after the checkpoint or the pickle.
            for name in all_options().keys() & self.defaults.keys():
                group.setdefault(name, self.defaults[name])

    def __getstate__(self) -> dict[str, Any]:
        # torch's own keeps three attributes only.
        own = ("gamma", "skipped_steps", "process_group", "_ready")
        if not isinstance(self.process_group, str | None):
            raise TypeError(
                "an optimizer with a process group of its own cannot be copied or pickled; save "
                "optimizer.state_dict(), and give the process_group to a new optimizer"
            )
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    # The stages of a step -----------------------------------------------------------------------

    def _loss(
        self, closure: Callable[[], Tensor | float | None] | None, loss: Tensor | float | None
    ) -> tuple[Tensor | float, Tensor | float | None]:
        """The loss by which to step, and what to return."""
        unknown = closure is None and loss is None and not self._watch.has_seen
        # torch.distributed.checkpoint makes steps of length 0, to see what state there is.
        if unknown and all(float(group["lr"]) == 0 for group in self.param_groups):
            return 0.0, None
        given, result = value_of_loss(type(self).__name__, closure, loss, self._watch)
        return whole(given) if isinstance(given, Tensor) else given, result

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if (grad := p.grad) is not None and grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients (parameter of "
                        f"shape {tuple(p.shape)}); make the layer with sparse=False"
                    )

    def _kernels(self) -> ctypes.CDLL | None:
        """The compiled kernels, if some group is to use them."""
        if torch.compiler.is_compiling():
            return None
        wanted = [group["fused"] for group in self.param_groups]
        if None in wanted and True not in wanted:
            if self._elements is None:
                params = [p for group in self.param_groups for p in group["params"]]
                self._elements = sum(p.numel() for p in params if p.dtype == torch.float32)
            if self._elements < LEAST_ELEMENTS:
                return None
        # A step that others make blindly, on another device, could not be undone here.
        if not all(p.is_cpu for group in self.param_groups for p in group["params"]):
            return None
        return native.library() if any(map(_fused, self.param_groups)) else None

    def _pull_back(self, group: dict[str, Any], kernels: ctypes.CDLL | None) -> list[Batch]:
        """The variables of ``group`` that have a gradient, in batches that can be treated alike."""
        fused: dict[bool, tuple[list[Tensor], list[State]]] = {}
        others: dict[Any, Variables] = {}
        pointers = {p.data_ptr() for p in group["params"]} if kernels is not None else set()
        if (
            not _fused(group)
            or group.get("quantizer") not in KINDS
            or relaxation_of(group) > 0
            or len(pointers) < len(group["params"])  # one twice: two threads would meet in it
        ):
            kernels = None
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self._current_state(p, group)
            if kernels is not None and fits(p, state, group.get("quantizer")):
                params, states = fused.setdefault(_keeps(group, state, "latent"), ([], []))
                params.append(p)
                states.append(state)
            else:
                self._add_variables(others, p, state, group)
        compiled = [
            FusedVariables(kernels, group, box(group), keeps, *those)
            for keeps, those in fused.items()
            if kernels is not None
        ]
        return [*compiled, *others.values()]

    def _add_variables(
        self, batches: dict[Any, Variables], p: Tensor, state: State, group: dict[str, Any]
    ) -> None:
        """Adds what is trained for ``p`` to the batches of its like."""
        for key, value, pulled, own_bounds in _variables(p, state, group):
            bounds = own_bounds or box(group)
            keeps = _keeps(group, state, key)
            groups = groups_of(value)
            kind = (value.device, value.dtype, bounds, own_bounds is None, keeps, groups)
            if kind not in batches:
                batches[kind] = Variables(
                    lr=_scalar_lr(group["lr"]),
                    # A scale is not pulled towards 0: two levels would merge.
                    weight_decay=group["weight_decay"] if own_bounds is None else 0.0,
                    momentum=group["momentum"] if keeps else None,
                    bounds=bounds,
                    exact=group.get("step_size") == "exact",
                    foreach=group["foreach"] is not False,
                    groups=groups,
                )
            gradient = local(placed_like(pulled.gradient, value))
            metric = None if pulled.metric is None else local(settled(pulled.metric))
            batches[kind].add(local(value), Pulled(gradient, metric), (p, key))

    def _search(
        self,
        ell: Tensor,
        batches: Sequence[Batch],
        terms: list[tuple[Tensor, ...]],
        among: Groups,
    ) -> Tensor:
        r"""The one :math:`\gamma` of this step."""
        eps = self.param_groups[0]["eps"]
        boxed = [batch for batch in batches if batch.searched]
        unboxed = closed_form(ell, *_totals(terms, ell), eps)
        if not boxed:
            return unboxed
        # From inside the box the exact root is never below the closed form's, and the slope at 0
        # is the same: if that is an end point, so is the other.
        # (A process that sees its own part only cannot tell.)
        inside = readable(ell) and not among and all(batch.inside() for batch in boxed)
        if inside and unboxed in (0, 1):
            return unboxed
        straight = [t for batch, t in zip(batches, terms, strict=True) if not batch.searched]
        decay, curvature = _totals(straight, ell)

        def slope(gamma: Tensor) -> tuple[Tensor, Tensor]:
            total, bend = ell - decay - (curvature + eps) * gamma, -(curvature + eps)
            pairs = [batch.slope(gamma.to(batch.values[0].device)) for batch in boxed]
            groups = [batch.groups for batch in boxed]
            for s, b in over_shards(groups, [(s.to(ell), b.to(ell)) for s, b in pairs], among):
                total, bend = total + s, bend + b
            return total, bend

        return climb(slope, unboxed) if inside else maximize(slope, like=ell)

    def _report(self, gamma: Tensor, finite: Tensor) -> None:
        self._watch.clear()
        if torch.compiler.is_compiling():  # which loses what is assigned to an optimizer
            self.gamma.copy_(gamma)
            self.skipped_steps.add_(~finite)
        else:
            self.gamma = gamma
            self.skipped_steps = self.skipped_steps.to(finite.device) + ~finite

    def _update(self, batches: Sequence[Batch], gamma: Tensor, finite: Tensor) -> None:
        for batch in batches:
            if isinstance(batch, FusedVariables):  # on the CPU, so nothing is there to be undone
                batch.move(gamma)
                continue
            batch.buffers = self._momentum_buffers(batch)
            device = batch.values[0].device
            # Where Python cannot know whether all is finite, the device decides.
            batch.move(gamma.to(device), None if readable(finite) else finite.to(device))

    def _quantize(self, group: dict[str, Any], written: set[Tensor], finite: Tensor) -> None:
        """Quantizes what was moved, except what its kernel has already ``written``."""
        counts = None if readable(finite) else finite
        if group.get("quantizer") is not None:
            for p in group["params"]:
                if p in written:
                    self._note_written(p)
                elif p.grad is not None:
                    state = self.state[p]
                    for key, value in QUANTIZERS[group["quantizer"]].derive(state, group).items():
                        state[key].copy_(settled(value))
                    self._publish(p, group, counts)

    def _device(self) -> torch.device:
        """Where the loss is wanted."""
        params = (p for group in self.param_groups for p in group["params"])
        return next((p.device for p in params), torch.get_default_device())


def _variables(
    p: Tensor, state: State, group: dict[str, Any]
) -> Iterator[tuple[str, Tensor, Pulled, Bounds | None]]:
    """What is trained for ``p``: state key, value, gradient with metric, own bounds if any."""
    assert p.grad is not None
    if group.get("quantizer") is None:
        yield "", p, Pulled(p.grad, None), None
        return
    pulled = relaxation.pull_back(p.grad, state, group)
    for key, bounds in QUANTIZERS[group["quantizer"]].variables.items():
        yield key, state[key], pulled[key], bounds


def _fused(group: dict[str, Any]) -> bool:
    """Whether compiled kernels may do the group: as in torch, ``foreach`` rules them out."""
    return group["fused"] or (group["fused"] is None and group["foreach"] is None)


def _keeps(group: dict[str, Any], state: State, key: str) -> bool:
    """Whether momentum is kept for a variable."""
    return group["momentum"] != 0 or momentum_key(key) in state


def _scalar(loss: Tensor | float, batches: Sequence[Batch]) -> Tensor:
    """The loss where the sums are made, 0-dim, in float32 or wider."""
    values = [batch.values[0] for batch in batches]
    dtype = reduce(torch.promote_types, (v.dtype for v in values), torch.float32)
    own = loss.device if isinstance(loss, Tensor) else None
    return scalar(loss, values[0].device if values else own, dtype)


def _totals(terms: list[tuple[Tensor, ...]], like: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(like)
    return sum((t[0] for t in terms), zero), sum((t[1] for t in terms), zero)


def _scalar_lr(lr: float | Tensor) -> float | Tensor:
    return lr.reshape(()) if isinstance(lr, Tensor) else lr
