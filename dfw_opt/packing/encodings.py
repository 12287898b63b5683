r"""How a tensor is kept in a packed file: as it is, or as signs, or as ternary digits.

An encoding is chosen by the values that a tensor holds, never by what an optimizer says of it, and
gives back every bit of them.

========  ==========================================  ====================  =======================
name      holds a tensor whose                        scales                a digit :math:`d` means
========  ==========================================  ====================  =======================
raw       values are anything                         none                  (none)
binary    :math:`|w|` is constant over each slice of  one a slice           :math:`(-1)^d` times the
          the first dimension (an output channel)                           scale
ternary   values are :math:`p`, :math:`0` and         :math:`p, n`          :math:`(0, p, -n)_d`
          :math:`-n`
========  ==========================================  ====================  =======================

A payload is the scales, in the dtype of the tensor, and then the digits
(:mod:`~dfw_opt.packing.digits`) in row-major order. Tensors are read and written in blocks, so that
the memory beyond the tensor itself stays small.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dfw_opt.packing import digits

__all__ = ["ENCODINGS", "Encoding", "best"]

_BLOCK = 40 << 15
"""Elements to a block: a multiple of 8 and of 5, so that blocks end where bytes end."""

_PACKABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Encoding(Protocol):
    """A lossless way to write tensors as bytes.

    Tensors are on the CPU and contiguous. ``bits`` is the size of a weight without the scales;
    ``None`` stands for that of its dtype.
    """

    bits: float | None

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether tensors of this shape and dtype can have this encoding at all."""
        ...

    def fits(self, tensor: Tensor) -> bool:
        """Whether it gives back every bit of ``tensor``, which it takes."""
        ...

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The bytes of the payload."""
        ...

    def write(self, tensor: Tensor) -> Iterator[Tensor]:
        """The payload, in parts that are 1-D and uint8."""
        ...

    def check(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        """What is wrong with a payload of the right size, if anything is."""
        ...

    def read(self, payload: Tensor, out: Tensor) -> None:
        """Fills ``out`` from a payload that has passed :meth:`check`."""
        ...


def best(tensor: Tensor) -> str:
    """The name of the encoding that keeps ``tensor`` in the fewest bytes."""
    kind = tuple(tensor.shape), tensor.dtype
    sizes = {name: code.size(*kind) for name, code in ENCODINGS.items() if code.takes(*kind)}
    in_order = sorted(sizes, key=lambda name: sizes[name])
    return next(name for name in in_order if ENCODINGS[name].fits(tensor))


class _Raw:
    bits: float | None = None

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return True

    def fits(self, tensor: Tensor) -> bool:
        return True

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize

    def write(self, tensor: Tensor) -> Iterator[Tensor]:
        yield from torch.split(_bytes(tensor), _BLOCK)

    def check(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        if dtype == torch.bool and len(payload) and int(payload.max()) > 1:
            return f"a byte of it is {int(payload.max())}, which is no bool"
        return None

    def read(self, payload: Tensor, out: Tensor) -> None:
        _bytes(out).copy_(payload)


class _Digits(ABC):
    """What binary and ternary share: a few scales, then one digit a weight."""

    base: int

    @abstractmethod
    def count_scales(self, shape: tuple[int, ...]) -> int: ...

    @abstractmethod
    def scales(self, tensor: Tensor) -> Tensor: ...

    @abstractmethod
    def digits(self, block: Tensor) -> Tensor: ...

    @abstractmethod
    def levels(self, scales: Tensor) -> Tensor: ...

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return len(shape) >= 2 and math.prod(shape) > 0 and dtype in _PACKABLE

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        scales = self.count_scales(shape) * dtype.itemsize
        return scales + digits.packed_size(math.prod(shape), self.base)

    def write(self, tensor: Tensor) -> Iterator[Tensor]:
        yield _bytes(self.scales(tensor).contiguous())
        for block in torch.split(tensor.view(-1), _BLOCK):
            yield digits.pack(self.digits(block), self.base)

    def check(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        first = self.count_scales(shape) * dtype.itemsize
        return digits.check(payload[first:], self.base, math.prod(shape))

    def read(self, payload: Tensor, out: Tensor) -> None:
        scales, packed = self.parts(payload, out)
        levels = self.levels(scales)
        step = _BLOCK // digits.per_byte(self.base)
        for block, its in zip(
            torch.split(out.view(-1), _BLOCK), torch.split(packed, step), strict=True
        ):
            block.copy_(digits.unpack(its, levels, len(block)))

    def parts(self, payload: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The scales, and the bytes of the digits, of a tensor ``like`` this one."""
        scales = like.new_empty(self.count_scales(tuple(like.shape)))
        stored = _bytes(scales)
        stored.copy_(payload[: len(stored)])
        return scales, payload[len(stored) :]


class _Binary(_Digits):
    base = 2
    bits: float | None = 1.0

    def count_scales(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def scales(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(1)[:, 0].abs()

    def fits(self, tensor: Tensor) -> bool:
        rows = tensor.flatten(1)
        step = max(1, _BLOCK // rows.shape[1])
        blocks = zip(torch.split(rows, step), torch.split(self.scales(tensor), step), strict=True)
        return all(bool((block.abs() == scale[:, None]).all()) for block, scale in blocks)

    def digits(self, block: Tensor) -> Tensor:
        # The sign bit, not w < 0: it tells -0.0 from 0.0 in a channel whose scale is 0.
        return block.signbit().view(torch.uint8)

    def levels(self, scales: Tensor) -> Tensor:
        return scales.new_tensor([1.0, -1.0])

    def read(self, payload: Tensor, out: Tensor) -> None:
        super().read(payload, out)
        scales, _ = self.parts(payload, out)
        out.flatten(1).mul_(scales[:, None])


class _Ternary(_Digits):
    base = 3
    bits: float | None = 8 / 5

    def count_scales(self, shape: tuple[int, ...]) -> int:
        return 2

    def scales(self, tensor: Tensor) -> Tensor:
        least, most = tensor.aminmax()
        return torch.stack([most, -least]).clamp_(min=0) + 0.0  # -0.0 becomes 0.0

    def fits(self, tensor: Tensor) -> bool:
        p, n = self.scales(tensor)

        def three_values(block: Tensor) -> bool:
            zero = (block == 0) & ~block.signbit()
            levels = (block == p) | (block == -n)
            return bool((zero | (levels & (block != 0))).all())

        return all(three_values(block) for block in torch.split(tensor.view(-1), _BLOCK))

    def digits(self, block: Tensor) -> Tensor:
        return (block > 0).view(torch.uint8) + 2 * (block < 0).view(torch.uint8)

    def levels(self, scales: Tensor) -> Tensor:
        p, n = scales
        return torch.stack([torch.zeros_like(p), p, -n])


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, 1-D and uint8."""
    return tensor.view(-1).view(torch.uint8)


ENCODINGS: dict[str, Encoding] = {"raw": _Raw(), "binary": _Binary(), "ternary": _Ternary()}
"""Every encoding by the name that it has in a file."""
