"""What every quantizer provides, and the normalised latent that they share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dfw_opt.sharding import largest

__all__ = ["Group", "Option", "Pulled", "Quantizer", "State", "normalised_latent"]

State = dict[str, Tensor]
"""What the optimizer keeps for one parameter, by name."""

Group = Mapping[str, Any]
"""The hyper-parameters of a parameter group."""


class Pulled(NamedTuple):
    r"""The gradient of one trained variable, in the metric of the weights that it moves."""

    gradient: Tensor
    r""":math:`d = M^{-1}\delta`, the shape of the variable."""
    metric: Tensor | None
    """:math:`M`, 0-dim: the squared change of the weights per unit step of one variable; one number
    for a whole tensor of them. ``None`` is 1."""


class Option(NamedTuple):
    """A group key of a quantizer's own, and what its value may be.

    The optimizer that has it gives its default, as a keyword argument of the same name.
    """

    name: str
    test: Callable[[float], bool]
    """Whether a finite number is allowed; only plain numbers are."""
    meaning: str
    """What the number must be, as the error words it, such as "at least 0"."""
    optimizer: str
    """The class that has the option, for the error where another is given it."""


class Quantizer(Protocol):
    """Latent to weight, and gradient at the weight to gradients of what is trained.

    ``variables`` maps the state keys that are trained to their bounds; ``None`` stands for the box
    of the group's ``radius``. Only variables under ``radius`` are subject to weight decay.
    ``derived`` are the state keys that follow from them; with the variables' they tell the state of
    one quantizer from that of another.
    ``options`` are the group keys that only this quantizer reads; optimizers check them.
    """

    @property
    def variables(self) -> Mapping[str, tuple[float, float] | None]: ...

    @property
    def derived(self) -> tuple[str, ...]: ...

    @property
    def options(self) -> tuple[Option, ...]: ...

    def start(self, weight: Tensor, group: Group) -> State:
        """The whole state for a parameter that holds ``weight``, in float32 or wider.

        It has a ``"latent"`` and its ``"unit"``, whose product are the float weights.
        """
        ...

    def derive(self, state: State, group: Group) -> State:
        """The part of the state that follows from the variables; called whenever they moved.

        It is kept so that quantizing and pulling back see the same numbers, to the last bit.
        """
        ...

    def quantize(self, state: State, group: Group) -> Tensor:
        """The weights that the network sees, in the dtype of the state."""
        ...

    def pull_back(self, grad: Tensor, state: State, group: Group) -> dict[str, Pulled]:
        """The gradient of every variable, from that at the quantized weights."""
        ...


def normalised_latent(weight: Tensor, radius: float | None) -> tuple[Tensor, Tensor]:
    r"""``weight`` as :math:`c\,u` with :math:`c = \max|w|`, so that :math:`u \in [-1, 1]`.

    A tensor of zeros, or next to it, has no scale of its own: :math:`c = 1` where
    :math:`\max|w| < 10^{-12}`, since the metric's :math:`c^2` would soon underflow in float32. A
    ``radius`` below 1 clips :math:`u`.

    Returns:
        :math:`u`, the shape of ``weight``, and :math:`c`, 0-dim, both in float32 or wider.
    """
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    unit = largest(weight)
    unit = torch.where(unit < 1e-12, torch.ones_like(unit), unit)
    latent = weight / unit
    return (latent if radius is None else latent.clamp_(-radius, radius)), unit
