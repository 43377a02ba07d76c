"""Alerts through the trackers that have them: W&B and trackio.

Where it is used: `MatesCallback` sends what a round should be looked at for. Fields of the config that begin with
`alert_` say what that is.

Trade-off: a tracker is asked only where this process has begun a run of it; nothing of the pool is sent.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mates_hf.config import MatesConfig
from mates_hf.disk import read_json
from mates_hf.display import cut
from mates_hf.errors import MatesError
from mates_hf.reporting.lines import round_line
from mates_hf.round_files import ROUND_FILE, round_path

logger = logging.getLogger(__name__)


class Alert(NamedTuple):
    """What somebody should look at.

    Attributes:
        title: below 64 characters, as W&B wants it.
        text: the round in one line.
    """

    title: str
    text: str


def round_alerts(
    info: Mapping[str, Any], config: MatesConfig, *, weak_before: int = 0, idle_share: float | None = None
) -> list[Alert]:
    """What of a round should be looked at, by the thresholds of the config.

    Args:
        info: The round's `round.json`.
        config: The run's settings; those that begin with `alert_` count.
        weak_before: Number of rounds right before this one that did not follow their own labels.
        idle_share: Share of the time since the last round in which devices waited for this one. None: not known.

    Returns:
        The alerts, without a word of the pool: first what the guard found, then a leak, groups and idle devices. None
        where the round did what it should.
    """
    guard = info.get("guard") or {}
    name, line = f"MATES round {info.get('number')}", _line(info)
    found: list[Alert] = []
    if guard.get("failed") == "loss_rose":
        found.append(Alert(f"{name} refused: reference loss rose", line))
    elif guard.get("reversed"):
        found.append(Alert(f"{name}: influence reversed", line))
    elif is_weak(info) and weak_before + 1 >= config.alert_weak_rounds:
        found.append(Alert(f"{name} {_outcome(guard)}", f"{weak_before + 1} in a row. {line}"))
    elif info.get("early"):
        found.append(Alert(f"{name} early: choice used up", line))
    overlap, most = (info.get("reference_overlap") or {}).get("share"), config.alert_reference_overlap
    if most is not None and overlap is not None and overlap > most:
        text = f"{overlap:.1%} of the chosen rows share a run of tokens with the reference (alert above {most:.1%})."
        found.append(Alert(f"{name}: reference in the pool", f"{text} {line}"))
    for group, boost in _boosts(info).items():
        if config.alert_group_boost is not None and boost > config.alert_group_boost:
            text = f"{cut(group, 40)} got {boost:.2f} times its share (alert above {config.alert_group_boost:g})."
            found.append(Alert(f"{name}: a group above its share", f"{text} {line}"))
    if config.alert_idle_share is not None and idle_share is not None and idle_share > config.alert_idle_share:
        text = f"Devices idled {idle_share:.1%} of the time (alert above {config.alert_idle_share:.1%})."
        found.append(Alert(f"{name}: devices idle", f"{text} {line}"))
    return found


def is_weak(info: Mapping[str, Any]) -> bool:
    """Whether a round did not follow its own labels: the guard kept the own order, or the model before."""
    return (info.get("guard") or {}).get("decision") in ("own_order", "keep_previous")


def weak_rounds_before(rounds_dir: Path, number: int) -> int:
    """Number of rounds right before one that did not follow their own labels, of those that are still on disk."""
    first = number
    try:
        while (path := round_path(rounds_dir, first - 1) / ROUND_FILE).exists() and is_weak(read_json(path)):
            first -= 1
    except (OSError, MatesError) as error:  # an alert is not worth a run
        logger.warning("Rounds before %d were not counted for an alert (%s).", number, error)
    return number - first


def _outcome(guard: Mapping[str, Any]) -> str:
    if guard.get("decision") == "keep_previous":
        return "kept the model before"
    return "refused: used up" if guard.get("failed") == "used_up" else "refused: weak signal"


def _line(info: Mapping[str, Any]) -> str:
    """The round in one line, without a word of the pool."""
    return round_line({key: value for key, value in info.items() if key != "bought_most"})


def _boosts(info: Mapping[str, Any]) -> dict[str, float]:
    """Share of the choice over share of the candidates, by group."""
    counts = {
        str(name): (facts["candidates"], facts["chosen"])
        for name, facts in (info.get("groups") or {}).items()
        if facts.get("candidates") and "chosen" in facts
    }
    every, taken = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    return {name: (got / taken) / (num / every) for name, (num, got) in counts.items()} if taken else {}


def send_alert(alert: Alert) -> None:
    """Send an alert through W&B and trackio where this process has a run of theirs; what fails there is only logged.

    Args:
        alert: What is sent, at the level of a warning.
    """
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
