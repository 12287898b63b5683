"""Shows what a packed file holds: ``python -m dfw_opt FILE``."""

import argparse
import sys

from dfw_opt.packed import reading
from dfw_opt.summary import of_stored

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dfw_opt", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    try:
        with reading(parser.parse_args().file) as held:
            print(of_stored(*held))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
