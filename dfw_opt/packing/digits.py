r"""Digits of a small base, as many to a byte as fit: 8 of base 2, 5 of base 3; and whole numbers of
a few bits, one after the other.

The first digit is the least significant: a byte is :math:`\sum_i d_i\, b^i`. Where the last byte
has room left, the digits there are 0. Numbers of :math:`b` bits go on in the next byte: bit
:math:`j` of the stream, counted from the least significant of the first byte, is bit :math:`j \bmod
b` of number :math:`\lfloor j/b \rfloor`. The rest of the last byte is 0.
"""

import torch
from torch import Tensor

__all__ = [
    "check",
    "pack",
    "pack_bits",
    "packed_bits_size",
    "packed_size",
    "per_byte",
    "unpack",
    "unpack_bits",
]


def per_byte(base: int) -> int:
    """How many digits of ``base`` a byte holds."""
    return max(count for count in range(1, 9) if base**count <= 256)


def packed_size(count: int, base: int) -> int:
    """The bytes that ``count`` digits take."""
    return -(-count // per_byte(base))


def pack(digits: Tensor, base: int) -> Tensor:
    """The bytes of ``digits``, both 1-D and uint8."""
    columns = per_byte(base)
    padding = -len(digits) % columns
    if padding:
        digits = torch.cat([digits, digits.new_zeros(padding)])
    packed = digits.new_zeros(len(digits) // columns)
    for column in reversed(digits.view(-1, columns).unbind(1)):
        packed = packed * base + column
    return packed


def unpack(packed: Tensor, levels: Tensor, count: int) -> Tensor:
    """``levels[d]`` for each of the first ``count`` digits ``d``, whose base is ``len(levels)``.

    Args:
        packed: bytes that have passed :func:`check`, 1-D, uint8.
        levels: the value of each digit, 1-D, any dtype.
        count: how many digits to read.
    """
    base = len(levels)
    powers = base ** torch.arange(per_byte(base), device=levels.device)
    bytes_ = torch.arange(base ** per_byte(base), device=levels.device)
    table = levels[bytes_[:, None] // powers % base]
    return table.index_select(0, packed.int()).view(-1)[:count]


def check(packed: Tensor, base: int, count: int) -> str | None:
    """What is wrong with the bytes of ``count`` digits, if anything is."""
    if int(packed.max()) >= base ** per_byte(base):
        return f"a byte of it is {int(packed.max())}, which is no {per_byte(base)} digits of {base}"
    used = count - (len(packed) - 1) * per_byte(base)
    if int(packed[-1]) >= base**used:
        return "its last byte has digits beyond the last weight"
    return None


def packed_bits_size(count: int, bits: int) -> int:
    """The bytes that ``count`` numbers of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    r"""The bytes of whole numbers below :math:`2^\text{bits}`, both 1-D and uint8."""
    # Eight numbers make a word of as many bytes as a number has bits.
    padded = torch.cat([numbers, numbers.new_zeros(-len(numbers) % 8)]).view(-1, 8).long()
    words = sum(column << (bits * i) for i, column in enumerate(padded.unbind(1)))
    assert isinstance(words, Tensor)
    packed = torch.stack([words >> (8 * i) & 255 for i in range(bits)], dim=1)
    return packed.view(-1)[: packed_bits_size(len(numbers), bits)].to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` numbers of ``bits`` bits, int64; the inverse of :func:`pack_bits`."""
    padded = torch.cat([packed, packed.new_zeros(-len(packed) % bits)]).view(-1, bits).long()
    words = sum(column << (8 * i) for i, column in enumerate(padded.unbind(1)))
    assert isinstance(words, Tensor)
    numbers = torch.stack([words >> (bits * i) & (1 << bits) - 1 for i in range(8)], dim=1)
    return numbers.view(-1)[:count]
