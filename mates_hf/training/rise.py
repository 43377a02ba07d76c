"""Whether the reference loss rose while a round trained on what it had selected.

A selection is bought so that the reference loss falls. Labels record the loss of every passage at each boundary, at
the null step of the weights that are probed. Where the mean over the passages is higher than at the boundary before,
beyond noise, the selection did harm, whatever its labels said.

A selection can do harm and no more than hold a loss up that would have fallen. So after a rise it is on probation: the
round that selects again is compared with the round in the Trainer's own order before it, step for step. A loss that
falls less than there counts as another rise.

What else makes a loss rise is no complaint about a selection, and is told apart where it can be. Nothing is said after
a round in the own order, where the learning rate is higher than at the boundary before (a warm-up, or a restart),
where the weights were averaged over another number of steps, and where passages or their tokens differ.

Where it is used: `rounds` asks before the guard does; `replay` asks again of what rounds have recorded. Trade-off: the
interval is over passages, not over runs, while the noise of a step moves the loss of all passages alike. Where a loss
no longer falls and steps are that noisy, there are false alarms; one costs a round in the own order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.disk import read_array, read_json
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import REFERENCE_FILE, ROUND_FILE, round_path

MIN_RISE = 0.01  # nats/token; what a step's noise does to a model that has nothing left to learn is below it
MIN_PASSAGES = 8
_MOST_RATE = 1.05  # learning rates, as a multiple of those at the boundary before, that count as no higher
_MOST_DOUBLINGS = 6
_Z_95 = 1.959964


class Rise(NamedTuple):
    """How far the reference loss rose since the boundary before, on the same passages.

    Attributes:
        rise: nats/token, mean over the trained tokens of all passages; < 0 is a fall, lower is better.
        interval: its 95 % interval over passages, by the normal approximation.
        beyond_own_order: true where it is told how much more it rose, or less it fell, than in the round in the own
            order before it.
    """

    rise: float
    interval: tuple[float, float]
    beyond_own_order: bool = False

    @property
    def is_harm(self) -> bool:
        """Whether the loss rose by more than noise does."""
        return self.interval[0] > 0 and self.rise > MIN_RISE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rise": self.rise, "interval": list(self.interval), "beyond_own_order": self.beyond_own_order}


class Course(NamedTuple):
    """A boundary: `round.json`, or what is known of it, and (R, 2) mean loss and trained tokens of each passage."""

    info: Mapping[str, Any]
    losses: npt.NDArray[Any]


def measure_rise(run: Any, labels: InfluenceLabels, info: Mapping[str, Any]) -> Rise | None:
    """How far the reference loss rose since the last round, which is read from its directory.

    Args:
        run: the run's state, with the number of the last round.
        labels: fresh labels.
        info: what `round.json` will say of the model as it was measured.

    Returns:
        The rise; None where there is nothing to compare with.
    """
    if run.last_round is None or labels.reference_losses is None:
        return None
    now = Course({"probe": labels.info, **info}, labels.reference_losses)
    last = _read_course(run, run.last_round)
    earlier = _read_course(run, run.last_round - 1) if run.last_rises else None
    return None if last is None else find_rise(now, last, earlier)


def _read_course(run: Any, number: int) -> Course | None:
    """A finished round; None where it has no losses, as rounds of earlier versions, and of probes that tell none."""
    path = round_path(run.rounds_dir, number)
    losses = read_array(path / REFERENCE_FILE, np.float32, num_dims=2)
    return None if losses is None else Course(read_json(path / ROUND_FILE), losses)


def find_rise(now: Course, last: Course, earlier: Course | None = None) -> Rise | None:
    """How far the reference loss rose from one round to the next.

    Args:
        now: This round.
        last: The round before it.
        earlier: The round before that, where the selection is on probation; compared with if it was in the own order.

    Returns:
        The rise; None where the last round selected nothing, or the two cannot be compared.
    """
    if last.info["guard"].get("decision") == "own_order":
        return None
    change = _change(last, now)
    if change is None:
        return None
    is_own = earlier is not None and earlier.info["guard"].get("decision") == "own_order"
    own_change = _change(earlier, last) if earlier is not None and is_own else None
    if own_change is not None and earlier is not None:
        steps = [each.info["step"] for each in (earlier, last, now)]
        change = change - own_change * ((steps[2] - steps[1]) / (steps[1] - steps[0]))
    share = last.losses[last.losses[:, 1] > 0, 1].astype(np.float64)
    share /= share.sum()
    rise, num = float(share @ change), len(change)
    half = _Z_95 * math.sqrt(float(np.sum((share * (change - rise)) ** 2)) * num / (num - 1))
    return Rise(rise, (rise - half, rise + half), own_change is not None)


def _change(last: Course, now: Course) -> npt.NDArray[np.float64] | None:
    """Change of the loss of each passage with trained tokens; None where something else may have changed it."""
    before, after = last.losses, now.losses
    same = before.shape == after.shape and before.ndim == 2 and before.shape[1:] == (2,)
    if not same or not _comparable(last.info, now.info) or not np.array_equal(before[:, 1], after[:, 1]):
        return None
    trained = before[:, 1] > 0
    change: npt.NDArray[np.float64] = after[trained, 0].astype(np.float64) - before[trained, 0]
    return change if len(change) >= MIN_PASSAGES and np.isfinite(change).all() else None


def rises_after(
    last_rises: Mapping[str, int], last_decision: str | None, rise: Rise | None
) -> tuple[dict[str, int], bool]:
    """How far the selection is mistrusted, and whether the coming round is in the own order for it.

    A rise adds 2 to the mistrust, a round that selected without one takes 1 off; at 0, probation is over. A rise is
    followed by 2^(mistrust - 2) rounds in the own order: by one, by two where only one good round lies between two
    rises, by four where none does. So selections that do harm time and again, by a wrong reference or probe, cost less
    and less.

    Args:
        last_rises: What this returned for the last round; empty where there is none.
        last_decision: The guard's decision in the last round.
        rise: what is measured now.

    Returns:
        `mistrust`, and `own_order_left` for the rounds in the own order that follow the coming one; nothing where
        there is no mistrust. And whether the coming round is one in the own order.
    """
    mistrust, left = last_rises.get("mistrust", 0), last_rises.get("own_order_left", 0)
    if rise is not None and rise.is_harm:
        mistrust += 2
        return {"mistrust": mistrust, "own_order_left": 2 ** min(mistrust - 2, _MOST_DOUBLINGS) - 1}, True
    if rise is not None:
        mistrust, left = mistrust - 1, 0
    if mistrust <= 0:
        return {}, False
    is_kept = left > 0 and last_decision == "own_order"
    return {"mistrust": mistrust, "own_order_left": left - is_kept}, is_kept


def _comparable(info: Mapping[str, Any], info_now: Mapping[str, Any]) -> bool:
    """Whether a loss that changed between two rounds would be the doing of the rows that were trained on."""
    digests = [_part(each, "reference").get("digest") for each in (info, info_now)]
    if digests[0] != digests[1] or info.get("averaged_steps") != info_now.get("averaged_steps"):
        return False
    before, now = (_rate(_part(each, "probe").get("learning_rates")) for each in (info, info_now))
    return before is None or now is None or now <= _MOST_RATE * before


def _part(info: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = info.get(name)
    return found if isinstance(found, Mapping) else {}


def _rate(rates: Any) -> float | None:
    """Sum of the learning rates of all groups; None where they are not known."""
    is_known = isinstance(rates, (list, tuple)) and rates and all(isinstance(rate, (int, float)) for rate in rates)
    return float(sum(abs(rate) for rate in rates)) if is_known else None
