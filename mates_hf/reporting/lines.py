"""A round in words: the one line a run prints of it, and the five that `mates-hf round` prints.

Where it is used: `training/` hands over what it writes into `round.json`; the command line reads it back. Trade-off:
a word such as "fine" is a rule of thumb; the figures stand next to it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mates_hf.display import interval, spread
from mates_hf.round_record import (
    RoundRecord,
    bought_text,
    decision_text,
    gap_text,
    groups_text,
    mean_of_selected,
    rise_text,
    round_head,
    round_parts,
    round_seconds,
)

logger = logging.getLogger(__name__)

_MAX_LEFT = 84  # characters of a line before its judgement, which stands below the others


def tell_round(info: Mapping[str, Any], *, has_bars: bool) -> None:
    """Print a round's line where the Trainer prints its logs: above its bars, or plainly where there are none.

    Nothing has to be set up for it. Where there are no bars and the log of this module is shown, the line goes there
    instead; where its warnings are not wanted either, nowhere.

    Args:
        info: The round's `round.json`.
        has_bars: Whether the run shows progress bars.
    """
    from tqdm.auto import tqdm

    if has_bars or (logger.isEnabledFor(logging.WARNING) and not logger.isEnabledFor(logging.INFO)):
        tqdm.write(round_line(info))
    else:
        logger.info("%s", round_line(info))


def round_line(info: Mapping[str, Any]) -> str:
    """What a run says of a round when it is finished.

    Args:
        info: The round's `round.json`; what it lacks is left out of the line.

    Returns:
        One line: step, and a check that brought it forward, probes, signal with its interval, decision, rows, what was
        bought most, a length that changed, random rows, passages, copies and leaks, seconds.
    """
    guard = info.get("guard") or {}
    parts = [f"round {info.get('number', '?')} at step {info.get('step', '?')}"]
    if info.get("early"):
        parts[0] += f", early: what round {info['early']['round']} chose was used up (gap {gap_text(info['early'])})"
    if "num_probed" in info:
        parts.append(f"{info['num_probed']:,} probed")
    if isinstance(guard.get("spearman"), (int, float)):
        signal = f"held-out Spearman {guard['spearman']:.2f}"
        parts.append(f"{signal} {interval(guard.get('interval'))}".rstrip())
    parts.append(_outcome(info))
    if bought_text(info):
        parts.append(bought_text(info))
    if groups_text(info):
        parts.append(f"{groups_text(info)} their share")
    if "last_round_steps" in info:
        parts.append(f"{info['round_steps']:,} steps long after {info['last_round_steps']:,}")
    if info.get("num_random"):
        parts.append(f"{info['num_random']:,} of them at random")
    if info.get("num_passage_rows"):
        parts.append(f"{info['num_passage_rows']:,} reference passages between them")
    if info.get("num_passed_over"):
        parts.append(f"{info['num_passed_over']:,} passed over as copies")
    shared = info.get("reference_overlap") or {}
    if shared.get("rows"):
        of = f"{shared['ngram']} tokens" if shared.get("ngram") else "an example"
        parts.append(f"{shared['rows']:,} with {of} of the reference")
    seconds = round_seconds(info)
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    return ", ".join(parts)


def _outcome(info: Mapping[str, Any]) -> str:
    """The decision, with the rows where some were chosen."""
    guard = info.get("guard") or {}
    if guard.get("decision") == "own_order":
        why = "signal too weak"
        if guard.get("failed") == "used_up":
            why = f"what was chosen last is used up (gap {gap_text(info)})"
        elif guard.get("failed") == "loss_rose":
            why = f"the reference loss rose{rise_text(info)}"
        return f"{why}: the Trainer's own order until the next round"
    rows, candidates = info.get("num_rows", 0), info.get("num_candidates", 0)
    end = f" for steps {info['from_step']} to {info['to_step']}" if {"from_step", "to_step"} <= info.keys() else ""
    text = decision_text(info)
    how = "" if text in ("OK", "no decision recorded") else f" ({text.removeprefix('OK, ')})"
    if "stream" in info:
        return f"selects from the buffers of the stream{end}{how}"
    return f"selected {rows:,} of {candidates:,} candidates{end}{how}"


def round_lines(record: RoundRecord) -> Iterator[str]:
    """What `mates-hf round` prints: five lines, on the left what was found, on the right what to think of it.

    Args:
        record: The round.

    Yields:
        Lines.
    """
    parts = {f"  {name:<8} {found}": judged for name, (found, judged) in round_parts(record).items()}
    parts = {round_head(record): decision_text(record.info), **parts}
    *_, last = parts
    parts[last] = "; ".join(filter(None, (parts[last], "texts and plots: mates-hf report")))
    width = max(len(left) for left in parts if len(left) <= _MAX_LEFT) if parts else 0
    yield from (f"{left:<{width}}   {judged}".rstrip() for left, judged in parts.items())


def round_json(record: RoundRecord) -> dict[str, Any]:
    """All that a round recorded, without its arrays.

    Args:
        record: The round.

    Returns:
        Plain JSON values; numbers that JSON does not have are None.
    """
    labels = record.labels
    told: dict[str, Any] = finite(
        {
            "path": str(record.path),
            "decision": (record.info.get("guard") or {}).get("decision"),
            "labels": {
                "num": len(labels),
                "num_tokens": int(labels.num_tokens.sum()),
                "probe": sorted({str(name) for name in labels.probe}),
                "influence": spread(labels.influence),
                "loss": spread(labels.loss),
            },
            "scores": None
            if record.scores is None
            else {"num": len(record.scores), **spread(record.scores[np.isfinite(record.scores)])},
            "selection": None
            if record.selection is None
            else {"num": len(record.selection), "mean_score": mean_of_selected(record)},
            "info": record.info,
        }
    )
    return told


def finite(value: Any) -> Any:
    """The same JSON value with None for each NaN and infinity, which strict readers refuse."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
