"""How many bits the weights of a model take, and how many bytes its packed file."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dfw_opt.packing.encodings import ENCODINGS
from dfw_opt.packing.file import live_tensors
from dfw_opt.packing.layout import DIGEST_SIZE, Entry, describe, preamble

__all__ = ["LayerSize", "Summary", "summary"]

_WIDEST = 100


@dataclass(frozen=True)
class LayerSize:
    """The tensors that one module holds itself, as they are packed."""

    name: str
    """As in ``model.named_modules()``."""
    shape: tuple[int, ...]
    """Of the largest tensor, which stands for the layer."""
    encoding: str
    """Of the same tensor, "raw", "binary", "ternary", or "uniform2" to "uniform8"."""
    bits: float
    """Per element of that tensor, without scales."""
    bytes: int
    """Of all tensors of the layer, scales included; 0 for those that another layer shares."""
    share: float
    """``bytes`` as a part of those of all layers."""


@dataclass(frozen=True, repr=False)
class Summary:
    """Sizes of a model, in all and by layer. ``str()`` of it is the table."""

    layers: tuple[LayerSize, ...]
    values: int
    """Elements of all tensors, shared ones counted once."""
    bytes: int
    """Of all tensors, packed."""
    float32_bytes: int
    """Of all tensors, were their floating-point elements float32."""
    file_bytes: int
    """Of the file that :func:`~dfw_opt.save_packed` writes."""
    quantized_weights: int
    """Elements of the tensors that are not raw."""
    quantized_bytes: int
    """Of the same tensors, packed, scales included."""

    @property
    def ratio(self) -> float:
        """How many times smaller than float32 the file is."""
        return self.float32_bytes / self.file_bytes

    @property
    def quantized_ratio(self) -> float | None:
        """How many times smaller than float32 the quantized weights are, ``None`` without any."""
        return 4 * self.quantized_weights / self.quantized_bytes if self.quantized_bytes else None

    def __repr__(self) -> str:
        return f"<Summary: {self.values} values in {self.file_bytes} bytes>"

    def __str__(self) -> str:
        rows = [("layer", "shape", "bits", "bytes", "share"), *map(_cells, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([*map(str.ljust, row[:2], widths[:2]), *map(str.rjust, row[2:], widths[2:])])
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(lines[1])
        if self.quantized_ratio is not None:
            lines.append(
                f"quantized {self.quantized_weights:,} weights, {self.quantized_bytes:,} bytes "
                f"with scales: {self.quantized_ratio:.1f} times smaller than float32"
            )
        lines.append(
            f"packed    {self.values:,} values, {self.file_bytes:,} bytes as a file: "
            f"{self.ratio:.1f} times smaller than float32 ({self.float32_bytes:,} bytes)"
        )
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def summary(model: nn.Module) -> Summary:
    r"""Prints how many bits and bytes each layer of ``model`` takes when packed, and the totals.

    Counted from the values that the model holds, by the rules of :func:`~dfw_opt.save_packed`:
    a layer that was meant to be binary and is not shows 32 bits. In memory the model stays as large
    as it was.

    Args:
        model: any module that :func:`~dfw_opt.save_packed` takes.

    Returns:
        What was printed, as data.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: its state dict holds something that cannot be packed.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 10))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(0.1 * model[0].weight.sign())
    >>> sizes = summary(model)  # doctest: +ELLIPSIS
    layer  shape  bits  bytes  share
    --------------------------------
    0      32x64     1    384  22.5%
    1      10x32    32  1,320  77.5%
    --------------------------------
    quantized 2,048 weights, 384 bytes with scales: 21.3 times smaller than float32
    packed    2,378 values, 1,8... bytes as a file: 5.2 times smaller than float32 (9,512 bytes)
    >>> sizes.quantized_weights
    2048
    """
    entries = describe(live_tensors(model))
    payloads = sum(entry.size for entry in entries)
    sizes = of_entries(entries, len(preamble(entries)) + payloads + DIGEST_SIZE)
    print(sizes)
    return sizes


def of_entries(entries: Sequence[Entry], file_bytes: int) -> Summary:
    """The sizes of a packed file that has these entries and ``file_bytes`` in all."""
    own = [entry for entry in entries if entry.tied is None]
    quantized = [entry for entry in own if entry.encoding != "raw"]
    total = sum(entry.size for entry in own)
    layers: dict[str, list[Entry]] = {}
    for entry in entries:
        layers.setdefault(entry.name.rpartition(".")[0], []).append(entry)
    return Summary(
        layers=tuple(_layer_size(name, held, total) for name, held in layers.items()),
        values=sum(entry.numel for entry in own),
        bytes=total,
        float32_bytes=sum(_float32_bytes(entry) for entry in own),
        file_bytes=file_bytes,
        quantized_weights=sum(entry.numel for entry in quantized),
        quantized_bytes=sum(entry.size for entry in quantized),
    )


def _layer_size(name: str, entries: list[Entry], total: int) -> LayerSize:
    largest = max(entries, key=lambda entry: entry.numel)
    bits = ENCODINGS[largest.encoding].bits
    size = sum(entry.size for entry in entries)
    return LayerSize(
        name,
        largest.shape,
        largest.encoding,
        8 * largest.dtype.itemsize if bits is None else bits,
        size,
        size / total if total else 0.0,
    )


def _float32_bytes(entry: Entry) -> int:
    return entry.numel * (4 if entry.dtype.is_floating_point else entry.dtype.itemsize)


def _cells(layer: LayerSize) -> tuple[str, ...]:
    # Names may come from a stranger's file: a terminal obeys what it prints, and one long name
    # would make every row as long.
    name = layer.name if layer.name.isprintable() else ascii(layer.name)
    return (
        name[:_WIDEST] or "(model)",
        "x".join(map(str, layer.shape)) or "scalar",
        f"{layer.bits:g}",
        f"{layer.bytes:,}",
        f"{layer.share:.1%}",
    )
