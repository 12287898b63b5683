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
from dfw_opt.sharding import Groups
from dfw_opt.update import UNBOUNDED, Bounds

__all__ = ["LEAST_ELEMENTS", "FusedVariables", "fits"]

LEAST_ELEMENTS = 1 << 16
"""Models with fewer elements take their steps without waiting for a compiler."""

KINDS = {None: 0, "binary": 1, "ternary": 2}
"""The enumeration of step.c by quantizer."""

_SCALES = ("scale_pos", "scale_neg")
_REQUIRED: dict[str | None, set[str]] = {
    None: set(),
    "binary": {"latent", "unit", "scale"},
    "ternary": {"latent", "unit", "delta", *_SCALES},
}
_POINTERS = (
    *("unit", "scale", "delta", *_SCALES, "momentum_buffer"),
    *("scale_pos_momentum_buffer", "scale_neg_momentum_buffer"),
)
"""State that the kernels read or write, in the order of Tensor in step.c."""
_TENSOR = struct.Struct(f"2q 3P {len(_POINTERS)}P 5d")
_FLOAT = struct.Struct("2q 3P 40x P 56x")  # the same, without what a float parameter has not
_OFFSETS = {key: 40 + 8 * index for index, key in enumerate(_POINTERS)}
_POINTER = struct.Struct("P")
_NO_SUMS = (0.0,) * 5


def fits(p: Tensor, state: Mapping[str, Tensor], quantizer: str | None) -> bool:
    """Whether the kernels can do ``p``: all its tensors are float32, dense, and laid out alike."""
    g, float32 = p.grad, torch.float32
    # A gradient of a class of its own may have no memory to point to, a lazy one has other numbers.
    if type(g) is not Tensor or g.is_neg() or g._is_zerotensor() or not (g.is_cpu and p.is_cpu):
        return False
    shape, stride = p.shape, p.stride()
    if not (g.dtype == p.dtype == float32 and g.shape == shape and g.stride() == stride):
        return False
    if not (_dense(p) and p.numel() and _REQUIRED[quantizer] <= state.keys()):
        return False
    for name, tensor in state.items():
        if tensor.dtype != float32 or not tensor.is_cpu:
            return False
        if name in ("latent", "momentum_buffer"):
            if tensor.shape != shape or tensor.stride() != stride:
                return False
        elif not tensor.is_contiguous() or tensor.numel() != (shape[0] if name == "scale" else 1):
            return False
    return True


class FusedVariables:
    """Parameters of one group, with one quantizer, and all that is trained for them."""

    groups: Groups = ()

    def __init__(
        self,
        kernels: ctypes.CDLL,
        group: Mapping[str, Any],
        bounds: Bounds,
        keeps: bool,
        params: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        self.kernels, self.bounds, self.keeps = kernels, bounds, keeps
        self.params, self.states = params, states
        self.quantizer = group.get("quantizer")
        # Scales have bounds of their own.
        bounded = bounds != UNBOUNDED or self.quantizer == "ternary"
        self.searched = group.get("step_size") == "exact" and bounded
        self.gradients = [p.grad for p in params]  # alive as long as there is a pointer to them
        self.values = [s["latent"] for s in states] if self.quantizer else params
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
        rows = [p.shape[0] if self.quantizer == "binary" else 1 for p in params]
        self.tensors = bytearray(b"".join(map(self._described, params, states, rows)))
        self.address = (ctypes.c_char * len(self.tensors)).from_buffer(self.tensors)
        self.pieces = kernels.dfw_pieces(self.kind, self.address, len(params))
        self.out = (ctypes.c_double * (native.OUTPUTS * self.pieces))()
        self.largest = 0.0

    def sums(self) -> tuple[Tensor, Tensor]:
        """As :meth:`dfw_opt.update.Variables.sums`."""
        self._run("sums")
        of_scales = self._call("scales_sums", self.out) if self.quantizer == "ternary" else 0.0
        squares, products = self._total(0) + of_scales, self._total(1)
        self.largest = max(self.out[2 :: native.OUTPUTS])
        lr = self.settings.lr
        return _float64(lr * self.settings.weight_decay * products), _float64(lr * squares)

    def inside(self) -> bool:
        """As :meth:`dfw_opt.update.Variables.inside`; after :meth:`sums`."""
        return (
            self.settings.lr * self.settings.weight_decay <= 1
            and self.largest <= ctypes.c_float(self.bounds[1]).value
            and all(s[key] >= ternary.SCALE_MIN for s in self.states for key in _SCALES if key in s)
        )

    def slope(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`dfw_opt.update.Variables.slope`."""
        self.settings.gamma = float(gamma)
        self._run("slope")
        slope, squares = self._total(0), self._total(1)
        if self.quantizer == "ternary":
            self._call("scales_slope", ctypes.byref(self.settings), self.out)
            slope, squares = slope + self.out[0], squares + self.out[1]
        return _float64(slope), _float64(-self.settings.lr * squares)

    def move(self, gamma: Tensor) -> None:
        """As :meth:`dfw_opt.update.Variables.move`, and writes the quantized weights."""
        self.settings.gamma = float(gamma)
        if self.keeps:
            self._start_momentum()
        self._run("move")
        if self.quantizer == "ternary":
            self._call("scales_move", ctypes.byref(self.settings))
            self._call("thresholds", ctypes.byref(self.settings), self.out)
            self._run("write_ternary")
        increment_version(self.params)

    def _described(self, p: Tensor, state: Mapping[str, Tensor], rows: int) -> bytes:
        assert p.grad is not None
        if self.quantizer is None:
            value, momentum = p.data_ptr(), state.get("momentum_buffer")
            z = 0 if momentum is None else momentum.data_ptr()
            return _FLOAT.pack(1, p.numel(), p.grad.data_ptr(), value, value, z)
        latent = state["latent"]
        pointers = [state[key].data_ptr() if key in state else 0 for key in _POINTERS]
        return _TENSOR.pack(
            *(rows, p.numel() // rows, p.grad.data_ptr(), latent.data_ptr(), p.data_ptr()),
            *pointers,
            *_NO_SUMS,
        )

    def _start_momentum(self) -> None:
        variables = ("latent", *_SCALES) if self.quantizer == "ternary" else ("latent",)
        for index, (p, state) in enumerate(zip(self.params, self.states, strict=True)):
            for variable in variables:
                key = momentum_key(variable)
                if key not in state:
                    state[key] = torch.zeros_like(state.get(variable, p))
                    place = index * _TENSOR.size + _OFFSETS[key]
                    _POINTER.pack_into(self.tensors, place, state[key].data_ptr())

    def _call(self, name: str, *arguments: Any) -> Any:
        return getattr(self.kernels, f"dfw_{name}")(self.address, len(self.params), *arguments)

    def _run(self, name: str) -> None:
        """Calls a kernel for all pieces."""
        kernel = getattr(self.kernels, f"dfw_{name}")
        settings = ctypes.byref(self.settings)

        def some(first: int, last: int) -> None:
            kernel(self.kind, self.address, len(self.params), settings, first, last, self.out)

        native.parallel(some, self.pieces, self.elements)

    def _total(self, output: int) -> float:
        return math.fsum(self.out[output :: native.OUTPUTS])


def _dense(p: Tensor) -> bool:
    """Whether the elements of ``p``, and those of each of its channels, lie side by side."""
    return p.is_contiguous() or (
        (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
        or (p.dim() == 5 and p.is_contiguous(memory_format=torch.channels_last_3d))
    )


def _float64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")
