"""Writing files so that a reader, or a crash, never meets half of one."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from dfw_opt import files as atomic

from .errors import UserError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` on a temporary file beside ``path``, sync it, and move it into place."""
    try:
        atomic.write_atomically(path, write)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; free some space or choose another --out"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def make_directory(path: Path, option: str = "--out") -> None:
    """Make ``path`` and see that a file can be written there, before any work is done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}; choose another {option}"
        ) from error


def clear_leftovers(directory: Path, names: Iterable[str]) -> None:
    """Remove what killed processes had begun to write in place of the files called ``names``."""
    for name in names:
        for part in directory.glob(f".{glob.escape(name)}.*.part"):
            pid = part.name.split(".")[-2].split("-")[0]
            if pid.isdecimal() and not _is_another_process(int(pid)):
                with contextlib.suppress(OSError):
                    part.unlink()


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    if os.name == "nt":  # where os.kill kills, but no file that is in use can be removed
        return False
    try:
        os.kill(pid, 0)  # sends nothing, only asks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # someone else's
        return True
    return True
