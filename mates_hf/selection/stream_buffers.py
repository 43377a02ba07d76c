"""Buffers of a stream: their rows, those that each sets aside, and the order in which the others are trained on.

Where it is used: `training/stream/sampler` makes the buffers of a run by it, `training/replay/stream` makes them again
from what they left. Selection is the best share of each buffer: an exact ratio, no threshold to estimate, and memory
for one buffer. Trade-off: the best of a buffer are worse than the best of the whole stream, and a text that is in two
buffers can be chosen in both.

Everything here is a function of settings, seeds and the number of a buffer, so neither workers nor processes nor a
resume change a row.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.config import MatesConfig
from mates_hf.errors import UnsupportedSettingError
from mates_hf.records import FloatArray, IntArray
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.copies import Hashes
from mates_hf.selection.plan import RunPlan
from mates_hf.selection.select_stage import SelectedRows, rows_by_worth


class BufferSizes(NamedTuple):
    """Rows of each buffer of a run.

    Attributes:
        rows: Number of rows that are read.
        set_aside: Number of them that are never trained on, for rounds to probe.
        kept: Number of the others that are trained on where the buffer is selected from; else all others are.
    """

    rows: int
    set_aside: int
    kept: int

    @property
    def candidates(self) -> int:
        """Number of rows that may be trained on."""
        return self.rows - self.set_aside


def sizes_for(most_rows: int, config: MatesConfig, step_rows: int) -> BufferSizes:
    """The buffers of a run.

    A buffer in the own order has no more rows than the shortest round, so that each round's model takes effect before
    the next one's. Buffers set aside what the shortest round that selects probes, and what the first one does.

    Args:
        most_rows: Largest number of rows of a buffer.
        config: Settings of the run.
        step_rows: Rows of an optimizer step.

    Returns:
        The sizes.

    Raises:
        UnsupportedSettingError: no buffer of so few rows has rows to choose from and rows to probe.
    """
    shortest = config.shortest_steps * step_rows
    before_first = config.random_rounds * config.update_steps * step_rows
    share = config.num_probes * max(config.selection_ratio / shortest, 1 / before_first)  # probes a candidate
    candidates = min(shortest, math.floor(most_rows / (1 + share)))
    kept = _share(candidates, config.selection_ratio)
    if kept < 1 or candidates < 2:
        least = math.ceil((1 / config.selection_ratio + 2) * (1 + share))
        raise UnsupportedSettingError(
            f"Buffers of a stream must have rows to choose from and rows to probe, but of `buffer_rows` ({most_rows}) "
            f"and the {shortest} rows of the shortest round no row would be kept (`selection_ratio` "
            f"{config.selection_ratio}, `num_probes` {config.num_probes}). Set `buffer_rows` to {least} or more and "
            "`first_round_steps` or `update_steps` to more, or lower `num_probes`."
        )
    set_aside = math.ceil(candidates * share)
    return BufferSizes(candidates + set_aside, set_aside, kept)


class BufferRows(NamedTuple):
    """The rows of a buffer, by their places in it, each ascending int64.

    Attributes:
        set_aside: never trained on.
        candidates: all others.
    """

    set_aside: IntArray
    candidates: IntArray


def split(sizes: BufferSizes, number: int, num_rows: int, seed: int) -> BufferRows:
    """Which rows of a buffer are set aside.

    Args:
        sizes: Sizes of the run's buffers.
        number: Number of the buffer.
        num_rows: Rows that it has; the last one of a stream may have fewer than others.
        seed: Selection seed of the run.

    Returns:
        The rows.
    """
    drawn = np.random.default_rng(stage_seed(seed, number, "aside")).permutation(sizes.rows)
    is_aside = np.zeros(sizes.rows, np.bool_)
    is_aside[drawn[: sizes.set_aside]] = True
    is_aside = is_aside[:num_rows]
    return BufferRows(np.flatnonzero(is_aside), np.flatnonzero(~is_aside))


def whole(rows: IntArray, number: int, seed: int) -> IntArray:
    """The candidates of a buffer in the own order of a stream: all of them, shuffled inside the buffer."""
    shuffled: IntArray = rows[np.random.default_rng(stage_seed(seed, number, "whole")).permutation(len(rows))]
    return shuffled


def best(
    config: MatesConfig,
    number: int,
    rows: IntArray,
    influence: FloatArray,
    num_targets: npt.NDArray[np.int32],
    hashes: Hashes | None,
    unit: float,
) -> SelectedRows:
    """The rows of a buffer that is selected from, in training order.

    Args:
        config: Settings of the run.
        number: Number of the buffer.
        rows: (C,) int64 its candidates.
        influence: (C,) float32 predicted influence of each in the labels' unit, > 0 helps.
        num_targets: (C,) int32 trained tokens of each.
        hashes: (C,) uint64, equal for copies of a text; None where they are not known.
        unit: `label_unit` of the labels.

    Returns:
        The rows, and what was found of copies in the buffer.
    """
    return rows_by_worth(
        rows,
        influence,
        num_targets,
        unit,
        min(max(_share(len(rows), config.selection_ratio), 1), len(rows)),
        temperature=config.temperature,
        selection_seed=config.selection_seed,
        round_number=number,
        hashes=hashes,
        max_copies=config.max_copies,
        random_share=config.random_share,
    )


def _share(num: int, ratio: float) -> int:
    """A share of some rows, rounded down; exact for the decimal that the ratio was written as."""
    return math.floor(num * Fraction(repr(float(ratio))))


def rows_read(plan: RunPlan, sizes: BufferSizes, max_steps: int) -> int:
    """Rows of a stream that a run reads which selects from its first selection on, at least.

    Args:
        plan: The plan of the run.
        sizes: Sizes of its buffers.
        max_steps: Its optimizer steps.

    Returns:
        Whole buffers of rows.
    """
    start = plan.first_step * plan.batch_rows
    own = min(plan.first_from_step, max_steps) * plan.batch_rows - start
    selected = max(max_steps * plan.batch_rows - start - own, 0)
    num_own = math.ceil(own / sizes.candidates)
    selected = max(selected - (num_own * sizes.candidates - own), 0)
    return (num_own + math.ceil(selected / sizes.kept)) * sizes.rows


def require_rows(plan: RunPlan, sizes: BufferSizes, num_rows: int | None) -> None:
    """Refuse a run for which a stream of known length has too few rows.

    Args:
        plan: The plan of the run.
        sizes: Sizes of its buffers.
        num_rows: Rows of the stream; None where that is not known.

    Raises:
        ValueError: says how many rows the run reads, and the largest `max_steps` that fits.
    """
    needed = rows_read(plan, sizes, plan.max_steps)
    if num_rows is None or needed <= num_rows:
        return
    low, high = plan.first_step, plan.max_steps
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if rows_read(plan, sizes, middle) <= num_rows else (low, middle)
    raise ValueError(
        f"The stream must have rows for the whole run, which reads {needed} of them (buffers of {sizes.rows} rows, of "
        f"which a selection trains on {sizes.kept}), got {num_rows}. Set `max_steps` to {max(low, 1)} or less (got "
        f"{plan.max_steps}), raise `selection_ratio`, or give it more files."
    )
