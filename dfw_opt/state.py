r"""What an optimizer keeps for its parameters, and how that and the parameters stay in step.

The life of a state: it begins when the optimizer is made (for a frozen parameter, with its first
gradient), follows the model to another device, goes into a checkpoint and comes back from one in
the dtype that it had. Whenever a latent or its relaxation changes,
:meth:`LatentOptimizer._publish` sets the parameter to what follows. Nothing else writes to a
quantized parameter; if somebody did, the next step says so, unless it was through ``.data``, which
torch does not count as a change.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from dfw_opt import relaxation
from dfw_opt.checkpoint import check_checkpoint, momentum_key
from dfw_opt.quantizers import QUANTIZERS, Group, State
from dfw_opt.sharding import is_sharded, local, placed_like, replicated, settled
from dfw_opt.update import UNBOUNDED, Bounds, Variables, wide
from dfw_opt.validate import check_relaxation

__all__ = ["LatentOptimizer", "box"]

_CHANGED = (
    "quantizer={}: the quantizer of a group cannot change once it has been chosen; make a new "
    "optimizer"
)


class LatentOptimizer(Optimizer):
    """An optimizer whose state holds latents, and whose parameters hold them quantized."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        # At which version of its tensor a quantized parameter was last written.
        self._written: dict[Tensor, int] = {}
        # The quantizer of each parameter, which decides what its state holds.
        self._chosen: dict[Tensor, str | None] = {}
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint, see :meth:`torch.optim.Optimizer.load_state_dict`.

        Latents and scales keep their dtype, whatever that of the parameters, and the parameters are
        set to the quantized latents, as relaxed as they were. Tensors are copied, not shared with
        ``state_dict``.

        Raises:
            ValueError: the checkpoint is of another optimizer or of parameters of other shapes;
                nothing is changed.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> None:
            check_checkpoint(incoming, self.param_groups, self.defaults)
            loaded.update(incoming)

        def restore(_: Optimizer) -> None:
            self._restore(loaded)

        # As hooks, the check sees what the user's own hooks made of the checkpoint, and their later
        # hooks see the restored state.
        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def relax(self, relaxation: float) -> None:
        r"""Sets the relaxation of all quantized groups, and their parameters to what it makes them.

        Latents and momentum stay. To be called between steps. The value is kept in the groups
        under the argument's name, in place of any that a group had of its own, and is that of
        groups that are added later.

        Args:
            relaxation: :math:`\theta`, from 1 for the float weights :math:`c\,u` to 0 for the
                quantized ones :math:`Q(u)`; :mod:`dfw_opt.relaxation` has the formulas.

        Raises:
            ValueError: it is not in [0, 1], or no group is quantized.
        """
        check_relaxation(relaxation)
        groups = [group for group in self.param_groups if group.get("quantizer") is not None]
        if not groups:
            raise ValueError(
                f"relaxation={relaxation!r}: no group of this {type(self).__name__} is quantized, "
                "so there is nothing to relax"
            )
        pairs = [(p, group) for group in groups for p in group["params"]]
        started = [(p, group) for p, group in pairs if "latent" in self.state.get(p, ())]
        for p, group in started:  # before anything changes: a warning may be an error
            self._state_of(p)  # follows the model to another device
            self._warn_if_overwritten(p, group)
        for settings in (self.defaults, *groups):
            settings["relaxation"] = float(relaxation)
        for p, group in started:
            self._publish(p, group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_written", {})
        if "_chosen" not in self.__dict__:
            self._chosen = {}
            for group in self.param_groups:
                self._choose(group)

    def _choose(self, group: dict[str, Any]) -> None:
        """Remembers the quantizer of a group.

        Raises:
            ValueError: it was another one before.
        """
        if torch.compiler.is_compiling():
            return
        quantizer = group.get("quantizer")
        for p in group["params"]:
            if self._chosen.setdefault(p, quantizer) != quantizer:
                raise ValueError(_CHANGED.format(repr(quantizer)))

    def _start(self, group: dict[str, Any]) -> None:
        """Brings the parameters of a new group into its constraint set."""
        self._choose(group)
        for p in group["params"]:
            # A frozen parameter is left alone, until it is unfrozen and has a gradient.
            if p.requires_grad:
                self._start_parameter(p, group)

    @torch.no_grad()
    def _start_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        variables = [""]
        if group.get("quantizer") is not None:
            variables = list(QUANTIZERS[group["quantizer"]].variables)
            if "latent" not in self.state[p]:
                self.state[p].update(_started(p, group))
                self._publish(p, group)
        elif group.get("radius") is not None:
            p.clamp_(*box(group))
        # At once: distributed checkpoints load what is there, and miss parameters without a state.
        state = self.state[p]
        if group["momentum"] != 0:
            for variable in variables:
                state.setdefault(momentum_key(variable), torch.zeros_like(state.get(variable, p)))

    def _state_of(self, p: Tensor) -> State:
        """The state of ``p``, moved along if the model has been moved to another device."""
        state: State = self.state[p]
        # All of it is on one device.
        main = state.get("latent", state.get("momentum_buffer"))
        if main is not None and main.device != p.device:
            for key, value in state.items():
                state[key] = value.to(p.device)
        return state

    def _current_state(self, p: Tensor, group: dict[str, Any]) -> State:
        """The state of ``p``, whose quantizer has been started; empty if it has none yet."""
        state = self._state_of(p)
        if group.get("quantizer") is None:
            return state
        if "latent" not in state:
            # Frozen until now. Only a step that counts quantizes the parameter itself.
            state.update(_started(p, group))
        self._warn_if_overwritten(p, group)
        return state

    def _unstarted(self) -> list[Tensor]:
        """The parameters to be quantized that have a gradient, but no state yet."""
        return [
            p
            for group in self.param_groups
            if group.get("quantizer") is not None
            for p in group["params"]
            if p.grad is not None and not self.state.get(p)
        ]

    def _momentum_buffers(self, batch: Variables) -> list[Tensor]:
        if batch.momentum is None:
            return []
        buffers = []
        for p, variable in batch.owners:
            state, key = self._state_of(p), momentum_key(variable)
            if key not in state:
                state[key] = torch.zeros_like(state.get(variable, p))
            buffers.append(local(state[key]))
        return buffers

    def _publish(self, p: Tensor, group: dict[str, Any], counts: Tensor | None = None) -> None:
        """Sets ``p`` to its quantized latent; unless ``counts``, on its device, says not to."""
        weight = relaxation.quantize(self.state[p], group)
        if counts is None:
            p.copy_(weight)
        else:
            mine, weight = local(p), local(placed_like(weight, p))
            mine.copy_(torch.where(counts.to(mine.device), weight.to(mine.dtype), mine))
        self._note_written(p)

    def _note_written(self, p: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._written[p] = p._version

    def _warn_if_overwritten(self, p: Tensor, group: dict[str, Any]) -> None:
        """Values that others put into a quantized parameter are about to be lost: say so."""
        if torch.compiler.is_compiling():
            return
        version = self._written.get(p)
        if version is None or version == p._version:
            return
        self._written[p] = p._version
        if not torch.equal(p, relaxation.quantize(self.state[p], group).to(p)):
            warnings.warn(
                f"a quantized parameter of shape {tuple(p.shape)} was changed from outside since "
                "the last step. The change is lost: the optimizer's latents know nothing of it. "
                "Load weights before making the optimizer",
                stacklevel=2,
            )

    @torch.no_grad()
    def _restore(self, loaded: dict[str, Any]) -> None:
        """Undoes what torch does to a loaded state: casts to the parameter's dtype, and sharing."""
        for saved, group in zip(loaded["param_groups"], self.param_groups, strict=True):
            quantized = group.get("quantizer") is not None
            for index, p in zip(saved["params"], group["params"], strict=True):
                dtype = wide(p.dtype) if quantized else p.dtype
                for key, value in loaded["state"].get(index, {}).items():
                    value = value.detach().to(p.device, dtype, copy=True)
                    if is_sharded(p) and not is_sharded(value):
                        value = replicated(value, p.device_mesh)
                    self.state[p][key] = value
                if "latent" in self.state.get(p, ()):
                    self._publish(p, group)


def _started(p: Tensor, group: dict[str, Any]) -> State:
    """The state with which a quantized parameter begins."""
    state = QUANTIZERS[group["quantizer"]].start(p, group)
    return {key: settled(value) for key, value in state.items()}


def box(group: Group) -> Bounds:
    """The bounds that ``radius`` sets."""
    radius = group.get("radius")
    return UNBOUNDED if radius is None else (-radius, radius)
