"""SignActivation: sign(0) = +1, and the two straight-through derivatives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfw_opt import SignActivation

POINTS = [-3.0, -1.001, -1.0, -0.75, -0.25, -0.0, 0.0, 0.25, 0.75, 1.0, 1.001, 3.0]


@pytest.mark.parametrize("ste", ["clipped", "approx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward(ste: str, dtype: torch.dtype) -> None:
    y = SignActivation(ste=ste)(torch.tensor(POINTS, dtype=dtype))
    assert y.dtype == dtype
    assert y.tolist() == [-1.0 if value < 0 else 1.0 for value in POINTS]


@pytest.mark.parametrize("ste", ["clipped", "approx"])
@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=8), st.integers(0, 1000))
def test_backward(ste: str, values: list[float], seed: int) -> None:
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    (SignActivation(ste=ste)(x) * weights).sum().backward()
    size = x.detach().abs()
    slopes = (size <= 1).double() if ste == "clipped" else (2 - 2 * size).clamp(min=0)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weights * slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 40])
def test_clipped_includes_the_ends(dtype: torch.dtype, count: int) -> None:
    """|x| = 1 passes, the next number does not; the same in long tensors, where kernels differ."""
    one = torch.ones((), dtype=dtype)
    beyond = one * (1 + torch.finfo(dtype).eps)
    assert beyond > 1
    x = torch.stack([-one, one, -beyond, beyond]).repeat(count).requires_grad_()
    SignActivation()(x).sum().backward()  # the default
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0] * count


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"ste='smooth'.*'approx', 'clipped'"):
        SignActivation(ste="smooth")
