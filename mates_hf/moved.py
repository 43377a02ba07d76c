"""Old import paths of public names, such as `mates_hf.influence.ngram`: they keep working, with a warning.

The package root installs this once. A module that has moved is found under its old name as an empty one that holds
what the new one holds. Trade-off: an import hook is less plain than a file at each old place, but those files would
stand in every listing of the folders.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

NEW_HOME = {
    "mates_hf.influence.directional": "mates_hf.influence.probe_directional",
    "mates_hf.influence.encoder": "mates_hf.prediction.encoder_model",
    "mates_hf.influence.hidden_states": "mates_hf.prediction.hidden_states",
    "mates_hf.influence.ngram": "mates_hf.prediction.ngram_model",
    "mates_hf.influence.one_step": "mates_hf.influence.probe_one_step",
}


class MovedModules:
    """Finds and fills the modules of `NEW_HOME`; all others are left to the finders before it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """What Python's import asks a finder."""
        return importlib.util.spec_from_loader(name, self) if name in NEW_HOME else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary empty module will do."""

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module with what its new home holds."""
        old = module.__name__
        warnings.warn(f"`{old}` is now `{NEW_HOME[old]}`: import from there.", DeprecationWarning, stacklevel=2)
        there = vars(importlib.import_module(NEW_HOME[old]))
        vars(module).update((name, value) for name, value in there.items() if not name.startswith("__"))


def install() -> None:
    """Let Python's import ask here last; does nothing the second time."""
    if not any(type(finder) is MovedModules for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
