"""Deep Frank-Wolfe optimizers for PyTorch: float, binary (XNOR-Net) and ternary (TTQ) networks."""

from dfw_opt.activations import SignActivation
from dfw_opt.dfw import DFW, ProjectedDFW, TernaryDFW
from dfw_opt.losses import MultiClassHingeLoss
from dfw_opt.param_groups import param_groups

__version__ = "0.1.0"
from dfw_opt.averaging import AveragedModel
