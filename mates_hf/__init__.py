"""Model-aware pretraining data selection (MATES, arXiv:2406.06046) inside an unmodified `transformers.Trainer`.

Influence is higher is better, everywhere. One-step labels price a step in nats/token; path labels give an order.

Public names are loaded when first used, so `import mates_hf` is light: a script that only reads finished rounds never
imports torch. Trade-off: a missing dependency is reported at first use, not at import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mates_hf.moved import install as _keep_old_paths

if TYPE_CHECKING:
    from mates_hf.config import MatesConfig
    from mates_hf.data.reference import ReferenceTask
    from mates_hf.data.stream import MatesStream
    from mates_hf.engine.combined_optimizer import CombinedOptimizer
    from mates_hf.errors import MatesError
    from mates_hf.influence.probe_directional import DirectionalProbe
    from mates_hf.influence.probe_loss_reduction import LossReductionProbe
    from mates_hf.influence.probe_one_step import OneStepProbe
    from mates_hf.prediction.encoder_model import EncoderInfluenceModel
    from mates_hf.prediction.feature_model import FeatureInfluenceModel
    from mates_hf.prediction.moore_lewis import MooreLewisModel
    from mates_hf.prediction.ngram_model import NgramInfluenceModel
    from mates_hf.prediction.text_model import TextInfluenceModel
    from mates_hf.round_files import load_round
    from mates_hf.selection.choose import gumbel_top_k
    from mates_hf.selection.file_scoring import score_files
    from mates_hf.selection.selector import MatesSelector
    from mates_hf.training.callback import MatesCallback
    from mates_hf.training.loop import MatesRounds
    from mates_hf.training.run_report import write_report
    from mates_hf.training.selector_fit import fit_selector

__version__ = "0.1.0"

__all__ = [
    "CombinedOptimizer",
    "DirectionalProbe",
    "EncoderInfluenceModel",
    "FeatureInfluenceModel",
    "LossReductionProbe",
    "MatesCallback",
    "MatesConfig",
    "MatesError",
    "MatesRounds",
    "MatesSelector",
    "MatesStream",
    "MooreLewisModel",
    "NgramInfluenceModel",
    "OneStepProbe",
    "ReferenceTask",
    "TextInfluenceModel",
    "fit_selector",
    "gumbel_top_k",
    "load_round",
    "score_files",
    "write_report",
]

_HOME = {
    "CombinedOptimizer": "mates_hf.engine.combined_optimizer",
    "DirectionalProbe": "mates_hf.influence.probe_directional",
    "EncoderInfluenceModel": "mates_hf.prediction.encoder_model",
    "FeatureInfluenceModel": "mates_hf.prediction.feature_model",
    "LossReductionProbe": "mates_hf.influence.probe_loss_reduction",
    "MatesCallback": "mates_hf.training.callback",
    "MatesConfig": "mates_hf.config",
    "MatesError": "mates_hf.errors",
    "MatesRounds": "mates_hf.training.loop",
    "MatesSelector": "mates_hf.selection.selector",
    "MatesStream": "mates_hf.data.stream",
    "MooreLewisModel": "mates_hf.prediction.moore_lewis",
    "NgramInfluenceModel": "mates_hf.prediction.ngram_model",
    "OneStepProbe": "mates_hf.influence.probe_one_step",
    "ReferenceTask": "mates_hf.data.reference",
    "TextInfluenceModel": "mates_hf.prediction.text_model",
    "fit_selector": "mates_hf.training.selector_fit",
    "gumbel_top_k": "mates_hf.selection.choose",
    "load_round": "mates_hf.round_files",
    "score_files": "mates_hf.selection.file_scoring",
    "write_report": "mates_hf.training.run_report",
}


_keep_old_paths()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module `mates_hf` has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
