"""What came out of a pilot: losses of the arms, tokens they need, harm to groups, and what it all costs.

Where it is used: `run_pilot`, on the results of its units; it trains nothing and reads no file. Figures are paired by
seed: arms of a seed share weights, first rows and batches.

Trade-off: tokens are counted with the common start, in which no arm can gain, so that gains are rather too small.

Signs: losses in nats/token, lower is better; a gain is tokens of the other over ours, above 1 is better.
Shape suffixes: S seeds, E marks, P passages, R rows that were kept out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mates_hf.pilot.estimates import Estimate, Values, estimate, first_reached, mean_loss
from mates_hf.pilot.schedule import Schedule
from mates_hf.pilot.verdict import Findings
from mates_hf.reporting.payback import SelectionPlan

ARMS: tuple[Literal["random", "filter", "ours"], ...] = ("random", "filter", "ours")
POOL = "pool"
Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""Results of units by arm, seeds in the same order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What came out.

    Attributes:
        findings: What the verdict is made of.
        losses: Loss of each arm at equal tokens.
        against_filter: Loss of each other arm minus that of the filter, at equal tokens.
        tokens_to_filter: Tokens of each arm, over those of the filter, to the filter's last loss; None where a seed
            does not get there.
        at_pilot_flops: Ours minus the filter where the pilot's own rounds count, nats/token.
        pilot_share: FLOPs of the pilot's own rounds over those of its training.
        harm: Loss minus that of random rows at equal tokens, by arm and group; `pool` is the pool's own text.
        curves: Mean loss over seeds at each mark, by arm.
        seconds: Seconds of each arm, all seeds, choosing included; and of `tuning`.
        flops: FLOPs of all units, tuning included.
        choosing_seconds: Of these, seconds that choosing took.
    """

    findings: Findings
    losses: Mapping[str, Estimate]
    against_filter: Mapping[str, Estimate]
    tokens_to_filter: Mapping[str, Estimate | None]
    at_pilot_flops: Estimate
    pilot_share: float
    harm: Mapping[str, Mapping[str, Estimate]]
    curves: Mapping[str, Mapping[str, list[float]]]
    seconds: Mapping[str, float]
    flops: float
    choosing_seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""

        def plain(value: Any) -> Any:
            if isinstance(value, Estimate):
                return value.to_dict()
            if isinstance(value, Mapping):
                return {name: plain(one) for name, one in value.items()}
            return value

        found = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        findings = {field.name: plain(getattr(self.findings, field.name)) for field in dataclasses.fields(Findings)}
        return {**found, "findings": findings}


class _Curve:
    """Losses of one unit over its steps, for any weights of passages."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.steps = np.asarray(result["steps"], np.float64)
        self._sums_EP, self._tokens_P = np.asarray(result["sums"]), np.asarray(result["tokens"], np.float64)

    def losses(self, weights: Values) -> Values:
        return mean_loss(self._sums_EP, self._tokens_P, weights)

    def at(self, step: float, weights: Values) -> float:
        return float(np.interp(step, self.steps, self.losses(weights)))

    def reaches(self, loss: float, weights: Values) -> float | None:
        return first_reached(self.steps, self.losses(weights), loss)


def summarise(
    results: Results,
    schedule: Schedule,
    plan: SelectionPlan,
    shares: Mapping[str, float],
    *,
    tuning: Results,
    step_tokens: int,
) -> Summary:
    """Make figures of the results of units.

    Args:
        results: Of `random`, `filter` and `ours`, at the same seeds.
        schedule: The steps.
        plan: The planned run.
        shares: Share of each group in the pool.
        tuning: Results of the units that filters were tuned with, for the cost.
        step_tokens: Tokens of a step of the pilot.

    Returns:
        The summary.
    """
    curves: dict[str, list[_Curve]] = {arm: [_Curve(result) for result in results[arm]] for arm in ARMS}
    end, num = float(schedule.end), len(results["ours"][0]["tokens"])
    share = plan.cost.share_of_training
    own_ends = [_equal_flops_step(result, end) for result in results["ours"]]

    def at_end(arm: str, weights: Values) -> list[float]:
        return [curve.at(end, weights) for curve in curves[arm]]

    def minus_filter(arm: str, steps: Sequence[float]) -> Estimate:
        return estimate(
            lambda w: [
                curve.at(step, w) - other.at(end, w)
                for curve, other, step in zip(curves[arm], curves["filter"], steps, strict=True)
            ],
            num,
        )

    everywhere = [end] * len(curves["ours"])
    harm = {arm: _harm(results[arm], results["random"], shares) for arm in ("filter", "ours")}
    flops = {arm: sum(_flops(result) for result in results[arm]) for arm in ARMS}
    planned_hours = plan.training_hours * (1 + plan.overhead)
    return Summary(
        findings=Findings(
            weak_rounds=[sum(_is_weak(one) for one in result["rounds"]) for result in results["ours"]],
            num_rounds=[len(result["rounds"]) for result in results["ours"]],
            difference=minus_filter("ours", [end / (1 + share)] * len(everywhere)),
            log_gain=estimate(lambda w: _log_gains(curves["ours"], curves["filter"], end, w), num),
            harm=harm["ours"],
            idle=plan.idle_hours / planned_hours,
            break_even=plan.break_even,
            smaller=plan.size.num_parameters / float(results["ours"][0]["num_parameters"]),
            shorter=plan.size.trained_tokens / (end * step_tokens),
        ),
        losses={arm: estimate(lambda w, arm=arm: at_end(arm, w), num) for arm in ARMS},  # type: ignore[misc]
        against_filter={arm: minus_filter(arm, everywhere) for arm in ("random", "ours")},
        tokens_to_filter={
            arm: _tokens_to_filter(curves[arm], curves["filter"], end, num) for arm in ("random", "ours")
        },
        at_pilot_flops=minus_filter("ours", own_ends),
        pilot_share=float(np.mean([_selecting_flops(one) / (end * one["step_flops"]) for one in results["ours"]])),
        harm=harm,
        curves={arm: _mean_curve(curves[arm], num) for arm in ARMS},
        seconds={name: sum(map(_seconds, found)) for name, found in {**results, **tuning}.items()},
        flops=sum(flops.values()) + sum(_flops(one) for found in tuning.values() for one in found),
        choosing_seconds={
            "filter": sum(float(one["filter_seconds"]) for one in results["filter"]),
            "ours": sum(float(part["seconds"]) for one in results["ours"] for part in one["rounds"]),
        },
    )


def _mean_curve(curves: Sequence[_Curve], num: int) -> dict[str, list[float]]:
    losses = np.mean([curve.losses(np.ones(num)) for curve in curves], axis=0)
    return {"steps": curves[0].steps.tolist(), "losses": losses.tolist()}


def _log_gains(ours: Sequence[_Curve], filters: Sequence[_Curve], end: float, weights: Values) -> list[float]:
    """Logarithm of the tokens of the filter over those of ours for the same loss, of each seed.

    Where ours ends lower, both are read at the filter's last loss, else at that of ours: each curve has got there.
    """
    found = []
    for own, other in zip(ours, filters, strict=True):
        mine, theirs = own.at(end, weights), other.at(end, weights)
        if mine <= theirs:
            found.append(math.log(end / (own.reaches(theirs, weights) or end)))
        else:
            found.append(math.log((other.reaches(mine, weights) or end) / end))
    return found


def _tokens_to_filter(curves: Sequence[_Curve], filters: Sequence[_Curve], end: float, num: int) -> Estimate | None:
    """Tokens to the filter's last loss over those of the filter; None where a seed does not get there."""

    def each(weights: Values) -> list[float | None]:
        pairs = zip(curves, filters, strict=True)
        return [curve.reaches(other.at(end, weights), weights) for curve, other in pairs]

    if None in each(np.ones(num)):
        return None
    last = max(float(curve.steps[-1]) for curve in curves)  # of other passages, a seed may not get there
    return estimate(lambda weights: [(last if one is None else one) / end for one in each(weights)], num)


def _harm(
    results: Sequence[Mapping[str, Any]], random: Sequence[Mapping[str, Any]], shares: Mapping[str, float]
) -> dict[str, Estimate]:
    """Loss of each group minus that of the random arm, and of the pool's own text."""
    groups = np.array(results[0]["kept_out"]["groups"], object)
    names = sorted(set(groups.tolist()))

    def group_loss(result: Mapping[str, Any], name: str, weights: Values) -> float:
        mine = groups == name
        kept = result["kept_out"]
        sums, tokens = np.asarray(kept["sums"])[mine], np.asarray(kept["tokens"], np.float64)[mine]
        some = weights[mine] if weights[mine].sum() else np.ones(mine.sum())
        return float(mean_loss(sums, tokens, some))

    def difference(name: str, weights: Values) -> list[float]:
        pairs = zip(results, random, strict=True)
        return [group_loss(one, name, weights) - group_loss(other, name, weights) for one, other in pairs]

    total = sum(shares.get(name, 0.0) for name in names)

    def of_pool(weights: Values) -> list[float]:
        each = np.array([difference(name, weights) for name in names])
        share = np.array([shares.get(name, 0.0) / total for name in names])
        return [float(one) for one in share @ each]

    num = len(groups)
    found = {name: estimate(lambda w, name=name: difference(name, w), num) for name in names}  # type: ignore[misc]
    return {POOL: estimate(of_pool, num), **found}


def _is_weak(one: Mapping[str, Any]) -> bool:
    """Whether the interval of a round's held-out Spearman includes 0, or there is none."""
    low, high = one["interval"]
    return not (low is not None and high is not None and (low > 0 or high < 0))


def _selecting_flops(result: Mapping[str, Any]) -> float:
    return float(sum(one["flops"] for one in result.get("rounds", ())))


def _flops(result: Mapping[str, Any]) -> float:
    """FLOPs of a unit."""
    return float(result["steps"][-1] * result["step_flops"] + _selecting_flops(result))


def _seconds(result: Mapping[str, Any]) -> float:
    """Seconds of a unit; rounds are in those of its training, and a filter is fitted before it."""
    return float(result["seconds"]) + float(result["filter_seconds"])


def _equal_flops_step(result: Mapping[str, Any], end: float) -> float:
    """The step at which ours, its own rounds counted, has used as many FLOPs as the filter at its end."""
    each, spent, step = float(result["step_flops"]), 0.0, 0.0
    budget = end * each
    for one in sorted(result["rounds"], key=lambda found: found["step"]):
        if one["step"] * each + spent >= budget:
            break
        step = float(one["step"])
        spent += float(one["flops"])
        if step * each + spent >= budget:
            return step
    return max(step, (budget - spent) / each)
