"""Saving a model in a small file, and loading it into the plain float model."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from dfw_opt.files import write_atomically
from dfw_opt.packing.encodings import ENCODINGS
from dfw_opt.packing.layout import (
    DIGEST_SIZE,
    PREFIX_SIZE,
    Entry,
    PackedFileError,
    brief,
    describe,
    memory,
    on_host,
    parse_header,
    parse_prefix,
    preamble,
    total_size,
)

__all__ = ["live_tensors", "load_packed", "read_entries", "save_packed"]

Path = str | os.PathLike[str]
Model = TypeVar("Model", bound=nn.Module)

_CHUNK = 1 << 20
_SHOWN = 5


@torch.no_grad()
def save_packed(model: nn.Module, path: Path) -> None:
    """Saves ``model`` in one file, its quantized weights packed.

    A weight whose values are binary (one magnitude per output channel, the first dimension) takes 1
    bit, a ternary one (:math:`p`, :math:`0`, :math:`-n` over the tensor) 8/5, evenly spaced ones
    (the float32 weights of the uniform quantizer) 2 to 8; their scales are kept in the dtype of the
    weight. Everything else in ``model.state_dict()`` is kept as it is, and
    weights that share their memory are kept once. What is quantized is found by looking at the
    values, so no optimizer is needed, and every bit comes back: see
    :mod:`~dfw_opt.packing.encodings` for the rules and :mod:`~dfw_opt.packing.layout` for the file.

    The file is written beside its place and moved there when it is complete.

    Args:
        model: any module, on any device.
        path: the file, which is replaced if it exists.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: something in the state dict cannot be kept: it is no tensor, has no values
            (``meta``, lazy), is sharded or sparse, or is not a parameter or buffer of the model
            but made for the state dict.
        OSError: the file cannot be written; one that was there before is unchanged.
    """
    path = os.fspath(path)
    tensors = live_tensors(model)
    entries = describe(tensors)

    def write(file: IO[bytes]) -> None:
        digest = hashlib.sha256()
        for part in _parts(entries, tensors):
            digest.update(part)
            file.write(part)
        file.write(digest.digest())

    write_atomically(path, write)


@torch.no_grad()
def load_packed(model: Model, path: Path) -> Model:
    """Loads a file of :func:`save_packed` into ``model``, all of it or nothing.

    The model is the plain one, with float layers: its weights get the values that the saved model
    held, bit for bit. Nothing in the file is executed. Beyond the model it
    takes the memory of the file and of one block of weights; for a weight that is not contiguous on
    the CPU, that of the weight.

    To go on training, make the optimizer afterwards: the latents then start from these values.

    Args:
        model: a module with the same names, shapes and dtypes as the one that was saved, on any
            device.
        path: the file.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model's state dict holds something that is not its own parameter or buffer.
        PackedFileError: the file is not a packed one, is damaged or truncated, or does not fit the
            model; the model is unchanged.
        OSError: the file cannot be read.
    """
    path = os.fspath(path)
    tensors = live_tensors(model)
    with open(path, "rb") as file, _naming(path):
        entries, digest = _read_preamble(file)
        _match(entries, tensors)
        # The sizes agree with those of the model by now: this allocates no more than it has.
        content = bytearray(sum(entry.size for entry in entries))
        _read_into(file, content)
        digest.update(content)
        _check_digest(file, digest.digest())
        payloads = _payloads(entries, content)
        _check_payloads(entries, payloads, tensors)
    for entry, payload in zip(entries, payloads, strict=True):
        _fill(tensors[entry.name], entry.encoding, payload)
    return model


def read_entries(path: Path) -> tuple[list[Entry], int]:
    """What the packed file at ``path`` holds, and its size in bytes, having checked it for damage.

    Raises:
        PackedFileError: it is not a packed file, or is damaged.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file, _naming(path):
        entries, digest = _read_preamble(file)
        left = sum(entry.size for entry in entries)
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise PackedFileError("truncated while it was read")
            digest.update(chunk)
            left -= len(chunk)
        _check_digest(file, digest.digest())
        return entries, file.tell()


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``model.state_dict()`` by name: the model's own, not copies.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: one of them cannot be packed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={brief(model)} must be a torch.nn.Module")
    if sys.byteorder != "little":
        raise ValueError("packed files hold tensors as a little-endian machine does; this is none")
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        problem = _problem(tensor, own)
        if problem:
            raise ValueError(f"{name!r} in the model's state dict {problem}")
    return tensors


def _problem(tensor: Any, own: set[int]) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}; only tensors can be packed"
    if nn.parameter.is_lazy(tensor):
        return "has no values yet: run the model once on a batch"
    if hasattr(tensor, "device_mesh"):
        return "is sharded (a DTensor); gather the model first"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"has layout {tensor.layout}, dtype {tensor.dtype}; only dense tensors can be packed"
    if tensor.is_meta:
        return "is on the meta device and has no values"
    if any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        return "is expanded: several of its elements share one place in memory; make it contiguous"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view that torch conjugates or negates when it is read; clone it"
    if id(tensor) not in own:
        return "is not a parameter or buffer of the model: a hook made it"
    return None


def _parts(entries: list[Entry], tensors: dict[str, Tensor]) -> Iterator[Any]:
    yield preamble(entries)
    for entry in entries:
        if entry.tied is None:
            for part in ENCODINGS[entry.encoding].write(on_host(tensors[entry.name])):
                yield _bytes(part)


def _bytes(part: Tensor) -> bytearray:
    content = bytearray(part.numel())
    if content:  # frombuffer refuses an empty one
        torch.frombuffer(content, dtype=torch.uint8).copy_(part)
    return content


def _read_preamble(file: IO[bytes]) -> tuple[list[Entry], Any]:
    """The entries, once they account for every byte of the file, and the digest so far."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX_SIZE)
    stored = file.read(parse_prefix(prefix, size))
    entries = parse_header(stored)
    expected = total_size(len(stored), entries)
    if size != expected:
        raise PackedFileError(
            f"damaged: what its header lists takes {brief(expected)} bytes, but it has {size}"
        )
    return entries, hashlib.sha256(prefix + stored)


def _read_into(file: IO[bytes], content: bytearray) -> None:
    if file.readinto(content) != len(content):  # type: ignore[attr-defined]
        raise PackedFileError("truncated while it was read")


def _check_digest(file: IO[bytes], digest: bytes) -> None:
    if file.read(DIGEST_SIZE + 1) != digest:
        raise PackedFileError("damaged: its checksum does not match its content")


def _match(entries: list[Entry], tensors: dict[str, Tensor]) -> None:
    names = [entry.name for entry in entries]
    known = set(names)
    missing = [name for name in tensors if name not in known]
    unexpected = [name for name in names if name not in tensors]
    if missing or unexpected:
        raise PackedFileError(
            "it is of another model:"
            + _listed(" it lacks", missing)
            + (" and" if missing and unexpected else "")
            + _listed(" it has, and the model does not,", unexpected)
        )
    for entry in entries:
        tensor = tensors[entry.name]
        if entry.shape != tuple(tensor.shape):
            raise PackedFileError(
                f"entry {brief(entry.name)} has shape {entry.shape} in the file, "
                f"{tuple(tensor.shape)} in the model"
            )
        if entry.dtype != tensor.dtype:
            raise PackedFileError(
                f"entry {brief(entry.name)} is {entry.dtype} in the file, {tensor.dtype} in the "
                f"model; convert the model first: model.to({entry.dtype})"
            )


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what} {', '.join(brief(name) for name in names[:_SHOWN])}{more}"


def _payloads(entries: list[Entry], content: bytearray) -> list[Tensor]:
    """The payload of each entry, 1-D and uint8; that of a tied one is the other's."""
    everything = torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[: len(content)]
    own = torch.split(everything, [entry.size for entry in entries])
    return [own[index if entry.tied is None else entry.tied] for index, entry in enumerate(entries)]


def _check_payloads(
    entries: list[Entry], payloads: list[Tensor], tensors: dict[str, Tensor]
) -> None:
    holders: dict[Any, tuple[Entry, Tensor]] = {}
    for entry, payload in zip(entries, payloads, strict=True):
        problem = ENCODINGS[entry.encoding].check(payload, entry.shape, entry.dtype)
        if problem:
            raise PackedFileError(f"entry {brief(entry.name)} cannot be read: {problem}")
        tensor = tensors[entry.name]
        first, same = holders.setdefault(memory(tensor) or entry.name, (entry, payload))
        if first.encoding != entry.encoding or not torch.equal(same, payload):
            raise PackedFileError(
                f"entries {brief(first.name)} and {brief(entry.name)} are one tensor in the model, "
                "but differ in the file"
            )


def _fill(tensor: Tensor, encoding: str, payload: Tensor) -> None:
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        ENCODINGS[encoding].read(payload, tensor.detach())
    else:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        ENCODINGS[encoding].read(payload, values)
        tensor.copy_(values)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the name of the file in front of what is wrong with it."""
    try:
        yield
    except PackedFileError as error:
        raise PackedFileError(f"{path!s}: {error}") from None
