"""What several test files need: parameters, gradients, and comparing tensors bit for bit."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dfw_opt.quantizers import quantizer_of

SHAPES: tuple[tuple[int, ...], ...] = ((4, 6), (3, 2, 3, 3), (5,))


def make_params(
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 0.3,
) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [Parameter((scale * values).to(dtype)) for values in draw]


def uncovered() -> dict[str, str]:
    """The environment for a process whose coverage is not measured, which takes a third less."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COV")}


def clone_params(params: Iterable[Tensor]) -> list[Parameter]:
    return [Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in params]


def draw_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """Give every parameter a random gradient."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        values = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (scale * values).to(p.dtype)


def copy_gradients(params: Iterable[Tensor], twins: Iterable[Tensor]) -> None:
    """The twins' own, each in its twin's dtype."""
    for p, twin in zip(params, twins, strict=True):
        twin.grad = None if p.grad is None else p.grad.to(twin.dtype, copy=True)


def train(optimizer: Any, params: Sequence[Tensor], steps: int, seed: int = 0) -> None:
    """Some steps with gradients that depend on the weights, as in training."""
    for number in range(steps):
        draw_gradients(params, 1000 * seed + number, 0.3)
        for p in params:
            assert p.grad is not None
            p.grad += p.detach()
        optimizer.step(loss=1.0 / (1 + number))


def raw(tensor: Tensor) -> bytes:
    """The bits of a tensor: tells −0.0 from 0.0 and finds NaN equal to itself."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and raw(left) == raw(right)


def fingerprint(value: Any) -> Any:
    """Compares equal only if all tensors inside have the same type, shape and bits."""
    if isinstance(value, Tensor):
        return (str(value.dtype), tuple(value.shape), raw(value))
    if isinstance(value, dict):
        return {key: fingerprint(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(inner) for inner in value]
    return copy.deepcopy(value)


def everything(optimizer: Optimizer) -> Any:
    """Parameters, state, groups and the plane, as a fingerprint of before and after."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    planes = [s.get("plane") for s in optimizer.state_dict()["state"].values()]
    return (
        fingerprint([p.detach() for p in params]),
        fingerprint([dict(optimizer.state[p]) if p in optimizer.state else {} for p in params]),
        [
            {key: fingerprint(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        fingerprint(planes),
    )


def whole(optimizer: Any) -> Any:
    return everything(optimizer), fingerprint([optimizer.gamma, optimizer.skipped_steps])


@contextmanager
def refused(optimizer: Any, match: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """What is done inside raises, and changes nothing."""
    before = whole(optimizer)
    with pytest.raises(error, match=match):
        yield
    assert whole(optimizer) == before


def forward_weights(optimizer: Optimizer, group: dict[str, Any], p: Tensor) -> Tensor:
    """What the parameter must hold, from the optimizer's state alone."""
    quantizer, state = quantizer_of(group), optimizer.state[p]
    assert quantizer is not None
    ones = (1,) * p.dim()
    batch = {key: state[key].view(1, *ones) for key in ("unit", *quantizer.scales)}
    return quantizer.quantize({"latent": state["latent"].unsqueeze(0), **batch})[0].to(p.dtype)


def assert_consistent(optimizer: Optimizer) -> None:
    """Latents in the box, scales at least 0.001, parameters exactly Q(u), all finite."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            assert torch.isfinite(p).all()
            for value in state.values():
                assert torch.isfinite(value).all()
            radius = group.get("radius")
            if group.get("quantizer") is None:
                if radius is not None:
                    # Rounded to the parameter's type: no number is nearer to the bound.
                    assert (p.detach().abs() <= torch.tensor(radius, dtype=p.dtype)).all()
                continue
            if radius is not None:
                assert (state["latent"].abs() <= radius).all()
            if group["quantizer"] == "ternary":
                for name in ("scale_pos", "scale_neg"):
                    assert state[name] >= torch.tensor(1e-3, dtype=state[name].dtype)
            assert same_bits(p, forward_weights(optimizer, group, p))


def to_numpy(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(tensor.detach().to(torch.float64).cpu().numpy(), dtype=np.float64).copy()
