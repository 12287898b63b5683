"""Writing a file so that a reader, or a crash, never meets half of one."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["write_atomically"]

_LONGEST = 50  # of 255 bytes that a name may have; a character may take four


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], object], advice: str = ""
) -> None:
    """Calls ``write`` on a temporary file beside ``path``, syncs it, and moves it into place.

    Until that last move the file at ``path``, if there is one, stays as it was; the new one takes
    over its permissions. A link is followed. Only a process that is killed leaves the temporary
    file, ``.NAME.*.part``, behind.

    Args:
        path: the file to write.
        write: what writes it, given a binary file.
        advice: what to do if it cannot be written, for the error.

    Raises:
        OSError: the file cannot be written, or what is there is no file but a device, say; it is
            unchanged.
    """
    target = Path(os.path.realpath(path))
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    part = target.with_name(f".{target.name[:_LONGEST]}.{unique}.part")
    try:
        permissions = _permissions(target) if target.exists() else None
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if permissions is not None:
            os.chmod(part, permissions)
        os.replace(part, target)
        _sync_directory(target.parent)
    except OSError as error:
        kept = "; the file that is there is unchanged" if target.is_file() else ""
        reason = f"cannot write: {error.strerror or error}{kept}{advice and '; '}{advice}"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _permissions(target: Path) -> int:
    """Of the file to be replaced, which must be one."""
    mode = target.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a directory cannot be replaced anyway
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket, not a file")
    return stat.S_IMODE(mode)


def _sync_directory(path: Path) -> None:
    # Without this the rename itself may be lost in a power cut. Not every system can do it.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
