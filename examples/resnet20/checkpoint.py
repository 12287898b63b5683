"""Checkpoints: all that a run needs to go on, in tensors and plain values."""

import pickle
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import write_atomically

NAME = "checkpoint.pt"
_FORMAT = 1


def save(directory: Path, content: dict[str, Any]) -> Path:
    """Write ``content`` to the checkpoint in ``directory``; the old one stays until it is done."""
    path = directory / NAME
    write_atomically(path, lambda file: torch.save({"format": _FORMAT} | content, file))
    return path


def load(directory: Path, device: str | None = None) -> dict[str, Any]:
    """Read the checkpoint in ``directory``."""
    path = directory / NAME
    if not path.is_file():
        raise UserError(f"nothing to resume: there is no {path}; leave --resume out to start")
    try:
        content = torch.load(path, map_location=device or "cpu", weights_only=True)
        if content["format"] != _FORMAT:
            raise KeyError("format")
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is no checkpoint of this example, or is damaged; choose another --out"
        ) from error
    return dict(content)
