"""What came of a run in one sentence, and the reason in the next: for who reads no further.

Trade-off: the newest round speaks for the run, since that is what trains now; the table below has the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mates_hf.display import interval
from mates_hf.reporting.page.rounds import Facts, selects
from mates_hf.round_record import rise_text

_REASONS = {
    "labels": "its labels rank no candidate",
    "loss_rose": "the reference loss rose{rise}",
    "used_up": "what was chosen last is used up (gap {gap})",
    "reversed": "its labels are the reverse of what the influence model before predicts",
    "min_spearman": "its signal is too weak: held-out Spearman {signal}, below {least}",
    "interval": "its signal may be noise: held-out Spearman {signal} has an interval that includes 0",
}


def reason_of(row: Facts, info: Mapping[str, Any]) -> str:
    """Why a round decided what it did, in half a sentence; empty where nothing was recorded.

    Args:
        row: The round as `rounds.round_row` reads it.
        info: Its `round.json`.

    Returns:
        The reason.
    """
    gap = "" if row["gap"] is None else f"{row['gap']:+.2f} sd"
    told = _REASONS.get(row["failed"] or "")
    if told is not None:
        return told.format(rise=rise_text(info), gap=gap, signal=_signal(row), least=row["min_spearman"])
    if row["spearman"] is None:
        return ""
    return f"held-out Spearman {_signal(row)}"


def find_verdict(rows: Sequence[Facts], infos: Sequence[Mapping[str, Any]], checks: Sequence[Facts]) -> Facts:
    """The verdict on a run.

    Args:
        rows: Its rounds, as `rounds.round_row` reads them.
        infos: Their `round.json`.
        checks: What `checks.find_checks` found.

    Returns:
        `level` ("fine", "look" or "refused"), `text` and `reason`, both whole sentences.
    """
    last, num = rows[-1], sum(map(selects, rows))
    looks = [check for check in checks if check["status"] == "look"]
    reason = reason_of(last, infos[-1])
    if not selects(last):
        why = reason or "no reason was recorded"
        return {
            "level": "refused",
            "text": "The run does not select now: it trains in the Trainer's own order.",
            "reason": f"Round {last['number']} was refused because {why}. {num} of {len(rows)} rounds selected.",
        }
    if last["decision"] == "keep_previous":
        text = "The run selects, by an earlier influence model."
        why = f"Round {last['number']} kept it because {reason or 'its own was refused'}."
    else:
        text = "The run selects."
        least = "" if last["min_spearman"] is None else f", above the guard of {last['min_spearman']:g}"
        weak = last["spearman"] is None or last["low"] is None or last["low"] <= 0
        rule = "" if weak else f"{least} with an interval above 0"
        why = f"Round {last['number']} has {reason or 'no recorded signal'}{rule}."
        if last["failed"]:
            why = f"Round {last['number']} selected although {reason}."
    things = _things(len(looks)) if looks else "Nothing stands out in the checks."
    return {
        "level": "look" if looks or last["failed"] or last["decision"] != "select" else "fine",
        "text": f"{text} {things}",
        "reason": f"{why} {num} of {len(rows)} rounds selected.",
    }


def _things(num: int) -> str:
    return "One check asks for a look." if num == 1 else f"{num} checks ask for a look."


def _signal(row: Facts) -> str:
    return f"{row['spearman']:.2f} {interval([row['low'], row['high']])}".rstrip()
