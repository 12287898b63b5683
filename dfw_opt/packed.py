r"""Small files: a quantized weight in 1 to 8 bits, everything else as it is.

A packed file is one of `safetensors <https://github.com/huggingface/safetensors>`_. Of a packed
tensor, ``name`` holds the digits (uint8, 1-D) and ``name.scale`` the scales; any other is as it is,
or, if safetensors lacks its dtype, its bytes ("raw"). The metadata are ``sha256``, a checksum of
the rest, and ``dfw_opt``, JSON: ``{"version": 1, "packed": {name: [encoding, dtype, shape]},
"tied": {name: other name}}``. The encoding is the smallest that brings back every bit:

=============  ======================================  =============  ==============================
encoding       values                                  digit          bits
=============  ======================================  =============  ==============================
binary         :math:`\pm a`                           0, 1           1
ternary        :math:`-n`, 0, :math:`p`                0, 1, 2        8/5
uniform2 to 8  :math:`a \cdot k/q`, :math:`|k| \le q`  :math:`k + q`  :math:`b`, :math:`q=2^{b-1}-1`
=============  ======================================  =============  ==============================

**Scales** (:math:`a`; :math:`p` and :math:`n`, stacked) are one for each block of the weight. Their
shape tells the blocks: its first number divides the first dimension of the weight, the others are 1
or the whole dimension. ``(8, 1, 1)`` is one for each output channel, ``(1, 8, 1)`` if the
convolution is transposed, ``(2, 4, 1)`` if that has two groups. They have the dtype of the weight;
of "uniform" at least float32, in which weights are computed before they are rounded to theirs.

**Digits** are row-major, the first in the lowest place of a byte: 8 binary or 5 ternary ones. Those
of "uniform" are :math:`b` rows of binary ones: all lowest bits, all next ones, and so on.
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

__all__ = ["PackedFileError", "load_packed", "save_packed"]

Model = TypeVar("Model", bound=nn.Module)
Shape = tuple[int, ...]

# The base of digits, how many are in a byte, how many make a number, and q.
PLACES = {"binary": (2, 8, 1, 0), "ternary": (3, 5, 1, 1)}
PLACES |= {f"uniform{bits}": (2, 8, bits, 2 ** (bits - 1) - 1) for bits in range(2, 9)}
# What every version of safetensors can keep.
_NAMES = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.bool: "BOOL"}
_NAMES |= {getattr(torch, f"float{n}"): f"F{n}" for n in (64, 32, 16)}
_NAMES |= {getattr(torch, f"int{n}"): f"I{n}" for n in (64, 32, 16, 8)}


class PackedFileError(ValueError):
    """A file is not one of :func:`~dfw_opt.save_packed`, is damaged, or is of another model."""


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves ``model`` in one small file, whose format is that of :mod:`dfw_opt.packed`.

    A weight whose values are binary takes 1 bit, a ternary one 8/5, an evenly spaced one 2 to 8;
    the rest of ``model.state_dict()`` is kept as it is, what shares memory once. The values alone
    decide: no optimizer is needed. What ``torch.compile``, ``DataParallel`` or ``AveragedModel``
    put around the model is left out. A file at ``path`` is replaced once the new one is complete.

    Raises:
        ImportError: safetensors is missing.
        TypeError: ``model`` is not a module.
        ValueError: something in the state dict is no dense tensor of the model with values.
        OSError: the file cannot be written; one that was there before is unchanged.
    """
    path, _ = os.fspath(path), _safetensors()
    stored, tied = store_model(model)
    parts = {name: tensor.data for name, tensor in stored.items()}
    scales = {f"{name}.scale": tensor.scale for name, tensor in stored.items()}
    parts |= {name: scale for name, scale in scales.items() if scale is not None}
    packed = {}
    for name, (encoding, dtype, shape, data, _) in stored.items():
        if data.dtype != dtype:
            packed[name] = (encoding, str(dtype).removeprefix("torch."), shape)
    about = json.dumps({"version": 1, "packed": packed, "tied": tied}, separators=(",", ":"))
    _write(path, parts, {"dfw_opt": about, "sha256": _digest(about, parts)})


def load_packed(model: Model, path: str | os.PathLike[str]) -> Model:
    """Loads a file of :func:`~dfw_opt.save_packed` into ``model``, all or nothing, and returns it.

    The model has the same names, shapes and dtypes as the saved one, and is the plain one, with
    float layers, or that in ``torch.compile``, ``DataParallel`` or ``AveragedModel``. Its tensors,
    on any device, get the values that the saved model held, bit for bit, and stay the same objects.
    Nothing in the file is executed; the memory that is taken is bounded by the size of the model.
    To train on, make the optimizer afterwards: its latents then start from these values.

    Raises:
        ImportError: safetensors is missing.
        TypeError: ``model`` is not a module.
        ValueError: its state dict holds something that :func:`~dfw_opt.save_packed` refuses.
        PackedFileError: the file is not a packed one, is damaged, or does not fit the model, which
            is unchanged.
        OSError: the file cannot be read.
    """
    (tensors, ties), values = live_tensors(model), dict[str, Tensor]()
    with reading(os.fspath(path)) as (stored, tied):
        stored |= {name: stored[other] for name, other in tied.items()}
        ours, its = sorted(tensors.keys() - stored), sorted(stored.keys() - tensors)
        if ours or its:
            raise PackedFileError(f"only the model has {ours!r:.200}, only the file {its!r:.200}")
        for name, tensor in tensors.items():
            has, needs = stored[name][1:3], (tensor.dtype, tuple(tensor.shape))
            if has != needs:
                what = f"{has!r:.100} in the file, {needs} in the model"
                raise PackedFileError(f"{name!r} is {what} (model.to can change the dtype)")
            values[name] = restore(stored[name])
            if not torch.equal(_bytes(values[name]), _bytes(values[ties.get(name, name)])):
                raise PackedFileError(
                    f"{name!r} and {ties[name]!r} differ, and the model ties them"
                )
    for name, tensor in tensors.items():
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.copy_(values[name])
    return model


class Stored(NamedTuple):
    """A tensor as it is kept. ``data`` are digits, or itself, or its bytes."""

    encoding: str
    dtype: torch.dtype
    shape: Shape
    data: Tensor
    scale: Tensor | None = None


def store(tensor: Tensor) -> Stored:
    """``tensor`` in the fewest bytes that bring back every bit of it."""
    w = tensor.detach().cpu().contiguous()
    for _, encoding, blocks in _choices(w):
        few = tuple(min(count, 4) for count in blocks)
        ends = (few[i] * (size // blocks[i]) for i, size in enumerate(w.shape))
        corner = w[tuple(map(slice, ends))]  # tells nearly all that do not fit
        for part, its in ((corner, few), (w, blocks)):
            digits, scale = _split(encoding, part, its)
            if not torch.equal(_bytes(_join(encoding, digits, scale).to(w.dtype)), _bytes(part)):
                break
        else:
            return Stored(encoding, w.dtype, tuple(w.shape), _pack(encoding, digits), scale)
    return Stored("raw", w.dtype, tuple(w.shape), w if w.dtype in _NAMES else _bytes(w))


def restore(stored: Stored) -> Tensor:
    """The tensor that :func:`store` was given, on the CPU; some exception if there is none."""
    encoding, dtype, shape, data, scale = stored
    if scale is None:
        return data if data.dtype == dtype else data.clone().view(dtype).view(shape)
    if any(size % n for n, size in zip(scale.shape[encoding == "ternary" :], shape, strict=True)):
        raise ValueError("scales that do not fit, and may become too many")
    return _join(encoding, _unpack(encoding, data, math.prod(shape)).view(shape), scale).to(dtype)


def _choices(w: Tensor) -> list[tuple[int, str, Shape]]:
    """Sizes, encodings and shapes of scales that take less than ``w``, the smallest first."""
    if w.dim() < 2 or not w.numel() or not w.is_floating_point() or w.itemsize == 1:
        return []
    rows, columns, *rest = w.shape
    ones = [1] * len(rest)
    shapes = {(rows, 1, *ones)} | {(n, columns, *ones) for n in range(1, rows + 1) if not rows % n}
    if rest:  # a stack of matrices whose output channels are last
        shapes.add((rows, 1, rest[0], *ones[1:]))
    if len(set(w.view(-1)[:: 1 + w.numel() // 1000].abs().tolist())) < 129:  # as q is below 128
        shapes.add((1, 1, *ones))
    found = []
    for name, (_, per_byte, places, _) in PLACES.items():
        each = 2 * w.itemsize if name == "ternary" else max(w.itemsize, 4 if places > 1 else 0)
        digits = places * -(-w.numel() // per_byte)
        found += [(digits + each * math.prod(blocks), name, blocks) for blocks in shapes]
    return sorted(choice for choice in found if choice[0] < w.nbytes)


def _split(encoding: str, w: Tensor, blocks: Shape) -> tuple[Tensor, Tensor]:
    """The digits and scales that ``w`` has if it is of this encoding."""
    if encoding == "binary":
        return w.signbit().byte(), _largest(w.abs(), blocks)  # -0.0 has a sign
    q = PLACES[encoding][3]
    if encoding == "ternary":
        k, a = w.sign(), torch.stack([_largest(w, blocks), _largest(-w, blocks)]).clamp(min=0)
    else:
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        a = _largest(wide.abs(), blocks)
        k = (wide / _spread(torch.where(a > 0, a, 1.0), w) * q).round()
        if w.itemsize == 2:  # take the middle of all a whose levels are rounded to these weights
            near = ((w.abs().view(torch.int16) + step).view(w.dtype) for step in (-1, 1))
            low, high = ((wide.abs() + neighbour) / 2 * q / k.abs() for neighbour in near)
            low = _largest(torch.where(k == 0, 0.0, low), blocks)
            high = -_largest(torch.where(k == 0, -torch.inf, -high), blocks)
            a = torch.where(a > 0, (low + high) / 2, a)
    return (k + q).byte(), a


def _join(encoding: str, digits: Tensor, scale: Tensor) -> Tensor:
    """The inverse, in the dtype of ``scale``."""
    if encoding == "binary":
        a = _spread(scale, digits)
        return torch.where(digits == 0, a, -a)
    p, n = scale if encoding == "ternary" else (scale, scale)
    q = PLACES[encoding][3]
    k = digits.to(scale.dtype) - q
    # As the quantizer computes it: k/q first, and the last level is a.
    a = torch.where(k > 0, _spread(p, k), _spread(n, k))
    return torch.where(k == 0, 0.0, a * (k / q))


def _largest(values: Tensor, blocks: Shape) -> Tensor:
    split = values.reshape(blocks[0], -1, *values.shape[1:])
    return split.amax([1, *(i + 1 for i, n in enumerate(blocks) if i and n == 1)]).view(blocks)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    return scale.repeat_interleave(like.shape[0] // scale.shape[0], 0)


def _pack(encoding: str, digits: Tensor) -> Tensor:
    base, per_byte, places, _ = PLACES[encoding]
    rows = torch.stack([digits.view(-1) >> place for place in range(places)]) % base
    rows = nn.functional.pad(rows, (0, -rows.shape[1] % per_byte)).view(-1, per_byte)
    return (rows * base ** torch.arange(per_byte, device="cpu").byte()).sum(1, dtype=torch.uint8)


def _unpack(encoding: str, data: Tensor, count: int) -> Tensor:
    base, per_byte, places, _ = PLACES[encoding]
    powers = base ** torch.arange(per_byte, device="cpu").byte()
    rows = data.view(places, -(-count // per_byte), 1) // powers % base
    shifts = torch.arange(places, device="cpu").byte()[:, None]
    return (rows.view(places, -1)[:, :count] << shifts).sum(0, dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def store_model(model: nn.Module) -> tuple[dict[str, Stored], dict[str, str]]:
    """What to keep of ``model``, by name; and of names that are tied to another one, that."""
    tensors, ties = live_tensors(model)
    return {name: store(tensor) for name, tensor in tensors.items() if name not in ties}, ties


def live_tensors(model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain model's tensors themselves, by name; and of names that share memory, the first."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r:.100} must be a torch.nn.Module")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, swa_utils.AveragedModel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    tensors, ties, first = dict[str, Tensor](), dict[str, str](), dict[Any, str]()
    for name, tensor in model.state_dict(keep_vars=True).items():
        odd = id(tensor) not in own or nn.parameter.is_lazy(tensor) or tensor.is_meta
        odd = odd or hasattr(tensor, "device_mesh") or tensor.layout != torch.strided
        odd = odd or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
        if odd or (0 in tensor.stride() and tensor.numel() > 1):
            raise ValueError(
                f"{name!r} in model ({type(tensor).__name__}) is no dense parameter or buffer with "
                "values: run a lazy model once, gather a sharded one, clone expanded views"
            )
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        tensors[name] = tensor
        place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if (other := first.setdefault(place, name)) != name:
            ties[name] = other
    return tensors, ties


@contextlib.contextmanager
def reading(path: str) -> Iterator[tuple[dict[str, Stored], dict[str, str]]]:
    """What :func:`store_model` made of the model in the file; what fails with it is the file's."""
    try:
        with _safetensors().safe_open(path, framework="pt", device="cpu") as file:  # maps it
            names, metadata = file.keys(), file.metadata() or {}
            parts = {name: file.get_tensor(name) for name in names}
        about = json.loads(metadata["dfw_opt"])
        if (version := about["version"]) != 1:
            raise PackedFileError(f"of version {version!r:.20}; install the dfw-opt that wrote it")
        if metadata.get("sha256") != _digest(metadata["dfw_opt"], parts):
            raise PackedFileError("damaged: its checksum does not match its content")
        stored = {}
        for name, (encoding, dtype, shape) in about["packed"].items():
            data, scale = parts.pop(name), parts.pop(f"{name}.scale", None)
            stored[name] = Stored(encoding, getattr(torch, dtype), tuple(shape), data, scale)
        stored |= {name: Stored("raw", p.dtype, tuple(p.shape), p) for name, p in parts.items()}
        yield stored, about["tied"]
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # of any kind: a stranger may have made the file
        what = f"not a packed file, or a damaged one ({type(error).__name__}: {error!s:.100})"
        what = str(error) if isinstance(error, PackedFileError) else what
        raise PackedFileError(f"{path}: {what}") from None


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError('packed files need safetensors: pip install "dfw-opt[files]"') from error


def _buffer(part: Tensor) -> Any:
    """The memory of a contiguous tensor, which must outlive it."""
    return (ctypes.c_ubyte * part.nbytes).from_address(part.data_ptr())


def _digest(about: str, parts: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name, part in sorted(parts.items()):
        digest.update(json.dumps([name, str(part.dtype), part.shape]).encode())
        digest.update(_buffer(part))
    return digest.hexdigest()


def _write(path: str, parts: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As safetensors.torch.save_file does, which needs NumPy; beside ``path``, and then there."""
    header, start = dict[str, Any](__metadata__=metadata), 0
    ordered = sorted(parts.items(), key=lambda item: -item[1].itemsize)  # so that each is aligned
    for name, part in ordered:
        offsets = (start, start := start + part.nbytes)
        header[name] = {"dtype": _NAMES[part.dtype], "shape": part.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is a folder, a device, a pipe or a socket, not a file")
        with beside.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(_buffer(part) for _, part in ordered)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            beside.chmod(target.stat().st_mode & 0o7777)
        beside.replace(target)
    except OSError as error:
        reason = f"not written, and what is there is unchanged: {error.strerror or error}"
        raise OSError(error.errno, reason, path) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
