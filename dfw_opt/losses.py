"""The loss that the theory is for: the multi-class hinge."""

import torch
from torch import Tensor, nn


class MultiClassHingeLoss(nn.Module):
    r"""The multi-class support vector machine loss of Crammer and Singer, averaged over the batch.

    With scores :math:`s`, the label :math:`\bar y` and the augmented margins
    :math:`a_y = s_y + \mathbb 1[y \ne \bar y] - s_{\bar y}`,

    .. math:: \ell = \operatorname{mean}_{\text{batch}} \sum_y \xi_y\,a_y ,

    where :math:`\xi` is one-hot at the largest margin, so that the sum is
    :math:`\max_y a_y \ge 0`. No gradient flows through :math:`\xi`.

    Args:
        smooth: dual smoothing: :math:`\xi = \operatorname{softmax}(s)` instead, which gives every
            class a gradient, but for samples for which the sum would be negative.

    Shape:
        - scores: :math:`(N, C)` with :math:`C \ge 2`, floating point; computed in float32 or wider.
        - targets: :math:`(N)`, class indices in :math:`[0, C)`, int64.
        - output: 0-dim.

    Raises:
        ValueError: shapes or dtypes are not as above. (A label out of range is torch's error.)

    >>> criterion = MultiClassHingeLoss()
    >>> criterion(torch.tensor([[2.0, 1.5, 0.0]]), torch.tensor([0]))
    tensor(0.5000)

    Source: Berrada et al., ICLR 2019 (arXiv 1811.07591), Section 3 and, for dual smoothing, its
    appendix; Crammer and Singer, JMLR 2, 2001.
    """

    def __init__(self, smooth: bool = False) -> None:
        super().__init__()
        self.smooth = smooth

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        good = scores.dim() == 2 and scores.shape[1] > 1 and scores.is_floating_point()
        if not good or targets.dtype != torch.int64 or targets.shape != scores.shape[:1]:
            found = [(tuple(x.shape), x.dtype) for x in (scores, targets)]
            wanted = "scores (N, C) with C >= 2, floating point, and targets (N,), int64"
            raise ValueError(f"{wanted}: not of shapes and dtypes {found}")
        s, labels = scores.to(torch.promote_types(scores.dtype, torch.float32)), targets[:, None]
        # The label's own margin is 0 by definition, whatever rounding makes of s - s + 0.
        a = (s - s.gather(1, labels) + 1).scatter(1, labels, 0.0)
        hardest = a.max(dim=1).values
        if not self.smooth:
            return hardest.mean()
        smoothed = (s.detach().softmax(dim=1) * a).sum(dim=1)
        return torch.where(smoothed < 0, hardest, smoothed).mean()

    def extra_repr(self) -> str:
        return f"smooth={self.smooth}"
