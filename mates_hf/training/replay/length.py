"""The length of a finished round, recomputed: the gap from labels and recorded predictions, and what follows from it.

Where it is used: `replay` asks it for each round. So is what was found inside a round (`check-*.json`), which may end
it early, and whether the reference loss rose. The rules are not written down twice: they are `trust`'s and `rise`'s
own. Trade-off: what the model of the last round predicted is read and not predicted again, so that no influence model
is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mates_hf.config import MatesConfig
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.round_files import REFERENCE_FILE, ROUND_FILE
from mates_hf.training.replay.blocked import RoundWithBlocked, redacted_probes
from mates_hf.training.replay.reader import is_whole
from mates_hf.training.rise import Boundary, Rise, course_after, find_rise, rises_after
from mates_hf.training.trust import (
    GAP_FILE,
    LOSS_ROSE,
    Gap,
    check_file,
    gap_between,
    measure_gap,
    next_check,
    round_steps,
    rows_to_check,
)

_RTOL, _ATOL = 1e-6, 1e-9  # means add up in another order with another numpy


class RoundWithLength(RoundWithBlocked):
    """What of a finished round its length is checked by; `replay` reads the rest.

    Attributes:
        number: the round.
        info: its `round.json`.
        config: The config in it.
        decision: The guard's.
        steps: its length.
        rows: what it trains on, in order, once they are read.
        labels: its labels, once they are read.
        before: the reference loss at the round before it, once it is checked; None where that is not known.
        ends: the checks inside it that found its choice used up, by step, once they are checked.
    """

    number: int
    info: dict[str, Any]
    config: MatesConfig
    decision: Any
    steps: int
    rows: IntArray
    labels: InfluenceLabels
    before: Boundary | None = None
    ends: dict[int, dict[str, Any]]


def lengths_of(current: RoundWithLength) -> tuple[int, int]:
    """What a round records of its length: optimizer steps, and the rows that it was drawn for, which may be more."""
    info, config = current.info, current.config
    steps = info.get("round_steps", config.update_steps)  # not there in rounds of versions whose rounds had one length
    ok = is_whole(steps) and config.shortest_steps <= steps <= config.update_steps
    what = f"`round_steps` from {config.shortest_steps} to {config.update_steps}"
    current.require(ok, ROUND_FILE, what, repr(steps))
    drawn_for = info.get("num_rows_drawn_for", info["num_rows"])
    ok = is_whole(drawn_for) and info["num_rows"] <= drawn_for < 2**63
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
    last_steps, last_decision = (None, None) if before is None else (_lasted(current, before), before.decision)
    value = None if gap is None else gap.gap
    expected = round_steps(config, last_steps, last_decision, info["guard"], value)
    what = f"`round_steps` {expected}, which the gap and {last_steps or 'no'} steps of the round before give"
    current.require(steps == expected, ROUND_FILE, what, str(steps))
    changed = None if last_steps in (None, steps) else last_steps
    found = info.get("last_round_steps")
    current.require(found == changed, ROUND_FILE, f"`last_round_steps` {changed}", repr(found))
    if config.first_steps is None:
        return
    if before is not None and last_steps == before.steps:
        apart = info["step"] - before.info["step"]
        what = f"`step` a multiple of {last_steps} after {before.info['step']}, as round {before.number} is so long"
        current.require(apart % before.steps == 0, ROUND_FILE, what, str(info["step"]))
    failed = info["guard"].get("failed")
    used_up = value is not None and value <= 0 and failed != LOSS_ROSE
    what = f"`failed` of `guard` {'' if used_up else 'not '}'used_up', as the gap is {value}"
    current.require((failed == "used_up") == used_up, ROUND_FILE, what, repr(failed))
    if used_up and config.on_weak_signal == "own_order":
        what = "`decision` 'own_order', as what the last round chose is used up"
        current.require(current.decision == "own_order", ROUND_FILE, what, repr(current.decision))


def _lasted(current: RoundWithLength, before: RoundWithLength) -> int:
    """How long the round before was: as planned, or up to the check that ended it, which this one records."""
    step, early = current.info["step"], current.info.get("early")
    end = min((each for each in before.ends if each <= step), default=None)
    expected = None
    if end is not None:
        expected = {"round": before.number, "step": end, **before.ends[end]["gap"]}
        what = f"`step` {end}, where {check_file(end)} of round {before.number} ends it"
        current.require(step == end, ROUND_FILE, what, str(step))
    what = f"`early` {expected}, as the checks inside round {before.number} say"
    current.require(early == expected, ROUND_FILE, what, repr(early))
    return before.steps if end is None else end - int(before.info["step"])


def check_inside(current: RoundWithLength) -> None:
    """What was looked at inside the round is what seed and order draw, and each gap what its labels give.

    Args:
        current: The round; its rows are read.

    Raises:
        WrongError: the first thing that is wrong.
    """
    current.ends = {}
    for file in sorted(current.path.glob("check-*.json")):
        check = current.json(file.name)
        step = int(check["step"]) if is_whole(check.get("step")) else -1
        ok = check.get("round") == current.number and file.name == check_file(step)
        current.require(ok, file.name, "the `step` and `round` that its name and folder say", repr(check.get("step")))
        due = next_check(current.config, {**current.info, "redacted": None}, step - 1)
        current.require(due == step, file.name, f"a check at a step where one is due ({due})", str(step))
        expected = _gap_inside(current, file.name, check)
        what = f"`gap` {expected}, as its labels give"
        current.require(_same(check.get("gap"), expected), file.name, what, repr(check.get("gap")))
        if expected is not None and check["gap"]["gap"] <= 0:
            current.ends[step] = check


def _gap_inside(current: RoundWithLength, name: str, check: Mapping[str, Any]) -> dict[str, Any] | None:
    """The gap of a check; None where it could not be measured."""
    if "candidate_id" not in check:
        return None
    if current.info.get("redacted"):  # what the gap hung on was taken out
        recorded: dict[str, Any] | None = check.get("gap")
        return recorded
    num_done, num = check.get("num_done"), current.info["num_candidates"]
    current.require(is_whole(num_done), name, "`num_done` as a number of rows", repr(num_done))
    ids, is_bought = rows_to_check(
        current.config,
        current.number,
        check["step"],
        np.asarray(current.array("candidates.npy", np.int64, num)),
        np.asarray(current.array("scores.npy", np.float32, num)),
        np.asarray(current.array("num_targets.npy", np.int32, num)),
        current.rows,
        int(check["num_done"]),
    )
    candidate_id, per_token, num_tokens = (
        current.numbers(check, key, dtype, name)
        for key, dtype in (("candidate_id", np.int64), ("influence_per_token", np.float32), ("num_tokens", np.int32))
    )
    measured = np.isin(ids, candidate_id)  # those of which the probe found no trained token are left out
    ok = len(ids) > 0 and np.array_equal(ids[measured], candidate_id)
    current.require(ok, name, "`candidate_id` as seed and order draw", "other rows")
    ok = len(candidate_id) == len(per_token) == len(num_tokens)
    current.require(ok, name, f"the labels of {len(candidate_id)} rows", f"{len(per_token)}, {len(num_tokens)}")
    gap = gap_between(per_token, num_tokens, is_bought[measured])
    return None if gap is None else gap.to_dict()


def check_rise(current: RoundWithLength, before: RoundWithLength | None) -> None:
    """Whether the reference loss rose is what the losses of the passages say, and the guard answers to it.

    Args:
        current: The round.
        before: the round before this one, where it is on disk.

    Raises:
        WrongError: the first thing that is wrong.
    """
    info, guard = current.info, current.info["guard"]
    if "rise" not in info or (before is None and current.number > current.config.random_rounds):
        return  # of an earlier version; or the round to compare with is deleted
    rise: Rise | None = None
    now, last = _boundary(current), None if before is None else _boundary(before)
    if before is not None and last is not None:
        current.before = last
        on_probation = bool(before.info["guard"].get("rises"))
        if on_probation and before.before is None and before.number > current.config.random_rounds:
            return  # what it was compared with is deleted
        rise = None if now is None else find_rise(now, last, before.before if on_probation else None)
    expected = None if rise is None else rise.to_dict()
    what = f"`rise` {expected}, as {REFERENCE_FILE} gives"
    current.require(_same(info["rise"], expected), ROUND_FILE, what, repr(info["rise"]))
    last_rises = {} if before is None else before.info["guard"].get("rises", {})
    rises, is_kept = rises_after(last_rises, None if before is None else before.decision, rise)
    what = f"`rises` of `guard` {rises}, after {last_rises}"
    current.require(guard.get("rises", {}) == rises, ROUND_FILE, what, repr(guard.get("rises")))
    course = [] if now is None else course_after(last, now)
    found: Any = info.get("reference_course")
    flat = [part for pair in found for part in pair] if _is_pairs(found) else [None]
    same = _close(_floats(flat), [part for pair in course for part in pair])
    current.require(same, ROUND_FILE, f"`reference_course` {course}, as {REFERENCE_FILE} gives", repr(found))
    loss_rose = is_kept and info.get("fit") is not None
    what = f"`failed` of `guard` {'' if loss_rose else 'not '}{LOSS_ROSE!r}"
    current.require((guard.get("failed") == LOSS_ROSE) == loss_rose, ROUND_FILE, what, repr(guard.get("failed")))


def _check_gap(current: RoundWithLength, before: RoundWithLength | None) -> Gap | None:
    """The round's gap, which is there where the last round bought something and these labels rank."""
    info, labels = current.info, current.labels
    gap = info.get("gap")
    current.require(gap is None or isinstance(gap, dict), ROUND_FILE, "`gap` as an object", repr(gap))
    is_there = (current.path / GAP_FILE).exists()
    if before is not None and "gap" in info and not before.lacks_model:
        bought = before.decision != "own_order" and info.get("fit") is not None
        what = f"{'a' if bought else 'no such'} file, as round {before.number} decided {before.decision}"
        current.require(is_there == bought, GAP_FILE, what, "one" if is_there else "none")
    found = None
    if is_there:
        predicted = current.array(GAP_FILE, np.float32, len(labels))
        if len(redacted_probes(current)):  # it hung on labels that were taken out, so it stays as recorded
            return None if gap is None else Gap(gap["gap"], tuple(gap["interval"]))
        found = measure_gap(np.asarray(predicted), labels, current.config.selection_ratio)
    expected = None if found is None else found.to_dict()
    current.require(
        _same(gap, expected), ROUND_FILE, f"`gap` {expected}, as {GAP_FILE} and the labels give", repr(gap)
    )
    return found


def _boundary(current: RoundWithLength) -> Boundary | None:
    """What a round says of the reference loss; None where it says nothing."""
    losses = current.labels.reference_losses
    return None if losses is None else Boundary(current.info, np.asarray(losses))


def _same(found: Any, expected: Mapping[str, Any] | None) -> bool:
    """Whether a gap or a rise is what was recomputed, but for the last bits."""
    if expected is None or not isinstance(found, Mapping):
        return found is expected
    told, interval = dict(found), found.get("interval")
    ends = interval if isinstance(interval, list) else [None]
    same = all(told.get(name) == value for name, value in expected.items() if isinstance(value, bool))
    numbers = [name for name, value in expected.items() if isinstance(value, float)]
    values = [*(told.get(name) for name in numbers), *ends]
    return same and _close(_floats(values), [*(expected[name] for name in numbers), *expected["interval"]])


def _close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and bool(np.allclose(one, other, rtol=_RTOL, atol=_ATOL))


def _floats(values: list[Any]) -> list[float]:
    """Numbers as they are; what is none is NaN, which equals nothing."""
    return [float(value) if isinstance(value, (int, float)) else float("nan") for value in values]


def _is_pairs(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)


def rows_per_step(info: Mapping[str, Any]) -> float:
    """Rows a step of a round trains on, by its `round.json`; another number where the batch size was changed."""
    return float((info["num_rows"] + info.get("num_passage_rows", 0)) / (info["to_step"] - info["from_step"]))
