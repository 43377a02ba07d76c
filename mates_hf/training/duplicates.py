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
from mates_hf.data.feeds import CollatedRows
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.data.token_overlap import NGRAM_TOKENS, TokenNgramIndex
from mates_hf.records import IntArray
from mates_hf.selection.copies import Hashes, end_tokens, other_inputs, own_hashes, row_hashes
from mates_hf.selection.select_stage import SelectedRows
from mates_hf.training.run import Run

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 8  # rows that are named


class CopyMarks:
    """Tells which of a run's rows are one text, or have the same inputs.

    Args:
        run: the run's state. Where its rows are more than text, those of equal bytes in all inputs are copies,
            whatever their labels. Where its collator gives other inputs beside tokens, every row is a text of its own.
    """

    def __init__(self, run: Run) -> None:
        self.ends = end_tokens(run.tokenizer, getattr(run.model, "config", None))
        reading = run.pool.reading or PLAIN
        known = {reading.mask_key, *reading.constants}
        self.pool, self.others = run.pool, []
        if not run.pool.beyond_text:
            self.others = [name for name in other_inputs(run.pool.dataset, run.pool.collate_fn) if name not in known]
        if self.others and run.config.max_copies is not None:
            logger.info(
                "`max_copies` has no effect: rows of equal tokens may differ in `%s`.", "`, `".join(self.others)
            )

    def hashes(self, rows: Any, ids: IntArray) -> Hashes:
        """(N,) uint64, equal for copies; `rows` are text or as the model is fed them, `ids` their pool rows."""
        if isinstance(rows, CollatedRows):
            return rows.hashes
        if self.pool.beyond_text:
            return self.pool.input_hashes(ids)
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
        the length of the run, a few of the rows, and how many passages are too short to be looked for. Of a task of
        examples: how many selected rows have the inputs of one of them, with None as the length.
    """
    if run.reference_overlap is None:
        run.reference_overlap = _index_of(run)
    shared = run.reference_overlap.shared_of(run.pool, selected.rows)
    share = len(shared) / max(1, len(selected.rows))
    if len(shared) and not run.overlap_told:
        run.overlap_told = True  # once a run is enough to act on; what later rounds find is recorded
        _warn_of_overlap(run, shared, len(selected.rows), number)
    return {
        "repeated_share": selected.num_repeated / max(1, num_candidates),
        "num_passed_over": selected.num_passed_over,
        "num_random": selected.num_random,
        "reference_overlap": {
            "rows": len(shared),
            "share": share,
            "ngram": run.reference_overlap.n,
            "examples": np.asarray(shared[:NUM_EXAMPLES]).tolist(),
            "num_short_passages": run.reference_overlap.num_short,
        },
    }


def _warn_of_overlap(run: Run, shared: IntArray, num_selected: int, number: int) -> None:
    """Say once that what is measured on the reference task is trained on, and what to do."""
    of_text = run.reference.is_text
    logger.warning(
        "Round %d selected %d rows of %d (%.2g %%) that share %s with the reference task, first pool rows %s. What is "
        "measured on the reference task is trained on there. %s Later rounds record theirs as `reference_overlap`.",
        number,
        len(shared),
        num_selected,
        100 * len(shared) / max(1, num_selected),
        f"a run of {NGRAM_TOKENS} tokens" if of_text else "all inputs of an example",
        shared[:NUM_EXAMPLES].tolist(),
        "`mates_hf.data.token_overlap.shared_rows(dataset, reference)` gives all such rows of a dataset, to leave out "
        "before the run."
        if of_text
        else "Leave them out of the pool, or take other examples for the task.",
    )


class ExampleIndex:
    """The inputs of some examples, to look rows up in.

    Args:
        hashes: (N,) uint64 of the inputs of each example.

    Attributes:
        n: None, where an index of text has the number of its tokens.
        num_short: 0, where an index of text has the passages that are too short.
    """

    n, num_short = None, 0

    def __init__(self, hashes: Hashes) -> None:
        self._hashes = hashes

    def shared_of(self, pool: CandidatePool, ids: IntArray) -> IntArray:
        """(M,) int64, ascending, those of the pool rows `ids` that have the inputs of an example."""
        rows = np.sort(ids)
        return rows[np.isin(pool.input_hashes(rows), self._hashes)] if len(self._hashes) else rows[:0]


def _index_of(run: Run) -> TokenNgramIndex | ExampleIndex:
    """What selected rows are compared with, to tell which of them share something with the reference task."""
    rows, fed = run.reference.rows, run.reference.fed
    if isinstance(rows, TokenRows):
        return TokenNgramIndex(rows, NGRAM_TOKENS)
    return ExampleIndex(fed.hashes if isinstance(fed, CollatedRows) else np.zeros(0, np.uint64))
