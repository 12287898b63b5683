"""ProjectedDFW: Deep Frank-Wolfe over a box, for binary weights and weights of a few bits."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dfw_opt.data_parallel import Ranks
from dfw_opt.optimizer import FrankWolfe

__all__ = ["ProjectedDFW"]


class ProjectedDFW(FrankWolfe):
    r"""Deep Frank-Wolfe over a box, for binary weights and weights of a few bits.

    The box :math:`[-R, R]^p` is the relaxation of weights in :math:`\{-1, 1\}`.

    Each quantized parameter holds :math:`Q(u)`, for binary weights
    :math:`c\,a\,\operatorname{sign}(u)`, from construction on and after every step; its normalised
    latent :math:`u` is ``optimizer.state[p]["latent"]``, in float32. With
    :math:`d = M^{-1}\delta` the gradient pulled back to the latent, in the metric :math:`M` of the
    weights (see :mod:`dfw_opt.quantizers`), and :math:`v` a latent or a float parameter
    (:math:`M = 1`):

    .. math::

        \begin{aligned}
        &\rule{110mm}{0.4pt}\\
        &v(\gamma) = \Pi_{[-R, R]}\bigl(v - \eta\,(\lambda v + \gamma d)\bigr)\\
        &\gamma\ \text{solves}\ \ell + \sum\langle d, v(\gamma) - v\rangle_M = \varepsilon\gamma
            \ \text{on}\ [0, 1]\text{, or is the end point nearest to that}\\
        &z \leftarrow \mu z - \eta\gamma\,(d + \lambda v)\\
        &v \leftarrow \Pi_{[-R, R]}\bigl(v - \eta\,(\lambda v + \gamma d) + \mu z\bigr)\\
        &p \leftarrow Q(u)\\
        &\rule{110mm}{0.4pt}
        \end{aligned}

    Args:
        params: parameters or groups; :func:`~dfw_opt.param_groups` makes the usual two, with the
            first and last layer, biases and norms left in float.
        lr: :math:`\eta`, as in :class:`DFW`; one value serves latents and float parameters.
        momentum: :math:`\mu`, as in :class:`DFW`.
        weight_decay: :math:`\lambda`, as in :class:`DFW`; on a latent it acts on :math:`u`.
        eps: :math:`\varepsilon`, as in :class:`DFW`.
        quantizer: ``"binary"``; ``"uniform"`` for weights of ``bits`` bits, see
            :mod:`dfw_opt.quantizers.uniform`; or ``None`` to keep the parameter itself in the box,
            for models that quantize in their own layers.
        bits: of a ``"uniform"`` weight, 2 to 8: :math:`2^\text{bits} - 1` levels.
        radius: :math:`R > 0`, or ``None`` for no box. Only ``quantizer=None, radius=None`` together
            make a group plain :class:`DFW`, as biases and norms need.
        step_size: ``"exact"`` solves for :math:`\gamma` over the box; ``"closed_form"`` takes
            that of :class:`DFW`, as if there were no box, and projects afterwards.
        relaxation: :math:`\theta \in [0, 1]`, for a start with float weights: quantized parameters
            hold :math:`(1 - \theta)\,Q(u) + \theta\,c\,u`. Over training it is to be lowered to 0
            by :meth:`~dfw_opt.optimizer.FrankWolfe.relax`. See :mod:`dfw_opt.relaxation`.
        foreach: as in :class:`DFW`.
        fused: as in :class:`DFW`.
        process_group: as in :class:`DFW`.

    A frozen parameter is left as it is until it is unfrozen and has a gradient.

    Raises:
        TypeError: a parameter is not real floating point, or flattened by FSDP1; or
            ``process_group`` is neither a process group of this rank, nor ``"world"``, nor
            ``None``.
        ValueError: a setting is out of range or names nothing; a parameter to be quantized has
            fewer than two dimensions, or holds NaN or infinity.

    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = ProjectedDFW(
    ...     [{"params": model.weight}, {"params": model.bias, "quantizer": None, "radius": None}]
    ... )
    >>> model.weight.abs().unique(dim=1).shape  # one magnitude per output channel
    torch.Size([3, 1])

    Source: the poster *Binary Neural Networks* (Paren, Jaeckle, Berrada, Zisserman, Pawan Kumar);
    the quantizer from Rastegari et al., *XNOR-Net*, ECCV 2016 (arXiv 1603.05279).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        *,
        quantizer: str | None = "binary",
        bits: int = 4,
        radius: float | None = 1.0,
        step_size: str = "exact",
        relaxation: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
        process_group: Ranks = "world",
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "eps": eps,
                "quantizer": quantizer,
                "bits": bits,
                "radius": radius,
                "step_size": step_size,
                "relaxation": relaxation,
                "foreach": foreach,
                "fused": fused,
            },
            process_group,
        )
