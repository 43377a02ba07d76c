"""How long a round's candidates take, where each is read or run by itself: known before the first optimizer step.

Where it is used: `start` calls `check_scoring_time` once a run is put together. An influence model that reads
each candidate by itself says how long so many would take (`seconds_to_score`), and how long they may (`max_seconds`).

Trade-off: a few rows are run twice, in the process that asks. Rows of other lengths take other times, so it is an
estimate.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np

from mates_hf.data.columns import fixed_positions
from mates_hf.selection.plan import RunPlan, num_candidates
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.run import Run, reads_examples

logger = logging.getLogger(__name__)

_NUM_ROWS = 64  # that are run


def check_scoring_time(run: Run, plan: RunPlan) -> None:
    """Refuse a run whose rounds would score their candidates for longer than its influence model allows.

    All processes must call it.

    Args:
        run: The run's state.
        plan: When its rounds happen.

    Raises:
        ValueError: the candidates of one round would take too long; says how long, and a setting that fits.
    """
    estimate: Any = getattr(run.influence_model, "seconds_to_score", None)
    if estimate is None or not plan.rounds or isinstance(run.ledger, StreamLedger):
        return
    config, limit = run.config, getattr(run.influence_model, "max_seconds", None)
    num_selected = max(planned.num_rows for planned in plan.rounds)
    in_slice = min(num_candidates(num_selected, config.selection_ratio), len(run.pool))
    num = len(run.pool) if config.candidate_scope == "pool" else in_slice
    ids = run.pool.candidate_ids[fixed_positions(len(run.pool), _NUM_ROWS)]
    shared = reads_examples(run.influence_model)
    rows = run.pool.candidates(ids) if shared else run.pool.token_rows(ids)
    each = estimate(rows, 1) / (run.processes.size if shared else 1)
    # One number for all processes, or some would refuse and others wait for them.
    each = float(run.processes.sum(np.array([each]))[0]) / run.processes.size
    seconds = each * num
    if limit is not None and seconds > limit:
        raise ValueError(
            f"Scoring the {num:,} candidates of one round must take at most `max_seconds={limit:g}`, and would take "
            f"about {seconds:,.0f} s, as was measured on a few rows. "
            f"{_way_out(config, each, num_selected, in_slice, limit)}"
        )
    tell = logger.warning if config.candidate_scope == "pool" and limit is None else logger.info
    if run.processes.is_main:
        tell(
            "%s scores the %d candidates of a round in about %.0f s. `max_seconds` sets a limit.",
            type(run.influence_model).__name__, num, seconds,
        )  # fmt: skip


def _way_out(config: Any, each: float, num_selected: int, in_slice: int, limit: float) -> str:
    """A setting with which scoring takes no longer than it may."""
    if config.candidate_scope == "pool" and each * in_slice <= limit:
        return "Set `candidate_scope='slice'`."
    ratio = math.ceil(100 * 1.2 * num_selected * each / limit) / 100
    if ratio <= 1:
        slice_ = "`candidate_scope='slice'` and " if config.candidate_scope == "pool" else ""
        return f"Set {slice_}`selection_ratio={ratio:g}`."
    return (
        f"Set `max_seconds` to {math.ceil(1.2 * each * in_slice):,} or more, or make rounds shorter (`update_steps`)."
    )
