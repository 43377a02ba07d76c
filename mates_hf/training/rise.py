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

Noise has two sources. Passages differ, for which there is an interval over passages. And a step moves the loss of all
passages alike, up and down: how far is measured by how boundaries before lie off the line between their neighbours.

Where it is used: `rounds` asks before the guard does; `replay` asks again of what rounds have recorded. Trade-off: the
noise of steps is known from the fourth boundary on, and a loss that falls in a curve looks noisier than it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.disk import read_array, read_json
from mates_hf.records import InfluenceLabels
from mates_hf.round_files import REFERENCE_FILE, ROUND_FILE, round_path

MIN_RISE = 0.01  # nats/token; less is no harm worth an answer, whatever its noise
MIN_PASSAGES = 8
NUM_BOUNDARIES = 10  # whose mean losses tell how noisy it is
_MOST_RATE = 1.05  # learning rates, as a multiple of those at the boundary before, that count as no higher
_MOST_DOUBLINGS = 6
_Z_95 = 1.959964
_Z_95_ONE_SIDED = 1.644854


class Rise(NamedTuple):
    """How far the reference loss rose since the boundary before, on the same passages.

    Attributes:
        rise: nats/token, mean over the trained tokens of all passages; < 0 is a fall, lower is better.
        interval: its 95 % interval over passages, by the normal approximation.
        beyond_own_order: true where it is told how much more it rose, or less it fell, than in the round in the own
            order before it.
        noise: nats/token; the noise of steps makes less of a rise in 95 % of all cases. 0 where that is not known yet.
    """

    rise: float
    interval: tuple[float, float]
    beyond_own_order: bool = False
    noise: float = 0.0

    @property
    def is_harm(self) -> bool:
        """Whether the loss rose by more than noise does."""
        return self.interval[0] > 0 and self.rise > max(MIN_RISE, self.noise)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self._asdict(), "interval": list(self.interval)}


class Boundary(NamedTuple):
    """A round: its `round.json`, or what is known of it, and (R, 2) mean loss and trained tokens of each passage."""

    info: Mapping[str, Any]
    losses: npt.NDArray[Any]

    @property
    def mean(self) -> float:
        """Reference loss, nats/token."""
        return float(np.average(self.losses[:, 0].astype(np.float64), weights=self.losses[:, 1]))


def measure_rise(run: Any, labels: InfluenceLabels, info: Mapping[str, Any]) -> Rise | None:
    """How far the reference loss rose since the last round, which is read from its directory.

    Args:
        run: the run's state, with the number of the last round.
        labels: fresh labels.
        info: what `round.json` will say of the model as it was measured.

    Returns:
        The rise; None where there is nothing to compare with.
    """
    last = _read_boundary(run, run.last_round)
    if last is None or labels.reference_losses is None:
        return None
    earlier = _read_boundary(run, run.last_round - 1) if run.last_rises else None
    return find_rise(Boundary({"probe": labels.info, **info}, labels.reference_losses), last, earlier)


def course_so_far(run: Any, labels: InfluenceLabels, info: Mapping[str, Any]) -> list[list[float]]:
    """What `round.json` says of the reference loss at this and earlier boundaries, as `course_after` finds it."""
    if labels.reference_losses is None:
        return []
    return course_after(_read_boundary(run, run.last_round), Boundary(info, labels.reference_losses))


def _read_boundary(run: Any, number: int | None) -> Boundary | None:
    """A finished round; None where it has no losses, as rounds of earlier versions, and of probes that tell none."""
    path = None if number is None else round_path(run.rounds_dir, number)
    losses = None if path is None else read_array(path / REFERENCE_FILE, np.float32, num_dims=2)
    return None if path is None or losses is None else Boundary(read_json(path / ROUND_FILE), losses)


def find_rise(now: Boundary, last: Boundary, earlier: Boundary | None = None) -> Rise | None:
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
    ratio = 0.0  # of the steps of the last round to those in the own order
    if own_change is not None and earlier is not None:
        steps = [each.info["step"] for each in (earlier, last, now)]
        ratio = (steps[2] - steps[1]) / (steps[1] - steps[0])
        change = change - ratio * own_change
    share = last.losses[last.losses[:, 1] > 0, 1].astype(np.float64)
    share /= share.sum()
    rise, num = float(share @ change), len(change)
    half = _Z_95 * math.sqrt(float(np.sum((share * (change - rise)) ** 2)) * num / (num - 1))
    spread = math.sqrt(1 + (1 + ratio) ** 2 + ratio**2)  # of now - (1 + ratio) last + ratio earlier
    noise = _Z_95_ONE_SIDED * spread * noise_of(last.info.get("reference_course") or [])
    return Rise(rise, (rise - half, rise + half), own_change is not None, noise)


def noise_of(course: Sequence[Sequence[float]]) -> float:
    """How noisy the reference loss of a boundary is: how far boundaries lie off the line between their neighbours.

    Args:
        course: step and mean loss of each, in order.

    Returns:
        Standard deviation, nats/token; 0 of fewer than four.
    """
    if len(course) < 4:
        return 0.0
    step, loss = np.asarray(course, np.float64).T
    left = (step[2:] - step[1:-1]) / (step[2:] - step[:-2])
    off = loss[1:-1] - left * loss[:-2] - (1 - left) * loss[2:]
    return math.sqrt(float(np.mean(off**2 / (1 + left**2 + (1 - left) ** 2))))


def course_after(last: Boundary | None, now: Boundary) -> list[list[float]]:
    """Step and mean loss of the last boundaries, those that are comparable with this one and it.

    While the selection is mistrusted no boundary is added: the harm that it does is no noise.

    Args:
        last: The round before; None where there is none.
        now: This round, whose guard has decided.

    Returns:
        At most `NUM_BOUNDARIES` pairs.
    """
    found = [float(now.info["step"]), now.mean]
    if last is None or not _same_passages(last, now):
        return [found]
    earlier: list[list[float]] = list(last.info.get("reference_course") or [])
    return earlier if now.info["guard"].get("rises") else [*earlier, found][-NUM_BOUNDARIES:]


def _same_passages(last: Boundary, now: Boundary) -> bool:
    """Whether two rounds read the same passages, at weights averaged alike."""
    before, after = last.losses, now.losses
    if before.shape != after.shape or before.ndim != 2 or before.shape[1] != 2:
        return False
    digests = [_part(each.info, "reference").get("digest") for each in (last, now)]
    same = digests[0] == digests[1] and last.info.get("averaged_steps") == now.info.get("averaged_steps")
    return same and np.array_equal(before[:, 1], after[:, 1])


def _change(last: Boundary, now: Boundary) -> npt.NDArray[np.float64] | None:
    """Change of the loss of each passage with trained tokens; None where something else may have changed it."""
    rates = [_rate(_part(each.info, "probe").get("learning_rates")) for each in (last, now)]
    rate_rose = rates[0] is not None and rates[1] is not None and rates[1] > _MOST_RATE * rates[0]
    if rate_rose or not _same_passages(last, now):
        return None
    trained = last.losses[:, 1] > 0
    change: npt.NDArray[np.float64] = now.losses[trained, 0].astype(np.float64) - last.losses[trained, 0]
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


def _part(info: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = info.get(name)
    return found if isinstance(found, Mapping) else {}


def _rate(rates: Any) -> float | None:
    """Sum of the learning rates of all groups; None where they are not known."""
    is_known = isinstance(rates, (list, tuple)) and rates and all(isinstance(rate, (int, float)) for rate in rates)
    return float(sum(abs(rate) for rate in rates)) if is_known else None
