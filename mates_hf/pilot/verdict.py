"""Go, no-go or measure more: what follows from a pilot, by criteria that were fixed before it.

Where it is used: `run_pilot`, at the end; it reads no file. A kill criterion that is met is a no-go. A go needs all of
them not met, an interval, and a gain over the best static filter whose lower end pays for the rounds of the planned
run. One seed has no interval, so it is never a go, and neither is a pilot that is far smaller than the planned run.

Trade-off: a criterion is met, not met, or open. A filter within the interval is open while no more than `more_seeds`
further seeds could take it out, and met otherwise: who has no more seeds to give runs the filter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mates_hf.pilot.estimates import Estimate
from mates_hf.pilot.settings import PilotSettings

Decision = Literal["go", "no-go", "measure more"]
State = Literal["met", "not met", "open", "not asked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What a verdict is made of.

    Attributes:
        weak_rounds: Rounds of each seed whose held-out Spearman interval includes 0.
        num_rounds: Rounds of each seed.
        difference: Loss of ours minus that of the filter at equal FLOPs, nats/token; below 0 ours is better.
        log_gain: Logarithm of the tokens that the filter needs over those of ours, for the same loss.
        harm: Loss of ours minus that of random rows at equal tokens, by group, nats/token; above 0 is worse.
        idle: Share of the planned run's time that devices may wait for rounds, at most.
        break_even: Gain from which on selecting pays in the planned run.
        smaller: Parameters of the planned model over those of the pilot.
        shorter: Tokens of the planned run over those of an arm.
    """

    weak_rounds: Sequence[int]
    num_rounds: Sequence[int]
    difference: Estimate
    log_gain: Estimate
    harm: Mapping[str, Estimate]
    idle: float
    break_even: float
    smaller: float
    shorter: float

    @property
    def num_seeds(self) -> int:
        """Number of seeds."""
        return self.difference.num_seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """One kill criterion and how it stands.

    Attributes:
        name: A short name.
        question: What it asks.
        value: What was found, in words.
        threshold: What was allowed, in words.
        state: Whether it is met; met is a reason to stop.
        more_seeds: Further seeds that would decide it where it is open; None where no number up to a hundred would.
    """

    name: str
    question: str
    value: str
    threshold: str
    state: State
    more_seeds: int | None = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows.

    Attributes:
        decision: Go, no-go or measure more.
        reason: Why, in a sentence or two.
        criteria: Every kill criterion.
        more_seeds: Further seeds that would decide, where more is to be measured; None where no number would.
    """

    decision: Decision
    reason: str
    criteria: tuple[Criterion, ...]
    more_seeds: int | None = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def decide(findings: Findings, settings: PilotSettings) -> Verdict:
    """The verdict.

    Args:
        findings: What was measured and planned.
        settings: With the criteria, fixed before the first step.

    Returns:
        The verdict with its reason.
    """
    criteria = (
        _signal(findings, settings), _filter(findings, settings), *_harms(findings, settings),
        _idle(findings, settings), _scale(findings, settings),
    )  # fmt: skip
    killed = [one for one in criteria if one.state == "met"]
    if killed:
        reasons = " ".join(_REASONS[one.name].format(one=one) for one in killed)
        return Verdict(decision="no-go", reason=reasons, criteria=criteria)
    gain, needed = findings.log_gain, math.log(findings.break_even)
    if gain.high is not None and gain.high < needed:
        reason = (
            f"Even the upper end of the gain over the filter ({math.exp(gain.high):.2f} times) is below what the "
            f"rounds of the planned run cost ({findings.break_even:.3f} times)."
        )
        return Verdict(decision="no-go", reason=reason, criteria=criteria)
    unsettled = [one.more_seeds for one in criteria if one.state == "open"]
    pays = gain.low is not None and gain.low > needed
    if not pays:
        unsettled.append(gain.more_seeds(needed))
    if unsettled:
        more = None if None in unsettled else max(one for one in unsettled if one is not None)
        return Verdict(
            decision="measure more", reason=_why_more(findings, settings, more), criteria=criteria, more_seeds=more
        )
    assert gain.low is not None
    reason = (
        f"No kill criterion is met, and the lower end of the gain over the filter ({math.exp(gain.low):.2f} times) is "
        f"above what the rounds of the planned run cost ({findings.break_even:.3f} times)."
    )
    return Verdict(decision="go", reason=reason, criteria=criteria)


_REASONS = {
    "signal": "The labels could not be predicted: {one.value}.",
    "filter": "The static filter is as good at equal FLOPs, and costs nothing: {one.value}.",
    "harm": "A protected group gets worse by more than was allowed: {one.value}, allowed {one.threshold}.",
    "idle": "Devices would wait too long for rounds: {one.value}.",
}


def _why_more(findings: Findings, settings: PilotSettings, more: int | None) -> str:
    if findings.num_seeds == 1:
        return "One seed has no interval, so nothing follows from it. Two more seeds give one."
    if more is None:
        return (
            "The intervals do not decide, and no further seeds up to a hundred would: more held-out passages or "
            "longer arms are needed, in a new folder."
        )
    if not more:
        return (
            "At this size no kill criterion is met, and the gain pays for the rounds. But the pilot is too small to "
            f"speak for the planned run: run one of about {settings.params / 1e7:,.3g} million parameters and "
            f"{settings.tokens / 1e8:,.3g} million tokens an arm."
        )
    few = "1 more seed" if more == 1 else f"{more} more seeds"
    return f"The intervals do not decide. If mean and spread stay as they are, {few} would."


def _signal(findings: Findings, settings: PilotSettings) -> Criterion:
    worst = max(findings.weak_rounds)
    rounds = findings.num_rounds[list(findings.weak_rounds).index(worst)]
    return Criterion(
        name="signal",
        question="Does the interval of the held-out Spearman include 0 in several rounds of a run?",
        value=f"{worst} of {rounds} rounds of the worst run",
        threshold=f"{settings.weak_rounds} rounds",
        state="met" if worst >= settings.weak_rounds else "not met",
    )


def _filter(findings: Findings, settings: PilotSettings) -> Criterion:
    found = findings.difference
    more = found.more_seeds(0.0)
    if found.high is None:
        state: State = "open"
    elif found.high < 0:
        state = "not met"
    else:
        state = "open" if found.mean < 0 and more is not None and more <= settings.more_seeds else "met"
    return Criterion(
        name="filter",
        question="Is the tuned static filter within the interval of ours, at equal FLOPs of the planned run?",
        value=f"ours minus the filter is {interval_text(found)} nats/token",
        threshold=f"the interval is below 0, with at most {settings.more_seeds} further seeds",
        state=state,
        more_seeds=more if state == "open" else 0,
    )


def _harms(findings: Findings, settings: PilotSettings) -> list[Criterion]:
    question = "Is a protected group worse than with random rows by more than was allowed?"
    allowed = f"{settings.max_harm:g} nats/token"
    if not settings.protected:
        return [
            Criterion(
                name="harm", question=question, value="no group is protected", threshold=allowed, state="not asked"
            )
        ]
    criteria = []
    for group in settings.protected:
        found = findings.harm[group]
        if found.mean > settings.max_harm:
            state: State = "met"
        else:
            state = "open" if found.high is None or found.high > settings.max_harm else "not met"
        criteria.append(
            Criterion(
                name="harm", question=question, value=f"{group} {interval_text(found)} nats/token", threshold=allowed,
                state=state, more_seeds=found.more_seeds(settings.max_harm) if state == "open" else 0,
            )
        )  # fmt: skip
    return criteria


def _idle(findings: Findings, settings: PilotSettings) -> Criterion:
    return Criterion(
        name="idle",
        question="Would devices of the planned run wait for rounds for long?",
        value=f"at most {findings.idle:.2%} of the time",
        threshold=f"{settings.max_idle:.2%}",
        state="met" if findings.idle > settings.max_idle else "not met",
    )


def _scale(findings: Findings, settings: PilotSettings) -> Criterion:
    large = findings.smaller <= settings.max_smaller and findings.shorter <= settings.max_shorter
    return Criterion(
        name="scale",
        question="Is the pilot too small to speak for the planned run? This alone is no reason to stop.",
        value=f"a model {findings.smaller:,.0f} times smaller, arms {findings.shorter:,.0f} times shorter",
        threshold=f"{settings.max_smaller:,.0f} and {settings.max_shorter:,.0f} times",
        state="not met" if large else "open",
    )


def interval_text(found: Estimate, form: str = "+.3f") -> str:
    """A mean with its interval, or what one seed has in place of it.

    Args:
        found: The estimate.
        form: Format of each number.

    Returns:
        One phrase.
    """
    if found.low is None or found.high is None:
        return f"{found.mean:{form}} (one seed: no interval)"
    return f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"
