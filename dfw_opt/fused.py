"""Steps by compiled kernels: one pass over memory where torch's operations need many.

The counterpart of :class:`~dfw_opt.update.Variables` for float32 tensors on the CPU. It has the
same methods, but keeps no gradients of its own: the kernels (``native/step.c``) pull the gradient
back anew in each pass, so that a step needs next to no memory of its own.
"""

import ctypes
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from dfw_opt import native
from dfw_opt.checkpoint import momentum_key
from dfw_opt.quantizers import ternary
from dfw_opt.update import UNBOUNDED, Bounds

__all__ = ["LEAST_ELEMENTS", "FusedVariables", "fits"]

LEAST_ELEMENTS = 1 << 16
"""Models with fewer elements take their steps without waiting for a compiler."""

KINDS = {None: 0, "binary": 1, "ternary": 2}
"""The enumeration of step.c by quantizer."""

_SCALES = ("scale_pos", "scale_neg")
_OWN = ("unit", "scale", "delta", *_SCALES)
"""State that the kernels read, or write, in the order of step.c."""
# As Tensor in step.c, and where some of its fields are.
_TENSOR = struct.Struct("2q 11P 4d")
_MOMENTUM, _SCALE_MOMENTUM = 32, 88
_POINTER = struct.Struct("P")


def fits(p: Tensor, state: Mapping[str, Tensor]) -> bool:
    """Whether the kernels can do ``p``: all its tensors are float32, dense, and laid out alike."""
    g = p.grad
    assert g is not None
    like = [g, *(x for name, x in state.items() if name in ("latent", "momentum_buffer"))]
    return (
        p.device.type == "cpu"
        and type(g) is Tensor
        and p.numel() > 0
        and _dense(p)
        and all(
            x.dtype == torch.float32 and x.device == p.device and x.stride() == p.stride()
            for x in (p, *like)
        )
    )


class FusedVariables:
    """Parameters of one group, with one quantizer, and all that is trained for them."""

    def __init__(
        self,
        kernels: ctypes.CDLL,
        group: Mapping[str, Any],
        bounds: Bounds,
        keeps: bool,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        self.kernels, self.bounds = kernels, bounds
        self.params, self.states = params, states
        self.quantizer = group.get("quantizer")
        self.momentum = group["momentum"] if keeps else None
        self.searched = group.get("step_size") == "exact" and bounds != UNBOUNDED
        self.latents = [s["latent"] for s in states] if self.quantizer else params
        self.owners = [(p, momentum_key("")) for p in params]
        self.values = list(self.latents)
        for key in _SCALES if self.quantizer == "ternary" else ():
            self.owners += [(p, momentum_key(key)) for p in params]
            self.values += [s[key] for s in states]
        self.buffers: list[Tensor] = []
        self.settings = native.Settings(
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lower=bounds[0],
            upper=bounds[1],
            threshold=group.get("threshold", 0.0),
            scale_min=ternary.SCALE_MIN,
        )
        self.kind = KINDS[self.quantizer]
        self.elements = sum(p.numel() for p in params)
        self.tensors = bytearray(b"".join(map(self._described, params, states)))
        self.address = (ctypes.c_char * len(self.tensors)).from_buffer(self.tensors)
        self.units = kernels.unit_count(self.kind, self.address, len(params))
        self.out = (ctypes.c_double * (native.OUTPUTS * self.units))()
        self.largest = 0.0

    def sums(self) -> tuple[Tensor, Tensor]:
        """As :func:`dfw_opt.update.sums`."""
        self._run("sums")
        squares, products = self._total(0), self._total(1)
        if self.quantizer == "ternary":
            squares += self._call("scales_sums", self.out)
        self.largest = max(self.out[2 :: native.OUTPUTS])
        lr = self.settings.lr
        return _scalar(lr * self.settings.weight_decay * products), _scalar(lr * squares)

    def inside(self) -> bool:
        """As :meth:`dfw_opt.update.Variables.inside`; after :meth:`sums`."""
        return (
            self.settings.lr * self.settings.weight_decay <= 1
            and self.largest <= self.bounds[1]
            and all(v >= ternary.SCALE_MIN for v in self.values[len(self.params) :])
        )

    def slope(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """As :func:`dfw_opt.update.slope_in_box`."""
        self.settings.gamma = float(gamma)
        self._run("slope")
        slope, squares = self._total(0), self._total(1)
        if self.quantizer == "ternary":
            self._call("scales_slope", ctypes.byref(self.settings), self.out)
            slope, squares = slope + self.out[0], squares + self.out[1]
        return _scalar(slope), _scalar(-self.settings.lr * squares)

    def move(self, gamma: Tensor) -> None:
        """As :func:`dfw_opt.update.move`, and writes the quantized weights."""
        self.settings.gamma = float(gamma)
        self._point_to_momentum()
        self._run("move")
        if self.quantizer == "ternary":
            self._call("scales_move", ctypes.byref(self.settings))
            self._call("thresholds", ctypes.byref(self.settings), self.out)
            self._run("write_ternary")
        for changed in (*self.params, *self.values, *self.buffers):
            increment_version(changed)

    def _described(self, p: Tensor, state: Mapping[str, Tensor]) -> bytes:
        assert p.grad is not None
        g, v = p.grad.data_ptr(), (state["latent"] if self.quantizer else p).data_ptr()
        rows = p.shape[0] if self.quantizer == "binary" else 1
        own = [state[key].data_ptr() if key in state else 0 for key in _OWN]
        weight = p.data_ptr() if self.quantizer else 0
        return _TENSOR.pack(rows, p.numel() // rows, g, v, 0, weight, *own, 0, 0, *[0.0] * 4)

    def _point_to_momentum(self) -> None:
        count = len(self.params)
        for number, buffer in enumerate(self.buffers):
            place, index = divmod(number, count)
            field = _MOMENTUM if place == 0 else _SCALE_MOMENTUM + (place - 1) * _POINTER.size
            self._point(index, field, buffer)

    def _point(self, index: int, field: int, tensor: Tensor) -> None:
        _POINTER.pack_into(self.tensors, index * _TENSOR.size + field, tensor.data_ptr())

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.kernels, f"dfw_{name}")(self.address, len(self.params), *arguments)

    def _run(self, name: str) -> None:
        """Calls a kernel for all units."""
        kernel = getattr(self.kernels, f"dfw_{name}")
        settings = ctypes.byref(self.settings)

        def some(first: int, last: int) -> None:
            kernel(self.kind, self.address, len(self.params), settings, first, last, self.out)

        native.parallel(some, self.units, self.elements)

    def _total(self, output: int) -> float:
        return math.fsum(self.out[output :: native.OUTPUTS])


def _dense(p: Tensor) -> bool:
    """Whether the elements of ``p``, and those of each of its channels, lie side by side."""
    return p.is_contiguous() or (
        (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
        or (p.dim() == 5 and p.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
