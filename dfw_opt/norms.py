r"""The norm in which a step is measured: it says which direction is steepest, and how long it is.

A step minimises a plane with gradient :math:`m` over a ball. The direction that takes most from it
is :math:`D = \arg\max_{\|D\| \le 1} \langle m, D\rangle`, the oracle of Frank and Wolfe. In the
spectral norm of a matrix that is the orthogonal factor of :math:`m`: all singular values are made
1, so that every direction of the layer's input moves alike. Directions here have a root mean square
of 1 (at full rank); the optimizer multiplies them by the size of the variable, which makes ``lr``
the *relative* length of the longest step.

Sources: Bernstein and Newhouse, *Old Optimizer, New Norm*, 2024 (arXiv 2409.20325); Pethick et al.,
*Training Deep Learning Models with Norm-Constrained LMOs*, 2025 (arXiv 2502.07529).
"""

import math

import torch
from torch import Tensor

NEWTON_SCHULZ = (
    (8.3837, -24.7659, 18.3571),
    (4.0434, -3.0114, 0.5695),
    (3.5056, -2.6267, 0.5257),
    (2.4901, -1.8343, 0.4368),
)
"""Coefficients (a, b, c) of each iteration, of those polynomials that together take singular values
in [0.003, 1], in units of the Frobenius norm, as near to 1 as four can: to between 0.8 and 1.204,
and lesser ones to less. Each is the minimax polynomial of the interval that the ones before leave
(Amsel, Persson, Musco, Gower, *The Polar Express*, 2025, arXiv 2505.16932, Theorem 3.1)."""


def spectral(
    gradient: Tensor,
    layout: str = "matrix",
    present: Tensor | None = None,
    products: torch.dtype | None = None,
) -> Tensor:
    r"""The steepest direction, of root mean square 1 at full rank, for each tensor of a batch.

    - ``"matrix"``: first dimension × the rest, as layers multiply by them:
      :math:`\sqrt{\max(\text{rows}, \text{columns})}\;UV^\top`, of :math:`U\Sigma V^\top`. A vector
      or a number (a bias, a norm's weight) is divided by its root mean square.
    - ``"stack"``: as many matrices as the leading dimensions say, of the last two.
    - ``"rows"``: each row divided by its root mean square, for the table of an embedding.

    Args:
        gradient: shape ``(batch, *shape)``.
        layout: how each of the tensors is to be read.
        present: for ``"rows"``: the gradient of this batch alone. A row with none stays, since the
            mean would go on pushing it in a direction that nothing has asked for.
        products: as for :func:`polar`.
    """
    if gradient.dim() <= 2:
        return _normalised(gradient, dims=tuple(range(1, gradient.dim())))
    if layout == "rows":
        dims = tuple(range(2, gradient.dim()))
        asked = 1.0 if present is None else present.abs().amax(dims, keepdim=True) > 0
        return _normalised(gradient, dims) * asked
    matrix = gradient.flatten(0, -3) if layout == "stack" else gradient.flatten(2)
    return (math.sqrt(max(matrix.shape[1:])) * polar(matrix, products)).view_as(gradient)


def polar(matrix: Tensor, products: torch.dtype | None = None) -> Tensor:
    r""":math:`UV^\top` of the singular value decomposition :math:`U\Sigma V^\top`, nearly.

    Four Newton-Schulz iterations :math:`X \leftarrow aX + b(XX^\top)X + c(XX^\top)^2X`, with
    coefficients :data:`NEWTON_SCHULZ`. For matrices at least twice as wide as high they are made on
    :math:`A = XX^\top` alone,

    .. math:: P = aI + bA + cA^2, \qquad A \leftarrow PAP, \qquad Q \leftarrow PQ,

    and :math:`X` is multiplied once, by :math:`Q`. A matrix of zeros stays what it is.

    Args:
        matrix: shape ``(batch, rows, columns)``, float32 or wider.
        products: the dtype in which iterations on :math:`X` are made; those on :math:`A`, which
            lose more, are made in that of ``matrix``.
    """
    if matrix.shape[1] > matrix.shape[2]:
        return polar(matrix.mT, products).mT
    x = _normalised(matrix, dims=(1, 2), rms=(matrix.shape[1] * matrix.shape[2]) ** -0.5)
    if matrix.shape[2] < 2 * matrix.shape[1]:
        narrow = products is not None and x.dtype == torch.float32
        # Beyond the largest value that they are made for, polynomials grow fast: leave room.
        x, room = (x.to(products), 1.02) if narrow else (x, 1.0)
        for a, b, c in NEWTON_SCHULZ:
            gram = torch.bmm(x, x.mT)
            inner = torch.baddbmm(gram, gram, gram, beta=b / room**3, alpha=c / room**5)
            x = torch.baddbmm(x, inner, x, beta=a / room)
        return x.to(matrix.dtype)
    gram = torch.bmm(x, x.mT)
    product = torch.diag_embed(torch.ones_like(gram[..., 0]))
    for number, (a, b, c) in enumerate(NEWTON_SCHULZ, 1):
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, inner, product, beta=a)
        if number < len(NEWTON_SCHULZ):
            half = torch.baddbmm(gram, inner, gram, beta=a)
            gram = torch.baddbmm(half, half, inner, beta=a)
    return torch.bmm(product, x)


def _normalised(x: Tensor, dims: tuple[int, ...], rms: float = 1.0) -> Tensor:
    """With this root mean square; in two divisions, since squares of float32 overflow early."""
    if not dims:
        return x.sign()
    x = x / torch.linalg.vector_norm(x, math.inf, dims, keepdim=True).clamp(min=1e-30)
    length = x
    for dim in reversed(dims):  # one by one: over many elements at once float32 loses digits
        length = torch.linalg.vector_norm(length, 2, dim, keepdim=True)
    usual = rms * math.sqrt(math.prod([x.shape[dim] for dim in dims]))
    return x.div_(length.clamp(min=1e-30) / usual)
