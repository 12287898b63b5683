"""Checkpoints: all that a run needs to go on, in tensors and plain values, and a seal.

The seal is a line of text after what torch.save wrote, ``sha256`` and the digest of all before it.
torch.load reads the file as if it were not there, and without it does not notice a flipped bit.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .files import write_atomically

NAME = "checkpoint.pt"
_FORMAT = 2


def save(directory: Path, content: dict[str, Any]) -> Path:
    """Write ``content`` to the checkpoint in ``directory``; the old one stays until it is done."""
    path = directory / NAME
    # In memory first: torch.save would make an error of its own out of that of a full disk.
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT} | content, buffer)
    body = buffer.getvalue()
    write_atomically(path, lambda file: file.write(body + seal(body)))
    return path


def load(directory: Path, device: str | None = None) -> dict[str, Any]:
    """Read the checkpoint in ``directory``."""
    path = directory / NAME
    try:
        stored = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"nothing to resume: there is no {path}; leave --resume out to start"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; choose another --out") from error
    content = decode(stored, device)
    if content is None:
        raise UserError(
            f"{path} is no checkpoint of this example, or is damaged; choose another --out"
        )
    return content


def decode(stored: bytes, device: str | None = None) -> dict[str, Any] | None:
    """What `save` was given, from the bytes that it wrote; ``None`` if they are not these bytes."""
    body, line = stored[:-_SEAL_BYTES], stored[-_SEAL_BYTES:]
    if line != seal(body):
        return None
    try:
        content = torch.load(io.BytesIO(body), map_location=device or "cpu", weights_only=True)
    except Exception:  # what is sealed is whole, but need not be ours
        return None
    ours = isinstance(content, dict) and content.get("format") == _FORMAT
    return content if ours else None


def seal(body: bytes) -> bytes:
    """The line that ends a checkpoint."""
    return f"\nsha256 {hashlib.sha256(body).hexdigest()}\n".encode()


_SEAL_BYTES = len(seal(b""))
