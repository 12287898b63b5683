"""The packed file, written and read literally, for the tests to compare with.

Plain integers and bytes, one rule of the format a line, loops over single elements. Nothing is
shared with the package. An element is its bit pattern, an integer: what is compared are bits, so
−0.0 is not 0.0 and each NaN is itself.

The functions that write take what they are told, so that they also write files that are wrong in
one place and right in all others, the checksum included. ``read`` accepts nothing but what the
format allows.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

MAGIC = b"\x89DFW\r\n\x1a\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")  # magic, version, size of the header, size of the file
DIGEST = 32
HEADER_LIMIT = 4 << 20

ITEM_SIZES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}

# What may be binary or ternary, and its infinity: larger bit patterns, sign aside, are NaN.
INFINITY = {
    "float16": 0x7C00,
    "bfloat16": 0x7F80,
    "float32": 0x7F80_0000,
    "float64": 0x7FF0_0000_0000_0000,
}


class Invalid(Exception):  # noqa: N818 (not an error of the tests, but their expectation)
    """The file breaks a rule of the format, or does not fit the model."""


@dataclass(frozen=True)
class Entry:
    """One tensor; ``content`` has its elements in row-major order, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str | int
    content: bytes

    def listed(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), self.encoding]


def count(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def split(content: bytes, size: int) -> list[int]:
    return [
        int.from_bytes(content[start : start + size], "little")
        for start in range(0, len(content), size)
    ]


def join(words: Sequence[int], size: int) -> bytes:
    return b"".join(word.to_bytes(size, "little") for word in words)


# --------------------------------------------------------------------------------------------------
# Encodings
# --------------------------------------------------------------------------------------------------


def pack(digits: Sequence[int], base: int, per_byte: int) -> bytes:
    """The first digit of a byte is the least significant."""
    packed = []
    for start in range(0, len(digits), per_byte):
        group = digits[start : start + per_byte]
        packed.append(sum(digit * base**place for place, digit in enumerate(group)))
    return bytes(packed)


def unpack(packed: bytes, base: int, per_byte: int, number: int) -> list[int]:
    digits = []
    for byte in packed:
        if byte >= base**per_byte:
            raise Invalid(f"byte {byte}")
        for _ in range(per_byte):
            byte, digit = divmod(byte, base)
            digits.append(digit)
    if any(digits[number:]):
        raise Invalid("padding")
    return digits[:number]


def quantizable(dtype: str, shape: Sequence[int]) -> bool:
    return dtype in INFINITY and len(shape) >= 2 and count(shape) >= 1


def encode_binary(dtype: str, shape: Sequence[int], content: bytes) -> bytes | None:
    size = ITEM_SIZES[dtype]
    top = 8 * size - 1
    words = split(content, size)
    length = len(words) // shape[0]
    scales = []
    for row in range(shape[0]):
        magnitudes = {word & ~(1 << top) for word in words[row * length : (row + 1) * length]}
        if len(magnitudes) > 1 or max(magnitudes) > INFINITY[dtype]:  # NaN is never a scale
            return None
        scales.append(magnitudes.pop())
    return join(scales, size) + pack([word >> top for word in words], 2, 8)


def encode_ternary(dtype: str, shape: Sequence[int], content: bytes) -> bytes | None:
    size = ITEM_SIZES[dtype]
    top = 8 * size - 1
    positive, negative, digits = set(), set(), []
    for word in split(content, size):
        magnitude = word & ~(1 << top)
        if word == 0:
            digits.append(0)
        elif magnitude == 0 or magnitude > INFINITY[dtype]:  # −0.0, NaN
            return None
        elif word >> top:
            negative.add(magnitude)
            digits.append(2)
        else:
            positive.add(magnitude)
            digits.append(1)
    if len(positive) > 1 or len(negative) > 1:
        return None
    scales = [max(positive, default=0), max(negative, default=0)]
    return join(scales, size) + pack(digits, 3, 5)


# What may be uniform: how struct calls it, and its smallest normal number.
UNIFORM = {"float32": ("<f", 2.0**-126), "float64": ("<d", 2.0**-1022)}
WIDTHS = {f"uniform{bits}": bits for bits in range(2, 9)}


def level(dtype: str, largest: int, step: int, q: int) -> int:
    """The word of m · (k/q), rounded twice; exact doubles round to float32 as they should."""
    form = UNIFORM[dtype][0]

    def rounded(x: float) -> float:
        return float(struct.unpack(form, struct.pack(form, x))[0])

    (m,) = struct.unpack(form, largest.to_bytes(ITEM_SIZES[dtype], "little"))
    value = m * rounded(step / q) if step else 0.0
    return int.from_bytes(struct.pack(form, value), "little")


def allowed(dtype: str, largest: int, q: int) -> bool:
    form, tiny = UNIFORM[dtype]
    (m,) = struct.unpack(form, largest.to_bytes(ITEM_SIZES[dtype], "little"))
    return largest == 0 or (m >= tiny * (q + 1) and largest < INFINITY[dtype])


def pack_bits(numbers: Sequence[int], bits: int) -> bytes:
    stream = sum(number << (bits * place) for place, number in enumerate(numbers))
    return stream.to_bytes(-(-len(numbers) * bits // 8), "little")


def encode_uniform(dtype: str, shape: Sequence[int], content: bytes, bits: int) -> bytes | None:
    if dtype not in UNIFORM:
        return None
    size, q = ITEM_SIZES[dtype], 2 ** (bits - 1) - 1
    words = split(content, size)
    length = len(words) // shape[0]
    scales, numbers = [], []
    for row in range(shape[0]):
        own = words[row * length : (row + 1) * length]
        largest = max(word & ~(1 << (8 * size - 1)) for word in own)
        if not allowed(dtype, largest, q):
            return None
        number = {level(dtype, largest, step, q): step + q for step in range(-q, q + 1)}
        if largest == 0:
            number = {0: q}
        if any(word not in number for word in own):
            return None
        scales.append(largest)
        numbers += [number[word] for word in own]
    return join(scales, size) + pack_bits(numbers, bits)


def encode(dtype: str, shape: Sequence[int], content: bytes) -> tuple[str, bytes]:
    """The encoding with the fewest bytes and its payload; the first of those that are equal."""
    candidates = [("raw", content)]
    if quantizable(dtype, shape):
        for name, function in (("binary", encode_binary), ("ternary", encode_ternary)):
            payload = function(dtype, shape, content)
            if payload is not None:
                candidates.append((name, payload))
        for name, bits in WIDTHS.items():
            payload = encode_uniform(dtype, shape, content, bits)
            if payload is not None:
                candidates.append((name, payload))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def payload_of(entry: Entry) -> bytes:
    if isinstance(entry.encoding, int):
        return b""
    if entry.encoding == "binary":
        payload = encode_binary(entry.dtype, entry.shape, entry.content)
    elif entry.encoding == "ternary":
        payload = encode_ternary(entry.dtype, entry.shape, entry.content)
    elif entry.encoding in WIDTHS:
        payload = encode_uniform(entry.dtype, entry.shape, entry.content, WIDTHS[entry.encoding])
    else:
        payload = entry.content
    assert payload is not None, f"{entry.name} is not {entry.encoding}"
    return payload


def payload_size(dtype: str, shape: Sequence[int], encoding: str | int) -> int:
    size, number = ITEM_SIZES[dtype], count(shape)
    if isinstance(encoding, int):
        return 0
    if encoding == "binary":
        return shape[0] * size + -(-number // 8)
    if encoding == "ternary":
        return 2 * size + -(-number // 5)
    if encoding in WIDTHS:
        return shape[0] * size + -(-number * WIDTHS[encoding] // 8)
    return number * size


def decode(dtype: str, shape: Sequence[int], encoding: str, payload: bytes) -> bytes:
    size, number = ITEM_SIZES[dtype], count(shape)
    sign = 1 << (8 * size - 1)
    if encoding == "raw":
        if dtype == "bool" and any(byte > 1 for byte in payload):
            raise Invalid("bool")
        return payload
    if encoding == "binary":
        scales = split(payload[: shape[0] * size], size)
        signs = unpack(payload[shape[0] * size :], 2, 8, number)
        length = number // shape[0]
        words = [scales[i // length] ^ (sign if digit else 0) for i, digit in enumerate(signs)]
        return join(words, size)
    if encoding in WIDTHS:
        bits, q = WIDTHS[encoding], 2 ** (WIDTHS[encoding] - 1) - 1
        scales = split(payload[: shape[0] * size], size)
        stream = int.from_bytes(payload[shape[0] * size :], "little")
        numbers = [stream >> (bits * place) & (2**bits - 1) for place in range(number)]
        if stream >> (bits * number) or any(one > 2 * q for one in numbers):
            raise Invalid("number")
        if not all(allowed(dtype, largest, q) for largest in scales):
            raise Invalid("scale")
        length = number // shape[0]
        words = [level(dtype, scales[i // length], one - q, q) for i, one in enumerate(numbers)]
        return join(words, size)
    positive, negative = split(payload[: 2 * size], size)
    values = (0, positive, negative ^ sign)
    return join([values[digit] for digit in unpack(payload[2 * size :], 3, 5, number)], size)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def assemble(
    header: bytes,
    payload: bytes,
    *,
    magic: bytes = MAGIC,
    version: int = VERSION,
    header_size: int | None = None,
    size: int | None = None,
) -> bytes:
    """A file with the checksum of what it holds. ``header`` is as stored, compressed."""
    header_size = len(header) if header_size is None else header_size
    size = PREFIX.size + len(header) + len(payload) + DIGEST if size is None else size
    body = PREFIX.pack(magic, version, header_size, size) + header + payload
    return body + hashlib.sha256(body).digest()


def compress(listed: object) -> bytes:
    return zlib.compress(json.dumps(listed).encode())


def build(
    entries: Sequence[Entry],
    *,
    listed: object = None,
    payloads: Mapping[int, bytes] | None = None,
    **wrong: Any,
) -> bytes:
    """Entries as they are told to be encoded.

    ``listed`` stands in the header in place of the entries, ``payloads`` are written in place of
    those of the entries with these numbers; ``wrong`` goes to ``assemble``.
    """
    header = compress([entry.listed() for entry in entries] if listed is None else listed)
    written = [payload_of(entry) for entry in entries]
    for number, payload in (payloads or {}).items():
        written[number] = payload
    return assemble(header, b"".join(written), **wrong)


def write(path: Path, entries: Sequence[Entry], **wrong: Any) -> None:
    path.write_bytes(build(entries, **wrong))


def reseal(data: bytes) -> bytes:
    """With the size and checksum that a file of these bytes should have, if there is room."""
    if len(data) < PREFIX.size + DIGEST:
        return data
    body = data[:16] + struct.pack("<Q", len(data)) + data[24:-DIGEST]
    return body + hashlib.sha256(body).digest()


def read_header(stored: bytes) -> list[tuple[str, str, tuple[int, ...], str | int]]:
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(stored, HEADER_LIMIT + 1)
        if len(text) > HEADER_LIMIT or not inflate.eof or inflate.unused_data:
            raise Invalid("header size")
        listed = json.loads(text.decode("utf-8"))
    except (zlib.error, ValueError, RecursionError) as error:
        raise Invalid("header") from error
    if type(listed) is not list:
        raise Invalid("not a list")
    entries: list[tuple[str, str, tuple[int, ...], str | int]] = []
    for item in listed:
        if type(item) is not list or len(item) != 4:
            raise Invalid("entry")
        name, dtype, shape, encoding = item
        if type(name) is not str or name in {entry[0] for entry in entries}:
            raise Invalid("name")
        if type(dtype) is not str or dtype not in ITEM_SIZES:
            raise Invalid("dtype")
        if type(shape) is not list or any(type(n) is not int or n < 0 for n in shape):
            raise Invalid("shape")
        if type(encoding) is int:
            if not 0 <= encoding < len(entries):
                raise Invalid("tie")
            source = entries[encoding]
            if isinstance(source[3], int) or source[1:3] != (dtype, tuple(shape)):
                raise Invalid("tie")
        elif encoding in ("binary", "ternary"):
            if not quantizable(dtype, shape):
                raise Invalid("encoding")
        elif type(encoding) is str and encoding in WIDTHS:
            if not (quantizable(dtype, shape) and dtype in UNIFORM):
                raise Invalid("encoding")
        elif encoding != "raw":
            raise Invalid("encoding")
        entries.append((name, dtype, tuple(shape), encoding))
    return entries


def read(path: Path) -> list[Entry]:
    data = path.read_bytes()
    if len(data) < PREFIX.size + DIGEST:
        raise Invalid("short")
    magic, version, header_size, size = PREFIX.unpack_from(data)
    if (magic, version, size) != (MAGIC, VERSION, len(data)):
        raise Invalid("prefix")
    if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
        raise Invalid("checksum")
    start = PREFIX.size + header_size
    if start > len(data) - DIGEST:
        raise Invalid("header size")
    headers = read_header(data[PREFIX.size : start])
    sizes = [payload_size(dtype, shape, encoding) for _, dtype, shape, encoding in headers]
    if start + sum(sizes) + DIGEST != len(data):
        raise Invalid("payload size")
    entries: list[Entry] = []
    for (name, dtype, shape, encoding), length in zip(headers, sizes, strict=True):
        if isinstance(encoding, int):
            content = entries[encoding].content
        else:
            content = decode(dtype, shape, encoding, data[start : start + length])
        entries.append(Entry(name, dtype, shape, encoding, content))
        start += length
    return entries


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A model of just these tensors; those that are no parameters become buffers."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def draw(
    levels: Sequence[float], shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Each level in turn, shuffled."""
    number = math.prod(shape)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    values = torch.tensor(levels, dtype=torch.float64).to(dtype)
    return values[order % len(levels)].reshape(list(shape))


def binary(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.arange(1, shape[0] + 1).reshape([-1] + [1] * (len(shape) - 1)).to(dtype) / 7
    return draw((1, -1), shape, dtype) * rows


def blank(model: nn.Module) -> nn.Module:
    """The same model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.fill_(3)
    return other


def dtype_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def content_of(tensor: Tensor) -> bytes:
    """The elements' bits in row-major order (little-endian, as the machine has to be)."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def contents(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Compares equal only if all tensors have the same names, types, shapes and bits."""
    return {
        name: (dtype_of(tensor), tuple(tensor.shape), content_of(tensor))
        for name, tensor in model.state_dict().items()
    }


def entries_of(model: nn.Module) -> list[Entry]:
    """What the file of a model has to hold."""
    entries: list[Entry] = []
    seen: dict[object, int] = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        dtype, shape, content = dtype_of(tensor), tuple(tensor.shape), content_of(tensor)
        encoding: str | int = encode(dtype, shape, content)[0]
        if tensor.numel():
            first = seen.setdefault(memory, number)
            encoding = encoding if first == number else first
        entries.append(Entry(name, dtype, shape, encoding, content))
    return entries


def fit(
    entries: Sequence[Entry], model: nn.Module
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the model holds after loading these entries; by name, so in any order."""
    told = {entry.name: (entry.dtype, entry.shape, entry.content) for entry in entries}
    have = contents(model)
    if {name: value[:2] for name, value in told.items()} != {
        name: value[:2] for name, value in have.items()
    }:
        raise Invalid("model")
    return {name: told[name] for name in have}
