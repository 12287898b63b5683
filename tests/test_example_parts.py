"""Parts of the image example: networks, straight-through layers, reading and fetching images."""

import functools
import hashlib
import http.server
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from common import UserError, lr_factor
from resnet20 import data, straight_through
from resnet20.data import FILES, FOLDER, RECORD_BYTES, RECORDS, Batches, Data, Split
from resnet20.nets import Block, build
from resnet20.straight_through import BinaryConv2d, LatentConv2d, TernaryConv2d
from torch import Tensor, nn

from dfw_opt import TernaryDFW, param_groups

# Networks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "net", "quantized", "parameters"),
    [
        ("resnet20", "ternary", 18, 269_722),
        ("resnet20", "xnor", 18, 269_754),
        ("wrn16-2", "binary", 15, 691_674),
        ("densenet28", "binary", 26, 102_730),
    ],
)
def test_architectures(arch: str, net: str, quantized: int, parameters: int) -> None:
    model = build(net, "resnet", 0, arch)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    groups = [group for group in param_groups(model) if group["name"].startswith("quantized")]
    names = {name for name, p in model.blocks.named_parameters(prefix="blocks") if p.dim() == 4}
    chosen = {id(p) for group in groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in chosen} == names
    assert len(names) == quantized
    # Straight-through layers take the same ones.
    straight_through.convert(model.blocks, "binary")
    assert len([m for m in model.modules() if isinstance(m, LatentConv2d)]) == quantized


def test_same_seed_same_start() -> None:
    one, two = build("float", "resnet", 1), build("ternary", "bireal", 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = build("float", "resnet", 2)
    assert not torch.equal(other.linear.weight, one.linear.weight)


@pytest.mark.parametrize("signs", [False, True])
def test_shortcuts(signs: bool) -> None:
    """With convolutions of zeros, what is left is the sum of shortcuts."""
    x = torch.rand(1, 4, 8, 8) + 0.1
    for bireal in (False, True):
        block = Block(4, 4, 1, signs, bireal)
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
        torch.testing.assert_close(block(x), x)
    down = Block(4, 8, 2, signs, True)
    assert down(x).shape == (1, 8, 4, 4)


# Straight-through layers -------------------------------------------------------------------------


def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 5, 3, 2, 1, bias=False).double()


def latent_gradient(layer: LatentConv2d, gradient: Tensor) -> Tensor:
    """The gradient at the latent when that at the quantized weight is ``gradient``."""
    (layer.quantized() * gradient).sum().backward()  # type: ignore[no-untyped-call]
    assert layer.latent.grad is not None
    return layer.latent.grad


@pytest.mark.parametrize("kind", [LatentConv2d, BinaryConv2d, TernaryConv2d])
def test_computes_with_the_quantized_weights(kind: type[LatentConv2d]) -> None:
    plain = conv()
    layer = kind(plain)
    assert layer.latent.dim() == 2  # as Muon wants it
    x = torch.randn(2, 3, 9, 9).double()
    plain.load_state_dict({"weight": layer.quantized().detach().view_as(plain.weight)})
    torch.testing.assert_close(layer(x), plain(x))
    state = straight_through.plain_state(nn.Sequential(layer))
    assert state.keys() == {"0.weight"}
    assert torch.equal(state["0.weight"], plain.weight)


def test_binary_values_and_gradient() -> None:
    layer = BinaryConv2d(conv())
    with torch.no_grad():
        layer.latent[0, 0] = 0.0
    latent = layer.latent.detach().clone().requires_grad_()
    alpha = latent.abs().mean(1, keepdim=True)
    expected = alpha * torch.where(latent >= 0, 1.0, -1.0)
    torch.testing.assert_close(layer.quantized(), expected)
    gradient = torch.randn_like(latent)
    # The value of the sign, the derivative of the identity; alpha is left to autograd.
    sign = latent + (torch.where(latent >= 0, 1.0, -1.0) - latent).detach()
    (alpha * sign * gradient).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(latent_gradient(layer, gradient), latent.grad)


def test_ternary_values_and_gradients_by_hand() -> None:
    plain = nn.Conv2d(1, 1, (1, 5), bias=False).double()
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([2.0, 0.05, -0.08, -1.0, 0.6]))
    layer = TernaryConv2d(plain)

    def numbers(*values: float) -> Tensor:
        return torch.tensor([values], dtype=torch.float64)

    # Normalised by 2; the threshold is then 0.7 of 0.373.
    torch.testing.assert_close(layer.latent.detach(), numbers(1, 0.025, -0.04, -0.5, 0.3))
    torch.testing.assert_close(layer.quantized().detach(), numbers(0.65, 0, 0, -0.5, 0.65))
    found = latent_gradient(layer, numbers(1, 2, 3, 4, 5))
    slopes = numbers(0.65, 0.575, 0.575, 0.5, 0.65)
    torch.testing.assert_close(found, slopes * numbers(1, 2, 3, 4, 5))
    assert layer.scale_pos.grad == pytest.approx((1 + 5) / 2)
    assert layer.scale_neg.grad == pytest.approx(-4)


def test_clip() -> None:
    layer = TernaryConv2d(conv())
    with torch.no_grad():
        layer.latent.copy_(torch.linspace(-3, 3, layer.latent.numel()).view_as(layer.latent))
        layer.scale_neg.fill_(-2.0)
        layer.scale_pos.fill_(2.0)
    layer.clip()
    assert layer.latent.abs().max().item() == 1
    assert layer.latent.min().item() == -1
    assert layer.scale_neg.item() == pytest.approx(1e-3)
    assert layer.scale_pos.item() == 2.0


def test_ternary_start_is_that_of_the_optimizer() -> None:
    plain = conv().float()
    layer, p = TernaryConv2d(plain), plain.weight
    state = TernaryDFW([p]).state[p]
    torch.testing.assert_close(layer.latent.detach(), state["latent"].flatten(1))
    torch.testing.assert_close(layer.scale_pos.detach(), state["scale_pos"])
    torch.testing.assert_close(layer.scale_neg.detach(), state["scale_neg"])


def test_a_layer_of_zeros_stays_finite() -> None:
    plain = conv()
    nn.init.zeros_(plain.weight)
    assert torch.equal(TernaryConv2d(plain).quantized(), torch.zeros(5, 27).double())


def test_schedules() -> None:
    assert [lr_factor("none", done) for done in (0, 0.9)] == [1, 1]
    assert lr_factor("cosine", 0.5) == pytest.approx(0.5)
    steps = [lr_factor("step", done) for done in (0.49, 0.5, 0.75)]
    assert steps == pytest.approx([1, 0.1, 0.01])
    assert lr_factor("parq", 0.75) == pytest.approx(0.001)


# Images ------------------------------------------------------------------------------------------


def write_cifar10(folder: Path) -> None:
    """All six files: record i of a file has label i mod 10, and the file's number everywhere."""
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        records = torch.full((RECORDS, RECORD_BYTES), number, dtype=torch.uint8)
        records[:, 0] = torch.arange(RECORDS) % 10
        records[0, 1:4] = torch.tensor([11, 12, 13])  # a red line begins the record
        (folder / name).write_bytes(records.numpy().tobytes())


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write_cifar10(directory / FOLDER)
    return directory


def test_binary_layout(cifar10: Path) -> None:
    images = data.load(str(cifar10), limit=20_001)
    assert (len(images.train), len(images.held_out), images.flips) == (20_001, 10_000, True)
    assert images.train.images[0, 0, :4, 0].tolist() == [11, 12, 13, 0]
    assert images.train.images[0, 0, :3, 1].tolist() == [0, 0, 0]
    assert images.train.images[20_000, 0, :3, 0].tolist() == [11, 12, 13]
    assert set(images.held_out.images[1].flatten().tolist()) == {5}
    assert images.train.labels[:12].tolist() == [*range(10), 0, 1]
    judged = data.load(str(cifar10 / FOLDER), validate=True)
    assert (len(judged.train), len(judged.held_out)) == (45_000, 5_000)
    assert judged.held_out_name == "validation"


def test_damaged_files_are_named(cifar10: Path) -> None:
    path = cifar10 / FOLDER / FILES[2]
    whole = path.read_bytes()
    try:
        for content, reason in ((whole[:-1], "bytes instead of"), (b"\xff" + whole[1:], "label")):
            path.write_bytes(content)
            with pytest.raises(UserError, match=f"{FILES[2]}.*{reason}"):
                data.load(str(cifar10))
    finally:
        path.write_bytes(whole)


def test_batches_follow_from_seed_and_epoch() -> None:
    digits = data.load(None, limit=50)
    batches = Batches(digits, torch.device("cpu"))
    first, again = (list(batches.epoch(0, 1, 16)) for _ in range(2))
    assert len(first) == 3
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert not torch.equal(first[0][0], next(batches.epoch(0, 2, 16))[0])
    shares = [next(batches.epoch(0, 1, 16, rank, 2)) for rank in (0, 1)]
    for i in (0, 1):
        assert torch.equal(
            torch.stack([share[i] for share in shares], 1).flatten(0, 1), first[0][i]
        )


def test_crops_and_flips() -> None:
    """Each is a window of the padded image, half of them mirrored."""
    image = torch.arange(1, 1 + 32 * 32).remainder(251).to(torch.uint8).view(1, 32, 32, 1)
    split = Split(image.expand(400, -1, -1, 3).contiguous(), torch.zeros(400, dtype=torch.int64))
    batches = Batches(Data("", split, split, "test", True), torch.device("cpu"))
    (images, _), *_ = batches.epoch(0, 0, 400)
    padded = nn.functional.pad(image, (0, 0, 4, 4, 4, 4)).expand(-1, -1, -1, 3)
    windows = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    both = torch.cat([w for window in windows for w in (window, window.flip(2))])
    found = (images[:, None] - batches.normalise(both)[None]).abs().amax((2, 3, 4)).argmin(1)
    assert torch.equal(batches.normalise(both)[found], images)
    assert len(set(found.tolist())) > 100
    assert 150 < int((found % 2).sum()) < 250


def test_download(cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server on this machine: checked, unpacked, and not fetched again."""
    pytest.importorskip("pooch")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(cifar10 / FOLDER, FOLDER)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    target = tmp_path / "target"
    try:
        with pytest.raises(UserError, match="hash"):
            data.download(target)
        monkeypatch.setattr(data, "SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
        data.download(target)
    finally:
        server.shutdown()
        server.server_close()
    assert len(data.load(str(target)).held_out) == RECORDS
    data.download(target)
    with pytest.raises(UserError, match="--download: "):
        data.download(tmp_path / "other")
