"""One process that `machine.in_processes` starts: calls a function, leaves its result as JSON."""

import importlib
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    call, arguments, out = sys.argv[1:]
    module, _, name = call.partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(out).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo now and then end a process that is done
