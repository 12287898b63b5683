"""What is trained leaves the house: exported and traced, with the same scores.

The quantized weights are in the plain model, so nothing of this package has to know about it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from resnet20 import data
from resnet20.data import Data
from resnet20.settings import Settings
from resnet20.training import Run
from torch import Tensor, nn

from dfw_opt import SignActivation

pytestmark = pytest.mark.no_cover

BATCH = ({0: torch.export.Dim("batch", min=2, max=1000)},)


@pytest.fixture(scope="module", params=["xnor", "ternary"])
def trained(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    """A network after some steps, images, and its scores for them."""
    digits = data.load(None, limit=800)
    digits = Data(digits.name, digits.train, digits.held_out.part(0, 50), "test", False)
    settings = {"device": "cpu", "amp": "off", "batch_size": 16, "epochs": 2}
    run = Run(Settings.choose(settings | {"net": request.param}), digits)
    for _ in range(run.settings.epochs):
        run.history.append(run.advance())
    model = run.model.eval()
    images = run.batches.normalise(digits.held_out.images)
    with torch.no_grad():
        scores = model(images)
    assert len(scores.argmax(1).unique()) > 2
    return model, images, scores


def test_exported_program(trained: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    """Through a file, and for batches of another size than the one that was traced."""
    model, images, scores = trained
    program = torch.export.export(model, (images[:7],), dynamic_shapes=BATCH)
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    with torch.no_grad():
        assert torch.equal(loaded(images), scores)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traced(trained: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    """A TorchScript file, read back, for batches of another size than the traced one."""
    model, images, scores = trained
    traced: Any = torch.jit.trace(model, images[:7])  # type: ignore[no-untyped-call]
    traced.save(str(tmp_path / "net.ts"))
    loaded: Any = torch.jit.load(tmp_path / "net.ts")  # type: ignore[no-untyped-call]
    with torch.no_grad():
        assert torch.equal(loaded(images), scores)
    weights = dict(loaded.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(weights[name], p)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx(trained: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    """In onnxruntime. Its sums round otherwise, which may flip a sign of a number near 0."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images, scores = trained
    path, options = str(tmp_path / "net.onnx"), {"dynamo": True, "verbose": False}
    torch.onnx.export(model, (images[:7],), path, dynamic_shapes=BATCH, **options)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    same = (torch.from_numpy(found) - scores).abs().amax(1) < 1e-3
    signs = any(isinstance(module, SignActivation) for module in model.modules())
    assert same.sum() >= (48 if signs else 50)
    assert (torch.from_numpy(found)[same].argmax(1) == scores[same].argmax(1)).all()
