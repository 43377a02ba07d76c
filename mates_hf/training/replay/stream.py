"""Finished rounds of a stream, and the buffers that were made by them, recomputed from what they left on disk.

Where it is used: under `verify`, which tells a stream's round by its pool. The rules are the run's own: which rows a
buffer sets aside, what a round draws of them, and which rows are the best of a buffer.

Trade-off: a buffer's text is not there any more, so its predictions are checked by their consequences alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.config import BEFORE, MatesConfig
from mates_hf.disk import read_json
from mates_hf.errors import MatesError
from mates_hf.round_files import PROBES_FILE, ROUND_FILE
from mates_hf.selection.stream_buffers import BufferSizes, best, split, whole
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.order import stream_digest
from mates_hf.training.replay.finished import FinishedRound
from mates_hf.training.replay.length import check_length, check_rise
from mates_hf.training.replay.reader import RoundReader, WrongError
from mates_hf.training.stream.files import BufferRecord, files_in, numbered, read_buffer

_ROWS = 2**62  # more than any stream has


def open_round(path: Path, number: int) -> FinishedRound:
    """A finished round, of a pool or of a stream.

    Args:
        path: its directory.
        number: Number of the round.

    Returns:
        The round, to be checked.

    Raises:
        WrongError: its `round.json` is not what it must be.
    """
    pool = RoundReader(path).json(ROUND_FILE).get("pool")
    of_stream = isinstance(pool, Mapping) and pool.get("stream") is True
    return (StreamRound if of_stream else FinishedRound)(path, number)


class StreamRound(FinishedRound):
    """A finished round of a stream, which decided by which model buffers are selected from."""

    def check(self, before: FinishedRound | None) -> None:
        """All of it, the cheap first.

        Args:
            before: the round before this one, where it is on disk.

        Raises:
            WrongError: the first thing that is wrong.
        """
        self._check_whole(before)
        self.rows = self.array(self.order_file, np.int64, 0)
        self._check_rule()
        self.labels = self._read_labels()
        self._check_probes(before)
        if before is not None:
            for name in ("pool", "reference"):
                self.same(ROUND_FILE, self.info[name], before.info[name], f"round {before.number}")
            self.same(ROUND_FILE, self.key["config"], before.key["config"], f"round {before.number}")
            for name in ("step", "from_position"):
                what = f"`{name}` after {before.info[name]}, that of round {before.number}"
                self.require(self.info[name] > before.info[name], ROUND_FILE, what, str(self.info[name]))
        check_length(self, before)
        check_rise(self, before)
        self.ends = {}

    def _read_num_pool_rows(self) -> int:
        return _ROWS

    def _scored_files(self) -> list[str]:
        return []

    def _check_rule(self) -> None:
        """The hash is that of the rule, with the model that it names."""
        stream = self.mapping(self.info, "stream", ROUND_FILE)
        scored_by = stream.get("scored_by")
        ok = (scored_by is None) == (self.decision == "own_order")
        what = f"`scored_by` of `stream` as `guard` decided {self.decision}"
        self.require(ok and (self.decision != "select" or scored_by == self.number), ROUND_FILE, what, repr(scored_by))
        folder = self.path.parent / f"round-{scored_by or 0:04d}" / "influence_model"
        if scored_by is not None and not folder.is_dir():
            return  # `keep_rounds` has deleted it
        digest = stream_digest(self.info["weights"], stream, {} if scored_by is None else files_in(folder))
        expected = self.info.get("order_sha256")
        self.require(digest == expected, ROUND_FILE, f"`order_sha256` {digest}, of its rule and model", str(expected))

    def _check_probes(self, before: FinishedRound | None) -> None:
        """The probes are of what earlier buffers have set aside, as seed and round number draw them."""
        ledger, seed = StreamLedger(self.config.selection_seed), self.config.selection_seed
        for number, path in numbered(self.path.parent, "buffer"):
            record = _read(path)
            first, sizes = record.facts["first_row"], BufferSizes(*record.facts["sizes"])
            aside = split(sizes, number, record.facts["num_rows"], seed).set_aside
            ledger.set_aside(number, record.facts["position"], first + aside)
        if before is None and self.number > self.config.random_rounds:
            return  # what was probed before is deleted
        earlier = [*getattr(before, "probed_so_far", []), *([] if before is None else [before.probes])]
        self.probed_so_far = earlier
        for probes in earlier:
            ledger.mark_probed(probes)
        ledger.position = int(self.info["cursor"])
        try:
            draw = ledger.draw(
                round_number=self.number,
                num_selected=0,
                selection_ratio=1.0,
                candidate_scope="slice",
                num_probes=self.config.num_probes,
            )
        except MatesError as error:
            raise WrongError(PROBES_FILE, "rows that buffers have set aside", str(error)) from error
        self._first_difference(PROBES_FILE, np.sort(draw.probes), np.sort(self.probes), "what buffers and seed draw")


def check_buffers(rounds_dir: Path) -> None:
    """The buffers of a run follow one another, each made by the round that it must be, as its scores give.

    Args:
        rounds_dir: where the run's rounds are; without a stream nothing is done.

    Raises:
        WrongError: the first thing that is wrong.
    """
    rounds = _rounds(rounds_dir)
    before: BufferRecord | None = None
    for number, path in numbered(rounds_dir, "buffer"):
        record = _read(path)
        expected = 0 if before is None else before.facts["number"] + 1
        require = RoundReader.require
        require(number == record.facts["number"] == expected, path.name, f"buffer {expected}", str(number))
        if before is not None:
            position = before.facts["position"] + len(before.selection)
            what = f"`position` {position}, where the rows of buffer {number - 1} end"
            require(record.facts["position"] == position, path.name, what, str(record.facts["position"]))
        if rounds:
            _check_buffer(path.name, record, rounds)
        before = record


def _check_buffer(name: str, record: BufferRecord, rounds: list[dict[str, Any]]) -> None:
    """Rows and order of a buffer are what seed, round and scores give."""
    facts, require = record.facts, RoundReader.require
    config = MatesConfig(**{**BEFORE, **rounds[0]["config"]})
    rows = split(BufferSizes(*facts["sizes"]), facts["number"], facts["num_rows"], config.selection_seed).candidates
    same = np.array_equal(record.rows, facts["first_row"] + rows)
    require(same, name, "the rows that its number and the seed do not set aside", f"{len(record.rows)} others")
    in_force = [each for each in rounds if each["from_position"] <= facts["position"]]
    if rounds[0]["number"] > config.random_rounds and not in_force:
        return  # made by a round that is deleted
    info: dict[str, Any] = in_force[-1] if in_force else {"number": -1, "stream": {"scored_by": None}}
    what = f"`round` {info['number']}, which is in force at its position"
    require(facts["round"] == info["number"], name, what, str(facts["round"]))
    if info["stream"]["scored_by"] is None or not len(rows):
        expected = whole(rows, facts["number"], config.selection_seed)
    else:
        there = record.influence is not None and record.num_targets is not None
        require(there, name, "predicted influence of its rows", "none")
        assert record.influence is not None
        assert record.num_targets is not None
        try:
            unit = info["stream"]["unit"]
            expected = best(
                config, facts["number"], rows, record.influence, record.num_targets, record.hashes, unit
            ).rows
        except (MatesError, ValueError) as error:
            raise WrongError(name, "predicted influence that can be selected on", str(error)) from error
    found = record.selection - facts["first_row"]
    wrong = np.flatnonzero(expected != found) if len(expected) == len(found) else np.array([0])
    require(not len(wrong), name, "the rows that scores and seed give, in their order", f"{len(wrong)} others")


def _read(path: Path) -> BufferRecord:
    try:
        return read_buffer(path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WrongError(path.name, "the record of a buffer", str(error)) from error


def _rounds(rounds_dir: Path) -> list[dict[str, Any]]:
    """`round.json` of each finished round, ascending."""
    found = [read_json(path) for path in sorted(rounds_dir.glob(f"round-????/{ROUND_FILE}"))]
    return [info for info in found if "stream" in info]
