"""By what a stream's buffers are selected from: a round's influence model, from a position on.

Where it is used: `stream/sampler` asks for the rule of each buffer it makes. A round of a stream decides no rows, only
by which model the rows to come are chosen (`stream/rounds`). Trade-off: each process needs that model, so its files
travel with the order, also to machines that do not see the folder of the rounds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mates_hf.data.pool import CandidatePool
from mates_hf.data.stream_pool import buffer_pool
from mates_hf.records import FloatArray, IntArray
from mates_hf.selection.copies import Hashes
from mates_hf.training.order import Files, Order
from mates_hf.training.run import InfluenceModel, Run
from mates_hf.training.scoring import SCORE_ROWS, SCORE_TOKENS


class Rule(NamedTuple):
    """From a position on, how buffers are selected from.

    Attributes:
        number: Number of the round that decided it; -1 before the first.
        from_position: pool rows before the first buffer that it may hold for.
        scorer: the influence model; None is the own order.
        scale: what its predictions are multiplied by, to be in the unit of the round's labels.
        unit: `label_unit` of those.
    """

    number: int = -1
    from_position: int = 0
    scorer: InfluenceModel | None = None
    scale: float = 1.0
    unit: float = 1.0

    @classmethod
    def of(cls, run: Run, order: Order) -> Rule:
        """The rule of a round, whose influence model is read from the files that came with it."""
        stream = order.info["stream"]
        scorer = None if stream["scored_by"] is None else model_of(run, order.files)
        return cls(order.number, order.from_position, scorer, float(stream["scale"]), float(stream["unit"]))


class ScoredBuffer(NamedTuple):
    """Of each row of a buffer predicted influence (float32, > 0 helps), trained tokens and text (uint64)."""

    influence: FloatArray
    num_targets: np.ndarray[Any, np.dtype[np.int32]]
    hashes: Hashes

    def take(self, places: IntArray) -> ScoredBuffer:
        """Some of the rows."""
        return ScoredBuffer(self.influence[places], self.num_targets[places], self.hashes[places])


def score(run: Run, rule: Rule, table: Any, first_row: int) -> ScoredBuffer:
    """Predict the influence of all rows of a buffer; those that it sets aside are few, and rows in order read fast.

    Args:
        run: the run's state.
        rule: with a scorer.
        table: Rows of the buffer, in Arrow.
        first_row: Number of the buffer's first row in the stream.

    Returns:
        The predictions, in the unit of the labels.
    """
    assert rule.scorer is not None
    pool: CandidatePool = buffer_pool(table, run.pool)
    places = np.arange(len(table))
    influence, num_targets = np.zeros(len(table), np.float32), np.zeros(len(table), np.int32)
    hashes, start = np.zeros(len(table), np.uint64), 0
    for rows in pool.chunks(places, SCORE_ROWS, max_tokens=SCORE_TOKENS):
        span = slice(start, start + len(rows))
        influence[span] = rule.scorer.predict(rows)
        num_targets[span] = rows.num_targets
        hashes[span] = run.copy_marks.hashes(rows, first_row + places[span])
        start = span.stop
    return ScoredBuffer(influence * np.float32(rule.scale), num_targets, hashes)


def model_of(run: Run, files: Files) -> InfluenceModel:
    """The influence model whose files these are."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.tobytes())
        model: InfluenceModel = type(run.influence_model).from_pretrained(folder)
    return model
