"""Fetching CIFAR-10: checked while it streams, taken up again after a break, unpacked safely."""

import gzip
import hashlib
import http.client
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .data import FOLDER, RECORD_BYTES, RECORDS_PER_FILE, TEST_FILES, TRAIN_FILES
from .errors import UserError

_CHUNK = 1 << 18
_TIMEOUT = 30.0

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Archive:
    """A tar.gz file on the web, and the regular files of one folder that we take out of it."""

    url: str
    size: int
    sha256: str
    folder: str
    files: dict[str, int]

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name


CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    folder=FOLDER,
    files=dict.fromkeys(TRAIN_FILES + TEST_FILES, RECORDS_PER_FILE * RECORD_BYTES),
)


def fetch(
    archive: Archive,
    directory: Path,
    progress: Progress = lambda done, total: None,
    attempts: int = 4,
    pause: float = 1.0,
) -> Path:
    """Download and unpack ``archive`` below ``directory``; return the folder with its files.

    What arrives goes to a ``.part`` file, which a second call goes on from. Nothing gets its
    final name before its size and SHA-256 digest are right. A folder that is already complete is
    left as it is.
    """
    folder = directory / archive.folder
    if _complete(folder, archive):
        return folder
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / archive.name
        if not (path.is_file() and _digest_of(path) == archive.sha256):
            _download(archive, path, progress, attempts, pause)
        _unpack(archive, path, folder)
        path.unlink()
    except OSError as error:
        raise UserError(
            f"cannot store {archive.name} in {directory}: {error.strerror or error}; "
            "choose another --data, or free some space"
        ) from error
    return folder


def _download(
    archive: Archive, path: Path, progress: Progress, attempts: int, pause: float
) -> None:
    part = path.with_name(path.name + ".part")
    for attempt in range(1, attempts + 1):
        before = _size_of(part)
        problem = _stream(archive, part, progress) or "the connection broke"
        if _size_of(part) == archive.size:
            if _digest_of(part) == archive.sha256:
                part.replace(path)
                return
            part.unlink()
            problem = "what arrived has the wrong SHA-256 digest and was thrown away"
            if before == 0:
                break  # all of it came from the server just now: asking again will not help
        if attempt < attempts:
            time.sleep(pause * attempt)
    raise UserError(
        f"could not download {archive.url}: {problem} "
        f"(have {_size_of(part):,} of {archive.size:,} bytes); run the same command again to go on"
    )


def _stream(archive: Archive, part: Path, progress: Progress) -> str | None:
    """Ask for what is missing of ``part`` and append it; return what went wrong, if known."""
    start = _size_of(part)
    if start == archive.size:
        return None
    if start > archive.size:
        part.unlink()
        start = 0
    request = urllib.request.Request(archive.url, headers={"User-Agent": "dfw-opt example"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if start and not _continues(response, start, archive.size):
                start = 0  # the server sends the whole file, so ours begins anew
            with part.open("ab" if start else "wb") as file:
                return _copy(response, file, start, archive.size, progress)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            part.unlink()
        return f"the server answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        return str(error) or type(error).__name__


def _continues(response: Any, start: int, size: int) -> bool:
    expected = f"bytes {start}-{size - 1}/{size}"
    return bool(response.status == 206 and response.headers.get("Content-Range") == expected)


def _copy(response: Any, file: Any, done: int, size: int, progress: Progress) -> str | None:
    while chunk := response.read(_CHUNK):
        done += len(chunk)
        if done > size:
            file.truncate(0)
            return "the server sends more than it should"
        file.write(chunk)
        progress(done, size)
    return None


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(folder: Path, archive: Archive) -> bool:
    return all(_size_of(folder / name) == size for name, size in archive.files.items())


def _unpack(archive: Archive, path: Path, folder: Path) -> None:
    """Copy the files that we expect out of the archive, each to a name that we choose.

    Nothing is written to a path that the archive names, and nothing but the content of regular
    files is used, so links, devices, absolute paths and ``..`` have no way to act.
    """
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    missing = dict(archive.files)
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                inside = PurePosixPath(member.name)
                if str(inside.parent) != archive.folder or inside.name not in missing:
                    continue
                source = tar.extractfile(member) if member.isreg() else None
                if source is None or member.size != missing.pop(inside.name):
                    raise UserError(f"{path} holds an unexpected {member.name}; nothing unpacked")
                with source, (temporary / inside.name).open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
        if missing:
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}; nothing unpacked")
        folder.mkdir(exist_ok=True)
        for name in archive.files:
            (temporary / name).replace(folder / name)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); delete it and try again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
