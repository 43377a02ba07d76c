"""The passages of the reference task between the rows of a finished round, counted again.

Where it is used: `replay` asks it for each round. The schedule is not written down twice: it is `data/mixing`'s own.
Trade-off: what the passages are is known to the run alone; here their hash must be the same in all rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mates_hf.config import MatesConfig
from mates_hf.data.mixing import PassageSchedule
from mates_hf.round_files import KEY_FILE, ROUND_FILE
from mates_hf.training.replay.reader import RoundReader, is_whole

_SCHEDULE = ("num_passages", "passes", "start", "num_rows", "seed")


class RoundWithPassages(RoundReader):
    """What of a finished round its passages are checked by; `replay` reads the rest.

    Attributes:
        number: the round.
        info: its `round.json`.
        key: its `key.json`.
        config: The config in it.
    """

    number: int
    info: dict[str, Any]
    key: dict[str, Any]
    config: MatesConfig


def check_passages(current: RoundWithPassages, before: RoundWithPassages | None) -> None:
    """The positions of the round, and its passages, are what the recorded schedule gives.

    Args:
        current: The round.
        before: the round before this one, where it is on disk.

    Raises:
        WrongError: the first thing that is wrong.
    """
    info, config = current.info, current.config
    told = info.get("passages")
    current.require(told == current.key.get("passages"), KEY_FILE, "`passages` of round.json", "others")
    if not config.reference_passes:
        what = "no `passages`, as `reference_passes` is 0"
        current.require(told is None and "num_passage_rows" not in info, ROUND_FILE, what, repr(told))
        return
    schedule = _schedule(told)
    what = "`passages` with the schedule by which they are mixed in"
    current.require(schedule is not None, ROUND_FILE, what, repr(told))
    assert schedule is not None
    for name, value in (("passes", config.reference_passes), ("seed", config.selection_seed)):
        found = getattr(schedule, name)
        current.require(found == value, ROUND_FILE, f"`{name}` {value} of `passages`, as in `config`", repr(found))
    if before is not None:
        what = f"`passages` of round {before.number}"
        current.require(told == before.info.get("passages"), ROUND_FILE, what, repr(told))
    position: Any = info.get("row_position")
    ok = is_whole(position) and 0 <= position < 2**63
    current.require(ok, ROUND_FILE, "`row_position` as a whole number of at least 0", repr(position))
    expected = schedule.pool_rows(position)
    what = f"`from_position` {expected}, the pool rows before position {position}"
    current.require(info["from_position"] == expected, ROUND_FILE, what, str(info["from_position"]))
    num: Any = info.get("num_passage_rows")
    ok = is_whole(num) and 0 <= num < 2**63
    current.require(ok, ROUND_FILE, "`num_passage_rows` as a whole number of at least 0", repr(num))
    stop = position + info["num_rows"] + num
    expected = schedule.before(stop) - schedule.before(position)
    what = f"`num_passage_rows` {expected}, the passages from position {position} to {stop}"
    current.require(num == expected, ROUND_FILE, what, str(num))


def _schedule(told: Any) -> PassageSchedule | None:
    """The schedule that a round tells of; None where it is none."""
    if not isinstance(told, Mapping) or not isinstance(told.get("sha256"), str):
        return None
    try:
        return PassageSchedule(**{name: told.get(name) for name in _SCHEDULE})  # type: ignore[arg-type]
    except ValueError:
        return None
