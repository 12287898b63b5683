"""Resumes a run on a disk that is full, and on one that is read-only; run by test_trust.py.

Needs the right to mount, as inside `unshare -rm`. Usage:

    full_disk.py CHECKPOINT MOUNTPOINT

Prints, as JSON, how each attempt ended and what was left.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import cifar_resnet20
import torch
from resnet20 import checkpoint

NOT_ALLOWED = 77


def mount(where: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(result.stderr.strip())
        sys.exit(NOT_ALLOWED)


def attempt(out: Path) -> dict[str, Any]:
    with redirect_stderr(io.StringIO()) as errors:
        code = cifar_resnet20.main(["--resume", "--out", str(out)])
    return {
        "code": code,
        "errors": errors.getvalue(),
        "digest": hashlib.sha256((out / checkpoint.NAME).read_bytes()).hexdigest(),
        "epochs": len(checkpoint.load(out)["history"]),
        "files": sorted(path.name for path in out.iterdir()),
    }


def main() -> None:
    before, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    room = before.stat().st_size * 3 // 2  # for one checkpoint, not for the next beside it
    mount(out, f"size={room}")
    shutil.copy(before, out / checkpoint.NAME)
    full = attempt(out)
    mount(out, f"remount,ro,size={room}")
    read_only = attempt(out)
    mount(out, f"remount,rw,size={10 * room}")
    enough = attempt(out)
    shutil.copytree(out, before.parent / "after")
    print(json.dumps({"full": full, "read_only": read_only, "enough": enough}))


if __name__ == "__main__":
    main()
