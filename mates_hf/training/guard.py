"""The guard: which influence model scores a round, if any. It selects neither on noise nor against what is measured.

Where it is used: between fit and score in `rounds.run_round`. What it asks costs no probe: the held-out report of the
fresh fit, what the last trusted influence model predicts of the fresh labels, whose candidates it has never seen, and
the losses of the reference passages, which every probe reads anyway.

What it sees, in the order in which it looks, and what it answers:

1. **Labels that rank nothing** (`labels`): all are equal. The round is in the Trainer's own order.
2. **A reference loss that rose** (`loss_rose`, see `rise`): the last round selected, and the loss of the passages is
   higher than at the boundary before, beyond noise. The selection harmed what it was bought for. The round is in the
   Trainer's own order, and half as long where rounds find their length. Afterwards the selection is on probation: it
   must do as well as the own order did just before. Where it does not, that counts as a rise too. The next rise keeps
   the own order for two or four rounds, and so on (`rise.rises_after`).
3. **What was bought is used up** (`used_up`, see `trust`), where rounds find their length (`first_round_steps`): fresh
   labels no longer prefer the kind of rows that was chosen last. The round is in the Trainer's own order, and half as
   long.
4. **A reversal** (`reversed`): predictions of the trusted model contradict the fresh labels, by a rank correlation
   whose whole 95 % interval is below 0. The first reversal keeps the previous model (measured: 0.44 nats better than
   following), for half as long where rounds find their length. A second one in a row goes back to the own order: the
   previous model is refuted twice then, and the fresh one is the opposite extreme of an overshot model.
5. **A weak signal** (`min_spearman`, `interval`): held-out labels are predicted too badly, or not beyond noise. The
   previous model is kept where it still predicts the fresh labels; else the round is in the own order.

With `on_weak_signal="select"` the round selects all the same where labels rank anything. With `"error"` the run ends.

A reversal comes from overshoot: a round of one kind of text uses up what made it helpful, labels turn round, and they
are predicted as well as ever, so the held-out report cannot see it. A correlation that falls and stays above 0 is
ordinary ageing, for which rounds are there. Noise has an interval that includes 0, however few the probes. After a
round in the own order no selection has been overshot, so the labels there are taken for what they say, whatever the
old model says of them.

Trade-off: prices that truly turn round within a round are followed two rounds late.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from mates_hf.errors import WeakSignalError
from mates_hf.prediction.judge import FEW_HELD_OUT, times_needed
from mates_hf.records import FitReport
from mates_hf.training.rise import Rise, rises_after
from mates_hf.training.run import InfluenceModel, Run
from mates_hf.training.trust import LOSS_ROSE, Gap

logger = logging.getLogger(__name__)

UNKNOWN = (-1.0, 1.0)  # the interval of a correlation that nothing is known about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """What is known of a round's labels when the guard is asked.

    Attributes:
        fitted: the fresh influence model; None where labels rank nothing.
        fresh: the last trusted model's report on the fresh labels; None where there is no such model.
        reason: why labels rank nothing; empty where they do.
        gap: what the last round bought against the rest, by the labels; None where it bought nothing, or they cannot
            tell.
        rise: how far the reference loss rose since the last round; None where that says nothing of its selection.
    """

    fitted: InfluenceModel | None = None
    fresh: FitReport | None = None
    reason: str = ""
    gap: Gap | None = None
    rise: Rise | None = None

    @classmethod
    def unrankable(cls, reason: str) -> Judged:
        """Labels that rank nothing, for this reason."""
        return cls(reason=reason)

    @property
    def spearman(self) -> float:
        """Held-out rank correlation of the fresh fit; 0 where there is none."""
        return 0.0 if self.fitted is None else self.fitted.report.spearman

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % interval."""
        return UNKNOWN if self.fitted is None else self.fitted.report.interval

    @property
    def contradicted(self) -> bool:
        """Whether the fresh labels are the reverse of what the trusted model predicts, beyond noise."""
        return self.fresh is not None and self.fresh.interval[1] < 0


def decide(run: Run, judged: Judged) -> tuple[dict[str, Any], InfluenceModel | None]:
    """Which influence model scores this round.

    Args:
        run: the run's state, with what the last round decided.
        judged: the fresh fit and what the trusted model makes of the labels.

    Returns:
        What `round.json` says of it as `guard`, and the model; None is the Trainer's own order.

    Raises:
        WeakSignalError: the guard refuses and `on_weak_signal="error"`.
    """
    config, fitted = run.config, judged.fitted
    overshot = judged.contradicted and run.last_decision != "own_order"
    rises, loss_rose = rises_after(run.last_rises, run.last_decision, judged.rise)
    failed, complaint = _complaint(run, judged, overshot, rises if loss_rose else {})
    guard: dict[str, Any] = {
        "decision": "select",
        "spearman": judged.spearman,
        "interval": list(judged.interval),
        "ranking": "influence" if fitted is None else fitted.report.ranking,
        "failed": failed,
        "reversed": overshot,
    }
    if rises:
        guard["rises"] = rises
    if judged.fresh is not None:
        guard |= {"previous_spearman": judged.fresh.spearman, "previous_interval": list(judged.fresh.interval)}
    if not failed:
        return guard, fitted
    if config.on_weak_signal == "error":
        raise WeakSignalError(f"The round must not select: {complaint}.")
    if fitted is not None and config.on_weak_signal == "select":
        return guard, fitted
    if run.trusted_model is not None and _keeps(run, judged, failed):
        logger.warning("The previous influence model is kept: %s.", complaint)
        return {**guard, "decision": "keep_previous"}, run.trusted_model
    logger.warning("This round stays in the Trainer's own order: %s.", complaint)
    return {**guard, "decision": "own_order"}, None


def _keeps(run: Run, judged: Judged, failed: str) -> bool:
    """Whether the trusted model scores a round that its own fit must not score."""
    if failed in (LOSS_ROSE, "used_up"):  # it is the trusted model's choice that did harm, or is used up
        return False
    return not run.last_reversed if failed == "reversed" else _still_holds(judged, run.config.min_spearman)


def _still_holds(judged: Judged, min_spearman: float) -> bool:
    """Whether the trusted model predicts fresh labels that a fresh fit does not."""
    return judged.fitted is not None and judged.fresh is not None and judged.fresh.passes(max(min_spearman, 0.05))


def _complaint(run: Run, judged: Judged, overshot: bool, rises: Mapping[str, int]) -> tuple[str | None, str]:
    """The one condition that failed, by its name in `round.json`, and as a sentence says it; None where none did."""
    fitted, config = judged.fitted, run.config
    if fitted is None:
        return "labels", f"the labels rank no candidate ({judged.reason.rstrip('.')})"
    if rises:
        return LOSS_ROSE, _harm(judged.rise, rises)
    report = fitted.report
    if config.first_steps is not None and judged.gap is not None and judged.gap.gap <= 0:
        low, high = judged.gap.interval
        return "used_up", (
            f"what the last round chose is worth no more than the rest by now (gap {judged.gap.gap:+.2f} standard "
            f"deviations of the labels, 95 % interval {low:+.2f} to {high:+.2f}), though held-out Spearman is "
            f"{report.spearman:.3f}: it is used up. The round is short, and the next one follows the labels again"
        )
    if overshot:  # first: pooled with earlier labels that say the opposite, a fit is weak as well
        assert judged.fresh is not None
        low, high = judged.fresh.interval
        return "reversed", (
            f"the fresh labels are the reverse of what the previous influence model predicts (Spearman "
            f"{judged.fresh.spearman:.3f}, 95 % interval {low:.3f} to {high:.3f}), though held-out Spearman is "
            f"{report.spearman:.3f}: what was selected last is used up, and the model has overshot. Shorter rounds "
            "(`update_steps`), such that find their length (`first_round_steps`), or a larger `selection_ratio` avoid "
            "it; more probes do not"
        )
    return weakness(report, config.min_spearman, config.num_probes)


def weakness(report: FitReport, min_spearman: float, num_probes: int) -> tuple[str | None, str]:
    """Why a fit is too weak to select by, and about how many probes would do.

    Args:
        report: Report of the fit, on held-out labels.
        min_spearman: The guard's lowest Spearman.
        num_probes: Candidates that were probed.

    Returns:
        The one condition that failed, `"min_spearman"` or `"interval"`, and as a sentence says it; None and an empty
        string where none did.
    """
    low, high = report.interval
    if report.spearman < min_spearman:
        what = f"held-out Spearman is {report.spearman:.3f}, below `min_spearman`={min_spearman}"
        return "min_spearman", f"{what}; {_advice(report, min_spearman, num_probes)}"
    if not low > 0:
        what = (
            f"held-out Spearman is {report.spearman:.3f}, but its 95 % interval ({low:.3f} to {high:.3f}) includes 0"
        )
        return "interval", f"{what}; {_advice(report, min_spearman, num_probes)}"
    return None, ""


def _harm(rise: Rise | None, rises: Mapping[str, int]) -> str:
    """That the reference loss rose, and for how long nothing is selected."""
    if rise is None:
        what = "the reference loss rose time and again in rounds that selected"
    else:
        by = f"{rise.rise:.3f} nats/token (95 % interval {rise.interval[0]:.3f} to {rise.interval[1]:.3f})"
        what = f"the reference loss rose by {by} since the last round, so what that selected did harm"
        if rise.beyond_own_order:
            what = f"what the last round selected left the reference loss {by} above the own order's course before it"
    left = rises["own_order_left"]
    more = f" So {'does' if left == 1 else 'do'} the {f'{left} after it' if left > 1 else 'next'}." if left else ""
    return f"{what}.{more} Look at the reference task, the probe and the learning rate if it happens again"


def _advice(report: FitReport, min_spearman: float, num_probes: int) -> str:
    """How many probes would do, or that no number is known to."""
    wanted = probes_needed(report, min_spearman, num_probes)
    if wanted is None:
        return (
            f"no number of probes is known to do (`num_probes` is {num_probes}): look at the reference task and the "
            "probe instead"
        )
    return f"about {wanted:,} probes would do (`num_probes` is {num_probes})"


def probes_needed(report: FitReport, min_spearman: float, num_probes: int) -> int | None:
    """How many probes would let a weak fit pass, to two digits, by `times_needed`.

    Where fewer labels are held out than can be judged by, at least as many as give those.

    Args:
        report: Report of the fit, on held-out labels.
        min_spearman: The guard's lowest Spearman.
        num_probes: Candidates that were probed.

    Returns:
        Number of probes; None where no number is known to do.
    """
    times = times_needed(report, min_spearman)
    if times is None:
        return None
    times = max(times, FEW_HELD_OUT / max(report.num_held_out, 1))
    unit = int(10 ** max(len(str(int(times * num_probes))) - 2, 0))
    return math.ceil(times * num_probes / unit) * unit
