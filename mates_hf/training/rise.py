"""Whether the reference loss rose while a round trained on what it had selected.

A selection is bought so that the reference loss falls. Labels record the loss of every passage at each boundary, at
the null step of the weights that are probed. Where the mean over the passages is higher than at the boundary before,
beyond noise, the selection did harm, whatever its labels said.

What else makes a loss rise is no complaint about a selection, and is told apart where it can be. Nothing is said after
a round in the Trainer's own order, where the learning rate is higher than at the boundary before (a warm-up, or a
restart), where the weights were averaged over another number of steps, and where passages or their tokens differ.

Where it is used: `rounds` asks before the guard does; `replay` asks again of what rounds have recorded. Trade-off: the
interval is over passages, not over runs, while the noise of a step moves the loss of all passages alike. So a rise
must be of more than `MIN_RISE` as well.
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
    """

    rise: float
    interval: tuple[float, float]

    @property
    def is_harm(self) -> bool:
        """Whether the loss rose by more than noise does."""
        return self.interval[0] > 0 and self.rise > MIN_RISE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rise": self.rise, "interval": list(self.interval)}


def measure_rise(run: Any, labels: InfluenceLabels, facts: Mapping[str, Any]) -> Rise | None:
    """How far the reference loss rose since the last round, which is read from its directory.

    Args:
        run: the run's state, with the number of the last round.
        labels: fresh labels.
        facts: what `round.json` will say of the model as it was measured.

    Returns:
        The rise; None where there is nothing to compare with.
    """
    if run.last_round is None or labels.reference_losses is None:
        return None
    path = round_path(run.rounds_dir, run.last_round)
    before = read_array(path / REFERENCE_FILE, np.float32, num_dims=2)
    if before is None:  # of an earlier version, or of a probe that does not tell
        return None
    return find_rise(read_json(path / ROUND_FILE), before, {"probe": labels.info, **facts}, labels.reference_losses)


def find_rise(
    info: Mapping[str, Any], losses: npt.NDArray[Any], info_now: Mapping[str, Any], losses_now: npt.NDArray[Any]
) -> Rise | None:
    """How far the reference loss rose from one round to the next.

    Args:
        info: `round.json` of the round before.
        losses: (R, 2) mean loss and trained tokens of each passage in it.
        info_now: `round.json` of this round, or what is known of it.
        losses_now: the same in this round.

    Returns:
        The rise; None where the round before selected nothing, or the two cannot be compared.
    """
    same = losses.shape == losses_now.shape and losses.ndim == 2 and losses.shape[1:] == (2,)
    if not same or not _comparable(info, info_now) or not np.array_equal(losses[:, 1], losses_now[:, 1]):
        return None
    trained = losses[:, 1] > 0
    change = losses_now[trained, 0].astype(np.float64) - losses[trained, 0]
    share = losses[trained, 1].astype(np.float64)
    num = len(change)
    if num < MIN_PASSAGES or not np.isfinite(change).all():
        return None
    share /= share.sum()
    rise = float(share @ change)
    half = _Z_95 * math.sqrt(float(np.sum((share * (change - rise)) ** 2)) * num / (num - 1))
    return Rise(rise, (rise - half, rise + half))


def rises_after(
    last_rises: Mapping[str, int], last_decision: str | None, rise: Rise | None
) -> tuple[dict[str, int], bool]:
    """How often in a row the loss rose, and whether the coming round is in the own order for it.

    The n-th rise in a row, with nothing but rounds in the own order in between, is followed by 2^(n - 1) rounds in the
    own order. So selections that do harm time and again, by a wrong reference or probe, cost less and less.

    Args:
        last_rises: What this returned for the last round; empty where there is none.
        last_decision: The guard's decision in the last round.
        rise: what is measured now.

    Returns:
        `in_a_row`, and `own_order_left` for the rounds in the own order that follow the coming one; nothing where the
        last selection did no harm. And whether the coming round is one in the own order.
    """
    in_a_row, left = last_rises.get("in_a_row", 0), last_rises.get("own_order_left", 0)
    if rise is not None and rise.is_harm:
        in_a_row += 1
        return {"in_a_row": in_a_row, "own_order_left": 2 ** min(in_a_row - 1, _MOST_DOUBLINGS) - 1}, True
    if rise is not None or not in_a_row:
        return {}, False
    is_kept = left > 0 and last_decision == "own_order"
    return {"in_a_row": in_a_row, "own_order_left": left - is_kept}, is_kept


def _comparable(info: Mapping[str, Any], info_now: Mapping[str, Any]) -> bool:
    """Whether a loss that rose between two rounds would be the doing of what the first one selected."""
    if info["guard"].get("decision") == "own_order":
        return False
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
