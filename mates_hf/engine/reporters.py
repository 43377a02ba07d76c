"""The Trainer that calls a hook, and its reporters.

Where it is used: `MatesCallback` and `LmEvalCallback` hand their metrics over here. Hooks are not given the Trainer:
it is looked up in the frames that call them.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)


def find_trainer(callback: Any) -> Any:
    """The Trainer whose loop calls the hook that is running, or None where another loop does.

    Hooks are not given the Trainer. It is looked up in the frames that call them, and only read.

    Args:
        callback: must be among its callbacks.

    Returns:
        The Trainer.
    """
    from transformers import Trainer

    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    return None


def tell_unreported(trainer: Any, report_to: Any) -> None:
    """One hint where metrics reach no reporter although the run has some: its loop is no Trainer that is known.

    Args:
        trainer: The attached Trainer, or the one that calls the hooks; None where there is none.
        report_to: The reporters of the run's arguments.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if trainer is None and names and names != ["none"]:
        logger.warning(
            "Metrics go to `state.log_history` alone, and `report_to` (%s) gets none: no `transformers.Trainer` with "
            "this callback calls its hooks. Call `callback.attach(trainer)` to have them reported.",
            ", ".join(map(str, names)),
        )


def report(callback: Any, trainer: Any, state: Any, metrics: Mapping[str, float]) -> None:
    """Hand metrics to every reporter of a Trainer; without a Trainer, to `state.log_history` alone.

    What the Trainer was about to log itself, and what a subclass gathers for that, stays as it is.

    Args:
        callback: whose metrics they are, while one of its hooks runs.
        trainer: the Trainer that trains; None has it looked up.
        state: the Trainer's state, as hooks get it.
        metrics: by name.
    """
    from transformers import Trainer

    if not metrics:
        return
    trainer = trainer or find_trainer(callback)
    if trainer is None:
        state.log_history.append({**metrics, "epoch": state.epoch, "step": state.global_step})
        return
    was_due = trainer.control.should_log
    Trainer.log(trainer, dict(metrics))  # an override may clear what it has summed up (TRL's trainers do)
    trainer.control.should_log = was_due  # each log says that the one that is due is done
