"""The checks that torch makes of its own optimizers, with what ships of its test harness.

torch's test files are not part of its package; what they check is written anew here, with a closure
wherever a step is taken: these optimizers need the loss, torch's do not. Parameters are matrices,
so that all can be quantized.
"""

# The harness is built on unittest, and is untyped.
# ruff: noqa: PT009, PT027
# mypy: disable-error-code="no-untyped-call, untyped-decorator"

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import (
    ConstantLR,
    ExponentialLR,
    LinearLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    get_error_inputs_for_all_optims,
    optims,
)
from torch.testing._internal.common_utils import TestCase

from dfw_opt import DFW, ProjectedDFW, TernaryDFW


def config(kwargs: dict[str, Any], desc: str) -> Any:
    """Settings alone: the tests bring the parameters."""
    params: Any = None
    return OptimizerInput(params=params, kwargs=kwargs, desc=desc)


def inputs_dfw(device: str, dtype: Any = None) -> list[Any]:
    return [
        config({}, "default"),
        config({"lr": 0.01}, "non-default lr"),
        config({"lr": torch.tensor(0.01)}, "Tensor lr"),
        config({"momentum": 0.0}, "no momentum"),
        config({"momentum": 0.5, "weight_decay": 0.1}, "weight_decay"),
        config({"eps": 0.0}, "no eps"),
    ]


def inputs_projected(device: str, dtype: Any = None) -> list[Any]:
    return [
        *inputs_dfw(device, dtype),
        config({"quantizer": None, "radius": 2.0}, "box"),
        config({"step_size": "closed_form"}, "closed form"),
        config({"radius": 0.5}, "radius"),
    ]


def inputs_ternary(device: str, dtype: Any = None) -> list[Any]:
    return [
        *inputs_dfw(device, dtype),
        config({"step_size": "closed_form"}, "closed form"),
        config({"threshold": 0.3}, "threshold"),
    ]


def bad(kwargs: dict[str, Any], regex: str, error: type[Exception] = ValueError) -> Any:
    return ErrorOptimizerInput(config(kwargs, regex), error_type=error, error_regex=regex)


def errors_dfw(device: str, dtype: Any) -> list[Any]:
    sparse = Parameter(torch.randn(2, 2, device=device, dtype=dtype))
    sparse.grad = torch.ones_like(sparse).to_sparse()
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        bad({"lr": -0.01}, "lr=-0.01"),
        bad({"momentum": 1.0}, "momentum=1.0"),
        bad({"momentum": -0.5}, "momentum=-0.5"),
        bad({"weight_decay": -1.0}, "weight_decay=-1.0"),
        bad({"eps": -1e-3}, "eps=-0.001"),
        ErrorOptimizerInput(
            OptimizerInput(params=[sparse], kwargs={}, desc="sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="sparse",
        ),
    ]


def errors_projected(device: str, dtype: Any) -> list[Any]:
    vector = Parameter(torch.randn(2, device=device, dtype=dtype))
    return [
        *errors_dfw(device, dtype),
        bad({"radius": 0.0}, "radius=0.0"),
        bad({"quantizer": "octal"}, "quantizer='octal'"),
        bad({"step_size": "guess"}, "step_size='guess'"),
        ErrorOptimizerInput(
            OptimizerInput(params=[vector], kwargs={}, desc="vector"),
            error_type=ValueError,
            error_regex="param_groups",
        ),
    ]


def errors_ternary(device: str, dtype: Any) -> list[Any]:
    return [*errors_projected(device, dtype), bad({"threshold": 1.0}, "threshold=1.0")]


SCHEDULER_INPUTS = (
    [
        lambda opt: StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: ReduceLROnPlateau(opt),
    ],
    [
        lambda opt: ConstantLR(opt, factor=0.4, total_iters=4),
        lambda opt: ExponentialLR(opt, gamma=0.99),
    ],
    [
        lambda opt: LinearLR(opt, start_factor=0.4, total_iters=4),
        lambda opt: PolynomialLR(opt, power=0.9, total_iters=400),
    ],
)


def info(cls: Any, inputs: Callable[..., Any], errors: Callable[..., Any]) -> Any:
    return OptimizerInfo(
        cls,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=SCHEDULER_INPUTS,
        supported_impls=("foreach",),
        supports_complex=False,
    )


OPTIMIZERS = [
    info(DFW, inputs_dfw, errors_dfw),
    info(ProjectedDFW, inputs_projected, errors_projected),
    info(TernaryDFW, inputs_ternary, errors_ternary),
]
TRACKED = ("latent", "scale_pos", "scale_neg", "momentum_buffer")


class TestHarness(TestCase):
    def problem(
        self, device: str, dtype: Any, transposed: bool = False
    ) -> tuple[Parameter, Parameter, Callable[[Any], Tensor]]:
        """A layer of two matrices, and a closure for an optimizer of theirs."""
        generator = torch.Generator(device).manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

        if transposed:
            weight, bias = randn(5, 10).t(), randn(10, 2)[:, :1]
        else:
            weight, bias = randn(10, 5), randn(10, 1)
        weight, bias = Parameter(weight), Parameter(bias)
        x, y = randn(5, 16), randn(10, 16)

        def closure(optimizer: Any) -> Tensor:
            optimizer.zero_grad()
            loss = (weight @ x + bias - y).square().mean()
            loss.backward()
            return loss

        return weight, bias, closure

    def configurations(self, optim_info: Any, device: str, dtype: Any) -> Iterator[dict[str, Any]]:
        for given in optim_info.optim_inputs_func(device=device, dtype=dtype):
            for foreach in (False, True):
                yield {**given.kwargs, "foreach": foreach}

    def run_steps(self, optimizer: Any, closure: Callable[[Any], Tensor], steps: int) -> None:
        for _ in range(steps):
            optimizer.step(lambda: closure(optimizer))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_infos_leave_the_implementation_to_the_test(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        for given in optim_info.optim_inputs_func(device=device):
            self.assertNotIn("foreach", given.kwargs)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_errors(self, device: str, dtype: Any, optim_info: Any) -> None:
        for case in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            given = case.optimizer_error_input
            params = given.params
            if params is None:
                params = [Parameter(torch.randn(1, 1, device=device, dtype=dtype))]
            if case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                if issubclass(case.error_type, Warning):
                    with self.assertWarnsRegex(case.error_type, case.error_regex):
                        optim_info.optim_cls(params, **given.kwargs)
                else:
                    with self.assertRaisesRegex(case.error_type, case.error_regex):
                        optim_info.optim_cls(params, **given.kwargs)
            else:
                optimizer = optim_info.optim_cls(params, **given.kwargs)
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    optimizer.step(loss=1.0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_forloop_goes_right_direction(self, device: str, dtype: Any, optim_info: Any) -> None:
        for transposed in (False, True):
            for kwargs in self.configurations(optim_info, device, dtype):
                weight, bias, closure = self.problem(device, dtype, transposed)
                optimizer = optim_info.optim_cls([weight, bias], **kwargs)
                first = closure(optimizer).item()
                self.run_steps(optimizer, closure, 20)
                self.assertLess(closure(optimizer).item(), first, msg=str(kwargs))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_right_direction_with_schedulers_and_groups(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            for makers in optim_info.scheduler_inputs:
                weight, bias, closure = self.problem(device, dtype)
                groups = [{"params": [weight], "lr": 0.05}, {"params": [bias]}]
                optimizer = optim_info.optim_cls(groups, **kwargs)
                schedulers = [make(optimizer) for make in makers]
                first = closure(optimizer).item()
                for _ in range(20):
                    loss = optimizer.step(lambda: closure(optimizer))  # noqa: B023
                    for scheduler in schedulers:
                        if isinstance(scheduler, ReduceLROnPlateau):
                            scheduler.step(loss.detach())
                        else:
                            scheduler.step()
                self.assertLess(closure(optimizer).item(), first, msg=str(kwargs))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_tensor_lr(self, device: str, dtype: Any, optim_info: Any) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            kwargs.pop("lr", None)
            outcomes = []
            for lr in (1e-2, torch.tensor(1e-2), torch.tensor([1e-2])):
                weight, bias, closure = self.problem(device, dtype)
                optimizer = optim_info.optim_cls([weight, bias], lr=lr, **kwargs)
                self.run_steps(optimizer, closure, 5)
                outcomes.append((weight, bias))
                if isinstance(lr, Tensor):
                    # The caller's tensor is read, not replaced or written.
                    self.assertIs(optimizer.param_groups[0]["lr"], lr)
                    self.assertEqual(lr.item(), 1e-2, atol=1e-8, rtol=0)
            self.assertEqual(outcomes[0], outcomes[1], atol=1e-5, rtol=1e-4)
            self.assertEqual(outcomes[0], outcomes[2], atol=1e-5, rtol=1e-4)

    @optims(OPTIMIZERS, dtypes=[torch.float64])
    def test_foreach_matches_forloop(self, device: str, dtype: Any, optim_info: Any) -> None:
        for given in optim_info.optim_inputs_func(device=device, dtype=dtype):
            tracker = TensorTracker({"rtol": 1e-9, "atol": 1e-11})
            for foreach in (False, True):
                weight, bias, closure = self.problem(device, dtype)
                optimizer = optim_info.optim_cls([weight, bias], **given.kwargs, foreach=foreach)
                for _ in range(7):
                    self.run_steps(optimizer, closure, 1)
                    tensors = [
                        state[name]
                        for state in (optimizer.state[weight], optimizer.state[bias])
                        for name in TRACKED
                        if name in state
                    ]
                    for tensor in (optimizer.gamma, weight, bias, *tensors):
                        if foreach:
                            tracker.pop_check_set(tensor.detach(), self)
                        else:
                            tracker.add(tensor)
            self.assertTrue(tracker.all_popped())

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_param_groups_lr(self, device: str, dtype: Any, optim_info: Any) -> None:
        """A group with lr 0 stays where it is while the other one moves."""
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, closure = self.problem(device, dtype)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.0}]
            optimizer = optim_info.optim_cls(groups, **kwargs)
            before = weight.detach().clone(), bias.detach().clone()
            self.run_steps(optimizer, closure, 10)
            self.assertNotEqual(weight, before[0])
            self.assertEqual(bias, before[1], atol=0, rtol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_param_groups_weight_decay(self, device: str, dtype: Any, optim_info: Any) -> None:
        """The group with decay ends smaller; quantized ones are compared by their latents."""
        for kwargs in self.configurations(optim_info, device, dtype):
            kwargs["weight_decay"] = 0.0
            kwargs.setdefault("lr", 0.01)
            sizes = []
            for decay in (0.0, 0.5):
                weight, bias, closure = self.problem(device, dtype)
                groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias]}]
                optimizer = optim_info.optim_cls(groups, **kwargs)
                self.run_steps(optimizer, closure, 10)
                value = optimizer.state[weight].get("latent", weight)
                sizes.append(value.detach().norm().item())
            self.assertLess(sizes[1], sizes[0], msg=str(kwargs))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_step_is_noop_when_params_have_no_grad(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, _ = self.problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            before = weight.detach().clone(), bias.detach().clone()
            for loss in (1.0, torch.tensor(1.0)):
                optimizer.step(loss=loss)
                self.assertEqual((weight, bias), before, atol=0, rtol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_step_is_noop_for_zero_grads(self, device: str, dtype: Any, optim_info: Any) -> None:
        """Without weight decay, which is the one thing that moves then."""
        for kwargs in self.configurations(optim_info, device, dtype):
            kwargs["weight_decay"] = 0.0
            weight, bias, _ = self.problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            before = weight.detach().clone(), bias.detach().clone()
            for _ in range(3):
                weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
                optimizer.step(loss=torch.tensor(1.0))
                self.assertEqual((weight, bias), before, atol=0, rtol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_can_be_printed(self, device: str, dtype: Any, optim_info: Any) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, _ = self.problem(device, dtype)
            self.assertIn("lr", repr(optim_info.optim_cls([weight, bias], **kwargs)))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_non_empty_state(self, device: str, dtype: Any, optim_info: Any) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, closure = self.problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            self.run_steps(optimizer, closure, 1)
            for p in (weight, bias):
                if kwargs.get("momentum", 0.9) > 0:
                    self.assertIn("momentum_buffer", optimizer.state[p])
                for value in optimizer.state[p].values():
                    self.assertIsInstance(value, Tensor)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_state_dict_deterministic(self, device: str, dtype: Any, optim_info: Any) -> None:
        """Training that goes on from a loaded state equals training that never stopped."""
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, closure = self.problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            self.run_steps(optimizer, closure, 5)

            weight_c, bias_c, closure_c = self.problem(device, dtype)
            optimizer_c = optim_info.optim_cls([weight_c, bias_c], **kwargs)
            with torch.no_grad():
                weight_c.copy_(weight)
                bias_c.copy_(bias)
            optimizer_c.load_state_dict(optimizer.state_dict())
            self.assertEqual(optimizer.state_dict(), optimizer_c.state_dict())
            for _ in range(5):
                self.run_steps(optimizer, closure, 1)
                self.run_steps(optimizer_c, closure_c, 1)
                self.assertEqual((weight, bias), (weight_c, bias_c), atol=0, rtol=0)
            self.assertEqual(optimizer.state_dict(), optimizer_c.state_dict())
            optimizer_c.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_can_load_older_state_dict(self, device: str, dtype: Any, optim_info: Any) -> None:
        """A key that says nothing about the mathematics may be missing."""
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, closure = self.problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            self.run_steps(optimizer, closure, 3)
            older = copy.deepcopy(optimizer.state_dict())
            for group in older["param_groups"]:
                del group["foreach"]
            optimizer.load_state_dict(older)
            self.run_steps(optimizer, closure, 3)
            self.assertIn("foreach", optimizer.param_groups[0])

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_can_load_from_and_to_named_state_dict(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        weight, bias, closure = self.problem(device, dtype)
        named = [("weight", weight), ("bias", bias)]
        for first, second in ((named, [weight, bias]), ([weight, bias], named)):
            optimizer = optim_info.optim_cls(first)
            self.run_steps(optimizer, closure, 2)
            other = optim_info.optim_cls(second)
            other.load_state_dict(optimizer.state_dict())
            self.run_steps(other, closure, 2)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_save_load_equality_with_weights_only(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            weight, bias, closure = self.problem(device, dtype)
            optimizer = optim_info.optim_cls([weight, bias], **kwargs)
            self.run_steps(optimizer, closure, 3)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "optimizer.pt"
                torch.save(optimizer.state_dict(), path)
                loaded = torch.load(path, weights_only=True)
            self.assertEqual(optimizer.state_dict(), loaded)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_step_hooks(self, device: str, dtype: Any, optim_info: Any) -> None:
        """Own and global hooks, before and after, in order, with the arguments of step."""
        weight, bias, closure = self.problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias])
        calls: list[str] = []

        def remember(name: str) -> Callable[[Any, Any, Any], None]:
            def hook(opt: Any, args: Any, kwargs: Any) -> None:
                self.assertIs(opt, optimizer)
                calls.append(name)

            return hook

        handles = [
            optimizer.register_step_pre_hook(remember("own pre")),
            optimizer.register_step_post_hook(remember("own post")),
            register_optimizer_step_pre_hook(remember("global pre")),
            register_optimizer_step_post_hook(remember("global post")),
        ]
        try:
            self.run_steps(optimizer, closure, 2)
        finally:
            for handle in handles:
                handle.remove()
        self.assertEqual(calls, ["global pre", "own pre", "own post", "global post"] * 2)
        self.run_steps(optimizer, closure, 1)
        self.assertEqual(len(calls), 8)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_pre_hook_may_replace_the_loss(self, device: str, dtype: Any, optim_info: Any) -> None:
        weight, bias, closure = self.problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias])
        closure(optimizer)

        def other_loss(opt: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return args, {**kwargs, "loss": 0.25}

        optimizer.register_step_pre_hook(other_loss)
        self.assertEqual(optimizer.step(loss=1.0), 0.25)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_state_dict_hooks(self, device: str, dtype: Any, optim_info: Any) -> None:
        """Four kinds, in the order of registration unless prepended; what they return counts."""
        weight, bias, closure = self.problem(device, dtype)
        optimizer = optim_info.optim_cls([weight, bias])
        self.run_steps(optimizer, closure, 2)
        calls: list[str] = []
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save pre 1"))
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append("save pre 0"), prepend=True)
        optimizer.register_state_dict_post_hook(lambda opt, saved: calls.append("save post"))
        saved = copy.deepcopy(optimizer.state_dict())
        self.assertEqual(calls, ["save pre 0", "save pre 1", "save post"])

        calls.clear()
        momenta = [state.pop("momentum_buffer") for state in saved["state"].values()]
        self.assertEqual(len(momenta), 2)

        def bring_back(opt: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            calls.append("load pre 1")
            for state, momentum in zip(incoming["state"].values(), momenta, strict=True):
                state["momentum_buffer"] = momentum
            return incoming

        optimizer.register_load_state_dict_pre_hook(bring_back)
        optimizer.register_load_state_dict_pre_hook(
            lambda opt, incoming: calls.append("load pre 0"), prepend=True
        )
        optimizer.register_load_state_dict_post_hook(lambda opt: calls.append("load post 1"))
        optimizer.register_load_state_dict_post_hook(
            lambda opt: calls.append("load post 0"), prepend=True
        )
        optimizer.load_state_dict(saved)
        self.assertEqual(calls, ["load pre 0", "load pre 1", "load post 0", "load post 1"])
        for p, momentum in zip((weight, bias), momenta, strict=True):
            self.assertEqual(optimizer.state[p]["momentum_buffer"], momentum, atol=0, rtol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_deepcopy_copies_all_public_attrs(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        for kwargs in self.configurations(optim_info, device, dtype):
            for steps in (0, 2):
                weight, bias, closure = self.problem(device, dtype)
                optimizer = optim_info.optim_cls([weight, bias], **kwargs)
                self.run_steps(optimizer, closure, steps)
                public = {name for name in vars(optimizer) if not name.startswith("_")}
                twin = copy.deepcopy(optimizer)
                self.assertEqual({n for n in vars(twin) if not n.startswith("_")}, public)
                self.assertEqual(twin.state_dict(), optimizer.state_dict())

    @optims(OPTIMIZERS, dtypes=[torch.float32])
    def test_set_default_dtype_does_not_matter(
        self, device: str, dtype: Any, optim_info: Any
    ) -> None:
        """State, γ and parameters follow the parameters' type, not torch's default."""
        default = torch.get_default_dtype()
        outcomes = []
        try:
            for other in (torch.float32, torch.float64, torch.float16):
                torch.set_default_dtype(other)
                weight, bias, closure = self.problem(device, dtype)
                optimizer = optim_info.optim_cls([weight, bias])
                self.run_steps(optimizer, closure, 3)
                for state in optimizer.state.values():
                    self.assertEqual({value.dtype for value in state.values()}, {dtype})
                outcomes.append((weight.detach(), bias.detach(), optimizer.gamma))
        finally:
            torch.set_default_dtype(default)
        self.assertEqual(outcomes[0], outcomes[1], atol=0, rtol=0)
        self.assertEqual(outcomes[0], outcomes[2], atol=0, rtol=0)

    @optims(OPTIMIZERS, dtypes=[torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_mixed_dtypes(self, device: str, dtype: Any, optim_info: Any) -> None:
        """A parameter of another type beside those in question."""
        for foreach in (False, True):
            params = [
                Parameter(torch.randn(3, 4, device=device, dtype=kind))
                for kind in (dtype, torch.float32)
            ]
            optimizer = optim_info.optim_cls(params, foreach=foreach)
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step(loss=torch.tensor(0.5, dtype=dtype, device=device))
            for p in params:
                self.assertTrue(torch.isfinite(p).all())

    @optims(OPTIMIZERS, dtypes=[torch.complex64])
    def test_complex_is_refused(self, device: str, dtype: Any, optim_info: Any) -> None:
        with self.assertRaisesRegex(TypeError, "complex"):
            optim_info.optim_cls([Parameter(torch.randn(2, 2, dtype=dtype, device=device))])


instantiate_device_type_tests(TestHarness, globals(), only_for="cpu")
