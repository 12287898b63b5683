"""Directions: orthogonal factors against torch.linalg.svd, all others against their definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import POLAR
from torch import Tensor

from dfw_opt.norms import polar, spectral

SHAPES = [(1, 1), (1, 7), (7, 1), (3, 3), (4, 6), (6, 4), (3, 7), (7, 3), (5, 40), (40, 5), (4, 8)]
"""Square, nearly square, and at least twice as wide or high, which is computed in another way."""

ROUNDING = 1e-11
"""Of 1e-16 (float32: 6e-8), as terms of up to 25 cancel, and slopes of up to 296 multiply."""

ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def polynomial(x: Tensor) -> Tensor:
    """What four iterations make of a singular value: p₄(p₃(p₂(p₁(x))))."""
    for a, b, c in POLAR:
        x = a * x + b * x**3 + c * x**5
    return x


def factor(matrix: Tensor) -> Tensor:
    """U p(Σ/‖Σ‖) Vᵀ, by the singular value decomposition."""
    U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
    values = polynomial(S / S.square().sum(-1, keepdim=True).sqrt())
    result: Tensor = U @ torch.diag_embed(values) @ Vt
    return result


class TestPolar:
    @ALL_SHAPES
    def test_singular_value_decomposition(self, shape: tuple[int, int]) -> None:
        """The same singular vectors, each value mapped by the polynomial."""
        batch = torch.stack([draw(shape, seed) for seed in range(5)])
        torch.testing.assert_close(polar(batch), factor(batch), rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize("height", [6, 24], ids=["direct", "Gram matrix"])
    def test_ill_conditioned(self, height: int) -> None:
        """Singular values over six decades; those of a Gram matrix over twelve."""
        U, _, Vt = torch.linalg.svd(draw((6, height)), full_matrices=False)
        matrix = (U * torch.logspace(0, -6, 6, dtype=torch.float64)) @ Vt
        for x in (matrix, matrix.mT):
            torch.testing.assert_close(polar(x[None])[0], factor(x), rtol=0, atol=ROUNDING)

    def test_values_end_near_one(self) -> None:
        """From 0.3 % of the Frobenius norm on, between 0.8 and 1.204; the least grow 296 times."""
        x = torch.logspace(math.log10(0.003), 0, 100_000, dtype=torch.float64)
        assert float(polynomial(x).min()) > 0.795
        assert float(polynomial(x).max()) < 1.205
        tiny = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
        slope = math.prod(a for a, _, _ in POLAR)
        assert float(polar(tiny[None])[0, 1, 1]) == pytest.approx(slope * 1e-9)

    @ALL_SHAPES
    def test_float32(self, shape: tuple[int, int]) -> None:
        """As close as rounding allows, whatever the scale."""
        x = draw(shape)
        for scale in (1e-30, 1e-20, 1.0, 1e20, 1e30):
            given = (x * scale).float()
            assert (given.abs() > 0).all()
            result = polar(given[None])[0]
            assert result.dtype == torch.float32
            torch.testing.assert_close(result.double(), factor(x), rtol=0, atol=1e-3)

    @ALL_SHAPES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rank_one(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Its one singular value is 1 at first; nothing grows out of the rounding of the others."""
        left, right = draw((shape[0], 1), 1), draw((1, shape[1]), 2)
        expected = left / left.norm() * polynomial(torch.ones(1).double()) @ (right / right.norm())
        result = polar((left @ right).to(dtype)[None])[0]
        atol = 1e-3 if dtype == torch.float32 else ROUNDING
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)

    @ALL_SHAPES
    def test_narrow_products(self, shape: tuple[int, int]) -> None:
        """Iterations on X in bfloat16: values still end near 1. Float64 and Gram matrices stay."""
        x = draw((16, *shape))
        assert torch.equal(polar(x, torch.bfloat16), polar(x))
        narrow, plain = polar(x.float(), torch.bfloat16), polar(x.float())
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, plain) == (max(shape) >= 2 * min(shape))
        values = torch.linalg.svdvals(narrow.double())
        assert float(values.min()) > 0.9 * float(torch.linalg.svdvals(plain).min()) - 0.05
        assert float(values.max()) < 1.3

    @ALL_SHAPES
    def test_zero_stays_among_others(self, shape: tuple[int, int]) -> None:
        batch = torch.stack([draw(shape), torch.zeros(shape, dtype=torch.float64), draw(shape, 1)])
        result = polar(batch)
        assert not result[1].any()
        torch.testing.assert_close(result[::2], factor(batch[::2]), rtol=0, atol=ROUNDING)


class TestSpectral:
    @given(
        shape=st.sampled_from([(3, 4), (6, 2), (2, 9), (4, 2, 3), (2, 3, 3, 3), (5,), (1,), ()]),
        layout=st.sampled_from(["matrix", "rows", "stack"]),
        power=st.integers(-30, 30),
        seed=st.integers(0, 10**6),
    )
    def test_scale_does_not_matter(
        self, shape: tuple[int, ...], layout: str, power: int, seed: int
    ) -> None:
        """Of any gradient that float32 can hold; powers of two change not a bit of float64."""
        g = draw((2, *shape), seed)
        plain = spectral(g, layout)
        assert torch.equal(spectral(g * 2.0**power, layout), plain)
        single = spectral((g * 10.0**power).float(), layout)
        atol = 1e-2 if g.dim() > 2 else 1e-5
        torch.testing.assert_close(single.double(), plain, rtol=0, atol=atol)

    @pytest.mark.parametrize("shape", [(3, 4), (4, 2, 3), (2, 3, 3, 3), (12, 2, 2), (64, 4)])
    def test_matrix(self, shape: tuple[int, ...]) -> None:
        """First dimension × the rest; the root mean square is 1 where all values end at 1."""
        g = draw((3, *shape))
        flat = g.flatten(2)
        expected = math.sqrt(max(flat.shape[1:])) * factor(flat)
        torch.testing.assert_close(spectral(g), expected.view_as(g), rtol=0, atol=1e-11)
        rms = spectral(g).square().mean(tuple(range(1, g.dim()))).sqrt()
        assert (rms > 0.79).all()
        assert (rms < 1.21).all()

    @pytest.mark.parametrize("shape", [(5, 3, 4), (2, 2, 4, 3)])
    def test_stack(self, shape: tuple[int, ...]) -> None:
        """Each of the last two dimensions' matrices for itself."""
        g = draw((2, *shape))
        single = torch.stack([spectral(part[None])[0] for part in g.flatten(0, -3)])
        torch.testing.assert_close(spectral(g, "stack"), single.view_as(g), rtol=0, atol=ROUNDING)
        assert torch.equal(spectral(g[:, 0], "stack"), spectral(g[:, 0])) or g.dim() > 4

    @pytest.mark.parametrize("layout", ["matrix", "rows", "stack"])
    def test_vectors_and_numbers(self, layout: str) -> None:
        """A vector over its root mean square, a number over its magnitude; zeros stay."""
        g = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1e30, 0.0], [0.0, 1e-25]])
        expected = torch.tensor([[3.0, -4.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        expected[0] /= 12.5**0.5
        expected[2:] *= 2**0.5
        torch.testing.assert_close(spectral(g, layout), expected)
        assert spectral(torch.tensor([-2e-9, 0.0, 3e30]), layout).tolist() == [-1.0, 0.0, 1.0]

    @pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
    def test_rows(self, shape: tuple[int, ...]) -> None:
        """Each over its own root mean square; one without a gradient in this batch stays."""
        g = draw((2, *shape))
        g[0, 1] *= 1e6
        g[1, 2] = 0.0
        rms = g.flatten(2).square().mean(2).sqrt().view(2, 4, *[1] * (g.dim() - 2))
        expected = torch.where(rms > 0, g / rms, 0.0)
        torch.testing.assert_close(spectral(g, "rows"), expected)
        present = g.clone()
        present[0, 3] = present[1, 0] = 0.0
        present[0, 0].view(-1)[1:] = 0.0  # a single number is enough
        expected[0, 3] = expected[1, 0] = 0.0
        torch.testing.assert_close(spectral(g, "rows", present), expected)
