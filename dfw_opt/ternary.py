"""TernaryDFW: Deep Frank-Wolfe for ternary weights with trained scales."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dfw_opt.data_parallel import Ranks
from dfw_opt.optimizer import FrankWolfe

__all__ = ["TernaryDFW"]


class TernaryDFW(FrankWolfe):
    r"""Deep Frank-Wolfe for Trained Ternary Quantization: latents and scales in one step.

    Each quantized parameter holds :math:`Q(u) \in \{-c\,W_n,\ 0,\ c\,W_p\}`, from construction on
    and after every step. Its state has the normalised latent :math:`u` (``"latent"``, float32)
    and the scales :math:`W_p` (``"scale_pos"``) and :math:`W_n` (``"scale_neg"``). All three are
    variables :math:`v` of the step of :class:`ProjectedDFW`, with one :math:`\gamma`: latents in
    :math:`[-R, R]`, scales bounded below by a small positive number and free of weight decay. In
    the metric of the weights a scale moves by the mean gradient of its zone, so that it needs no
    learning rate of its own (see :mod:`dfw_opt.quantizers.ternary` for the formulas).

    Args:
        params: as in :class:`ProjectedDFW`.
        lr: :math:`\eta`, as in :class:`DFW`; one value serves latents, scales and float parameters.
        momentum: :math:`\mu`, as in :class:`DFW`.
        weight_decay: :math:`\lambda`, as in :class:`DFW`; on a latent it acts on :math:`u`.
        eps: :math:`\varepsilon`, as in :class:`DFW`.
        quantizer: ``"ternary"``, ``"binary"`` or ``None``, as in :class:`ProjectedDFW`.
        threshold: :math:`t \in [0, 1)`; weights with :math:`|u| \le t \max|u|` are 0.
        radius: :math:`R`, as in :class:`ProjectedDFW`.
        step_size: as in :class:`ProjectedDFW`.
        relaxation: :math:`\theta`, as in :class:`ProjectedDFW`.
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
    >>> optimizer = TernaryDFW(
    ...     [{"params": model.weight}, {"params": model.bias, "quantizer": None, "radius": None}]
    ... )
    >>> model.weight.unique().numel() <= 3
    True

    Source: Zhu et al., *Trained Ternary Quantization*, ICLR 2017 (arXiv 1612.01064), trained as
    in the poster *Binary Neural Networks* (Paren, Jaeckle, Berrada, Zisserman, Pawan Kumar).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        *,
        quantizer: str | None = "ternary",
        threshold: float = 0.05,
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
                "threshold": threshold,
                "radius": radius,
                "step_size": step_size,
                "relaxation": relaxation,
                "foreach": foreach,
                "fused": fused,
            },
            process_group,
        )
