"""What a packed file holds, entry by entry, and how its header says so.

All integers are little-endian.

======  ========  ===========================================================================
offset  bytes     what
======  ========  ===========================================================================
0       8         ``89 44 46 57 0D 0A 1A 0A``
8       4         the version of the format, 1
12      4         H, the size of the header as it is stored
16      8         the size of the file
24      H         the header: JSON in UTF-8, compressed with zlib
24 + H  the rest  the payloads of the entries, in their order
last    32        SHA-256 of all that precedes
======  ========  ===========================================================================

The header is a list with an entry ``[name, dtype, shape, encoding]`` for each key of the model's
state dict. ``encoding`` is a name from :data:`~dfw_opt.packing.encodings.ENCODINGS`, or the index
of the earlier entry whose memory this one shares, and then there is no payload.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfw_opt.packing.encodings import ENCODINGS, best

__all__ = [
    "DIGEST_SIZE",
    "DTYPES",
    "MAX_HEADER",
    "PREFIX_SIZE",
    "Entry",
    "PackedFileError",
    "brief",
    "describe",
    "memory",
    "on_host",
    "parse_header",
    "parse_prefix",
    "preamble",
    "total_size",
]

_MAGIC = b"\x89DFW\r\n\x1a\n"  # as PNG's: neither text nor fit to survive a change of line ends
_VERSION = 1
_PREFIX = struct.Struct("<8sIIQ")
PREFIX_SIZE = _PREFIX.size
DIGEST_SIZE = 32
MAX_HEADER = 4 << 20
"""The most bytes that a header may have, before compression."""
_MAX_DIMENSIONS = 64  # torch's own limit

_DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}


class PackedFileError(ValueError):
    """A file is not one of :func:`~dfw_opt.save_packed`, is damaged, or is of another model."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a state dict."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: str
    tied: int | None = None
    """The index of the entry that it shares its memory with."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """The bytes of its payload."""
        if self.tied is not None:
            return 0
        return ENCODINGS[self.encoding].size(self.shape, self.dtype)


def describe(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """The entries of ``tensors``, each in the encoding that takes the fewest bytes."""
    entries: list[Entry] = []
    seen: dict[Any, int] = {}
    for index, (name, tensor) in enumerate(tensors.items()):
        shape = tuple(tensor.shape)
        first = seen.setdefault(memory(tensor) or name, index)
        if first < index:
            entries.append(Entry(name, tensor.dtype, shape, entries[first].encoding, first))
        else:
            encoding = best(on_host(tensor))
            entries.append(Entry(name, tensor.dtype, shape, encoding))
    return entries


def on_host(tensor: Tensor) -> Tensor:
    """``tensor`` as encodings take it: on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous()


def memory(tensor: Tensor) -> Any:
    """What two tensors have in common if they are one; ``None`` for a tensor that has no memory."""
    if not tensor.numel():
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def preamble(entries: Sequence[Entry]) -> bytes:
    """All that precedes the payloads.

    Raises:
        ValueError: there are more names than a header may hold.
    """
    listed = [
        [
            entry.name,
            str(entry.dtype).removeprefix("torch."),
            list(entry.shape),
            entry.encoding if entry.tied is None else entry.tied,
        ]
        for entry in entries
    ]
    text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"the model has {len(entries)} tensors, whose names and shapes take {len(text)} "
            f"bytes; a packed file has room for {MAX_HEADER}"
        )
    header = zlib.compress(text, 9)
    size = total_size(len(header), entries)
    return _PREFIX.pack(_MAGIC, _VERSION, len(header), size) + header


def total_size(header: int, entries: Sequence[Entry]) -> int:
    """The bytes of a file whose header takes ``header`` bytes."""
    return PREFIX_SIZE + header + sum(entry.size for entry in entries) + DIGEST_SIZE


def parse_prefix(prefix: bytes, size: int) -> int:
    """The size of the stored header, from the first bytes of a file of ``size`` bytes."""
    if not prefix.startswith(_MAGIC[: len(prefix)]) or not prefix:
        raise PackedFileError("not a packed file, one of dfw_opt.save_packed")
    if len(prefix) < PREFIX_SIZE:
        raise PackedFileError(f"truncated: it has {size} bytes, fewer than any packed file")
    _, version, header, total = _PREFIX.unpack(prefix)
    if version != _VERSION:
        raise PackedFileError(
            f"its format has version {version}, and this dfw_opt reads version {_VERSION}; "
            "install the dfw-opt that wrote it"
        )
    if total != size:
        state = "truncated" if size < total else "too long"
        raise PackedFileError(f"{state}: it has {size} bytes and should have {total}")
    if header > size - PREFIX_SIZE - DIGEST_SIZE:
        raise PackedFileError(f"damaged: a header of {header} bytes in a file of {size}")
    if header > MAX_HEADER:
        raise PackedFileError(f"a header of {header} bytes; at most {MAX_HEADER} are read")
    return int(header)


def parse_header(stored: bytes) -> list[Entry]:
    """The entries that a stored header lists."""
    entries: list[Entry] = []
    names: set[str] = set()
    for item in _decoded(stored):
        entry = _entry(item, entries)
        if entry.name in names:
            raise PackedFileError(f"its header lists {brief(entry.name)} twice")
        names.add(entry.name)
        entries.append(entry)
    return entries


def brief(value: object) -> str:
    """``value`` as Python writes it, cut short: it may come from a stranger."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _decoded(stored: bytes) -> list[Any]:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(stored, MAX_HEADER + 1)
    except zlib.error as error:
        raise PackedFileError(f"damaged: its header cannot be inflated ({error})") from None
    if len(text) > MAX_HEADER:
        raise PackedFileError(f"its header is larger than {MAX_HEADER} bytes")
    if not inflater.eof or inflater.unused_data:
        raise PackedFileError("damaged: its header does not end where it should")
    try:
        listed = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise PackedFileError(f"its header is no JSON ({brief(str(error))})") from None
    if not isinstance(listed, list):
        raise PackedFileError(f"its header is {brief(listed)}, not a list")
    return listed


def _entry(item: Any, before: list[Entry]) -> Entry:
    if not (isinstance(item, list) and len(item) == 4):
        raise PackedFileError(f"its header has {brief(item)} for a name, dtype, shape and encoding")
    name, dtype, shape, encoding = item
    if not isinstance(name, str):
        raise PackedFileError(f"its header has {brief(name)} for a name")
    where = f"entry {brief(name)}"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise PackedFileError(f"{where} has the unknown dtype {brief(dtype)}")
    if not (
        isinstance(shape, list)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    ):
        raise PackedFileError(f"{where} has {brief(shape)} for a shape")
    described = DTYPES[dtype], tuple(shape)
    if type(encoding) is int:
        if not 0 <= encoding < len(before):
            raise PackedFileError(f"{where} is tied to number {brief(encoding)}, not before it")
        first = before[encoding]
        if first.tied is not None or (first.dtype, first.shape) != described:
            raise PackedFileError(f"{where} is tied to {brief(first.name)}, which is unlike it")
        return Entry(name, *described, first.encoding, encoding)
    if not isinstance(encoding, str) or encoding not in ENCODINGS:
        raise PackedFileError(f"{where} has the unknown encoding {brief(encoding)}")
    if not ENCODINGS[encoding].takes(*described[::-1]):
        raise PackedFileError(f"{where} cannot be {encoding}: shape {shape}, dtype {dtype}")
    return Entry(name, *described, encoding)
