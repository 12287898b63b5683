"""What the tensors of a model are, and how many bytes they take in float and packed."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from dfw_opt.packed import PLACES, Stored, restore, store_model

__all__ = ["Summary", "TensorSize", "summary"]


class TensorSize(NamedTuple):
    """A tensor: "binary", "ternary", "uniform2" to "uniform8", or its dtype; the share of zeros in
    a ternary one; its bytes in the model, and packed (none if it is tied to another one).
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    zeros: float | None
    weights: int
    float_bytes: int
    bytes: int


class Summary(NamedTuple):
    """The tensors of a model; ``str()`` of it is the table."""

    tensors: tuple[TensorSize, ...]

    def total(self, what: str, quantized: bool = False) -> int:
        """The "weights", "float_bytes" or (packed) "bytes" of all tensors or the quantized ones."""
        rows = (row for row in self.tensors if row.encoding in PLACES or not quantized)
        return sum(getattr(row, what) for row in rows)

    def __str__(self) -> str:
        rows = [["tensor", "shape", "kind", "bits", "zeros", "in float", "packed"]]
        rows += [_cells(row) for row in self.tensors if len(row.shape) > 1]
        small = Summary(tuple(row for row in self.tensors if len(row.shape) < 2))
        for name, part in (("vectors, scalars", small), ("quantized", self), ("all", self)):
            sizes = [part.total(of, name == "quantized") for of in ("float_bytes", "bytes")]
            factor = f"{sizes[0] / max(sizes[1], 1):.1f} x smaller"
            rows.append([name, "", factor, "", "", *(f"{size:,}" for size in sizes)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        widths[0] = min(widths[0], 74 - sum(widths[1:]))  # 80 less the spaces between
        line = " ".join(map("{{:{}{}}}".format, "<<<>>>>", widths))
        return "\n".join(line.format(name[-widths[0] :], *cells) for name, *cells in rows)


def summary(model: nn.Module) -> Summary:
    """Prints what each tensor of ``model`` is, and its bytes in float and packed; returns that.

    That is found from the values: a weight that was meant to be binary and is not shows 32 bits. A
    file has some 100 bytes more for each tensor.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: its state dict holds something that cannot be packed.
    """
    print(sizes := of_stored(*store_model(model)))
    return sizes


def of_stored(stored: Mapping[str, Stored], tied: Mapping[str, str]) -> Summary:
    """The sizes of what :func:`~dfw_opt.packed.store_model` made of a model."""
    rows = {}
    for name, (encoding, dtype, shape, data, scale) in stored.items():
        zeros, count = None, math.prod(shape)
        if encoding == "ternary":
            zeros = 1 - int(restore(stored[name]).count_nonzero()) / count
        kind = encoding if encoding in PLACES else str(dtype).removeprefix("torch.")
        sizes = count * dtype.itemsize, data.nbytes + (0 if scale is None else scale.nbytes)
        rows[name] = TensorSize(name, shape, kind, zeros, count, *sizes)
    for name, other in tied.items():
        rows[name] = rows[other]._replace(name=name, weights=0, float_bytes=0, bytes=0)
    return Summary(tuple(rows.values()))


def _cells(row: TensorSize) -> list[str]:
    bits = f"{8 * row.bytes / row.weights:.3g}" if row.weights else "tied"
    zeros = "" if row.zeros is None else f"{row.zeros:.1%}"
    shape = "x".join(map(str, row.shape))[:20]
    name = ascii(row.name)[1:-1]  # a stranger's, and a terminal obeys what it prints
    return [name, shape, row.encoding, bits, zeros, f"{row.float_bytes:,}", f"{row.bytes:,}"]
