"""Compiles step.c with the machine's C compiler, loads it, and runs it on torch's threads' number.

No compiler, or one that fails, is no error: :func:`library` is then ``None``, which is logged once,
and steps are made of torch's own kernels. The result is kept in the user's cache folder by what it
was made from (source, compiler, processor), so that a machine compiles once.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dfw_opt.files import write_atomically

__all__ = ["OUTPUTS", "Settings", "library", "parallel"]

_log = logging.getLogger(__name__)

OUTPUTS = 7
"""Doubles that each unit of work leaves behind; as in step.c."""

_SOURCE = Path(__file__).with_name("step.c")
# Never -ffast-math: NaN must stay NaN, and linking with it would change the whole process.
_FLAGS = ("-std=c99", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 60

_P, _N = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "unit_count": ([ctypes.c_int, _P, _N], _N),
    **{
        f"dfw_{name}": ([ctypes.c_int, _P, _N, _P, _N, _N, _P], None)
        for name in ("sums", "slope", "move", "write_ternary")
    },
    "dfw_thresholds": ([_P, _N, _P, _P], None),
    "dfw_scales_sums": ([_P, _N, _P], ctypes.c_double),
    "dfw_scales_slope": ([_P, _N, _P, _P], None),
    "dfw_scales_move": ([_P, _N, _P], None),
}


class Settings(ctypes.Structure):
    """As in step.c."""

    _fields_ = [
        (name, ctypes.c_double)
        for name in (
            *("lr", "weight_decay", "momentum", "lower", "upper"),
            *("threshold", "scale_min", "gamma"),
        )
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled step.c, or ``None`` where that cannot be had."""
    try:
        path = _compiled()
        loaded = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.info("no compiled steps: %s", error)
        return None
    return loaded


def parallel(function: Callable[[int, int], object], units: int, elements: int) -> None:
    """Calls ``function(first, last)`` for ranges that make up ``range(units)``, on some threads."""
    threads = min(torch.get_num_threads(), units, 1 + elements // _WORTH_A_THREAD)
    if threads <= 1:
        function(0, units)
        return
    bounds = [units * i // threads for i in range(threads + 1)]
    mine, *others = itertools.pairwise(bounds)
    running = [_pool(os.getpid()).submit(function, *ends) for ends in others]
    function(*mine)
    for each in running:
        each.result()


_WORTH_A_THREAD = 1 << 20  # elements: less takes about as long as waking the thread


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    # By process, because threads do not survive a fork.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dfw_opt")


def _compiled() -> Path:
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    command = [*compiler.split(), *_FLAGS]
    source = _SOURCE.read_bytes()
    made_from = hashlib.sha256(source + repr((command, _processor())).encode()).hexdigest()
    folder = _cache()
    path = folder / f"step-{made_from[:32]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch, "step.so")
            subprocess.run(
                [*command, "-shared", "-fPIC", str(_SOURCE), "-o", str(made), "-lm"],
                check=True,
                capture_output=True,
                timeout=_TIMEOUT,
            )
            content = made.read_bytes()
        write_atomically(path, lambda file: file.write(content))
    return path


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _cache() -> Path:
    """A folder that no other user can write to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dfw_opt")
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        safe = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if safe and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="dfw_opt-"))
