"""Small files: 1 bit for a binary weight, 8/5 for a ternary one, everything else as it is."""

from dfw_opt.packing.file import load_packed, save_packed
from dfw_opt.packing.layout import PackedFileError

__all__ = ["PackedFileError", "load_packed", "save_packed"]
