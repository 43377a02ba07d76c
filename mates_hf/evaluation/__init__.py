"""How good the model is: the zero-shot tasks, on checkpoints and on the live model while it trains.

`benchmarks`, `local_files` and `item_metrics` are what the task files in `tasks/` score and how; `evaluator` runs
tasks on a model in memory through `live` and `continuations`; `callback` does so inside a Trainer. `contamination`
finds text that pool, reference and evaluated items share; `agreement` and `metrics/` judge influence fits. Place in
the flow: right of `data`, left of everything that chooses data, so no choice can look at a result.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mates_hf.evaluation.callback import LmEvalCallback
    from mates_hf.evaluation.contamination import check_contamination
    from mates_hf.evaluation.evaluator import Evaluator

__all__ = ["Evaluator", "LmEvalCallback", "check_contamination"]

_HOME = {
    "Evaluator": "mates_hf.evaluation.evaluator",
    "LmEvalCallback": "mates_hf.evaluation.callback",
    "check_contamination": "mates_hf.evaluation.contamination",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `mates_hf.evaluation` has no attribute {name!r}; it has {', '.join(__all__)}.")
    return getattr(importlib.import_module(_HOME[name]), name)
