"""Who gains and who pays: what each group of rows got over a run's rounds, and how its loss changed.

Where it is used: `mates-hf groups RUN`, and whatever else shows a run. Read from `round.json` alone. Trade-off: the
loss of a group is that of its probes, rows not trained on in that pass, at the first and at the last round that say
it. It is no comparison with a run without selection: groups also differ in how fast they are learned.

Sign: a change of loss below 0 is good, in nats/token. Intervals are 95 %.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mates_hf.disk import read_json
from mates_hf.errors import MatesError
from mates_hf.paths import expand_path
from mates_hf.round_files import ROUND_FILE, find_rounds

_WIDTH = 1.96  # standard errors on either side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its standard error.

    Attributes:
        value: The number.
        error: Its standard error; None where it is not known.
    """

    value: float
    error: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None where the error is not known."""
        return None if self.error is None else (self.value - _WIDTH * self.error, self.value + _WIDTH * self.error)

    def minus(self, other: Estimate) -> Estimate:
        """The difference to an independent number."""
        known = self.error is not None and other.error is not None
        error = math.hypot(self.error or 0.0, other.error or 0.0) if known else None
        return Estimate(value=self.value - other.value, error=error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupCourse:
    """What one group got and how its loss went.

    Attributes:
        name: Name of the group.
        rows: Its share of the candidates of all rounds that selected; None where none did.
        chosen: Its share of what they chose.
        boost: How many times its share it got.
        probes: Rows of it that were probed.
        first_loss: Its loss before the first round that says it, nats/token.
        last_loss: Its loss before the last such round.
        change: The last less the first; below 0 is good. None with one round.
        beyond: `change` less that of all other groups together; below 0 is better than theirs.
    """

    name: str
    rows: float | None
    chosen: float | None
    boost: float | None
    probes: int
    first_loss: Estimate | None
    last_loss: Estimate | None
    change: Estimate | None
    beyond: Estimate | None

    @property
    def verdict(self) -> str:
        """`"gains"` or `"pays"` where `beyond` is surely on one side of 0, else `"unclear"`."""
        bounds = None if self.beyond is None else self.beyond.interval
        if bounds is None or bounds[0] <= 0 <= bounds[1]:
            return "unclear"
        return "gains" if bounds[1] < 0 else "pays"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: each estimate as `value` and `interval`."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            told = isinstance(value, Estimate)
            found[field.name] = {"value": value.value, "interval": value.interval} if told else value
        return {**found, "verdict": self.verdict}


def group_table(infos: Sequence[Mapping[str, Any]]) -> list[GroupCourse]:
    """What each group got over some rounds, and how its loss changed.

    Args:
        infos: `round.json` of the rounds, in their order.

    Returns:
        The groups, those that got the most beyond their share first; none where rows have no group.
    """
    told = [info["groups"] for info in infos if isinstance(info.get("groups"), Mapping)]
    names = sorted({name for groups in told for name in groups})
    total = {key: sum(_count(groups, name, key) for groups in told for name in names) for key in _COUNTS}
    found = [_course(name, told, total) for name in names]
    return sorted(found, key=lambda one: (-(one.boost or 0.0), one.name))


_COUNTS = ("candidates", "chosen", "probes")


def _course(name: str, told: Sequence[Mapping[str, Any]], total: Mapping[str, int]) -> GroupCourse:
    sums = {key: sum(_count(groups, name, key) for groups in told) for key in _COUNTS}
    rows = sums["candidates"] / total["candidates"] if total["candidates"] else None
    chosen = sums["chosen"] / total["chosen"] if total["chosen"] else None
    known = [groups for groups in told if _loss(groups, [name]) is not None]
    first, last = (_loss(known[0], [name]), _loss(known[-1], [name])) if known else (None, None)
    change = beyond = None
    if len(known) > 1 and first is not None and last is not None:
        change = last.minus(first)
        before, after = (
            _loss(groups, [other for other in groups if other != name]) for groups in (known[0], known[-1])
        )
        beyond = None if before is None or after is None else change.minus(after.minus(before))
    boost = None if not rows or chosen is None else chosen / rows
    return GroupCourse(
        name=name, rows=rows, chosen=chosen, boost=boost, probes=sums["probes"], first_loss=first, last_loss=last,
        change=change, beyond=beyond,
    )  # fmt: skip


def _count(groups: Mapping[str, Any], name: str, key: str) -> int:
    return int(groups.get(name, {}).get(key, 0))


def _loss(groups: Mapping[str, Any], names: Sequence[str]) -> Estimate | None:
    """The loss of some groups together, weighted by tokens; None where none of them says one."""
    facts = [groups[name] for name in names if groups.get(name, {}).get("loss") is not None]
    if not facts:
        return None
    weights = [float(one.get("tokens", 1)) for one in facts]
    errors = [one.get("loss_error") for one in facts]
    total = sum(weights)
    squares = [None if error is None else (weight * error) ** 2 for weight, error in zip(weights, errors, strict=True)]
    known = [square for square in squares if square is not None]
    error = math.sqrt(sum(known)) / total if len(known) == len(squares) else None
    return Estimate(value=sum(w * one["loss"] for w, one in zip(weights, facts, strict=True)) / total, error=error)


def run_groups(run_dir: str | os.PathLike[str]) -> list[GroupCourse]:
    """`group_table` of a run's finished rounds.

    Args:
        run_dir: The run's `output_dir`, or the directory that holds its rounds.

    Returns:
        The groups.

    Raises:
        FileNotFoundError: there is no finished round.
        MatesError: rows of the run have no group, or a record is damaged.
    """
    folder, rounds = find_rounds(expand_path(run_dir))
    if not rounds:
        raise FileNotFoundError(f"`{folder}` must hold finished rounds, and has none. Give a run's `output_dir`.")
    found = group_table([read_json(path / ROUND_FILE) for path in rounds.values()])
    if not found:
        raise MatesError(
            f"The rounds in `{folder}` say nothing of groups: set `MatesConfig(group_column=...)`, the column with "
            "each row's source, before a run."
        )
    return found


def group_lines(groups: Sequence[GroupCourse]) -> Iterator[str]:
    """The table as a person reads it.

    Args:
        groups: The groups, as `group_table` gives them.

    Yields:
        Its lines.
    """
    heads = ["group", "rows", "chosen", "boost", "loss", "change", "beyond the others", ""]
    rows = [heads, *(_cells(one) for one in groups)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        aligned = [cell.ljust(width) if i in (0, 7) else cell.rjust(width) for i, (cell, width) in
                   enumerate(zip(row, widths, strict=True))]  # fmt: skip
        yield "  ".join(aligned).rstrip()
    yield ""
    yield "Loss of rows not trained on, nats/token, with 95 % intervals; a change below 0 is good. No run without"
    yield "selection is compared with: groups also differ in how fast they are learned."


def _cells(one: GroupCourse) -> list[str]:
    share = ["" if value is None else f"{value:.1%}" for value in (one.rows, one.chosen)]
    boost = "" if one.boost is None else f"{one.boost:.2f}"
    losses = [f"{loss.value:.3f}" for loss in (one.first_loss, one.last_loss) if loss is not None]
    loss = " to ".join(losses if one.change is not None else losses[:1])
    return [one.name, *share, boost, loss, _shown(one.change), _shown(one.beyond), one.verdict]


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    bounds = estimate.interval
    return f"{estimate.value:+.3f}" + ("" if bounds is None else f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]")
