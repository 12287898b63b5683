"""Deep Frank-Wolfe optimizers for PyTorch: float, binary (XNOR-Net) and ternary (TTQ) networks."""

from dfw_opt.activations import SignActivation
from dfw_opt.averaging import AveragedModel
from dfw_opt.dfw import DFW
from dfw_opt.groups import param_groups
from dfw_opt.losses import MultiClassHingeLoss
from dfw_opt.packing import PackedFileError, load_packed, save_packed
from dfw_opt.projected import ProjectedDFW
from dfw_opt.sizes import summary
from dfw_opt.ternary import TernaryDFW

__all__ = [
    "DFW",
    "AveragedModel",
    "MultiClassHingeLoss",
    "PackedFileError",
    "ProjectedDFW",
    "SignActivation",
    "TernaryDFW",
    "load_packed",
    "param_groups",
    "save_packed",
    "summary",
]

__version__ = "0.1.0"
