"""Training by Lightning, Hugging Face Trainer and Accelerate: it learns, and takes the right steps.

Right is what a plain loop does that is given the same data, in the same order, and passes the loss
to every step. The learning rates are so large that γ is often below 1, and so tells the loss.
"""

# torch leaves backward() untyped.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_consistent, everything
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import CosineAnnealingLR

from dfw_opt import MultiClassHingeLoss

pytestmark = pytest.mark.frameworks

ROOT = Path(__file__).parent.parent
KINDS = pytest.mark.parametrize("kind", ["float", "binary", "ternary"])
PARTS = 4
LR = 0.5


@pytest.fixture(scope="module")
def runs() -> ModuleType:
    """Imported here, for the default run collects this file where there are no frameworks."""
    return importlib.import_module("framework_runs")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate, and Trainer with it, keeps what it was first told for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def check_same(got: Any, wanted: Any) -> None:
    """The same γ at every step and the same end, up to rounding in float64."""
    assert len(got.gammas) == len(wanted.gammas)
    assert sum(0 < gamma < 1 for gamma in wanted.gammas) >= 3, wanted.gammas
    assert got.gammas == pytest.approx(wanted.gammas, rel=1e-9, abs=1e-12)
    for left, right in zip(got.numbers(), wanted.numbers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def differs(got: Any, wanted: Any) -> bool:
    return bool(got.gammas != pytest.approx(wanted.gammas, rel=1e-3))


class TestLightning:
    @pytest.mark.parametrize("how", ["closure", "accumulated", "bf16-mixed", "16-mixed"])
    @KINDS
    def test_learns(self, runs: ModuleType, kind: str, how: str) -> None:
        from lightning.pytorch.plugins.precision import MixedPrecision

        settings: dict[str, Any] = {}
        if how == "accumulated":
            settings["accumulate_grad_batches"] = PARTS
        elif how == "16-mixed":  # by its name it is not to be had on the CPU
            settings["plugins"] = [MixedPrecision("16-mixed", "cpu")]
        elif how == "bf16-mixed":
            settings["precision"] = how
        steps = 6 * (88 // (PARTS if how == "accumulated" else 1))
        module = runs.Lit(kind, watched=how in ("accumulated", "16-mixed"), steps=steps)
        trainer = runs.lightning_trainer(max_epochs=6, **settings)
        validation = runs.loader(1400, 1797, 100, torch.float32)
        start = trainer.validate(module, validation, verbose=False)[0]
        trainer.fit(module, runs.loader(0, 1400, 16, torch.float32), validation)
        end = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert start["loss"] > 0.9
        assert end["loss"] < 0.45
        assert end["accuracy"] > 0.82
        assert len(module.record.gammas) == steps
        assert_consistent(module.record.optimizer)
        assert int(module.record.optimizer.skipped_steps) == 0
        if how == "16-mixed":
            assert trainer.precision_plugin.scaler.get_scale() >= 1024

    @pytest.mark.parametrize("watched", [False, True], ids=["closure", "watched"])
    @KINDS
    def test_is_the_plain_loop(self, runs: ModuleType, kind: str, watched: bool) -> None:
        """With a schedule, and with validation every few steps."""
        data = (0, 960, 32, torch.float64)
        module = runs.Lit(kind, watched=watched, dtype=torch.float64, steps=60, lr=LR)
        trainer = runs.lightning_trainer(max_epochs=2, precision="64-true", val_check_interval=7)
        trainer.fit(module, runs.loader(*data), runs.loader(1400, 1500, 50, torch.float64))
        net = runs.mlp(torch.float64)
        optimizer = runs.make(kind, net, lr=LR)
        wanted = runs.plain_loop(
            optimizer,
            runs.divided(net, module.criterion, 1),
            runs.loader(*data),
            epochs=2,
            scheduler=CosineAnnealingLR(optimizer, 60),
        )
        check_same(module.record, wanted)

    @pytest.mark.parametrize("images", [960, 860])
    @KINDS
    def test_accumulation(self, runs: ModuleType, kind: str, images: int) -> None:
        """As the large batch; where the last one is short, as the sum that Lightning makes."""
        modules = {}
        for watched in (True, False):
            module = runs.Lit(kind, watched=watched, dtype=torch.float64, lr=LR)
            trainer = runs.lightning_trainer(
                max_epochs=2, precision="64-true", accumulate_grad_batches=PARTS
            )
            trainer.fit(
                module,
                runs.loader(0, images, 8, torch.float64),
                runs.loader(1400, 1500, 50, torch.float64),
            )
            modules[watched] = module
        net = runs.mlp(torch.float64)
        large = images % (8 * PARTS) == 0
        size, parts = (8 * PARTS, 1) if large else (8, PARTS)
        wanted = runs.plain_loop(
            runs.make(kind, net, lr=LR),
            runs.divided(net, modules[True].criterion, parts),
            runs.loader(0, images, size, torch.float64),
            parts=parts,
            epochs=2,
        )
        check_same(modules[True].record, wanted)
        # Why it has to be watched: the closure returns a quarter of the last batch's loss.
        assert differs(modules[False].record, wanted)

    @KINDS
    def test_half_precision_takes_the_unscaled_loss(self, runs: ModuleType, kind: str) -> None:
        """The scale, here 2¹⁰ at first and then half and twice that, is not seen by γ."""
        from lightning.pytorch.plugins.precision import MixedPrecision

        gammas = []
        for scale in (2.0**10, 1.0):
            scaler = GradScaler("cpu", init_scale=scale, growth_interval=5)
            module = runs.Lit(kind, watched=True, lr=3.0)
            trainer = runs.lightning_trainer(
                max_epochs=1,
                limit_train_batches=8,
                plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
            )
            trainer.fit(module, runs.loader(0, 256, 32, torch.float32))
            gammas.append(module.record.gammas)
            assert scaler.get_scale() > scale
        assert any(0 < gamma < 1 for gamma in gammas[0])
        # Half precision rounds differently where the gradients are a thousand times larger.
        assert gammas[0][:3] == pytest.approx(gammas[1][:3], rel=0.02)

    @KINDS
    def test_manual_optimization(self, runs: ModuleType, kind: str) -> None:
        data = (0, 960, 32, torch.float64)
        module = runs.ManualLit(kind, dtype=torch.float64, lr=LR)
        runs.lightning_trainer(max_epochs=1, precision="64-true").fit(module, runs.loader(*data))
        net = runs.mlp(torch.float64)
        wanted = runs.plain_loop(
            runs.make(kind, net, lr=LR),
            runs.divided(net, module.criterion, 1),
            runs.loader(*data),
        )
        check_same(module.record, wanted)

    @KINDS
    def test_resume(self, runs: ModuleType, kind: str, tmp_path: Path) -> None:
        """Bit for bit where it would have been, by a checkpoint without pickled code."""
        from lightning.pytorch.callbacks import ModelCheckpoint

        def fit(name: str, epochs: int, **resume: Any) -> Any:
            module = runs.Lit(kind, watched=True, steps=40, lr=LR)
            saving = ModelCheckpoint(dirpath=tmp_path / name, save_last=True)
            trainer = runs.lightning_trainer(
                max_epochs=epochs,
                enable_checkpointing=True,
                callbacks=[saving],
                accumulate_grad_batches=2,
            )
            trainer.fit(module, runs.loader(0, 640, 32, torch.float32), **resume)
            return module.record

        whole = fit("whole", 4)
        half = fit("half", 2)
        rest = fit("rest", 4, ckpt_path=tmp_path / "half" / "last.ckpt", weights_only=True)
        assert half.gammas + rest.gammas == whole.gammas
        assert everything(rest.optimizer) == everything(whole.optimizer)
        assert everything(half.optimizer) != everything(whole.optimizer)


class OwnLoss(nn.Module):
    """A model that returns its loss, and is not told how many items a step has."""

    def __init__(self, runs: ModuleType) -> None:
        super().__init__()
        self.net = runs.mlp(torch.float64)
        self.criterion = MultiClassHingeLoss(smooth=True)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scores = self.net(pixel_values)
        return {"loss": self.criterion(scores, labels), "logits": scores}


class SumOverItems(nn.Module):
    """A ``compute_loss_func`` that is a module, so that it can be watched."""

    def forward(self, outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return torch.div(loss, num_items_in_batch)


class TestTransformers:
    @KINDS
    def test_learns(self, runs: ModuleType, kind: str, tmp_path: Path) -> None:
        """As on the page: with evaluation, Trainer's own schedule, and accumulation."""
        from transformers import Trainer

        model = runs.transformer()
        optimizer = runs.make(kind, model, lr=0.1)
        record = runs.Record(optimizer)
        optimizer.watch_loss(model)
        trainer = Trainer(
            model,
            runs.trainer_arguments(
                tmp_path,
                num_train_epochs=5,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=PARTS,
                train_sampling_strategy="random",
                eval_strategy="epoch",
                eval_on_start=True,
            ),
            train_dataset=runs.examples(0, 1400),
            eval_dataset=runs.examples(1400, 1797),
            optimizers=(optimizer, None),
            compute_metrics=lambda p: {
                "accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())
            },
        )
        trainer.train()
        evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(evaluations) == 6
        assert evaluations[0]["eval_loss"] > 2.5
        assert evaluations[-1]["eval_loss"] < 1.0
        assert evaluations[-1]["eval_accuracy"] > 0.7
        assert len(record.gammas) == 5 * 44
        assert_consistent(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0  # the end of the linear schedule

    @pytest.mark.parametrize(
        ("loss", "images"),
        [("items", 384), ("items", 340), ("model", 384), ("model", 340), ("function", 340)],
    )
    @KINDS
    def test_accumulation(
        self, runs: ModuleType, kind: str, loss: str, images: int, tmp_path: Path
    ) -> None:
        """The three ways in which Trainer makes a loss; 340 images leave a short last step."""
        model = OwnLoss(runs) if loss == "model" else runs.transformer(torch.float64)
        criterion = SumOverItems()
        twin = copy.deepcopy(model)
        lr = 2.0 if loss == "model" else 0.5

        def fit(max_grad_norm: float) -> Any:
            from transformers import Trainer

            trained = copy.deepcopy(model)
            optimizer = runs.make(kind, trained, lr=lr)
            record = runs.Record(optimizer)
            watched = optimizer.watch_loss(criterion if loss == "function" else trained)
            Trainer(
                trained,
                runs.trainer_arguments(
                    tmp_path,
                    num_train_epochs=1,
                    per_device_train_batch_size=8,
                    gradient_accumulation_steps=PARTS,
                    lr_scheduler_type="constant",
                    eval_strategy="steps",
                    eval_steps=3,
                    max_grad_norm=max_grad_norm,
                ),
                train_dataset=runs.examples(0, images, torch.float64),
                eval_dataset=runs.examples(1400, 1500, torch.float64),
                optimizers=(optimizer, None),
                compute_loss_func=criterion if loss == "function" else None,
            ).train()
            watched.remove()
            return record

        def mean_of_means(batches: Sequence[Any]) -> Iterable[Tensor]:
            return (twin(x, y)["loss"] / len(batches) for x, y in batches)

        large = images == 384
        wanted = runs.plain_loop(
            runs.make(kind, twin, lr=lr),
            mean_of_means if loss == "model" else runs.mean_over_items(twin),
            runs.loader(0, images, 8 * PARTS if large else 8, torch.float64),
            parts=1 if large else PARTS,
        )
        check_same(fit(max_grad_norm=0), wanted)
        # Trainer's default clips the gradient but not the loss.
        assert differs(fit(max_grad_norm=1.0), wanted)

    @KINDS
    def test_scaler(self, runs: ModuleType, kind: str, tmp_path: Path) -> None:
        """Of what ``fp16=True`` does on an accelerator, all but float16: a power of 2 is exact."""
        from transformers import Trainer

        ends = []
        for scaled in (False, True):
            model = runs.transformer()
            optimizer = runs.make(kind, model, lr=LR)
            record = runs.Record(optimizer)
            arguments = runs.trainer_arguments(tmp_path, max_steps=8, gradient_accumulation_steps=2)
            trainer = Trainer(
                model,
                arguments,
                train_dataset=runs.examples(0, 64),
                optimizers=(optimizer, None),
            )
            if scaled:
                trainer.accelerator.scaler = GradScaler("cpu", growth_interval=3)
            optimizer.watch_loss(model, scaler=trainer.accelerator.scaler)
            trainer.train()
            assert any(0 < gamma < 1 for gamma in record.gammas)
            ends.append((record.gammas, everything(optimizer)))
        assert trainer.accelerator.scaler.get_scale() == 2.0**18
        assert ends[0] == ends[1]

    @pytest.mark.parametrize("how", ["gradient_checkpointing", "bf16"])
    def test_memory_savers(self, runs: ModuleType, how: str, tmp_path: Path) -> None:
        """Recomputed blocks change nothing, bfloat16 little."""
        from transformers import Trainer

        gammas = []
        for settings in ({}, {how: True}):
            model = runs.transformer()
            optimizer = runs.make("binary", model, lr=LR)
            record = runs.Record(optimizer)
            optimizer.watch_loss(model)
            arguments = runs.trainer_arguments(
                tmp_path, max_steps=8, lr_scheduler_type="constant", **settings
            )
            Trainer(
                model,
                arguments,
                train_dataset=runs.examples(0, 64),
                optimizers=(optimizer, None),
            ).train()
            assert_consistent(optimizer)
            gammas.append(record.gammas)
        assert any(0 < gamma < 1 for gamma in gammas[0])
        if how == "bf16":
            assert gammas[1][0] == pytest.approx(gammas[0][0], rel=0.1)
            assert gammas[1] != gammas[0]
        else:
            assert gammas[1] == pytest.approx(gammas[0], rel=1e-5)

    @KINDS
    def test_resume(self, runs: ModuleType, kind: str, tmp_path: Path) -> None:
        """In the middle of an epoch, bit for bit."""
        from transformers import Trainer

        def fit(folder: Path, checkpoint: Path | None = None) -> Any:
            model = runs.convolutional()
            optimizer = runs.make(kind, model, lr=LR)
            record = runs.Record(optimizer)
            optimizer.watch_loss(model)
            arguments = runs.trainer_arguments(
                folder,
                num_train_epochs=2,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                train_sampling_strategy="random",
                save_strategy="steps",
                save_steps=5,
            )
            trainer = Trainer(
                model,
                arguments,
                train_dataset=runs.examples(0, 192),
                optimizers=(optimizer, None),
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return record

        whole = fit(tmp_path / "whole")
        rest = fit(tmp_path / "rest", tmp_path / "whole" / "checkpoint-15")
        assert len(whole.gammas) == 24
        assert rest.gammas == whole.gammas[15:]
        assert everything(rest.optimizer) == everything(whole.optimizer)


class TestAccelerate:
    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @KINDS
    def test_learns(self, runs: ModuleType, kind: str, precision: str) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=PARTS, mixed_precision=precision
        )
        net = runs.mlp()
        plain = runs.make(kind, net)
        record = runs.Record(plain)
        criterion = MultiClassHingeLoss(smooth=True)
        plain.watch_loss(criterion)
        scheduler = CosineAnnealingLR(plain, 6 * 22)
        model, optimizer, batches, scheduler = accelerator.prepare(
            net, plain, runs.loader(0, 1400, 16, torch.float32), scheduler
        )
        images, labels = (values[1400:] for values in runs.digits())

        def evaluate() -> tuple[float, float]:
            with torch.no_grad():
                scores = model(images)
                accuracy = (scores.argmax(1) == labels).float().mean()
                return float(criterion(scores, labels)), float(accuracy)

        start, _ = evaluate()
        for _ in range(6):
            for x, y in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(criterion(model(x), y))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            end, accuracy = evaluate()
        assert start > 0.9
        assert end < 0.45
        assert accuracy > 0.82
        assert len(record.gammas) == 6 * 22
        assert_consistent(plain)

    @KINDS
    def test_closure(self, runs: ModuleType, kind: str) -> None:
        """Without accumulation, the prepared optimizer passes a closure on."""
        from accelerate import Accelerator

        data = (0, 960, 32, torch.float64)
        criterion = MultiClassHingeLoss(smooth=True)
        accelerator = Accelerator(cpu=True)
        net = runs.mlp(torch.float64)
        record = runs.Record(runs.make(kind, net, lr=LR))
        model, optimizer, batches = accelerator.prepare(net, record.optimizer, runs.loader(*data))
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = criterion(model(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
        net = runs.mlp(torch.float64)
        wanted = runs.plain_loop(
            runs.make(kind, net, lr=LR), runs.divided(net, criterion, 1), runs.loader(*data)
        )
        check_same(record, wanted)

    @pytest.mark.parametrize("images", [960, 860])
    @KINDS
    def test_accumulation(self, runs: ModuleType, kind: str, images: int) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
        criterion = MultiClassHingeLoss(smooth=True)
        net = runs.mlp(torch.float64)
        record = runs.Record(runs.make(kind, net, lr=LR))
        record.optimizer.watch_loss(criterion)
        model, optimizer, batches = accelerator.prepare(
            net, record.optimizer, runs.loader(0, images, 8, torch.float64)
        )
        for _ in range(2):
            for x, y in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(criterion(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
        net = runs.mlp(torch.float64)
        large = images % (8 * PARTS) == 0
        size, parts = (8 * PARTS, 1) if large else (8, PARTS)
        wanted = runs.plain_loop(
            runs.make(kind, net, lr=LR),
            runs.divided(net, criterion, parts),
            runs.loader(0, images, size, torch.float64),
            parts=parts,
            epochs=2,
        )
        check_same(record, wanted)

    @KINDS
    def test_scaler(self, runs: ModuleType, kind: str) -> None:
        """Of what ``mixed_precision="fp16"`` does on an accelerator, all but float16."""
        from accelerate import Accelerator

        ends = []
        for scaled in (False, True):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            scaler = GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110)
            if scaled:
                accelerator.scaler = scaler
            criterion = MultiClassHingeLoss(smooth=True)
            net = runs.mlp()
            plain = runs.make(kind, net, lr=LR)
            plain.watch_loss(criterion, scaler=accelerator.scaler)
            model, optimizer = accelerator.prepare(net, plain)
            skipped = []
            for number, (x, y) in enumerate(runs.loader(0, 640, 32, torch.float32)):
                if number < 2 and not scaled:
                    continue  # where the scale is too large
                with accelerator.accumulate(model):
                    accelerator.backward(1e3 * criterion(model(x), y))
                    optimizer.step()
                    if accelerator.sync_gradients:
                        skipped.append(optimizer.step_was_skipped)
                    optimizer.zero_grad()
            assert skipped == [True] * scaled + [False] * 9
            assert 0 < float(plain.gamma) < 1
            ends.append((float(plain.gamma), everything(plain)))
        assert ends[0] == ends[1]

    @KINDS
    def test_resume(self, runs: ModuleType, kind: str, tmp_path: Path) -> None:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        criterion = MultiClassHingeLoss(smooth=True)

        def prepared() -> tuple[Any, Any, Any]:
            net = runs.mlp()
            record = runs.Record(runs.make(kind, net, lr=LR))
            record.optimizer.watch_loss(criterion)
            return record, *accelerator.prepare(net, record.optimizer)

        def fit(model: Any, optimizer: Any) -> None:
            for x, y in runs.loader(0, 320, 32, torch.float32):
                optimizer.zero_grad()
                accelerator.backward(criterion(model(x), y))
                optimizer.step()

        whole, *first = prepared()
        fit(*first)
        accelerator.save_state(tmp_path)
        fit(*first)
        accelerator.free_memory()
        rest, *second = prepared()
        accelerator.load_state(tmp_path)
        fit(*second)
        assert rest.gammas == whole.gammas[10:]
        assert everything(rest.optimizer) == everything(whole.optimizer)


@pytest.mark.parametrize("framework", ["lightning", "transformers", "accelerate"])
def test_two_processes(runs: ModuleType, framework: str, tmp_path: Path) -> None:
    """Bit for bit the same on both ranks, and to rounding as one process on all the data."""
    paths = (ROOT, ROOT / "examples", ROOT / "tests")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [
            *launch,
            f"--nproc-per-node={runs.RANKS}",
            str(paths[2] / "framework_runs.py"),
            framework,
            str(tmp_path),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert list(first) == list(runs.KINDS)
    for kind, results in first.items():
        assert results["bits"] == second[kind]["bits"]
        assert results["gammas"] == second[kind]["gammas"]
        assert len(results["gammas"]) == runs.STEPS
        if framework == "transformers":
            net = runs.transformer(torch.float64)
            objective = runs.mean_over_items(net)
        else:
            net = runs.mlp(torch.float64)
            objective = runs.divided(net, MultiClassHingeLoss(smooth=True), 1)
        joined = runs.PART * runs.PARTS * runs.RANKS
        wanted = runs.plain_loop(
            runs.make(kind, net, lr=runs.DISTRIBUTED[framework]),
            objective,
            runs.loader(0, runs.TRAINED, joined, torch.float64),
        )
        check_same(runs.Result(results["gammas"], results["numbers"]), wanted)
