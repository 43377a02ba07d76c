"""What a round finds of texts that are there more than once: among its candidates, and in the reference task.

Where it is used: under `rounds`, in the main process. The score stage asks for hashes of the rows it reads, the
select stage for what `round.json` says of copies and of selected rows that share tokens with the reference task.

Trade-off: rows that share text with the reference are recorded and warned of, never dropped: a pool may hold the
reference's domain rightly, and the run's data order stays what scores and seed give.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mates_hf.data.batches import PLAIN
from mates_hf.data.rows import TokenRows
from mates_hf.data.token_overlap import NGRAM_TOKENS, TokenNgramIndex
from mates_hf.records import IntArray
from mates_hf.selection.copies import Hashes, end_tokens, other_inputs, own_hashes, row_hashes
from mates_hf.selection.select_stage import SelectedRows
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 8  # rows that are named


class CopyMarks:
    """Tells which of a run's rows are one text.

    Args:
        run: the run's state. Where its collator gives more than tokens, every row is a text of its own.
    """

    def __init__(self, run: Run) -> None:
        self.ends = end_tokens(run.tokenizer, getattr(run.model, "config", None))
        reading = run.pool.reading or PLAIN
        known = {reading.mask_key, *reading.constants}
        self.others = [name for name in other_inputs(run.pool.dataset, run.pool.collate_fn) if name not in known]
        if self.others and run.config.max_copies is not None:
            logger.info(
                "`max_copies` has no effect: rows of equal tokens may differ in `%s`.", "`, `".join(self.others)
            )

    def hashes(self, rows: TokenRows, ids: IntArray) -> Hashes:
        """(N,) uint64, equal for rows of one text; `ids` are their pool rows."""
        return own_hashes(ids) if self.others else row_hashes(rows, ids, self.ends)


def selection_facts(run: Run, selected: SelectedRows, num_candidates: int, number: int) -> dict[str, Any]:
    """What `round.json` says of copies and of rows shared with the reference task.

    Args:
        run: the run's state; it keeps the reference task's index, which is made once.
        selected: what the round chose.
        num_candidates: how many it chose from.
        number: the round.

    Returns:
        `num_random`, selected rows that were drawn at random; `repeated_share`, of the candidates whose text an
        earlier candidate has too; `num_passed_over`, copies left out that are worth more than the least row selected
        by worth; and `reference_overlap`: how many selected rows share a run of tokens with a passage, their share,
        the length of the run, a few of the rows, and how many passages are too short to be looked for.
    """
    if run.reference_overlap is None:
        run.reference_overlap = TokenNgramIndex(run.reference.rows)
    shared = run.reference_overlap.shared_of(run.pool, selected.rows)
    share = len(shared) / max(1, len(selected.rows))
    # Once a run is enough to act on; what later rounds find is in their records and metrics.
    if len(shared) and not run.overlap_told:
        run.overlap_told = True
        logger.warning(
            "Round %d selected %d rows of %d (%.2g %%) that share a run of %d tokens with the reference task, first "
            "pool rows %s. What is measured on the reference task is trained on there. "
            "`mates_hf.data.token_overlap.shared_rows(dataset, reference)` gives all such rows of a dataset, to leave "
            "out before the run. Later rounds record theirs as `reference_overlap`.",
            number, len(shared), len(selected.rows), 100 * share, NGRAM_TOKENS, shared[:NUM_EXAMPLES].tolist(),
        )  # fmt: skip
    return {
        "repeated_share": selected.num_repeated / max(1, num_candidates),
        "num_passed_over": selected.num_passed_over,
        "num_random": selected.num_random,
        "reference_overlap": {
            "rows": len(shared),
            "share": share,
            "ngram": NGRAM_TOKENS,
            "examples": np.asarray(shared[:NUM_EXAMPLES]).tolist(),
            "num_short_passages": run.reference_overlap.num_short,
        },
    }
