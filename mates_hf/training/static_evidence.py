"""Static evidence of a run: log-odds of the reference task against the pool, counted once and given to every fit.

Where it is used: `rounds` gives it to an influence model that counts it and whose `fit` takes it
(`NgramInfluenceModel`), which shrinks towards as much of it as the labels agree with, and counts it beside them in
what is predicted. With it a few labels choose as many do without it (docs/LOG.md). Where a run has a `score_column`,
that stands in its place beside the labels.

Trade-off: a sample stands for a large pool. Two million tokens know the usual bigrams, and reading more would take
longer than a round's fit.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from mates_hf.data.rows import TokenRows
from mates_hf.prediction.moore_lewis import background_rows
from mates_hf.selection.choose import stage_seed
from mates_hf.training.run import Run


def evidence_for(run: Run) -> dict[str, Any]:
    """What the fit of a round's influence model is given besides labels.

    Args:
        run: the run's state, which keeps what was counted.

    Returns:
        The arguments `evidence` and `evidence_weight` of the fit, or nothing where the model counts none, its `fit`
        does not name it, or the reference task has no text. One that takes whatever it is given may hand it on to one
        that does not.
    """
    model: Any = run.influence_model
    known = inspect.signature(model.fit).parameters
    if not run.reference.is_text or not hasattr(model, "count_evidence") or "evidence" not in known:
        return {}
    if run.evidence is None:
        run.evidence = model.count_evidence(run.reference.weighted_rows, _background(run))
    beside = run.config.score_column is None or "evidence_weight" not in known
    return {"evidence": run.evidence, **({} if beside else {"evidence_weight": 0.0})}


def _background(run: Run) -> TokenRows:
    """Rows of the pool that may be trained on; the same whenever a run counts them."""
    pool, blocked = run.pool, None if run.blocked is None else run.blocked.mask
    rng = np.random.default_rng(stage_seed(run.config.selection_seed, 0, "evidence"))
    if blocked is None:
        return background_rows(len(pool), pool.token_rows, rng)
    may = np.flatnonzero(~blocked)
    return background_rows(len(may), lambda places: pool.token_rows(may[places]), rng)
