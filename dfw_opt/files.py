"""Writing a file so that a reader, or a crash, never meets half of one."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["write_atomically"]

_LONGEST = 50  # of 255 bytes that a name may have; a character may take four


def write_atomically(
    path: str | os.PathLike[str], write: Callable[[IO[bytes]], object], advice: str = ""
) -> None:
    """Calls ``write`` on a temporary file beside ``path``, syncs it, and moves it into place.

    Until that last move the file at ``path``, if there is one, stays as it was. A link is followed.
    Only a process that is killed leaves the temporary file, ``.NAME.*.part``, behind.

    Args:
        path: the file to write.
        write: what writes it, given a binary file.
        advice: what to do if it cannot be written, for the error.

    Raises:
        OSError: the file cannot be written; one that was there before is unchanged.
    """
    target = Path(os.path.realpath(path))
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    part = target.with_name(f".{target.name[:_LONGEST]}.{unique}.part")
    try:
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_directory(target.parent)
    except OSError as error:
        kept = "; the file that is there is unchanged" if target.is_file() else ""
        reason = f"cannot write: {error.strerror or error}{kept}{advice and '; '}{advice}"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    # Without this the rename itself may be lost in a power cut. Not every system can do it.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
