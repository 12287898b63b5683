"""Shows what a packed file holds: ``python -m dfw_opt FILE``."""

import argparse
import contextlib
import sys

from dfw_opt.packing.file import read_entries
from dfw_opt.packing.layout import PackedFileError
from dfw_opt.sizes import of_entries


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a name shows its code
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(
        prog="python -m dfw_opt", description="Show what a file of dfw_opt.save_packed holds."
    )
    parser.add_argument("file", metavar="FILE")
    path = parser.parse_args(arguments).file
    try:
        entries, size = read_entries(path)
    except (PackedFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(of_entries(entries, size))
    print(f"{path}: {size:,} bytes, undamaged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
