"""Packed files: what is chosen, every bit back, all or nothing; and what `summary` says of them."""

# torch leaves some functions untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import io
import json
import math
import os
import runpy
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resnet20 import nets
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import swa_utils

import dfw_opt
from dfw_opt import (
    AveragedModel,
    PackedFileError,
    ProjectedDFW,
    TernaryDFW,
    load_packed,
    packed,
    param_groups,
    save_packed,
    summary,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ENCODINGS = ["binary", "ternary", *(f"uniform{bits}" for bits in range(2, 9))]


class Holder(nn.Module):
    """A module of just these tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


def contents(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Every bit of a model."""
    state = model.state_dict()
    return {
        name: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in state.items()
    }


def blank(model: nn.Module) -> nn.Module:
    """Another one with other values, all bytes 1."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            ones = torch.ones(tensor.numel() * tensor.itemsize, dtype=torch.uint8)
            if tensor.numel():
                tensor.copy_(ones.view(tensor.dtype).view(tensor.shape))
    return other


def quantized(
    encoding: str, shape: tuple[int, ...], scales: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Weights as the quantizers compute them, with scales of this shape, spread as documented."""
    g = torch.Generator().manual_seed(sum(shape) + sum(map(ord, encoding)))
    wide = torch.promote_types(dtype, torch.float32)
    top = torch.rand(scales, generator=g, dtype=wide) + 0.5
    for axis, (size, count) in enumerate(zip(shape, scales, strict=True)):
        top = top.repeat_interleave(size // count, axis)
    if encoding == "binary":
        k = torch.randint(0, 2, shape, generator=g).to(wide) * 2 - 1
        return (top * k).to(dtype)
    if encoding == "ternary":
        k = torch.randint(-1, 2, shape, generator=g).to(wide)
        return torch.where(k > 0, 0.37 * top, torch.where(k < 0, -1.7 * top, 0.0)).to(dtype)
    q = 2 ** (int(encoding[7:]) - 1) - 1
    k = torch.randint(-q, q + 1, shape, generator=g).to(wide)
    firsts = tuple(slice(None, None, s // c) for s, c in zip(shape, scales, strict=True))
    k[firsts] = q  # the largest of each block is the last level
    return torch.where(k == 0, 0.0, top * (k / torch.tensor(q))).to(dtype)


def check(model: nn.Module, path: Path) -> dict[str, str]:
    """Every bit comes back, and nothing is larger than it was. Returns the encodings."""
    before = contents(model)
    save_packed(model, path)
    other = blank(model)
    assert load_packed(other, path) is other
    assert contents(other) == before
    assert contents(model) == before
    stored, tied = packed.store_model(model)
    for tensor in stored.values():
        parts = [part for part in (tensor.data, tensor.scale) if part is not None]
        assert sum(part.nbytes for part in parts) <= math.prod(tensor.shape) * tensor.dtype.itemsize
    return {name: tensor.encoding for name, tensor in stored.items()} | tied


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.dfw"


# --- Which encoding ---

LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "tensor": ((8, 48), (1, 1)),
    "linear": ((12, 130), (12, 1)),
    "conv1d": ((8, 40, 5), (8, 1, 1)),
    "conv2d": ((8, 16, 3, 3), (8, 1, 1, 1)),
    "conv3d": ((4, 8, 3, 3, 3), (4, 1, 1, 1, 1)),
    "transposed1d": ((20, 9, 5), (1, 9, 1)),
    "transposed2d": ((16, 8, 3, 3), (1, 8, 1, 1)),
    "transposed, two groups": ((16, 6, 4, 4), (2, 6, 1, 1)),
    "experts": ((3, 10, 120), (3, 10, 1)),
    "experts, transposed": ((3, 120, 10), (3, 1, 10)),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str, dtype: torch.dtype, path: Path) -> None:
    """Scales are found where they are, in one file of all encodings."""
    shape, scales = LAYERS[layer]
    model = Holder(**{name: quantized(name, shape, scales, dtype) for name in ENCODINGS})
    found = check(model, path)
    stored, _ = packed.store_model(model)
    for name in ENCODINGS:
        if (name, dtype) == ("uniform8", torch.bfloat16):
            continue  # the last levels are one in 8 bits: kept as it is, should none be found
        tensor = stored[name]
        assert found[name] in (name, "ternary" if name == "uniform2" else name)
        assert tensor.scale is not None
        lead = (2,) if found[name] == "ternary" else ()
        assert tuple(tensor.scale.shape) == lead + scales
        wide = torch.promote_types(dtype, torch.float32)
        assert tensor.scale.dtype == (wide if found[name].startswith("uniform") else dtype)
        per_byte = 5 if found[name] == "ternary" else 8
        places = int(found[name][7:]) if found[name].startswith("uniform") else 1
        assert len(tensor.data) == places * -(-math.prod(shape) // per_byte)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_near_misses(encoding: str, dtype: torch.dtype, path: Path) -> None:
    """One weight away from an encoding: none is rounded to it."""
    w = quantized(encoding, (6, 80), (6, 1), dtype)
    near = {f"x{i}": w.clone() for i in (0, int(w.view(-1).abs().argmax()), 479)}
    for name, tensor in near.items():
        tensor.view(-1).view(torch.uint8)[int(name[1:]) * w.itemsize] ^= 1
    near["zero"] = w.index_put((torch.tensor(3), torch.tensor(40)), torch.tensor(-0.0).to(dtype))
    assert encoding not in check(Holder(**near), path).values() or dtype == torch.bfloat16
    special = {f"x{i}": w.clone() for i in range(3)}
    for tensor, value in zip(special.values(), (math.nan, math.inf, -math.inf), strict=True):
        tensor[2, 7] = value
    assert set(check(Holder(**special), path).values()) == {"raw"}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_special_values(dtype: torch.dtype, path: Path) -> None:
    patterns = torch.randint(0, 256, (20, 30 * dtype.itemsize), dtype=torch.uint8)
    info = torch.finfo(dtype)
    extreme = [0.0, -0.0, info.max, -info.max, info.tiny, info.smallest_normal / 2, math.inf]
    rows = torch.tensor(extreme, dtype=dtype)[:, None].repeat(1, 40)
    signs = torch.where(torch.rand(7, 40) < 0.5, -1, 1).to(dtype)
    model = Holder(
        anything=patterns.view(dtype),  # NaN of any payload among them
        vector=patterns.view(dtype)[0].clone(),
        binary=rows * signs,
        nan=torch.full((9, 40), math.nan, dtype=dtype),  # binary or not, the same NaN
        zeros=torch.zeros(9, 40, dtype=dtype),
    )
    found = check(model, path)
    assert [found[name] for name in ("anything", "vector", "binary", "zeros")] == [
        *("raw", "raw", "binary", "binary")
    ]


OTHERS = [
    *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    *("complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", OTHERS)
def test_other_dtypes(name: str, path: Path) -> None:
    dtype = getattr(torch, name)
    values = torch.arange(24 * dtype.itemsize, dtype=torch.uint8)
    values = values % 2 if dtype == torch.bool else values
    tensor = values.view(dtype).view(4, 6)
    model = Holder(matrix=tensor, scalar=tensor[1, 2].clone(), none=tensor[:0].clone())
    assert set(check(model, path).values()) <= {"raw"}


def test_raw(path: Path) -> None:
    """Vectors, scalars, tensors without elements; a weight that would not be smaller."""
    model = Holder(
        ones=torch.ones(100),
        scalar=torch.tensor(2.5),
        steps=torch.tensor(7),
        none=torch.zeros(0, 3),
        other=torch.zeros(3, 0, 2),
        tiny=torch.ones(1, 1),
        column=torch.randn(300, 1).sign() * torch.rand(300, 1),
    )
    assert set(check(model, path).values()) == {"raw"}
    assert check(nn.ReLU(), path) == {}


def test_by_hand(path: Path) -> None:
    """One small file, spelled out; what reads it knows only safetensors."""
    thirds = torch.tensor([-3, -2, -1, 0, 1, 2, 3, 3, 3, 0]) / 3
    model = Holder(
        b=torch.tensor([[1.5, -1.5, -1.5, 1.5, 1.5], [-2, 2, 2, 2, -2]]),
        t=torch.tensor([[0, 0.5, -4, 0.5, 0], [0, 0, 0.5, -4, -4], [-4, 0, 0, 0, 0]]),
        u=torch.stack([1.5 * thirds, 0.5 * thirds.flip(0), thirds]),
        v=torch.tensor([1.0, -2]),
    )
    model.register_buffer("w", model.get_buffer("t"))
    save_packed(model, path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dfw_opt"])
        parts = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118
    assert about == {
        "version": 1,
        "packed": {
            "b": ["binary", "float32", [2, 5]],
            "t": ["ternary", "float32", [3, 5]],
            "u": ["uniform3", "float32", [3, 10]],
        },
        "tied": {"w": "t"},
    }
    ternary = [1 + 3 * 2 + 0 + 27 * 2 + 81, 1 + 3 + 9 * 2, 0 + 3 + 9 + 27 + 81]
    numbers = [*(0, 1, 2, 3, 4, 5, 6, 6, 6, 3), *(3, 6, 6, 6, 5, 4, 3, 2, 1, 0)]
    numbers += numbers[:10]
    rows = [sum((n >> bit & 1) << i for i, n in enumerate(numbers)) for bit in range(3)]
    assert parts == {
        "b": [0b00100110, 0b00000010],
        "b.scale": [[1.5], [2.0]],
        "t": ternary,
        "t.scale": [[[0.5]], [[4.0]]],
        "u": [byte for row in rows for byte in row.to_bytes(4, "little")],
        "u.scale": [[1.5], [0.5], [1.0]],
        "v": [1.0, -2.0],
    }


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    levels=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-40]), min_size=1),
    seed=st.integers(0, 99),
)
def test_any_tensor_comes_back(
    dtype: torch.dtype, shape: list[int], levels: list[float], seed: int
) -> None:
    drawn = torch.randint(len(levels), shape, generator=torch.Generator().manual_seed(seed))
    tensor = torch.tensor(levels, dtype=dtype)[drawn]
    stored = packed.store(tensor)
    assert contents(Holder(x=packed.restore(stored))) == contents(Holder(x=tensor))


def test_layouts_in_memory(path: Path) -> None:
    """Row-major in the file whatever the strides, which loading leaves as they are."""
    w = quantized("binary", (4, 6, 3, 3), (4, 1, 1, 1), torch.float32)
    model = Holder(
        last=nn.Parameter(w.to(memory_format=torch.channels_last)),
        turned=w.view(4, 54).t(),
        part=quantized("ternary", (8, 30), (1, 1), torch.float32)[::2, 3:28:3],
        permuted=torch.randn(3, 4, 5).permute(2, 0, 1),
    )
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    found = check(model, path)
    assert [found[name] for name in ("last", "turned", "part")] == ["binary", "binary", "ternary"]
    load_packed(model, path)
    assert {name: tensor.stride() for name, tensor in model.state_dict().items()} == strides


# --- Models ---


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(8 * 16, 9), nn.Linear(9, 3)),
        )


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "binary": lambda model: ProjectedDFW(param_groups(model)),
    "ternary": lambda model: TernaryDFW(param_groups(model)),
    "uniform3": lambda model: ProjectedDFW(param_groups(model), quantizer="uniform", bits=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("encoding", OPTIMIZERS)
def test_trained_networks(encoding: str, dtype: torch.dtype, path: Path) -> None:
    """Found as what the optimizer makes of them; the scores are the same to the last bit."""
    model, fresh = small_net().to(dtype), small_net(1).to(dtype)
    optimizer = OPTIMIZERS[encoding](model)
    images = torch.randn(8, 1, 8, 8, dtype=dtype)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(images).float().square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    assert [check(model, path)[f"{i}.weight"] for i in (0, 3, 7, 8)] == [
        *("raw", encoding, encoding, "raw")
    ]
    load_packed(fresh, path)
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model, ProjectedDFW(param_groups(model)))


def compiled_inside(model: nn.Module) -> nn.Module:
    model[3] = torch.compile(model[3])  # type: ignore[index, operator]
    return model


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda model: model,
    "compiled": torch.compile,
    "compiled inside": compiled_inside,
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
    "torch's average": swa_utils.AveragedModel,
    "average": averaged,
}


@pytest.mark.parametrize("target", WRAPPERS)
@pytest.mark.parametrize("source", WRAPPERS)
def test_wrapped_models(source: str, target: str, path: Path) -> None:
    """The file is that of the plain model, and loads into any."""
    plain = small_net()
    ProjectedDFW(param_groups(plain))
    saved = WRAPPERS[source](plain)
    expected = contents(saved.module if "average" in source else plain)
    save_packed(saved, path)
    bare = small_net(1)
    wrapped = WRAPPERS[target](bare)
    load_packed(wrapped, path)
    held = wrapped.module if "average" in target else bare  # which has a copy
    assert list(contents(held).values()) == list(expected.values())


def test_tied_weights(path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(40, 20), nn.Linear(20, 40)
            if tied:
                self.out.weight = self.embed.weight

    model = Pair(tied=True)
    with torch.no_grad():
        model.embed.weight.copy_(quantized("binary", (40, 20), (40, 1), torch.float32))
    assert check(model, path)["out.weight"] == "embed.weight"
    once = path.stat().st_size
    loose = load_packed(Pair(tied=False), path)  # what is one in the file may be two in the model
    assert torch.equal(loose.embed.weight, loose.out.weight)
    save_packed(loose, path)
    assert path.stat().st_size > once + 200
    assert contents(load_packed(Pair(tied=True), path)) == contents(model)
    with torch.no_grad():
        loose.out.weight[3, 5] *= -1
    save_packed(loose, path)
    refused(Pair(tied=True), path, "'embed.weight' differ, and the model ties them")


def test_the_same_objects(path: Path) -> None:
    """Loaded in place: an optimizer that holds the parameters still does; also after inference."""
    save_packed(small_net(), path)
    model = small_net(1)
    held = {name: (id(t), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.inference_mode():
        load_packed(model, path)
        frozen = small_net(2)
    after = {name: (id(t), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    assert after == held
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    with torch.device("meta"):  # another default device
        save_packed(load_packed(frozen, path), path)
        load_packed(model, path)
    assert contents(frozen) == contents(model) == contents(small_net())


def hooked(name: str, value: Any) -> nn.Module:
    """What is loaded into it would be lost."""

    def put(module: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        state[prefix + name] = value

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_state_dict_post_hook(put)
    return model


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Tensor]:
    store = FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    torch.distributed.destroy_process_group()


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (dict, TypeError, r"model=\{\} must be a torch\.nn\.Module"),
    "a class": (lambda: nn.Linear, TypeError, r"must be a torch\.nn\.Module"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), ValueError, "'weight' in model .*with values"),
    "lazy": (lambda: nn.LazyLinear(2), ValueError, "'weight' in model .*run a lazy model"),
    "extra state": (lambda: hooked("extra", {}), ValueError, r"'0\.extra' in model \(dict\)"),
    "sparse": (lambda: Holder(x=torch.eye(3).to_sparse()), ValueError, "'x' in model .*dense"),
    "expanded": (lambda: Holder(x=torch.ones(1).expand(3)), ValueError, "'x' .*clone"),
    "a hook's": (lambda: hooked("weight", torch.ones(2, 2)), ValueError, r"'0\.weight' in model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_models(kind: str, path: Path) -> None:
    """An error that names the tensor, before there is a file, or any change."""
    make, error, match = REFUSED[kind]
    model: Any = make()
    for act in (save_packed, load_packed, lambda model, _: summary(model)):
        with pytest.raises(error, match=match):
            act(model, path)
    assert not path.exists()


def test_refused_views(sharded: Tensor, path: Path) -> None:
    conjugate = torch.ones(3, dtype=torch.complex64).conj()
    for tensor in (conjugate, conjugate.imag, nn.Parameter(sharded)):
        with pytest.raises(ValueError, match="'x' in model"):
            save_packed(Holder(x=tensor), path)
    assert not path.exists()


# --- Files ---


def script(code: str, *arguments: object) -> None:
    """Run it in another process, which has to succeed."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(dfw_opt.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number", [save_packed, load_packed])
def test_without_safetensors(
    number: Callable[..., Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_packed(nn.Linear(3, 3), path)
    before = path.read_bytes()
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "dfw-opt\[files\]"'):
        number(nn.Linear(3, 3), path)
    assert path.read_bytes() == before
    summary(nn.Linear(3, 3))  # needs none


def test_a_process_without_numpy(path: Path, tmp_path: Path) -> None:
    """torch, safetensors and dfw_opt are all that it takes, to load and to save."""
    save_packed(Holder(w=quantized("binary", (5, 30), (5, 1), torch.float32)), path)
    again = tmp_path / "again"
    code = """
import sys
sys.modules["numpy"] = None
import torch, dfw_opt
model = torch.nn.Linear(30, 5, bias=False)
model.register_parameter("w", model._parameters.pop("weight"))
dfw_opt.save_packed(dfw_opt.load_packed(model, sys.argv[1]), sys.argv[2])
"""
    script(code, path, again)
    assert again.read_bytes() == path.read_bytes()


class TestPlaces:
    def test_replaces_what_is_there(self, tmp_path: Path) -> None:
        """Through a link, with its permissions; nothing else is left."""
        target, link = tmp_path / "target", tmp_path / "link"
        link.symlink_to(target)
        for mode in (None, 0o600, 0o664):
            if mode:
                target.chmod(mode)
            save_packed(small_net(), str(link) if mode else link)
            assert contents(load_packed(small_net(1), link)) == contents(small_net())
            assert mode is None or stat.S_IMODE(target.stat().st_mode) == mode
        assert link.is_symlink()
        assert sorted(tmp_path.iterdir()) == [link, target]

    @pytest.mark.parametrize("there", ["nothing", "folder", "pipe", "file in the way"])
    def test_cannot_be_written(self, there: str, tmp_path: Path) -> None:
        path = tmp_path / "x" / "model.dfw"
        if there == "file in the way":
            path.parent.touch()
        elif there != "nothing":
            path.parent.mkdir()
            (path.mkdir if there == "folder" else lambda: os.mkfifo(path))()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OSError, match=r"not written.*model\.dfw"):
            save_packed(small_net(), path)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("broken", ["fsync", "replace", "write"])
    def test_the_old_file_survives(
        self, broken: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_packed(small_net(), path)
        before = path.read_bytes()

        def fail(*arguments: Any) -> Any:
            raise OSError(28, "No space left on device")

        where = {"fsync": "os.fsync", "replace": "pathlib.Path.replace"}
        monkeypatch.setattr(where.get(broken, "dfw_opt.packed._buffer"), fail, raising=True)
        if broken == "write":
            monkeypatch.setattr(packed, "_digest", lambda *_: "")
        with pytest.raises(OSError, match=r"what is there is unchanged: No space"):
            save_packed(small_net(1), path)
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]

    def test_cannot_be_read(self, tmp_path: Path) -> None:
        for name in ("missing", ""):
            with pytest.raises(OSError, match=r"directory|device"):
                load_packed(small_net(), tmp_path / name)


def forge(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Changes what a file says, and seals it again."""
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["dfw_opt"])
        names = file.keys()
        parts = {name: file.get_tensor(name).clone() for name in names}
    change(about, parts)
    text = json.dumps(about)
    save_file(parts, path, {"dfw_opt": text, "sha256": packed._digest(text, parts)})


def refused(model: nn.Module, path: Path, match: str = ".") -> None:
    """With the documented error, which names the file; the model has not changed."""
    before = contents(model)
    with pytest.raises(PackedFileError, match=match) as caught:
        load_packed(model, path)
    assert str(path) in str(caught.value)
    assert contents(model) == before


def ends(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*list(small_net())[:8], *layers)


MISFITS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fewer": (ends, r"only the model has \[\], only the file \['8.bias', '8.weight'\]"),
    "more": (lambda: ends(nn.Linear(9, 3), nn.PReLU()), r"model has \['9.weight'\], only .*\[\]"),
    "others": (lambda: nn.ModuleDict({"a": small_net()}), r"has \['a.0.bias', .* file \['0.bias'"),
    "shape": (
        lambda: ends(nn.Linear(9, 4)),
        r"'8.weight' is .*\(3, 9\)\) in the file, .*\(4, 9\)\)",
    ),
    "dtype": (lambda: small_net().double(), r"float32, .* in the file, \(torch.float64.*model\.to"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_another_model(kind: str, path: Path) -> None:
    make, match = MISFITS[kind]
    save_packed(small_net(), path)
    refused(make(), path, match)


@pytest.mark.parametrize(
    "kind", ["empty", "text", "pickle", "safetensors", "version", "truncated", "long"]
)
def test_another_file(kind: str, path: Path) -> None:
    model = small_net()
    save_packed(model, path)
    if kind == "version":
        forge(path, lambda about, _: about.update(version=2))
        refused(model, path, "of version 2; install the dfw-opt")
    elif kind == "truncated":
        for size in range(path.stat().st_size - 1, 0, -37):
            os.truncate(path, size)
            refused(model, path, "not a packed file, or a damaged one")
    elif kind == "long":
        path.write_bytes(path.read_bytes() + b"\0")
        refused(model, path, "not a packed file, or a damaged one")
    else:
        pickle = io.BytesIO()
        torch.save(model.state_dict(), pickle)
        path.write_bytes({"empty": b"", "text": b"x" * 999}.get(kind, pickle.getvalue()))
        if kind == "safetensors":
            save_file({"x": torch.ones(3)}, path)
        refused(model, path, "not a packed file")


# --- Files that mean harm ---


def sample() -> Holder:
    """Some of everything, in few bytes."""
    return Holder(
        conv=nn.Parameter(quantized("binary", (3, 4, 3, 3), (3, 1, 1, 1), torch.float32)),
        tern=nn.Parameter(quantized("ternary", (4, 30), (1, 1), torch.bfloat16)),
        grid=quantized("uniform3", (2, 40), (2, 1), torch.float32),
        free=nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)),
        mask=torch.tensor([True, False, True]),
        steps=torch.tensor(3),
        pair=torch.complex(torch.ones(2), torch.arange(2.0)),
        none=torch.zeros(0, 3),
    )


class Target:
    """A model, and a file that is changed and then loaded into it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.model = folder / "model.dfw", blank(sample())
        save_packed(sample(), self.path)
        self.good = self.path.read_bytes()
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def loads(self) -> bool:
        """All of it, or nothing and the documented error."""
        before = contents(self.model)
        try:
            load_packed(self.model, self.path)
        except PackedFileError:
            assert contents(self.model) == before
            return False
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(self.before[name])
        return True


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("harm"))


TOKENS: list[Any] = [
    *(None, True, [], {}, "", "raw", "binary", "ternary", "uniform2", "uniform8", "uniform9"),
    *("float32", "float16", "bfloat16", "qint8", "save", "__class__", "conv", "free", "\x1b[2J\n"),
    *(-1, 0, 1, 2, 3, 3.0, 30, 1e308, 2**31, 2**62, 2**63, 10**30, [2**40, 2**40], [0], [1] * 70),
]
SHAPES = [(), (0,), (1,), (2,), (3, 1), (1, 3), (2, 1, 1), (3, 1, 1, 1), (2, 5, 1), (108,), (1, 9)]
DTYPES = [torch.uint8, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all items of nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*at, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*at, key))


def tamper(
    about: dict[str, Any], parts: dict[str, Tensor], kind: str, number: int, token: Any, new: Tensor
) -> None:
    """Replaces, or takes away, one thing that a file says or holds."""
    if kind in ("say", "unsay"):
        paths = list(places(about))
        *inner, last = paths[number % len(paths)]
        parent = reduce(getitem, inner, about)
        parent.update({last: token}) if isinstance(parent, dict) else parent.insert(last, token)
        if kind == "unsay":
            del parent[last]
    else:
        names = sorted(name for name in parts if kind != "repeat" or name.endswith(".scale"))
        old = parts.pop(names[number % len(names)])
        if kind != "drop":
            new = old.reshape(-1).repeat(7) if kind == "repeat" else new
            parts[names[number % len(names)]] = new


SPANS = st.sampled_from([0, 1, 1, 1, 2, 8, 100])
EDITS = st.tuples(st.integers(0, 10**4), SPANS, st.binary(max_size=9))
MANY = pytest.mark.parametrize("examples", [300, pytest.param(5000, marks=pytest.mark.slow)])


@MANY
def test_damaged_files(examples: int, target: Target) -> None:
    """Bytes changed, cut out, put in, or repeated: found in all of them."""

    @settings(max_examples=examples, deadline=None, database=None)
    @given(edits=st.lists(EDITS, min_size=1, max_size=3))
    def run(edits: list[tuple[int, int, bytes]]) -> None:
        data = bytearray(target.good)
        for place, length, new in edits:
            start = place % len(data)
            data[start : start + length] = new or data[:start]
        target.path.write_bytes(data)
        assert not target.loads() or data == target.good

    run()


@MANY
def test_forged_files(examples: int, target: Target) -> None:
    """They say something else, and the checksum is right: loaded, or refused as any other."""

    @settings(max_examples=examples, deadline=None, database=None)
    @given(
        kind=st.sampled_from(["say", "say", "unsay", "hold", "hold", "drop", "repeat"]),
        number=st.integers(0, 10**4),
        token=st.sampled_from(TOKENS),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
    )
    def run(kind: str, number: int, token: Any, shape: Any, dtype: torch.dtype) -> None:
        new = torch.full(shape, 3).to(dtype)
        target.path.write_bytes(target.good)
        forge(target.path, lambda about, parts: tamper(about, parts, kind, number, token, new))
        target.loads()

    run()


def test_every_byte(target: Target) -> None:
    """One bit of each: safetensors would notice few of them."""
    for position in range(len(target.good)):
        data = bytearray(target.good)
        data[position] ^= 1 << position % 8
        target.path.write_bytes(data)
        assert not target.loads()


HUGE: list[Callable[[dict[str, Any], dict[str, Tensor]], object]] = [
    lambda about, parts: about["packed"]["conv"].__setitem__(2, [2**30, 2**30]),
    lambda about, parts: parts.update({"conv.scale": torch.ones(1000, 3, 1, 1, 1)}),
    lambda about, parts: parts.update({"grid.scale": torch.ones(2, 1, 1, 10000)}),
    lambda about, parts: parts.update({"tern.scale": torch.ones(2, 1, 100000).bfloat16()}),
    lambda about, parts: parts.update({"conv": torch.zeros(10**7).byte()}),
]


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_stays_bounded(target: Target, tmp_path: Path) -> None:
    for number, change in enumerate(HUGE):
        target.path.write_bytes(target.good)
        forge(target.path, change)
        (tmp_path / f"{number}").write_bytes(target.path.read_bytes())
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    (tmp_path / "forged").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    (tmp_path / "long").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    code = """
import resource, sys, pathlib, torch, dfw_opt, safetensors
model = torch.nn.Module()
for name, tensor in torch.load(sys.argv[2]).items():
    model.register_buffer(name, tensor)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
for path in pathlib.Path(sys.argv[1]).iterdir():
    try:
        dfw_opt.load_packed(model, path)
    except dfw_opt.PackedFileError as error:
        assert "alloc" not in str(error), error
    else:
        raise SystemExit(f"{path} was loaded")
"""
    state = tmp_path.with_suffix(".pt")
    torch.save(sample().state_dict(), state)
    script(code, tmp_path, state)


# --- Sizes ---


def float_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def test_resnet20(path: Path) -> None:
    model = nets.build("xnor", "resnet", 0)
    ProjectedDFW(param_groups(model))
    save_packed(model, path)
    assert path.stat().st_size <= 66_000
    assert float_size(model) / path.stat().st_size > 16


@pytest.mark.parametrize("width", [500, pytest.param(2500, marks=pytest.mark.slow)])
def test_a_large_binary_net(width: int, path: Path) -> None:
    """The slow one has 25 million weights."""
    shape = (width, 4 * width)
    model = Holder(w=quantized("binary", shape, (width, 1), torch.float32))
    save_packed(model, path)
    assert float_size(model) / path.stat().st_size > 30


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """Counted on paper: it is what is printed, and what a file holds of tensors."""
    model = Holder(
        binary=quantized("binary", (7, 54), (7, 1), torch.float32),
        ternary=torch.tensor([[0.0, 0.0, 0.0, 1.0, -2.0]]).repeat(11, 1),
        grid=quantized("uniform4", (5, 100), (5, 1), torch.float32),
        free=torch.randn(3, 4),
        narrow=torch.randn(2, 4).half(),
        bias=torch.ones(9),
        steps=torch.tensor(3),
    )
    model.register_buffer("again", model.get_buffer("binary"))
    sizes = summary(model)
    assert capsys.readouterr().out == f"{sizes}\n"
    rows = {row.name: row[1:] for row in sizes.tensors}
    assert rows == {
        "binary": ((7, 54), "binary", None, 378, 1512, 28 + 48),
        "ternary": ((11, 5), "ternary", 0.6, 55, 220, 8 + 11),
        "grid": ((5, 100), "uniform4", None, 500, 2000, 20 + 252),
        "free": ((3, 4), "float32", None, 12, 48, 48),
        "narrow": ((2, 4), "float16", None, 8, 16, 16),
        "bias": ((9,), "float32", None, 9, 36, 36),
        "steps": ((), "int64", None, 1, 8, 8),
        "again": ((7, 54), "binary", None, 0, 0, 0),
    }
    assert (sizes.total("weights"), sizes.total("bytes", quantized=True)) == (963, 76 + 19 + 272)
    assert [line.split() for line in str(sizes).splitlines()] == [
        ["tensor", "shape", "kind", "bits", "zeros", "in", "float", "packed"],
        ["binary", "7x54", "binary", "1.61", "1,512", "76"],
        ["ternary", "11x5", "ternary", "2.76", "60.0%", "220", "19"],
        ["grid", "5x100", "uniform4", "4.35", "2,000", "272"],
        ["free", "3x4", "float32", "32", "48", "48"],
        ["narrow", "2x4", "float16", "16", "16", "16"],
        ["again", "7x54", "binary", "tied", "0", "0"],
        ["vectors,", "scalars", "1.0", "x", "smaller", "44", "44"],
        ["quantized", "10.2", "x", "smaller", "3,732", "367"],
        ["all", "8.1", "x", "smaller", "3,840", "475"],
    ]


@pytest.mark.parametrize("shape", [(), (3,), (300, 300), (1,) * 30, (0, 10**15)])
def test_the_table_is_80_columns_wide(shape: tuple[int, ...]) -> None:
    names = ["a" * 90, "größe", "b\x1b[2J\n\u202e", "w"]
    lines = str(summary(Holder(**{name: torch.zeros(shape) for name in names}))).splitlines()
    assert all(len(line) <= 80 and line.isascii() and line.isprintable() for line in lines)
    assert len(lines) == (4 if len(shape) < 2 else 8)


def test_command_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["dfw_opt", *map(str, arguments)])
        runpy.run_module("dfw_opt", run_name="__main__")
        return capsys.readouterr().out

    save_packed(sample(), path)
    table = str(summary(sample())).splitlines()
    capsys.readouterr()
    assert sorted(run(path).splitlines()) == sorted(table)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit, match=r"^error: .*model\.dfw: damaged: its checksum"):
        run(path)
    with pytest.raises(SystemExit, match=r"^error: .*missing"):
        run(path.parent / "missing")
    with pytest.raises(SystemExit, match="2"):
        run()
