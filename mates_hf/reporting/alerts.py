"""Alerts through the trackers that have them: W&B and trackio.

Where it is used: `MatesCallback` sends what a round should be looked at for.

Trade-off: a tracker is asked only where this process has begun a run of it; nothing of the pool is sent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from mates_hf.reporting.lines import round_line

logger = logging.getLogger(__name__)


class Alert(NamedTuple):
    """What somebody should look at.

    Attributes:
        title: below 64 characters, as W&B wants it.
        text: the round in one line.
    """

    title: str
    text: str


def round_alert(info: Mapping[str, Any]) -> Alert | None:
    """What of a round should be looked at: that it was refused, or that what was bought is no longer worth more.

    Args:
        info: The round's `round.json`.

    Returns:
        The alert, without a word of the pool; None where the round did what it should.
    """
    guard = info.get("guard") or {}
    if guard.get("decision") == "own_order":
        why = {"used_up": "used up", "loss_rose": "reference loss rose"}.get(str(guard.get("failed")), "weak signal")
        title = f"MATES round {info.get('number')} refused: {why}"
    elif guard.get("decision") == "keep_previous":
        title = f"MATES round {info.get('number')} kept the model before"
    elif guard.get("reversed"):
        title = f"MATES round {info.get('number')}: influence reversed"
    elif info.get("early"):
        title = f"MATES round {info.get('number')} early: choice used up"
    else:
        return None
    return Alert(title, round_line({key: value for key, value in info.items() if key != "bought_most"}))


def send_alert(alert: Alert | None) -> None:
    """Send an alert through W&B and trackio where this process has a run of theirs; what fails there is only told.

    Args:
        alert: is sent at the level of a warning; None sends nothing.
    """
    if alert is None:
        return
    for name, send in (("wandb", _through_wandb), ("trackio", _through_trackio)):
        module = sys.modules.get(name)
        if module is None:
            continue
        try:
            send(module, alert)
        except Exception as error:  # whatever a tracker raises, training goes on
            logger.warning("%s took no alert (%s): %s", name, error, alert.title)


def _through_wandb(wandb: Any, alert: Alert) -> None:
    if wandb.run is not None:
        wandb.run.alert(title=alert.title, text=alert.text, level="WARN")


def _through_trackio(trackio: Any, alert: Alert) -> None:
    if hasattr(trackio, "alert") and trackio.context_vars.current_run.get() is not None:
        trackio.alert(title=alert.title, text=alert.text, level=trackio.AlertLevel.WARN)
