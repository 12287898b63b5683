r"""What surrounds the steps of an optimizer with latents: groups, checkpoints, copies, the loss.

A state begins when the optimizer is made (for a frozen parameter, with its first gradient), follows
the model to another device, and comes back from a checkpoint in the dtype that it had.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from dfw_opt import norms, sharding, validate
from dfw_opt.checkpoint import aligned, restore
from dfw_opt.quantizers import QUANTIZERS, Quantizer, quantizer_of
from dfw_opt.variables import squares, stack
from dfw_opt.watch_loss import LossWatch, loss_of

USAGE = (
    "write optimizer.step(loss=loss) after loss.backward(), or optimizer.step(closure) with one "
    "that calls backward() and returns the loss, or, once, optimizer.watch_loss(criterion)"
)


def steepest(planes: list[tuple[Tensor, str, Any]], products: Any = None) -> list[Tensor]:
    """:func:`norms.spectral` of each, under autocast too. Uses the list up, so memory is free."""
    kind = planes[0][0].device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
        return [norms.spectral(*planes.pop(0), products) for _ in range(len(planes))]


class LatentOptimizer(Optimizer):
    r"""A :class:`torch.optim.Optimizer` whose parameters may hold quantized latents.

    What it keeps for a parameter is float32 or wider, and there from construction on, as
    :math:`Q(u)` is in quantized parameters.
    """

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], process_group: sharding.Ranks = "world"
    ) -> None:
        if not isinstance(process_group, sharding.ProcessGroup | None) and process_group != "world":
            kinds = "not 'world', a ProcessGroup, or None"
            raise TypeError(f"process_group={process_group!r} is {kinds}")
        self.process_group = process_group
        self._ready: list[bool] = []  # in place, so that a wrapper's copy of it is the same
        self._set_up()
        super().__init__(params, defaults)
        validate.check_groups(self)
        self.register_step_pre_hook(validate.before_step)
        self.register_step_post_hook(validate.after_step)
        # Once every group is known to be good: what fails must not leave quantized weights behind.
        for group in self.param_groups:
            self._start_group(group)
        self._ready.append(True)

    @property
    def gamma(self) -> Tensor:
        r"""The last step's :math:`\gamma`, 0-dim, new; NaN if it was skipped, or there was none."""
        return self._gamma.clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps changed nothing, as the loss or a gradient was not finite; 0-dim, new."""
        return self._skipped.clone()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what has been seen of a watched loss."""
        super().zero_grad(set_to_none)
        self._watch.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a copy of a group, see :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            TypeError, ValueError: as of the constructor; or what counts once for all differs.
        """
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        group = self.param_groups[-1]
        if group.get("quantizer") == "uniform" and group.get("bits", 4) is None:
            group["bits"] = 4
        try:
            validate.check_group(group, param_group, self)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._ready:
            self._start_group(group)

    def watch_loss(
        self,
        module: nn.Module,
        get: Callable[[Any], Tensor | None] = loss_of,
        scaler: torch.amp.GradScaler | None = None,
    ) -> RemovableHandle:
        r"""Takes the loss from ``module``, for loops that call ``step()`` without an argument.

        What the loop calls ``backward()`` on, :math:`f`, may be any linear function of the outputs
        :math:`\ell_k` of ``module``: the step is made for :math:`\sum_k \langle \partial
        f/\partial\ell_k, \ell_k\rangle`, over all since the last step or :meth:`zero_grad`. That
        ends with ``remove()`` of the handle that is returned.

        Args:
            module: a criterion, or a model that returns its loss. Keep a reference to it.
            get: finds the loss in the output of ``module``; by default it is the output itself, or
                its ``loss``. Where that is ``None``, there is nothing to be seen.
            scaler: the gradient scaler, if one is used, for its scale is not part of the loss.

        :meth:`step` with ``loss`` ignores what was seen; with a closure, it takes that rather than
        the closure's result. See :mod:`dfw_opt.watch_loss`.

        Raises:
            TypeError: ``module``, ``get`` or ``scaler`` is not what it says.
            ValueError: ``module`` is watched already.
        """
        return self._watch.add(module, get, scaler)

    @torch.no_grad()
    def relax(self, relaxation: float) -> None:
        r"""Sets the relaxation of all quantized groups, and their parameters to what it makes them.

        Latents and momentum stay. To be called between steps. It replaces what a group had of its
        own, and is that of groups that are added later.

        Args:
            relaxation: :math:`\theta`, from 1 for the float weights :math:`c\,u` to 0 for the
                quantized ones :math:`Q(u)`; :mod:`dfw_opt.quantizers.relaxed` has the formulas.

        Raises:
            ValueError: it is not in [0, 1], or no group is quantized.
        """
        validate.check_settings({"relaxation": relaxation}, {"relaxation": 0})
        groups = [group for group in self.param_groups if group.get("quantizer") is not None]
        if not groups:
            raise ValueError(f"relaxation={relaxation!r}: no group of this optimizer is quantized")
        for text in validate.overwritten(self):
            warnings.warn(text, stacklevel=3)  # before anything changes: it may be an error
        for settings in (self.defaults, *groups):
            settings["relaxation"] = float(relaxation)
        for group in groups:
            for p in (p for p in group["params"] if self.state.get(p)):
                self._place(p, self.state[p])
                self._write(p, group)

    def state_dict(self) -> dict[str, Any]:
        """As in torch. Each parameter's state has the plane they share: its height and its age."""
        result = super().state_dict()
        for group in result["param_groups"]:  # NumPy's would not be safe to load
            group |= {k: x.item() for k, x in group.items() if type(x).__module__ == "numpy"}
        if self.param_groups[0]["norm"] == "spectral":
            states = result["state"].items()
            result["state"] = {i: s | {"plane": self._plane.clone()} for i, s in states}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint, see :meth:`torch.optim.Optimizer.load_state_dict`.

        Parameters are matched by name where both sides have ``param_names``. State is float32 or
        wider, whatever the parameters are, and these are set to the quantized latents.

        Raises:
            ValueError: the checkpoint is of another optimizer, or of parameters of other names or
                shapes; nothing is changed.
        """
        loaded: dict[str, Any] = {}

        def align(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            loaded.update(sharding.agreed(self, lambda: aligned(incoming, self)))
            return loaded

        # As hooks: the user's own come before the check, and those on the result after restore().
        with (
            self.register_load_state_dict_pre_hook(align),
            self.register_load_state_dict_post_hook(lambda _: restore(self, loaded), prepend=True),
        ):
            super().load_state_dict(state_dict)

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]  # as torch, without what a group has no use for
        for number, group in enumerate(self.param_groups):
            name, spectral = group.get("quantizer"), group["norm"] == "spectral"
            idle = {key for kind, (_, keys) in QUANTIZERS.items() for key in keys if kind != name}
            idle |= {"params", "param_names", "step_size" if spectral else "layout"}
            idle |= {"quantizer", "radius"} - self.defaults.keys()
            if name is None:
                idle |= {"relaxation", "scale_axis", "scale_groups"}
                idle |= set() if group.get("radius") else {"step_size"}
            lines += [f"Parameter Group {number}: {len(group['params'])} parameters"]
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in idle]
        return "\n".join([*lines, ")"])

    def __getstate__(self) -> dict[str, Any]:
        # torch's own keeps three attributes only.
        if not isinstance(self.process_group, str | None):
            how = "give the process_group to a new optimizer, and load the state_dict() of this one"
            raise TypeError(f"a process group of its own cannot be copied or pickled; {how}")
        own = ("process_group", "_ready", "_gamma", "_skipped", "_plane")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_written" in self.__dict__:  # torch does this when it loads a checkpoint
            super().__setstate__(state)
            return
        self._set_up()
        super().__setstate__(state)
        self.register_step_pre_hook(validate.before_step)
        self.register_step_post_hook(validate.after_step)
        for group in self.param_groups:
            self._seen.append(validate.settings(group))
            for p in group["params"]:
                sharding.adapt(self, p)
                if "latent" in self.state.get(p, {}):
                    self._written[p] = p._version

    @torch.inference_mode(False)
    def _set_up(self) -> None:
        """What a new optimizer and a copy begin with."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        nan = partial(torch.full, (), math.nan, dtype=dtype)
        self._gamma, self._ell = nan(), nan()
        self._plane = torch.zeros(2, dtype=dtype)  # what is left of its height, and its steps
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._watch = LossWatch(self)
        self._written = dict[Tensor, int]()  # at which version a quantized parameter was written
        self._seen: list[dict[str, Any]] = []  # the settings of each group that have been checked
        self._warned: set[str] = set()
        self._late: list[str] = []
        # How the core computes. sharding.adapt() has others of these.
        self._place: Callable[..., Any] = sharding.place
        self._gather: Callable[[list[Tensor]], Tensor] = torch.stack
        self._squares: Callable[[Sequence[Tensor]], Tensor] = squares
        self._copy: Callable[..., None] = torch._foreach_copy_
        self._settle: Callable[..., Any] = lambda x, whole=False: x
        medium = torch.get_float32_matmul_precision() == "medium"  # torch's word for bfloat16
        self._steepest: Any = partial(steepest, products=torch.bfloat16 if medium else None)

    def _loss(self, closure: Any, loss: Any) -> tuple[Tensor | float | None, Tensor]:
        """What a step is to return, and the loss by which to step, the same on all ranks."""
        name, watch = type(self).__name__, self._watch
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"{name}.step: the closure, {closure!r}, cannot be called: {USAGE}")
            with torch.enable_grad():
                returned = closure()
            if loss is None:
                loss = returned
            elif returned is None:
                closure = None  # Lightning adds one that does nothing, in manual optimization
            else:
                raise TypeError(f"{name}.step takes a closure or a loss, not both: {USAGE}")
        elif loss is None and not watch.active and not sharding.is_probe(self):
            raise TypeError(f"{name}.step needs the loss: {USAGE}")
        value: Any = 0.0 if loss is None and closure is None else loss
        # Frameworks that call backward() themselves pass closures that return nothing; or the last
        # micro-batch's loss alone, so that what was watched comes first.
        if watch.active and (closure is not None or loss is None):
            value = watch.value(name)
        source = "the loss" if closure is None else "the closure's result"
        is_tensor = isinstance(value, Tensor)
        if value.is_complex() if is_tensor else not isinstance(value, Real):
            raise TypeError(f"{source} is {value!r}; it must be a real scalar tensor or a number")
        if is_tensor and value.numel() != 1:
            raise ValueError(f"{source} has shape {tuple(value.shape)}; it must be a scalar")
        trained = (p for g in self.param_groups for p in g["params"] if p.grad is not None)
        where = next((p.device for p in trained if not p.is_meta), self._gamma.device)
        if where != self._gamma.device:  # what all parameters share follows them
            for own in ("_gamma", "_plane", "_skipped"):
                setattr(self, own, getattr(self, own).to(where))
        if is_tensor:
            ell = sharding.whole(value.detach()).reshape(()).to(self._gamma)
        else:  # this waits for no device; and torch refuses to round what no float32 can hold
            value = value if not abs(value) > 3e38 else math.inf if value > 0 else -math.inf
            ell = torch.full_like(self._gamma, value)
        self._ell = sharding.mean(self, ell, self.process_group)
        return loss, self._ell

    def _read(self, x: Tensor) -> Any:
        """The number, where Python may look at it for free; elsewhere the tensor."""
        return x if x.device.type != "cpu" or torch.compiler.is_compiling() else x.item()

    def _cleared(self, batch: Sequence[Tensor], skip: Tensor) -> Any:
        """Tensors of one shape, zeros where ``skip`` is true; at once, or one by one to fuse."""
        if torch.compiler.is_compiling():
            return [x.masked_fill(skip, 0) for x in batch]
        return stack([*batch]).masked_fill(skip.to(batch[0].device), 0)

    def _start_group(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            sharding.adapt(self, p)
            if p.requires_grad:
                dtype = torch.promote_types(self._gamma.dtype, p.dtype)
                self._gamma, self._plane = self._gamma.to(dtype), self._plane.to(dtype)
                if p.numel() and not p.is_meta:  # what is not, has its state when it has a gradient
                    self._start(p, group)
        self._seen.append(validate.settings(group))

    def _write(self, p: Tensor, group: dict[str, Any]) -> None:
        """:math:`Q(u)` into a quantized parameter."""
        if (quantizer := quantizer_of(group)) is not None:
            self._quantize(group, quantizer, [p])
            self._written[p] = p._version

    # Of the subclass.
    _start: Callable[[Tensor, dict[str, Any]], None]
    _quantize: Callable[[dict[str, Any], Quantizer, list[Tensor]], None]
