"""Compiles step.c with the machine's C compiler, loads it, and runs it in threads.

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
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from dfw_opt.files import write_atomically

__all__ = ["OUTPUTS", "Settings", "library", "parallel"]

_log = logging.getLogger(__name__)

OUTPUTS = 7
"""Doubles that each piece of work leaves behind; as in step.c."""

_SOURCE = Path(__file__).with_name("step.c")
# Never -ffast-math: NaN must stay NaN, and linking with it would change the whole process.
_FLAGS = (
    "-std=c99",
    "-O3",
    "-march=native",
    "-ffp-contract=off",  # gcc and clang differ in whether they would
    "-fno-math-errno",
    "-fno-trapping-math",
)
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 60

_P, _N = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "dfw_layout": ([_P], None),
    "dfw_pieces": ([ctypes.c_int, _P, _N], _N),
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
        with _compiled() as path:
            loaded = ctypes.CDLL(str(path))
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
    # Whatever goes wrong with a compiler, a folder or a home is no reason not to train.
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError, ValueError) as error:
        _log.info("no compiled steps: %s", error)
        return None
    return loaded


def parallel(function: Callable[[int, int], object], pieces: int, elements: int) -> None:
    """Calls ``function(first, last)`` for ranges that make up ``range(pieces)``, in threads."""
    threads = min(torch.get_num_threads(), pieces, 1 + elements // _WORTH_A_THREAD)
    if threads <= 1:
        function(0, pieces)
        return
    bounds = [pieces * i // threads for i in range(threads + 1)]
    mine, *others = itertools.pairwise(bounds)
    running = [_pool(os.getpid()).submit(function, *ends) for ends in others]
    try:
        function(*mine)
    finally:  # also when interrupted: they write to memory that is about to be given back
        wait(running)
    for each in running:
        each.result()


_WORTH_A_THREAD = 1 << 20  # elements: less takes about as long as waking the thread


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    # By process, because threads do not survive a fork.
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="dfw_opt")


@contextlib.contextmanager
def _compiled() -> Iterator[Path]:
    """The library as a file, which need not outlast the block."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise FileNotFoundError("there is no C compiler")
    command = [*shlex.split(compiler), *_FLAGS]
    folder = _cache()
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="dfw_opt-") as scratch:
            yield _compile(command, Path(scratch))
        return
    made_from = hashlib.sha256(_SOURCE.read_bytes() + repr((command, _machine(command))).encode())
    path = folder / f"step-{made_from.hexdigest()[:32]}.so"
    if not _sound(path):
        with tempfile.TemporaryDirectory(prefix="dfw_opt-") as scratch:
            content = _compile(command, Path(scratch)).read_bytes()
        write_atomically(path, lambda file: file.write(content + hashlib.sha256(content).digest()))
    yield path


def _compile(command: list[str], folder: Path) -> Path:
    made = folder / "step.so"
    subprocess.run(
        [*command, "-shared", "-fPIC", str(_SOURCE), "-o", str(made), "-lm"],
        check=True,
        capture_output=True,
        timeout=_TIMEOUT,
    )
    return made


def _sound(path: Path) -> bool:
    """Whether it is what was written there, by us: half a library would end the process."""
    if not path.is_file() or not _ours(path):
        return False
    content = path.read_bytes()  # with its digest at the end, which the loader does not look at
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _ours(path: Path) -> bool:
    """Whether nobody else can write to it."""
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _machine(command: list[str]) -> list[Any]:
    """What decides the result beside the source: the compiler's file, and the processor."""
    found = shutil.which(command[0])
    status = os.stat(found) if found else None
    return [platform.machine(), _processor(), status and (status.st_size, status.st_mtime_ns)]


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _cache() -> Path | None:
    """The user's cache folder, if it can be written to, and by no other user."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dfw_opt")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _ours(folder) and os.access(folder, os.W_OK):
            return folder
    return None
