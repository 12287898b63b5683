"""Lightning, Fabric, Trainer and Accelerate end where a loop by hand does, bit for bit.

The loop is given the same batches and passes the loss to every step. Learning rates are so large
that γ is often below 1, and so tells the loss. Averages of the latents are compared too.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_consistent
from torch.optim import swa_utils

from dfw_opt import AveragedModel

pytestmark = pytest.mark.frameworks
kinds = pytest.mark.parametrize("kind", ["float", "binary", "ternary"])
norms = pytest.mark.parametrize("norm", ["spectral", "euclidean"])


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    """Imported here, for the default run collects this file where there are no frameworks."""
    return importlib.import_module("framework_runs")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate, and Trainer with it, keeps what it was first told for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def check(got: Any, wanted: Any) -> None:
    assert sum(0 < gamma < 1 for gamma in wanted.gammas) > 1, wanted.gammas
    assert got.gammas == wanted.gammas
    assert got.bits() == wanted.bits()
    assert_consistent(got.optimizer)


# Lightning ----------------------------------------------------------------------------------------


@kinds
@norms
@pytest.mark.parametrize(
    "how", ["closure", "watched", "manual closure", "manual loss", "manual watched"]
)
def test_lightning(runs: ModuleType, kind: str, norm: str, how: str) -> None:
    got = runs.lightning_fit(runs.start(kind, norm), how)
    check(got, runs.by_hand(runs.start(kind, norm)))


@kinds
@pytest.mark.parametrize("parts", [2, 4])
def test_lightning_accumulates(runs: ModuleType, kind: str, parts: int) -> None:
    """Which divides by ``parts`` also where there are fewer."""
    settings = {"accumulate_grad_batches": parts, "max_epochs": 2}
    wanted = runs.by_hand(runs.start(kind), parts=parts, epochs=2)
    check(runs.lightning_fit(runs.start(kind), "watched", **settings), wanted)
    # Why it has to be watched: the closure returns the last batch's share.
    assert runs.lightning_fit(runs.start(kind), **settings).gammas != wanted.gammas


@kinds
def test_lightning_in_bfloat16(runs: ModuleType, kind: str) -> None:
    got = runs.lightning_fit(runs.start(kind), precision="bf16-mixed")
    check(got, runs.by_hand(runs.start(kind), bf16=True))


@kinds
def test_lightning_resumes(runs: ModuleType, kind: str, tmp_path: Path) -> None:
    """In the middle, from a checkpoint without pickled code, the average with it."""
    often = {"every_n_train_steps": 11, "save_top_k": -1, "filename": "{step}"}
    saving = runs.callbacks.ModelCheckpoint(tmp_path, **often)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2}
    runs.lightning_fit(runs.start(kind), "watched", [saving], enable_checkpointing=True, **settings)
    rest = runs.start(kind)
    path = tmp_path / "step=11.ckpt"
    runs.lightning_fit(rest, "watched", ckpt_path=path, weights_only=True, **settings)
    wanted = runs.by_hand(runs.start(kind), parts=2, epochs=2)
    assert len(rest.gammas) == 11
    wanted.gammas = wanted.gammas[11:]
    check(rest, wanted)


def test_lightnings_average_of_float_weights(runs: ModuleType) -> None:
    """Is right, to the rounding of 1/n to float32."""
    got, wanted = runs.start("float"), runs.start("float")
    runs.lightning_fit(got, callbacks=[runs.callbacks.WeightAveraging(use_buffers=False)])
    wanted.average(multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
    average = runs.by_hand(wanted).averaged.module
    for mine, p in zip(got.net.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-5, atol=1e-6)


def test_lightnings_average_of_binary_weights(runs: ModuleType) -> None:
    """Is not binary, or lost; that of latents is binary."""

    def is_binary(net: Any) -> bool:
        return all(len(row.abs().unique()) == 1 for row in net.layers[3].weight)

    run = runs.start("binary")
    ours = runs.lightning_fit(run, callbacks=[runs.callbacks.WeightAveraging()]).averaged.module
    assert is_binary(ours)
    assert not is_binary(run.net)
    run = runs.start("binary")
    callback = runs.callbacks.StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1)
    with pytest.warns(UserWarning, match="changed from outside"):
        runs.lightning_fit(run, callbacks=[callback], max_epochs=3)
    assert_consistent(run.optimizer)


# Fabric -------------------------------------------------------------------------------------------


@kinds
@norms
@pytest.mark.parametrize("how", ["closure", "watched"])
def test_fabric(runs: ModuleType, kind: str, norm: str, how: str, tmp_path: Path) -> None:
    """A group is added through the wrapper, state saved and loaded through it, and by Fabric."""
    got, wanted = (runs.start(kind, norm, late=True) for _ in range(2))
    fabric = runs.lightning.Fabric(accelerator="cpu", devices=1)
    net, optimizer = fabric.setup(got.net, got.optimizer)
    got.averaged = AveragedModel(got.net, optimizer)
    assert optimizer.gamma.isnan()

    def add(step: int) -> None:
        if step == 3:
            wanted.optimizer.add_param_group(runs.late_group(wanted.net))

    runs.by_hand(wanted, before=add)
    if how == "watched":
        optimizer.watch_loss(got.net.criterion)
    for step, batch in enumerate(runs.loader()):
        if step == 3:
            optimizer.add_param_group(runs.late_group(got.net))
            assert_consistent(got.optimizer)
        if step == 5:
            optimizer.load_state_dict(optimizer.state_dict())
        if step == 7:
            parts = {"net": net, "optimizer": optimizer, "averaged": got.averaged}
            fabric.save(tmp_path / "saved", parts)
            for part in (*got.net.parameters(), *got.averaged.buffers()):
                part.data.zero_()
            fabric.load(tmp_path / "saved", parts)
        optimizer.zero_grad()
        runs.step(how, fabric.backward, net, optimizer, batch)
        got.averaged.update_parameters(net)
    check(got, wanted)


def test_fabric_refuses_a_loss(runs: ModuleType) -> None:
    """Its ``step()`` has no other argument than the closure."""
    run = runs.start("binary")
    _, optimizer = runs.lightning.Fabric(accelerator="cpu", devices=1).setup(run.net, run.optimizer)
    with pytest.raises(TypeError, match="loss"):
        optimizer.step(loss=1.0)


# Hugging Face -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 4}, {"bf16": True}])
def test_trainer(runs: ModuleType, kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Which divides by how many batches a step has."""
    got = runs.trainer_fit(runs.start(kind), tmp_path, num_train_epochs=2, **settings)
    parts, bf16 = settings.get("gradient_accumulation_steps", 1), "bf16" in settings
    wanted = runs.by_hand(runs.start(kind), parts=parts, epochs=2, bf16=bf16, divide_by="batches")
    check(got, wanted)


@kinds
def test_trainer_resumes(runs: ModuleType, kind: str, tmp_path: Path) -> None:
    """In the middle of an epoch, the average with it."""
    settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 8}
    runs.trainer_fit(runs.start(kind), tmp_path, **saving, **settings)
    path = tmp_path / "checkpoint-8"
    rest = runs.trainer_fit(runs.start(kind), tmp_path, path, **settings)
    wanted = runs.by_hand(runs.start(kind), parts=2, epochs=2, divide_by="batches")
    assert len(rest.gammas) == 14
    wanted.gammas = wanted.gammas[8:]
    check(rest, wanted)


@kinds
@pytest.mark.parametrize("source", ["model", "function"])
def test_trainer_divides_by_items(runs: ModuleType, kind: str, source: str, tmp_path: Path) -> None:
    """Of all batches of a step: a model that is told how many, or a function, which is watched."""
    criterion = runs.MeanOverItems()
    settings: dict[str, Any] = {"gradient_accumulation_steps": 4}
    if source == "function":
        settings |= {"watched": criterion, "compute_loss_func": criterion}
    got, wanted = (runs.start(kind, net=runs.ToldNet()) for _ in range(2))
    runs.trainer_fit(got, tmp_path, **settings)

    def before(step: int) -> None:
        wanted.net.items = min(4, runs.BATCHES - 4 * step) * runs.BATCH

    check(got, runs.by_hand(wanted, parts=4, before=before, divide_by="items"))


# Accelerate ---------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("how", ["closure", "watched", "accumulated", "bf16", "scaled"])
def test_accelerate(runs: ModuleType, kind: str, how: str, tmp_path: Path) -> None:
    """All is saved and loaded in the middle. A closure is run only where nothing accumulates."""
    from accelerate import Accelerator

    got, parts = runs.start(kind), 4 if how == "accumulated" else 1
    settings = {"mixed_precision": "bf16" if how == "bf16" else "no"}
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts, **settings)
    if how == "scaled":  # a power of 2 is exact
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    if how != "closure":
        got.optimizer.watch_loss(got.net.criterion, scaler=accelerator.scaler)
    net, optimizer, batches = accelerator.prepare(got.net, got.optimizer, runs.loader())
    got.averaged = AveragedModel(got.net, optimizer)
    accelerator.register_for_checkpointing(got.averaged)
    for epoch in range(2):
        for batch in batches:
            with accelerator.accumulate(net):
                runs.step(how, accelerator.backward, net, optimizer, batch)
                if accelerator.sync_gradients:
                    got.averaged.update_parameters(net)
                optimizer.zero_grad()
        if epoch == 0:
            accelerator.save_state(str(tmp_path))
            for part in (*got.net.parameters(), *got.averaged.buffers()):
                part.data.zero_()
            accelerator.load_state(str(tmp_path))
    check(got, runs.by_hand(runs.start(kind), parts=parts, epochs=2, bf16=how == "bf16"))
