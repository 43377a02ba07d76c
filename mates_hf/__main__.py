"""`python -m mates_hf` is `mates-hf`."""

from __future__ import annotations

import sys

from mates_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
