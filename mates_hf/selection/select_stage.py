"""The select stage of a round: from predictions to the rows that are trained on next.

Where it is used: `training/rounds` calls it once a round, `training/replay` once more to check a finished one. What it
is made of is in `choose` (the largest values, noise, ties) and `copies` (which rows are one text). Trade-off: it is
a pure function of arrays that lie in a round directory, so nothing that only a dataset or a model knows can steer it.

Sign: > 0 helps, higher is better.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.errors import InfluenceError
from mates_hf.prediction.worth import row_worth
from mates_hf.records import FloatArray, InfluenceLabels, IntArray
from mates_hf.selection.choose import (
    Seed,
    check_temperature,
    largest,
    noisy,
    nth_true,
    stage_seed,
    with_others,
)
from mates_hf.selection.copies import Hashes, find_copies
from mates_hf.selection.quota import Quota, best_within


class SelectedRows(NamedTuple):
    """What the select stage chose.

    Attributes:
        rows: (k,) int64 pool rows in training order.
        num_repeated: candidates whose text an earlier candidate has too; 0 where no hashes were given.
        num_passed_over: candidates left out as copies, though worth more than the least text that was chosen by worth.
        num_random: rows that were drawn at random from what was not chosen by worth.
    """

    rows: IntArray
    num_repeated: int
    num_passed_over: int
    num_random: int = 0


def select_rows(
    candidates: IntArray,
    influence: FloatArray,
    num_targets: npt.NDArray[np.int32],
    labels: InfluenceLabels,
    num_rows: int,
    *,
    temperature: float,
    selection_seed: int,
    round_number: int,
    hashes: Hashes | None = None,
    max_copies: int | None = None,
    random_share: float = 0.0,
    quota: Quota | None = None,
) -> SelectedRows:
    """The select stage of a round: the rows to train on next, in training order.

    A pure function of what a round directory holds, so that anyone can recompute a finished round's selection. The
    budget is rows, so a candidate is worth `row_worth`; the temperature's unit is the standard deviation of the same
    over the probed candidates. The limit on copies comes after the noise: of a text, the best `max_copies` stay.

    Args:
        candidates: (M,) int64 pool rows to choose from.
        influence: (M,) float32 predicted influence of each, > 0 helps, higher is better.
        num_targets: (M,) int32 trained tokens of each; rows without any come last.
        labels: Measured influence of the round's probes.
        num_rows: Number k of rows to choose.
        temperature: Temperature of the Gumbel noise; 0 takes the best.
        selection_seed: Selection seed of the run.
        round_number: Number of the round; with `selection_seed` it seeds noise, ties and training order.
        hashes: (M,) uint64 of `copies.row_hashes`, equal for copies of a text; None where they are not known.
        max_copies: Largest number of copies of a text that are chosen; needs `hashes`. Where the texts do not suffice
            for k rows, further copies follow, the best first. None sets no limit.
        random_share: Share of the k rows that is drawn at random, each candidate alike, from those that are not chosen
            by their worth; rounded to whole rows.
        quota: Bounds of what each group of candidates gets of the k rows; None sets none. Rows without a trained token
            and copies that are not chosen do not count for a group.

    Returns:
        The rows, and what was found of copies.

    Raises:
        ValueError: k, temperature or share out of range, arrays of different lengths, or a limit without hashes.
        InfluenceError: influence is not finite, or the labels rank no row.
    """
    return rows_by_worth(
        candidates,
        influence,
        num_targets,
        label_unit(labels),
        num_rows,
        temperature=temperature,
        selection_seed=selection_seed,
        round_number=round_number,
        hashes=hashes,
        max_copies=max_copies,
        random_share=random_share,
        quota=quota,
    )


def label_unit(labels: InfluenceLabels) -> float:
    """The temperature's unit: the standard deviation of what the probed candidates are worth.

    Args:
        labels: Measured influence of a round's probes.

    Returns:
        A number above 0.

    Raises:
        InfluenceError: the labels rank no row.
    """
    unit = float(np.std(row_worth(labels.influence_per_token, labels.num_tokens)))
    if not (math.isfinite(unit) and unit > 0):
        raise InfluenceError(
            f"The labels' standard deviation, the temperature's unit, must be a finite number above 0, got {unit}: "
            "all probed candidates are worth the same. Check that they differ and that the learning rate is not 0."
        )
    return unit * float(labels.step_size)


def rows_by_worth(
    candidates: IntArray,
    influence: FloatArray,
    num_targets: npt.NDArray[np.int32],
    unit: float,
    num_rows: int,
    *,
    temperature: float,
    selection_seed: int,
    round_number: int,
    hashes: Hashes | None = None,
    max_copies: int | None = None,
    random_share: float = 0.0,
    quota: Quota | None = None,
) -> SelectedRows:
    """`select_rows` for labels of which only their `label_unit` is at hand; buffers of a stream are chosen from by it.

    Args:
        candidates: As for `select_rows`.
        influence: As for `select_rows`, in the unit of the labels.
        num_targets: As for `select_rows`.
        unit: `label_unit` of the labels.
        num_rows: As for `select_rows`.
        temperature: As for `select_rows`.
        selection_seed: As for `select_rows`.
        round_number: Number that seeds noise, ties and training order: of a round, or of a buffer of a stream.
        hashes: As for `select_rows`.
        max_copies: As for `select_rows`.
        random_share: As for `select_rows`.
        quota: As for `select_rows`.

    Returns:
        The rows, and what was found of copies.
    """
    _check(candidates, influence, num_targets, num_rows, hashes, max_copies, temperature, random_share)
    values = row_worth(influence, num_targets)
    values /= unit
    trainable = np.greater(num_targets, 0)
    num_trainable = int(np.count_nonzero(trainable))
    seed = stage_seed(selection_seed, round_number, "select")
    if num_trainable < len(values):
        values = values[trainable]
    num_random = round(random_share * num_rows)
    k = min(num_rows - num_random, num_trainable)
    if temperature and 0 < k < num_trainable:
        values = noisy(values, temperature, seed)
    num_repeated = 0 if hashes is None else len(find_copies(hashes))
    copies = np.zeros(0, np.int64)
    if num_repeated and hashes is not None and max_copies is not None:
        copies = find_copies(hashes if num_trainable == len(hashes) else hashes[trainable], values, max_copies)
    num, share_seed = min(num_rows, num_trainable), stage_seed(selection_seed, round_number, "random_share")
    if quota is not None:
        limits = _limits(quota, trainable, copies, num_rows)
        chosen = best_within(values, quota.codes[trainable], limits, (k, num), (seed, share_seed), copies)
        lowest = values[chosen].min(initial=np.inf)
        num_passed_over = int(np.count_nonzero(values[np.setdiff1d(copies, chosen)] > lowest))
    else:
        chosen, num_passed_over = _largest_without(values, k, seed, copies)
        if num_random:
            chosen = _filled_up(values, chosen, copies, num, share_seed)
    del values
    if num_trainable < len(trainable):
        chosen = nth_true(trainable, chosen)
    if len(chosen) < num_rows:
        chosen = np.concatenate([chosen, np.flatnonzero(num_targets == 0)[: num_rows - len(chosen)]])
    order = np.random.default_rng(stage_seed(selection_seed, round_number, "order")).permutation(len(chosen))
    return SelectedRows(candidates[chosen[order]].astype(np.int64), num_repeated, num_passed_over, num_random)


def _check(
    candidates: IntArray,
    influence: FloatArray,
    num_targets: npt.NDArray[np.int32],
    num_rows: int,
    hashes: Hashes | None,
    max_copies: int | None,
    temperature: float,
    random_share: float,
) -> None:
    """Refuse arrays that do not fit, settings out of range and influence that is not finite."""
    if not len(candidates) == len(influence) == len(num_targets) >= num_rows >= 0:
        raise ValueError(
            "`candidates`, `influence` and `num_targets` must be of one length, at least `num_rows`, got "
            f"{len(candidates)}, {len(influence)} and {len(num_targets)} for {num_rows} rows."
        )
    if (hashes is None and max_copies is not None) or (hashes is not None and len(hashes) != len(candidates)):
        raise ValueError(
            f"`hashes` must have one entry a candidate ({len(candidates)}) where `max_copies` is a number, got "
            f"{'none' if hashes is None else len(hashes)}."
        )
    check_temperature(temperature)
    if not 0 <= random_share <= 1:
        raise ValueError(f"`random_share` must be in [0, 1], got {random_share!r}.")
    finite = np.isfinite(influence)
    if not finite.all():
        raise InfluenceError(
            f"Predicted influence must be finite; that of {len(finite) - int(np.count_nonzero(finite))} of "
            f"{len(finite)} candidates is not, first candidate_id {candidates[~finite][:8].tolist()}. Look at how "
            "these candidates were predicted."
        )


def _largest_without(values_N: npt.NDArray[Any], k: int, seed: Seed, copies: IntArray) -> tuple[IntArray, int]:
    """`largest` of all but some positions, and of these only what is missing; and how many of them were in the way.

    Values at the positions in `copies` are overwritten.
    """
    left_out = values_N[copies]
    values_N[copies] = -np.inf
    chosen = largest(values_N, min(k, len(values_N) - len(copies)), seed)
    in_the_way = left_out > values_N[chosen].min(initial=np.inf)
    if len(chosen) < k:
        more = largest(left_out, k - len(chosen), seed)
        in_the_way[more] = False
        chosen = np.sort(np.concatenate([chosen, copies[more]]))
    return chosen, int(np.count_nonzero(in_the_way))


def _filled_up(values_N: npt.NDArray[Any], chosen: IntArray, copies: IntArray, num: int, seed: Seed) -> IntArray:
    """Some positions and random other ones, `num` in all; copies only where the rest does not suffice."""
    free = np.ones(len(values_N), np.bool_)
    free[chosen] = False
    free[copies] = False
    found = with_others(chosen, free, num, seed)
    if len(found) < num:
        further = np.setdiff1d(copies, chosen)
        found = np.sort(np.concatenate([found, further[: num - len(found)]]))
    return found


def _limits(
    quota: Quota, trainable: npt.NDArray[np.bool_], copies: IntArray, num_rows: int
) -> tuple[IntArray, IntArray]:
    """(G,) rows that each group must get and may get, of those with a trained token that are no copies."""
    may = trainable.copy()
    may[nth_true(trainable, copies)] = False
    return quota.limits(num_rows, may)
