r"""How a tensor is kept in a packed file: as it is, as signs, ternary digits or whole numbers.

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
uniform2  values are :math:`m\,(k/q)`, whole          one a slice           :math:`m\,((d - q)/q)`
to        :math:`|k| \le q`, :math:`m` the largest
uniform8  :math:`|w|` of each slice of the first
          dimension; :math:`q = 2^{b-1} - 1` for
          "uniform" :math:`b`
========  ==========================================  ====================  =======================

A payload is the scales, in the dtype of the tensor, and then the digits
(:mod:`~dfw_opt.packing.digits`) in row-major order; those of "uniform" :math:`b` have :math:`b`
bits. Tensors are read and written in blocks, so that the memory beyond the tensor itself stays
small.

The values of "uniform" :math:`b` are computed anew when they are read, :math:`k/q` first and then
the product, both rounded to the dtype, as :mod:`dfw_opt.quantizers.uniform` computes them. So only
float32 and float64 have it: a narrower weight has been rounded once more. And :math:`m` is 0, or
large enough that no level is a subnormal number, which some machines take for 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Protocol

import torch
from torch import Tensor

from dfw_opt.packing import digits
from dfw_opt.quantizers import uniform

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
    """What binary and ternary share: a few scales, then one digit a weight.

    All is done on the patterns of the numbers: arithmetic could change them where torch has been
    told to flush subnormal numbers to zero.
    """

    base: int

    @abstractmethod
    def count_scales(self, shape: tuple[int, ...]) -> int: ...

    @abstractmethod
    def scales(self, patterns: Tensor) -> Tensor: ...

    @abstractmethod
    def holds(self, patterns: Tensor, scales: Tensor) -> bool:
        """Whether every value is one that ``scales`` and a digit give."""

    @abstractmethod
    def digits(self, patterns: Tensor) -> Tensor: ...

    @abstractmethod
    def levels(self, scales: Tensor) -> Tensor:
        """The pattern that stands for each digit."""

    def fits(self, tensor: Tensor) -> bool:
        patterns = _patterns(tensor)
        scales = self.scales(patterns)
        return _no_nan(scales, tensor.dtype) and self.holds(patterns, scales)

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        return len(shape) >= 2 and math.prod(shape) > 0 and dtype in _PACKABLE

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        scales = self.count_scales(shape) * dtype.itemsize
        return scales + digits.packed_size(math.prod(shape), self.base)

    def write(self, tensor: Tensor) -> Iterator[Tensor]:
        patterns = _patterns(tensor)
        yield _bytes(self.scales(patterns).contiguous())
        for block in torch.split(patterns.view(-1), _BLOCK):
            yield digits.pack(self.digits(block), self.base)

    def check(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        first = self.count_scales(shape) * dtype.itemsize
        return digits.check(payload[first:], self.base, math.prod(shape))

    def read(self, payload: Tensor, out: Tensor) -> None:
        scales, packed = self.parts(payload, out)
        levels = self.levels(scales)
        step = _BLOCK // digits.per_byte(self.base)
        blocks = torch.split(_patterns(out).view(-1), _BLOCK)
        for block, its in zip(blocks, torch.split(packed, step), strict=True):
            block.copy_(digits.unpack(its, levels, len(block)))

    def parts(self, payload: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The scales, and the bytes of the digits, of a tensor ``like`` this one."""
        scales = _patterns(like).new_empty(self.count_scales(tuple(like.shape)))
        stored = _bytes(scales)
        stored.copy_(payload[: len(stored)])
        return scales, payload[len(stored) :]


class _Binary(_Digits):
    base = 2
    bits: float | None = 1.0

    def count_scales(self, shape: tuple[int, ...]) -> int:
        return shape[0]

    def scales(self, patterns: Tensor) -> Tensor:
        return patterns.flatten(1)[:, 0] & torch.iinfo(patterns.dtype).max

    def holds(self, patterns: Tensor, scales: Tensor) -> bool:
        rows = patterns.flatten(1)
        step = max(1, _BLOCK // rows.shape[1])
        magnitude = torch.iinfo(patterns.dtype).max
        blocks = zip(torch.split(rows, step), torch.split(scales, step), strict=True)
        return all(bool(((block & magnitude) == its[:, None]).all()) for block, its in blocks)

    def digits(self, patterns: Tensor) -> Tensor:
        # The sign bit tells -0.0 from 0.0 in a channel whose scale is 0.
        return (patterns < 0).view(torch.uint8)

    def levels(self, scales: Tensor) -> Tensor:
        return scales.new_tensor([0, _sign_bit(scales)])

    def read(self, payload: Tensor, out: Tensor) -> None:
        super().read(payload, out)
        scales, _ = self.parts(payload, out)
        _patterns(out).flatten(1).bitwise_xor_(scales[:, None])


class _Ternary(_Digits):
    base = 3
    bits: float | None = 8 / 5

    def count_scales(self, shape: tuple[int, ...]) -> int:
        return 2

    def scales(self, patterns: Tensor) -> Tensor:
        least, most = patterns.aminmax()
        p = most.clamp(min=0)
        return torch.stack([p, torch.where(least < 0, least ^ _sign_bit(least), 0)])

    def holds(self, patterns: Tensor, scales: Tensor) -> bool:
        # Where nothing is negative -n has the pattern of -0.0, which is not one of the values.
        zero, p, minus_n = self.levels(scales)
        values = (zero, p, minus_n) if scales[1] else (zero, p)
        blocks = torch.split(patterns.view(-1), _BLOCK)
        return all(bool(reduce(or_, (block == v for v in values)).all()) for block in blocks)

    def digits(self, patterns: Tensor) -> Tensor:
        return (patterns > 0).view(torch.uint8) + 2 * (patterns < 0).view(torch.uint8)

    def levels(self, scales: Tensor) -> Tensor:
        p, n = scales
        return torch.stack([torch.zeros_like(p), p, n ^ _sign_bit(n)])


class _Uniform:
    def __init__(self, bits: int) -> None:
        self.bits: float | None = float(bits)
        self.width, self.q = bits, uniform.levels_beyond_zero(bits)

    def takes(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        wide = dtype in (torch.float32, torch.float64)
        return len(shape) >= 2 and math.prod(shape) > 0 and wide

    def size(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return shape[0] * dtype.itemsize + digits.packed_bits_size(math.prod(shape), self.width)

    def fits(self, tensor: Tensor) -> bool:
        rows = tensor.flatten(1)
        # A look at the first row is enough for nearly all tensors that do not fit.
        return self.holds(rows[:1]) and self.holds(rows)

    def holds(self, rows: Tensor) -> bool:
        """Whether every value is a level of its row."""
        largest = _largest(rows)
        blocks = self.blocks(rows, largest)
        return self.allowed(largest) and all(
            torch.equal(_patterns(self.again(block, its)), _patterns(block))
            for block, its in blocks
        )

    def allowed(self, largest: Tensor) -> bool:
        """Whether all levels of all slices are 0, or normal numbers."""
        least = torch.finfo(largest.dtype).tiny * (self.q + 1)
        zero = _patterns(largest) == 0
        return bool((zero | ((largest >= least) & largest.isfinite())).all())

    def write(self, tensor: Tensor) -> Iterator[Tensor]:
        largest = _largest(tensor.flatten(1))
        yield _bytes(largest)
        for block, its in self.blocks(tensor, largest):
            k = uniform.nearest(block, its, self.width)
            yield digits.pack_bits((k + self.q).to(torch.uint8), self.width)

    def check(self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
        largest, packed = self.parts(payload, shape, dtype)
        if not self.allowed(largest):
            return "a scale of it is neither 0 nor a normal number that all levels can have"
        count = math.prod(shape)
        if (used := count * self.width % 8) and int(packed[-1]) >> used:
            return "its last byte has bits beyond the last weight"
        # Bytes to a block of numbers, as they were written.
        for block in torch.split(packed, _BLOCK // 8 * self.width):
            numbers = digits.unpack_bits(block, self.width, min(count, _BLOCK))
            count -= len(numbers)
            if int(numbers.max()) > 2 * self.q:
                return f"a number of it is {int(numbers.max())}, beyond the last level"
        return None

    def read(self, payload: Tensor, out: Tensor) -> None:
        largest, packed = self.parts(payload, tuple(out.shape), out.dtype)
        numbered = torch.split(packed, _BLOCK // 8 * self.width)
        for (block, its), part in zip(self.blocks(out, largest), numbered, strict=True):
            numbers = digits.unpack_bits(part, self.width, len(block))
            block.copy_(uniform.level((numbers - self.q).to(out.dtype), its, self.width))

    def parts(
        self, payload: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The scales, and the bytes of the numbers."""
        largest = torch.empty(shape[0], dtype=dtype, device="cpu")
        stored = _bytes(largest)
        stored.copy_(payload[: len(stored)])
        return largest, payload[len(stored) :]

    def blocks(self, tensor: Tensor, largest: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of ``tensor``, 1-D, and for each of their elements the largest of its slice."""
        flat = tensor.view(-1)
        columns = len(flat) // len(largest)
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK]
            elements = torch.arange(start, start + len(block), device=largest.device)
            yield block, largest[elements // columns]

    def again(self, block: Tensor, largest: Tensor) -> Tensor:
        """``block`` as it would be read."""
        return uniform.level(uniform.nearest(block, largest, self.width), largest, self.width)


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, without a copy of them all; NaN where there is one."""
    return torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).abs()


def _patterns(tensor: Tensor) -> Tensor:
    """The bits of floating-point numbers as integers, which nothing rounds or flushes to zero.

    Those of negative numbers are negative, and those of positive numbers are ordered as they are.
    """
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _sign_bit(patterns: Tensor) -> int:
    return torch.iinfo(patterns.dtype).min


def _no_nan(scales: Tensor, dtype: torch.dtype) -> bool:
    infinity = _patterns(torch.full((1,), torch.inf, dtype=dtype, device="cpu"))
    return bool((scales <= infinity).all())


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, 1-D and uint8."""
    return tensor.view(-1).view(torch.uint8)


ENCODINGS: dict[str, Encoding] = {
    "raw": _Raw(),
    "binary": _Binary(),
    "ternary": _Ternary(),
    **{f"uniform{bits}": _Uniform(bits) for bits in range(2, 9)},
}
"""Every encoding by the name that it has in a file."""
