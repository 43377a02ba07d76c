"""A trust region in time: how long a round is, by whether what the last one bought is still worth more than the rest.

A label is a price at the margin, and a round spends a whole budget at that price. Where the model does not know a kind
of text, the first hundred selected steps change every price; afterwards prices hold. So rounds begin short
(`first_round_steps`), and one may be longer only while the prices that the last one paid still hold.

The **gap** says whether they do. The influence model that chose the last round ranks the rows that this round has
probed; the best `selection_ratio` of them are the kind that was bought. The gap is the mean worth of those minus that
of the rest, by the fresh labels, in standard deviations of the labels' worth. Above 0: still worth more, higher is
better. It costs no probe, and no row in it was trained on.

A long round is looked at inside as well (`MatesConfig.checks_inside`). There the gap is between rows that were bought
and are still ahead, and rows that were passed over, by a few probes (`drift`). While it is above 0 the round goes on.
Where it is not, the next round starts at once, and the present one counts with the steps that it lasted. So the new
round's own labels, which are many more, decide how long it is: a false alarm costs the probes of one round.

Where it is used: between fit and guard in `rounds.run_round`; `replay` asks again with what a round has recorded.
Trade-off: the sign alone decides, so that labels without any signal shorten every other round; noise costs no more
than the Trainer's own order does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.config import NUM_SENTINELS, MatesConfig
from mates_hf.prediction.worth import row_worth
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.plan import PlannedRound, RunPlan

GAP_FILE = "bought.npy"  # (P,) float32, what the model that chose the last round predicts of the labelled rows
SENTINEL_FILE = "sentinel.json"  # what a drift check measures again
LOSS_ROSE = "loss_rose"  # what the guard says failed where the reference loss rose
MIN_CHECKED = 8  # rows of a kind; fewer say nothing
_Z_95 = 1.959964


class Gap(NamedTuple):
    """Worth of the kind of rows that the last round bought, minus that of the rest.

    Attributes:
        gap: in standard deviations of the labels' worth; > 0 is still worth more, higher is better.
        interval: its 95 % interval, by the normal approximation of a difference of two means.
    """

    gap: float
    interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"gap": self.gap, "interval": list(self.interval)}


def measure_gap(predicted: npt.NDArray[Any], labels: InfluenceLabels, selection_ratio: float) -> Gap | None:
    """Whether fresh labels still prefer what the last round bought.

    Args:
        predicted: (P,) influence of the labelled rows as predicted by the model that chose the last round, > 0 helps.
        labels: fresh labels of P rows.
        selection_ratio: share of its candidates that a round buys.

    Returns:
        The gap; None where a round buys every candidate, or the labels do not tell two kinds apart.
    """
    num = len(labels)
    if num < 4 or selection_ratio >= 1:
        return None
    num_bought = min(max(round(selection_ratio * num), 2), num - 2)
    is_bought = np.zeros(num, np.bool_)
    is_bought[np.argsort(-row_worth(predicted, labels.num_tokens), kind="stable")[:num_bought]] = True
    return gap_between(labels.influence_per_token, labels.num_tokens, is_bought)


def gap_between(
    influence_per_token: npt.NDArray[Any], num_tokens: npt.NDArray[Any], is_bought: npt.NDArray[np.bool_]
) -> Gap | None:
    """Worth of some rows minus that of the others.

    Args:
        influence_per_token: (P,) labels, > 0 helps.
        num_tokens: (P,) trained tokens.
        is_bought: (P,) of which at least two are true and two are not.

    Returns:
        The gap; None where the labels do not tell two kinds apart.
    """
    worth = row_worth(influence_per_token.astype(np.float64), num_tokens)
    unit = float(worth.std())
    if not (math.isfinite(unit) and unit > 0):
        return None
    bought, rest = worth[is_bought] / unit, worth[~is_bought] / unit
    gap = float(bought.mean() - rest.mean())
    half = _Z_95 * math.sqrt(bought.var(ddof=1) / len(bought) + rest.var(ddof=1) / len(rest))
    return Gap(gap, (gap - half, gap + half))


def next_check(config: MatesConfig, info: Mapping[str, Any], step: int) -> int | None:
    """The step at which a round is looked at next, before it is over.

    Args:
        config: the run's `MatesConfig`.
        info: The round's `round.json`.
        step: optimizer steps done.

    Returns:
        The first such step after `step`; None where there is none, where the round bought nothing, or where rows were
        taken out of it, so that its predictions are no longer all there.
    """
    if info["guard"]["decision"] == "own_order" or info.get("redacted"):
        return None
    boundary = int(info["step"])
    checks = config.checks_inside(int(info.get("round_steps", config.update_steps)))
    return next((boundary + after for after in checks if boundary + after > step), None)


def rows_to_check(
    config: MatesConfig,
    number: int,
    step: int,
    candidates: IntArray,
    scores: npt.NDArray[Any],
    num_targets: npt.NDArray[Any],
    rows: IntArray,
    num_done: int,
) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """What a check inside a round measures: some of what is bought and still ahead, and as many passed over.

    None of them was fitted on or trained on. Of the rows that were bought only those count whose prediction is among
    the highest: others are there at random (`random_share`).

    Args:
        config: the run's `MatesConfig`.
        number: the round.
        step: optimizer steps done.
        candidates: (M,) pool rows that the round chose from.
        scores: (M,) their predicted influence.
        num_targets: (M,) their trained tokens.
        rows: (k,) what it chose, in training order.
        num_done: how many of these are trained on.

    Returns:
        Pool rows, ascending, and which of them are bought; none where there are fewer than `MIN_CHECKED` of a kind.
    """
    is_kind = np.zeros(len(candidates), np.bool_)
    is_kind[np.argsort(-row_worth(scores, num_targets), kind="stable")[: len(rows)]] = True
    is_trained = np.asarray(num_targets) > 0
    bought = candidates[is_kind & is_trained & np.isin(candidates, rows[num_done:])]
    rest = candidates[~is_kind & is_trained & ~np.isin(candidates, rows)]
    num = min(NUM_SENTINELS // 2, len(bought), len(rest))
    if num < MIN_CHECKED:
        return np.zeros(0, np.int64), np.zeros(0, np.bool_)
    generator = np.random.default_rng([stage_seed(config.selection_seed, number, "check"), step])
    bought = generator.permutation(bought)[:num]
    checked = np.sort(np.concatenate([bought, generator.permutation(rest)[:num]]))
    return checked, np.isin(checked, bought)


def check_file(step: int) -> str:
    """Name of what a check at a step leaves in the directory of its round."""
    return f"check-{step:06d}.json"


def longest_steps(config: MatesConfig, last_steps: int | None, last_decision: str | None) -> int:
    """How long the coming round may be, before its labels are known.

    Args:
        config: the run's `MatesConfig`.
        last_steps: Length of the last round; None before the first.
        last_decision: The guard's decision in it.

    Returns:
        Optimizer steps. After a round in the own order, which bought nothing that could still hold, its own length.
    """
    if config.first_steps is not None and last_steps is not None and last_decision == "own_order":
        return last_steps
    return config.longest_steps(last_steps)


def round_steps(
    config: MatesConfig, last_steps: int | None, last_decision: str | None, guard: dict[str, Any], gap: float | None
) -> int:
    """How long the coming round is: twice the last one where the gap is above 0, half of it where it is not.

    Half of it as well where the labels are reversed, or where the reference loss rose.

    Args:
        config: the run's `MatesConfig`.
        last_steps: Length of the last round; None before the first.
        last_decision: The guard's decision in it.
        guard: The guard's decision in this round, as in `round.json`.
        gap: The gap of this round; None where nothing was bought that it could measure.

    Returns:
        Optimizer steps, from `first_round_steps` to `update_steps`; `update_steps` where rounds do not grow. A round
        that the guard sends to the own order for another reason is as long as the last one.
    """
    longest = longest_steps(config, last_steps, last_decision)
    if config.first_steps is None or last_steps is None or last_decision == "own_order":
        return longest
    if guard.get("reversed") or guard.get("failed") == LOSS_ROSE or (gap is not None and gap <= 0):
        return max(config.first_steps, last_steps // 2)
    return last_steps if gap is None or guard["decision"] == "own_order" else longest


def shortened(run: Any, longest: PlannedRound, plan: RunPlan, guard: dict[str, Any], gap: Gap | None) -> PlannedRound:
    """The coming round at the length that its labels give it.

    Args:
        run: the run's state, with what the last round left.
        longest: The round as long as it may be.
        plan: The plan of the run, which says what a shorter round would be.
        guard: The guard's decision in this round.
        gap: its gap.

    Returns:
        The round.
    """
    steps = round_steps(run.config, run.last_steps, run.last_decision, guard, None if gap is None else gap.gap)
    if steps == longest.steps:
        return longest
    planned = plan.round_at(longest.number, longest.boundary_step, steps)
    assert planned is not None  # it begins where the longer one does
    return planned


def length_facts(run: Any, longest: PlannedRound, planned: PlannedRound) -> dict[str, Any]:
    """What `round.json` says of a round's length, of what it was drawn for, and of a check that started it early."""
    facts: dict[str, Any] = {"round_steps": planned.steps}
    if run.last_steps is not None and run.last_steps != planned.steps:
        facts["last_round_steps"] = run.last_steps
    if longest.num_rows != planned.num_rows:
        facts["num_rows_drawn_for"] = longest.num_rows
    if run.ended_by is not None:
        facts["early"] = dict(run.ended_by)
    return facts
