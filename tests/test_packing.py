"""Packed files: every byte as the format says, every weight back bit for bit."""

# torch leaves backward() and some others untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import packed_reference as reference
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_reference import Holder, binary, blank, contents, draw
from resnet20 import nets
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import Parameter

import dfw_opt
from dfw_opt import (
    PackedFileError,
    ProjectedDFW,
    TernaryDFW,
    load_packed,
    param_groups,
    save_packed,
)
from dfw_opt.packing import layout
from dfw_opt.quantizers.uniform import largest_of_channel, quantize

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYERS: list[Callable[[], nn.Module]] = [
    lambda: nn.Linear(7, 5),
    lambda: nn.Conv1d(3, 5, 3),
    lambda: nn.Conv2d(3, 5, 3),
    lambda: nn.Conv3d(2, 3, 3),
    lambda: nn.ConvTranspose1d(3, 5, 3),
    lambda: nn.ConvTranspose2d(3, 5, 3),
    lambda: nn.ConvTranspose3d(2, 3, 3),
]

PATTERNS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def bits(dtype: torch.dtype, patterns: Sequence[int], *shape: int) -> Tensor:
    """A tensor of these bit patterns."""
    size = dtype.itemsize
    data = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape or (-1,))


def assert_file(path: Path, entries: Sequence[reference.Entry]) -> None:
    """Every byte of the file but how zlib came to its own."""
    data = path.read_bytes()
    magic, version, header_size, size = struct.unpack("<8sIIQ", data[:24])
    assert magic == b"\x89DFW\r\n\x1a\n"
    assert version == 1
    assert size == len(data)
    inflate = zlib.decompressobj()
    header = json.loads(inflate.decompress(data[24 : 24 + header_size]).decode())
    assert inflate.eof
    assert inflate.unused_data == b""
    assert header == [[e.name, e.dtype, list(e.shape), e.encoding] for e in entries]
    position = 24 + header_size
    for entry in entries:
        payload = reference.payload_of(entry)
        assert data[position : position + len(payload)] == payload, entry.name
        position += len(payload)
    assert data[position:] == hashlib.sha256(data[:position]).digest()


def check(model: nn.Module, folder: Path) -> list[str | int]:
    """The file is as it must be, and it and the reference's bring all bits back.

    Returns the encodings.
    """
    before = contents(model)
    entries = reference.entries_of(model)
    saved, written = folder / "saved.dfw", folder / "written.dfw"
    save_packed(model, saved)
    assert contents(model) == before
    assert_file(saved, entries)
    assert reference.read(saved) == entries
    reference.write(written, entries)
    for path in (saved, written):
        other = blank(model)
        assert load_packed(other, path) is other
        assert contents(other) == before
    assert sorted(folder.iterdir()) == [saved, written]
    return [entry.encoding for entry in entries]


# --------------------------------------------------------------------------------------------------
# Layers, shapes, types
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer()).__name__)
def test_layers(layer: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    model = layer().to(dtype)
    weight = model.get_parameter("weight")
    assert check(model, tmp_path) == ["raw", "raw"]
    with torch.no_grad():
        weight.copy_(binary(weight.shape, dtype))
    assert check(model, tmp_path) == ["binary", "raw"]
    with torch.no_grad():
        weight.copy_(draw((0.5, 0, -0.25), weight.shape, dtype))
    assert check(model, tmp_path) == ["ternary", "raw"]


SHAPES = [
    *itertools.product((1, 2, 3, 5, 8, 9, 16, 17), (1, 2, 5, 7, 8, 11)),
    (1, 1, 1),
    (2, 3, 1, 3),
    (1, 1, 5, 1, 2),
    (3, 1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", FLOATS)
def test_shapes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Any number of unused digits in the last byte, rows of one weight, single rows."""
    tensors = {}
    for number, shape in enumerate(SHAPES):
        tensors[f"binary{number}"] = binary(shape, dtype)
        tensors[f"ternary{number}"] = draw((2, 0, -3, 0, 2), shape, dtype, seed=number)
    encodings = check(Holder(**tensors), tmp_path)
    assert {"raw", "binary", "ternary"} <= set(encodings)  # and some happen to be uniform


def test_one_level_and_two(tmp_path: Path) -> None:
    """Zones that are empty: the scale of a side without weights is 0."""
    encodings = check(
        Holder(
            positive=draw((0, 0.5), (9, 3)),
            negative=draw((0, -0.5), (9, 3)),
            zero=torch.zeros(9, 3),
            both=draw((0.5, -0.25), (9, 3)),
        ),
        tmp_path,
    )
    assert encodings == ["ternary"] * 4


def test_digits_by_hand(tmp_path: Path) -> None:
    """One small file of each kind, spelled out."""
    path = tmp_path / "model.dfw"
    weight = torch.tensor([[1.5, -1.5, -1.5, 1.5, 1.5], [-2, 2, 2, 2, -2]])
    save_packed(Holder(weight=weight), path)
    digits = bytes([0b00100110, 0b00000010])
    assert payload(path) == struct.pack("<2f", 1.5, 2) + digits

    weight = torch.tensor([[0, 0.5, -4, 0.5, 0], [0, 0, 0.5, -4, -4], [-4, 0, 0, 0, 0]])
    save_packed(Holder(weight=weight), path)
    digits = bytes([0 + 3 * 1 + 9 * 2 + 27 * 1 + 81 * 0, 9 * 1 + 27 * 2 + 81 * 2, 2])
    assert payload(path) == struct.pack("<2f", 0.5, 4) + digits

    save_packed(Holder(mask=torch.tensor([True, False]), steps=torch.tensor(-2)), path)
    assert payload(path) == b"\x01\x00" + struct.pack("<q", -2)


def header(path: Path) -> list[Any]:
    data = path.read_bytes()
    listed = json.loads(zlib.decompress(data[24 : 24 + struct.unpack("<I", data[12:16])[0]]))
    assert isinstance(listed, list)
    return listed


def payload(path: Path) -> bytes:
    data = path.read_bytes()
    return data[24 + struct.unpack("<I", data[12:16])[0] : -32]


@pytest.mark.parametrize("dtype", FLOATS)
def test_models_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_net().to(dtype)
    optimizer = TernaryDFW(param_groups(model))
    assert check(model, tmp_path).count("ternary") == 2
    del optimizer


OTHER_TYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.uint16,
    torch.int16,
    torch.uint32,
    torch.int32,
    torch.uint64,
    torch.int64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    *([torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", OTHER_TYPES)
def test_buffers_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """Raw, however few values they have."""
    values = torch.tensor([0, 1] * 3, dtype=torch.uint8)
    many = values.bool() if dtype == torch.bool else torch.arange(6 * dtype.itemsize).byte()
    many = many.view(dtype)
    few = values.repeat_interleave(dtype.itemsize).view(dtype)
    encodings = check(Holder(few=few.reshape(2, 3), many=many, one=many[1].clone()), tmp_path)
    assert encodings == ["raw"] * 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """−0.0, infinities, subnormal numbers, NaN of any sign and payload."""
    size = dtype.itemsize
    sign = 1 << (8 * size - 1)
    infinity = reference.INFINITY[str(dtype).removeprefix("torch.")]
    patterns = [0, 1, infinity - 1, infinity, infinity + 1, infinity | infinity >> 1, sign - 1]
    patterns += [sign | pattern for pattern in patterns]
    mixed = bits(dtype, patterns * 10, 10, 14)
    # A row of ± one pattern for each that is not NaN.
    numbers = [pattern for pattern in patterns if pattern & ~sign <= infinity]
    rows = [pattern ^ (sign * (column % 3 == 0)) for pattern in numbers for column in range(20)]
    infinite = [(0, infinity, sign | infinity)[number % 3] for number in range(30)]
    model = Holder(
        mixed=mixed,
        vector=bits(dtype, patterns),
        rows=bits(dtype, rows, 8, 20),
        infinite=bits(dtype, infinite, 3, 10),
    )
    assert check(model, tmp_path) == ["raw", "raw", "binary", "ternary"]


def test_empty_and_zero_dimensional(tmp_path: Path) -> None:
    model = Holder(
        empty=Parameter(torch.zeros(0, 3)),
        also=torch.zeros(3, 0),
        vector=torch.zeros(0, dtype=torch.int64),
        scalar=torch.tensor(2.5),
        steps=torch.tensor(7),
        flag=torch.tensor(True),
        last=torch.zeros(2, 0, 2),
    )
    assert check(model, tmp_path) == ["raw"] * 7


def test_a_model_without_tensors(tmp_path: Path) -> None:
    assert check(nn.ReLU(), tmp_path) == []


def test_non_persistent_buffers_are_left_out(tmp_path: Path) -> None:
    model = Holder(weight=binary((3, 9)))
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    path = tmp_path / "model.dfw"
    save_packed(model, path)
    assert [entry.name for entry in reference.read(path)] == ["weight"]
    other = Holder(weight=torch.zeros(3, 9))
    other.register_buffer("scratch", torch.zeros(3), persistent=False)
    load_packed(other, path)
    assert contents(other) == contents(model)
    assert torch.equal(other.get_buffer("scratch"), torch.zeros(3))


def test_layouts_in_memory(tmp_path: Path) -> None:
    """Row-major in the file whatever the strides, which loading leaves as they are."""
    square = draw((1, -1, 0.5, 0.25), (6, 6))
    model = Holder(
        channels_last=Parameter(binary((4, 3, 3, 3)).to(memory_format=torch.channels_last)),
        ternary_last=Parameter(
            draw((1, 0, -2), (4, 3, 3, 3)).to(memory_format=torch.channels_last)
        ),
        last_3d=binary((2, 3, 2, 2, 3)).to(memory_format=torch.channels_last_3d),
        transposed=Parameter(binary((5, 9)).t()),
        binary_transposed=Parameter(binary((5, 9)).t().contiguous().t()),
        square=square,
        turned=square.t(),
        slice=draw((1, 0, -2), (8, 30))[::2, 3:28:3],
        reversed=torch.arange(12).reshape(3, 4).flip(0)[:, 1:3],
        permuted=binary((3, 4, 5)).permute(2, 0, 1),
    )
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    encodings = dict(zip(strides, check(model, tmp_path), strict=True))
    binaries = {"channels_last", "last_3d", "binary_transposed"}
    ternaries = {"ternary_last", "slice"}
    assert {name for name, encoding in encodings.items() if encoding == "binary"} == binaries
    assert {name for name, encoding in encodings.items() if encoding == "ternary"} == ternaries
    load_packed(model, tmp_path / "saved.dfw")
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides


def test_loads_into_another_layout(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3)
    path = tmp_path / "model.dfw"
    save_packed(model, path)
    other = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    load_packed(other, path)
    assert contents(other) == contents(model)


# --------------------------------------------------------------------------------------------------
# Which encoding
# --------------------------------------------------------------------------------------------------


def ulp(weight: Tensor, index: int = 5, pattern: int = 1) -> Tensor:
    """With one weight whose bits differ."""
    changed = weight.clone()
    changed.view(-1).view(PATTERNS[weight.dtype])[index] ^= pattern
    return changed


@pytest.mark.parametrize("dtype", FLOATS)
class TestNearMisses:
    """One weight away from a cheaper encoding. None is rounded to it."""

    def test_one_bit_in_a_binary_row(self, dtype: torch.dtype, tmp_path: Path) -> None:
        weight = binary((3, 20), dtype)
        assert check(Holder(weight=weight), tmp_path) == ["binary"]
        assert check(Holder(weight=ulp(weight)), tmp_path) == ["raw"]
        assert check(Holder(weight=ulp(weight, 59)), tmp_path) == ["raw"]

    def test_one_bit_among_ternary(self, dtype: torch.dtype, tmp_path: Path) -> None:
        weight = draw((1, 0, -0.5), (3, 20), dtype)
        assert check(Holder(weight=weight), tmp_path) == ["ternary"]
        for level in (1, 0, -0.5):
            index = int((weight.view(-1) == level).nonzero()[-1])
            assert check(Holder(weight=ulp(weight, index)), tmp_path) == ["raw"]

    def test_two_scales_of_one_sign(self, dtype: torch.dtype, tmp_path: Path) -> None:
        for levels in ((1, 0, 0.5), (-1, 0, -0.5), (1, 0, -1, -0.5), (1, 2, 0, -1)):
            assert check(Holder(weight=draw(levels, (3, 20), dtype)), tmp_path) == ["raw"]

    def test_negative_zero_among_ternary(self, dtype: torch.dtype, tmp_path: Path) -> None:
        weight = draw((1, 0, -0.5), (3, 20), dtype)
        weight.view(-1)[int((weight.view(-1) == 0).nonzero()[3])] = -0.0
        assert check(Holder(weight=weight), tmp_path) == ["raw"]

    def test_negative_zero_among_zeros(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Binary: the digit is the sign bit."""
        weight = torch.zeros(3, 40, dtype=dtype)
        assert check(Holder(weight=weight), tmp_path) == ["binary"]
        weight[1, 2] = -0.0
        assert check(Holder(weight=weight), tmp_path) == ["binary"]

    def test_a_zero_in_a_binary_row(self, dtype: torch.dtype, tmp_path: Path) -> None:
        weight = binary((3, 20), dtype)
        weight[2, 7] = 0
        expected = "uniform2" if dtype in (torch.float32, torch.float64) else "raw"
        assert check(Holder(weight=weight), tmp_path) == [expected]

    def test_nan_in_a_row(self, dtype: torch.dtype, tmp_path: Path) -> None:
        for weight in (binary((3, 20), dtype), draw((1, 0, -0.5), (3, 20), dtype)):
            weight[1, 4] = math.nan
            assert check(Holder(weight=weight), tmp_path) == ["raw"]

    def test_a_row_of_nan(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Not even of one and the same: arithmetic need not keep its bits."""
        weight = binary((3, 20), dtype)
        weight[1] = math.nan
        assert check(Holder(weight=weight), tmp_path) == ["raw"]
        assert check(Holder(weight=-weight), tmp_path) == ["raw"]

    def test_vectors(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """One dimension is never quantized, however few values there are."""
        model = Holder(ones=torch.ones(100, dtype=dtype), signs=draw((1, -1), (100,), dtype))
        assert check(model, tmp_path) == ["raw", "raw"]


@pytest.mark.parametrize(
    ("rows", "columns", "encoding"),
    [
        (1, 1, "raw"),  # 5 bytes binary, 9 ternary
        (2, 1, "raw"),  # 9, 9
        (3, 1, "ternary"),  # 13, 9
        (1, 2, "binary"),  # 5, 9
        (2, 2, "binary"),  # 9, 9: the first of the two
        (2, 6, "binary"),  # 10, 11
        (3, 20, "binary"),  # 20, 20
        (4, 8, "ternary"),  # 20, 15
    ],
)
def test_fewest_bytes(rows: int, columns: int, encoding: str, tmp_path: Path) -> None:
    weight = draw((1, -1), (rows, columns))
    sizes = {
        "binary": 4 * rows + -(-rows * columns // 8),
        "ternary": 8 + -(-rows * columns // 5),
        "raw": 4 * rows * columns,
    }
    chosen = check(Holder(weight=weight), tmp_path)
    assert len(payload(tmp_path / "saved.dfw")) == min(sizes.values())
    assert chosen == [encoding]


def test_raw_if_none_is_smaller(tmp_path: Path) -> None:
    """A scale for each weight, and the digits besides."""
    assert check(Holder(weight=binary((200, 1))), tmp_path) == ["raw"]
    few = draw((1, 0, -2), (1, 2), torch.bfloat16)
    assert check(Holder(weight=few), tmp_path) == ["raw"]


@pytest.mark.parametrize("shape", [(2, 700_001), (1, 1_400_003), (350_001, 4), (4, 175_000, 2)])
def test_large_weights(shape: tuple[int, ...], tmp_path: Path) -> None:
    """More than is written or read at once; digits by numpy, as the reference takes its time."""
    path, number = tmp_path / "model.dfw", math.prod(shape)
    signs = draw((1, 1, -1), shape)
    weight = signs * torch.arange(1.0, shape[0] + 1).reshape([-1] + [1] * (len(shape) - 1))
    zones = draw((0, 0.5, -2, 0.5), shape).numpy().reshape(-1)
    model = Holder(binary=weight, ternary=draw((0, 0.5, -2, 0.5), shape))
    save_packed(model, path)
    assert [entry[3] for entry in header(path)] == ["binary", "ternary"]

    digits = np.select([zones > 0, zones < 0], [1, 2]).astype(np.uint8)
    fives = np.append(digits, np.zeros(-number % 5, np.uint8)).reshape(-1, 5)
    expected = [
        np.arange(1, shape[0] + 1, dtype="<f4").tobytes(),
        np.packbits(signs.numpy().reshape(-1) < 0, bitorder="little").tobytes(),
        struct.pack("<2f", 0.5, 2),
        (fives @ np.array([1, 3, 9, 27, 81])).astype(np.uint8).tobytes(),
    ]
    assert payload(path) == b"".join(expected)
    assert contents(load_packed(blank(model), path)) == contents(model)

    weight.view(-1)[-1] *= 1.3
    model.get_buffer("ternary").view(-1)[-1] = -0.0
    save_packed(model, path)
    assert [entry[3] for entry in header(path)] == ["raw", "raw"]
    assert contents(load_packed(blank(model), path)) == contents(model)


# --------------------------------------------------------------------------------------------------
# Weights of a few bits
# --------------------------------------------------------------------------------------------------


def uniform(bits: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights as the quantizer makes them, each row with another scale and its largest."""
    latent = torch.rand(shape, generator=torch.Generator().manual_seed(bits), dtype=dtype) * 2 - 1
    rows = torch.arange(1, shape[0] + 1).reshape([-1] + [1] * (len(shape) - 1)) / shape[0]
    latent = latent * rows.to(dtype)
    unit = torch.tensor(0.37, dtype=dtype)
    return quantize(latent, unit, largest_of_channel(latent), bits)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
class TestUniform:
    @pytest.mark.parametrize("shape", [(5, 400), (3, 4, 9, 9), (2, 1001)])
    def test_every_bit_comes_back(
        self, bits: int, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
    ) -> None:
        weight = uniform(bits, shape, dtype)
        assert check(Holder(weight=weight), tmp_path) == [f"uniform{bits}"]
        scales = shape[0] * dtype.itemsize
        packed = payload(tmp_path / "saved.dfw")
        assert len(packed) == scales + -(-math.prod(shape) * bits // 8)

    def test_near_misses(self, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
        weight = uniform(bits, (4, 200), dtype)
        index = int(weight.view(-1).abs().argmax())
        for changed in (ulp(weight, index), ulp(weight, int((weight != 0).view(-1).nonzero()[7]))):
            assert check(Holder(weight=changed), tmp_path) == ["raw"]
        negative_zero = weight.clone()
        negative_zero[2, int(weight[2].abs().argmin())] = -0.0
        assert check(Holder(weight=negative_zero), tmp_path) == ["raw"]
        for special in (math.nan, math.inf):
            changed = weight.clone()
            changed[1, 5] = special
            assert check(Holder(weight=changed), tmp_path) == ["raw"]

    def test_zeros_and_tiny_rows(self, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
        """A row of zeros has the scale 0; levels that some machines flush to zero stay raw."""
        weight = uniform(bits, (4, 200), dtype)
        weight[1] = 0
        assert check(Holder(weight=weight), tmp_path) == [f"uniform{bits}"]
        q = 2 ** (bits - 1) - 1
        steps = torch.arange(-q, q + 1).to(dtype) / q
        least = torch.finfo(dtype).tiny * (q + 1)
        for largest, encoding in ((least, f"uniform{bits}"), (least / 2, "raw")):
            row = (largest * steps).repeat(40)
            row[row == 0] = 0.0
            weight = torch.stack([row, 2 * row])  # of one row alone, 2 bits would be ternary
            assert check(Holder(weight=weight), tmp_path) == [encoding]

    def test_narrow_weights_stay_raw(self, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
        """They have been rounded once more, which the formula does not repeat."""
        narrow = torch.float16 if dtype == torch.float32 else torch.bfloat16
        weight = uniform(bits, (4, 200)).to(narrow)
        assert check(Holder(weight=weight), tmp_path) == ["raw"]


def test_uniform_by_hand(tmp_path: Path) -> None:
    """3 bits: q = 3, a number is k + 3; the first is in the lowest bits of the first byte."""
    path = tmp_path / "model.dfw"
    thirds = torch.tensor([-3, -2, -1, 0, 1, 2, 3, 3, 3, 0]) / 3
    weight = torch.stack([1.5 * thirds, 0.7 * thirds.flip(0)])
    save_packed(Holder(weight=weight), path)
    assert header(path)[0][3] == "uniform3"
    numbers = [0, 1, 2, 3, 4, 5, 6, 6, 6, 3, 3, 6, 6, 6, 5, 4, 3, 2, 1, 0]
    stream = sum(number << 3 * place for place, number in enumerate(numbers))
    assert payload(path) == struct.pack("<2f", 1.5, 0.7) + stream.to_bytes(8, "little")


def test_large_uniform_weights(tmp_path: Path) -> None:
    """More than is written or read at once, with a block that ends within a row."""
    path = tmp_path / "model.dfw"
    model = Holder(weight=uniform(5, (3, 900_001)), other=uniform(8, (350_001, 4)))
    save_packed(model, path)
    assert [entry[3] for entry in header(path)] == ["uniform5", "uniform8"]
    assert contents(load_packed(blank(model), path)) == contents(model)


# --------------------------------------------------------------------------------------------------
# Tied weights
# --------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 20)
        self.norm = nn.LayerNorm(20)
        self.out = nn.Linear(20, 6)
        if tied:
            self.out.weight = self.embed.weight


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    model = Pair(tied=True)
    with torch.no_grad():
        model.embed.weight.copy_(binary((6, 20)))
    assert check(model, tmp_path) == ["binary", "raw", "raw", 0, "raw"]
    path = tmp_path / "saved.dfw"
    tied = Pair(tied=True)
    load_packed(tied, path)
    assert contents(tied) == contents(model)
    assert tied.out.weight is tied.embed.weight
    untied = Pair(tied=False)
    load_packed(untied, path)
    assert contents(untied) == contents(model)
    assert untied.out.weight.data_ptr() != untied.embed.weight.data_ptr()


def test_an_untied_file_of_equal_weights_loads_into_a_tied_model(tmp_path: Path) -> None:
    model = Pair(tied=False)
    with torch.no_grad():
        model.out.weight.copy_(model.embed.weight)
    path = tmp_path / "model.dfw"
    save_packed(model, path)
    assert [entry.encoding for entry in reference.read(path)] == ["raw"] * 5
    tied = Pair(tied=True)
    load_packed(tied, path)
    assert contents(tied) == contents(model)


def test_tied_three_times(tmp_path: Path) -> None:
    """Each points to the first, not one to the next."""
    weight, bias = Parameter(draw((1, 0, -2), (4, 9))), Parameter(torch.randn(3))
    model = Holder(a=weight, b=bias, c=weight, d=bias, e=weight)
    assert check(model, tmp_path) == ["ternary", "raw", 0, 1, 0]


def test_modules_used_twice(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    assert check(nn.Sequential(layer, nn.ReLU(), layer), tmp_path) == ["raw", "raw", 0, 1]


def test_only_the_whole_of_the_memory_is_tied(tmp_path: Path) -> None:
    """Other shape, type, strides or start: saved on their own, though memory is shared."""
    memory = draw((1, -1, 0.5, 0.25), (36,))
    model = Holder(
        square=memory.view(6, 6),
        turned=memory.view(6, 6).t(),
        flat=memory.view(36),
        first=memory[:9],
        second=memory[9:18],
        integers=memory.view(torch.int32).view(6, 6),
    )
    assert check(model, tmp_path) == ["raw"] * 6


def test_tied_parameters_of_one_memory(tmp_path: Path) -> None:
    """Two parameters, one memory."""
    first = Parameter(binary((3, 9)))
    model = Holder(first=first, second=Parameter(first.data), third=first.detach())
    assert model.get_parameter("first") is not model.get_parameter("second")
    assert check(model, tmp_path) == ["binary", 0, 0]


def test_equal_weights_are_not_tied(tmp_path: Path) -> None:
    model = Holder(first=binary((3, 9)), second=binary((3, 9)))
    assert check(model, tmp_path) == ["binary", "binary"]


# --------------------------------------------------------------------------------------------------
# Trained nets
# --------------------------------------------------------------------------------------------------


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 7, 3, stride=2, bias=False),
            nn.BatchNorm2d(7),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(28, 11),
            nn.ReLU(),
            nn.Linear(11, 3),
        )


def trained(kind: str, seed: int = 0) -> tuple[nn.Sequential, Any]:
    model = small_net(seed)
    optimizer: Any = {
        "binary": lambda: ProjectedDFW(param_groups(model), lr=0.1, momentum=0.5),
        "ternary": lambda: TernaryDFW(param_groups(model), lr=0.1, momentum=0.5),
    }[kind]()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        batch = torch.randn(16, 1, 8, 8, generator=generator)
        labels = (batch.mean((1, 2, 3)) > 0).long()
        loss = nn.functional.cross_entropy(model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
    return model, optimizer


def images() -> torch.Tensor:
    return torch.linspace(-2, 2, 5 * 64).reshape(5, 1, 8, 8)


def logits(model: nn.Module) -> bytes:
    with torch.no_grad():
        return reference.content_of(model.eval()(images()))


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_trained_nets(kind: str, tmp_path: Path) -> None:
    model, _ = trained(kind)
    encodings = dict(zip(model.state_dict(), check(model, tmp_path), strict=True))
    quantized = {name for name, encoding in encodings.items() if encoding == kind}
    assert quantized == {"3.weight", "7.weight"}
    assert set(encodings.values()) == {kind, "raw"}
    fresh = small_net(seed=1)
    assert logits(fresh) != logits(model)
    load_packed(fresh, tmp_path / "saved.dfw")
    assert logits(fresh) == logits(model)


@pytest.mark.parametrize("kind", ["binary", "ternary"])
def test_saving_takes_no_part_in_training(kind: str, tmp_path: Path) -> None:
    """A step after saving is the step without."""
    outcomes = []
    for save in (False, True):
        model, optimizer = trained(kind)
        if save:
            save_packed(model, tmp_path / "model.dfw")
        loss = model(torch.linspace(-1, 1, 256).reshape(4, 1, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        outcomes.append(contents(model))
    assert outcomes[0] == outcomes[1]


def test_a_fresh_process_gives_the_same_logits(tmp_path: Path) -> None:
    """One that knows nothing but the model's layers."""
    model, _ = trained("binary")
    path = tmp_path / "model.dfw"
    save_packed(model, path)
    script = f"""
import sys, torch, dfw_opt
from torch import nn
torch.set_num_threads(1)
{inspect.getsource(small_net)}
{inspect.getsource(images)}
model = dfw_opt.load_packed(small_net(seed=1), sys.argv[1]).eval()
with torch.no_grad():
    print(model(images()).numpy().tobytes().hex())
"""
    assert run(script, path).stdout.strip() == logits(model).hex()


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Python in a new process that finds the package where this one did."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(dfw_opt.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
        **options,
    )


def test_loading_is_in_place(tmp_path: Path) -> None:
    """The parameters stay the same objects, so that an optimizer still holds them."""
    path = tmp_path / "model.dfw"
    save_packed(small_net(seed=1), path)
    model = small_net()
    model[0].requires_grad_(False)
    before = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    load_packed(model, path)
    after = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert after == before
    assert all(p.is_leaf and p.grad is None for p in model.parameters())
    assert model.training


def test_the_loaded_net_trains_on(tmp_path: Path) -> None:
    model, _ = trained("ternary")
    path = tmp_path / "model.dfw"
    save_packed(model, path)
    model = small_net(seed=1)
    load_packed(model, path)
    optimizer = TernaryDFW(param_groups(model))
    loss = model(torch.ones(4, 1, 8, 8)).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
    assert contents(model) != reference.fit(reference.read(path), model)


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    files = [tmp_path / "a.dfw", tmp_path / "b.dfw"]
    for path in files:
        save_packed(trained("binary")[0], path)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("net", "most"), [("xnor", 54_000), ("ternary", 88_000)])
def test_size_of_resnet20(net: str, most: int, tmp_path: Path) -> None:
    """Against more than a megabyte of ``torch.save``."""
    model = nets.build(net, "bireal", 0)
    optimizer = (ProjectedDFW if net == "xnor" else TernaryDFW)(param_groups(model))
    path = tmp_path / "model.dfw"
    save_packed(model, path)
    usual = io.BytesIO()
    torch.save(model.state_dict(), usual)
    assert path.stat().st_size <= most
    assert usual.tell() > 1_000_000
    entries = reference.entries_of(model)
    assert_file(path, entries)
    kind = "binary" if net == "xnor" else "ternary"
    assert [entry.encoding for entry in entries].count(kind) == 18
    other = nets.build(net, "bireal", 1)
    assert contents(load_packed(other, path)) == contents(model)
    del optimizer


# --------------------------------------------------------------------------------------------------
# Settings of torch that must not matter
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> Holder:
    return Holder(
        binary=binary((5, 9)),
        ternary=Parameter(draw((1, 0, -2), (4, 9))),
        turned=Parameter(draw((1, 0, -2), (9, 4)).t()),
        uniform=uniform(4, (4, 90)),
        raw=torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    )


def test_where_numbers_below_the_normal_ones_are_taken_for_zero(tmp_path: Path) -> None:
    """Bits are compared and kept, not what arithmetic makes of them."""
    tiny = 1e-40
    model = Holder(
        binary=torch.full((2, 20), tiny) * draw((1, -1), (2, 20)),
        two_scales=torch.full((2, 20), tiny) * draw((1, 2), (2, 20)),
        among_ternary=draw((1, 0, tiny, -1), (2, 20)),
        ternary=draw((tiny, 0, -tiny), (2, 20)),
        one_side=draw((1, 0, -tiny), (2, 20)),
        narrow=draw((1e-7, 0, 2e-7, -1), (2, 20), torch.float16),
    )
    before, other = contents(model), blank(model)
    path = tmp_path / "model.dfw"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        save_packed(model, path)
        load_packed(other, path)
    finally:
        torch.set_flush_denormal(False)
    assert contents(other) == before
    assert_file(path, reference.entries_of(model))


def test_default_device(mixed: Holder, tmp_path: Path) -> None:
    """Where new tensors go by default is not where the model is."""
    path, other = tmp_path / "model.dfw", blank(mixed)
    with torch.device("meta"):
        save_packed(mixed, path)
        load_packed(other, path)
    assert_file(path, reference.entries_of(mixed))
    assert contents(other) == contents(mixed)


def test_default_dtype(mixed: Holder, tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            check(mixed, tmp_path)
        finally:
            torch.set_default_dtype(usual)


def test_modes(mixed: Holder, tmp_path: Path) -> None:
    with torch.inference_mode():
        check(mixed, tmp_path)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        check(mixed, tmp_path)
    torch.use_deterministic_algorithms(True)
    try:
        check(mixed, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)


# --------------------------------------------------------------------------------------------------
# Anything
# --------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of few levels or of many, of any float type and shape, and sometimes one weight off."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 9), st.integers(1, 24)),
            st.lists(st.integers(0, 4), max_size=5).map(tuple),
        )
    )
    size = dtype.itemsize
    sign = 1 << (8 * size - 1)
    infinity = reference.INFINITY[str(dtype).removeprefix("torch.")]
    pattern = st.one_of(
        st.integers(0, 2 * sign - 1),
        st.sampled_from([0, sign, 1, infinity, infinity | sign, infinity + 1, 2 * sign - 1]),
    )
    number = math.prod(shape)
    style = draw(st.sampled_from(["levels", "rows", "ternary"]))
    if style == "levels":
        levels = draw(st.lists(pattern, min_size=1, max_size=4))
        patterns = [
            draw(st.sampled_from(levels)) if number < 40 else levels[i % len(levels)]
            for i in range(number)
        ]
    elif style == "ternary":
        levels = [0, draw(pattern) & ~sign, draw(pattern) | sign]
        seed = draw(st.integers(0, 2**16))
        choice = torch.randint(3, (number,), generator=torch.Generator().manual_seed(seed))
        patterns = [levels[i] for i in choice.tolist()]
    else:
        length = number // shape[0] if shape and shape[0] else 1
        scales = draw(st.lists(pattern, min_size=1, max_size=9))
        signs = draw(st.integers(0, 2**number - 1 if number < 300 else 2**300))
        patterns = [
            scales[i // length % len(scales)] ^ (sign * (signs >> i & 1)) for i in range(number)
        ]
    if number and draw(st.booleans()):
        patterns[draw(st.integers(0, number - 1))] ^= draw(st.sampled_from([0, 1, sign]))
    tensor = torch.zeros(shape, dtype=dtype)
    if number:
        tensor = bits(dtype, patterns).reshape(shape)
    if len(shape) == 2 and draw(st.booleans()):
        tensor = tensor.t().contiguous().t()
    return tensor


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(tensors(), min_size=1, max_size=3), tie=st.booleans())
def test_anything_comes_back(values: list[Tensor], tie: bool, tmp_path: Path) -> None:
    if tie:
        values.append(values[0])
    check(Holder(**{f"t{number}": value for number, value in enumerate(values)}), tmp_path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(OTHER_TYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_any_buffer_comes_back(
    dtype: torch.dtype, shape: list[int], seed: int, tmp_path: Path
) -> None:
    size, generator = dtype.itemsize, torch.Generator().manual_seed(seed)
    data = torch.randint(256, (math.prod(shape) * size,), generator=generator).to(torch.uint8)
    data = data % 2 == 0 if dtype == torch.bool else data
    tensor = torch.zeros(shape, dtype=dtype)
    if data.numel():
        tensor.copy_(data.view(dtype).reshape(shape))
    assert check(Holder(tensor=tensor), tmp_path) == ["raw"]


# --------------------------------------------------------------------------------------------------
# What cannot be saved, and where
# --------------------------------------------------------------------------------------------------


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError("not asked for")


class TestRefused:
    """An error that names the entry, and no file."""

    def refuse(self, model: nn.Module, match: str, folder: Path) -> None:
        with pytest.raises(ValueError, match=match):
            save_packed(model, folder / "model.dfw")
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("model", [None, "model.dfw", {}, nn.Linear, torch.zeros(3)])
    def test_not_a_module(self, model: Any, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="Module"):
            save_packed(model, tmp_path / "model.dfw")
        assert list(tmp_path.iterdir()) == []

    def test_swapped_arguments(self, tmp_path: Path) -> None:
        path = tmp_path / "model.dfw"
        with pytest.raises(TypeError, match=r"Module|PathLike.*Linear"):
            save_packed(path, nn.Linear(2, 2))  # type: ignore[arg-type]

    def test_a_state_dict(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="Module"):
            save_packed(nn.Linear(2, 2).state_dict(), tmp_path / "model.dfw")  # type: ignore[arg-type]

    def test_meta(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        self.refuse(model, r"1\.weight.*meta", tmp_path)

    def test_lazy(self, tmp_path: Path) -> None:
        self.refuse(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), r"1\.weight", tmp_path)

    def test_extra_state(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(2, 2), WithExtraState(2, 2))
        self.refuse(model, r"1\._extra_state", tmp_path)

    @pytest.mark.filterwarnings("ignore:Sparse CSR")
    def test_sparse(self, tmp_path: Path) -> None:
        for kind in (torch.sparse_coo, torch.sparse_csr):
            sparse = torch.eye(3).to_sparse(layout=kind)
            self.refuse(Holder(good=torch.ones(2), bad=sparse), "bad.*sparse", tmp_path)

    @pytest.mark.parametrize("view", ["conjugate", "negative"])
    def test_views_that_torch_computes(self, view: str, tmp_path: Path) -> None:
        """What they are is not what is in memory."""
        values = torch.ones(3, dtype=torch.complex64).conj()
        assert values.is_conj()
        assert values.imag.is_neg()
        values = values if view == "conjugate" else values.imag
        self.refuse(Holder(good=torch.ones(2), bad=values), "bad", tmp_path)
        check(Holder(good=values.resolve_conj().resolve_neg()), tmp_path)

    def test_expanded(self, tmp_path: Path) -> None:
        """Nothing can be loaded into it: its elements share one place."""
        self.refuse(Holder(good=torch.ones(2), bad=torch.ones(1).expand(3)), "bad", tmp_path)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_quantized(self, tmp_path: Path) -> None:
        values = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        self.refuse(Holder(good=torch.ones(2), bad=values), "bad", tmp_path)

    def test_sharded(self, tmp_path: Path) -> None:
        folder = tmp_path / "empty"
        folder.mkdir()
        store = FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            sharded = Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
            self.refuse(Holder(good=torch.ones(2), bad=sharded), "bad", folder)
        finally:
            torch.distributed.destroy_process_group()

    def test_a_hook_that_makes_a_tensor(self, tmp_path: Path) -> None:
        """It would be written, and nobody could say where to load it."""

        def add(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
            state[f"{prefix}mean"] = module.get_parameter("weight").detach().mean()

        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].register_state_dict_post_hook(add)
        self.refuse(model, r"1\.mean", tmp_path)

    def test_a_hook_that_replaces_a_tensor(self, tmp_path: Path) -> None:
        """The name is right, but what is loaded into it would be lost."""

        def halve(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].half()

        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].register_state_dict_post_hook(halve)
        self.refuse(model, r"1\.weight", tmp_path)


def test_the_old_file_survives_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "model.dfw"
    save_packed(small_net(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="weight"):
        save_packed(nn.Linear(2, 2, device="meta"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class TestPlaces:
    def test_str_and_path(self, tmp_path: Path) -> None:
        model = small_net()
        for path in (tmp_path / "path.dfw", str(tmp_path / "str.dfw")):
            save_packed(model, path)
            assert contents(load_packed(small_net(seed=1), path)) == contents(model)
        assert (tmp_path / "path.dfw").read_bytes() == (tmp_path / "str.dfw").read_bytes()

    def test_the_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        save_packed(small_net(), "model.dfw")
        load_packed(small_net(), "model.dfw")
        assert os.listdir() == ["model.dfw"]

    @pytest.mark.parametrize("name", ["no suffix", "ünïcödé.dfw", ".hidden", "a'b\"c.dfw"])
    def test_names(self, name: str, tmp_path: Path) -> None:
        save_packed(small_net(), tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_replaces_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.dfw"
        path.write_bytes(b"something else, and longer than the model" * 1000)
        check_path = contents(small_net(seed=1))
        save_packed(small_net(seed=1), path)
        assert contents(load_packed(small_net(), path)) == check_path

    def test_a_link_stays_a_link(self, tmp_path: Path) -> None:
        """As with any program that writes to it: the file that it names is the new one."""
        (tmp_path / "far").mkdir()
        target, link = tmp_path / "far" / "target.dfw", tmp_path / "link.dfw"
        link.symlink_to(target)
        for seed, existing in enumerate((False, True)):
            assert target.exists() == existing
            save_packed(small_net(seed), link)
            assert link.is_symlink()
            for path in (link, target):
                other = load_packed(small_net(seed=7), path)
                assert contents(other) == contents(small_net(seed))
        assert list(target.parent.iterdir()) == [target]
        assert sorted(tmp_path.iterdir()) == [target.parent, link]

    @pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
    def test_others_may_read_it_as_any_file(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        save_packed(small_net(), tmp_path / "model.dfw")
        modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "model.dfw")]
        assert modes[0] == modes[1]

    @pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
    def test_who_might_read_the_old_one_may_read_the_new_one(self, tmp_path: Path) -> None:
        path = tmp_path / "model.dfw"
        for mode in (0o600, 0o664):
            path.touch()
            path.chmod(mode)
            save_packed(small_net(), path)
            assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
    def test_a_pipe_stays_a_pipe(self, tmp_path: Path) -> None:
        path = tmp_path / "pipe"
        os.mkfifo(path)
        with pytest.raises(OSError, match=r"cannot write: it is a device, a pipe.*pipe"):
            save_packed(small_net(), path)
        assert path.is_fifo()
        assert list(tmp_path.iterdir()) == [path]

    def test_on_the_disk_before_it_is_in_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or a power cut could leave the name of the old file with half of the new one."""
        path = tmp_path / "model.dfw"
        seen: list[int | str] = []
        fsync, replace = os.fsync, os.replace

        def note_fsync(descriptor: int) -> None:
            seen.append(os.fstat(descriptor).st_size)
            fsync(descriptor)

        def note_replace(source: Any, target: Any) -> None:
            seen.append("moved")
            assert Path(source).parent == tmp_path
            assert re.fullmatch(r"\.model\.dfw\..+\.part", Path(source).name)
            replace(source, target)

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        save_packed(small_net(), path)
        assert seen[:2] == [path.stat().st_size, "moved"]

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "missing" / "model.dfw"
        with pytest.raises(OSError, match="missing") as caught:
            save_packed(small_net(), path)
        assert str(path) in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_file_for_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("text")
        path = tmp_path / "file" / "model.dfw"
        with pytest.raises(OSError, match="file") as caught:
            save_packed(small_net(), path)
        assert str(path) in str(caught.value)
        assert (tmp_path / "file").read_text() == "text"

    def test_a_folder_for_a_file(self, tmp_path: Path) -> None:
        """Known only when all is written and to be moved into place."""
        path = tmp_path / "model.dfw"
        path.mkdir()
        (path / "inside").touch()
        with pytest.raises(OSError, match=r"model\.dfw"):
            save_packed(small_net(), path)
        assert list(tmp_path.iterdir()) == [path]
        assert [inner.name for inner in path.iterdir()] == ["inside"]

    @pytest.mark.skipif(sys.platform == "win32", reason="has no limit on the size of a file")
    def test_a_write_that_fails_in_the_middle(self, tmp_path: Path) -> None:
        path = tmp_path / "model.dfw"
        save_packed(small_net(), path)
        before = path.read_bytes()
        script = """
import resource, sys, torch
from dfw_opt import save_packed
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    save_packed(torch.nn.Linear(200, 200), sys.argv[1])
except OSError as error:
    print(error)
"""
        message = run(script, path).stdout
        assert str(path) in message
        assert "unchanged" in message
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    model = small_net()
    before = contents(model)
    with pytest.raises(FileNotFoundError, match="missing"):
        load_packed(model, tmp_path / "missing.dfw")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        load_packed(model, tmp_path / "folder")
    assert contents(model) == before


@pytest.mark.parametrize("model", [None, {}, nn.Linear, torch.zeros(3)])
def test_loading_into_no_module(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.dfw"
    save_packed(small_net(), path)
    with pytest.raises(TypeError, match="Module"):
        load_packed(model, path)


@pytest.mark.parametrize("kind", [str, Path])
def test_loading_with_swapped_arguments(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "model.dfw"
    save_packed(small_net(), path)
    with pytest.raises(TypeError, match=r"Module|PathLike.*Sequential"):
        load_packed(kind(path), small_net())  # type: ignore[arg-type]


def test_more_names_than_a_header_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_HEADER", 20)
    with pytest.raises(ValueError, match=r"2 tensors, whose names and shapes take \d+ bytes"):
        save_packed(nn.Linear(3, 3), tmp_path / "model.dfw")
    assert not list(tmp_path.iterdir())


def test_a_stored_header_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_packed(nn.Linear(3, 3), tmp_path / "model.dfw")
    monkeypatch.setattr(layout, "MAX_HEADER", 20)
    with pytest.raises(PackedFileError, match=r"a header of \d+ bytes; at most 20 are read"):
        load_packed(nn.Linear(3, 3), tmp_path / "model.dfw")


def test_a_big_endian_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(ValueError, match="little-endian"):
        save_packed(nn.Linear(3, 3), tmp_path / "model.dfw")


def test_same_bytes_in_other_encodings(tmp_path: Path) -> None:
    """The payloads of these two are equal, bytes of a binary and of a ternary tensor."""
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    model = nn.Sequential(first, second)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[-2.0, -2.0], [-1.0, 1.0]]))
        second.weight.copy_(torch.tensor([[2.0, -1.0], [0.0, 0.0]]))
    save_packed(model, tmp_path / "untied")
    second.weight = first.weight
    before = first.weight.detach().clone()
    with pytest.raises(PackedFileError, match="one tensor in the model, but differ in the file"):
        load_packed(model, tmp_path / "untied")
    assert torch.equal(first.weight, before)
