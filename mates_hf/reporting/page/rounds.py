"""One row of the page for each round, from what `round.json` holds, and from nothing else.

A thousand rounds are read for a page that is written again after each of them, so no array is opened here. Trade-off:
what a file holds is not trusted. What is no number becomes None and is shown as "not recorded".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mates_hf.disk import read_json
from mates_hf.round_files import ROUND_FILE
from mates_hf.round_record import decision_text, round_seconds

Facts = dict[str, Any]


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def whole(value: Any) -> int | None:
    """The value where it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def part(info: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """A mapping inside of `round.json`, or an empty one where it is none."""
    found: Any = info
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def pair(values: Any) -> tuple[float | None, float | None]:
    """The two bounds of an interval, None where one was not recorded."""
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        return None, None
    return number(values[0]), number(values[1])


def read_infos(rounds: Mapping[int, Path]) -> list[Mapping[str, Any]]:
    """`round.json` of each round.

    Args:
        rounds: Directories of finished rounds by number, as `round_files.find_rounds` gives them.

    Returns:
        One mapping a round, ascending.

    Raises:
        MatesError: a file is damaged.
    """
    return [{"number": which, **read_json(path / ROUND_FILE)} for which, path in rounds.items()]


def round_row(info: Mapping[str, Any]) -> Facts:
    """What the page says of a round in one row.

    Args:
        info: The round's `round.json`.

    Returns:
        Plain JSON values; None is "not recorded". Losses and rises are in nats/token, gaps in standard deviations of
        the labels.
    """
    guard, gap, rise = part(info, "guard"), part(info, "gap"), part(info, "rise")
    shared, fidelity = part(info, "reference_overlap"), part(info, "fidelity")
    low, high = pair(guard.get("interval"))
    gap_low, gap_high = pair(gap.get("interval"))
    fine_low, fine_high = pair(fidelity.get("interval"))
    rise_low, rise_high = pair(rise.get("interval"))
    flops = [number(stage.get("flops")) for stage in part(info, "stages").values() if isinstance(stage, Mapping)]
    return {
        "number": whole(info.get("number")),
        "step": whole(info.get("step")),
        "from_step": whole(info.get("from_step")),
        "to_step": whole(info.get("to_step")),
        "decision": guard.get("decision") if isinstance(guard.get("decision"), str) else None,
        "decision_text": decision_text(info),
        "failed": guard.get("failed") if isinstance(guard.get("failed"), str) else None,
        "reversed": bool(guard.get("reversed", False)),
        "spearman": number(guard.get("spearman")),
        "low": low,
        "high": high,
        "min_spearman": number(part(info, "config").get("min_spearman")),
        "num_held_out": whole(part(info, "fit").get("num_held_out")),
        "top_fifth_overlap": number(part(info, "fit").get("top_fifth_overlap")),
        "previous_spearman": number(guard.get("previous_spearman")),
        "gap": number(gap.get("gap")),
        "gap_low": gap_low,
        "gap_high": gap_high,
        "early": bool(info.get("early")),
        "fidelity": number(fidelity.get("spearman")),
        "fidelity_low": fine_low,
        "fidelity_high": fine_high,
        "num_audited": whole(fidelity.get("num_candidates")),
        "reference_loss": number(part(info, "probe").get("reference_loss")),
        "rise": number(rise.get("rise")),
        "rise_low": rise_low,
        "rise_high": rise_high,
        "num_rows": whole(info.get("num_rows")),
        "num_candidates": whole(info.get("num_candidates")),
        "num_random": whole(info.get("num_random")),
        "num_probed": whole(info.get("num_probed")),
        "repeated_share": number(info.get("repeated_share")),
        "num_passed_over": whole(info.get("num_passed_over")),
        "overlap_rows": whole(shared.get("rows")),
        "overlap_share": number(shared.get("share")),
        "overlap_ngram": whole(shared.get("ngram")),
        "seconds": round_seconds(info),
        "flops": None if None in flops or not flops else sum(each for each in flops if each is not None),
    }


def selects(row: Facts) -> bool:
    """Whether a round chose rows, by its own influence model or by the one before."""
    return row["decision"] in ("select", "keep_previous")
