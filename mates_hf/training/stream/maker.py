"""Makes a buffer of a stream: sets rows aside, scores the others, chooses, writes down and spools.

Where it is used: `stream/sampler`, in each process of a run, with the same result in all of them. The main process
writes what stays beside the rounds. Trade-off: each process scores the whole buffer, which takes a few percent of what
reading it takes, and needs no collective inside of a data loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.data.spool import Spool
from mates_hf.data.stream_pool import StreamPool, take_rows
from mates_hf.data.stream_reader import RawBuffer
from mates_hf.data.stream_source import StreamSource
from mates_hf.disk import make_directory
from mates_hf.records import IntArray
from mates_hf.selection.select_stage import SelectedRows
from mates_hf.selection.stream_buffers import BufferSizes, best, split, whole
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.disk_errors import DiskError, disk_errors_named
from mates_hf.training.run import Run
from mates_hf.training.stream.files import BufferRecord, stream_dir, write_aside, write_buffer
from mates_hf.training.stream.rules import Rule, ScoredBuffer, score


class BufferMaker:
    """Makes the buffers of a run.

    Args:
        run: the run's state, of a stream.
        sizes: Sizes of its buffers.
        spool: Where chosen rows go.

    Attributes:
        source: the stream.
    """

    def __init__(self, run: Run, sizes: BufferSizes, spool: Spool) -> None:
        assert isinstance(run.pool, StreamPool)
        assert isinstance(run.ledger, StreamLedger)
        self.run, self.sizes, self.spool = run, sizes, spool
        self._pool, self._ledger = run.pool, run.ledger
        self.source: StreamSource = run.pool.stream.source

    def begin(self) -> None:
        """Make the folders; whatever an earlier start left in that of the spool goes."""
        with _spooling(self.spool.folder):
            self.spool.clear()
        self._pool.stream.spool = self.spool
        if self.run.processes.is_main:
            make_directory(stream_dir(self.run.rounds_dir))

    def make(self, raw: RawBuffer, position: int, rule: Rule) -> IntArray:
        """Make a buffer, and have its rows at hand where they are trained on.

        Args:
            raw: The buffer as it was read.
            position: Pool rows before its first.
            rule: How it is selected from.

        Returns:
            (k,) int64 numbers in the stream of the rows to train on, in order.
        """
        with self.run.processes.together():
            return self._make(raw, position, rule)

    def _make(self, raw: RawBuffer, position: int, rule: Rule) -> IntArray:
        config, first_row = self.run.config, raw.number * self.sizes.rows
        aside, candidates = split(self.sizes, raw.number, len(raw.table), config.selection_seed)
        scored: ScoredBuffer | None = None
        if rule.scorer is None or not len(candidates):
            selected = SelectedRows(whole(candidates, raw.number, config.selection_seed), 0, 0)
        else:
            scored = score(self.run, rule, raw.table, first_row).take(candidates)
            selected = best(config, raw.number, candidates, *scored, rule.unit)
        rows = first_row + selected.rows
        held = take_rows(raw.table, aside)
        if len(aside):
            self.hold_in(self.run, raw.number, position, first_row + aside, held)
        if self.run.processes.is_main:
            places = np.full(len(candidates), -1, np.int64)
            places[np.searchsorted(candidates, selected.rows)] = np.arange(len(selected.rows))
            facts = {
                "number": raw.number,
                "position": position,
                "round": rule.number,
                "sizes": list(self.sizes),
                "num_rows": len(raw.table),
                "first_row": first_row,
                "num_repeated": selected.num_repeated,
                "num_passed_over": selected.num_passed_over,
                "num_random": selected.num_random,
            }
            record = BufferRecord(facts, first_row + candidates, places, *(scored or ()))
            with disk_errors_named(self.run.rounds_dir):
                if len(aside):
                    write_aside(self.run.rounds_dir, raw.number, position, first_row + aside, held)
                write_buffer(self.run.rounds_dir, record)
        if len(rows):
            with _spooling(self.spool.folder):
                chosen = np.sort(selected.rows)
                self.spool.write(raw.number, first_row + chosen, take_rows(raw.table, chosen))
        return rows

    @staticmethod
    def hold_in(run: Run, number: int, position: int, rows: IntArray, table: Any) -> None:
        """Have the rows that a buffer sets aside at hand, for a round to probe."""
        assert isinstance(run.pool, StreamPool)
        assert isinstance(run.ledger, StreamLedger)
        run.ledger.set_aside(number, position, rows)
        run.pool.hold(number, rows, table)

    def passed(self, position: int) -> None:
        """Take note of how many pool rows are trained on; what no round can probe any more is let go."""
        self._ledger.position = position
        oldest = self._ledger.oldest_kept(self.run.config.num_probes)
        if oldest:
            self._ledger.let_go_before(oldest)
            self._pool.let_go_before(oldest)


@contextlib.contextmanager
def _spooling(folder: Path) -> Iterator[None]:
    """What a disk refuses inside ends the run with the folder's name and the way out."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"Rows of a stream must be written to `{folder}`, which failed: {error}. Free some space there, set "
            "`spool_dir` of the MatesStream to a folder that can be written to, or lower `buffer_rows`."
        ) from error
