"""How a command prints: lines for a person, one JSON object for a program.

Where it is used: by each command. Trade-off: a reader that stops early is no error, so what it did not read is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from typing import Any


def print_lines(lines: Iterable[str]) -> None:
    """Print lines; a reader that has seen enough (`mates-hf round RUN | head`) is no error."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit, so what is left over needs somewhere to go.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Print a JSON object that strict readers take."""
    from mates_hf.reporting.lines import finite

    print_lines([json.dumps(finite(value), indent=2, allow_nan=False)])
