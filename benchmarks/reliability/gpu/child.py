"""The process of a part: reads its task from standard input, and leaves the result, or the error, as JSON."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.reliability.gpu.device import Task


def main() -> None:
    """Run it."""
    told = json.loads(sys.stdin.read())
    module, _, name = told.pop("call").partition(":")
    out = Path(told.pop("out"))
    try:
        result = getattr(importlib.import_module(module), name)(Task(**told))
    except Exception as error:
        traceback.print_exc()
        result = {"done": False, "error": f"{type(error).__name__}: {error}"[:500]}
    out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
