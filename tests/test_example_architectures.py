"""The example's --arch: Wide ResNet and DenseNet, which every optimizer trains like ResNet-20."""

import itertools
import math
from pathlib import Path

import cifar_resnet20
import pytest
import torch
from resnet20 import checkpoint, data, nets
from resnet20.data import Data
from resnet20.errors import UserError
from resnet20.settings import Settings
from resnet20.straight_through import layers, plain_state
from resnet20.training import Run
from torch import Tensor, nn

from dfw_opt import param_groups

OTHERS = ("wrn16-2", "densenet28")
ARCHES = pytest.mark.parametrize("arch", OTHERS)


@pytest.fixture(scope="module")
def digits() -> Data:
    everything = data.load(None, limit=32)
    return Data(everything.name, everything.train, everything.held_out.part(0, 20), "test", False)


def choose(**given: object) -> Settings:
    return Settings.choose({"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 1} | given)


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_sizes_are_those_of_the_papers() -> None:
    """0.7 million parameters, as Zagoruyko and Komodakis say; the other counted by hand."""
    wide, dense = (nets.build("float", "resnet", 0, arch) for arch in OTHERS)
    assert sum(p.numel() for p in wide.parameters()) == 691_674
    by_hand, width = 3 * 24 * 9, 24
    for stage in range(3):
        if stage > 0:
            by_hand += 2 * width + width * (width // 2)
            width //= 2
        for _ in range(4):
            by_hand += 2 * width + width * 48 + 2 * 48 + 48 * 12 * 9
            width += 12
    by_hand += 2 * width + width * 10 + 10
    assert sum(p.numel() for p in dense.parameters()) == by_hand
    # The depth that they are called by: all layers but shortcuts.
    assert sum(c.kernel_size == (3, 3) for c in convolutions(wide)) + 1 == 14
    assert len(convolutions(dense)) + 1 == 28


@ARCHES
def test_shapes(arch: str) -> None:
    model = nets.build("float", "resnet", 0, arch)
    sizes: list[int] = []
    for module in convolutions(model):
        module.register_forward_hook(lambda *call: sizes.append(call[2].shape[-1]))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert {32, 16, 8} == set(sizes)
    assert sizes[-1] == 8


def test_wide_block() -> None:
    """The shortcut is the identity where it can be, and takes what the first norm gives."""
    blocks = nets.build("float", "resnet", 0, "wrn16-2").blocks.eval()
    assert [block.get_parameter("conv1.weight").shape[0] for block in blocks] == [
        *[32] * 2,
        *[64] * 2,
        *[128] * 2,
    ]
    x = torch.randn(2, 32, 8, 8)
    with torch.no_grad():
        for block in (blocks[1], blocks[2]):
            block.get_parameter("conv2.weight").zero_()
        assert torch.equal(blocks[1](x), x)
        around = blocks[2].get_submodule("shortcut")
        norm = blocks[2].get_submodule("before1.0")
        torch.testing.assert_close(blocks[2](x), around(norm(x).relu()))


def test_dense_layer_keeps_what_there_is() -> None:
    layer = nets.build("float", "resnet", 0, "densenet28").blocks[0]
    x = torch.randn(2, 24, 8, 8)
    y = layer(x)
    assert y.shape == (2, 36, 8, 8)
    assert torch.equal(y[:, :24], x)


@ARCHES
def test_same_seed_same_weights(arch: str) -> None:
    one, same, other = (nets.build("ternary", "resnet", seed, arch) for seed in (7, 7, 8))
    weights = [[m.weight for m in convolutions(model)] for model in (one, same, other)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][3], weights[2][3])


@pytest.mark.parametrize(
    ("arch", "net", "optimizer"),
    [*itertools.product(OTHERS, ("float", "binary", "ternary"), ("dfw", "adam", "sgd"))],
)
def test_every_combination_takes_steps(arch: str, net: str, optimizer: str, digits: Data) -> None:
    run = Run(choose(arch=arch, net=net, optimizer=optimizer), digits)
    before = [p.detach().clone() for p in run.model.parameters()]
    inner = {id(p) for p in param_groups(nets.build(net, "resnet", 0, arch))[0]["params"]}
    images, labels = next(run.augmenter.epoch(0, 0, 16))
    losses = [float(run.train_step(images, labels)[0]) for _ in range(2)]
    assert all(map(math.isfinite, losses))
    for p, old in zip(run.model.parameters(), before, strict=True):
        assert not torch.equal(p.detach(), old)
    quantized = [
        value
        for name, value in plain_state(run.model).items()
        if name.startswith("blocks.") and value.dim() == 4
    ]
    # All but the first and the last layer, 1x1 convolutions included, whatever the optimizer.
    assert len(quantized) == len(inner) == len(convolutions(run.model)) - 1
    assert len(layers(run.model)) == (0 if net == "float" or optimizer == "dfw" else len(inner))
    for value in quantized:
        assert is_like(net, value)
    assert not is_like("ternary", run.model.conv.weight)
    assert not is_like("ternary", run.model.linear.weight)


def is_like(net: str, weight: Tensor) -> bool:
    if net == "binary":
        return all(levels(channel.abs()) == 1 for channel in weight)
    return (levels(weight) <= 3) == (net == "ternary")


def levels(values: Tensor) -> int:
    return len(set(values.flatten().tolist()))


@ARCHES
def test_a_run_of_its_own(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same script: its name, its checkpoint, its file."""
    monkeypatch.chdir(tmp_path)
    job = ["--arch", arch, "--limit=32", "--batch-size=16", "--threads=1", "--device=cpu"]
    job += ["--amp=off", "--epochs=1"]
    assert cifar_resnet20.main([*job, "--export", "net.dfw"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()[1:]
    assert first.startswith(f"binary {nets.ARCHES[arch]} (")
    assert "shortcuts" not in first
    assert float(last.split(" times smaller")[0].split()[-1]) > 8
    out = Path("runs") / f"{arch}-binary-dfw"
    assert checkpoint.load(out)["settings"]["arch"] == arch
    assert cifar_resnet20.main(["--resume", "--out", str(out), "--export", "net.dfw"]) == 0


@ARCHES
def test_bench(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = ["--arch", arch, "--limit=32", "--batch-size=8", "--threads=1", "--device=cpu"]
    assert cifar_resnet20.main([*job, "--bench=1"]) == 0
    out = capsys.readouterr().out
    for name in ("bare float loop, SGD", "float, dfw", "binary, dfw", "ternary, dfw"):
        assert f"| {name} |" in out


@ARCHES
def test_what_is_for_resnet20_alone(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--net xnor is for --arch resnet20"):
        choose(arch=arch, net="xnor")
    with pytest.raises(UserError, match="--shortcut bireal is for --arch resnet20"):
        choose(arch=arch, shortcut="bireal")
    assert choose(arch=arch).net == "binary"
    assert cifar_resnet20.main(["--table", "--arch", arch, "--out", str(tmp_path / "t")]) == 2
    assert "--arch does not go with --table" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
