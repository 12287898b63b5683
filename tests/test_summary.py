"""The sizes that are printed are those of the file, and they are counted as they should be."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packed_reference as reference
import pytest
import torch
from packed_reference import Entry, Holder, binary, draw
from resnet20 import nets
from torch import nn
from torch.nn import Parameter

import dfw_opt
from dfw_opt import ProjectedDFW, TernaryDFW, param_groups, save_packed, summary
from dfw_opt.__main__ import main

BITS = {"binary": 1, "ternary": 1.6}
FLOATING = re.compile("b?float")


def net() -> nn.Sequential:
    """A float layer, a norm, a binary layer, a ternary one."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 7, 3), nn.Flatten(), nn.Linear(28, 11)
    )
    with torch.no_grad():
        model.get_parameter("2.weight").copy_(binary((7, 6, 3, 3)))
        model.get_parameter("4.weight").copy_(draw((1, 0, -2), (11, 28)))
    return model


def tied() -> nn.Module:
    weight = Parameter(binary((6, 20)))
    model = nn.ModuleDict({"embed": nn.Embedding(6, 20), "out": nn.Linear(20, 6)})
    for name in ("embed", "out"):
        model[name].weight = weight
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": net,
    "tied": tied,
    "float": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "bfloat16": lambda: net().to(torch.bfloat16),
    "float64": lambda: net().double(),
    "other types": lambda: Holder(
        mask=torch.tensor([True, False]),
        steps=torch.tensor(3),
        pair=torch.zeros(3, dtype=torch.complex64),
        eighth=torch.zeros(5).to(torch.float8_e4m3fn),
        narrow=torch.zeros(3, 8).half(),
    ),
    "empty tensors": lambda: Holder(a=torch.zeros(0, 3), b=torch.zeros(0)),
    "no tensors": lambda: nn.ReLU(),
    "xnor": lambda: quantized("xnor"),
    "ternary": lambda: quantized("ternary"),
}


def quantized(kind: str) -> nn.Module:
    model = nets.build(kind, "bireal", 0)
    (ProjectedDFW if kind == "xnor" else TernaryDFW)(param_groups(model))
    return model


def size(entry: Entry) -> int:
    return reference.payload_size(entry.dtype, entry.shape, entry.encoding)


def float32_size(entry: Entry) -> int:
    floating = FLOATING.match(entry.dtype) is not None
    return reference.count(entry.shape) * (4 if floating else reference.ITEM_SIZES[entry.dtype])


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


class TestNumbers:
    def test_totals(self, model: nn.Module, tmp_path: Path) -> None:
        sizes = summary(model)
        entries = reference.entries_of(model)
        own = [entry for entry in entries if not isinstance(entry.encoding, int)]
        packed = [entry for entry in own if entry.encoding != "raw"]
        assert sizes.bytes == sum(map(size, own))
        assert sizes.values == sum(reference.count(entry.shape) for entry in own)
        assert sizes.float32_bytes == sum(map(float32_size, own))
        assert sizes.quantized_weights == sum(reference.count(entry.shape) for entry in packed)
        if packed:
            ratio = sum(map(float32_size, packed)) / sum(map(size, packed))
            assert sizes.quantized_ratio == pytest.approx(ratio)
        else:
            assert sizes.quantized_ratio is None

    def test_the_file(self, model: nn.Module, tmp_path: Path) -> None:
        """To the byte, though none is written."""
        sizes = summary(model)
        path = tmp_path / "model.dfw"
        save_packed(model, path)
        assert sizes.file_bytes == path.stat().st_size
        assert sizes.ratio == pytest.approx(sizes.float32_bytes / sizes.file_bytes)

    def test_layers(self, model: nn.Module) -> None:
        sizes = summary(model)
        held: dict[str, list[Entry]] = {}
        entries = reference.entries_of(model)
        for entry in entries:
            held.setdefault(entry.name.rpartition(".")[0], []).append(entry)
        assert [layer.name for layer in sizes.layers] == list(held)
        for layer, its in zip(sizes.layers, held.values(), strict=True):
            largest = max(its, key=lambda entry: reference.count(entry.shape))
            encoding = largest.encoding
            if isinstance(encoding, int):
                encoding = entries[encoding].encoding
            assert layer.shape == largest.shape
            assert layer.encoding == encoding
            width = 8 * reference.ITEM_SIZES[largest.dtype]
            assert layer.bits == pytest.approx(BITS.get(str(encoding), width))
            assert layer.bytes == sum(map(size, its))
            total = sum(map(size, entries))
            assert layer.share == pytest.approx(layer.bytes / total if total else 0)

    def test_shares_add_up(self) -> None:
        assert sum(layer.share for layer in summary(net()).layers) == pytest.approx(1)

    def test_by_hand(self) -> None:
        """The layers of the net, counted on paper."""
        sizes = summary(net())
        rows = [(x.name, x.shape, x.encoding, x.bits, x.bytes) for x in sizes.layers]
        assert rows == [
            ("0", (6, 1, 3, 3), "raw", 32, 54 * 4 + 6 * 4),
            ("1", (6,), "raw", 32, 4 * 6 * 4 + 8),
            ("2", (7, 6, 3, 3), "binary", 1, 7 * 4 + 48 + 7 * 4),  # 378 weights
            ("4", (11, 28), "ternary", 1.6, 2 * 4 + 62 + 11 * 4),  # 308 weights
        ]
        assert sizes.quantized_weights == 378 + 308
        assert sizes.quantized_ratio == pytest.approx(686 * 4 / (28 + 48 + 8 + 62))

    def test_tied_weights_count_once(self) -> None:
        sizes = summary(tied())
        embed, out = sizes.layers
        assert sizes.values == 6 * 20 + 6
        assert sizes.float32_bytes == 4 * (6 * 20 + 6)
        assert embed.bytes == 6 * 4 + 15
        assert out.bytes == 6 * 4  # the bias

    def test_wholly_tied_layers_take_nothing(self) -> None:
        layer = nn.Linear(8, 8)
        first, second = summary(nn.Sequential(layer, layer)).layers
        assert (first.bytes, second.bytes) == (4 * 72, 0)
        assert (first.share, second.share) == (1, 0)

    def test_bfloat16_against_float32(self) -> None:
        """What a float32 model would take, whatever this one is."""
        wide, narrow = summary(net()), summary(net().bfloat16())
        assert wide.float32_bytes == narrow.float32_bytes
        assert narrow.bytes < wide.bytes
        assert narrow.layers[0].bits == 16

    def test_frozen(self) -> None:
        sizes = summary(net())
        for thing in (sizes, sizes.layers[0]):
            with pytest.raises(dataclasses.FrozenInstanceError):
                thing.bytes = 0  # type: ignore[misc]
        assert isinstance(sizes.layers, tuple)

    def test_the_model_is_left_alone(self, model: nn.Module) -> None:
        before = reference.contents(model)
        summary(model)
        assert reference.contents(model) == before

    def test_follows_the_values(self) -> None:
        """One weight off, and the layer shows what it really takes."""
        model = net()
        with torch.no_grad():
            model.get_parameter("2.weight")[3, 1, 1, 1] *= 1.01
        layer = summary(model).layers[2]
        assert (layer.encoding, layer.bits) == ("raw", 32)


class TestTable:
    def test_prints_what_it_returns(
        self, model: nn.Module, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = summary(model)
        assert capsys.readouterr().out == f"{sizes}\n"

    def test_has_all_numbers(self) -> None:
        sizes = summary(net())
        lines = str(sizes).splitlines()
        for layer, shape in zip(sizes.layers, ("6x1x3x3", "6", "7x6x3x3", "11x28"), strict=True):
            (line,) = (line for line in lines if line.split()[0] == layer.name)
            assert line.split()[1:] == [
                shape,
                f"{layer.bits:g}",
                f"{layer.bytes:,}",
                f"{layer.share:.1%}",
            ]
        for number in (sizes.quantized_weights, sizes.values, sizes.file_bytes):
            assert any(f"{number:,} " in line for line in lines)
        assert f"{sizes.quantized_ratio:.1f} times" in str(sizes)
        assert f"{sizes.ratio:.1f} times" in str(sizes)

    def test_columns(self) -> None:
        """Rows of one width, however long the names are."""
        model = nn.ModuleDict({"a" * 50: nn.Linear(2, 2), "b": nn.Linear(300, 300)})
        rows = [line for line in str(summary(model)).splitlines() if line.endswith("%")]
        assert len(rows) == 2
        assert len({len(row) for row in rows}) == 1

    def test_without_quantized_weights(self) -> None:
        assert "quantized" not in str(summary(nn.Linear(3, 3)))

    def test_tensors_of_the_model_itself(self) -> None:
        """Those of no layer have a row too."""
        (layer,) = summary(nn.Linear(3, 2)).layers
        assert layer.name == ""
        assert "2x3" in str(summary(nn.Linear(3, 2)))


@pytest.mark.parametrize("model", [None, "model.dfw", {}, nn.Linear])
def test_not_a_module(model: Any) -> None:
    with pytest.raises(TypeError, match="Module"):
        summary(model)


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match=r"1\.weight.*meta"):
        summary(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


# --------------------------------------------------------------------------------------------------
# python -m dfw_opt FILE
# --------------------------------------------------------------------------------------------------


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user would; what it prints is UTF-8 unless told otherwise."""
    path = str(Path(dfw_opt.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "dfw_opt", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"} | env,
        capture_output=True,
        encoding="utf-8",
    )


def complaint(*arguments: object) -> str:
    """The one line of an error."""
    result = command(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    line = result.stderr[:-1]
    assert line.isprintable()
    return line


class TestCommand:
    def test_the_same_table(self, tmp_path: Path) -> None:
        """As of the model, which it has never seen."""
        path = tmp_path / "model.dfw"
        save_packed(net(), path)
        result = command(path)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(f"{summary(net())}\n")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        assert "missing.dfw" in complaint(tmp_path / "missing.dfw")

    def test_a_folder(self, tmp_path: Path) -> None:
        assert str(tmp_path) in complaint(tmp_path)

    def test_another_file(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        torch.save(net().state_dict(), path)
        assert f"{path}: not a packed file" in complaint(path)

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        """One bit of one weight."""
        path = tmp_path / "model.dfw"
        save_packed(net(), path)
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        assert "checksum" in complaint(path)

    def test_an_entry_with_a_hostile_name(self, tmp_path: Path) -> None:
        """In an error it is escaped, as all that comes from the file."""
        path = tmp_path / "model.dfw"
        name = "a\x1b]0;title\x07\r\nerror: b\u202e\x9b\ud800"
        reference.write(path, [], listed=[[name, "float32", [-1], "raw"]])
        assert "\\x1b" in complaint(path)

    @pytest.mark.parametrize("arguments", [(), ("a", "b")])
    def test_other_arguments(self, arguments: tuple[str, ...]) -> None:
        result = command(*arguments)
        assert result.returncode == 2
        assert result.stdout == ""
        assert "usage" in result.stderr
        assert "Traceback" not in result.stderr

    def test_hostile_names_in_the_table(self, tmp_path: Path) -> None:
        """Good files of strange names: no line has anything that a terminal obeys."""
        names = [
            "clear\x1b[2Jscreen",
            "title\x1b]0;x\x07",
            "line\r\nbreak",
            "back\x08\x08space",
            "csi\x9b31m",
            "right\u202eleft",
            "separator\u2028",
            "nul\x00",
            "lone\ud800surrogate",
            "zero\u200bwidth",
        ]
        entries = [Entry(f"{name}.weight", "float32", (1,), "raw", bytes(4)) for name in names]
        path = tmp_path / "model.dfw"
        reference.write(path, entries)
        result = command(path)
        assert (result.returncode, result.stderr) == (0, "")
        lines = result.stdout.split("\n")
        assert all(line.isprintable() for line in lines)
        for name in names:
            (word,) = re.findall("^[a-z]+", name)
            assert sum(word in line for line in lines) == 1

    def test_names_that_the_terminal_cannot_show(self, tmp_path: Path) -> None:
        path = tmp_path / "model.dfw"
        reference.write(path, [Entry("größe.weight", "float32", (1,), "raw", bytes(4))])
        assert "größe" in command(path).stdout
        result = command(path, PYTHONIOENCODING="ascii")
        assert (result.returncode, result.stderr) == (0, "")
        assert "gr" in result.stdout

    def test_shapes_of_any_size(self, tmp_path: Path) -> None:
        """Of tensors without elements, which a file can hold as many of as it likes."""
        path = tmp_path / "model.dfw"
        shapes = [(0, 2**62), (2**62, 2**62, 0), (0,) * 60, ()]
        entries = [
            Entry(f"t{number}.weight", "float32", shape, "raw", bytes(4 * reference.count(shape)))
            for number, shape in enumerate(shapes)
        ]
        reference.write(path, entries)
        result = command(path)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"0x{2**62}" in result.stdout

    def test_a_file_of_another_compression(self, tmp_path: Path) -> None:
        """The size is that of the file, not of the one that would be written here."""
        path = tmp_path / "model.dfw"
        entries = reference.entries_of(net())
        listed = [entry.listed() for entry in entries]
        path.write_bytes(
            reference.assemble(
                zlib.compress(str(listed).replace("'", '"').encode(), 0),
                b"".join(map(reference.payload_of, entries)),
            )
        )
        result = command(path)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"{path.stat().st_size:,} bytes" in result.stdout
        assert f"{summary(net()).file_bytes:,} bytes" not in result.stdout

    @pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
    def test_a_small_file_does_not_make_a_huge_table(self, tmp_path: Path) -> None:
        """One very long name, and many rows that are as wide."""
        names = ["a" * 2_000_000, *(f"t{number}" for number in range(20_000))]
        path = tmp_path / "model.dfw"
        reference.write(path, [Entry(f"{name}.w", "float32", (0,), "raw", b"") for name in names])
        assert path.stat().st_size < 200_000
        script = """
import resource, runpy, sys
import dfw_opt
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
runpy.run_module("dfw_opt", run_name="__main__")
"""
        result = subprocess.run(
            [sys.executable, "-c", script, path],
            env=os.environ | {"PYTHONPATH": str(Path(dfw_opt.__file__).parents[1])},
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in result.stderr
        assert result.returncode in (0, 2)
        assert len(result.stdout) < 50_000_000


def test_the_command_in_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.dfw"
    save_packed(nn.Linear(40, 30), path)
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "30x40" in shown
    assert f"{path.stat().st_size:,} bytes, undamaged" in shown
    path.write_bytes(path.read_bytes()[:-1])
    assert main([str(path)]) == 2
    assert "truncated" in capsys.readouterr().err


def test_repr_is_short() -> None:
    sizes = summary(nn.Linear(40, 30))
    assert repr(sizes) == f"<Summary: 1230 values in {sizes.file_bytes} bytes>"
