"""The length of a finished round, recomputed: the gap from labels and recorded predictions, and what follows from it.

Where it is used: `replay` asks it for each round. The rule is not written down twice: it is `trust`'s own. Trade-off:
what the model of the last round predicted is read and not predicted again, so that no influence model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mates_hf.config import MatesConfig
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import ROUND_FILE
from mates_hf.training.round_reader import RoundReader
from mates_hf.training.trust import GAP_FILE, Gap, measure_gap, round_steps

_RTOL, _ATOL = 1e-6, 1e-9  # means add up in another order with another numpy


class RoundWithLength(RoundReader):
    """What of a finished round its length is checked by; `replay` reads the rest.

    Attributes:
        number: the round.
        info: its `round.json`.
        config: The config in it.
        decision: The guard's.
        steps: its length.
        labels: its labels, once they are read.
    """

    number: int
    info: dict[str, Any]
    config: MatesConfig
    decision: Any
    steps: int
    labels: InfluenceLabels


def lengths_of(current: RoundWithLength) -> tuple[int, int]:
    """What a round records of its length: optimizer steps, and the rows that it was drawn for, which may be more."""
    info, config = current.info, current.config
    steps = info.get("round_steps", config.update_steps)  # not there in rounds of versions whose rounds had one length
    ok = _is_whole(steps) and config.shortest_steps <= steps <= config.update_steps
    what = f"`round_steps` from {config.shortest_steps} to {config.update_steps}"
    current.require(ok, ROUND_FILE, what, repr(steps))
    drawn_for = info.get("num_rows_drawn_for", info["num_rows"])
    ok = _is_whole(drawn_for) and info["num_rows"] <= drawn_for < 2**63
    what = f"`num_rows_drawn_for` as a number of at least `num_rows` ({info['num_rows']})"
    current.require(ok, ROUND_FILE, what, repr(drawn_for))
    return int(steps), int(drawn_for)


def check_length(current: RoundWithLength, before: RoundWithLength | None) -> None:
    """The gap is what labels and recorded predictions give, and the length what it gives after the last round's.

    Args:
        current: The round; its labels and rows are read.
        before: the round before this one, where it is on disk.

    Raises:
        WrongError: the first thing that is wrong.
    """
    config, info, steps = current.config, current.info, current.steps
    gap = _check_gap(current, before)
    length = info["to_step"] - info["from_step"]
    what = f"`to_step` at most {steps} (`round_steps`) after `from_step`"
    current.require(length <= steps, ROUND_FILE, what, f"{length} after it")
    if before is None and current.number > config.random_rounds:
        return  # the round that says what this one's length comes from is deleted
    last_steps, last_decision = (None, None) if before is None else (before.steps, before.decision)
    value = None if gap is None else gap.gap
    expected = round_steps(config, last_steps, last_decision, info["guard"], value)
    what = f"`round_steps` {expected}, which the gap and {last_steps or 'no'} steps of the round before give"
    current.require(steps == expected, ROUND_FILE, what, str(steps))
    changed = None if last_steps in (None, steps) else last_steps
    found = info.get("last_round_steps")
    current.require(found == changed, ROUND_FILE, f"`last_round_steps` {changed}", repr(found))
    if config.first_round_steps is None:
        return
    if before is not None:
        apart = info["step"] - before.info["step"]
        what = f"`step` a multiple of {last_steps} after {before.info['step']}, as round {before.number} is so long"
        current.require(apart % before.steps == 0, ROUND_FILE, what, str(info["step"]))
    used_up, failed = value is not None and value <= 0, info["guard"].get("failed")
    what = f"`failed` of `guard` {'' if used_up else 'not '}'used_up', as the gap is {value}"
    current.require((failed == "used_up") == used_up, ROUND_FILE, what, repr(failed))
    if used_up and config.on_weak_signal == "own_order":
        what = "`decision` 'own_order', as what the last round chose is used up"
        current.require(current.decision == "own_order", ROUND_FILE, what, repr(current.decision))


def _check_gap(current: RoundWithLength, before: RoundWithLength | None) -> Gap | None:
    """The round's gap, which is there where the last round bought something and these labels rank."""
    info, labels = current.info, current.labels
    gap = info.get("gap")
    current.require(gap is None or isinstance(gap, dict), ROUND_FILE, "`gap` as an object", repr(gap))
    is_there = (current.path / GAP_FILE).exists()
    if before is not None and "gap" in info:
        bought = before.decision != "own_order" and info.get("fit") is not None
        what = f"{'a' if bought else 'no such'} file, as round {before.number} decided {before.decision}"
        current.require(is_there == bought, GAP_FILE, what, "one" if is_there else "none")
    found = None
    if is_there:
        predicted = current.array(GAP_FILE, np.float32, len(labels))
        found = measure_gap(np.asarray(predicted), labels, current.config.selection_ratio)
    expected = None if found is None else found.to_dict()
    same = _numbers(gap) == _numbers(expected) or (
        len(_numbers(gap)) == len(_numbers(expected))
        and np.allclose(_numbers(gap), _numbers(expected), rtol=_RTOL, atol=_ATOL)
    )
    current.require(same, ROUND_FILE, f"`gap` {expected}, as {GAP_FILE} and the labels give", repr(gap))
    return found


def _numbers(gap: Mapping[str, Any] | None) -> list[float]:
    """A gap and the ends of its interval; what is no number is NaN, which equals nothing."""
    if gap is None:
        return []
    interval = gap.get("interval")
    values = [gap.get("gap"), *(interval if isinstance(interval, list) else [None, None])]
    return [float(value) if isinstance(value, (int, float)) else float("nan") for value in values]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
