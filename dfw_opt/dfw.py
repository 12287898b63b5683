"""DFW: Deep Frank-Wolfe for float networks."""

from torch import Tensor
from torch.optim.optimizer import ParamsT

from dfw_opt.data_parallel import Ranks
from dfw_opt.optimizer import FrankWolfe

__all__ = ["DFW"]


class DFW(FrankWolfe):
    r"""Deep Frank-Wolfe: SGD's direction, with the step size of a proximal problem.

    SGD linearises regulariser, network and loss. DFW keeps the loss, which it knows to be
    non-negative, and linearises the rest. At weights :math:`w`, mini-batch loss :math:`\ell`
    (without the regulariser) and its gradient :math:`\delta`, with weight decay
    :math:`r = \lambda w` and the learning rate :math:`\eta`, momentum :math:`\mu`:

    .. math::

        \begin{aligned}
        &\rule{110mm}{0.4pt}\\
        &\gamma = \operatorname{clip}_{[0,1]}
            \frac{\ell - \sum\eta\langle\delta, r\rangle}{\sum\eta\|\delta\|^2 + \varepsilon}
            \qquad\text{one for all parameters}\\
        &z \leftarrow \mu z - \eta\gamma\,(\delta + r)\\
        &w \leftarrow w - \eta\,(r + \gamma\delta) + \mu z\\
        &\rule{110mm}{0.4pt}
        \end{aligned}

    The sums run over all parameters, each with the :math:`\eta` of its group. With
    :math:`\lambda = \mu = 0` the step is :math:`\eta\gamma = \min(\eta, \ell/\|\delta\|^2)`, a
    clipped Polyak step: :math:`\eta` is an upper limit, and the step shrinks with the loss.

    Args:
        params: parameters, or groups of parameters that override the settings below.
        lr: :math:`\eta \ge 0`, the paper's proximal coefficient; a float or a 1-element tensor.
        momentum: :math:`\mu \in [0, 1)`.
        weight_decay: :math:`\lambda \ge 0`. Not written into ``.grad``, and not part of the loss
            that is passed to :meth:`~dfw_opt.optimizer.FrankWolfe.step`.
        eps: :math:`\varepsilon \ge 0`. As :math:`\gamma` is one for all, that of the first group
            counts.
        foreach: whether to use torch's multi-tensor kernels; ``None`` means yes. The other path is
            the same step, one tensor at a time.
        fused: whether to use kernels of our own, which move as little memory as the step needs.
            They do float32 parameters on the CPU, where there is a C compiler; all else is done as
            ``foreach`` says. ``None`` means yes for models of 65,536 elements or more, unless
            ``foreach`` is given. The first such step on a machine waits about a second for the
            compiler. ``foreach=True`` and ``fused=True`` together are refused.
        process_group: over which ranks the loss is averaged, so that :math:`\gamma` is the same on
            all of them: ``"world"``, all ranks, where ``torch.distributed`` is initialised when a
            step is made; a ``ProcessGroup``; or ``None``, no others.

    Raises:
        TypeError: a parameter is not real floating point, or flattened by FSDP1; or
            ``process_group`` is neither a process group of this rank, nor ``"world"``, nor
            ``None``.
        ValueError: a setting is out of range; the message names it.

    >>> import torch
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = DFW(model.parameters(), lr=0.1)
    >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(2, 4)), torch.tensor([0, 2]))
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> 0 <= optimizer.gamma <= 1
    tensor(True)

    Source: Berrada, Zisserman, Pawan Kumar, *Deep Frank-Wolfe for Neural Network Optimization*,
    ICLR 2019 (arXiv 1811.07591), Algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        *,
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
                "foreach": foreach,
                "fused": fused,
            },
            process_group,
        )
