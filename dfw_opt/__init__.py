"""Deep Frank-Wolfe optimizers for PyTorch: float, binary (XNOR-Net) and ternary (TTQ) networks."""

from dfw_opt.activations import SignActivation
from dfw_opt.averaging import AveragedModel
from dfw_opt.dfw import DFW, ProjectedDFW, TernaryDFW
from dfw_opt.losses import MultiClassHingeLoss
from dfw_opt.packed import PackedFileError, load_packed, save_packed
from dfw_opt.param_groups import param_groups
from dfw_opt.summary import summary

__all__ = ["DFW", "AveragedModel", "MultiClassHingeLoss", "PackedFileError", "ProjectedDFW"]
__all__ += ["SignActivation", "TernaryDFW", "load_packed", "param_groups", "save_packed", "summary"]

__version__ = "0.1.0"
