"""The optimizers: :class:`FrankWolfe` with the settings that each kind of network needs."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dfw_opt.optimizer import FrankWolfe
from dfw_opt.sharding import Ranks

LR = 0.07  # of all three, in both norms


class DFW(FrankWolfe):
    r"""Deep Frank-Wolfe for float networks: a step whose size follows from the loss.

    With :math:`\ell` and :math:`\delta` the loss of the batch and its gradient at :math:`v`:

    .. math::

        \begin{aligned}
        m &\leftarrow \mu m + (1 - \mu)\,\delta \\
        h &\leftarrow \mu h_\text{left} + (1 - \mu)\,\ell \\
        U\Sigma V^\top &= \mu m + (1 - \mu)\,\delta \\
        D &= \rho\,\sqrt{\max(\text{rows}, \text{columns})}\;UV^\top / \sqrt{1 + t/100} \\
        \gamma &= \operatorname{clip}_{[0,1]} \frac{h - \sum\eta\langle m, \lambda v\rangle}
            {\sum\eta\langle m, D\rangle + \varepsilon} \\
        h_\text{left} &= \max(0,\ h - \textstyle\sum\eta\langle m, \lambda v + \gamma D\rangle) \\
        v &\leftarrow v - \eta\,(\lambda v + \gamma D)
        \end{aligned}

    with one :math:`\gamma` for all, after :math:`t` other steps. Vectors are divided by their root
    mean square instead. The size :math:`\rho` of a matrix is its root mean square at the start,
    at least :math:`0.1/\sqrt{\text{fan in}}`; that of a vector :math:`0.1 \max(1,
    \operatorname{rms})`. With ``norm="euclidean"``, the paper's algorithm:

    .. math::

        \gamma = \operatorname{clip}_{[0,1]} \frac{\ell - \sum\eta\langle\delta, \lambda v\rangle}
            {\sum\eta\|\delta\|^2 + \varepsilon}, \quad
        z \leftarrow \mu z - \eta\gamma\,(\delta + \lambda v), \quad
            v \leftarrow v - \eta\,(\lambda v + \gamma\delta) + \mu z .

    Args:
        params: parameters, or groups with their own settings, see :func:`~dfw_opt.param_groups`.
        lr: :math:`\eta \ge 0`; a float or a 1-element tensor. In the spectral norm the *relative*
            length of the longest step, at first: at 1, a step may change every matrix by its own
            size. In the Euclidean norm the paper's proximal coefficient, the largest learning rate.
        momentum: :math:`\mu \in [0, 1)`. In the spectral norm that of the plane, one for all.
        weight_decay: :math:`\lambda \ge 0`; on a latent it acts on :math:`u`, on scales not at all.
        eps: :math:`\varepsilon \ge 0`, one for all groups.
        norm: ``"spectral"`` or ``"euclidean"``, one for all groups.
        process_group: over which ranks the loss is averaged: ``"world"``, all, if there are others
            when a step is made; a ``ProcessGroup``; or ``None``, no others.

    Raises:
        TypeError: a parameter is not real floating point, or flattened by FSDP1; or no such group.
        ValueError: a setting is out of range or of no use.

    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = DFW(model.parameters())
    >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2]))
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> 0 <= optimizer.gamma <= 1
    tensor(True)

    Source: Berrada, Zisserman, Pawan Kumar, ICLR 2019 (arXiv 1811.07591), Algorithm 1; for the
    spectral norm see :mod:`dfw_opt.optimizer` and :mod:`dfw_opt.norms`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = LR,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        *,
        norm: str = "spectral",
        process_group: Ranks = "world",
    ) -> None:
        super().__init__(params, _settings(locals()), process_group)


class ProjectedDFW(FrankWolfe):
    r"""Deep Frank-Wolfe over a box, for binary weights and weights of a few bits.

    The box :math:`[-R, R]^p` is the relaxation of weights in :math:`\{-1, 1\}`. Each quantized
    parameter holds :math:`Q(u)`, for binary weights :math:`c\,a\,\operatorname{sign}(u)`, from
    construction on and after every step; its normalised latent :math:`u` is
    ``optimizer.state[p]["latent"]``, in float32. A step is that of :class:`DFW`, with gradients
    pulled back to the latents (:mod:`dfw_opt.quantizers`) and projected onto the box. A frozen
    parameter is left alone until it has a gradient. Other arguments and errors: see :class:`DFW`.

    Args:
        quantizer: ``"binary"``; ``"uniform"``, of ``bits`` bits; or ``None``: the parameter itself
            is kept in the box, for models that quantize in their own layers.
        bits: of a ``"uniform"`` weight, 2 to 8 (``None``: 4): :math:`2^\text{bits} - 1` levels.
        radius: :math:`R > 0` of the box, or ``None``. Together, ``quantizer=None, radius=None``
            make a group plain :class:`DFW`, as norms need.
        step_size: in the Euclidean norm: ``"exact"`` solves for :math:`\gamma` over the box
            (:mod:`dfw_opt.step_size`); ``"closed_form"`` takes that of :class:`DFW`, and projects.
        relaxation: :math:`\theta \in [0, 1]`, above 0 to start with float weights: ``relax()``.

    Raises:
        ValueError: a parameter to be quantized has fewer than two dimensions, NaN or infinity.

    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = ProjectedDFW(param_groups(model, skip=[]))
    >>> model.weight.abs().unique(dim=1).shape  # one magnitude per output channel
    torch.Size([3, 1])

    Source: the poster *Binary Neural Networks* (Paren, Jaeckle, Berrada, Zisserman, Pawan Kumar);
    the quantizer from Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = LR,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        *,
        norm: str = "spectral",
        quantizer: str | None = "binary",
        bits: int | None = None,
        radius: float | None = 1.0,
        step_size: str = "exact",
        relaxation: float = 0.0,
        process_group: Ranks = "world",
    ) -> None:
        super().__init__(params, _settings(locals(), scale_axis=0, scale_groups=1), process_group)


class TernaryDFW(FrankWolfe):
    r"""Deep Frank-Wolfe for Trained Ternary Quantization: latents and scales in one step.

    Each quantized parameter holds :math:`Q(u) \in \{-c\,W_n,\ 0,\ c\,W_p\}`. Its state has the
    latent :math:`u`, as in :class:`ProjectedDFW`, and the scales :math:`W_p` (``"scale_pos"``) and
    :math:`W_n` (``"scale_neg"``), all trained by the step of that class with one :math:`\gamma`.
    Scales, at least 0.001, move by a tenth of their first value at most, in the Euclidean norm by
    their metric (:mod:`dfw_opt.quantizers.ternary`). Other arguments: :class:`ProjectedDFW`.

    Args:
        quantizer: ``"ternary"``, ``"binary"`` or ``None``, as there.
        threshold: :math:`t \in [0, 1)`, for 0 where :math:`|u| \le t \max|u|`; or ``None``: 0.05 in
            the Euclidean norm, as in the paper; else 0 where :math:`|u| \le 0.7\,\text{mean}\,|u|`.

    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = TernaryDFW(param_groups(model, skip=[]))
    >>> model.weight.unique().numel() <= 3
    True

    Source: Zhu et al., *Trained Ternary Quantization*, ICLR 2017 (arXiv 1612.01064), trained as
    in the poster *Binary Neural Networks* (Paren, Jaeckle, Berrada, Zisserman, Pawan Kumar).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = LR,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        *,
        norm: str = "spectral",
        quantizer: str | None = "ternary",
        threshold: float | None = None,
        radius: float | None = 1.0,
        step_size: str = "exact",
        relaxation: float = 0.0,
        process_group: Ranks = "world",
    ) -> None:
        super().__init__(params, _settings(locals(), scale_axis=0, scale_groups=1), process_group)


def _settings(arguments: dict[str, Any], **channels: int) -> dict[str, Any]:
    """Those arguments of a constructor that groups have, and how their tensors are to be read."""
    others = ("self", "params", "process_group", "__class__")
    return {k: v for k, v in arguments.items() if k not in others} | {"layout": "matrix"} | channels
