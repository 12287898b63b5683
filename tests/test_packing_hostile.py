"""Files that are damaged, or made to do harm: one kind of error, and no bit of the model changes.

A checksum keeps out accidents, not enemies. So most files here have a right one, whatever else is
wrong with them, and the reference reader decides which of them are valid after all.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import packed_reference as reference
import pytest
import torch
from packed_reference import Entry, Holder, Invalid, binary, contents, draw
from torch import Tensor, nn

from dfw_opt import PackedFileError, load_packed, save_packed

Bytes = Callable[[random.Random, bytes], bytes]


def grid(bits: int, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of a few bits, with another scale in each row."""
    q = 2 ** (bits - 1) - 1
    steps = draw(range(-q, q + 1), shape, dtype)
    steps[:, 0] = q
    levels = torch.arange(1, shape[0] + 1, dtype=dtype)[:, None] / 7 * (steps / torch.tensor(q))
    return torch.where(steps == 0, 0.0, levels)


def make(tied: bool) -> Holder:
    """Some of everything, in few bytes."""
    normal = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    model = Holder(
        conv=nn.Parameter(binary((3, 2, 3, 3))),
        tern=nn.Parameter(draw((0.5, 0, -2), (4, 7))),
        narrow=binary((2, 9), torch.float16),
        brain=draw((1, 0, -3, 0), (3, 7), torch.bfloat16),
        wide=binary((2, 11), torch.float64),
        grid=grid(3, (2, 9)),
        fine=grid(5, (3, 5), torch.float64),
        free=nn.Parameter(normal),
        mask=torch.tensor([True, False, True, True, False]),
        steps=torch.tensor(3),
        none=torch.zeros(0, 3),
        pair=torch.complex(torch.ones(2), torch.arange(2.0)),
    )
    for name, source in (("again", model.conv), ("more", model.free)):
        assert isinstance(source, nn.Parameter)
        model.register_parameter(name, source if tied else nn.Parameter(source.detach().clone()))
    return model


ENTRIES = reference.entries_of(make(tied=True))
PAYLOAD = b"".join(reference.payload_of(entry) for entry in ENTRIES)
LISTED = [entry.listed() for entry in ENTRIES]
assert {entry.encoding for entry in ENTRIES} == {
    *("raw", "binary", "ternary", "uniform3", "uniform5", 0, 2)
}


def entry(name: str) -> tuple[int, Entry]:
    return next((number, entry) for number, entry in enumerate(ENTRIES) if entry.name == name)


class Target:
    """A model to load into, whose tensors are all its own, and what it holds before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.model = reference.blank(make(tied=False))
        self.kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.before = contents(self.model)
        self.loaded = self.refused = 0

    def load(self, data: bytes) -> None:
        """The package does with a file what the reference does."""
        # Written over, not emptied first, after which some file systems wait for the disk.
        with self.path.open("r+b") as file:
            file.write(data)
            file.truncate()
        want: dict[str, Any] | None = None
        entries: list[Entry] = []
        try:
            entries = reference.read(self.path)
            want = reference.fit(entries, self.model)
        except Invalid:
            pass
        problem: Exception | None = None
        try:
            load_packed(self.model, self.path)
        except PackedFileError as error:
            problem = error
        if problem is not None:
            assert type(problem) is PackedFileError
            assert want is None, f"valid, but refused: {problem}"
            assert contents(self.model) == self.before
            self.refused += 1
        else:
            assert want is not None, "loaded, but invalid"
            packed = {e.name for e in entries if e.encoding in ("binary", "ternary", 0)}
            assert settled(contents(self.model), packed) == settled(want, packed)
            with torch.no_grad():
                for name, tensor in self.model.state_dict().items():
                    tensor.copy_(self.kept[name])
            self.loaded += 1

    def refuse(self, data: bytes) -> None:
        before = self.refused
        self.load(data)
        assert self.refused == before + 1, "loaded"


def settled(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """With one NaN for all: which one comes of a scale that is NaN, the format does not say."""
    result = dict(values)
    for name in names:
        dtype, shape, content = values[name]
        size, infinity = reference.ITEM_SIZES[dtype], reference.INFINITY[dtype]
        sign = 1 << (8 * size - 1)
        words = [
            sign - 1 if word & ~sign > infinity else word for word in reference.split(content, size)
        ]
        result[name] = (dtype, shape, reference.join(words, size))
    return result


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path / "model.dfw")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What is damaged below: a good file."""
    path = tmp_path_factory.mktemp("good") / "model.dfw"
    save_packed(make(tied=True), path)
    assert reference.read(path) == ENTRIES
    return path.read_bytes()


def test_the_good_file_loads(target: Target, data: bytes) -> None:
    target.load(data)
    target.load(reference.assemble(reference.compress(LISTED), PAYLOAD))
    assert target.loaded == 2


# --------------------------------------------------------------------------------------------------
# Damaged bytes
# --------------------------------------------------------------------------------------------------


def span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + 1 + int(rng.expovariate(1 / 8)))


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 5))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 3))):
        changed[rng.randrange(len(data))] = rng.choice((0, 1, 2, 127, 128, 242, 243, 255))
    return bytes(changed)


def replace_range(rng: random.Random, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice((bytes(1), bytes(40), rng.randbytes(rng.randrange(1, 100)), data))


def insert(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(rng.randrange(1, 9)) + data[start:]


def delete_range(rng: random.Random, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:start] + data[end:]


def repeat_range(rng: random.Random, data: bytes) -> bytes:
    start, end = span(rng, data)
    return data[:end] + data[start:]


def swap_ranges(rng: random.Random, data: bytes) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


MUTATIONS: list[Bytes] = [
    flip_bits,
    change_bytes,
    replace_range,
    truncate,
    extend,
    insert,
    delete_range,
    repeat_range,
    swap_ranges,
]


def mutations(data: bytes, number: int, seed: int) -> Iterator[bytes]:
    """Different from the data, one or two changes each."""
    rng = random.Random(seed)
    while number:
        changed = rng.choice(MUTATIONS)(rng, data)
        if changed and rng.random() < 0.3:
            changed = rng.choice(MUTATIONS)(rng, changed)
        if changed != data:
            number -= 1
            yield changed


def test_every_bit(target: Target, data: bytes) -> None:
    """With the checksum as it was."""
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            target.refuse(bytes(changed))


def test_every_length(target: Target, data: bytes) -> None:
    """With the checksum as it was, and with one that is right, for what is left and for more."""
    for size in range(len(data)):
        target.refuse(data[:size])
        if size != len(data) - 32:
            target.refuse(reference.reseal(data[:size] + data[-32:]))
    for more in range(1, 100):
        target.refuse(data + bytes(more))
        target.refuse(reference.reseal(data[:-32] + bytes(more) + data[-32:]))


def test_damage(target: Target, data: bytes) -> None:
    for changed in mutations(data, 1500, seed=1):
        target.refuse(changed)


def test_every_bit_with_a_right_checksum(target: Target, data: bytes) -> None:
    """The parser meets each of them, and the model each of the payload's that is valid."""
    for position in range(len(data) - 32):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            target.load(reference.reseal(bytes(changed)))
    assert target.loaded > 500
    assert target.refused > 1000


def test_damage_with_a_right_checksum(target: Target, data: bytes) -> None:
    for changed in mutations(data, 2500, seed=2):
        target.load(reference.reseal(changed))
    assert target.loaded > 50
    assert target.refused > 1000


def test_damaged_payload(target: Target) -> None:
    header = reference.compress(LISTED)
    for changed in mutations(PAYLOAD, 2000, seed=3):
        # Of the right size too, so that it is the content that counts.
        fitted = changed[: len(PAYLOAD)].ljust(len(PAYLOAD), b"\0")
        target.load(reference.assemble(header, fitted))
    assert target.loaded > 200
    assert target.refused > 200


def test_damaged_json(target: Target) -> None:
    """Changed before it is compressed, so that zlib does not notice."""
    text = json.dumps(LISTED).encode()
    for changed in mutations(text, 2000, seed=4):
        target.load(reference.assemble(zlib.compress(changed), PAYLOAD))
    assert target.loaded > 5  # white space
    assert target.refused > 1500


def test_noise(target: Target) -> None:
    """With the right beginning, and without."""
    rng = random.Random(5)
    for _ in range(300):
        noise = rng.randbytes(rng.randrange(200))
        target.refuse(noise)
        target.refuse(reference.MAGIC + noise)
        target.refuse(reference.assemble(noise, PAYLOAD))
        target.refuse(reference.assemble(zlib.compress(noise), PAYLOAD))


# --------------------------------------------------------------------------------------------------
# Headers that say strange things
# --------------------------------------------------------------------------------------------------


class Json(str):
    """Text that goes into the header as it is."""


def dump(value: object) -> str:
    if isinstance(value, Json):
        return value
    if isinstance(value, list):
        return f"[{','.join(map(dump, value))}]"
    return json.dumps(value)


def nested(depth: int, opening: str = "[", inner: str = "", closing: str = "]") -> Json:
    return Json(opening * depth + inner + closing * depth)


TOKENS = [
    *map(Json, ["null", "true", "false", "{}", "[]", "[[]]", "[null]", '{"a":1}', '["raw"]']),
    *map(Json, ["-1", "-0", "0", "1", "2", "3", "7", "11", "12", "1e0", "2.0", "0.5", "1e999"]),
    *map(Json, ["NaN", "Infinity", "-Infinity", '"NaN"', "1e400", "-1e-400"]),
    *map(Json, ["255", "65536", "2147483648", "4294967296", "9223372036854775807"]),
    *map(Json, ["9223372036854775808", "18446744073709551616", "-9223372036854775809"]),
    *map(Json, ["9" * 40, "9" * 400, "9" * 4000, "9" * 5000, "-" + "9" * 4000]),
    *map(Json, ['"\\ud800"', '"\\u001b[31m"', '"\\u0000"', '"a\\nb"', '""', '"é"', '"__proto__"']),
    *map(nested, (2, 64, 65, 100, 500, 950, 5000)),
    nested(300, '{"a":', "1", "}"),
    *("raw", "binary", "ternary", "RAW", "raw ", "tied", "pickle", "__class__", "a" * 5000),
    *("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool", "complex64"),
    *("float", "half", "double", "long", "torch.float32", "Float32", "qint8", "dtype", "load"),
    *("conv", "free", "more", "unknown", "conv.weight"),
]


def places(value: list[Any], path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The paths to all items of nested lists."""
    found = []
    for number, item in enumerate(value):
        found.append((*path, number))
        if isinstance(item, list):
            found += places(item, (*path, number))
    return found


def change_header(rng: random.Random, listed: list[Any]) -> None:
    """One change somewhere in the lists."""
    *inner, last = rng.choice(places(listed))
    parent = listed
    for number in inner:
        parent = parent[number]
    action = rng.randrange(9)
    if action < 4:
        parent[last] = rng.choice(TOKENS)
    elif action == 4:
        parent.insert(last, rng.choice([*TOKENS, copy.deepcopy(parent[last])]))
    elif action == 5:
        del parent[last]
    elif action == 6:
        other = rng.randrange(len(parent))
        parent[last], parent[other] = parent[other], parent[last]
    elif action == 7:
        parent[last] = [parent[last]]
    elif type(parent[last]) is int:
        parent[last] += rng.choice((-2, -1, 1, 2))
    else:
        *inner, other = rng.choice(places(listed))
        item: Any = listed
        for number in [*inner, other]:
            item = item[number]
        parent[last] = copy.deepcopy(item)


def fitting(rng: random.Random, header: bytes) -> bytes:
    """A payload of the size that the header asks for, if it asks for a reasonable one."""
    try:
        size = sum(reference.payload_size(*entry[1:]) for entry in reference.read_header(header))
    except Invalid:
        size = len(PAYLOAD)
    if size > 10_000:
        return PAYLOAD
    return rng.choice((PAYLOAD, bytes(size), rng.randbytes(size)))[:size].ljust(size, b"\0")


def test_changed_headers(target: Target) -> None:
    rng = random.Random(6)
    for _ in range(2500):
        listed = copy.deepcopy(LISTED)
        for _ in range(rng.choice((1, 1, 2, 3))):
            if listed:
                change_header(rng, listed)
        header = zlib.compress(dump(listed).encode("utf-8"))
        target.load(reference.assemble(header, fitting(rng, header)))
    assert target.loaded > 20
    assert target.refused > 2000


def test_every_value_in_every_place(target: Target) -> None:
    """Of the first entry, of one that is tied, and around them."""
    tied, _ = entry("again")
    for place in [(), *places(LISTED[:1]), (tied,), *((tied, number) for number in range(4))]:
        for token in TOKENS:
            listed: Any = copy.deepcopy(LISTED)
            if place:
                parent = listed
                for number in place[:-1]:
                    parent = parent[number]
                parent[place[-1]] = token
            else:
                listed = token
            header = zlib.compress(dump(listed).encode())
            target.load(reference.assemble(header, PAYLOAD))
    # Ones that change nothing: "conv", "float32", 3, 2, "binary", 0.
    assert target.loaded >= 6


def test_order_of_entries(target: Target) -> None:
    """They are found by name."""
    entries = [entry for entry in ENTRIES if not isinstance(entry.encoding, int)]
    entries += [
        Entry(e.name, e.dtype, e.shape, "raw", e.content)
        for e in ENTRIES
        if isinstance(e.encoding, int)
    ]
    for seed in range(20):
        random.Random(seed).shuffle(entries)
        target.load(reference.build(entries))
    assert target.loaded == 20


def test_ties(target: Target) -> None:
    """To itself, forward, in a circle, to one that is tied, out of range, to one that is unlike."""
    for number, its in enumerate(ENTRIES):
        for tie in (-(2**70), -13, -12, -1, *range(len(LISTED) + 2), 2**31, 2**63, 2**70):
            tied = [*ENTRIES]
            tied[number] = Entry(its.name, its.dtype, its.shape, tie, its.content)
            target.load(reference.build(tied))
    # None but the two that are there: every other one is unlike, or not before it.
    assert target.loaded == 2
    circle = copy.deepcopy(LISTED)
    (conv, _), (again, _) = entry("conv"), entry("again")
    circle[conv][3], circle[again][3] = again, conv
    target.refuse(reference.assemble(reference.compress(circle), PAYLOAD))


def test_deep_nesting(target: Target) -> None:
    """Also where the parser just gets through, and what comes after it might not."""
    limit = sys.getrecursionlimit()
    depths = [*range(max(limit - 200, 1), limit + 5), 10_000, 1_000_000, 8_000_000]
    for depth in depths:
        lists = nested(depth)
        headers = [lists]
        if depth < 10_000:
            dicts = nested(depth, '{"a":', "1", "}")
            headers += [dicts, Json(f"[{dicts}]")]
            headers += [Json(dump([["free", "float32", deep, "raw"]])) for deep in (lists, dicts)]
        for header in headers:
            target.refuse(reference.assemble(zlib.compress(header.encode()), PAYLOAD))


def shaped(shape: Sequence[object], dtype: str, encoding: object, name: str = "free") -> bytes:
    listed = copy.deepcopy(LISTED)
    number, _ = entry(name)
    listed[number][1:] = [dtype, list(shape), encoding]
    return reference.assemble(zlib.compress(dump(listed).encode()), PAYLOAD)


@pytest.mark.parametrize("encoding", ["raw", "binary", "ternary", "uniform4", 0])
def test_absurd_shapes(encoding: object, target: Target) -> None:
    """Whose sizes have thousands of digits, or fit no 64 bits, or are of no memory at all."""
    huge = Json("9" * 4000)
    for shape in (
        *([huge], [huge, huge], [huge] * 3, [huge, 0], [0, huge], [2**63], [2**64, 1]),
        *([2**62] * 64, [2**62] * 65, [1] * 1000, [0] * 100, [2**62, 2**62, 0], [-1, -6]),
    ):
        for dtype in ("float32", "float64", "bool"):
            target.refuse(shaped(shape, dtype, encoding))


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: text.encode("utf-32"),
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.replace("free", "fr\xe9e").encode("latin-1"),
        lambda text: text.replace("free", "fr\ud800ee").encode("utf-8", "surrogatepass"),
        lambda text: text.encode() + b"\0",
        lambda text: text.encode() + text.encode(),
        lambda text: text.replace('"', "'").encode(),
        lambda text: text.encode() + b"// comment",
        lambda text: b"",
        lambda text: b" ",
    ],
)
def test_not_json_in_utf8(encode: Callable[[str], bytes], target: Target) -> None:
    target.refuse(reference.assemble(zlib.compress(encode(json.dumps(LISTED))), PAYLOAD))


def test_other_streams_of_zlib(target: Target) -> None:
    """Any level is good, and a whole stream it must be, with nothing after it."""
    text = json.dumps(LISTED).encode()
    for level in range(10):
        target.load(reference.assemble(zlib.compress(text, level), PAYLOAD))
    assert target.loaded == 10
    good = zlib.compress(text)
    raw, gzip = (zlib.compressobj(wbits=wbits) for wbits in (-15, 31))
    for stream in (
        good + b"\0",
        good + good,
        good[:-1],
        good[:-4],
        good[:-4] + bytes(4),
        good[:20],
        b"",
        text,
        raw.compress(text) + raw.flush(),
        gzip.compress(text) + gzip.flush(),
    ):
        target.refuse(reference.assemble(stream, PAYLOAD))
    needs_dictionary = zlib.compressobj(zdict=b"float32 binary raw")
    stream = needs_dictionary.compress(text) + needs_dictionary.flush()
    target.refuse(reference.assemble(stream, PAYLOAD))


def test_white_space_is_json(target: Target) -> None:
    text = json.dumps(LISTED, indent=3).encode()
    target.load(reference.assemble(zlib.compress(text), PAYLOAD))
    assert target.loaded == 1


def test_header_at_the_limit(target: Target) -> None:
    """4 MiB of it are read, and not one byte more."""
    text = json.dumps(LISTED).encode()
    for size in (reference.HEADER_LIMIT, reference.HEADER_LIMIT + 1):
        target.load(reference.assemble(zlib.compress(text.ljust(size), 1), PAYLOAD))
    assert (target.loaded, target.refused) == (1, 1)


def test_sizes_in_the_prefix(target: Target) -> None:
    """Of header and file, near to the right ones and far off."""
    header = reference.compress(LISTED)
    right = len(header)
    whole = 24 + right + len(PAYLOAD) + 32
    for size in (0, 1, right - 1, right + 1, whole - 56, whole - 55, whole, 2**31, 2**32 - 1):
        target.refuse(reference.assemble(header, PAYLOAD, header_size=size))
    for size in (0, 1, whole - 1, whole + 1, 2**31, 2**32 + whole, 2**63, 2**64 - 1):
        target.refuse(reference.assemble(header, PAYLOAD, size=size))


# --------------------------------------------------------------------------------------------------
# Payloads
# --------------------------------------------------------------------------------------------------


def with_last_byte(name: str, byte: int) -> bytes:
    """The good file, but for the last byte of one payload."""
    number, its = entry(name)
    payload = reference.payload_of(its)
    return reference.build(ENTRIES, payloads={number: payload[:-1] + bytes([byte])})


@pytest.mark.parametrize(
    ("name", "digits", "base"),
    [("conv", 6, 2), ("narrow", 2, 2), ("wide", 6, 2), ("tern", 3, 3), ("brain", 1, 3)],
)
def test_every_last_byte(name: str, digits: int, base: int, target: Target) -> None:
    """Digits that are left over must be 0, and 243 and more are no five digits."""
    for byte in range(256):
        target.load(with_last_byte(name, byte))
    assert target.loaded == base**digits


def test_every_byte_of_a_bool(target: Target) -> None:
    for byte in range(256):
        target.load(with_last_byte("mask", byte))
    assert target.loaded == 2


@pytest.mark.parametrize("byte", range(243, 256))
def test_bytes_that_are_no_five_digits(byte: int, target: Target) -> None:
    number, its = entry("tern")
    payload = reference.payload_of(its)
    for position in range(8, len(payload)):
        changed = payload[:position] + bytes([byte]) + payload[position + 1 :]
        target.refuse(reference.build(ENTRIES, payloads={number: changed}))


@pytest.mark.parametrize("name", ["conv", "narrow", "wide", "tern", "brain"])
def test_scales_of_any_bits(name: str, target: Target) -> None:
    """Infinite, NaN, negative, −0.0, subnormal: they mean what they say."""
    number, its = entry(name)
    payload, size = reference.payload_of(its), reference.ITEM_SIZES[its.dtype]
    infinity, sign = reference.INFINITY[its.dtype], 1 << (8 * size - 1)
    patterns = [0, 1, infinity - 1, infinity, infinity + 1, sign - 1]
    patterns += [pattern | sign for pattern in patterns]
    for pattern in patterns:
        for position in (0, size):
            scale = pattern.to_bytes(size, "little")
            changed = payload[:position] + scale + payload[position + size :]
            target.load(reference.build(ENTRIES, payloads={number: changed}))
    assert target.loaded == 2 * len(patterns)


@pytest.mark.parametrize("encoding", ["raw", "binary", "ternary", "uniform2", "uniform7"])
def test_encodings_that_are_not_the_smallest(encoding: str, target: Target) -> None:
    """A file may use any that fits: to choose is the writer's business."""
    entries, (number, _) = [*ENTRIES], entry("tern")
    content = reference.content_of(draw((1, -1), (4, 7)))
    entries[number] = Entry("tern", "float32", (4, 7), encoding, content)
    target.load(reference.build(entries))
    assert target.loaded == 1


# --------------------------------------------------------------------------------------------------
# Tied models
# --------------------------------------------------------------------------------------------------


def test_one_weight_cannot_be_two(tmp_path: Path) -> None:
    """Two different tensors of a file for one of the model: neither is right."""
    path = tmp_path / "model.dfw"
    save_packed(Holder(a=torch.ones(2), b=torch.zeros(2)), path)
    shared = torch.full((2,), 7.0)
    model = Holder(a=shared, b=shared)
    before = contents(model)
    with pytest.raises(PackedFileError, match=r"'a'.*'b'"):
        load_packed(model, path)
    assert contents(model) == before


# --------------------------------------------------------------------------------------------------
# Code in files
# --------------------------------------------------------------------------------------------------


class Harmful:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_pickles_are_not_read(target: Target, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    dumped, saved = pickle.dumps(Harmful(marker)), io.BytesIO()
    torch.save({"weight": Harmful(marker)}, saved)
    for data in (dumped, saved.getvalue()):
        target.refuse(data)
        target.refuse(reference.MAGIC + data)
        target.refuse(reference.assemble(data, b""))
        target.refuse(reference.assemble(zlib.compress(data), b""))
    assert not marker.exists()
    pickle.loads(dumped)
    assert marker.exists(), "it would have done no harm anyway"


def test_nothing_is_executed_or_imported(target: Target, data: bytes) -> None:
    """Python reports both, pickles included."""
    target.path.write_bytes(data)
    bad = target.path.with_name("bad.dfw")
    reference.write(bad, ENTRIES, listed=[["__import__('os')", "load", [1], "eval"]])
    script = """
import sys
import test_packing_hostile as hostile
from dfw_opt import PackedFileError, load_packed
model = hostile.make(tied=False)
def load():
    load_packed(model, sys.argv[1])
    try:
        load_packed(model, sys.argv[2])
    except PackedFileError:
        print("refused")
load()
seen = []
names = ("exec", "compile", "import", "pickle.find_class", "os.system", "subprocess.Popen")
sys.addaudithook(lambda name, arguments: seen.append(name) if name in names else None)
exec("1")
assert seen, "nothing would be seen"
seen.clear()
load()
print(seen)
"""
    assert run(script, target.path, bad).splitlines() == ["refused", "refused", "[]"]


def run(script: str, *arguments: object) -> str:
    """What Python prints in a new process, which finds all that this one does."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{script}"]
        + [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import torch
import test_packing_hostile as hostile
from dfw_opt import PackedFileError, load_packed
torch.set_num_threads(1)
model = hostile.make(tied=False)
before = hostile.contents(model)
more, *paths = sys.argv[1:]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(more), resource.RLIM_INFINITY))
for path in paths:
    try:
        load_packed(model, path)
        print("loaded")
    except Exception as error:
        print(type(error).__name__)
    assert hostile.contents(model) == before
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")


def bomb(size: int) -> bytes:
    """Spaces, compressed, without ever holding them all."""
    stream = zlib.compressobj(1)
    block = b" " * 2**20
    return b"".join(stream.compress(block) for _ in range(size // len(block))) + stream.flush()


@LINUX
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """By what the model takes, whatever the file says: here by 100 MB for 1 KB of model."""
    huge = Json("9" * 4000)
    files = [
        reference.assemble(bomb(2**29), PAYLOAD),
        reference.assemble(bomb(2**29) + reference.compress(LISTED), PAYLOAD),
        reference.assemble(bomb(2**25)[:1000], PAYLOAD),
        reference.assemble(b"", PAYLOAD, header_size=2**32 - 1),
        reference.assemble(b"", PAYLOAD, header_size=2**32 - 1, size=2**40),
        shaped([2**40], "float32", "raw"),
        shaped([2**31, 2**31], "float32", "raw"),
        shaped([2**62, 2**62], "float64", "binary"),
        shaped([2**62, 1], "float64", "binary"),
        shaped([1, 2**62], "float64", "ternary"),
        shaped([2**62, 2**62], "float64", "uniform8"),
        shaped([1, 2**62], "float32", "uniform3"),
        shaped([2**32, 2**32, 0], "float64", "raw"),
        shaped([0, 2**63], "float64", "raw"),
        shaped([2**64, 0], "float64", "raw"),
        shaped([1] * 100_000, "float64", "raw"),
        shaped([2**62] * 50_000, "float64", "raw"),
        shaped([huge], "float32", "raw"),
        shaped([huge] * 3, "float32", "raw"),
        shaped([huge, huge, 0], "float32", "raw"),
        shaped([2, 3], "float32", huge),
        shaped([Json("9" * 10_000_000)], "float32", "raw"),
    ]
    paths = []
    for number, data in enumerate(files):
        paths.append(tmp_path / f"{number}.dfw")
        paths[-1].write_bytes(data)
    paths.append(Path("/dev/zero"))
    # One that is as large as it says, of which the disk holds nothing.
    large = tmp_path / "large.dfw"
    with large.open("wb") as file:
        file.write(reference.PREFIX.pack(reference.MAGIC, 1, 100, 2**31))
        file.truncate(2**31)
    paths.append(large)
    header = reference.compress([["free", "float32", [2**29 - 50], "raw"]])
    with large.with_name("larger.dfw").open("wb") as file:
        size = 24 + len(header) + 4 * (2**29 - 50) + 32
        file.write(reference.PREFIX.pack(reference.MAGIC, 1, len(header), size) + header)
        file.truncate(size)
    paths.append(large.with_name("larger.dfw"))
    assert run(LIMITED, 100 * 2**20, *paths).split() == ["PackedFileError"] * len(paths)


@LINUX
def test_memory_of_the_largest_header(tmp_path: Path) -> None:
    """Python needs much for 4 MiB of small lists, and no more than it must."""
    size = reference.HEADER_LIMIT
    texts = [
        "[" + "[]," * (size // 3 - 1) + "0]",
        "[" + '{"a":0},' * (size // 8 - 1) + "0]",
        f'[["{"é" * (size // 2 - 50)}","float32",[1],"raw"]]',
        f'[["a","{"x" * (size - 50)}",[1],"raw"]]',
        f'[["a","float32",[{"1," * (size // 2 - 50)}1],"raw"]]',
    ]
    paths = []
    for number, text in enumerate(texts):
        assert len(text.encode()) <= size
        paths.append(tmp_path / f"{number}.dfw")
        paths[-1].write_bytes(reference.assemble(zlib.compress(text.encode()), PAYLOAD))
        assert paths[-1].stat().st_size < 2**20
    assert run(LIMITED, 400 * 2**20, *paths).split() == ["PackedFileError"] * len(paths)


# --------------------------------------------------------------------------------------------------
# What the errors say
# --------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self, *, width: int = 4, **more: Any) -> None:
        super().__init__()
        self.first = nn.Linear(3, width)
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor([True, False]))
        for name, tensor in more.items():
            self.register_buffer(name, tensor)


class TestMessages:
    """What is wrong, with which file and which entry, and what both sides say."""

    @pytest.fixture(autouse=True)
    def prepare(self, tmp_path: Path) -> None:
        self.path = tmp_path / "model.dfw"
        self.set(Layers())

    def set(self, model: nn.Module) -> None:
        self.model = model
        self.entries = reference.entries_of(model)
        self.listed = [entry.listed() for entry in self.entries]
        self.payload = b"".join(reference.payload_of(entry) for entry in self.entries)

    def message(self, *parts: str) -> str:
        """Of loading the file; it has all of these, and the name of the file."""
        before = contents(self.model)
        with pytest.raises(PackedFileError) as caught:
            load_packed(self.model, self.path)
        assert type(caught.value) is PackedFileError
        assert contents(self.model) == before
        message = str(caught.value)
        for part in (str(self.path), *parts):
            assert part in message
        assert "\n" not in message
        assert len(message) < 1000
        return message

    def write(self, listed: object, **wrong: Any) -> None:
        reference.write(self.path, self.entries, listed=listed, **wrong)

    def number(self, name: str) -> int:
        return [entry.name for entry in self.entries].index(name)

    def changed(self, name: str, place: int, value: object) -> list[Any]:
        listed = copy.deepcopy(self.listed)
        listed[self.number(name)][place] = value
        return listed

    @pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(100), b"\x89D"])
    def test_another_kind_of_file(self, content: bytes) -> None:
        self.path.write_bytes(content)
        message = self.message()
        assert "not a packed file" in message or "truncated" in message

    def test_a_checkpoint_of_torch(self) -> None:
        torch.save(self.model.state_dict(), self.path)
        self.message("not a packed file")

    @pytest.mark.parametrize("version", [0, 2, 70_000])
    def test_another_version(self, version: int) -> None:
        """Said first: what follows may be laid out in another way."""
        self.write(self.listed, version=version)
        self.message("version", str(version), "version 1")
        data = self.path.read_bytes()
        self.path.write_bytes(data[:30])
        self.message("version", str(version), "version 1")

    def test_truncated(self) -> None:
        self.write(self.listed)
        data = self.path.read_bytes()
        for size in (len(data) - 1, 100, 24):
            self.path.write_bytes(data[:size])
            self.message("truncated", str(size), str(len(data)))
        self.path.write_bytes(data[:20])
        self.message("truncated", "20")

    def test_too_long(self) -> None:
        self.write(self.listed)
        data = self.path.read_bytes()
        self.path.write_bytes(data + b"\n")
        self.message("too long", str(len(data)), str(len(data) + 1))

    @pytest.mark.parametrize("position", [-33, -1])
    def test_damaged(self, position: int) -> None:
        self.write(self.listed)
        data = bytearray(self.path.read_bytes())
        data[position] ^= 1
        self.path.write_bytes(data)
        self.message("damaged", "checksum")

    def test_header_that_is_not_compressed(self) -> None:
        self.path.write_bytes(reference.assemble(b"[]" * 20, self.payload))
        self.message("header")

    def test_header_that_is_too_large(self) -> None:
        self.write(" " * reference.HEADER_LIMIT)
        self.message("header", str(reference.HEADER_LIMIT))

    @pytest.mark.parametrize("text", ["", "[", "[1,]", "nan", "[" * 100_000, "\udcff"])
    def test_header_that_is_not_json(self, text: str) -> None:
        header = zlib.compress(text.encode("utf-8", "surrogateescape"))
        self.path.write_bytes(reference.assemble(header, self.payload))
        self.message("header", "JSON")

    @pytest.mark.parametrize("listed", [{"a": 1}, "text", 3, None])
    def test_header_that_is_no_list(self, listed: object) -> None:
        header = zlib.compress(json.dumps(listed).encode())
        self.path.write_bytes(reference.assemble(header, self.payload))
        self.message("header", "list")

    @pytest.mark.parametrize("item", [3, "text", [], ["a", "float32", [2]], {"name": "a"}])
    def test_entry_of_another_form(self, item: object) -> None:
        self.write([*self.listed, item])
        self.message("header", str(item)[:5])

    def test_name_that_is_no_text(self) -> None:
        self.write(self.changed("mask", 0, 17))
        self.message("name", "17")

    def test_names_twice(self) -> None:
        self.write([*self.listed, self.listed[self.number("first.bias")]])
        self.message("first.bias", "twice")

    @pytest.mark.parametrize(
        "shape", [3, "3", None, [-4, 3], [4.0, 3], [True, 3], ["4", 3], [[4], 3], [None, 3]]
    )
    def test_shapes(self, shape: object) -> None:
        self.write(self.changed("first.weight", 2, shape))
        self.message("first.weight", "shape", str(shape))

    @pytest.mark.parametrize("dtype", ["float31", "float", "qint8", "nn", "", 3, None, ["float32"]])
    def test_unknown_dtype(self, dtype: object) -> None:
        self.write(self.changed("first.weight", 1, dtype))
        self.message("first.weight", "dtype", repr(dtype))

    @pytest.mark.parametrize("encoding", ["octal", "", None, True, 1.0, ["raw"], {}])
    def test_unknown_encoding(self, encoding: object) -> None:
        self.write(self.changed("first.bias", 3, encoding))
        self.message("first.bias", "encoding", repr(encoding))

    @pytest.mark.parametrize("encoding", ["binary", "ternary"])
    @pytest.mark.parametrize("name", ["first.bias", "mask", "matrix", "empty"])
    def test_encoding_that_it_cannot_have(self, name: str, encoding: str) -> None:
        """Vectors, what is no float, and what has no elements."""
        self.set(Layers(matrix=torch.ones(3, 3, dtype=torch.int32), empty=torch.zeros(0, 3)))
        self.write(self.changed(name, 3, encoding))
        self.message(name, encoding)

    @pytest.mark.parametrize("tie", [-1, 1, 2, 7, 10**30])
    def test_tie_to_what_is_not_before(self, tie: int) -> None:
        assert self.number("first.weight") == 1
        self.write(self.changed("first.weight", 3, tie))
        self.message("first.weight", "tied", str(tie))

    def test_tie_to_what_is_unlike(self) -> None:
        self.write(self.changed("first.bias", 3, self.number("first.weight")))
        self.message("first.bias", "first.weight", "tied")

    def test_tie_to_what_is_tied(self) -> None:
        listed = [["a", "bool", [2], "raw"], ["b", "bool", [2], 0], ["c", "bool", [2], 1]]
        self.write(listed)
        self.message("'c'", "'b'", "tied")

    def test_payload_of_another_size(self) -> None:
        self.path.write_bytes(reference.assemble(reference.compress(self.listed), b"too short"))
        self.message("damaged", str(self.path.stat().st_size))

    def test_missing_entries(self) -> None:
        self.model = Layers(extra=torch.ones(2))
        self.write(self.listed)
        self.message("extra")

    def test_unexpected_entries(self) -> None:
        save_packed(Layers(surplus=torch.ones(2)), self.path)
        self.message("surplus")

    def test_both(self) -> None:
        save_packed(Layers(surplus=torch.ones(2)), self.path)
        self.model = Layers(extra=torch.ones(2))
        self.message("extra", "surplus")

    def test_many(self) -> None:
        """Not all of them."""
        surplus: dict[str, Any] = {f"t{number}": torch.ones(2) for number in range(300)}
        save_packed(Layers(**surplus), self.path)
        self.message("t0")

    def test_another_shape(self) -> None:
        save_packed(Layers(width=5), self.path)
        self.message("first.weight", "(5, 3)", "(4, 3)")

    def test_the_same_number_of_elements_is_not_enough(self) -> None:
        self.write(self.changed("first.weight", 2, [3, 4]))
        self.message("first.weight", "(3, 4)", "(4, 3)")

    def test_another_dtype(self) -> None:
        save_packed(Layers().half(), self.path)
        self.message("first.weight", "float16", "float32")

    def test_a_dtype_of_the_same_size(self) -> None:
        self.write(self.changed("first.weight", 1, "int32"))
        self.message("first.weight", "int32", "float32")

    def write_byte(self, name: str, byte: int) -> None:
        """In place of the last one of an entry."""
        number = self.number(name)
        payload = reference.payload_of(self.entries[number])[:-1] + bytes([byte])
        reference.write(self.path, self.entries, payloads={number: payload})

    def test_digits_out_of_range(self) -> None:
        self.set(Layers(matrix=draw((1, 0, -2), (4, 3))))
        assert self.entries[self.number("matrix")].encoding == "ternary"
        self.write_byte("matrix", 251)
        self.message("'matrix'", "251")

    @pytest.mark.parametrize(("levels", "encoding"), [((1, -1), "binary"), ((1, 0, -2), "ternary")])
    def test_padding(self, levels: tuple[float, ...], encoding: str) -> None:
        self.set(Layers(matrix=draw(levels, (2, 7))))
        assert self.entries[self.number("matrix")].encoding == encoding
        self.write_byte("matrix", 128)
        self.message("'matrix'", "last byte")

    def test_uniform_numbers_out_of_range(self) -> None:
        self.set(Layers(matrix=grid(4, (4, 8))))
        assert self.entries[self.number("matrix")].encoding == "uniform4"
        self.write_byte("matrix", 0xF0)
        self.message("'matrix'", "15", "last level")

    def test_uniform_padding(self) -> None:
        self.set(Layers(matrix=grid(3, (3, 7))))
        self.write_byte("matrix", 0x80)
        self.message("'matrix'", "last byte")

    @pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, -0.0, 1e-44, 2.0**-126])
    def test_uniform_scales(self, scale: float) -> None:
        self.set(Layers(matrix=grid(3, (3, 7))))
        number = self.number("matrix")
        payload = struct.pack("<f", scale) + reference.payload_of(self.entries[number])[4:]
        reference.write(self.path, self.entries, payloads={number: payload})
        self.message("'matrix'", "scale")

    def test_bools(self) -> None:
        self.write_byte("mask", 2)
        self.message("'mask'", "bool", "2")

    def test_long_names_are_cut(self) -> None:
        for place in range(4):
            self.write(self.changed("mask", place, "x" * 100_000))
            self.message("xxx")

    def test_names_for_a_terminal(self) -> None:
        """What comes from a stranger does not move the cursor."""
        for place in range(4):
            self.write(self.changed("mask", place, "a\x1b[2J\r\n\x9b\u202eb\ud800"))
            assert self.message().isprintable()


def test_struct_of_the_prefix() -> None:
    """The reference's own: no padding between the fields."""
    assert reference.PREFIX.size == struct.calcsize("<8sIIQ") == 24
